"""Options that several commands share, each with a type and a help text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from typer import Option

from vilu.cli.help import DATA, MODEL, MORE, PAIRS, SPEED, TABLE
from vilu.embeddings.columns import AnswerKind
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.embeddings.pairs import Pools
    from vilu.embeddings.source import EmbeddingSource

# Maximum option values. A larger number is refused as a typo.
MAX_SEED = 2**63 - 1
MAX_RESAMPLES = 10**6
MAX_WORKERS = 4096


def require_existing(value: Any) -> Any:  # noqa: ANN401 - a path, several, or None, as typer has it
    """Return a path option's value, as typer's callback. Raise UsageError for a missing path."""
    paths = [value]
    if isinstance(value, list | tuple):
        paths = list(value)
    for path in paths:
        if isinstance(path, Path) and not path.exists():
            raise UsageError(f"{path} does not exist.")
    return value


def path_argument(help_text: str, metavar: str | None = None) -> Any:  # noqa: ANN401 - typer's own
    """Make an argument for existing input paths, one or several."""
    return typer.Argument(help=help_text, metavar=metavar, callback=require_existing)


def path_option(
    help_text: str,
    metavar: str | None = None,
    rich_help_panel: str | None = None,
) -> Any:  # noqa: ANN401 - typer's own
    """Make an option for existing input paths, one or several."""
    return Option(
        help=help_text, metavar=metavar, callback=require_existing, rich_help_panel=rich_help_panel
    )


def complete_methods(incomplete: str) -> list[str]:
    """Return the method names that begin with ``incomplete``, for completion in the shell."""
    from vilu.predictors.contract.catalogue import method_names

    names = method_names()
    return _names_that_begin_with(incomplete, names)


def complete_backbones(incomplete: str) -> list[str]:
    """Return the backbone names that begin with ``incomplete``, for completion in the shell."""
    from vilu.backbones.catalog import BACKBONES

    names = BACKBONES.names()
    return _names_that_begin_with(incomplete, names)


def complete_datasets(incomplete: str) -> list[str]:
    """Return the data set names that begin with ``incomplete``, for completion in the shell."""
    from vilu.datasets.known import KNOWN

    return _names_that_begin_with(incomplete, KNOWN)


def _names_that_begin_with(prefix: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


Backbone = Annotated[
    str,
    Option(
        help="A name from `vilu list backbones`, compact[:SIZE], open_clip:NAME/TAG, hf:ID, "
        "KIND:FOLDER, or open_clip:NAME/FILE with weights of your own.",
        autocompletion=complete_backbones,
    ),
]
Models = Annotated[
    Path | None,
    path_option(
        "Folder to read backbones from instead of the model hub. It has a sub-folder for each "
        "named backbone, or the folder or file of your own weights.",
        metavar="DIR",
        rich_help_panel=MODEL,
    ),
]
Outside = Annotated[
    list[str] | None,
    Option(
        metavar="NAME",
        help="A folder, a label, a name, or a number beyond the classes. Its images are of none of "
        "the classes, so any answer to them is wrong. May be repeated.",
        rich_help_panel=DATA,
    ),
]
Template = Annotated[
    list[str] | None,
    Option(
        help="Prompt with {} for the name, or a named set (default, ensemble); several are "
        "averaged.",
        rich_help_panel=MODEL,
    ),
]
Predictor = Annotated[Path, path_argument("Folder that `vilu fit` or `vilu convert` wrote.")]
Data = Annotated[
    Path,
    path_argument(
        "Store that `vilu embed` or `vilu import` wrote, or precomputed embeddings in shards like "
        "LAION's; or a table of answers of any model, .csv or .parquet."
    ),
]
Answer = Annotated[
    AnswerKind | None,
    Option(
        help="The answer that is judged. zero_shot: the candidate of the largest logit. adapted: "
        "the likeliest candidate of the method's own posterior. given: the column answer of the "
        "data."
    ),
]
Overwrite = Annotated[
    bool,
    Option(
        "--overwrite",
        help="Replace an existing result of vilu; files that vilu did not make are never touched.",
        rich_help_panel=MORE,
    ),
]
LabelFiles = Annotated[
    list[Path] | None,
    path_option(
        "Labels of rows of the store: a CSV with the columns path and label, as `vilu labels` and "
        "`vilu next` write it, or labels.parquet of a triage. Labels in the store count as well. "
        "May be repeated.",
        metavar="FILE",
    ),
]
ClusterColumn = Annotated[
    str | None,
    Option(
        "--clusters",
        metavar="COLUMN",
        help="Column with the cluster of each row, such as its page or conversation. [cluster]",
        rich_help_panel=TABLE,
    ),
]
Fold = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class ReadingFlags:
    """Flags for reading stores.

    A command with ``@with_reading_flags`` has a flag for each field.
    """

    pool_size: Annotated[
        int | None,
        Option(
            "--pool-size",
            min=2,
            help="Number of captions that each image can match. [1024]",
            rich_help_panel=PAIRS,
        ),
    ] = None
    direction: Annotated[
        Literal["image_to_text", "text_to_image"],
        Option(
            help="Match a caption to each image, or an image to each caption.",
            rich_help_panel=PAIRS,
        ),
    ] = "image_to_text"
    hard: Annotated[
        bool, Option("--hard-negatives", help="Make pools of similar rows.", rich_help_panel=PAIRS)
    ] = False
    near_duplicates: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            metavar="COSINE",
            help="Captions with at least this cosine count as the same answer.",
            rich_help_panel=PAIRS,
        ),
    ] = None
    fold: Annotated[
        Fold | None,
        Option(
            help="Only captions of this fold (60/10/30 % by hash of the caption). [all]",
            rich_help_panel=PAIRS,
        ),
    ] = None
    logit_scale: Annotated[
        float | None,
        Option(
            min=0,
            help="Logit scale of the model of precomputed embeddings (100 for CLIP); not needed "
            "for stores.",
            rich_help_panel=PAIRS,
        ),
    ] = None
    second: Annotated[
        Path | None,
        path_option(
            "Store of the same images, embedded by a second model, for the method duo.",
            metavar="STORE",
            rich_help_panel=PAIRS,
        ),
    ] = None
    cluster_column: ClusterColumn = None

    @property
    def digest_settings(self) -> dict[str, object]:
        """The flags' values, for the digest of a command's inputs.

        If there is a second store, the flag "second" has the value True. The store's path is no
        part of the digest.
        """
        flags = asdict(self)
        if flags.pop("second") is not None:
            flags["second"] = True
        # Older versions had no flag --clusters. Without this flag, the digest must be the same as
        # in older versions.
        cluster_column = flags.pop("cluster_column")
        if cluster_column is not None:
            flags["clusters"] = cluster_column
        return flags

    @property
    def input_paths(self) -> list[Path]:
        """The paths in these flags: the second store, if any."""
        if self.second is None:
            return []
        return [self.second]

    @property
    def pools(self) -> Pools | None:
        """The pools from the flags. None if all flags about pools have the default values.

        Data with classes have no pools, and are opened with None.
        """
        flags = (self.pool_size, self.direction, self.hard, self.near_duplicates)
        defaults = (None, "image_to_text", False, None)
        if flags == defaults:
            return None
        from vilu.embeddings.pairs import Pools

        size = Pools.size
        if self.pool_size is not None:
            size = self.pool_size
        return Pools(
            size=size,
            direction=self.direction,
            hard=self.hard,
            near_duplicates=self.near_duplicates,
        )

    def open(self, store: Path, role: Fold | None = None) -> EmbeddingSource:
        """Open a store, with the pools from the flags.

        Without the flag --fold, all captions are read. With this flag, only the captions of a
        single fold are read: the fold ``role``, or the flag's fold if ``role`` is None.
        """
        return self.open_with_pools(self.pools, store, role)

    def open_with_second(self, store: Path) -> EmbeddingSource:
        """Open a store together with the second model's store, if any."""
        data = self.open(store)
        return self.with_second(data)

    def with_second(self, data: EmbeddingSource) -> EmbeddingSource:
        """Combine ``data`` with the second model's store, if any."""
        if self.second is None:
            return data
        from vilu.embeddings.two_models import TwoModels
        from vilu.store.reader import open_source

        data_of_second = open_source(self.second)
        return TwoModels(data, data_of_second)

    def open_with_pools(
        self, pools: Pools | None, store: Path, role: Fold | None = None
    ) -> EmbeddingSource:
        """Open a store like ``open``, but with these pools. A table of answers has no pools."""
        from vilu.store.reader import open_source
        from vilu.tables.files import may_be_table
        from vilu.tables.read import open_table

        if may_be_table(store):
            has_store_flags = replace(self, cluster_column=None) != ReadingFlags()
            if has_store_flags:
                raise UsageError(
                    f"{store} is a table of answers. Leave out the options that say how a store is "
                    "read, such as --second."
                )
            return open_table(store, clusters=self.cluster_column)
        if self.cluster_column is not None:
            raise UsageError(
                f"--clusters names a column of a table of answers, and {store} is none. Leave it "
                "out."
            )
        fold = self.fold
        if fold is not None and role is not None:
            fold = role  # the role, such as "train", decides which fold is read
        return open_source(store, pools=pools, fold=fold, logit_scale=self.logit_scale)

    def split_of(self, data: EmbeddingSource) -> str | None:
        """Return the name of the split that is read: the fold, or else the store's own split.

        None if there is no fold, and the store does not state a split.
        """
        from vilu.embeddings.two_models import TwoModels
        from vilu.store.reader import CaptionStore, EmbeddingStore

        if self.fold is not None:
            return self.fold
        first_source = data
        if isinstance(data, TwoModels):
            first_source = data.first
        if isinstance(first_source, EmbeddingStore | CaptionStore):
            return first_source.manifest.split
        return None


