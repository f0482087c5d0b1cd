"""The whole job on a folder of photos, and the page and the sentences that it leaves for people."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from vilu.artifacts.disk import locked, make_folder, write_text
from vilu.calibration.anytime import log_evidence
from vilu.calibration.thresholds import exactly, percent
from vilu.device import torch_defaults
from vilu.errors import UsageError
from vilu.guard.guard import Answer
from vilu.metrics.counts import Floats
from vilu.outcomes.decisions import ACCEPT, REVIEW
from vilu.report.page.build import find_template, render
from vilu.report.page.gallery import thumbnails
from vilu.triage.answers import answers_of, count_answers, write_decisions, write_next
from vilu.triage.guarantee import GuaranteeProgress
from vilu.triage.labels import SKIPPED, LabelBook, check_names, match_photos, read_labels
from vilu.triage.photos import PhotoFolder
from vilu.triage.run import TriageResult, run_triage
from vilu.triage.sorting import list_folder, sort_photos
from vilu.triage.state import BOOK, NEXT, REPORT, TriageSettings, open_state
from vilu.validation import checked, require_between

PAGE: Final = "triage.html.jinja"
PHOTOS_SHOWN: Final = 24
"""Photos in a section of the page."""

LEVELS_SHOWN: Final = 20
"""Thresholds in the table of the page."""

FEW_OF_SCENES: Final = 0.05
"""Where a larger share of the labels is of scenes that have another label, the page says so."""

RISKS: Final = np.arange(1, 1000) / 1000


LabelFiles = Mapping[Path, tuple[dict[str, str], dict[str, str]]]
"""Files of labels, with their labels and streams by the names that they give the photos."""


@dataclass(frozen=True)
class TriageSummary:
    """What a run has to say: how many photos are what, and how far the guarantee is."""

    counts: str
    guarantee: str
    n_asked: int


@checked
@torch_defaults()
def triage_photos(
    settings: TriageSettings,
    output: Path,
    labels: Sequence[Path] = (),
    *,
    sort: Literal["link", "move"] | None = None,
    overwrite: bool = False,
) -> TriageSummary:
    """Do the whole job, or what of it is new, into a folder.

    Args:
        settings: What is asked for.
        output: New, empty, or the folder of an earlier run with the same settings.
        labels: Files of labels (``labels.read_labels``).
        sort: Also sort the photos, or links to them.
        overwrite: Begin anew, whatever was there, labels included; photos that were moved stay
            where they are.

    Raises:
        UsageError: If a setting cannot be, or is another than in earlier runs; or if
            ``next_labels.csv`` holds answers that are not given, which would be lost.
        DataError: If there is no photo, a label is no class, or a file of labels cannot be read.
        BusyError: If another process works in the folder.
        StorageError: If the file system refuses; run again, what is done stays done.
    """
    check_settings(settings)
    find_template(PAGE)  # what the page needs is missed before anything slow
    files = {file: read_labels(file) for file in labels}
    for file, (by_name, _) in files.items():
        check_names(by_name, settings.embedding.names, settings.of_no_class, file)
    open_state(output, settings, overwrite=overwrite)  # refuses before anything slow, too
    listing = list_folder(settings.photos, output)
    by_path, streams = _labels_by_path(files, listing)
    if not overwrite:
        _require_answers(output, files, by_path)
    with locked(make_folder(output), "sorting into", who="triage"):
        # the state is read again, since another run may have ended meanwhile
        result = run_triage(output, settings, listing, by_path, streams, overwrite=overwrite)
        answers = answers_of(result.photos, result.outcomes, result.book.labels)
        write_decisions(output, result.outcomes, answers)
        write_next(output / NEXT, result.asked, {answer.key: answer for answer in answers})
        write_page(output, listing, result, answers, settings)
        if sort is not None:
            sort_photos(output, listing, answers, settings, sort)
    return summary_of(result, answers, settings)


def check_settings(settings: TriageSettings) -> None:
    """Refuse what cannot be, before anything slow."""
    require_between("max_risk", settings.max_risk)
    require_between("confidence", settings.confidence)
    names = settings.embedding.names
    if len(set(names)) < 2:
        raise UsageError(
            f"there must be two classes at least to choose from. Got {len(names)}: "
            f"{', '.join(names)}."
        )
    both = sorted({*settings.of_no_class, SKIPPED} & {*names})
    if both:
        raise UsageError(
            f"{both[0]!r} is one of the classes, and as a label says that a photo has none. "
            "Rename one."
        )


def _labels_by_path(
    files: LabelFiles, listing: PhotoFolder
) -> tuple[dict[str, str], dict[str, str]]:
    """The labels of all files, and their streams, by the path of the photo."""
    by_path: dict[str, str] = {}
    streams: dict[str, str] = {}
    for file, (labels, streams_of_file) in files.items():
        photo_of = match_photos(labels, listing.paths, listing.root, file)
        for name, photo in photo_of.items():
            by_path[photo] = labels[name]
            if name in streams_of_file:
                streams[photo] = streams_of_file[name]
    return by_path, streams


def _require_answers(output: Path, files: LabelFiles, by_path: Collection[str]) -> None:
    """Refuse to ask anew over answers that were filled in, and neither given now nor before."""
    if not (output / NEXT).is_file():
        return
    names = set(by_path)
    for by_name, _ in files.values():
        names |= by_name.keys()
    in_book = {entry.path for entry in LabelBook.load(output / BOOK) if entry.label is not None}
    filled_in, _ = read_labels(output / NEXT)
    lost = filled_in.keys() - names - in_book
    if lost:
        raise UsageError(
            f"{output / NEXT} holds {len(lost)} answers that were not given, such as that about "
            f"{min(lost)!r}, and would be lost. Give them: --labels {output / NEXT}."
        )


def summary_of(
    result: TriageResult, answers: Sequence[Answer], settings: TriageSettings
) -> TriageSummary:
    """What a run has to say."""
    counts = count_answers(answers)
    parts = [f"{counts['accepted']:,} accepted", f"{counts['review']:,} to review"]
    for name in ("labelled", "unreadable"):
        if counts[name]:
            parts.append(f"{counts[name]:,} {name}")
    new = f" ({result.n_new:,} of them new)" if result.n_new else ""
    return TriageSummary(
        counts=f"{counts['photos']:,} photos{new}: {', '.join(parts)}",
        guarantee=guarantee_in_words(result, settings),
        n_asked=len(result.asked),
    )


@dataclass(frozen=True)
class Level:
    """What labels say of one threshold.

    Attributes:
        coverage: Share of the photos without a label that it accepts.
        threshold: The uncertainty.
        accepted: Labels of photos that it accepts.
        wrong: How many of these were answered wrong.
        bound: The least risk that is certified there, by itself; None without labels.
        expected: Mean probability of failure of the photos that it accepts.
        certified: Whether the guarantee in force covers it.
    """

    coverage: float
    threshold: float
    accepted: int
    wrong: int
    bound: float | None
    expected: float
    certified: bool


def levels_of(
    uncertainty: Floats, progress: GuaranteeProgress | None, in_force: float | None
) -> list[Level]:
    """Some thresholds of the grid; without one, those of equal parts of the photos.

    Args:
        uncertainty: (N,) of the photos without a label.
        progress: Of the predictor that gives it.
        in_force: Threshold of its guarantee, where it has one.
    """
    if not len(uncertainty):
        return []
    if progress is None:
        deciles = np.quantile(uncertainty, np.arange(1, 11) / 10)
        return [_unlabelled_level(uncertainty, float(decile), in_force) for decile in deciles]
    grid = progress.looks.grid
    delta = progress.looks.delta
    wrong, accepted = progress.looks.counts(
        progress.outcomes.uncertainty, progress.outcomes.failure
    )
    evidence = log_evidence(wrong, accepted, progress.looks.max_risk)
    levels = []
    for index in np.unique(np.linspace(0, len(grid) - 1, LEVELS_SHOWN).round().astype(int)):
        threshold = float(grid[index])
        # what is guaranteed of all up to the threshold in force need not be so of the most
        # trusted alone
        is_shown = bool(evidence[index] >= -math.log(delta)) or threshold == in_force
        is_within = in_force is not None and threshold <= in_force
        level = Level(
            coverage=float((uncertainty <= threshold).mean()),
            threshold=threshold,
            accepted=int(accepted[index]),
            wrong=int(wrong[index]),
            bound=least_risk(int(wrong[index]), int(accepted[index]), delta),
            expected=_mean_up_to(uncertainty, threshold),
            certified=is_within and is_shown,
        )
        levels.append(level)
    return levels


def _unlabelled_level(uncertainty: Floats, threshold: float, in_force: float | None) -> Level:
    """A threshold of which no label says anything now."""
    return Level(
        coverage=float((uncertainty <= threshold).mean()),
        threshold=threshold,
        accepted=0,
        wrong=0,
        bound=None,
        expected=_mean_up_to(uncertainty, threshold),
        certified=in_force is not None and threshold <= in_force,
    )


def _mean_up_to(uncertainty: Floats, threshold: float) -> float:
    below = uncertainty[uncertainty <= threshold]
    return float(below.mean()) if len(below) else 0.0


def least_risk(wrong: int, accepted: int, delta: float) -> float | None:
    """The least risk, in steps of 0.001, that labels show at one threshold, whenever one looks."""
    if not accepted:
        return None
    evidence = np.array([float(log_evidence(wrong, accepted, risk)) for risk in RISKS])
    shown = np.flatnonzero(evidence >= -np.log(delta))
    return float(RISKS[shown[0]]) if len(shown) else None


def _levels(result: TriageResult) -> list[Level]:
    """The levels of the predictor that labels are asked for."""
    labels = result.book.labels
    has_no_label = np.array([path not in labels for path in result.photos.ids], dtype=np.bool_)
    uncertainty = result.tested_outcomes.uncertainty
    uncertainty = uncertainty[has_no_label & np.isfinite(uncertainty)]
    in_force = None
    if result.rule is not None and not result.has_candidate:
        in_force = result.rule.threshold
    return levels_of(uncertainty, result.progress, in_force)


def guarantee_in_words(result: TriageResult, settings: TriageSettings) -> str:
    """How far the guarantee is, in a sentence or two."""
    goal = (
        f"at most {percent(settings.max_risk, 1)} wrong among the accepted, with "
        f"{exactly(settings.confidence)} confidence"
    )
    if result.rule is not None:
        return (
            f"Guaranteed: {goal}, at whatever moment one looks. {result.rule.n_wrong} of "
            f"{result.rule.n_accepted} labels up to the threshold are wrong. The guarantee is "
            f"about photos like these, drawn as these were.{scenes_in_words(result)}"
        )
    if result.progress is None:
        return (
            f"Nothing is guaranteed ({goal}): there are {len(result.book.labels)} labels. The "
            "photos are ranked by what the model alone makes likely."
        )
    return f"Not guaranteed yet ({goal}): {_lacking_in_words(result.progress)}"


def _lacking_in_words(progress: GuaranteeProgress) -> str:
    if len(progress.missing):
        return (
            f"{len(progress.missing):,} of the labels that were asked for are missing. The "
            "guarantee rests on all of them; a photo that nobody can name has the label "
            f"{SKIPPED}."
        )
    wrong, accepted = progress.looks.counts(
        progress.outcomes.uncertainty, progress.outcomes.failure
    )
    last = progress.looks.last
    counts = f"{int(wrong[last])} of {int(accepted[last])} labels that count are wrong."
    if progress.more is None:
        return (
            f"{counts} With so many wrong ones more labels of the calibration side would not "
            "help: give more labels to fit on."
        )
    return f"{counts} About {progress.more:,} more would do, if errors go on as so far."


def scenes_in_words(result: TriageResult) -> str:
    """What is shown of new scenes, where many of the labels are of photos that are nearly alike."""
    progress = result.progress
    is_first = result.is_first_of_scene
    if progress is None or result.rule is None or is_first is None:
        return ""
    n_repeated = int((~is_first).sum())
    if n_repeated <= FEW_OF_SCENES * len(is_first):
        return ""
    certified = progress.looks.certified(
        progress.outcomes.uncertainty[is_first], progress.outcomes.failure[is_first]
    )
    if certified is None:
        shown = "nothing"
    else:
        threshold = float(progress.looks.grid[certified])
        share = float((result.tested_outcomes.uncertainty <= threshold).mean())
        is_the_same = threshold >= (result.rule.threshold or 0.0)
        shown = "the same" if is_the_same else f"it for {share:.0%} of the photos"
    return (
        f" But {n_repeated:,} of the {len(is_first):,} labels that count are of photos nearly like "
        "another one with a label, as in bursts and films. With one label a scene they show "
        f"{shown}: for photos of new scenes rely on that."
    )


def write_page(
    root: Path,
    listing: PhotoFolder,
    result: TriageResult,
    answers: Sequence[Answer],
    settings: TriageSettings,
) -> None:
    """``report.html``: what was decided, what is guaranteed, and photos worth a look."""
    sections = _sections(answers, {entry.path for entry in result.asked})
    pictures = _pictures(listing, result, sections)
    page = render(
        find_template(PAGE),
        title=f"Photos in {settings.photos.name}",
        counts=count_answers(answers),
        guarantee=guarantee_in_words(result, settings),
        levels=_levels(result),
        sections=sections,
        pictures=pictures,
        bad=sorted(result.photos.bad.items())[:PHOTOS_SHOWN],
        n_bad=len(result.photos.bad),
        method=result.predictor.label,
        backbone=settings.embedding.backbone.name,
        n_fit=result.n_fit,
        has_candidate=result.has_candidate,
        n_calibration=0 if result.progress is None else len(result.progress.rows),
        max_risk=settings.max_risk,
    )
    write_text(root / REPORT, page)


def _sections(answers: Sequence[Answer], asked: Collection[str]) -> dict[str, list[Answer]]:
    """The photos that are worth a look, under their headings."""
    doubtful_first = sorted(answers, key=lambda answer: -(answer.failure_probability or 0.0))
    to_label = [answer for answer in answers if answer.key in asked]
    accepted = [answer for answer in doubtful_first if answer.decision == ACCEPT]
    to_review = []
    for answer in doubtful_first:
        if answer.decision == REVIEW and answer.failure_probability is not None:
            to_review.append(answer)
    return {
        "Label these next": to_label[:PHOTOS_SHOWN],
        "To review, the most doubtful first": to_review[:PHOTOS_SHOWN],
        "Accepted, the least trusted first": accepted[:PHOTOS_SHOWN],
    }


def _pictures(
    listing: PhotoFolder, result: TriageResult, sections: Mapping[str, Sequence[Answer]]
) -> dict[str, object]:
    """Thumbnails of the photos in the sections, by path; unreadable ones have none."""
    row_of = {path: row for row, path in enumerate(result.photos.ids)}
    paths = set()
    for answers in sections.values():
        paths |= {answer.key for answer in answers if answer.key in row_of}
    if not paths:
        return {}
    rows = sorted(row_of[path] for path in paths)
    by_row = thumbnails(result.outcomes, rows, listing.files_of(paths))
    return {path: by_row[row_of[path]] for path in paths}
