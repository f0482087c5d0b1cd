"""Settings and state of a triage, and the names of the files in its folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from vilu.artifacts.documents import Document, read_document
from vilu.artifacts.paths import claim_folder
from vilu.calibration.answer_choice import AnswerChoice
from vilu.embeddings.columns import AnswerKind
from vilu.errors import OUTSIDE_NAME, DataError, UsageError
from vilu.triage.photos import FOLDER, EmbeddingSettings
from vilu.triage.trial import Trial

# Files and folders in the folder of a triage.
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
"""Files and folders that ``--overwrite`` removes. Moved photos and their table stay."""


NOTHING_CHOSEN = AnswerChoice(answer="zero_shot", reason="no other answers were chosen")
"""The choice of answers before the first fit, and of the candidate if there is none."""


@dataclass(frozen=True)
class TriageSettings:
    """Settings of a triage.

    Attributes:
        photos: The folder of photos.
        embedding: Model, classes, prompts and negative words.
        outside: Labels that mean "none of the classes", besides "(outside)".
        max_risk: Largest error rate among accepted answers, in (0, 1).
        confidence: Confidence of the guarantee of ``max_risk``, in (0, 1).
        n_next: Number of labels that are asked for at a time.
        seed: Seed of the split, of the fits and of the choice of photos to label.
        answer: Kind of the judged answers; None to let vilu choose with every fit.
        follow_links: Whether links in the folder may lead anywhere, also to folders.
    """

    photos: Path
    embedding: EmbeddingSettings
    outside: tuple[str, ...] = ()
    max_risk: float = 0.05
    confidence: float = 0.95
    n_next: int = 50
    seed: int = 0
    answer: AnswerKind | None = None
    follow_links: bool = False

    @property
    def of_no_class(self) -> tuple[str, ...]:
        """Labels that mean "none of the classes"."""
        return (*self.outside, OUTSIDE_NAME)

    @property
    def delta(self) -> float:
        """Level: largest probability that the guarantee is false."""
        return 1 - self.confidence

    @property
    def fixed(self) -> dict[str, object]:
        """Settings that may not change between runs, because labels were counted under them."""
        backbone = self.embedding.backbone
        templates = self.embedding.templates
        return {
            "classes": list(self.embedding.names),
            "backbone": backbone.name,
            "templates": None if templates is None else list(templates),
            "negatives": len(self.embedding.negatives),
            "outside": sorted(self.outside),
            "max_risk": self.max_risk,
            "confidence": self.confidence,
            "seed": self.seed,
            "answer": self.answer,
        }


class TriageState(Document):
    """The file ``triage.json``: fixed settings, tests of the predictors, and progress of the draw.

    Attributes:
        settings: Settings that may not change between runs (``TriageSettings.fixed``).
        photos: The folder of photos in the last run.
        follow_links: Whether links in this folder were followed in the last run.
        method: Method of the present predictor; empty before the first fit.
        answer: Which answers the present predictor judges, and why.
        trial: Test of the present predictor; None before its first test or if it needs no labels.
        candidate: Test of the candidate; None without a candidate.
        candidate_answer: Which answers the candidate judges, and why.
        n_tested: Number of predictors so far that had enough labels to be certified.
        n_fit_of_last_candidate: Number of labels that the last candidate was fitted on, whether it
            was tested or not.
        asked_up_to: Position in the random order. The photos before it are drawn: labels of those
            that the rule may accept were asked for.
        counted_up_to: Position in the random order: the value of ``asked_up_to`` when last none of
            the labels that were asked for was missing.
    """

    again = (
        "Run `vilu triage` into a new folder, with --labels and the labels.parquet of this folder"
    )
    fault = DataError

    kind: Literal["triage"] = "triage"
    settings: dict[str, object]
    photos: str = ""
    follow_links: bool = False
    method: str = ""
    answer: AnswerChoice = NOTHING_CHOSEN
    trial: Trial | None = None
    candidate: Trial | None = None
    candidate_answer: AnswerChoice = NOTHING_CHOSEN
    n_tested: int = Field(default=0, ge=0)
    n_fit_of_last_candidate: int = Field(default=0, ge=0)
    asked_up_to: int = Field(default=0, ge=0)
    counted_up_to: int = Field(default=0, ge=0)

    @property
    def tested_trial(self) -> Trial | None:
        """The trial of the candidate; without a candidate the trial of the present predictor."""
        return self.trial if self.candidate is None else self.candidate

    def with_trial(self, trial: Trial) -> TriageState:
        """The state with ``trial`` as the trial of the tested predictor."""
        if self.candidate is None:
            return self.model_copy(update={"trial": trial})
        return self.model_copy(update={"candidate": trial})


def open_state(root: Path, settings: TriageSettings, *, overwrite: bool = False) -> TriageState:
    """Read the state of a folder, or make a new state.

    Raises:
        UsageError: If the folder holds a triage with other settings, or other files.
    """
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


def without_predictors(root: Path, state: TriageState) -> TriageState:
    """Remove the predictors of a triage whose photos are embedded again; return the next state.

    All labels stay, and so does the number of tested predictors, on which the levels depend.
    """
    state = TriageState(
        settings=state.settings,
        photos=state.photos,
        follow_links=state.follow_links,
        n_tested=state.n_tested,
        asked_up_to=state.asked_up_to,
        counted_up_to=state.counted_up_to,
    )
    state.write(root / STATE)
    for name in (PREDICTOR_FOLDER, CANDIDATE_FOLDER):
        if (root / name).exists():
            shutil.rmtree(root / name)
    return state


def _require_same_settings(
    root: Path, before: Mapping[str, object], now: Mapping[str, object]
) -> None:
    changes = []
    for name, value in now.items():
        if before.get(name) != value:
            changes.append(f"{name} {before.get(name)!r}, now {value!r}")
    if changes:
        raise UsageError(
            f"{root} was begun with other settings: {'; '.join(changes)}. The settings of a "
            "guarantee are fixed before its labels are looked at. Give a new folder, or "
            "--overwrite to begin anew, which removes the labels too."
        )
