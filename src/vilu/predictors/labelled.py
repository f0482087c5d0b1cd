"""What predictors share that learn from labels or failures."""

from __future__ import annotations

import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from itertools import chain
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings.checks import SHORT_POOL, RowNumbers
from vilu.embeddings.pairs import PairSource
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import SAME_TEXT, UNKNOWN, Batch, EmbeddingSource
from vilu.errors import DataError, ProvenanceError
from vilu.predictors.base import FailurePredictor, similarity_range
from vilu.predictors.nn.processes import current_world
from vilu.predictors.nn.train import SCORING_BATCH, Rows
from vilu.predictors.parameters import check_parameters
from vilu.predictors.rows import RowSketch

MAX_UNUSABLE = 0.01


@dataclasses.dataclass
class LabelledPredictor(FailurePredictor):
    """A predictor that is fitted on labelled rows.

    Args:
        seed: Of everything random in ``fit``.
    """

    needs_fit: ClassVar[bool] = True

    seed: int = 0

    def fit(self, train: EmbeddingSource, validation: EmbeddingSource | None = None) -> Self:
        """Learn from labelled embeddings.

        Args:
            train: Rows to learn from. Rows without label are left out with a warning.
            validation: Rows to select on, none of them among the training rows; where the method selects something and
                gets none, it holds out a part of ``train``.

        Raises:
            UsageError: If a hyper-parameter is out of range, or the method does not work on image-caption pairs.
            DataError: If nothing can be learned from the rows: empty, one candidate, over 1 % unusable rows, no labels;
                or if the two sets overlap, or lack a column that the method needs.
            ProvenanceError: If the two sets come from different embedding spaces.
        """
        check_parameters(self)
        columns = self.columns_to_fit(train)
        self._check_source(train, columns)
        refuse_overlap(train, validation)
        rows, failure = trainable_rows(train, "training")
        self._learn(Rows(train, rows, columns), failure, validation)
        self.space_, self.calibrator_ = train.space, None
        seen = [
            source.ids
            for source in (train, validation)
            if source is not None and not isinstance(source.ids, RowNumbers)
        ]
        self.seen_ = RowSketch.of(chain(*seen)) if seen else None
        self.similarity_ = similarity_range(train)
        self.notes_ = {"n_train": len(failure), "n_failures": int(failure.sum()), **self._notes()}
        return self

    def _notes(self) -> dict[str, object]:
        """What to remember of the fit, for people."""
        return {}

    @abstractmethod
    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        """Learn from usable labelled rows and their failures (M,) in {0, 1}."""


