"""The TOML file of a study: its models and their checks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from vilu.metrics.catalog import METRICS
from vilu.predictors import PREDICTORS
from vilu.predictors.contract.catalogue import find_method, method_names
from vilu.predictors.contract.parameters import build, check_parameters, parameters
from vilu.predictors.contract.predictor import FailurePredictor
from vilu_bench.studies.parts import RANKED_BY, Count, Data, Name, Names, Section, require_known
from vilu_bench.studies.views import AnyClaim, AnyView, Study


class Setting(Section):
    """What is fitted on, and what is tested on."""

    # labelled rows per class to fit on, a share of all of them (0.025), "all", or "none": all rows,
    # but no label
    budget: int | float | Literal["all", "none"] = "all"
    data: Names | None = None  # data sets to test on; by default all that make sense
    # which rows to test on; "validation" for choosing among methods
    test_on: Literal["validation", "test"] = "test"
    # captions that an image of the test set has to choose from; by default that of the data set
    pool_size: Annotated[int, Field(ge=2)] | None = None
    title: str | None = None  # for tables and figures, instead of the name
    x: float | None = None  # where the setting stands on the axis of a curve
    published: str | None = None  # what publications call it

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, value: object) -> object:
        is_word = value in ("all", "none")
        is_share = isinstance(value, float) and 0 < value < 1
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (is_word or is_share or is_number):
            raise ValueError(
                'must be "all", "none", a number of labels per class, at least 1, '
                "or a share of all, below 1"
            )
        return value

    @property
    def sources(self) -> Names:
        """Data sets to fit on that are not the one to test on."""
        return ()

    @property
    def amount(self) -> str:
        """The budget in words."""
        if self.budget == "all":
            return "all labels"
        if self.budget == "none":
            return "no label"
        if isinstance(self.budget, int):
            return f"{self.budget} labels per class"
        return f"{self.budget:.3g} of all labels"

    def describe(self, fitted: str = "") -> str:
        """In words: what is fitted on, then what else is not as usual."""
        text = fitted or self.amount
        if self.test_on == "validation":
            text += ", tested on the validation rows"
        if self.pool_size:
            text += f", pools of {self.pool_size}"
        return text

    def __str__(self) -> str:
        return self.describe()


class Labels(Setting):
    """Fitted and tested on one data set."""

    kind: Literal["labels"]


class FromOther(Setting):
    """Fitted on another data set."""

    source: str
    # allow the two to be embedded by one model at different picture sizes, which is refused
    # otherwise
    across_preprocessing: bool = False

    @property
    def sources(self) -> Names:
        """The source."""
        return (self.source,)


class Transfer(FromOther):
    """Fitted on another data set and tested as it is."""

    kind: Literal["transfer"]

    def __str__(self) -> str:
        return self.describe(f"fitted on {self.source} with {self.amount}")


class Adapt(FromOther):
    """Fitted on another data set with all its labels, then on ``budget`` labels of this."""

    kind: Literal["adapt"]

    @model_validator(mode="after")
    def _check_few(self) -> Self:
        if self.budget in ("all", "none"):
            raise ValueError("to adapt, give a budget: labels per class, or a share of them")
        return self

    def __str__(self) -> str:
        return self.describe(
            f"fitted on {self.source} with all labels, then on {self.amount} of its own"
        )


class Union(Setting):
    """Fitted on several data sets at once; class texts serve as captions (supplement, C.6)."""

    kind: Literal["union"]
    budget: Literal["all"] = "all"  # of each data set
    of: Annotated[Names, Field(min_length=1)]  # the data sets to fit on
    # captions that an image has to choose from in training
    train_pool_size: Annotated[int, Field(ge=2)] = 1024
    across_preprocessing: bool = False  # as for a transfer

    @property
    def sources(self) -> Names:
        """All of them."""
        return self.of

    def __str__(self) -> str:
        return self.describe(
            f"fitted on the union of {', '.join(self.of)} in pools of {self.train_pool_size}"
        )


class Unseen(Setting):
    """Fitted on half of the classes, tested on the other half; the seed draws the halves."""

    kind: Literal["unseen"]

    def __str__(self) -> str:
        return self.describe(f"fitted on the other half of the classes with {self.amount}")


AnySetting = Annotated[Labels | Transfer | Unseen | Adapt | Union, Field(discriminator="kind")]


MAX_EPOCHS = 300  # however few the training rows are; the heads' own limit


class Method(Section):
    """A method and how often it runs."""

    method: str | None = None  # name in ``PREDICTORS``; by default the label
    # hyper-parameters that differ from the defaults
    params: dict[str, Any] = Field(default_factory=dict)
    settings: Names | None = None
    data: Names | None = None  # only these data sets to test on
    seeds: Count | None = None  # only the first so many seeds
    # in place of ``epochs``: as many epochs as make about so many steps on the training rows at
    # hand
    steps: Count | None = None
    deterministic: bool = False  # whether scores depend on the seed through the training rows alone
    # whether all rows of the training set are given beside, without labels, those that the budget
    # leaves out, too
    unlabelled: bool = False
    title: str | None = None  # for tables and figures, instead of the label
    x: float | None = None  # where the method stands on the axis of a curve
    published: str | None = None  # what publications call it


class Trained(Section):
    """What holds for every method that trains a network, unless its own table says otherwise."""

    seeds: Count | None = None  # only the first so many seeds
    steps: Count | None = None  # in place of ``epochs``, as for a method
    settings: Names | None = None  # only these; an empty list: none of them runs


class Config(Section):
    """A benchmark."""

    # of the benchmark, and of its folder of tables and figures; by default that of the file
    name: Name = "benchmark"
    # Number of seeds, 0 ... seeds - 1: they draw training rows and class halves, and seed the
    # methods
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    resamples: Annotated[int, Field(ge=10)] = 1000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    metrics: Names = ("auroc", "fpr95", "augrc", "aurc", "ece")  # names of ``vilu.metrics.METRICS``
    device: str = "cpu"  # where methods run that have a choice, and models
    # every method, also those that ``methods`` does not name; always so when it names none
    all_methods: bool = False
    deterministic: Names = ()  # labels of methods to mark as deterministic, for short
    trained: Trained = Trained()  # for every method that trains a network
    data: Annotated[dict[Name, Data], Field(min_length=1)]
    settings: Annotated[dict[Name, AnySetting], Field(min_length=1)]
    methods: dict[Name, Method] = Field(default_factory=dict)
    study: Study | None = None
    views: tuple[AnyView, ...] = ()  # tables and figures to make; by default a ranking
    claims: tuple[AnyClaim, ...] = ()  # what is to be decided
    _guests: dict[str, Method] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        require_known("metric", self.metrics, METRICS)
        if not set(RANKED_BY) <= set(self.metrics):
            raise ValueError(f"metrics must name {' and '.join(RANKED_BY)}, which rank the methods")
        for label in self.methods:
            self._check_method(label)
        require_known("setting (trained)", self.trained.settings or (), self.settings)
        require_known("method (deterministic)", self.deterministic, self.entries)
        for name in self.settings:
            self._check_setting(name)
        return self

    def _check_method(self, label: str) -> None:
        method = self.methods[label]
        name = method.method or label
        require_known(f"method (methods.{label})", [name], method_names())
        require_known(f"setting (methods.{label})", method.settings or (), self.settings)
        require_known(f"data set (methods.{label})", method.data or (), self.data)
        if method.steps:
            takes_steps = is_trained(name) and "epochs" not in method.params
            if not takes_steps:
                raise ValueError(
                    f"methods.{label}: steps are for a method with epochs, and in place of them"
                )
        if method.unlabelled and not find_method(name).uses_unlabelled:
            raise ValueError(f"methods.{label}: {name} learns nothing from rows without labels")

    def _check_setting(self, name: str) -> None:
        setting = self.settings[name]
        named = [*setting.sources, *(setting.data or ())]
        require_known(f"data set (settings.{name})", named, self.data)
        tested = [data for data in self.data if self.is_tested_on(name, data)]
        if setting.test_on == "validation":
            self._check_validation(name, tested)
        if isinstance(setting, Union):
            self._check_union(name)
        draws_by_class = isinstance(setting, Unseen | Adapt) or not isinstance(setting.budget, str)
        if draws_by_class:
            # rows or classes are drawn of the data sets that are fitted on
            is_elsewhere = setting.sources and not isinstance(setting, Adapt)
            self._refuse_captions(name, setting.sources if is_elsewhere else tested)

    def _check_validation(self, setting: str, tested: Iterable[str]) -> None:
        for data in tested:
            if self.data[data].validation is None:
                raise ValueError(
                    f"settings.{setting} tests on validation rows, and data.{data} names none"
                )

    def _check_union(self, setting: str) -> None:
        for label, method in self.entries.items():
            if method.unlabelled and self.is_run_in(label, setting):
                raise ValueError(
                    f"methods.{label}: unlabelled goes with no union. "
                    f"Give its settings without {setting}"
                )

    def _refuse_captions(self, setting: str, fitted: Iterable[str]) -> None:
        for data in fitted:
            if self.data[data].captions:
                raise ValueError(
                    f"settings.{setting} draws rows or classes, and data.{data} has captions"
                )

    @model_validator(mode="after")
    def _check_presentation(self) -> Self:
        for name, count in Counter(view.name for view in self.views).items():
            if count > 1:
                raise ValueError(f"two views are called {name}, and would be one file")
        for view in self.views:
            view.check(self)
        for claim in self.claims:
            claim.check(self)
        return self

    @cached_property
    def entries(self) -> dict[str, Method]:
        """Every method that runs, by label, with all that holds for it."""
        methods = self.methods
        if self.all_methods or not methods:
            methods = {name: Method() for name in PREDICTORS} | methods
        return {label: self._complete(label, method) for label, method in methods.items()}

    def along(self, axis: str) -> Mapping[str, Data | Setting | Method]:
        """Methods by label, data sets or settings by name."""
        if axis == "method":
            return self.entries | self._guests
        if axis == "data":
            return self.data
        return self.settings

    def with_guests(self, made_by: Mapping[str, str]) -> Config:
        """The same with columns for methods that others ran, and for who did."""
        guests = {}
        for label, maker in made_by.items():
            guests[label] = Method(title=f"{label} ({maker or 'submitted'})")
        config = self.model_copy()
        config._guests = guests
        return config

    @property
    def guests(self) -> Names:
        """Labels of the methods that others ran."""
        return tuple(self._guests)

    def _complete(self, label: str, method: Method) -> Method:
        """A method with what holds for it by the tables beside its own."""
        name = method.method or label
        complete: dict[str, Any] = {"method": name}
        if label in self.deterministic:
            complete["deterministic"] = True
        if is_trained(name):
            complete["seeds"] = method.seeds or self.trained.seeds
            if method.settings is None:
                complete["settings"] = self.trained.settings
            if method.steps is None and "epochs" not in method.params:
                complete["steps"] = self.trained.steps
        return method.model_copy(update=complete)

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
        return find_method(str(self.entries[label].method))

    def is_run_in(self, label: str, setting: str) -> bool:
        """Whether a method is wanted in a setting: without labels, those alone that need none."""
        cls = self.class_of(label)
        needs_labels = cls.needs_fit and cls.needs_labels
        if needs_labels and self.settings[setting].budget == "none":
            return False
        wanted = self.entries[label].settings
        return wanted is None or setting in wanted

    def depends_on_seed(self, label: str) -> bool:
        """Whether scores can differ between seeds on the same training rows."""
        method = self.entries[label]
        if method.deterministic:
            return False
        if "seed" in method.params:
            return False
        return "seed" in parameters(self.class_of(label))

    def predictor(self, label: str, seed: int = 0) -> FailurePredictor:
        """A new predictor for a label."""
        cls = self.class_of(label)
        names = parameters(cls)
        params: dict[str, Any] = {}
        if "seed" in names:
            params["seed"] = seed
        if "device" in names:
            params["device"] = self.device
        predictor = build(cls, {**params, **self.entries[label].params})
        check_parameters(predictor)
        return predictor

    def epochs_for(self, label: str, step_rows: int, n_train: int) -> int | None:
        """Epochs that make about ``steps`` steps of ``step_rows``; None without ``steps``."""
        steps = self.entries[label].steps
        if steps is None:
            return None
        steps_per_epoch = math.ceil(n_train / step_rows)
        epochs = round(steps / steps_per_epoch)
        return min(max(epochs, 1), MAX_EPOCHS)


def is_trained(name: str) -> bool:
    """Whether a method trains a network, in steps of some rows."""
    return {"epochs", "batch_size"} <= parameters(find_method(name)).keys()
