"""The options that say which rows of which data a command is about, shared by the commands that read embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from vilu.pairs import Pools
    from vilu.types import EmbeddingSource

Data = Annotated[
    Path,
    typer.Argument(help="Store that `vilu embed` wrote, or precomputed embeddings in shards as LAION's."),
]
PoolSize = Annotated[
    int | None,
    typer.Option("--pool-size", min=2, help="Pairs: captions that each image has to choose from. [1024]"),
]
Direction = Annotated[
    Literal["image_to_text", "text_to_image"], typer.Option(help="Pairs: which side is asked for the other.")
]
Hard = Annotated[bool, typer.Option("--hard-negatives", help="Pairs: pools of rows that are alike.")]
NearDuplicates = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="COSINE", help="Pairs: captions from this cosine on are the same answer."),
]
Fold = Annotated[
    Literal["train", "validation", "test"] | None,
    typer.Option(help="Pairs: only captions of this fold (60/10/30 % by hash of the caption). [all]"),
]
LogitScale = Annotated[
    float | None,
    typer.Option(min=0, help="Of the model behind precomputed embeddings (100 for CLIP); stores know their own."),
]


def choose_pools(
    size: int | None, direction: Literal["image_to_text", "text_to_image"], hard: bool, near_duplicates: float | None
) -> Pools | None:
    """The pools that the options ask for; None when they ask for nothing special, so that class stores are fine."""
    if size is None and direction == "image_to_text" and not hard and near_duplicates is None:
        return None
    from vilu.pairs import Pools

    return Pools(Pools.size if size is None else size, direction, hard, near_duplicates)


def split_of(data: EmbeddingSource) -> str | None:
    """Name of the part that a store holds; None where it does not say."""
    from vilu.store.pairs import CaptionStore
    from vilu.store.reader import EmbeddingStore

    return data.manifest.split if isinstance(data, EmbeddingStore | CaptionStore) else None
