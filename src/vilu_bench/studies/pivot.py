"""Results of cells as rows and columns of a table, with their notes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vilu.metrics.catalog import METRICS, but_for
from vilu.text import short, span
from vilu_bench.studies.board import Board, Entrant, Mean, counted_rows, occurring
from vilu_bench.studies.config import Config
from vilu_bench.studies.parts import RANKED_BY
from vilu_bench.studies.sheet import Sheet, Shown
from vilu_bench.studies.views import FIELDS, Published, TableView, View, find_published

REASON_LENGTH = 160


def notes_of(
    board: Board, view: View, shown: Iterable[Shown], measured: Iterable[Entrant]
) -> tuple[str, ...]:
    """Every note of a table, each once."""
    values = list(shown)
    entrants = list({entrant.place: entrant for entrant in measured}.values())
    confidence = f"{100 * board.config.confidence:g} %"
    notes = [
        f"In percent{but_for(METRICS[name] for name in view.metrics)}. Brackets: {confidence} bootstrap interval over "
        f"test rows (stratified by failure) and seeds, {board.config.resamples} resamples.",
        _rows_note(board, entrants),
        _seeds_note(entrants),
        "; ".join(f"{METRICS[name].title}: {METRICS[name].convention}" for name in view.metrics)
        + ".",
    ]
    if any(name not in RANKED_BY for name in view.metrics):
        notes.append(
            f"Intervals and ≈ only for {' and '.join(METRICS[name].title for name in RANKED_BY)}."
        )
    return (*filter(None, notes), *_published_notes(board, entrants, values), *_refusals(entrants))


def _rows_note(board: Board, entrants: Iterable[Entrant]) -> str:
    """Rows and accuracy by data set and setting; settings with the same numbers together."""
    told: dict[tuple[str, str], dict[str, None]] = {}
    for entrant in entrants:
        _, data, setting = entrant.place
        if entrant.found:
            fact = counted_rows(
                *(occurring(field, [entrant]) for field in ("n", "n_failures", "n_outside"))
            )
            told.setdefault((data, fact), {})[setting] = None
    counts = Counter(data for data, _ in told)
    parts = []
    for (data, fact), settings in told.items():
        name = board.config.data[data].title or data
        parts.append(
            f"{name} ({', '.join(settings)}) {fact}" if counts[data] > 1 else f"{name} {fact}"
        )
    return f"Test rows: {'; '.join(parts)}." if parts else ""


def _seeds_note(entrants: Sequence[Entrant]) -> str:
    """How many different results are behind the means."""
    found = [entrant for entrant in entrants if entrant.found]
    if not found:
        return ""
    counts = Counter(entrant.n_runs for entrant in found)
    most = max(counts, key=lambda n: counts[n])
    others = {
        n: [entrant for entrant in found if entrant.n_runs == n]
        for n in sorted(counts)
        if n != most
    }
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
    names = (
        name if len(mine) == counts[name] else f"{name} ({', '.join(mine)})"
        for name, mine in places.items()
    )
    return ", ".join(names)


def _published_notes(
    board: Board, entrants: Iterable[Entrant], shown: Iterable[Shown]
) -> list[str]:
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
        what = (
            [f"another model ({', '.join(other_models)} for {', '.join(theirs)})"]
            if other_models
            else []
        )
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
            seeds = f" (seed {span(entrant.refused_seeds)})" if entrant.found else ""
            reasons.setdefault(short(entrant.reason, REASON_LENGTH) + seeds, []).append(entrant)
    return [
        f"No result of {_named(refused, entrants)}: {reason}" for reason, refused in reasons.items()
    ]


MEAN = "mean"  # what stands for the data set where there is a mean over several
ALPHA = 0.05  # from this p-value on two methods are not told apart


@dataclass(frozen=True)
class Key:
    """Where a number belongs."""

    method: str
    data: str
    setting: str
    metric: str

    def of(self, fields: Iterable[str]) -> tuple[str, ...]:
        """Some of its parts."""
        return tuple(getattr(self, field) for field in fields)


def table_sheet(board: Board, view: TableView) -> Sheet:
    """The sheet of a table."""
    entrants, measured = chosen(board, view), measured_of(board, view)
    shown = _ranked(
        {key: show(board.config, key, found) for key, found in measured.items()},
        measured,
        view.compete,
    )
    rows, columns = (
        [*dict.fromkeys(key.of(fields) for key in shown)] for fields in (view.rows, view.columns)
    )
    config = board.config
    return Sheet(
        name=view.name,
        title=view.title,
        row_fields=view.rows,
        column_fields=view.columns,
        rows=tuple(_titles(config, view.rows, labels) for labels in rows),
        columns=tuple(_titles(config, view.columns, labels) for labels in columns),
        cells={
            (rows.index(key.of(view.rows)), columns.index(key.of(view.columns))): one
            for key, one in shown.items()
        },
        notes=notes_of(board, view, shown.values(), entrants.values()),
    )


def measured_of(board: Board, view: View) -> dict[Key, Mean]:
    """What a view shows by its key: every entrant, then the means that it asks for."""
    entrants = chosen(board, view)
    found = {} if view.means_only else {key: Mean((entrant,)) for key, entrant in entrants.items()}
    for key in dict.fromkeys(replace(key, data=MEAN) for key in entrants) if view.mean else ():
        places = [(key.method, data, key.setting) for data in view.mean]
        parts = [board.entrants[place] for place in places if place in board.entrants]
        if len(parts) == len(places):
            found[key] = Mean(tuple(parts))
    return found


def chosen(board: Board, view: View) -> dict[Key, Entrant]:
    """Every entrant of a view by its key, in the order of the view; also those without result."""
    axes, found = (view.places(board.config, axis) for axis in ("data", "setting", "method")), {}
    for name, setting, method, metric in itertools.product(*axes, view.metrics):
        entrant = board.entrants.get((method, name, setting))
        if entrant is not None:
            found[Key(method, name, setting, metric)] = entrant
    return found


def show(config: Config, key: Key, found: Mean) -> Shown:
    """A number with its interval and the published one."""
    parts = found.parts
    published = published_of(config, key, parts)
    if not all(part.found for part in parts):
        reason = next(part.reason for part in parts if not part.found)
        return Shown(key.metric, None, published=published, why=reason)
    value = found.mean(key.metric)
    has_interval = value is not None and key.metric in RANKED_BY
    return Shown(
        metric=key.metric,
        value=value,
        interval=found.quantity(key.metric).interval(config.confidence) if has_interval else None,
        n=occurring("n", parts),
        n_failures=occurring("n_failures", parts),
        n_runs=max(part.n_runs for part in parts),
        published=published,
        why=None if value is not None else "undefined",
    )


def published_of(config: Config, key: Key, parts: Sequence[Entrant] = ()) -> Published | None:
    """The published number that belongs beside ours; beside a mean, that over as many data sets of the publication."""
    if config.study is None or not config.study.published:
        return None
    if key.data == MEAN:
        theirs = {config.data[part.place[1]].paper_name for part in parts}
        name = f"mean of {len(parts)}" if None not in theirs and len(theirs) == len(parts) else None
    else:
        name = config.data[key.data].paper_name
    if name is None:
        return None
    entry = config.data[key.data if key.data != MEAN else parts[0].place[1]]
    setting = config.settings[key.setting].published or ""
    method = config.along("method")[key.method].published or key.method
    return find_published(
        config.study.published, (name, setting, method, key.metric), entry.backbone
    )


def _ranked(
    shown: Mapping[Key, Shown], measured: Mapping[Key, Mean], compete: Sequence[str]
) -> dict[Key, Shown]:
    """With the best and the second best of those that differ in ``compete`` alone, and who is as good as the best."""
    fixed = [field for field in FIELDS if field not in compete]
    groups: dict[tuple[str, ...], list[Key]] = {}
    for key, one in shown.items():
        if one.value is not None:
            groups.setdefault(key.of(fixed), []).append(key)
    ranked = dict(shown)
    for keys in groups.values():
        if len(keys) < 2:
            continue
        sign = -1 if METRICS[keys[0].metric].higher_is_better else 1
        values = {key: sign * (shown[key].value or 0.0) for key in keys}
        order, best = sorted(set(values.values())), min(keys, key=values.__getitem__)
        for key in keys:
            place = order.index(values[key])
            gap = (
                measured[key].less(measured[best], key.metric)
                if place and key.metric in RANKED_BY
                else None
            )
            tied = (
                gap is not None and gap.p_value() >= ALPHA
            )  # the paired bootstrap cannot tell the two apart
            ranked[key] = replace(
                shown[key], rank=("best", "second", None)[min(place, 2)], tied=tied
            )
    return ranked


def _titles(config: Config, fields: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        title_of(config, field, label) for field, label in zip(fields, labels, strict=True)
    )


def title_of(config: Config, field: str, label: str) -> str:
    """What a method, a data set, a setting or a metric is called in a table."""
    if field == "metric":
        return METRICS[label].title
    if field == "data" and label == MEAN:
        return MEAN
    return config.along(field)[label].title or label
