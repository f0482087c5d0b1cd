"""Conversion of released ViLU checkpoints, without executing code in the files."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from vilu.backbones.loading import READING_ERRORS, unpickling_problem
from vilu.device import torch_defaults
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, StorageError, ViLUError
from vilu.extras import suppress_messages
from vilu.predictors.vilu.head import HeadPredictor
from vilu.predictors.vilu.vilu import LVU, ViLU
from vilu.validation import checked


@checked
@torch_defaults()
def convert_official(
    path: str | Path, logit_scale: float = 100.0, *, embed_dim: int | None = None
) -> HeadPredictor:
    """Make a ``ViLU`` or ``LVU`` with the weights from a released checkpoint.

    A released head returns a confidence logit. A head in vilu returns a failure logit, which is
    minus the confidence logit. So the last layer's sign is changed.

    An attention projection starts as the identity. If a projection is a multiple of the
    identity, the projection was frozen in training. The released code then skips the projection,
    but weight decay shrinks the matrix. The head in vilu always applies its projections, so such a
    matrix is replaced by the identity.

    The file is a pickle. torch's restricted unpickler reads the file, and creates only tensors
    and numpy scalars. The released files have numpy scalars, so numpy scalars are allowed by name.

    Args:
        path: A checkpoint with the key ``state_dict``, or a bare state dict.
        logit_scale: The VLM's logit scale, which is not in the checkpoints (100 for OpenAI's
            CLIP models).
        embed_dim: Embedding width D. Needed only for a head without attention, with the image and
            the predicted caption as inputs.

    Raises:
        DataError: If the unpickler refuses the file, or if the weights fit no known head.

    Examples:
        >>> import tempfile, pathlib, torch, vilu
        >>> # a checkpoint whose head gives an image (x_1, x_2) the confidence logit 3 x_1 - 3 x_2
        >>> layers = {"mlp.0.weight": torch.eye(2), "mlp.0.bias": torch.zeros(2)}
        >>> layers |= {"mlp.2.weight": torch.tensor([[3.0, -3.0]]), "mlp.2.bias": torch.zeros(1)}
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "head.ckpt"
        >>> torch.save({"state_dict": layers}, path)
        >>> head = vilu.convert_official(path)
        >>> data = vilu.Embeddings(torch.eye(2), torch.eye(2))  # the images (1, 0) and (0, 1)
        >>> head.predict_uncertainty(data).round(2)  # sigmoid(-3) and sigmoid(3)
        array([0.05, 0.95])
    """
    weights = read_checkpoint(Path(path))
    try:
        return _make_predictor(weights, path, float(logit_scale), embed_dim)
    except ViLUError:  # the message is for users already
        raise
    except DAMAGE_ERRORS as error:
        raise DataError(
            f"{path} holds weights of no known head: {type(error).__name__}: {error}."
        ) from error


DAMAGE_ERRORS = (
    *READING_ERRORS,
    ArithmeticError,
    AssertionError,
    ImportError,
    MemoryError,
    pickle.UnpicklingError,
)
"""Errors that torch raises for damaged files and for tensors with unexpected shapes."""


def _make_predictor(
    weights: dict[str, Tensor], path: str | Path, logit_scale: float, embed_dim: int | None
) -> HeadPredictor:
    """Make the predictor with the ``weights`` from the checkpoint at ``path``."""
    layers = _layer_names(weights, path)
    text_projection = weights.get("in_proj_t.weight")  # only in heads with attention
    width = weights["mlp.0.weight"].shape[1]
    if text_projection is None:
        dim = embed_dim or width
        possible_inputs = ["image", "caption"]
    else:
        dim = embed_dim or len(text_projection)
        possible_inputs = ["image", "attended", "caption"]
    n_inputs = width // dim  # the first layer reads the concatenation of the inputs
    inputs = possible_inputs[:n_inputs]
    # a head with attention must read the attended text
    lacks_attended = text_projection is not None and inputs == ["image"]
    if width != dim * len(inputs) or lacks_attended:
        raise DataError(
            f"{path} has a head of input width {width}, "
            f"which is no concatenation of embeddings of width {dim}."
        )
    hidden_layers = layers[:-1]
    hidden = tuple(len(weights[f"{layer}.bias"]) for layer in hidden_layers)  # the layers' widths
    predictor: HeadPredictor = LVU(hidden=hidden, loss="bce")
    if inputs != ["image"]:
        attention: Literal["official"] | None = None
        if text_projection is not None:
            attention = "official"
        predictor = ViLU(hidden=hidden, attention=attention, predicted_caption="caption" in inputs)
    predictor.space_ = EmbeddingSpace(embed_dim=dim, logit_scale=logit_scale)
    predictor.restore(weights_of_head(weights, layers, inputs))
    predictor.notes_ = {"converted_from": "a checkpoint of the reference implementation"}
    return predictor


def _layer_names(weights: dict[str, Tensor], path: str | Path) -> list[str]:
    """Return the perceptron's layer names, from the first layer to the last."""
    layers = []
    for name in weights:
        if re.fullmatch(r"mlp\.\d+\.weight", name):  # such as mlp.0.weight
            layers.append(name.removesuffix(".weight"))
    if not layers or any(f"{layer}.bias" not in weights for layer in layers):
        saved_names = ", ".join(weights)[:200]
        raise DataError(
            f"{path} holds no multilayer perceptron mlp.0, mlp.2, ... Found: {saved_names}."
        )
    return layers


