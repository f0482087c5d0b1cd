"""Pydantic models for a benchmark's TOML file, with checks of its content."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from vilu.errors import UsageError
from vilu.metrics.catalog import METRICS
from vilu.predictors import PREDICTORS
from vilu.predictors.contract.catalogue import find_method, method_names
from vilu.predictors.contract.parameters import build_predictor, check_parameters, parameters
from vilu.predictors.contract.predictor import FailurePredictor
from vilu_bench.studies.parts import (
    RANKING_ACROSS_ANSWERS,
    RANKING_METRICS,
    Count,
    Data,
    Name,
    Names,
    Section,
    require_known,
)
from vilu_bench.studies.views import AnyClaim, AnyView, Study


class Setting(Section):
    """Chooses the rows to fit methods on and the rows to test methods on."""

    # Labels to fit on. An int is a number of labels per class. A float (such as 0.025) is a share
    # of all labels. "all" takes all labels. "none" takes all rows, without the labels.
    budget: int | float | Literal["all", "none"] = "all"
    # Data sets to test on, by default all. An ``OtherSourceSetting`` never tests on its ``source``.
    data: Names | None = None
    # Which rows to test on. "validation" is for a choice among methods.
    test_on: Literal["validation", "test"] = "test"
    # number of captions in a test pool, by default the data set's number
    pool_size: Annotated[int, Field(ge=2)] | None = None
    seeds: Count | None = None  # number of seeds to run, from seed 0, by default all
    title: str | None = None  # title in tables and figures, by default the name
    x: float | None = None  # position on a curve's axis
    published: str | None = None  # the setting's name in publications

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, value: object) -> object:
        """Refuse a budget that is not a word, a share, or a number of labels."""
        is_word = value in ("all", "none")
        is_share = isinstance(value, float) and 0 < value < 1
        is_bool = isinstance(value, bool)  # in Python a bool is an int, too
        is_number = isinstance(value, int) and not is_bool and value >= 1
        if not (is_word or is_share or is_number):
            raise ValueError(
                'must be "all", "none", a number of labels per class, at least 1, '
                "or a share of all, below 1"
            )
        return value

    @property
    def sources(self) -> Names:
        """Data sets to fit on that the setting names, empty for a fit on the tested data set."""
        return ()

    @property
    def budget_text(self) -> str:
        """The budget as text."""
        if self.budget == "all":
            return "all labels"
        if self.budget == "none":
            return "no label"
        if isinstance(self.budget, int):
            return f"{self.budget} labels per class"
        return f"{self.budget:.3g} of all labels"

    def describe(self, fitted_on: str = "") -> str:
        """Describe the rows to fit on, and everything else that differs from the defaults.

        Args:
            fitted_on: Text about the rows to fit on, by default the budget.
        """
        text = fitted_on or self.budget_text
        if self.test_on == "validation":
            text += ", tested on the validation rows"
        if self.pool_size:
            text += f", pools of {self.pool_size}"
        return text

    def __str__(self) -> str:
        return self.describe()


class LabelsSetting(Setting):
    """Setting in which methods are fitted and tested on the same data set."""

    kind: Literal["labels"]


class OtherSourceSetting(Setting):
    """Setting with a fit on ``source``, which is not the tested data set."""

    source: str
    # Whether ``source`` and the tested data set may be embedded with different preprocessing, such
    # as different picture sizes. The model must be the same.
    across_preprocessing: bool = False

    @property
    def sources(self) -> Names:
        """The single data set to fit on."""
        return (self.source,)


class TransferSetting(OtherSourceSetting):
    """Setting with a single fit, on ``source``."""

    kind: Literal["transfer"]

    def __str__(self) -> str:
        return self.describe(f"fitted on {self.source} with {self.budget_text}")


class AdaptSetting(OtherSourceSetting):
    """Setting with two fits: first on ``source``, then on ``budget`` of the tested data set."""

    kind: Literal["adapt"]

    @model_validator(mode="after")
    def _require_budget(self) -> Self:
        if self.budget in ("all", "none"):
            raise ValueError("to adapt, give a budget: labels per class, or a share of them")
        return self

    def __str__(self) -> str:
        return self.describe(
            f"fitted on {self.source} with all labels, then on {self.budget_text} of its own"
        )


class UnionSetting(Setting):
    """Setting with one fit on several data sets.

    Class texts serve as captions (ViLU paper, supplement C.6).
    """

    kind: Literal["union"]
    budget: Literal["all"] = "all"  # all labels of each data set
    of: Annotated[Names, Field(min_length=1)]  # data sets to fit on
    # number of captions in a training pool
    train_pool_size: Annotated[int, Field(ge=2)] = 1024
    # Whether the data sets may be embedded with different preprocessing, such as different picture
    # sizes. The model must be the same.
    across_preprocessing: bool = False

    @property
    def sources(self) -> Names:
        """The data sets of the union."""
        return self.of

    def __str__(self) -> str:
        data = ", ".join(self.of)
        return self.describe(f"fitted on the union of {data} in pools of {self.train_pool_size}")


class UnseenSetting(Setting):
    """Setting with a fit on half of the classes, and a test on the remaining half.

    The seed draws the halves.
    """

    kind: Literal["unseen"]

    def __str__(self) -> str:
        return self.describe(f"fitted on the other half of the classes with {self.budget_text}")


AnySetting = Annotated[
    LabelsSetting | TransferSetting | UnseenSetting | AdaptSetting | UnionSetting,
    Field(discriminator="kind"),
]


MAX_EPOCHS = 300  # maximum epoch count that ``steps`` may give; default counts have the same bound


class Method(Section):
    """A method to run, with its hyper-parameters, settings, data sets and seeds.

    The method's label is its key in ``Config.methods``.
    """

    method: str | None = None  # name in ``PREDICTORS``, by default the label
    # hyper-parameters with values different from the defaults
    params: dict[str, Any] = Field(default_factory=dict)
    settings: Names | None = None  # settings to run in, by default all
    data: Names | None = None  # data sets to test on, by default all
    seeds: Count | None = None  # number of seeds to run, from seed 0, by default all
    # Total number of training steps, in place of ``epochs``. The epoch count follows from the
    # number of training rows.
    steps: Count | None = None
    # whether the same training rows give the same scores, whatever the seed
    deterministic: bool = False
    # Whether the fit also gets all training rows without their labels. Rows outside the budget are
    # included.
    unlabelled: bool = False
    title: str | None = None  # title in tables and figures, by default the label
    x: float | None = None  # position on a curve's axis
    published: str | None = None  # the method's name in publications


class TrainedDefaults(Section):
    """Defaults for all methods that train a network. A method's own table has precedence."""

    seeds: Count | None = None  # number of seeds to run, from seed 0
    steps: Count | None = None  # total number of training steps, in place of ``epochs``
    # Settings to run in. With an empty list, these methods do not run.
    settings: Names | None = None


