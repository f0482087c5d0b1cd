"""Methods to score answer tables: a single column, a combination of columns, and a probe."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.columns import NUMBERS, AnswerKind, DataKind
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats
from vilu.predictors.contract.given_logits import require_kind
from vilu.predictors.contract.parameters import check_parameters
from vilu.predictors.contract.predictor import FailurePredictor, Learnt
from vilu.predictors.contract.seen import Overlap
from vilu.tables.combine import (
    CrossValidation,
    Linear,
    Recipe,
    RisingMaps,
    best_combination,
    best_probe,
    make_folds,
)
from vilu.tables.read import open_table
from vilu.tables.table import FEATURES, AnswerTable, sign_of

COLUMNS_KEY = "columns"
"""Key in the fit notes. Its value: names of the used number columns, in order."""

WIDTH_KEY = "n_features"
"""Key in the fit notes. Its value: number of used features."""

SHARES_KEY = "shares"
"""Key in the fit notes. Its value: column -> share in the score."""


@dataclass
class AnswerMethod(FailurePredictor):
    """Base class of the methods for answer tables (``vilu.AnswerTable``).

    ``fit`` and ``predict_uncertainty`` also accept the arguments of ``vilu.open_table``, such as a
    data frame. The failure log-odds, or another score, is a sum with one term per column.
    """

    takes: ClassVar[DataKind] = "answers"
    no_captions: ClassVar[str | None] = "a table of answers has no captions"
    columns: ClassVar[tuple[str, ...]] = (NUMBERS,)
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})

    answer: AnswerKind = dataclasses.field(default="given", kw_only=True)

    def fit(
        self,
        train: Any,  # noqa: ANN401 - whatever open_table takes
        validation: EmbeddingSource | None = None,
        *,
        unlabelled: EmbeddingSource | None = None,
    ) -> Self:
        """Learn from the table rows with a value in the column ``correct``.

        Raises the errors of ``vilu.open_table`` and ``FailurePredictor.fit``.
        """
        if validation is not None:
            raise UsageError(
                f"{self.name} selects by cross-validation. Leave the validation rows out, or add "
                "them to the table."
            )
        table = _table_or_source(train)
        return super().fit(table, unlabelled=unlabelled)

    def predict_uncertainty(  # type: ignore[override]
        self,
        data: Any,  # noqa: ANN401 - whatever open_table takes
        text: None = None,
    ) -> NDArray[np.float64]:
        """Return the uncertainty (N,) float64 of every row. A higher number: more likely wrong.

        Raises the errors of ``vilu.open_table`` and ``FailurePredictor.predict_uncertainty``.
        """
        table = _table_or_source(data)
        uncertainty: Floats = super().predict_uncertainty(table, text)
        return uncertainty

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Names of the number columns in the score, in order."""
        return tuple(self.notes_.get(COLUMNS_KEY, ()))

    def contributions(self, data: object) -> dict[str, Floats]:
        """Return column -> contributions (N,) to the failure log-odds.

        The contribution of a column is the column's term in the log-odds, minus the mean term. All
        features together count as a single column. The contributions of a row add up to the row's
        log-odds minus the mean log-odds.

        Examples:
            >>> import numpy as np
            >>> from vilu.tables.methods import AnswerScores
            >>> score = np.linspace(0, 1, 200)
            >>> table = {"id": np.arange(200), "score": score, "correct": score > 0.3}
            >>> terms = AnswerScores().fit(table).contributions(table)
            >>> bool(terms["score"][0] > 0 > terms["score"][-1])  # a low score is a doubt
            True
        """
        table = _table_or_source(data)
        self._check_ready(table)
        batch_terms = []
        arranged_table = table.arranged(self.used_columns)
        with torch.no_grad():
            for batch in arranged_table.batches(len(table), columns=self.columns_to_score):
                terms_of_batch = self.terms(batch)
                batch_terms.append(terms_of_batch.numpy())
        terms = np.concatenate(batch_terms)
        centred = terms - terms.mean(axis=0)
        return {name: centred[:, column] for column, name in enumerate(self.term_names)}

    def inputs(self, table: AnswerTable) -> dict[str, Tensor]:
        """Check the score's columns, and return the columns by name.

        Raises:
            DataError: If the table lacks a column, or has features of another width.
        """
        self._check_ready(table)
        arranged_table = table.arranged(self.used_columns)
        every_row = torch.arange(len(table))
        return {name: arranged_table.column(name, every_row) for name in self.columns_to_score}

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the score's terms: the columns, and "features" if features are used."""
        return self.used_columns

    @abstractmethod
    def terms(self, batch: Batch) -> Tensor:
        """Compute the score's terms (B, G) float64, one for each of the G ``term_names``."""

    def check_answer(self) -> None:
        """Refuse an ``answer`` other than "given": the method must judge the table's answers."""
        if self.answer != "given":
            raise UsageError(
                f'{self.name} judges the answers of a table, and none of a model: answer="given". '
                f"Got {self.answer!r} instead."
            )

    def _check_source(self, data: EmbeddingSource, columns: Sequence[str]) -> None:
        """Refuse data that are no table, or whose features do not match the features of the fit."""
        require_kind(type(self), data)
        needs_features = FEATURES in columns
        if needs_features and FEATURES not in data.columns:
            raise DataError(
                f"this {self.name} was fitted with features, and this table has none. Give the "
                "features of its rows, or fit on a table without features."
            )
        n_features = self.notes_.get(WIDTH_KEY, 0)
        if needs_features and isinstance(data, AnswerTable) and data.n_features != n_features:
            raise self._width_error(expected=n_features, actual=data.n_features)
        # Methods without features still recognise near copies by the features. So the features must
        # be as wide as the features of the fit.
        width = 0 if self.space_ is None else self.space_.embed_dim
        if width and data.has_vectors and data.space.embed_dim != width:
            raise self._width_error(expected=width, actual=data.space.embed_dim)

    def seen(self, data: EmbeddingSource, rows: NDArray[np.int64] | None = None) -> Overlap:
        """Find the rows that were used to fit, after a check of the table's columns.

        The column order does not matter. Additional columns do not matter.
        """
        self._check_source(data, self.columns_to_score)
        if isinstance(data, AnswerTable):
            data = data.arranged(self.used_columns)
        return super().seen(data, rows)

    def _width_error(self, *, expected: int, actual: int) -> DataError:
        """Make the error for a table with ``actual`` instead of ``expected`` features."""
        return DataError(
            f"this {self.name} was fitted on a table with {expected} features. Got {actual} "
            "instead."
        )

    def _check_ready(self, data: EmbeddingSource) -> None:
        # Like the base class, but without a comparison of embedding spaces: a table has no such
        # space.
        check_parameters(self)
        self.check_answer()
        self._check_source(data, self.columns_to_score)
        self.require_fitted()

    def _scored_on_device(
        self, data: EmbeddingSource, rows: Tensor | None
    ) -> Iterator[tuple[Batch, Tensor]]:
        self._check_ready(data)
        if isinstance(data, AnswerTable):
            data = data.arranged(self.used_columns)
        return super()._scored_on_device(data, rows)


