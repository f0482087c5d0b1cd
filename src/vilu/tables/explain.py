"""Why answers of a table are suspicious: which column moves the score of each row."""

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
from vilu.text import printable

WORD_OF_CORRECT = {1: "right", 0: "WRONG"}
"""Words for the values of the column ``correct``."""


@dataclass(frozen=True)
class ExplainedAnswer:
    """Why one answer is suspicious, or why it is not."""

    row: int  # position of the row in the table, from 0
    key: str  # identifier of the row
    answer: str | None  # text of the answer; None if the table has none
    uncertainty: float
    correct: int  # 1 right, 0 wrong, -1 unknown
    # by column, its term in the score minus the mean of this term; the largest term is first
    terms: dict[str, float]

    def __str__(self) -> str:
        answer = ""
        if self.answer is not None:
            answer = f"   answer {printable(self.answer)!r:.60}"
        head = f"row {self.row}  {printable(self.key)}{answer}   uncertainty {self.uncertainty:.4g}"
        if self.correct in WORD_OF_CORRECT:
            head += f"   {WORD_OF_CORRECT[self.correct]}"
        parts = [f"{value:+.3g} {name}" for name, value in self.terms.items()]
        return f"{head}\n  {'   '.join(parts)}"


@dataclass(frozen=True)
class ExplainedAnswers:
    """Explanations of rows, and the share of each column in the scores of the fit."""

    method: str
    shares: dict[str, float]
    rows: tuple[ExplainedAnswer, ...]

    def to_dict(self) -> dict[str, Any]:
        """The content as plain JSON."""
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
    """Explain some rows of a table, by default the ``n`` most uncertain ones.

    Args:
        predictor: A predictor that is ready to score.
        table: The table.
        rows: Positions or identifiers of rows; None: the most uncertain rows.
        n: Number of rows, if ``rows`` is None.

    Raises:
        DataError: If there is no such row. The errors of ``predict_uncertainty`` are raised, too.
        UsageError: If the predictor takes no tables.

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
    for row in rows:
        explanations.append(_explain_row(table, _position(table, row), uncertainty, contributions))
    return ExplainedAnswers(
        predictor.label, predictor.notes_.get("shares", {}), tuple(explanations)
    )


def _explain_row(
    table: AnswerTable, row: int, uncertainty: Floats, contributions: Mapping[str, Floats]
) -> ExplainedAnswer:
    """The explanation of one row."""
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
    """The absolute value of a term."""
    _, value = term
    return abs(value)


def _position(table: AnswerTable, row: int | str) -> int:
    """The position of a row, from its position or its identifier."""
    if isinstance(row, str):
        if row not in table.ids:
            raise DataError(f"the table has no row with the id {row!r:.60}.")
        return table.ids.index(row)
    if not 0 <= row < len(table):
        raise DataError(f"the table has the rows 0 to {len(table) - 1}. Got {row} instead.")
    return row
