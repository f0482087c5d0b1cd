"""Any embeddings on disk as a source."""

from __future__ import annotations

import os
from pathlib import Path

from vilu.embeddings.pairs import Pools
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UsageError
from vilu.files import RUN, read_document
from vilu.store.documents import Run
from vilu.store.folds import Fold
from vilu.store.laion import LaionPairs, find_shards
from vilu.store.reader import CaptionStore, EmbeddingStore


def open_source(
    path: str | os.PathLike[str],
    *,
    pools: Pools | None = None,
    fold: Fold | None = None,
    logit_scale: float | None = None,
) -> EmbeddingSource:
    """A store of classes or of captions, or embeddings of image-caption pairs that another tool wrote.

    Args:
        path: A folder that ``vilu embed`` wrote, or one in a layout of ``LaionPairs``.
        pools: What captions are matched against; by default pools of 1024.
        fold: Only the pairs whose caption is in this fold: "train", "validation" or "test".
        logit_scale: Multiplier of the cosine, where the folder does not know it.

    Raises:
        UsageError: If an argument is given that the data do not take, or the logit scale is missing.
        DataError: If the folder is none of these, or not complete.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together.
    """
    root = Path(path)
    if not (root / RUN).is_file():
        if logit_scale is None:
            find_shards(root)  # a folder of another kind is told so first
            raise UsageError(
                f"{root} does not say which model made it. Give logit_scale, the multiplier of its cosines: "
                "100 for OpenAI's CLIP, for others the exponential of the learned parameter."
            )
        return LaionPairs(root, pools, logit_scale=logit_scale, fold=fold)
    if logit_scale is not None:
        raise UsageError(f"{root} is a store, which knows the logit scale of its model. Leave logit_scale out.")
    if read_document(root / RUN, Run).captions:
        return CaptionStore(root, pools, fold)
    if pools is not None or fold is not None:
        raise UsageError(f"{root} is a store of classes: there are no captions for pools or folds. Leave them out.")
    return EmbeddingStore(root)
