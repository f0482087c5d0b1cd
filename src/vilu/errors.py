"""All errors that vilu raises on purpose, each with an exit code for the command line.

A message states the found value, the expected value, and the correction. This module also defines
the codes for unknown labels and for labels outside the classes, because all subpackages use these
codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar, Final

UNKNOWN = -1
"""Code of an unknown label, answer or failure."""

OUTSIDE = -2
"""Label for a picture outside all classes, in files and in arguments.

In memory such a picture has the label ``UNKNOWN`` and the Boolean ``outside`` is True.
"""

OUTSIDE_NAME: Final = "(outside)"
"""Label for a picture outside all classes, where labels are class names."""

# Label in files for a picture that nobody could name. The picture's class is not known.
NO_NAME = "(skip)"


class ViLUError(Exception):
    """Base of all errors that the user can correct. Never raised for a bug."""

    exit_code: ClassVar[int] = 1


class UsageError(ViLUError, ValueError):
    """An argument or a hyper-parameter is invalid."""

    exit_code = 2


class NotFittedError(ViLUError, ValueError, AttributeError):
    """A predictor was asked for scores before ``fit``."""

    exit_code = 2


class DataError(ViLUError, ValueError):
    """Data cannot be used: empty, malformed, degenerate, or with too many bad rows."""

    exit_code = 3


class InfeasibleError(ViLUError):
    """The calibration rows cannot support a guarantee, or nothing was calibrated.

    The message states how many rows would be needed, or how to calibrate.
    """

    exit_code = 4


class MissingModelError(ViLUError):
    """Model weights or an optional dependency are not on this machine."""

    exit_code = 5


class ProvenanceError(ViLUError, ValueError):
    """Two artefacts do not belong together: different backbone, width, preprocessing or schema."""

    exit_code = 6


class StorageError(ViLUError, OSError):
    """The file system refused: disk full, read-only, or a damaged file."""

    exit_code = 7


class BusyError(ViLUError):
    """Another process holds the lock. Trying again later can succeed."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a question about the most similar known name, such as " Did you mean 'cat'?".

    Return "" if no known name has at least the similarity ``cutoff``, from 0 to 1.
    """
    similar = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean {similar[0]!r}?" if similar else ""
