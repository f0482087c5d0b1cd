"""What is said about each explained row, and about all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vilu.errors import UsageError
from vilu.explaining.attribution import Attribution
from vilu.explaining.neighbours import Neighbour
from vilu.files import write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Competitor:
    """A candidate.

    Attributes:
        name: Of the class; of a caption the key of its pair.
        weight: That the method gives it (``Explanations.weights``).
        posterior: Its zero-shot probability.
    """

    name: str
    weight: float
    posterior: float


@dataclass(frozen=True)
class Explanation:
    """Why one answer is suspicious, or not.

    Attributes:
        row: Position in the data.
        key: Identifier.
        answer: The zero-shot answer.
        posterior: Its zero-shot probability.
        uncertainty: Of the method, higher = more likely wrong.
        truth: The right answer, None where unknown.
        wrong: Whether the answer is wrong, None where unknown.
        competitors: Candidates of the largest weights, falling.
        failures: The training rows most like it whose answers are wrong; None where no training rows were given.
        successes: The same of right answers.
        attribution: What moved the score; None where the method has none.
    """

    row: int
    key: str
    answer: str
    posterior: float
    uncertainty: float
    truth: str | None
    wrong: bool | None
    competitors: tuple[Competitor, ...]
    failures: tuple[Neighbour, ...] | None
    successes: tuple[Neighbour, ...] | None
    attribution: Attribution | None


@dataclass(frozen=True)
class Explanations:
    """Explained rows, and what their numbers mean.

    Attributes:
        rows: One explanation each, the most uncertain first where nobody chose.
        method: Label of the predictor.
        is_probability: Whether the uncertainty is a probability of failure.
        weights: What the weights of the competitors are.
        unit: What the attribution shares out; None where there is none.
        attribution: How it is defined, or why there is none.
        neighbours: Where the neighbours are from, or why there are none.
        n_seen: How many of the rows were used to fit the predictor, as far as is known.
    """

    rows: tuple[Explanation, ...]
    method: str
    is_probability: bool
    weights: str
    unit: str | None
    attribution: str
    neighbours: str
    n_seen: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.rows)

    def __str__(self) -> str:
        from vilu.explaining.text import explanations_text

        return explanations_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {"schema_version": SCHEMA_VERSION, "kind": "explanations", **dataclasses.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write ``.json`` atomically; errors as ``save_json``."""
        save_json(path, self.to_dict())


def save_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write plain JSON atomically.

    Raises:
        UsageError: If the suffix is not ``.json``.
        StorageError: If the file system refuses.
    """
    require_json(path)
    write_json(path, content)


def require_json(path: str | Path) -> None:
    """Refuse a file of another format.

    Raises:
        UsageError: If the suffix is not ``.json``.
    """
    if Path(path).suffix.lower() != ".json":
        raise UsageError(f"explanations are nested, so they go to a .json file. Got {Path(path).name!r} instead.")
