"""Names of devices to devices."""

from __future__ import annotations

import torch

from vilu.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The device called "auto", "cpu", "cuda", "cuda:N" or "mps"; "auto" is the first of cuda, mps, cpu at hand.

    Raises:
        UsageError: If the name is not one of these or the device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in available.items() if here))
    kind, _, number = name.partition(":")
    if kind not in available or (number and not number.isdigit()):
        raise UsageError(f"device must be auto, cpu, cuda, cuda:N or mps. Got {name!r} instead.")
    if not available[kind] or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        here = ", ".join(kind for kind, is_here in available.items() if is_here)
        raise UsageError(f"device {name!r} is not on this machine. Found: {here}.")
    return torch.device(name)
