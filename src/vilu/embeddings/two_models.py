"""A source with every row's embeddings from two models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.checks import VALID, IdentityKind
from vilu.embeddings.columns import SECOND_MODEL_COLUMNS
from vilu.embeddings.source import EmbeddingSource, RowSubset
from vilu.errors import DataError, UsageError
from vilu.validation import checked

MODEL_INDEPENDENT_KINDS: tuple[IdentityKind, ...] = ("pictures", "names")
"""Identity kinds that do not depend on the embedding model, best first."""


class TwoModels(RowSubset):
    """The rows of a source, with embeddings of the same pictures by a second model.

    All data come from the first source, except two additional columns:

    - ``second_image`` (N, E): image embeddings by the second model.
    - ``second_text`` (K, E): candidate embeddings by the second model, times the second model's
      logit scale.

    The products of both columns are the second model's zero-shot logits without the bias. The bias
    is left out, because a bias cancels in a softmax.

    The rows are searched in the second source by picture. If a source has no picture hashes, the
    rows are searched by name. The row order in the second source does not matter. The second source
    may have more rows, and its embeddings are read only on demand. A row is usable only if the row
    is usable in both sources.

    Args:
        first: The first model's source. The first model is usually the larger one, and its
            failures are to be predicted.
        second: The second model's source.

    Attributes:
        first: The first model's source.
        second: The second model's source.

    Raises:
        UsageError: If a source has captions. The two models have different caption pools, so the
            rows of the two models do not correspond.
        DataError: If the candidates or their order differ, if rows of the first source are missing
            in the second, or if rows can be matched neither by picture nor by name.

    Examples:
        >>> import numpy as np, torch, vilu
        >>> large = vilu.Embeddings(np.eye(3), np.eye(3), ids=["a", "b", "c"])
        >>> # the small model has width 2; its source has the images in another order
        >>> image = [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]
        >>> small = vilu.Embeddings(image, text=image, ids=["c", "b", "a"])
        >>> both = vilu.TwoModels(large, small)
        >>> c = torch.tensor([2])  # row number of "c" in the first source
        >>> both.column("second_image", c).tolist()  # "c" is row 0 of the second source
        [[1.0, 0.0]]
    """

    first: EmbeddingSource
    second: EmbeddingSource

    @checked
    def __init__(self, first: EmbeddingSource, second: EmbeddingSource) -> None:
        if first.pool_size is not None or second.pool_size is not None:
            raise UsageError(
                "a second model works only with sources that have classes. Image-caption pairs "
                "have their candidates in pools, and each model has pools of its own."
            )
        if not (first.has_texts and second.has_texts):
            raise UsageError(
                "a second model works only with embeddings of texts, and one of the sources has "
                "logits without texts (vilu.Embeddings.from_logits). Give image and text of both."
            )
        _require_same_candidates(first, second)
        all_rows = torch.arange(len(first), device="cpu")
        super().__init__(
            first,
            all_rows,
            classes=None,  # all classes of ``first``
            columns=first.columns | SECOND_MODEL_COLUMNS,
        )
        row_in_second = match_rows(first, second)  # for every row of ``first``
        self.first = first
        self.second = second
        self._row_in_second = torch.from_numpy(row_in_second)
        self.ids = first.ids
        self.candidate_of = first.candidate_of
        # a row with a usable embedding in the first source has the status of the second source
        self.status = np.where(first.status == VALID, second.status[row_in_second], first.status)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return a column from the first source, or a column from the second model."""
        if name == "second_image":
            return self.second.image_rows(self._row_in_second[index])
        if name == "second_text":
            no_rows = index[:0]  # the candidates are the same for all rows
            return self.second.candidates(no_rows).text * self.second.space.logit_scale
        return super().column(name, index)


def match_rows(first: EmbeddingSource, second: EmbeddingSource) -> NDArray[np.int64]:
    """Find the index (N,) of the same row in the second source, for every row of the first."""
    kind = _common_identity(first, second)
    first_identities = first.identities(kind)
    second_identities = second.identities(kind)
    order = np.argsort(second_identities, kind="stable")
    sorted_identities = second_identities[order]
    if kind == "names":
        _require_distinct_names(second, order, sorted_identities)
    # An identity's rank is a position in ``sorted_identities``. For a missing identity, the
    # rank is the position for inserting it, possibly after the last entry.
    rank = np.searchsorted(sorted_identities, first_identities)
    is_in_range = rank < len(sorted_identities)
    is_present = np.zeros(len(first), dtype=bool)
    identity_at_rank = sorted_identities[rank[is_in_range]]
    is_present[is_in_range] = identity_at_rank == first_identities[is_in_range]
    if not is_present.all():
        missing_rows = np.flatnonzero(~is_present)
        first_missing = first.ids[int(missing_rows[0])]
        raise DataError(
            f"{len(missing_rows)} of {len(first)} rows are not among the {len(second)} rows of the "
            f"second source (compared by their {kind}), for example {first_missing!r}. Embed the "
            "same images with the second model."
        )
    return np.asarray(order[rank], dtype=np.int64)


def _require_distinct_names(
    second: EmbeddingSource, order: NDArray[np.int64], sorted_identities: NDArray[np.uint64]
) -> None:
    """Raise DataError if two rows of the second source have the same name.

    Args:
        second: The second source.
        order: Row numbers in the second source, in the order of ``sorted_identities``.
        sorted_identities: The identities of all rows in the second source, sorted.
    """
    equals_next = sorted_identities[:-1] == sorted_identities[1:]
    repeated_positions = np.flatnonzero(equals_next)
    if repeated_positions.size:
        name = second.ids[int(order[repeated_positions[0]])]
        raise DataError(
            f"rows are found by their names, and the second source has {name!r} twice. Give "
            "every row a name of its own."
        )


def _common_identity(first: EmbeddingSource, second: EmbeddingSource) -> IdentityKind:
    """Return the best identity kind common to both sources. Raise DataError if there is none."""
    for kind in MODEL_INDEPENDENT_KINDS:
        if kind in first.identified_by and kind in second.identified_by:
            return kind
    raise DataError(
        "nothing tells which rows of the two sources are the same: both need pictures (`vilu "
        "embed`), or names (ids). Embed both with `vilu embed`, or give both the ids of their rows."
    )


def _require_same_candidates(first: EmbeddingSource, second: EmbeddingSource) -> None:
    """Raise DataError if the candidates differ. The message names the first difference."""
    first_names = first.class_names
    second_names = second.class_names
    if first.n_candidates == second.n_candidates and first_names == second_names:
        return
    differences = [f"{first.n_candidates} against {second.n_candidates}"]
    only_one_has_names = (first_names is None) != (second_names is None)
    if first_names is not None and second_names is not None:
        difference = _first_difference(first_names, second_names)
        differences.append(difference)
    elif only_one_has_names:
        differences.append("one of them has names of its classes, the other has none")
    listing = "; ".join(differences)
    raise DataError(
        "the two sources must have the same candidates in the same order. "
        f"Got {listing}. Embed both with the same names."
    )


def _first_difference(first: Sequence[str], second: Sequence[str]) -> str:
    """Describe the first difference between two name lists. The lists must differ."""
    for position, (name, counterpart) in enumerate(zip_longest(first, second)):
        if name != counterpart:
            return f"the first difference is at {position}: {name!r} against {counterpart!r}"
    raise AssertionError("the names are equal")
