"""Checked input for all metrics: correct and wrong answers, counted per distinct score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import OUTSIDE, UNKNOWN, DataError
from vilu.validation import refuse_masked

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PositiveClass = Literal["correct", "failure"]
"""Answers that a metric counts as the positive class: the correct answers, or the failures."""


@dataclass(frozen=True, eq=False)
class TieCounts:
    """Counts of correct and wrong answers at each distinct score, the most trusted score first.

    Rows with equal scores are counted together, so the counts do not depend on the row order. All
    axes before the last axis are resample axes. If a resample has no row with some score, the
    counts at this score are zero, and the score does not affect the metrics.
    """

    value: Floats  # (G,) distinct uncertainties, ascending
    correct: Ints  # (..., G) correct answers at each score
    wrong: Ints  # (..., G) wrong answers at each score

    @cached_property
    def size(self) -> Ints:
        """Answer count (..., G) at each score."""
        return self.correct + self.wrong

    @cached_property
    def accepted_correct(self) -> Ints:
        """Count (..., G) of correct answers up to each score."""
        return self.correct.cumsum(-1)

    @cached_property
    def accepted_wrong(self) -> Ints:
        """Count (..., G) of wrong answers up to each score."""
        return self.wrong.cumsum(-1)

    @cached_property
    def accepted(self) -> Ints:
        """Count (..., G) of answers up to each score."""
        return self.accepted_correct + self.accepted_wrong

    @property
    def n_correct(self) -> Ints:
        """Total count (...) of correct answers."""
        return self.accepted_correct[..., -1]

    @property
    def n_wrong(self) -> Ints:
        """Total count (...) of wrong answers."""
        return self.accepted_wrong[..., -1]

    @property
    def n(self) -> Ints:
        """Total count (...) of answers."""
        return self.accepted[..., -1]

    @cached_property
    def with_roles_exchanged(self) -> TieCounts:
        """Counts with exchanged roles: ``correct`` counts wrong answers, ``wrong`` correct answers.

        The scores are negated, so the least trusted score is first.
        """
        return TieCounts(
            -self.value[::-1], correct=self.wrong[..., ::-1], wrong=self.correct[..., ::-1]
        )

    def with_positive(self, positive: PositiveClass) -> TieCounts:
        """Return counts where ``correct`` counts the answers in the class ``positive``.

        The score most typical for this class is first.
        """
        return self if positive == "correct" else self.with_roles_exchanged


def check_scores_and_failures(
    uncertainty: ArrayLike, failure: ArrayLike
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return uncertainty (N,) as float64 and failure (N,) as bool. Raise DataError if invalid."""
    given_scores = _vector_of_reals(uncertainty, "uncertainty")
    scores: Floats = given_scores.astype(np.float64, copy=False)
    given_failures = _vector_of_reals(failure, "failure")
    failures: Floats = given_failures.astype(np.float64, copy=False)
    require_same_length(scores, failures)
    if not len(scores):
        raise DataError("a metric needs at least one row. Got none.")
    is_finite = np.isfinite(scores)
    if not is_finite.all():
        row = int(np.argmin(is_finite))  # the first row where the mask is False
        n_bad = np.count_nonzero(~is_finite)
        raise DataError(
            f"uncertainty must be finite. Got {n_bad} bad values of {len(scores)}, "
            f"the first in row {row} ({scores[row]}). Leave those rows out."
        )
    is_binary = (failures == 0) | (failures == 1)
    if not is_binary.all():
        row = int(np.argmin(is_binary))
        raise DataError(
            "failure must be 0 (the answer is right) or 1 (it is wrong). "
            f"Got {failures[row]:g} in row {row} instead."
        )
    return scores, failures == 1


def require_same_length(scores: Floats, failures: NDArray[Any]) -> None:
    """Refuse uncertainties and failures if their row counts differ."""
    if len(scores) != len(failures):
        raise DataError(
            "uncertainty and failure must have one entry per row each. "
            f"Got {len(scores)} and {len(failures)} instead."
        )


