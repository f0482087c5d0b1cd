"""What a triage leaves for people: decisions, the next labels, a page, and the photos sorted."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa

from vilu.artifacts.disk import atomic_write, locked, make_folder, or_refuse, write_text
from vilu.artifacts.hashing import bytes_hash
from vilu.artifacts.tables import write_table
from vilu.calibration.anytime import log_evidence
from vilu.calibration.thresholds import exactly, percent
from vilu.datasets.files import portable_name
from vilu.device import as_usual
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UsageError
from vilu.guard.guard import RunnersUp, runners_up_of
from vilu.report.page.build import find_template, render
from vilu.report.page.gallery import thumbnails
from vilu.scoring.score import ACCEPT, OUTSIDE_REASON
from vilu.triage.ask import LABELLED, REVIEW, Decision, decision_of, write_next
from vilu.triage.labels import (
    SKIPPED,
    LabelBook,
    check_names,
    columns_of,
    match_photos,
    read_labels,
)
from vilu.triage.photos import PhotoFolder
from vilu.triage.triage import BOOK, DECISIONS, MOVED, NEXT, REPORT, SORTED, Job, Triage, Workshop
from vilu.validation import checked, require_between

PAGE: Final = "triage.html.jinja"
SHOWN, LINES = 24, 20
"""Photos in a section of the page, and thresholds in its table."""

SELDOM: Final = 0.05
"""Where a larger share of the labels is of scenes that have another, it is told."""

NO_NAME: Final = re.compile(r"[^\w .()+-]")
"""What no folder's name should hold."""

RISKS: Final = np.arange(1, 1000) / 1000


def decisions_of(found: Triage) -> list[Decision]:
    """One for every photo that was listed: scored, labelled or unreadable."""
    outcomes, labels = found.outcomes, found.book.labels
    near = runners_up(found.photos)
    rows = [
        decision_of(outcomes, row, labels.get(path), near[row])
        for row, path in enumerate(found.photos.ids)
    ]
    rows += [Decision(path, None, None, REVIEW, kind) for path, kind in found.photos.bad.items()]
    return sorted(rows, key=lambda one: one.path)


def runners_up(photos: EmbeddingSource) -> list[RunnersUp]:
    """Per row the next answers; none of rows that cannot be scored."""
    found: list[RunnersUp] = [()] * len(photos)
    for batch in photos.batches(SCORING_BATCH):
        for row, near in zip(
            batch.index.tolist(), runners_up_of(batch, photos.class_names or ()), strict=True
        ):
            found[row] = near
    return found


def write_decisions(root: Path, found: Triage, rows: Sequence[Decision]) -> None:
    """``decisions.csv`` for people, with the runner-up; ``decisions.parquet`` as ``vilu score`` writes it."""
    names = ("path", "answer", "failure_probability", "decision", "reason", "runner_up")
    write_table(root / f"{DECISIONS}.csv", columns_of(rows, names), {})
    found.outcomes.save(root / f"{DECISIONS}.parquet")


def sort_photos(
    root: Path, listing: PhotoFolder, rows: Sequence[Decision], job: Job, how: str
) -> None:
    """``sorted/accepted/CLASS``, ``sorted/outside`` and ``sorted/review``.

    A photo that is moved is noted with its new place before it goes, after the place where it is,
    so that later runs find it; nothing is ever overwritten, and of what lies in ``sorted`` only
    links are removed. Where another file has the place of a photo, the photo stays where it is, and
    so does one that is a link itself.
    """
    home, moved = root / SORTED, listing.moved
    sources = {
        text: moved.get(text, listing.root / path)
        for text, path in ((portable_name(path), path) for path, _ in listing.listing)
    }
    flat = Counter(_flat(one.path) for one in rows)
    places = {
        one.path: home / _place(one, job) / _flat(one.path, told_apart=flat[_flat(one.path)] > 1)
        for one in rows
    }
    with or_refuse(f"sort photos into {home}"):
        for old in home.rglob("*"):
            if old.is_symlink():
                old.unlink()
        places = {path: target for path, target in places.items() if not target.exists()}
        if how == "move":
            places = {
                path: target for path, target in places.items() if not sources[path].is_symlink()
            }
            _note(root, [*moved.items(), *places.items()])
        for path, target in places.items():
            make_folder(target.parent)
            if how == "link":
                # a link that leads to itself is no error of realpath, but of Path.resolve
                source = os.path.realpath(sources[path])
                target.symlink_to(os.path.relpath(source, target.parent.resolve()))
            elif sources[path].exists() and not target.exists():
                shutil.move(sources[path], target, _copy)


