"""How a study shows its results: tables, figures, claims of the paper, published numbers."""

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
from vilu_bench import asset
from vilu_bench.studies.parts import RANKED_BY, Name, Names, Section, require_known

Axis = Literal["method", "data", "setting"]
# what each axis is called in messages
AXES = {"method": "method", "data": "data set", "setting": "setting"}
FIELDS = (*AXES, "metric")


class Study(Section):
    """What the benchmark is about."""

    title: str  # in a few words
    reproduces: str = ""  # which table or figure of a publication, if any
    protocol: str = ""  # what was chosen, and where that differs from the publication
    published: Names = ()  # tables of published numbers that go with it (assets/published.csv)

    @field_validator("published")
    @classmethod
    def _check_published(cls, names: Names) -> Names:
        require_known("table of published numbers", names, published_tables())
        return names


class Placed(Protocol):
    """What may stand on the axis of a curve."""

    @property
    def x(self) -> float | None:
        """Where."""


class Known(Protocol):
    """What views and claims may name: the ``Config`` that they are part of."""

    metrics: Names

    def along(self, axis: str) -> Mapping[str, Placed]:
        """Methods by label, data sets or settings by name."""

    @property
    def guests(self) -> Names:
        """Labels of methods that others ran."""


def require_all(where: str, known: Known, chosen: Mapping[str, Names | None]) -> None:
    """Refuse what is not there with a ValueError."""
    for axis, names in chosen.items():
        if names is not None:
            require_known(f"{AXES[axis]} {where}", names, known.along(axis))


class View(Section):
    """A table or a figure."""

    with_intervals: ClassVar[bool] = False  # whether metrics without an interval cannot be shown
    with_guests: ClassVar[bool] = True  # whether methods that others ran go with the study's

    name: Name
    title: str
    methods: Names | None = None  # only these, in this order
    data: Names | None = None  # only these, in this order
    settings: Names | None = None  # only these, in this order
    metrics: Annotated[Names, Field(min_length=1)] = RANKED_BY  # what is shown
    mean: Names = ()  # data sets over which a mean is added; none: no mean
    means_only: bool = False  # whether the data sets by themselves are left out

    @property
    def averages(self) -> bool:
        """Whether it can show means over data sets."""
        return False

    @property
    def where(self) -> str:
        """For messages."""
        return f"(view {self.name})"

    @property
    def chosen(self) -> dict[str, Names | None]:
        """What is shown; None: all that there is."""
        return {"method": self.methods, "data": self.data, "setting": self.settings}

    def check(self, known: Known) -> None:
        """Refuse a view that names what is not there, or could not be shown, with a ValueError."""
        data = (*(self.data or ()), *self.mean)
        require_all(
            self.where,
            known,
            {"method": self.methods, "data": data, "setting": self.settings},
        )
        require_known(f"metric {self.where}", self.metrics, known.metrics)
        if self.means_only and not self.mean:
            raise ValueError(f"means_only needs a mean, as mean = [data sets] {self.where}")
        if self.mean and not self.averages:
            raise ValueError(
                "means are for tables, and for curves over something else than data sets "
                f"{self.where}"
            )
        if self.with_intervals:
            require_known(f"metric with an interval {self.where}", self.metrics, RANKED_BY)

    def along(self, known: Known, axis: str) -> dict[str, Placed]:
        """What is shown along an axis; guests go with methods that are side by side."""
        there = known.along(axis)
        names = [*(self.chosen[axis] or there)]
        takes_guests = axis == "method" and self.with_guests
        if takes_guests and len(names) > 1:
            names += known.guests
        return {name: there[name] for name in names}

    def as_table(self, rows: Names, columns: Names) -> TableView:
        """The numbers of a figure as a table."""
        same = {name: getattr(self, name) for name in View.model_fields}
        return TableView(kind="table", rows=rows, columns=columns, **same)


