"""Outcomes: answers with uncertainties, and whether each answer fails."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.artifacts.documents import plain_json
from vilu.artifacts.paths import claim_file, inputs_entry
from vilu.artifacts.tables import read_column, read_table, write_table
from vilu.errors import OUTSIDE, OUTSIDE_NAME, UNKNOWN, DataError, MissingModelError, UsageError
from vilu.metrics.catalog import Metric
from vilu.metrics.counts import check_codes, check_pictures, real_vector, repeated_picture_numbers
from vilu.metrics.histogram import Histogram
from vilu.metrics.pictures import ScoredRows
from vilu.outcomes.decisions import ACCEPT, REVIEW
from vilu.outcomes.row_sample import RowSample, hash_of_text, sample_of_rows
from vilu.validation import checked, require_mask

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def check_outside(values: ArrayLike, target: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the checked mask (N,) of rows outside all classes.

    In such rows, ``target`` (N,) must not be a class.
    """
    outside: NDArray[np.bool_] = require_mask("outside", np.array(values), len(target))
    contradictory_rows = np.flatnonzero(outside & (target >= 0))
    if len(contradictory_rows):
        row = contradictory_rows[0]
        raise DataError(
            f"row {row} cannot be of none of the classes (outside) and of class {target[row]}."
        )
    return outside


def check_texts(
    values: Sequence[str | None] | None, name: str, *, optional: bool = False
) -> tuple[Any, ...] | None:
    """Return the checked texts as a tuple. If ``optional`` is true, a text may be None."""
    if values is None:
        return None
    # A single text is refused, because its elements are characters. Collections without an order
    # are refused too.
    is_no_list = isinstance(values, str | Set | Mapping)
    if is_no_list or not isinstance(values, Iterable):
        raise DataError(f"{name} must be a list of texts. Got {type(values).__name__} instead.")
    texts = tuple(values)
    allowed_types = (str, NoneType) if optional else (str,)
    types = set(map(type, texts))  # fast, also for a million texts
    if types.issubset(allowed_types):
        return texts
    for row, text in enumerate(texts):
        if not isinstance(text, allowed_types):
            raise DataError(f"{name} must hold texts. Got {text!r} in row {row} instead.")
    return texts


def require_decisions(decisions: Sequence[str | None] | None) -> None:
    """Refuse decisions except "accept" and "review", for example decisions by an older vilu."""
    unknown = set(decisions or ()) - {ACCEPT, REVIEW, None}
    if unknown:
        first_unknown = min(unknown, key=str)
        raise DataError(
            f"decision must be {ACCEPT} or {REVIEW} in every row. Got {first_unknown!r:.40} "
            "instead. Make scores of an older vilu again with `vilu score`."
        )


def nullable_codes(codes: NDArray[np.int64] | None, n: int) -> pa.Array:
    """Return the codes (N,) as an Arrow int32 column, null where a code is unknown."""
    import pyarrow as pa

    code_type = pa.int32()
    if codes is None:
        return pa.nulls(n, code_type)
    return pa.array(codes, code_type, mask=codes == UNKNOWN)


def _text_column(values: Sequence[str | None] | None, n: int) -> pa.Array:
    """Return the texts (N,) as an Arrow column, null where there is no text."""
    import pyarrow as pa

    text_type = pa.string()
    if values is None:
        return pa.nulls(n, text_type)
    return pa.array(values, text_type)


def _repeated_text(text: str | None, n: int) -> pa.Array:
    """Return an Arrow column (n,) with ``text`` in every row, or null if there is no text."""
    import pyarrow as pa

    scalar = pa.scalar(text, pa.string())
    return pa.repeat(scalar, n)


def check_probabilities(values: ArrayLike | None, name: str) -> NDArray[np.float64] | None:
    """Return the checked probabilities (N,), in [0, 1] or NaN, or None if ``values`` is None."""
    if values is None:
        return None
    numbers = real_vector(values, name)
    is_probability = (numbers >= 0) & (numbers <= 1)
    is_valid = is_probability | np.isnan(numbers)
    if not is_valid.all():
        raise DataError(f"{name} must be in [0, 1], or NaN where there is none.")
    return numbers


def plain_values(column: pa.ChunkedArray, column_type: str) -> Any:  # noqa: ANN401 - by type
    """Return the column's values, with -1 (integers), NaN (floats) or None (texts) for null."""
    if column_type == "string":
        return column.to_pylist()
    filled_column = column.fill_null(MISSING_VALUE[column_type])
    return filled_column.to_numpy()


Scores = ScoredRows | Histogram
"""The scores of rows whose failures are known."""


