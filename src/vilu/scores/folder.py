"""A folder of scores, read."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilu.errors import DataError, ProvenanceError
from vilu.metrics.histogram import Histogram
from vilu.outcome_columns import UNKNOWN
from vilu.outcomes import OPTIONAL, Outcomes
from vilu.scores.content import read_histogram, require_hash
from vilu.scores.documents import AGAIN, MANIFEST, RUN, Counts, Manifest, Run, read, read_receipt
from vilu.tables import read_column, read_table
from vilu.tally import Tally


class ScoreFolder:
    """What ``score_parts`` wrote; ``vilu.evaluate`` takes it like ``Outcomes``, whatever its size.

    Opening reads the documents and checks that every file is there with its size; ``verify`` reads every byte.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        run: What made it.
        counts: What became of the rows.

    Raises:
        DataError: If the folder holds no scores, or is not complete.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together, or another schema wrote them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / RUN).is_file():
            raise DataError(f"{self.path} is no folder of scores (it has no {RUN}). Make one with `vilu score`.")
        self.run = read(self.path / RUN, Run)
        if not (self.path / MANIFEST).is_file():
            raise DataError(f"{self.path} is not complete. {AGAIN}: it goes on where it stopped.")
        manifest = read(self.path / MANIFEST, Manifest)
        self._receipts = [read_receipt(self.path, self.run, part) for part in self.run.parts]
        if manifest != Manifest.of(self.run, self._receipts):
            raise ProvenanceError(f"{self.path / MANIFEST} seals other parts than the folder holds. {AGAIN}.")
        self.counts: Counts = manifest.counts

    def __len__(self) -> int:
        return self.run.n_in

    def __repr__(self) -> str:
        return f"ScoreFolder({str(self.path)!r}, n_in={self.counts.n_in}, n_scored={self.counts.n_scored})"

    @cached_property
    def histogram(self) -> Histogram:
        """Correct and wrong answers per bin of the score, of all rows that have a score and a known failure.

        Raises:
            StorageError: If a file is not the one that its receipt vouches for.
        """
        return Histogram.total(read_histogram(self.path, receipt) for receipt in self._receipts)

    def tally(self) -> Tally:
        """What ``vilu.evaluate`` needs."""
        return Tally(
            scores=self.histogram,
            n_unlabelled=self.counts.n_unlabelled,
            n_unusable=self.counts.n_unscored,
            is_probability=self.run.is_probability,
            method=self.run.method,
            dataset=self.run.dataset,
            split=self.run.split,
            seed=self.run.seed,
        )

    def outcomes(self) -> Outcomes:
        """Every row in memory, in the order of the data: for data that fit, what ``vilu.score`` gives.

        Raises:
            StorageError: If a file is damaged.
            DataError: If a file is not such a table, or its rows are not those of the data.
        """
        parts = [Outcomes.load(self.path / receipt.part.scores) for receipt in self._receipts]
        row_id = np.concatenate([self._row_ids(receipt.part.scores) for receipt in self._receipts])
        order = np.argsort(row_id, kind="stable")
        if not np.array_equal(row_id[order], np.arange(len(self))):
            raise DataError(f"the parts of {self.path} do not hold the rows 0 to {len(self) - 1} once each. {AGAIN}.")
        optional = {name: _joined(parts, name, kind, order) for name, kind in OPTIONAL.items()}
        optional["reason"] = optional["reason"] or [None] * len(order)
        return Outcomes(
            uncertainty=np.concatenate([part.uncertainty for part in parts])[order],
            failure=np.concatenate([part.failure for part in parts])[order],
            **{name: values for name, values in optional.items() if values is not None},
            class_names=parts[0].class_names,
            **{name: getattr(self.run, name) for name in ("method", "dataset", "split", "seed", "is_probability")},
            provenance={**self.run.provenance, "n_seen_in_fit": self.counts.n_seen},
        )

    def verify(self) -> None:
        """Read every byte, and compare it with what was written.

        Raises:
            StorageError: If a file is damaged; the message names it.
        """
        for receipt in self._receipts:
            for name, info in receipt.files.items():
                require_hash(self.path / name, info)

    def _row_ids(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        table, _ = read_table(self.path / name, ())
        return np.asarray(read_column(self.path / name, table, "row_id", "int64").to_numpy(), dtype=np.int64)


def _joined(parts: list[Outcomes], name: str, kind: str, order: NDArray[np.int64]) -> Any:  # noqa: ANN401 - by its kind
    """What the parts say of every row, in the order of the data; a part without it says nothing of its rows."""
    found = [getattr(part, name) for part in parts]
    if all(values is None for values in found):
        return None
    if kind == "string":
        texts = [text for part, values in zip(parts, found, strict=True) for text in values or [None] * len(part)]
        return [texts[place] for place in order]
    missing = np.nan if kind == "float64" else UNKNOWN
    numbers = [np.full(len(p), missing) if v is None else v for p, v in zip(parts, found, strict=True)]
    return np.concatenate(numbers)[order]
