"""Settings for a whole process. Only the process owner calls this module."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

from vilu.callers import warn_caller

SPIN_VARIABLE = "GOMP_SPINCOUNT"
"""Environment variable for how long a waiting thread spins. vilu sets this variable."""
WAITING_VARIABLES = {SPIN_VARIABLE, "OMP_WAIT_POLICY"}
"""If the user has set any of these environment variables, vilu does not set how threads wait."""
SHORT_WAIT = "3000"
"""Number of times that a waiting thread spins before it sleeps (docs/performance.md)."""

RAY_REPORTS = "RAY_USAGE_STATS_ENABLED"
"""Environment variable for whether Ray sends usage statistics."""

RAY_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Environment variable for whether Ray listens to other machines.

Despite the name, Ray reads this variable on Linux, too.
"""

LARGEST_KEPT_BLOCK = 2**29
"""Largest freed block that glibc keeps, in bytes."""
ARROW_POOL = "ARROW_DEFAULT_MEMORY_POOL"
"""Environment variable for where Arrow takes memory from."""
HEAP_VARIABLES = {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}
"""If the user has set any of these environment variables, vilu does not limit glibc's heaps."""
KEPT_MEMORY_VARIABLES = {
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
}
"""If the user has set any of these environment variables, vilu does not change what glibc keeps."""


def tune_process() -> None:
    """Tune this process for vilu. Afterwards, embedding images takes half the time.

    Without this call, vilu leaves the process settings unchanged in a program that imports vilu. A
    program that mainly computes with vilu should call this function first, like the command line
    does. There are three settings. A setting is skipped if the user has set it by an environment
    variable:

    - Freed memory is kept for later use, if the C library is glibc.
    - A waiting torch thread spins only for a moment before it sleeps (``GOMP_SPINCOUNT=3000``).
      Otherwise torch would be slow on a busy machine.
    - Ray, if started by this process, sends no usage statistics (``RAY_USAGE_STATS_ENABLED=0``).

    torch reads ``GOMP_SPINCOUNT`` while torch is imported. ``import vilu`` and
    ``vilu.tune_process`` do not import torch. If torch was imported before, a warning states that
    ``GOMP_SPINCOUNT`` has no effect.

    Examples:
        >>> import subprocess, sys
        >>> program = "import sys, vilu; vilu.tune_process(); print('torch' in sys.modules)"
        >>> print(subprocess.check_output([sys.executable, "-c", program], text=True).strip())
        False
    """
    keep_freed_memory()
    os.environ.setdefault(RAY_REPORTS, "0")
    if _is_any_set(WAITING_VARIABLES):
        return
    os.environ[SPIN_VARIABLE] = SHORT_WAIT
    if "torch" in sys.modules:
        warn_caller(
            f"torch was imported before vilu.tune_process(): {SPIN_VARIABLE} has no effect in this "
            "process any more. Call it before torch is imported, or set "
            f"{SPIN_VARIABLE}={SHORT_WAIT} outside."
        )


def _is_any_set(variables: set[str]) -> bool:
    """Return whether any of these environment variables is set."""
    return any(name in os.environ for name in variables)


def ray_cluster() -> str | None:
    """Return the address of the Ray cluster to join, from the variable ``RAY_ADDRESS``.

    Return None if Ray starts on this machine: the variable is not set, is empty, or is "local".
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in {"", "local"}:
        return None
    return address


def keep_ray_on_this_machine() -> None:
    """Let a new Ray listen only at 127.0.0.1, by the environment variable ``RAY_CLUSTERS``.

    Call this function before ray is imported. Nothing is changed if there is a cluster to join, or
    if the user has set the variable.
    """
    if ray_cluster() is None:
        os.environ.setdefault(RAY_CLUSTERS, "0")


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 512 MiB each, and 1 GiB in total, for later use.

    By default, glibc returns large blocks to the operating system. The operating system must then
    set up every page again when the next block is written. Setting up pages took half of an image
    tower's time, and a sixth of the time for entropies over 1,000 candidates. If the user has set
    this behaviour by an environment variable, or if the C library is not glibc, nothing is changed.
    """
    if sys.platform != "linux" or _is_any_set(KEPT_MEMORY_VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # the C library is musl, without mallopt
        return
    mallopt(-3, LARGEST_KEPT_BLOCK)  # -3 is M_MMAP_THRESHOLD in <malloc.h>
    mallopt(-1, 2 * LARGEST_KEPT_BLOCK)  # -1 is M_TRIM_THRESHOLD


def use_one_heap() -> None:
    """Let Arrow and all threads take memory from glibc's main heap.

    This function is for a process that runs for months. Call this function before pyarrow is
    imported and before further threads are started. Settings made by the user through environment
    variables are not changed.

    Without this call, every thread has a separate heap, and ``return_freed_memory`` cannot return
    the end of such a heap. Arrow's own pool keeps memory, too. So the process would keep as much
    memory as the largest table ever took.
    """
    os.environ.setdefault(ARROW_POOL, "system")
    if sys.platform != "linux" or _is_any_set(HEAP_VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # the C library musl has no mallopt
        mallopt(-8, 1)  # -8 is M_ARENA_MAX in <malloc.h>


def return_freed_memory() -> None:
    """Return freed memory to the operating system, despite ``keep_freed_memory``.

    Arrow's memory is returned on every system. The memory that libraries besides Arrow have freed
    is returned only with glibc.
    """
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    if sys.platform != "linux":
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
