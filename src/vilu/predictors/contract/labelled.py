"""Rows to learn from: which can be, which are held out, and what they lack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vilu.callers import warn_caller
from vilu.embeddings.checks import SHORT_POOL
from vilu.embeddings.columns import ANSWER
from vilu.embeddings.pairs import PairSource
from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import Others, float64
from vilu.embeddings.source import SAME_TEXT, Batch, EmbeddingSource
from vilu.errors import UNKNOWN, DataError
from vilu.predictors.contract.seen import overlap
from vilu.predictors.nn.processes import current_world

MAX_UNUSABLE = 0.01
FEW = 20
GROUP_BLOCK = 16_384


def disjoint(train: EmbeddingSource, validation: EmbeddingSource) -> EmbeddingSource:
    """The validation set without the few rows of the training set.

    One of another space is refused, and one with many rows of the training set.
    """
    names = "the training set", "the validation set"
    train.space.require_match(validation.space, name=names[0], other_name=names[1])
    common = overlap(train, validation, names)
    if common is None:
        return validation
    blind = "Selection on training rows is blind: take them out of one of the two sets."
    is_new = common.unshared(validation, "validation rows", "are in the training set, too", blind)
    return validation.without(~is_new)


def require_comparable(train: EmbeddingSource, unlabelled: EmbeddingSource) -> None:
    """Refuse unlabelled rows of another space, or with other candidates than the training set."""
    train.space.require_match(
        unlabelled.space, name="the training set", other_name="the unlabelled rows"
    )
    train_text = _shared_texts(train)
    unlabelled_text = _shared_texts(unlabelled)
    n_alike = 0
    if len(train_text) == len(unlabelled_text):
        cosine = (train_text * unlabelled_text).sum(dim=1)
        n_alike = int((cosine >= SAME_TEXT).sum())
    if n_alike < max(len(train_text), 1):
        raise DataError(
            "unlabelled rows must have the candidates of the training set, in their order. Of its "
            f"{len(train_text)} shared texts, {n_alike} are at the same place here. Embed both "
            "with one list of classes."
        )


def _shared_texts(source: EmbeddingSource) -> Tensor:
    """(K, D) the candidates that all rows share; none where each pool has its own."""
    if source.pool_size is not None:
        return torch.empty(0, source.space.embed_dim, dtype=torch.float32)
    return source.candidates(torch.arange(0)).text


Needs = Literal["failure", "class", "nothing"]
"""What a fit must know of a row: whether its answer is wrong, which class it is of, or nothing."""


def trainable_rows(
    source: EmbeddingSource, role: str, needs: Needs = "class", columns: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Positions (M,) of usable rows of which the needed is known, and their failures (M,).

    Failures are those of the answers in the column "answer", where ``columns`` names it. One is -1
    only if nothing is needed. Rows of none of the classes have a failure and no
    class.
    """
    n_short, n_unusable = _few_unusable(source, role)
    rows, failure = with_failures(source.batches(SCORING_BATCH, columns=columns))
    if needs == "nothing":
        if n_unusable:
            warn_caller(f"{n_unusable} of {len(source)} {role} rows are left out (unusable).")
        return rows, failure
    outside = source.outside[rows]
    known = failure != UNKNOWN
    if outside.any() and not (known & ~outside).any():
        raise DataError(
            f"the {int(outside.sum())} labelled {role} rows are of none of the classes, all of "
            "them, so nothing can be learned of the classes. Add rows of the classes to these "
            f"{len(source)}."
        )
    n_ood = 0
    if needs == "class":
        known &= ~outside
        n_ood = int(outside.sum())
    if not known.any():
        raise DataError(f"none of the {len(source)} {role} rows has a label.")
    n_left_out = len(source) - n_short - int(known.sum())
    if n_left_out:
        warn_caller(
            f"{n_left_out} of {len(source)} {role} rows are left out "
            f"{_reasons(n_unusable, n_ood)}.",
        )
    return rows[known], failure[known]


