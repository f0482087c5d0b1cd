"""A study's content: tables, figures, claims from a publication, and published numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from vilu.artifacts.tables import parse_csv
from vilu.errors import DataError
from vilu_bench import read_asset
from vilu_bench.studies.parts import RANKING_METRICS, Name, Names, Section, require_known

Axis = Literal["method", "data", "setting"]
# axis names in messages
AXIS_NAMES = {"method": "method", "data": "data set", "setting": "setting"}
KEY_FIELDS = (*AXIS_NAMES, "metric")  # the fields that identify a number in a study


class Study(Section):
    """Title and description for a benchmark."""

    title: str  # short title
    reproduces: str = ""  # the reproduced table or figure in a publication, if any
    protocol: str = ""  # the protocol, and differences from the publication
    published: Names = ()  # tables in ``assets/published.csv`` to show beside our numbers

    @field_validator("published")
    @classmethod
    def _check_published(cls, names: Names) -> Names:
        tables = published_tables()
        require_known("table of published numbers", names, tables)
        return names


class AxisEntry(Protocol):
    """A method, data set or setting, with an optional position on a curve's axis."""

    @property
    def x(self) -> float | None:
        """Position on the axis. None: the entry has no position."""


class StudyNames(Protocol):
    """The names that a study's views and claims may use. ``Config`` provides the names."""

    metrics: Names

    @property
    def ranking_metrics(self) -> Names:
        """Metrics with intervals. The first metric ranks the methods."""

    def entries_of(self, axis: str) -> Mapping[str, AxisEntry]:
        """Return all entries on ``axis``: methods by label, data sets by name, settings by name."""

    @property
    def submitted_methods(self) -> Names:
        """Labels for the methods with submitted results."""


def require_known_names(
    section_name: str, study_names: StudyNames, names_of_axis: Mapping[str, Names | None]
) -> None:
    """Raise a ValueError for a name that a study does not have.

    Args:
        section_name: The view or claim in the message, such as "(claim)".
        study_names: The study's names.
        names_of_axis: Maps each axis to the names to check. None means all names in the study, so
            there is nothing to check.
    """
    for axis, names in names_of_axis.items():
        if names is not None:
            known_names = study_names.entries_of(axis)
            require_known(f"{AXIS_NAMES[axis]} {section_name}", names, known_names)


class View(Section):
    """A table or a figure."""

    needs_intervals: ClassVar[bool] = False  # whether all metrics in the view must have intervals
    shows_submitted_methods: ClassVar[bool] = True  # whether the view also shows submitted methods

    name: Name
    title: str
    methods: Names | None = None  # methods to show, in this order, or None for all
    data: Names | None = None  # data sets to show, in this order, or None for all
    settings: Names | None = None  # settings to show, in this order, or None for all
    metrics: Annotated[Names, Field(min_length=1)] = RANKING_METRICS  # metrics to show
    mean: Names = ()  # data sets to average, or empty for no mean
    means_only: bool = False  # whether to show only the mean, without the single data sets

    @property
    def can_average(self) -> bool:
        """Whether the view can show means over data sets."""
        return False

    @property
    def section_name(self) -> str:
        """The text "(view NAME)". Messages name the view in this form."""
        return f"(view {self.name})"

    @property
    def chosen_names(self) -> dict[str, Names | None]:
        """The names to show on each axis. None: all names."""
        return {"method": self.methods, "data": self.data, "setting": self.settings}

    def check(self, study_names: StudyNames) -> None:
        """Raise a ValueError if a name is unknown, or if the view cannot be shown."""
        chosen_data = self.data or ()  # without chosen data sets, there is no name to check
        data = (*chosen_data, *self.mean)
        require_known_names(
            self.section_name,
            study_names,
            {"method": self.methods, "data": data, "setting": self.settings},
        )
        require_known(f"metric {self.section_name}", self.metrics, study_names.metrics)
        if self.means_only and not self.mean:
            raise ValueError(f"means_only needs a mean, as mean = [data sets] {self.section_name}")
        if self.mean and not self.can_average:
            raise ValueError(
                "means are for tables, and for curves over something else than data sets "
                f"{self.section_name}"
            )
        if self.needs_intervals:
            require_known(
                f"metric with an interval {self.section_name}",
                self.metrics,
                study_names.ranking_metrics,
            )

    def entries_of(self, study_names: StudyNames, axis: str) -> dict[str, AxisEntry]:
        """Return the view's methods, data sets or settings, by name."""
        all_entries = study_names.entries_of(axis)
        if axis == "method":
            names = self._methods_to_show(study_names)
        else:
            names = self.chosen_names[axis] or tuple(all_entries)
        return {name: all_entries[name] for name in names}

    def _methods_to_show(self, study_names: StudyNames) -> Names:
        """Return the chosen methods (by default all in the study), then the submitted methods.

        Submitted methods are left out if the view does not show submitted methods, or if a single
        method is chosen.
        """
        study_methods = [
            name
            for name in study_names.entries_of("method")
            if name not in study_names.submitted_methods
        ]
        names = self.methods or tuple(study_methods)
        if not self.shows_submitted_methods:
            return names
        has_single_method = self.methods is not None and len(self.methods) == 1
        if has_single_method:
            return names
        return (*names, *study_names.submitted_methods)

    def as_table(self, rows: Names, columns: Names) -> TableView:
        """Return a table view with the numbers in a figure."""
        shared_fields = {name: getattr(self, name) for name in View.model_fields}
        return TableView(kind="table", rows=rows, columns=columns, **shared_fields)


