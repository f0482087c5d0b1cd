"""Groups of near-duplicate pictures, such as film frames, or a photo saved twice."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.pairs import COSINE_BLOCK_ROWS, PairSource, group_leaders
from vilu.embeddings.source import EmbeddingSource

NEAR_COPY_COSINE: Final = 0.98
"""Two pictures count as near copies if their cosine is at least this number.

With CLIP embeddings, 0 to 1 % of 3,000 separately taken photos (Oxford pets, food) have a
neighbour at this cosine. Among frames from videos of 101 actions, 4 % have such a neighbour.
"""


def near_copy_groups(
    source: EmbeddingSource,
    rows: NDArray[np.int64],
    cosine: float = NEAR_COPY_COSINE,
    block_rows: int = COSINE_BLOCK_ROWS,
) -> NDArray[np.int64]:
    """Group near copies. Return, for every row, the position (M,) of its group's first row.

    A position is an index of ``rows`` (M,). Rows with the same position form a group.

    A row is compared with the first row of every group, in order. The row joins the first group
    whose first row is a near copy. If there is no such group, the row starts a new group. So two
    rows in a group need not be near copies of each other (``group_leaders``). From an image-caption
    pair, only the image is compared. The cosines are computed block by block, but all M embeddings
    are in memory.

    Args:
        source: Source with the rows.
        rows: Indices of usable rows. The order decides which row is the first in a group.
        cosine: Minimum cosine between two near copies.
        block_rows: Number of rows in a block. The cosines of two blocks are computed together.

    Examples:
        >>> import numpy as np, vilu
        >>> from vilu.embeddings.copies import near_copy_groups
        >>> image = np.eye(3)[[0, 1, 0, 2]]  # rows 0 and 2 are equal
        >>> data = vilu.Embeddings(image, text=np.eye(3))
        >>> near_copy_groups(data, rows=np.arange(4)).tolist()
        [0, 1, 0, 3]
    """
    if not source.has_vectors:  # there are no cosines, so every row is a separate group
        return np.arange(len(rows))
    image = picture_vectors(source, torch.from_numpy(np.ascontiguousarray(rows)))
    return group_leaders(image, cosine, block_rows).numpy()


def picture_vectors(source: EmbeddingSource, index: Tensor) -> Tensor:
    """Return image embeddings (B, D) at ``index``, even if captions are the queries of pairs."""
    if isinstance(source, PairSource):
        return source.picture_rows(index)
    return source.image_rows(index)
