"""The interface of the journals of a service, in this process or in a Ray actor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

from vilu.calibration.monitor.status import Status
from vilu.errors import DataError

PREDICTOR_NAMES: Final = ("first", "second")
"""Names of the predictors of a service: the main predictor, and an optional second predictor."""

ScoreColumns = tuple[list[int], list[float]]
"""For some rows: the indices of the answers, and the uncertainties."""


class LabelCounts(NamedTuple):
    """Counts of labels from a client, for the rows of a predictor."""

    n_new: int  # number of new labels, for rows without a label before
    unknown_row_ids: list[str]  # row ids from the client that are missing in the journal


GuaranteeState = Literal["holds", "void", "none"]
"""State of a guarantee: "holds", "void" after an alarm, or "none" without a guarantee."""


class ContradictionError(DataError):
    """A label differs from the present label of a row; nothing of the request is written."""


def make_row_id(request_id: str, index: int, content: bytes, picture: bytes) -> str:
    """The id of a row of a request; a repeated request with the same images gives the same ids.

    Args:
        request_id: Id of the request.
        index: Index of the image or row in the request.
        content: Digest or bytes of the image or row.
        picture: Bytes that are equal for equal pictures, such as the pixels. The id ends with the
            digest of ``picture``.
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
        guarantees: Maps the name of a predictor to the state of the guarantee.
        has_lost_journal: Whether the file of a journal was removed or replaced.
        is_writable: Whether the last write to every journal succeeded.
    """

    answering_name: str
    guarantees: dict[str, GuaranteeState]
    has_lost_journal: bool = False
    is_writable: bool = True


class Journals(Protocol):
    """The journals of all predictors of a service, each known by the name of the predictor."""

    def record(self, ids: Sequence[str], scores: Mapping[str, ScoreColumns]) -> ServiceState:
        """Write rows with the answers of all predictors; return the state of the service."""

    def state(self) -> ServiceState:
        """The present state of the service."""

    def check_writable(self) -> ServiceState:
        """Try whether the journals can be written; return the state of the service."""

    def label(self, labels: Mapping[str, str]) -> dict[str, LabelCounts]:
        """Write labels, and count the labels for every predictor.

        ``labels`` maps the id of a row to a label. The result maps the name of a predictor to
        counts.
        """

    def correct(
        self, labels_before: Mapping[str, str], labels_after: Mapping[str, str]
    ) -> ServiceState:
        """Replace labels by other labels; both arguments map the id of a row to a label."""

    def statuses(self) -> dict[str, Status]:
        """Maps the name of every predictor with a monitor to the status of the monitor."""

    def switch(self, name: str) -> ServiceState:
        """Let another predictor answer from now on; return the state of the service."""

    def close(self) -> None:
        """Save the monitors."""
