"""Scores of data of any size, in a folder: parts, receipts, manifest."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from vilu.embeddings.space import digest
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.files import (
    LOCK,
    MAX_DOCUMENT_BYTES,
    SCHEMA_VERSION,
    TEMPORARY,
    Model,
    explain,
    locked,
    make_folder,
    parquet_bytes,
    read_column,
    read_table,
    write_json,
)
from vilu.metrics.counts import Ints
from vilu.metrics.histogram import MAX_BINS, Histogram, codes
from vilu.outcomes.outcomes import OPTIONAL, UNKNOWN, Outcomes, Tally
from vilu.store.documents import Count, FileInfo

RUN, MANIFEST = "run.json", "manifest.json"
AGAIN = "Run the same `vilu score` again"


class Document(Model):
    """A file of the folder."""

    schema_version: Literal[1] = SCHEMA_VERSION


class Run(Document):
    """Everything that decides what the folder holds; its hash is the fingerprint.

    Attributes:
        kind: What this folder is.
        predictor: Fingerprint of the predictor and its weights.
        source: Fingerprint of the embeddings.
        n_in: Rows of the embeddings.
        n_candidate: How many of them are usable (and fill pools); the others come after them, without a score.
        rows_per_part: Rows of a part: whole pools, or whole batches of scoring.
        method: Name of the predictor.
        dataset: Name of the data set.
        split: Name of its part.
        seed: Seed of the predictor.
        is_probability: Whether the uncertainty is a probability of failure.
        provenance: As in ``Outcomes``.
    """

    kind: Literal["scores"] = "scores"
    predictor: str
    source: str
    n_in: Count
    n_candidate: Count
    rows_per_part: int = Field(ge=1)
    method: str | None
    dataset: str | None
    split: str | None
    seed: int | None
    is_probability: bool
    provenance: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash over every field."""
        return digest(self.model_dump(mode="json"))

    @property
    def parts(self) -> list[Part]:
        """All parts: of the rows to score in their order, then of the rows without a score."""
        cuts = [
            *range(0, self.n_candidate, self.rows_per_part),
            *range(self.n_candidate, self.n_in, self.rows_per_part),
        ]
        return [
            Part(number=i, start=a, stop=b) for i, (a, b) in enumerate(zip(cuts, [*cuts[1:], self.n_in], strict=True))
        ]

    def require_same(self, other: Run, path: Path) -> None:
        """Refuse to mix two runs.

        Raises:
            ProvenanceError: If a field differs, naming both sides.
        """
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        differences = [f"{k}: {mine[k]!r} ({path}) against {theirs[k]!r} (now)" for k in mine if mine[k] != theirs[k]]
        if differences:
            raise ProvenanceError(
                f"{path} holds the scores of another run: {'; '.join(differences)}. "
                "Give another folder, or overwrite this one."
            )


class Part(Model):
    """Rows ``start`` ... ``stop - 1`` in the order of scoring."""

    number: Count
    start: Count
    stop: Count

    @property
    def scores(self) -> str:
        """One row per row, as ``Outcomes.save`` writes it."""
        return f"scores/scores_{self.number:05d}.parquet"

    @property
    def histogram(self) -> str:
        """Correct and wrong answers per bin of the score."""
        return f"histograms/histogram_{self.number:05d}.parquet"

    @property
    def receipt(self) -> str:
        """Written last."""
        return f"receipts/{self.number:05d}.json"

    def __len__(self) -> int:
        return self.stop - self.start


class Counts(Model):
    """What became of some rows.

    Attributes:
        n_in: Rows.
        n_scored: How many of them have an uncertainty.
        n_failures: How many of those are wrong.
        n_unlabelled: For how many of those that is unknown.
        unscored: The other rows, by reason.
        n_seen: How many of the rows were used to fit the predictor.
    """

    n_in: Count
    n_scored: Count
    n_failures: Count
    n_unlabelled: Count
    unscored: dict[str, Count]
    n_seen: Count

    @property
    def n_unscored(self) -> int:
        """Rows without an uncertainty."""
        return sum(self.unscored.values())

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        if self.n_in != self.n_scored + self.n_unscored:
            raise ValueError(f"n_in={self.n_in} is not n_scored + n_unscored={self.n_scored + self.n_unscored}")
        if self.n_scored < self.n_failures + self.n_unlabelled:
            raise ValueError(f"n_scored={self.n_scored} is less than n_failures + n_unlabelled")
        return self

    @classmethod
    def total(cls, several: Iterable[Counts]) -> Counts:
        """The sum."""
        every = list(several)
        reasons = sorted({reason for one in every for reason in one.unscored})
        numbers = ("n_in", "n_scored", "n_failures", "n_unlabelled", "n_seen")
        return cls(
            unscored={reason: sum(one.unscored.get(reason, 0) for one in every) for reason in reasons},
            **{name: sum(getattr(one, name) for one in every) for name in numbers},
        )