@dataclasses.dataclass
class TensorPredictor(LabelledPredictor):
    """A labelled predictor whose ``fit`` results in named tensors and nothing else.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; not part of what is saved.
    """

    tensors: ClassVar[tuple[str, ...]]

    device: str = "auto"

    learned_: dict[str, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:  # noqa: ARG002
        self.learned_ = self._fit_tensors(train, failure)

    @abstractmethod
    def _fit_tensors(self, train: Rows, failure: Tensor) -> dict[str, Tensor]:
        """Learn ``tensors``, on the CPU, from usable labelled rows and their failures (M,) in {0, 1}."""

    def _tensor(self, name: str, device: torch.device) -> Tensor:
        """A learned tensor where the batch is."""
        return self.learned_[name].to(device)

    def state(self) -> dict[str, Tensor]:
        """The learned tensors."""
        return dict(self.learned_)

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        expected = self._tensor_names()
        if set(state) != set(expected):
            raise DataError(f"a {self.name} holds {', '.join(expected)}. The file has {', '.join(sorted(state)[:8])}.")
        self.learned_ = state

    def _tensor_names(self) -> tuple[str, ...]:
        return self.tensors


@dataclasses.dataclass
class ClosedSetPredictor(TensorPredictor):
    """A labelled predictor that knows its classes, and recognises them by their text embeddings, whatever the order."""

    closed_set: ClassVar[bool] = True
    no_captions: ClassVar[str | None] = "it compares images of one class, and captions have no classes"

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        super()._learn(train, failure, validation)
        self.learned_["classes"] = train.source.candidates(train.index[:0]).text.clone()

    def _tensor_names(self) -> tuple[str, ...]:
        return (*self.tensors, "classes")

    def classes_of(self, text: Tensor) -> Tensor:
        """(K,) fitted class of every candidate (K, D).

        Raises:
            ProvenanceError: If a candidate is none of the fitted classes, or two are the same one.
        """
        cosine, match = (text @ self._tensor("classes", text.device).T).max(dim=1)
        unknown = int((cosine < SAME_TEXT).sum())
        if unknown or len(match.unique()) < len(match):
            raise ProvenanceError(
                f"{self.name} scores the {len(self.learned_['classes'])} classes that it was fitted on. Of the "
                f"{len(text)} candidates here {unknown} are others. Fit it on these classes, or take a method that "
                "works on any (see `vilu list predictors`)."
            )
        return match

    def _uncertainty(self, batch: Batch) -> Tensor:
        return self._class_uncertainty(batch, self.classes_of(batch.text))

    @abstractmethod
    def _class_uncertainty(self, batch: Batch, classes: Tensor) -> Tensor:
        """(B,) uncertainty of a batch whose K candidates are the fitted ``classes`` (K,)."""


def refuse_overlap(train: EmbeddingSource, validation: EmbeddingSource | None) -> None:
    """Refuse a validation set from another space, or with rows of the training set."""
    if validation is None:
        return
    train.space.require_match(validation.space, mine="the training set", theirs="the validation set")
    if isinstance(train.ids, RowNumbers) or isinstance(validation.ids, RowNumbers):
        return
    common = set(train.ids) & set(validation.ids)
    if common:
        raise DataError(
            f"{len(common)} rows are in both the training and the validation set, for example {min(common)!r}. "
            "Selection on training rows is blind; make the sets disjoint."
        )


def trainable_rows(source: EmbeddingSource, role: str) -> tuple[Tensor, Tensor]:
    """Positions (M,) of usable labelled rows, and their failures (M,) in {0, 1}."""
    if not len(source):
        raise DataError(f"the {role} set is empty.")
    if source.n_candidates < 2:
        raise DataError(f"the {role} set has one candidate text: it is always the answer, so no failure is defined.")
    short = int(np.count_nonzero(source.status == SHORT_POOL))
    unusable = int(np.count_nonzero(source.status)) - short
    if unusable > MAX_UNUSABLE * len(source):
        raise DataError(
            f"{unusable} of {len(source)} {role} rows are not finite or of zero norm, more than {MAX_UNUSABLE:.0%}. "
            "Embed them again."
        )
    rows, failure = with_failures(source.batches(SCORING_BATCH))
    known = failure != UNKNOWN
    if not known.any():
        raise DataError(f"none of the {len(source)} {role} rows has a label.")
    left_out = len(source) - short - int(known.sum())
    if left_out:
        warnings.warn(
            f"{left_out} of {len(source)} {role} rows are left out ({unusable} unusable, the rest without label).",
            stacklevel=4,
        )
    return rows[known], failure[known]


def with_failures(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Positions (M,) of the rows of some batches, and their failures (M,); of several processes each does its share."""
    world = current_world()
    parts = [(b.index, world.gather(b.rows(world.mine(len(b.index))).failure)) for b in batches]
    nothing = torch.empty(0, dtype=torch.int64)
    return torch.cat([nothing, *(rows for rows, _ in parts)]), torch.cat([nothing, *(failed for _, failed in parts)])


FEW = 20
GROUP_BLOCK = 16_384


@dataclasses.dataclass
class LearnedPredictor(LabelledPredictor):
    """A predictor that needs labelled rows with failures and successes among them.

    Args:
        seed: Of everything random in ``fit``.
        allow_degenerate: Fit a constant when the training rows hold no failure, or nothing else. Otherwise ``fit``
            refuses them with a ``DataError``.
    """

    allow_degenerate: bool = False

    constant_: float | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        n_failures = int(failure.sum())
        self.constant_ = self._degenerate(n_failures, len(failure))
        if self.constant_ is None:
            self._learn_difference(train, failure, validation)

    def _degenerate(self, n_failures: int, n: int) -> float | None:
        """The constant to predict where there is nothing to learn; refused unless allowed."""
        rare, name = min((n_failures, "failures"), (n - n_failures, "successes"))
        if rare == 0 and not self.allow_degenerate:
            raise DataError(
                f"{self.name} learns to tell failures from successes. Found {rare} {name} among {n} training rows; at "
                f"least {FEW} are needed for a useful fit. Add harder (or easier) images, or set allow_degenerate=true "
                "for a constant predictor."
            )
        if rare < FEW:
            warnings.warn(f"only {rare} {name} among {n} training rows: expect an unreliable fit.", stacklevel=3)
        return n_failures / n if rare == 0 else None

    def _uncertainty(self, batch: Batch) -> Tensor:
        if self.constant_ is not None:
            return torch.full((len(batch.index),), self.constant_, dtype=torch.float64)
        return self._learned_uncertainty(batch)

    def state(self) -> dict[str, Tensor]:
        """The constant of a degenerate fit, or what ``_learned_state`` gives."""
        if self.constant_ is not None:
            return {"constant": torch.tensor(self.constant_, dtype=torch.float64)}
        return self._learned_state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        if state.keys() == {"constant"}:
            self.constant_ = float(state["constant"])
        else:
            self._restore_learned(state)

    @abstractmethod
    def _learn_difference(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        """Learn from usable labelled rows; their failures (M,) in {0, 1} are of both kinds."""

    @abstractmethod
    def _learned_state(self) -> dict[str, Tensor]:
        """Everything learned, as tensors."""

    @abstractmethod
    def _restore_learned(self, state: dict[str, Tensor]) -> None:
        """The inverse; must refuse tensors of the wrong names or shapes."""

    @abstractmethod
    def _learned_uncertainty(self, batch: Batch) -> Tensor:
        """(B,) uncertainty of a batch."""


@dataclasses.dataclass
class SelectingPredictor(LearnedPredictor):
    """A learned predictor that selects something on rows that it does not learn from.

    Args:
        validation_fraction: Share of the training rows held out for selection when ``fit`` gets no validation set.
    """

    validation_fraction: float = 0.1

    def _learn_difference(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:
        fit_rows, held_out = self._roles(train, failure, validation)
        self._fit(fit_rows, held_out, error_rate=float(failure.double().mean()))

    def _roles(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> tuple[Rows, Rows | None]:
        """Rows to fit on and rows to select on; None when a selection would be blind."""
        rows, columns = train.index, train.columns
        if validation is not None:
            held_out, held_failure = trainable_rows(validation, "validation")
            chosen = Rows(validation, held_out, columns)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            groups = caption_groups(train.source, rows) if isinstance(train.source, PairSource) else None
            part = hold_out(failure, self.validation_fraction, train.source.pool_size, generator, groups)
            chosen = Rows(train.source, rows[part], columns)
            _, held_failure = with_failures(chosen.batches(SCORING_BATCH))  # with captions, in pools of their own
            keep = torch.ones(len(rows), dtype=torch.bool)
            keep[part] = False
            rows = rows[keep]
        is_blind = len(held_failure.unique()) < 2
        return Rows(train.source, rows, columns), None if is_blind else chosen

    @abstractmethod
    def _fit(self, train: Rows, validation: Rows | None, error_rate: float) -> None:
        """Learn; the rows are usable, labelled, and hold failures and successes."""


def hold_out(
    failure: Tensor,
    fraction: float,
    pool_size: int | None,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Tensor:
    """Sorted positions (H,) of a random part of the rows: stratified by failure, or whole pools.

    With in-batch candidates the part is rounded to whole pools, and empty when there are fewer than two.

    Args:
        failure: (M,) in {0, 1}.
        fraction: Share to hold out.
        pool_size: Rows of a pool, or None.
        generator: Chooses.
        groups: (M,) int64: with pools, rows of one number stay together; None: every row by itself. Where there are
            fewer groups than a pool has rows, they recur in every pool, as classes do, and rows go by themselves.
    """
    n = len(failure)
    if pool_size is not None:
        pools = n // pool_size
        count = max(round(pools * fraction), 1) if pools > 1 and fraction > 0 else 0
        order = torch.randperm(n, generator=generator)
        room = count * pool_size
        by_themselves = groups is None or len(groups.unique()) < pool_size
        chosen = order[:room] if groups is None or by_themselves else order[whole_groups(groups[order], room)]
        return chosen[: len(chosen) if len(chosen) >= pool_size else 0].sort().values
    parts = []
    for value in (0, 1):
        members = (failure == value).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        parts.append(members[order[: round(len(members) * fraction)]])
    return torch.cat(parts).sort().values


def whole_groups(groups: Tensor, room: int) -> Tensor:
    """Sorted positions of whole groups that fit into ``room`` rows, taken in the order in which they first occur.

    Args:
        groups: (M,) int64 number of each row's group.
        room: How many rows at most; groups that are too large for what is left of it are passed over.
    """
    _, group = torch.unique(groups, return_inverse=True)
    positions = torch.arange(len(groups))
    first = torch.full((int(group.max()) + 1,), len(groups)).scatter_reduce(0, group, positions, "amin")
    waiting, sizes = first.argsort(), group.bincount()
    taken = torch.zeros(len(sizes), dtype=torch.bool)
    while len(waiting := waiting[sizes[waiting] <= room]):
        fits = waiting[sizes[waiting].cumsum(0) <= room]  # the first one does
        taken[fits] = True
        room -= int(sizes[fits].sum())
        waiting = waiting[len(fits) :]
    return taken[group].nonzero().squeeze(1)


def caption_groups(source: PairSource, rows: Tensor) -> Tensor:
    """(M,) int64: equal for rows of equal captions (in float16, as they are stored); read in blocks.

    Rows whose caption is the text of a class are each by themselves: held out together, the class would go unlearnt.

    sum_i a_i x_i mod 2^64 of the D 16-bit numbers x of a caption with fixed random odd a: two captions meet by chance
    with a probability below 2^-48, which does no more harm than that they stay together.
    """
    factors = np.random.default_rng(0).integers(2**63, size=source.space.embed_dim, dtype=np.uint64) * 2 + 1
    parts = []
    for block in rows.split(GROUP_BLOCK):
        bits = (source.caption_rows(block).half() + 0).numpy().view(np.uint16)  # + 0 makes -0 a 0
        parts.append(bits.astype(np.uint64) @ factors)
    return torch.where(source.of_classes(rows), rows, torch.from_numpy(np.concatenate(parts).view(np.int64)))


def failure_log_odds(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) float64 log((1 - p) / p), p the mass of the zero-shot answer, without rounding where p is near zero or one.

    Args:
        logits: (B, K) of any posterior; its largest may be at another candidate than the answer.
        batch: Its answers, and which candidates are the same.
    """
    logits = float64(logits)
    alike = batch.alike(batch.prediction).to(logits.device)
    others, own = (logits.masked_fill(mask, -torch.inf).logsumexp(dim=-1) for mask in (alike, ~alike))
    return others - own


FOLDED_ROWS = 5_000
"""Up to so many rows are cross-fitted; of more, one fifth is held out, and so many rows at most."""

FOLDS = 5


def cross_fitting(
    train: Rows, failure: Tensor, validation: EmbeddingSource | None, seed: int
) -> list[tuple[Rows, Rows]]:
    """Pairs of rows to fit on and rows held out from that fit: the validation set, or folds stratified by failure.

    Args:
        train: Usable labelled rows with shared candidates.
        failure: (M,) their failures in {0, 1}.
        validation: Rows to hold out instead of a part of ``train``.
        seed: Of the folds.
    """
    if validation is not None:
        rows, _ = trainable_rows(validation, "validation")
        return [(train, Rows(validation, rows, train.columns))]
    n = len(failure)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    order = order[failure[order].argsort(stable=True)]  # neighbours in this order go to different folds
    fold = torch.empty(n, dtype=torch.long)
    fold[order] = torch.arange(n) % FOLDS
    parts = [train.index[fold == k] for k in range(FOLDS if n <= FOLDED_ROWS else 1)]
    pairs = []
    for k, part in enumerate(parts):
        few = torch.randperm(len(part), generator=generator)[:FOLDED_ROWS].sort().values  # rows may come class by class
        if len(few):
            rest, held_out = train.index[fold != k], part[few]
            pairs.append((Rows(train.source, rest, train.columns), Rows(train.source, held_out, train.columns)))
    return pairs