def real_vector(values: ArrayLike, name: str) -> Floats:
    """Copy a vector of real numbers as float64. Error messages use ``name``."""
    return _vector_of_reals(values, name).astype(np.float64)


def check_codes(
    values: ArrayLike, name: str, last: int | None, first: int = UNKNOWN
) -> NDArray[np.int64]:
    """Return ``values`` (N,) as int64, checked to be whole numbers from ``first`` to ``last``.

    If ``last`` is None, there is no upper limit. The message for invalid values begins with
    ``name``.
    """
    numbers = real_vector(values, name)
    largest = np.inf if last is None else last
    is_in_range = (numbers >= first) & (numbers <= largest)
    is_whole = numbers == np.rint(numbers)
    bad_rows = np.flatnonzero(~(is_in_range & is_whole))
    if len(bad_rows):
        lowest = f"{UNKNOWN} (unknown)"
        if first != UNKNOWN:  # then ``first`` is ``OUTSIDE``
            lowest = f"{OUTSIDE} (none of the classes), {lowest}"
        raise DataError(
            f"{name} must hold whole numbers from {lowest} to {largest:g}. "
            f"Got {numbers[bad_rows[0]]:g} in row {bad_rows[0]} instead."
        )
    return numbers.astype(np.int64)


def _vector_of_reals(values: ArrayLike, name: str) -> NDArray[Any]:
    """Return ``values`` as a vector of real numbers. Error messages use ``name``."""
    try:
        array = np.asarray(values)
    # raised by ragged lists, and by tensors on a device or with gradients
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} must be a vector of numbers on the CPU: {error}") from error
    if array.ndim != 1:
        raise DataError(f"{name} must be a vector (rows,). Got shape {array.shape} instead.")
    refuse_masked(values, name)
    is_real = array.dtype.kind in "biuf"  # bool, signed, unsigned or floating point
    if array.size and not is_real:
        raise DataError(f"{name} must hold real numbers. Got dtype {array.dtype} instead.")
    return array


BLOCK_ROWS = 2**22
"""Rows to sort at a time. Sorting all rows at once would need much memory."""


def tie_counts(
    uncertainty: ArrayLike, failure: ArrayLike, *, block_rows: int = BLOCK_ROWS
) -> TieCounts:
    """Count correct and wrong answers (G,) per distinct uncertainty.

    To save memory, at most ``block_rows`` rows are sorted at a time.
    """
    scores, failures = check_scores_and_failures(uncertainty, failure)
    blocks = []
    for start in range(0, len(scores), block_rows):
        rows = slice(start, start + block_rows)
        counts_of_block = _counts_of_block(scores[rows], failures[rows])
        blocks.append(counts_of_block)
    if len(blocks) == 1:
        return blocks[0]
    values_of_blocks = np.concatenate([block.value for block in blocks])
    # for each score in each block, ``value_index`` is the score's position in ``value``
    value, value_index = np.unique(values_of_blocks, return_inverse=True)
    correct = _totals([block.correct for block in blocks], value_index, len(value))
    wrong = _totals([block.wrong for block in blocks], value_index, len(value))
    return TieCounts(value, correct, wrong)


def _totals(counts_of_blocks: list[Ints], value_index: Ints, n_values: int) -> Ints:
    """Add up the counts of several blocks, and return every value's total count (n_values,).

    All blocks together, one after another, have N counts. ``value_index`` (N,) says for each count
    which value was counted.
    """
    counts = np.concatenate(counts_of_blocks)
    totals = np.zeros(n_values, np.int64)
    np.add.at(totals, value_index, counts)
    return totals


def _counts_of_block(scores: Floats, failures: NDArray[np.bool_]) -> TieCounts:
    """Count the rows (G,) in one block."""
    value, size = np.unique(scores, return_counts=True)
    # The wrong rows are sorted once more. This takes less time than to search every row's score
    # in ``value``.
    value_of_wrong, n_wrong = np.unique(scores[failures], return_counts=True)
    wrong = np.zeros_like(size)
    wrong[np.searchsorted(value, value_of_wrong)] = n_wrong
    return TieCounts(value, correct=size - wrong, wrong=wrong)


