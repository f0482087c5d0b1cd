"""Arranges results in a table's rows and columns, and writes the table's notes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vilu.metrics.catalog import METRICS, not_in_percent
from vilu.text import join_distinct, shorten_line
from vilu_bench.studies.board import (
    Board,
    Entrant,
    MethodMean,
    distinct_row_counts,
    row_counts_in_words,
)
from vilu_bench.studies.config import Config
from vilu_bench.studies.sheet import Sheet, TableNumber
from vilu_bench.studies.views import KEY_FIELDS, PublishedNumber, TableView, View, find_published

REASON_LENGTH = 160  # maximum number of characters for a reason in a note


def notes_of(
    board: Board, view: View, numbers: Iterable[TableNumber], all_entrants: Iterable[Entrant]
) -> tuple[str, ...]:
    """Write all notes for a table.

    ``all_entrants`` may have an entrant several times, once for every metric.
    """
    entrant_of_case = {entrant.method_case: entrant for entrant in all_entrants}
    entrants = list(entrant_of_case.values())
    notes = [_interval_note(board.config, view)]
    if any(entrant.results for entrant in entrants):
        notes += [_rows_note(board, entrants), _seeds_note(entrants)]
    notes.append(_conventions_note(view))
    if not set(view.metrics) <= set(board.config.ranking_metrics):
        titles = [METRICS[name].title for name in board.config.ranking_metrics]
        ranking_titles = " and ".join(titles)
        notes.append(f"Intervals and ≈ only for {ranking_titles}.")
    notes += _published_notes(board, entrants, numbers)
    notes += _refusal_notes(entrants)
    return tuple(notes)


def _interval_note(config: Config, view: View) -> str:
    """Write a note on the unit of the numbers and on the intervals."""
    exceptions = not_in_percent(METRICS[name] for name in view.metrics)
    return (
        f"In percent{exceptions}. Brackets: {100 * config.confidence:g} % bootstrap interval "
        f"over test rows ({config.strata}) and seeds, "
        f"{config.resamples} resamples."
    )


def _conventions_note(view: View) -> str:
    """Write a note on the convention for every metric in the view."""
    conventions = []
    for name in view.metrics:
        metric = METRICS[name]
        conventions.append(f"{metric.title}: {metric.convention}")
    return "; ".join(conventions) + "."


def _rows_note(board: Board, entrants: Iterable[Entrant]) -> str:
    """Write a note on the test row counts by data set. Settings with equal counts share a text."""
    # Maps a data set and the text with the numbers to the settings with these numbers. The settings
    # are dict keys, so each setting is listed once.
    settings_by_numbers: dict[tuple[str, str], dict[str, None]] = {}
    for entrant in entrants:
        if entrant.results:
            _, data, setting = entrant.method_case
            numbers = _row_numbers_in_words(entrant)
            settings = settings_by_numbers.setdefault((data, numbers), {})
            settings[setting] = None
    text_counts = Counter(data for data, _ in settings_by_numbers)
    parts = []
    for (data, numbers), settings in settings_by_numbers.items():
        title = board.config.data[data].title or data
        if text_counts[data] > 1:
            title += f" ({', '.join(settings)})"
        parts.append(f"{title} {numbers}")
    return f"Test rows: {'; '.join(parts)}."


def _row_numbers_in_words(entrant: Entrant) -> str:
    """Write an entrant's numbers of test rows and wrong answers as text."""
    n_rows = distinct_row_counts("n", [entrant])
    n_failures = distinct_row_counts("n_failures", [entrant])
    n_outside = distinct_row_counts("n_outside", [entrant])
    return row_counts_in_words(n_rows, n_failures, n_outside)


