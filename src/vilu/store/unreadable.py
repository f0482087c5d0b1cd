"""Convert exceptions from unreadable files into vilu errors."""

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
"""NumPy's exceptions for a damaged file.

NumPy parses the header as Python code. The last four exceptions come from this parser.
"""

PARQUET_READING_ERRORS = (pa.ArrowException, OSError, ValueError)
"""pyarrow's exceptions for a damaged file.

A ValueError is also raised if a column name is not text.
"""

SYSTEM_ERRNOS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
"""Error codes for problems with permissions or with the system, not with a file's content."""


@contextmanager
def convert_damage_errors(
    path: Path | str,
    hint: str,
    exceptions: tuple[type[Exception], ...] = PARQUET_READING_ERRORS,
    error_class: type[ViLUError] = StorageError,
    condition: str = "damaged",
) -> Iterator[None]:
    """Convert ``exceptions``, which a library raises for a damaged file, into ``error_class``.

    The message is "PATH is CONDITION: REASON. HINT", where REASON is the exception's message. HINT
    is a sentence with advice.

    System errors (``SYSTEM_ERRNOS``) have nothing to do with the file's content. They become a
    StorageError with the message "cannot read PATH: REASON."
    """
    try:
        yield
    except ViLUError:
        raise
    except exceptions as error:
        # A system error says nothing about the file's content. For example, it is raised if there
        # are too many open files.
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRNOS:
            advice = ""
            if error.errno == errno.EMFILE:
                advice = " Raise the limit on open files: ulimit -n 4096."
            reason = os.strerror(error.errno)
            raise StorageError(f"cannot read {path}: {reason}.{advice}") from error
        raise error_class(f"{path} is {condition}: {error}. {hint}") from error