STUDY_FLAGS: Final = frozenset({"hard", "near_duplicates"})
"""Flags about pools, only needed for studies. `vilu pools` and the class ``Pools`` have them."""

POOL_FLAGS: Final = frozenset({"pool_size", "direction", "fold", "logit_scale"})
"""Flags for image-caption pairs. A command about class labels does not need these flags."""


def with_reading_flags(
    command: Callable[..., None], *, excluded_flags: Collection[str] = STUDY_FLAGS
) -> Callable[..., None]:
    """Replace a command's parameter ``reading_flags`` by a parameter per field of ``ReadingFlags``.

    ``excluded_flags`` names fields to leave out.
    """
    flag_parameters = dict(signature(ReadingFlags, eval_str=True).parameters)
    for name in excluded_flags:
        del flag_parameters[name]

    @wraps(command)
    def run_with_flags(**values: Any) -> None:  # noqa: ANN401 - values of all flags of the command
        flag_values = {name: values.pop(name) for name in flag_parameters}
        reading_flags = ReadingFlags(**flag_values)
        command(reading_flags=reading_flags, **values)

    parameters: list[Parameter] = []
    parameters_of_command = signature(command, eval_str=True).parameters
    for name, parameter in parameters_of_command.items():
        if name == "reading_flags":
            parameters += flag_parameters.values()
        else:
            parameters.append(parameter)
    vars(run_with_flags)["__signature__"] = Signature(parameters)  # typer reads the options from it
    return run_with_flags


