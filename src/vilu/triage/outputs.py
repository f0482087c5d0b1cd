"""Runs the whole triage of a photo folder, and writes the report page and the summary."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from vilu.artifacts.disk import locked, make_folder, write_text
from vilu.backbones.zeroshot import TEMPLATES, describe_prompts
from vilu.calibration.anytime import ThresholdTests, log_evidence
from vilu.calibration.closed_set import ClosedPhotos, ClosedSetTests
from vilu.calibration.likely import MIN_WRONG_ANSWERS, LikelyRight
from vilu.calibration.rules import Rule
from vilu.calibration.thresholds import exact_percent, percent
from vilu.device import torch_defaults
from vilu.errors import UsageError
from vilu.guard.guard import Answer
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.decisions import ACCEPT, REVIEW
from vilu.report.page.build import find_template, render_page
from vilu.report.page.gallery import thumbnails
from vilu.text import plural
from vilu.triage.answers import (
    answers_of,
    count_answers,
    unlabelled_scores,
    write_decisions,
    write_next,
)
from vilu.triage.carrying import all_labels, former_class_names, without_former_labels
from vilu.triage.fitting import MIN_LABELS_TO_FIT, refuse_given_answers
from vilu.triage.forecast import Forecast
from vilu.triage.guarantee import GuaranteeProgress
from vilu.triage.labels import (
    SKIPPED,
    Entry,
    GivenFile,
    LabelBook,
    match_photos,
    meant_name,
    names_of_labels,
    read_labels,
)
from vilu.triage.photos import EMBEDDINGS_FOLDER, PhotoFolder, PhotoStores
from vilu.triage.run import TriageResult, run_triage
from vilu.triage.sidecars import write_sidecars
from vilu.triage.sorting import accepted_labels, list_folder, sort_photos
from vilu.triage.state import (
    BOOK_FILE,
    NEXT_LABELS_CSV,
    REPORT_FILE,
    TriageSettings,
    open_state,
)
from vilu.triage.verdict import collect_labelled_answers, verdict_in_words
from vilu.validation import checked, require_between

PAGE_TEMPLATE: Final = "triage.html.jinja"
"""File name of the page template."""

PHOTOS_SHOWN: Final = 24
"""A section on the page shows at most this number of photos."""

THRESHOLDS_SHOWN: Final = 20
"""The table on the page has at most this number of thresholds."""

COPY_SHARE_TO_MENTION: Final = 0.05
"""The page mentions near copies if more than this share of labelled photos are near copies."""

TRIED_BOUNDS: Final = [thousandth / 1000 for thousandth in range(1, 1000)]
"""Upper bounds on the error rate for ``lowest_shown_bound`` to try, ascending."""

NO_SIDECAR_TEXT: Final = (
    "--xmp has written no label: no photo is accepted or labelled with a class yet."
)

LabelFiles = Mapping[Path, tuple[dict[str, str], dict[str, str]]]
"""Maps every label file to two mappings: from photo names to labels, and to streams."""


@dataclass(frozen=True)
class TriageSummary:
    """The summary of a run for people.

    Attributes:
        verdict: Text on how good the answers are according to the labels, and warnings. May be "".
        answer: The answer kind that is judged, with the reason.
        counts: How many photos are accepted, to review, and so on, and how many photos have a
            label.
        guarantee: The guarantee, or the labels missing for a guarantee.
        forecast: How many photos could be accepted with more labels, or "" if not known.
        likely: How many photos without a label are likely right, or why this is not known.
        prompts: The prompt templates, and a warning if prompts read badly.
        n_asked: How many labels are asked for.
        no_request_reason: Why no label is asked for, and the next step. "" if labels are asked for.
        sidecars: How many photos have a sidecar with their label, or why no photo has a sidecar. ""
            if no sidecars were asked for.
    """

    verdict: str
    answer: str
    counts: str
    guarantee: str
    forecast: str
    likely: str
    prompts: str
    n_asked: int
    no_request_reason: str
    sidecars: str


@checked
@torch_defaults()
def triage_photos(
    settings: TriageSettings,
    output: Path,
    labels: Sequence[Path] = (),
    *,
    sort: Literal["link", "move"] | None = None,
    xmp: bool = False,
    overwrite: bool = False,
) -> TriageSummary:
    """Run a triage in a folder. A later run only processes new photos and labels.

    Args:
        settings: The triage settings.
        output: The triage folder: new, empty, or from an earlier run. If settings have
            changed since, the labels stay (``carrying.carry_over``).
        labels: Label files (``labels.read_labels``).
        sort: "link": also make sorted links to the photos. "move": also move the photos into sorted
            folders.
        xmp: Also write the accepted labels to XMP sidecars beside the photos.
        overwrite: Begin anew, and remove the results and labels from earlier runs. Moved photos
            stay where they are.

    Raises:
        UsageError: If a setting is not allowed, if the seed differs from the earlier runs, or if
            answers in ``next_labels.csv`` would be lost because no run has read them.
        DataError: If there is no photo, a label is no class, or a label file cannot be read.
        BusyError: If another process works in the folder.
        StorageError: If the file system refuses. A repeated run goes on where this run ended.
    """
    check_settings(settings)
    find_template(PAGE_TEMPLATE)  # fails here, before the slow steps, if the page cannot be written
    former_classes: set[str] = set()
    if not overwrite:
        former_classes = former_class_names(output, settings.known_labels)
    files = _read_label_files(labels, settings, former_classes)
    open_state(output, settings, overwrite=overwrite)  # fails here if the folder is no triage
    photo_folder = list_folder(settings.photos, output, follow_links=settings.follow_links)
    # With ``overwrite`` the book is removed, so nothing is left of earlier paths.
    earlier = EarlierPaths() if overwrite else _earlier_paths(output, photo_folder)
    given_files = []
    for file, (file_labels, streams) in files.items():
        given_files.append(_given_file(file, file_labels, streams, photo_folder, earlier))
    checked_answers: dict[str, str] = {}
    if not overwrite:
        checked_answers = _require_no_lost_answers(
            output, given_files, former_classes, safe_answers=earlier.labels
        )
    with locked(make_folder(output), activity="sorting into", holder_kind="triage"):
        # ``run_triage`` reads the state again. Another run may have changed the state while this
        # run waited for the lock.
        result = run_triage(output, settings, photo_folder, given_files, overwrite=overwrite)
        answers = answers_of(
            result.photos,
            result.predictor,
            result.outcomes,
            result.book.labels,
            result.likely_right,
        )
        write_decisions(output, result.outcomes, answers)
        answer_of_path = {answer.key: answer for answer in answers}
        # Somebody may have filled in the table while this run was embedding photos.
        _require_no_lost_answers(output, given_files, former_classes, checked_answers)
        write_next(
            output / NEXT_LABELS_CSV,
            result.entries_to_label,
            answer_of_path,
            result.outcomes.answer,
        )
        verdict = _verdict_text(result)
        write_page(output, photo_folder, result, answers, settings, verdict)
        if sort is not None:
            sort_photos(output, photo_folder, answers, settings, sort)
        sidecars = _write_accepted_labels(output, answers, settings) if xmp else ""
    return summary_of(result, answers, settings, verdict, sidecars)


def _read_label_files(
    paths: Sequence[Path], settings: TriageSettings, former_classes: Collection[str]
) -> LabelFiles:
    """Read label files. Labels of former classes are left out, with a warning.

    Raises:
        DataError: If a label is no class, or if a file cannot be read.
    """
    files = {}
    for path in paths:
        texts, streams = read_labels(path)
        texts = without_former_labels(texts, former_classes, source=path)
        labels = names_of_labels(
            texts, settings.embedding.names, settings.outside_labels, source=path
        )
        files[path] = (labels, streams)
    return files


def _write_accepted_labels(
    output: Path, answers: Sequence[Answer], settings: TriageSettings
) -> str:
    """Write the accepted labels to sidecars. Return a text for the summary."""
    # The photos are listed again because they may have been moved.
    photo_folder = list_folder(settings.photos, output, follow_links=settings.follow_links)
    labels = accepted_labels(output, photo_folder, answers, settings)
    n_written = write_sidecars(labels)
    if not n_written:
        return NO_SIDECAR_TEXT
    return f"{plural(n_written, 'photo')} with the accepted label in PHOTO.xmp"


def check_settings(settings: TriageSettings) -> None:
    """Raise UsageError if a setting is not allowed, before the slow steps."""
    require_between("max_risk", settings.max_risk)
    require_between("confidence", settings.confidence)
    refuse_given_answers(settings.answer)
    names = settings.embedding.names
    if len(set(names)) < 2:
        raise UsageError(
            f"there must be at least two classes to choose from. Got {len(names)}: "
            f"{', '.join(names)}."
        )
    ambiguous = sorted({*settings.outside_labels, SKIPPED} & {*names})
    if ambiguous:
        raise UsageError(
            f"{ambiguous[0]!r} is the name of a class, and also the label of photos that are of no "
            "class. Rename the class, or the label."
        )


@dataclass(frozen=True)
class EarlierPaths:
    """Former paths of photos that were renamed since. No photo has such a path now.

    Attributes:
        requests: Former paths of photos with an open request, if the picture is known.
        labels: Maps each former path to the label that the book has for the picture of the photo.
    """

    requests: Collection[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


def _earlier_paths(output: Path, photo_folder: PhotoFolder) -> EarlierPaths:
    """Read the former paths from a triage's book and from the stores of the embedded photos."""
    present_paths = set(photo_folder.paths)
    book = LabelBook.load(output / BOOK_FILE)
    requested_paths = {entry.path for entry in book.waiting_entries() if entry.picture}
    requests = requested_paths - present_paths
    label_of_picture = {entry.picture: entry.label for entry in book if entry.picture}
    labels = {}
    for path, picture in PhotoStores(output / EMBEDDINGS_FOLDER).seen_pictures():
        label = label_of_picture.get(picture.hex())
        if label is not None and path not in present_paths:
            labels[path] = label  # the last labelled picture at this path counts
    return EarlierPaths(requests, labels)