class TableView(View):
    """Values with intervals; the best and the second best of those that compete are marked."""

    kind: Literal["table"]
    # what a row stands for; what neither rows nor columns name must be one and the same
    rows: Names = ("method",)
    columns: Names = ("data", "metric")  # what a column stands for
    compete: Names = ("method",)  # values that differ in these alone compete

    @property
    def averages(self) -> bool:
        """Always."""
        return True

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        for names in (self.rows, self.columns, self.compete):
            require_known("field", names, FIELDS)
        for name, count in Counter((*self.rows, *self.columns)).items():
            if count > 1:
                raise ValueError(f"{name} is both in the rows and in the columns")
        return self

    def check(self, known: Known) -> None:
        """Also refuse a table in which two numbers would stand in one cell."""
        super().check(known)
        shown = {axis: tuple(self.along(known, axis)) for axis in AXES}
        shown["metric"] = self.metrics
        if self.means_only:
            shown["data"] = ("mean",)
        for field, names in shown.items():
            if field not in (*self.rows, *self.columns) and len(names) > 1:
                raise ValueError(
                    f"the view {self.name} has several values of {field} ({', '.join(names)}), "
                    "and neither rows nor columns name it"
                )


class CurveView(View):
    """A metric against a number: a line with intervals for every method, data set or setting."""

    with_intervals: ClassVar[bool] = True
    kind: Literal["curve"]
    x: Axis = "setting"  # whose ``x`` is the axis
    line: Axis = "method"  # what a line stands for
    panel: Axis = "data"  # what a panel stands for, beside the metric
    x_label: str  # of the axis
    log: bool = False  # whether the axis is logarithmic
    # what is said at a place of the axis, instead of its number
    ticks: dict[str, str] = Field(default_factory=dict)

    @property
    def averages(self) -> bool:
        """Unless data sets are its axis."""
        return self.x != "data"

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        if len({self.x, self.line, self.panel}) < 3:
            raise ValueError("x, line and panel must be three different things")
        return self

    def check(self, known: Known) -> None:
        """Also refuse an axis without a point."""
        super().check(known)
        if all(place.x is None for place in self.along(known, self.x).values()):
            raise ValueError(f"no {self.x} has an x to stand on the axis {self.where}")


class ScatterView(View):
    """A metric against the zero-shot accuracy: points by data set and setting, lines by method."""

    with_intervals: ClassVar[bool] = True
    kind: Literal["scatter"]


class HistogramView(View):
    """Uncertainties of right and wrong answers: a panel by data set and method, the first seed."""

    with_guests: ClassVar[bool] = False  # it is drawn from the files of a run folder
    kind: Literal["histograms"]


class GridView(View):
    """Two hyper-parameters: the best pair in one setting chooses what another setting reports."""

    with_guests: ClassVar[bool] = False  # it is of parameters
    kind: Literal["grid"]
    parameters: tuple[str, str]  # names of the two, rows first
    select_on: str  # setting that chooses
    report_on: str  # setting that is reported

    def check(self, known: Known) -> None:
        """Also refuse a choice by a metric without interval, or in a setting that is not there."""
        super().check(known)
        require_known(f"metric with an interval {self.where}", self.metrics[:1], RANKED_BY)
        require_all(self.where, known, {"setting": (self.select_on, self.report_on)})


class RankingView(View):
    """Every method of every data set and setting, best first, with wins and mean ranks."""

    kind: Literal["ranking"]

    def check(self, known: Known) -> None:
        """Also refuse a choice: it is of everything."""
        super().check(known)
        if any(self.chosen.values()) or self.metrics != RANKED_BY:
            raise ValueError(
                f"a ranking is of everything, so there is nothing to choose {self.where}"
            )


AnyView = Annotated[
    TableView | CurveView | ScatterView | HistogramView | GridView | RankingView,
    Field(discriminator="kind"),
]


class Subject(Section):
    """A method in a setting."""

    method: str
    setting: str


