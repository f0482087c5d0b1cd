"""A table with the answers of any model: one row per answer, with scores."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Final, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.hashing import digest
from vilu.embeddings.checks import IdentityKind, check_indices, hash_items, normalise_rows
from vilu.embeddings.columns import ANSWER, LOGITS, NUMBERS, DataKind
from vilu.embeddings.logits import logit_space, zero_texts
from vilu.embeddings.similarity import select_rows
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.validation import checked

SCORE: Final = "score"
UNCERTAINTY: Final = "uncertainty"
"""Columns named "score", "score_...", "uncertainty" or "uncertainty_..." have a sign.

See ``sign_of``.
"""

Text = TypeVar("Text", bound=str)

FEATURES: Final = "features"
N_CANDIDATES: Final = 2
"""Every row has two candidates: the row's answer, and any other answer."""

MIN_WIDTH_FOR_COPY_SEARCH: Final = 32
"""Near copies are only searched for if the features have at least this width F.

Vectors with few numbers often have nearly the same direction, even for different rows.
"""

Sign = Literal[-1, 0, 1]
LabelPurpose = Literal["fit", "calibration"]
"""Purpose of a label: to fit on, or to calibrate on."""
Features = NDArray[np.float32]


def sign_of(name: str) -> Sign:
    """Return the sign of a numeric column by name.

    1: a higher number means that the answer is more likely right. -1: more likely wrong. 0: the
    name does not say the sign, so a fit learns it.

    Examples:
        >>> from vilu.tables.table import sign_of
        >>> [sign_of(name) for name in ("score_mean", "uncertainty", "width")]
        [1, -1, 0]
    """
    stem, _, _ = name.partition("_")
    if stem == SCORE:
        return 1
    if stem == UNCERTAINTY:
        return -1
    return 0