def ratio(
    numerator: NDArray[np.generic], denominator: NDArray[np.generic], if_undefined: float = np.nan
) -> Floats:
    """Divide in float64. Where the denominator is zero, the result is ``if_undefined``."""
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    quotient: Floats = np.full(shape, if_undefined)
    is_defined = np.asarray(denominator) != 0
    np.divide(numerator, denominator, out=quotient, where=is_defined)
    return quotient


def check_pictures(values: ArrayLike | None, n: int) -> Ints | None:
    """Copy the picture identities (N,) as int64. If ``values`` is None, return None.

    Raises a DataError unless all n values are whole numbers of at least 0, or -1 for unknown.
    """
    if values is None:
        return None
    numbers = _vector_of_reals(values, "picture")
    is_whole = numbers.dtype.kind in "iu"  # signed or unsigned
    if numbers.size and not is_whole:
        raise DataError(
            "picture must hold whole numbers, -1 where the picture is not known. "
            f"Got dtype {numbers.dtype} instead."
        )
    if len(numbers) != n:
        raise DataError(
            f"picture must have one entry per uncertainty ({n}). Got {len(numbers)} instead."
        )
    largest = np.iinfo(np.int64).max
    if numbers.size and (numbers.min() < UNKNOWN or numbers.max() > largest):
        raise DataError(
            f"picture must be from 0 to {largest}, or -1 where the picture is not known. "
            f"Got {numbers.min()} to {numbers.max()} instead."
        )
    return numbers.astype(np.int64)


def first_rows(picture: Ints) -> Ints:
    """Return, for each row (N,), the index of the first row with the same picture.

    If a row's picture is unknown (-1), the row gets the row's own index.

    Examples:
        >>> import numpy as np
        >>> from vilu.metrics.counts import first_rows
        >>> picture = np.array([7, -1, 3, 7, -1])  # rows 0 and 3 show the same picture
        >>> first_rows(picture).tolist()
        [0, 1, 2, 0, 4]
    """
    first_row = np.arange(len(picture))
    known_rows = np.flatnonzero(picture != UNKNOWN)
    _, first_of_picture, picture_index = np.unique(
        picture[known_rows], return_index=True, return_inverse=True
    )
    # Each known row's picture occurs first at this position in ``known_rows``.
    first_position = first_of_picture[picture_index]
    first_row[known_rows] = known_rows[first_position]
    return first_row


def has_repeated_picture(picture: Ints) -> bool:
    """Return whether two rows (N,) have the same picture. Unknown pictures (-1) are not compared.

    This takes about 16 bytes per row, and ``repeated_picture_numbers`` takes 100.

    Examples:
        >>> import numpy as np
        >>> from vilu.metrics.counts import has_repeated_picture
        >>> has_repeated_picture(np.array([7, -1, 3, -1])), has_repeated_picture(np.array([7, 7]))
        (False, True)
    """
    known_pictures = picture[picture != UNKNOWN]
    known_pictures.sort()  # equal pictures are neighbours now
    is_repeated = known_pictures[1:] == known_pictures[:-1]
    return bool(is_repeated.any())


def repeated_picture_numbers(picture: Ints | None) -> Ints | None:
    """Return each row's picture number (N,), or None if no picture has two rows.

    Pictures are numbered from 0, in the order of the first rows. A row with an unknown picture
    (-1) counts as a separate picture.

    Examples:
        >>> import numpy as np
        >>> from vilu.metrics.counts import repeated_picture_numbers
        >>> picture = np.array([7, 3, 7, -1])  # rows 0 and 2 show the same picture
        >>> repeated_picture_numbers(picture).tolist()
        [0, 1, 0, 2]
    """
    if picture is None or not has_repeated_picture(picture):
        return None
    first_row = first_rows(picture)
    _, number = np.unique(first_row, return_inverse=True)
    return number