class TableView(View):
    """A table of values with intervals. The best and second best competing values are marked."""

    kind: Literal["table"]
    # Fields that label a row. A field outside ``rows`` and ``columns`` must have a single
    # value.
    rows: Names = ("method",)
    columns: Names = ("data", "metric")  # fields that label a column
    compete: Names = ("method",)  # values compete if they differ only in these fields

    @property
    def can_average(self) -> bool:
        """True: a table can show means over data sets."""
        return True

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        """Refuse unknown fields, and a field in both rows and columns."""
        for names in (self.rows, self.columns, self.compete):
            require_known("field", names, KEY_FIELDS)
        use_counts = Counter((*self.rows, *self.columns))
        for name, count in use_counts.items():
            if count > 1:
                raise ValueError(f"{name} is both in the rows and in the columns")
        return self

    def check(self, study_names: StudyNames) -> None:
        """Raise a ValueError also for a table in which two numbers would share a cell."""
        super().check(study_names)
        names_of_field = {axis: tuple(self.entries_of(study_names, axis)) for axis in AXIS_NAMES}
        names_of_field["metric"] = self.metrics
        if self.means_only:
            names_of_field["data"] = ("mean",)
        for field, names in names_of_field.items():
            if field not in (*self.rows, *self.columns) and len(names) > 1:
                raise ValueError(
                    f"the view {self.name} has several values of {field} ({', '.join(names)}), "
                    "and neither rows nor columns name it"
                )


class CurveView(View):
    """A figure of a metric over a number: lines with intervals, in one or more panels."""

    needs_intervals: ClassVar[bool] = True
    kind: Literal["curve"]
    # Whether the points are the methods, the data sets or the settings. A point's field ``x`` is
    # the position on the horizontal axis.
    x: Axis = "setting"
    line: Axis = "method"  # a panel has a line for each entry of this axis
    panel: Axis = "data"  # there is a panel for each entry of this axis and each metric
    x_label: str  # label on the horizontal axis
    log: bool = False  # whether the horizontal axis is logarithmic
    # texts to show at values on the horizontal axis, instead of the values
    ticks: dict[str, str] = Field(default_factory=dict)

    @property
    def can_average(self) -> bool:
        """Whether the view can show means over data sets: not if data sets are on the axis."""
        return self.x != "data"

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        if len({self.x, self.line, self.panel}) < 3:
            raise ValueError("x, line and panel must be three different things")
        return self

    def check(self, study_names: StudyNames) -> None:
        """Raise a ValueError also if no point has a position on the axis."""
        super().check(study_names)
        entries = self.entries_of(study_names, self.x)
        if all(entry.x is None for entry in entries.values()):
            raise ValueError(f"no {self.x} has an x, its position on the axis {self.section_name}")


class ScatterView(View):
    """A figure of a metric over the zero-shot accuracy, with a trend line for every method.

    A point is a data set in a setting.
    """

    needs_intervals: ClassVar[bool] = True
    kind: Literal["scatter"]


class HistogramView(View):
    """Histograms of the uncertainties for right and wrong answers with the first seed.

    There is a panel for each data set and method.
    """

    # histograms need a run folder's score files
    shows_submitted_methods: ClassVar[bool] = False
    kind: Literal["histograms"]


class GridView(View):
    """A grid over two hyper-parameters, with one setting for choosing and one for reporting."""

    # the parameters of submitted methods are unknown
    shows_submitted_methods: ClassVar[bool] = False
    kind: Literal["grid"]
    parameters: tuple[str, str]  # hyper-parameter for the rows, hyper-parameter for the columns
    select_on: str  # setting for choosing the best pair of values
    report_on: str  # setting for reporting all pairs' results

    def check(self, study_names: StudyNames) -> None:
        """Raise a ValueError also if the first metric has no interval, or a setting is unknown."""
        super().check(study_names)
        require_known(
            f"metric with an interval {self.section_name}",
            self.metrics[:1],
            study_names.ranking_metrics,
        )
        settings = (self.select_on, self.report_on)
        require_known_names(self.section_name, study_names, {"setting": settings})


class RankingView(View):
    """A table for each data set and setting, with all methods, best first, and a table of wins."""

    kind: Literal["ranking"]

    def check(self, study_names: StudyNames) -> None:
        """Raise a ValueError also for chosen names, because a ranking shows all names."""
        super().check(study_names)
        if any(self.chosen_names.values()) or self.metrics != RANKING_METRICS:
            raise ValueError(
                f"a ranking is of everything, so there is nothing to choose {self.section_name}"
            )