class Config(Section):
    """Content of a benchmark file."""

    # Name for the benchmark and for the folder with tables and figures. By default the file's name.
    name: Name = "benchmark"
    # Number of seeds to run: 0, 1, ..., seeds - 1. Each seed draws training rows and class halves,
    # and is the random seed for the methods.
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    resamples: Annotated[int, Field(ge=10)] = 1000  # number of bootstrap resamples
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95  # confidence level of intervals
    metrics: Names = ("auroc", "fpr95", "augrc", "aurc", "ece")  # names of ``vilu.metrics.METRICS``
    device: str = "cpu"  # device for the models, and for methods with a device parameter
    # Whether to run every method, in addition to ``methods``. If ``methods`` is empty, every method
    # is run in any case.
    all_methods: bool = False
    # Labels of deterministic methods. ``deterministic = true`` in a method's table means the same.
    deterministic: Names = ()
    trained: TrainedDefaults = TrainedDefaults()  # defaults for methods that train a network
    data: Annotated[dict[Name, Data], Field(min_length=1)]
    settings: Annotated[dict[Name, AnySetting], Field(min_length=1)]
    methods: dict[Name, Method] = Field(default_factory=dict)
    study: Study | None = None
    views: tuple[AnyView, ...] = ()  # tables and figures to make, by default a ranking
    claims: tuple[AnyClaim, ...] = ()  # a publication's claims to check
    # submitted methods by label, to show beside the study's own methods
    _submitted_methods: dict[str, Method] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        """Refuse undefined names, contradictory tables, and a benchmark in which nothing runs."""
        require_known("metric", self.metrics, METRICS)
        if self.judges_adapted_answers:
            self._check_across_answers()
        if not set(self.ranking_metrics) <= set(self.metrics):
            ranking = " and ".join(self.ranking_metrics)
            raise ValueError(f"metrics must name {ranking}, which rank the methods")
        for label in self.methods:
            self._check_method(label)
        require_known("setting (trained)", self.trained.settings or (), self.settings)
        require_known("method (deterministic)", self.deterministic, self.method_entries)
        for name in self.settings:
            self._check_setting(name)
        self._require_cells()
        return self

    def _require_cells(self) -> None:
        """Refuse a benchmark in which no method runs."""
        for setting, data in itertools.product(self.settings, self.data):
            if not self.is_tested_on(setting, data):
                continue
            for label, method in self.method_entries.items():
                is_run_on_data = method.data is None or data in method.data
                if is_run_on_data and self.is_run_in(label, setting):
                    return
        raise ValueError(
            "no method runs on any data set. A setting with the budget 'none' runs only methods "
            "that need no labels. A transfer is not tested on its source. Add a setting, a data "
            "set or a method."
        )

    @property
    def judges_adapted_answers(self) -> bool:
        """Whether any method judges adapted answers. If so, methods judge different answers."""
        return any(method.params.get("answer") == "adapted" for method in self.methods.values())

    @property
    def ranking_metrics(self) -> Names:
        """Metrics with intervals. The first metric ranks the methods."""
        return RANKING_ACROSS_ANSWERS if self.judges_adapted_answers else RANKING_METRICS

    @property
    def strata(self) -> str:
        """Text on the bootstrap's strata."""
        # With strata, every resample has as many wrong rows as the test set. This is impossible if
        # methods judge different answers, because different rows are then wrong for each method.
        return "without strata" if self.judges_adapted_answers else "stratified by failure"

    def _check_across_answers(self) -> None:
        """Refuse metrics that cannot compare methods with different answers."""
        allowed = [name for name, metric in METRICS.items() if metric.across_answers]
        for name in self.metrics:
            if name not in allowed:
                raise ValueError(
                    f"metrics: {name} compares nothing here, because a method judges adapted "
                    "answers, which are wrong in other rows than zero-shot answers. Choose from: "
                    f"{', '.join(allowed)}"
                )

    def _check_method(self, label: str) -> None:
        """Refuse a method with unknown names, or with a value that its class cannot use."""
        method = self.methods[label]
        name = method.method or label
        known_methods = method_names()
        require_known(f"method (methods.{label})", [name], known_methods)
        # None stands for all settings or all data sets, so there is no name to check
        require_known(f"setting (methods.{label})", method.settings or (), self.settings)
        require_known(f"data set (methods.{label})", method.data or (), self.data)
        if method.steps:
            takes_steps = is_trained(name) and "epochs" not in method.params
            if not takes_steps:
                raise ValueError(
                    f"methods.{label}: steps replace epochs, so the method must have the parameter "
                    "epochs, and not set it"
                )
        if method.unlabelled and not find_method(name).uses_unlabelled:
            raise ValueError(f"methods.{label}: {name} learns nothing from rows without labels")

    def _check_setting(self, name: str) -> None:
        """Refuse a setting that names unknown data sets, or that is impossible on a data set."""
        setting = self.settings[name]
        named_data = [*setting.sources, *(setting.data or ())]
        require_known(f"data set (settings.{name})", named_data, self.data)
        tested_data = [data for data in self.data if self.is_tested_on(name, data)]
        if setting.test_on == "validation":
            self._check_validation(name, tested_data)
        if isinstance(setting, UnionSetting):
            self._check_union(name)
        draws_rows = not isinstance(setting.budget, str)  # a number of labels, or a share
        draws_classes = isinstance(setting, UnseenSetting)
        if draws_rows or draws_classes:
            drawn_data: Sequence[str] = tested_data
            if isinstance(setting, TransferSetting):  # not fitted on the tested data sets
                drawn_data = setting.sources
            self._refuse_captions(name, drawn_data)

    def _check_validation(self, setting: str, tested_data: Iterable[str]) -> None:
        """Refuse tested data sets without validation rows."""
        for data in tested_data:
            if self.data[data].validation is None:
                raise ValueError(
                    f"settings.{setting} tests on validation rows, and data.{data} names none"
                )

    def _check_union(self, setting: str) -> None:
        """Refuse methods that use unlabelled rows in a union of data sets."""
        for label, method in self.method_entries.items():
            if method.unlabelled and self.is_run_in(label, setting):
                raise ValueError(
                    f"methods.{label}: unlabelled rows cannot be used in the union {setting}. "
                    f"List the settings of the method without {setting}"
                )

    def _refuse_captions(self, setting: str, drawn_data: Iterable[str]) -> None:
        """Refuse data sets with captions, because no rows or classes can be drawn from captions."""
        for data in drawn_data:
            if self.data[data].captions:
                raise ValueError(
                    f"settings.{setting} draws rows or classes, and data.{data} has captions"
                )

    @model_validator(mode="after")
    def _check_presentation(self) -> Self:
        """Refuse invalid views and claims, and views with equal names."""
        view_counts = Counter(view.name for view in self.views)
        for name, count in view_counts.items():
            if count > 1:
                raise ValueError(f"two views are called {name}, and would be one file")
        for view in self.views:
            view.check(self)
        for claim in self.claims:
            claim.check(self)
        return self

    @cached_property
    def method_entries(self) -> dict[str, Method]:
        """Every method to run, by label, with defaults for values missing in the method's table."""
        methods = self.methods
        if self.all_methods or not methods:
            methods = {name: Method() for name in PREDICTORS} | methods
        return {label: self._with_defaults(label, method) for label, method in methods.items()}

    def entries_of(self, axis: str) -> Mapping[str, Data | Setting | Method]:
        """Return all entries on ``axis``: methods by label, data sets by name, settings by name."""
        if axis == "method":
            return self.method_entries | self._submitted_methods
        if axis == "data":
            return self.data
        return self.settings

    def with_submitted_methods(self, maker_of_label: Mapping[str, str]) -> Config:
        """Return a copy with further methods, whose results were submitted.

        Args:
            maker_of_label: For each submitted method's label, the package and version that has the
                method's code, or "" if vilu has the code.
        """
        submitted_methods = {}
        for label, maker in maker_of_label.items():
            submitted_methods[label] = Method(title=f"{label} ({maker or 'submitted'})")
        config = self.model_copy()
        config._submitted_methods = submitted_methods
        return config

    @property
    def submitted_methods(self) -> Names:
        """Labels of the submitted methods."""
        return tuple(self._submitted_methods)

    def _with_defaults(self, label: str, method: Method) -> Method:
        """Return a copy of a method, with missing values from ``deterministic`` and ``trained``."""
        name = method.method or label
        defaults: dict[str, Any] = {"method": name}
        if label in self.deterministic:
            defaults["deterministic"] = True
        if is_trained(name):
            defaults["seeds"] = method.seeds or self.trained.seeds
            if method.settings is None:
                defaults["settings"] = self.trained.settings
            if method.steps is None and "epochs" not in method.params:
                defaults["steps"] = self.trained.steps
        return method.model_copy(update=defaults)

    def with_every_method_named(self) -> Config:
        """Return a copy that lists every method to run.

        Without the list, the methods to run would depend on the installed methods.
        """
        return self.model_copy(update={"methods": self.method_entries, "all_methods": False})

    def is_tested_on(self, setting: str, data: str) -> bool:
        """Return whether a setting tests on a data set.

        A setting tests on the data sets that its table chooses, by default on all. Only a union
        also tests on its sources.
        """
        chosen_setting = self.settings[setting]
        if data in chosen_setting.sources and not isinstance(chosen_setting, UnionSetting):
            return False
        return chosen_setting.data is None or data in chosen_setting.data

    def class_of(self, label: str) -> type[FailurePredictor]:
        """Return the predictor class for a method's label."""
        return find_method(str(self.method_entries[label].method))

    def is_run_in(self, label: str, setting: str) -> bool:
        """Return whether a method runs in a setting.

        A method runs in the settings that its table chooses, by default in all. A method that needs
        labels does not run in a setting without labels.
        """
        cls = self.class_of(label)
        needs_labels = cls.needs_fit and cls.needs_labels
        if needs_labels and self.settings[setting].budget == "none":
            return False
        chosen_settings = self.method_entries[label].settings
        return chosen_settings is None or setting in chosen_settings

    def depends_on_seed(self, label: str) -> bool:
        """Return whether scores can differ between seeds on the same training rows."""
        method = self.method_entries[label]
        if method.deterministic:
            return False
        if "seed" in method.params:  # the method's table fixes the seed
            return False
        cls = self.class_of(label)
        return "seed" in parameters(cls)

    def predictor(self, label: str, seed: int = 0) -> FailurePredictor:
        """Make a new predictor for a label."""
        cls = self.class_of(label)
        names = parameters(cls)
        params: dict[str, Any] = {}
        if "seed" in names:
            params["seed"] = seed
        if "device" in names:
            params["device"] = self.device
        predictor = build_predictor(cls, {**params, **self.method_entries[label].params})
        check_parameters(predictor)
        predictor.check_answer()
        if predictor.answer == "given":
            raise UsageError(
                f"[methods.{label}] judges given answers, which belong to rows, not to a method. "
                f"Score them with `vilu fit TRAIN --method {predictor.name} --answer given -o P` "
                "and `vilu score P TEST -o given.parquet`, the others in the same way, and compare "
                "the files with `vilu evaluate FILES`. vilu.compare gives the paired difference of "
                'two files, by a metric such as "coverage_at_risk_0.05".'
            )
        return predictor

    def epochs_for(self, label: str, step_rows: int, n_train: int) -> int | None:
        """Compute how many epochs make about ``steps`` training steps.

        Return None if the method has no ``steps``.

        Args:
            label: The method's label.
            step_rows: Number of rows in a training step.
            n_train: Number of training rows, all of which are in an epoch.
        """
        steps = self.method_entries[label].steps
        if steps is None:
            return None
        steps_per_epoch = math.ceil(n_train / step_rows)
        epochs = round(steps / steps_per_epoch)
        return min(max(epochs, 1), MAX_EPOCHS)


def is_trained(name: str) -> bool:
    """Return whether a method trains a network, and so has ``epochs`` and ``batch_size``."""
    cls = find_method(name)
    return {"epochs", "batch_size"} <= parameters(cls).keys()