def _copy(source: str | Path, target: str | Path) -> None:
    """To another disk: no kill leaves half of a photo where it is to lie; by its time it is known as the same one."""
    with atomic_write(target) as copy:
        copy.write(Path(source).read_bytes())
        copy.flush()
        shutil.copystat(source, copy.name)


LONGEST_NAME: Final = 255
"""Bytes that file systems take of a name."""

HASH_DIGITS: Final = 16
"""Digits of a hash in front of a name that is cut, or that another photo has."""


def _flat(path: str, *, told_apart: bool = False) -> str:
    """Name of a photo where all lie in one folder.

    A hash tells apart ``a/b.jpg`` and ``a__b.jpg``, and names that are cut.
    """
    name = path.replace("/", "__")
    content = name.encode()
    if len(content) <= LONGEST_NAME and not told_apart:
        return name
    start = f"{bytes_hash(path.encode())[:HASH_DIGITS]}__"
    return start + content[len(start) - LONGEST_NAME :].decode(errors="ignore")


def _note(root: Path, places: Sequence[tuple[str, Path]]) -> None:
    names = {
        "path": [path for path, _ in places],
        "place": [one.relative_to(root).as_posix() for _, one in places],
    }
    write_table(
        root / MOVED,
        {name: pa.array(found, pa.string()) for name, found in names.items()},
        {"kind": "moved"},
    )


def _place(one: Decision, job: Job) -> str:
    if one.reason == OUTSIDE_REASON or one.answer in job.of_no_class:
        return "outside"
    if one.decision in {ACCEPT, LABELLED} and one.answer is not None:
        return f"accepted/{NO_NAME.sub('_', one.answer).strip('. ') or '_'}"
    return "review"


@dataclass(frozen=True)
class Level:
    """What labels say of one threshold."""

    coverage: float  # share of the photos without a label
    threshold: float
    accepted: int
    wrong: int
    bound: float | None  # the least risk that is certified there, by itself; None: none below one
    expected: float  # mean probability of failure of the photos that it accepts
    certified: bool


def levels_of(found: Triage) -> list[Level]:
    """Some thresholds of the grid; without one, those of equal parts of the photos, of which no label counts."""
    known = found.book.labels  # made anew whenever it is asked for
    free = np.array([path not in known for path in found.photos.ids], dtype=np.bool_)
    u = found.in_play.uncertainty[free & np.isfinite(found.in_play.uncertainty)]
    standing, rule = found.standing, found.rule
    if not len(u):
        return []
    if standing is None:
        grid, wrong, accepted = np.quantile(u, np.arange(1, 11) / 10), *np.zeros((2, 10), np.int64)
        shown = wrong == 0
    else:
        grid = standing.looks.grid
        wrong, accepted = standing.looks.counts(
            standing.outcomes.uncertainty, standing.outcomes.failure
        )
        # what is promised of all up to the threshold in force need not be so of the most trusted
        # alone
        shown = log_evidence(wrong, accepted, standing.looks.max_risk) >= -math.log(
            standing.looks.delta
        )
    kept = None if rule is None or found.has_candidate else rule.threshold
    certified = -math.inf if kept is None else kept
    return [
        Level(
            coverage=float((u <= grid[place]).mean()),
            threshold=float(grid[place]),
            accepted=int(accepted[place]),
            wrong=int(wrong[place]),
            bound=None
            if standing is None
            else least_risk(int(wrong[place]), int(accepted[place]), standing.looks.delta),
            expected=float(u[u <= grid[place]].mean()) if (u <= grid[place]).any() else 0.0,
            certified=bool(grid[place] <= certified and (shown[place] or grid[place] == certified)),
        )
        for place in np.unique(np.linspace(0, len(grid) - 1, LINES).round().astype(int)).tolist()
    ]


def least_risk(wrong: int, accepted: int, delta: float) -> float | None:
    """The least risk, in steps of 0.001, that so many labels show at one threshold, at whatever moment one looks."""
    if not accepted:
        return None
    shown = np.array([float(log_evidence(wrong, accepted, risk)) for risk in RISKS]) >= -np.log(
        delta
    )
    return float(RISKS[int(np.argmax(shown))]) if shown.any() else None