class Receipt(Document):
    """Vouches for the files of a part; a part exists if and only if its receipt does.

    Attributes:
        fingerprint: Of the run.
        part: Which rows.
        counts: What became of them.
        files: Size and hash of each file.
    """

    fingerprint: str
    part: Part
    counts: Counts
    files: dict[str, FileInfo]


class Manifest(Document):
    """The seal of a complete folder.

    Attributes:
        fingerprint: Of the run.
        n_parts: Number of parts.
        counts: Of all rows.
        content: Hash over the hashes of all files.
    """

    fingerprint: str
    n_parts: Count
    counts: Counts
    content: str

    @classmethod
    def of(cls, run: Run, receipts: list[Receipt]) -> Manifest:
        """The seal of these parts."""
        content = digest([info.sha256 for receipt in receipts for info in receipt.files.values()])
        counts = Counts.total(receipt.counts for receipt in receipts)
        return cls(fingerprint=run.fingerprint, n_parts=len(receipts), counts=counts, content=content)


D = TypeVar("D", bound=Document)


def read(path: Path, kind: type[D]) -> D:
    """A document of the folder, checked.

    Raises:
        StorageError: If it is missing, too large, or damaged.
        DataError: If it is a document of something else.
        ProvenanceError: If another version of vilu wrote it in a schema that this one does not know.
    """
    try:
        with path.open("rb") as handle:
            content = handle.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            raise StorageError(f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes, so it is no file of vilu.")
        raw = json.loads(content)
    except FileNotFoundError as error:
        raise StorageError(f"{path} is missing. {AGAIN} to complete the folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"cannot read {path}: {error}. {AGAIN} to repair it.") from error
    if kind is Run and not (isinstance(raw, dict) and raw.get("kind") == "scores"):
        raise DataError(f"{path} is not of a folder of scores. Make one with `vilu score`.")
    if isinstance(raw, dict) and raw.get("schema_version") != SCHEMA_VERSION:
        raise ProvenanceError(
            f"{path} has schema version {raw.get('schema_version')!r}, this vilu reads {SCHEMA_VERSION}. "
            "Score again, or use the vilu that wrote it."
        )
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise StorageError(f"{path} is damaged: {explain(error)}. {AGAIN} to repair it.") from error


def read_receipt(root: Path, run: Run, part: Part) -> Receipt:
    """The receipt of a part that is there in full.

    Raises:
        StorageError: If the receipt or one of its files is missing, or has another size than it vouches for.
        ProvenanceError: If it belongs to another run.
    """
    path = root / part.receipt
    receipt = read(path, Receipt)
    if receipt.fingerprint != run.fingerprint:
        raise ProvenanceError(
            f"{path} belongs to run {receipt.fingerprint}, the folder to run {run.fingerprint}. "
            f"{AGAIN} to redo the part."
        )
    found = (receipt.part, receipt.counts.n_in, list(receipt.files))
    expected = (part, len(part), [part.scores, part.histogram])
    if found != expected:
        raise StorageError(f"{path} is damaged: it describes {found}, expected {expected}. {AGAIN}.")
    for name, info in receipt.files.items():
        size = (root / name).stat().st_size if (root / name).is_file() else None
        if size != info.bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise StorageError(f"{root / name} {state}, its receipt says {info.bytes} bytes. {AGAIN} to redo the part.")
    return receipt


COLUMNS = ("bin", "correct", "wrong")


def histogram_bytes(histogram: Histogram) -> memoryview:
    """A histogram as the content of a Parquet file: one row per occupied bin, ascending."""
    columns = dict(zip(COLUMNS, map(pa.array, (histogram.bins, histogram.correct, histogram.wrong)), strict=True))
    ends = [histogram.low, histogram.high] if histogram.n else None
    return parquet_bytes(columns, {"kind": "histogram", "level": histogram.level, "ends": ends})


def read_histogram(root: Path, receipt: Receipt) -> Histogram:
    """The counts of a part, checked against its receipt.

    Raises:
        StorageError: If the file is not the one that the receipt vouches for, or not such a table.
    """
    path, counts = root / receipt.part.histogram, receipt.counts
    require_hash(path, receipt.files[receipt.part.histogram])
    table, metadata = read_table(path, ())
    level, ends = metadata.get("level"), metadata.get("ends")
    if table.column_names != list(COLUMNS) or any(c.type != pa.int64() or c.null_count for c in table.columns):
        raise _damaged(path, f"its columns are {table.schema.names}")
    if not isinstance(level, int) or not 0 <= level < 64 or not _are_ends(ends):
        raise _damaged(path, f"its level is {level!r} and its ends are {ends!r}")
    low, high = ends if isinstance(ends, list) else (math.inf, -math.inf)
    bins, correct, wrong = (column.to_numpy() for column in table.columns)
    histogram = Histogram(bins, correct, wrong, level, low, high)
    found = (histogram.n, histogram.n_failures)
    expected = (counts.n_scored - counts.n_unlabelled, counts.n_failures)
    if found != expected or not _in_order(histogram) or (ends is None) != (len(bins) == 0):
        raise _damaged(path, f"it counts {found} rows and failures, its receipt {expected}")
    return histogram


def require_hash(path: Path, info: FileInfo) -> None:
    """Refuse a file with other bytes than its receipt vouches for.

    Raises:
        StorageError: If it is missing or another.
    """
    try:
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}. {AGAIN} to redo the part.") from error
    if found != info.sha256:
        raise StorageError(f"{path} is not the file that its receipt vouches for. Remove the receipt. {AGAIN}.")


def _are_ends(ends: object) -> bool:
    if ends is None:
        return True
    return isinstance(ends, list) and len(ends) == 2 and all(isinstance(x, float) and math.isfinite(x) for x in ends)


def _in_order(histogram: Histogram) -> bool:
    bins = histogram.bins
    if not len(bins):
        return True
    occupied = len(bins) <= MAX_BINS and bool((np.diff(bins) > 0).all()) and _positive(histogram)
    first, last = codes(np.array([histogram.low, histogram.high])) >> histogram.level
    return occupied and bool(first == bins[0]) and bool(last == bins[-1])


def _positive(histogram: Histogram) -> bool:
    counts: tuple[Ints, ...] = (histogram.correct, histogram.wrong, histogram.correct + histogram.wrong - 1)
    return all(bool((count >= 0).all()) for count in counts)


def _damaged(path: Path, what: str) -> StorageError:
    return StorageError(f"{path} is no histogram: {what}. {AGAIN} into a new folder.")


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
            probability=self.histogram if self.run.is_probability else None,
            n_unlabelled=self.counts.n_unlabelled,
            n_unusable=self.counts.n_unscored,
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


FOLDERS = ("receipts", "histograms", "scores")


@contextmanager
def claim(root: Path) -> Iterator[None]:
    """Make the folder and hold its lock; the system lets go of it when the process dies.

    Raises:
        UsageError: If the folder holds something else than scores.
        BusyError: If another process scores into it.
        StorageError: If it cannot be made or written to.
    """
    make_folder(root)
    try:
        foreign = [path.name for path in root.iterdir() if path.name != LOCK and not TEMPORARY.fullmatch(path.name)]
        if foreign and not (root / RUN).is_file():
            raise UsageError(
                f"{root} is not empty ({min(foreign)!r}, ...) and holds no {RUN}, so it is no folder of scores. "
                "Give a new or an empty folder."
            )
    except OSError as error:
        raise StorageError(f"cannot read {root}: {error.strerror or error}.") from error
    with locked(root, "scoring into"):
        yield


def begin(root: Path, run: Run, *, overwrite: bool) -> None:
    """See that the folder, whose lock we hold, is of this run, and remove what a killed one left half-written.

    Raises:
        DataError: If it is of something else than scores.
        ProvenanceError: If it is of another run and not to be overwritten.
        StorageError: If the file system refuses.
    """
    if (root / RUN).is_file():
        found = read(root / RUN, Run)
        if overwrite and found != run:
            _clear(root)
        else:
            found.require_same(run, root)
    try:
        for folder in (root, *(root / name for name in FOLDERS)):
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if TEMPORARY.fullmatch(path.name):
                    path.unlink()
    except OSError as error:
        raise StorageError(f"cannot prepare {root}: {error.strerror or error}.") from error
    if not (root / RUN).is_file():
        write_json(root / RUN, run.model_dump(mode="json"))


def unseal(root: Path) -> None:
    """Mark the folder as not complete.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        (root / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot change {root}: {error.strerror or error}.") from error


def _clear(root: Path) -> None:
    """Remove scores, and nothing else that may lie in the folder; ``run.json`` last, so that a kill leaves a folder."""
    unseal(root)
    try:
        for name in FOLDERS:
            if (root / name).is_dir():
                shutil.rmtree(root / name)
        (root / RUN).unlink()
    except OSError as error:
        raise StorageError(f"cannot remove the old scores in {root}: {error.strerror or error}.") from error