@dataclass(frozen=True)
class Tally:
    """Counts of one method's rows on one data set. Metrics are computed from these counts."""

    scores: Scores  # evaluable rows: rows with an uncertainty and a known failure
    within: Scores  # evaluable rows whose picture belongs to one of the classes
    outside: Scores  # evaluable rows, where a picture of none of the classes counts as wrong
    n_unlabelled: int  # number of rows with an uncertainty and an unknown failure
    n_unusable: int  # number of rows without an uncertainty
    # The evaluable rows, with the failure probability as the score. This is the calibrated
    # probability, or else the uncertainty if the uncertainty is a probability. None without a
    # probability.
    probability: Scores | None
    method: str | None = None  # predictor name
    dataset: str | None = None  # data set name
    split: str | None = None  # split name
    seed: int | None = None  # predictor seed
    answer: str = "zero_shot"  # kind of the judged answers, as in ``Outcomes``
    sample: RowSample | None = None  # ``sample_of_rows`` for the evaluable rows
    has_clusters: bool = False  # whether clusters are resampled, and not pictures
    is_calibrated: bool = False  # whether ``probability`` is the calibrated probability
    n_seen_in_fit: int = 0  # number of rows used to fit the predictor, as far as known

    def rows_for(self, metric: Metric) -> Scores | None:
        """Return the rows for a metric. Return None if the needed probabilities are missing."""
        if metric.of_probability:
            return self.probability
        rows_of_question = {"failure": self.scores, "within": self.within, "outside": self.outside}
        return rows_of_question[metric.question]

    def convention_of(self, metric: Metric) -> str:
        """Say how a metric is defined, of which probability, and how precise the value is."""
        texts = [metric.convention]
        if metric.of_probability and self.is_calibrated:
            texts.append("of the calibrated failure_probability")
        scores = self.rows_for(metric) or self.scores
        if scores.note is not None:
            texts.append(scores.note)
        return "; ".join(texts)


def identity_fields(scores: object) -> dict[str, Any]:
    """Return the names and values of the fields in ``IDENTITY_FIELDS``."""
    return {name: getattr(scores, name) for name in IDENTITY_FIELDS}


@runtime_checkable
class SupportsTally(Protocol):
    """Scores that can be evaluated: ``Outcomes`` or a ``ScoreFolder``."""

    def tally(self) -> Tally:
        """Return the counts from which metrics are computed."""


DECISION_COLUMNS = ("decision", "decision_reason", "label_set")
"""Text columns that a calibrated rule fills."""

TEXT_COLUMNS = (
    "key",
    "pred_name",
    "label_name",
    "reason",
    "score_name",
    "answer",
    "zero_shot_name",
    "cluster",
    *DECISION_COLUMNS,
)
"""File columns that hold texts."""

OPTIONAL_COLUMNS = {
    "prediction": "int64",
    "target": "int64",
    "ids": "string",
    "reason": "string",
    "failure_probability": "float64",
    "picture": "int64",
    "cluster": "string",
    "zero_shot": "int64",
    **dict.fromkeys(DECISION_COLUMNS, "string"),
}
"""Maps an optional column's field to the column's type."""

COLUMN_OF_FIELD = {"prediction": "pred", "target": "label", "ids": "key", "picture": "picture_id"}
"""Maps a field to its column name in a table, if the two names differ."""

MISSING_VALUE = {"int64": UNKNOWN, "float64": np.nan, "string": None}
"""Maps a column type to the value for a missing entry."""

IDENTITY_FIELDS = ("method", "dataset", "split", "seed", "answer")
"""Names of the fields that identify scores."""

COMMON_FIELD_TYPES = {
    "method": str | None,
    "dataset": str | None,
    "split": str | None,
    "seed": int | None,
    "answer": str,
    "provenance": Mapping,
    "is_probability": bool,
}
"""The fields that have one value for all rows. Maps each field to the type of its value."""

FILLABLE_COLUMNS = ("prediction", "target", "reason", "picture", "cluster")
"""Optional columns that may be in some parts for ``concat`` and not in others.

Rows from a part without the column get missing values.
"""

PROBLEM_ENTRIES = ("space", "predictor_space", "n_candidates", "pool_size")
"""Provenance entries that describe how difficult the problem is."""

SUMMED_ENTRIES = ("n_seen_in_fit", "n_compared_with_fit")
"""Provenance entries that count rows. ``concat`` adds up these counts."""


def _require_joinable(first: Outcomes, part: Outcomes) -> None:
    """Raise DataError if two outcomes differ in the method or in the problem."""
    for name in ("method", "answer", "class_names", "is_probability"):
        _require_equal(name, getattr(first, name), getattr(part, name))
    for name in PROBLEM_ENTRIES:
        first_entry = first.provenance.get(name)
        entry = part.provenance.get(name)
        _require_equal(name, first_entry, entry)
    for name in OPTIONAL_COLUMNS:
        first_has_it = getattr(first, name) is not None
        part_has_it = getattr(part, name) is not None
        if name not in FILLABLE_COLUMNS and part_has_it != first_has_it:
            raise DataError(
                f"all parts must have the column {name}, or none of them. Some parts have it."
            )


def _require_equal(name: str, first: object, value: object) -> None:
    if first != value:
        raise DataError(
            f"the parts must have the same {name}. Got {first!r:.100} and {value!r:.100}."
        )


