"""How a study shows what it found: tables, figures, and what the paper claims of it."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from vilu.benchmark.parts import RANKED_BY, Name, Names, Section, require_known
from vilu.benchmark.published import published_tables

Axis = Literal["method", "data", "setting"]
FIELDS = ("method", "data", "setting", "metric")


class Study(Section):
    """What the benchmark is about."""

    title: str  # in a few words
    reproduces: str = ""  # which table or figure of a publication, if any
    protocol: str = ""  # what was chosen, and where that differs from the publication
    published: Names = ()  # tables of published numbers that go with it (``vilu.benchmark.published``)

    @field_validator("published")
    @classmethod
    def _check_published(cls, names: Names) -> Names:
        require_known("table of published numbers", names, published_tables())
        return names


class View(Section):
    """A table or a figure."""

    name: Name
    title: str
    methods: Names | None = None  # only these, in this order
    data: Names | None = None  # only these, in this order
    settings: Names | None = None  # only these, in this order
    metrics: Annotated[Names, Field(min_length=1)] = RANKED_BY  # what is shown

    def as_table(self, rows: Names, columns: Names) -> TableView:
        """The numbers of a figure as a table."""
        same = {name: getattr(self, name) for name in View.model_fields}
        return TableView(kind="table", rows=rows, columns=columns, **same)


class TableView(View):
    """Values with intervals; the best and the second best of those that compete are marked."""

    kind: Literal["table"]
    rows: Names = ("method",)  # what a row stands for; what neither rows nor columns name must be one and the same
    columns: Names = ("data", "metric")  # what a column stands for
    mean: Names = ()  # data sets over which a mean is added; none: no mean
    compete: Names = ("method",)  # values that differ in these alone compete

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        for names in (self.rows, self.columns, self.compete):
            require_known("field", names, FIELDS)
        twice = [name for name, count in Counter((*self.rows, *self.columns)).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} is both in the rows and in the columns")
        return self


class CurveView(View):
    """A metric against a number, a line for every method (or data set, or setting), with its interval."""

    kind: Literal["curve"]
    x: Axis = "setting"  # whose ``x`` is the axis
    line: Axis = "method"  # what a line stands for
    panel: Axis = "data"  # what a panel stands for, beside the metric
    x_label: str  # of the axis
    log: bool = False  # whether the axis is logarithmic

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        if len({self.x, self.line, self.panel}) < 3:
            raise ValueError("x, line and panel must be three different things")
        return self


class ScatterView(View):
    """A metric against the zero-shot accuracy, a point a data set and setting, a trend line a method."""

    kind: Literal["scatter"]


class HistogramView(View):
    """Uncertainties of right and of wrong answers, a panel for every data set and method, of the first seed."""

    kind: Literal["histograms"]


class GridView(View):
    """Two hyper-parameters against each other; the best value in one setting chooses what is reported of another."""

    kind: Literal["grid"]
    parameters: tuple[str, str]  # names of the two, rows first
    select_on: str  # setting that chooses
    report_on: str  # setting that is reported


class RankingView(View):
    """Every method of every data set and setting, best first, with wins and mean ranks over all of them."""

    kind: Literal["ranking"]


AnyView = Annotated[
    TableView | CurveView | ScatterView | HistogramView | GridView | RankingView, Field(discriminator="kind")
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


class Better(Claim):
    """One method (in a setting) is better than another, by the mean over the data sets."""

    kind: Literal["better"]
    better: Subject
    than: Subject


class Trend(Claim):
    """A metric of a method rises or falls along the ``x`` of the settings, by the slope over log2 x."""

    kind: Literal["trend"]
    method: str
    settings: Annotated[Names, Field(min_length=2)]  # with their ``x``
    metric_goes: Literal["up", "down"]  # direction


class Steeper(Claim):
    """A metric depends more on the zero-shot accuracy for one method than for another, by the slopes of trend lines."""

    kind: Literal["steeper"]
    steeper: str
    than: str
    settings: Names


AnyClaim = Annotated[Better | Trend | Steeper, Field(discriminator="kind")]
