"""A triage's settings and state, and the file names in the triage folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final, Literal

from pydantic import Field

from vilu.artifacts.documents import Document, read_document
from vilu.artifacts.paths import claim_folder
from vilu.artifacts.tables import read_table
from vilu.calibration.answer_choice import AnswerChoice
from vilu.datasets.files import original_path, portable_name
from vilu.embeddings.columns import AnswerKind
from vilu.errors import OUTSIDE_NAME, DataError, UsageError
from vilu.triage.labels import SKIPPED
from vilu.triage.photos import EMBEDDINGS_FOLDER, EmbeddingSettings
from vilu.triage.trial import Trial

# Names of files and folders in the triage folder.
STATE_FILE: Final = "triage.json"
BOOK_FILE: Final = "labels.parquet"
FORMER_BOOK_FILE: Final = "former_labels.parquet"
PREDICTOR_FOLDER: Final = "predictor"
CANDIDATE_FOLDER: Final = "candidate"
DECISIONS_CSV: Final = "decisions.csv"
DECISIONS_PARQUET: Final = "decisions.parquet"
NEXT_LABELS_CSV: Final = "next_labels.csv"
REPORT_FILE: Final = "report.html"
SORTED_FOLDER: Final = "sorted"
MOVED_TABLE: Final = "moved.parquet"
RESULT_FILES: Final = (
    STATE_FILE,
    BOOK_FILE,
    FORMER_BOOK_FILE,
    EMBEDDINGS_FOLDER,
    PREDICTOR_FOLDER,
    CANDIDATE_FOLDER,
    DECISIONS_CSV,
    DECISIONS_PARQUET,
    NEXT_LABELS_CSV,
    REPORT_FILE,
)
"""Files and folders to remove with ``--overwrite``. Moved photos and their table stay."""


GuaranteePopulation = Literal["new", "folder"]
"""Which photos a guarantee is about.

"new": new photos that are drawn in the same way as these photos. "folder": the folder's photos.
"""

FIXED_SETTING_REASON: Final = (
    "It decides which photos are for fits and which are for a guarantee, so it stays."
)
"""Why a setting must not change."""

BEGIN_ANEW_ADVICE: Final = (
    "Give a new folder, or --overwrite to begin anew, which removes the labels too."
)
"""Advice if a setting must not change."""

NO_ANSWER_CHOICE = AnswerChoice(answer="zero_shot", reason="no other answers were chosen")
"""The answer choice before the first fit, and for a candidate while there is no candidate."""


@dataclass(frozen=True)
class TriageSettings:
    """Settings of a triage.

    Attributes:
        photos: The photo folder.
        embedding: Model, classes, prompts and negative words.
        outside: Labels for "none of the classes", besides "(outside)".
        max_risk: Largest error rate among accepted answers, in (0, 1).
        confidence: Confidence of the guarantee for ``max_risk``, in (0, 1).
        n_next: How many labels to ask for at a time.
        seed: Seed for the split, the fits and the choice of photos to label.
        answer: Kind of the judged answers. If None, vilu chooses with every fit.
        follow_links: Whether links in the folder may lead anywhere, also to folders.
        about: Which photos the guarantee is about: "new" or "folder".
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
    about: GuaranteePopulation = "new"

    @property
    def outside_labels(self) -> tuple[str, ...]:
        """Labels for "none of the classes"."""
        return (*self.outside, OUTSIDE_NAME)

    @property
    def known_labels(self) -> set[str]:
        """All labels that a photo may have."""
        return {*self.embedding.names, *self.outside_labels, SKIPPED}

    @property
    def delta(self) -> float:
        """Level: largest probability that the guarantee is false."""
        return 1 - self.confidence

    @property
    def recorded_settings(self) -> dict[str, object]:
        """Settings that affect embeddings, fits and guarantees (``carrying.carry_over``)."""
        backbone = self.embedding.backbone
        templates = self.embedding.templates
        return {
            "classes": list(self.embedding.names),
            "backbone": backbone.name,
            "full_decode": backbone.full_decode,
            "templates": None if templates is None else list(templates),
            "negatives": len(self.embedding.negatives),
            "outside": sorted(self.outside),
            "max_risk": self.max_risk,
            "confidence": self.confidence,
            "seed": self.seed,
            "answer": self.answer,
            "about": self.about,
        }


