"""The parts of a benchmark: data sets and settings."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
"""Of a data set, a setting or a method; it becomes a part of file names."""
Names = tuple[str, ...]
Count = Annotated[int, Field(ge=1)]


def require_known(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: Naming the nearest, or all.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}"
            raise ValueError(f"there is no {what} {name!r}. {hint}")


class Model(BaseModel):
    """Immutable; names the nearest key where one is unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:  # noqa: ANN401 - whatever TOML holds
        if isinstance(value, dict):
            require_known("key", value, cls.model_fields)
        return value


class StorePaths(Model):
    """Folders that ``vilu embed`` wrote, below the data folder."""

    train: str
    test: str


class Data(Model):
    """A data set: images to embed, or two stores.

    Attributes:
        source: File or folder of images below the data folder; ``package:NAME`` ships with vilu.
        stores: Ready-made stores, in place of ``source`` and all that belongs to it.
        backbone: The frozen model.
        classes: Names for the prompts, in label order; by default those of the data set.
        train: Split to fit on; several are joined by ``+``.
        test: Split to test on.
        features: Whether to store features.
        views: Augmented views per test image; 0 for none.
        prompts: Prompts to keep apart, or named sets of them, as for ``vilu embed --prompts``.
        limit: Only so many images of each split, evenly spaced.
    """

    source: str | None = None
    stores: StorePaths | None = None
    backbone: str = "compact"
    classes: Names | None = None
    train: str = "train"
    test: str = "test"
    features: bool = True
    views: Annotated[int, Field(ge=0)] = 4
    prompts: Names = ("ensemble",)
    limit: Count | None = None

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        if (self.source is None) == (self.stores is None):
            raise ValueError("a data set has either a source or stores")
        return self


class Setting(Model):
    """What is fitted on, and what is tested on.

    Attributes:
        budget: Labelled rows per class to fit on, or "all".
        data: Data sets to test on; by default all that make sense.
    """

    budget: int | Literal["all"] = "all"
    data: Names | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, value: object) -> object:
        if value != "all" and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ValueError('must be "all" or a number of labels per class, at least 1')
        return value

    @property
    def amount(self) -> str:
        """The budget in words."""
        return "all labels" if self.budget == "all" else f"{self.budget} labels per class"


class Labels(Setting):
    """Fitted and tested on the same classes of one data set."""

    kind: Literal["labels"]

    def __str__(self) -> str:
        return self.amount


class Transfer(Setting):
    """Fitted on another data set.

    Attributes:
        source: The data set to fit on.
        across_preprocessing: Allow the two to be embedded by one model at different picture sizes, which is refused
            otherwise.
    """

    kind: Literal["transfer"]
    source: str
    across_preprocessing: bool = False

    def __str__(self) -> str:
        return f"fitted on {self.source} with {self.amount}"


class Unseen(Setting):
    """Fitted on one half of the classes, tested on rows and candidates of the other; the seed draws the halves."""

    kind: Literal["unseen"]

    def __str__(self) -> str:
        return f"fitted on the other half of the classes with {self.amount}"


AnySetting = Annotated[Labels | Transfer | Unseen, Field(discriminator="kind")]
