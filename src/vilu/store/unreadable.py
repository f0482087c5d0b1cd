"""What is raised of a file that cannot be read: damaged, or kept back by the system."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError

import pyarrow as pa

from vilu.errors import StorageError, ViLUError

UNREADABLE_NPY = (
    OSError,
    ValueError,
    OverflowError,
    SyntaxError,
    TokenError,
    RecursionError,
    MemoryError,
)
"""What numpy raises on a damaged file (the last four from parsing its header as Python)."""

UNREADABLE_PARQUET = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises on one (ValueError also for names that are no text)."""

NOT_THE_FILE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
"""What the system says of itself: it tells nothing about the bytes of a file."""


@contextmanager
def or_damaged(
    path: Path | str,
    hint: str,
    kinds: tuple[type[Exception], ...] = UNREADABLE_PARQUET,
    fault: type[ViLUError] = StorageError,
    state: str = "damaged",
) -> Iterator[None]:
    """A block in which exceptions of these kinds become a fault: the file is in this ``state``."""
    try:
        yield
    except ViLUError:
        raise
    except kinds as error:
        # Out of descriptors or memory every file is unreadable: it must not be called damaged.
        if isinstance(error, OSError) and error.errno in NOT_THE_FILE:
            advice = ""
            if error.errno == errno.EMFILE:
                advice = " Raise the limit on open files: ulimit -n 4096."
            reason = os.strerror(error.errno)
            raise StorageError(f"cannot read {path}: {reason}.{advice}") from error
        raise fault(f"{path} is {state}: {error}. {hint}") from error
