"""Boxes in a picture, and the overlap between two boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vilu.errors import DataError
from vilu.metrics.counts import Floats

LARGEST_EDGE = 1e9
"""Largest edge coordinate in pixels, to keep every area in the range of a float."""

Box = tuple[float, float, float, float]
"""Left edge, top edge, width and height in pixels."""


def as_boxes(boxes: Sequence[Sequence[float]]) -> Floats:
    """Convert boxes to (N, 4) float64. (0, 4) without boxes."""
    return np.asarray(boxes, dtype=np.float64).reshape(len(boxes), 4)


def areas(boxes: Floats) -> Floats:
    """Compute the areas (N,) of boxes (N, 4)."""
    area: Floats = boxes[:, 2] * boxes[:, 3]
    return area


def overlaps(first: Floats, second: Floats, is_crowd: NDArray[np.bool_] | None = None) -> Floats:
    """Compute the overlap between every two of N and M boxes: (N, M) numbers from 0 to 1.

    The overlap is intersection over union. ``is_crowd`` (M,) marks crowds in ``second``. The
    overlap with a crowd is the share of the first box inside the crowd.

    Examples:
        >>> import numpy as np
        >>> from vilu.tables.sources.boxes import overlaps
        >>> overlaps(np.array([[0, 0, 2, 2.0]]), np.array([[0, 0, 2, 1.0], [5, 5, 1, 1]])).tolist()
        [[0.5, 0.0]]
    """
    # (N, 2), (M, 2) or, for pairs of boxes, (N, M, 2): a horizontal and a vertical number each
    first_start = first[:, :2]  # left and top
    second_start = second[:, :2]
    first_end = first_start + first[:, 2:]  # right and bottom
    second_end = second_start + second[:, 2:]
    start = np.maximum(first_start[:, None], second_start[None, :])  # of the intersection
    end = np.minimum(first_end[:, None], second_end[None, :])
    sides = np.clip(end - start, 0, None)
    intersection: Floats = sides[:, :, 0] * sides[:, :, 1]
    first_area = areas(first)[:, None]
    union = first_area + areas(second)[None, :] - intersection
    whole_area = union
    if is_crowd is not None:
        whole_area = np.where(is_crowd[None, :], first_area, union)
    overlap: Floats = np.zeros_like(intersection)
    np.divide(intersection, whole_area, out=overlap, where=intersection > 0)
    return overlap


def require_box(box: Sequence[float], location: str) -> None:
    """Raise DataError if a side is negative, or if an edge is too far away for a picture."""
    is_far = max(abs(edge) for edge in box) > LARGEST_EDGE
    _, _, width, height = box
    if is_far or min(width, height) < 0:
        raise DataError(
            f"{location}: a box is left, top, width and height in pixels, up to {LARGEST_EDGE:g}, "
            f"and no side is negative. Got {list(box)} instead."
        )
