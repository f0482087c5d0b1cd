"""The steps of a triage run: each step takes the folder's state and returns the next state.

``advance`` calls the steps in order. A step first writes its files, then writes the next state to
``triage.json``, then returns this state. Only the last step (``ask_for_labels``) writes the state
first. So if a run is killed between two steps, the next run continues with the second step. If a
run is killed inside a step, the next run repeats the step.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
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
from vilu.calibration.rules import ALL_ROWS_GROUP, Rule
from vilu.datasets.files import text_of_version_0_1
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.spread import is_shown_as_probability
from vilu.predictors.persistence.description import read_description
from vilu.predictors.persistence.files import PREDICTOR
from vilu.predictors.persistence.storage import load_predictor, load_uncalibrated
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.scoring.score import provenance_of, score_rows
from vilu.text import plural
from vilu.triage.carrying import carry_over
from vilu.triage.choose import choose_rows_to_fit
from vilu.triage.closed_folder import SPLIT_CLASSES
from vilu.triage.fitting import (
    FitCase,
    answer_to_judge,
    choose_method,
    estimate_likely_right,
    fit_case,
    fit_predictor,
    is_worth_testing,
)
from vilu.triage.forecast import Forecast, is_enough_to_fit
from vilu.triage.guarantee import (
    GuaranteeProgress,
    Mask,
    PhotoSplit,
    draw_probability,
    keep_guarantee,
    new_scene_mask,
    progress_of,
    rule_of,
)
from vilu.triage.labels import Entry, GivenFile, LabelBook, places_of_entries
from vilu.triage.photos import EMBEDDINGS_FOLDER, PhotoFolder, Photos, PhotoStores
from vilu.triage.state import (
    BOOK_FILE,
    CANDIDATE_FOLDER,
    FORMER_BOOK_FILE,
    NO_ANSWER_CHOICE,
    PREDICTOR_FOLDER,
    RESULT_FILES,
    STATE_FILE,
    TriageSettings,
    TriageState,
    open_state,
)
from vilu.triage.trial import Trial, require_scores

THRESHOLDS_PER_STEP: Final = 8
"""Once all thresholds up to the limit are certified, the limit rises by this many thresholds."""

CALIBRATION_INTERVAL: Final = 3
"""With a guarantee and no candidate, every third photo to label is on the calibration side."""

CANDIDATE_COVERAGE_FACTOR: Final = 1.25
"""At least this many times the photos accepted now are up to a candidate's uncertainty limit."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TriageRun:
    """The input for the steps of one run.

    Attributes:
        root: The triage folder.
        settings: The run's settings.
        photos: The embedded photos, with the labels from the book.
        book: All labels that were asked for or given.
        split: The photos to fit on, and the photos for a guarantee.
    """

    root: Path
    settings: TriageSettings
    photos: Photos
    book: LabelBook
    split: PhotoSplit

    @property
    def present_folder(self) -> Path:
        """The present predictor's folder. The present predictor decides about the photos."""
        return self.root / PREDICTOR_FOLDER

    @property
    def candidate_folder(self) -> Path:
        """The candidate's folder. While a candidate is tested, the present predictor decides."""
        return self.root / CANDIDATE_FOLDER

    def tested_folder(self, state: TriageState) -> Path:
        """Return the tested predictor's folder: the candidate, or else the present predictor."""
        return self.present_folder if state.candidate is None else self.candidate_folder

    def score(
        self, predictor: FailurePredictor, calibration: Calibration | None = None
    ) -> Outcomes:
        """Score all photos with a predictor. A calibration adds decisions to the outcomes."""
        facts = {
            "method": predictor.label,
            "dataset": self.settings.photos.name,
            "seed": self.settings.seed,
            "is_probability": is_shown_as_probability(predictor),
            "provenance": provenance_of(calibration),
        }
        return score_rows(predictor, self.photos, facts, calibration=calibration)

    def write(self, state: TriageState) -> TriageState:
        """Write the state to the folder and return it."""
        write_document(self.root / STATE_FILE, state)
        return state


@dataclass(frozen=True)
class TriageResult:
    """The result of a run.

    Attributes:
        photos: The embedded photos.
        outcomes: Outcomes for all photos by the present predictor, with decisions.
        predictor: The present predictor. Its decisions are in ``outcomes``.
        answer: The answer kind that the present predictor judges, with the reason.
        likely_right: Estimate for the present predictor: which answers are likely right. None if an
            earlier vilu version fitted this predictor.
        rule: The present predictor's guarantee, or None if nothing is certified.
        progress: Progress of the tested predictor's guarantee (``progress_to_show``). None if the
            tested predictor needs no labels, or if there is no calibration photo.
        tested_outcomes: Outcomes for all photos by the tested predictor.
        has_candidate: Whether the tested predictor is a candidate, not the present predictor.
        is_calibration: (N,) bool, True for photos that may count for a guarantee.
        is_first_of_scene: (M,) bool about the photos that count for the guarantee. False for near
            copies of a photo to fit on or of an earlier photo. None without
            ``progress``.
        entries_to_label: Entries of the photos to label next.
        book: All labels that were asked for or given.
        n_fit: How many labels the present predictor was fitted on.
        forecast: How many photos could be accepted with more labels.
        n_new: How many photos were embedded in this run.
    """

    photos: Photos
    outcomes: Outcomes
    predictor: FailurePredictor
    answer: AnswerChoice
    likely_right: LikelyRight | None
    rule: Rule | None
    progress: GuaranteeProgress | None
    tested_outcomes: Outcomes
    has_candidate: bool
    is_calibration: Mask
    is_first_of_scene: Mask | None
    entries_to_label: list[Entry]
    book: LabelBook
    n_fit: int
    forecast: Forecast
    n_new: int = 0


