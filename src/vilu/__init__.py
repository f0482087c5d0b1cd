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
    from vilu.decision.calibrate import calibrate
    from vilu.decision.monitor import Monitor
    from vilu.decision.selector import Selector
    from vilu.embeddings import Embeddings, PairEmbeddings
    from vilu.evaluation import compare, evaluate
    from vilu.explaining.explain import explain
    from vilu.explaining.prompts import prompt_gains
    from vilu.explaining.risk import risk_map
    from vilu.outcomes import Outcomes
    from vilu.page.build import report_page
    from vilu.pairs import Pools
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
    from vilu.pseudo import PseudoCaptions
    from vilu.results import ResultTable
    from vilu.scores.folder import ScoreFolder
    from vilu.scores.write import score_parts
    from vilu.scoring import score
    from vilu.space import EmbeddingSpace
    from vilu.store.embed import embed
    from vilu.store.open import open_source
    from vilu.store.reader import EmbeddingStore
    from vilu.types import Batch, EmbeddingSource

__version__ = "0.1.0"

_HOME = {
    "load_backbone": "vilu.backbones.catalog",
    "open_dataset": "vilu.datasets.catalog",
    "calibrate": "vilu.decision.calibrate",
    "Monitor": "vilu.decision.monitor",
    "Selector": "vilu.decision.selector",
    "compare": "vilu.evaluation",
    "evaluate": "vilu.evaluation",
    "explain": "vilu.explaining.explain",
    "prompt_gains": "vilu.explaining.prompts",
    "risk_map": "vilu.explaining.risk",
    "Outcomes": "vilu.outcomes",
    "report_page": "vilu.page.build",
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
    "ResultTable": "vilu.results",
    "score": "vilu.scoring",
    "EmbeddingSpace": "vilu.space",
    "embed": "vilu.store.embed",
    "open_source": "vilu.store.open",
    "Pools": "vilu.pairs",
    "PseudoCaptions": "vilu.pseudo",
    "ScoreFolder": "vilu.scores.folder",
    "score_parts": "vilu.scores.write",
    "EmbeddingStore": "vilu.store.reader",
    "Batch": "vilu.types",
    "EmbeddingSource": "vilu.types",
    "Embeddings": "vilu.embeddings",
    "PairEmbeddings": "vilu.embeddings",
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
