"""Data for predictors: embedding sources, row batches, and views of rows."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.checks import (
    SHORT_POOL,
    VALID,
    Identifiers,
    IdentityKind,
    RowNumbers,
    as_array,
    check_indices,
    hash_names,
    hash_rows,
)
from vilu.embeddings.columns import (
    ANSWER,
    COLUMN_COMMANDS,
    LOGITS,
    ROW_COLUMNS,
    TEXT_COLUMNS,
    DataKind,
)
from vilu.embeddings.similarity import (
    Matches,
    RivalWeights,
    ZeroShot,
    float64,
    index_of_first_equal,
    row_blocks,
    zero_shot,
)
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import OUTSIDE, UNKNOWN, DataError, UsageError
from vilu.validation import checked, describe_value, require_mask

if TYPE_CHECKING:
    from vilu.embeddings.split import SplitParts

HASH_BLOCK_ROWS = 2**14
"""Number of rows in a block. The embeddings in a block are hashed together."""

SAME_TEXT_COSINE = 0.999
"""Minimum cosine between the texts of two classes with equal names.

Below this cosine, an error is raised. Rounding to float16 changes a cosine by less than 1e-6.
"""

MAX_MERGED_SHOWN = 5
"""Largest number of merged classes to name in a message."""

logger = logging.getLogger(__name__)
Result = TypeVar("Result")  # result of the ``function`` argument of ``_map_parts``


@dataclass(frozen=True)
class Candidates:
    """The candidate texts for some rows, and the right candidate for each row."""

    text: Tensor  # (K, D) float32 unit-norm candidates
    target: Tensor  # (B,) int64 index of the right candidate. -1 where unknown
    matches: Matches | None = None  # None: only a row's target is right
    # (K,) int64 source row of each candidate. None: all rows share the candidates.
    row_of_candidate: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Some images with their candidate texts, all in float32 on the same device.

    The candidates are the prompts of K classes, or the captions in a pool. In both cases all rows
    in the batch share the candidates, and a target is a candidate's index. If captions are matched
    against images, ``image`` holds the captions and ``text`` holds the images.

    Attributes:
        image: (B, D) unit-norm image embeddings.
        text: (K, D) unit-norm candidate embeddings.
        target: (B,) int64 index of the right candidate. -1 where unknown.
        index: (B,) int64 row numbers in the source.
        logit_scale: Multiplier of the cosine.
        logit_bias: Added to every logit.
        columns: The requested columns, by name (``vilu.embeddings.columns``).
        matches: The right candidates, if images or captions in a pool repeat. None: only a row's
            target is right.
        outside: (B,) bool, true for rows without a right candidate. Any answer to such a row is
            wrong. None: there is no such row.

    Examples:
        >>> import torch, vilu
        >>> image = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
        >>> text = torch.eye(2)
        >>> target = torch.tensor([0, 0])
        >>> batch = vilu.Batch(image, text, target, index=torch.arange(2), logit_scale=10.0)
        >>> batch.prediction.tolist()
        [1, 0]
        >>> batch.failure.tolist()  # the first answer is wrong
        [1, 0]
        >>> batch.rows(slice(1)).logits.round(decimals=3).tolist()  # 10 * cosine, of row 0
        [[6.0, 8.0]]
    """

    image: Tensor
    text: Tensor
    target: Tensor
    index: Tensor
    logit_scale: float
    logit_bias: float = 0.0
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    matches: Matches | None = None
    outside: Tensor | None = None

    @cached_property
    def logits(self) -> Tensor:
        """Logits (B, K): logit_scale * cosine + logit_bias, in float32 even under autocast."""
        with torch.autocast(self.image.device.type, enabled=False):
            logits = (self.image @ self.text.T).mul_(self.logit_scale)
            if self.logit_bias:
                logits.add_(self.logit_bias)
            return logits

    @cached_property
    def zero_shot(self) -> ZeroShot:
        """Answers, largest logits and log-normalisers, computed in bounded memory."""
        are_logits_in_memory = "logits" in self.__dict__  # where a computed cached property is
        if are_logits_in_memory:
            return self.rivals.zero_shot(self.first_equal_index)
        return zero_shot(
            self.image, self.text, self.first_equal_index, self.logit_scale, self.logit_bias
        )

    @cached_property
    def rivals(self) -> RivalWeights:
        """Softmax weights of all candidates except the zero-shot answer."""
        return RivalWeights.from_logits(self.logits)

    @cached_property
    def judged_rivals(self) -> RivalWeights:
        """Softmax weights of all candidates except the judged answer."""
        if ANSWER in self.columns:
            return RivalWeights.from_logits(self.logits, self.columns[ANSWER][:, None])
        return self.rivals

    @cached_property
    def first_equal_index(self) -> Tensor:
        """Index (K,) int64 of the first candidate with the same embedding, for every candidate."""
        return index_of_first_equal(self.text)

    @property
    def first_equal(self) -> Tensor:
        """Former name of ``first_equal_index``."""
        warnings.warn(
            "Batch.first_equal is Batch.first_equal_index now. The former name will be removed in "
            "0.4.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.first_equal_index

    @property
    def prediction(self) -> Tensor:
        """Judged answers (B,) int64: the column "answer" if available, or zero-shot answers.

        The zero-shot answer is the candidate with the largest logit, the first of equal logits.
        """
        if ANSWER in self.columns:
            return self.columns[ANSWER]
        return self.zero_shot.prediction

    @property
    def answer_probability(self) -> Tensor:
        """Zero-shot probability (B,) float32 of the judged answer."""
        if ANSWER not in self.columns:
            return self.zero_shot.max_probability
        answer_column = self.prediction[:, None]
        answer_logit = self.logits.gather(1, answer_column).squeeze(1)
        return (answer_logit - self.zero_shot.log_norm).exp()

    @cached_property
    def failure(self) -> Tensor:
        """Failures (B,) int64: 1 for a wrong answer, 0 for a right answer, -1 if unknown."""
        if self.matches is None:
            is_right = self.prediction == self.target
        else:
            is_right = self.matches.are_right(self.prediction)
        failure_if_known = (~is_right).long()
        failure = torch.where(self.target != UNKNOWN, failure_if_known, UNKNOWN)
        if self.outside is None:
            return failure
        return failure.masked_fill(self.outside, 1)  # any answer is wrong for these rows

    @property
    def target_log_probability(self) -> Tensor:
        """Zero-shot log-probability log p_y (B,) float32 of the target y.

        The value is -inf for a row without a right candidate. For a row with an unknown target, the
        value is the log-probability of candidate 0.
        """
        log_probability = self._target_log_probability()
        if self.outside is None:
            return log_probability
        return log_probability.masked_fill(self.outside, -torch.inf)

    def _target_log_probability(self) -> Tensor:
        """Compute ``target_log_probability`` as if no row were outside."""
        target = self.target.clamp(min=0)
        with torch.autocast(self.image.device.type, enabled=False):
            if self.matches is not None:
                # Several candidates may be right, so all logits are needed: in bounded memory.
                log_probabilities = []
                n_rows = len(target)
                for block in row_blocks(n_rows, n_candidates=len(self.text), size=n_rows):
                    batch = self.rows(block)
                    log_probability = batch.log_likelihood(batch.logits)
                    log_probabilities.append(log_probability)
                return torch.cat(log_probabilities)
            # Each target is a single candidate, so a single dot product per row is enough.
            cosine = (self.image * self.text[target]).sum(dim=1)
            return cosine * self.logit_scale + self.logit_bias - self.zero_shot.log_norm

    def log_likelihood(self, logits: Tensor) -> Tensor:
        """Compute the target's log-probability (B,) under the softmax of ``logits`` (B, K).

        If several candidates of a row are right, the result is the log of their summed
        probabilities.

        Examples:
            >>> import torch, vilu
            >>> image = torch.tensor([[0.6, 0.8]])
            >>> target, index = torch.tensor([1]), torch.tensor([0])
            >>> batch = vilu.Batch(image, torch.eye(2), target, index, logit_scale=10.0)
            >>> # the logits are 6 and 8: candidate 1 has the probability 1 / (1 + exp(6 - 8))
            >>> probability = batch.log_likelihood(batch.logits).exp()
            >>> round(probability.item(), 4)
            0.8808
        """
        if self.matches is None:
            target_column = self.target.to(logits.device)[:, None]
            target_logit = logits.gather(1, target_column).squeeze(1)
            return target_logit - logits.logsumexp(dim=1)
        is_wrong = ~self.right.to(logits.device)
        right_logits = logits.masked_fill(is_wrong, -torch.inf)
        return right_logits.logsumexp(dim=1) - logits.logsumexp(dim=1)

    @property
    def right(self) -> Tensor:
        """Mask (B, K) of every row's right candidates. The targets must be known.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.eye(3)[[0, 0, 1]]  # the first two rows are one image with two captions
            >>> data = vilu.Embeddings.pairs(image, np.eye(3), pool_size=3)
            >>> batch = next(data.batches(3))
            >>> first_query = batch.index.tolist().index(0)
            >>> n_right = batch.right.sum(dim=1)
            >>> n_right[first_query].item()  # both captions
            2
        """
        if self.matches is None:
            candidates = torch.arange(len(self.text), device=self.target.device)
            return candidates == self.target[:, None]
        return self.matches.right_mask()

    def alike(self, answer: Tensor) -> Tensor:
        """Return a mask (B, K): which candidates are the same answer as ``answer`` (B,).

        Captions of the same image are the same answer. Images of the same caption are the same
        answer, too. All images and captions in the pool are compared. If only the row's image or
        caption were compared, the mask would reveal the right answer.

        Examples:
            >>> import torch, vilu
            >>> image, text = torch.eye(2, 3), torch.eye(3)
            >>> target = index = torch.arange(2)
            >>> batch = vilu.Batch(image, text, target, index, logit_scale=10.0)
            >>> batch.alike(torch.tensor([1, 2])).int().tolist()  # no answer has an equal
            [[0, 1, 0], [0, 0, 1]]
        """
        if self.matches is None:
            candidates = torch.arange(len(self.text), device=answer.device)
            return candidates == answer[:, None]
        matches = self.matches.to(answer.device)
        return matches.same_answer_mask(answer)

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device."""
        if self.image.device == torch.device(device):
            return self
        moved_tensors = {}
        for name in ("image", "text", "target", "index", "matches", "outside"):
            value = getattr(self, name)
            if value is not None:
                moved_tensors[name] = value.to(device)
        columns = {name: tensor.to(device) for name, tensor in self.columns.items()}
        batch = replace(self, **moved_tensors, columns=columns)
        if self._has_answers:
            moved_answers = self.zero_shot.to(device)
            batch.answered(moved_answers)
        return batch

    def rows(self, part: slice | Tensor) -> Batch:
        """Return a batch of some rows, selected by a slice or by indices, with all candidates."""
        columns = dict(self.columns)
        for name in columns:
            if name in ROW_COLUMNS:
                columns[name] = columns[name][part]
        batch = replace(
            self,
            image=self.image[part],
            target=self.target[part],
            index=self.index[part],
            columns=columns,
            matches=None if self.matches is None else self.matches.take_rows(part),
            outside=None if self.outside is None else self.outside[part],
        )
        if self._has_answers:
            answers = self.zero_shot.take(part)
            batch.answered(answers)
        if "first_equal_index" in self.__dict__:  # still right, because the candidates are the same
            batch.__dict__["first_equal_index"] = self.first_equal_index
        return batch

    def by_pool(self) -> Iterator[tuple[slice, Batch]]:
        """Yield each pool's row slice and batch. Here, all rows form a single pool."""
        yield slice(0, len(self.index)), self

    def judging(self, answer: Tensor) -> Batch:
        """Return the same batch, but judge the answers ``answer`` (B,), not the zero-shot answers.

        Examples:
            >>> import torch, vilu
            >>> image, target, index = (
            ...     torch.tensor([[0.6, 0.8]]),
            ...     torch.tensor([0]),
            ...     torch.arange(1),
            ... )
            >>> batch = vilu.Batch(image, torch.eye(2), target, index, logit_scale=10.0)
            >>> batch.failure.tolist()  # the zero-shot answer is candidate 1, which is wrong
            [1]
            >>> batch.judging(torch.tensor([0])).failure.tolist()  # candidate 0 is right
            [0]
        """
        batch = replace(self, columns={**self.columns, ANSWER: answer})
        for name in ("logits", "zero_shot", "rivals", "first_equal_index"):
            # copy cached properties, to avoid computing them again
            if name in self.__dict__:
                batch.__dict__[name] = self.__dict__[name]
        return batch

    def answered(self, answers: ZeroShot) -> Batch:
        """Set zero-shot answers computed before, and return this batch."""
        self.__dict__["zero_shot"] = answers
        return self

    @property
    def _has_answers(self) -> bool:
        """Whether the zero-shot answers have been computed."""
        return "zero_shot" in self.__dict__


@dataclass(frozen=True)
class WholeLogits(Batch):
    """A batch with all logits in memory and without equal candidates."""

    @cached_property
    def zero_shot(self) -> ZeroShot:
        """Answers, largest logits and log-normalisers from the logits."""
        return self.rivals.zero_shot(self.first_equal_index)

    @cached_property
    def first_equal_index(self) -> Tensor:
        """Index (K,) int64 of the first candidate with the same embedding, for every candidate.

        Here this is the candidate's own index, because all candidates differ.
        """
        n_candidates = self.text.shape[-2]  # of (K, D), or of (P, K, D) in a ``PooledBatch``
        return torch.arange(n_candidates, device=self.text.device)

    def _target_log_probability(self) -> Tensor:
        """Compute the values as in ``Batch``, but from the logits in memory."""
        target = self.target.clamp(min=0)
        target_logit = self.logits.gather(1, target[:, None]).squeeze(1)
        return target_logit - self.zero_shot.log_norm


@dataclass(frozen=True)
class LogitBatch(WholeLogits):
    """A batch of rows with logits from another classifier: the column "logits".

    The candidates have no embeddings, so ``text`` (K, D) is zero.
    """

    @cached_property
    def logits(self) -> Tensor:
        """Logits (B, K) float32 from another classifier."""
        return self.columns[LOGITS]


@dataclass(frozen=True)
class PooledBatch(WholeLogits):
    """A batch of several consecutive pools of the same size, for methods that use only logits.

    ``text`` is (P, K, D). A target is a candidate's index within the row's pool. The logits are bit
    for bit the same as in single-pool batches. No two candidates in a pool are equal.
    """

    @cached_property
    def logits(self) -> Tensor:
        """Zero-shot logits (B, K) float32: a row is compared with the candidates in its pool."""
        size = self.text.shape[1]  # a pool has as many rows as candidates
        with torch.autocast(self.image.device.type, enabled=False):
            logits = self.image.new_empty(len(self.image), size)
            pools = zip(self.image.split(size), self.text, logits.split(size), strict=True)
            # one product per pool, because a batched matrix product may round differently
            for image, text, out in pools:
                torch.mm(image, text.T, out=out)
            logits.mul_(self.logit_scale)
            if self.logit_bias:
                logits.add_(self.logit_bias)
            return logits

    def by_pool(self) -> Iterator[tuple[slice, Batch]]:
        """Yield each pool's row slice and batch.

        If the zero-shot answers are already computed, the yielded batches have these answers, too.
        """
        size = self.text.shape[1]  # a pool has as many rows as candidates
        for number, text in enumerate(self.text):
            part = slice(number * size, (number + 1) * size)
            pool = Batch(
                image=self.image[part],
                text=text,
                target=self.target[part],
                index=self.index[part],
                logit_scale=self.logit_scale,
                logit_bias=self.logit_bias,
                outside=None if self.outside is None else self.outside[part],
            )
            if self._has_answers:
                answers = self.zero_shot.take(part)
                pool.answered(answers)
            yield part, pool


class EmbeddingSource(ABC):
    """Rows of image embeddings with their candidate texts. Predictors fit and score a source.

    vilu and other packages read the rows through these methods:

    - ``batches`` to score, and ``many`` to score by the logits alone
    - ``shuffled`` and ``steps`` to train
    - ``candidates`` to get the texts
    - ``identified_by`` and ``identities`` to find the same rows in another source

    Attributes:
        space: The embedding space.
        class_names: Candidate names, or None (captions, or bare arrays).
        ids: (N,) row identifiers for display. Rows are compared by ``identities``.
        target: (N,) int64 index of every row's right candidate. -1 where unknown.
        text: (K, D) candidates, if all rows share the candidates.
        cluster: (N,) cluster name of every row. The answers to rows in the same cluster may be
            wrong together. None: no clusters are known.
        answer_numbers: (N,) answer number of every row, if there are clusters and answers are no
            candidates. Equal answers have equal numbers. None: there are no such numbers.
        pool_size: Number of rows in a pool. The captions of these rows are the pool's candidates.
            None if all rows share the candidates.
        columns: Names of the available columns (``vilu.embeddings.columns``).
        candidate_of: For every original class, the int64 index of its candidate. Classes with equal
            texts were merged into the same candidate. None if all texts were different.
        second: A second source (``vilu.embeddings.two_models``): the same rows and possibly further
            rows, embedded by a second model. None if there is no second model.
        stored_dtype: Number format of the embeddings in the store. None if the embeddings are not
            from a store.
        device: Device for scoring the rows. None: the predictor chooses a device.
        fingerprint: Hash over all rows. None if computing the hash would need a pass over all
            embeddings.

    Examples:
        >>> import numpy as np, torch, vilu
        >>> image, text = np.eye(4), np.eye(4)[:2]
        >>> data = vilu.Embeddings(image, text, target=[0, 1, -1, 1])
        >>> len(data), data.n_candidates
        (4, 2)
        >>> data.candidates(torch.tensor([3])).target.tolist()  # of row 3
        [1]
        >>> labelled = data.without(data.target.numpy() < 0)  # three rows
        >>> [batch.index.tolist() for batch in labelled.steps(2)]
        [[0, 1], [2]]
    """

    # how to make a source, for messages about an argument of another type
    how_to_make: ClassVar[str] = (
        "embeddings (vilu.Embeddings(image, text, target=target) of arrays, "
        "vilu.open_source(path) of a store) or answers (vilu.open_table(table))"
    )

    data_kind: ClassVar[DataKind] = "embeddings"

    space: EmbeddingSpace
    class_names: tuple[str, ...] | None
    ids: Sequence[str]
    target: Tensor
    text: Tensor
    pool_size: int | None = None
    cluster: Sequence[str] | None = None
    answer_numbers: NDArray[np.int64] | None = None
    columns: frozenset[str] = frozenset()
    candidate_of: Tensor | None = None
    second: EmbeddingSource | None = None
    stored_dtype: str | None = None
    device: torch.device | None = None
    fingerprint: str | None = None
    _columns: Mapping[str, Tensor] = {}  # columns in memory

    def _merge_equal_classes(self) -> Tensor | None:
        """Merge classes that are the same answer into a single candidate.

        Return the class number (K,) int64 from which each candidate is taken. None if no class is
        merged. See ``index_of_first_same_answer``.
        """
        first_class = index_of_first_same_answer(self.text, self.class_names)
        class_of_candidate: Tensor
        class_of_candidate, candidate_of = first_class.unique(return_inverse=True)
        if len(class_of_candidate) == len(candidate_of):
            return None
        names = self.class_names or tuple(f"class {i}" for i in range(len(candidate_of)))
        first_classes = first_class.tolist()
        message = _merge_message(names, first_classes)
        warn_once(message)
        self.candidate_of = candidate_of
        self.text = self.text[class_of_candidate]
        new_target = candidate_of[self.target]  # without meaning where the target is unknown
        self.target = torch.where(self.target == UNKNOWN, UNKNOWN, new_target)
        if ANSWER in self._columns:
            self._columns = {**self._columns, ANSWER: candidate_of[self._columns[ANSWER]]}
        if self.class_names:
            self.class_names = tuple(names[i] for i in class_of_candidate.tolist())
        return class_of_candidate

    def __len__(self) -> int:
        return len(self.target)

    def __array__(self, *_: object, **_more: object) -> NoReturn:
        raise UsageError(
            "a source of embeddings is no array, so functions that take arrays, such as "
            "scikit-learn's cross-validation, cannot use it. Select rows with data[rows]."
        )

    def __repr__(self) -> str:
        facts = {"n": len(self), "K": self.n_candidates, "D": self.space.embed_dim}
        if self.pool_size is not None:
            facts["pool_size"] = self.pool_size
        else:
            facts["labelled"] = int((self.target != UNKNOWN).sum())
        n_outside = int(self.outside.sum())
        if n_outside:
            facts["outside"] = n_outside
        parts = [f"{name}={value}" for name, value in facts.items()]
        if self.columns:
            parts.append(f"columns={sorted(self.columns)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __getitem__(
        self, rows: slice | Sequence[int] | Sequence[bool] | Tensor | NDArray[Any]
    ) -> EmbeddingSource:
        """Take some rows as a new source: a slice, a mask (N,) bool, or row indices (M,).

        See ``take``.

        Raises:
            DataError: If ``rows`` is a single number, because a source has no single rows.
            UsageError: If the source has captions, because the pools are made from all rows in the
                source.

        Examples:
            >>> import numpy as np, vilu
            >>> image, text = np.eye(4), np.eye(4)[:2]
            >>> data = vilu.Embeddings(image, text, target=[0, 1, -1, -1])
            >>> data[:3]
            RowSubset(n=3, K=2, D=4, labelled=2)
            >>> data[data.target >= 0]  # the labelled rows
            RowSubset(n=2, K=2, D=4, labelled=2)
            >>> data[[2, 0]].target.tolist()
            [-1, 0]
        """
        if isinstance(rows, slice):
            return self.take(np.arange(len(self))[rows])
        index = as_array(rows, "rows")
        if index.ndim == 0:
            raise DataError(
                "rows must be a slice, a mask or a list of indices, as in data[3:4] or data[[3]]. "
                f"Got {describe_value(rows)} instead."
            )
        if index.dtype == bool:
            index = np.flatnonzero(require_mask("rows", index, len(self)))
        return self.take(check_indices(index, len(self), "rows"))

    @property
    def has_vectors(self) -> bool:
        """Whether the rows have embeddings. If not, the rows have only logits."""
        return self.space.embed_dim > 0

    @property
    def has_texts(self) -> bool:
        """Whether the candidates have embeddings. If not, the rows have the column "logits"."""
        return LOGITS not in self.columns

    @property
    def n_candidates(self) -> int:
        """Number K of candidates. For pools, the maximum number of candidates per row."""
        return len(self.text)

    @abstractmethod
    def image_rows(self, index: Tensor) -> Tensor:
        """Return image embeddings (B, D) float32 of the rows ``index`` (B,) int64."""

    def candidates(self, index: Tensor) -> Candidates:
        """Return the candidates for the rows ``index``. Here all rows share the same candidates."""
        return Candidates(self.text, self.target[index])

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return column ``name``: the entries for the rows ``index``, or all entries.

        ``index`` selects entries only if the column has an entry per row. If the column belongs to
        the candidates, or to the whole model, all entries are returned. If the source has pools,
        the candidates are rows. Then a candidate column also has an entry per row.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> image = text = np.eye(2)
            >>> views = np.stack([image, image[::-1]], axis=1)  # two augmented views of each image
            >>> data = vilu.Embeddings(image, text, columns={"views": views})
            >>> data.column("views", torch.tensor([1])).tolist()  # both views of image 1
            [[[0.0, 1.0], [1.0, 0.0]]]
        """
        if name not in self._columns:
            command = COLUMN_COMMANDS.get(name, "vilu embed")
            raise DataError(f"these embeddings have no column {name!r}. Make it with `{command}`.")
        is_of_rows = name in ROW_COLUMNS
        if self.pool_size is not None:  # the candidates are also rows
            is_of_rows = is_of_rows or name in TEXT_COLUMNS
        if is_of_rows:
            return self._columns[name][index]
        return self._columns[name]

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """Status codes (N,): 0 if the embedding is usable, else an index of ``STATUS_NAMES``.

        See ``vilu.embeddings.checks``. By default all rows are usable.
        """
        return np.full(len(self), VALID, dtype=np.uint8)

    @cached_property
    def outside(self) -> Tensor:
        """Mask (N,) of rows known to have no right candidate.

        The target of such a row is -1, and any answer is wrong. By default no row is outside.
        """
        # a single False, expanded to N rows without taking memory for each row
        return torch.zeros(1, dtype=torch.bool, device="cpu").expand(len(self))

    @cached_property
    def usable_rows(self) -> Tensor:
        """Indices (M,) int64 of the usable rows, in scoring order.

        If there are pools, each pool consists of the next ``pool_size`` rows in this order.
        """
        usable_rows = np.flatnonzero(self.status == VALID)
        return torch.from_numpy(usable_rows)

    @property
    def identified_by(self) -> tuple[IdentityKind, ...]:
        """Identity kinds for finding the rows in another source, best first.

        Rows without a vector can be found only by name, because different pictures may have equal
        logits.
        """
        kinds: list[IdentityKind] = []
        if self.has_vectors:
            kinds.append("embeddings")
        if not isinstance(self.ids, RowNumbers):
            kinds.append("names")
        return tuple(kinds)

    def identities(
        self, by: IdentityKind, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Return identity hashes (M,) of ``rows`` (M,), by default of all rows.

        Equal hashes mean the same row.

        Args:
            by: A kind from ``identified_by``. With "embeddings", the hash has no meaning for a row
                without a usable embedding.
            rows: Row indices, in any order.

        Examples:
            >>> import numpy as np, vilu
            >>> image = text = np.eye(3)
            >>> train = vilu.Embeddings(image[:2], text).identities("embeddings")
            >>> test = vilu.Embeddings(image[1:], text).identities("embeddings")
            >>> np.isin(test, train).tolist()  # image 1 is in both sources
            [True, False]
        """
        if by == "names":
            if rows is None:
                return hash_names(self.ids)
            names = (self.ids[row] for row in rows.tolist())
            return hash_names(names)
        index = self._as_index(rows)
        return hash_row_blocks(index, self._hashed_numbers)

    def _as_index(self, rows: NDArray[np.int64] | None) -> Tensor:
        """Convert row indices to a tensor (M,) int64. By default the indices of all rows."""
        if rows is not None:
            return torch.from_numpy(rows)
        return torch.arange(len(self), device="cpu")

    def picture_identities(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the picture identities (M,) int64 of ``rows`` (M,), by default of all rows.

        Rows with equal identities from 0 to 2^63 - 1 show the same picture. Such an identity is a
        hash of the picture's encoded bytes. If the bytes are not known, the embedding is hashed
        instead. All rows without a usable embedding have the identity -1.

        For image-caption pairs, only the image is hashed. So the captions and the search direction
        have no influence.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.eye(4)[[0, 0, 1, 1]]  # each image has two captions
            >>> data = vilu.Embeddings.pairs(image, text=np.eye(4), pool_size=2)
            >>> first, second, third, _ = data.picture_identities().tolist()
            >>> first == second, second == third
            (True, False)
        """
        index = rows
        if index is None:
            index = np.arange(len(self))
        if not self.has_vectors:
            return np.full(len(index), UNKNOWN)
        # clear each hash's highest bit: the identities are from 0 to 2^63 - 1
        largest_identity = np.iinfo(np.int64).max
        hashes = self._picture_hashes(index) & np.uint64(largest_identity)
        has_embedding = np.isin(self.status[index], (VALID, SHORT_POOL))
        identities = hashes.astype(np.int64)
        return np.where(has_embedding, identities, UNKNOWN)

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return hashes (M,) of the pictures in the ``rows`` (M,)."""
        by: IdentityKind = "embeddings"
        if "pictures" in self.identified_by:
            by = "pictures"
        return self.identities(by, rows)

    def _hashed_numbers(self, index: Tensor) -> Tensor:
        """Return the rows' numbers (B, ...), to be hashed for the "embeddings" identities."""
        return self.image_rows(index)

    @checked
    def take(
        self,
        rows: Sequence[int] | Tensor | NDArray[np.int64],
        classes: Sequence[int] | Tensor | NDArray[np.int64] | None = None,
        columns: Collection[str] | None = None,
    ) -> EmbeddingSource:
        """Take some rows as a new source. All rows must share the candidates.

        The new source is a view. Rows are read from this source only on demand.

        Args:
            rows: (M,) int64 row indices, in the order of the new source.
            classes: (K',) int64 candidates to keep, in their new order. By default all. If a row's
                class is removed, the row gets an unknown target.
            columns: Names of the columns to keep. By default all. The column "logits" is always
                kept.

        Raises:
            UsageError: If the source has captions, because the pools are made from all rows in the
                source.
            DataError: If there is no such row or class, or if a class is given twice.

        Examples:
            >>> import numpy as np, vilu
            >>> image = text = np.eye(3)
            >>> names = ["cat", "dog", "cup"]
            >>> data = vilu.Embeddings(image, text, target=[0, 1, 2], class_names=names)
            >>> pets = data.take(rows=[2, 1, 0], classes=[1, 0])
            >>> pets.class_names
            ('dog', 'cat')
            >>> pets.target.tolist()  # row 2 is a cup, which is no class of the new source
            [-1, 0, 1]
        """
        if self.pool_size is not None:
            raise UsageError(
                "image-caption pairs are matched in pools, so a part of them would be a different "
                "problem. Use all pairs."
            )
        column_names = self.columns
        if columns is not None:
            # the logit column stays, because the answers are computed from logits
            column_names = column_names.intersection({*columns, LOGITS})
        class_index: Tensor | None = None
        if classes is not None:
            class_index = check_indices(classes, self.n_candidates, "classes")
            if len(class_index.unique()) < len(class_index):
                raise DataError(
                    f"classes must name each class once. Got {class_index.tolist()!s:.80}. "
                    "Leave out the repeats."
                )
        row_index = check_indices(rows, len(self), "rows")
        return RowSubset(self, row_index, classes=class_index, columns=column_names)

    def without(self, rows: NDArray[np.bool_]) -> EmbeddingSource:
        """Return the source without the rows in the mask ``rows`` (N,) bool.

        Raises:
            DataError: If ``rows`` is no such mask.
        """
        mask = np.asarray(rows)
        is_left_out = require_mask("rows", mask, len(self))
        if not is_left_out.any():
            return self
        remaining_rows = np.flatnonzero(~is_left_out)
        return self.take(remaining_rows)

    def inseparable(self) -> NDArray[np.int64]:
        """Return the group number (N,) of every row. A split must not divide a group.

        Rows with the same picture are a group. Without clusters, the numbers are the picture
        identities, and a row with -1 is a group alone. With clusters, rows with the same picture or
        in the same cluster are connected, and all connected rows are a group.

        Examples:
            >>> import vilu
            >>> table = {"id": [1, 2, 3], "score": [0.1, 0.2, 0.3], "cluster": ["x", "y", "x"]}
            >>> vilu.open_table(table).inseparable().tolist()
            [0, 1, 0]
        """
        if self.cluster is None:
            return self.picture_identities()
        from vilu.embeddings.split import connected_row_groups

        cluster_of_row = np.array(self.cluster)
        _, cluster_index = np.unique(cluster_of_row, return_inverse=True)
        cluster_number = cluster_index.astype(np.int64)
        picture = self.picture_identities()
        return connected_row_groups(cluster_number, picture)

    @checked
    def split(
        self, fit: float, calibration: float = 0.0, test: float = 0.0, *, seed: int = 0
    ) -> SplitParts[EmbeddingSource]:
        """Divide the rows into three parts: to fit on, to calibrate on and to test on.

        Rows with the same picture, or in the same cluster, are in the same part. Every part gets
        its share of every class, up to a single picture or cluster. Rows beyond the summed shares
        are in no part. A part with share 0 is empty.

        Args:
            fit: Share of rows to fit on, from 0 to 1.
            calibration: Share of rows to calibrate on.
            test: Share of rows to test on.
            seed: Seed for the division.

        Raises:
            UsageError: If a share is not from 0 to 1, if the shares add up to more than 1, or if
                the source has captions, because the pools would change.

        Examples:
            >>> import numpy as np, vilu
            >>> image, text = np.eye(10), np.eye(10)[:2]
            >>> data = vilu.Embeddings(image, text, target=[0, 1] * 5)
            >>> parts = data.split(fit=0.6, test=0.4)
            >>> len(parts.fit), len(parts.calibration), len(parts.test)
            (6, 0, 4)
        """
        from vilu.embeddings.split import SplitParts, part_of_each_row, require_shares

        shares = (fit, calibration, test)
        require_shares(shares)
        if self.pool_size is not None:
            raise UsageError(
                "captions cannot be split row by row, since their pools would change. Make one "
                "source for each part."
            )
        # A class is a stratum. Rows outside all classes have the stratum -2. Rows without a label
        # have the target -1, and so the stratum -1.
        stratum = np.where(self.outside.numpy(), OUTSIDE, self.target.numpy())
        group_of_row = self.inseparable()  # rows of a group are in the same part
        part = part_of_each_row(group_of_row, stratum, shares, seed)
        sources = [self.take(np.flatnonzero(part == number)) for number in range(len(shares))]
        return SplitParts(*sources)

    def shuffled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return the row indices in a random order, for a training pass.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> data = vilu.Embeddings(np.eye(4), np.eye(4))
            >>> rows = data.shuffled(data.usable_rows, torch.Generator().manual_seed(0))
            >>> sorted(rows.tolist())  # every row occurs once
            [0, 1, 2, 3]
        """
        return rows[torch.randperm(len(rows), generator=generator, device="cpu")]

    def batches(
        self, size: int, *, rows: Tensor | None = None, columns: Sequence[str] = ()
    ) -> Iterator[Batch]:
        """Yield batches of at most ``size`` rows, in order, with the named ``columns``.

        ``rows`` are the row indices, by default of all usable rows. All logits of a batch fit into
        memory (``similarity.MAX_BATCH_LOGITS``).

        If the source has pools, consecutive ``rows`` form a pool. A pool may be divided into
        several batches. Each such batch has all candidates in the pool, because the candidate count
        is part of the problem. The last rows are left out if they do not fill a pool.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.eye(4)
            >>> image[1] = np.nan  # a row that is not usable
            >>> data = vilu.Embeddings(image, text=np.eye(4))
            >>> [batch.index.tolist() for batch in data.batches(2)]
            [[0, 2], [3]]
        """
        step_size = self.pool_size or size  # a whole pool if there are pools
        for step in self.steps(step_size, rows=rows, columns=columns):
            for part in row_blocks(len(step.index), len(step.text), size):
                yield step.rows(part)

    def steps(
        self, size: int, *, rows: Tensor | None = None, columns: Sequence[str] = ()
    ) -> Iterator[Batch]:
        """Yield one batch per training step: ``size`` rows, or a whole pool."""
        if rows is None:
            rows = self.usable_rows
        if not len(rows):
            return
        if self.pool_size is not None:
            size = self.pool_size
            rows = rows[: len(rows) // size * size]  # leave out rows that do not fill a pool
        read_batch = partial(self._batch, columns=columns)
        parts = rows.split(size)
        yield from self._map_parts(read_batch, parts)

    def many(
        self, size: int, *, rows: Tensor | None = None, columns: Sequence[str] = ()
    ) -> Iterator[Batch]:
        """Yield batches like ``batches``, for methods that use only the logits.

        A batch may hold several small pools (``PooledBatch``).

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings.pairs(np.eye(6), np.eye(6), pool_size=2)
            >>> [tuple(batch.text.shape) for batch in data.batches(4)]  # one pool per batch
            [(2, 6), (2, 6), (2, 6)]
            >>> [tuple(batch.text.shape) for batch in data.many(4)]  # two pools, then one
            [(2, 2, 6), (1, 2, 6)]
        """
        return self.batches(size, rows=rows, columns=columns)

    def _map_parts(
        self, function: Callable[[Tensor], Result], parts: Sequence[Tensor]
    ) -> Iterator[Result]:
        """Yield ``function(part)`` for each part of the row indices, in order."""
        return map(function, parts)

    def _batch(self, index: Tensor, columns: Sequence[str]) -> Batch:
        """Make a batch of the rows ``index``, with the named ``columns``."""
        candidates = self.candidates(index)
        row_of_candidate = candidates.row_of_candidate
        if row_of_candidate is None:  # then ``column`` returns a candidate column as a whole
            row_of_candidate = index
        tensors = {}
        for name in columns:
            rows_of_column = index if name in ROW_COLUMNS else row_of_candidate
            tensors[name] = self.column(name, rows_of_column)
        batch_type = Batch
        if not self.has_texts:
            batch_type = LogitBatch
            tensors[LOGITS] = self.column(LOGITS, index)
        image = self.image_rows(index)
        return batch_type(
            image=image,
            text=candidates.text,
            target=candidates.target,
            index=index,
            logit_scale=self.space.logit_scale,
            logit_bias=self.space.logit_bias,
            columns=tensors,
            matches=candidates.matches,
            outside=self.outside[index],
        )


def hash_row_blocks(index: Tensor, read_rows: Callable[[Tensor], Tensor]) -> NDArray[np.uint64]:
    """Hash the rows ``index`` (M,), block by block. Return the hashes (M,).

    ``read_rows`` gets the indices of a block, and returns the numbers in the block's rows.
    """
    hashes = [hash_rows(read_rows(block)) for block in index.split(HASH_BLOCK_ROWS)]
    return np.concatenate(hashes)


@cache
def warn_once(message: str) -> None:
    """Log a warning once per process, even if a store is opened many times."""
    logger.warning(message)


def _merge_message(names: Sequence[str], first_class: Sequence[int]) -> str:
    """Return a message with the list of merged classes.

    Args:
        names: Class names.
        first_class: For every class, the number of the first class that is the same answer.
    """
    merged_classes = [number for number, first in enumerate(first_class) if first != number]
    example_texts = []
    for number in merged_classes[:MAX_MERGED_SHOWN]:
        first = first_class[number]
        example_texts.append(f"{names[number]!r} ({number}) is {names[first]!r} ({first})")
    n_merged = len(merged_classes)
    n_not_shown = n_merged - MAX_MERGED_SHOWN
    and_more = f" and {n_not_shown} more" if n_not_shown > 0 else ""
    n_candidates = len(first_class) - n_merged
    return (
        f"{n_merged} of {len(first_class)} classes have the text of an earlier one: "
        f"{', '.join(example_texts)}{and_more}. Equal candidates are one answer, so "
        f"{n_candidates} candidates remain, which are numbered anew."
    )


def index_of_first_same_answer(text: Tensor, names: Sequence[str] | None) -> Tensor:
    """Return, for every text (K, D), the first candidate (K,) int64 that is the same answer.

    Two candidates are the same answer if their texts are equal, or if their names are equal.

    Raises:
        DataError: If classes with the same name have different texts.
    """
    first = index_of_first_equal(text)
    if names is None or len(set(names)) == len(names):  # no two names are equal
        return first
    first_index: dict[str, int] = {}
    for i, name in enumerate(names):
        first_index.setdefault(name, i)  # a repeated name keeps the first index
    first_of_name = torch.tensor([first_index[name] for name in names])
    # cosine between every text and the first text with the same name
    cosine = (text * text[first_of_name]).sum(dim=1)
    differing_indices = (cosine < SAME_TEXT_COSINE).nonzero().squeeze(1)
    if len(differing_indices):
        differing_names = sorted({names[i] for i in differing_indices.tolist()})
        quoted_names = ", ".join(repr(name) for name in differing_names)
        raise DataError(
            f"classes of one name must have one text. Different texts: {quoted_names:.200}. "
            "Rename them, or give both the same row of text."
        )
    # Candidate A may have the name of B, and B may have the text of C. Then A, B and C are the same
    # answer. The loop follows such chains to the end.
    first = first[first_of_name]
    while not torch.equal(first, first[first]):
        first = first[first]
    return first


class RowSubset(EmbeddingSource):
    """A view of some rows of another source, as returned by ``EmbeddingSource.take``.

    The rows are read only on demand.

    Args:
        source: The original source.
        rows: (M,) indices of the view's rows in ``source``, in the view's order.
        classes: (K',) candidates to keep, in their new order. None keeps all candidates.
        columns: Names of the columns to keep.
    """

    def __init__(
        self, source: EmbeddingSource, rows: Tensor, classes: Tensor | None, columns: frozenset[str]
    ) -> None:
        self._source = source
        self._rows = rows
        self._classes = classes
        self.space = source.space
        self.columns = columns
        self.second = source.second
        self.stored_dtype = source.stored_dtype
        self.target = source.target[rows]
        self.status = source.status[rows.numpy()]
        self.outside = source.outside[rows]
        if isinstance(source.ids, RowNumbers):
            self.ids = RowNumbers(len(rows))
        else:
            self.ids = SubsetIds(source.ids, rows)
        no_rows = rows[:0]  # the candidates are the same for all rows
        self.text = source.candidates(no_rows).text
        self.class_names = source.class_names
        if classes is not None:
            self._take_classes(classes)

    def _take_classes(self, classes: Tensor) -> None:
        """Keep only the candidates ``classes``, in this order.

        If a row's class is removed, the row gets an unknown target.
        """
        # An entry per candidate, and a last entry for unknown targets: -1 indexes the last entry.
        self._new_index_of = classes.new_full((len(self.text) + 1,), UNKNOWN)
        self._new_index_of[classes] = torch.arange(len(classes), device="cpu")
        self.target = self._new_index_of[self.target]
        self.text = self.text[classes]
        if self.class_names:
            self.class_names = tuple(self.class_names[i] for i in classes.tolist())

    def image_rows(self, index: Tensor) -> Tensor:
        """Return image embeddings (B, D) from the original source."""
        return self._source.image_rows(self._rows[index])

    @property
    def identified_by(self) -> tuple[IdentityKind, ...]:
        """The identity kinds of the original source."""
        return self._source.identified_by

    def identities(
        self, by: IdentityKind, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Return the rows' identities (M,), from the original source."""
        rows_of_source = self._rows.numpy()
        if rows is not None:
            rows_of_source = rows_of_source[rows]
        return self._source.identities(by, rows_of_source)

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the rows' picture hashes (M,), from the original source."""
        source_rows = self._rows.numpy()[rows]
        return self._source._picture_hashes(source_rows)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return column ``name`` of the original source, for this source's rows or candidates."""
        if name not in self.columns:
            return super().column(name, index)
        if name == LOGITS:
            logits = self._source.column(name, self._rows[index])
            return logits if self._classes is None else logits[:, self._classes]
        if name == ANSWER and self._classes is not None:
            return self._new_answers(index)
        if name in ROW_COLUMNS:
            return self._source.column(name, self._rows[index])
        all_entries = self._source.column(name, index)
        if self._classes is not None and name in TEXT_COLUMNS:
            return all_entries[self._classes]
        return all_entries

    def _new_answers(self, index: Tensor) -> Tensor:
        """Return the rows' given answers (B,), numbered by the kept candidates.

        Raises:
            DataError: If an answer is a class that was not kept.
        """
        answers = self._source.column(ANSWER, self._rows[index])
        new_answers = self._new_index_of[answers]
        if (new_answers == UNKNOWN).any():
            raise DataError(
                "some answers are classes that take(classes=...) left out, so they cannot be "
                "judged. Keep these classes, or leave these rows out."
            )
        return new_answers


class SubsetIds(Identifiers):
    """Row identifiers of a ``RowSubset``."""

    def __init__(self, ids: Sequence[str], rows: Tensor) -> None:
        super().__init__(len(rows))
        self._ids = ids
        self._rows = rows

    def _identifier(self, row: int) -> str:
        return self._ids[int(self._rows[row])]

    def __iter__(self) -> Iterator[str]:
        is_chosen = np.zeros(len(self._ids), dtype=bool)
        is_chosen[self._rows] = True
        # a single pass in stored order, because identifiers on disk are read part by part
        ids_in_stored_order = list(compress(self._ids, is_chosen))
        # for every row in the subset, the position of the identifier in ``ids_in_stored_order``
        _, position_of_row = self._rows.unique(return_inverse=True)
        return (ids_in_stored_order[position] for position in position_of_row.tolist())


def log_posterior(batch: Batch, temperature: float | Tensor = 1.0) -> Tensor:
    """Compute the log-posterior log p (B, K) float64, where p = softmax(logits / temperature).

    ``temperature`` is positive: a single number, or a number per row (B, 1).

    Let l_j be the logit of candidate j, l_max the largest logit, and p_max the largest probability.
    With d_j = (l_j - l_max) / temperature, the result is

        log p_j = d_j - log1p(sum of exp(d_k) over all k except the largest logit)

    So confident rows keep their order even if p_max rounds to 1. A float32 softmax at CLIP's logit
    scale would give many rows the same p_max.
    """
    logits = float64(batch.logits)
    answer_column = batch.zero_shot.prediction[:, None].to(logits.device)
    largest_logit = logits.gather(1, answer_column)
    difference = (logits - largest_logit) / temperature  # d_j
    exp_of_rivals = difference.exp().scatter(1, answer_column, 0.0)  # 0 for the largest logit
    return difference - torch.log1p(exp_of_rivals.sum(dim=-1, keepdim=True))
