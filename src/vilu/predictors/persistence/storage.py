"""How saved predictors are loaded.

A saved predictor is a folder with ``weights.safetensors`` and ``predictor.json``. Loading executes
no code from these files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from vilu.artifacts.disk import convert_os_errors
from vilu.artifacts.documents import read_json
from vilu.artifacts.hashing import bytes_hash
from vilu.artifacts.paths import claim_folder, inputs_digest
from vilu.device import torch_defaults
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ViLUError
from vilu.predictors.contract.catalogue import PREDICTORS, find_method, method_names
from vilu.predictors.contract.parameters import build_predictor
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.probability import read_calibrator
from vilu.predictors.persistence import description
from vilu.predictors.persistence.description import (
    RECALIBRATE_ADVICE,
    REFIT_ADVICE,
    pop_sketches,
    read_description,
)
from vilu.predictors.persistence.files import PREDICTOR, RISK, WEIGHTS
from vilu.predictors.persistence.fit_sample import FitSample
from vilu.registry import refuse_name_of_bench
from vilu.validation import checked

logger = logging.getLogger(__name__)


@checked
@torch_defaults()
def load_predictor(folder: str | Path) -> FailurePredictor:
    """Load a predictor, with the same scores as the saved predictor, bit for bit.

    Raises:
        DataError: If the folder holds no predictor, or a damaged predictor.
        ProvenanceError: If the predictor has the schema of another vilu version.

    Examples:
        >>> import tempfile, numpy as np, vilu
        >>> image = np.tile([1.0, 0.0], (40, 1))  # 40 equal images, whose answer is class 0
        >>> target = [0, 0, 0, 1] * 10  # one of four answers is wrong
        >>> data = vilu.Embeddings(image, np.eye(2), target=target)
        >>> folder = tempfile.mkdtemp()
        >>> fingerprint = vilu.PREDICTORS["mcm_ts"]().fit(data).save(folder)
        >>> from vilu.predictors.persistence.storage import load_predictor
        >>> load_predictor(folder).predict_uncertainty(data)[:2].round(2)
        array([0.25, 0.25])
    """
    path = Path(folder)
    saved_description = read_description(path / PREDICTOR)
    weight_bytes = _read_weights(path / WEIGHTS, saved_description["weights_sha256"])
    method_class = saved_method_class(saved_description, path / PREDICTOR)
    sample = FitSample.load(path, saved_description["weights_sha256"])
    try:
        predictor = _assemble(
            method_class, saved_description, safetensors_torch.load(weight_bytes), path / PREDICTOR
        )
    except LOADING_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ViLUError):
            reason = str(error).rstrip(".")
        raise DataError(
            f"{path / PREDICTOR} is damaged, or {WEIGHTS} beside it: {reason}. {REFIT_ADVICE}."
        ) from error
    predictor.sample_ = sample
    return predictor


def load_uncalibrated(folder: str | Path) -> FailurePredictor:
    """Load a predictor without an earlier calibration's probabilities.

    Raises:
        DataError: If the folder holds no predictor, or a damaged predictor.
        ProvenanceError: If the predictor has the schema of another vilu version.
    """
    predictor = load_predictor(folder)
    predictor.calibrator_ = None
    return predictor


def _read_weights(path: Path, expected_sha256: str) -> bytes:
    """Read the bytes of the weights file at ``path``, and check their hash."""
    if not path.is_file():
        raise DataError(f"the predictor is not complete: {path} does not exist. {REFIT_ADVICE}.")
    with convert_os_errors(f"cannot read {path}"):
        weight_bytes = path.read_bytes()
    if bytes_hash(weight_bytes) != expected_sha256:
        raise DataError(
            f"{path} is damaged: it is not the file that {PREDICTOR} names. {REFIT_ADVICE}."
        )
    return weight_bytes


LOADING_ERRORS = (
    AttributeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""Errors that a method may raise if saved tensors or parameters do not fit the method."""


def _assemble(
    method_class: type[FailurePredictor],
    saved_description: dict[str, Any],
    tensors: dict[str, Tensor],
    path: Path,
) -> FailurePredictor:
    """Make a predictor from ``tensors`` and the description read from ``path``."""
    predictor = build_predictor(method_class, saved_description["parameters"])
    if saved_description["space"]:
        predictor.space_ = EmbeddingSpace(**saved_description["space"])
    if saved_description["similarity"]:
        predictor.similarity_ = tuple(saved_description["similarity"])
    predictor.seen_ = pop_sketches(tensors, saved_description, path)
    predictor.notes_ = saved_description["notes"]
    if saved_description.get("calibrator"):
        predictor.calibrator_ = read_calibrator(saved_description["calibrator"])
    state = {name.removeprefix("state."): tensor for name, tensor in tensors.items()}
    predictor.restore(state)
    return predictor


