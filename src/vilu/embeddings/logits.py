"""Rows with the logits of any classifier, whose candidates have no embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vilu.device import torch_defaults
from vilu.embeddings.checks import (
    NONFINITE,
    VALID,
    as_array,
    as_matrix,
    check_answers,
    check_class_names,
    check_ids,
    check_targets,
    normalised,
)
from vilu.embeddings.columns import ANSWER, LOGITS
from vilu.embeddings.similarity import rows_at
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.validation import checked


class LogitEmbeddings(EmbeddingSource):
    """Rows with K logits each, from any classifier, and optionally a vector of each row.

    The logits may be those of a ResNet, of a fine-tuned CLIP, of SigLIP with its bias, or the
    decision function of scikit-learn. The answer of a row is the candidate of its largest logit;
    the lowest index wins ties. Methods that look at the logits alone work. With ``features``,
    methods also work that look at a vector of the row, such as ``vilu_plus``. Methods that need
    embeddings of the candidates refuse these rows.

    Args:
        logits: (N, K) logits, numpy or torch, any float dtype. They are kept in float32 as they
            are: nothing is normalised, and a bias stays. Where float32 would give two logits of a
            row the same value, the answer remains the largest logit of the array.
        features: (N, D) vectors of the rows, for example what the last layer of the classifier
            takes. They are normalised to unit norm. None: the rows have no vector.
        target: (N,) integer candidates, -1 where unknown, -2 (``vilu.OUTSIDE``) for pictures of
            none of the classes. None if no label is known.
        class_names: K different names.
        ids: N row identifiers; by default the row numbers. Without ``features`` rows can be
            recognised by their identifiers only.
        answer: (N,) answers to judge with ``answer="given"``: candidates, or their names.

    A row with a logit that is not finite is kept, but marked in ``status``, as is a row whose
    features have no direction. It is never used for training, and its uncertainty is NaN.

    Raises:
        DataError: If shapes disagree, a target is no candidate, or two candidates have one name.

    Examples:
        >>> import numpy as np, vilu
        >>> logits = np.array([[3.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
        >>> data = vilu.Embeddings.from_logits(logits, target=[0, 1])
        >>> (batch,) = data.batches(8)
        >>> batch.prediction.tolist(), batch.failure.tolist()
        ([0, 0], [0, 1])
    """

    @checked
    @torch_defaults()
    def __init__(
        self,
        logits: ArrayLike | Tensor,
        features: ArrayLike | Tensor | None = None,
        target: ArrayLike | Tensor | None = None,
        class_names: Sequence[str] | None = None,
        *,
        ids: Sequence[str] | None = None,
        answer: ArrayLike | Tensor | None = None,
    ) -> None:
        values = float32_logits(logits)
        n_rows, n_candidates = values.shape
        self.image, self.status = _vectors(features, n_rows)
        is_broken = ~torch.isfinite(values).all(dim=1).numpy()
        self.status[is_broken] = NONFINITE
        self.space = logit_space(self.image.shape[1])
        self.text = no_texts(n_candidates, self.space)
        self.target, self.outside = check_targets(target, n_rows, n_candidates)
        self.class_names = check_class_names(class_names, n_candidates)
        require_different(self.class_names)
        self.ids = check_ids(ids, n_rows)
        self._columns = {LOGITS: values}
        if answer is not None:
            self._columns[ANSWER] = check_answers(answer, n_rows, self.class_names, n_candidates)
        self.columns = frozenset(self._columns)

    def image_rows(self, index: Tensor) -> Tensor:
        """Vectors (B, D) of the rows; (B, 0) if they have none.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> data = vilu.Embeddings.from_logits(np.eye(2), features=[[3.0, 4.0], [0.0, 1.0]])
            >>> data.image_rows(torch.tensor([1])).tolist()
            [[0.0, 1.0]]
        """
        return rows_at(self.image, index)


def logit_space(width: int) -> EmbeddingSpace:
    """The space of rows with given logits and vectors of this width, which nothing scales."""
    return EmbeddingSpace(width, logit_scale=1.0)


def no_texts(n_candidates: int, space: EmbeddingSpace) -> Tensor:
    """Zeros (K, D) in place of the embeddings of candidates."""
    return torch.zeros(n_candidates, space.embed_dim, dtype=torch.float32)


def float32_logits(logits: ArrayLike | Tensor) -> Tensor:
    """Logits (N, K) in float32, with the answer of every row that the given numbers have."""
    given = as_array(logits, "logits")
    rows = as_matrix(given, "logits", scaled=False)
    if not len(rows):
        return rows
    answer = torch.from_numpy(given.argmax(axis=1))
    is_rounded_away = (rows.argmax(dim=1) != answer) & torch.isfinite(rows).all(dim=1)
    moved = is_rounded_away.nonzero().squeeze(1)
    # The next number of float32 above the largest: two logits that were different had become equal.
    above = torch.nextafter(rows[moved].amax(dim=1), torch.tensor(torch.inf))
    rows[moved, answer[moved]] = above
    return rows


def require_different(names: Sequence[str] | None) -> None:
    """Raise DataError if two candidates with logits of their own have one name."""
    if names is None or len(set(names)) == len(names):
        return
    repeated = sorted({name for name in names if names.count(name) > 1})
    raise DataError(
        f"candidates with logits must have different names. Got {len(repeated)} names more than "
        f"once, the first is {repeated[0]!r}. Rename it, or add up the probabilities of its "
        "candidates: log(exp(a) + exp(b)) is the logit of both."
    )


def _vectors(features: ArrayLike | Tensor | None, n_rows: int) -> tuple[Tensor, NDArray[np.uint8]]:
    """Unit vectors (N, D) of the rows and their status codes; (N, 0) if there are none."""
    if features is None:
        return torch.zeros(n_rows, 0, dtype=torch.float32), np.full(n_rows, VALID, np.uint8)
    n_features = len(as_array(features, "features"))
    if n_features != n_rows:
        raise DataError(
            f"features must have one row per row of logits ({n_rows}). Got {n_features} instead."
        )
    vectors, status, _ = normalised(as_matrix(features, "features"))
    return vectors, status
