"""The steps of a triage run: each takes the state of the folder and returns the next state.

``advance`` calls the steps in order. A step first writes its files, then writes the next state to
``triage.json``, then returns this state. So a run that was killed between two steps continues with
the second of them. A run that was killed inside a step repeats this step.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from vilu.artifacts.documents import write_document
from vilu.calibration.answer_choice import AnswerChoice
from vilu.calibration.anytime import level_of
from vilu.calibration.calibration import Calibration
from vilu.calibration.likely import LikelyRight
from vilu.calibration.procedure import remove_outdated_calibration
from vilu.calibration.rules import ALL, Rule
from vilu.datasets.files import text_of_version_0_1
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.spread import states_probability
from vilu.predictors.persistence.description import read_description
from vilu.predictors.persistence.files import PREDICTOR
from vilu.predictors.persistence.storage import load_predictor
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.scoring.score import provenance_of, score_rows
from vilu.text import plural
from vilu.triage.carrying import carry_over
from vilu.triage.choose import choose_to_fit
from vilu.triage.closed_folder import SPLITS
from vilu.triage.fitting import (
    FitCase,
    answer_to_judge,
    fit,
    fit_case,
    is_worth_testing,
    likely_right,
    method_for,
)
from vilu.triage.forecast import Forecast, is_enough_to_fit
from vilu.triage.guarantee import (
    POSITIONS,
    GuaranteeProgress,
    Mask,
    PhotoSplit,
    first_of_scene,
    keep_guarantee,
    progress_of,
    rule_of,
)
from vilu.triage.labels import Entry, LabelBook
from vilu.triage.photos import FOLDER, PhotoFolder, Photos, PhotoStores
from vilu.triage.state import (
    BOOK,
    CANDIDATE_FOLDER,
    NOTHING_CHOSEN,
    PREDICTOR_FOLDER,
    RESULT_FILES,
    STATE,
    TriageSettings,
    TriageState,
    open_state,
)
from vilu.triage.trial import Trial, require_scores

FURTHER: Final = 8
"""Number of thresholds by which the limit moves up once all thresholds up to it are certified."""

CALIBRATION_PART: Final = 3
"""With a guarantee and no candidate, every third photo to label is of the calibration side."""

WORTH_MORE: Final = 1.25
"""The limit of a candidate includes at least this multiple of the photos accepted at present."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TriageRun:
    """The input of the steps of one run.

    Attributes:
        root: The folder of the triage.
        settings: The settings of the run.
        photos: The embedded photos, with the labels of the book.
        book: All labels that were asked for or given.
        split: Which photos are for fits, and which for a guarantee.
    """

    root: Path
    settings: TriageSettings
    photos: Photos
    book: LabelBook
    split: PhotoSplit

    @property
    def present(self) -> Path:
        """Folder of the present predictor, which decides."""
        return self.root / PREDICTOR_FOLDER

    @property
    def candidate(self) -> Path:
        """Folder of a candidate, which is tested while the present predictor decides."""
        return self.root / CANDIDATE_FOLDER

    def tested_folder(self, state: TriageState) -> Path:
        """Folder of the tested predictor: the candidate if there is any, else the present one."""
        return self.present if state.candidate is None else self.candidate

    def score(
        self, predictor: FailurePredictor, calibration: Calibration | None = None
    ) -> Outcomes:
        """Score all photos with a predictor; a calibration adds decisions to the outcomes."""
        facts = {
            "method": predictor.label,
            "dataset": self.settings.photos.name,
            "seed": self.settings.seed,
            "is_probability": states_probability(predictor),
            "provenance": provenance_of(calibration),
        }
        return score_rows(predictor, self.photos, facts, calibration=calibration)

    def write(self, state: TriageState) -> TriageState:
        """Write the state to the folder, and return it."""
        write_document(self.root / STATE, state)
        return state