def counts_of(rows: Sequence[Decision]) -> dict[str, int]:
    """How many photos have which decision; of those to review, those that cannot be read, and those of no class."""
    unread = sum(one.answer is None for one in rows)
    return {
        "photos": len(rows),
        "accepted": sum(one.decision == ACCEPT for one in rows),
        "labelled": sum(one.decision == LABELLED for one in rows),
        "outside": sum(one.reason == OUTSIDE_REASON for one in rows),
        "unreadable": unread,
        "review": sum(one.decision == REVIEW for one in rows) - unread,
    }


def promise_in_words(found: Triage, max_risk: float, confidence: float) -> str:
    """Where the promise stands, in a sentence or two."""
    standing, goal = (
        found.standing,
        f"at most {percent(max_risk, 1)} wrong among the accepted, with {exactly(confidence)} confidence",
    )
    if found.rule is not None:
        return (
            f"Promised: {goal}, at whatever moment one looks. {found.rule.n_wrong} of {found.rule.n_accepted} labels "
            "up to the threshold are wrong. It is a promise about photos like these, drawn as these were."
            f"{scenes_in_words(found)}"
        )
    if standing is None:
        few = len(found.book.labels)
        return (
            f"Nothing is promised ({goal}): there are {few} labels that could teach or vouch. The photos are ranked by "
            "what the model alone makes likely."
        )
    wrong, accepted = standing.looks.counts(
        standing.outcomes.uncertainty, standing.outcomes.failure
    )
    if len(standing.missing):
        return (
            f"Not promised yet ({goal}): {len(standing.missing):,} of the labels that were asked for are missing. The "
            f"promise rests on all of them; a photo that nobody can name has the label {SKIPPED}."
        )
    k, m = int(wrong[standing.looks.last]), int(accepted[standing.looks.last])
    told = f"Not promised yet ({goal}): {k} of {m} labels that may vouch are wrong."
    if standing.more is None:
        return f"{told} With so many wrong ones more labels of this kind would not help: let more of them teach."
    return f"{told} About {standing.more:,} more would do, if errors go on as so far."


def scenes_in_words(found: Triage) -> str:
    """What is shown of new scenes, where many of the labels are of photos that are nearly alike."""
    standing, rule, once = found.standing, found.rule, found.scenes
    if standing is None or rule is None or once is None or (~once).sum() <= SELDOM * len(once):
        return ""
    shown = standing.looks.certified(
        standing.outcomes.uncertainty[once], standing.outcomes.failure[once]
    )
    threshold = -math.inf if shown is None else float(standing.looks.grid[shown])
    share = float((found.in_play.uncertainty <= threshold).mean())
    less = "nothing" if shown is None else f"it for {share:.0%} of the photos"
    counted = "the same" if threshold >= (rule.threshold or 0.0) else less
    return (
        f" But {(~once).sum():,} of the {len(once):,} labels that count are of photos nearly like another one with a "
        f"label, as in bursts and films. With one label a scene they show {counted}: for photos of new scenes rely on "
        "that."
    )


def write_page(
    root: Path, listing: PhotoFolder, found: Triage, rows: Sequence[Decision], job: Job
) -> None:
    """``report.html``: what was decided, what is promised, and photos worth a look."""
    template = find_template(PAGE)
    place = {path: row for row, path in enumerate(found.photos.ids)}
    doubt = [one for one in rows if one.decision == REVIEW and one.failure_probability is not None]
    doubt.sort(key=lambda one: -(one.failure_probability or 0.0))
    trusted = sorted(
        (one for one in rows if one.decision == ACCEPT),
        key=lambda one: -(one.failure_probability or 0.0),
    )
    asked = {one.path for one in found.asked}
    sections = {
        "Label these next": [one for one in rows if one.path in asked][:SHOWN],
        "To review, the most doubtful first": doubt[:SHOWN],
        "Accepted, the least trusted first": trusted[:SHOWN],
    }
    wanted = sorted(
        {place[one.path] for shown in sections.values() for one in shown if one.path in place}
    )
    paths = {found.photos.ids[row] for row in wanted}
    drawn = thumbnails(found.outcomes, wanted, listing.some(paths)) if wanted else {}
    page = render(
        template,
        title=f"Photos in {job.photos.name}",
        counts=counts_of(rows),
        promise=promise_in_words(found, job.max_risk, job.confidence),
        levels=levels_of(found),
        sections={
            heading: [(one, drawn.get(place.get(one.path, -1))) for one in shown]
            for heading, shown in sections.items()
        },
        bad=sorted(found.photos.bad.items())[:SHOWN],
        n_bad=len(found.photos.bad),
        method=found.predictor.label,
        backbone=job.how.backbone.name,
        n_fit=found.n_fit,
        has_candidate=found.has_candidate,
        n_vouch=0 if found.standing is None else len(found.standing.rows),
        max_risk=job.max_risk,
    )
    write_text(root / REPORT, page)