def _given_file(
    file: Path,
    labels: Mapping[str, str],
    streams: Mapping[str, str],
    photo_folder: PhotoFolder,
    earlier: EarlierPaths,
) -> GivenFile:
    """Match the labels in a file with photos by name. Labels of known pictures are matched later.

    Args:
        file: The file.
        labels: Maps the photo names in the file to labels.
        streams: Maps the photo names in the file to streams.
        photo_folder: The photos.
        earlier: Former paths. A label in the file is left out if ``earlier.labels`` has it already.
    """
    labelled_pictures = _labelled_pictures(file, labels, photo_folder)
    matched_by_picture = {entry.path for entry in labelled_pictures}
    names = [name for name in labels if name not in matched_by_picture]
    # These labels answer open requests. The run finds the renamed photos by their pictures.
    answers = {name: labels[name] for name in names if name in earlier.requests}
    new_names = [name for name in names if earlier.labels.get(name) != labels[name]]
    labels_by_name = {name: labels[name] for name in new_names if name not in answers}
    paths = match_photos(labels_by_name, photo_folder.paths, photo_folder.root, source=file)
    given_file = GivenFile({}, {}, answers, names, labelled_pictures)
    for name, path in paths.items():
        given_file.labels[path] = labels[name]
        if name in streams:
            given_file.streams[path] = streams[name]
    return given_file


