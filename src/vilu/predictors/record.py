"""What a saved predictor says of itself: ``predictor.json``, beside its weights and a card; written and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from safetensors import torch as safetensors_torch
from torch import Tensor

from vilu.embeddings.checks import Identity
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.files.disk import atomic_write, make_folder
from vilu.files.documents import digest, write_json
from vilu.predictors.card import Described, model_card
from vilu.predictors.parameters import Parametrised, parameters
from vilu.predictors.probability import Calibrator
from vilu.predictors.rows import RowSketch, Sketches

SCHEMA = 1
MAX_JSON_BYTES = 64 << 20
PREDICTOR, WEIGHTS, CARD, RISK = "predictor.json", "weights.safetensors", "README.md", "risk.json"
NOT_SAVED = {"device"}  # belongs to the machine, not to the predictor
SEEN_BY: dict[Identity, str] = {"pictures": "seen.pictures", "embeddings": "seen.embeddings", "names": "seen"}
"""Tensors of the hashes of rows; older predictors know names alone."""


class Saved(Parametrised, Described, Protocol):
    """What is written of a predictor."""

    space_: EmbeddingSpace | None
    similarity_: tuple[float, float] | None
    seen_: Sketches
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
    tensors |= seen_tensors(predictor)
    weights = safetensors_torch.save(tensors)
    with atomic_write(path / WEIGHTS) as handle:
        handle.write(weights)
    record = describe(predictor)
    record["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    record["fingerprint"] = digest(record)
    write_card(path, record, predictor, None)
    write_json(path / PREDICTOR, record)
    return str(record["fingerprint"])


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
        "n_seen": max((sketch.n_rows for sketch in predictor.seen_.values()), default=None),
        **({"seen_by": list(predictor.seen_)} if predictor.seen_.keys() - {"names"} else {}),
        "notes": predictor.notes_,
        **home_of(type(predictor)),
        **({} if predictor.calibrator_ is None else {"calibrator": predictor.calibrator_.model_dump(mode="json")}),
    }


def seen_tensors(predictor: Saved) -> dict[str, Tensor]:
    """The hashes of the rows of the fit, by the names under which they are saved."""
    return {SEEN_BY[by]: sketch.hashes for by, sketch in predictor.seen_.items()}


def take_seen(tensors: dict[str, Tensor], found: dict[str, Any], path: Path) -> Sketches:
    """The rows of the fit; their hashes are taken out of the saved tensors."""
    hashes = {by: tensors.pop(name) for by, name in SEEN_BY.items() if name in tensors}
    if hashes and not isinstance(found["n_seen"], int):
        raise DataError(f"{path} is damaged: n_seen must be a number. Got {found['n_seen']!r:.80}. Fit it again.")
    return {by: RowSketch(of, found["n_seen"]) for by, of in hashes.items()}


def fit_fingerprint(folder: str | Path) -> str:
    """Hash of a saved fit with its weights and its calibrator, whichever vilu wrote it."""
    record = read_record(Path(folder) / PREDICTOR)
    return digest({key: value for key, value in record.items() if key not in {"fingerprint", "vilu"}})


def write_card(path: Path, record: dict[str, Any], predictor: Saved, risk: dict[str, Any] | None) -> None:
    """The card, with the guarantee of a calibration."""
    with atomic_write(path / CARD) as handle:
        handle.write(model_card(record, predictor, risk).encode())


def read_record(path: Path) -> dict[str, Any]:
    """``predictor.json``, checked for schema and keys."""
    record = read_object(path)
    if not isinstance(record.get("schema"), int):
        raise DataError(f"{path} does not describe a predictor.")
    if record["schema"] > SCHEMA:
        raise ProvenanceError(f"{path} has schema {record['schema']}; this vilu reads up to {SCHEMA}. Update vilu.")
    missing = {"method", "parameters", "space", "similarity", "n_seen", "notes", "weights_sha256"} - record.keys()
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}.")
    return record


def home_of(cls: type) -> dict[str, Any]:
    """Where a class from outside of this package is to be found."""
    package = cls.__module__.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return {}
    distribution = next(iter(metadata.packages_distributions().get(package, ())), None)
    return {"home": {"distribution": distribution, "module": cls.__module__}}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
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
