"""The description of a saved predictor (``predictor.json``), and how predictors are saved."""

from __future__ import annotations

import dataclasses
import logging
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import torch as safetensors_torch
from torch import Tensor

from vilu.artifacts.disk import convert_os_errors, make_folder, write_bytes, write_text
from vilu.artifacts.documents import (
    MAX_DOCUMENT_BYTES,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    VERSION_KEY,
    content_digest,
    first_error,
    parse_json,
    plain_json,
    read_json,
    without_version,
    write_json,
)
from vilu.artifacts.hashing import bytes_hash
from vilu.artifacts.paths import claim_folder, kind_and_inputs
from vilu.embeddings.checks import IdentityKind
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, UsageError
from vilu.predictors.contract.parameters import Parametrised, parameters
from vilu.predictors.contract.probability import Calibrator
from vilu.predictors.contract.seen import RowSketch, Sketches
from vilu.predictors.persistence.card import DescribedPredictor, model_card
from vilu.predictors.persistence.files import (
    CARD,
    LIKELY,
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

UNSAVED_PARAMETERS = {"device"}  # parameters that depend on the machine
SKETCH_TENSOR_NAMES: dict[IdentityKind, str] = {
    "pictures": "seen.pictures",
    "embeddings": "seen.embeddings",
    "rows": "seen.rows",
    "names": "seen",
}
"""Maps an identity kind to the name of the tensor with the fitted rows' hashes."""
FINGERPRINT_KEY = "fingerprint"
"""Key of the digest of ``predictor.json`` in the file.

In the result of ``read_description`` this key has the predictor's fingerprint instead.
"""
REFIT_ADVICE = "Run `vilu fit` again"
RECALIBRATE_ADVICE = "Run `vilu calibrate` again"

logger = logging.getLogger(__name__)


class SavableSample(Protocol):
    """A sample of a fit's images (see ``FitSample``)."""

    def save(self, folder: Path, weights_sha256: str) -> None:
        """Write the sample to a folder, with the hash of the fit's weights."""


class SavablePredictor(Parametrised, DescribedPredictor, Protocol):
    """A predictor that can be saved, with the attributes and methods needed for saving."""

    space_: EmbeddingSpace | None
    similarity_: tuple[float, float] | None
    seen_: Sketches
    notes_: dict[str, Any]
    calibrator_: Calibrator | None

    @property
    def sample_(self) -> SavableSample | None:
        """A sample of the fit's images, or None without a sample."""

    def state(self) -> dict[str, Tensor]:
        """Return everything learned by the fit."""

    def take(self, tensors: dict[str, Tensor], space: EmbeddingSpace | None) -> None:
        """Store learned tensors. Refuse tensors with wrong names, types or shapes."""


def save(predictor: SavablePredictor, folder: str | Path) -> str:
    """Write a predictor to a folder and return its fingerprint.

    The weights are written first. ``predictor.json`` has the hash of the weights and is written
    last. So a folder that is incomplete after a crash is recognised and refused.

    A calibration in the folder belongs to the replaced predictor. The calibration is removed,
    unless the same fit is saved again. The new card reports no guarantee. Files that do not belong
    to a predictor are never changed.

    Raises:
        UsageError: If parameters were changed after the fit, so that the file could not be loaded.
    """
    # a new predictor with the same parameters refuses tensors with wrong names, types or shapes
    unfitted_predictor = dataclasses.replace(predictor)
    try:
        unfitted_predictor.take(predictor.state(), predictor.space_)
    except DataError as error:
        raise UsageError(
            f"parameters were changed after the fit and no longer match it: {error} Fit again."
        ) from error
    state = predictor.state()
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in state.items()}
    tensors |= sketch_tensors(predictor)
    weights = safetensors_torch.save(tensors)
    description = describe(predictor)
    description["weights_sha256"] = bytes_hash(weights)
    path = Path(folder)
    is_same_fit = _has_same_fit(path, description)
    refuse_foreign_files(path, is_same_fit=is_same_fit)
    make_folder(path)
    keeps_calibration = is_same_fit and "calibrator" in description
    if not keeps_calibration:
        _drop_calibration(path)
    write_bytes(path / WEIGHTS, weights)
    _write_sample(path, predictor.sample_, description["weights_sha256"])
    fingerprint = content_digest(description)
    write_card(path, {**description, FINGERPRINT_KEY: fingerprint}, predictor, risk=None)
    write_json(path / PREDICTOR, description, digest_key=FINGERPRINT_KEY)
    return fingerprint


def _has_same_fit(path: Path, description: dict[str, Any]) -> bool:
    """Return whether the folder has a predictor with this fit. Calibrations may differ."""
    # JSON has no tuples, so the description in the folder has lists instead. The new description is
    # converted in the same way, to compare both descriptions.
    document = plain_json(description)
    new_description = parse_json(document)
    fit_description = _without_calibration(new_description)
    return read_fit_description(path / PREDICTOR) == fit_description


