"""What a benchmark consists of."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from vilu.benchmark.checks import check_claims, check_views
from vilu.benchmark.parts import Count, Data, Model, Name, Names, require_known
from vilu.benchmark.presentation import AnyClaim, AnyView, Study
from vilu.benchmark.resampling import RANKED_BY
from vilu.benchmark.settings import Adapt, AnySetting, Union, Unseen
from vilu.metrics.catalog import METRICS
from vilu.predictors import PREDICTORS
from vilu.predictors.base import FailurePredictor
from vilu.predictors.parameters import build, check_parameters, parameters

MAX_EPOCHS = 300
"""However few the training rows are; the heads' own limit."""


class Method(Model):
    """A method and how often it runs.

    Attributes:
        method: Name in ``PREDICTORS``; by default the label.
        params: Hyper-parameters that differ from the defaults.
        settings: Only these settings.
        data: Only these data sets to test on.
        seeds: Only the first so many seeds.
        steps: In place of ``epochs``: as many epochs as make about so many steps on the training rows at hand.
        deterministic: Whether scores depend on the seed through the training rows alone.
        title: For tables and figures, instead of the label.
        x: Where the method stands on the axis of a curve.
        published: What publications call it.
    """

    method: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    settings: Names | None = None
    data: Names | None = None
    seeds: Count | None = None
    steps: Count | None = None
    deterministic: bool = False
    title: str | None = None
    x: float | None = None
    published: str | None = None


class Trained(Model):
    """What holds for every method that trains a network, unless its own table says otherwise.

    Attributes:
        seeds: Only the first so many seeds.
        steps: In place of ``epochs``, as for a method.
    """

    seeds: Count | None = None
    steps: Count | None = None


class Config(Model):
    """A benchmark.

    Attributes:
        name: Of the benchmark, and of its folder of tables and figures; by default that of the file.
        seeds: Number of seeds, 0 ... seeds - 1: they draw training rows and class halves, and seed the methods.
        resamples: Bootstrap resamples.
        confidence: Coverage of the intervals.
        metrics: Names of ``vilu.metrics.METRICS``.
        device: Where methods run that have a choice, and models.
        all_methods: Every method, also those that ``methods`` does not name; always so when it names none.
        deterministic: Labels of methods to mark as deterministic, for short.
        trained: For every method that trains a network.
        data: Data sets by name.
        settings: Settings by name.
        methods: Methods by label.
        study: What it is about.
        views: Tables and figures to make; by default a ranking.
        claims: What is to be decided.
    """

    name: Name = "benchmark"
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    resamples: Annotated[int, Field(ge=10)] = 1000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    metrics: Names = ("auroc", "fpr95", "augrc", "aurc", "ece")
    device: str = "cpu"
    all_methods: bool = False
    deterministic: Names = ()
    trained: Trained = Trained()
    data: Annotated[dict[Name, Data], Field(min_length=1)]
    settings: Annotated[dict[Name, AnySetting], Field(min_length=1)]
    methods: dict[Name, Method] = Field(default_factory=dict)
    study: Study | None = None
    views: tuple[AnyView, ...] = ()
    claims: tuple[AnyClaim, ...] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        require_known("metric", self.metrics, METRICS)
        missing = [name for name in RANKED_BY if name not in self.metrics]
        if missing:
            raise ValueError(f"metrics must name {' and '.join(RANKED_BY)}, which rank the methods")
        for name in self.settings:
            self._check_setting(name)
        for label, method in self.methods.items():
            require_known(f"method (methods.{label})", [method.method or label], PREDICTORS)
            require_known(f"setting (methods.{label})", method.settings or (), self.settings)
            require_known(f"data set (methods.{label})", method.data or (), self.data)
            if method.steps and ("epochs" in method.params or not is_trained(method.method or label)):
                raise ValueError(f"methods.{label}: steps are for a method with epochs, and in place of them")
        require_known("method (deterministic)", self.deterministic, self.entries)
        return self

    def _check_setting(self, name: str) -> None:
        setting = self.settings[name]
        require_known(f"data set (settings.{name})", [*setting.sources, *(setting.data or ())], self.data)
        tested = [data for data in self.data if self.is_tested_on(name, data)]
        for data in tested:
            if setting.test_on == "validation" and self.data[data].validation is None:
                raise ValueError(f"settings.{name} tests on validation rows, and data.{data} names none")
        by_class = isinstance(setting, Unseen | Adapt) or setting.budget != "all"
        fitted = setting.sources if setting.sources and not isinstance(setting, Adapt) else tested
        pairs = [data for data in fitted if self.data[data].captions]
        if pairs and by_class:
            raise ValueError(f"settings.{name} draws rows or classes, and data.{pairs[0]} has captions")

    @model_validator(mode="after")
    def _check_presentation(self) -> Self:
        for check in (check_views, check_claims):
            check(self)
        return self

    @cached_property
    def entries(self) -> dict[str, Method]:
        """Every method that runs, by label, with all that holds for it."""
        every = {name: Method() for name in PREDICTORS} if self.all_methods or not self.methods else {}
        return {label: self._complete(label, method) for label, method in (every | self.methods).items()}

    def _complete(self, label: str, method: Method) -> Method:
        name = method.method or label
        more: dict[str, Any] = {"method": name, "deterministic": method.deterministic or label in self.deterministic}
        if is_trained(name):
            more["seeds"] = method.seeds or self.trained.seeds
            more["steps"] = method.steps or (None if "epochs" in method.params else self.trained.steps)
        return method.model_copy(update=more)

    def complete(self) -> Config:
        """The same with every method named, so that it means the same where there are others."""
        return self.model_copy(update={"methods": self.entries, "all_methods": False})

    def is_tested_on(self, setting: str, data: str) -> bool:
        """Whether a setting makes sense on a data set and is wanted there."""
        chosen = self.settings[setting]
        if data in chosen.sources and not isinstance(chosen, Union):
            return False
        return chosen.data is None or data in chosen.data

    def class_of(self, label: str) -> type[FailurePredictor]:
        """The class behind a label."""
        return PREDICTORS[str(self.entries[label].method)]

    def depends_on_seed(self, label: str) -> bool:
        """Whether scores can differ between seeds on the same training rows."""
        method = self.entries[label]
        random = "seed" in parameters(self.class_of(label)) and "seed" not in method.params
        return random and not method.deterministic

    def predictor(self, label: str, seed: int = 0) -> FailurePredictor:
        """A new predictor for a label.

        Raises:
            UsageError: If a hyper-parameter cannot be.
        """
        cls = self.class_of(label)
        given = {"seed": seed, "device": self.device}
        defaults = {name: value for name, value in given.items() if name in parameters(cls)}
        predictor = build(cls, {**defaults, **self.entries[label].params})
        check_parameters(predictor)
        return predictor

    def epochs_for(self, label: str, step_rows: int, n_train: int) -> int | None:
        """The number of epochs that ``steps`` of so many rows mean on so many training rows; None without ``steps``."""
        steps = self.entries[label].steps
        if steps is None:
            return None
        return min(max(round(steps / math.ceil(n_train / step_rows)), 1), MAX_EPOCHS)


def is_trained(name: str) -> bool:
    """Whether a method trains a network, in steps of some rows."""
    return {"epochs", "batch_size"} <= parameters(PREDICTORS[name]).keys()