def _labelled_pictures(
    file: Path, labels: Mapping[str, str], photo_folder: PhotoFolder
) -> list[Entry]:
    """Return the entries in a book that are to be matched by picture, not by path.

    An entry is matched by picture if its picture is known, or if no photo in the folder has its
    path. Without a known picture it matches no photo. The list is empty if the file is no book, and
    for books of version 0.1.0.

    ``labels`` are the labels in the file that may be used, as class names. Entries without such a
    label are left out.
    """
    if file.suffix.lower() != ".parquet":
        return []
    entries = [entry for entry in LabelBook.load(file) if entry.path in labels]
    if not any(entry.picture for entry in entries):
        return []
    paths = set(photo_folder.paths)
    labelled_pictures = []
    for entry in entries:
        if entry.picture or entry.path not in paths:
            labelled_pictures.append(replace(entry, label=labels[entry.path]))
    return labelled_pictures


def _require_no_lost_answers(
    output: Path,
    given_files: Sequence[GivenFile],
    former_classes: Collection[str],
    safe_answers: Mapping[str, str],
) -> dict[str, str]:
    """Raise UsageError if answers in ``next_labels.csv`` would be lost.

    The run replaces this file. An answer would be lost if its photo has no label in the book and
    none in the label files of this run.

    Args:
        output: The triage folder.
        given_files: The label files of this run.
        former_classes: Names of the triage's former classes.
        safe_answers: Maps photo paths to answers that are safe for another reason: the book has
            them for the renamed photo, or an earlier check has passed them.

    Returns:
        The answers in ``next_labels.csv``, by photo.
    """
    table = output / NEXT_LABELS_CSV
    if not table.is_file():
        return {}
    known_paths = {entry.path for entry in all_labels(output) if entry.label is not None}
    for file in given_files:
        known_paths |= {*file.labels, *file.names}
    answers, _ = read_labels(table)
    lost_paths = []
    for path, answer in answers.items():
        if path not in known_paths and safe_answers.get(path) != answer:
            lost_paths.append(path)
    if lost_paths:
        first_path = min(lost_paths)
        remedy = _remedy_for_answers(table, answers[first_path], former_classes)
        raise UsageError(
            f"{table} holds {plural(len(lost_paths), 'answer')} that no run has read, such as that "
            f"about {first_path!r}. They would be lost. {remedy} Or move this file away, if they "
            "are not needed."
        )
    return answers


