"""Explanations for suspicious answers, as objects and as text."""

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
from vilu.predictors.bank.search import k_largest
from vilu.predictors.contract.coalitions import NoAttribution, ScoredBatch
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.seen import common_identity
from vilu.progress import track
from vilu.report.explain.attribution import Attribution, Attributor
from vilu.report.explain.competitors import Neighbour, RowsToSkip, TrainingRows, Weights, weights_of
from vilu.report.explain.rows import CandidateNames, find_rows, scored_rows, true_classes
from vilu.text import align_columns, hidden_rows_line, to_terminal_text
from vilu.validation import checked

MAX_ROWS_SHOWN = 15  # maximum number of rows in a printed table. Further rows are only counted


def require_json(path: str | Path) -> None:
    """Raise UsageError if the suffix of a path is not ``.json``."""
    if Path(path).suffix.lower() != ".json":
        raise UsageError(
            f"explanations are nested, so they go to a .json file. Got {Path(path).name!r} instead."
        )


@dataclass(frozen=True)
class Findings:
    """Results that can be printed as text and saved as JSON."""

    kind: ClassVar[str]  # kind of results, as in a saved file

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, with the schema version and the kind."""
        return {"schema_version": SCHEMA_VERSION, "kind": self.kind, **dataclasses.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write a ``.json`` file atomically.

        An existing explanation at this path is replaced. Any other kind of file is not replaced.

        Raises:
            UsageError: If the suffix is not ``.json``, or if an existing file at the path is no
                explanation.
            StorageError: If the file cannot be written.
        """
        require_json(path)
        claim_file(path, "explanation", overwrite=True)
        content = self.to_dict()
        write_json(path, content)


def first_table_lines(
    heading: Sequence[str], rows: Sequence[Sequence[str]], noun: str
) -> list[str]:
    """Format the first rows as a table. A last line counts any further rows as ``noun``."""
    return [
        *align_columns([heading, *rows[:MAX_ROWS_SHOWN]]),
        *hidden_rows_line(len(rows), MAX_ROWS_SHOWN, noun),
    ]


@dataclass(frozen=True)
class Competitor:
    """One of the candidates with the largest weights, possibly the answer itself."""

    name: str  # class name, or for a caption the key of the image-caption pair
    weight: float  # weight that the method gives the candidate. See ``Explanations.weights``
    posterior: float  # zero-shot probability of the candidate


@dataclass(frozen=True)
class Explanation:
    """Why an answer is suspicious, or why it is not."""

    row: int  # position in the data
    key: str  # identifier
    answer: str  # name of the judged answer
    posterior: float  # zero-shot probability of the answer
    uncertainty: float  # the method's uncertainty, higher = more likely wrong
    # name of the right answer, or "none of the classes". None if unknown.
    truth: str | None
    wrong: bool | None  # whether the answer is wrong. None if unknown
    competitors: tuple[Competitor, ...]  # candidates with the largest weights, in descending order
    # nearest training rows with a wrong answer. None if no training rows were given.
    failures: tuple[Neighbour, ...] | None
    # nearest training rows with a right answer. None if no training rows were given.
    successes: tuple[Neighbour, ...] | None
    attribution: Attribution | None  # every input's share in the score. None if not available
    zero_shot: str | None = None  # zero-shot answer if different from ``answer``


@dataclass(frozen=True)
class Explanations(Findings):
    """Explanations for rows, with the meaning of the numbers."""

    kind: ClassVar[str] = "explanations"

    # In the order in which the caller named the rows. If no rows were named, the most uncertain row
    # comes first.
    rows: tuple[Explanation, ...]
    method: str  # the predictor's label
    is_probability: bool  # whether the uncertainty is a failure probability
    weights: str  # meaning of the competitors' weights
    unit: str | None  # the quantity that an attribution splits. None if there is no attribution
    attribution: str  # definition of the attribution, or the reason why there is none
    neighbours: str  # which rows were searched for neighbours, or why no rows were searched
    n_seen: int  # how many explained rows are known to have been used to fit the predictor
    answer: str = "zero_shot"  # kind of judged answers, as in ``vilu.Outcomes``

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.rows)

    def __str__(self) -> str:
        kind = "a score, higher = more likely wrong"
        if self.is_probability:
            kind = "probability of failure"
        answers_line = ""
        if self.answer != "zero_shot":
            answers_line = f"answers       {self.answer}; in brackets their zero-shot probability\n"
        head = (
            f"method        {self.method}; uncertainty: {kind}\n"
            f"{answers_line}"
            f"competitors   {self.weights}\n"
            f"attribution   {self.attribution}\n"
            f"neighbours    {self.neighbours}"
        )
        paragraphs = [_row_text(row, self.unit) for row in self]
        return "\n\n".join([head, *paragraphs])


