"""vilu: how likely is a frozen vision-language model's answer wrong?

Public names are imported on first use, so ``import vilu`` imports neither torch nor a backbone.
This import also leaves the process settings unchanged (docs/architecture.md). ``tune_process``
changes the settings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vilu import methods as methods
    from vilu import metrics as metrics
    from vilu.backbones.catalog import load_backbone as load_backbone
    from vilu.calibration.calibration import Calibration as Calibration
    from vilu.calibration.estimates import Estimate as Estimate
    from vilu.calibration.estimates import estimate as estimate
    from vilu.calibration.monitor.monitor import Monitor as Monitor
    from vilu.calibration.procedure import calibrate_predictor as calibrate_predictor
    from vilu.calibration.rules import Rule as Rule
    from vilu.calibration.rules import certify as certify
    from vilu.calibration.rules import certify_clusters as certify_clusters
    from vilu.calibration.target import Target as Target
    from vilu.datasets.catalog import open_dataset as open_dataset
    from vilu.embeddings.memory import Embeddings as Embeddings
    from vilu.embeddings.memory import PairEmbeddings as PairEmbeddings
    from vilu.embeddings.pairs import Pools as Pools
    from vilu.embeddings.pairs import PseudoCaptions as PseudoCaptions
    from vilu.embeddings.source import Batch as Batch
    from vilu.embeddings.source import EmbeddingSource as EmbeddingSource
    from vilu.embeddings.space import EmbeddingSpace as EmbeddingSpace
    from vilu.embeddings.two_models import TwoModels as TwoModels
    from vilu.errors import OUTSIDE as OUTSIDE
    from vilu.guard.guard import Answer as Answer
    from vilu.guard.guard import Guard as Guard
    from vilu.outcomes.evaluate import compare as compare
    from vilu.outcomes.evaluate import evaluate as evaluate
    from vilu.outcomes.outcomes import Outcomes as Outcomes
    from vilu.outcomes.results import ResultTable as ResultTable
    from vilu.predictors import PREDICTORS as PREDICTORS
    from vilu.predictors.contract.predictor import FailurePredictor as FailurePredictor
    from vilu.predictors.persistence.convert import convert_official as convert_official
    from vilu.predictors.plus.vilu_plus import ViLUPlus as ViLUPlus
    from vilu.predictors.vilu.vilu import LVU as LVU
    from vilu.predictors.vilu.vilu import ViLU as ViLU
    from vilu.predictors.zero_shot import MCM as MCM
    from vilu.predictors.zero_shot import Doctor as Doctor
    from vilu.predictors.zero_shot import Entropy as Entropy
    from vilu.predictors.zero_shot import Margin as Margin
    from vilu.predictors.zero_shot import MaxLogit as MaxLogit
    from vilu.process import tune_process as tune_process
    from vilu.registry import register as register
    from vilu.report.explain.explain import explain as explain
    from vilu.report.explain.prompts import prompt_gains as prompt_gains
    from vilu.report.explain.risk import risk_map as risk_map
    from vilu.report.page.build import report_page as report_page
    from vilu.scoring.score import score as score
    from vilu.scoring.score import score_parts as score_parts
    from vilu.scoring.score_folder import ScoreFolder as ScoreFolder
    from vilu.selective import Selective as Selective
    from vilu.selective import load as load
    from vilu.store.embed import ExtraColumns as ExtraColumns
    from vilu.store.embed import embed as embed
    from vilu.store.importing import import_arrays as import_arrays
    from vilu.store.reader import EmbeddingStore as EmbeddingStore
    from vilu.store.reader import open_source as open_source
    from vilu.tables.read import open_table as open_table
    from vilu.tables.table import AnswerTable as AnswerTable

    __version__: str

# maps each module to public names, separated by spaces
_NAMES_OF_MODULE = {
    "vilu.backbones.catalog": "load_backbone",
    "vilu.datasets.catalog": "open_dataset",
    "vilu.calibration.target": "Target",
    "vilu.calibration.rules": "Rule certify certify_clusters",
    "vilu.calibration.estimates": "Estimate estimate",
    "vilu.calibration.calibration": "Calibration",
    "vilu.calibration.monitor.monitor": "Monitor",
    "vilu.calibration.procedure": "calibrate_predictor",
    "vilu.scoring.score": "score score_parts",
    "vilu.scoring.score_folder": "ScoreFolder",
    "vilu.embeddings.memory": "Embeddings PairEmbeddings",
    "vilu.embeddings.two_models": "TwoModels",
    "vilu.embeddings.pairs": "Pools PseudoCaptions",
    "vilu.embeddings.source": "Batch EmbeddingSource",
    "vilu.embeddings.space": "EmbeddingSpace",
    "vilu.errors": "OUTSIDE",
    "vilu.outcomes.evaluate": "compare evaluate",
    "vilu.outcomes.outcomes": "Outcomes",
    "vilu.outcomes.results": "ResultTable",
    "vilu.predictors": "PREDICTORS",
    "vilu.predictors.contract.predictor": "FailurePredictor",
    "vilu.predictors.plus.vilu_plus": "ViLUPlus",
    "vilu.predictors.vilu.vilu": "LVU ViLU",
    "vilu.predictors.zero_shot": "MCM Doctor Entropy Margin MaxLogit",
    "vilu.predictors.persistence.convert": "convert_official",
    "vilu.process": "tune_process",
    "vilu.registry": "register",
    "vilu.report.explain.explain": "explain",
    "vilu.report.explain.prompts": "prompt_gains",
    "vilu.report.explain.risk": "risk_map",
    "vilu.report.page.build": "report_page",
    "vilu.selective": "Selective load",
    "vilu.store.embed": "ExtraColumns embed",
    "vilu.store.importing": "import_arrays",
    "vilu.store.reader": "EmbeddingStore open_source",
    "vilu.tables.read": "open_table",
    "vilu.tables.table": "AnswerTable",
    "vilu.guard.guard": "Answer Guard",
}
_MODULE_OF_NAME = {
    name: module for module, names in _NAMES_OF_MODULE.items() for name in names.split()
}

__all__ = ["__version__", "methods", "metrics", *_MODULE_OF_NAME]  # noqa: PLE0604 - all strings


if not TYPE_CHECKING:  # with this function, a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name == "metrics":
            return importlib.import_module("vilu.metrics")
        if name == "methods":
            return importlib.import_module("vilu.methods")
        if name == "__version__":
            # imported here because this import is slower than the whole module
            return importlib.import_module("importlib.metadata").version("vilu")
        if name not in _MODULE_OF_NAME:
            raise AttributeError(f"module 'vilu' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