def _remedy_for_answers(table: Path, label: str, former_classes: Collection[str]) -> str:
    """Say what to do so that a run reads the answers in ``next_labels.csv``, such as ``label``."""
    if meant_name(label, former_classes) is None:
        return f"Give them: --labels {table}."
    # Such answers are left out of given files, too (``without_former_labels``).
    return (
        f"The class {label!r} no longer exists. Correct such answers, or run once with the former "
        f"--classes and with --labels {table}, which keeps them."
    )


def summary_of(
    result: TriageResult,
    answers: Sequence[Answer],
    settings: TriageSettings,
    verdict: str,
    sidecars: str,
) -> TriageSummary:
    """Make the summary of a run for people.

    ``verdict`` and ``sidecars`` are the texts in the summary's fields with these names.
    """
    counts = count_answers(answers)
    photos = plural(counts["photos"], "photo")
    if result.n_new:
        photos += f" ({result.n_new:,} of them new)"
    return TriageSummary(
        verdict=verdict,
        answer=str(result.answer),
        counts=f"{photos}: {counts_in_words(counts)}",
        guarantee=guarantee_in_words(result, settings),
        forecast=str(result.forecast),
        likely=likely_in_words(result.likely_right, counts),
        prompts=_prompts_text(settings),
        sidecars=sidecars,
        n_asked=len(result.entries_to_label),
        no_request_reason="" if result.entries_to_label else why_nothing_is_asked(result, settings),
    )


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Write a text on the counts from ``count_answers``."""
    n = counts["unlabelled"]
    parts = [
        f"accepted {counts['accepted']:,} of {n:,} without a label",
        f"{counts['review']:,} to review",
    ]
    if counts["unreadable"]:
        parts.append(f"{counts['unreadable']:,} unreadable")
    verb = "has" if counts["labelled"] == 1 else "have"
    return f"{', '.join(parts)}; {counts['labelled']:,} {verb} a label"


def likely_in_words(likely_right: LikelyRight | None, counts: Mapping[str, int]) -> str:
    """Say how many photos without a label are likely right, or why there is no estimate."""
    no_estimate = "Which answers are likely right cannot be estimated"
    if likely_right is None:
        return f"{no_estimate}: the predictor was fitted before there was such an estimate."
    if likely_right.n == 0:
        return f"{no_estimate} yet: the predictor was not fitted on labels."
    basis = (
        f"{likely_right.n_wrong:,} of {likely_right.n:,} cross-fitted labels show a wrong answer"
    )
    if likely_right.n_drawn:
        basis += f", and {likely_right.n_drawn_wrong:,} of {likely_right.n_drawn:,} drawn ones"
    if likely_right.probability is None:
        return f"{no_estimate} yet: {basis}, and {MIN_WRONG_ANSWERS} wrong ones are needed."
    n_unlabelled = counts["unlabelled"]
    if not n_unlabelled:
        return "Every photo has a label, so no answer is left to be likely right."
    return (
        f"{counts['likely']:,} of {n_unlabelled:,} photos without a label are likely right. "
        f"At most {percent(likely_right.max_risk, decimals=1)} of these answers are expected to be "
        f"wrong. This is an estimate, not a guarantee: {basis}."
    )


def _verdict_text(result: TriageResult) -> str:
    """Write the verdict: how good the answers are according to the labels, and warnings."""
    labelled_answers = collect_labelled_answers(
        result.photos,
        result.outcomes,
        result.predictor,
        result.is_calibration,
        result.likely_right,
    )
    has_doubtful = any(entry.stream == "fit" and entry.label is not None for entry in result.book)
    return verdict_in_words(labelled_answers, result.outcomes, has_doubtful=has_doubtful)


def _prompts_text(settings: TriageSettings) -> str:
    """Describe the prompt templates, with a warning if prompts read badly."""
    embedding = settings.embedding
    templates = TEMPLATES["default"] if embedding.templates is None else embedding.templates
    return describe_prompts(embedding.names, templates)


@dataclass(frozen=True)
class ThresholdRow:
    """A row in the page's table: a threshold with the counted labels and the bound.

    Attributes:
        coverage: Share of unlabelled photos that the threshold accepts.
        threshold: Largest accepted uncertainty.
        n_accepted: How many accepted photos have a counted label.
        n_wrong: How many accepted photos with a counted label have a wrong answer.
        risk_bound: Upper bound on the error rate from the labels, if only this threshold is tested.
            None if the labels show no bound, if some photos up to this threshold are never drawn,
            or if the guarantee is about a closed set of photos.
        expected_risk: Mean failure probability of the accepted photos without a label.
        is_certified: Whether the guarantee in force covers this threshold.
    """

    coverage: float
    threshold: float
    n_accepted: int
    n_wrong: int
    risk_bound: float | None
    expected_risk: float
    is_certified: bool


def threshold_rows(
    uncertainty: Floats, progress: GuaranteeProgress | None, threshold_in_force: float | None
) -> list[ThresholdRow]:
    """Make the rows for the table on the page.

    The thresholds are spread over the test grid. Without a test the thresholds are the
    deciles of the uncertainties.

    Args:
        uncertainty: (N,) uncertainties of the photos without a label.
        progress: Progress of the predictor's guarantee, or None without a test.
        threshold_in_force: Threshold of the guarantee in force, or None without a guarantee.
    """
    if not len(uncertainty):
        return []
    if progress is not None:
        return _rows_of_test(uncertainty, progress, threshold_in_force)
    rows = []
    shares = np.arange(1, 11) / 10
    deciles = np.quantile(uncertainty, shares)
    for decile in deciles.tolist():
        row = _row_without_labels(uncertainty, decile, threshold_in_force)
        rows.append(row)
    return rows


def _rows_of_test(
    uncertainty: Floats, progress: GuaranteeProgress, threshold_in_force: float | None
) -> list[ThresholdRow]:
    """Make rows for thresholds spread over the grid of a test."""
    tests = progress.tests
    # for every threshold in the grid: the counted labels, and the evidence from these labels
    outcomes = progress.counted_outcomes
    n_wrong, n_accepted = tests.count_wrong_and_accepted(outcomes.uncertainty, outcomes.failure)
    evidence = log_evidence(n_wrong, n_accepted, tests.max_risk)
    needed_evidence = -math.log(tests.delta)  # log(1 / delta)
    # These bounds are not valid for a closed set, with labels drawn without replacement.
    has_bounds = isinstance(tests, ThresholdTests)
    rows = []
    for index in _spread_indices(len(tests.grid)):
        threshold = float(tests.grid[index])
        # The guarantee is about all photos up to the threshold in force. The photos up to a lower
        # threshold may have a higher error rate, so a lower threshold needs separate evidence.
        has_evidence = has_bounds and bool(evidence[index] >= needed_evidence)
        is_in_force = threshold_in_force is not None and threshold <= threshold_in_force
        risk_bound = None
        # No photo above the uncertainty limit is drawn. So for a threshold above this limit, the
        # labels are no random sample.
        if has_bounds and index <= tests.last_tested_index:
            risk_bound = lowest_shown_bound(
                int(n_wrong[index]), int(n_accepted[index]), tests.delta
            )
        row = ThresholdRow(
            coverage=float((uncertainty <= threshold).mean()),
            threshold=threshold,
            n_accepted=int(n_accepted[index]),
            n_wrong=int(n_wrong[index]),
            risk_bound=risk_bound,
            expected_risk=_mean_up_to(uncertainty, threshold),
            is_certified=is_in_force and (has_evidence or threshold == threshold_in_force),
        )
        rows.append(row)
    return rows


def _spread_indices(n_thresholds: int) -> Ints:
    """Return indices of the shown thresholds, spread evenly over a grid of ``n_thresholds``."""
    exact_indices = np.linspace(0, n_thresholds - 1, THRESHOLDS_SHOWN)
    rounded_indices = exact_indices.round()
    return np.unique(rounded_indices.astype(np.int64))  # a small grid has fewer thresholds


def _row_without_labels(
    uncertainty: Floats, threshold: float, threshold_in_force: float | None
) -> ThresholdRow:
    """Make the table row for a threshold without counted labels."""
    coverage = float((uncertainty <= threshold).mean())
    expected_risk = _mean_up_to(uncertainty, threshold)
    return ThresholdRow(
        coverage=coverage,
        threshold=threshold,
        n_accepted=0,
        n_wrong=0,
        risk_bound=None,
        expected_risk=expected_risk,
        is_certified=threshold_in_force is not None and threshold <= threshold_in_force,
    )


def _mean_up_to(uncertainty: Floats, threshold: float) -> float:
    """Compute the mean of the uncertainties up to a threshold, or 0 if there are none."""
    uncertainty_up_to = uncertainty[uncertainty <= threshold]
    return float(uncertainty_up_to.mean()) if len(uncertainty_up_to) else 0.0


def lowest_shown_bound(n_wrong: int, n_accepted: int, delta: float) -> float | None:
    """Return the lowest bound in ``TRIED_BOUNDS`` that the labels show, or None without a bound.

    The bound is valid after every label, at the level ``delta``.

    Args:
        n_wrong: How many accepted answers with a label are wrong.
        n_accepted: How many accepted answers have a label.
        delta: The level.
    """
    if not n_accepted:
        return None

    def evidence_against_more_than(bound: float) -> float:
        return float(log_evidence(n_wrong, n_accepted, bound))

    # The evidence rises with the bound, so bisection finds the lowest bound with enough evidence.
    needed_evidence = -math.log(delta)  # log(1 / delta)
    index = bisect_left(TRIED_BOUNDS, needed_evidence, key=evidence_against_more_than)
    return TRIED_BOUNDS[index] if index < len(TRIED_BOUNDS) else None


def _tested_threshold_rows(result: TriageResult) -> list[ThresholdRow]:
    """Make the table rows for the tested predictor."""
    uncertainty = _finite_unlabelled_scores(result)
    threshold_in_force = None
    # The rule belongs to the present predictor. A candidate has no rule yet.
    if result.rule is not None and not result.has_candidate:
        threshold_in_force = result.rule.threshold
    return threshold_rows(uncertainty, result.progress, threshold_in_force)


def _finite_unlabelled_scores(result: TriageResult) -> Floats:
    """Return the tested predictor's scores (M,) for photos without a label."""
    scores = unlabelled_scores(result.photos, result.tested_outcomes, result.book.labels)
    return scores[np.isfinite(scores)]


