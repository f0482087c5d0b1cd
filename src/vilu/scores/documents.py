"""What a folder of scores says of itself: the run, a receipt for every part, and the seal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from vilu.document import MAX_DOCUMENT_BYTES, SCHEMA_VERSION, Model, explain
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.space import digest
from vilu.store.manifest import Count, FileInfo

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
