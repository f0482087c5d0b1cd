"""The same rows seen by two models."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.checks import VALID, Identity
from vilu.embeddings.columns import SECOND
from vilu.embeddings.source import EmbeddingSource, Taken
from vilu.errors import DataError, UsageError
from vilu.validation import checked

TELLING: tuple[Identity, ...] = ("pictures", "names")
"""What a row can be recognised by, whichever model embedded it; the best first."""


class TwoModels(Taken):
    """The rows of one source, with what a second model makes of the same pictures and the same candidates.

    Everything is the first source's but for two columns: ``second_image`` (N, E), embeddings by the
    second model, and ``second_text`` (K, E), its embeddings of the candidates times its logit
    scale, so that their products are the second model's zero-shot logits (but for a bias, which
    cancels in a softmax). Rows are found in the second source by their pictures, or by names where
    one of the two knows no pictures, whatever their order; nothing of it is held. It may have more
    rows. A row that is not usable in one of the two is not usable.

    Args:
        first: With the answers whose failures are to be predicted; as a rule of the larger model.
        second: Of the other model.

    Attributes:
        first: As given.
        second: As given.

    Raises:
        UsageError: If one of them has captions: pools of two models cannot be matched row by row.
        DataError: If they have other candidates, or in another order; if rows of the first are not
            in the second, or nothing tells which they are.

    Examples:
        >>> import numpy as np, torch, vilu
        >>> large = vilu.Embeddings(np.eye(3), np.eye(3), ids=["a", "b", "c"])
        >>> rows = [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]
        >>> small = vilu.Embeddings(
        ...     rows, rows, logit_scale=1.0, ids=["c", "b", "a"]
        ... )  # of another width, in another order
        >>> vilu.TwoModels(large, small).column("second_image", torch.tensor([1, 2])).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """

    first: EmbeddingSource
    second: EmbeddingSource

    @checked
    def __init__(self, first: EmbeddingSource, second: EmbeddingSource) -> None:
        if first.pool_size is not None or second.pool_size is not None:
            raise UsageError(
                "a second model is for classes: image-caption pairs are matched in pools of one model."
            )
        _require_same_candidates(first, second)
        super().__init__(
            first, torch.arange(len(first), device="cpu"), None, first.columns | SECOND
        )
        self.first, self.second, self._place = (
            first,
            second,
            torch.from_numpy(places(first, second)),
        )
        self.ids, self.candidate_of = first.ids, first.candidate_of
        self.status = np.where(
            first.status == VALID, second.status[self._place.numpy()], first.status
        )

    def column(self, name: str, index: Tensor) -> Tensor:
        """A column of the first source, or what the second model says."""
        if name == "second_image":
            return self.second.image_rows(self._place[index])
        if name == "second_text":
            return self.second.candidates(index[:0]).text * self.second.space.logit_scale
        return super().column(name, index)


def places(first: EmbeddingSource, second: EmbeddingSource) -> NDArray[np.int64]:
    """(N,) positions in the second source of the rows of the first."""
    by = next(
        (by for by in TELLING if by in first.identified_by and by in second.identified_by), None
    )
    if by is None:
        raise DataError(
            "nothing tells which rows of the two sources are the same: both need pictures (`vilu embed`), or names "
            "(ids). Embed both with `vilu embed`, or give both the ids of their rows."
        )
    mine, theirs = first.identities(by), second.identities(by)
    order = np.argsort(theirs, kind="stable")
    ordered = theirs[order]
    if (
        by == "names"
        and len(ordered)
        and (twice := np.flatnonzero(ordered[1:] == ordered[:-1])).size
    ):
        raise DataError(
            f"rows are told by their names, and the second source has {second.ids[int(order[twice[0]])]!r} twice. Give "
            "every row a name of its own."
        )
    found = np.searchsorted(ordered, mine)
    is_there = found < len(ordered)
    is_there[is_there] = ordered[found[is_there]] == mine[is_there]
    if not is_there.all():
        missing = np.flatnonzero(~is_there)
        raise DataError(
            f"{len(missing)} of {len(first)} rows are not among the {len(second)} of the second source (told by their "
            f"{by}), for example {first.ids[int(missing[0])]!r}. Embed the same images with the second model."
        )
    return np.asarray(order[found], dtype=np.int64)


def _require_same_candidates(first: EmbeddingSource, second: EmbeddingSource) -> None:
    mine, theirs = first.class_names, second.class_names
    if first.n_candidates == second.n_candidates and mine == theirs:
        return
    found = f"{first.n_candidates} against {second.n_candidates}"
    if mine is not None and theirs is not None:
        place, one, other = next(
            (i, a, b) for i, (a, b) in enumerate(zip_longest(mine, theirs)) if a != b
        )
        found += f"; the first difference is at {place}: {one!r} against {other!r}"
    elif mine != theirs:
        found += "; one of them has names of its classes, the other has none"
    raise DataError(
        f"the two sources must have the same candidates in the same order. Got {found}. Embed both with the same names."
    )
