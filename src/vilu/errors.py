"""Every error that vilu raises on purpose, each with the exit code of the command line; checks of settings.

A message says what was found, what was expected, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


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
    """A promise that these calibration rows cannot support; the message says how many would be needed."""

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


def require_at_least(name: str, value: int, least: int) -> None:
    """Refuse a smaller number."""
    if value < least:
        raise UsageError(f"{name} must be at least {least}. Got {value} instead.")


def require_between(name: str, value: float, interval: str = "(0, 1)") -> None:
    """Refuse a number that is not between 0 and 1; the brackets say whether these are allowed."""
    ends = {0.0: interval.startswith("["), 1.0: interval.endswith("]")}
    if not (0 < value < 1 or ends.get(value)):
        raise UsageError(f"{name} must be in {interval}. Got {value} instead.")


def require_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse another word."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}. Got {value!r} instead.")
