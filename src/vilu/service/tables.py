"""The service for answer tables: clients send the columns of rows instead of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vilu.calibration.calibration import Calibration, require_new_row_guarantee
from vilu.device import torch_defaults
from vilu.embeddings.columns import NUMBERS, DataKind
from vilu.errors import UNKNOWN, UsageError
from vilu.guard.guard import Answer, Guard
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.storage import load_predictor
from vilu.progress import SilentProgress
from vilu.scoring.score import provenance_of, require_streaming, score_rows
from vilu.service.engine import ClientRows, Engine, bytes_of_rows
from vilu.service.journals import Journals
from vilu.tables.methods import AnswerMethod
from vilu.tables.read import open_table
from vilu.tables.table import FEATURES, AnswerTable


class TableGuard(Guard):
    """A guard for table rows, with a predictor and a calibration, but without a model.

    Raises:
        UsageError: If the folder holds a predictor for images, or if the rule needs all rows at
            once.
        ProvenanceError: If the rule is about the photos in a single folder.
    """

    predictor: AnswerMethod

    def __init__(self, folder: Path) -> None:
        predictor = load_predictor(folder)
        if not isinstance(predictor, AnswerMethod):
            raise UsageError(f"{folder} holds a {predictor.name}, which is no method for tables.")
        # Guard.__init__ would open a model, so the attributes are set here instead
        self._saved_model = folder
        self.folder = folder
        self.predictor = predictor
        self.calibration = Calibration.find(folder)
        require_streaming(self.calibration)
        if self.calibration is not None:
            require_new_row_guarantee(self.calibration.rule)
        self.likely = None
        self.names = ()
        self.batch_size = 1
        self.workers = 1
        self._model = None

    @torch_defaults()
    def answer(
        self, arrays: Mapping[str, Tensor], keys: Sequence[str]
    ) -> tuple[list[Answer], Outcomes]:
        """Return decisions about table rows, and the rows' scores as outcomes.

        Args:
            arrays: The columns of B rows, as returned by ``AnswerMethod.inputs``.
            keys: The identifiers of the B rows.
        """
        numbers = arrays[NUMBERS].numpy()  # (B, C), one column per used column
        column_names = self.predictor.used_columns
        features = arrays[FEATURES].numpy() if FEATURES in arrays else None
        table = AnswerTable(
            tuple(keys),
            np.full(len(keys), UNKNOWN, dtype=np.int64),
            {name: numbers[:, column] for column, name in enumerate(column_names)},
            features=features,
        )
        facts = {
            "is_probability": self.predictor.is_probability,
            "provenance": provenance_of(self.calibration),
        }
        outcomes = score_rows(
            self.predictor, table, facts, calibration=self.calibration, task=SilentProgress()
        )
        answers = []
        for row in range(len(keys)):
            answers.append(self._answer_of_row(outcomes, row, runners_up=(), likely=None))
        return answers, outcomes


class TableEngine(Engine):
    """The engine for a table predictor. Only rows of numbers are judged, and no images."""

    data_kind: DataKind = "answers"
    guard: TableGuard

    def __init__(self, guard: TableGuard, journals: Journals) -> None:
        super().__init__(guard, journals)

    @property
    def numbers_per_row(self) -> int:
        """Number of values in a client's row: columns, features and identifier."""
        n_features = int(self.guard.predictor.notes_.get("n_features", 0))
        n_identifiers = 1
        return len(self.guard.predictor.used_columns) + n_features + n_identifiers

    def check_rows(self, columns: Mapping[str, Any]) -> ClientRows:
        """Check a client's columns like the columns of a file.

        Raises:
            DataError: If a column is missing or wrong. The message names the row.
        """
        table = open_table(columns)
        arrays = self.guard.predictor.inputs(table)
        # Two answers may have equal numbers, and a client may use an identifier again for another
        # answer. So rows belong to the same answer only if identifier and numbers are equal.
        bytes_of_numbers = bytes_of_rows(arrays)
        picture_keys = []
        for name, number_bytes in zip(table.ids, bytes_of_numbers, strict=True):
            picture_keys.append(name.encode() + number_bytes)
        return ClientRows(arrays, picture_keys)
