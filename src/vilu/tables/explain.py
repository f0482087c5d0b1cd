"""Explains suspicious answers in a table: how much each column moves a row's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.tables.methods import AnswerMethod
from vilu.tables.table import AnswerTable
from vilu.text import escape_unprintable

WORD_OF_CORRECT = {1: "right", 0: "WRONG"}
"""Value of the column ``correct`` -> word. There is no word for unknown (-1)."""


@dataclass(frozen=True)
class ExplainedAnswer:
    """The reasons for a single answer's score."""

    row: int  # position of the row in the table, from 0
    key: str  # the row's identifier
    answer: str | None  # the answer's text, or None if the table has no texts
    uncertainty: float
    correct: int  # 1 right, 0 wrong, -1 unknown
    # column -> term in this row's score, minus the mean term over all rows. Terms with the largest
    # absolute values come first.
    terms: dict[str, float]

    def __str__(self) -> str:
        answer = ""
        if self.answer is not None:
            answer = f"   answer {self.answer!r:.60}"
        key = escape_unprintable(self.key)
        head = f"row {self.row}  {key}{answer}   uncertainty {self.uncertainty:.4g}"
        if self.correct in WORD_OF_CORRECT:
            head += f"   {WORD_OF_CORRECT[self.correct]}"
        parts = [f"{value:+.3g} {name}" for name, value in self.terms.items()]
        return f"{head}\n  {'   '.join(parts)}"


@dataclass(frozen=True)
class ExplainedAnswers:
    """Explained rows, and each column's share in the scores of the fit."""

    method: str
    shares: dict[str, float]  # column -> share in the spread of the score. Empty without a fit.
    rows: tuple[ExplainedAnswer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the content as plain JSON."""
        return {"kind": "explanations", **asdict(self)}

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        head = f"method   {self.method}\n"
        if shares:
            head += f"shares   {shares} (of the spread of the score on the rows of the fit)\n"
        head += "terms    what each column adds to the score of a row, less its mean over the table"
        return "\n\n".join([head, *map(str, self.rows)])


def explain_answers(
    predictor: FailurePredictor,
    table: AnswerTable,
    rows: Sequence[int | str] | None = None,
    n: int = 10,
) -> ExplainedAnswers:
    """Explain some rows of a table, by default the ``n`` most uncertain rows.

    Args:
        predictor: A method for tables. The predictor must be fitted, unless it needs no fit.
        table: The table.
        rows: Row positions or identifiers. If None, the most uncertain rows.
        n: Number of rows, if ``rows`` is None.

    Raises:
        DataError: If there is no such row. The errors of ``predict_uncertainty`` are raised, too.
        UsageError: If the predictor is no method for tables.

    Examples:
        >>> import vilu
        >>> from vilu.methods import AnswerScore
        >>> from vilu.tables.explain import explain_answers
        >>> table = vilu.open_table({"id": ["a", "b"], "score": [0.9, 0.1]})
        >>> (explained,) = explain_answers(AnswerScore(), table, n=1).rows
        >>> explained.key, round(explained.terms["score"], 2)
        ('b', 0.4)
    """
    if not isinstance(predictor, AnswerMethod):
        raise UsageError(
            f"{predictor.name} takes no table of answers. Fit a method for tables: `vilu fit TABLE "
            "-o predictor`."
        )
    uncertainty = predictor.predict_uncertainty(table)
    contributions = predictor.contributions(table)
    if rows is None:
        rows = np.argsort(-uncertainty, kind="stable")[:n].tolist()
    explanations = []
    for position_or_id in rows:
        row = _row_position(table, position_or_id)
        explanation = _explain_row(table, row, uncertainty, contributions)
        explanations.append(explanation)
    shares = predictor.notes_.get("shares", {})
    return ExplainedAnswers(predictor.label, shares, tuple(explanations))


def _explain_row(
    table: AnswerTable, row: int, uncertainty: Floats, contributions: Mapping[str, Floats]
) -> ExplainedAnswer:
    """Explain the row at the position ``row``.

    ``contributions`` maps each column to the terms (N,) of all rows.
    """
    terms = {name: float(values[row]) for name, values in contributions.items()}
    largest_first = sorted(terms.items(), key=_absolute_value, reverse=True)
    return ExplainedAnswer(
        row=row,
        key=table.ids[row],
        answer=None if table.answer is None else table.answer[row],
        uncertainty=float(uncertainty[row]),
        correct=int(table.correct[row]),
        terms=dict(largest_first),
    )


def _absolute_value(term: tuple[str, float]) -> float:
    """Return a term's absolute value."""
    _, value = term
    return abs(value)


def _row_position(table: AnswerTable, position_or_id: int | str) -> int:
    """Return the position of a row. Raises DataError if the table has no such row."""
    if isinstance(position_or_id, str):
        if position_or_id not in table.ids:
            raise DataError(f"the table has no row with the id {position_or_id!r:.60}.")
        return table.ids.index(position_or_id)
    if not 0 <= position_or_id < len(table):
        raise DataError(
            f"the table has the rows 0 to {len(table) - 1}. Got {position_or_id} instead."
        )
    return position_or_id
