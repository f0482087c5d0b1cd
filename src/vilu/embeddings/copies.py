"""Pictures that are nearly the same: a burst, frames of a film, one photo saved twice."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.pairs import NEAR_ROWS, PairSource, first_alike
from vilu.embeddings.source import EmbeddingSource

NEAR_COPY: Final = 0.98
"""Cosine from which on two photos are taken for one scene: a burst, frames of a film.

Of 3,000 photos that were taken one by one 0 to 1 % have so near a neighbour by real CLIP (Oxford
pets, food), of frames of 101 actions 4 %.
"""


def near_copies(
    source: EmbeddingSource,
    rows: NDArray[np.int64],
    cosine: float = NEAR_COPY,
    block_rows: int = NEAR_ROWS,
) -> NDArray[np.int64]:
    """(M,) for every row the index, among the ``rows`` (M,), of the first that it is like.

    A row that is a near copy of no earlier one has its own index. So rows of one number are one
    group, and ``len(np.unique(...))`` counts the groups. A row
    belongs to the first group whose first row it is like, so likeness does not chain
    (``first_alike``). Of a pair its image counts. Cosines are looked at block by block; the M
    embeddings are in memory.

    Args:
        source: What the rows are of.
        rows: Indices of usable rows, in the order in which they may be the first of a group.
        cosine: From which on a row is a near copy of another one.
        block_rows: Rows whose likeness with as many others is looked at together.

    Examples:
        >>> import numpy as np, vilu
        >>> from vilu.embeddings.copies import near_copies
        >>> data = vilu.Embeddings(np.eye(3)[[0, 1, 0, 2]], np.eye(3))
        >>> near_copies(data, np.arange(4)).tolist()
        [0, 1, 0, 3]
    """
    image = picture_vectors(source, torch.from_numpy(np.ascontiguousarray(rows)))
    return first_alike(image, cosine, block_rows).numpy()


def picture_vectors(source: EmbeddingSource, index: Tensor) -> Tensor:
    """(B, D) embeddings of the pictures of the rows ``index``: of a pair its image."""
    if isinstance(source, PairSource):
        return source.picture_rows(index)
    return source.image_rows(index)
