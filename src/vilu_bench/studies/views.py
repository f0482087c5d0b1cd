"""How a study shows what it found: tables, figures, what the paper claims of it, and its numbers to stand beside."""

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
AXES = {
    "method": "method",
    "data": "data set",
    "setting": "setting",
}  # what each is called in messages
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
        require_known(f"{AXES[axis]} {where}", names or (), known.along(axis))


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
        require_all(self.where, known, {**self.chosen, "data": (*(self.data or ()), *self.mean)})
        require_known(f"metric {self.where}", self.metrics, known.metrics)
        if self.means_only and not self.mean:
            raise ValueError(f"means_only needs a mean, as mean = [data sets] {self.where}")
        if self.mean and not self.averages:
            raise ValueError(
                f"means are for tables, and for curves over something else than data sets {self.where}"
            )
        if self.with_intervals:
            require_known(f"metric with an interval {self.where}", self.metrics, RANKED_BY)

    def places(self, known: Known, axis: str) -> dict[str, Placed]:
        """What is shown along an axis; where methods are side by side, those of others go with them."""
        there = known.along(axis)
        names = self.chosen[axis] or there
        guests = known.guests if axis == "method" and self.with_guests and len(names) > 1 else ()
        return {name: there[name] for name in (*names, *guests)}

    def as_table(self, rows: Names, columns: Names) -> TableView:
        """The numbers of a figure as a table."""
        same = {name: getattr(self, name) for name in View.model_fields}
        return TableView(kind="table", rows=rows, columns=columns, **same)


class TableView(View):
    """Values with intervals; the best and the second best of those that compete are marked."""

    kind: Literal["table"]
    rows: Names = (
        "method",
    )  # what a row stands for; what neither rows nor columns name must be one and the same
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
        if twice := [
            name for name, count in Counter((*self.rows, *self.columns)).items() if count > 1
        ]:
            raise ValueError(f"{twice[0]} is both in the rows and in the columns")
        return self

    def check(self, known: Known) -> None:
        """Also refuse a table in which two numbers would stand in one cell."""
        super().check(known)
        several = {axis: tuple(self.places(known, axis)) for axis in AXES} | {
            "metric": self.metrics
        }
        if self.means_only:
            several["data"] = ("mean",)
        for field, names in several.items():
            if field not in (*self.rows, *self.columns) and len(names) > 1:
                raise ValueError(
                    f"the view {self.name} has several values of {field} ({', '.join(names)}), and neither rows nor "
                    "columns name it"
                )


class CurveView(View):
    """A metric against a number, a line for every method (or data set, or setting), with its interval."""

    with_intervals: ClassVar[bool] = True
    kind: Literal["curve"]
    x: Axis = "setting"  # whose ``x`` is the axis
    line: Axis = "method"  # what a line stands for
    panel: Axis = "data"  # what a panel stands for, beside the metric
    x_label: str  # of the axis
    log: bool = False  # whether the axis is logarithmic
    ticks: dict[str, str] = Field(
        default_factory=dict
    )  # what is said at a place of the axis, instead of its number

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
        """Also refuse points without place."""
        super().check(known)
        if all(place.x is None for place in self.places(known, self.x).values()):
            raise ValueError(f"no {self.x} has an x to stand on the axis {self.where}")


class ScatterView(View):
    """A metric against the zero-shot accuracy, a point a data set and setting, a trend line a method."""

    with_intervals: ClassVar[bool] = True
    kind: Literal["scatter"]


class HistogramView(View):
    """Uncertainties of right and of wrong answers, a panel for every data set and method, of the first seed."""

    with_guests: ClassVar[bool] = False  # it is drawn from the files of a run folder
    kind: Literal["histograms"]


class GridView(View):
    """Two hyper-parameters against each other; the best value in one setting chooses what is reported of another."""

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
    """Every method of every data set and setting, best first, with wins and mean ranks over all of them."""

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
    """Something that a publication says, in our words, to be decided by a number and its interval."""

    says: str
    source: str  # where it is said
    data: Names | None = None  # data sets that it is decided on: the number is a mean over them
    metric: str = RANKED_BY[0]

    @property
    @abstractmethod
    def subjects(self) -> tuple[Names, Names]:
        """Methods and settings that it is about."""

    def check(self, known: Known) -> None:
        """Refuse a claim that names what is not there, or could not be decided, with a ValueError."""
        require_all("(claim)", known, {"data": self.data})
        require_known("metric (claim)", [self.metric], RANKED_BY)
        require_all("(claim)", known, dict(zip(("method", "setting"), self.subjects, strict=True)))


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
    """A metric of a method rises or falls along the ``x`` of the settings, by the slope over log2 x."""

    kind: Literal["trend"]
    method: str
    settings: Annotated[Names, Field(min_length=2)]  # with their ``x``
    metric_goes: Literal["up", "down"]  # direction

    @property
    def subjects(self) -> tuple[Names, Names]:
        """The method, and all settings of the line."""
        return (self.method,), self.settings

    def check(self, known: Known) -> None:
        """Also refuse settings without places on a logarithmic axis."""
        super().check(known)
        x = [known.along("setting")[name].x for name in self.settings]
        if any(value is None or value <= 0 for value in x) or len(set(x)) < 2:
            raise ValueError(
                f"the trend of {self.method} needs settings with different x above zero"
            )


class Steeper(Claim):
    """A metric depends more on the zero-shot accuracy for one method than for another, by the slopes of trend lines."""

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
    """Every published table by name: numbers by data set, setting, method and metric, one for each backbone."""
    tables: dict[str, dict[PublishedKey, tuple[Published, ...]]] = {}
    text = asset("published.csv")
    for row in parse_csv(text.splitlines(), "published.csv")[1]:
        key = row["dataset"], row["setting"], row["method"], row["metric"]
        cells = tables.setdefault(row["table"], {})
        number = Published(
            round(float(row["percent"]) / 100, 6), row["backbone"], row["source"], row["doubt"]
        )
        if any(other.backbone == number.backbone for other in cells.get(key, ())):
            raise DataError(
                f"published.csv has {row['table']}, {', '.join(key)} twice for {number.backbone}."
            )
        cells[key] = (*cells.get(key, ()), number)
    return tables


def find_published(tables: Sequence[str], key: PublishedKey, backbone: str) -> Published | None:
    """The number of the first of some tables that has one: of this backbone, or of the only one there is.

    Numbers of several other backbones are none: which of them would be meant, nobody knows.
    """
    for name in tables:
        found = published_tables()[name].get(key, ())
        same = [number for number in found if number.backbone == backbone]
        if same or len(found) == 1:
            return (same or list(found))[0]
    return None
