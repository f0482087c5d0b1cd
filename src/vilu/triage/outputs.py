"""The whole triage of a folder of photos, with its report page and its summary for people."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from vilu.artifacts.disk import locked, make_folder, write_text
from vilu.backbones.zeroshot import TEMPLATES, prompts_in_words
from vilu.calibration.anytime import Looks, log_evidence
from vilu.calibration.closed_set import ClosedLooks, ClosedPhotos
from vilu.calibration.likely import LEAST_WRONG, LikelyRight
from vilu.calibration.rules import Rule
from vilu.calibration.thresholds import exact_percent, percent
from vilu.device import torch_defaults
from vilu.errors import UsageError
from vilu.guard.guard import Answer
from vilu.metrics.counts import Floats
from vilu.outcomes.decisions import ACCEPT, REVIEW
from vilu.report.page.build import find_template, render
from vilu.report.page.gallery import thumbnails
from vilu.text import plural
from vilu.triage.answers import (
    answers_of,
    count_answers,
    unlabelled_scores,
    write_decisions,
    write_next,
)
from vilu.triage.carrying import all_labels, former_names, without_former
from vilu.triage.fitting import require_possible
from vilu.triage.guarantee import GuaranteeProgress
from vilu.triage.labels import SKIPPED, match_photos, read_labels, require_names
from vilu.triage.photos import PhotoFolder
from vilu.triage.run import TriageResult, run_triage
from vilu.triage.sidecars import write_sidecars
from vilu.triage.sorting import accepted_labels, list_folder, sort_photos
from vilu.triage.state import NEXT, REPORT, TriageSettings, open_state
from vilu.triage.verdict import labelled_answers, verdict_in_words
from vilu.validation import checked, require_between

PAGE: Final = "triage.html.jinja"
"""File name of the template of the page."""

PHOTOS_SHOWN: Final = 24
"""Maximum number of photos in a section of the page."""

LEVELS_SHOWN: Final = 20
"""Number of thresholds in the table of the page, or fewer if the grid is smaller."""

FEW_NEAR_COPIES: Final = 0.05
"""The page mentions near copies if they are more than this share of the labelled photos."""

RISKS: Final = np.arange(1, 1000) / 1000
"""Upper bounds on the error rate that ``least_risk`` tries, ascending."""

NO_SIDECAR: Final = "--xmp has written no label: no photo is accepted or labelled with a class yet."

LabelFiles = Mapping[Path, tuple[dict[str, str], dict[str, str]]]
"""For every file of labels: labels and streams, both by the name that the file gives a photo."""


@dataclass(frozen=True)
class TriageSummary:
    """The summary of a run for people.

    Attributes:
        verdict: What the labels say about the answers, and warnings; empty if there is neither.
        answer: Which answers are judged, and why.
        counts: How many photos have a label. Of those without a label, how many were accepted, are
            to be reviewed, and so on.
        guarantee: What is guaranteed, or what the guarantee lacks.
        forecast: How many photos further labels could get accepted; "" if nothing is known.
        likely: How many photos without a label are likely right, or why this is not known.
        prompts: The templates, and a warning of prompts that read badly.
        n_asked: Number of photos whose labels are asked for.
        why_none: Why no label is asked for, and what to do next; "" if labels are asked for.
        sidecars: How many photos have their label in a sidecar, or why none has; "" if none was
            asked for.
    """

    verdict: str
    answer: str
    counts: str
    guarantee: str
    forecast: str
    likely: str
    prompts: str
    n_asked: int
    why_none: str
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
    """Run a triage in a folder; a later run only does what is new.

    Args:
        settings: The settings of the triage.
        output: The folder of the triage: new, empty, or of an earlier run. If settings have
            changed since, the labels stay (``carrying.carry_over``).
        labels: Files of labels (``labels.read_labels``).
        sort: "link": also make sorted links to the photos. "move": also move the photos into sorted
            folders.
        xmp: Also write the accepted labels to XMP sidecars beside the photos.
        overwrite: Begin anew and remove the results and labels of earlier runs. Photos that were
            moved stay where they are.

    Raises:
        UsageError: If a setting is not allowed, if the seed differs from the earlier runs, or if
            ``next_labels.csv`` holds answers that were not given to this run and would be lost.
        DataError: If there is no photo, a label is no class, or a file of labels cannot be read.
        BusyError: If another process works in the folder.
        StorageError: If the file system refuses. A repeated run goes on where this one ended.
    """
    check_settings(settings)
    find_template(PAGE)  # fails before the slow steps if the page cannot be written
    former: set[str] = set()
    if not overwrite:
        former = former_names(output, settings.known_labels)
    files = {}
    for file in labels:
        texts, streams_of_file = read_labels(file)
        texts = without_former(texts, former, source=file)
        labels_of_file = require_names(
            texts, settings.embedding.names, settings.of_no_class, source=file
        )
        files[file] = (labels_of_file, streams_of_file)
    open_state(output, settings, overwrite=overwrite)  # fails here if the folder is no triage
    listing = list_folder(settings.photos, output, follow_links=settings.follow_links)
    labels_by_path, streams = _labels_by_path(files, listing)
    if not overwrite:
        _require_no_lost_answers(output, files, labels_by_path)
    with locked(make_folder(output), activity="sorting into", holder_kind="triage"):
        # ``run_triage`` reads the state again, because another run may have changed it before the
        # lock was taken.
        result = run_triage(output, settings, listing, labels_by_path, streams, overwrite=overwrite)
        answers = answers_of(
            result.photos, result.predictor, result.outcomes, result.book.labels, result.likely
        )
        write_decisions(output, result.outcomes, answers)
        answer_of_path = {answer.key: answer for answer in answers}
        write_next(output / NEXT, result.asked, answer_of_path, result.outcomes.answer)
        verdict = _verdict(result)
        write_page(output, listing, result, answers, settings, verdict)
        if sort is not None:
            sort_photos(output, listing, answers, settings, sort)
        sidecars = ""
        if xmp:
            # listed again, because photos may have been moved
            listing = list_folder(settings.photos, output, follow_links=settings.follow_links)
            n_written = write_sidecars(accepted_labels(output, listing, answers, settings))
            sidecars = NO_SIDECAR
            if n_written:
                sidecars = f"{plural(n_written, 'photo')} with the accepted label in PHOTO.xmp"
    return summary_of(result, answers, settings, verdict, sidecars)


def check_settings(settings: TriageSettings) -> None:
    """Raise UsageError if a setting is not allowed, before the slow steps."""
    require_between("max_risk", settings.max_risk)
    require_between("confidence", settings.confidence)
    require_possible(settings.answer)
    names = settings.embedding.names
    if len(set(names)) < 2:
        raise UsageError(
            f"there must be at least two classes to choose from. Got {len(names)}: "
            f"{', '.join(names)}."
        )
    ambiguous = sorted({*settings.of_no_class, SKIPPED} & {*names})
    if ambiguous:
        raise UsageError(
            f"{ambiguous[0]!r} is the name of a class, and also the label of photos that are of no "
            "class. Rename the class, or the label."
        )


def _labels_by_path(
    files: LabelFiles, listing: PhotoFolder
) -> tuple[dict[str, str], dict[str, str]]:
    """Labels and streams of all files, by the path of the photo."""
    by_path: dict[str, str] = {}
    streams: dict[str, str] = {}
    for file, (labels, streams_of_file) in files.items():
        photo_of = match_photos(labels, listing.paths, listing.root, source=file)
        for name, photo in photo_of.items():
            by_path[photo] = labels[name]
            if name in streams_of_file:
                streams[photo] = streams_of_file[name]
    return by_path, streams


def _require_no_lost_answers(output: Path, files: LabelFiles, paths: Collection[str]) -> None:
    """Raise UsageError if ``next_labels.csv`` holds answers that would be lost.

    Answers are lost if they are neither in the book nor in the files of this run.

    Args:
        output: The folder of the triage.
        files: The files of labels of this run.
        paths: Paths of the photos that these files label.
    """
    if not (output / NEXT).is_file():
        return
    in_files = set(paths)  # paths of photos, and below also their names in the files
    for labels_by_name, _ in files.values():
        in_files |= labels_by_name.keys()
    in_book = {entry.path for entry in all_labels(output) if entry.label is not None}
    filled_in, _ = read_labels(output / NEXT)
    lost = filled_in.keys() - in_files - in_book
    if lost:
        raise UsageError(
            f"{output / NEXT} holds {plural(len(lost), 'answer')} that no run has read, such as "
            f"that about {min(lost)!r}. They would be lost. Give them: --labels {output / NEXT}."
        )


def summary_of(
    result: TriageResult,
    answers: Sequence[Answer],
    settings: TriageSettings,
    verdict: str,
    sidecars: str,
) -> TriageSummary:
    """The summary of a run for people."""
    counts = count_answers(answers)
    new = f" ({result.n_new:,} of them new)" if result.n_new else ""
    return TriageSummary(
        verdict=verdict,
        answer=str(result.answer),
        counts=f"{plural(counts['photos'], 'photo')}{new}: {counts_in_words(counts)}",
        guarantee=guarantee_in_words(result, settings),
        forecast=str(result.forecast),
        likely=likely_in_words(result.likely, counts),
        prompts=_prompts(settings),
        sidecars=sidecars,
        n_asked=len(result.asked),
        why_none="" if result.asked else why_nothing_is_asked(result),
    )


def counts_in_words(counts: Mapping[str, int]) -> str:
    """What became of the photos without a label, and how many have a label (``count_answers``)."""
    n = counts["unlabelled"]
    parts = [
        f"accepted {counts['accepted']:,} of {n:,} without a label",
        f"{counts['review']:,} to review",
    ]
    if counts["unreadable"]:
        parts.append(f"{counts['unreadable']:,} unreadable")
    has = "has" if counts["labelled"] == 1 else "have"
    return f"{', '.join(parts)}; {counts['labelled']:,} {has} a label"


def likely_in_words(likely: LikelyRight | None, counts: Mapping[str, int]) -> str:
    """How many photos without a label are likely right, or why there is no estimate."""
    none = "Which answers are likely right cannot be estimated"
    if likely is None:
        return f"{none}: the predictor was fitted before there was such an estimate."
    if likely.n == 0:
        return f"{none} yet: the predictor was not fitted on labels."
    labels = f"{likely.n_wrong:,} of {likely.n:,} cross-fitted labels show a wrong answer"
    if likely.n_drawn:
        labels += f", and {likely.n_drawn_wrong:,} of {likely.n_drawn:,} drawn ones"
    if likely.probability is None:
        return f"{none} yet: {labels}, and {LEAST_WRONG} wrong ones are needed."
    n_unlabelled = counts["unlabelled"]
    if not n_unlabelled:
        return "Every photo has a label, so no answer is left to be likely right."
    return (
        f"{counts['likely']:,} of {n_unlabelled:,} photos without a label are likely right. "
        f"At most {percent(likely.max_risk, decimals=1)} of these answers are expected to be "
        f"wrong. This is an estimate, not a guarantee: {labels}."
    )


def _verdict(result: TriageResult) -> str:
    """What the labels say about the answers, and warnings."""
    labelled = labelled_answers(
        result.photos, result.outcomes, result.predictor, result.is_calibration, result.likely
    )
    has_doubtful = any(entry.stream == "fit" and entry.label is not None for entry in result.book)
    return verdict_in_words(labelled, result.outcomes, has_doubtful=has_doubtful)


def _prompts(settings: TriageSettings) -> str:
    """The templates of the prompts, with a warning of prompts that read badly."""
    embedding = settings.embedding
    templates = TEMPLATES["default"] if embedding.templates is None else embedding.templates
    return prompts_in_words(embedding.names, templates)


@dataclass(frozen=True)
class Level:
    """What the labels show about one threshold: a row of the table of the page.

    Attributes:
        coverage: Share of the unlabelled photos that the threshold accepts.
        threshold: Largest uncertainty that is accepted.
        accepted: Number of counted labels whose photo the threshold accepts.
        wrong: Number of these photos whose answer is wrong.
        bound: Upper bound on the error rate that the labels show if only this threshold is tested;
            None if they show none.
        expected: Mean probability of failure of the unlabelled photos that the threshold accepts.
        certified: Whether the guarantee in force covers this threshold.
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
    """Make the rows of the table of the page.

    The thresholds are spread over the grid of the test. Without a test they are the deciles of the
    uncertainties.

    Args:
        uncertainty: (N,) uncertainties of the photos without a label.
        progress: How far the guarantee of the predictor is; None without a test.
        in_force: Threshold of the predictor's guarantee; None without a guarantee.
    """
    if not len(uncertainty):
        return []
    if progress is None:
        deciles = np.quantile(uncertainty, np.arange(1, 11) / 10)
        return [_unlabelled_level(uncertainty, float(decile), in_force) for decile in deciles]
    grid = progress.looks.grid
    delta = progress.looks.delta
    # Numbers of labels for every threshold of the grid, and what they show of it.
    wrong, accepted = progress.looks.counts(
        progress.outcomes.uncertainty, progress.outcomes.failure
    )
    evidence = log_evidence(wrong, accepted, progress.looks.max_risk)
    # Labels of a closed set are drawn without replacement, so these bounds do not hold for it.
    has_bounds = isinstance(progress.looks, Looks)
    levels = []
    indices = np.unique(np.linspace(0, len(grid) - 1, LEVELS_SHOWN).round().astype(int))
    for index in indices:
        threshold = float(grid[index])
        # The guarantee is about all photos up to the threshold in force. The photos up to a lower
        # threshold may have a higher error rate, so that threshold needs evidence of its own.
        has_evidence = has_bounds and bool(evidence[index] >= -math.log(delta))
        is_within = in_force is not None and threshold <= in_force
        bound = None
        if has_bounds:
            bound = least_risk(int(wrong[index]), int(accepted[index]), delta)
        level = Level(
            coverage=float((uncertainty <= threshold).mean()),
            threshold=threshold,
            accepted=int(accepted[index]),
            wrong=int(wrong[index]),
            bound=bound,
            expected=_mean_up_to(uncertainty, threshold),
            certified=is_within and (has_evidence or threshold == in_force),
        )
        levels.append(level)
    return levels