Seed = Annotated[
    int, Option(min=0, max=MAX_SEED, help="Seed of all random numbers.", rich_help_panel=MORE)
]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=SPEED)]
Precision = Annotated[
    Literal["fp32", "bf16", "auto"],
    Option(
        help="Arithmetic of the image tower. bf16 is checked on the first 64 photos. auto: bf16 "
        "where the processor multiplies it, else fp32.",
        rich_help_panel=SPEED,
    ),
]
FollowLinks = Annotated[
    bool,
    Option(
        "--follow-links",
        help="Follow links out of the folder, and links to folders.",
        rich_help_panel=DATA,
    ),
]
BatchSize = Annotated[int, Option(min=1, help="Images per forward pass.", rich_help_panel=SPEED)]
StoreFolder = Annotated[
    Path, Option("--output", "-o", help="Folder of the store to make or to resume.")
]
StoredNumbers = Literal["float16", "float32"]
ImagesSplit = Annotated[str | None, Option(help="Split of --images.", rich_help_panel=DATA)]
ImagesRoot = Annotated[
    Path | None,
    Option(
        metavar="DIR", help="Folder that paths in --images are relative to.", rich_help_panel=DATA
    ),
]
RowsFile = Annotated[
    Path | None, Option("--output", "-o", help="Also write the rows, .json, .parquet or .csv.")
]
JsonFile = Annotated[
    Path | None, Option("--output", "-o", help="Also write the JSON to this file.")
]
