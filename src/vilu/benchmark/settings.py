"""The settings of a benchmark: what is fitted on, and what is tested on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from vilu.benchmark.parts import Model, Names


class Setting(Model):
    """What is fitted on, and what is tested on.

    Attributes:
        budget: Labelled rows per class to fit on, a share of all of them (0.025), or "all".
        data: Data sets to test on; by default all that make sense.
        test_on: Which rows to test on; "validation" for choosing among methods.
        pool_size: Captions that an image of the test set has to choose from; by default that of the data set.
        title: For tables and figures, instead of the name.
        x: Where the setting stands on the axis of a curve.
        published: What publications call it.
    """

    budget: int | float | Literal["all"] = "all"
    data: Names | None = None
    test_on: Literal["validation", "test"] = "test"
    pool_size: Annotated[int, Field(ge=2)] | None = None
    title: str | None = None
    x: float | None = None
    published: str | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, value: object) -> object:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value != "all" and not number and not (isinstance(value, float) and 0 < value < 1):
            raise ValueError('must be "all", a number of labels per class, at least 1, or a share of all, below 1')
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
        return f"{self.budget} labels per class" if isinstance(self.budget, int) else f"{self.budget:.3g} of all labels"

    def describe(self, fitted: str = "") -> str:
        """In words: what is fitted on, then what else is not as usual."""
        on = ", tested on the validation rows" if self.test_on == "validation" else ""
        pool = f", pools of {self.pool_size}" if self.pool_size else ""
        return f"{fitted or self.amount}{on}{pool}"

    def __str__(self) -> str:
        return self.describe()


class Labels(Setting):
    """Fitted and tested on one data set."""

    kind: Literal["labels"]


class FromOther(Setting):
    """Fitted on another data set.

    Attributes:
        source: The data set to fit on.
        across_preprocessing: Allow the two to be embedded by one model at different picture sizes, which is refused
            otherwise.
    """

    source: str
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
    """Fitted on another data set with all its labels, then from those weights on ``budget`` labels of this one."""

    kind: Literal["adapt"]

    @model_validator(mode="after")
    def _check_few(self) -> Self:
        if self.budget == "all":
            raise ValueError("to adapt, give a budget: labels per class, or a share of them")
        return self

    def __str__(self) -> str:
        return self.describe(f"fitted on {self.source} with all labels, then on {self.amount} of its own")


class Union(Setting):
    """Fitted on several data sets at once, whose class texts serve as captions (supplement, C.6).

    Attributes:
        of: The data sets to fit on.
        train_pool_size: Captions that an image has to choose from in training.
        across_preprocessing: As for a transfer.
    """

    kind: Literal["union"]
    of: Annotated[Names, Field(min_length=1)]
    train_pool_size: Annotated[int, Field(ge=2)] = 1024
    across_preprocessing: bool = False

    @property
    def sources(self) -> Names:
        """All of them."""
        return self.of

    def __str__(self) -> str:
        return self.describe(f"fitted on the union of {', '.join(self.of)} in pools of {self.train_pool_size}")


class Unseen(Setting):
    """Fitted on one half of the classes, tested on rows and candidates of the other; the seed draws the halves."""

    kind: Literal["unseen"]

    def __str__(self) -> str:
        return self.describe(f"fitted on the other half of the classes with {self.amount}")


AnySetting = Annotated[Labels | Transfer | Unseen | Adapt | Union, Field(discriminator="kind")]