def _unlabelled_level(uncertainty: Floats, threshold: float, in_force: float | None) -> Level:
    """The level of a threshold for which no labels are counted."""
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
    """Mean of the uncertainties up to a threshold; 0 if there are none."""
    below = uncertainty[uncertainty <= threshold]
    return float(below.mean()) if len(below) else 0.0


def least_risk(wrong: int, accepted: int, delta: float) -> float | None:
    """The lowest bound in ``RISKS`` that labels show at a threshold; None if they show no bound.

    The bound is valid after every label, at the level ``delta``.

    Args:
        wrong: Number of wrong answers among the accepted ones.
        accepted: Number of labelled answers that the threshold accepts.
        delta: The level.
    """
    if not accepted:
        return None
    evidence = np.array([float(log_evidence(wrong, accepted, risk)) for risk in RISKS])
    shown_risks = RISKS[evidence >= -np.log(delta)]
    return float(shown_risks[0]) if len(shown_risks) else None


def _levels(result: TriageResult) -> list[Level]:
    """Levels of the tested predictor, from the photos that have no label."""
    uncertainty = _unlabelled_scores(result)
    in_force = None
    # The rule belongs to the present predictor. A candidate has no rule yet.
    if result.rule is not None and not result.has_candidate:
        in_force = result.rule.threshold
    return levels_of(uncertainty, result.progress, in_force)


