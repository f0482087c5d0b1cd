"""What a triage was asked for, how far it is, and the names of the files that hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from vilu.artifacts.documents import Document, read_document
from vilu.artifacts.paths import claim_folder
from vilu.calibration.shares import OUTSIDE_NAME
from vilu.errors import DataError, UsageError
from vilu.triage.photos import FOLDER, EmbeddingSettings
from vilu.triage.trial import Trial

STATE: Final = "triage.json"
BOOK: Final = "labels.parquet"
PREDICTOR_FOLDER: Final = "predictor"
CANDIDATE_FOLDER: Final = "candidate"
DECISIONS_CSV: Final = "decisions.csv"
DECISIONS_PARQUET: Final = "decisions.parquet"
NEXT: Final = "next_labels.csv"
REPORT: Final = "report.html"
SORTED: Final = "sorted"
MOVED: Final = "moved.parquet"
MADE: Final = (
    STATE,
    BOOK,
    FOLDER,
    PREDICTOR_FOLDER,
    CANDIDATE_FOLDER,
    DECISIONS_CSV,
    DECISIONS_PARQUET,
    NEXT,
    REPORT,
)
"""What can be made again; photos that were moved cannot."""


@dataclass(frozen=True)
class TriageSettings:
    """What is asked for.

    Attributes:
        photos: The folder of photos.
        embedding: Model, classes, prompts and words.
        outside: Labels that mean "none of the classes", beside "(outside)".
        max_risk: Largest error rate among accepted answers, in (0, 1).
        confidence: With which it is guaranteed, in (0, 1).
        n_next: How many labels are asked for.
        seed: Of the split, the fit and the choice.
    """

    photos: Path
    embedding: EmbeddingSettings
    outside: tuple[str, ...] = ()
    max_risk: float = 0.05
    confidence: float = 0.95
    n_next: int = 50
    seed: int = 0

    @property
    def of_no_class(self) -> tuple[str, ...]:
        """Labels that mean "none of the classes"."""
        return (*self.outside, OUTSIDE_NAME)

    @property
    def delta(self) -> float:
        """How often the guarantee may be false."""
        return 1 - self.confidence

    @property
    def fixed(self) -> dict[str, object]:
        """What may not change from run to run: a guarantee is stated before anybody looks."""
        backbone = self.embedding.backbone
        templates = self.embedding.templates
        return {
            "classes": list(self.embedding.names),
            "backbone": backbone.name,
            "precision": backbone.precision,
            "templates": None if templates is None else list(templates),
            "negatives": len(self.embedding.negatives),
            "outside": sorted(self.outside),
            "max_risk": self.max_risk,
            "confidence": self.confidence,
            "seed": self.seed,
        }


class TriageState(Document):
    """``triage.json``: what was asked for, the present predictor, and what its guarantee rests on.

    Attributes:
        settings: What may not change from run to run (``TriageSettings.fixed``).
        photos: The folder of photos, when they were last looked at.
        method: Of the present predictor; empty before the first fit.
        trial: Of the present predictor; None where it learns from no labels.
        candidate: Trial of a predictor that is tested beside one with a guarantee.
        n_tested: Predictors of which labels could certify something.
        n_fit_of_last_candidate: Labels that the last candidate was fitted on, tested or not.
        asked_up_to: All photos up to this position in the random order were asked for.
        counted_up_to: Up to this position all labels were there when they were last looked at.
    """

    again = "Run `vilu triage` into a new folder with --labels labels.parquet of this one"
    fault = DataError

    kind: Literal["triage"] = "triage"
    settings: dict[str, object]
    photos: str = ""
    method: str = ""
    trial: Trial | None = None
    candidate: Trial | None = None
    n_tested: int = Field(default=0, ge=0)
    n_fit_of_last_candidate: int = Field(default=0, ge=0)
    asked_up_to: int = Field(default=0, ge=0)
    counted_up_to: int = Field(default=0, ge=0)

    @property
    def tested_trial(self) -> Trial | None:
        """Of the predictor that labels are asked for: the candidate, where there is one."""
        return self.trial if self.candidate is None else self.candidate

    def with_trial(self, trial: Trial) -> TriageState:
        """The state with another trial of the predictor that labels are asked for."""
        if self.candidate is None:
            return self.model_copy(update={"trial": trial})
        return self.model_copy(update={"candidate": trial})


def open_state(root: Path, settings: TriageSettings, *, overwrite: bool = False) -> TriageState:
    """The state in a folder, or a new one; refuses another folder, and one of other settings."""
    state = None
    if (root / STATE).is_file() and not overwrite:
        state = read_document(root / STATE, TriageState)
        _require_same_settings(root, state.settings, settings.fixed)
    claim_folder(
        root,
        "triage",
        lambda path: path.name in {*MADE, SORTED, MOVED},
        same=state is not None,
        overwrite=overwrite,
    )
    return state or TriageState(settings=settings.fixed)


def _require_same_settings(
    root: Path, before: Mapping[str, object], now: Mapping[str, object]
) -> None:
    changes = []
    for name, value in now.items():
        if before.get(name) != value:
            changes.append(f"{name} {before.get(name)!r}, now {value!r}")
    if changes:
        raise UsageError(
            f"{root} was begun with other settings: {'; '.join(changes)}. A guarantee is stated "
            "before its labels are looked at, and is about one question. Give a new folder, or "
            "--overwrite to begin anew, labels included."
        )
