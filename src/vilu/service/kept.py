"""What is kept of a service, and how all who judge ask for it: a keeper, here or behind an actor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from vilu.calibration.monitor.status import Status

NAMES: Final = ("first", "second")
"""What the predictors of a service are called: the one that it was started with, and the one beside it."""

Scores = tuple[list[int], list[float]]
"""Answers and uncertainties of some rows."""

PromiseState = Literal["holds", "void", "none"]
"""Of a promise: no alarm so far, an alarm was raised, or nothing was promised."""


def row_id(request: str, place: int, content: bytes) -> str:
    """What a row is known by: the same request sent again, with the same image, is the same row."""
    return hashlib.blake2b(f"{request}\n{place}\n".encode() + content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Kept:
    """Which predictor answers, the state of every promise, and whether a journal was lost."""

    answering: str
    promises: dict[str, PromiseState]
    lost: bool = False


class Keeps(Protocol):
    """A keeper, here or behind an actor."""

    def record(self, ids: Sequence[str], said: Mapping[str, Scores]) -> Kept:
        """Write what the predictors said of some rows."""

    def kept(self) -> Kept:
        """The state."""

    def label(self, labels: Mapping[str, str]) -> dict[str, tuple[int, list[str]]]:
        """Note what rows really show."""

    def statuses(self) -> dict[str, Status]:
        """What the monitors say."""

    def switch(self, name: str) -> Kept:
        """Have another predictor answer."""

    def close(self) -> None:
        """Save."""