@dataclass(frozen=True)
class TriageResult:
    """The result of a run.

    Attributes:
        photos: The embedded photos.
        outcomes: Outcomes of all photos by the present predictor, with decisions.
        predictor: The present predictor, which decides.
        answer: Which answers the present predictor judges, and why.
        likely: The estimate of which answers of the present predictor are likely right; None if an
            earlier version of vilu fitted it.
        rule: The guarantee of the present predictor; None if nothing is certified.
        progress: How far the guarantee of the tested predictor is; None if the tested predictor
            needs no labels, or if there is no calibration photo.
        tested_outcomes: Outcomes of all photos by the tested predictor.
        has_candidate: Whether the tested predictor is a candidate, not the present predictor.
        is_calibration: (N,) bool, which photos may count for a guarantee.
        is_first_of_scene: (M,) bool, which of the photos that count for the guarantee are near
            copies neither of a photo to fit on nor of an earlier photo; None without ``progress``.
        asked: Entries of the photos whose labels are asked for.
        book: All labels that were asked for or given.
        n_fit: Number of labels that the present predictor was fitted on.
        forecast: How many photos further labels could get accepted.
        n_new: Number of photos that were embedded in this run.
    """

    photos: Photos
    outcomes: Outcomes
    predictor: FailurePredictor
    answer: AnswerChoice
    likely: LikelyRight | None
    rule: Rule | None
    progress: GuaranteeProgress | None
    tested_outcomes: Outcomes
    has_candidate: bool
    is_calibration: Mask
    is_first_of_scene: Mask | None
    asked: list[Entry]
    book: LabelBook
    n_fit: int
    forecast: Forecast
    n_new: int = 0


