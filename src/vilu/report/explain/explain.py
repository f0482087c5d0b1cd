"""Why answers are suspicious: one explanation for each row, and its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vilu.artifacts.documents import SCHEMA_VERSION, write_json
from vilu.artifacts.paths import claim_file
from vilu.callers import warn_caller
from vilu.device import torch_defaults
from vilu.embeddings.source import EmbeddingSource, log_posterior
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.predictors.bank.search import leaders
from vilu.predictors.contract.coalitions import NoAttribution, Scored
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.seen import common_identity
from vilu.progress import track
from vilu.report.explain.attribution import Attribution, Attributor
from vilu.report.explain.competitors import Neighbour, Own, TrainingRows, Weights, weights_of
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
    """Results that are read as text, and stored as JSON."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {"schema_version": SCHEMA_VERSION, "kind": self.kind, **dataclasses.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write ``.json`` atomically; an explanation that lies there is replaced, no other file.

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
    # the right answer, None where unknown; "none of the classes" where there is none
    truth: str | None
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

    # one explanation each, the most uncertain first where nobody chose
    rows: tuple[Explanation, ...]
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
        kind = "a score, higher = more likely wrong"
        if self.is_probability:
            kind = "probability of failure"
        head = (
            f"method        {self.method}; uncertainty: {kind}\n"
            f"competitors   {self.weights}\n"
            f"attribution   {self.attribution}\n"
            f"neighbours    {self.neighbours}"
        )
        paragraphs = [_row_text(row, self.unit) for row in self]
        return "\n\n".join([head, *paragraphs])


def _row_text(row: Explanation, unit: str | None) -> str:
    """One paragraph."""
    lines = [f"row {row.row}  {shown(row.key)}", _answer_line(row)]
    competitors = [f"{shown(rival.name)} {rival.weight:.3f}" for rival in row.competitors]
    lines.append("  competes    " + "   ".join(competitors))
    if row.attribution is not None:
        lines.append(_attribution_line(row.attribution, unit))
    lines += _neighbour_lines("failures", row.failures)
    lines += _neighbour_lines("successes", row.successes)
    return "\n".join(lines)


def _answer_line(row: Explanation) -> str:
    answer = f"{shown(row.answer)} ({row.posterior:.1%})"
    line = f"  answer      {answer}   uncertainty {row.uncertainty:.4g}"
    if row.truth is None:
        return line
    verdict = {None: "", True: "  WRONG", False: "  right"}[row.wrong]
    return f"{line}   truth {shown(row.truth)}{verdict}"


def _attribution_line(attribution: Attribution, unit: str | None) -> str:
    parts = [f" {value:+.2f} {name}" for name, value in attribution.parts.items()]
    total = f"{attribution.score:.2f} = {attribution.baseline:.2f} mean"
    return f"  {unit}  {total}{''.join(parts)}"


def _neighbour_lines(kind: str, neighbours: Sequence[Neighbour] | None) -> list[str]:
    """A heading and a line for each; nothing where no training rows were given."""
    if neighbours is None:
        return []
    heading = f"  {'nearest' if neighbours else 'no'} training {kind}"
    return [heading, *map(_neighbour_text, neighbours)]


def _neighbour_text(row: Neighbour) -> str:
    text = f"    {row.cosine:.3f}  {shown(row.key)}  answered {shown(row.answer)}"
    if row.answer != row.truth:
        text += f", true {shown(row.truth)}"
    return text


class Depth(NamedTuple):
    """How much an explanation tells of a row."""

    candidates: int = 5  # competitors of an answer
    neighbours: int = 3  # training failures, and successes
    background: int = 128  # rows that an attribution compares with
    seed: int = 0  # of their draw


DEFAULT = Depth()


@checked
@torch_defaults()
def explain(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    train: EmbeddingSource | None = None,
    rows: Sequence[int | str] | None = None,
    *,
    n: int = 10,
    depth: Depth = DEFAULT,
) -> Explanations:
    """Why some answers are suspicious.

    An explanation names the competitors of an answer, training rows that look alike, and what moved
    the score.

    Args:
        predictor: Ready to score.
        data: The rows' source.
        train: Labelled training rows, for the neighbours. Where ``data`` have too few rows that are
            not explained, the attribution's background is drawn from them, too, although they were
            scored in the fit.
        rows: Row numbers, or keys; None for the ``n`` most uncertain rows.
        n: How many rows where none are chosen.
        depth: How much is told of each.

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
        >>> (row,) = vilu.explain(vilu.MCM(), data, n=1)  # the most uncertain row
        >>> row.row, row.answer, row.truth, [rival.name for rival in row.competitors]
        (1, 'dog', 'cat', ['dog', 'cat', 'cup'])
    """
    counts = (depth.candidates, depth.neighbours, depth.background)
    if min(n, *counts) < 1:
        raise UsageError(
            f"n, candidates, neighbours and background must be positive. Got {n}, {counts}."
        )
    predictor.require_fitted()
    if data.n_candidates < 2:
        raise DataError(
            "with one candidate no other answer was possible, so there is nothing to explain."
        )
    if rows is None:
        chosen = most_uncertain(predictor, data, n)
    else:
        chosen = find_rows(data, rows)
    neighbours = "left out: no training rows given"
    if train is not None:
        data.space.require_match(
            train.space, name="the data to explain", other_name="the training set"
        )
        neighbours = f"of {len(train)} training rows"
    attributor, attribution = _attributor(predictor, data, train, chosen, depth)
    explained = _explained(predictor, data, chosen, depth, attributor)
    return Explanations(
        rows=tuple(_with_neighbours(explained, data, train, depth)),
        method=predictor.label,
        is_probability=predictor.is_probability,
        weights=weights_of(predictor).meaning,
        unit=None if attributor is None else attributor.coalitions.unit,
        attribution=attribution,
        neighbours=neighbours,
        n_seen=_seen(predictor, data, chosen),
    )


