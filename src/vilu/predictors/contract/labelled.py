"""Rows to learn from: which can be, which are held out, and what they lack."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings.checks import SHORT_POOL
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
    """The validation set without the few rows of the training set; refused from another space, or with many of them."""
    names = "the training set", "the validation set"
    train.space.require_match(validation.space, mine=names[0], theirs=names[1])
    common = overlap(train, validation, names)
    if common is None:
        return validation
    blind = "Selection on training rows is blind: take them out of one of the two sets."
    return validation.without(
        ~common.others(validation, "validation rows", "are in the training set, too", blind)
    )


def require_comparable(train: EmbeddingSource, unlabelled: EmbeddingSource) -> None:
    """Refuse unlabelled rows of another space, or against other candidates than the training set's."""
    train.space.require_match(
        unlabelled.space, mine="the training set", theirs="the unlabelled rows"
    )
    none = torch.empty(0, train.space.embed_dim)
    mine, theirs = (
        none if one.pool_size else one.candidates(torch.arange(0)).text
        for one in (train, unlabelled)
    )
    alike = int(((mine * theirs).sum(dim=1) >= SAME_TEXT).sum()) if len(mine) == len(theirs) else 0
    if alike < max(len(mine), 1):
        raise DataError(
            "unlabelled rows must have the candidates of the training set, in their order. Of its "
            f"{len(mine)} shared texts, {alike} are at the same place here. Embed both with one list of classes."
        )


Needs = Literal["failure", "class", "nothing"]
"""What a fit must know of a row: whether its answer is wrong, which class it is of, or nothing."""


def trainable_rows(
    source: EmbeddingSource, role: str, needs: Needs = "class"
) -> tuple[Tensor, Tensor]:
    """Positions (M,) of usable rows of which the needed is known, and their failures (M,), -1 only if that is nothing.

    Rows of none of the classes have a failure and no class.
    """
    short, unusable = _few_unusable(source, role)
    rows, failure = with_failures(source.batches(SCORING_BATCH))
    if needs == "nothing":
        if unusable:
            warnings.warn(
                f"{unusable} of {len(source)} {role} rows are left out (unusable).", stacklevel=6
            )
        return rows, failure
    outside = source.outside[rows]
    known = (failure != UNKNOWN) & ~outside if needs == "class" else failure != UNKNOWN
    if outside.any() and not (known & ~outside).any():
        raise DataError(
            f"the {int(outside.sum())} labelled {role} rows are of none of the classes, all of them, so nothing can be "
            f"learned of the classes. Add rows of the classes to these {len(source)}."
        )
    if not known.any():
        raise DataError(f"none of the {len(source)} {role} rows has a label.")
    if left_out := len(source) - short - int(known.sum()):
        strangers = int(outside.sum()) if needs == "class" else 0
        of_none = f", {strangers} of none of the classes" if strangers else ""
        what = (
            "where classes are told apart " if strangers else ""
        )  # strangers may teach what is outside
        why = f"({unusable} unusable{of_none}, the rest without label)"
        warnings.warn(
            f"{left_out} of {len(source)} {role} rows are left out {what}{why}.", stacklevel=6
        )
    return rows[known], failure[known]


def _few_unusable(source: EmbeddingSource, role: str) -> tuple[int, int]:
    """How many rows are in no whole pool, and how many are not usable; refused where there is nothing to learn."""
    if not len(source):
        raise DataError(f"the {role} set is empty.")
    if source.n_candidates < 2:
        raise DataError(
            f"the {role} set has one candidate text: it is always the answer, so no failure is defined."
        )
    short = int(np.count_nonzero(source.status == SHORT_POOL))
    unusable = int(np.count_nonzero(source.status)) - short
    if unusable > MAX_UNUSABLE * len(source):
        raise DataError(
            f"{unusable} of {len(source)} {role} rows are not finite or of zero norm, more than {MAX_UNUSABLE:.0%}. "
            "Embed them again."
        )
    return short, unusable