def guarantee_in_words(result: TriageResult, settings: TriageSettings) -> str:
    """Write a text on the guarantee, or on the labels missing for a guarantee."""
    population = "the accepted"
    if settings.about == "folder":
        population = "the accepted photos of this folder that nobody has labelled"
    target = (
        f"at most {percent(settings.max_risk, decimals=1)} wrong among {population}, with "
        f"{exact_percent(settings.confidence)} confidence"
    )
    if result.rule is not None and result.rule.closed is not None:
        return _folder_guarantee_in_words(result.rule, result.rule.closed, settings)
    if result.rule is not None:
        return (
            f"Guaranteed: {target}, at whatever moment one looks. {result.rule.n_wrong} of "
            f"{result.rule.n_accepted} labelled answers up to the threshold are wrong. The "
            "guarantee is about photos that are drawn in the same way as these."
            f"{scenes_in_words(result)}"
        )
    if result.progress is None:
        n_labels = len(result.book.labels.keys() & set(result.photos.ids))
        return (
            f"Nothing is guaranteed ({target}) with {plural(n_labels, 'label')}. "
            "The photos are ranked without labels, by the model alone."
        )
    return f"Not guaranteed yet ({target}): {_lacking_in_words(result.progress)}"


def _folder_guarantee_in_words(
    rule: Rule, closed_photos: ClosedPhotos, settings: TriageSettings
) -> str:
    """Write a text on the guarantee about the photos in the folder."""
    return (
        f"Guaranteed: of the {closed_photos} that are accepted and that nobody had labelled, at "
        f"most {percent(settings.max_risk, decimals=1)} are wrong, with "
        f"{exact_percent(settings.confidence)} confidence, at whatever moment one looks. "
        f"{rule.n_wrong} of {rule.n_accepted} labelled answers up to the threshold are wrong. The "
        "guarantee is about these photos only, and about no new ones."
    )