def run_triage(
    root: Path,
    settings: TriageSettings,
    listing: PhotoFolder,
    labels: Mapping[str, str],
    streams: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> TriageResult:
    """Run a triage once: embed new photos, note the labels, and take all steps (``advance``)."""
    state = begin(root, settings, overwrite=overwrite)
    stores = PhotoStores(root / FOLDER)
    n_new = stores.update(listing, settings.embedding)
    photos = stores.open(listing.listing)
    _require_photos(photos, settings.photos)
    # The book may no longer have its drawn photos, if their classes are gone. The state remembers
    # that there were any.
    has_drawn = state.has_drawn or LabelBook.load(root / BOOK).has_drawn
    streams = SPLITS[settings.about].streams_of(labels, streams, has_drawn=has_drawn)
    book = note_labels(root, photos, listing.paths, labels, streams)
    _, result = advance(root, settings, state, photos, book)
    return dataclasses.replace(result, n_new=n_new)


def begin(root: Path, settings: TriageSettings, *, overwrite: bool) -> TriageState:
    """Open the state in which a run begins, and carry it over to the settings of the run.

    ``overwrite`` removes earlier results (``RESULT_FILES``).
    """
    state = open_state(root, settings, overwrite=overwrite)
    if overwrite:
        for name in RESULT_FILES:
            path = root / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    state = carry_over(root, state, settings)
    folder = {"photos": str(settings.photos.absolute()), "follow_links": settings.follow_links}
    state = state.model_copy(update=folder)
    write_document(root / STATE, state)
    return state


def _require_photos(photos: Photos, folder: Path) -> None:
    """Raise DataError if no photo was embedded."""
    if len(photos):
        return
    reasons = Counter(photos.bad.values()).most_common()
    why = ", ".join(f"{n} {reason}" for reason, n in reasons)
    raise DataError(
        f"not one of {plural(len(photos.bad), 'photo')} in {folder} can be read: {why}."
    )


def note_labels(
    root: Path,
    photos: Photos,
    paths: list[str],
    labels: Mapping[str, str],
    streams: Mapping[str, str],
) -> LabelBook:
    """Add the new labels to the book; remove a guarantee if one of its labels has changed."""
    book = LabelBook.load(root / BOOK)
    book.rename(
        text_of_version_0_1, paths
    )  # books of version 0.1.0 write some paths in another way
    # The guarantee is removed before the book is saved. Otherwise a run that is killed in between
    # could leave a guarantee whose labels have changed.
    remove_outdated_calibration(root / PREDICTOR_FOLDER, _paths_to_relabel(book, labels))
    n_noted = book.answer(labels, streams)
    if n_noted:
        logger.info("%d labels are new or changed; %d in all", n_noted, len(book.labels))
    n_photos_changed = book.note_pictures(dict(zip(photos.ids, photos.pictures, strict=True)))
    if n_photos_changed:
        logger.warning(
            "%d photos have changed since their labels were given, so no guarantee rests on them",
            n_photos_changed,
        )
    # Noted labels are saved at once. Other changes are saved in the last step (``ask_for_labels``).
    if n_noted:
        book.save(root / BOOK)
    return book


def _paths_to_relabel(book: LabelBook, labels: Mapping[str, str]) -> set[str]:
    """Paths of the photos whose label in the book is replaced by a different label."""
    paths = set()
    for path, label in labels.items():
        entry = book.entries.get(path)
        if entry is None or entry.label is None:
            continue  # there is no label that could be replaced
        if entry.label != label:
            paths.add(path)
    return paths


def advance(
    root: Path, settings: TriageSettings, state: TriageState, photos: Photos, book: LabelBook
) -> tuple[TriageState, TriageResult]:
    """Take all steps after the photos were embedded; return the next state and the result."""
    photos.label(book.labels, settings.of_no_class)
    split = SPLITS[settings.about].of(photos, book, settings.seed)
    run = TriageRun(root, settings, photos, book, split)
    has_drawn = state.has_drawn or book.has_drawn
    state = bind(state, split.bound_to(photos), has_drawn=has_drawn)
    state = test_before_a_fit(run, state)
    state, predictor = choose_predictor(run, state)
    run = dataclasses.replace(run, split=split.for_predictor(predictor, photos))
    tested = run.score(predictor)
    state, progress = test_predictor(run, state, predictor, tested)
    state = ask_for_labels(run, state, tested.uncertainty, progress)
    result = _result(run, state, tested, progress)
    guarantee = "" if result.rule is None else str(result.rule)
    state = run.write(state.model_copy(update={"guarantee": guarantee}))
    return state, result


def bind(state: TriageState, pictures: str | None, *, has_drawn: bool) -> TriageState:
    """The state, bound to the pictures that the guarantee is about; None: it is about new ones.

    Raises:
        UsageError: If pictures were added, removed or changed after the first draw.
    """
    has_changed = state.pictures != pictures
    if has_drawn and has_changed:
        raise UsageError(
            "photos were added, removed or changed after the first labels were drawn, and `--about "
            "folder` is about the photos that were there. Give the folder as it was, or a new -o, "
            "with --labels and the labels.parquet of this one."
        )
    return state.model_copy(update={"pictures": pictures, "has_drawn": has_drawn})


def _result(
    run: TriageRun, state: TriageState, tested: Outcomes, progress: GuaranteeProgress | None
) -> TriageResult:
    predictor = load_predictor(run.present)
    calibration = Calibration.find(run.present)
    is_first_of_scene = None
    if progress is not None:
        is_first_of_scene = first_of_scene(run.photos, run.split.fit_rows, progress.rows)
    n_fit = _number_of_fit_labels(run, state, predictor)
    outcomes = run.score(predictor, calibration)
    # so that `vilu evaluate` and `vilu calibrate` know that the predictor learned from these labels
    seen = {"n_seen_in_fit": n_fit, "n_compared_with_fit": len(run.book.labels)}
    outcomes = dataclasses.replace(outcomes, provenance={**outcomes.provenance, **seen})
    return TriageResult(
        photos=run.photos,
        outcomes=outcomes,
        predictor=predictor,
        answer=state.answer,
        likely=likely_with_drawn(run, state, predictor, outcomes),
        rule=rule_in_force(run.present),
        progress=progress,
        tested_outcomes=tested,
        has_candidate=state.candidate is not None,
        is_calibration=run.split.for_calibration,
        is_first_of_scene=is_first_of_scene,
        asked=run.book.waiting(),
        book=run.book,
        n_fit=n_fit,
        forecast=forecast_of(run, state, tested),
    )


def likely_with_drawn(
    run: TriageRun, state: TriageState, predictor: FailurePredictor, outcomes: Outcomes
) -> LikelyRight | None:
    """The estimate of the present predictor with all labels of its draw; it is kept beside it.

    Args:
        run: The run.
        state: The state after the test.
        predictor: The present predictor.
        outcomes: Outcomes of all photos by the present predictor.
    """
    likely = LikelyRight.find(run.present)
    if likely is None or state.trial is None:
        return likely
    if len(likely.failure) != likely.n:  # a file of a version that did not keep the answers
        return likely
    split = run.split.for_predictor(predictor, run.photos)
    rows = split.drawn_rows(outcomes.uncertainty, state.trial.limit)
    drawn = JudgedAnswers(outcomes.uncertainty[rows], outcomes.failure[rows])
    with_drawn = likely.with_drawn(drawn, outcomes.uncertainty)
    with_drawn.save(run.present)
    return with_drawn


def _number_of_fit_labels(run: TriageRun, state: TriageState, predictor: FailurePredictor) -> int:
    """Number of labels that the present predictor was fitted on, or an upper bound of it."""
    if state.trial is not None:
        return state.trial.n_fit
    # without a calibration photo there is no trial, which would have the number
    return len(run.split.fit_rows) if predictor.needs_labels else 0


def forecast_of(run: TriageRun, state: TriageState, tested: Outcomes) -> Forecast:
    """How many photos further labels could get accepted, by the tested predictor."""
    trial = state.tested_trial
    settings = run.settings
    return Forecast.of(
        tested.uncertainty[run.split.for_calibration],
        n_photos=len(run.photos),
        n_classes=len(settings.embedding.names),
        n_fit_labels=0 if trial is None else trial.n_fit,
        most_fit_labels=len(run.split.fit_rows) + len(run.split.rows_to_pick(run.photos, run.book)),
        n_labels=len(run.book.labels),
        max_risk=settings.max_risk,
        level=level_of(state.n_tested + 1, settings.delta),
        looks_of=run.split.looks_before_labels,
        share_accepted=share_accepted(run),
    )


def test_before_a_fit(run: TriageRun, state: TriageState) -> TriageState:
    """Test the predictor of the last run if a new predictor would take its place untested.

    Labels of a draw and labels to fit on may come in the same run. Without this test the labels of
    the draw would say nothing about the predictor that they were drawn for.
    """
    is_going_on = case_of(run, state).goes_on
    is_missing = not (run.tested_folder(state) / PREDICTOR).is_file()
    if is_going_on or is_missing or state.tested_trial is None:
        return state
    predictor = _load_uncalibrated(run.tested_folder(state))
    run = dataclasses.replace(run, split=run.split.for_predictor(predictor, run.photos))
    state, _ = test_predictor(run, state, predictor, run.score(predictor))
    return state


def test_predictor(
    run: TriageRun, state: TriageState, predictor: FailurePredictor, tested: Outcomes
) -> tuple[TriageState, GuaranteeProgress | None]:
    """Count the labels for the tested predictor, and keep what they certify.

    Returns:
        The next state, and how far the guarantee is: None if the predictor needs no labels, or if
        there is no calibration photo.
    """
    has_test = predictor.needs_labels and run.split.for_calibration.any()
    if not has_test:
        return state, None
    state, progress = count_labels(run, state, tested)
    return keep_certified(run, state, predictor, tested, progress), progress


def rule_in_force(folder: Path) -> Rule | None:
    """The guarantee of the predictor in a folder; None without a feasible rule."""
    calibration = Calibration.find(folder)
    if calibration is None or calibration.rule is None:
        return None
    if calibration.rule.feasible:
        return calibration.rule
    return None


# The first step: choose the predictor to test. The labels of the last step are for its test.


def choose_predictor(run: TriageRun, state: TriageState) -> tuple[TriageState, FailurePredictor]:
    """Load the tested predictor or fit a new one, as the ``FitCase`` of the run says."""
    case = case_of(run, state)
    if case.goes_on:
        return state, _load_uncalibrated(run.tested_folder(state))
    fit_rows = run.split.fit_rows
    method = method_for(run.photos, fit_rows)
    predictor = fit(method, run.photos, fit_rows, run.settings.seed)
    labelled = run.photos.take(fit_rows)
    answer = answer_to_judge(run.settings.answer, predictor, labelled, run.settings.max_risk)
    predictor = predictor.judging(answer.answer)
    uncertainty = run.score(predictor).uncertainty
    likely = likely_right(predictor, uncertainty, run.settings.max_risk)
    if case is FitCase.NO_GUARANTEE:
        state = _let_decide(run, state, predictor, trial=None, answer=answer, likely=likely)
        return run.write(state), predictor
    return _begin_trial(run, state, predictor, answer, likely, uncertainty)


def case_of(run: TriageRun, state: TriageState) -> FitCase:
    """Whether the run fits a new predictor, and why."""
    fit_rows = run.split.fit_rows
    return fit_case(
        state,
        method=method_for(run.photos, fit_rows),
        n_labels=len(fit_rows),
        is_saved=(run.tested_folder(state) / PREDICTOR).is_file(),
        is_guaranteed=rule_in_force(run.present) is not None,
        has_calibration_photos=bool(run.split.for_calibration.any()),
    )


def _load_uncalibrated(folder: Path) -> FailurePredictor:
    predictor = load_predictor(folder)
    predictor.calibrator_ = None
    return predictor


def _let_decide(
    run: TriageRun,
    state: TriageState,
    predictor: FailurePredictor,
    *,
    trial: Trial | None,
    answer: AnswerChoice,
    likely: LikelyRight | None,
) -> TriageState:
    """Save a predictor as the present one, which decides. The caller writes the returned state."""
    predictor.save(run.present)
    if likely is not None:
        likely.save(run.present)
    Vocabulary.of(run.photos, run.photos.first.manifest.dtype).save(run.present)
    return state.model_copy(
        update={
            "method": predictor.name,
            "answer": answer,
            "trial": trial,
            "candidate": None,
            "candidate_answer": NOTHING_CHOSEN,
        }
    )


def _begin_trial(
    run: TriageRun,
    state: TriageState,
    predictor: FailurePredictor,
    answer: AnswerChoice,
    likely: LikelyRight,
    scores: Floats,
) -> tuple[TriageState, FailurePredictor]:
    """Make a new predictor the candidate if its test is worth the labels.

    ``scores`` (N,) are its uncertainties of all photos.
    """
    n_labels = len(run.split.fit_rows)
    least_share = min(WORTH_MORE * share_accepted(run), 1.0)
    candidate = plan_trial(run, state, scores, least_share=least_share)
    next_state = state.model_copy(update={"n_fit_of_last_candidate": n_labels})
    if not is_worth_testing(candidate, state, n_labels):
        return run.write(next_state), _load_uncalibrated(run.tested_folder(state))
    predictor.save(run.candidate)
    likely.save(run.candidate)
    next_state = next_state.model_copy(update={"candidate": candidate, "candidate_answer": answer})
    return run.write(next_state), predictor


def plan_trial(
    run: TriageRun, state: TriageState, scores: Floats, *, least_share: float = 0.0
) -> Trial:
    """Plan the trial of a predictor; its limit includes at least ``least_share`` of the photos."""
    settings = run.settings
    for_calibration = run.split.for_calibration
    require_scores(scores, np.flatnonzero(for_calibration), run.photos.ids)
    n_answered = int((for_calibration & run.split.answered).sum())
    return Trial.plan(
        n_fit=len(run.split.fit_rows),
        scores=scores[for_calibration],
        n_answered=n_answered,
        max_risk=settings.max_risk,
        delta=level_of(state.n_tested + 1, settings.delta),
        least_share=least_share,
    )


def share_accepted(run: TriageRun) -> float:
    """Share of the calibration photos that the guarantee in force accepts."""
    for_calibration = run.split.for_calibration
    rule = rule_in_force(run.present)
    if rule is None or rule.threshold is None or not for_calibration.any():
        return 0.0
    uncertainty = load_predictor(run.present).predict_uncertainty(run.photos)
    is_accepted = uncertainty[for_calibration] <= rule.threshold
    return float(is_accepted.mean())


# The second step: count the labels for the guarantee.


def count_labels(
    run: TriageRun, state: TriageState, tested: Outcomes
) -> tuple[TriageState, GuaranteeProgress]:
    """Count the labels for the guarantee, and note what the test uses of the level."""
    trial = state.tested_trial or plan_trial(run, state, tested.uncertainty)
    settings = run.settings
    progress = progress_of(
        trial,
        tested,
        run.split,
        max_risk=settings.max_risk,
        level=trial.level or level_of(state.n_tested + 1, settings.delta),
    )
    return run.write(note_test(state, trial, progress)), progress


def note_test(state: TriageState, trial: Trial, progress: GuaranteeProgress) -> TriageState:
    """The state after a test: what the test used of the level."""
    # A test with too few labels to certify anything uses none of the level, so it is not counted.
    starts_to_count = trial.level == 0 and progress.looks.can_certify(progress.outcomes.uncertainty)
    if starts_to_count:
        trial = trial.model_copy(update={"level": progress.looks.delta})
        state = state.model_copy(update={"n_tested": state.n_tested + 1})
    return state.with_trial(trial)


# The third step: keep what was certified.


def keep_certified(
    run: TriageRun,
    state: TriageState,
    predictor: FailurePredictor,
    tested: Outcomes,
    progress: GuaranteeProgress,
) -> TriageState:
    """Write a better guarantee; a candidate replaces the present predictor if it accepts more."""
    if state.candidate is not None:
        is_accepted = tested.uncertainty[run.split.for_calibration] <= progress.threshold
        share = float(is_accepted.mean())
        share_before = share_accepted(run)
        if share <= share_before:
            return state
        logger.info(
            "a predictor that was fitted on more labels accepts %.1f %% of the photos, not %.1f %%",
            100 * share,
            100 * share_before,
        )
        state = _let_decide(
            run,
            state,
            predictor,
            trial=state.candidate,
            answer=state.candidate_answer,
            likely=LikelyRight.find(run.candidate),
        )
        # The old state refers to the folder of the candidate. So the new state is written before
        # the folder is removed.
        state = run.write(state)
        shutil.rmtree(run.candidate)
    if _replaces(progress, rule_in_force(run.present)):
        settings = run.settings
        all_progress = {ALL: progress}
        closed = run.split.closed(run.photos, tested.uncertainty, progress.threshold)
        rule = rule_of(all_progress, settings.max_risk, settings.confidence, closed)
        keep_guarantee(
            run.present,
            predictor,
            run.photos,
            all_progress,
            progress.outcomes,
            rule,
            settings.photos.name,
        )
    return state


def _replaces(progress: GuaranteeProgress, rule: Rule | None) -> bool:
    """Whether a new rule is written from the progress.

    A rule in force stays certified. So it is only replaced by a rule that accepts more.
    """
    if not len(progress.rows):
        return False
    if rule is None:
        return True
    return progress.threshold > (rule.threshold or 0.0)


# The last step: ask for labels.


def ask_for_labels(
    run: TriageRun, state: TriageState, uncertainty: Floats, progress: GuaranteeProgress | None
) -> TriageState:
    """Ask for the labels of the draw that are missing, or else for new labels of both sides."""
    description = read_description(run.tested_folder(state) / PREDICTOR)
    # The book names a predictor by the start of the digest of its weights.
    fingerprint = str(description["weights_sha256"])[:16]
    missing = np.zeros(0, np.int64) if progress is None else progress.missing
    _withdraw_requests(run, fingerprint, _paths_of(run, missing))
    drawn_rows = missing
    if progress is not None and not len(missing):
        state, drawn_rows = _draw(run, state, uncertainty, progress)
    _ask_for_guarantee(run, fingerprint, drawn_rows)
    if not len(missing):
        n_to_fit = run.settings.n_next - len(run.book.waiting())
        _ask_to_fit(run, fingerprint, uncertainty, n_to_fit)
    run.book.save(run.root / BOOK)
    return run.write(state)


def _ask_for_guarantee(run: TriageRun, fingerprint: str, rows: Ints) -> None:
    """Ask for labels of calibration ``rows``, in the random order, unless they are asked for."""
    if not len(rows):
        return
    waiting = {entry.path for entry in run.book.waiting()}
    new_paths = [path for path in _paths_of(run, rows) if path not in waiting]
    last_position = int(run.split.position[rows[-1]])
    probability = (last_position + 1) / POSITIONS
    run.book.ask(new_paths, "calibration", predictor=fingerprint, probability=probability)


def _draw(
    run: TriageRun, state: TriageState, uncertainty: Floats, progress: GuaranteeProgress
) -> tuple[TriageState, Ints]:
    """Draw the next calibration photos; return the state after the draw, and their rows."""
    nothing: Ints = np.zeros(0, np.int64)
    trial = state.tested_trial
    if trial is None:
        return state, nothing
    n_drawn = n_to_draw(
        state,
        run.settings.n_next,
        is_guaranteed=rule_in_force(run.present) is not None,
        is_ready=is_ready_to_draw(run, trial),
        can_be_shown=progress.more is not None,
    )
    if not n_drawn:
        return state, nothing
    trial = further_trial(trial, progress, uncertainty[run.split.for_calibration])
    rows = run.split.open_rows(uncertainty, trial.limit)[:n_drawn]
    return state.with_trial(trial), rows


def is_ready_to_draw(run: TriageRun, trial: Trial) -> bool:
    """Whether a predictor without a guarantee is worth calibration labels already.

    A guarantee must be likely, and there must be enough labels to fit on (``is_enough_to_fit``). If
    no photo is left to fit on, nothing is gained by waiting, so the predictor is always worth them.
    """
    if not len(run.split.rows_to_pick(run.photos, run.book)):
        return True
    n_classes = len(run.settings.embedding.names)
    return trial.likely and is_enough_to_fit(trial, len(run.split.fit_rows), n_classes)


def _paths_of(run: TriageRun, rows: Ints) -> list[str]:
    """Paths of the photos in these rows (M,)."""
    return [run.photos.ids[row] for row in rows.tolist()]


def _withdraw_requests(run: TriageRun, fingerprint: str, missing: list[str]) -> None:
    """Withdraw the requests that were made for another predictor than that with ``fingerprint``.

    Requests for labels of the paths ``missing`` stay. If there are any and nothing is guaranteed,
    all other requests are withdrawn.
    """
    only_missing = bool(missing) and rule_in_force(run.present) is None

    def is_forgotten(entry: Entry) -> bool:
        if entry.path in missing:
            return False
        return only_missing or entry.predictor != fingerprint

    run.book.forget(is_forgotten)


def n_to_draw(
    state: TriageState, n: int, *, is_guaranteed: bool, is_ready: bool, can_be_shown: bool
) -> int:
    """How many of the next ``n`` labels are of the calibration side.

    - If a candidate is tested: all labels.
    - If there is a guarantee: every third label.
    - If the predictor is ready (``is_ready_to_draw``) and a guarantee is possible: all labels.
    - In all other cases: none.

    Args:
        state: State of the triage.
        n: Number of labels that are asked for.
        is_guaranteed: Whether a guarantee is in force.
        is_ready: Whether the predictor is worth calibration labels.
        can_be_shown: Whether some number of further calibration labels would certify a threshold.
    """
    if state.candidate is not None:
        return n if can_be_shown else 0
    if is_guaranteed:
        return n // CALIBRATION_PART
    return n if is_ready and can_be_shown else 0


def further_trial(trial: Trial, progress: GuaranteeProgress, scores: Floats) -> Trial:
    """The trial with its limit ``FURTHER`` thresholds higher, if the present limit is certified.

    Otherwise the trial itself. ``scores`` (M,) are the uncertainties of the calibration photos.
    """
    if progress.certified != progress.looks.last:
        return trial
    return trial.further(FURTHER, scores)


def _ask_to_fit(run: TriageRun, fingerprint: str, uncertainty: Floats, n: int) -> None:
    """Ask for ``n`` labels of the fit side."""
    if n <= 0:
        return
    rows = run.split.rows_to_pick(run.photos, run.book)
    fit_rows = choose_to_fit(run.photos, rows, uncertainty, n, run.settings.seed)
    run.book.ask(_paths_of(run, fit_rows), "fit", predictor=fingerprint)
