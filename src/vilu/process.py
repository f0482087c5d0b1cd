"""Settings of a whole process. They are its owner's: nothing else in this package changes any."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

from vilu.callers import warn_caller

SPINS = "GOMP_SPINCOUNT"
WAITING_IS_SET_BY = {SPINS, "OMP_WAIT_POLICY"}
SHORT_WAIT = "3000"
"""Turns that a waiting thread spins before it sleeps (docs/performance.md)."""

RAY_REPORTS = "RAY_USAGE_STATS_ENABLED"

KEPT_BYTES = 2**29
KEPT_BY = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}
"""Environment variables by which a user says himself what glibc keeps."""


def tune_process() -> None:
    """Set up this process for vilu, whose images are embedded in half of the time then.

    ``import vilu`` and all its functions leave the process as it is. A program that mainly
    computes with vilu calls this first of all; the command line does. Three things are set, each
    unless an environment variable says otherwise already:

    - memory that was freed is kept for the next block, where the C library is glibc;
    - a thread of torch that waits for another one spins for a moment only
      (``GOMP_SPINCOUNT=3000``), so that a busy machine does not slow it down;
    - a Ray that is started here reports nothing to its makers (``RAY_USAGE_STATS_ENABLED=0``).

    torch reads the second when it is imported. Neither ``import vilu`` nor ``vilu.tune_process``
    imports it. Where it was imported before, a warning says that this setting comes too late.

    Examples:
        >>> import subprocess, sys
        >>> program = "import sys, vilu; vilu.tune_process(); print('torch' in sys.modules)"
        >>> print(subprocess.check_output([sys.executable, "-c", program], text=True).strip())
        False
    """
    keep_freed_memory()
    os.environ.setdefault(RAY_REPORTS, "0")
    if os.environ.keys() & WAITING_IS_SET_BY:
        return
    os.environ[SPINS] = SHORT_WAIT
    if "torch" in sys.modules:
        warn_caller(
            f"torch was imported before vilu.tune_process(): {SPINS} has no effect in this process "
            f"any more. Call it before torch is imported, or set {SPINS}={SHORT_WAIT} outside."
        )


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
