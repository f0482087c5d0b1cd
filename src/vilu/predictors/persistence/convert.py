"""Conversion of checkpoints of the reference implementation, without executing their content."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from vilu.backbones.loading import UNREADABLE, why_refused
from vilu.device import torch_defaults
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, StorageError, ViLUError
from vilu.extras import quiet
from vilu.predictors.vilu.head import HeadPredictor
from vilu.predictors.vilu.vilu import LVU, ViLU
from vilu.validation import checked


@checked
@torch_defaults()
def convert_official(
    path: str | Path, logit_scale: float = 100.0, *, embed_dim: int | None = None
) -> HeadPredictor:
    """Make a ``ViLU`` or ``LVU`` with the weights of a released checkpoint.

    The output of the reference head is a confidence logit. The output of our head is a failure
    logit, its negative, so the sign of the last layer is changed.

    A projection that is a multiple of the identity was frozen in training. The reference then does
    not use the projection, while weight decay shrinks its matrix. It is replaced by the identity.

    The file is a pickle. The restricted unpickler of torch reads it and makes only tensors and
    numpy scalars. The released files contain numpy scalars, so these are allowed by name.

    Args:
        path: A checkpoint with the key ``state_dict``, or a bare state dict.
        logit_scale: Logit scale of the VLM; the checkpoints do not hold it (100 for OpenAI's CLIP).
        embed_dim: Embedding width D; needed only for a head of image and predicted caption without
            attention.

    Raises:
        DataError: If the file contains any other object, or its weights are not those of a known
            head.

    Examples:
        >>> import tempfile, pathlib, torch, vilu
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "head.ckpt"  # stands for a released one
        >>> layers = {"mlp.0.weight": torch.eye(2), "mlp.0.bias": torch.zeros(2)}
        >>> layers |= {"mlp.2.weight": torch.tensor([[3.0, -3.0]]), "mlp.2.bias": torch.zeros(1)}
        >>> torch.save({"state_dict": layers}, path)
        >>> data = vilu.Embeddings(torch.eye(2), torch.eye(2))
        >>> head = vilu.convert_official(path)
        >>> head.predict_uncertainty(data).round(2)  # sigmoid(-3) and sigmoid(3)
        array([0.05, 0.95])
    """
    weights = read_checkpoint(Path(path))
    try:
        return _head(weights, path, float(logit_scale), embed_dim)
    except ViLUError:
        raise
    except DAMAGE as error:
        raise DataError(
            f"{path} holds weights of no known head: {type(error).__name__}: {error}."
        ) from error


DAMAGE = (
    *UNREADABLE,
    ArithmeticError,
    AssertionError,
    ImportError,
    MemoryError,
    pickle.UnpicklingError,
)
"""Errors that torch raises on damaged files and on tensors of unexpected shapes."""


def _head(
    weights: dict[str, Tensor], path: str | Path, logit_scale: float, embed_dim: int | None
) -> HeadPredictor:
    """The predictor with the ``weights`` of the checkpoint at ``path``."""
    layers = _layers(weights, path)
    projection = weights.get("in_proj_t.weight")
    width = weights["mlp.0.weight"].shape[1]
    if projection is None:
        dim = embed_dim or width
        possible = ["image", "caption"]
    else:
        dim = embed_dim or len(projection)
        possible = ["image", "attended", "caption"]
    parts = possible[: width // dim]
    attends_to_nothing = projection is not None and parts == ["image"]
    if width != dim * len(parts) or attends_to_nothing:
        raise DataError(
            f"{path} has a head of input width {width}, "
            f"which is no concatenation of embeddings of {dim}."
        )
    hidden = tuple(len(weights[f"{layer}.bias"]) for layer in layers[:-1])
    predictor: HeadPredictor = LVU(hidden=hidden, loss="bce")
    if parts != ["image"]:
        attention: Literal["official"] | None = None if projection is None else "official"
        predictor = ViLU(hidden=hidden, attention=attention, predicted_caption="caption" in parts)
    predictor.space_ = EmbeddingSpace(dim, logit_scale)
    predictor.restore(renamed(weights, layers, parts))
    predictor.notes_ = {"converted_from": "a checkpoint of the reference implementation"}
    return predictor


def _layers(weights: dict[str, Tensor], path: str | Path) -> list[str]:
    """Names of the layers of the perceptron, from the first to the last."""
    layers = []
    for name in weights:
        if re.fullmatch(r"mlp\.\d+\.weight", name):
            layers.append(name.removesuffix(".weight"))
    if not layers or any(f"{layer}.bias" not in weights for layer in layers):
        raise DataError(
            f"{path} holds no multilayer perceptron mlp.0, mlp.2, ... "
            f"Found: {', '.join(weights)[:200]}."
        )
    return layers


def renamed(weights: dict[str, Tensor], layers: list[str], parts: list[str]) -> dict[str, Tensor]:
    """The weights by the names of our head, which has one first matrix for every part of the input.

    The sign of the last layer is changed, since the reference head predicts that the answer is
    right.
    """
    signs = [1] * (len(layers) - 1) + [-1]
    blocks = weights[f"{layers[0]}.weight"].float().chunk(len(parts), dim=1)
    state = {}
    for part, block in zip(parts, blocks, strict=True):
        state[f"first.{part}"] = signs[0] * block
    state["first_bias"] = signs[0] * weights[f"{layers[0]}.bias"].float()
    for i, layer in enumerate(layers[1:], start=1):
        for kind in ("weight", "bias"):
            state[f"rest.{2 * i - 1}.{kind}"] = signs[i] * weights[f"{layer}.{kind}"].float()
    if "in_proj_v.weight" in weights:
        state["attention.image"] = thawed(weights["in_proj_v.weight"].float())
    if "in_proj_t.weight" in weights:
        state["attention.text"] = thawed(weights["in_proj_t.weight"].float())
    return state


def thawed(projection: Tensor) -> Tensor:
    """The identity if the projection is a multiple of it, so was frozen; else the projection."""
    identity = torch.eye(len(projection), dtype=projection.dtype)
    was_frozen = torch.equal(projection, identity * projection[0, 0])
    return identity if was_frozen else projection


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state dict, by name."""
    # the module of numpy scalars has an old and a new name, depending on the version of numpy that
    # wrote the file
    scalar = cast("Callable[..., Any]", np.float64(0).__reduce__()[0])
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *[type(np.dtype(kind)) for kind in ("f8", "f4", "i8")],
    ]
    try:
        with quiet(), torch.serialization.safe_globals(allowed):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error
    except DAMAGE as error:
        raise DataError(
            f"{path} is refused, nothing in it was executed: {why_refused(error)}."
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise DataError(f"{path} holds no state dict, but a {type(content).__name__}.")
    return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