def fit_inputs_digest(predictor: FailurePredictor, files: Sequence[Path], **flags: object) -> str:
    """Compute a digest from all inputs of a fit.

    The inputs are the method, its parameters, the ``files`` read by the fit, and further ``flags``.
    """
    content = description.describe(predictor)
    return inputs_digest(
        *files, method=content["method"], parameters=content["parameters"], **flags
    )


def claim_output_folder(folder: Path, fit_digest: str, *, overwrite: bool) -> bool:
    """Check an output folder. Return whether an intact predictor with ``fit_digest`` is there.

    If that predictor is damaged, a warning is logged and the result is False. With ``overwrite``,
    the result is False, too. Otherwise a predictor from different inputs is refused.
    """
    notes: object = None
    saved_description = description.read_fit_description(folder / PREDICTOR)
    if saved_description is not None:
        notes = saved_description.get("notes")
    has_same_inputs = isinstance(notes, dict) and notes.get("inputs") == fit_digest
    if has_same_inputs and not overwrite:
        try:
            load_predictor(folder)
        except ViLUError as error:
            logger.warning("%s is made again: %s", folder, error)
            has_same_inputs = False
            overwrite = True
    # The description is written last. A missing description means a new folder, or an interrupted
    # save.
    is_incomplete = not (folder / PREDICTOR).exists()
    return claim_folder(
        folder,
        "predictor",
        description.is_predictor_file,
        has_same_inputs=has_same_inputs,
        overwrite=overwrite or is_incomplete,
    )


def saved_method_class(saved_description: dict[str, Any], path: Path) -> type[FailurePredictor]:
    """Return the saved predictor's class, from the description read from ``path``.

    Raises:
        DataError: If the class is not installed. If its module is known, the message says what to
            install, to load or to move.
        MissingModelError: If the class belongs to vilu-bench, and vilu-bench is not installed.
    """
    name = saved_description["method"]
    home = saved_description.get("home")  # package and module if the method is outside vilu
    if name in method_names():
        method_class = find_method(name)
        _warn_of_other_home(method_class, home, path)
        return method_class
    if not isinstance(home, dict) or str(home.get("module")).startswith("vilu_bench."):
        # ``refuse_name_of_bench`` does nothing for names outside vilu-bench.
        refuse_name_of_bench(PREDICTORS.group, name)
    if not isinstance(home, dict):
        known_names = ", ".join(method_names())
        raise DataError(f"{path} is for the method {name!r}. Known: {known_names}.")
    module = home.get("module")
    remedy = f"Give --plugin {module}."
    if module == SCRIPT:
        remedy = "That was a script: move the class to a module, and give --plugin MODULE."
    elif home.get("distribution"):
        remedy = f"Install {home['distribution']}, or give --plugin {module}."
    raise DataError(f"{path} is for the method {name!r} of {module}, which is not here. {remedy}")


SCRIPT = "__main__"
"""Module name of a class in a script or a notebook. Another process cannot import it."""


def _warn_of_other_home(
    method_class: type[FailurePredictor], home: dict[str, Any] | None, path: Path
) -> None:
    """Warn if a saved predictor's method came from another package than ``method_class``."""
    # the description names no home for vilu's own methods
    saved_module = "vilu" if home is None else home["module"]
    modules = (saved_module, method_class.__module__)
    # vilu's methods may move between its two packages, and a script has no name of its own
    packages = {module.partition(".")[0] for module in modules}
    if len(packages) == 1 or packages == {"vilu", "vilu_bench"} or SCRIPT in packages:
        return
    logger.warning(
        "%s is for the method %r of %s, and is read by the method of this name in %s: "
        "its scores may differ",
        path,
        method_class.name,
        *modules,
    )


def write_card(folder: str | Path) -> None:
    """Write a saved predictor's card again, with the guarantee if there is a ``risk.json``."""
    path = Path(folder)
    risk = None
    if (path / RISK).exists():
        risk = read_json(path / RISK, RECALIBRATE_ADVICE)
    saved_description = read_description(path / PREDICTOR)
    predictor = load_predictor(path)
    description.write_card(path, saved_description, predictor, risk)
