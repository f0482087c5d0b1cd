"""Names of devices to devices, and torch as it is when nobody has set anything."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
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


KEPT_BYTES = 2**29
KEPT_BY = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 512 MiB, 1 GiB in all, for those to come.

    It would give large ones back to the system, which makes every page anew when the next one is
    written to: that was half of the time of an image tower, and a sixth of that of an entropy of
    1,000 candidates. Whoever has set it by an environment variable is obeyed, and where glibc is
    not in use nothing is done.
    """
    if sys.platform != "linux" or os.environ.keys() & KEPT_BY:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return
    mallopt(-3, KEPT_BYTES)  # M_MMAP_THRESHOLD of <malloc.h>
    mallopt(-1, 2 * KEPT_BYTES)  # M_TRIM_THRESHOLD


LOCK = threading.Lock()
BEFORE: list[torch.dtype] = []  # the default types at the begin of the blocks that are open

# of every process its own: threads that hold one are not forked
SEEDED: dict[int, AbstractContextManager[object]] = {}


@contextmanager
def torch_defaults() -> Iterator[None]:
    """A block, or a function, in which torch has its defaults.

    These are gradients, float32, the CPU and no autocast.

    So a number does not depend on what the caller has set, and what is made here can be used
    anywhere: a tensor that is made in inference mode can never be trained on.
    """
    keep_freed_memory()
    with ExitStack() as stack, torch.inference_mode(mode=False), torch.enable_grad():
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # the type is of all threads: the first block sets it, the last one to end gives back what
        # was
        with LOCK:
            BEFORE.append(torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            with LOCK:
                dtype = BEFORE.pop()
                torch.set_default_dtype(torch.float32 if BEFORE else dtype)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block in which torch's own generator begins at this seed, and is left as it was.

    The whole process has one, so blocks of several threads come one after the other; a block may
    hold another one.
    """
    with SEEDED.setdefault(os.getpid(), threading.RLock()), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def each_with_torch_defaults(items: Generator[Item, None, None]) -> Iterator[Item]:
    """The items of a generator, each made in a block ``torch_defaults``.

    Between the items the caller's settings hold.
    """
    with closing(items):
        while True:
            with torch_defaults():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
