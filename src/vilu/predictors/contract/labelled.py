"""Rows to learn from: the usable and labelled rows, and the rows held out from a fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vilu.callers import warn_caller
from vilu.embeddings.checks import SHORT_POOL, VALID
from vilu.embeddings.columns import ANSWER
from vilu.embeddings.pairs import PairSource
from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import RivalWeights, float64
from vilu.embeddings.source import SAME_TEXT_COSINE, Batch, EmbeddingSource
from vilu.errors import UNKNOWN, DataError
from vilu.predictors.contract.seen import find_overlap
from vilu.predictors.nn.processes import current_world

MAX_UNUSABLE_SHARE = 0.01  # maximum share of rows without a usable embedding
MIN_RELIABLE_ROWS = 20  # a fit to fewer rows, fewer failures or fewer successes is unreliable
CAPTION_BLOCK_ROWS = 16_384  # number of captions in memory at the same time


def without_training_rows(validation: EmbeddingSource, train: EmbeddingSource) -> EmbeddingSource:
    """Return the validation set without the rows in the training set ``train``.

    Raises:
        ProvenanceError: If ``validation`` and ``train`` have different embedding spaces.
        DataError: If more than 1 % of the validation rows are in the training set.
    """
    train_name = "the training set"
    validation_name = "the validation set"
    train.space.require_match(validation.space, name=train_name, other_name=validation_name)
    common_rows = find_overlap(train, validation, names=(train_name, validation_name))
    if common_rows is None:
        return validation
    is_new = common_rows.unshared_mask(
        validation,
        rows_name="validation rows",
        predicate="are in the training set, too",
        remedy="Training rows cannot select a model. Take them out of one of the two sets.",
    )
    return validation.without(~is_new)


def require_comparable(train: EmbeddingSource, unlabelled: EmbeddingSource) -> None:
    """Refuse unlabelled rows if ``train`` has a different embedding space or candidates."""
    train.space.require_match(
        unlabelled.space, name="the training set", other_name="the unlabelled rows"
    )
    train_text = _shared_texts(train)
    unlabelled_text = _shared_texts(unlabelled)
    n_alike = 0
    if len(train_text) == len(unlabelled_text):
        cosine = (train_text * unlabelled_text).sum(dim=1)
        n_alike = int((cosine >= SAME_TEXT_COSINE).sum())
    # image-caption pairs have no shared texts, and are therefore never comparable
    are_comparable = n_alike > 0 and n_alike == len(train_text)
    if not are_comparable:
        raise DataError(
            "unlabelled rows must have the candidates of the training set, in their order. Of its "
            f"{len(train_text)} shared texts, {n_alike} are at the same place here. Embed both "
            "with one list of classes."
        )


def _shared_texts(source: EmbeddingSource) -> Tensor:
    """Return the candidate texts (K, D) shared by all rows, or (0, D) for image-caption pairs."""
    if source.pool_size is not None:
        return torch.empty(0, source.space.embed_dim, dtype=torch.float32)
    no_rows = torch.arange(0)
    return source.candidates(no_rows).text


Needs = Literal["failure", "class", "nothing"]
"""Requirement for a training row: a known failure, a known class, or nothing."""


def trainable_rows(
    source: EmbeddingSource, role: str, needs: Needs = "class", columns: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Return indices (M,) and failures (M,) of the rows for a fit.

    If ``needs`` is "nothing", the result has all usable rows. Otherwise the result has the usable
    rows with a known failure ("failure") or a known class ("class"). A row outside all classes has
    a failure, but no class.

    If ``columns`` has "answer", the failures belong to the answers in this column. Otherwise the
    failures belong to the zero-shot answers. A failure is -1 (unknown) only if ``needs`` is
    "nothing".

    Warn if rows are left out. Messages name the set by ``role``, such as "training".
    """
    n_left_over, n_unusable = _count_unusable(source, role)
    rows, failure = rows_and_failures(source.batches(SCORING_BATCH, columns=columns))
    if needs == "nothing":
        if n_unusable:
            warn_caller(f"{n_unusable} of {len(source)} {role} rows are left out (unusable).")
        return rows, failure
    is_ood = source.outside[rows]
    n_ood = int(is_ood.sum())
    is_failure_known = failure != UNKNOWN
    # only a row with a known class, or a row outside all classes, has a known failure
    has_class = is_failure_known & ~is_ood
    if n_ood and not has_class.any():
        raise DataError(
            f"all {n_ood} labelled {role} rows are of none of the classes, so nothing "
            "can be learned about the classes. Add rows that belong to a class."
        )
    if needs == "class":
        is_trainable = has_class
        n_ood_left_out = n_ood
    else:
        is_trainable = is_failure_known
        n_ood_left_out = 0
    if not is_trainable.any():
        raise DataError(f"none of the {len(source)} {role} rows has a label.")
    n_left_out = len(source) - n_left_over - int(is_trainable.sum())
    if n_left_out:
        rows_left_out = f"{n_left_out} of {len(source)} {role} rows are left out"
        if n_ood_left_out:
            warn_caller(
                f"{rows_left_out} where classes are told apart ({n_unusable} unusable, "
                f"{n_ood_left_out} of none of the classes, the rest without label).",
            )
        else:
            warn_caller(f"{rows_left_out} ({n_unusable} unusable, the rest without label).")
    return rows[is_trainable], failure[is_trainable]


