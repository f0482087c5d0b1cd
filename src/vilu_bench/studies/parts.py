"""The parts of a benchmark: names, and data sets."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vilu.datasets.known import KNOWN
from vilu.errors import nearest
from vilu_bench.known_datasets.shift import KINDS, SEVERITIES

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
"""Of a data set, a setting or a method; it becomes a part of file names."""
Names = tuple[str, ...]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")
RANKED_BY = ("auroc", "fpr95")  # metrics that get intervals; methods are ranked by the first


def require_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse an unknown name with a ValueError that names the nearest, or all."""
    for name in names:
        if name not in known:
            hint = nearest(str(name), known) or f" There are: {', '.join(known)}"
            raise ValueError(f"there is no {what} {name!r}.{hint}")


class Section(BaseModel):
    """Immutable; names the nearest key where one is unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:  # noqa: ANN401 - whatever TOML holds
        if isinstance(value, dict):
            require_known("key", value, cls.model_fields)
        return value


class StorePaths(Section):
    """Folders that ``vilu embed`` wrote, below the data folder; of captions one for all roles."""

    train: str
    test: str
    validation: str | None = None


class Shift(Section):
    """What is done to every picture before the model sees it (``known_datasets.shift``)."""

    # which ways; every picture gets one of them
    kinds: Names = tuple(kind for kind in KINDS if kind != "low_resolution")
    severity: Annotated[int, Field(ge=1, le=SEVERITIES)] = 3

    @field_validator("kinds")
    @classmethod
    def _check_kinds(cls, kinds: Names) -> Names:
        require_known("kind of shift", kinds, KINDS)
        return kinds


class Limits(Section):
    """Only so many images of a role, evenly spaced; None: all."""

    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None


class Data(Section):
    """A data set: images to embed, or ready-made stores."""

    # file or folder of images below the data folder; ``package:NAME`` ships with vilu
    source: str | None = None
    # A known data set (``vilu datasets list``); ``source`` is then where it lies, by default
    # anywhere in the data folder
    dataset: str | None = None
    # ready-made stores, in place of ``source`` and all that belongs to it
    stores: StorePaths | None = None
    # stores of the same images, and of more, by a second model, for methods that take two
    second: StorePaths | None = None
    backbone: str = "compact"
    # names for the prompts, in label order; by default those of the data set
    classes: Names | None = None
    # whether a known data set's names go into the prompts as they are, underscores and all
    raw_names: bool = False
    # only rows of a table that hold these values, by column
    where: dict[str, str] = Field(default_factory=dict)
    # whether images have captions instead of classes. Then there is one store, the roles are folds
    # of its captions ("train", "validation", "test"), and each image is matched against those of
    # its pool
    captions: bool = False
    # captions that an image has to choose from, in training and (unless a setting says so) in
    # testing
    pool_size: Annotated[int, Field(ge=2)] = 1024
    shift: Shift | None = None  # what is done to every picture first
    train: str = "train"  # split to fit on; several are joined by ``+``
    # split to select on; or the share of the training rows that is held out for it, by a hash of
    # their pictures. None: methods that select hold out rows of their own
    validation: str | Share | None = None
    test: str = "test"  # split to test on
    # where train and test are one set of rows: the share of it to fit on, drawn by the seed; the
    # others are tested on
    fit_share: Share | None = None
    features: bool = True  # whether to store features
    views: Annotated[int, Field(ge=0)] = 4  # augmented views per test image; 0 for none
    # prompts to keep apart, or named sets of them, as for ``vilu embed --prompts``
    prompts: Names = ("ensemble",)
    negatives: bool = False  # whether to keep everyday words, as ``vilu embed --negatives`` does
    limit: Count | Limits | None = None  # only so many images of each split, evenly spaced
    # of images in tar files, which are not counted before: only those in the first so many files
    shards: Count | None = None
    title: str | None = None  # for tables and figures, instead of the name
    x: float | None = None  # where the data set stands on the axis of a curve
    # what publications call it, where their numbers are to stand beside ours; by default
    # ``dataset``
    published: str | None = None

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        has_images = self.source is not None or self.dataset is not None
        if self.stores is not None and has_images:
            raise ValueError("a data set has either a source or stores")
        if self.stores is None and not has_images:
            raise ValueError(
                "a data set has either a source, or the name of a known dataset, or stores"
            )
        if self.dataset:
            require_known("known data set", [self.dataset], KNOWN)
        if self.captions:
            self._check_captions()
        if self.fit_share is not None and not self._is_one_set():
            raise ValueError(
                "fit_share divides one set of rows: train and test must be the same store or "
                "split, under one limit, without captions, and without validation"
            )
        return self

    def _check_captions(self) -> None:
        if self.classes is not None or isinstance(self.validation, float):
            raise ValueError(
                "captions have no classes, and their validation set is the fold of that name"
            )
        if self.negatives:
            raise ValueError(
                "captions have no classes, so no image is of none of them: leave negatives out"
            )
        if self.second is not None:
            raise ValueError("a second model is for classes, not for captions")
        has_several_limits = isinstance(self.limit, Limits)
        if has_several_limits:
            raise ValueError("captions are in one store, so their limit is one number")
        if self.stores and self.limit:
            raise ValueError("a ready-made store of captions is taken whole, without limit")

    def _is_one_set(self) -> bool:
        """Whether training and test rows are the same ones, and nothing else is set aside."""
        where = self if self.stores is None else self.stores
        if where.train != where.test:
            return False
        if self.limit_of("train") != self.limit_of("test"):
            return False
        if self.captions:
            return False
        return self.validation is None and where.validation is None

    @property
    def paper_name(self) -> str | None:
        """What publications call it."""
        return self.published or self.dataset

    def limit_of(self, role: Role) -> int | None:
        """How many images of a role there are to be; None: all."""
        if isinstance(self.limit, Limits):
            limit: int | None = getattr(self.limit, role)
            return limit
        return self.limit
