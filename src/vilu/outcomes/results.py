"""Results as tidy rows, and as tables for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Self

from vilu.artifacts.documents import read_json, write_json
from vilu.artifacts.paths import claim_file, said_of
from vilu.artifacts.tables import read_column, read_table, write_table
from vilu.errors import DataError, StorageError, UsageError
from vilu.metrics.bootstrap import OwnInterval
from vilu.metrics.catalog import (
    DEFAULT_METRICS,
    METRICS,
    Metric,
    but_for,
    evaluated_metrics,
    get_metric,
)
from vilu.text import aligned, in_markdown, markdown_rows, printable, span
from vilu.validation import checked, describe_value

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ResultRow:
    """One metric of one method on one data set.

    Raises:
        DataError: If a number is NaN or infinite (what is undefined is None), or a count has more
            than 64 bits.
    """

    method: str | None  # name of the predictor
    dataset: str | None  # name of the data set
    split: str | None  # name of its part
    seed: int | None  # seed of the predictor
    metric: str  # name of the metric, as in ``vilu.metrics.METRICS``
    value: float | None  # the metric, None where it is undefined
    ci_low: float | None  # lower end of its interval, None where there is none
    ci_high: float | None  # upper end
    n: int  # number of rows with an uncertainty and a known failure
    n_failures: int  # how many of them are wrong
    accuracy: float  # share of right answers of the frozen model
    n_unlabelled: int  # rows left out because their failure is unknown
    n_unusable: int  # rows left out because they have no uncertainty
    convention: str  # what was chosen where the literature differs
    interval: str | None = None  # how the interval was made, None where there is none
    why: str | None = None  # why ``value`` is None
    n_outside: int = 0  # how many of the wrong ones are answers for pictures of none of the classes
    n_pictures: int | None = None  # how many pictures the n rows show; None where as many as rows

    def __post_init__(self) -> None:
        for name in ("value", "ci_low", "ci_high", "accuracy"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise DataError(
                    f"{name} of {self.metric} must be finite, or None where it is undefined. Got {number}."
                )
        for name in (*COUNTS, "n_pictures", "seed"):
            if not -(2**63) <= (getattr(self, name) or 0) < 2**63:
                raise DataError(
                    f"{name} of {self.metric} must be a 64-bit integer. Got {getattr(self, name)}."
                )


ARROW = {"str": "string", "int": "int64", "float": "float64"}
TYPES = {field.name: ARROW[str(field.type).removesuffix(" | None")] for field in fields(ResultRow)}
COLUMNS = tuple(TYPES)
REQUIRED_COUNTS = ("n", "n_failures", "n_unlabelled", "n_unusable")
COUNTS = (*REQUIRED_COUNTS, "n_outside")
SELDOM = ("n_outside", "n_pictures")
REQUIRED = ("metric", *REQUIRED_COUNTS, "accuracy", "convention")


@dataclass(frozen=True)
class ResultTable:
    """Rows of results; prints as a table of methods by metrics, and ``+`` joins two.

    Examples:
        >>> import vilu
        >>> perfect = vilu.Outcomes([0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20, method="mine")
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
        """The rows whose fields have the given values, such as ``method="mcm", seed=0``.

        Raises:
            UsageError: If there is no such field.

        Examples:
            >>> import vilu
            >>> uncertainty, failure = [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20
            >>> scores = [
            ...     vilu.Outcomes(uncertainty, failure, method=name, seed=seed)
            ...     for name in "ab"
            ...     for seed in range(3)
            ... ]
            >>> table = vilu.evaluate(scores, metrics=["auroc", "augrc"], n_resamples=0)
            >>> (
            ...     len(table),
            ...     len(table.filter(method="a")),
            ...     len(table.filter(method="a", metric="auroc", seed=2)),
            ... )
            (12, 6, 1)
        """
        if unknown := [name for name in fields if name not in COLUMNS]:
            raise UsageError(
                f"a result has no field {unknown[0]!r}. There are: {', '.join(COLUMNS)}."
            )
        for name, want in fields.items():
            if not isinstance(want, str | Real | None):  # numpy's, too
                raise UsageError(
                    f"{name} must be a text, a number or None. Got {describe_value(want)} instead."
                )
        fits = (
            row
            for row in self.rows
            if all(getattr(row, name) == want for name, want in fields.items())
        )
        return ResultTable(tuple(fits))

    @checked
    def value(self, metric: str, **fields: object) -> float | None:
        """The value of a metric in the one row that fits; None where it is undefined.

        Raises:
            UsageError: If no row fits, or several do.

        Examples:
            >>> import vilu
            >>> wrong_half = vilu.Outcomes(
            ...     [0.1, 0.2, 0.3, 0.4] * 20, [0, 1, 0, 1] * 20, method="mine"
            ... )
            >>> vilu.evaluate(wrong_half, metrics=["auroc", "augrc"], n_resamples=0).value("augrc")
            0.1875
        """
        found = self.filter(metric=metric, **fields)
        if len(found) != 1:
            raise UsageError(
                f"one row must fit metric={metric!r} and {fields}. {len(found)} of {len(self)} do; "
                "narrow by method, dataset, split or seed."
            )
        return found.rows[0].value

    def mean_over_seeds(self) -> ResultTable:
        """One row per method, data set, split and metric: the mean over seeds, how many being told in ``interval``.

        The ends of the interval are the mean less and plus the standard deviation over seeds. A
        mean is None where the value of one seed is. What has one seed stays as it is; a row that is
        there twice counts once, also where the two have other intervals.

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
        groups: dict[tuple[object, ...], dict[ResultRow, ResultRow]] = {}
        for row in self.rows:
            seeds = groups.setdefault(
                (row.method, row.dataset, row.split, row.metric, row.convention), {}
            )
            seeds.setdefault(replace(row, ci_low=None, ci_high=None, interval=None), row)
        return ResultTable(tuple(_mean(list(seeds.values())) for seeds in groups.values()))

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, with ``n_outside`` and ``n_pictures`` where some have one.

        Examples:
            >>> import vilu
            >>> perfect = vilu.Outcomes(
            ...     [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20, method="mine", dataset="pets"
            ... )
            >>> (row,) = vilu.evaluate(perfect, metrics=["auroc"], n_resamples=0).to_dicts()
            >>> {
            ...     name: row[name]
            ...     for name in ("method", "dataset", "metric", "value", "n", "n_failures")
            ... }
            {'method': 'mine', 'dataset': 'pets', 'metric': 'auroc', 'value': 1.0, 'n': 80, 'n_failures': 40}
        """
        return [
            {name: value for name, value in asdict(row).items() if name in self._columns}
            for row in self.rows
        ]

    @property
    def _columns(self) -> tuple[str, ...]:
        """What is written: a column that says nothing of any row is none."""
        silent = {name for name in SELDOM if not any(getattr(row, name) for row in self.rows)}
        return tuple(name for name in COLUMNS if name not in silent)

    @checked
    def table(self, metrics: Sequence[str] | None = None) -> str:
        """Aligned text: methods as rows, metrics as columns; by default the main ones of all, or those of a choice.

        Examples:
            >>> import vilu
            >>> perfect = vilu.Outcomes(
            ...     [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20, method="mine", dataset="pets"
            ... )
            >>> print(vilu.evaluate(perfect, n_resamples=0).table(["auroc", "augrc"]))
            pets: 80 answers, 40 wrong, accuracy 50.0 %
            method  AUROC  AUGRC
            mine    100.0  12.5
            <BLANKLINE>
            in percent
            AUROC: ties count half
            AUGRC: trapezoids over distinct scores
        """
        shown = _shown(self.rows, metrics)
        parts = ["\n".join([title, *aligned(lines)]) for title, lines in _parts(self.rows, shown)]
        return "\n\n".join([*parts, "\n".join(_notes(self.rows, shown))])

    @checked
    def to_markdown(self, metrics: Sequence[str] | None = None) -> str:
        """The same as ``table``, in Markdown.

        Examples:
            >>> import vilu
            >>> perfect = vilu.Outcomes(
            ...     [0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20, method="mine", dataset="pets"
            ... )
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
        shown, parts = _shown(self.rows, metrics), []
        for title, lines in _parts(self.rows, shown):
            heading, *body = ([in_markdown(cell) for cell in line] for line in lines)
            parts.append(
                "\n".join([f"**{in_markdown(title)}**", "", *markdown_rows(heading, body)])
            )
        return "\n\n".join(
            [*parts, "\n".join(f"- {in_markdown(note)}" for note in _notes(self.rows, shown))]
        )

    @checked
    def save(self, path: str | Path, *, inputs: str | None = None) -> None:
        """Write ``.json``, ``.parquet`` or ``.csv`` atomically; what is undefined is null.

        Other results that lie there are replaced, and no other file. ``inputs`` is the digest of
        what they were made from (``vilu.artifacts.paths``).

        Raises:
            UsageError: If the suffix is another, or something else than results lies there.
            StorageError: If the file system refuses.

        Examples:
            >>> import json, pathlib, tempfile, vilu
            >>> perfect = vilu.Outcomes([0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20, method="mine")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     vilu.evaluate(perfect, metrics=["auroc"]).save(f"{folder}/results.json")
            ...     kept = json.loads(pathlib.Path(folder, "results.json").read_text())
            >>> [(row["metric"], row["value"], row["ci_low"]) for row in kept["rows"]]
            [('auroc', 1.0, 1.0)]
        """
        claim_file(path, "results", overwrite=True)
        self.write(path, inputs)

    def write(self, path: str | Path, inputs: str | None = None) -> None:
        """The same without a look at what lies there."""
        import pyarrow as pa

        said = said_of(inputs)
        if Path(path).suffix.lower() == ".json":
            write_json(
                path,
                {"kind": "results", **said, "rows": self.to_dicts()},
            )
            return
        columns = {
            name: pa.array([getattr(r, name) for r in self.rows], TYPES[name])
            for name in self._columns
        }
        write_table(path, columns, {"kind": "results", **said})

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            UsageError: If the suffix is none of the three.
            StorageError: If the file cannot be opened.
            DataError: If it is not such a table.
            ProvenanceError: If another version of vilu wrote it.

        Examples:
            >>> import tempfile, vilu
            >>> perfect = vilu.Outcomes([0.1, 0.2, 0.3, 0.4] * 20, [0, 0, 1, 1] * 20, method="mine")
            >>> table = vilu.evaluate(perfect, metrics=["auroc"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     table.save(f"{folder}/results.parquet")
            ...     vilu.ResultTable.load(f"{folder}/results.parquet") == table
            True
        """
        if Path(path).suffix.lower() == ".json":
            table = _table_of_json(path)
        else:
            table, _ = read_table(path, [name for name, kind in TYPES.items() if kind == "string"])
        columns = {
            name: read_column(path, table, name, TYPES[name]).to_pylist() for name in COLUMNS
        }
        columns["n_outside"] = [n or 0 for n in columns["n_outside"]]
        for name in REQUIRED:
            if None in columns[name]:
                raise DataError(
                    f"{path} is not a table of results: {name!r} is missing in row {columns[name].index(None)}."
                )
        return cls(tuple(ResultRow(*values) for values in zip(*columns.values(), strict=True)))


def _table_of_json(path: str | Path) -> pa.Table:
    import pyarrow as pa

    if not Path(path).is_file():
        raise StorageError(f"{path} does not exist.")
    content = read_json(Path(path), "Run `vilu evaluate` again")
    if not isinstance(content.get("rows"), list):
        raise DataError(
            f"{path} must hold an object with a list 'rows'. It has {', '.join(content):.80}."
        )
    if not all(isinstance(row, dict) for row in content["rows"]):
        raise DataError(f"every entry of 'rows' in {path} must be an object.")
    try:
        return pa.Table.from_pylist(
            content["rows"], pa.schema([(n, pa.type_for_alias(TYPES[n])) for n in COLUMNS])
        )
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise DataError(f"{path} is not a table of results: {error}") from error


def _mean(rows: Sequence[ResultRow]) -> ResultRow:
    if len(rows) == 1:
        return rows[0]
    undefined = next((row for row in rows if row.value is None), None)
    values = [row.value for row in rows if row.value is not None]
    mean, spread = (None, 0.0) if undefined else (fmean(values), stdev(values))
    counts: dict[str, Any] = {
        name: round(fmean(getattr(row, name) for row in rows)) for name in COUNTS
    }
    return replace(
        rows[0],
        seed=None,
        value=mean,
        ci_low=None if mean is None else mean - spread,
        ci_high=None if mean is None else mean + spread,
        accuracy=fmean(row.accuracy for row in rows),
        n_pictures=_mean_pictures(rows),
        interval=None if mean is None else f"mean of {len(rows)} seeds, one standard deviation",
        why=None
        if undefined is None
        else f"seed {undefined.seed} of {len(rows)} seeds: {undefined.why}",
        **counts,
    )


def _mean_pictures(rows: Sequence[ResultRow]) -> int | None:
    """Of all seeds; None where every seed has as many pictures as rows."""
    if all(row.n_pictures is None for row in rows):
        return None
    return round(fmean(row.n if row.n_pictures is None else row.n_pictures for row in rows))


UNDEFINED = "undefined"


Titled = tuple[str, list[list[str]]]
"""The results on one data set: a title; and the heading, then a line of cells per method."""


def _shown(rows: Sequence[ResultRow], metrics: Sequence[str] | None) -> Sequence[str]:
    """The metrics asked for, here or when the rows were made; of rows for which nobody asked, those always wanted."""
    if metrics is not None:
        return [get_metric(name).name for name in metrics]
    present = list(dict.fromkeys(row.metric for row in rows))
    always = [METRICS[name] for name in DEFAULT_METRICS]
    ours = {
        metric.name
        for metric in always
        if not metric.of_probability and metric.question == "failure"
    }
    nobody_asked = ours <= set(present) <= set(evaluated_metrics())
    main = [
        name for name, metric in METRICS.items() if metric.wanted == "always" and name in present
    ]
    return main if nobody_asked else present


def _parts(rows: Sequence[ResultRow], shown: Sequence[str]) -> list[Titled]:
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(_where(row), []).append(row)
    return [_part(group, shown) for group in groups.values()]


def _part(rows: Sequence[ResultRow], metrics: Sequence[str]) -> Titled:
    lines: dict[tuple[str | None, int | None, int], dict[str, ResultRow]] = {}
    repeats: Counter[tuple[str | None, int | None, str]] = Counter()
    for row in rows:
        key = (row.method, row.seed, row.metric)
        lines.setdefault((row.method, row.seed, repeats[key]), {})[row.metric] = row
        repeats[key] += 1  # a second row of the same name gets a line of its own
    several_seeds = len({row.seed for row in rows}) > 1
    table = [["method", *(_metric(name).title for name in metrics)]]
    for (method, seed, _), line in lines.items():
        cells = [_cell(line.get(name)) for name in metrics]
        table.append([_label(method, seed if several_seeds else None), *cells])
    return _title(rows), table


def _metric(name: str) -> Metric:
    """The metric; one that this version does not know is shown by its name."""
    return METRICS.get(name) or replace(METRICS["auroc"], title=printable(name))


def _label(method: str | None, seed: int | None) -> str:
    return printable(method or "unnamed") + ("" if seed is None else f" (seed {seed})")


def _cell(row: ResultRow | None) -> str:
    if row is None:
        return ""
    if row.value is None:
        return UNDEFINED
    metric = _metric(row.metric)
    if row.ci_low is None or row.ci_high is None:
        return metric.show(row.value)
    return f"{metric.show(row.value)} {metric.brackets(row.ci_low, row.ci_high)}"


def _title(rows: Sequence[ResultRow]) -> str:
    counts = [
        f"{span(row.n for row in rows)} answers{_pictures(rows)}",
        f"{span(row.n_failures for row in rows)} wrong{_shares(rows)}",
        f"accuracy {span(f'{100 * row.accuracy:.1f}' for row in rows)} %",
    ]
    if any(row.n_unlabelled for row in rows):
        counts.append(f"{span(row.n_unlabelled for row in rows)} unlabelled left out")
    if any(row.n_unusable for row in rows):
        counts.append(f"{span(row.n_unusable for row in rows)} without a score left out")
    return f"{_where(rows[0])}: {', '.join(counts)}"


def _pictures(rows: Sequence[ResultRow]) -> str:
    """How many pictures they are for, where some answers are for one picture."""
    if all(row.n_pictures is None for row in rows):
        return ""
    pictures = span(row.n if row.n_pictures is None else row.n_pictures for row in rows)
    return f" for {pictures} pictures"


def _shares(rows: Sequence[ResultRow]) -> str:
    """The two kinds of wrong answers, where there are two."""
    if not any(row.n_outside for row in rows):
        return ""
    within = span(f"{100 * (row.n_failures - row.n_outside) / max(row.n, 1):.1f}" for row in rows)
    outside = span(f"{100 * row.n_outside / max(row.n, 1):.1f}" for row in rows)
    return f" ({within} % within the classes, {outside} % of none of the classes)"


def _where(row: ResultRow) -> str:
    return printable(" ".join(text for text in (row.dataset, row.split) if text)) or "results"


def _notes(rows: Sequence[ResultRow], shown: Sequence[str]) -> list[str]:
    """Unit, intervals, conventions, and the reasons for what is undefined, each said once."""
    if not rows:
        return ["no results"]
    rows = [row for row in rows if row.metric in shown]
    methods: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.interval and not isinstance(_metric(row.metric).kernel, OwnInterval):
            methods.setdefault(row.interval, {})[_label(row.method, None)] = None
    several = len(methods) > 1
    intervals = [how + (f" ({', '.join(of)})" if several else "") for how, of in methods.items()]
    unit = f"in percent{but_for(map(_metric, shown))}"
    notes = [unit + (f"; in brackets: {'; '.join(intervals)}" if intervals else "")]
    notes += [f"{_metric(row.metric).title}: {row.convention}{_own_interval(row)}" for row in rows]
    notes += [f"undefined on {_where(row)}: {row.why}" for row in rows if row.why]
    return list(dict.fromkeys(map(printable, notes)))


def _own_interval(row: ResultRow) -> str:
    """How an interval was made that is not made as those of other metrics."""
    is_own = row.interval and isinstance(_metric(row.metric).kernel, OwnInterval)
    return f"; in brackets: {row.interval}" if is_own else ""
