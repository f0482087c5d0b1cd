"""Names and data sets in a benchmark file."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vilu.datasets.known import KNOWN
from vilu.errors import did_you_mean
from vilu_bench.known_datasets.shift import DAMAGE_KINDS, MAX_SEVERITY

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
"""Name for a data set, a setting or a method, such as "few-labels". File names contain it."""
Names = tuple[str, ...]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")
# Metrics with intervals. The first metric ranks the methods.
RANKING_METRICS = ("auroc", "fpr95")
# These metrics replace ``RANKING_METRICS`` in a study whose methods judge different answers. AUROC
# and FPR95 measure how well right and wrong answers are told apart, so they cannot compare such
# methods.
RANKING_ACROSS_ANSWERS = ("coverage_at_risk_0.05", "aurc")


def require_known(noun: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise a ValueError for an unknown name, with the nearest known name or all known names."""
    for name in names:
        if name not in known:
            hint = did_you_mean(str(name), known) or f" There are: {', '.join(known)}"
            raise ValueError(f"there is no {noun} {name!r}.{hint}")


class Section(BaseModel):
    """Immutable table of a benchmark file.

    The error for an unknown key suggests the nearest known key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:  # noqa: ANN401 - whatever TOML holds
        if isinstance(value, dict):
            require_known("key", value, cls.model_fields)
        return value


class StorePaths(Section):
    """Folders that ``vilu embed`` wrote, below the data folder, by role.

    For captions all roles name the same folder.
    """

    train: str
    test: str
    validation: str | None = None


class Shift(Section):
    """Damage done to every picture before it is embedded (``known_datasets.shift``)."""

    # Kinds of damage. Every picture gets a single kind.
    kinds: Names = tuple(kind for kind in DAMAGE_KINDS if kind != "low_resolution")
    severity: Annotated[int, Field(ge=1, le=MAX_SEVERITY)] = 3

    @field_validator("kinds")
    @classmethod
    def _check_kinds(cls, kinds: Names) -> Names:
        require_known("kind of shift", kinds, DAMAGE_KINDS)
        return kinds


class Limits(Section):
    """Maximum image count for each role. The taken images are evenly spaced. None: all images."""

    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None


class Data(Section):
    """A data set: images to embed, or ready-made stores."""

    # File or folder with images below the data folder. ``package:NAME`` ships with vilu.
    source: str | None = None
    # Name of a known data set (``vilu datasets list``). ``source`` is then the data set's folder.
    # Without ``source``, the folder is searched for in the data folder.
    dataset: str | None = None
    # ready-made stores, in place of ``source`` and the keys for embedding images
    stores: StorePaths | None = None
    # stores with the same images (and perhaps more) from a second model, for methods with two
    # models
    second: StorePaths | None = None
    backbone: str = "compact"  # model for embedding the images
    # class names for the prompts, in label order, by default the data set's own names
    classes: Names | None = None
    # whether a known data set's class names are used in prompts unchanged, with underscores
    raw_names: bool = False
    # Maps a table column to a value. Only rows with this value in the column are used.
    where: dict[str, str] = Field(default_factory=dict)
    # Whether images have captions instead of classes. With captions there is a single store. The
    # roles are folds of the captions ("train", "validation", "test"), and each image is matched
    # with the captions in its pool.
    captions: bool = False
    # number of captions in a pool, in training and in testing. A setting may replace the number in
    # testing.
    pool_size: Annotated[int, Field(ge=2)] = 1024
    shift: Shift | None = None  # damage done to every picture before it is embedded
    train: str = "train"  # split to fit on, where ``+`` joins several splits
    # Split on which methods select, for example, the number of epochs. A number instead of a name
    # is the share of training rows to hold out for selection, even if ``stores`` names validation
    # rows. A hash of the picture decides which rows are held out. None: the validation store, if
    # ``stores`` names one, or else no rows. In the latter case a method that selects holds out
    # training rows itself.
    validation: Annotated[str | Share | None, Field(validate_default=True)] = None
    test: str = "test"  # split to test on
    # Only if train and test are the same set of rows: the share of these rows to fit on. The seed
    # draws the rows to fit on, and all remaining rows are tested on.
    fit_share: Share | None = None
    features: bool = True  # whether to store features
    views: Annotated[int, Field(ge=0)] = 4  # augmented views per test image
    # prompts, or names of prompt sets, to store separately, as ``vilu embed --prompts`` does
    prompts: Names = ("ensemble",)
    negatives: bool = False  # whether to store everyday words, as ``vilu embed --negatives`` does
    # Maximum image count for each split. The taken images are evenly spaced.
    limit: Count | Limits | None = None
    # Number of tar files to read. For images in tar files, this number replaces ``limit``, because
    # these images are not counted in advance.
    shards: Count | None = None
    title: str | None = None  # title in tables and figures, by default the name
    x: float | None = None  # position on a curve's axis
    # The data set's name in publications, to show published numbers beside ours. By default
    # ``dataset``.
    published: str | None = None

    @field_validator("validation")
    @classmethod
    def _use_validation_store(
        cls, validation: str | float | None, info: ValidationInfo
    ) -> str | float | None:
        """Use the validation store if ``stores`` names one, and ``validation`` is not set."""
        # ``info.data`` lacks ``stores`` if ``stores`` is invalid
        stores: StorePaths | None = info.data.get("stores")
        if validation is not None or stores is None or stores.validation is None:
            return validation
        return "validation"

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        """Refuse contradictory values for a data set."""
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
        """Refuse values that are impossible for a data set with captions."""
        if self.classes is not None or isinstance(self.validation, float):
            raise ValueError(
                "captions have no classes, and their validation set is the fold of that name"
            )
        if self.negatives:
            raise ValueError(
                "negatives are for images of none of the classes, and captions have no classes: "
                "leave negatives out"
            )
        if self.second is not None:
            raise ValueError("a second model is for classes, not for captions")
        has_several_limits = isinstance(self.limit, Limits)
        if has_several_limits:
            raise ValueError("captions are in one store, so their limit is one number")
        if self.stores and self.limit:
            raise ValueError("a ready-made store of captions is taken whole, without limit")

    def _is_one_set(self) -> bool:
        """Return whether training and test rows are the same set, without validation rows."""
        # both objects have a field for each role, with the name of a split or a store
        rows_by_role = self if self.stores is None else self.stores
        if rows_by_role.train != rows_by_role.test:
            return False
        if self.limit_of("train") != self.limit_of("test"):
            return False
        if self.captions:
            return False
        return self.validation is None and rows_by_role.validation is None

    @property
    def paper_name(self) -> str | None:
        """The data set's name in publications."""
        return self.published or self.dataset

    def limit_of(self, role: Role) -> int | None:
        """Return the maximum image count for a role. None: all images."""
        if isinstance(self.limit, Limits):
            limit: int | None = getattr(self.limit, role)
            return limit
        return self.limit
