"""How far a training run is, as something that can be written and read back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vilu.errors import DataError
from vilu.nn.dropout import Dropout
from vilu.nn.keeper import Checkpoint

BUFFER = "momentum_buffer"


class Stateful(Protocol):
    """Something in a loss that remembers earlier batches."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse; must refuse tensors of the wrong names or shapes."""


@dataclass
class History:
    """What happened, one entry an epoch; ``kept_epoch`` is the one whose weights were kept (0-based)."""

    loss: list[float] = field(default_factory=list)
    validation_auroc: list[float] = field(default_factory=list)
    kept_epoch: int = -1


@dataclass
class Position:
    """How far a training run is.

    Attributes:
        order: State of the shuffling at the start of the epoch.
        total: () float32 sum of the epoch's losses so far.
        epoch: Finished epochs.
        step: Finished steps of the next one.
        kept: Weights of the epoch that validation chose so far.
        history: Of the finished epochs.
    """

    order: Tensor
    total: Tensor
    epoch: int = 0
    step: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=History)


def pack(at: Position, head: nn.Module, optimizer: torch.optim.SGD, stateful: Sequence[Stateful]) -> Checkpoint:
    """Everything that the rest of a training run depends on."""
    buffers = {str(i): optimizer.state[p].get(BUFFER) for i, p in enumerate(parameters_of(optimizer))}
    parts = {
        "head": head.state_dict(),
        "kept": at.kept,
        "momentum": {name: buffer for name, buffer in buffers.items() if buffer is not None},
        "masks": {str(i): generator.get_state() for i, generator in enumerate(generators_of(head))},
        "loop": {"order": at.order, "total": at.total},
        **{f"memory{i}": each.state() for i, each in enumerate(stateful)},
    }
    tensors = {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
    return Checkpoint({"epoch": at.epoch, "step": at.step, "history": dataclasses.asdict(at.history)}, tensors)


def unpack(
    checkpoint: Checkpoint, head: nn.Module, optimizer: torch.optim.SGD, stateful: Sequence[Stateful]
) -> Position:
    """The inverse of ``pack``: fill head, optimiser and memories, and say where to go on.

    Raises:
        DataError: If the checkpoint does not have what these need.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    weights = head.state_dict()
    _load("weights", parts.get("head", {}), weights)
    kept = parts.get("kept", {})
    if kept:
        _load("kept weights", kept, {name: torch.empty_like(tensor) for name, tensor in weights.items()})
    device = next(iter(weights.values())).device
    parameters = parameters_of(optimizer)
    for name, buffer in parts.get("momentum", {}).items():
        if not name.isdigit() or int(name) >= len(parameters) or buffer.shape != parameters[int(name)].shape:
            raise DataError(f"a checkpoint has momentum {name!r} of shape {tuple(buffer.shape)} for no weight here.")
        optimizer.state[parameters[int(name)]][BUFFER] = buffer.to(device)
    masks = {str(i): generator.get_state() for i, generator in enumerate(generators_of(head))}
    _load("states of masks", parts.get("masks", {}), masks)
    for i, generator in enumerate(generators_of(head)):
        generator.set_state(masks[str(i)])
    for i, each in enumerate(stateful):
        each.restore(parts.get(f"memory{i}", {}))
    loop = {"order": torch.Generator().get_state(), "total": torch.zeros(())}
    _load("state of the loop", parts.get("loop", {}), loop)
    total, history = loop["total"].to(device), _history(checkpoint.position)
    return Position(loop["order"], total, *checkpoint.numbers(), kept, history)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters that the optimiser knows, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def generators_of(head: nn.Module) -> list[torch.Generator]:
    """Generators of the masks of a head."""
    return [module.generator for module in head.modules() if isinstance(module, Dropout)]


def _load(what: str, found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names.

    Raises:
        DataError: If names, shapes or dtypes differ.
    """
    kinds = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in (found, into)]
    if kinds[0] != kinds[1]:
        differing = sorted(kinds[0].keys() ^ kinds[1].keys()) or [n for n in kinds[0] if kinds[0][n] != kinds[1][n]]
        raise DataError(f"the {what} of a checkpoint do not fit; they differ in {', '.join(differing[:4])}.")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(found[name])


def _history(position: Mapping[str, Any]) -> History:
    found = position.get("history")
    if not isinstance(found, dict) or found.keys() != {"loss", "validation_auroc", "kept_epoch"}:
        raise DataError("a checkpoint has no history.")
    lists = found["loss"], found["validation_auroc"]
    if not all(isinstance(values, list) and all(map(_is_finite, values)) for values in lists):
        raise DataError("the history of a checkpoint is not of numbers.")
    return History(list(lists[0]), list(lists[1]), int(found["kept_epoch"]))


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