def _reasons(n_unusable: int, n_ood: int) -> str:
    """Why rows are left out; with out-of-distribution rows also where, as they teach elsewhere."""
    if not n_ood:
        return f"({n_unusable} unusable, the rest without label)"
    return (
        f"where classes are told apart ({n_unusable} unusable, {n_ood} of none of the "
        "classes, the rest without label)"
    )


def _few_unusable(source: EmbeddingSource, role: str) -> tuple[int, int]:
    """How many rows are in no whole pool, and how many are not usable.

    A source from which nothing can be learned is refused.
    """
    if not len(source):
        raise DataError(f"the {role} set is empty.")
    if source.n_candidates < 2:
        raise DataError(
            f"the {role} set has one candidate text: it is always the answer, so no failure is "
            "defined."
        )
    n_short = int(np.count_nonzero(source.status == SHORT_POOL))
    n_unusable = int(np.count_nonzero(source.status)) - n_short
    if n_unusable > MAX_UNUSABLE * len(source):
        raise DataError(
            f"{n_unusable} of {len(source)} {role} rows are not finite or of zero norm, more than "
            f"{MAX_UNUSABLE:.0%}. Embed them again."
        )
    return n_short, n_unusable


def with_failures(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Positions (M,) of the rows of some batches, and their failures (M,).

    Of several processes each computes its share.
    """
    world = current_world()
    rows = [torch.empty(0, dtype=torch.int64)]
    failures = [torch.empty(0, dtype=torch.int64)]
    for batch in batches:
        share = batch.rows(world.mine(len(batch.index)))
        rows.append(batch.index)
        failures.append(world.gather(share.failure))
    return torch.cat(rows), torch.cat(failures)


def degenerate_rate(failure: Tensor, name: str, *, allowed: bool) -> float | None:
    """The error rate (0 or 1) where failures (M,) are all of one kind; else None.

    It is refused that they are, unless ``allowed``.
    """
    n = len(failure)
    n_failures = int(failure.sum())
    n_rare, kind = min((n_failures, "failures"), (n - n_failures, "successes"))
    if n_rare == 0 and not allowed:
        raise DataError(
            f"{name} learns to tell failures from successes. Found {n_rare} {kind} among {n} "
            f"training rows; at least {FEW} are needed for a useful fit. Add harder (or easier) "
            "images, or set allow_degenerate=true for a constant predictor."
        )
    if n_rare < FEW:
        warn_caller(f"only {n_rare} {kind} among {n} training rows: expect an unreliable fit.")
    if n_rare > 0:
        return None
    return n_failures / n


def warn_few(failure: Tensor, name: str) -> None:
    """Warn of a probability of failure that is learned from fewer than ``FEW`` rows (M,)."""
    n = len(failure)
    if n < FEW:
        rows = "row" if n == 1 else "rows"
        warn_caller(
            f"{name} is fitted on {n} {rows}: with fewer than {FEW} its probabilities say little."
        )


def answer_columns(train: Rows) -> tuple[str, ...]:
    """The column of the answers that are judged, where a fit has one."""
    return tuple(name for name in train.columns if name == ANSWER)


def class_texts(train: Rows) -> Tensor:
    """(K, D) texts of the training classes, by which they are recognised, whatever their order."""
    return train.source.candidates(train.index[:0]).text.clone()


def fit_and_selection(
    train: Rows, failure: Tensor, validation: EmbeddingSource | None, fraction: float, seed: int
) -> tuple[Rows, Rows | None]:
    """Rows to fit on, and rows to select on.

    These are held out where there is no validation set; there are none where selection would be
    blind, since their failures are all of one kind.
    """
    rows = train.index
    if validation is not None:
        held_out, held_failure = trainable_rows(
            validation, "validation", "failure", answer_columns(train)
        )
        selection = Rows(validation, held_out, train.columns)
    else:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(train.source, PairSource):
            groups = caption_groups(train.source, rows)
        else:
            _, groups = train.pictures()
        part = hold_out(failure, fraction, train.source.pool_size, generator, groups)
        selection = Rows(train.source, rows[part], train.columns)
        # with captions, in pools of their own
        _, held_failure = with_failures(selection.batches(SCORING_BATCH))
        stays = ~torch.isin(torch.arange(len(rows)), part)
        rows = rows[stays]
        n_kinds = 2
        if train.source.pool_size is not None:  # pools have other failures in every pass
            n_kinds = 1
        if len(failure[stays].unique()) < n_kinds:
            raise DataError(
                f"validation_fraction={fraction} holds out {len(part)} of {len(failure)} training "
                "rows, so that no failure or no success is left to learn from. Make it smaller."
            )
    is_blind = len(held_failure.unique()) < 2
    if is_blind:
        return Rows(train.source, train.index, train.columns), None
    return Rows(train.source, rows, train.columns), selection


def hold_out(
    failure: Tensor,
    fraction: float,
    pool_size: int | None,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Tensor:
    """Sorted positions (H,) of a random part of rows with failures (M,).

    The part is stratified by failure, or of whole pools.

    With in-batch candidates the part is rounded to whole pools, and empty when there are fewer than
    two. Rows of one number in ``groups`` (M,) stay together. In pools they do not where there are
    fewer groups than a pool has rows: such groups recur in every pool, as classes do.
    """
    if pool_size is not None:
        return _hold_out_pools(len(failure), fraction, pool_size, generator, groups)
    if groups is None:
        groups = torch.arange(len(failure))
    _, first_indices = np.unique(groups.numpy(), return_index=True)
    first = torch.from_numpy(first_indices)  # a group counts as its first row
    parts = []
    for value in (0, 1):
        kind = first[failure[first] == value]
        order = torch.randperm(len(kind), generator=generator)
        parts.append(kind[order[: round(len(kind) * fraction)]])
    held_out = torch.isin(groups, groups[torch.cat(parts)])
    return held_out.nonzero().squeeze(1)


def _hold_out_pools(
    n: int, fraction: float, pool_size: int, generator: torch.Generator, groups: Tensor | None
) -> Tensor:
    """Sorted positions (H,) of rows for whole pools, in whole groups as far as these fit."""
    n_pools = n // pool_size
    n_held_out = 0
    if n_pools > 1 and fraction > 0:
        n_held_out = max(round(n_pools * fraction), 1)
    order = torch.randperm(n, generator=generator)
    room = n_held_out * pool_size
    if groups is None or len(groups.unique()) < pool_size:
        chosen = order[:room]
    else:
        chosen = order[whole_groups(groups[order], room)]
    if len(chosen) < pool_size:  # they fill no pool
        chosen = chosen[:0]
    return chosen.sort().values


def whole_groups(groups: Tensor, room: int) -> Tensor:
    """Sorted positions of whole groups, by their numbers (M,), that fit into ``room`` rows.

    Groups are taken in the order of their first rows.
    """
    _, group = torch.unique(groups, return_inverse=True)
    sizes = group.bincount()
    beyond = torch.full((len(sizes),), len(groups))
    first = beyond.scatter_reduce(0, group, torch.arange(len(groups)), "amin")
    taken = torch.zeros(len(sizes), dtype=torch.bool)
    waiting = first.argsort()
    waiting = waiting[sizes[waiting] <= room]
    while len(waiting):
        # as many of the next groups as fit together; the first of them does
        fits = waiting[sizes[waiting].cumsum(0) <= room]
        taken[fits] = True
        room -= int(sizes[fits].sum())
        # the group behind them is too large now: those small enough are left
        waiting = waiting[len(fits) :]
        waiting = waiting[sizes[waiting] <= room]
    return taken[group].nonzero().squeeze(1)


def caption_groups(source: PairSource, rows: Tensor, block_rows: int = GROUP_BLOCK) -> Tensor:
    """(M,) int64: equal for rows of equal captions (float16, as they are stored); read in blocks.

    Rows whose caption is the text of a class are each by themselves: held out together, the class
    would go unlearnt.

    sum_i a_i x_i mod 2^64 of the D 16-bit numbers x of a caption with fixed random odd a: two
    captions meet by chance with a probability below 2^-48, which does no more harm than that they
    stay together.
    """
    rng = np.random.default_rng(0)
    factors = rng.integers(2**63, size=source.space.embed_dim, dtype=np.uint64) * 2 + 1
    sums = []
    for block in rows.split(block_rows):
        captions = (source.caption_rows(block).half() + 0).numpy()  # + 0 makes -0 a 0
        sums.append(captions.view(np.uint16).astype(np.uint64) @ factors)
    groups = torch.from_numpy(np.concatenate(sums).view(np.int64))
    return torch.where(source.of_classes(rows), rows, groups)


def failure_log_odds(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) float64 log((1 - p) / p), p the mass of the zero-shot answer.

    The mass is that under the softmax of any logits (B, K).

    Without rounding where p is near zero or one; the largest logit may be at another candidate than
    the answer.
    """
    if batch.same is None:
        return Others.of(logits, batch.prediction[:, None].to(logits.device)).log_odds
    logits = float64(logits)
    alike = batch.alike(batch.prediction).to(logits.device)
    log_wrong = logits.masked_fill(alike, -torch.inf).logsumexp(dim=-1)
    log_right = logits.masked_fill(~alike, -torch.inf).logsumexp(dim=-1)
    return log_wrong - log_right


def with_outside(log_odds: Tensor, outside: Tensor) -> Tensor:
    """(B,) float64 log-odds of u = 1 - (1 - P(outside)) q.

    ``log_odds`` are those of 1 - q against q, ``outside`` those of outside against inside.

    u / (1 - u) = (1 - q) / q + P(outside) / P(inside) / q, so that no u rounds to one before it has
    to.
    """
    either = torch.logaddexp(log_odds, torch.zeros_like(log_odds))  # of 1 / q, the log
    return torch.logaddexp(log_odds, outside.to(log_odds.device) + either)


FOLDED_ROWS = 5_000
FOLDS = 5


def cross_fitting(
    train: Rows,
    failure: Tensor,
    validation: EmbeddingSource | None,
    seed: int,
    needs: Needs = "class",
    folded_rows: int = FOLDED_ROWS,
) -> list[tuple[Rows, Rows]]:
    """Pairs of rows to fit on and rows held out: the validation set, or folds.

    Of more than ``folded_rows`` rows one fifth is held out, and ``folded_rows`` at most.

    Folds are stratified by failure (M,). Rows of one picture are in one fold; it counts as a
    failure where its first row is one.
    """
    if validation is not None:
        rows, _ = trainable_rows(validation, "validation", needs, answer_columns(train))
        return [(train, Rows(validation, rows, train.columns))]
    n = len(failure)
    generator = torch.Generator().manual_seed(seed)
    first, picture = train.pictures()
    order = torch.randperm(len(first), generator=generator)
    # successes first, then failures: neighbours in this order go to different folds
    order = order[failure[first][order].argsort(stable=True)]
    fold_of_picture = torch.empty(len(first), dtype=torch.long)
    fold_of_picture[order] = torch.arange(len(first)) % FOLDS
    fold = fold_of_picture[picture]
    n_folds = FOLDS
    if n > folded_rows:
        n_folds = 1
    pairs = []
    for number in range(n_folds):
        part = train.index[fold == number]
        # a random choice, since rows may come class by class
        few = torch.randperm(len(part), generator=generator)[:folded_rows].sort().values
        if len(few):
            fitted_on = replace(train, index=train.index[fold != number])
            held_out = replace(train, index=part[few])
            pairs.append((fitted_on, held_out))
    return pairs
