"""The journals of a service as all who judge see them: in this process, or behind an actor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from vilu.calibration.monitor.status import Status

NAMES: Final = ("first", "second")
"""The predictors of a service: the one that it was started with, and the one beside it."""

Scores = tuple[list[int], list[float]]
"""Answers and uncertainties of some rows."""

GuaranteeState = Literal["holds", "void", "none"]
"""Of a guarantee: no alarm so far, an alarm was raised, or nothing was guaranteed."""


def row_id(request: str, place: int, content: bytes) -> str:
    """The id of a row: the same request sent again, with the same image, is the same row."""
    return hashlib.blake2b(f"{request}\n{place}\n".encode() + content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class ServiceState:
    """Which predictor answers, the state of every guarantee, and whether a journal was lost."""

    answering: str
    guarantees: dict[str, GuaranteeState]
    has_lost_journal: bool = False


class Journals(Protocol):
    """The journals of all predictors of a service, by the names of the predictors."""

    def record(self, ids: Sequence[str], scores: Mapping[str, Scores]) -> ServiceState:
        """Write what the predictors answered for some rows; the state after it."""

    def state(self) -> ServiceState:
        """The state now."""

    def label(self, labels: Mapping[str, str]) -> dict[str, tuple[int, list[str]]]:
        """Note what rows really show."""

    def statuses(self) -> dict[str, Status]:
        """What the monitors say."""

    def switch(self, name: str) -> ServiceState:
        """Have another predictor answer."""

    def close(self) -> None:
        """Save the monitors."""