def _seeds_note(entrants: Sequence[Entrant]) -> str:
    """Write a note on how many different results a mean averages.

    At least one entrant must have a result.
    """
    entrants_of_count: dict[int, list[Entrant]] = {}
    entrants_with_result = [entrant for entrant in entrants if entrant.results]
    for entrant in entrants_with_result:
        entrants_of_count.setdefault(entrant.n_runs, []).append(entrant)
    # the most frequent count, or the first if several counts are equally frequent
    usual_n_runs = max(entrants_of_count, key=lambda n_runs: len(entrants_of_count[n_runs]))
    intro = "Seeds (different results behind a mean):"
    if len(entrants_of_count) == 1:
        return f"{intro} {usual_n_runs} for all."
    exceptions = []
    for n_runs in sorted(entrants_of_count):
        if n_runs != usual_n_runs:
            methods = _methods_in_words(entrants_of_count[n_runs], entrants_with_result)
            exceptions.append(f"{n_runs} for {methods}")
    parts = "; ".join([*exceptions, f"{usual_n_runs} for the others"])
    return f"{intro} {parts}. Methods are compared on the seeds that both have."


def _methods_in_words(entrants: Sequence[Entrant], all_entrants: Sequence[Entrant]) -> str:
    """Name the methods in ``entrants``, as text.

    If a method has further entrants in ``all_entrants``, the data sets and settings of its
    ``entrants`` follow the name in parentheses.
    """
    cases_of_method: dict[str, list[str]] = {}
    for entrant in entrants:
        _, data, setting = entrant.method_case
        cases_of_method.setdefault(entrant.method, []).append(f"{data} {setting}")
    n_entrants = Counter(entrant.method for entrant in all_entrants)
    names = []
    for method, cases in cases_of_method.items():
        if len(cases) == n_entrants[method]:
            names.append(method)
        else:
            names.append(f"{method} ({', '.join(cases)})")
    return ", ".join(names)


def _published_notes(
    board: Board, entrants: Iterable[Entrant], numbers: Iterable[TableNumber]
) -> list[str]:
    """Write notes on published numbers: sources, and why our numbers may differ."""
    all_published = [number.published for number in numbers if number.published is not None]
    if not all_published:
        return []
    sources = dict.fromkeys(published.source for published in all_published)
    notes = [
        "In parentheses: the published number, then ours less it, whose interval is ours shifted "
        f"by it. Sources: {'; '.join(sources)}."
    ]
    differences = _differences_in_words(board.config, entrants, all_published)
    if differences:
        all_differences = " and ".join(differences)
        notes.append(
            f"Ours are of {all_differences}, so the differences from the published "
            "numbers say nothing of either implementation; compare the order of the methods."
        )
    return notes


def _differences_in_words(
    config: Config, entrants: Iterable[Entrant], all_published: Iterable[PublishedNumber]
) -> list[str]:
    """Describe how our numbers and the published numbers differ in model and data."""
    entries = {entrant.data: config.data[entrant.data] for entrant in entrants}
    published_models = dict.fromkeys(published.backbone for published in all_published)
    our_models: dict[str, None] = {}
    other_data = []
    for name, entry in entries.items():
        if entry.paper_name and entry.backbone not in published_models:
            our_models[entry.backbone] = None
        # our data are used in place of the data in the publication
        if entry.published and entry.published not in {entry.dataset, name}:
            other_data.append(f"{entry.title or name} for {entry.published}")
    differences = []
    if our_models:
        used_names = ", ".join(our_models)
        published_names = ", ".join(published_models)
        differences.append(f"another model ({used_names} for {published_names})")
    if other_data:
        differences.append(f"other data ({', '.join(other_data)})")
    return differences


def _refusal_notes(entrants: Sequence[Entrant]) -> list[str]:
    """Make a note for each reason why methods have no result."""
    entrants_by_reason: dict[str, list[Entrant]] = {}
    for entrant in entrants:
        if entrant.reason is None:
            continue
        reason = shorten_line(entrant.reason, REASON_LENGTH)
        if entrant.results:
            reason += f" (seed {join_distinct(entrant.refused_seeds)})"
        entrants_by_reason.setdefault(reason, []).append(entrant)
    notes = []
    for reason, refused_entrants in entrants_by_reason.items():
        methods = _methods_in_words(refused_entrants, entrants)
        notes.append(f"No result of {methods}: {reason}")
    return notes


DATA_OF_MEAN = "mean"  # data set in the key for a mean over several data sets
SIGNIFICANCE_LEVEL = 0.05  # two methods are tied if their difference has at least this p-value