def _attributor(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    train: EmbeddingSource | None,
    chosen: Tensor,
    depth: Depth,
) -> tuple[Attributor | None, str]:
    """The attributor, where the method allows one, and a sentence on how, or why not."""
    source = data
    leave_out = chosen
    kind = "other"
    n_unexplained = len(data.usable_rows) - len(chosen)
    if train is not None and n_unexplained < depth.background:
        source = train
        leave_out = chosen[:0]
        kind = "training"
    try:
        attributor = Attributor(predictor, source, depth.background, depth.seed, leave_out)
    except NoAttribution as reason:
        return None, f"left out: {reason}"
    background = f"{attributor.n_background} {kind} rows"
    return attributor, f"Shapley values against {background}: {attributor.coalitions.meaning}"


def most_uncertain(predictor: FailurePredictor, data: EmbeddingSource, n: int) -> Tensor:
    """(<= n,) positions of the rows of largest uncertainty, falling.

    Of rows of equal uncertainty the lowest position comes first.
    """
    uncertainty = predictor.predict_uncertainty(data)
    scored = np.flatnonzero(np.isfinite(uncertainty))
    if not len(scored):
        raise DataError(f"none of the {len(data)} rows has a score to explain.")
    order = np.argsort(-uncertainty[scored], kind="stable")
    return torch.from_numpy(scored[order[:n]])


def _explained(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    rows: Tensor,
    depth: Depth,
    attributor: Attributor | None,
) -> list[tuple[Explanation, Tensor]]:
    """An explanation per row, in their order and without neighbours, with its image (D,)."""
    by_row: dict[int, tuple[Explanation, Tensor]] = {}
    names = Names(data)
    weights = weights_of(predictor)
    with track("explain", len(rows), "rows") as task, torch.no_grad():
        for scored in scored_rows(predictor, data, rows):
            batch, _ = scored
            explanations = _of_batch(scored, names, weights, depth, attributor)
            for explanation, image in zip(explanations, batch.image, strict=True):
                by_row[explanation.row] = (explanation, image.cpu())
                task.advance(1)
    return [by_row[row] for row in rows.tolist()]


def _of_batch(
    scored: Scored, names: Names, weights: Weights, depth: Depth, attributor: Attributor | None
) -> Iterator[Explanation]:
    """The explanations of a batch's rows, in order."""
    batch, scores = scored
    posterior = log_posterior(batch).exp().cpu()
    n_leaders = min(depth.candidates, len(batch.text))
    weight, leader = leaders(weights.of(batch).cpu(), n_leaders)
    truth = truths(batch).tolist()
    failure = batch.failure.tolist()
    attributions: list[Attribution] | None = None
    if attributor is not None:
        attributions = attributor.of(scored)
    for place, row in enumerate(batch.index.tolist()):
        answer = int(batch.prediction[place])
        is_labelled = truth[place] != UNKNOWN
        is_judged = failure[place] != UNKNOWN
        yield Explanation(
            row=row,
            key=names.data.ids[row],
            answer=names.of(row, answer),
            posterior=float(posterior[place, answer]),
            uncertainty=float(scores[place]),
            truth=names.of(row, truth[place]) if is_labelled else None,
            wrong=bool(failure[place]) if is_judged else None,
            competitors=_competitors(row, names, leader[place], weight[place], posterior[place]),
            failures=None,
            successes=None,
            attribution=None if attributions is None else attributions[place],
        )


def _competitors(
    row: int, names: Names, leader: Tensor, weight: Tensor, posterior: Tensor
) -> tuple[Competitor, ...]:
    """The candidates ``leader`` of a row with their weights (both of one length), largest first."""
    competitors = []
    for candidate, candidate_weight in zip(leader.tolist(), weight.tolist(), strict=True):
        name = names.of(row, candidate)
        competitors.append(Competitor(name, candidate_weight, float(posterior[candidate])))
    return tuple(competitors)


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
    images = torch.stack([image for _, image in explained])
    rows = np.array([explanation.row for explanation in explanations])
    by = common_identity(
        train.identified_by, data.identified_by, ("the training set", "the explained rows")
    )
    own: Own | None = None
    if by is not None:
        own = (by, data.identities(by, rows))
    near = TrainingRows(train).near(images, own, depth.neighbours)
    with_neighbours = []
    for explanation, (failures, successes) in zip(explanations, near, strict=True):
        with_neighbours.append(
            replace(explanation, failures=tuple(failures), successes=tuple(successes))
        )
    return with_neighbours


def _seen(predictor: FailurePredictor, data: EmbeddingSource, rows: Tensor) -> int:
    """How many rows were used to fit, with a warning where there are any."""
    seen = predictor.seen(data, rows.numpy())
    if len(seen):
        warn_caller(
            f"{seen.in_words('explained rows')} were used to fit this {predictor.name}: "
            "their scores say little about new images.",
        )
    return len(seen)
