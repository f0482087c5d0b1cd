"""Provide a device that stands in for a GPU.

Its tensors have no numbers, and copies to the CPU are noted. The device is torch's "meta". Scoring
on it shows where tensors go, and not what they hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "meta"
NUMBER = torch.ops.aten._local_scalar_dense.default
TO = torch.ops.aten._to_copy.default
COPY = torch.ops.aten.copy_.default
EQUAL = torch.ops.aten.equal.default
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}
"""Operations whose index may lie on the CPU."""


class FakeGPU(TorchDispatchMode):
    """Note the shape of every tensor that comes to the CPU, and count single numbers.

    A tensor that comes to the CPU is 0 everywhere. As on a GPU, an operation on tensors from both
    devices is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.n_numbers = 0

    def __enter__(self) -> FakeGPU:
        """Begin to note. Autocast needs a device with numbers, so the CPU's autocast is used."""
        self._autocast = torch.autocast
        torch.autocast = _autocast_of_cpu
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Stop noting."""
        torch.autocast = self._autocast
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Answer operations that read from the device, and pass on all others."""
        named = kwargs or {}
        if func is NUMBER and args[0].is_meta:
            self.n_numbers += 1
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        if func is EQUAL and args[0].is_meta:
            self.n_numbers += 1
            return True
        device = named.get("device")
        is_download = func is TO and args[0].is_meta and device is not None
        if is_download and torch.device(device).type == "cpu":
            self.shapes.append(tuple(args[0].shape))
            dtype = named.get("dtype") or args[0].dtype
            return torch.zeros(args[0].shape, dtype=dtype, device="cpu")
        self._require_one_device(func, (args, named))
        return func(*args, **named)

    @staticmethod
    def _require_one_device(func: object, arguments: object) -> None:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        may_mix = func in INDEXING or func in {TO, COPY}
        assert len(devices) < 2 or may_mix, f"{func} mixes {devices}"


class _autocast_of_cpu(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **named: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE else device_type, *args, **named)


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor on the device."""
    return torch.empty(*shape, dtype=dtype, device=DEVICE)
