"""What a saved predictor says of itself: ``predictor.json``, beside its weights and a card."""

from __future__ import annotations

import dataclasses
import logging
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import torch as safetensors_torch
from torch import Tensor

from vilu.artifacts.disk import make_folder, or_refuse, write_bytes, write_text
from vilu.artifacts.documents import (
    MADE_WITH,
    MAX_DOCUMENT_BYTES,
    SCHEMA,
    SCHEMA_VERSION,
    explain,
    identity,
    parse_json,
    plain_json,
    read_json,
    without_version,
    write_json,
)
from vilu.artifacts.hashing import bytes_hash
from vilu.artifacts.paths import claim_folder, kind_and_inputs
from vilu.embeddings.checks import Identity
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, UsageError
from vilu.predictors.contract.parameters import Parametrised, parameters
from vilu.predictors.contract.probability import Calibrator
from vilu.predictors.contract.seen import RowSketch, Sketches
from vilu.predictors.persistence.card import Described, model_card
from vilu.predictors.persistence.files import (
    CARD,
    LOOKS,
    PREDICTOR,
    RISK,
    ROWS,
    SAMPLE,
    SAMPLE_KEY,
    VOCABULARY,
    VOCABULARY_KEY,
    WEIGHTS,
)

NOT_SAVED = {"device"}  # belongs to the machine, not to the predictor
SEEN_BY: dict[Identity, str] = {
    "pictures": "seen.pictures",
    "embeddings": "seen.embeddings",
    "names": "seen",
}
"""Tensors of the hashes of rows."""
FINGERPRINT = "fingerprint"  # the key of the digest of ``predictor.json``, and of the fingerprint
REFIT = "Run `vilu fit` again"
RECALIBRATE = "Run `vilu calibrate` again"

logger = logging.getLogger(__name__)


class SavedSample(Protocol):
    """A sample of the images of a fit: see ``FitSample``."""

    def save(self, folder: Path, weights_sha256: str) -> None:
        """Write it, bound to the weights of its fit."""


class Saved(Parametrised, Described, Protocol):
    """What is written of a predictor."""

    space_: EmbeddingSpace | None
    similarity_: tuple[float, float] | None
    seen_: Sketches
    notes_: dict[str, Any]
    calibrator_: Calibrator | None

    @property
    def sample_(self) -> SavedSample | None:
        """A sample of the images of the fit."""

    def state(self) -> dict[str, Tensor]:
        """Everything learned."""

    def take(self, tensors: dict[str, Tensor], space: EmbeddingSpace | None) -> None:
        """Hold what was learned."""


def save(predictor: Saved, folder: str | Path) -> str:
    """Write a predictor to a folder and return its fingerprint.

    Weights go first and ``predictor.json``, which holds their hash, last: a folder torn by a crash
    is refused. The card between them says nothing of a calibration: what lies in the folder was
    made for another fit (``write_card``), and goes with that fit. Files that are not a predictor's
    are never touched.

    Raises:
        UsageError: If the parameters are no longer those of the fit, so that the file could not be
            loaded.
    """
    try:
        dataclasses.replace(predictor).take(predictor.state(), predictor.space_)
    except DataError as error:
        raise UsageError(
            f"parameters were set after the fit that do not fit it: {error} Fit again."
        ) from error
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in predictor.state().items()}
    tensors |= seen_tensors(predictor)
    weights = safetensors_torch.save(tensors)
    description = describe(predictor)
    description["weights_sha256"] = bytes_hash(weights)
    path = Path(folder)
    same = fit_of(path / PREDICTOR) == _fit(parse_json(plain_json(description)))
    claim(path, same=same)
    make_folder(path)
    if not (same and "calibrator" in description):
        _drop_calibration(path)
    write_bytes(path / WEIGHTS, weights)
    _write_sample(path, predictor.sample_, description["weights_sha256"])
    fingerprint = identity(description)
    write_card(path, {**description, FINGERPRINT: fingerprint}, predictor, None)
    write_json(path / PREDICTOR, description, seal=FINGERPRINT)
    return fingerprint


def _write_sample(path: Path, sample: SavedSample | None, weights_sha256: str) -> None:
    """Put the sample of this fit there, or take away that of another one."""
    if sample is not None:
        sample.save(path, weights_sha256)
        return
    with or_refuse(f"remove the old sample in {path}"):
        (path / SAMPLE).unlink(missing_ok=True)


def claim(folder: str | Path, *, same: bool = False) -> None:
    """Refuse a folder with anything but a predictor.

    Where the ``same`` fit lies, only what stands in the way is refused.
    """
    names = {PREDICTOR, WEIGHTS, CARD, RISK, ROWS, LOOKS, VOCABULARY, SAMPLE}
    claim_folder(
        folder,
        "predictor",
        lambda path: is_ours(path) or (same and path.name not in names),
        overwrite=True,
    )


def _drop_calibration(path: Path) -> None:
    """Take away, and say so, what vouches for another predictor than the one to lie here."""
    stale = [name for name in (RISK, ROWS, LOOKS, VOCABULARY) if (path / name).exists()]
    with or_refuse(f"remove the old calibration in {path}"):
        for name in stale:
            (path / name).unlink()
    if RISK not in stale and ROWS not in stale:
        return
    logger.warning(
        "%s: the calibration of the predictor that lay here is gone with it: calibrate the new one",
        path,
    )


def _fit(description: dict[str, Any]) -> dict[str, Any]:
    return without_version(description, "calibrator", FINGERPRINT)


