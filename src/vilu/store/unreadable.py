"""Turn the errors of unreadable files into errors of vilu: damaged, or refused by the system."""

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
"""Exceptions of NumPy for a damaged file; the last four come from parsing its header as Python."""

UNREADABLE_PARQUET = (pa.ArrowException, OSError, ValueError)
"""Exceptions of pyarrow for a damaged file; ValueError also for names that are not text."""

NOT_THE_FILE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
"""Error codes that concern rights or resources of the system, not the content of a file."""


@contextmanager
def or_damaged(
    path: Path | str,
    hint: str,
    kinds: tuple[type[Exception], ...] = UNREADABLE_PARQUET,
    fault: type[ViLUError] = StorageError,
    state: str = "damaged",
) -> Iterator[None]:
    """Turn exceptions of these ``kinds`` in the block into ``fault``: the file is ``state``.

    Errors of the system (``NOT_THE_FILE``) become a StorageError that does not say "damaged".
    """
    try:
        yield
    except ViLUError:
        raise
    except kinds as error:
        # Without file descriptors or memory, no file can be read: this one may be undamaged.
        if isinstance(error, OSError) and error.errno in NOT_THE_FILE:
            advice = ""
            if error.errno == errno.EMFILE:
                advice = " Raise the limit on open files: ulimit -n 4096."
            reason = os.strerror(error.errno)
            raise StorageError(f"cannot read {path}: {reason}.{advice}") from error
        raise fault(f"{path} is {state}: {error}. {hint}") from error
