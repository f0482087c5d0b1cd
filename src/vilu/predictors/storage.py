"""Saved predictors: a folder of ``weights.safetensors``, ``predictor.json`` and a card, nothing that can execute."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

import vilu
from vilu.embeddings.space import EmbeddingSpace, digest
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.files import atomic_write, make_folder, write_json
from vilu.predictors import PREDICTORS
from vilu.predictors.base import FailurePredictor
from vilu.predictors.card import Method, model_card
from vilu.predictors.parameters import build, parameters
from vilu.predictors.probability import read_calibrator
from vilu.predictors.rows import RowSketch

SCHEMA = 1
MAX_JSON_BYTES = 64 << 20
PREDICTOR, WEIGHTS, CARD, RISK = "predictor.json", "weights.safetensors", "README.md", "risk.json"
NOT_SAVED = {"device"}  # belongs to the machine, not to the predictor
SEEN = "seen"


def save(predictor: FailurePredictor, folder: str | Path) -> str:
    """Write a predictor to a folder and return its fingerprint.

    Weights go first and ``predictor.json``, which holds their hash, last: a folder torn by a crash is refused. The card
    between them says nothing of a calibration: what lies in the folder was made for another fit (``write_card``).

    Raises:
        NotFittedError: If it needs ``fit`` first.
        StorageError: If the file system refuses.
    """
    predictor.require_fitted()
    path = make_folder(folder)
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in predictor.state().items()}
    if predictor.seen_ is not None:
        tensors[SEEN] = predictor.seen_.hashes
    weights = safetensors_torch.save(tensors)
    with atomic_write(path / WEIGHTS) as handle:
        handle.write(weights)
    record = describe(predictor)
    record["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    record["fingerprint"] = digest(record)
    _write_card(path, record, predictor, None)
    write_json(path / PREDICTOR, record)
    return str(record["fingerprint"])


def describe(predictor: FailurePredictor) -> dict[str, Any]:
    """Everything about a predictor but its weights, as plain JSON."""
    values = {name: getattr(predictor, name) for name in parameters(predictor) if name not in NOT_SAVED}
    return {
        "schema": SCHEMA,
        "vilu": vilu.__version__,
        "method": predictor.name,
        "parameters": values,
        "space": None if predictor.space_ is None else dataclasses.asdict(predictor.space_),
        "similarity": predictor.similarity_,
        "n_seen": predictor.seen_.n_rows if predictor.seen_ else None,
        "notes": predictor.notes_,
        **({} if predictor.calibrator_ is None else {"calibrator": predictor.calibrator_.model_dump(mode="json")}),
    }


def load(folder: str | Path) -> FailurePredictor:
    """Read a predictor back; its scores equal those of the saved one bit for bit.

    Raises:
        DataError: If the folder holds no predictor, or a damaged one.
        ProvenanceError: If it was written by a newer schema.
    """
    path = Path(folder)
    record = read_record(path / PREDICTOR)
    weights = read_bytes(path / WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != record["weights_sha256"]:
        raise DataError(f"{path / 'weights.safetensors'} is not the file that predictor.json names. Save it again.")
    try:
        tensors = safetensors_torch.load(weights)
    except SafetensorError as error:
        raise DataError(f"{path / 'weights.safetensors'} is not a safetensors file: {error}.") from error
    predictor = build(PREDICTORS[record["method"]], record["parameters"])
    predictor.space_ = EmbeddingSpace(**record["space"]) if record["space"] else None
    predictor.similarity_ = tuple(record["similarity"]) if record["similarity"] else None
    predictor.seen_ = RowSketch(tensors.pop(SEEN), record["n_seen"]) if SEEN in tensors else None
    predictor.notes_ = record["notes"]
    predictor.calibrator_ = read_calibrator(record["calibrator"]) if "calibrator" in record else None
    predictor.restore({name.removeprefix("state."): tensor for name, tensor in tensors.items()})
    return predictor


def fit_fingerprint(folder: str | Path) -> str:
    """Hash of a saved fit with its weights and its calibrator, whichever vilu wrote it.

    Raises:
        DataError: If the folder holds no predictor.
    """
    record = read_record(Path(folder) / PREDICTOR)
    return digest({key: value for key, value in record.items() if key not in {"fingerprint", "vilu"}})


def write_card(folder: str | Path) -> None:
    """Write the card of a saved predictor again, with the guarantee of ``risk.json`` where that lies beside it.

    Raises:
        DataError: If the folder holds no predictor, or ``risk.json`` is not a JSON object.
        StorageError: If the file system refuses.
    """
    path = Path(folder)
    predictor, risk = load(path), None
    if (path / RISK).exists():
        risk = _read_object(path / RISK)
    _write_card(path, read_record(path / PREDICTOR), predictor, risk)


def _write_card(path: Path, record: dict[str, Any], predictor: FailurePredictor, risk: dict[str, Any] | None) -> None:
    method = Method(
        summary=predictor.summary,
        reference=predictor.reference,
        is_probability=predictor.is_probability,
        closed_set=predictor.closed_set,
        needs_fit=predictor.needs_fit,
        columns=predictor.columns_to_score,
    )
    with atomic_write(path / CARD) as handle:
        handle.write(model_card(record, method, risk).encode())


def read_record(path: Path) -> dict[str, Any]:
    """``predictor.json``, checked for schema, method and keys."""
    record = _read_object(path)
    if not isinstance(record.get("schema"), int):
        raise DataError(f"{path} does not describe a predictor.")
    if record["schema"] > SCHEMA:
        raise ProvenanceError(f"{path} has schema {record['schema']}; this vilu reads up to {SCHEMA}. Update vilu.")
    missing = {"method", "parameters", "space", "similarity", "n_seen", "notes", "weights_sha256"} - record.keys()
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}.")
    if record["method"] not in PREDICTORS:
        raise DataError(f"{path} is for the method {record['method']!r}. Known: {', '.join(PREDICTORS)}.")
    return record


def _read_object(path: Path) -> dict[str, Any]:
    content = read_bytes(path, MAX_JSON_BYTES)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} does not describe a predictor: it is no JSON object.")
    return found


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """A file of a predictor's folder."""
    try:
        if limit is not None and path.stat().st_size > limit:
            raise DataError(f"{path} has {path.stat().st_size} bytes; at most {limit} were expected.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no predictor here: {path} does not exist. Make one with `vilu fit`.") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