def _row_text(row: Explanation, unit: str | None) -> str:
    """Format an explanation as a paragraph."""
    lines = [f"row {row.row}  {to_terminal_text(row.key)}", _answer_line(row)]
    competitors = [
        f"{to_terminal_text(rival.name)} {rival.weight:.3f}" for rival in row.competitors
    ]
    joined_competitors = "   ".join(competitors)
    lines.append(f"  competes    {joined_competitors}")
    if row.attribution is not None:
        attribution_line = _attribution_line(row.attribution, unit)
        lines.append(attribution_line)
    lines += _neighbour_lines("failures", row.failures)
    lines += _neighbour_lines("successes", row.successes)
    return "\n".join(lines)


def _answer_line(row: Explanation) -> str:
    """Format the answer, the answer's uncertainty, and the truth if known."""
    answer = f"{to_terminal_text(row.answer)} ({row.posterior:.1%})"
    if row.zero_shot is not None:
        answer += f"; zero-shot: {to_terminal_text(row.zero_shot)}"
    line = f"  answer      {answer}   uncertainty {row.uncertainty:.4g}"
    if row.truth is None:
        return line
    line += f"   truth {to_terminal_text(row.truth)}"
    if row.wrong is not None:
        line += "  WRONG" if row.wrong else "  right"
    return line


def _attribution_line(attribution: Attribution, unit: str | None) -> str:
    """Format the score as a sum: the mean background score, and a part for every input group."""
    parts = [f" {value:+.2f} {name}" for name, value in attribution.parts.items()]
    score_and_mean = f"{attribution.score:.2f} = {attribution.baseline:.2f} mean"
    return f"  {unit}  {score_and_mean}{''.join(parts)}"


def _neighbour_lines(kind: str, neighbours: Sequence[Neighbour] | None) -> list[str]:
    """Make a heading and a line per neighbour. No lines if no training rows were given."""
    if neighbours is None:
        return []
    heading = f"  {'nearest' if neighbours else 'no'} training {kind}"
    return [heading, *map(_neighbour_text, neighbours)]


def _neighbour_text(row: Neighbour) -> str:
    """Format a neighbour's line. The line has the truth only if the answer is wrong."""
    text = f"    {row.cosine:.3f}  {to_terminal_text(row.key)}"
    text += f"  answered {to_terminal_text(row.answer)}"
    if row.answer != row.truth:
        text += f", true {to_terminal_text(row.truth)}"
    return text


class Depth(NamedTuple):
    """How detailed an explanation is."""

    candidates: int = 5  # number of competitors
    neighbours: int = 3  # number of nearest training failures, and as many nearest successes
    background: int = 128  # number of rows that an attribution compares with
    seed: int = 0  # seed for drawing background rows


DEFAULT_DEPTH = Depth()


