"""vilu: how likely is the answer of a frozen vision-language model wrong?

Public names are imported on first use, so that ``import vilu`` loads neither torch nor a backbone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vilu import metrics
    from vilu.backbones.catalog import load_backbone
    from vilu.datasets.catalog import open_dataset
    from vilu.decision.calibrate import Selector, calibrate
    from vilu.decision.monitor import Monitor
    from vilu.decision.score import score, score_parts
    from vilu.decision.score_folder import ScoreFolder
    from vilu.embeddings.memory import Embeddings, PairEmbeddings
    from vilu.embeddings.pairs import Pools, PseudoCaptions
    from vilu.embeddings.source import Batch, EmbeddingSource
    from vilu.embeddings.space import EmbeddingSpace
    from vilu.outcomes.evaluate import compare, evaluate
    from vilu.outcomes.outcomes import Outcomes
    from vilu.outcomes.results import ResultTable
    from vilu.predictors import (
        LVU,
        MCM,
        PREDICTORS,
        Doctor,
        Entropy,
        FailurePredictor,
        Margin,
        MaxLogit,
        ViLU,
        ViLUPlus,
    )
    from vilu.predictors.convert import convert_official
    from vilu.predictors.storage import load
    from vilu.registry import register
    from vilu.report.explain.explain import explain
    from vilu.report.explain.prompts import prompt_gains
    from vilu.report.explain.risk import risk_map
    from vilu.report.page.build import report_page
    from vilu.store.embed import embed
    from vilu.store.open import open_source
    from vilu.store.reader import EmbeddingStore

__version__ = "0.1.0"

_HOME = {
    "load_backbone": "vilu.backbones.catalog",
    "open_dataset": "vilu.datasets.catalog",
    "calibrate": "vilu.decision.calibrate",
    "Monitor": "vilu.decision.monitor",
    "Selector": "vilu.decision.calibrate",
    "compare": "vilu.outcomes.evaluate",
    "evaluate": "vilu.outcomes.evaluate",
    "explain": "vilu.report.explain.explain",
    "prompt_gains": "vilu.report.explain.prompts",
    "risk_map": "vilu.report.explain.risk",
    "Outcomes": "vilu.outcomes.outcomes",
    "report_page": "vilu.report.page.build",
    "Doctor": "vilu.predictors",
    "Entropy": "vilu.predictors",
    "FailurePredictor": "vilu.predictors",
    "LVU": "vilu.predictors",
    "MCM": "vilu.predictors",
    "Margin": "vilu.predictors",
    "MaxLogit": "vilu.predictors",
    "PREDICTORS": "vilu.predictors",
    "ViLU": "vilu.predictors",
    "ViLUPlus": "vilu.predictors",
    "convert_official": "vilu.predictors.convert",
    "load": "vilu.predictors.storage",
    "register": "vilu.registry",
    "ResultTable": "vilu.outcomes.results",
    "score": "vilu.decision.score",
    "EmbeddingSpace": "vilu.embeddings.space",
    "embed": "vilu.store.embed",
    "open_source": "vilu.store.open",
    "Pools": "vilu.embeddings.pairs",
    "PseudoCaptions": "vilu.embeddings.pairs",
    "ScoreFolder": "vilu.decision.score_folder",
    "score_parts": "vilu.decision.score",
    "EmbeddingStore": "vilu.store.reader",
    "Batch": "vilu.embeddings.source",
    "EmbeddingSource": "vilu.embeddings.source",
    "Embeddings": "vilu.embeddings.memory",
    "PairEmbeddings": "vilu.embeddings.memory",
}

__all__ = [
    "LVU",
    "MCM",
    "PREDICTORS",
    "Batch",
    "Doctor",
    "EmbeddingSource",
    "EmbeddingSpace",
    "EmbeddingStore",
    "Embeddings",
    "Entropy",
    "FailurePredictor",
    "Margin",
    "MaxLogit",
    "Monitor",
    "Outcomes",
    "PairEmbeddings",
    "Pools",
    "PseudoCaptions",
    "ResultTable",
    "ScoreFolder",
    "Selector",
    "ViLU",
    "ViLUPlus",
    "__version__",
    "calibrate",
    "compare",
    "convert_official",
    "embed",
    "evaluate",
    "explain",
    "load",
    "load_backbone",
    "metrics",
    "open_dataset",
    "open_source",
    "prompt_gains",
    "register",
    "report_page",
    "risk_map",
    "score",
    "score_parts",
]


def __getattr__(name: str) -> object:
    if name == "metrics":
        return importlib.import_module("vilu.metrics")
    if name not in _HOME:
        raise AttributeError(f"module 'vilu' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
