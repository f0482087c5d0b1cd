"""Why answers are suspicious: one explanation a row, and its text."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vilu.artifacts.documents import SCHEMA_VERSION, write_json
from vilu.artifacts.paths import claim_file
from vilu.device import as_usual
from vilu.embeddings.source import EmbeddingSource, log_posterior
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.predictors.bank.search import leaders
from vilu.predictors.contract.games import NoAttribution, Scored
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.seen import common_identity
from vilu.progress import track
from vilu.report.explain.attribution import Attribution, Attributor
from vilu.report.explain.competitors import Neighbour, TrainingRows, Weights, weights_of
from vilu.report.explain.rows import Names, find_rows, scored_rows, truths
from vilu.text import aligned, rest, shown
from vilu.validation import checked

SHOWN = 15  # lines of a table; the rest is counted


def require_json(path: str | Path) -> None:
    """Refuse a file of another format."""
    if Path(path).suffix.lower() != ".json":
        raise UsageError(
            f"explanations are nested, so they go to a .json file. Got {Path(path).name!r} instead."
        )


@dataclass(frozen=True)
class Findings:
    """What can be read as text, and kept as JSON."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {"schema_version": SCHEMA_VERSION, "kind": self.kind, **dataclasses.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write ``.json`` atomically; other explanations that lie there are replaced, and no other file.

        Raises:
            UsageError: If the suffix is not ``.json``, or something else than an explanation lies
                there.
            StorageError: If the file system refuses.
        """
        require_json(path)
        claim_file(path, "explanation", overwrite=True)
        write_json(path, self.to_dict())


def first_lines(heading: Sequence[str], rows: Sequence[Sequence[str]], what: str) -> list[str]:
    """A table of the first rows, and how many more there are."""
    return [*aligned([heading, *rows[:SHOWN]]), *rest(len(rows), SHOWN, what)]


@dataclass(frozen=True)
class Competitor:
    """A candidate."""

    name: str  # of the class; of a caption the key of its pair
    weight: float  # that the method gives it (``Explanations.weights``)
    posterior: float  # its zero-shot probability


@dataclass(frozen=True)
class Explanation:
    """Why one answer is suspicious, or not."""

    row: int  # position in the data
    key: str  # identifier
    answer: str  # the zero-shot answer
    posterior: float  # its zero-shot probability
    uncertainty: float  # of the method, higher = more likely wrong
    truth: (
        str | None
    )  # the right answer, None where unknown; "none of the classes" where there is none
    wrong: bool | None  # whether the answer is wrong, None where unknown
    competitors: tuple[Competitor, ...]  # candidates of the largest weights, falling
    # the training rows most like it whose answers are wrong; None where no training rows were given
    failures: tuple[Neighbour, ...] | None
    successes: tuple[Neighbour, ...] | None  # the same of right answers
    attribution: Attribution | None  # what moved the score; None where the method has none


@dataclass(frozen=True)
class Explanations(Findings):
    """Explained rows, and what their numbers mean."""

    kind: ClassVar[str] = "explanations"

    rows: tuple[
        Explanation, ...
    ]  # one explanation each, the most uncertain first where nobody chose
    method: str  # label of the predictor
    is_probability: bool  # whether the uncertainty is a probability of failure
    weights: str  # what the weights of the competitors are
    unit: str | None  # what the attribution shares out; None where there is none
    attribution: str  # how it is defined, or why there is none
    neighbours: str  # where the neighbours are from, or why there are none
    n_seen: int  # how many of the rows were used to fit the predictor, as far as is known

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.rows)

    def __str__(self) -> str:
        kind = (
            "probability of failure"
            if self.is_probability
            else "a score, higher = more likely wrong"
        )
        head = (
            f"method        {self.method}; uncertainty: {kind}\n"
            f"competitors   {self.weights}\n"
            f"attribution   {self.attribution}\n"
            f"neighbours    {self.neighbours}"
        )
        return "\n\n".join([head, *(_row_text(row, self.unit) for row in self)])


def _row_text(row: Explanation, unit: str | None) -> str:
    """One paragraph."""
    verdict = {None: "", True: "  WRONG", False: "  right"}[row.wrong]
    truth = "" if row.truth is None else f"   truth {shown(row.truth)}{verdict}"
    lines = [
        f"row {row.row}  {shown(row.key)}",
        f"  answer      {shown(row.answer)} ({row.posterior:.1%})   uncertainty {row.uncertainty:.4g}{truth}",
        "  competes    "
        + "   ".join(f"{shown(one.name)} {one.weight:.3f}" for one in row.competitors),
    ]
    if row.attribution is not None:
        parts = "".join(f" {value:+.2f} {name}" for name, value in row.attribution.parts.items())
        lines.append(
            f"  {unit}  {row.attribution.score:.2f} = {row.attribution.baseline:.2f} mean{parts}"
        )
    for kind, neighbours in (("failures", row.failures), ("successes", row.successes)):
        if neighbours is not None:
            lines += [
                f"  {'nearest' if neighbours else 'no'} training {kind}",
                *map(_neighbour_text, neighbours),
            ]
    return "\n".join(lines)


def _neighbour_text(row: Neighbour) -> str:
    true = "" if row.answer == row.truth else f", true {shown(row.truth)}"
    return f"    {row.cosine:.3f}  {shown(row.key)}  answered {shown(row.answer)}{true}"


class Depth(NamedTuple):
    """How much is said."""

    candidates: int = 5  # competitors of an answer
    neighbours: int = 3  # training failures, and successes
    background: int = 128  # rows that an attribution compares with
    seed: int = 0  # of their draw


DEFAULT = Depth()


@checked
@as_usual()
def explain(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    train: EmbeddingSource | None = None,
    rows: Sequence[int | str] | None = None,
    *,
    n: int = 10,
    depth: Depth = DEFAULT,
) -> Explanations:
    """Why some answers are suspicious: competitors, training rows that look alike, and what moved the score.

    Args:
        predictor: Ready to score.
        data: The rows' source.
        train: Labelled training rows, for the neighbours. Where ``data`` have too few rows that are
            not explained, the attribution's background is drawn from them, too, although they were
            scored in the fit.
        rows: Row numbers, or keys; None for the ``n`` most uncertain rows.
        n: How many rows where none are chosen.
        depth: How much is said of each.

    Warns:
        UserWarning: If explained rows were used to fit the predictor: their scores say little about
        new images.

    Raises:
        UsageError: If a number is not positive.
        DataError: If a row does not exist or has no score, or no training row has a label.
        NotFittedError: If the predictor needs ``fit`` first.
        ProvenanceError: If the data come from another embedding space.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.6, 0.8]]
        >>> data = vilu.Embeddings(
        ...     image, np.eye(3), [0, 0, 2], logit_scale=10.0, class_names=["cat", "dog", "cup"]
        ... )
        >>> (found,) = vilu.explain(vilu.MCM(), data, n=1)  # the most uncertain row
        >>> found.row, found.answer, found.truth, [one.name for one in found.competitors]
        (1, 'dog', 'cat', ['dog', 'cat', 'cup'])
    """
    if min(n, *depth[:3]) < 1:
        raise UsageError(
            f"n, candidates, neighbours and background must be positive. Got {n}, {tuple(depth[:3])}."
        )
    predictor.require_fitted()
    if data.n_candidates < 2:
        raise DataError(
            "with one candidate no other answer was possible, so there is nothing to explain."
        )
    chosen = most_uncertain(predictor, data, n) if rows is None else find_rows(data, rows)
    if train is not None:
        data.space.require_match(train.space, mine="the data to explain", theirs="the training set")
    attributor, why = _attributor(predictor, data, train, chosen, depth)
    explained = _explained(predictor, data, chosen, depth, attributor)
    return Explanations(
        rows=tuple(_with_neighbours(explained, data, train, depth)),
        method=predictor.label,
        is_probability=predictor.is_probability,
        weights=weights_of(predictor).meaning,
        unit=None if attributor is None else attributor.game.unit,
        attribution=why,
        neighbours="left out: no training rows given"
        if train is None
        else f"of {len(train)} training rows",
        n_seen=_seen(predictor, data, chosen),
    )


def _attributor(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    train: EmbeddingSource | None,
    chosen: Tensor,
    depth: Depth,
) -> tuple[Attributor | None, str]:
    """What attributes, where the method allows it, and a sentence on how, or why not."""
    from_train = train is not None and len(data.usable_rows) - len(chosen) < depth.background
    source, leave_out = (train, chosen[:0]) if train is not None and from_train else (data, chosen)
    try:
        found = Attributor(predictor, source, depth.background, depth.seed, leave_out)
    except NoAttribution as reason:
        return None, f"left out: {reason}"
    whence = f"{found.n_background} {'training' if from_train else 'other'} rows"
    return found, f"Shapley values against {whence}: {found.game.meaning}"


def most_uncertain(predictor: FailurePredictor, data: EmbeddingSource, n: int) -> Tensor:
    """(<= n,) positions of the rows of largest uncertainty, falling; of equal ones the lowest first."""
    uncertainty = predictor.predict_uncertainty(data)
    scored = np.flatnonzero(np.isfinite(uncertainty))
    if not len(scored):
        raise DataError(f"none of the {len(data)} rows has a score to explain.")
    return torch.from_numpy(scored[np.argsort(-uncertainty[scored], kind="stable")[:n]])


def _explained(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    rows: Tensor,
    depth: Depth,
    attributor: Attributor | None,
) -> list[tuple[Explanation, Tensor]]:
    """An explanation per row, in their order and without neighbours, with its image (D,)."""
    found: dict[int, tuple[Explanation, Tensor]] = {}
    names, weights = Names(data), weights_of(predictor)
    with track("explain", len(rows), "rows") as task, torch.no_grad():
        for scored in scored_rows(predictor, data, rows):
            for explanation, image in _of_batch(scored, names, weights, depth, attributor):
                found[explanation.row] = explanation, image
                task.advance(1)
    return [found[row] for row in rows.tolist()]


def _of_batch(
    scored: Scored, names: Names, weights: Weights, depth: Depth, attributor: Attributor | None
) -> Iterator[tuple[Explanation, Tensor]]:
    batch, scores = scored
    posterior = log_posterior(batch).exp().cpu()
    weight, leader = leaders(weights.of(batch).cpu(), min(depth.candidates, len(batch.text)))
    attributions, truth = None if attributor is None else attributor.of(scored), truths(batch)
    for place, row in enumerate(batch.index.tolist()):
        answer, target, failure = (
            int(column[place]) for column in (batch.prediction, truth, batch.failure)
        )
        p, leading = (
            posterior[place],
            zip(weight[place].tolist(), leader[place].tolist(), strict=True),
        )
        explanation = Explanation(
            row=row,
            key=names.data.ids[row],
            answer=names.of(row, answer),
            posterior=float(p[answer]),
            uncertainty=float(scores[place]),
            truth=None if target == UNKNOWN else names.of(row, target),
            wrong=None if failure == UNKNOWN else bool(failure),
            competitors=tuple(
                Competitor(names.of(row, j), given, float(p[j])) for given, j in leading
            ),
            failures=None,
            successes=None,
            attribution=None if attributions is None else attributions[place],
        )
        yield explanation, batch.image[place].cpu()


def _with_neighbours(
    explained: list[tuple[Explanation, Tensor]],
    data: EmbeddingSource,
    train: EmbeddingSource | None,
    depth: Depth,
) -> list[Explanation]:
    """The explanations with their neighbours, from one pass over the training rows."""
    explanations = [explanation for explanation, _ in explained]
    if train is None or not explained:
        return explanations
    images, rows = (
        torch.stack([image for _, image in explained]),
        np.array([e.row for e in explanations]),
    )
    by = common_identity(
        train.identified_by, data.identified_by, ("the training set", "the explained rows")
    )
    own = None if by is None else (by, data.identities(by, rows))
    near = TrainingRows(train).near(images, own, depth.neighbours)
    return [
        replace(explanation, failures=tuple(failures), successes=tuple(successes))
        for explanation, (failures, successes) in zip(explanations, near, strict=True)
    ]


def _seen(predictor: FailurePredictor, data: EmbeddingSource, rows: Tensor) -> int:
    """How many rows were used to fit; said aloud."""
    seen = predictor.seen(data, rows.numpy())
    if len(seen):
        warnings.warn(
            f"{seen.said('explained rows')} were used to fit this {predictor.name}: their scores say little about new "
            "images.",
            stacklevel=5,
        )
    return len(seen)
