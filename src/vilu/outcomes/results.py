"""Results from evaluations: one row per metric, and tables of methods by metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Self

from vilu.artifacts.documents import read_json, write_json
from vilu.artifacts.paths import claim_file, inputs_entry
from vilu.artifacts.tables import read_column, read_table, write_table
from vilu.errors import DataError, StorageError, UsageError
from vilu.metrics.bootstrap import OwnInterval
from vilu.metrics.catalog import (
    DEFAULT_METRICS,
    METRICS,
    Metric,
    evaluated_metrics,
    get_metric,
    not_in_percent,
)
from vilu.outcomes.row_sample import RowSample, are_disjoint
from vilu.text import (
    align_columns,
    escape_markdown,
    escape_unprintable,
    join_distinct,
    markdown_rows,
)
from vilu.validation import checked, describe_value

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ResultRow:
    """The value that one metric has for one method on one data set.

    Raises:
        DataError: If a number is NaN or infinite (undefined numbers must be None), or if a count
            has more than 64 bits.
    """

    method: str | None  # predictor name
    dataset: str | None  # data set name
    split: str | None  # split name
    seed: int | None  # predictor seed
    metric: str  # metric name, as in ``vilu.metrics.METRICS``
    value: float | None  # the metric's value, None if undefined
    ci_low: float | None  # lower end of the value's interval, None without an interval
    ci_high: float | None  # upper end of the interval, None without an interval
    n: int  # number of rows with an uncertainty and a known failure
    n_failures: int  # number of wrong answers in these rows
    accuracy: float  # share of right answers in these rows
    n_unlabelled: int  # rows left out because of an unknown failure
    n_unusable: int  # rows left out because of a missing uncertainty
    convention: str  # convention of the metric, where the literature has several
    interval: str | None = None  # how the interval was made, None without an interval
    why: str | None = None  # why ``value`` is None
    n_outside: int = 0  # number of wrong answers for pictures outside all classes
    # number of pictures, or of clusters if these are known; None if none has two rows
    n_pictures: int | None = None
    answer: str = "zero_shot"  # kind of the judged answers, as in ``Outcomes``
    # sample from the evaluated rows (``sample_of_rows``); None if unknown, as in results from a
    # file
    sample: RowSample | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("value", "ci_low", "ci_high", "accuracy"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise DataError(
                    f"{name} of {self.metric} must be finite, or None where it is undefined. "
                    f"Got {number}."
                )
        for name in (*COUNT_COLUMNS, "n_pictures", "seed"):
            count = getattr(self, name)
            if count is not None and not -(2**63) <= count < 2**63:
                raise DataError(f"{name} of {self.metric} must be a 64-bit integer. Got {count}.")


ARROW_TYPE = {"str": "string", "int": "int64", "float": "float64"}
"""Maps a field's Python type to the column's Arrow type."""


def _column_types() -> dict[str, str]:
    """Return each file column's Arrow type, by name. All fields but ``sample`` are columns."""
    types = {}
    for column in fields(ResultRow):
        if column.name != "sample":
            # ``column.type`` is a text such as "int | None"
            python_type = str(column.type).removesuffix(" | None")
            types[column.name] = ARROW_TYPE[python_type]
    return types


COLUMN_TYPES = _column_types()
"""Maps every file column to the column's Arrow type."""

COLUMNS = tuple(COLUMN_TYPES)
"""All file columns, named like the fields of ``ResultRow``."""

REQUIRED_COUNTS = ("n", "n_failures", "n_unlabelled", "n_unusable")
"""Columns with counts, required in every row of a file."""

COUNT_COLUMNS = (*REQUIRED_COUNTS, "n_outside")
"""Columns with counts that have a value in every ``ResultRow``."""

RARE_COLUMNS = ("n_outside", "n_pictures")
"""Columns that are left out of a file if every value is 0 or None."""

REQUIRED_COLUMNS = ("metric", *REQUIRED_COUNTS, "accuracy", "convention")
"""Columns required in every row of a file."""


