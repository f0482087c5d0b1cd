"""Every error that vilu raises on purpose, each with the exit code of the command line.

A message says what was found, what was expected, and how to mend it. Here too: the codes of what
has no class, which every room reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

UNKNOWN = -1
"""A label, an answer or a failure that is not known."""

OUTSIDE = -2
"""Label of a picture of none of the classes, in files and where data come in.

In memory the Boolean ``outside`` says so.
"""

# stands in place of a label, in files, of a picture that nobody can name: it is not known
NO_NAME = "(skip)"


class ViLUError(Exception):
    """Base of all errors that are the user's to mend; never a bug."""

    exit_code: ClassVar[int] = 1


class UsageError(ViLUError, ValueError):
    """An argument or a hyper-parameter that cannot be."""

    exit_code = 2


class NotFittedError(ViLUError, ValueError, AttributeError):
    """A predictor was asked for scores before ``fit``."""

    exit_code = 2


class DataError(ViLUError, ValueError):
    """Data that cannot be used: empty, malformed, degenerate, or beyond the error budget."""

    exit_code = 3


class InfeasibleError(ViLUError):
    """A guarantee that these calibration rows cannot support, or that nobody has made.

    The message says how many rows would be needed, or how it is made.
    """

    exit_code = 4


class MissingModelError(ViLUError):
    """Model weights or an optional dependency are not on this machine."""

    exit_code = 5


class ProvenanceError(ViLUError, ValueError):
    """Two artefacts do not belong together: other backbone, width, preprocessing, or schema."""

    exit_code = 6


class StorageError(ViLUError, OSError):
    """The file system refused: disk full, read-only, or a damaged file."""

    exit_code = 7


class BusyError(ViLUError):
    """Another process holds the lock; trying again later can succeed."""

    exit_code = 75


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question whether the nearest of the known names was meant; "" where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
