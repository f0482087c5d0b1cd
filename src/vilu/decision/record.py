"""``risk.json``: what was promised, on which rows, for which predictor; it lies beside ``predictor.json``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

import vilu
from vilu.decision.calibrate import Selector
from vilu.decision.label_sets import LabelSets
from vilu.decision.selection import BatchSelector
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import digest
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.files import MAX_DOCUMENT_BYTES, SCHEMA_VERSION, Model, atomic_write, explain, parquet_bytes, write_json
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.record import fit_fingerprint

RISK, ROWS = "risk.json", "calibration.parquet"
AGAIN = "Run `vilu calibrate` again"

Rule = Selector | BatchSelector


class Record(Model):
    """The calibration of a predictor.

    Attributes:
        vilu: Version that made it.
        predictor: Hash of the predictor, its weights and its calibrator; not of the vilu that loads it.
        n_candidates: Number of candidates that the rows had; None for pools.
        classes: Hash of their names; None where they have none.
        pool_size: Pairs of a pool; None for classes.
        source: Fingerprint of the calibration data.
        dataset: Their name.
        split: Name of their part.
        n: Calibration rows with an uncertainty and a known failure.
        rows_sha256: Of ``calibration.parquet``, the calibration rows as ``vilu.Outcomes``.
        promise: What the rule promises, in words.
        rule: Accepts or abstains; None when only probabilities were calibrated.
        label_sets: Sets of labels; None without.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["risk"] = "risk"
    vilu: str = vilu.__version__
    predictor: str
    n_candidates: int | None
    classes: str | None
    pool_size: int | None
    source: str
    dataset: str | None
    split: str | None
    n: int = Field(ge=0)
    rows_sha256: str
    promise: str | None
    rule: Annotated[Rule, Field(discriminator="kind")] | None
    label_sets: LabelSets | None = None

    def require_candidates(self, data: EmbeddingSource) -> None:
        """Refuse rows with other candidates: another problem, of which nothing was promised.

        Raises:
            ProvenanceError: Naming both sides.
        """
        mine, theirs = {name: getattr(self, name) for name in ("n_candidates", "classes", "pool_size")}, problem(data)
        if mine != theirs:
            raise ProvenanceError(
                f"the predictor was calibrated on rows with {_in_words(mine)}, and these have {_in_words(theirs)}: its "
                f"thresholds say nothing of them. {AGAIN} on rows like these, or remove {RISK}."
            )


def problem(data: EmbeddingSource) -> dict[str, Any]:
    """What a promise depends on beside the rows: how many candidates there are, and which."""
    names, pools = data.class_names, data.pool_size
    return {
        "n_candidates": data.n_candidates if pools is None else None,
        "classes": None if names is None else digest(list(names)),
        "pool_size": pools,
    }


def _in_words(found: dict[str, Any]) -> str:
    if found["pool_size"] is not None:
        return f"pools of {found['pool_size']}"
    return f"{found['n_candidates']} candidates (names {found['classes'] or 'unknown'})"


def save(folder: Path, rows: Outcomes, **fields: object) -> Record:
    """Write the calibration rows, and the record that vouches for them last.

    Raises:
        StorageError: If the file system refuses.
    """
    content = parquet_bytes(*rows.table())
    with atomic_write(folder / ROWS) as handle:
        handle.write(content)
    record = Record.model_validate({**fields, "rows_sha256": hashlib.sha256(content).hexdigest()})
    write_json(folder / RISK, record.model_dump(mode="json"))
    return record


def has_record(folder: Path) -> bool:
    """Whether a predictor's folder holds a calibration."""
    return (folder / RISK).is_file()


def load(folder: str | Path) -> Record:
    """The record in a predictor's folder, checked, and that it is of the predictor that lies there.

    Raises:
        DataError: If there is none, or it is damaged.
        ProvenanceError: If a newer vilu wrote it, or it was made for another predictor.
        StorageError: If it cannot be read.
    """
    path = Path(folder) / RISK
    found, fingerprint = _parse(path), fit_fingerprint(folder)
    if found.predictor != fingerprint:
        raise ProvenanceError(
            f"{path} was made for the predictor {found.predictor}, and {folder} holds {fingerprint}: its thresholds "
            f"say nothing here. {AGAIN}, or remove the file."
        )
    return found


def _parse(path: Path) -> Record:
    content = _read(path)
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}. {AGAIN}.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION and isinstance(version, int):
        raise ProvenanceError(f"{path} has schema version {version}, this vilu reads {SCHEMA_VERSION}. {AGAIN}.")
    try:
        return Record.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {explain(error)}. {AGAIN}.") from error


def load_rows(folder: str | Path, record: Record) -> Outcomes:
    """The calibration rows behind a record.

    Raises:
        DataError: If they are missing, or others than it names.
        StorageError: If they cannot be read.
    """
    path = Path(folder) / ROWS
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. {AGAIN}.") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    if found != record.rows_sha256:
        raise DataError(f"{path} does not hold the rows that {RISK} names. {AGAIN}.")
    return Outcomes.load(path)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise DataError(f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes, so it is no file of vilu.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} is not calibrated. Run `vilu calibrate` first.") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