@dataclass(frozen=True)
class ResultTable:
    """Result rows. ``print`` shows a table of methods by metrics, and ``+`` joins two tables.

    Examples:
        >>> import vilu
        >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20
        >>> perfect = vilu.Outcomes(uncertainty, failure, method="mine")
        >>> table = vilu.evaluate(perfect, metrics=["auroc", "augrc"])
        >>> table.value("auroc", method="mine")
        1.0
        >>> len(table), len(table + table)
        (2, 4)
    """

    rows: tuple[ResultRow, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ResultRow]:
        return iter(self.rows)

    def __add__(self, other: ResultTable) -> ResultTable:
        return ResultTable(self.rows + other.rows)

    def __str__(self) -> str:
        return self.table()

    def filter(self, **fields: object) -> ResultTable:
        """Return the rows with the given field values, such as ``method="mcm", seed=0``.

        Raises:
            UsageError: If there is no such field.

        Examples:
            >>> import vilu
            >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20
            >>> a = vilu.Outcomes(uncertainty, failure, method="a")
            >>> b = vilu.Outcomes(uncertainty, failure, method="b")
            >>> table = vilu.evaluate([a, b], metrics=["auroc", "augrc"], n_resamples=0)
            >>> len(table)  # 2 methods and 2 metrics
            4
            >>> len(table.filter(method="a"))
            2
        """
        for name in fields:
            if name not in COLUMNS:
                raise UsageError(
                    f"a result has no field {name!r}. There are: {', '.join(COLUMNS)}."
                )
        for name, wanted_value in fields.items():
            if not isinstance(wanted_value, str | Real | None):  # NumPy numbers are ``Real``, too
                raise UsageError(
                    f"{name} must be a text, a number or None. "
                    f"Got {describe_value(wanted_value)} instead."
                )
        rows = self.rows
        for name, wanted_value in fields.items():
            rows = tuple(row for row in rows if getattr(row, name) == wanted_value)
        return ResultTable(rows)

    @checked
    def value(self, metric: str, **fields: object) -> float | None:
        """Return a metric's value in the only row with these fields, or None if undefined.

        Raises:
            UsageError: If no row or more than one row has these fields.

        Examples:
            >>> import vilu
            >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 1, 0, 1] * 20
            >>> outcomes = vilu.Outcomes(uncertainty, failure, method="mine")
            >>> vilu.evaluate(outcomes, metrics=["auroc", "augrc"], n_resamples=0).value("auroc")
            0.75
        """
        matching_rows = self.filter(metric=metric, **fields)
        if len(matching_rows) != 1:
            raise UsageError(
                f"one row must fit metric={metric!r} and {fields}. "
                f"{len(matching_rows)} of {len(self)} do; narrow by method, dataset, split or seed."
            )
        return matching_rows.rows[0].value

    def mean_over_seeds(self) -> ResultTable:
        """Average over seeds: one row per method, answer kind, data set, split and metric.

        The interval is the mean plus or minus the standard deviation over seeds. The field
        ``interval`` says how many seeds there are. If the value is None for any seed, the mean is
        None. A row with a single seed is unchanged. Several rows count as one row if only the
        intervals differ.

        Raises:
            UsageError: If no evaluated row is common to two of the seeds. Such results are
                cross-validation folds, and the spread over folds is not the spread over seeds.
                Results from a file or from a ``ScoreFolder`` are not checked.

        Examples:
            >>> import vilu
            >>> orders = [1, 2, 3, 4], [1, 3, 2, 4]  # an AUROC of 1 and of 3/4
            >>> scores = [
            ...     vilu.Outcomes(u * 20, [0, 0, 1, 1] * 20, method="mine", seed=seed)
            ...     for seed, u in enumerate(orders)
            ... ]
            >>> (row,) = vilu.evaluate(scores, metrics=["auroc"], n_resamples=0).mean_over_seeds()
            >>> row.value, round(row.ci_low, 3), round(row.ci_high, 3), row.interval
            (0.875, 0.698, 1.052, 'mean of 2 seeds, one standard deviation')
        """
        # A group holds the rows to average, which share the fields in ``key``. A group's keys are
        # the rows without the intervals. So if rows differ only in the interval, only the first row
        # is in the group.
        groups: dict[tuple[object, ...], dict[ResultRow, ResultRow]] = {}
        for row in self.rows:
            key = (row.method, row.answer, row.dataset, row.split, row.metric, row.convention)
            without_interval = replace(row, ci_low=None, ci_high=None, interval=None)
            group = groups.setdefault(key, {})
            group.setdefault(without_interval, row)
        means = []
        for different_rows in groups.values():
            rows = list(different_rows.values())
            _refuse_folds(rows)
            means.append(_mean_row(rows))
        return ResultTable(tuple(means))

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries.

        ``n_outside`` is left out if every value is 0. ``n_pictures`` is left out if every value is
        None.

        Examples:
            >>> import vilu
            >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20
            >>> perfect = vilu.Outcomes(uncertainty, failure, method="mine", dataset="pets")
            >>> (row,) = vilu.evaluate(perfect, metrics=["auroc"], n_resamples=0).to_dicts()
            >>> row["method"], row["dataset"], row["metric"], row["value"], row["n"]
            ('mine', 'pets', 'auroc', 1.0, 80)
        """
        columns = self._columns
        dicts = []
        for row in self.rows:
            dicts.append({name: getattr(row, name) for name in columns})
        return dicts

    @property
    def _columns(self) -> tuple[str, ...]:
        """Columns to write. A column in ``RARE_COLUMNS`` with only 0 or None is left out."""
        columns = list(COLUMNS)
        for name in RARE_COLUMNS:
            if not any(getattr(row, name) for row in self.rows):
                columns.remove(name)
        return tuple(columns)

    @checked
    def table(self, metrics: Sequence[str] | None = None) -> str:
        """Return the results as aligned text, with methods as rows and metrics as columns.

        By default the main metrics are shown. If ``evaluate`` was called with ``metrics``, all of
        these metrics are shown.

        Examples:
            >>> import vilu
            >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20
            >>> perfect = vilu.Outcomes(uncertainty, failure, method="mine", dataset="pets")
            >>> print(vilu.evaluate(perfect, n_resamples=0).table(["auroc", "augrc"]))
            pets: 80 answers, 40 wrong, accuracy 50.0 %
            method  AUROC  AUGRC
            mine    100.0  12.5
            <BLANKLINE>
            in percent
            AUROC: ties count half
            AUGRC: trapezoids over distinct scores
        """
        shown_metrics = _shown_metrics(self.rows, metrics)
        blocks = []
        for title, lines in _tables_by_data_set(self.rows, shown_metrics):
            aligned_lines = align_columns(lines)
            block = "\n".join([title, *aligned_lines])
            blocks.append(block)
        notes = _notes(self.rows, shown_metrics)
        blocks.append("\n".join(notes))
        return "\n\n".join(blocks)

    @checked
    def to_markdown(self, metrics: Sequence[str] | None = None) -> str:
        """Return the text that ``table`` returns, but in Markdown.

        Examples:
            >>> import vilu
            >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20
            >>> perfect = vilu.Outcomes(uncertainty, failure, method="mine", dataset="pets")
            >>> print(vilu.evaluate(perfect, metrics=["auroc"], n_resamples=0).to_markdown())
            **pets: 80 answers, 40 wrong, accuracy 50.0 %**
            <BLANKLINE>
            | method | AUROC |
            |---|---|
            | mine | 100.0 |
            <BLANKLINE>
            - in percent
            - AUROC: ties count half
        """
        shown_metrics = _shown_metrics(self.rows, metrics)
        blocks = []
        for title, lines in _tables_by_data_set(self.rows, shown_metrics):
            heading, *body = [list(map(escape_markdown, line)) for line in lines]
            rows = markdown_rows(heading, body)
            escaped_title = escape_markdown(title)
            block = "\n".join([f"**{escaped_title}**", "", *rows])
            blocks.append(block)
        notes = [f"- {escape_markdown(note)}" for note in _notes(self.rows, shown_metrics)]
        blocks.append("\n".join(notes))
        return "\n\n".join(blocks)

    @checked
    def save(self, path: str | Path, *, inputs: str | None = None) -> None:
        """Write ``.json``, ``.parquet`` or ``.csv`` atomically. Undefined values are null.

        An existing file is replaced only if the file holds results. ``inputs`` is a digest of the
        results' inputs (``vilu.artifacts.paths``).

        Raises:
            UsageError: If the suffix is not listed above, or if an existing file holds no results.
            StorageError: If the file cannot be written.

        Examples:
            >>> import json, pathlib, tempfile, vilu
            >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20
            >>> perfect = vilu.Outcomes(uncertainty, failure, method="mine")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     vilu.evaluate(perfect, metrics=["auroc"]).save(f"{folder}/results.json")
            ...     content = json.loads(pathlib.Path(folder, "results.json").read_text())
            >>> (row,) = content["rows"]
            >>> row["metric"], row["value"], row["ci_low"]
            ('auroc', 1.0, 1.0)
        """
        claim_file(path, "results", overwrite=True)
        self.write(path, inputs)

    def write(self, path: str | Path, inputs: str | None = None) -> None:
        """Write a file like ``save``, but replace any existing file."""
        import pyarrow as pa

        metadata = {"kind": "results", **inputs_entry(inputs)}
        if Path(path).suffix.lower() == ".json":
            rows = self.to_dicts()
            write_json(path, {**metadata, "rows": rows})
            return
        columns = {}
        for name in self._columns:
            values = [getattr(row, name) for row in self.rows]
            columns[name] = pa.array(values, COLUMN_TYPES[name])
        write_table(path, columns, metadata)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Self:
        """Read a file that ``save`` wrote.

        Raises:
            UsageError: If the suffix is not ``.json``, ``.parquet`` or ``.csv``.
            StorageError: If the file cannot be opened.
            DataError: If the file is no result table.
            ProvenanceError: If a version of vilu with another schema wrote the file.

        Examples:
            >>> import tempfile, vilu
            >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20
            >>> perfect = vilu.Outcomes(uncertainty, failure, method="mine")
            >>> table = vilu.evaluate(perfect, metrics=["auroc"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     table.save(f"{folder}/results.parquet")
            ...     vilu.ResultTable.load(f"{folder}/results.parquet") == table
            True
        """
        if Path(path).suffix.lower() == ".json":
            table = _table_of_json(path)
        else:
            text_columns = [
                name for name, arrow_type in COLUMN_TYPES.items() if arrow_type == "string"
            ]
            table, _ = read_table(path, text_columns)
        columns = {}
        for name, arrow_type in COLUMN_TYPES.items():
            columns[name] = read_column(path, table, name, arrow_type).to_pylist()
        columns["n_outside"] = [n or 0 for n in columns["n_outside"]]  # null in a file means 0
        for name in REQUIRED_COLUMNS:
            if None in columns[name]:
                row = columns[name].index(None)
                raise DataError(
                    f"{path} is not a table of results: {name!r} is missing in row {row}."
                )
        # each tuple has the values of one row, in field order
        values_by_row = zip(*columns.values(), strict=True)
        return cls(tuple(ResultRow(*values) for values in values_by_row))


def _table_of_json(path: str | Path) -> pa.Table:
    """Read the rows from a JSON file by ``ResultTable.save``, and refuse any other content."""
    import pyarrow as pa

    if not Path(path).is_file():
        raise StorageError(f"{path} does not exist.")
    content = read_json(Path(path), "Run `vilu evaluate` again")
    if not isinstance(content.get("rows"), list):
        raise DataError(
            f"{path} must hold an object with a list 'rows'. It has {', '.join(content):.80}."
        )
    for row in content["rows"]:
        if not isinstance(row, dict):
            raise DataError(f"every entry of 'rows' in {path} must be an object.")
    fields = [(name, pa.type_for_alias(arrow_type)) for name, arrow_type in COLUMN_TYPES.items()]
    schema = pa.schema(fields)
    try:
        return pa.Table.from_pylist(content["rows"], schema)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise DataError(f"{path} is not a table of results: {error}") from error


def _refuse_folds(rows: Sequence[ResultRow]) -> None:
    """Raise UsageError if no evaluated row is common to two of the seeds."""
    samples = [row.sample for row in rows if row.sample is not None]
    if not are_disjoint(samples):
        return
    first_row = rows[0]
    name_of_scores = scores_name(first_row.method, first_row.answer)
    data_set = _data_set_name(first_row)
    raise UsageError(
        f"the {len(samples)} results of {name_of_scores} on "
        f"{data_set} are of different rows, so they are folds and not seeds. Join "
        "the folds first: vilu.evaluate(vilu.Outcomes.concat(folds))."
    )


def _mean_row(rows: Sequence[ResultRow]) -> ResultRow:
    """Average the rows for several seeds. The mean is None if any row has the value None."""
    if len(rows) == 1:
        return rows[0]
    counts: dict[str, Any] = {}
    for name in COUNT_COLUMNS:
        counts[name] = round(fmean(getattr(row, name) for row in rows))
    without_value = replace(
        rows[0],
        seed=None,
        value=None,
        ci_low=None,
        ci_high=None,
        accuracy=fmean(row.accuracy for row in rows),
        n_pictures=_mean_pictures(rows),
        interval=None,
        why=None,
        **counts,
    )
    for row in rows:
        if row.value is None:
            return replace(without_value, why=f"seed {row.seed} of {len(rows)} seeds: {row.why}")
    values = [row.value for row in rows if row.value is not None]
    value = fmean(values)
    spread = stdev(values)
    return replace(
        without_value,
        value=value,
        ci_low=value - spread,
        ci_high=value + spread,
        interval=f"mean of {len(rows)} seeds, one standard deviation",
    )


def _mean_pictures(rows: Sequence[ResultRow]) -> int | None:
    """Return the mean picture count over seeds. Return None if no picture has two rows."""
    if all(row.n_pictures is None for row in rows):
        return None
    n_pictures_of_seeds = [_n_pictures(row) for row in rows]
    return round(fmean(n_pictures_of_seeds))


def _n_pictures(row: ResultRow) -> int:
    """Return the number of different pictures, which may be the number of rows."""
    if row.n_pictures is None:  # no picture has two rows
        return row.n
    return row.n_pictures


UNDEFINED_CELL = "undefined"
"""Table cell for a metric without a value."""


TitledTable = tuple[str, list[list[str]]]
"""Results on one data set: the title, and the table's lines as lists of cells.

The first line is the table heading.
"""


def _shown_metrics(rows: Sequence[ResultRow], metrics: Sequence[str] | None) -> Sequence[str]:
    """Return the names of the metrics to show.

    1. The names in ``metrics``, unless ``metrics`` is None.
    2. Otherwise all metrics in the rows, if ``evaluate`` was called with chosen metrics.
    3. Otherwise the metrics in the rows with ``wanted="always"``.
    """
    if metrics is not None:
        return [get_metric(name).name for name in metrics]
    metrics_of_rows = list(dict.fromkeys(row.metric for row in rows))
    if not _are_default_metrics(set(metrics_of_rows)):
        return metrics_of_rows
    shown = []
    for name in METRICS:
        if METRICS[name].wanted == "always" and name in metrics_of_rows:
            shown.append(name)
    return shown


def _are_default_metrics(names: set[str]) -> bool:
    """Return whether these metrics were computed by default, and not chosen by the user."""
    always_computed = set()
    for name in DEFAULT_METRICS:
        metric = METRICS[name]
        if not metric.of_probability and metric.question == "failure":
            always_computed.add(metric.name)
    has_all_always_computed = always_computed.issubset(names)
    default_names = evaluated_metrics()
    has_only_defaults = names.issubset(default_names)
    return has_all_always_computed and has_only_defaults


def _tables_by_data_set(
    rows: Sequence[ResultRow], shown_metrics: Sequence[str]
) -> list[TitledTable]:
    """Make one table per data set and split, with ``shown_metrics`` as columns."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        data_set = _data_set_name(row)
        rows_of_data_set = groups.setdefault(data_set, [])
        rows_of_data_set.append(row)
    return [_table_of_data_set(group, shown_metrics) for group in groups.values()]


def _table_of_data_set(rows: Sequence[ResultRow], metrics: Sequence[str]) -> TitledTable:
    """Make the table of one data set, with a line per method and seed."""
    # A line maps each metric to a result. If there are two results for the same scores, seed and
    # metric, the second result goes to a new line. So the key of a line has three parts: the name
    # of the scores, the seed, and the number of earlier results for the same scores, seed and
    # metric.
    lines: dict[tuple[str, int | None, int], dict[str, ResultRow]] = {}
    n_earlier: Counter[tuple[str, int | None, str]] = Counter()
    for row in rows:
        name = scores_name(row.method, row.answer)
        key = (name, row.seed, row.metric)
        line = lines.setdefault((name, row.seed, n_earlier[key]), {})
        line[row.metric] = row
        n_earlier[key] += 1
    n_seeds = len({row.seed for row in rows})
    table = [["method", *[_metric_named(metric).title for metric in metrics]]]
    for (name, seed, _), line in lines.items():
        first_cell = escape_unprintable(name)
        if n_seeds > 1 and seed is not None:
            first_cell = f"{first_cell} (seed {seed})"
        cells = [_cell(line.get(metric)) for metric in metrics]
        table.append([first_cell, *cells])
    return _title(rows), table


def _metric_named(name: str) -> Metric:
    """Return the metric with this name.

    If the name is unknown, return a metric with the name as title and AUROC's number format.
    """
    if name not in METRICS:
        title = escape_unprintable(name)
        return replace(METRICS["auroc"], title=title)
    return METRICS[name]


def scores_name(method: str | None, answer: str) -> str:
    """Return the method's name. If the answers are not zero-shot, add the kind in brackets."""
    name = method or "unnamed"
    if answer == "zero_shot":
        return name
    return f"{name} ({answer})"


def _cell(row: ResultRow | None) -> str:
    """Return a table cell: the value, and the interval if there is an interval."""
    if row is None:
        return ""
    if row.value is None:
        return UNDEFINED_CELL
    metric = _metric_named(row.metric)
    if row.ci_low is None or row.ci_high is None:
        return metric.show(row.value)
    return f"{metric.show(row.value)} {metric.brackets(row.ci_low, row.ci_high)}"


def _title(rows: Sequence[ResultRow]) -> str:
    """Return the title of one data set's table: the data set's name, and the row counts."""
    accuracy = join_distinct(f"{100 * row.accuracy:.1f}" for row in rows)
    counts = [
        f"{_span_of_count(rows, 'n')} answers{_pictures_phrase(rows)}",
        f"{_span_of_count(rows, 'n_failures')} wrong{_shares_phrase(rows)}",
        f"accuracy {accuracy} %",
    ]
    n_unlabelled = _span_of_count(rows, "n_unlabelled")
    if n_unlabelled != "0":
        counts.append(f"{n_unlabelled} unlabelled left out")
    n_unusable = _span_of_count(rows, "n_unusable")
    if n_unusable != "0":
        counts.append(f"{n_unusable} without a score left out")
    return f"{_data_set_name(rows[0])}: {', '.join(counts)}"


def _span_of_count(rows: Sequence[ResultRow], count_name: str) -> str:
    """Return the different values that a count has in the rows, such as "10/20" or "0"."""
    return join_distinct(getattr(row, count_name) for row in rows)


def _pictures_phrase(rows: Sequence[ResultRow]) -> str:
    """Return a phrase on the picture count, or "" if no two rows show the same picture."""
    if all(row.n_pictures is None for row in rows):
        return ""
    return f" for {join_distinct(_n_pictures(row) for row in rows)} pictures"


def _shares_phrase(rows: Sequence[ResultRow]) -> str:
    """Return a phrase on wrong answers within and outside the classes, or "" if none is outside."""
    if not any(row.n_outside for row in rows):
        return ""
    percent_within = join_distinct(_percent(row.n_failures - row.n_outside, row.n) for row in rows)
    percent_outside = join_distinct(_percent(row.n_outside, row.n) for row in rows)
    return f" ({percent_within} % within the classes, {percent_outside} % of none of the classes)"


def _percent(count: int, n: int) -> str:
    """Return the share of ``count`` in ``n`` as text, in percent. Without rows, the share is 0."""
    return f"{100 * count / max(n, 1):.1f}"


def _data_set_name(row: ResultRow) -> str:
    """Name the data set and the split, or return "results" if both are unknown."""
    names = [name for name in (row.dataset, row.split) if name]
    joined_names = " ".join(names)
    return escape_unprintable(joined_names) or "results"


def _notes(rows: Sequence[ResultRow], shown_metrics: Sequence[str]) -> list[str]:
    """Return notes on the unit, intervals, conventions and undefined values, each note once."""
    if not rows:
        return ["no results"]
    rows = [row for row in rows if row.metric in shown_metrics]
    exceptions = not_in_percent(map(_metric_named, shown_metrics))
    first_note = f"in percent{exceptions}"
    intervals = _intervals_in_words(rows)
    if intervals:
        first_note = f"{first_note}; in brackets: {intervals}"
    notes = [first_note]
    for row in rows:
        metric = _metric_named(row.metric)
        interval_note = _own_interval_note(row)
        notes.append(f"{metric.title}: {row.convention}{interval_note}")
    notes += [f"undefined on {_data_set_name(row)}: {row.why}" for row in rows if row.why]
    if len({row.answer for row in rows}) > 1:
        notes += _notes_across_answers(rows)
    return list(dict.fromkeys(escape_unprintable(note) for note in notes))


def _notes_across_answers(rows: Sequence[ResultRow]) -> list[str]:
    """Return a note on the metrics that cannot compare different kinds of answers."""
    titles: list[str] = []
    for row in rows:
        metric = _metric_named(row.metric)
        if not metric.across_answers and metric.title not in titles:
            titles.append(metric.title)
    if not titles:
        return []
    return [
        f"{', '.join(titles)}: not to be compared between kinds of answers, which are wrong in "
        "other rows"
    ]


def _intervals_in_words(rows: Sequence[ResultRow]) -> str:
    """Say how intervals were made, or return "" if there are no intervals.

    If there are several kinds of intervals, the text names the methods for each kind.
    """
    # The methods for each kind of interval are dict keys, because a set has no order.
    methods: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.interval and not _is_own_interval(row):
            name_of_scores = scores_name(row.method, row.answer)
            name = escape_unprintable(name_of_scores)
            names = methods.setdefault(row.interval, {})
            names[name] = None
    if not methods:
        return ""
    if len(methods) == 1:
        (interval,) = methods
        return interval
    texts = []
    for interval, names in methods.items():
        joined_names = ", ".join(names)
        texts.append(f"{interval} ({joined_names})")
    return "; ".join(texts)


def _is_own_interval(row: ResultRow) -> bool:
    """Return whether the row's metric has its own method for intervals."""
    return isinstance(_metric_named(row.metric).kernel, OwnInterval)


def _own_interval_note(row: ResultRow) -> str:
    """Say how the metric made the row's interval, or return "" for a bootstrap interval."""
    if row.interval and _is_own_interval(row):
        return f"; in brackets: {row.interval}"
    return ""
