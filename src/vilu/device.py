"""Devices by name, and code blocks with torch's default settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vilu.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Return the device with this name: "auto", "cpu", "cuda", "cuda:N" or "mps".

    "auto" is the first available device in the order cuda, mps, cpu.
    """
    is_kind_available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available_kinds = [kind for kind, is_available in is_kind_available.items() if is_available]
    if name == "auto":
        return torch.device(available_kinds[0])
    is_numbered = re.fullmatch("cuda:[0-9]{1,4}", name) is not None
    if name not in is_kind_available and not is_numbered:
        raise UsageError(f"device must be auto, cpu, cuda, cuda:N or mps. Got {name!r} instead.")
    kind, _, number = name.partition(":")
    is_available = is_kind_available[kind]
    if is_available and number:
        is_available = int(number) < torch.cuda.device_count()
    if not is_available:
        listed_kinds = ", ".join(available_kinds)
        raise UsageError(f"device {name!r} is not on this machine. Found: {listed_kinds}.")
    return torch.device(name)


BF16_INSTRUCTIONS: Final = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
"""torch's names of processor capabilities with instructions for bfloat16."""


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 instructions. If not, torch emulates products slowly.

    If torch does not know the processor's instructions, the result is False.
    """
    if device.type == "cuda":
        is_supported: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return is_supported
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if device.type != "cpu" or get_capabilities is None:
        return False
    capabilities = get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)


Item = TypeVar("Item")


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Run a block, or a decorated function, with torch's default settings.

    The settings are: gradients on, inference mode off, the CPU as default device, autocast off.
    These settings belong to the current thread. torch's default number format belongs to all
    threads, so the default format is not changed. Therefore code in the block must name the number
    format for every new floating-point tensor.

    There are two reasons for such a block. First, results must not depend on the caller's settings.
    Second, tensors made in the block must be usable anywhere, but a tensor made in inference mode
    can never be used for training.
    """
    with ExitStack() as stack, torch.inference_mode(mode=False), torch.enable_grad():
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def each_with_torch_defaults(items: Generator[Item, None, None]) -> Iterator[Item]:
    """Yield a generator's items, and run the generator with ``torch_defaults``.

    The caller's code, between two items, runs with the caller's settings.
    """
    with closing(items):
        while True:
            with torch_defaults():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


FILLING_FUNCTIONS = {
    "uniform_",
    "normal_",
    "bernoulli_",
    "trunc_normal_",
    "orthogonal_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
}
"""Names of functions that fill the first argument, a tensor, with random numbers.

The functions are tensor methods and functions in ``torch.nn.init``. A function is recognised by
name, because transformers replaces these functions while making a model. The replacements keep the
names.
"""

MAKING_FUNCTIONS: set[Callable[..., object]] = {torch.rand, torch.randn, torch.normal}
"""Functions that make a new tensor with random numbers."""


class SeparateGenerator(TorchFunctionMode):
    """A block with a separate generator for random numbers on the CPU.

    Libraries draw random initial weights even if the model's weights are then read from a file.
    Within this block, such draws do not change the state of torch's global generator. Threads
    outside the block are not affected.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Any,  # noqa: ANN401 - torch's own signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Call a torch function. Random numbers are drawn from the block's generator."""
        keywords = dict(kwargs or {})  # torch passes None if there are no keyword arguments
        if keywords.get("generator") is None and _draws_on_cpu(func, args, keywords):
            keywords["generator"] = self.generator
        return func(*args, **keywords)


def _draws_on_cpu(
    function: Callable[..., object], args: tuple[Any, ...], keywords: dict[str, Any]
) -> bool:
    """Return whether a call to a torch function draws random numbers on the CPU."""
    if getattr(function, "__name__", None) in FILLING_FUNCTIONS:
        tensor: Tensor = args[0] if args else keywords["tensor"]
        return tensor.device.type == "cpu"
    device = keywords.get("device") or "cpu"  # no device, or None, counts as the CPU
    return function in MAKING_FUNCTIONS and torch.device(device).type == "cpu"