def _table_or_source(data: Any) -> Any:  # noqa: ANN401 - whatever open_table takes
    """Open ``data`` as a table. Embedding sources are returned unchanged, and refused later."""
    if isinstance(data, EmbeddingSource):
        return data
    return open_table(data)


@dataclass
class AnswerScore(AnswerMethod):
    """The uncertainty is a single table column, or -1 times the column if it is a score.

    Nothing is learned. Calibration turns the uncertainty into a failure probability.

    Args:
        column: The column's name. The name begins with ``score`` or ``uncertainty``.

    Examples:
        >>> from vilu.tables.methods import AnswerScore
        >>> table = {"id": ["a", "b"], "score_p": [0.9, 0.2]}
        >>> AnswerScore(column="score_p").predict_uncertainty(table)
        array([-0.9, -0.2])
    """

    name: ClassVar[str] = "answer_score"
    summary: ClassVar[str] = "one column of a table of answers, as it is"
    reference: ClassVar[str] = "the model of the answers itself"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})

    column: str = "score"

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The scored column's name."""
        return (self.column,)

    def terms(self, batch: Batch) -> Tensor:
        """Compute the uncertainty (B, 1)."""
        sign = sign_of(self.column)
        if sign == 0:
            raise UsageError(
                f"the name of the column {self.column!r} does not say whether a higher number "
                "means more likely right. Call it score_... (higher: right) or uncertainty_... "
                "(higher: wrong), or fit answer_scores, which learns it."
            )
        return -sign * batch.columns[NUMBERS]

    def _score(self, batch: Batch) -> Tensor:
        terms = self.terms(batch)
        return terms.squeeze(1)