def run_triage(
    root: Path,
    settings: TriageSettings,
    photo_folder: PhotoFolder,
    given_files: Sequence[GivenFile],
    *,
    overwrite: bool = False,
) -> TriageResult:
    """Run a triage once: embed new photos, note the labels, and take all steps (``advance``).

    Args:
        root: The triage folder.
        settings: The run's settings.
        photo_folder: The photos.
        given_files: The labels given to this run. A later file replaces labels of an earlier one.
        overwrite: Whether to begin anew, and remove earlier results.
    """
    state = begin_run(root, settings, overwrite=overwrite)
    stores = PhotoStores(root / EMBEDDINGS_FOLDER)
    n_new = stores.embed_new_photos(photo_folder, settings.embedding)
    photos = stores.open_photos(photo_folder.listed_photos)
    _require_photos(photos, settings.photos)
    labels, given_streams = _given_labels(given_files, photos, settings.photos)
    has_drawn = _has_drawn(root, state)
    split_class = SPLIT_CLASSES[settings.about]
    streams = split_class.streams_of_unasked_labels(labels, given_streams, has_drawn=has_drawn)
    _answer_requests(root, given_files)
    book = note_labels(root, photos, photo_folder.paths, labels, streams)
    _, result = advance(root, settings, state, photos, book)
    return dataclasses.replace(result, n_new=n_new)


