"""What there is of a data set, in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

SHOWN: Final = 5
"""Missing files that are named."""


@dataclass(frozen=True)
class Count:
    """Images of one split.

    Attributes:
        found: Files that are there; None where they were not counted.
        listed: Files that should be, by the list in use; None where nothing lists them.
        missing: The first of those that are not.
        problem: Why nothing can be said; None where something can.
    """

    found: int | None
    listed: int | None
    missing: tuple[str, ...] = ()
    problem: str | None = None

    @classmethod
    def sum(cls, counts: Iterable[Count]) -> Count:
        """Of several splits together."""
        parts = list(counts)
        return cls(
            _sum(part.found for part in parts),
            _sum(part.listed for part in parts),
            tuple(name for part in parts for name in part.missing)[:SHOWN],
            next((part.problem for part in parts if part.problem), None),
        )


@dataclass(frozen=True)
class Survey:
    """What a reader finds.

    Attributes:
        origin: Which list of splits is in use, for people.
        counts: By split.
        binding: Whether the published sizes must be met; not where the list is the user's own, or links have died.
    """

    origin: str
    counts: Mapping[str, Count]
    binding: bool = True


def _sum(numbers: Iterable[int | None]) -> int | None:
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total