def _write_sample(path: Path, sample: SavableSample | None, weights_sha256: str) -> None:
    """Write this fit's sample. Without a sample, remove an earlier fit's sample."""
    if sample is not None:
        sample.save(path, weights_sha256)
        return
    with convert_os_errors(f"cannot remove the old sample in {path}"):
        (path / SAMPLE).unlink(missing_ok=True)


def refuse_foreign_files(folder: str | Path, *, is_same_fit: bool = False) -> None:
    """Refuse a folder with files that do not belong to a predictor.

    If the folder already has the same fit, user files are allowed, too, unless a user file has a
    name that a predictor file can have.
    """
    names = {PREDICTOR, WEIGHTS, CARD, RISK, ROWS, LOOKS, LIKELY, VOCABULARY, SAMPLE}

    def is_allowed(path: Path) -> bool:
        is_file_of_user = path.name not in names
        return is_predictor_file(path) or (is_same_fit and is_file_of_user)

    claim_folder(folder, "predictor", is_allowed, overwrite=True)


def _drop_calibration(path: Path) -> None:
    """Remove the calibration of the replaced predictor, with a warning."""
    names = (RISK, ROWS, LOOKS, LIKELY, VOCABULARY)
    stale_names = [name for name in names if (path / name).exists()]
    with convert_os_errors(f"cannot remove the old calibration in {path}"):
        for name in stale_names:
            (path / name).unlink()
    had_calibration = RISK in stale_names or ROWS in stale_names
    if not had_calibration:
        return
    logger.warning(
        "%s: the predictor here was replaced, and its calibration was removed: "
        "calibrate the new predictor",
        path,
    )


def _without_calibration(description: dict[str, Any]) -> dict[str, Any]:
    """Remove the calibrator, the fingerprint and vilu's version from a description."""
    return without_version(description, "calibrator", FINGERPRINT_KEY)


def read_fit_description(path: Path) -> dict[str, Any] | None:
    """Read ``predictor.json`` without the calibration. Return None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with convert_os_errors(f"cannot read {path}"):
            document = path.read_bytes()
            description = parse_json(document)
            return _without_calibration(description)
    except (ValueError, RecursionError):
        return None


def is_predictor_file(path: Path) -> bool:
    """Return whether a file belongs to a saved predictor.

    A file belongs to a predictor if both the name and the content are right. A damaged file with a
    right name belongs to a predictor if the description or the weights in the same folder belong to
    a predictor.
    """
    if not path.is_file():
        return False
    if _has_predictor_content(path):
        return True
    if path.name not in {PREDICTOR, WEIGHTS, RISK, ROWS, LOOKS, LIKELY, VOCABULARY, SAMPLE}:
        return False
    for name in (PREDICTOR, WEIGHTS):
        sibling = path.with_name(name)
        if sibling.is_file() and _has_predictor_content(sibling):
            return True
    return False


def _has_predictor_content(path: Path) -> bool:
    """Return whether a file has the content that a predictor file with this name must have."""
    try:
        with convert_os_errors(f"cannot read {path}"), path.open("rb") as handle:
            if path.name in {VOCABULARY, WEIGHTS, SAMPLE}:
                # a safetensors file begins with the size of the header, then the header as JSON
                size_bytes = handle.read(8)
                header_size = int.from_bytes(size_bytes, "little")
                document = handle.read(min(header_size, MAX_DOCUMENT_BYTES))
                header = parse_json(document)
                return _has_predictor_header(path.name, header)
            if path.name == CARD:
                # this line is in the YAML header, at the beginning of the card
                return b'library_name: "vilu"' in handle.read(200)
            if path.name == PREDICTOR:
                document = handle.read(MAX_DOCUMENT_BYTES)
                content = parse_json(document)
                return {"method", "weights_sha256"} <= content.keys()
            kinds = {RISK: "risk", LOOKS: "looks", LIKELY: "likely"}
            if path.name in kinds:
                document = handle.read(MAX_DOCUMENT_BYTES)
                content = parse_json(document)
                return bool(content.get("kind") == kinds[path.name])
    except (ValueError, RecursionError):
        return False
    if path.name != ROWS:
        return False
    stated_kind = kind_and_inputs(path)  # calibration rows are a table with scores
    return stated_kind is not None and stated_kind.kind == "scores"


def _has_predictor_header(name: str, header: dict[str, Any]) -> bool:
    """Return whether a tensor file belongs to a saved predictor, by its name and header."""
    metadata_keys = {VOCABULARY: VOCABULARY_KEY, SAMPLE: SAMPLE_KEY}
    if name in metadata_keys:
        file_metadata = dict(header.get("__metadata__") or {})  # empty without metadata
        return metadata_keys[name] in file_metadata
    known_keys = {*SKETCH_TENSOR_NAMES.values(), "__metadata__"}
    for key in header:
        if key not in known_keys and not key.startswith("state."):
            return False
    return True


def describe(predictor: SavablePredictor) -> dict[str, Any]:
    """Describe a predictor as plain JSON: everything except the tensors."""
    parameter_values = {}
    for name in parameters(predictor):
        if name not in UNSAVED_PARAMETERS:
            parameter_values[name] = getattr(predictor, name)
    space = None
    if predictor.space_ is not None:
        space = dataclasses.asdict(predictor.space_)
    numbers_of_rows = [sketch.n_rows for sketch in predictor.seen_.values()]
    description = {
        SCHEMA_KEY: SCHEMA_VERSION,
        VERSION_KEY: metadata.version("vilu"),
        "method": predictor.name,
        "parameters": parameter_values,
        "space": space,
        "similarity": predictor.similarity_,
        "n_seen": max(numbers_of_rows, default=None),
        "notes": predictor.notes_,
        **home_of(type(predictor)),
    }
    # the kinds are listed only if rows are recognised by more than identifiers ("names")
    if predictor.seen_.keys() - {"names"}:
        description["seen_by"] = list(predictor.seen_)
    if predictor.calibrator_ is not None:
        description["calibrator"] = predictor.calibrator_.model_dump(mode="json")
    return description


def sketch_tensors(predictor: SavablePredictor) -> dict[str, Tensor]:
    """Return the tensors with the fitted rows' hashes, by name in the file."""
    return {SKETCH_TENSOR_NAMES[kind]: sketch.hashes for kind, sketch in predictor.seen_.items()}