class TriageState(Document):
    """The file ``triage.json``: the settings, and facts about the triage's predictors.

    Attributes:
        settings: Settings in the last run (``TriageSettings.recorded_settings``).
        photos: The photo folder in the last run.
        follow_links: Whether links in this folder were followed in the last run.
        method: Method of the present predictor. Empty before the first fit.
        answer: The answer kind that the present predictor judges, with the reason.
        trial: Test of the present predictor. None before the first test, or if the predictor needs
            no labels.
        candidate: Test of the candidate, or None without a candidate.
        candidate_answer: The answer kind that the candidate judges, with the reason.
        n_tested: Number of predictors so far whose test had enough labels to certify something.
            Predictors under earlier settings of the folder count, too.
        n_fit_of_last_candidate: How many labels the last candidate was fitted on, whether it
            was tested or not.
        has_drawn: Whether a label for a guarantee was ever asked for.
        pictures: Digest of all pictures in the folder for a guarantee about the folder, else None.
        guarantee: Text of the guarantee in force, or "" if nothing is guaranteed.
    """

    remedy = (
        "Run `vilu triage` into a new folder, with --labels and the labels.parquet of this folder"
    )
    error_class = DataError

    kind: Literal["triage"] = "triage"
    settings: dict[str, object]
    photos: str = ""
    follow_links: bool = False
    method: str = ""
    answer: AnswerChoice = NO_ANSWER_CHOICE
    trial: Trial | None = None
    candidate: Trial | None = None
    candidate_answer: AnswerChoice = NO_ANSWER_CHOICE
    n_tested: int = Field(default=0, ge=0)
    n_fit_of_last_candidate: int = Field(default=0, ge=0)
    has_drawn: bool = False
    pictures: str | None = None
    guarantee: str = ""

    @property
    def tested_trial(self) -> Trial | None:
        """The candidate's trial, or the present predictor's trial if there is no candidate."""
        return self.trial if self.candidate is None else self.candidate

    def with_trial(self, trial: Trial) -> TriageState:
        """Return the state with ``trial`` in place of the tested predictor's trial."""
        if self.candidate is None:
            return self.model_copy(update={"trial": trial})
        return self.model_copy(update={"candidate": trial})

    def with_settings(self, settings: TriageSettings) -> TriageState:
        """Return a state for other settings, without a predictor.

        ``n_tested`` stays. So all tests together, under all settings, stay within the level.
        """
        return TriageState(
            settings=settings.recorded_settings,
            n_tested=self.n_tested,
            has_drawn=self.has_drawn,
            pictures=self.pictures,
        )


def open_state(root: Path, settings: TriageSettings, *, overwrite: bool = False) -> TriageState:
    """Read a folder's state, with the settings in the last run, or make a new state.

    Raises:
        UsageError: If the folder holds a triage with another seed or ``about``, or other files.
    """
    state = None
    if (root / STATE_FILE).is_file() and not overwrite:
        state = read_document(root / STATE_FILE, TriageState)
        _require_same_split(root, state.settings, settings)
    names_in_folder = {*RESULT_FILES, SORTED_FOLDER, MOVED_TABLE}
    claim_folder(
        root,
        "triage",
        lambda path: path.name in names_in_folder,
        has_same_inputs=state is not None,
        overwrite=overwrite,
    )
    return state or TriageState(settings=settings.recorded_settings)


def _require_same_split(
    root: Path, recorded_settings: Mapping[str, object], settings: TriageSettings
) -> None:
    """Raise UsageError if a setting has changed that decides the split."""
    if recorded_settings.get("seed") != settings.seed:
        raise UsageError(
            f"{root} was begun with the seed {recorded_settings.get('seed')}, now {settings.seed}. "
            f"{FIXED_SETTING_REASON} {BEGIN_ANEW_ADVICE}"
        )
    # states by earlier versions do not have "about"
    recorded_about = recorded_settings.get("about", "new")
    if recorded_about != settings.about:
        raise UsageError(
            f"{root} was begun with a guarantee about {recorded_about!r}, now {settings.about!r}. "
            f"{FIXED_SETTING_REASON} {BEGIN_ANEW_ADVICE}"
        )


def moved_photos(root: Path) -> dict[str, Path]:
    """Map every moved photo's path, in the photo folder, to the present location.

    Moved photos are left out if they were deleted since or replaced by a link.

    Raises:
        DataError: If a location in the table is not below the folder of sorted photos.
    """
    if not (root / MOVED_TABLE).exists():
        return {}
    table, _ = read_table(root / MOVED_TABLE, ())
    moved = {}
    for name, place in zip(table["path"].to_pylist(), table["place"].to_pylist(), strict=True):
        parts = PurePath(place).parts
        if parts[:1] != (SORTED_FOLDER,) or ".." in parts:
            raise DataError(
                f"{root / MOVED_TABLE} is damaged: it says that {name!r} was moved to {place!r}, "
                f"which is not below {SORTED_FOLDER}. Take the file from a backup, or remove it "
                "and move the photos back."
            )
        target = root / place
        if target.is_file() and not target.is_symlink():
            path = original_path(name)
            moved[portable_name(path)] = target
    return moved