def method_of_only_score(table: AnswerTable, command_after_fit: str = "") -> AnswerScore:
    """Return the method for the only table column with a sign in its name.

    Args:
        table: The table.
        command_after_fit: What to run with a fitted predictor instead, for the error message.

    Raises:
        UsageError: If there is no such column, or several.

    Examples:
        >>> import vilu
        >>> from vilu.tables.methods import method_of_only_score
        >>> method_of_only_score(
        ...     vilu.open_table({"id": ["a"], "uncertainty_h": [0.1], "width": [3]})
        ... )
        AnswerScore(column='uncertainty_h')
    """
    signed_columns = [name for name in table.numbers if sign_of(name) != 0]
    if len(signed_columns) == 1:
        return AnswerScore(column=signed_columns[0])
    problem = "This table has no column that begins with score or uncertainty. Rename one column"
    if signed_columns:
        problem = f"This table has the columns {', '.join(signed_columns)}. Keep only one of them"
    then = ""
    if command_after_fit:
        then = f", and then `{command_after_fit}`"
    raise UsageError(
        f"without a fit, one column decides: score_... or uncertainty_.... {problem}, or fit a "
        f"method: `vilu fit TABLE -o PREDICTOR`{then}."
    )


@dataclass
class AnswerScores(AnswerMethod):
    """The best rising combination of number columns, by cross-validation.

    Let x_c be column c, multiplied by 1 or -1, so that a higher number means more likely wrong. The
    map f_c is rising: a straight line, or the rank. With weights w_c >= 0 and an intercept b,

        P(failure) = sigmoid(sum_c w_c f_c(x_c) + b)

    So if a score falls, the uncertainty never falls. A 5-fold cross-validation compares each column
    alone and all columns together, both maps, and, for all columns together, five strengths for a
    ridge penalty. The combination with the least log-loss is chosen. Its log-odds are calibrated on
    the held-out folds (Platt). All rows of one cluster are in one fold.

    Examples:
        >>> import numpy as np
        >>> from vilu.tables.methods import AnswerScores
        >>> rng = np.random.default_rng(0)
        >>> hidden = rng.normal(size=1000)
        >>> noisy = {"score_a": hidden + rng.normal(size=1000), "width": rng.normal(size=1000)}
        >>> table = {"id": np.arange(1000), **noisy, "correct": hidden > -0.5}
        >>> predictor = AnswerScores().fit(table)
        >>> bool(predictor.notes_["shares"]["score_a"] > 0.9)
        True
    """

    name: ClassVar[str] = "answer_scores"
    summary: ClassVar[str] = "the best rising combination of the columns of a table of answers"
    reference: ClassVar[str] = "logistic regression with weights of one sign"
    cost: ClassVar[str] = "fit: seconds; score: a sum over the columns"
    is_probability: ClassVar[bool] = True
    learns_failure: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})
    # the learned tensors in the notation of ``require_forms``: float64, C columns, S pieces
    _forms: ClassVar[str] = "direction:dC lower:dCS width:dCS rise:dCS weight:dC intercept:d"

    seed: int = 0
    allow_degenerate: bool = False

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        table = _training_table(train)
        names = tuple(table.numbers)
        if not names:
            raise DataError(
                f"{self.name} combines columns of numbers, and this table has only features. Fit "
                "answer_probe."
            )
        numbers = table.matrix(names)
        failure_array = failure.numpy()
        folds = make_folds(table.inseparable(), failure_array, self.seed)
        combination, comparison = best_combination(names, numbers, failure_array, folds)
        mapped_numbers = combination.maps(numbers * combination.direction)
        deviation_of_terms = mapped_numbers.std(axis=0) * combination.linear.weights
        signs = (-combination.direction).astype(int).tolist()  # as in ``sign_of``
        notes = {
            COLUMNS_KEY: list(names),
            "signs": dict(zip(names, signs, strict=True)),
            SHARES_KEY: _shares(names, deviation_of_terms),
            "chosen": _recipe_in_words(names, comparison),
        }
        arrays = {
            "direction": combination.direction,
            **_arrays_of_maps(combination.maps),
            **_arrays_of_linear(combination.linear),
        }
        return Learnt(_as_tensors(arrays), notes)

    def terms(self, batch: Batch) -> Tensor:
        """Compute the terms (B, C) of the failure log-odds, without the intercept."""
        numbers = batch.columns[NUMBERS] * self.learned_["direction"]
        # the maps are sums of pieces, as in ``RisingMaps``
        share_of_piece = (numbers.unsqueeze(2) - self.learned_["lower"]) / self.learned_["width"]
        mapped_numbers = (share_of_piece.clamp(0, 1) * self.learned_["rise"]).sum(dim=2)
        return mapped_numbers * self.learned_["weight"]

    def _score(self, batch: Batch) -> Tensor:
        terms = self.terms(batch)
        log_odds = terms.sum(dim=1) + self.learned_["intercept"]
        return torch.sigmoid(log_odds)