def weights_of_head(
    weights: dict[str, Tensor], layers: list[str], inputs: list[str]
) -> dict[str, Tensor]:
    """Rename the weights for a ``FailureHead``, and change the last layer's sign.

    In a ``FailureHead``, the first layer has a separate weight matrix for each input.
    """
    signs = [1] * len(layers)
    signs[-1] = -1  # the last layer's sign is changed
    first_layer, *later_layers = layers
    first_sign, *later_signs = signs
    joint_matrix = weights[f"{first_layer}.weight"].float()
    first_matrices = joint_matrix.chunk(len(inputs), dim=1)
    state = {}
    for name, matrix in zip(inputs, first_matrices, strict=True):
        state[f"first.{name}"] = first_sign * matrix
    state["first_bias"] = first_sign * weights[f"{first_layer}.bias"].float()
    for i, (layer, sign) in enumerate(zip(later_layers, later_signs, strict=True)):
        new_layer = f"rest.{2 * i + 1}"  # in ``rest``, members 0, 2, 4, ... are ReLUs
        for tensor in ("weight", "bias"):
            state[f"{new_layer}.{tensor}"] = sign * weights[f"{layer}.{tensor}"].float()
    if "in_proj_v.weight" in weights:
        image_projection = weights["in_proj_v.weight"].float()
        state["attention.image"] = identity_if_frozen(image_projection)
    if "in_proj_t.weight" in weights:
        text_projection = weights["in_proj_t.weight"].float()
        state["attention.text"] = identity_if_frozen(text_projection)
    return state


def identity_if_frozen(projection: Tensor) -> Tensor:
    """Return the projection, or the identity if the projection is a multiple of the identity.

    A multiple of the identity was frozen in training.
    """
    identity = torch.eye(len(projection), dtype=projection.dtype)
    diagonal_value = projection[0, 0]
    was_frozen = torch.equal(projection, identity * diagonal_value)
    if was_frozen:
        return identity
    return projection


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors in a checkpoint's state dict, by name."""
    # The first entry in ``__reduce__`` is the function called by a pickle to create a numpy scalar.
    # The function's name in the file depends on the numpy version that wrote the file.
    reduced_scalar = np.float64(0).__reduce__()
    make_scalar = cast("Callable[..., Any]", reduced_scalar[0])
    number_types = [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
    allowed_globals: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (make_scalar, "numpy.core.multiarray.scalar"),
        (make_scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *number_types,
    ]
    try:
        with suppress_messages(), torch.serialization.safe_globals(allowed_globals):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error
    except DAMAGE_ERRORS as error:
        raise DataError(
            f"{path} is refused, nothing in it was executed: {unpickling_problem(error)}."
        ) from error
    weights: object = None
    if isinstance(content, dict):
        weights = content.get("state_dict", content)
    if not isinstance(weights, dict):
        raise DataError(f"{path} holds no state dict, but a {type(content).__name__}.")
    return {str(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
