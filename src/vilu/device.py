"""Names of devices to devices, and torch with the defaults of its threads."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TypeVar

import torch

from vilu.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The device called "auto", "cpu", "cuda", "cuda:N" or "mps".

    "auto" is the first of cuda, mps, cpu at hand.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    here = [kind for kind, is_here in available.items() if is_here]
    if name == "auto":
        return torch.device(here[0])
    kind, colon, number = name.partition(":")
    is_numbered_gpu = kind == "cuda" and re.fullmatch("[0-9]{1,4}", number) is not None
    if kind not in available or (colon and not is_numbered_gpu):
        raise UsageError(f"device must be auto, cpu, cuda, cuda:N or mps. Got {name!r} instead.")
    is_there = available[kind]
    if is_there and kind == "cuda":
        is_there = int(number or 0) < torch.cuda.device_count()
    if not is_there:
        raise UsageError(f"device {name!r} is not on this machine. Found: {', '.join(here)}.")
    return torch.device(name)


Item = TypeVar("Item")


@contextmanager
def as_usual() -> Iterator[None]:
    """A block, or a function, in which torch has its defaults.

    These are gradients, the CPU and no autocast, all of this thread alone. The default type is of
    all threads and stays: whoever makes a tensor of floats here names its type.

    So a number does not depend on what the caller has set, and what is made here can be used
    anywhere: a tensor that is made in inference mode can never be trained on.
    """
    with ExitStack() as stack, torch.inference_mode(mode=False), torch.enable_grad():
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def each_as_usual(items: Generator[Item, None, None]) -> Iterator[Item]:
    """The items of a generator, each made in a block ``as_usual``.

    Between the items the caller's settings hold.
    """
    with closing(items):
        while True:
            with as_usual():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
