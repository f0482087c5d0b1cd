"""Turn the exceptions of unreadable files into errors of vilu."""

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
"""Exceptions of NumPy for a damaged file.

NumPy parses the header as Python code. The last four exceptions come from this parser.
"""

UNREADABLE_PARQUET = (pa.ArrowException, OSError, ValueError)
"""Exceptions of pyarrow for a damaged file. ValueError also means that a name is not text."""

NOT_THE_FILE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
"""Error codes that concern permissions or the system, not the content of the file."""


@contextmanager
def or_damaged(
    path: Path | str,
    hint: str,
    kinds: tuple[type[Exception], ...] = UNREADABLE_PARQUET,
    fault: type[ViLUError] = StorageError,
    state: str = "damaged",
) -> Iterator[None]:
    """Turn the exceptions ``kinds`` in the block into the error ``fault``.

    The message says that the file is ``state``, and ends with the advice ``hint``. Errors that do
    not concern the content (``NOT_THE_FILE``) become a StorageError that does not say "damaged".
    """
    try:
        yield
    except ViLUError:
        raise
    except kinds as error:
        # Without file descriptors or memory, no file can be read, so this file may be undamaged.
        if isinstance(error, OSError) and error.errno in NOT_THE_FILE:
            advice = ""
            if error.errno == errno.EMFILE:
                advice = " Raise the limit on open files: ulimit -n 4096."
            reason = os.strerror(error.errno)
            raise StorageError(f"cannot read {path}: {reason}.{advice}") from error
        raise fault(f"{path} is {state}: {error}. {hint}") from error