def _lacking_in_words(progress: GuaranteeProgress) -> str:
    """Say what is missing for a guarantee: missing answers to requests, or more labels."""
    if len(progress.missing_rows):
        return (
            f"{len(progress.missing_rows):,} of the labels that were asked for are missing. Labels "
            "count up to the first photo without a label. Give the label "
            f"{SKIPPED} to a photo that nobody can name."
        )
    n_wrong, n_accepted = progress.tests.count_wrong_and_accepted(
        progress.counted_outcomes.uncertainty, progress.counted_outcomes.failure
    )
    last_index = progress.tests.last_tested_index  # index of the laxest tested threshold
    n_counted = int(n_accepted[last_index])
    n_wrong_counted = int(n_wrong[last_index])
    counted_labels = f"{n_wrong_counted} of {n_counted} labelled answers that count are wrong."
    if not n_counted:
        counted_labels = "no label counts for it yet."
    if progress.n_more_labels is None:
        return f"{counted_labels} {_out_of_reach_in_words(progress, n_counted)}"
    needed_labels = _needed_labels_in_words(progress.n_more_labels, n_counted)
    if progress.n_more_labels > progress.n_photos_left:
        photos_left = plural(progress.n_photos_left, "photo")
        return (
            f"{counted_labels} {needed_labels}, but only {photos_left} of this folder can still be "
            "drawn for them: allow a larger risk (--max-risk), or add photos."
        )
    return f"{counted_labels} {needed_labels}."