@dataclass
class AnswerProbe(AnswerMethod):
    """Ridge logistic regression on the standardised number columns and features.

    Let z be the numbers and features of a row, each standardised to mean 0 and standard deviation 1
    over the rows used to fit. With learned weights w and an intercept b,

        P(failure) = sigmoid(w . z + b)

    5-fold cross-validation chooses the penalty strength with the least log-loss. All rows of one
    cluster are in one fold. The log-odds are calibrated on the held-out folds (Platt). If the
    features are hidden states, the probe is P(I know) by Kadavath et al. (2022).

    Examples:
        >>> import numpy as np
        >>> from vilu.tables.methods import AnswerProbe
        >>> features = np.random.default_rng(0).normal(size=(1000, 4))
        >>> table = {"id": np.arange(1000), "features": features, "correct": features[:, 0] > -0.5}
        >>> predictor = AnswerProbe().fit(table)
        >>> uncertainty = predictor.predict_uncertainty(table)
        >>> bool(uncertainty[features[:, 0] > 0].max() < uncertainty[features[:, 0] < -1].min())
        True
    """

    name: ClassVar[str] = "answer_probe"
    summary: ClassVar[str] = "logistic regression on the scores and features of a table of answers"
    reference: ClassVar[str] = "Kadavath et al. 2022, P(I know)"
    cost: ClassVar[str] = "fit: seconds to minutes with wide features; score: one product"
    is_probability: ClassVar[bool] = True
    learns_failure: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})
    # the learned tensors in the notation of ``require_forms``: float64, I inputs
    _forms: ClassVar[str] = "mean:dI scale:dI weight:dI intercept:d"

    seed: int = 0
    allow_degenerate: bool = False

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The numbers, and the features if the fit used any."""
        if self.notes_.get(WIDTH_KEY):
            return (NUMBERS, FEATURES)
        return (NUMBERS,)

    @property
    def term_names(self) -> tuple[str, ...]:
        """The number columns, and "features" if features are used."""
        if self.notes_.get(WIDTH_KEY):
            return (*self.used_columns, FEATURES)
        return self.used_columns

    def _learn(
        self,
        train: Rows,
        failure: Tensor,
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        table = _training_table(train)
        names = tuple(table.numbers)
        inputs = _probe_inputs(table, names)
        failure_array = failure.numpy()
        folds = make_folds(table.inseparable(), failure_array, self.seed)
        probe, comparison = best_probe(inputs, failure_array, folds)
        terms = (inputs - probe.mean) / probe.scale * probe.linear.weights
        n_columns = len(names)
        deviation_of_terms = terms[:, :n_columns].std(axis=0)
        term_names = names
        if table.features is not None:  # all features together are a single term
            term_of_features = terms[:, n_columns:].sum(axis=1)
            deviation_of_terms = np.append(deviation_of_terms, term_of_features.std())
            term_names = (*names, FEATURES)
        ridge = comparison.best_option
        notes = {
            COLUMNS_KEY: list(names),
            WIDTH_KEY: table.n_features,
            SHARES_KEY: _shares(term_names, deviation_of_terms),
            "chosen": f"ridge {ridge:g}, log-loss {comparison.loss_of_option[ridge]:.4f}",
        }
        arrays = {"mean": probe.mean, "scale": probe.scale, **_arrays_of_linear(probe.linear)}
        tensors = _as_tensors(arrays)
        return Learnt(tensors, notes)

    def terms(self, batch: Batch) -> Tensor:
        """Compute the terms of the failure log-odds: (B, C), or (B, C + 1) with features."""
        n_columns = len(self.used_columns)
        inputs = batch.columns[NUMBERS]
        if FEATURES in batch.columns:
            inputs = torch.cat([inputs, batch.columns[FEATURES].double()], dim=1)
        terms = (inputs - self.learned_["mean"]) / self.learned_["scale"] * self.learned_["weight"]
        has_features = terms.shape[1] > n_columns
        if not has_features:
            return terms
        term_of_features = terms[:, n_columns:].sum(dim=1, keepdim=True)
        return torch.cat([terms[:, :n_columns], term_of_features], dim=1)

    def _score(self, batch: Batch) -> Tensor:
        terms = self.terms(batch)
        log_odds = terms.sum(dim=1) + self.learned_["intercept"]
        return torch.sigmoid(log_odds)


def _training_table(train: Rows) -> AnswerTable:
    """Return the table with the rows to learn from."""
    table = train.source
    if not isinstance(table, AnswerTable):
        raise UsageError(
            f"a fit needs {AnswerTable.how_to_make}. Got {type(table).__name__} instead."
        )
    return table.take(train.index)


def _probe_inputs(table: AnswerTable, names: Sequence[str]) -> Floats:
    """Return the probe's inputs (N, C + F): the C columns ``names``, then the F features if any."""
    numbers = table.matrix(names)
    if table.features is None:
        return numbers
    features = table.features.astype(np.float64)
    return np.hstack([numbers, features])