def fit_of(path: Path) -> dict[str, Any] | None:
    """What a ``predictor.json`` says but for its calibration.

    None where it is damaged or absent.
    """
    if not path.is_file():
        return None
    try:
        with or_refuse(f"read {path}"):
            return _fit(parse_json(path.read_bytes()))
    except (ValueError, RecursionError):
        return None


def is_ours(path: Path) -> bool:
    """Whether a file is one of a predictor's: by its name and what it says.

    Or it is damaged, and lies beside one that says it.
    """
    if not path.is_file():
        return False
    if _says_ours(path):
        return True
    if path.name not in {PREDICTOR, WEIGHTS, RISK, ROWS, LOOKS, VOCABULARY, SAMPLE}:
        return False
    for name in (PREDICTOR, WEIGHTS):
        beside = path.with_name(name)
        if beside.is_file() and _says_ours(beside):
            return True
    return False


def _says_ours(path: Path) -> bool:
    try:
        with or_refuse(f"read {path}"), path.open("rb") as handle:
            if path.name in {VOCABULARY, WEIGHTS, SAMPLE}:
                size = int.from_bytes(handle.read(8), "little")
                header = parse_json(handle.read(min(size, MAX_DOCUMENT_BYTES)))
                return _holds_ours(path.name, header)
            if path.name == CARD:
                return b'library_name: "vilu"' in handle.read(200)
            if path.name == PREDICTOR:
                content = parse_json(handle.read(MAX_DOCUMENT_BYTES))
                return {"method", "weights_sha256"} <= content.keys()
            kinds = {RISK: "risk", LOOKS: "looks"}
            if path.name in kinds:
                content = parse_json(handle.read(MAX_DOCUMENT_BYTES))
                return bool(content.get("kind") == kinds[path.name])
    except (ValueError, RecursionError):
        return False
    return path.name == ROWS and (kind_and_inputs(path) or [""])[0] == "scores"


def _holds_ours(name: str, header: dict[str, Any]) -> bool:
    """Whether a file of tensors is one of ours, by its header."""
    keys = {VOCABULARY: VOCABULARY_KEY, SAMPLE: SAMPLE_KEY}
    if name in keys:
        return keys[name] in dict(header.get("__metadata__") or {})
    known = {*SEEN_BY.values(), "__metadata__"}
    for key in header:
        if key not in known and not key.startswith("state."):
            return False
    return True


def describe(predictor: Saved) -> dict[str, Any]:
    """Everything about a predictor but its weights, as plain JSON."""
    values = {}
    for name in parameters(predictor):
        if name not in NOT_SAVED:
            values[name] = getattr(predictor, name)
    description = {
        SCHEMA: SCHEMA_VERSION,
        MADE_WITH: metadata.version("vilu"),
        "method": predictor.name,
        "parameters": values,
        "space": None if predictor.space_ is None else dataclasses.asdict(predictor.space_),
        "similarity": predictor.similarity_,
        "n_seen": max((sketch.n_rows for sketch in predictor.seen_.values()), default=None),
        "notes": predictor.notes_,
        **home_of(type(predictor)),
    }
    if predictor.seen_.keys() - {"names"}:
        description["seen_by"] = list(predictor.seen_)
    if predictor.calibrator_ is not None:
        description["calibrator"] = predictor.calibrator_.model_dump(mode="json")
    return description


def seen_tensors(predictor: Saved) -> dict[str, Tensor]:
    """The hashes of the rows of the fit, by the names under which they are saved."""
    return {SEEN_BY[by]: sketch.hashes for by, sketch in predictor.seen_.items()}


def take_seen(tensors: dict[str, Tensor], description: dict[str, Any], path: Path) -> Sketches:
    """The rows of the fit; their hashes are taken out of the saved tensors."""
    n_seen = description["n_seen"]
    sketches = {}
    for by, name in SEEN_BY.items():
        if name in tensors:
            sketches[by] = RowSketch(tensors.pop(name), n_seen)
    if sketches and not isinstance(n_seen, int):
        raise DataError(
            f"{path} is damaged: n_seen must be a number. Got {n_seen!r:.80}. Fit it again."
        )
    return sketches


def fit_fingerprint(folder: str | Path) -> str:
    """Hash of a saved fit with its weights and its calibrator, whichever vilu wrote it."""
    return str(read_description(Path(folder) / PREDICTOR)[FINGERPRINT])


def write_card(
    path: Path, description: dict[str, Any], predictor: Saved, risk: dict[str, Any] | None
) -> None:
    """The card, with the guarantee of a calibration."""
    write_text(path / CARD, model_card(description, predictor, risk))


class _Notes(BaseModel):
    """What is computed with of what a fit leaves."""

    n_train: int | None = Field(default=None, ge=0)
    n_failures: int | None = Field(default=None, ge=0)
    pool_size: int | None = Field(default=None, ge=1)


class _Home(BaseModel):
    distribution: str | None = None
    module: str


class _Description(BaseModel):
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


def read_description(path: Path) -> dict[str, Any]:
    """``predictor.json`` with its digest, its schema and the types of its values checked.

    In place of the digest, its key holds the fingerprint: the same without the version of vilu.
    """
    if not path.is_file():
        raise DataError(f"no predictor here: {path} does not exist. Make one with `vilu fit`.")
    description = read_json(path, REFIT, seal=FINGERPRINT)
    try:
        _Description.model_validate(description)
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {explain(error)}. {REFIT}.") from error
    return {**description, FINGERPRINT: identity(description, FINGERPRINT)}


def home_of(cls: type) -> dict[str, Any]:
    """Where a class from outside of this package is to be found."""
    package = cls.__module__.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return {}
    distribution = next(iter(metadata.packages_distributions().get(package, ())), None)
    return {"home": {"distribution": distribution, "module": cls.__module__}}