def with_failures(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Positions (M,) of the rows of some batches, and their failures (M,); of several processes each does its share."""
    world = current_world()
    parts = [(b.index, world.gather(b.rows(world.mine(len(b.index))).failure)) for b in batches]
    nothing = torch.empty(0, dtype=torch.int64)
    return torch.cat([nothing, *(rows for rows, _ in parts)]), torch.cat(
        [nothing, *(failed for _, failed in parts)]
    )


def degenerate_rate(failure: Tensor, name: str, *, allowed: bool) -> float | None:
    """The error rate (0 or 1) where failures (M,) are all of one kind, which is refused unless allowed; else None."""
    n, n_failures = len(failure), int(failure.sum())
    rare, kind = min((n_failures, "failures"), (n - n_failures, "successes"))
    if rare == 0 and not allowed:
        raise DataError(
            f"{name} learns to tell failures from successes. Found {rare} {kind} among {n} training rows; at "
            f"least {FEW} are needed for a useful fit. Add harder (or easier) images, or set allow_degenerate=true "
            "for a constant predictor."
        )
    if rare < FEW:
        warnings.warn(
            f"only {rare} {kind} among {n} training rows: expect an unreliable fit.", stacklevel=7
        )
    return n_failures / n if rare == 0 else None


def warn_few(failure: Tensor, name: str) -> None:
    """Warn of a probability of failure that is learned from fewer than ``FEW`` rows (M,), whatever it learns from."""
    if len(failure) < FEW:
        n, rows = len(failure), "row" if len(failure) == 1 else "rows"
        warnings.warn(
            f"{name} is fitted on {n} {rows}: with fewer than {FEW} its probabilities say little.",
            stacklevel=3,
        )


def class_texts(train: Rows) -> Tensor:
    """(K, D) texts of the training classes, by which they are recognised, whatever their order."""
    return train.source.candidates(train.index[:0]).text.clone()


def fit_and_selection(
    train: Rows, failure: Tensor, validation: EmbeddingSource | None, fraction: float, seed: int
) -> tuple[Rows, Rows | None]:
    """Rows to fit on, and to select on, held out where there is no validation set; none are where it would be blind."""
    rows, columns = train.index, train.columns
    if validation is not None:
        held_out, held_failure = trainable_rows(validation, "validation", "failure")
        chosen = Rows(validation, held_out, columns)
    else:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(train.source, PairSource):
            groups = caption_groups(train.source, rows)
        else:
            _, groups = train.pictures()
        part = hold_out(failure, fraction, train.source.pool_size, generator, groups)
        chosen = Rows(train.source, rows[part], columns)
        _, held_failure = with_failures(
            chosen.batches(SCORING_BATCH)
        )  # with captions, in pools of their own
        kept = ~torch.isin(torch.arange(len(rows)), part)
        rows = rows[kept]
        kinds = (
            2 if train.source.pool_size is None else 1
        )  # pools have other failures in every pass
        if len(failure[kept].unique()) < kinds:
            said = f"validation_fraction={fraction} holds out {len(part)} of {len(failure)} training rows, so that no"
            raise DataError(f"{said} failure or no success is left to learn from. Make it smaller.")
    is_blind = len(held_failure.unique()) < 2
    return Rows(
        train.source, train.index if is_blind else rows, columns
    ), None if is_blind else chosen


def hold_out(
    failure: Tensor,
    fraction: float,
    pool_size: int | None,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Tensor:
    """Sorted positions (H,) of a random part of rows with failures (M,): stratified by failure, or whole pools.

    With in-batch candidates the part is rounded to whole pools, and empty when there are fewer than
    two. Rows of one number in ``groups`` (M,) stay together. In pools they do not where there are
    fewer groups than a pool has rows: such groups recur in every pool, as classes do.
    """
    n = len(failure)
    if pool_size is not None:
        pools = n // pool_size
        count = max(round(pools * fraction), 1) if pools > 1 and fraction > 0 else 0
        order = torch.randperm(n, generator=generator)
        room = count * pool_size
        by_themselves = groups is None or len(groups.unique()) < pool_size
        chosen = (
            order[:room]
            if groups is None or by_themselves
            else order[whole_groups(groups[order], room)]
        )
        return chosen[: len(chosen) if len(chosen) >= pool_size else 0].sort().values
    groups = torch.arange(n) if groups is None else groups
    first = torch.from_numpy(np.unique(groups.numpy(), return_index=True)[1])
    kinds = [first[failure[first] == value] for value in (0, 1)]
    parts = [
        kind[torch.randperm(len(kind), generator=generator)[: round(len(kind) * fraction)]]
        for kind in kinds
    ]
    return torch.isin(groups, groups[torch.cat(parts)]).nonzero().squeeze(1)


def whole_groups(groups: Tensor, room: int) -> Tensor:
    """Sorted positions of whole groups, by their numbers (M,), that fit into ``room`` rows; the first ones go first."""
    _, group = torch.unique(groups, return_inverse=True)
    positions = torch.arange(len(groups))
    first = torch.full((int(group.max()) + 1,), len(groups)).scatter_reduce(
        0, group, positions, "amin"
    )
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

    Rows whose caption is the text of a class are each by themselves: held out together, the class
    would go unlearnt.

    sum_i a_i x_i mod 2^64 of the D 16-bit numbers x of a caption with fixed random odd a: two
    captions meet by chance with a probability below 2^-48, which does no more harm than that they
    stay together.
    """
    factors = (
        np.random.default_rng(0).integers(2**63, size=source.space.embed_dim, dtype=np.uint64) * 2
        + 1
    )
    blocks = (
        (source.caption_rows(block).half() + 0).numpy() for block in rows.split(GROUP_BLOCK)
    )  # + 0 makes -0 a 0
    parts = [block.view(np.uint16).astype(np.uint64) @ factors for block in blocks]
    return torch.where(
        source.of_classes(rows), rows, torch.from_numpy(np.concatenate(parts).view(np.int64))
    )


def failure_log_odds(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) float64 log((1 - p) / p), p the mass of the zero-shot answer under the softmax of any logits (B, K).

    Without rounding where p is near zero or one; the largest logit may be at another candidate than
    the answer.
    """
    if batch.same is None:
        return Others.of(logits, batch.prediction[:, None].to(logits.device)).log_odds
    logits = float64(logits)
    alike = batch.alike(batch.prediction).to(logits.device)
    others, own = (
        logits.masked_fill(mask, -torch.inf).logsumexp(dim=-1) for mask in (alike, ~alike)
    )
    return others - own


def with_outside(log_odds: Tensor, outside: Tensor) -> Tensor:
    """(B,) float64 log-odds of u = 1 - (1 - P(outside)) q, from those of 1 - q against q and of outside against inside.

    u / (1 - u) = (1 - q) / q + P(outside) / P(inside) / q, so that no u rounds to one before it has
    to.
    """
    either = torch.logaddexp(log_odds, torch.zeros_like(log_odds))  # of 1 / q, the log
    return torch.logaddexp(log_odds, outside.to(log_odds.device) + either)


# up to so many rows are cross-fitted; of more, one fifth is held out, and so many rows at most
FOLDED_ROWS = 5_000
FOLDS = 5


def cross_fitting(
    train: Rows,
    failure: Tensor,
    validation: EmbeddingSource | None,
    seed: int,
    needs: Needs = "class",
) -> list[tuple[Rows, Rows]]:
    """Pairs of rows to fit on and rows held out from it: the validation set, or folds stratified by failure (M,).

    Rows of one picture are in one fold; it counts as a failure where its first row is one.
    """
    if validation is not None:
        rows, _ = trainable_rows(validation, "validation", needs)
        return [(train, Rows(validation, rows, train.columns))]
    n = len(failure)
    generator = torch.Generator().manual_seed(seed)
    first, picture = train.pictures()
    order = torch.randperm(len(first), generator=generator)
    order = order[
        failure[first][order].argsort(stable=True)
    ]  # neighbours in this order go to different folds
    fold_of_picture = torch.empty(len(first), dtype=torch.long)
    fold_of_picture[order] = torch.arange(len(first)) % FOLDS
    fold = fold_of_picture[picture]
    parts = [train.index[fold == k] for k in range(FOLDS if n <= FOLDED_ROWS else 1)]
    pairs = []
    for k, part in enumerate(parts):
        few = (
            torch.randperm(len(part), generator=generator)[:FOLDED_ROWS].sort().values
        )  # rows may come class by class
        if len(few):
            pairs.append(
                (replace(train, index=train.index[fold != k]), replace(train, index=part[few]))
            )
    return pairs
