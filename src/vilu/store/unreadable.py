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

NPY_READING_ERRORS = (
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

PARQUET_READING_ERRORS = (pa.ArrowException, OSError, ValueError)
"""Exceptions of pyarrow for a damaged file. ValueError also means that a name is not text."""

SYSTEM_ERRNOS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
"""Error codes that concern permissions or the system, not the content of the file."""


@contextmanager
def convert_damage_errors(
    path: Path | str,
    hint: str,
    exceptions: tuple[type[Exception], ...] = PARQUET_READING_ERRORS,
    error_class: type[ViLUError] = StorageError,
    condition: str = "damaged",
) -> Iterator[None]:
    """Convert the ``exceptions`` of a library that reads a damaged file into ``error_class``.

    The message is "PATH is CONDITION: REASON. HINT". Errors that do not concern the content of the
    file (``SYSTEM_ERRNOS``) become a StorageError with the message "cannot read PATH: REASON."
    """
    try:
        yield
    except ViLUError:
        raise
    except exceptions as error:
        # These errors say nothing about the content: without memory, no file can be read.
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRNOS:
            advice = ""
            if error.errno == errno.EMFILE:
                advice = " Raise the limit on open files: ulimit -n 4096."
            reason = os.strerror(error.errno)
            raise StorageError(f"cannot read {path}: {reason}.{advice}") from error
        raise error_class(f"{path} is {condition}: {error}. {hint}") from error