class Claim(Section):
    """What a publication says, in our words; a number and its interval decide it."""

    says: str
    source: str  # where it is said
    data: Names | None = None  # data sets that it is decided on: the number is a mean over them
    metric: str = RANKED_BY[0]

    @property
    @abstractmethod
    def subjects(self) -> tuple[Names, Names]:
        """Methods and settings that it is about."""

    def check(self, known: Known) -> None:
        """Refuse a claim on what is not there, or that nothing could decide, with a ValueError."""
        require_all("(claim)", known, {"data": self.data})
        require_known("metric (claim)", [self.metric], RANKED_BY)
        methods, settings = self.subjects
        require_all("(claim)", known, {"method": methods, "setting": settings})


class Better(Claim):
    """One method (in a setting) is better than another, by the mean over the data sets."""

    kind: Literal["better"]
    better: Subject
    than: Subject

    @property
    def subjects(self) -> tuple[Names, Names]:
        """Both."""
        return (self.better.method, self.than.method), (self.better.setting, self.than.setting)


class Trend(Claim):
    """A metric of a method rises or falls along the ``x`` of the settings, by its log2 slope."""

    kind: Literal["trend"]
    method: str
    settings: Annotated[Names, Field(min_length=2)]  # with their ``x``
    metric_goes: Literal["up", "down"]  # direction

    @property
    def subjects(self) -> tuple[Names, Names]:
        """The method, and all settings of the line."""
        return (self.method,), self.settings

    def check(self, known: Known) -> None:
        """Also refuse settings that have no point on a logarithmic axis."""
        super().check(known)
        x = [known.along("setting")[name].x for name in self.settings]
        on_axis = [place for place in x if place is not None and place > 0]
        if len(on_axis) < len(x) or len(set(on_axis)) < 2:
            raise ValueError(
                f"the trend of {self.method} needs settings with different x above zero"
            )


class Steeper(Claim):
    """A metric rises more with the zero-shot accuracy for one method than for another."""

    kind: Literal["steeper"]
    steeper: str
    than: str
    settings: Names

    @property
    def subjects(self) -> tuple[Names, Names]:
        """Both methods, and all settings."""
        return (self.steeper, self.than), self.settings


AnyClaim = Annotated[Better | Trend | Steeper, Field(discriminator="kind")]


PublishedKey = tuple[str, str, str, str]
"""Data set, setting, method, metric; each as publications are entered in the file."""


@dataclass(frozen=True)
class Published:
    """A number of a publication."""

    value: float  # the metric, as a fraction
    backbone: str  # the model behind it (``vilu.backbones.catalog``)
    source: str  # where it stands
    doubt: str  # why it is doubtful; "" where nothing speaks against it


@cache
def published_tables() -> dict[str, dict[PublishedKey, tuple[Published, ...]]]:
    """Every published table by name: its numbers by key, one for each backbone."""
    tables: dict[str, dict[PublishedKey, tuple[Published, ...]]] = {}
    text = asset("published.csv")
    for row in parse_csv(text.splitlines(), "published.csv")[1]:
        key = row["dataset"], row["setting"], row["method"], row["metric"]
        cells = tables.setdefault(row["table"], {})
        value = round(float(row["percent"]) / 100, 6)
        number = Published(value, row["backbone"], row["source"], row["doubt"])
        before = cells.get(key, ())
        if number.backbone in {earlier.backbone for earlier in before}:
            raise DataError(
                f"published.csv has {row['table']}, {', '.join(key)} twice for {number.backbone}."
            )
        cells[key] = (*before, number)
    return tables


def find_published(tables: Sequence[str], key: PublishedKey, backbone: str) -> Published | None:
    """The number of the first table that has one of this backbone, or of one backbone alone.

    Numbers of several other backbones are none: which of them would be meant, nobody knows.
    """
    for name in tables:
        numbers = published_tables()[name].get(key, ())
        for number in numbers:
            if number.backbone == backbone:
                return number
        if len(numbers) == 1:
            return numbers[0]
    return None