AnyView = Annotated[
    TableView | CurveView | ScatterView | HistogramView | GridView | RankingView,
    Field(discriminator="kind"),
]


class MethodInSetting(Section):
    """A method in a setting."""

    method: str
    setting: str


THIS_PROJECT = "this project"  # source for a claim without a publication


class Claim(Section):
    """A claim by a publication or by this project. A number and an interval decide the claim."""

    says: str  # the claim in our words
    source: str  # where the publication makes the claim, or ``THIS_PROJECT``
    data: Names | None = None  # data sets that the deciding number averages, or None for all
    metric: str = RANKING_METRICS[0]

    @property
    def is_ours(self) -> bool:
        """Whether this project makes the claim, and no publication."""
        return self.source == THIS_PROJECT

    @property
    @abstractmethod
    def subjects(self) -> tuple[Names, Names]:
        """The claim's methods, and the claim's settings."""

    def check(self, study_names: StudyNames) -> None:
        """Raise a ValueError if a name is unknown, or if the claim cannot be decided."""
        require_known_names("(claim)", study_names, {"data": self.data})
        require_known("metric (claim)", [self.metric], study_names.ranking_metrics)
        methods, settings = self.subjects
        require_known_names("(claim)", study_names, {"method": methods, "setting": settings})


class BetterClaim(Claim):
    """One method in a setting is better than another method, by the mean over the data sets."""

    kind: Literal["better"]
    better: MethodInSetting
    than: MethodInSetting

    @property
    def subjects(self) -> tuple[Names, Names]:
        """The two methods and the two settings."""
        return (self.better.method, self.than.method), (self.better.setting, self.than.setting)


class TrendClaim(Claim):
    """A method's metric rises or falls with log2 of the settings' ``x``."""

    kind: Literal["trend"]
    method: str
    settings: Annotated[Names, Field(min_length=2)]  # points on the line, which each need an ``x``
    metric_goes: Literal["up", "down"]  # claimed direction

    @property
    def subjects(self) -> tuple[Names, Names]:
        """The line's method and settings."""
        return (self.method,), self.settings

    def check(self, study_names: StudyNames) -> None:
        """Raise a ValueError also for settings without a position on a logarithmic axis."""
        super().check(study_names)
        positions = [study_names.entries_of("setting")[name].x for name in self.settings]
        positive = [position for position in positions if position is not None and position > 0]
        all_positive = len(positive) == len(positions)
        if not all_positive or len(set(positive)) < 2:
            raise ValueError(
                f"the trend of {self.method} needs settings with different x above zero"
            )


class SteeperClaim(Claim):
    """A metric rises more with the zero-shot accuracy for one method than for another method."""

    kind: Literal["steeper"]
    steeper: str
    than: str
    settings: Names

    @property
    def subjects(self) -> tuple[Names, Names]:
        """The two methods and the settings."""
        return (self.steeper, self.than), self.settings


AnyClaim = Annotated[BetterClaim | TrendClaim | SteeperClaim, Field(discriminator="kind")]


PublishedKey = tuple[str, str, str, str]
"""A number's data set, setting, method and metric, as named in ``assets/published.csv``."""


@dataclass(frozen=True)
class PublishedNumber:
    """A number in a publication."""

    value: float  # the metric, as a fraction
    backbone: str  # the model used for the measurement (``vilu.backbones.catalog``)
    source: str  # table or figure in the publication
    doubt: str  # why the number is doubtful, or "" if there is no doubt


@cache
def published_tables() -> dict[str, dict[PublishedKey, tuple[PublishedNumber, ...]]]:
    """Map each table's name, then a key, to published numbers: at most one per backbone."""
    tables: dict[str, dict[PublishedKey, tuple[PublishedNumber, ...]]] = {}
    text = read_asset("published.csv")
    _, rows = parse_csv(text.splitlines(), "published.csv")
    for row in rows:
        key = row["dataset"], row["setting"], row["method"], row["metric"]
        numbers_of_key = tables.setdefault(row["table"], {})
        value = round(float(row["percent"]) / 100, 6)  # 0.7 / 100 is 0.006999999999999999
        number = PublishedNumber(value, row["backbone"], row["source"], row["doubt"])
        earlier_numbers = numbers_of_key.get(key, ())
        if number.backbone in {earlier.backbone for earlier in earlier_numbers}:
            raise DataError(
                f"published.csv has {row['table']}, {', '.join(key)} twice for {number.backbone}."
            )
        numbers_of_key[key] = (*earlier_numbers, number)
    return tables


def find_published(
    tables: Sequence[str], key: PublishedKey, backbone: str
) -> PublishedNumber | None:
    """Look up a key's published number in the first suitable table. None if no table has one.

    If a table has a number for ``backbone``, this number is taken. Otherwise, if the table has a
    single number (for another backbone), this single number is taken. If the table has several
    numbers for other backbones, the choice is unclear, so the next table is searched.
    """
    for name in tables:
        numbers = published_tables()[name].get(key, ())
        for number in numbers:
            if number.backbone == backbone:
                return number
        if len(numbers) == 1:
            return numbers[0]
    return None