class Told(list[str]):
    """What a run has to tell, line by line."""

    n_asked: int = 0


@checked
@as_usual()
def triage_photos(
    job: Job,
    output: Path,
    labels: Sequence[Path] = (),
    *,
    sort: Literal["link", "move"] | None = None,
    overwrite: bool = False,
) -> Told:
    """Do the whole job, or what of it is new, into a folder; returns what there is to tell.

    Args:
        job: What is asked for.
        output: New, empty, or the folder of an earlier run of the same job.
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
    check_job(job)
    find_template(PAGE)  # what the page needs is missed before anything slow
    read = {file: read_labels(file) for file in labels}
    for file, (found, _) in read.items():
        check_names(found, job.how.names, job.of_no_class, file)
    listing = Workshop(output, job, overwrite=overwrite).listing()
    paths = [portable_name(path) for path, _ in listing.listing]
    answers, streams = dict[str, str](), dict[str, str]()
    for file, (found, said) in read.items():
        place = match_photos(found, paths, job.photos, file)
        answers |= {place[name]: label for name, label in found.items() if name in place}
        streams |= {place[name]: stream for name, stream in said.items() if name in place}
    if (output / NEXT).is_file() and not overwrite:
        _require_answers(
            output, {*answers, *(name for found, _ in read.values() for name in found)}
        )
    with locked(make_folder(output), "sorting into", who="triage"):
        # as the folder is now: another run may have ended since
        result = Workshop(output, job, overwrite=overwrite).run(answers, streams, listing)
        rows = decisions_of(result)
        write_decisions(output, result, rows)
        write_next(output / NEXT, result.asked, rows)
        write_page(output, listing, result, rows, job)
        if sort is not None:
            sort_photos(output, listing, rows, job, sort)
    told = Told(_lines(result, rows, job))
    told.n_asked = len(result.asked)
    return told


def _require_answers(output: Path, given: Collection[str]) -> None:
    """Refuse to ask anew over answers that were filled in where they were asked for, and not given, by these names."""
    known = {one.path for one in LabelBook.load(output / BOOK) if one.label is not None}
    if lost := {*read_labels(output / NEXT)[0]} - {*given} - known:
        raise UsageError(
            f"{output / NEXT} holds {len(lost)} answers that were not given, such as that about {min(lost)!r}, and "
            f"would be lost. Give them: --labels {output / NEXT}."
        )


def check_job(job: Job) -> None:
    """Refuse what cannot be, before anything slow."""
    require_between("max_risk", job.max_risk)
    require_between("confidence", job.confidence)
    names = job.how.names
    if len(set(names)) < 2:
        raise UsageError(
            f"there must be two classes at least to choose from. Got {len(names)}: {', '.join(names)}."
        )
    if both := sorted({*job.of_no_class, SKIPPED} & {*names}):
        raise UsageError(
            f"{both[0]!r} is one of the classes, and as a label says that a photo has none. Rename one."
        )


def _lines(found: Triage, rows: Sequence[Decision], job: Job) -> list[str]:
    n = counts_of(rows)
    parts = [
        f"{n[name]:,} {word}"
        for name, word in COUNTED.items()
        if n[name] or name in {"accepted", "review"}
    ]
    new = f" ({found.n_new:,} of them new)" if found.n_new else ""
    return [
        f"{n['photos']:,} photos{new}: {', '.join(parts)}",
        promise_in_words(found, job.max_risk, job.confidence),
    ]


COUNTED: Final = {
    "accepted": "accepted",
    "review": "to review",
    "labelled": "labelled",
    "unreadable": "unreadable",
}
