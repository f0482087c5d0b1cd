"""Rows with logits from any classifier. The candidates have no embeddings."""

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
    normalise_rows,
)
from vilu.embeddings.columns import ANSWER, LOGITS
from vilu.embeddings.similarity import select_rows
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.validation import checked


class LogitEmbeddings(EmbeddingSource):
    """Rows with K logits each, from any classifier, and optionally a vector per row.

    The logits may come from a ResNet, a fine-tuned CLIP, SigLIP with its bias, or a scikit-learn
    decision function. A row's answer is the candidate with the largest logit, the first of equal
    logits. Methods that use only logits can score these rows. With ``features``, methods that use
    a vector per row can score these rows, too (``vilu_plus``). Methods that need candidate
    embeddings raise an error for these rows.

    Args:
        logits: (N, K) logits, numpy or torch, any float dtype. The logits are converted to float32,
            and not normalised. Different logits in the array may be equal in float32. Even then,
            the answer is the candidate with the largest logit in the array.
        features: (N, D) a vector for each row, for example the inputs to the classifier's last
            layer. The vectors are normalised to unit norm. None: the rows have no vector.
        target: (N,) candidate indices, or names in ``class_names``. An unknown target is -1 or "".
            A picture outside all classes has the target -2 (``vilu.OUTSIDE``) or "(outside)". None
            if no label is known.
        class_names: K different names.
        ids: N row identifiers. By default the row numbers. Without ``features`` rows can be
            recognised by identifier only.
        answer: (N,) answers to judge with ``answer="given"``: candidate indices or names.

    A row is not usable if one of its logits is not finite, or if the features have no direction.
    An unusable row is marked in ``status``, is never used for training, and has the uncertainty
    NaN.

    Raises:
        DataError: If shapes disagree, a target is no candidate, or two candidates have equal names.

    Examples:
        >>> import numpy as np, vilu
        >>> logits = np.array([[3.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
        >>> data = vilu.Embeddings.from_logits(logits, target=[0, 1])
        >>> (batch,) = data.batches(8)
        >>> batch.prediction.tolist()  # in the second row, the first of two equal logits
        [0, 0]
        >>> batch.failure.tolist()  # the second answer is wrong
        [0, 1]
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
        float32_logits = logits_to_float32(logits)
        n_rows, n_candidates = float32_logits.shape
        self.image, self.status = _unit_vectors(features, n_rows)
        is_finite = torch.isfinite(float32_logits).all(dim=1)
        self.status[~is_finite.numpy()] = NONFINITE
        self.space = logit_space(self.image.shape[1])
        self.text = zero_texts(n_candidates, self.space)
        self.class_names = check_class_names(class_names, n_candidates)
        require_distinct_names(self.class_names)
        self.target, self.outside = check_targets(target, n_rows, n_candidates, self.class_names)
        self.ids = check_ids(ids, n_rows)
        self._columns = {LOGITS: float32_logits}
        if answer is not None:
            self._columns[ANSWER] = check_answers(answer, n_rows, self.class_names, n_candidates)
        self.columns = frozenset(self._columns)

    def image_rows(self, index: Tensor) -> Tensor:
        """Return feature vectors (B, D) of the rows at ``index``. (B, 0) if there are no features.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> data = vilu.Embeddings.from_logits(np.eye(2), features=[[3.0, 0.0], [0.0, 1.0]])
            >>> data.image_rows(torch.tensor([0])).tolist()  # (3, 0) was normalised
            [[1.0, 0.0]]
        """
        return select_rows(self.image, index)


def logit_space(width: int) -> EmbeddingSpace:
    """Return the space for rows with logits. The scale is 1, because logits need no scaling.

    Args:
        width: Width D of the row vectors. 0 for rows without vectors.
    """
    return EmbeddingSpace(width, logit_scale=1.0)


def zero_texts(n_candidates: int, space: EmbeddingSpace) -> Tensor:
    """Return zeros (K, D) in place of texts, because these candidates have no embeddings."""
    return torch.zeros(n_candidates, space.embed_dim, dtype=torch.float32)


def logits_to_float32(logits: ArrayLike | Tensor) -> Tensor:
    """Convert logits (N, K) to float32 without changing any row's answer."""
    exact_logits = as_array(logits, "logits")
    rounded_logits = as_matrix(exact_logits, "logits", keep_direction=False)
    if not len(rounded_logits):
        return rounded_logits
    exact_answer = exact_logits.argmax(axis=1)
    answer = torch.from_numpy(exact_answer)
    is_answer_changed = rounded_logits.argmax(dim=1) != answer
    is_finite = torch.isfinite(rounded_logits).all(dim=1)
    changed_rows = (is_answer_changed & is_finite).nonzero().squeeze(1)
    # In these rows, rounding made an earlier candidate's logit equal to the answer's logit.
    # The answer's logit is set to the next larger float32 number, to be the largest logit again.
    largest = rounded_logits[changed_rows].amax(dim=1)
    infinity = torch.tensor(torch.inf)
    next_larger = torch.nextafter(largest, infinity)
    answer_columns = answer[changed_rows]
    rounded_logits[changed_rows, answer_columns] = next_larger
    return rounded_logits


def require_distinct_names(names: Sequence[str] | None) -> None:
    """Raise DataError if two candidates have the same name.

    Candidates with the same name would be the same answer, but their logits may differ.
    """
    if names is None or len(set(names)) == len(names):
        return
    repeated_names = sorted({name for name in names if names.count(name) > 1})
    raise DataError(
        "candidates with logits must have different names. "
        f"Got {len(repeated_names)} names more than once, the first is {repeated_names[0]!r}. "
        "Rename it, or add up the probabilities of its candidates: log(exp(a) + exp(b)) is the "
        "logit of both."
    )


def _unit_vectors(
    features: ArrayLike | Tensor | None, n_rows: int
) -> tuple[Tensor, NDArray[np.uint8]]:
    """Return unit vectors (N, D) and status codes (N,). Vectors are (N, 0) without features."""
    if features is None:
        return torch.zeros(n_rows, 0, dtype=torch.float32), np.full(n_rows, VALID, np.uint8)
    n_feature_rows = len(as_array(features, "features"))
    if n_feature_rows != n_rows:
        raise DataError(
            f"features must have one row per row of logits ({n_rows}). Got {n_feature_rows} "
            "instead."
        )
    matrix = as_matrix(features, "features")
    vectors, status, _ = normalise_rows(matrix)
    return vectors, status