def pop_sketches(tensors: dict[str, Tensor], description: dict[str, Any], path: Path) -> Sketches:
    """Make the fitted rows' sketches, and remove the row hashes from ``tensors``.

    ``description`` is the content of the file at ``path``, with the fit's row count.
    """
    n_seen = description["n_seen"]
    sketches = {}
    for kind, name in SKETCH_TENSOR_NAMES.items():
        if name in tensors:
            row_hashes = tensors.pop(name)
            sketches[kind] = RowSketch(row_hashes, n_seen)
    if sketches and not isinstance(n_seen, int):
        raise DataError(
            f"{path} is damaged: n_seen must be a number. Got {n_seen!r:.80}. Fit it again."
        )
    return sketches


def fit_fingerprint(folder: str | Path) -> str:
    """Read the hash of everything in a saved predictor, except vilu's version."""
    path = Path(folder)
    description = read_description(path / PREDICTOR)
    return str(description[FINGERPRINT_KEY])


def write_card(
    path: Path,
    description: dict[str, Any],
    predictor: SavablePredictor,
    risk: dict[str, Any] | None,
) -> None:
    """Write the card. ``risk`` is the content of ``risk.json``, or None without a calibration."""
    card = model_card(description, predictor, risk)
    write_text(path / CARD, card)


class _Notes(BaseModel):
    """Those notes of a fit that are used in computations. All other notes are for people."""

    n_train: int | None = Field(default=None, ge=0)
    n_failures: int | None = Field(default=None, ge=0)
    pool_size: int | None = Field(default=None, ge=1)


class _Home(BaseModel):
    """The origin of a method's class outside vilu."""

    distribution: str | None = None
    module: str


class _Description(BaseModel):
    """Keys and types in ``predictor.json``. Other keys are allowed."""

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
    """Read ``predictor.json`` and check the digest, the schema and the value types.

    In the result, the value at the digest's key is replaced by the fingerprint. The fingerprint is
    a digest that does not depend on vilu's version.
    """
    if not path.is_file():
        raise DataError(f"no predictor here: {path} does not exist. Make one with `vilu fit`.")
    description = read_json(path, REFIT_ADVICE, digest_key=FINGERPRINT_KEY)
    try:
        _Description.model_validate(description)
    except ValidationError as error:
        problem = first_error(error)
        raise DataError(f"{path} is damaged: {problem}. {REFIT_ADVICE}.") from error
    return {**description, FINGERPRINT_KEY: content_digest(description, FINGERPRINT_KEY)}


def home_of(cls: type) -> dict[str, Any]:
    """Return a class's package and module, for the description. Return {} for a vilu class."""
    package = cls.__module__.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return {}
    distributions_of_packages = metadata.packages_distributions()
    distributions = distributions_of_packages.get(package, ())
    # None for a package that was not installed, such as a module in the working directory
    distribution = next(iter(distributions), None)
    return {"home": {"distribution": distribution, "module": cls.__module__}}
