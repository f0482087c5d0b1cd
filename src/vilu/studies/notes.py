"""What has to be known to read a table: rows, seeds, intervals, conventions, refusals, and what is beside what."""

from __future__ import annotations

from collections.abc import Iterable

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


def _seeds_note(entrants: Iterable[Entrant]) -> str:
    """How many different results are behind the means."""
    methods: dict[int, dict[str, None]] = {}
    for entrant in entrants:
        if entrant.found:
            methods.setdefault(entrant.n_runs, {})[entrant.method] = None
    if not methods:
        return ""
    most = max(methods, key=lambda n: len(methods[n]))
    parts = [f"{n} for {', '.join(names)}" for n, names in sorted(methods.items()) if n != most]
    rest = f"{most} for {'the others' if parts else 'all'}"
    return f"Seeds (different results behind a mean): {'; '.join([*parts, rest])}."


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


def _refusals(entrants: Iterable[Entrant]) -> list[str]:
    """Why methods have no result, methods with the same reason together."""
    reasons: dict[str, dict[str, None]] = {}
    for entrant in entrants:
        if entrant.reason is not None:
            where = "" if not entrant.found else f" (seed {_span(entrant.refused_seeds)})"
            reasons.setdefault(_short(entrant.reason), {})[entrant.method + where] = None
    return [f"No result of {', '.join(methods)}: {reason}" for reason, methods in reasons.items()]


def _span(values: Iterable[object]) -> str:
    return "/".join(map(str, values))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_LENGTH else line[: REASON_LENGTH - 1] + "…"