@checked
@torch_defaults()
def explain(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    train: EmbeddingSource | None = None,
    rows: Sequence[int | str] | None = None,
    *,
    n: int = 10,
    depth: Depth = DEFAULT_DEPTH,
) -> Explanations:
    """Explain why some answers are suspicious.

    An explanation has three parts: the answer's competitors, the nearest training rows, and every
    input group's share in the score.

    Args:
        predictor: A predictor after ``fit``, or a predictor that needs no ``fit``.
        data: Source that has the rows.
        train: Labelled training rows, for the neighbours. An attribution compares with
            ``depth.background`` rows. If ``data`` has fewer rows apart from the explained rows, the
            rows to compare with are drawn from ``train``, on which the predictor was fitted.
        rows: Row numbers or keys. None for the ``n`` most uncertain rows.
        n: Number of rows to explain if ``rows`` is None.
        depth: Numbers of competitors, neighbours and background rows.

    Warns:
        UserWarning: If explained rows were used to fit the predictor. The scores of such rows say
            little about the scores of new images.

    Raises:
        UsageError: If a number is not positive.
        DataError: If a row does not exist or has no score, if no training row has a label, or if
            there is only a single candidate.
        NotFittedError: If the predictor needs ``fit`` first.
        ProvenanceError: If the data come from another embedding space.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.6, 0.8]]  # the second image is a bit more like a dog
        >>> text = np.eye(2)
        >>> data = vilu.Embeddings(image, text, target=[0, 0], class_names=["cat", "dog"])
        >>> (explanation,) = vilu.explain(vilu.MCM(), data, n=1)  # the most uncertain row
        >>> explanation.row, explanation.answer, explanation.truth
        (1, 'dog', 'cat')
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
        chosen_rows = most_uncertain(predictor, data, n)
    else:
        chosen_rows = find_rows(data, rows)
    neighbours_text = "left out: no training rows given"
    if train is not None:
        data.space.require_match(
            train.space, name="the data to explain", other_name="the training set"
        )
        neighbours_text = f"of {len(train)} training rows"
        if predictor.answer != "zero_shot":
            neighbours_text += ", right or wrong by their zero-shot answers"
    attributor, attribution_text = _make_attributor(predictor, data, train, chosen_rows, depth)
    explained_rows = _explain_without_neighbours(predictor, data, chosen_rows, depth, attributor)
    return Explanations(
        rows=tuple(_with_neighbours(explained_rows, data, train, depth)),
        method=predictor.label,
        is_probability=predictor.is_probability,
        weights=weights_of(predictor).meaning,
        unit=None if attributor is None else attributor.coalitions.unit,
        attribution=attribution_text,
        neighbours=neighbours_text,
        n_seen=_count_fitted_rows(predictor, data, chosen_rows),
        answer=predictor.answer,
    )


def _make_attributor(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    train: EmbeddingSource | None,
    chosen_rows: Tensor,
    depth: Depth,
) -> tuple[Attributor | None, str]:
    """Return the attributor and a text that describes it, or None and the reason why."""
    source = data
    rows_to_leave_out = chosen_rows
    kind_of_rows = "other"
    n_unexplained = len(data.usable_rows) - len(chosen_rows)
    if train is not None and n_unexplained < depth.background:
        source = train
        rows_to_leave_out = torch.empty(0, dtype=torch.int64)
        kind_of_rows = "training"
    try:
        attributor = Attributor(
            predictor,
            source,
            n_rows=depth.background,
            seed=depth.seed,
            rows_to_leave_out=rows_to_leave_out,
        )
    except NoAttribution as reason:
        return None, f"left out: {reason}"
    background = f"{attributor.n_background} {kind_of_rows} rows"
    return attributor, f"Shapley values against {background}: {attributor.coalitions.meaning}"


def most_uncertain(predictor: FailurePredictor, data: EmbeddingSource, n: int) -> Tensor:
    """Return the positions of the ``n`` rows with the largest uncertainties, in descending order.

    If rows have equal uncertainty, the lowest position comes first. Rows without a score are left
    out, so there may be fewer than ``n`` positions.
    """
    uncertainty = predictor.predict_uncertainty(data)
    has_score = np.isfinite(uncertainty)
    rows_with_score = np.flatnonzero(has_score)
    if not len(rows_with_score):
        raise DataError(f"none of the {len(data)} rows has a score to explain.")
    order = np.argsort(-uncertainty[rows_with_score], kind="stable")
    return torch.from_numpy(rows_with_score[order[:n]])


class _ExplainedRow(NamedTuple):
    """An explanation without neighbours, and the image for finding the neighbours."""

    explanation: Explanation
    image: Tensor  # (D,) embedding


def _explain_without_neighbours(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    rows: Tensor,
    depth: Depth,
    attributor: Attributor | None,
) -> list[_ExplainedRow]:
    """Explain rows in the order of ``rows``, but leave the neighbours out."""
    explained_of_row: dict[int, _ExplainedRow] = {}
    names = CandidateNames(data)
    weights = weights_of(predictor)
    with track("explain", len(rows), "rows") as task, torch.no_grad():
        for scored_batch in scored_rows(predictor, data, rows):
            batch, _ = scored_batch
            explanations = _explain_batch(scored_batch, names, weights, depth, attributor)
            for explanation, image in zip(explanations, batch.image, strict=True):
                explained_of_row[explanation.row] = _ExplainedRow(explanation, image.cpu())
                task.advance(1)
    return [explained_of_row[row] for row in rows.tolist()]


def _explain_batch(
    scored_batch: ScoredBatch,
    names: CandidateNames,
    weights: Weights,
    depth: Depth,
    attributor: Attributor | None,
) -> Iterator[Explanation]:
    """Yield the explanations for a batch's rows, in order."""
    batch, scores = scored_batch
    posterior = log_posterior(batch).exp().cpu()
    n_competitors = min(depth.candidates, len(batch.text))
    # (B, L) each: the candidates with the largest weights, and these weights
    top_weights, top_candidates = k_largest(weights.compute(batch).cpu(), n_competitors)
    truth = true_classes(batch).tolist()
    zero_shot = batch.zero_shot.prediction.tolist()
    failure = batch.failure.tolist()
    attributions: list[Attribution] | None = None
    if attributor is not None:
        attributions = attributor.attribute(scored_batch)
    for i, row in enumerate(batch.index.tolist()):
        answer = int(batch.prediction[i])
        is_labelled = truth[i] != UNKNOWN
        is_judged = failure[i] != UNKNOWN
        yield Explanation(
            row=row,
            key=names.data.ids[row],
            answer=names.name_of(row, answer),
            posterior=float(posterior[i, answer]),
            uncertainty=float(scores[i]),
            truth=names.name_of(row, truth[i]) if is_labelled else None,
            wrong=bool(failure[i]) if is_judged else None,
            competitors=_competitors(row, names, top_candidates[i], top_weights[i], posterior[i]),
            failures=None,
            successes=None,
            attribution=None if attributions is None else attributions[i],
            zero_shot=None if zero_shot[i] == answer else names.name_of(row, zero_shot[i]),
        )