def _needed_labels_in_words(n_more_labels: int, n_counted: int) -> str:
    """Write a clause on how many labels are needed. ``n_counted`` labels count so far."""
    if not n_counted:
        return f"About {n_more_labels:,} labels are needed if every answer is right"
    return f"About {n_more_labels:,} more labels are needed at the present error rate"


def _out_of_reach_in_words(progress: GuaranteeProgress, n_counted: int) -> str:
    """Give advice if no number of further labels would certify a threshold.

    ``n_counted`` labels count so far.
    """
    if not n_counted:
        return (
            "There are too few photos: even if every answer is right, their labels would not be "
            "enough. Allow a larger risk (--max-risk), or add photos."
        )
    if isinstance(progress.tests, ClosedSetTests):
        return (
            "Too many of them are wrong, or too few photos are left: no number of further labels "
            "for the guarantee would be enough with this predictor. Give more labels to fit on, "
            "allow a larger --max-risk, or begin anew with --about new."
        )
    return (
        "With so many wrong answers no number of further calibration labels would be enough: give "
        "more labels to fit on, or allow a larger risk (--max-risk)."
    )


def why_nothing_is_asked(result: TriageResult, settings: TriageSettings) -> str:
    """Say why no label is asked for, and what the next step is."""
    if not settings.n_next:
        return "No label is asked for: -n is 0."
    nothing_left = (
        "No label is asked for: no photo is left from which a predictor or the guarantee could "
        "gain."
    )
    if result.rule is not None and result.rule.closed is not None:
        return (
            f"{nothing_left} For new photos run `vilu triage` with --about new and another -o, and "
            "with --labels and the labels.parquet of this folder."
        )
    if result.rule is not None:
        return (
            f"{nothing_left} Use the predictor on new photos (`vilu embed`, then `vilu score`), or "
            "add photos to the folder and run the same command."
        )
    if not result.predictor.needs_labels:
        return (
            "No label is asked for: all photos to fit on have labels or were skipped, but a "
            f"predictor is fitted on at least {MIN_LABELS_TO_FIT} labels that name a class. Add "
            "photos."
        )
    return (
        "No label is asked for: all photos to fit on have labels, and no number of further labels "
        "of these photos would show the risk. Run the same command with "
        f"{_larger_risk(result.forecast)}, or add photos."
    )


def _larger_risk(forecast: Forecast) -> str:
    """Return the option for a larger risk, with a number if a risk is known that can be shown."""
    if forecast.least_risk is not None and forecast.least_risk > forecast.max_risk:
        return f"--max-risk {forecast.least_risk}"
    return "a larger --max-risk"


