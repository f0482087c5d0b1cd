"""Scores of a table of answers: by its own columns, or by a saved predictor."""

from __future__ import annotations

from pathlib import Path

from vilu.calibration.calibration import Calibration
from vilu.errors import UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.storage import load_predictor
from vilu.scoring.score import score
from vilu.tables.read import has_answers, open_table
from vilu.tables.table import AnswerTable, sign_of


def scores_in(path: Path, predictor: Path | None = None) -> list[Outcomes]:
    """The scores of a table of answers; empty if the path is something else.

    With the folder of a ``predictor`` they are its scores, decided on by its calibration if it has
    one. Without a predictor, each column whose name says its sign is a method of its own.

    Raises:
        UsageError: If no column says its sign and there is no predictor.
    """
    if not has_answers(path):
        return []
    table = open_table(path)
    if predictor is None:
        return scores_of_columns(table)
    calibration = Calibration.find(predictor)
    return [
        score(load_predictor(predictor), table, dataset=path.name, calibration=calibration),
    ]


def scores_of_columns(table: AnswerTable) -> list[Outcomes]:
    """The scores of each column whose name says its sign; the method has the name of the column.

    Raises:
        UsageError: If there is no such column.

    Examples:
        >>> import vilu
        >>> from vilu.tables.scores import scores_of_columns
        >>> table = vilu.open_table({"id": ["a", "b"], "score_p": [0.9, 0.2], "correct": [1, 0]})
        >>> scores_of_columns(table)
        [Outcomes(n=2, evaluable=2, accuracy=0.500, method='score_p', answer='given')]
    """
    outcomes = []
    for name, numbers in table.numbers.items():
        sign = sign_of(name)
        if sign != 0:
            outcomes.append(
                Outcomes(
                    -sign * numbers,
                    table.failure,
                    ids=table.ids,
                    picture=table.picture_identities(),
                    prediction=table.answer_numbers,
                    cluster=table.cluster,
                    method=name,
                    dataset=table.name,
                    answer="given",
                )
            )
    if not outcomes:
        raise UsageError(
            "no column of this table says by its name whether a higher number means more likely "
            "right. Call one score_... or uncertainty_..., or score the table with a predictor."
        )
    return outcomes
