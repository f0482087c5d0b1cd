"""The interface to a service's journals, in this process or in a Ray actor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

from vilu.calibration.monitor.status import Status
from vilu.errors import DataError

PREDICTOR_NAMES: Final = ("first", "second")
"""Predictor names in a service: the main predictor, and an optional second predictor."""

FINGERPRINT_LENGTH: Final = 16
"""Number of characters kept from a fingerprint, in replies and in names of journals."""

ScoreColumns = tuple[list[int], list[float]]
"""The answer indices and the uncertainties for some rows."""


class LabelCounts(NamedTuple):
    """What became of a client's labels in one predictor's journal."""

    n_new: int  # number of rows that had no label before, and have one now
    unknown_row_ids: list[str]  # row ids from the client that are missing in the journal


GuaranteeState = Literal["holds", "void", "none"]
"""A guarantee's state: "holds", "void" after an alarm, or "none" without a guarantee."""


class ContradictionError(DataError):
    """A label differs from a row's present label. Nothing in the request is written."""


def make_row_id(request_id: str, index: int, content: bytes, picture: bytes) -> str:
    """Return a row id. If a request is sent again under the same id, its rows get the same ids.

    Args:
        request_id: Id of the request.
        index: The image's or row's index in the request.
        content: The bytes of the row, or the digest of the encoded image.
        picture: Bytes that are equal for equal pictures, such as the pixels. The row id ends with
            the digest of ``picture``.
    """
    content_in_request = f"{request_id}\n{index}\n".encode() + content
    return f"{_short_digest(content_in_request)}-{_short_digest(picture)}"


def _short_digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclass(frozen=True)
class ServiceState:
    """State of a service.

    Attributes:
        answering_name: Name of the answering predictor.
        guarantees: Maps each predictor name to the state of the predictor's guarantee.
        has_lost_journal: Whether a journal's file was removed or replaced.
        is_writable: Whether the last write to every journal succeeded.
    """

    answering_name: str
    guarantees: dict[str, GuaranteeState]
    has_lost_journal: bool = False
    is_writable: bool = True


class Journals(Protocol):
    """The journals for all predictors in a service, each known by the predictor's name."""

    def record(self, ids: Sequence[str], scores: Mapping[str, ScoreColumns]) -> ServiceState:
        """Write rows with all predictors' answers, and return the service's state."""

    def state(self) -> ServiceState:
        """Return the service's present state."""

    def check_writable(self) -> ServiceState:
        """Try whether the journals can be written, and return the service's state."""

    def label(self, labels: Mapping[str, str]) -> dict[str, LabelCounts]:
        """Write labels, and count the labels for every predictor.

        ``labels`` maps each row id to a label. The result maps the name of each predictor with a
        journal to the predictor's counts.
        """

    def correct(self, labels_before: Mapping[str, str], labels_after: Mapping[str, str]) -> int:
        """Replace ``labels_before`` by ``labels_after``. Both map each row id to a label.

        The result is the number of rows whose label was replaced.
        """

    def statuses(self) -> dict[str, Status]:
        """Return every monitor's status, by the name of its predictor."""

    def switch(self, name: str) -> ServiceState:
        """Let the predictor ``name`` answer from now on, and return the service's state."""

    def close(self) -> None:
        """Save the monitors."""