class AnswerTable(EmbeddingSource):
    """Answers of any model, one per row, with numbers that say how sure the model was.

    ``vilu.open_table`` makes a table from a file, a data frame or arrays, and checks every cell.
    ``vilu.score``, ``vilu.Selective`` and the commands accept a table in place of an embedding
    source. The candidates of a row are the row's answer, and any other answer.

    The name of a column decides its role:

    - ``id``: identifier of the row. Required, and different in all rows.
    - ``answer``: any text.
    - ``correct``: 1 if the answer is right, 0 if wrong, empty if not known.
    - ``truth``: text of the right answer, or empty. Only class shares need this column.
    - ``score`` and ``score_...``: a higher number means that the answer is more likely right.
    - ``uncertainty`` and ``uncertainty_...``: a higher number means more likely wrong.
    - ``group``, ``cluster``: any text.
    - ``features``: a vector of each row, as a column with lists of equal length. For a file
      ``answers.csv`` or ``answers.parquet`` the vectors may be in ``answers.features.npy`` (N, F)
      in the same folder.

    Every other number column is used, too, and a fit learns its sign. Other text columns have no
    role.

    Attributes:
        ids: Identifiers of the N rows, all different. Rows are recognised by identifier.
        correct: (N,) int64: 1 if the answer is right, 0 if wrong, -1 if not known.
        numbers: Name -> column (N,) float64, in the order of the table. ``sign_of(name)`` is 1 if a
            higher number means that the answer is more likely right, -1 if more likely wrong, 0 if
            a fit learns the sign.
        answer: Texts of the N answers, or None without the column.
        truth: Texts of the right answers, "" where not known, or None without the column.
        group: Group of each row, or None without the column.
        cluster: Cluster of each row, such as a page or a conversation, or None without the column.
        features: (N, F) float32 vectors of the rows, or None without features.
        asked_for: Purpose of each row's label, written by ``vilu next``, or None without the
            column.
        unused: Names of the columns without a role.
        name: The data set's name: the file name without its suffix, or None without a file.

    Examples:
        >>> import vilu
        >>> table = vilu.open_table(
        ...     {
        ...         "id": ["a", "b", "c"],
        ...         "answer": ["cat", "dog", "cat"],
        ...         "score_softmax": [0.9, 0.4, 0.7],
        ...         "correct": [1, 0, None],
        ...     }
        ... )
        >>> len(table), table.failure.tolist()
        (3, [0, 1, -1])
        >>> table.numbers["score_softmax"].tolist()
        [0.9, 0.4, 0.7]
        >>> table.take([2, 0]).answer
        ('cat', 'cat')
    """

    # for messages about a wrong argument: the expected value, and a way to get it
    how_to_make: ClassVar[str] = 'a table of answers (vilu.open_table("answers.csv"))'
    data_kind: ClassVar[DataKind] = "answers"

    ids: tuple[str, ...]

    def __init__(  # noqa: PLR0913 - one argument per role
        self,
        ids: tuple[str, ...],
        correct: Ints,
        numbers: Mapping[str, Floats],
        *,
        answer: tuple[str, ...] | None = None,
        truth: tuple[str, ...] | None = None,
        group: tuple[str, ...] | None = None,
        cluster: tuple[str, ...] | None = None,
        features: Features | None = None,
        asked_for: tuple[LabelPurpose, ...] | None = None,
        unused: tuple[str, ...] = (),
        name: str | None = None,
        image: Tensor | None = None,
    ) -> None:
        """Make a table from checked columns.

        ``image`` has the feature directions (``_feature_directions``). If ``image`` is
        None, the directions are computed.
        """
        self.ids = ids
        self.correct = correct
        self.numbers = dict(numbers)
        self.answer = answer
        self.truth = truth
        self.group = group
        self.cluster = cluster
        if answer is not None and cluster is not None:
            # equal answers have equal numbers, to find the majority answer of a cluster
            _, self.answer_numbers = np.unique(np.array(answer), return_inverse=True)
        self.features = features
        self.asked_for = asked_for
        self.unused = unused
        self.name = name
        self.image = _feature_directions(features, len(ids), image)
        self.space = logit_space(self.image.shape[1])
        self.text = zero_texts(N_CANDIDATES, self.space)
        self.class_names = None
        # index of the right candidate: 0 is the row's answer, 1 is any other answer
        self.target = torch.from_numpy(self.failure)
        self._columns = self._batch_columns()
        self.columns = frozenset(self._columns)

    def _batch_columns(self) -> dict[str, Tensor]:
        """Return name -> column, for the batch columns."""
        n_rows = len(self.ids)
        logits_of_row = torch.tensor([[1.0, 0.0]])  # largest for candidate 0, the row's answer
        numbers = self.matrix(list(self.numbers))
        tensors = {
            LOGITS: logits_of_row.expand(n_rows, -1),
            ANSWER: torch.zeros(n_rows, dtype=torch.int64),
            NUMBERS: torch.from_numpy(numbers),
        }
        if self.features is not None:
            tensors[FEATURES] = torch.from_numpy(self.features)
        return tensors

    def __getitem__(
        self, rows: slice | Sequence[int] | Sequence[bool] | Tensor | NDArray[Any]
    ) -> AnswerTable:
        """Return some rows as a new table: a slice, a mask (N,) bool, or indices (M,)."""
        table = super().__getitem__(rows)
        return cast("AnswerTable", table)

    def __repr__(self) -> str:
        n_known = int((self.correct != UNKNOWN).sum())
        return f"AnswerTable(n={len(self)}, known={n_known}, numbers={list(self.numbers)})"

    @property
    def failure(self) -> Ints:
        """Failures (N,) int64: 1 if the answer is wrong, 0 if right, -1 if unknown."""
        return np.where(self.correct == UNKNOWN, UNKNOWN, 1 - self.correct)

    @property
    def n_features(self) -> int:
        """Feature width F, or 0 without features."""
        if self.features is None:
            return 0
        return int(self.features.shape[1])

    @property
    def roles(self) -> dict[str, str]:
        """Column name -> use of the column, in words.

        Examples:
            >>> import vilu
            >>> table = vilu.open_table({"id": ["a"], "score_p": [0.5], "width": [3], "who": ["B"]})
            >>> for name, role in table.roles.items():
            ...     print(f"{name}: {role}")
            id: identifier of the row
            score_p: score: a higher number means more likely right
            width: number whose sign a fit learns
            who: not used
        """
        roles = {"id": "identifier of the row"}
        if self.answer is not None:
            roles["answer"] = "text of the answer"
        if (self.correct != UNKNOWN).any():
            roles["correct"] = "whether the answer is right"
        if self.truth is not None:
            roles["truth"] = "text of the right answer, for shares of classes"
        for name in self.numbers:
            roles[name] = ROLE_BY_SIGN[sign_of(name)]
        if self.group is not None:
            roles["group"] = "group of the row"
        if self.cluster is not None:
            roles["cluster"] = "cluster of the row, such as its page or conversation"
        if self.asked_for is not None:
            roles["asked_for"] = "what the label was asked for: to fit, or to calibrate on"
        if self.features is not None:
            roles["features"] = f"vector of {self.n_features} numbers"
        return roles | dict.fromkeys(self.unused, "not used")

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]  # in other sources a plain attribute
        """Hash of everything in the table except the name and the unused columns."""
        content = hashlib.sha256(self.correct.tobytes())
        for numbers in self.numbers.values():
            content.update(numbers.tobytes())
        if self.features is not None:
            content.update(self.features.tobytes())
        texts: list[object] = [self.ids, self.answer, self.group, self.cluster]
        # These columns are newer than the fingerprint. If a table lacks these columns, its
        # fingerprint must not change, so only existing columns are hashed.
        for newer_texts in (self.asked_for, self.truth):
            if newer_texts is not None:
                texts.append(newer_texts)
        content_digest = content.hexdigest()
        return digest([list(self.numbers), texts, self.n_features, content_digest])

    def matrix(self, names: Sequence[str]) -> Floats:
        """Return the number columns with these names, as (N, C) float64.

        Raises:
            DataError: If the table lacks a column.
        """
        missing_names = [name for name in names if name not in self.numbers]
        if missing_names:
            raise DataError(
                f"the table must have the columns of numbers {', '.join(names)}. Missing: "
                f"{', '.join(missing_names)}; it has {', '.join(self.numbers) or 'none'}."
            )
        matrix = np.empty((len(self.ids), len(names)), dtype=np.float64)
        for column, name in enumerate(names):
            matrix[:, column] = self.numbers[name]
        return matrix

    def for_purpose(self, purpose: LabelPurpose) -> AnswerTable:
        """Return the rows that may be used for a purpose: to fit on, or to calibrate on.

        The column ``asked_for`` has each row's purpose. Without this column, all rows may be used.
        Rows chosen to fit on are no random sample, so calibration must not use these rows.

        Raises:
            DataError: If no row is left, or if a label requested for calibration is missing.
        """
        if self.asked_for is None:
            return self
        has_purpose = np.array(self.asked_for) == purpose
        table = self[has_purpose]
        if not has_purpose.any():
            raise DataError(f"no row of this table was asked for: {purpose}.")
        unlabelled_rows = np.flatnonzero(table.correct == UNKNOWN)
        if purpose == "calibration" and len(unlabelled_rows):
            raise DataError(
                f"{len(unlabelled_rows)} of the labels that were asked for are missing. The first "
                f"missing label is of {table.ids[unlabelled_rows[0]]!r:.60}. Without them the "
                "sample is not random. Fill in the column correct."
            )
        return table

    def arranged(self, names: Sequence[str]) -> AnswerTable:
        """Return the table with only these number columns, in the order of ``names``.

        Raises:
            DataError: If the table lacks a column.
        """
        table = copy.copy(self)
        table.__dict__.pop("fingerprint", None)  # the cached fingerprint belongs to the old columns
        matrix = self.matrix(names)
        table.numbers = {name: matrix[:, column] for column, name in enumerate(names)}
        table._columns = {**self._columns, NUMBERS: torch.from_numpy(matrix)}
        return table

    def image_rows(self, index: Tensor) -> Tensor:
        """Return the feature directions (B, F), to find near copies. (B, 0) without features."""
        return select_rows(self.image, index)

    @property
    def identified_by(self) -> tuple[IdentityKind, ...]:
        """Identity kinds, best first: "embeddings" (features and numbers), "rows" (ids)."""
        if self.features is None:
            return ("rows",)
        return ("embeddings", "rows")

    def identities(
        self, by: IdentityKind, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Return identity hashes (M,) of ``rows`` (M,), or of all rows if ``rows`` is None."""
        if by == "rows":
            return super().identities("names", rows)
        index = np.arange(len(self)) if rows is None else rows
        content = self._columns[NUMBERS].numpy()[index]
        if self.features is not None:
            content = np.hstack([content, self.features[index]])
        return hash_items(row.tobytes() for row in content)

    def picture_identities(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return identities (M,) int64 of ``rows`` (M,). Rows with equal identities are one answer.

        Exact copies have equal features and equal numbers. Without features every row is a separate
        answer, because different answers often have equal scores.
        """
        best_kind = self.identified_by[0]
        hashes = self.identities(best_kind, rows)
        # clear each hash's highest bit: the identities are from 0 to 2^63 - 1
        largest_identity = np.iinfo(np.int64).max
        identities = hashes & np.uint64(largest_identity)
        return identities.astype(np.int64)

    @checked
    def take(
        self,
        rows: Sequence[int] | Tensor | NDArray[np.int64],
        classes: Sequence[int] | Tensor | NDArray[np.int64] | None = None,
        columns: Collection[str] | None = None,
    ) -> AnswerTable:
        """Return the rows with these indices (M,), as a new table.

        Raises:
            UsageError: If ``classes`` or ``columns`` are given. A table has rows only.
            DataError: If there is no such row.
        """
        if classes is not None or columns is not None:
            raise UsageError("a table of answers has rows only. Leave classes and columns out.")
        index = check_indices(rows, len(self), "rows")
        return self._take_rows(index.numpy())

    def _take_rows(self, index: Ints) -> AnswerTable:
        """Return the table with the rows at these indices (M,)."""
        return AnswerTable(
            _texts_of_rows(self.ids, index) or (),
            self.correct[index],
            {name: numbers[index] for name, numbers in self.numbers.items()},
            answer=_texts_of_rows(self.answer, index),
            truth=_texts_of_rows(self.truth, index),
            group=_texts_of_rows(self.group, index),
            cluster=_texts_of_rows(self.cluster, index),
            features=None if self.features is None else self.features[index],
            asked_for=_texts_of_rows(self.asked_for, index),
            unused=self.unused,
            name=self.name,
            image=self.image[torch.from_numpy(index)],
        )


ROLE_BY_SIGN: Final[dict[Sign, str]] = {
    1: "score: a higher number means more likely right",
    -1: "uncertainty: a higher number means more likely wrong",
    0: "number whose sign a fit learns",
}
"""Sign of a numeric column -> the column's role in words."""


def _texts_of_rows(texts: Sequence[Text] | None, rows: Ints) -> tuple[Text, ...] | None:
    """Return the texts at the indices ``rows`` (M,), or None if ``texts`` is None."""
    if texts is None:
        return None
    return tuple(texts[row] for row in rows.tolist())


def _feature_directions(
    features: Features | None, n_rows: int, known_directions: Tensor | None
) -> Tensor:
    """Return unit vectors (N, F) of standardised features, to find near copies.

    Hidden states of networks share a large mean, so all hidden states have nearly the same
    direction. Therefore each number is standardised over the rows. The result is (N, 0) without
    features, or if F is below ``MIN_WIDTH_FOR_COPY_SEARCH``. If ``known_directions`` is not None,
    the function returns ``known_directions``.
    """
    if known_directions is not None:
        return known_directions
    if features is None or features.shape[1] < MIN_WIDTH_FOR_COPY_SEARCH:
        return torch.zeros(n_rows, 0, dtype=torch.float32)
    centred = features - features.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    deviation[deviation == 0] = 1.0
    standardised = (centred / deviation).astype(np.float32)
    vectors, _, _ = normalise_rows(torch.from_numpy(standardised))
    return vectors