def _arrays_of_maps(maps: RisingMaps) -> dict[str, Floats]:
    """Return tensor name -> numbers: the pieces of every column's function."""
    return {"lower": maps.lower, "width": maps.width, "rise": maps.rise}


def _arrays_of_linear(linear: Linear) -> dict[str, Floats]:
    """Return tensor name -> numbers: the weights and the intercept."""
    return {"weight": linear.weights, "intercept": np.array(linear.intercept)}


def _as_tensors(arrays: Mapping[str, Floats]) -> dict[str, Tensor]:
    """Convert the arrays to float64 tensors with equal numbers."""
    return {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}


def _shares(term_names: tuple[str, ...], deviation_of_terms: Floats) -> dict[str, float]:
    """Return term -> share in the score: the term's standard deviation, divided by the sum.

    The sign of ``deviation_of_terms`` is ignored: a deviation times a negative weight is negative.
    """
    magnitude = np.abs(deviation_of_terms)
    total = magnitude.sum()
    if total == 0:
        return dict.fromkeys(term_names, 0.0)
    share = (magnitude / total).round(4)
    return dict(zip(term_names, share.tolist(), strict=True))


def _recipe_in_words(names: tuple[str, ...], comparison: CrossValidation[Recipe]) -> str:
    """Return a text for the notes: the recipe chosen by cross-validation, with the log-loss."""
    recipe = comparison.best_option
    columns_in_words = "all columns"
    if len(recipe.columns) == 1:
        columns_in_words = names[recipe.columns[0]]
    log_loss = comparison.loss_of_option[recipe]
    return f"{columns_in_words}, {recipe.map_name}, ridge {recipe.ridge:g}, log-loss {log_loss:.4f}"
