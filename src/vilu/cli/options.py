"""Options that several commands have, each with its type and its line of help."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.embeddings.pairs import Pools
    from vilu.embeddings.source import EmbeddingSource

MOST_SEED = 2**63 - 1
MOST_RESAMPLES = 10**6
MOST_WORKERS = 4096
"""Larger numbers on a command line are slips of the finger."""


def existing(value: Any) -> Any:  # noqa: ANN401 - a path, several, or None, as typer has it
    """What a command is to read; the one place that refuses a path that is not there."""
    paths = [value]
    if isinstance(value, list | tuple):
        paths = list(value)
    for path in paths:
        if isinstance(path, Path) and not path.exists():
            raise UsageError(f"{path} does not exist.")
    return value


def path_argument(text: str, metavar: str | None = None) -> Any:  # noqa: ANN401 - typer's own
    """A path, or several, that a command reads, with its line of help."""
    return typer.Argument(help=text, metavar=metavar, callback=existing)


def path_option(text: str, metavar: str | None = None) -> Any:  # noqa: ANN401 - typer's own
    """The same as a flag."""
    return Option(help=text, metavar=metavar, callback=existing)


def complete_methods(incomplete: str) -> list[str]:
    """Names of methods, for the shell."""
    from vilu.predictors.contract.catalogue import method_names

    return _that_begin_with(incomplete, method_names())


def complete_backbones(incomplete: str) -> list[str]:
    """Names of backbones, and what names begin with, for the shell."""
    from vilu.backbones.catalog import BACKBONES

    return _that_begin_with(incomplete, BACKBONES.names())


def complete_datasets(incomplete: str) -> list[str]:
    """Names of data sets, for the shell."""
    from vilu.datasets.known import KNOWN

    return _that_begin_with(incomplete, KNOWN)


def _that_begin_with(start: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(start)]


Backbone = Annotated[
    str,
    Option(
        help="A name of `vilu list backbones`, compact[:SIZE], open_clip:NAME/TAG, hf:ID, "
        "kind:FOLDER.",
        autocompletion=complete_backbones,
    ),
]
Models = Annotated[
    Path | None,
    path_option(
        "Folder with a sub-folder for each named backbone, in place of the model hub.",
        metavar="DIR",
    ),
]
Outside = Annotated[
    list[str] | None,
    Option(
        metavar="NAME",
        help="A class (folder, label or name), or a number beyond the classes, that is none of "
        "them: any answer about its images is wrong. May be repeated.",
    ),
]
Template = Annotated[
    list[str] | None,
    Option(
        help="Prompt with {} for the name, or a named set (default, ensemble); several are "
        "averaged."
    ),
]
Predictor = Annotated[Path, path_argument("Folder that `vilu fit` or `vilu convert` wrote.")]
Data = Annotated[
    Path,
    path_argument(
        "Store that `vilu embed` or `vilu import` wrote, or precomputed embeddings in shards as "
        "LAION's."
    ),
]
Overwrite = Annotated[
    bool,
    Option(
        "--overwrite",
        help="Make it anew in place of what vilu made there; what is not vilu's is never touched.",
    ),
]
Fold = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Reading:
    """How stores are read; every field is a flag of the commands that have ``@reads``."""

    pool_size: Annotated[
        int | None,
        Option(
            "--pool-size", min=2, help="Pairs: captions that each image has to choose from. [1024]"
        ),
    ] = None
    direction: Annotated[
        Literal["image_to_text", "text_to_image"],
        Option(help="Pairs: which side is asked for the other."),
    ] = "image_to_text"
    hard: Annotated[
        bool, Option("--hard-negatives", help="Pairs: pools of rows that are alike.")
    ] = False
    near_duplicates: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            metavar="COSINE",
            help="Pairs: captions from this cosine on are the same answer.",
        ),
    ] = None
    fold: Annotated[
        Fold | None,
        Option(help="Pairs: only captions of this fold (60/10/30 % by hash of the caption). [all]"),
    ] = None
    logit_scale: Annotated[
        float | None,
        Option(
            min=0,
            help="Of the model behind precomputed embeddings (100 for CLIP); stores know their "
            "own.",
        ),
    ] = None
    second: Annotated[
        Path | None,
        path_option("The same images embedded by a second model, for method duo.", metavar="STORE"),
    ] = None

    @property
    def settings(self) -> dict[str, object]:
        """The flags that say how, for the digest of what a command reads."""
        flags = asdict(self)
        if flags.pop("second") is not None:
            flags["second"] = True
        return flags

    @property
    def read(self) -> list[Path]:
        """What is read beside the stores that a command names."""
        if self.second is None:
            return []
        return [self.second]

    @property
    def pools(self) -> Pools | None:
        """None where the flags ask for nothing special, so that class stores are fine."""
        flags = (self.pool_size, self.direction, self.hard, self.near_duplicates)
        if flags == (None, "image_to_text", False, None):
            return None
        from vilu.embeddings.pairs import Pools

        size = Pools.size
        if self.pool_size is not None:
            size = self.pool_size
        return Pools(size, self.direction, self.hard, self.near_duplicates)

    def open(self, store: Path, role: Fold | None = None) -> EmbeddingSource:
        """A store; where a fold is asked for, that of a role."""
        return self.open_in(self.pools, store, role)

    def open_both(self, store: Path) -> EmbeddingSource:
        """A store with what the second model says of its rows, where there is one."""
        return self.with_second(self.open(store))

    def with_second(self, data: EmbeddingSource) -> EmbeddingSource:
        """The same with the rows of ``second``."""
        if self.second is None:
            return data
        from vilu.embeddings.two_models import TwoModels
        from vilu.store.reader import open_source

        return TwoModels(data, open_source(self.second))

    def open_in(
        self, pools: Pools | None, store: Path, role: Fold | None = None
    ) -> EmbeddingSource:
        """The same in other pools."""
        from vilu.store.reader import open_source

        fold = self.fold
        if fold is not None and role is not None:
            fold = role
        return open_source(store, pools=pools, fold=fold, logit_scale=self.logit_scale)

    def split_of(self, data: EmbeddingSource) -> str | None:
        """Name of the part of the data that is read; None where the store does not say."""
        from vilu.embeddings.two_models import TwoModels
        from vilu.store.reader import CaptionStore, EmbeddingStore

        if self.fold is not None:
            return self.fold
        first = data
        if isinstance(data, TwoModels):
            first = data.first
        if isinstance(first, EmbeddingStore | CaptionStore):
            return first.manifest.split
        return None


def reads(command: Callable[..., None], *, without: Collection[str] = ()) -> Callable[..., None]:
    """The command with the flags of ``Reading`` in place of its parameter ``reading``.

    ``without`` names flags that the command does not have.
    """
    flags = dict(signature(Reading, eval_str=True).parameters)
    for name in without:
        del flags[name]

    @wraps(command)
    def flagged(**values: Any) -> None:  # noqa: ANN401 - what the flags hold
        reading = Reading(**{name: values.pop(name) for name in flags})
        command(reading=reading, **values)

    expanded: list[Parameter] = []
    for name, parameter in signature(command, eval_str=True).parameters.items():
        if name == "reading":
            expanded += flags.values()
        else:
            expanded.append(parameter)
    vars(flagged)["__signature__"] = Signature(expanded)  # what typer makes the command line from
    return flagged


Seed = Annotated[int, Option(min=0, max=MOST_SEED, help="Of everything random.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[Literal["fp32", "bf16"], Option(help="Arithmetic of the image tower.")]
BatchSize = Annotated[int, Option(min=1, help="Images per forward pass.")]
DecodingThreads = Annotated[
    int | None, Option(min=1, max=MOST_WORKERS, help="Decoding threads. [one per core]")
]
StoreFolder = Annotated[
    Path, Option("--output", "-o", help="Folder of the store to make or to resume.")
]
StoredNumbers = Literal["float16", "float32"]
ImagesSplit = Annotated[str | None, Option(help="Of --images.")]
ImagesRoot = Annotated[
    Path | None, Option(metavar="DIR", help="Of --images, as `vilu embed` takes it.")
]
Json = Annotated[bool, Option("--json", help="Print JSON instead of text.")]
RowsJson = Annotated[bool, Option("--json", help="Print tidy rows as JSON instead of a table.")]
RowsFile = Annotated[
    Path | None, Option("--output", "-o", help="Also write the rows, .json, .parquet or .csv.")
]
JsonFile = Annotated[
    Path | None, Option("--output", "-o", help="Also write the JSON to this file.")
]