def _unlabelled_scores(result: TriageResult) -> Floats:
    """(M,) scores of the photos without a label by the tested predictor."""
    scores = unlabelled_scores(result.photos, result.tested_outcomes, result.book.labels)
    return scores[np.isfinite(scores)]


def guarantee_in_words(result: TriageResult, settings: TriageSettings) -> str:
    """What is guaranteed, or what the guarantee lacks, as a text for people."""
    among = "the accepted"
    if settings.about == "folder":
        among = "the accepted photos of this folder that nobody has labelled"
    target = (
        f"at most {percent(settings.max_risk, decimals=1)} wrong among {among}, with "
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
        return (
            f"Nothing is guaranteed ({target}) with {plural(len(result.book.labels), 'label')}. "
            "The photos are ranked without labels, by the model alone."
        )
    return f"Not guaranteed yet ({target}): {_lacking_in_words(result.progress)}"


def _folder_guarantee_in_words(rule: Rule, closed: ClosedPhotos, settings: TriageSettings) -> str:
    """What is guaranteed of the photos of the folder."""
    return (
        f"Guaranteed: of the {closed} that are accepted and that nobody had labelled, at most "
        f"{percent(settings.max_risk, decimals=1)} are wrong, with "
        f"{exact_percent(settings.confidence)} confidence, at whatever moment one looks. "
        f"{rule.n_wrong} of {rule.n_accepted} labelled "
        "answers up to the threshold are wrong. The guarantee is about these photos only, and "
        "about no new ones."
    )


def _lacking_in_words(progress: GuaranteeProgress) -> str:
    """What a guarantee lacks: labels that were asked for, or more labels."""
    if len(progress.missing):
        return (
            f"{len(progress.missing):,} of the labels that were asked for are missing. Labels "
            "count up to the first photo without a label. Give the label "
            f"{SKIPPED} to a photo that nobody can name."
        )
    wrong, accepted = progress.looks.counts(
        progress.outcomes.uncertainty, progress.outcomes.failure
    )
    last = progress.looks.last  # index of the laxest threshold that is tested
    n_counted = int(accepted[last])
    counts = f"{int(wrong[last])} of {n_counted} labelled answers that count are wrong."
    if not n_counted:
        counts = "no label counts for it yet."
    if progress.more is None:
        return f"{counts} {_out_of_reach_in_words(progress, n_counted)}"
    needed = f"About {progress.more:,} more labels are needed at the present error rate"
    if not n_counted:
        needed = f"About {progress.more:,} labels are needed if every answer is right"
    if progress.more > progress.n_left:
        return (
            f"{counts} {needed}, but only {plural(progress.n_left, 'photo')} of this folder can "
            "still be drawn for them: allow a larger risk (--max-risk), or add photos."
        )
    return f"{counts} {needed}."


def _out_of_reach_in_words(progress: GuaranteeProgress, n_counted: int) -> str:
    """What to do where no number of further labels would certify a threshold.

    ``n_counted`` labels count for it so far.
    """
    if not n_counted:
        return (
            "There are too few photos: even if every answer is right, their labels would not be "
            "enough. Allow a larger risk (--max-risk), or add photos."
        )
    if isinstance(progress.looks, ClosedLooks):
        return (
            "Too many of them are wrong, or too few photos are left, so no number of further "
            "labels would be enough. Begin anew with more labels to fit on, with a larger "
            "--max-risk, or with --about new."
        )
    return (
        "With so many wrong answers no number of further calibration labels would be enough: give "
        "more labels to fit on, or allow a larger risk (--max-risk)."
    )


def why_nothing_is_asked(result: TriageResult) -> str:
    """Why no label is asked for, and what to do next, as a text for people."""
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
    larger_risk = "a larger --max-risk"
    least_risk = result.forecast.least_risk
    if least_risk is not None and least_risk > result.forecast.max_risk:
        larger_risk = f"--max-risk {least_risk}"
    return (
        "No label is asked for: all photos to fit on have labels, and no number of further labels "
        f"of these photos would show the risk. Run the same command with {larger_risk}, or add "
        "photos."
    )


def scenes_in_words(result: TriageResult) -> str:
    """What the labels show about new scenes, as a sentence after those of the guarantee.

    "" if nothing is guaranteed, or if few labelled photos are near copies.

    The test is repeated with only the first photo of every scene.
    """
    progress = result.progress
    is_first = result.is_first_of_scene
    if progress is None or result.rule is None or is_first is None:
        return ""
    n_repeated = int((~is_first).sum())
    if n_repeated <= FEW_NEAR_COPIES * len(is_first):
        return ""
    certified = progress.looks.certified(
        progress.outcomes.uncertainty[is_first], progress.outcomes.failure[is_first]
    )
    what_is_shown = "nothing"
    if certified is not None:
        threshold = float(progress.looks.grid[certified])  # ``certified`` is an index
        share = float((_unlabelled_scores(result) <= threshold).mean())
        accepts_as_many = threshold >= (result.rule.threshold or 0.0)
        what_is_shown = f"the guarantee for {share:.0%} of the photos without a label"
        if accepts_as_many:
            what_is_shown = "the same"
    return (
        f" But {n_repeated:,} of the {len(is_first):,} labels that count are of photos nearly like "
        "another labelled photo, as in bursts and films. With one label for each scene the labels "
        f"show {what_is_shown}: rely on this for photos of new scenes."
    )


def write_page(
    root: Path,
    listing: PhotoFolder,
    result: TriageResult,
    answers: Sequence[Answer],
    settings: TriageSettings,
    verdict: str,
) -> None:
    """Write ``report.html``: decisions, guarantee, and the photos that people should look at."""
    sections = _sections(answers, {entry.path for entry in result.asked})
    counts = count_answers(answers)
    pictures = _pictures(listing, result, sections)
    page = render(
        find_template(PAGE),
        title=f"Photos in {settings.photos.name}",
        verdict=verdict,
        counts=counts,
        guarantee=guarantee_in_words(result, settings),
        likely=likely_in_words(result.likely, counts),
        answer=result.answer,
        forecast=str(result.forecast),
        prompts=_prompts(settings),
        levels=_levels(result),
        is_probability=result.tested_outcomes.is_probability,
        sections=sections,
        pictures=pictures,
        bad=sorted(result.photos.bad.items())[:PHOTOS_SHOWN],
        n_bad=len(result.photos.bad),
        backbone=settings.embedding.backbone.name,
        result=result,
        n_calibration=0 if result.progress is None else len(result.progress.rows),
        max_risk=settings.max_risk,
    )
    write_text(root / REPORT, page)


def _sections(answers: Sequence[Answer], asked: Collection[str]) -> dict[str, list[Answer]]:
    """The answers about photos that people should look at, by the heading of the section."""
    doubtful_first = sorted(answers, key=lambda answer: answer.uncertainty or 0.0, reverse=True)
    to_label = [answer for answer in answers if answer.key in asked]
    accepted = [answer for answer in doubtful_first if answer.decision == ACCEPT]
    to_review = []
    for answer in doubtful_first:
        if answer.decision == REVIEW and answer.uncertainty is not None:
            to_review.append(answer)
    return {
        "Label these next": to_label[:PHOTOS_SHOWN],
        "To review, the most doubtful first": to_review[:PHOTOS_SHOWN],
        "Accepted, the least trusted first": accepted[:PHOTOS_SHOWN],
    }


def _pictures(
    listing: PhotoFolder, result: TriageResult, sections: Mapping[str, Sequence[Answer]]
) -> dict[str, object]:
    """Thumbnails of the photos in the sections, by path; unreadable photos have none."""
    row_of = {path: row for row, path in enumerate(result.photos.ids)}
    paths = set()
    for answers in sections.values():
        paths |= {answer.key for answer in answers if answer.key in row_of}
    if not paths:
        return {}
    rows = sorted(row_of[path] for path in paths)
    by_row = thumbnails(result.outcomes, rows, listing.files_of(paths))
    return {path: by_row[row_of[path]] for path in paths}