def scenes_in_words(result: TriageResult) -> str:
    """Write a text on the guarantee for new scenes, to append to the text on the guarantee.

    Near copies are a scene. The test is repeated with only the first photo in every scene without a
    photo to fit on. The text is "" if nothing is guaranteed, or if few labelled photos are copies.
    """
    progress = result.progress
    is_first = result.is_first_of_scene
    if progress is None or result.rule is None or is_first is None:
        return ""
    n_repeated = int((~is_first).sum())
    if n_repeated <= COPY_SHARE_TO_MENTION * len(is_first):
        return ""
    certified_index = progress.tests.index_of_laxest_certified_threshold(
        progress.counted_outcomes.uncertainty[is_first], progress.counted_outcomes.failure[is_first]
    )
    what_is_guaranteed = "nothing is guaranteed"
    if certified_index is not None:
        threshold = float(progress.tests.grid[certified_index])
        scores = _finite_unlabelled_scores(result)
        share = float((scores <= threshold).mean())
        accepts_as_many = threshold >= (result.rule.threshold or 0.0)
        what_is_guaranteed = f"{share:.0%} of the photos without a label are guaranteed"
        if accepts_as_many:
            what_is_guaranteed = "the guarantee is the same"
    return (
        f" But {n_repeated:,} of the {len(is_first):,} labels that count belong to photos that are "
        "nearly like another labelled photo, as in bursts and films. If every scene has only one "
        f"label, {what_is_guaranteed}. Rely on this for photos of new scenes."
    )


def write_page(
    root: Path,
    photo_folder: PhotoFolder,
    result: TriageResult,
    answers: Sequence[Answer],
    settings: TriageSettings,
    verdict: str,
) -> None:
    """Write ``report.html``: decisions, guarantee, and the photos for people to look at."""
    sections = _sections(answers, {entry.path for entry in result.entries_to_label})
    counts = count_answers(answers)
    pictures = _pictures(photo_folder, result, sections)
    page = render_page(
        find_template(PAGE_TEMPLATE),
        title=f"Photos in {settings.photos.name}",
        verdict=verdict,
        counts=counts,
        guarantee=guarantee_in_words(result, settings),
        likely=likely_in_words(result.likely_right, counts),
        answer=result.answer,
        forecast=str(result.forecast),
        prompts=_prompts_text(settings),
        threshold_rows=_tested_threshold_rows(result),
        is_probability=result.tested_outcomes.is_probability,
        sections=sections,
        pictures=pictures,
        bad=sorted(result.photos.fault_of_path.items())[:PHOTOS_SHOWN],
        n_bad=len(result.photos.fault_of_path),
        backbone=settings.embedding.backbone.name,
        result=result,
        n_calibration=_number_of_guarantee_labels(result),
        max_risk=settings.max_risk,
    )
    write_text(root / REPORT_FILE, page)


def _number_of_guarantee_labels(result: TriageResult) -> int:
    """Count the labels for the present predictor's guarantee."""
    n_counted = 0 if result.progress is None else len(result.progress.counted_rows)
    if result.rule is None:
        return n_counted
    if result.has_candidate:  # the progress is the candidate's
        return result.rule.n
    return max(result.rule.n, n_counted)


def _sections(answers: Sequence[Answer], asked: Collection[str]) -> dict[str, list[Answer]]:
    """Map every section heading to answers about photos for people to look at.

    ``asked`` has the paths of the photos to label next.
    """
    answers_by_doubt = sorted(answers, key=lambda answer: answer.uncertainty or 0.0, reverse=True)
    answers_to_label = [answer for answer in answers if answer.key in asked]
    accepted_answers = [answer for answer in answers_by_doubt if answer.decision == ACCEPT]
    answers_to_review = []
    for answer in answers_by_doubt:
        if answer.decision == REVIEW and answer.uncertainty is not None:
            answers_to_review.append(answer)
    return {
        "Label these next": answers_to_label[:PHOTOS_SHOWN],
        "To review, the most doubtful first": answers_to_review[:PHOTOS_SHOWN],
        "Accepted, the least trusted first": accepted_answers[:PHOTOS_SHOWN],
    }


def _pictures(
    photo_folder: PhotoFolder, result: TriageResult, sections: Mapping[str, Sequence[Answer]]
) -> dict[str, object]:
    """Map the path of every readable photo in the sections to a thumbnail."""
    row_of = {path: row for row, path in enumerate(result.photos.ids)}
    paths = set()
    for answers in sections.values():
        paths |= {answer.key for answer in answers if answer.key in row_of}
    if not paths:
        return {}
    rows = sorted(row_of[path] for path in paths)
    files = photo_folder.files_of(paths)
    by_row = thumbnails(result.outcomes, rows, files)
    return {path: by_row[row_of[path]] for path in paths}
