"""Answers of a classifier, from class logits."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax

from vilu.errors import OUTSIDE, UNKNOWN, DataError, did_you_mean
from vilu.metrics.counts import Floats, Ints
from vilu.tables.sources.converted import Columns, Converted

WHOLE_NUMBER_PATTERN = re.compile(r"-?[0-9]{1,18}")
"""A whole number such as 12 or -1. Every number with at most 18 digits fits into an int64."""

BLOCK_ROWS = 4_096
"""Number of rows in a block. Probabilities are computed block by block."""


def logit_answers(
    logits: ArrayLike,
    *,
    target: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
) -> Converted:
    """Make a table of a classifier's answers from logits (N, K), one row per picture or text.

    The answer is the class with the largest logit, the first class if several have this logit. With
    p = softmax(logits), the columns are ``id``, ``answer``, ``correct``, ``score_softmax`` (largest
    p), ``score_margin`` (largest p minus the second largest), ``uncertainty_entropy`` (entropy of p
    in nats) and ``score_logit`` (the largest logit).

    Args:
        logits: (N, K) finite numbers, K at least 2. Logarithms of probabilities are logits, too.
        target: (N,) each row's true class, as a number from 0 or as a name. -1 or "" if the true
            class is not known. -2 (``vilu.OUTSIDE``) if the row belongs to no class. Then every
            answer is wrong.
        class_names: K class names. By default the numbers 0 to K - 1.
        ids: N row identifiers. By default the numbers 0 to N - 1.

    Raises:
        DataError: If an argument has another shape, a logit is not finite, or a target is no class.

    Examples:
        >>> import numpy as np
        >>> from vilu.tables.sources import logit_answers
        >>> table = logit_answers(np.log([[0.8, 0.2], [0.4, 0.6]]), target=[0, 0])
        >>> table.columns["answer"], table.columns["correct"]
        (['0', '1'], [1, 0])
        >>> np.round(table.columns["score_margin"], 6).tolist()
        [0.6, 0.2]
    """
    logit_rows = np.asarray(logits)
    is_real = logit_rows.dtype.kind in "fiu"  # floating point, signed or unsigned
    if logit_rows.ndim != 2 or logit_rows.shape[1] < 2 or not is_real:
        raise DataError(
            "logits must be numbers (N, K) with at least two classes. Got "
            f"{logit_rows.dtype} of shape {logit_rows.shape} instead."
        )
    n, n_classes = logit_rows.shape
    if not n:
        raise DataError("logits must have at least one row. They have none.")
    names = _texts_or_numbers(class_names, n_classes, "class_names")
    answer = logit_rows.argmax(axis=1)
    columns: Columns = {
        "id": _texts_or_numbers(ids, n, "ids"),
        "answer": [names[index] for index in answer.tolist()],
        "correct": [None] * n,
    }
    if target is not None:
        labels = _class_numbers(target, names)
        columns["correct"] = _correct_cells(answer, labels, n_classes)
    for start in range(0, n, BLOCK_ROWS):
        block = np.asarray(logit_rows[start : start + BLOCK_ROWS], dtype=np.float64)
        _require_finite(block, start)
        for name, numbers in _score_columns(block).items():
            columns.setdefault(name, []).extend(numbers.tolist())
    return Converted(columns)


def _score_columns(logits: Floats) -> dict[str, Floats]:
    """Compute the number columns (B,) by name, for logits (B, K)."""
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    two_largest = np.partition(p, -2, axis=1)[:, -2:]  # (B, 2), ascending
    return {
        "score_softmax": two_largest[:, 1],
        "score_margin": two_largest[:, 1] - two_largest[:, 0],
        "uncertainty_entropy": -(p * log_p).sum(axis=1),
        "score_logit": logits.max(axis=1),
    }


def _texts_or_numbers(texts: Sequence[str] | None, n: int, name: str) -> list[str]:
    """Return ``n`` texts: ``texts``, or the numbers 0 ... n - 1 if ``texts`` is None.

    Raises DataError if there are not ``n`` texts. ``name`` is the argument's name in the message.
    """
    if texts is None:
        return [str(number) for number in range(n)]
    if len(texts) != n:
        raise DataError(f"{name} must have {n} entries. Got {len(texts)} instead.")
    return [str(text) for text in texts]


def _class_numbers(target: ArrayLike, names: Sequence[str]) -> Ints:
    """Return the number of each row's true class.

    Texts in ``target`` are class names. If some texts are no names, but all texts are whole
    numbers, the texts are read as numbers.
    """
    labels = np.asarray(target)
    is_text = labels.dtype.kind == "U"
    if not is_text:
        return labels
    texts = labels.tolist()
    number_of_name = {name: number for number, name in enumerate(names)} | {"": UNKNOWN}
    unknown_texts = [text for text in texts if text not in number_of_name]
    are_numbers = all(WHOLE_NUMBER_PATTERN.fullmatch(text) for text in texts)
    if unknown_texts and are_numbers:
        return labels.astype(np.int64)
    if unknown_texts:
        suggestion = did_you_mean(unknown_texts[0], names)
        raise DataError(
            f'target must have names of classes, or "" if unknown. Got {unknown_texts[0]!r:.80}.'
            f"{suggestion}"
        )
    return np.array([number_of_name[text] for text in texts], dtype=np.int64)


def _correct_cells(answer: Ints, labels: Ints, n_classes: int) -> list[int | None]:
    """Return the cells of ``correct``: 1 (right), 0 (wrong), or None if the class is not known.

    ``labels`` (N,) has each row's true class, or -1 or -2 as in ``logit_answers``.
    """
    is_whole = labels.dtype.kind in "iu"  # signed or unsigned
    if labels.shape != answer.shape or not is_whole:
        raise DataError(
            f"target must have one whole number per row ({len(answer)}). Got {labels.dtype} of "
            f"shape {labels.shape} instead."
        )
    is_no_class = (labels < OUTSIDE) | (labels >= n_classes)
    if is_no_class.any():
        row = int(is_no_class.argmax())
        raise DataError(
            f"target must have numbers from 0 to {n_classes - 1}, or -1 if unknown, or -2 for "
            f"none of the classes. Row {row} (counted from 0) has {labels[row]}."
        )
    correct: list[int | None] = []
    for label, is_right in zip(labels.tolist(), (labels == answer).tolist(), strict=True):
        correct.append(None if label == UNKNOWN else int(is_right))
    return correct


def _require_finite(logits: Floats, start: int) -> None:
    """Raise DataError at a row with NaN or infinity.

    ``start`` is the position of the first row in the whole array.
    """
    is_finite = np.isfinite(logits).all(axis=1)
    if not is_finite.all():
        row = start + int((~is_finite).argmax())
        raise DataError(
            f"logits must be finite. Row {row} (counted from 0) has NaN or infinity. Of "
            "probabilities that are 0, take the logarithm of max(p, 1e-300)."
        )