def _given_labels(
    given_files: Sequence[GivenFile], photos: Photos, folder: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Map the photo paths to the given labels, and to the streams of these labels.

    A label of a known picture goes to a photo that has this picture now. If no photo in ``folder``
    has the picture, the label is left out, with a warning.

    Raises:
        DataError: If all given labels are left out.
    """
    labels: dict[str, str] = {}
    streams: dict[str, str] = {}
    n_missing = 0
    pictures = {picture.hex() for picture in photos.pictures}
    for file in given_files:
        for path, label in file.labels.items():
            _give_label(path, label, file.streams.get(path), labels, streams)
        places = places_of_entries(file.labelled_pictures, photos.picture_of_path)
        for entry in file.labelled_pictures:
            if entry.path in places:
                place = places[entry.path]
                _give_label(place, str(entry.label), entry.stream, labels, streams)
            n_missing += entry.picture not in pictures
    if n_missing:
        text = _missing_pictures_in_words(n_missing, folder)
        if not labels:
            raise DataError(text)
        logger.warning("%s", text)
    return labels, streams


def _give_label(
    path: str, label: str, stream: str | None, labels: dict[str, str], streams: dict[str, str]
) -> None:
    """Set a photo's label and stream. The stream of an earlier file is removed in any case."""
    labels[path] = label
    streams.pop(path, None)
    if stream is not None:
        streams[path] = stream


def _answer_requests(root: Path, given_files: Sequence[GivenFile]) -> None:
    """Save the answers to open requests for renamed photos, at the former paths.

    Later, ``_follow_pictures`` moves these labels to the present paths.
    """
    answers: dict[str, str] = {}
    for file in given_files:
        answers |= file.answers
    if answers:
        book = LabelBook.load(root / BOOK_FILE)
        book.answer_requests(answers)
        book.save(root / BOOK_FILE)


def _missing_pictures_in_words(n_missing: int, folder: Path) -> str:
    """Write a text on labels in a given book whose pictures are not in the photo folder."""
    labels_in_words = plural(n_missing, "label")
    return (
        f"{labels_in_words} left out, since no readable photo in {folder} has the picture "
        "that was labelled. If these photos were only edited, and their paths are the same, give "
        "the labels by path: `vilu labels OLD_FOLDER -o labels.csv`, then --labels labels.csv."
    )


def _has_drawn(root: Path, state: TriageState) -> bool:
    """Return whether a label for a guarantee was ever asked for."""
    # Drawn photos may have left the book because their classes are gone. The state remembers them.
    return state.has_drawn or LabelBook.load(root / BOOK_FILE).has_drawn


def begin_run(root: Path, settings: TriageSettings, *, overwrite: bool) -> TriageState:
    """Open the first state of a run, and carry the state over to the run's settings.

    With ``overwrite``, earlier results are removed (``RESULT_FILES``).
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
    location = {"photos": str(settings.photos.absolute()), "follow_links": settings.follow_links}
    state = state.model_copy(update=location)
    write_document(root / STATE_FILE, state)
    return state


def _require_photos(photos: Photos, folder: Path) -> None:
    """Raise DataError if no photo was embedded."""
    if len(photos):
        return
    n_of_reason = Counter(photos.fault_of_path.values())
    reasons = n_of_reason.most_common()
    why = ", ".join(f"{n} {reason}" for reason, n in reasons)
    raise DataError(
        f"not one of {plural(len(photos.fault_of_path), 'photo')} in {folder} can be read: {why}."
    )


def note_labels(
    root: Path,
    photos: Photos,
    paths: list[str],
    labels: Mapping[str, str],
    streams: Mapping[str, str],
) -> LabelBook:
    """Add the new labels to the book. Remove a guarantee if any of its labels has changed.

    ``labels`` maps paths to the labels given to this run, and ``streams`` maps paths to the streams
    of these labels. ``paths`` are the paths of all photos.
    """
    _follow_pictures(root, photos)
    book = LabelBook.load(root / BOOK_FILE)
    book.rename_paths(text_of_version_0_1, paths)
    # The guarantee is removed before the book is saved. Otherwise, if the run is killed in between,
    # a guarantee with changed labels could stay.
    changed_paths = _paths_to_relabel(root, book, labels)
    remove_outdated_calibration(root / PREDICTOR_FOLDER, changed_paths)
    book.set_aside_other_pictures(labels, photos.picture_of_path)
    n_noted = book.note_labels(labels, streams)
    if n_noted:
        logger.info("%d labels are new or changed; %d in all", n_noted, len(book.labels))
    n_photos_changed = book.note_pictures(photos.picture_of_path)
    if n_photos_changed:
        logger.warning(
            "%d photos have changed since their labels were given, so no guarantee rests on them",
            n_photos_changed,
        )
    # New labels are saved at once. The last step (``ask_for_labels``) saves all other changes.
    if n_noted:
        book.save(root / BOOK_FILE)
    return book


def _follow_pictures(root: Path, photos: Photos) -> None:
    """Save both books with the present paths of the labelled pictures, if a path has changed."""
    for name in (FORMER_BOOK_FILE, BOOK_FILE):
        book = LabelBook.load(root / name)
        n_moved = book.follow_pictures(photos.picture_of_path)
        if n_moved:
            logger.info("%s: %d labels and requests went with the pictures", name, n_moved)
            book.save(root / name)


def _paths_to_relabel(root: Path, book: LabelBook, labels: Mapping[str, str]) -> set[str]:
    """Return paths of photos for which ``labels`` changes a label in the book.

    Earlier paths of these photos are included.
    """
    paths = set()
    pictures = set()
    for path, label in labels.items():
        entry = book.entries.get(path)
        if entry is None or entry.label is None:
            continue  # there is no label to replace
        if entry.label != label:
            paths.add(path)
            pictures.add(entry.picture)
    if paths:
        for path, picture in PhotoStores(root / EMBEDDINGS_FOLDER).seen_pictures():
            if picture.hex() in pictures:
                paths.add(path)
    return paths


def advance(
    root: Path, settings: TriageSettings, state: TriageState, photos: Photos, book: LabelBook
) -> tuple[TriageState, TriageResult]:
    """Take all steps after the photos were embedded. Return the next state and the result."""
    photos.set_labels(book.labels, settings.outside_labels)
    split = SPLIT_CLASSES[settings.about].of(photos, book, settings.seed)
    run = TriageRun(root, settings, photos, book, split)
    _withdraw_outdated_guarantee(run)
    has_drawn = state.has_drawn or book.has_drawn
    pictures_digest = split.pictures_digest(photos)
    state = bind_to_pictures(state, pictures_digest, has_drawn=has_drawn)
    state = test_before_a_fit(run, state)
    state, predictor = choose_predictor(run, state)
    predictor_split = split.for_predictor(predictor, photos)
    run = dataclasses.replace(run, split=predictor_split)
    tested_outcomes = run.score(predictor)
    state, progress = test_predictor(run, state, predictor, tested_outcomes)
    state = ask_for_labels(run, state, tested_outcomes.uncertainty, progress)
    progress = progress_to_show(run, state, progress)
    result = _result(run, state, tested_outcomes, progress)
    guarantee = "" if result.rule is None else str(result.rule)
    next_state = state.model_copy(update={"guarantee": guarantee})
    state = run.write(next_state)
    return state, result


def _withdraw_outdated_guarantee(run: TriageRun) -> None:
    """Remove the guarantee if a picture behind it has another label now.

    Copies of a picture may have different labels. If a copy is added, renamed or deleted, another
    of these labels may count for the picture.
    """
    calibration = Calibration.find(run.present_folder)
    if calibration is None:
        return
    rows = calibration.rows
    if rows.ids is None or rows.picture is None or rows.target is None:
        return  # `vilu calibrate` has made this calibration, for rows that have no picture
    present_labels = _labels_of_pictures(run)
    changed_keys = set()
    for index, key in enumerate(rows.ids):
        label = (int(rows.target[index]), bool(rows.outside[index]))
        picture = int(rows.picture[index])
        if picture in present_labels and present_labels[picture] != label:
            changed_keys.add(key)
    remove_outdated_calibration(run.present_folder, changed_keys)


def _labels_of_pictures(run: TriageRun) -> dict[int, tuple[int, bool]]:
    """Map the labelled and skipped usable pictures to the labels that count: (class, is outside).

    The class is -1 for a picture of no class, and for a skipped picture. Only the picture of no
    class is outside.
    """
    answered_rows = np.flatnonzero(run.split.is_usable & run.split.is_answered)
    pictures = run.photos.picture_identities(answered_rows).tolist()
    targets = run.photos.target[answered_rows].tolist()
    are_outside = run.photos.outside[answered_rows].tolist()
    labels = zip(targets, are_outside, strict=True)
    return dict(zip(pictures, labels, strict=True))


def bind_to_pictures(state: TriageState, pictures: str | None, *, has_drawn: bool) -> TriageState:
    """Return the state with the digest of the pictures under the guarantee.

    Args:
        state: The state before.
        pictures: The digest, or None if the guarantee is about new photos.
        has_drawn: Whether photos were drawn already.

    Raises:
        UsageError: If pictures were added, removed or changed after the first draw.
    """
    has_changed = state.pictures != pictures
    if has_drawn and has_changed:
        raise UsageError(
            "photos were added, removed or changed after the first labels were drawn, and `--about "
            "folder` is about the photos that were there. Give the folder as it was, or a new -o, "
            "with --labels and the labels.parquet of this folder."
        )
    return state.model_copy(update={"pictures": pictures, "has_drawn": has_drawn})


def progress_to_show(
    run: TriageRun, state: TriageState, progress: GuaranteeProgress | None
) -> GuaranteeProgress | None:
    """Return the progress behind the rule in force, or ``progress`` if it certifies as much.

    New photos, or a higher limit, add photos without a label. In the random order, all labels after
    the first such photo no longer count in ``progress``. But the rule in force stays certified. If
    a picture behind the rule is missing, ``progress`` is returned.
    """
    calibration = Calibration.find(run.present_folder)
    rule = rule_in_force(run.present_folder)
    if progress is None or state.candidate is not None:
        return progress  # there is no test, or the candidate is tested
    if calibration is None or rule is None:
        return progress  # no rule is in force
    if calibration.draws is None or progress.threshold >= (rule.threshold or 0.0):
        return progress
    if calibration.rows.picture is None:
        return progress
    pictures = run.photos.picture_identities().tolist()
    row_of_picture = {picture: row for row, picture in enumerate(pictures)}
    rows = [row_of_picture.get(picture) for picture in calibration.rows.picture.tolist()]
    if None in rows:
        return progress
    return dataclasses.replace(
        progress,
        tests=calibration.draws[ALL_ROWS_GROUP].tests(run.settings.max_risk),
        counted_rows=np.array(rows, np.int64),
        counted_outcomes=calibration.rows,
    )


def _result(
    run: TriageRun,
    state: TriageState,
    tested_outcomes: Outcomes,
    progress: GuaranteeProgress | None,
) -> TriageResult:
    """Make the result of a run, from the state after all steps."""
    predictor = load_predictor(run.present_folder)
    is_first_of_scene = None
    if progress is not None:
        is_first_of_scene = new_scene_mask(run.photos, run.split.fit_rows, progress.counted_rows)
    n_fit = _number_of_fit_labels(run, state, predictor)
    outcomes = _outcomes_with_decisions(run, predictor, n_fit)
    return TriageResult(
        photos=run.photos,
        outcomes=outcomes,
        predictor=predictor,
        answer=state.answer,
        likely_right=likely_right_by_drawn_labels(run, state, predictor, outcomes),
        rule=rule_in_force(run.present_folder),
        progress=progress,
        tested_outcomes=tested_outcomes,
        has_candidate=state.candidate is not None,
        is_calibration=run.split.usable_calibration_mask,
        is_first_of_scene=is_first_of_scene,
        entries_to_label=run.book.waiting_entries(),
        book=run.book,
        n_fit=n_fit,
        forecast=forecast_of(run, state, tested_outcomes),
    )


def _outcomes_with_decisions(run: TriageRun, predictor: FailurePredictor, n_fit: int) -> Outcomes:
    """Compute the present predictor's outcomes for all photos. The fit used ``n_fit`` labels."""
    calibration = Calibration.find(run.present_folder)
    outcomes = run.score(predictor, calibration)
    # With these entries `vilu evaluate` and `vilu calibrate` know that the predictor was fitted on
    # some of the labels.
    entries = {"n_seen_in_fit": n_fit, "n_compared_with_fit": len(run.book.labels)}
    return dataclasses.replace(outcomes, provenance={**outcomes.provenance, **entries})


def likely_right_by_drawn_labels(
    run: TriageRun, state: TriageState, predictor: FailurePredictor, outcomes: Outcomes
) -> LikelyRight | None:
    """Update the estimate of the likely right answers with all labels in the draw.

    The new estimate is saved in the present predictor's folder.

    Args:
        run: The run.
        state: The state after the test.
        predictor: The present predictor.
        outcomes: The present predictor's outcomes for all photos.
    """
    likely_right = LikelyRight.find(run.present_folder)
    if likely_right is None or state.trial is None:
        return likely_right
    lacks_answers = len(likely_right.failure) != likely_right.n
    if lacks_answers:  # an earlier vilu version did not save the answers
        return likely_right
    rows = _drawn_rows(run, state.trial, predictor, outcomes.uncertainty)
    drawn_answers = JudgedAnswers(outcomes.uncertainty[rows], outcomes.failure[rows])
    likely_right = likely_right.with_drawn_answers(drawn_answers, outcomes.uncertainty)
    likely_right.save(run.present_folder)
    return likely_right


def _drawn_rows(
    run: TriageRun, trial: Trial, predictor: FailurePredictor, uncertainty: Floats
) -> Ints:
    """Return the calibration rows (M,) that count, up to the limit or the rule's threshold.

    ``uncertainty`` (N,) are the predictor's uncertainties for all photos.
    """
    split = run.split.for_predictor(predictor, run.photos)
    rows = split.counted_rows(uncertainty, trial.limit)
    rule = rule_in_force(run.present_folder)
    if rule is None or rule.threshold is None:
        return rows
    # If the limit was raised, some photos below it have no label. In the random order, only the
    # labels before the first such photo count up to the new limit. So the labels up to the rule's
    # threshold are added.
    rows_of_rule = split.counted_rows(uncertainty, rule.threshold)
    return np.union1d(rows, rows_of_rule)


def _number_of_fit_labels(run: TriageRun, state: TriageState, predictor: FailurePredictor) -> int:
    """Return how many labels the present predictor was fitted on, or an upper bound."""
    if state.trial is not None:
        return state.trial.n_fit
    # There is no trial if there is no calibration photo. Then only the upper bound is known.
    return len(run.split.fit_rows) if predictor.needs_labels else 0


def forecast_of(run: TriageRun, state: TriageState, tested_outcomes: Outcomes) -> Forecast:
    """Forecast how many photos the tested predictor could accept with more labels."""
    trial = state.tested_trial
    settings = run.settings
    n_photos_to_pick = len(run.split.rows_to_pick(run.photos, run.book))
    level = level_of(state.n_tested + 1, settings.delta)
    present_share = share_accepted(run)
    return Forecast.of(
        tested_outcomes.uncertainty[run.split.usable_calibration_mask],
        n_photos=len(run.photos),
        n_classes=len(settings.embedding.names),
        n_fit_labels=0 if trial is None else trial.n_fit,
        most_fit_labels=len(run.split.fit_rows) + n_photos_to_pick,
        n_labels=int(run.split.is_labelled.sum()),
        max_risk=settings.max_risk,
        level=level,
        make_tests=run.split.tests_before_labels,
        share_accepted=present_share,
    )


def test_before_a_fit(run: TriageRun, state: TriageState) -> TriageState:
    """Test the last run's tested predictor once more before a new predictor replaces it.

    Labels of drawn photos and labels to fit on may come in the same run. The labels of drawn photos
    were requested for the tested predictor. This test uses them before the predictor is replaced.
    """
    predictor_stays = fit_case_of(run, state).keeps_predictor
    tested_folder = run.tested_folder(state)
    is_missing = not (tested_folder / PREDICTOR).is_file()
    if predictor_stays or is_missing or state.tested_trial is None:
        return state
    predictor = load_uncalibrated(tested_folder)
    predictor_split = run.split.for_predictor(predictor, run.photos)
    run = dataclasses.replace(run, split=predictor_split)
    tested_outcomes = run.score(predictor)
    state, _ = test_predictor(run, state, predictor, tested_outcomes)
    return state


def test_predictor(
    run: TriageRun, state: TriageState, predictor: FailurePredictor, tested_outcomes: Outcomes
) -> tuple[TriageState, GuaranteeProgress | None]:
    """Count the labels for the tested predictor, and write the certified guarantee.

    Returns:
        The next state, and the progress of the guarantee. The progress is None if the predictor
        needs no labels, or if there is no calibration photo.
    """
    has_test = predictor.needs_labels and run.split.usable_calibration_mask.any()
    if not has_test:
        return state, None
    state, progress = count_labels(run, state, tested_outcomes)
    state = write_certified_guarantee(run, state, predictor, tested_outcomes, progress)
    return state, progress


def rule_in_force(folder: Path) -> Rule | None:
    """Return the feasible rule of the predictor in a folder, or None without such a rule."""
    calibration = Calibration.find(folder)
    if calibration is None or calibration.rule is None:
        return None
    if calibration.rule.feasible:
        return calibration.rule
    return None


# The first step: choose the predictor to test. The last step asks for the test's labels.


def choose_predictor(run: TriageRun, state: TriageState) -> tuple[TriageState, FailurePredictor]:
    """Load the tested predictor or fit a new predictor, as the run's ``FitCase`` says."""
    case = fit_case_of(run, state)
    if case.keeps_predictor:
        tested_folder = run.tested_folder(state)
        return state, load_uncalibrated(tested_folder)
    fit_rows = run.split.fit_rows
    method = choose_method(run.photos, fit_rows)
    predictor = fit_predictor(method, run.photos, fit_rows, run.settings.seed)
    labelled_photos = run.photos.take(fit_rows)
    choice = answer_to_judge(run.settings.answer, predictor, labelled_photos, run.settings.max_risk)
    predictor = predictor.judging(choice.answer)
    uncertainty = run.score(predictor).uncertainty
    likely_right = estimate_likely_right(predictor, uncertainty, run.settings.max_risk)
    if case is FitCase.NO_GUARANTEE:
        state = _save_as_present(
            run, state, predictor, trial=None, answer=choice, likely_right=likely_right
        )
        state = run.write(state)
        return state, predictor
    return _begin_trial(run, state, predictor, choice, likely_right, uncertainty)


def fit_case_of(run: TriageRun, state: TriageState) -> FitCase:
    """Decide whether the run fits a new predictor, and why."""
    fit_rows = run.split.fit_rows
    method = choose_method(run.photos, fit_rows)
    predictor_file = run.tested_folder(state) / PREDICTOR
    is_saved = predictor_file.is_file()
    rule = rule_in_force(run.present_folder)
    has_calibration_photos = bool(run.split.usable_calibration_mask.any())
    return fit_case(
        state,
        method=method,
        n_labels=len(fit_rows),
        is_saved=is_saved,
        is_guaranteed=rule is not None,
        has_calibration_photos=has_calibration_photos,
    )


def _save_as_present(
    run: TriageRun,
    state: TriageState,
    predictor: FailurePredictor,
    *,
    trial: Trial | None,
    answer: AnswerChoice,
    likely_right: LikelyRight | None,
) -> TriageState:
    """Save a predictor as the present predictor. The caller writes the returned state."""
    predictor.save(run.present_folder)
    if likely_right is not None:
        likely_right.save(run.present_folder)
    vocabulary = Vocabulary.of(run.photos, run.photos.first_store.manifest.dtype)
    vocabulary.save(run.present_folder)
    return state.model_copy(
        update={
            "method": predictor.name,
            "answer": answer,
            "trial": trial,
            "candidate": None,
            "candidate_answer": NO_ANSWER_CHOICE,
        }
    )


def _begin_trial(
    run: TriageRun,
    state: TriageState,
    predictor: FailurePredictor,
    answer: AnswerChoice,
    likely_right: LikelyRight,
    scores: Floats,
) -> tuple[TriageState, FailurePredictor]:
    """Make a new predictor the candidate if its test is worth the labels.

    ``scores`` (N,) are the new predictor's uncertainties for all photos. Returns the next state
    and the tested predictor: the new predictor, or the predictor tested before.
    """
    n_labels = len(run.split.fit_rows)
    present_share = share_accepted(run)
    least_share = min(CANDIDATE_COVERAGE_FACTOR * present_share, 1.0)
    candidate = plan_trial(run, state, scores, least_share=least_share)
    next_state = state.model_copy(update={"n_fit_of_last_candidate": n_labels})
    accepts_all = present_share == 1.0
    if accepts_all or not is_worth_testing(candidate, state, n_labels):
        next_state = run.write(next_state)
        tested_folder = run.tested_folder(state)
        return next_state, load_uncalibrated(tested_folder)
    predictor.save(run.candidate_folder)
    likely_right.save(run.candidate_folder)
    next_state = next_state.model_copy(update={"candidate": candidate, "candidate_answer": answer})
    next_state = run.write(next_state)
    return next_state, predictor


def plan_trial(
    run: TriageRun, state: TriageState, scores: Floats, *, least_share: float = 0.0
) -> Trial:
    """Plan a predictor's trial.

    Args:
        run: The run.
        state: The state before the trial.
        scores: (N,) the predictor's uncertainties for all photos.
        least_share: At least this share of the calibration photos is up to the limit.
    """
    settings = run.settings
    usable_calibration_mask = run.split.usable_calibration_mask
    calibration_rows = np.flatnonzero(usable_calibration_mask)
    require_scores(scores, calibration_rows, run.photos.ids)
    n_answered = int((usable_calibration_mask & run.split.is_answered).sum())
    level = level_of(state.n_tested + 1, settings.delta)
    return Trial.plan(
        n_fit=len(run.split.fit_rows),
        scores=scores[usable_calibration_mask],
        n_answered=n_answered,
        max_risk=settings.max_risk,
        delta=level,
        least_share=least_share,
    )


def share_accepted(run: TriageRun) -> float:
    """Compute the share of calibration photos accepted by the guarantee in force."""
    usable_calibration_mask = run.split.usable_calibration_mask
    rule = rule_in_force(run.present_folder)
    if rule is None or rule.threshold is None or not usable_calibration_mask.any():
        return 0.0
    predictor = load_predictor(run.present_folder)
    uncertainty = predictor.predict_uncertainty(run.photos)
    is_accepted = uncertainty[usable_calibration_mask] <= rule.threshold
    return float(is_accepted.mean())


# The second step: count the labels for the guarantee.


def count_labels(
    run: TriageRun, state: TriageState, tested_outcomes: Outcomes
) -> tuple[TriageState, GuaranteeProgress]:
    """Count the labels for the guarantee, and note the share of the level that the test uses."""
    trial = state.tested_trial or plan_trial(run, state, tested_outcomes.uncertainty)
    settings = run.settings
    level = trial.level
    if level == 0:  # the test has not used a share of the level yet
        level = level_of(state.n_tested + 1, settings.delta)
    progress = progress_of(
        trial, tested_outcomes, run.split, max_risk=settings.max_risk, level=level
    )
    next_state = state_after_test(state, trial, progress)
    state = run.write(next_state)
    return state, progress


def state_after_test(state: TriageState, trial: Trial, progress: GuaranteeProgress) -> TriageState:
    """Return the state after a test.

    ``n_tested`` counts the tests that used a share of the level.
    """
    # A test with too few labels to certify anything uses no share of the level. It is not counted.
    uncertainty = progress.counted_outcomes.uncertainty
    starts_to_count = trial.level == 0 and progress.tests.can_certify(uncertainty)
    if starts_to_count:
        trial = trial.model_copy(update={"level": progress.tests.delta})
        state = state.model_copy(update={"n_tested": state.n_tested + 1})
    return state.with_trial(trial)


# The third step: write the certified guarantee.


def write_certified_guarantee(
    run: TriageRun,
    state: TriageState,
    predictor: FailurePredictor,
    tested_outcomes: Outcomes,
    progress: GuaranteeProgress,
) -> TriageState:
    """Write the certified guarantee if it is better than the guarantee in force.

    A candidate with a better guarantee replaces the present predictor. Returns the next state.
    """
    if state.candidate is not None:
        is_accepted = (
            tested_outcomes.uncertainty[run.split.usable_calibration_mask] <= progress.threshold
        )
        share = float(is_accepted.mean())
        share_before = share_accepted(run)
        if share <= share_before:
            return state
        logger.info(
            "a predictor that was fitted on more labels accepts %.1f %% of the photos, not %.1f %%",
            100 * share,
            100 * share_before,
        )
        state = _replace_present_predictor(run, state, predictor)
    present_rule = rule_in_force(run.present_folder)
    if _is_better(progress, present_rule):
        _write_guarantee(run, predictor, tested_outcomes, progress)
    return state


def _replace_present_predictor(
    run: TriageRun, state: TriageState, candidate: FailurePredictor
) -> TriageState:
    """Replace the present predictor by the candidate. Return the next state."""
    likely_right = LikelyRight.find(run.candidate_folder)
    state = _save_as_present(
        run,
        state,
        candidate,
        # The state's field ``candidate`` is the candidate's trial (``tested_trial``). The
        # field keeps this name because saved files (triage.json) contain the name.
        trial=state.candidate,
        answer=state.candidate_answer,
        likely_right=likely_right,
    )
    # The old state refers to the candidate's folder. So the new state is written before the
    # folder is removed.
    state = run.write(state)
    shutil.rmtree(run.candidate_folder)
    return state


def _write_guarantee(
    run: TriageRun,
    predictor: FailurePredictor,
    tested_outcomes: Outcomes,
    progress: GuaranteeProgress,
) -> None:
    """Write the certified rule to the present predictor's folder."""
    settings = run.settings
    all_progress = {ALL_ROWS_GROUP: progress}
    closed_photos = run.split.closed_photos(
        run.photos, tested_outcomes.uncertainty, progress.threshold
    )
    rule = rule_of(all_progress, settings.max_risk, settings.confidence, closed_photos)
    keep_guarantee(
        run.present_folder,
        predictor,
        run.photos,
        all_progress,
        counted_outcomes=progress.counted_outcomes,
        rule=rule,
        dataset=settings.photos.name,
    )


def _is_better(progress: GuaranteeProgress, rule: Rule | None) -> bool:
    """Return whether a rule from the progress replaces ``rule``, the rule in force.

    The rule in force stays certified, so it is only replaced by a rule that accepts more photos.
    """
    if not len(progress.counted_rows):
        return False
    if rule is None:
        return True
    return progress.threshold > (rule.threshold or 0.0)


# The last step: ask for labels.


def ask_for_labels(
    run: TriageRun, state: TriageState, uncertainty: Floats, progress: GuaranteeProgress | None
) -> TriageState:
    """Ask for the missing labels in the draw. If no label is missing, ask for new labels.

    ``uncertainty`` (N,) are the tested predictor's uncertainties for all photos.
    """
    predictor_file = run.tested_folder(state) / PREDICTOR
    description = read_description(predictor_file)
    # The book names each predictor by the start of the weights' digest.
    fingerprint = str(description["weights_sha256"])[:16]
    missing_rows = np.zeros(0, np.int64) if progress is None else progress.missing_rows
    missing_paths = _paths_of(run, missing_rows)
    _withdraw_requests(run, fingerprint, missing_paths)
    drawn_rows = missing_rows
    if progress is not None and not len(missing_rows):
        state, drawn_rows = _draw_photos(run, state, uncertainty, progress)
    _ask_for_guarantee(run, fingerprint, drawn_rows)
    if not len(missing_rows):
        n_to_fit = run.settings.n_next - len(run.book.waiting_entries())
        _ask_to_fit(run, fingerprint, uncertainty, n_to_fit)
    # The state comes first. If the run is killed in between, the next run asks for the same labels.
    # In the reverse order, a raised limit would be lost.
    state = run.write(state)
    run.book.note_pictures(run.photos.picture_of_path)  # so that requests go with the pictures
    run.book.save(run.root / BOOK_FILE)
    return state


def _ask_for_guarantee(run: TriageRun, fingerprint: str, rows: Ints) -> None:
    """Ask for the labels of calibration ``rows`` without an open request.

    ``rows`` (M,) are in the random order. ``fingerprint`` is the tested predictor's
    fingerprint.
    """
    if not len(rows):
        return
    asked_paths = {entry.path for entry in run.book.waiting_entries()}
    new_paths = [path for path in _paths_of(run, rows) if path not in asked_paths]
    last_position = int(run.split.random_position[rows[-1]])
    probability = draw_probability(last_position)
    run.book.request_labels(
        new_paths, "calibration", predictor=fingerprint, probability=probability
    )


def _draw_photos(
    run: TriageRun, state: TriageState, uncertainty: Floats, progress: GuaranteeProgress
) -> tuple[TriageState, Ints]:
    """Draw the next calibration photos. Return the state after the draw, and the drawn rows."""
    no_rows: Ints = np.zeros(0, np.int64)
    trial = state.tested_trial
    if trial is None:
        return state, no_rows
    rule = rule_in_force(run.present_folder)
    is_ready = is_ready_to_draw(run, trial)
    n_drawn = n_to_draw(
        state,
        run.settings.n_next,
        is_guaranteed=rule is not None,
        is_ready_to_draw=is_ready,
        can_be_certified=progress.n_more_labels is not None,
    )
    if not n_drawn:
        return state, no_rows
    trial = trial_with_raised_limit(trial, progress, uncertainty[run.split.usable_calibration_mask])
    rows = run.split.unanswered_rows(uncertainty, trial.limit)[:n_drawn]
    return state.with_trial(trial), rows


def is_ready_to_draw(run: TriageRun, trial: Trial) -> bool:
    """Return whether the run asks for calibration labels, for a predictor without a guarantee.

    A guarantee must be likely, and there must be enough labels to fit on (``is_enough_to_fit``). If
    no photo is left to fit on, and no label to fit on is asked for, nothing is gained by waiting.
    So the result is True.
    """
    is_waiting_to_fit = any(entry.stream == "fit" for entry in run.book.waiting_entries())
    if not is_waiting_to_fit and not len(run.split.rows_to_pick(run.photos, run.book)):
        return True
    n_classes = len(run.settings.embedding.names)
    return trial.likely and is_enough_to_fit(trial, len(run.split.fit_rows), n_classes)


def _paths_of(run: TriageRun, rows: Ints) -> list[str]:
    """Return the photo paths at these rows (M,)."""
    return [run.photos.ids[row] for row in rows.tolist()]


def _withdraw_requests(run: TriageRun, fingerprint: str, missing_paths: list[str]) -> None:
    """Withdraw requests for earlier predictors, for unusable photos, and for labelled pictures.

    Label requests for ``missing_paths`` always stay. If ``missing_paths`` is not empty and
    nothing is guaranteed, all requests outside ``missing_paths`` are withdrawn.

    Args:
        run: The run.
        fingerprint: The tested predictor's fingerprint.
        missing_paths: Paths of the drawn photos whose label is still missing.
    """
    only_missing_stay = bool(missing_paths) and rule_in_force(run.present_folder) is None
    usable_rows = np.flatnonzero(run.split.is_usable)
    usable_paths = set(_paths_of(run, usable_rows))

    def is_withdrawn(entry: Entry) -> bool:
        if entry.path in missing_paths:
            return False
        if entry.path not in usable_paths:
            return True
        return only_missing_stay or entry.predictor != fingerprint

    run.book.withdraw_requests(is_withdrawn)


def n_to_draw(
    state: TriageState,
    n: int,
    *,
    is_guaranteed: bool,
    is_ready_to_draw: bool,
    can_be_certified: bool,
) -> int:
    """Return how many of the next ``n`` labels are on the calibration side.

    - If a candidate is tested: all labels, if a guarantee is possible, or else none.
    - If there is a guarantee: every third label.
    - If the run is ready to draw, and a guarantee is possible: all labels.
    - Otherwise: none.

    Args:
        state: The triage's state.
        n: How many labels to ask for.
        is_guaranteed: Whether a guarantee is in force.
        is_ready_to_draw: Whether the run asks for calibration labels (``is_ready_to_draw``).
        can_be_certified: Whether enough further calibration labels would certify a threshold.
    """
    if state.candidate is not None:
        return n if can_be_certified else 0
    if is_guaranteed:
        return n // CALIBRATION_INTERVAL
    return n if is_ready_to_draw and can_be_certified else 0


def trial_with_raised_limit(trial: Trial, progress: GuaranteeProgress, scores: Floats) -> Trial:
    """Return the trial, with a higher limit if the present limit is certified.

    ``scores`` (M,) are the calibration photos' uncertainties.
    """
    if progress.certified_index != progress.tests.last_tested_index:
        return trial
    return trial.with_raised_limit(THRESHOLDS_PER_STEP, scores)


def _ask_to_fit(run: TriageRun, fingerprint: str, uncertainty: Floats, n: int) -> None:
    """Ask for ``n`` labels to fit on.

    ``uncertainty`` (N,) are the tested predictor's uncertainties for all photos.
    ``fingerprint`` is the tested predictor's fingerprint.
    """
    if n <= 0:
        return
    rows = run.split.rows_to_pick(run.photos, run.book)
    fit_rows = choose_rows_to_fit(run.photos, rows, uncertainty, n, run.settings.seed)
    paths = _paths_of(run, fit_rows)
    run.book.request_labels(paths, "fit", predictor=fingerprint)
