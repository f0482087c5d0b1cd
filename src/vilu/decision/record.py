"""``risk.json``: what was promised, on which rows, for which predictor; it lies beside ``predictor.json``."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vilu.decision.calibrate import Selector
from vilu.decision.label_sets import LabelSets
from vilu.decision.selection import BatchSelector
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError, ProvenanceError
from vilu.files.disk import atomic_write, file_hash
from vilu.files.documents import Document, digest, read_document
from vilu.files.tables import parquet_bytes
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.record import fit_fingerprint
from vilu.predictors.rows import candidates_of, same_candidates

RISK, ROWS = "risk.json", "calibration.parquet"
AGAIN = "Run `vilu calibrate` again"

Rule = Selector | BatchSelector


class Record(Document):
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
        texts: Sketch of the candidates' texts (``candidates_of``); None for pools, and in records of older code.
    """

    again = AGAIN
    fault = DataError
    later = frozenset({"texts"})

    kind: Literal["risk"] = "risk"
    vilu: str = version("vilu")
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
    texts: tuple[float, ...] | None = None

    def require_candidates(self, data: EmbeddingSource) -> None:
        """Refuse rows with other candidates: another problem, of which nothing was promised."""
        mine, theirs = {name: getattr(self, name) for name in ("n_candidates", "classes", "pool_size")}, problem(data)
        apart = mine != theirs and _in_words(theirs)
        if not apart and not same_candidates(vars(self), candidates_of(data)):
            apart = "the same names in other prompts"
        if apart:
            raise ProvenanceError(
                f"the predictor was calibrated on rows with {_in_words(mine)}, and these have {apart}: its "
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
    """Write the calibration rows, and the record that vouches for them last."""
    content = parquet_bytes(*rows.table())
    with atomic_write(folder / ROWS) as handle:
        handle.write(content)
    record = Record.model_validate({**fields, "rows_sha256": hashlib.sha256(content).hexdigest()})
    record.write(folder / RISK)
    return record


def has_record(folder: Path) -> bool:
    """Whether a predictor's folder holds a calibration."""
    return (folder / RISK).is_file()


def load(folder: str | Path) -> Record:
    """The record in a predictor's folder, checked, and that it is of the predictor that lies there."""
    path = Path(folder) / RISK
    if not path.is_file():
        raise DataError(f"{folder} is not calibrated. Run `vilu calibrate` first.")
    found, fingerprint = read_document(path, Record), fit_fingerprint(folder)
    if found.predictor != fingerprint:
        raise ProvenanceError(
            f"{path} was made for the predictor {found.predictor}, and {folder} holds {fingerprint}: its thresholds "
            f"say nothing here. {AGAIN}, or remove the file."
        )
    return found


def load_rows(folder: str | Path, record: Record) -> Outcomes:
    """The calibration rows behind a record; DataError if they are missing, or others than it names."""
    path = Path(folder) / ROWS
    if not path.is_file():
        raise DataError(f"{path} is missing. {AGAIN}.")
    if file_hash(path) != record.rows_sha256:
        raise DataError(f"{path} does not hold the rows that {RISK} names. {AGAIN}.")
    return Outcomes.load(path)
