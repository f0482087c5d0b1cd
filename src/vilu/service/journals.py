"""The interface of the journals of a service, which are in this process or in a Ray actor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

from vilu.calibration.monitor.status import Status

NAMES: Final = ("first", "second")
"""Names of the predictors of a service: the main predictor, and the optional second one."""

Scores = tuple[list[int], list[float]]
"""Indices of the answers, and uncertainties, of some rows."""


class LabelCounts(NamedTuple):
    """What became of the labels that a client sent, in the journal of one predictor."""

    n_new: int  # number of labels of rows that had no label before
    unknown: list[str]  # ids of the client that no row of the journal has


GuaranteeState = Literal["holds", "void", "none"]
"""State of a guarantee: "holds" before any alarm, "void" after one, "none" without guarantee."""


def row_id(request: str, index: int, content: bytes) -> str:
    """The id of a row of a request; a repeated request with the same images gives the same ids.

    Args:
        request: Id of the request.
        index: Index of the image in the request.
        content: Digest or bytes of the image or row.
    """
    return hashlib.blake2b(f"{request}\n{index}\n".encode() + content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class ServiceState:
    """State of a service.

    Attributes:
        answering: Name of the predictor that answers.
        guarantees: State of every guarantee, by the name of the predictor.
        has_lost_journal: Whether the file of a journal was removed or replaced.
    """

    answering: str
    guarantees: dict[str, GuaranteeState]
    has_lost_journal: bool = False


class Journals(Protocol):
    """The journals of all predictors of a service, by the names of the predictors."""

    def record(self, ids: Sequence[str], scores: Mapping[str, Scores]) -> ServiceState:
        """Write rows with the answers of all predictors; returns the state of the service."""

    def state(self) -> ServiceState:
        """The present state of the service."""

    def label(self, labels: Mapping[str, str]) -> dict[str, LabelCounts]:
        """Write labels, by the id of the row; returns the counts by the name of the predictor."""

    def statuses(self) -> dict[str, Status]:
        """The status of every monitor, by the name of the predictor."""

    def switch(self, name: str) -> ServiceState:
        """Let another predictor answer from now on; returns the state of the service."""

    def close(self) -> None:
        """Save the monitors."""
