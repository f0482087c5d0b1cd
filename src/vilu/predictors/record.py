"""What a saved predictor says of itself: ``predictor.json``, beside its weights and a card; written and checked."""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import torch as safetensors_torch
from torch import Tensor

from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.files.disk import atomic_write, make_folder
from vilu.files.documents import digest, explain, read_json, write_json
from vilu.predictors.card import Described, model_card
from vilu.predictors.parameters import Parametrised, parameters
from vilu.predictors.probability import Calibrator
from vilu.predictors.rows import RowSketch

SCHEMA = 1
PREDICTOR, WEIGHTS, CARD, RISK = "predictor.json", "weights.safetensors", "README.md", "risk.json"
ROWS = "calibration.parquet"
NOT_SAVED = {"device"}  # belongs to the machine, not to the predictor
SEEN = "seen"
FINGERPRINT = "fingerprint"
"""The key of the digest of ``predictor.json``."""
REFIT, RECALIBRATE = "Run `vilu fit` again", "Run `vilu calibrate` again"


class Saved(Parametrised, Described, Protocol):
    """What is written of a predictor."""

    space_: EmbeddingSpace | None
    similarity_: tuple[float, float] | None
    seen_: RowSketch | None
    notes_: dict[str, Any]
    calibrator_: Calibrator | None

    def state(self) -> dict[str, Tensor]:
        """Everything learned."""


def save(predictor: Saved, folder: str | Path) -> str:
    """Write a predictor to a folder and return its fingerprint.

    Weights go first and ``predictor.json``, which holds their hash, last: a folder torn by a crash is refused. The card
    between them says nothing of a calibration: what lies in the folder was made for another fit (``write_card``).
    """
    path = make_folder(folder)
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in predictor.state().items()}
    if predictor.seen_ is not None:
        tensors[SEEN] = predictor.seen_.hashes
    weights = safetensors_torch.save(tensors)
    with atomic_write(path / WEIGHTS) as handle:
        handle.write(weights)
    record = describe(predictor)
    record["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    write_card(path, {**record, FINGERPRINT: digest(record)}, predictor, None)
    return write_json(path / PREDICTOR, record, seal=FINGERPRINT)


def describe(predictor: Saved) -> dict[str, Any]:
    """Everything about a predictor but its weights, as plain JSON."""
    values = {name: getattr(predictor, name) for name in parameters(predictor) if name not in NOT_SAVED}
    return {
        "schema": SCHEMA,
        "vilu": metadata.version("vilu"),
        "method": predictor.name,
        "parameters": values,
        "space": None if predictor.space_ is None else dataclasses.asdict(predictor.space_),
        "similarity": predictor.similarity_,
        "n_seen": predictor.seen_.n_rows if predictor.seen_ else None,
        "notes": predictor.notes_,
        **home_of(type(predictor)),
        **({} if predictor.calibrator_ is None else {"calibrator": predictor.calibrator_.model_dump(mode="json")}),
    }


def fit_fingerprint(folder: str | Path) -> str:
    """Hash of a saved fit with its weights and its calibrator, whichever vilu wrote it."""
    record = read_record(Path(folder) / PREDICTOR)
    return digest({key: value for key, value in record.items() if key not in {FINGERPRINT, "vilu"}})


def write_card(path: Path, record: dict[str, Any], predictor: Saved, risk: dict[str, Any] | None) -> None:
    """The card, with the guarantee of a calibration."""
    with atomic_write(path / CARD) as handle:
        handle.write(model_card(record, predictor, risk).encode())


class _Notes(BaseModel):
    """What is computed with of what a fit leaves."""

    n_train: int | None = Field(default=None, ge=0)
    n_failures: int | None = Field(default=None, ge=0)
    pool_size: int | None = Field(default=None, ge=1)


class _Home(BaseModel):
    distribution: str | None = None
    module: str


class _Said(BaseModel):
    """What ``predictor.json`` has to say."""

    model_config = ConfigDict(strict=True)

    vilu: str
    method: str
    parameters: dict[str, Any]
    space: dict[str, Any] | None
    similarity: list[float] | None = Field(min_length=2, max_length=2)
    n_seen: int | None = Field(ge=0)
    notes: _Notes
    weights_sha256: str
    home: _Home | None = None
    calibrator: dict[str, Any] | None = None


def read_record(path: Path) -> dict[str, Any]:
    """``predictor.json``: its fingerprint, which is its digest, its schema, and the types of what it says."""
    if not path.is_file():
        raise DataError(f"no predictor here: {path} does not exist. Make one with `vilu fit`.")
    record = read_json(path, REFIT, seal=FINGERPRINT, always=True)
    if type(record.get("schema")) is not int:
        raise DataError(f"{path} does not describe a predictor: it has no schema. {REFIT}.")
    if record["schema"] > SCHEMA:
        raise ProvenanceError(f"{path} has schema {record['schema']}; this vilu reads up to {SCHEMA}. Update vilu.")
    try:
        _Said.model_validate(record)
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {explain(error)}. {REFIT}.") from error
    return {**record, FINGERPRINT: digest(record)}


def home_of(cls: type) -> dict[str, Any]:
    """Where a class from outside of this package is to be found."""
    package = cls.__module__.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return {}
    distribution = next(iter(metadata.packages_distributions().get(package, ())), None)
    return {"home": {"distribution": distribution, "module": cls.__module__}}


def read_bytes(path: Path) -> bytes:
    """A file of a predictor's folder."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"the predictor is not complete: {path} does not exist. {REFIT}.") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