@dataclass(frozen=True)
class NumberKey:
    """Identity of a number: the method, data set, setting and metric."""

    method: str
    data: str
    setting: str
    metric: str

    def values_of(self, fields: Iterable[str]) -> tuple[str, ...]:
        """Return the key's values for ``fields``, for example for ("data", "metric")."""
        return tuple(getattr(self, field) for field in fields)


def table_sheet(board: Board, view: TableView) -> Sheet:
    """Make the sheet for a table view."""
    config = board.config
    entrants = entrants_by_key(board, view)
    means = means_by_key(board, view)
    numbers = {key: make_table_number(config, key, mean) for key, mean in means.items()}
    ranked_numbers = _with_ranks(numbers, means, view.compete)
    rows: dict[tuple[str, ...], int] = {}  # maps a row's labels to the row index
    columns: dict[tuple[str, ...], int] = {}  # maps a column's labels to the column index
    cells = {}
    for key, number in ranked_numbers.items():
        row_labels = key.values_of(view.rows)
        column_labels = key.values_of(view.columns)
        # new labels get the next index, and known labels keep the index
        row = rows.setdefault(row_labels, len(rows))
        column = columns.setdefault(column_labels, len(columns))
        cells[row, column] = number
    notes = notes_of(board, view, ranked_numbers.values(), entrants.values())
    return Sheet(
        name=view.name,
        title=view.title,
        row_fields=view.rows,
        column_fields=view.columns,
        rows=tuple(_titles_of_labels(config, view.rows, labels) for labels in rows),
        columns=tuple(_titles_of_labels(config, view.columns, labels) for labels in columns),
        cells=cells,
        notes=notes,
    )


def means_by_key(board: Board, view: View) -> dict[NumberKey, MethodMean]:
    """Collect the results for a view, by key: single data sets, then means over data sets."""
    entrants = entrants_by_key(board, view)
    means = {}
    if not view.means_only:
        for key, entrant in entrants.items():
            means[key] = MethodMean((entrant,))
    if not view.mean:
        return means
    # dict keys, because several data sets give the same key
    mean_keys = dict.fromkeys(replace(key, data=DATA_OF_MEAN) for key in entrants)
    for key in mean_keys:
        method_cases = [(key.method, data, key.setting) for data in view.mean]
        has_all_parts = board.entrants.keys() >= set(method_cases)
        if has_all_parts:
            means[key] = MethodMean(
                tuple(board.entrants[method_case] for method_case in method_cases)
            )
    return means


def entrants_by_key(board: Board, view: View) -> dict[NumberKey, Entrant]:
    """Collect a view's entrants by key, in the view's order, also entrants without a result."""
    config = board.config
    entrants = {}
    data_entries = view.entries_of(config, "data")
    setting_entries = view.entries_of(config, "setting")
    method_entries = view.entries_of(config, "method")
    for data, setting, method, metric in itertools.product(
        data_entries, setting_entries, method_entries, view.metrics
    ):
        entrant = board.entrants.get((method, data, setting))
        if entrant is not None:
            entrants[NumberKey(method, data, setting, metric)] = entrant
    return entrants


def make_table_number(config: Config, key: NumberKey, mean: MethodMean) -> TableNumber:
    """Make the number for a key, with the interval and the published number."""
    parts = mean.parts
    published = published_number(config, key, parts)
    for part in parts:
        if not part.results:
            return TableNumber(key.metric, value=None, published=published, why=part.reason)
    value = mean.mean(key.metric)
    interval = None
    if value is not None and key.metric in config.ranking_metrics:
        quantity = mean.quantity(key.metric)
        interval = quantity.interval(config.confidence)
    n_rows = distinct_row_counts("n", parts)
    n_failures = distinct_row_counts("n_failures", parts)
    return TableNumber(
        metric=key.metric,
        value=value,
        interval=interval,
        n=n_rows,
        n_failures=n_failures,
        n_runs=max(part.n_runs for part in parts),
        published=published,
        why="undefined" if value is None else None,
    )