def _competitors(
    row: int, names: CandidateNames, top_candidates: Tensor, top_weights: Tensor, posterior: Tensor
) -> tuple[Competitor, ...]:
    """Return the competitors in a row: the L candidates with the largest weights.

    Args:
        row: The row's position.
        names: Candidate names.
        top_candidates: (L,) candidates with the largest weights, in descending order.
        top_weights: (L,) weights of these candidates.
        posterior: (K,) zero-shot probabilities of all candidates.
    """
    competitors = []
    for candidate, weight in zip(top_candidates.tolist(), top_weights.tolist(), strict=True):
        name = names.name_of(row, candidate)
        competitor = Competitor(name, weight, float(posterior[candidate]))
        competitors.append(competitor)
    return tuple(competitors)


def _with_neighbours(
    explained_rows: list[_ExplainedRow],
    data: EmbeddingSource,
    train: EmbeddingSource | None,
    depth: Depth,
) -> list[Explanation]:
    """Add the nearest training rows to the explanations.

    A single pass over the training rows finds all neighbours.
    """
    explanations = [explanation for explanation, _ in explained_rows]
    if train is None or not explained_rows:
        return explanations
    images = torch.stack([image for _, image in explained_rows])
    rows = np.array([explanation.row for explanation in explanations])
    kind_of_identity = common_identity(
        train.identified_by, data.identified_by, ("the training set", "the explained rows")
    )
    to_skip: RowsToSkip | None = None
    if kind_of_identity is not None:
        identities = data.identities(kind_of_identity, rows)
        to_skip = RowsToSkip(kind_of_identity, identities)
    neighbours = TrainingRows(train).find_neighbours(images, to_skip, n=depth.neighbours)
    with_neighbours = []
    for explanation, (failures, successes) in zip(explanations, neighbours, strict=True):
        full_explanation = replace(
            explanation, failures=tuple(failures), successes=tuple(successes)
        )
        with_neighbours.append(full_explanation)
    return with_neighbours


def _count_fitted_rows(predictor: FailurePredictor, data: EmbeddingSource, rows: Tensor) -> int:
    """Count the rows that were used to fit the predictor, and warn if there are any."""
    row_numbers = rows.numpy()
    overlap = predictor.seen(data, row_numbers)
    if len(overlap):
        overlap_in_words = overlap.in_words("explained rows")
        warn_caller(
            f"{overlap_in_words} were used to fit this {predictor.name}: "
            "the scores of these rows say little about new images.",
        )
    return len(overlap)
