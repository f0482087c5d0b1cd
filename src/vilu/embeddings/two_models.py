"""The same rows seen by two models."""

from __future__ import annotations

from collections.abc import Sequence
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
    """The rows of one source, with what a second model makes of the same pictures and candidates.

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
        >>> # of another width, in another order
        >>> small = vilu.Embeddings(rows, rows, logit_scale=1.0, ids=["c", "b", "a"])
        >>> vilu.TwoModels(large, small).column("second_image", torch.tensor([1, 2])).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """

    first: EmbeddingSource
    second: EmbeddingSource

    @checked
    def __init__(self, first: EmbeddingSource, second: EmbeddingSource) -> None:
        if first.pool_size is not None or second.pool_size is not None:
            raise UsageError(
                "a second model is for classes: image-caption pairs are matched in pools of one "
                "model."
            )
        _require_same_candidates(first, second)
        all_rows = torch.arange(len(first), device="cpu")
        super().__init__(first, all_rows, None, first.columns | SECOND)
        row_of_second = rows_of_second(first, second)
        self.first = first
        self.second = second
        self._row_of_second = torch.from_numpy(row_of_second)
        self.ids = first.ids
        self.candidate_of = first.candidate_of
        self.status = np.where(first.status == VALID, second.status[row_of_second], first.status)

    def column(self, name: str, index: Tensor) -> Tensor:
        """A column of the first source, or what the second model says."""
        if name == "second_image":
            return self.second.image_rows(self._row_of_second[index])
        if name == "second_text":
            return self.second.candidates(index[:0]).text * self.second.space.logit_scale
        return super().column(name, index)


def rows_of_second(first: EmbeddingSource, second: EmbeddingSource) -> NDArray[np.int64]:
    """(N,) indices in the second source of the rows of the first."""
    by = _common_identity(first, second)
    sought = first.identities(by)
    identities = second.identities(by)
    order = np.argsort(identities, kind="stable")
    ordered = identities[order]
    if by == "names":
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
        if repeated.size:
            name = second.ids[int(order[repeated[0]])]
            raise DataError(
                f"rows are told by their names, and the second source has {name!r} twice. Give "
                "every row a name of its own."
            )
    rank = np.searchsorted(ordered, sought)
    is_there = rank < len(ordered)
    is_there[is_there] = ordered[rank[is_there]] == sought[is_there]
    if not is_there.all():
        missing = np.flatnonzero(~is_there)
        raise DataError(
            f"{len(missing)} of {len(first)} rows are not among the {len(second)} of the second "
            f"source (told by their {by}), for example {first.ids[int(missing[0])]!r}. Embed the "
            "same images with the second model."
        )
    return np.asarray(order[rank], dtype=np.int64)


def _common_identity(first: EmbeddingSource, second: EmbeddingSource) -> Identity:
    """The best of what tells rows apart in both sources."""
    for by in TELLING:
        if by in first.identified_by and by in second.identified_by:
            return by
    raise DataError(
        "nothing tells which rows of the two sources are the same: both need pictures (`vilu "
        "embed`), or names (ids). Embed both with `vilu embed`, or give both the ids of their rows."
    )


def _require_same_candidates(first: EmbeddingSource, second: EmbeddingSource) -> None:
    """Refuse sources of other candidates, with the first difference."""
    first_names = first.class_names
    second_names = second.class_names
    if first.n_candidates == second.n_candidates and first_names == second_names:
        return
    difference = f"{first.n_candidates} against {second.n_candidates}"
    if first_names is not None and second_names is not None:
        difference += f"; {_first_difference(first_names, second_names)}"
    elif first_names != second_names:
        difference += "; one of them has names of its classes, the other has none"
    raise DataError(
        f"the two sources must have the same candidates in the same order. Got {difference}. "
        "Embed both with the same names."
    )


def _first_difference(first: Sequence[str], second: Sequence[str]) -> str:
    """Where two lists of names, which are not equal, differ first."""
    for number, (name, counterpart) in enumerate(zip_longest(first, second)):
        if name != counterpart:
            return f"the first difference is at {number}: {name!r} against {counterpart!r}"
    raise AssertionError("the names are equal")