def published_number(
    config: Config, key: NumberKey, parts: Sequence[Entrant] = ()
) -> PublishedNumber | None:
    """Look up the published number for a key, or return None if there is no such number.

    A mean over data sets is compared with the published mean over the same number of data sets.
    """
    if config.study is None:
        return None
    if not config.study.published:
        return None
    if key.data == DATA_OF_MEAN:
        # the published mean is looked up for the model of the first data set
        entry = config.data[parts[0].data]
        name = _name_of_mean(config, parts)
    else:
        entry = config.data[key.data]
        name = entry.paper_name
    if name is None:
        return None
    setting = config.settings[key.setting].published or ""
    method = config.entries_of("method")[key.method].published or key.method
    published_key = (name, setting, method, key.metric)
    return find_published(config.study.published, published_key, entry.backbone)


def _name_of_mean(config: Config, parts: Sequence[Entrant]) -> str | None:
    """Return the published name for a mean over the data sets in ``parts``.

    Return None if a data set has no published name, or if two data sets share a published name.
    """
    names = {config.data[part.data].paper_name for part in parts}
    if None in names:
        return None
    if len(names) < len(parts):
        return None
    return f"mean of {len(parts)}"


def _with_ranks(
    numbers: Mapping[NumberKey, TableNumber],
    means: Mapping[NumberKey, MethodMean],
    competing_fields: Sequence[str],
) -> dict[NumberKey, TableNumber]:
    """Add ranks to the numbers.

    Numbers compete if the keys differ only in ``competing_fields``.
    """
    ranked_numbers = dict(numbers)
    for keys in _competing_keys(numbers, competing_fields):
        metric = keys[0].metric  # the same for all keys
        sign = -1 if METRICS[metric].higher_is_better else 1
        # The smallest loss is best. Competing numbers have values, never None.
        losses = {key: sign * (numbers[key].value or 0.0) for key in keys}
        distinct_losses = sorted(set(losses.values()))
        best_means = [means[key] for key in keys if losses[key] == distinct_losses[0]]
        for key in keys:
            n_better = distinct_losses.index(losses[key])  # number of different smaller losses
            is_tied = n_better > 0 and any(
                _is_tied(means[key], best, metric) for best in best_means
            )
            rank = _rank(n_better)
            ranked_numbers[key] = replace(numbers[key], rank=rank, is_tied=is_tied)
    return ranked_numbers


def _competing_keys(
    numbers: Mapping[NumberKey, TableNumber], competing_fields: Sequence[str]
) -> Iterator[list[NumberKey]]:
    """Yield groups of at least two keys that differ only in ``competing_fields``."""
    fixed_fields = [field for field in KEY_FIELDS if field not in competing_fields]
    groups: dict[tuple[str, ...], list[NumberKey]] = {}
    for key, number in numbers.items():
        if number.value is not None:
            fixed_values = key.values_of(fixed_fields)
            groups.setdefault(fixed_values, []).append(key)
    for keys in groups.values():
        if len(keys) > 1:
            yield keys


def _rank(n_better: int) -> Literal["best", "second"] | None:
    """Return a number's rank if ``n_better`` different numbers are better."""
    if n_better == 0:
        return "best"
    if n_better == 1:
        return "second"
    return None


def _is_tied(mean: MethodMean, best_mean: MethodMean, metric: str) -> bool:
    """Return whether the paired bootstrap finds no significant difference between two results."""
    if any(metric not in part.ranking_metrics for part in mean.parts):  # no bootstrap values
        return False
    gap = mean.difference_from(best_mean, metric)
    if gap is None:
        return False
    return gap.p_value() >= SIGNIFICANCE_LEVEL


def _titles_of_labels(
    config: Config, fields: Sequence[str], labels: Sequence[str]
) -> tuple[str, ...]:
    """Return the titles for labels. Each label is a value of the field at the same position."""
    titles = []
    for field, label in zip(fields, labels, strict=True):
        titles.append(title_of(config, field, label))
    return tuple(titles)


def title_of(config: Config, field: str, label: str) -> str:
    """Return the title that a table shows for a method, a data set, a setting or a metric."""
    if field == "metric":
        return METRICS[label].title
    if field == "data" and label == DATA_OF_MEAN:
        return DATA_OF_MEAN
    return config.entries_of(field)[label].title or label