def count_right_answers(failure: Tensor) -> dict[str, int]:
    """Count the answers with a known ``failure`` (M,), and the right answers among them."""
    n_known = int((failure != UNKNOWN).sum())
    n_right = int((failure == 0).sum())
    return {"n": n_known, "n_right": n_right}


def _count_unusable(source: EmbeddingSource, role: str) -> tuple[int, int]:
    """Count the rows left over after filling the pools, and the remaining unusable rows.

    Raises:
        DataError: If there are no rows, fewer than two candidates, or too many unusable rows.
    """
    if not len(source):
        raise DataError(f"the {role} set is empty.")
    if source.n_candidates < 2:
        raise DataError(
            f"the {role} set has one candidate text: it is always the answer, so no failure is "
            "defined."
        )
    n_left_over = int(np.count_nonzero(source.status == SHORT_POOL))
    n_unusable = int(np.count_nonzero(source.status != VALID)) - n_left_over
    if n_unusable > MAX_UNUSABLE_SHARE * len(source):
        raise DataError(
            f"{n_unusable} of {len(source)} {role} rows are not finite or of zero norm, more than "
            f"{MAX_UNUSABLE_SHARE:.0%}. Embed them again."
        )
    return n_left_over, n_unusable


def rows_and_failures(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Collect row indices (M,) and failures (M,) from batches.

    If several processes fit together, each process computes failures for a share of the rows.
    """
    world = current_world()
    rows = [torch.empty(0, dtype=torch.int64)]
    failures = [torch.empty(0, dtype=torch.int64)]
    for batch in batches:
        rows_of_process = world.process_slice(len(batch.index))
        process_batch = batch.rows(rows_of_process)
        rows.append(batch.index)
        failure_of_batch = world.gather(process_batch.failure)
        failures.append(failure_of_batch)
    return torch.cat(rows), torch.cat(failures)


def degenerate_rate(failure: Tensor, method_name: str, *, allow_degenerate: bool) -> float | None:
    """Return the error rate, 0 or 1, if the failures (M,) are all equal. Otherwise return None.

    Warn if there are fewer than ``MIN_RELIABLE_ROWS`` failures or successes. Messages name the
    method by ``method_name``.

    Raises:
        DataError: If the failures are all equal, unless ``allow_degenerate`` is true.
    """
    n_rows = len(failure)
    n_failures = int(failure.sum())
    n_successes = n_rows - n_failures
    rarer_kind = "successes"
    if n_failures <= n_successes:
        rarer_kind = "failures"
    n_rarer = min(n_failures, n_successes)
    if n_rarer == 0 and not allow_degenerate:
        raise DataError(
            f"{method_name} learns to tell failures from successes. Found {n_rarer} {rarer_kind} "
            f"among {n_rows} training rows; at least {MIN_RELIABLE_ROWS} are needed for a useful "
            "fit. Add harder (or easier) images, or set allow_degenerate=true for a constant "
            "predictor."
        )
    if n_rarer < MIN_RELIABLE_ROWS:
        warn_caller(
            f"only {n_rarer} {rarer_kind} among {n_rows} training rows: expect an unreliable fit."
        )
    if n_rarer > 0:
        return None
    return n_failures / n_rows


def warn_of_few_rows(failure: Tensor, method_name: str) -> None:
    """Warn if a method learns probabilities from fewer rows than ``MIN_RELIABLE_ROWS``."""
    n_rows = len(failure)
    if n_rows < MIN_RELIABLE_ROWS:
        unit = "row" if n_rows == 1 else "rows"
        warn_caller(
            f"{method_name} is fitted on {n_rows} {unit}: with fewer than {MIN_RELIABLE_ROWS} its "
            "probabilities say little."
        )


def answer_columns(train: Rows) -> tuple[str, ...]:
    """Return ("answer",) if the fit reads this column to judge given answers, or else ()."""
    return tuple(name for name in train.columns if name == ANSWER)


def class_texts(train: Rows) -> Tensor:
    """Return the texts (K, D) of the training classes, to recognise the classes in any order."""
    no_rows = train.index[:0]
    text = train.source.candidates(no_rows).text
    return text.clone()


def fit_and_selection(
    train: Rows, failure: Tensor, validation: EmbeddingSource | None, fraction: float, seed: int
) -> tuple[Rows, Rows | None]:
    """Return the rows to fit on, and the rows for model selection.

    The selection rows are the validation set. Without a validation set, a ``fraction`` of the
    training rows is held out. If the selection rows are all failures or all successes, selection is
    impossible. In this case all training rows are for the fit, and the selection rows are None.

    ``failure`` (M,) belongs to the training rows. ``seed`` chooses the held-out rows.
    """
    if validation is not None:
        index_to_fit = train.index
        columns = answer_columns(train)
        validation_rows, selection_failure = trainable_rows(
            validation, role="validation", needs="failure", columns=columns
        )
        selection = Rows(validation, validation_rows, train.columns)
    else:
        is_held_out = _held_out_mask(train, failure, fraction, seed)
        index_to_fit = train.index[~is_held_out]
        selection = Rows(train.source, train.index[is_held_out], train.columns)
        batches = selection.batches(SCORING_BATCH)
        # failures are computed again, because held-out captions are in new pools
        _, selection_failure = rows_and_failures(batches)
    can_select = len(selection_failure.unique()) == 2
    if not can_select:
        return Rows(train.source, train.index, train.columns), None
    return Rows(train.source, index_to_fit, train.columns), selection


def _held_out_mask(train: Rows, failure: Tensor, fraction: float, seed: int) -> Tensor:
    """Return a mask (M,): true for a random ``fraction`` of rows, given the failures (M,).

    Raises:
        DataError: If no failure or no success is left to fit on. With pools, only if no row is
            left.
    """
    pool_size = train.source.pool_size
    generator = torch.Generator().manual_seed(seed)
    if isinstance(train.source, PairSource):
        groups = caption_groups(train.source, train.index)
    else:
        _, groups = train.pictures()  # every row's picture
    positions = held_out_positions(failure, fraction, pool_size, generator, groups)
    is_held_out = torch.zeros(len(train.index), dtype=torch.bool)
    is_held_out[positions] = True
    # Both failures and successes must be left. With pools a single kind is enough, because every
    # pass over the rows draws new pools, and different answers fail in new pools.
    min_kinds = 2 if pool_size is None else 1
    kinds_left = failure[~is_held_out].unique()
    if len(kinds_left) < min_kinds:
        raise DataError(
            f"validation_fraction={fraction} holds out {len(positions)} of {len(failure)} "
            "training rows, so that no failure or no success is left to learn from. Make it "
            "smaller."
        )
    return is_held_out


def held_out_positions(
    failure: Tensor,
    fraction: float,
    pool_size: int | None,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Tensor:
    """Choose a random ``fraction`` of M rows. Return sorted positions (H,).

    Without pools the rows are stratified by ``failure`` (M,). Rows with the same number in
    ``groups`` (M,) stay together.

    With pools the held-out rows fill whole pools. If the rows make fewer than two pools, no rows
    are held out. Groups stay together as well, unless there are fewer groups than rows in a pool.
    With so few groups every pool holds several rows from a group anyway.
    """
    if pool_size is not None:
        return _held_out_pool_positions(len(failure), fraction, pool_size, generator, groups)
    if groups is None:
        groups = torch.arange(len(failure))
    _, first_indices = np.unique(groups.numpy(), return_index=True)
    first_rows = torch.from_numpy(first_indices)  # a group takes the failure of its first row
    chosen_rows = []  # first rows of the held-out groups
    for is_failure in (0, 1):
        candidates = first_rows[failure[first_rows] == is_failure]
        order = torch.randperm(len(candidates), generator=generator)
        n_held_out = round(len(candidates) * fraction)
        chosen_rows.append(candidates[order[:n_held_out]])
    chosen_groups = groups[torch.cat(chosen_rows)]
    return torch.isin(groups, chosen_groups).nonzero().squeeze(1)


def _held_out_pool_positions(
    n_rows: int, fraction: float, pool_size: int, generator: torch.Generator, groups: Tensor | None
) -> Tensor:
    """Return sorted positions (H,) of random rows that fill whole pools.

    The rows are whole groups if there are enough groups. If all rows fill at least two pools, a
    ``fraction`` of the pools is held out, but at least one. If no whole groups fill a pool, no row
    is held out.
    """
    n_pools = n_rows // pool_size
    n_pools_held_out = 0
    if n_pools > 1 and fraction > 0:
        n_pools_held_out = max(round(n_pools * fraction), 1)
    order = torch.randperm(n_rows, generator=generator)
    n_rows_held_out = n_pools_held_out * pool_size
    if groups is None or len(groups.unique()) < pool_size:
        chosen_rows = order[:n_rows_held_out]
    else:
        positions_in_order = rows_of_whole_groups(groups[order], max_rows=n_rows_held_out)
        chosen_rows = order[positions_in_order]
    if len(chosen_rows) < pool_size:  # too few rows for a pool
        chosen_rows = chosen_rows[:0]
    return chosen_rows.sort().values


def rows_of_whole_groups(groups: Tensor, max_rows: int) -> Tensor:
    """Choose whole groups with at most ``max_rows`` rows together, and return sorted row indices.

    ``groups`` (M,) has every row's group number. Groups are taken in the order of their first rows.
    If a group has more rows than are left to take, the group is skipped.
    """
    _, group_of_row = torch.unique(groups, return_inverse=True)
    sizes = group_of_row.bincount()
    # a group's first row is the smallest row index in the group
    after_last = torch.full((len(sizes),), len(groups))
    all_rows = torch.arange(len(groups))
    first_row = after_last.scatter_reduce(0, group_of_row, all_rows, reduce="amin")
    is_taken = torch.zeros(len(sizes), dtype=torch.bool)
    rows_left = max_rows
    # groups not yet taken or skipped, in the order of their first rows
    waiting_groups = first_row.argsort()
    waiting_groups = waiting_groups[sizes[waiting_groups] <= rows_left]
    while len(waiting_groups):
        # Take as many waiting groups as fit together. At least one group fits, since every waiting
        # group fits alone.
        groups_to_take = waiting_groups[sizes[waiting_groups].cumsum(0) <= rows_left]
        is_taken[groups_to_take] = True
        rows_left -= int(sizes[groups_to_take].sum())
        # the next group no longer fits: skip all groups that are now too large
        waiting_groups = waiting_groups[len(groups_to_take) :]
        waiting_groups = waiting_groups[sizes[waiting_groups] <= rows_left]
    return is_taken[group_of_row].nonzero().squeeze(1)


def caption_groups(
    source: PairSource, rows: Tensor, block_rows: int = CAPTION_BLOCK_ROWS
) -> Tensor:
    """Return a group number for every row: (M,) int64. Rows with equal captions have equal numbers.

    Captions are compared as float16. If a caption equals a class text, the row forms a group by
    itself. If all rows with such a caption were held out together, the class could not be learned.

    A caption has D 16-bit numbers x. The group number is a hash with fixed random odd factors a:

        sum_i a_i x_i mod 2^64

    Two different captions have the same hash with a probability below 2^-48. The only effect would
    be a group with both captions.
    """
    rng = np.random.default_rng(0)
    halves = rng.integers(2**63, size=source.space.embed_dim, dtype=np.uint64)
    factors = 2 * halves + 1  # odd
    hashes = []
    for block in rows.split(block_rows):
        # the sum of -0 and 0 is 0, so that equal numbers have equal bits
        captions = (source.caption_rows(block).half() + 0).numpy()
        bits = captions.view(np.uint16)
        hashes.append(bits.astype(np.uint64) @ factors)  # numpy computes modulo 2^64
    unsigned_hashes = np.concatenate(hashes)
    groups = torch.from_numpy(unsigned_hashes.view(np.int64))
    has_own_group = source.of_classes(rows)
    # if a row forms a group by itself, the row index is the group number
    return torch.where(has_own_group, rows, groups)


def failure_log_odds(logits: Tensor, batch: Batch) -> Tensor:
    """Compute the log-odds (B,) float64 of failure: log((1 - p) / p).

    p is the judged answer's probability under the softmax of ``logits`` (B, K). ``logits`` may
    differ from the zero-shot logits, so the answer need not have the largest logit. The result is
    exact also if p would round to 0 or 1.
    """
    if batch.matches is None:  # all candidates are different answers
        answer_column = batch.prediction[:, None].to(logits.device)
        return RivalWeights.from_logits(logits, answer_column).log_odds
    logits = float64(logits)
    is_answer = batch.alike(batch.prediction).to(logits.device)
    log_others = logits.masked_fill(is_answer, -torch.inf).logsumexp(dim=-1)
    log_answer = logits.masked_fill(~is_answer, -torch.inf).logsumexp(dim=-1)
    return log_others - log_answer


def log_odds_with_outside(log_odds: Tensor, outside_log_odds: Tensor) -> Tensor:
    """Compute the log-odds (B,) float64 of u = 1 - (1 - P(outside)) q.

    q is the answer's probability if the image is inside the classes. The odds are computed as a
    sum:

        u / (1 - u) = (1 - q) / q + P(outside) / P(inside) / q

    So large odds stay exact. If u were computed first, it could round to 1, with infinite odds.

    Args:
        log_odds: (B,) log((1 - q) / q).
        outside_log_odds: (B,) log(P(outside) / P(inside)).
    """
    log_one = torch.zeros_like(log_odds)
    log_inverse_q = torch.logaddexp(log_odds, log_one)  # log(1 / q), as 1 / q = (1 - q) / q + 1
    log_outside_term = outside_log_odds.to(log_odds.device) + log_inverse_q
    return torch.logaddexp(log_odds, log_outside_term)


MAX_FOLDED_ROWS = 5_000  # with more rows, only a single fold is held out
N_FOLDS = 5


def cross_fit_splits(
    train: Rows,
    failure: Tensor,
    validation: EmbeddingSource | None,
    seed: int,
    needs: Needs = "class",
    max_folded_rows: int = MAX_FOLDED_ROWS,
) -> list[tuple[Rows, Rows]]:
    """Split rows into pairs: rows to fit on, and rows held out from this fit.

    1. With a validation set there is a single pair: all training rows, and the validation set.
    2. Up to ``max_folded_rows`` training rows there is a pair for each of five folds.
    3. With more rows there is a single pair. The held-out rows are a fifth of the training rows,
       but at most ``max_folded_rows``.

    Folds are stratified by failure (M,). All rows of a picture are in the same fold, and the first
    row's failure counts for the picture.
    """
    if validation is not None:
        columns = answer_columns(train)
        rows, _ = trainable_rows(validation, role="validation", needs=needs, columns=columns)
        return [(train, Rows(validation, rows, train.columns))]
    generator = torch.Generator().manual_seed(seed)
    first_row, picture_of_row = train.pictures()
    n_pictures = len(first_row)
    order = torch.randperm(n_pictures, generator=generator)
    # Successes are sorted before failures. The pictures are dealt out to the folds in this order.
    # So the folds are stratified.
    shuffled_failure = failure[first_row][order]
    order = order[shuffled_failure.argsort(stable=True)]
    fold_of_picture = torch.empty(n_pictures, dtype=torch.long)
    fold_of_picture[order] = torch.arange(n_pictures) % N_FOLDS
    fold_of_row = fold_of_picture[picture_of_row]
    n_held_out_folds = N_FOLDS
    if len(failure) > max_folded_rows:
        n_held_out_folds = 1
    pairs = []
    for fold in range(n_held_out_folds):
        rows_of_fold = train.index[fold_of_row == fold]
        # chosen at random, since rows may be sorted by class
        order_of_fold = torch.randperm(len(rows_of_fold), generator=generator)
        positions_in_fold = order_of_fold[:max_folded_rows].sort().values
        if len(positions_in_fold):
            rows_to_fit = replace(train, index=train.index[fold_of_row != fold])
            held_out_rows = replace(train, index=rows_of_fold[positions_in_fold])
            pairs.append((rows_to_fit, held_out_rows))
    return pairs
