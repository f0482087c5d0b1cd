"""From a folder of photos, and what labels there are, to a decision about each: the whole job, again and again."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Document, read_document
from vilu.artifacts.paths import claim_folder
from vilu.artifacts.tables import read_table
from vilu.calibration.anytime import level_of
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import take_back
from vilu.calibration.rules import ALL, Rule
from vilu.calibration.shares import OUTSIDE_NAME
from vilu.datasets.files import former_text, path_of, portable_name
from vilu.datasets.folder import list_photos
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.catalogue import find_method
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.persistence.record import PREDICTOR, read_record
from vilu.predictors.persistence.storage import load
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.scoring.score import provenance_of, score_rows
from vilu.triage.choose import to_teach
from vilu.triage.labels import Entry, LabelBook
from vilu.triage.photos import FOLDER, Embedding, PhotoFolder, Photos, PhotoStores
from vilu.triage.promise import (
    ORDER,
    PLANNED,
    Mask,
    PromiseProgress,
    Sides,
    Trial,
    first_of_scene,
    keep_promise,
    rule_of_draws,
    stand,
)

STATE, BOOK, PREDICTOR_FOLDER, CANDIDATE_FOLDER = (
    "triage.json",
    "labels.parquet",
    "predictor",
    "candidate",
)
DECISIONS, NEXT, REPORT = "decisions", "next_labels.csv", "report.html"
SORTED, MOVED = "sorted", "moved.parquet"
MADE: Final = (
    STATE,
    BOOK,
    FOLDER,
    PREDICTOR_FOLDER,
    CANDIDATE_FOLDER,
    f"{DECISIONS}.csv",
    f"{DECISIONS}.parquet",
    NEXT,
    REPORT,
)
"""What can be made again; photos that were moved cannot."""

LEAST_TO_FIT, LEAST = 10, 50
"""Labels that a predictor is fitted on at least, and that teach before photos are drawn that vouch."""

FURTHER: Final = 8
"""Where all thresholds up to the limit are certified, it moves on by so many."""

THIRD: Final = 3
"""Of the labels that are asked for where a promise holds, the third part vouches: drawn from what may be accepted, they
are worth more each than those that teach.
"""

ANYHOW: Final = 3
"""So many times as many labels that teach are worth a trial, whatever a predictor thinks of itself."""

MORE: Final = 1.1
"""A predictor that is tried beside one with a promise is to accept so many times as many photos."""

GROWN, SOON = 1.5, 1.25
"""A predictor of which labels were looked at is fitted anew when those that teach are so many times as many; one that
may accept more than the present one is looked for when they are so many times as many as the last
time.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        photos: The folder of photos.
        names: The classes.
        how: Model, prompts and words.
        outside: Labels that mean "none of the classes", beside "(outside)".
        max_risk: Largest error rate among accepted answers, in (0, 1).
        confidence: With which it is promised, in (0, 1).
        n_next: How many labels are asked for.
        seed: Of the sides, the fit and the choice.
    """

    photos: Path
    how: Embedding
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
    def settings(self) -> dict[str, object]:
        """What may not change from run to run: a promise is stated before anybody looks."""
        how = self.how
        return {
            "classes": list(how.names),
            "backbone": how.backbone.name,
            "precision": how.backbone.precision,
            "templates": None if how.templates is None else list(how.templates),
            "negatives": len(how.negatives),
            "outside": sorted(self.outside),
            "max_risk": self.max_risk,
            "confidence": self.confidence,
            "seed": self.seed,
        }


class TriageState(Document):
    """``triage.json``: what was asked for, the present predictor, and what its promise rests on."""

    again = "Run `vilu triage` into a new folder"
    fault = DataError

    kind: Literal["triage"] = "triage"
    settings: dict[str, object]
    photos: str = ""  # the folder of photos, when they were last looked at
    method: str = ""
    trial: Trial | None = None  # of the present predictor; None where it learns from no labels
    candidate: Trial | None = (
        None  # of a predictor that is tried beside one that something is promised of
    )
    tried: int = Field(default=0, ge=0)  # predictors of which labels could certify something
    n_tried: int = Field(
        default=0, ge=0
    )  # labels that taught the last one that was fitted to be tried
    reach: int = Field(
        default=0, ge=0
    )  # labels of photos up to this place in the random order are asked for
    counted: int = Field(
        default=0, ge=0
    )  # up to this one all of them were there when they were last looked at


@dataclass(frozen=True)
class Triage:
    """What a run has found.

    Attributes:
        photos: The embedded photos.
        outcomes: What is said of each, with decisions.
        predictor: What says it.
        standing: How far the promise is; None without labels that teach.
        rule: The promise, where one was certified, now or before.
        in_play: What the predictor says that labels are to speak for now.
        has_candidate: Whether that is another one than decides, tried beside it.
        scenes: (M,) which of the photos whose labels count are nearly like no other one with a
            label before them.
        asked: Photos whose labels are asked for.
        n_new: Photos that were embedded in this run.
        n_fit: Labels that the predictor was fitted on.
    """

    photos: Photos
    outcomes: Outcomes
    predictor: FailurePredictor
    standing: PromiseProgress | None
    rule: Rule | None
    in_play: Outcomes
    has_candidate: bool
    scenes: Mask | None
    asked: list[Entry]
    book: LabelBook
    n_new: int
    n_fit: int


class Workshop:
    """The folder in which one triage lives, and goes on from run to run.

    Attributes:
        folder: Where the predictor is.
        candidate: Where another one is, which is tried beside it.
    """

    def __init__(self, root: Path, job: Job, *, overwrite: bool = False) -> None:
        self.root, self.job = root, job
        found = (
            read_document(root / STATE, TriageState)
            if (root / STATE).is_file() and not overwrite
            else None
        )
        before = job.settings if found is None else found.settings
        if apart := [name for name, value in job.settings.items() if before.get(name) != value]:
            raise UsageError(
                f"{root} was begun with other settings: "
                + "; ".join(
                    f"{name} {before.get(name)!r}, now {job.settings[name]!r}" for name in apart
                )
                + ". A promise is stated before its labels are looked at, and goes for one question. Give a new "
                "folder, or --overwrite to begin anew, labels included."
            )
        claim_folder(
            root,
            "triage",
            lambda path: path.name in {*MADE, SORTED, MOVED},
            same=found is not None,
            overwrite=overwrite,
        )
        self.state = found or TriageState(settings=job.settings)
        self.overwrite = overwrite
        self.stores = PhotoStores(root / FOLDER)
        self.folder, self.candidate = root / PREDICTOR_FOLDER, root / CANDIDATE_FOLDER

    def listing(self) -> PhotoFolder:
        """The photos that are there, but for what this folder itself holds."""
        moved = moved_photos(self.root)
        photos = [*list_photos(self.job.photos, least=0 if moved else 1)]
        if both := moved.keys() & {portable_name(path) for path, _ in photos}:
            raise DataError(
                f"{min(both)!r} was moved to {moved[min(both)]} and is in {self.job.photos} again. "
                "Rename the new photo; if they are one and the same, remove the one that was moved."
            )
        photos += [(path_of(path), place.stat()) for path, place in moved.items()]
        root, home = self.root.resolve(), self.job.photos.resolve()
        if root.is_relative_to(home):
            photos = [
                one
                for one in photos
                if not one[0].startswith(f"{root.relative_to(home).as_posix()}/")
            ]
        return PhotoFolder(self.job.photos, photos, moved)

    def run(self, labels: dict[str, str], streams: dict[str, str], listing: PhotoFolder) -> Triage:
        """Embed what is new, learn from what labels there are, decide, and ask for the next labels."""
        for path in (self.root / name for name in MADE if self.overwrite):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.state = self.state.model_copy(update={"photos": str(self.job.photos.absolute())})
        self.state.write(self.root / STATE)
        n_new = self.stores.update(listing, self.job.how)
        photos = self.stores.open(listing.listing)
        if not len(photos):
            kinds = ", ".join(
                f"{n} {kind}" for kind, n in Counter(photos.bad.values()).most_common()
            )
            raise DataError(
                f"none of the {len(photos.bad)} photos in {self.job.photos} can be read: {kinds}."
            )
        book = LabelBook.load(self.root / BOOK)
        book.rename(former_text, [portable_name(path) for path, _ in listing.listing])
        given = [book.entries[path] for path in labels if path in book.entries]
        # before the book is saved, so that no kill leaves a promise too much
        take_back(
            self.folder, {one.path for one in given if one.label not in {None, labels[one.path]}}
        )
        if changed := book.answer(labels, streams):
            logger.info("%d labels are new, of %d in all", changed, len(book.labels))
            book.save(self.root / BOOK)
        if n := book.note_pictures(dict(zip(photos.ids, photos.pictures, strict=True))):
            logger.warning(
                "%d photos have changed since their labels were given, which vouch for nothing now",
                n,
            )
        return self.decide(photos, book, n_new)

    def decide(self, photos: Photos, book: LabelBook, n_new: int) -> Triage:
        """What the labels in the book lead to, for photos that are embedded."""
        photos.label(book.labels, self.job.of_no_class)
        sides = Sides.of(photos, book, self.job.seed)
        teach = np.flatnonzero(sides.teacher & sides.labelled)
        predictor = self._in_play(photos, sides, teach)
        outcomes, standing = self._scores(predictor, photos), None
        if predictor.needs_labels and sides.voucher.any():
            standing = self._standing(outcomes, sides, len(teach))
            self._settle(predictor, photos, outcomes, standing, sides)
        self._ask(photos, book, standing, outcomes.uncertainty, sides)
        book.save(self.root / BOOK)
        self.state.write(self.root / STATE)
        decides = load(self.folder)
        calibration = Calibration.find(self.folder)
        return Triage(
            photos=photos,
            outcomes=self._scores(decides, photos, calibration),
            predictor=decides,
            standing=standing,
            rule=self._promised(),
            in_play=outcomes,
            has_candidate=self.state.candidate is not None,
            scenes=None if standing is None else first_of_scene(photos, teach, standing.rows),
            asked=book.waiting(),
            book=book,
            n_new=n_new,
            n_fit=0 if self.state.trial is None else self.state.trial.n_fit,
        )

    def _scores(
        self, predictor: FailurePredictor, photos: Photos, calibration: Calibration | None = None
    ) -> Outcomes:
        return score_rows(
            predictor,
            photos,
            {
                "method": predictor.label,
                "dataset": self.job.photos.name,
                "seed": self.job.seed,
                "is_probability": predictor.is_probability,
                "provenance": provenance_of(calibration),
            },
            calibration=calibration,
        )

    def _promised(self) -> Rule | None:
        """The promise that is in force, if one is."""
        calibration = Calibration.find(self.folder)
        rule = None if calibration is None else calibration.rule
        return rule if rule is not None and rule.feasible else None

    def _in_play(self, photos: Photos, sides: Sides, teach: Ints) -> FailurePredictor:
        """The predictor that labels are to speak for now, fitted anew where there is so much more to learn from.

        One that something is promised of goes on deciding; another is tried beside it, and takes
        its place as soon as it is certified to accept more.
        """
        state, n = self.state, len(teach)
        method = (
            "vilu_plus"
            if int((photos.target.numpy()[teach] >= 0).sum()) >= LEAST_TO_FIT
            else "vilu_zero"
        )
        trial, promised = state.candidate or state.trial, self._promised() is not None
        there = self.candidate if state.candidate is not None else self.folder
        looked = state.candidate is not None or not promised
        fitted = max(0 if trial is None else trial.n_fit, 0 if looked else state.n_tried, 1)
        grown = n >= (GROWN if looked else SOON) * fitted
        if (
            state.method == method
            and (there / PREDICTOR).is_file()
            and (method == "vilu_zero" or not grown)
        ):
            return self._loaded(there)
        if promised and not sides.voucher.any():  # no photo can tell which one accepts more
            return self._loaded(there)
        predictor = self._fitted(photos, teach, method)
        if not promised:
            self._adopt(predictor, photos, None)
            return predictor
        voucher = sides.voucher
        least = min(MORE * self._share(photos, voucher), 1.0)
        candidate = self._plan(self._scores(predictor, photos), sides, n, least)
        self.state = state = state.model_copy(update={"n_tried": n})
        # by its own probabilities: no label was looked at, so that this is no trial
        if not candidate.likely and n < ANYHOW * max(0 if trial is None else trial.n_fit, 1):
            return self._loaded(there)
        predictor.save(self.candidate)
        self.state = state.model_copy(update={"candidate": candidate})
        return predictor

    def _loaded(self, folder: Path) -> FailurePredictor:
        found = load(folder)
        found.calibrator_ = None
        return found

    def _share(self, photos: Photos, voucher: Mask) -> float:
        """Share of the photos that vouch which the promise in force accepts."""
        rule = self._promised()
        if rule is None or rule.threshold is None:
            return 0.0
        return float(
            (load(self.folder).predict_uncertainty(photos)[voucher] <= rule.threshold).mean()
        )

    def _fitted(self, photos: Photos, teach: Ints, method: str) -> FailurePredictor:
        settings = {"seed": self.job.seed} if method == "vilu_plus" else {}
        predictor: FailurePredictor = find_method(method)(**settings)
        predictor.fit(photos.take(teach) if method == "vilu_plus" else photos)
        on = (
            f"{len(teach):,} labels"
            if method == "vilu_plus"
            else f"{len(photos):,} photos, without labels"
        )
        logger.info("%s is fitted on %s", method, on)
        return predictor

    def _adopt(self, predictor: FailurePredictor, photos: Photos, trial: Trial | None) -> None:
        """From now on this predictor decides."""
        predictor.save(self.folder)
        Vocabulary.of(photos, photos.first.manifest.dtype).save(self.folder)
        self.state = self.state.model_copy(
            update={"method": predictor.name, "trial": trial, "candidate": None}
        )

    def _plan(self, outcomes: Outcomes, sides: Sides, n_teach: int, least: float = 0.0) -> Trial:
        """A trial of a predictor that is to accept a share ``least`` of the photos, if anything."""
        n = max(PLANNED, self.job.n_next, int((sides.voucher & sides.answered).sum()))
        risk = self.job.max_risk, level_of(self.state.tried + 1, 1 - self.job.confidence)
        return Trial.plan(n_teach, outcomes.uncertainty[sides.voucher], n, risk, least)

    def _stand(self, trial: Trial, outcomes: Outcomes, sides: Sides, up_to: int) -> PromiseProgress:
        risk = self.job.max_risk, 1 - self.job.confidence
        return stand(trial, outcomes, sides, risk, up_to, self.state.tried)

    def _standing(self, outcomes: Outcomes, sides: Sides, n_teach: int) -> PromiseProgress:
        """Of the predictor in play: by all labels that were asked for, or while some lack, by those before."""
        state = self.state
        trial = state.candidate or state.trial or self._plan(outcomes, sides, n_teach)
        found = self._stand(trial, outcomes, sides, state.reach)
        if len(found.missing):
            found = dataclasses.replace(
                self._stand(trial, outcomes, sides, state.counted), missing=found.missing
            )
        else:
            self.state = self.state.model_copy(update={"counted": state.reach})
        if not trial.attempt and found.looks.can_certify(
            found.outcomes.uncertainty
        ):  # with fewer a look is none
            self.state = self.state.model_copy(update={"tried": self.state.tried + 1})
            trial = trial.model_copy(update={"attempt": self.state.tried})
        self._try(trial)
        return found

    def _try(self, trial: Trial) -> None:
        """Note how the trial of the predictor in play stands."""
        place = "trial" if self.state.candidate is None else "candidate"
        self.state = self.state.model_copy(update={place: trial})

    def _settle(
        self,
        predictor: FailurePredictor,
        photos: Photos,
        outcomes: Outcomes,
        standing: PromiseProgress,
        sides: Sides,
    ) -> None:
        """Keep what was certified; a predictor that was tried beside the present one takes its place if it is more."""
        candidate = self.state.candidate
        if candidate is not None:
            share = float((outcomes.uncertainty[sides.voucher] <= standing.threshold).mean())
            before = self._share(photos, sides.voucher)
            if share <= before:
                return
            logger.info(
                "a predictor that more labels taught accepts %.1f %%, before %.1f %%",
                100 * share,
                100 * before,
            )
            self._adopt(predictor, photos, candidate)
            self.state.write(self.root / STATE)  # before what it names goes
            shutil.rmtree(self.candidate)
        kept = self._promised()
        # what was certified once is certified for ever, so a rule is replaced by one that accepts
        # more alone
        if len(standing.rows) and (kept is None or standing.threshold > (kept.threshold or 0.0)):
            draws = {ALL: standing}
            rule = rule_of_draws(draws, self.job.max_risk, self.job.confidence)
            keep_promise(
                self.folder,
                predictor,
                photos,
                draws,
                standing.outcomes,
                rule,
                self.job.photos.name,
            )

    def _ask(
        self,
        photos: Photos,
        book: LabelBook,
        standing: PromiseProgress | None,
        u: Floats,
        sides: Sides,
    ) -> None:
        """Ask for what is missing; else for labels that vouch, or teach; for both where a promise holds."""
        there = self.folder if self.state.candidate is None else self.candidate
        name, n = str(read_record(there / PREDICTOR)["weights_sha256"])[:16], self.job.n_next
        lacking = [] if standing is None else [photos.ids[row] for row in standing.missing.tolist()]
        alone = bool(lacking) and self._promised() is None
        book.forget(lambda one: one.path not in lacking and (alone or one.predictor != name))
        if not lacking and standing is not None:
            n_vouch = self._how_many_vouch(standing, int((sides.teacher & sides.labelled).sum()), n)
            lacking = [photos.ids[row] for row in self._draw_on(standing, u, sides, n_vouch)]
        waiting = {one.path for one in book.waiting()}
        vouch = [path for path in lacking if path not in waiting]
        book.ask(vouch, "promise", predictor=name, probability=self.state.reach / ORDER)
        left = n - len(book.waiting())
        if left > 0 and not (standing is not None and len(standing.missing)):
            asked = np.array([path in book.entries for path in photos.ids], dtype=np.bool_)
            teachers = to_teach(
                photos,
                np.flatnonzero(sides.teacher & ~sides.answered & ~asked),
                u,
                left,
                self.job.seed,
            )
            book.ask([photos.ids[row] for row in teachers], "fit", predictor=name)

    def _how_many_vouch(self, standing: PromiseProgress, n_teach: int, n: int) -> int:
        """How many of the next labels are to vouch: all until something is promised, if likely; then a third."""
        if self.state.trial is None:
            return 0
        if self._promised() is not None:
            return n // THIRD
        return (
            n if n_teach >= LEAST and self.state.trial.likely and standing.more is not None else 0
        )

    def _draw_on(self, standing: PromiseProgress, u: Floats, sides: Sides, n: int) -> list[int]:
        """The next photos in the random order, or where all up to the limit is certified, those a little beyond it."""
        trial, reach = self.state.candidate or self.state.trial, self.state.reach
        if trial is None or not n:
            return []
        last = standing.looks.last
        if standing.certified == last:
            trial = trial.model_copy(
                update={"limit": trial.grid[min(last + FURTHER, len(trial.grid) - 1)]}
            )
        region = np.flatnonzero(sides.voucher & (u <= trial.limit) & ~sides.answered)
        region = region[np.argsort(sides.place[region])]
        before = region[sides.place[region] < reach]
        chosen = before if len(before) else region[:n]
        if len(chosen):
            reach = max(reach, int(sides.place[chosen[-1]]) + 1)
        self._try(trial)
        self.state = self.state.model_copy(update={"reach": reach})
        found: list[int] = chosen.tolist()
        return found


def moved_photos(root: Path) -> dict[str, Path]:
    """Path in the folder of photos to where a photo was moved, which is no link; empty where none was."""
    if not (root / MOVED).exists():
        return {}
    table, _ = read_table(root / MOVED, ())
    moved = {}
    for name, below in zip(table["path"].to_pylist(), table["place"].to_pylist(), strict=True):
        place = root / below
        if place.is_file() and not place.is_symlink():
            moved[portable_name(path_of(name))] = place
    return moved
