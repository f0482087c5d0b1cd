"""Saved predictors read back: a folder of ``weights.safetensors`` and ``predictor.json``, nothing that can execute."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from vilu.device import as_usual
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, checked
from vilu.predictors import record
from vilu.predictors.base import FailurePredictor
from vilu.predictors.catalogue import find_method, method_names
from vilu.predictors.parameters import build
from vilu.predictors.probability import read_calibrator
from vilu.predictors.record import PREDICTOR, RISK, SEEN, WEIGHTS, read_bytes, read_object, read_record
from vilu.predictors.rows import RowSketch


@checked
@as_usual()
def load(folder: str | Path) -> FailurePredictor:
    """Read a predictor back; its scores equal those of the saved one bit for bit.

    Raises:
        DataError: If the folder holds no predictor, or a damaged one.
        ProvenanceError: If it was written by a newer schema.
    """
    path = Path(folder)
    found = read_record(path / PREDICTOR)
    weights = read_bytes(path / WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != found["weights_sha256"]:
        raise DataError(f"{path / 'weights.safetensors'} is not the file that predictor.json names. Save it again.")
    try:
        tensors = safetensors_torch.load(weights)
    except SafetensorError as error:
        raise DataError(f"{path / 'weights.safetensors'} is not a safetensors file: {error}.") from error
    predictor = build(method_of(found, path / PREDICTOR), found["parameters"])
    predictor.space_ = EmbeddingSpace(**found["space"]) if found["space"] else None
    predictor.similarity_ = tuple(found["similarity"]) if found["similarity"] else None
    predictor.seen_ = RowSketch(tensors.pop(SEEN), found["n_seen"]) if SEEN in tensors else None
    predictor.notes_ = found["notes"]
    predictor.calibrator_ = read_calibrator(found["calibrator"]) if "calibrator" in found else None
    predictor.restore({name.removeprefix("state."): tensor for name, tensor in tensors.items()})
    return predictor


def method_of(found: dict[str, Any], path: Path) -> type[FailurePredictor]:
    """The class of a saved predictor; where one from outside is missing, what to do is said."""
    name, home = found["method"], found.get("home")
    if name in method_names():
        return find_method(name)
    if not isinstance(home, dict):
        raise DataError(f"{path} is for the method {name!r}. Known: {', '.join(method_names())}.")
    install = f"Install {home['distribution']}, or give" if home.get("distribution") else "Give"
    module = home.get("module")
    raise DataError(f"{path} is for the method {name!r} of {module}, which is not here. {install} --plugin {module}.")


def write_card(folder: str | Path) -> None:
    """Write the card of a saved predictor again, with the guarantee of ``risk.json`` where that lies beside it."""
    path = Path(folder)
    risk = read_object(path / RISK) if (path / RISK).exists() else None
    record.write_card(path, read_record(path / PREDICTOR), load(path), risk)