def _join_column(parts: Sequence[Outcomes], name: str, column_type: str) -> Any:  # noqa: ANN401
    """Join an optional column over all parts. Parts without the column get missing values."""
    columns = [getattr(part, name) for part in parts]
    if all(column is None for column in columns):
        return None
    values: list[Any] = []
    for part, column in zip(parts, columns, strict=True):
        if column is None:
            values += [MISSING_VALUE[column_type]] * len(part)
        else:
            values += list(column)
    return values


def _join_provenance(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries that are equal in all parts, and the sums of row counts."""
    joined: dict[str, Any] = {}
    for name in parts[0]:
        values: list[Any] = [part.get(name) for part in parts]
        common_value = _common_value(values)
        if name in SUMMED_ENTRIES and None not in values:
            joined[name] = sum(values)
        elif common_value is not None:
            joined[name] = common_value
    return joined


def _common_value(values: Sequence[Any]) -> Any:  # noqa: ANN401 - any value
    """Return the common value of all entries, or None if the values differ."""
    if any(value != values[0] for value in values):
        return None
    return values[0]


def _label_set_column(texts: Sequence[str | None]) -> pa.Array:
    """Return an Arrow column with lists of names, from JSON lists, null where there is no set."""
    import pyarrow as pa

    label_sets: list[list[str] | None] = []
    for text in texts:
        label_set: list[str] | None = None
        if text is not None:
            label_set = json.loads(text)
        label_sets.append(label_set)
    set_type = pa.list_(pa.string())
    return pa.array(label_sets, set_type)


def _common_fields_of_file(
    path: str | Path, table: pa.Table, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a file's metadata, with the method and the answer kind."""
    common_fields: dict[str, Any] = dict(metadata)
    # If the metadata lack the method or the answer kind, the value comes from the column, if all
    # rows have the same value.
    methods = _distinct_texts(path, table, "score_name")
    if len(methods) == 1:
        common_fields.setdefault("method", methods[0])
    answer_kinds = _distinct_texts(path, table, "answer")
    if len(answer_kinds) == 1 and answer_kinds[0] is not None:
        common_fields.setdefault("answer", answer_kinds[0])
    return common_fields


def _distinct_texts(path: str | Path, table: pa.Table, name: str) -> list[str | None]:
    """Return the different texts in a file's column."""
    column = read_column(path, table, name, "string")
    texts: list[str | None] = column.unique().to_pylist()
    return texts


@dataclass(frozen=True, eq=False, repr=False)
class Outcomes:
    """Uncertainty and failure of N answers, and optional further columns.

    Attributes:
        uncertainty: Uncertainty (N,) float64, higher = more likely wrong. The uncertainty is NaN
            only in rows with a ``reason``.
        failure: Failure (N,) int64. 1 is a wrong answer, 0 a right answer, and -1 means unknown.
        prediction: Judged answers (N,) int64, -1 where there is no answer.
        target: Right answers (N,) int64. The target is -1 where the right answer is unknown, and in
            ``outside`` rows. As an argument, -2 means outside.
        outside: Mask (N,) of the rows whose picture belongs to none of the classes. Any answer is
            wrong in such a row. As an argument, an empty array means that there is no such row.
        picture: Picture identities (N,) int64, -1 where not known. Rows with the same picture have
            the same number. None if no picture is known.
        cluster: Cluster names (bursts, pages, ...) for the N rows. The rows of a cluster may be
            wrong together. None in rows without a cluster.
        ids: Identifiers for the N rows.
        class_names: Candidate names. Predictions and targets are indices into this list.
        method: Predictor name.
        dataset: Data set name.
        split: Split name.
        seed: Predictor seed.
        answer: Kind of the judged answers: "zero_shot", "adapted" or "given".
        zero_shot: Zero-shot answers (N,) int64, -1 where there is none. None if the judged answers
            are zero-shot answers.
        reason: Reason why a row has no uncertainty ("nonfinite", "zero_norm", "k<2", "short_pool").
            None in rows with an uncertainty.
        provenance: Where the scores come from, as plain JSON (fingerprints, candidate count, pool
            size, ...).
        is_probability: Whether the uncertainty is a probability of failure.
        failure_probability: Calibrated probability of failure (N,) float64, NaN where the
            uncertainty is NaN. None without a calibration.
        decision: "accept" or "review" for every row. None without a rule.
        decision_reason: Reason why a row is not accepted ("above_threshold", "below_floor",
            "outside", "not_certified", "not_selected", "not_covered", or the row's ``reason``).
            None in accepted rows.
        label_set: Label set for every row, as a JSON list with the candidates in the set. None in
            rows without an uncertainty.

    Raises:
        DataError: If columns have different lengths, or if a value is not possible.

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.9, 0.4]
        >>> failure = [0, 1, -1]  # it is not known whether the third answer is wrong
        >>> outcomes = vilu.Outcomes(uncertainty, failure)
        >>> outcomes.evaluable.tolist()
        [True, True, False]
        >>> outcomes.take([1, 0]).uncertainty.tolist()
        [0.9, 0.1]
        >>> # the second picture is of none of the classes
        >>> vilu.Outcomes([0.1, 0.9], [0, 1], target=[3, -2]).outside.tolist()
        [False, True]
        >>> outcomes
        Outcomes(n=3, evaluable=2, accuracy=0.500, answer='zero_shot')
    """

    # says how to get outcomes, in messages about a wrong argument
    how_to_make: ClassVar[str] = "vilu.Outcomes (vilu.score(predictor, data) gives them)"

    uncertainty: NDArray[np.float64]
    failure: NDArray[np.int64]
    prediction: NDArray[np.int64] | None = None
    target: NDArray[np.int64] | None = None
    ids: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    method: str | None = None
    dataset: str | None = None
    split: str | None = None
    seed: int | None = None
    reason: Sequence[str | None] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    is_probability: bool = False
    failure_probability: NDArray[np.float64] | None = None
    decision: Sequence[str] | None = None
    decision_reason: Sequence[str | None] | None = None
    label_set: Sequence[str | None] | None = None
    outside: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    picture: NDArray[np.int64] | None = None
    answer: str = "zero_shot"
    zero_shot: NDArray[np.int64] | None = None
    cluster: Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        uncertainty = real_vector(self.uncertainty, "uncertainty")
        n = len(uncertainty)
        names = check_texts(self.class_names, "class_names")
        last_class: int | None = None
        if names is not None:
            last_class = len(names) - 1
        probability = check_probabilities(self.failure_probability, "failure_probability")
        columns: dict[str, Any] = {
            "uncertainty": uncertainty,
            "failure": check_codes(self.failure, "failure", last=1),
            "ids": check_texts(self.ids, "ids"),
            "failure_probability": probability,
            "picture": check_pictures(self.picture, n),
        }
        for name in ("prediction", "zero_shot"):
            if getattr(self, name) is not None:
                columns[name] = check_codes(getattr(self, name), name, last_class)
        if self.target is not None:
            columns["target"] = check_codes(self.target, "target", last_class, first=OUTSIDE)
        for name in ("reason", "cluster", *DECISION_COLUMNS):
            columns[name] = check_texts(getattr(self, name), name, optional=True)
        require_decisions(columns["decision"])
        for name, column in columns.items():
            if column is not None and len(column) != n:
                raise DataError(
                    f"{name} must have one entry per uncertainty ({n}). Got {len(column)} instead."
                )
            object.__setattr__(self, name, column)
        object.__setattr__(self, "class_names", names)
        self._set_outside()
        self._check_common_fields()
        self._check_uncertainty()

    def _set_outside(self) -> None:
        """Set ``outside`` from the argument and from the targets with code -2.

        Every answer about a picture outside all classes must be wrong.
        """
        target = self.target
        if target is None:
            target = np.full(len(self.uncertainty), UNKNOWN)
        outside: NDArray[np.bool_] = target == OUTSIDE
        # A mask without True is not checked, because the mask may have the wrong length after
        # ``dataclasses.replace`` with fewer rows.
        if np.any(self.outside):
            outside |= check_outside(self.outside, target)
        is_scored = np.isfinite(self.uncertainty)
        contradictory_rows = np.flatnonzero(outside & is_scored & (self.failure != 1))
        if len(contradictory_rows):
            row = contradictory_rows[0]
            raise DataError(
                "an answer for a picture of none of the classes is wrong: failure must be 1 where "
                f"the target is {OUTSIDE}. Got {self.failure[row]} in row {row} instead."
            )
        if outside.any():
            target_within = np.where(outside, UNKNOWN, target)
            object.__setattr__(self, "target", target_within)
        object.__setattr__(self, "outside", outside)

    def _check_uncertainty(self) -> None:
        """Check uncertainties and probabilities. Both must be missing in the same rows."""
        is_missing = np.isnan(self.uncertainty)
        has_reason = np.zeros(len(is_missing), np.bool_)
        if self.reason is not None:
            has_reason = np.array([bool(text) for text in self.reason], np.bool_)
        unexplained_rows = np.flatnonzero(is_missing & ~has_reason)
        if len(unexplained_rows):
            raise DataError(
                "uncertainty must be a number unless 'reason' says why there is none. "
                f"Got {len(unexplained_rows)} rows with neither, the first is row "
                f"{unexplained_rows[0]}."
            )
        values = self.uncertainty[~is_missing]
        n_infinite = np.count_nonzero(np.isinf(values))
        if n_infinite:
            raise DataError(f"uncertainty must be finite. Got {n_infinite} infinite values.")
        probability = self.failure_probability
        if probability is not None and not np.array_equal(np.isnan(probability), is_missing):
            raise DataError("failure_probability must be there exactly where the uncertainty is.")
        if self.is_probability and len(values):
            smallest = values.min()
            largest = values.max()
            if smallest < 0 or largest > 1:
                raise DataError(
                    f"a probability must be in [0, 1]. Got {smallest:.6g} to {largest:.6g} instead."
                )

    def _check_common_fields(self) -> None:
        """Check the fields with one value for all rows (``COMMON_FIELD_TYPES``)."""
        for name, field_type in COMMON_FIELD_TYPES.items():
            value = getattr(self, name)
            if isinstance(value, np.generic):
                value = value.item()
            if not isinstance(value, field_type):
                raise DataError(f"{name} must be {field_type}. Got {value!r:.100} instead.")
            object.__setattr__(self, name, value)
        plain_json(dict(self.provenance))

    def __len__(self) -> int:
        return len(self.failure)

    def __repr__(self) -> str:
        field_texts = [f"n={len(self)}"]
        failure = self.failure[self.evaluable]
        if len(failure):
            field_texts += [f"evaluable={len(failure)}", f"accuracy={1 - failure.mean():.3f}"]
        if self.decision is not None:
            n_accepted = self.decision.count(ACCEPT)
            field_texts.append(f"accepted={n_accepted}")
        for name in IDENTITY_FIELDS:
            value = getattr(self, name)
            if value is not None:
                field_texts.append(f"{name}={value!r}")
        return f"Outcomes({', '.join(field_texts)})"

    @property
    def evaluable(self) -> NDArray[np.bool_]:
        """Mask (N,) of the rows that have both an uncertainty and a known failure."""
        evaluable: NDArray[np.bool_] = (self.failure != UNKNOWN) & np.isfinite(self.uncertainty)
        return evaluable

    def zero_shot_beside(self, row: int) -> str | None:
        """Return the name of a row's zero-shot answer if it differs from the judged answer.

        Return None if the two are equal, or if the zero-shot answer or the names are not known.

        Examples:
            >>> import vilu
            >>> outcomes = vilu.Outcomes(
            ...     [0.1, 0.9],
            ...     [0, 1],
            ...     prediction=[0, 1],
            ...     zero_shot=[0, 0],
            ...     class_names=["cat", "dog"],
            ...     answer="adapted",
            ... )
            >>> outcomes.zero_shot_beside(0), outcomes.zero_shot_beside(1)
            (None, 'cat')
        """
        if self.zero_shot is None or self.class_names is None:
            return None
        answer = int(self.zero_shot[row])
        is_judged = self.prediction is not None and self.prediction[row] == answer
        if answer == UNKNOWN or is_judged:
            return None
        return str(self.class_names[answer])

    def take(self, rows: ArrayLike) -> Self:
        """Return the rows with these indices in the given order, or the rows in a mask (N,).

        Raises:
            DataError: If an index is out of range, or if the mask has another length.

        Examples:
            >>> import vilu
            >>> ids = ["a.jpg", "b.jpg", "c.jpg"]
            >>> outcomes = vilu.Outcomes([0.1, 0.9, 0.4], [0, 1, 1], ids=ids)
            >>> outcomes.take(outcomes.failure == 1).ids
            ('b.jpg', 'c.jpg')
        """
        n = len(self)
        indices = np.asarray(rows)
        if not indices.size:  # NumPy makes an array of floats from an empty list
            indices = indices.astype(np.int64)
        requirement = f"rows must be a list of indices from 0 to {n - 1}, or {n} Booleans"
        try:
            row_indices = np.arange(n)[indices]  # indices, also if ``rows`` is a mask
        except IndexError as error:
            raise DataError(f"{requirement}: {error}.") from error
        if (indices < 0).any():  # -1 means "unknown" in vilu, not the last row
            raise DataError(f"{requirement}. Got {indices.min()} instead.")
        columns_of_rows: dict[str, Any] = {}
        for name in ("uncertainty", "failure", "outside", *OPTIONAL_COLUMNS):
            column = getattr(self, name)
            if isinstance(column, np.ndarray):
                columns_of_rows[name] = column[row_indices]
            elif column is not None:
                columns_of_rows[name] = [column[row] for row in row_indices.tolist()]
        return replace(self, **columns_of_rows)

    @staticmethod
    @checked
    def concat(parts: Sequence[Outcomes]) -> Outcomes:
        """Join the rows of several outcomes, one part after another.

        The parts are scores for different rows by one method, for example cross-validation folds.
        If the parts differ in the data set, split, seed or a ``provenance`` entry, this value is
        left out. The counts for rows seen in the fit are added up.

        Raises:
            UsageError: If there is no part.
            DataError: If the parts differ in the method, kind of answers, classes, embedding space
                or pool size, or if only some parts have a column that allows no missing values.

        Examples:
            >>> import vilu
            >>> folds = [
            ...     vilu.Outcomes([0.1, 0.9], [0, 1], method="mcm", seed=0),
            ...     vilu.Outcomes([0.4], [1], method="mcm", seed=1),
            ... ]
            >>> vilu.Outcomes.concat(folds)
            Outcomes(n=3, evaluable=3, accuracy=0.333, method='mcm', answer='zero_shot')
        """
        if not parts:
            raise UsageError("concat needs at least one part. Got none.")
        for part in parts[1:]:
            _require_joinable(parts[0], part)
        columns: dict[str, Any] = {}
        for name in ("uncertainty", "failure", "outside"):
            columns[name] = np.concatenate([getattr(part, name) for part in parts])
        for name, column_type in OPTIONAL_COLUMNS.items():
            columns[name] = _join_column(parts, name, column_type)
        for name in ("dataset", "split", "seed"):
            columns[name] = _common_value([getattr(part, name) for part in parts])
        columns["provenance"] = _join_provenance([part.provenance for part in parts])
        return replace(parts[0], **columns)

    def to_arrow(self) -> pa.Table:
        """Return a pyarrow table with one row per answer, and names in place of numbers.

        The table has the following columns, unless the outcomes lack the column. Unknown values
        are null.

        - ``id``, ``uncertainty``, ``failure`` and ``failure_probability``.
        - ``answer``, ``target`` and ``zero_shot``: class names, or numbers if the classes have no
          names. If a picture is in none of the classes, the target is "(outside)".
        - ``accept``: whether a rule accepts the answer.
        - ``reason``: why the answer is not accepted, or why the answer has no uncertainty.
        - ``label_set``: a list of names.
        - ``picture``: the picture's identity.

        Examples:
            >>> import vilu
            >>> prediction, target = [1, 0], [1, -2]
            >>> names = ["cat", "dog"]
            >>> outcomes = vilu.Outcomes([0.1, 0.9], [0, 1], prediction, target, class_names=names)
            >>> outcomes.to_arrow().to_pylist()[1]
            {'answer': 'cat', 'target': '(outside)', 'uncertainty': 0.9, 'failure': True}
        """
        import pyarrow as pa

        columns: dict[str, pa.Array] = {}
        if self.ids is not None:
            columns["id"] = pa.array(self.ids, pa.string())
        field_of_column = {"answer": "prediction", "target": "target", "zero_shot": "zero_shot"}
        for name, field_name in field_of_column.items():
            codes = getattr(self, field_name)
            if codes is not None:
                columns[name] = self._names_of(codes)
        if "target" in columns and self.outside.any():
            columns["target"] = self._names_with_outside(columns["target"])
        is_missing = np.isnan(self.uncertainty)
        columns["uncertainty"] = pa.array(self.uncertainty, mask=is_missing)
        columns["failure"] = nullable_codes(self.failure, len(self)).cast(pa.bool_())
        if self.failure_probability is not None:
            columns["failure_probability"] = pa.array(self.failure_probability, from_pandas=True)
        reason = self.reason
        if self.decision is not None:
            columns["accept"] = pa.array([decision == ACCEPT for decision in self.decision])
            reason = self.decision_reason
        if reason is not None:
            columns["reason"] = pa.array(reason, pa.string())
        if self.label_set is not None:
            columns["label_set"] = _label_set_column(self.label_set)
        if self.picture is not None:
            columns["picture"] = pa.array(self.picture, mask=self.picture == UNKNOWN)
        return pa.table(columns)

    def to_pandas(self) -> pd.DataFrame:
        """Return the table from ``to_arrow`` as a pandas data frame.

        Raises:
            MissingModelError: If pandas is not installed. The message says how to install pandas.

        Examples:
            >>> import vilu
            >>> frame = vilu.Outcomes([0.1, 0.9], [0, 1], ids=["a.jpg", "b.jpg"]).to_pandas()
            >>> frame[frame.failure].id.tolist()
            ['b.jpg']
        """
        if find_spec("pandas") is None:
            raise MissingModelError("to_pandas needs pandas: pip install pandas.")
        return self.to_arrow().to_pandas()

    def _names_of(self, codes: NDArray[np.int64]) -> pa.Array:
        """Return candidate names for the codes (N,), or the codes if there are no names."""
        import pyarrow as pa

        column = nullable_codes(codes, len(codes))
        if self.class_names is None:
            return column
        names = pa.array(self.class_names, pa.string())
        return names.take(column)

    def _names_with_outside(self, targets: pa.Array) -> pa.Array:
        """Return target names (N,), with "(outside)" in the rows that are ``outside``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        names = targets.cast(pa.string())
        is_outside = pa.array(self.outside)
        return pc.if_else(is_outside, OUTSIDE_NAME, names)

    def identities(self, rows: NDArray[np.bool_]) -> NDArray[np.int64] | None:
        """Return the numbers (M,) of clusters for the M rows in the mask ``rows`` (N,).

        Without clusters, return the numbers of the pictures instead. Without either, return None.
        Rows with equal numbers are resampled together, even if they are in different outcomes. A
        row with the number -1 is resampled alone.
        """
        if self.cluster is not None:
            number_of_cluster: dict[str | None, int] = {None: UNKNOWN}
            bits_without_sign = np.iinfo(np.int64).max  # so that no hash is UNKNOWN (-1)
            for name in set(self.cluster) - {None}:
                number_of_cluster[name] = hash_of_text(str(name)) & bits_without_sign
            numbers = [number_of_cluster[name] for name in self.cluster]
            return np.array(numbers, dtype=np.int64)[rows]
        if self.picture is not None:
            return self.picture[rows]
        return None

    def tally(self) -> Tally:
        """Return the counts from which ``vilu.evaluate`` computes metrics.

        Examples:
            >>> import vilu
            >>> tally = vilu.Outcomes([0.1, 0.9, 0.4], [0, 1, -1]).tally()
            >>> tally.scores.n, tally.scores.n_failures, tally.n_unlabelled
            (2, 1, 1)
        """
        rows = self.evaluable
        is_scored = np.isfinite(self.uncertainty)
        failure = self.failure[rows]
        is_outside = self.outside[rows]
        identities = self.identities(rows)
        resampling_unit = repeated_picture_numbers(identities)
        scores = ScoredRows(self.uncertainty[rows], failure, picture=resampling_unit)
        within = scores
        if self.outside.any():
            within = scores.take(~is_outside)
        probability = scores if self.is_probability else None
        if self.failure_probability is not None:
            probability = ScoredRows(
                self.failure_probability[rows], failure, picture=resampling_unit
            )
        n_seen_in_fit = self.provenance.get("n_seen_in_fit")
        if not isinstance(n_seen_in_fit, int):
            n_seen_in_fit = 0  # not known
        outside_failure = is_outside.astype(np.int64)
        outside = ScoredRows(scores.uncertainty, outside_failure, picture=resampling_unit)
        n_unlabelled = int(np.count_nonzero((self.failure == UNKNOWN) & is_scored))
        n_unusable = int(np.count_nonzero(~is_scored))
        sample = self._sample(rows)
        identity = identity_fields(self)
        return Tally(
            scores=scores,
            within=within,
            outside=outside,
            probability=probability,
            n_unlabelled=n_unlabelled,
            n_unusable=n_unusable,
            sample=sample,
            has_clusters=self.cluster is not None,
            is_calibrated=self.failure_probability is not None,
            n_seen_in_fit=n_seen_in_fit,
            **identity,
        )

    def _sample(self, rows: NDArray[np.bool_]) -> RowSample | None:
        """Sample the rows in a mask (N,) with ``sample_of_rows``."""
        pictures = None
        if self.picture is not None:
            pictures = self.picture[rows]
        ids = None
        if self.ids is not None:
            indices = np.flatnonzero(rows)
            ids = [self.ids[row] for row in indices.tolist()]
        return sample_of_rows(pictures, ids)

    @checked
    def save(self, path: str | Path, *, inputs: str | None = None) -> None:
        """Write a ``.parquet`` or ``.csv`` file atomically, with the columns of ``table``.

        A Parquet file also stores the fields with one value for all rows, so nothing is lost. A CSV
        file has only the columns. If a spreadsheet would run a text as a formula, the CSV file has
        an apostrophe before this text. An existing file is replaced only if the file holds scores.
        ``inputs`` is a digest of the scores' inputs (``vilu.artifacts.paths``).

        Raises:
            UsageError: If the suffix is not listed above, or if an existing file holds no scores.
            DataError: If a text is not valid Unicode.
            StorageError: If the file cannot be written.

        Examples:
            >>> import pathlib, tempfile, vilu
            >>> prediction, ids = [2, 0], ["a.jpg", "b.jpg"]
            >>> outcomes = vilu.Outcomes([0.1, 0.9], [0, -1], prediction, ids=ids, method="mine")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     outcomes.save(f"{folder}/scores.csv")
            ...     print(pathlib.Path(folder, "scores.csv").read_text())
            row_id,key,pred,pred_name,label,label_name,uncertainty,failure,reason,score_name,answer
            0,"a.jpg",2,,,,0.1,0,,"mine","zero_shot"
            1,"b.jpg",0,,,,0.9,,,"mine","zero_shot"
            <BLANKLINE>
        """
        claim_file(path, "scores", overwrite=True)
        columns, metadata = self.table()
        inputs_metadata = inputs_entry(inputs)
        write_table(path, columns, {**metadata, **inputs_metadata})

    def table(self, row_id: ArrayLike | None = None) -> tuple[dict[str, pa.Array], dict[str, Any]]:
        """Return the columns and the metadata that ``save`` writes to a file.

        Every table has the columns row_id, key, pred, pred_name, label, label_name, uncertainty,
        failure, reason, score_name and answer. The columns zero_shot, zero_shot_name,
        failure_probability, cluster, decision, decision_reason, label_set and picture_id are added
        if the outcomes have the values. Unknown values are null. The label is -2 in rows that are
        ``outside``.

        Args:
            row_id: Row indices (N,) in the data set. None means 0 to N-1.

        Examples:
            >>> import vilu
            >>> outcomes = vilu.Outcomes([0.1, 0.9], [0, -1], method="mine")
            >>> columns, metadata = outcomes.table(row_id=[7, 3])
            >>> columns["row_id"].to_pylist(), columns["failure"].to_pylist()
            ([7, 3], [0, None])
        """
        import pyarrow as pa

        n = len(self)
        row_numbers = np.arange(n)
        if row_id is not None:
            row_numbers = np.asarray(row_id, dtype=np.int64)
        pred = nullable_codes(self.prediction, n)
        target = nullable_codes(self.target, n)
        label = self._codes_with_outside(target)
        no_names = pa.nulls(n, pa.string())
        pred_name = no_names
        label_name = no_names
        names = None
        try:
            if self.class_names is not None:
                names = pa.array(self.class_names, pa.string())
                pred_name = names.take(pred)
                label_name = names.take(target)
            columns = {
                "row_id": pa.array(row_numbers),
                "key": _text_column(self.ids, n),
                "pred": pred,
                "pred_name": pred_name,
                "label": label,
                "label_name": label_name,
                "uncertainty": pa.array(self.uncertainty, mask=np.isnan(self.uncertainty)),
                "failure": nullable_codes(self.failure, n).cast(pa.int8()),
                "reason": _text_column(self.reason, n),
                "score_name": _repeated_text(self.method, n),
                "answer": _repeated_text(self.answer, n),
            }
            if self.zero_shot is not None:
                zero_shot = nullable_codes(self.zero_shot, n)
                columns["zero_shot"] = zero_shot
                columns["zero_shot_name"] = no_names if names is None else names.take(zero_shot)
            for name in ("failure_probability", "cluster", *DECISION_COLUMNS):
                values = getattr(self, name)
                if values is not None:
                    columns[name] = pa.array(values, OPTIONAL_COLUMNS[name], from_pandas=True)
            if self.picture is not None:
                is_unknown = self.picture == UNKNOWN
                columns["picture_id"] = pa.array(self.picture, pa.int64(), mask=is_unknown)
        except UnicodeError as error:
            raise DataError(
                f"ids, class_names and reason must be valid Unicode: {error}"
            ) from error
        present_columns = [name for name in OPTIONAL_COLUMNS if getattr(self, name) is not None]
        metadata = {name: getattr(self, name) for name in ("class_names", *COMMON_FIELD_TYPES)}
        return columns, {"kind": "outcomes", "present": present_columns, **metadata}

    def _codes_with_outside(self, targets: pa.Array) -> pa.Array:
        """Return target codes (N,), with ``OUTSIDE`` in the rows that are ``outside``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        is_outside = pa.array(self.outside)
        outside_code = pa.scalar(OUTSIDE, pa.int32())
        return pc.if_else(is_outside, outside_code, targets)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Self:
        """Read a file from ``save``, or any table with the columns ``uncertainty`` and ``failure``.

        A Parquet file from ``save`` stores all fields. A CSV file has only the columns.

        Raises:
            UsageError: If the suffix is neither ``.parquet`` nor ``.csv``.
            StorageError: If the file cannot be opened.
            DataError: If the file is no such table.
            ProvenanceError: If a newer version of vilu wrote the file.

        Examples:
            >>> import pandas as pd, tempfile, vilu
            >>> frame = pd.DataFrame({"uncertainty": [0.1, 0.9], "failure": [0, 1]})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     frame.to_csv(f"{folder}/scores.csv", index=False)
            ...     outcomes = vilu.Outcomes.load(f"{folder}/scores.csv")
            >>> outcomes.uncertainty.tolist(), outcomes.failure.tolist()
            ([0.1, 0.9], [0, 1])
        """
        table, metadata = read_table(path, TEXT_COLUMNS)
        required_columns = ("uncertainty", "failure")
        missing_columns = [name for name in required_columns if name not in table.column_names]
        if missing_columns:
            raise DataError(
                f"{path} must have the columns uncertainty and failure. "
                f"Missing: {', '.join(missing_columns)}; "
                f"it has {', '.join(table.column_names):.200}."
            )
        values: dict[str, Any] = {}
        for name, column_type in (("uncertainty", "float64"), ("failure", "int64")):
            required_column = read_column(path, table, name, column_type)
            values[name] = plain_values(required_column, column_type)
        # A file from ``save`` lists the optional columns of the outcomes. In any other table, a
        # column counts as present if any row has a value.
        listed_columns = metadata.get("present")
        for name, column_type in OPTIONAL_COLUMNS.items():
            column_name = COLUMN_OF_FIELD.get(name, name)
            column = read_column(path, table, column_name, column_type)
            is_present = column.null_count < len(table)
            if isinstance(listed_columns, list):
                is_present = name in listed_columns
            if is_present:
                values[name] = plain_values(column, column_type)
        common_fields = _common_fields_of_file(path, table, metadata)
        for name in ("class_names", *COMMON_FIELD_TYPES):
            if name in common_fields:
                values[name] = common_fields[name]
        return cls(**values)
