"""What has to be known to read a table: rows, seeds, intervals, conventions, refusals, and what is beside what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vilu.benchmark.board import Board, Entrant
from vilu.benchmark.presentation import View
from vilu.benchmark.resampling import RANKED_BY
from vilu.metrics.catalog import METRICS
from vilu.studies.sheet import Shown

REASON_LENGTH = 160


def notes_of(board: Board, view: View, shown: Iterable[Shown], measured: Iterable[Entrant]) -> tuple[str, ...]:
    """Every note of a table, each once."""
    values = list(shown)
    entrants = list({entrant.place: entrant for entrant in measured}.values())
    confidence = f"{100 * board.config.confidence:g} %"
    notes = [
        f"In percent. Brackets: {confidence} bootstrap interval over test rows (stratified by failure) and seeds, "
        f"{board.config.resamples} resamples.",
        _rows_note(board, entrants),
        _seeds_note(entrants),
        "; ".join(f"{METRICS[name].title}: {METRICS[name].convention}" for name in view.metrics) + ".",
    ]
    if any(name not in RANKED_BY for name in view.metrics):
        notes.append(f"Intervals and ≈ only for {' and '.join(METRICS[name].title for name in RANKED_BY)}.")
    return (*filter(None, notes), *_published_notes(board, entrants, values), *_refusals(entrants))


def _rows_note(board: Board, entrants: Iterable[Entrant]) -> str:
    """Rows and accuracy by data set and setting; settings with the same numbers together."""
    told: dict[tuple[str, str], list[str]] = {}
    for entrant in entrants:
        _, data, setting = entrant.place
        if entrant.found:
            fact = f"{_span(entrant.n)} answers, {_span(entrant.n_failures)} wrong"
            settings = told.setdefault((data, fact), [])
            settings += [setting] if setting not in settings else []
    several = {data for data, _ in told if sum(other == data for other, _ in told) > 1}
    parts = []
    for (data, fact), settings in told.items():
        name = board.config.data[data].title or data
        parts.append(f"{name} ({', '.join(settings)}) {fact}" if data in several else f"{name} {fact}")
    return f"Test rows: {'; '.join(parts)}." if parts else ""


def _seeds_note(entrants: Sequence[Entrant]) -> str:
    """How many different results are behind the means."""
    found = [entrant for entrant in entrants if entrant.found]
    if not found:
        return ""
    counts = Counter(entrant.n_runs for entrant in found)
    most = max(counts, key=lambda n: counts[n])
    others = {n: [entrant for entrant in found if entrant.n_runs == n] for n in sorted(counts) if n != most}
    parts = [f"{n} for {_named(some, found)}" for n, some in others.items()]
    rest = f"{most} for {'the others' if parts else 'all'}"
    compared = " Methods are compared on the seeds that both have." if parts else ""
    return f"Seeds (different results behind a mean): {'; '.join([*parts, rest])}.{compared}"


def _named(some: Sequence[Entrant], everywhere: Sequence[Entrant]) -> str:
    """Their methods, with data set and setting where it is not all that a method has."""
    places: dict[str, list[str]] = {}
    for entrant in some:
        places.setdefault(entrant.method, []).append(" ".join(entrant.place[1:]))
    counts = Counter(entrant.method for entrant in everywhere)
    names = (name if len(mine) == counts[name] else f"{name} ({', '.join(mine)})" for name, mine in places.items())
    return ", ".join(names)


def _published_notes(board: Board, entrants: Iterable[Entrant], shown: Iterable[Shown]) -> list[str]:
    """Where published numbers come from, and how far they are comparable."""
    numbers = [one.published for one in shown if one.published is not None]
    if not numbers:
        return []
    notes = [
        "In parentheses: the published number, then ours less it, whose interval is ours shifted by it. Sources: "
        + "; ".join(dict.fromkeys(number.source for number in numbers))
        + "."
    ]
    data = {entrant.place[1]: board.config.data[entrant.place[1]] for entrant in entrants}
    theirs = dict.fromkeys(number.backbone for number in numbers)
    ours = dict.fromkeys(entry.backbone for entry in data.values() if entry.paper_name)
    other_models = [name for name in ours if name not in theirs]
    stand_ins = [
        f"{entry.title or name} for {entry.published}"
        for name, entry in data.items()
        if entry.published and entry.published not in {entry.dataset, name}
    ]
    if other_models or stand_ins:
        what = [f"another model ({', '.join(other_models)} for {', '.join(theirs)})"] if other_models else []
        what += [f"other data ({', '.join(stand_ins)})"] if stand_ins else []
        notes.append(
            f"Ours are of {' and '.join(what)}, so the differences from the published numbers say nothing of either "
            "implementation; compare the order of the methods."
        )
    return notes


def _refusals(entrants: Sequence[Entrant]) -> list[str]:
    """Why methods have no result, methods with the same reason together."""
    reasons: dict[str, list[Entrant]] = {}
    for entrant in entrants:
        if entrant.reason is not None:
            seeds = f" (seed {_span(entrant.refused_seeds)})" if entrant.found else ""
            reasons.setdefault(_short(entrant.reason) + seeds, []).append(entrant)
    return [f"No result of {_named(refused, entrants)}: {reason}" for reason, refused in reasons.items()]


def _span(values: Iterable[object]) -> str:
    return "/".join(map(str, values))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 1] + "…"
