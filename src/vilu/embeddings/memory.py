"""Embedding sources in memory: rows with shared candidates, or image-caption pairs.

Shapes: N rows, K candidate texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vilu.device import torch_defaults
from vilu.embeddings.checks import (
    check_answers,
    check_class_names,
    check_ids,
    check_targets,
    require_usable_rows,
    unit_rows,
)
from vilu.embeddings.column_checks import check_columns
from vilu.embeddings.columns import ANSWER, TEXT_COLUMNS
from vilu.embeddings.pairs import PairSource, Pools, require_full_pools
from vilu.embeddings.similarity import select_rows
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.validation import checked

if TYPE_CHECKING:
    from vilu.embeddings.logits import LogitEmbeddings


class Embeddings(EmbeddingSource):
    """Image embeddings in memory, with the same K candidates for all rows.

    Args:
        image: (N, D) image embeddings, numpy or torch, any float dtype.
        text: (K, D) candidate embeddings.
        target: (N,) row numbers of ``text``, or names in ``class_names``. An unknown target is -1
            or "". A picture outside all classes has the target -2 (``vilu.OUTSIDE``) or
            "(outside)". None if no label is known.
        logit_scale: Multiplier of the cosine.
        logit_bias: Added to every logit.
        class_names: K names.
        ids: N row identifiers. By default the row numbers.
        space: The space's full identity, if known. Then ``logit_scale`` and ``logit_bias`` are
            taken from ``space``.
        columns: Further data for some methods, by name (``vilu.embeddings.columns``). The column
            "answer" has N answers from another model: row numbers of ``text``, or class names.

    All arrays are copied. Rows are normalised to unit norm, with a warning if they had another
    norm. An image row with NaN, infinity or zero norm is not usable. Such a row is marked in
    ``status``, is never used for training, and has the uncertainty NaN.

    Classes with exactly equal texts, or with equal names, are the same answer. Such classes are
    merged into their first class, and a warning is logged. Then K, names and targets describe the
    merged classes, and ``candidate_of`` has the candidate for every original class.

    Raises:
        DataError: If shapes disagree, a target is neither a row number of ``text`` nor a class
            name, a text row is unusable, or classes with the same name have different texts.

    Examples:
        >>> import numpy as np, vilu
        >>> names = ["cat", "dog", "cup"]
        >>> image = text = np.eye(3)  # image i is most similar to text i
        >>> target = ["cat", "dog", "dog"]  # but image 2 is a dog
        >>> data = vilu.Embeddings(image, text, target=target, class_names=names)
        >>> data
        Embeddings(n=3, K=3, D=3, labelled=3)
        >>> (batch,) = data.batches(8)
        >>> [names[i] for i in batch.prediction]
        ['cat', 'dog', 'cup']
        >>> batch.failure.tolist()  # the third answer is wrong
        [0, 0, 1]
        >>> data[1:].target.tolist()  # rows are selected by a slice, a mask or indices
        [1, 1]
    """

    @checked
    @torch_defaults()
    def __init__(  # noqa: PLR0913 - one argument per property of the data
        self,
        image: ArrayLike | Tensor,
        text: ArrayLike | Tensor,
        *,
        target: ArrayLike | Tensor | None = None,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        class_names: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        space: EmbeddingSpace | None = None,
        columns: Mapping[str, ArrayLike | Tensor] | None = None,
    ) -> None:
        self.image, self.status = unit_rows(image, "image")
        self.text = require_usable_rows(text, "text")
        self.space = space or EmbeddingSpace(
            embed_dim=self.image.shape[1],
            logit_scale=float(logit_scale),
            logit_bias=float(logit_bias),
        )
        self._require_width("image", self.image)
        self._require_width("text", self.text)
        self.class_names = check_class_names(class_names, len(self.text))
        self.target, self.outside = check_targets(
            target,
            n_rows=len(self.image),
            n_candidates=len(self.text),
            class_names=self.class_names,
        )
        self.ids = check_ids(ids, len(self.image))
        columns_without_answer = dict(columns or {})
        answer = columns_without_answer.pop(ANSWER, None)
        self._columns = check_columns(
            columns_without_answer,
            n_rows=len(self.image),
            n_texts=len(self.text),
            width=self.image.shape[1],
        )
        if answer is not None:
            self._columns[ANSWER] = check_answers(
                answer,
                n_rows=len(self.image),
                class_names=self.class_names,
                n_candidates=len(self.text),
            )
        self.columns = frozenset(self._columns)
        class_of_candidate = self._merge_equal_classes()
        if class_of_candidate is not None:  # class columns become candidate columns
            for name in TEXT_COLUMNS:
                if name in self._columns:
                    self._columns[name] = self._columns[name][class_of_candidate]

    def _require_width(self, name: str, rows: Tensor) -> None:
        """Raise DataError if ``rows`` are not as wide as the space."""
        if rows.shape[1] != self.space.embed_dim:
            raise DataError(
                f"image and text must share one width. Got {self.space.embed_dim}, "
                f"but {name} has {rows.shape[1]}."
            )

    def image_rows(self, index: Tensor) -> Tensor:
        """Return the rows (B, D) of ``image`` at ``index``.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> data = vilu.Embeddings(image=np.eye(3), text=np.eye(3)[:2])
            >>> data.image_rows(torch.tensor([2, 0])).tolist()
            [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        """
        return select_rows(self.image, index)

    @staticmethod
    def from_logits(
        logits: ArrayLike | Tensor,
        features: ArrayLike | Tensor | None = None,
        target: ArrayLike | Tensor | None = None,
        class_names: Sequence[str] | None = None,
        *,
        ids: Sequence[str] | None = None,
        answer: ArrayLike | Tensor | None = None,
    ) -> LogitEmbeddings:
        """Make rows from any classifier's logits, in place of candidate embeddings.

        See ``LogitEmbeddings``.

        Examples:
            >>> import vilu
            >>> logits = [[2.0, 0.0], [-1.0, 1.0]]
            >>> data = vilu.Embeddings.from_logits(logits, class_names=["cat", "dog"])
            >>> # in both rows the logits differ by 2, so the uncertainty is 1 / (1 + exp(2))
            >>> vilu.MCM().predict_uncertainty(data).round(2)
            array([0.12, 0.12])
        """
        from vilu.embeddings.logits import LogitEmbeddings

        return LogitEmbeddings(logits, features, target, class_names, ids=ids, answer=answer)

    @staticmethod
    def pairs(
        image: ArrayLike | Tensor,
        text: ArrayLike | Tensor,
        pool_size: int | Pools = 1024,
        logit_scale: float = 100.0,
    ) -> PairEmbeddings:
        """Make image-caption pairs: row i of ``image`` belongs to row i of ``text``.

        See ``PairEmbeddings``.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings.pairs(image=np.eye(6), text=np.eye(6), pool_size=3)
            >>> # six pairs fill two pools: an image is matched against three captions
            >>> # the batch size is 3 as well, so each pool comes as one batch
            >>> [batch.index.tolist() for batch in data.batches(3)]
            [[0, 1, 2], [3, 4, 5]]
        """
        return PairEmbeddings(image, text, pool_size, logit_scale)


class PairEmbeddings(PairSource):
    """Image-caption pairs in memory: each image is matched against the captions in a pool.

    The last rows have no score if they do not fill a pool, because a smaller pool would be an
    easier problem. An image with several captions is in several rows, once with each caption.

    Args:
        image: (N, D) image embeddings.
        text: (N, D) caption embeddings, in the order of ``image``.
        pool_size: Number of pairs in a pool. A pool has consecutive rows. Give a ``Pools`` object
            to choose the direction or other pools.
        logit_scale: Multiplier of the cosine.
        logit_bias: Added to every logit.
        ids: N row identifiers. By default the row numbers.
        space: The embedding space with the facts about the model, if known. Then ``logit_scale``
            and ``logit_bias`` are taken from ``space``.
        columns: Further data for some methods, by name (``vilu.embeddings.columns``).

    Raises:
        DataError: If the numbers of images and captions differ, if a row is unusable, or if the
            pairs do not fill a pool.

    Examples:
        >>> import numpy as np, torch, vilu
        >>> image = np.eye(4)
        >>> text = np.eye(4)[[0, 1, 3, 2]]  # the last two captions are swapped
        >>> data = vilu.PairEmbeddings(image, text, pool_size=2)
        >>> [batch.failure.tolist() for batch in data.batches(2)]
        [[0, 0], [1, 1]]
        >>> last = torch.tensor([3])
        >>> data.picture_rows(last).tolist()
        [[0.0, 0.0, 0.0, 1.0]]
        >>> data.caption_rows(last).tolist()
        [[0.0, 0.0, 1.0, 0.0]]

        One image in two rows, with two captions:

        >>> image = np.eye(4)[[0, 0, 2, 3]]
        >>> text = np.eye(4)[[1, 0, 2, 3]]
        >>> data = vilu.PairEmbeddings(image, text, pool_size=3)
        >>> (batch,) = data.batches(3)
        >>> batch.prediction.tolist()  # both rows find the second caption
        [1, 1, 2]
        >>> batch.failure.tolist()  # each caption of the image is right
        [0, 0, 0]
        >>> data.status.tolist()  # 3, "short_pool": the last row fills no pool
        [0, 0, 0, 3]
    """

    @checked
    @torch_defaults()
    def __init__(
        self,
        image: ArrayLike | Tensor,
        text: ArrayLike | Tensor,
        pool_size: int | Pools = 1024,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        *,
        ids: Sequence[str] | None = None,
        space: EmbeddingSpace | None = None,
        columns: Mapping[str, ArrayLike | Tensor] | None = None,
    ) -> None:
        self.image = require_usable_rows(image, "image")
        self.text = require_usable_rows(text, "text")
        if self.image.shape != self.text.shape:
            shapes = f"{tuple(self.image.shape)} and {tuple(self.text.shape)}"
            raise DataError(f"image and text must be pairs of one shape. Got {shapes} instead.")
        if isinstance(pool_size, int):
            pool_size = Pools(pool_size, seed=None)
        self.pools = pool_size
        self.pool_size = self.pools.size
        require_full_pools(len(self.image), self.pool_size, subject="this set of pairs")
        self.space = space or EmbeddingSpace(
            embed_dim=self.image.shape[1],
            logit_scale=float(logit_scale),
            logit_bias=float(logit_bias),
        )
        # The position in a pool if the rows keep their order. The targets of the batches are from
        # ``candidates``.
        self.target = torch.arange(len(self.image)) % self.pool_size
        self.ids = check_ids(ids, len(self.image))
        self._columns = check_columns(
            columns,
            n_rows=len(self.image),
            n_texts=len(self.text),
            width=self.image.shape[1],
        )
        self.columns = frozenset(self._columns)

    def picture_rows(self, index: Tensor) -> Tensor:
        """Return the rows (B, D) of ``image`` at ``index``."""
        return self.image[index]

    def caption_rows(self, index: Tensor) -> Tensor:
        """Return the rows (B, D) of ``text`` at ``index``."""
        return self.text[index]
