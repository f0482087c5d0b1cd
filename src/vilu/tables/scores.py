"""Scores of table answers, from the table's columns or from a saved predictor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from vilu.calibration.calibration import Calibration
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.storage import load_predictor
from vilu.scoring.score import score
from vilu.tables.read import open_table
from vilu.tables.table import AnswerTable, sign_of


def scores_of_file(
    path: Path, predictor: Path | None = None, *, cluster_column: str | None = None
) -> list[Outcomes]:
    """Return the scores of an answer table, one ``Outcomes`` per method.

    Args:
        path: The table.
        predictor: Folder of the predictor that scores the answers. If the predictor is calibrated,
            the scores have decisions, too. If None, each column with a sign in its name
            (``sign_of``) is a separate method.
        cluster_column: Name of the column with the clusters. By default "cluster".

    Raises:
        UsageError: If no column has a sign in its name and there is no predictor.
    """
    table = open_table(path, clusters=cluster_column)
    if predictor is None:
        return scores_of_columns(table)
    calibration = Calibration.find(predictor)
    failure_predictor = load_predictor(predictor)
    return [score(failure_predictor, table, dataset=path.name, calibration=calibration)]


def scores_of_columns(table: AnswerTable) -> list[Outcomes]:
    """Return the scores in each column with a sign in its name. This name is the method.

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
            uncertainty = -sign * numbers
            pictures = table.picture_identities()
            outcomes_of_column = Outcomes(
                uncertainty,
                table.failure,
                ids=table.ids,
                picture=pictures,
                prediction=table.answer_numbers,
                cluster=table.cluster,
                method=name,
                dataset=table.name,
                answer="given",
            )
            outcomes.append(outcomes_of_column)
    if not outcomes:
        raise UsageError(
            "no column of this table says by its name whether a higher number means more likely "
            "right. Call one score_... or uncertainty_..., or score the table with a predictor."
        )
    return outcomes


def outcomes_with_classes(outcomes: Outcomes, table: AnswerTable) -> Outcomes:
    """Return outcomes of table rows, with the answer texts as classes.

    With classes, ``vilu.estimate`` can count the rows of each class. The right class of a row is
    the answer if the answer is right, and else the ``truth``.

    Raises:
        DataError: If the table has no answers. Also if the truth of a wrong answer is not known or
            equals the answer.

    Examples:
        >>> import vilu
        >>> from vilu.tables.scores import outcomes_with_classes
        >>> table = vilu.open_table(
        ...     {
        ...         "id": ["a", "b", "c"],
        ...         "answer": ["cat", "cat", "dog"],
        ...         "truth": ["", "fox", ""],
        ...         "score_p": [0.9, 0.2, 0.5],
        ...         "correct": [1, 0, None],
        ...     }
        ... )
        >>> scores = vilu.score(vilu.methods.AnswerScore(column="score_p"), table)
        >>> outcomes = outcomes_with_classes(scores, table)
        >>> outcomes.class_names, outcomes.prediction.tolist(), outcomes.target.tolist()
        (('cat', 'dog', 'fox'), [0, 0, 1], [0, 2, -1])
    """
    if table.answer is None:
        raise DataError("shares of classes need the column answer. This table has none.")
    right_class_of_id = {}
    for row in np.flatnonzero(table.correct != UNKNOWN).tolist():
        right_class_of_id[table.ids[row]] = _right_class(table, row)
    answer_of_id = dict(zip(table.ids, table.answer, strict=True))
    names = sorted({*table.answer, *right_class_of_id.values()})
    number_of_class = {name: index for index, name in enumerate(names)}
    prediction = []
    target = []
    for row_id in outcomes.ids or ():
        prediction.append(number_of_class[answer_of_id[row_id]])
        if row_id in right_class_of_id:
            target.append(number_of_class[right_class_of_id[row_id]])
        else:
            target.append(UNKNOWN)
    return replace(
        outcomes,
        prediction=np.array(prediction, dtype=np.int64),
        target=np.array(target, dtype=np.int64),
        class_names=names,
    )


def _right_class(table: AnswerTable, row: int) -> str:
    """Return the right answer's text for a labelled row, in a table with answers."""
    answers = table.answer or ()
    if table.correct[row] == 1:
        return answers[row]
    truth = "" if table.truth is None else table.truth[row]
    if truth in {"", answers[row]}:
        raise DataError(
            f"row {row + 1} (id {table.ids[row]!r:.60}) is wrong, so another class is right. Write "
            f"it into the column truth. Got {truth!r:.60} instead."
        )
    return truth
