"""One page of a set of scores."""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from vilu.artifacts.hashing import bytes_hash
from vilu.calibration.thresholds import percent as bound
from vilu.datasets.base import ImageDataset
from vilu.device import as_usual
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UNKNOWN, ProvenanceError, UsageError
from vilu.extras import import_extra
from vilu.metrics.catalog import METRICS, but_for
from vilu.metrics.counts import Floats, Ints, check_pair
from vilu.outcomes.evaluate import evaluate
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable
from vilu.report.figures import known
from vilu.report.page import charts
from vilu.report.page.charts import Rate, class_rows, goal
from vilu.report.page.choice import Calibrated, Choice, by_hindsight, by_rule, choose_main
from vilu.report.page.gallery import Card, make_card, pick_rows, thumbnails
from vilu.text import csp_hash
from vilu.validation import checked

if TYPE_CHECKING:
    from jinja2 import Template

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the order of what stands around them; joiners, which scripts and emoji need, are not among."""

HARMFUL = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Categories of characters that a page has no use for: controls, halves of characters, breaks of lines."""

SHOWN, TOLD = 60, 300  # characters of a name that are seen, and that a tooltip tells at most
NOTHING = "–"
ADDED = "What a threshold would do, and probabilities"
TABLES = {
    "How well right and wrong answers are told apart": (
        "auroc", "fpr95", "aupr_failure", "aupr_success", "aurc", "excess_aurc", "augrc",
    ),
    "Wrong within the classes, and pictures of none of the classes": (
        "auroc_within", "fpr95_within", "auroc_outside", "fpr95_outside",
    ),
    ADDED: (
        "risk_at_coverage_0.8", "coverage_at_risk_0.01", "coverage_at_risk_0.05", "coverage_at_risk_0.1",
        "ece", "ece_mass", "brier", "log_loss",
    ),
}  # fmt: skip
"""Metrics in tables that fit on a sheet of paper, as far as there are some;

``ADDED`` takes those of others, too.
"""

MAX_RISK = 0.05  # error rate that is aimed at where no rule was calibrated
MAX_POINTS = 500  # operating points in a page at most, however many rows there are
COMPETITORS = 3  # of an answer, itself among them


@checked
@as_usual()
def report_page(
    outcomes: Sequence[Outcomes],
    *,
    main: str | None = None,
    calibrated: Calibrated | None = None,
    max_risk: float = MAX_RISK,
    images: ImageDataset | None = None,
    embeddings: EmbeddingSource | None = None,
    title: str | None = None,
) -> str:
    """One HTML page about one or several methods on the same rows; it loads nothing and works offline and in print.

    It says how often the model is wrong and how well that is foreseen, shows the curves with an
    operating point that a reader can move, the classes, and pictures of answers worth a look. The
    same input gives the same bytes.

    Args:
        outcomes: Scores of every method, each with a name of its own, of rows of which some have a
            known failure.
        main: Name of the method that the page is about; by default the calibrated one, or else
            ViLU+, ViLU, the first.
        calibrated: The rule that accepts or abstains (``vilu.report.page.choice.read_calibrated``).
        max_risk: Without a rule: error rate among the accepted, for a threshold found on these
            rows, which promises nothing.
        images: The data set whose record keys are the ids of the outcomes, for thumbnails.
        embeddings: What was scored, for the classes that compete with an answer.
        title: Of the page.

    Raises:
        UsageError: If a name or a setting cannot be.
        DataError: If no row can be evaluated, or the images are not those of the scores.
        ProvenanceError: If the outcomes, the rule or the embeddings are not of the same rows and
            method.
        MissingModelError: If the extra ``report`` is not installed.

    Examples:
        >>> import vilu
        >>> outcomes = vilu.Outcomes(
        ...     [0.1, 0.2, 0.3, 0.4] * 30, [0, 0, 0, 1] * 30, method="mine", dataset="pets"
        ... )
        >>> page = vilu.report_page([outcomes], title="Pets")
        >>> (
        ...     page.count("<svg"),
        ...     "<script src" in page,
        ...     "<link" in page,
        ... )  # three figures, and nothing is loaded from elsewhere
        (3, False, False)
    """
    template = find_template("page.html.jinja")
    about = choose_main(
        outcomes, main if main is not None or calibrated is None else calibrated.method
    )
    methods = [about, *(one for one in outcomes if one is not about)]
    table = evaluate(methods)  # refuses rows without labels before anything else needs them
    choice = by_hindsight(about, max_risk) if calibrated is None else by_rule(about, calibrated)
    n_accepted = int(choice.accepted[about.evaluable].sum())
    points = operating_points(*known(about), choice.threshold, n_accepted)
    return render(
        template,
        script=asset("page.js"),
        title=title or _title(about),
        main=about,
        methods=methods,
        looks=charts.line_looks(len(methods)),
        choice=choice,
        numbers=_numbers(about, choice, max_risk),
        curves=[
            one
            for one in (charts.risk_coverage(methods, choice), charts.roc(methods, choice))
            if one
        ],
        histograms=[
            charts.histogram(one, points.threshold[points.start] if i == 0 else None, i)
            for i, one in enumerate(methods)
        ],
        reliability=charts.reliability(methods),
        tables=_tables(methods, table),
        metrics=METRICS,
        classes=class_rows(about, choice),
        gallery=_gallery(about, choice, images, embeddings),
        with_pictures=images is not None,
        data=_script_data(
            about, points, exact=choice.threshold is not None or not choice.accepted.any()
        ),
        provenance=[_provenance(one) for one in methods],
        facts=list(flat(choice.facts)),
    )


def render(template: Template, *, script: str = "", **values: object) -> str:
    """A page of ours: one style, one script, and by its security policy nothing else."""
    style = asset("page.css")
    return template.render(
        style=style,
        script=script,
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        version=importlib.metadata.version("vilu"),
        **values,
    )


@cache
def find_template(name: str) -> Template:
    """A template with the filters of the pages; MissingModelError without the extra ``report``."""
    jinja2 = import_extra("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vilu.report.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        short=shortened, tip=partial(shortened, most=TOLD), pct=percent, bound=bound
    )
    environment.filters.update(count="{:,}".format, score=score, goal=goal)
    template: Template = environment.get_template(name)
    return template


def asset(name: str) -> str:
    """The text of a style or a script."""
    return (
        resources.files("vilu.report.page").joinpath("templates", name).read_text(encoding="utf-8")
    )


def _title(outcomes: Outcomes) -> str:
    return (
        " · ".join(name for name in (outcomes.dataset, outcomes.split) if name)
        or "Which answers to trust"
    )


def _numbers(outcomes: Outcomes, choice: Choice, max_risk: float) -> dict[str, Any]:
    """What the page says in words."""
    rows = outcomes.evaluable
    failure, accepted = outcomes.failure[rows], choice.accepted[rows]
    target = max_risk if choice.max_risk is None else choice.max_risk
    foreseen = by_hindsight(outcomes, target)
    scores = outcomes.tally().scores
    several = scores.rows_per_independent
    return {
        "n": len(failure),
        "n_pictures": scores.n_pictures,
        "n_rows": len(outcomes),
        "failures": Rate(int(failure.sum()), len(failure), several),
        "outside": Rate(int(np.count_nonzero(outcomes.outside[rows])), len(failure), several),
        "accepted": Rate(int(accepted.sum()), len(failure), several),
        "wrong": Rate(int(failure[accepted].sum()), int(accepted.sum()), several),
        "target": target,
        "reachable": float(foreseen.accepted[rows].mean()),
        "n_unlabelled": int(np.count_nonzero(~rows & np.isfinite(outcomes.uncertainty))),
        "n_unusable": int(np.count_nonzero(~np.isfinite(outcomes.uncertainty))),
    }


def _tables(methods: Sequence[Outcomes], table: ResultTable) -> list[dict[str, Any]]:
    """Metrics as rows of cells per method."""
    found = {(row.method, row.metric): row for row in table}
    present = dict.fromkeys(row.metric for row in table)
    groups = dict(TABLES)
    groups[ADDED] += tuple(
        name for name in present if not any(name in names for names in TABLES.values())
    )
    return [
        {
            "caption": caption,
            "but_for": but_for(METRICS[name] for name in names if name in present),
            "metrics": [name for name in names if name in present],
            "rows": [
                [found.get((one.method, name)) for name in names if name in present]
                for one in methods
            ],
        }
        for caption, names in groups.items()
        if not present.keys().isdisjoint(names)
    ]


def _gallery(
    outcomes: Outcomes,
    choice: Choice,
    images: ImageDataset | None,
    embeddings: EmbeddingSource | None,
) -> dict[str, list[Card]]:
    sections = pick_rows(outcomes, choice)
    rows = list(
        dict.fromkeys(chain.from_iterable(section.tolist() for section in sections.values()))
    )
    pictures = {} if images is None else thumbnails(outcomes, rows, images)
    others = {} if embeddings is None else competitors(outcomes, rows, embeddings)
    cards = {
        row: make_card(outcomes, choice, row, pictures.get(row), others.get(row, ()))
        for row in rows
    }
    return {name: [cards[row] for row in section.tolist()] for name, section in sections.items()}


def competitors(
    outcomes: Outcomes, rows: Iterable[int], source: EmbeddingSource
) -> dict[int, list[tuple[str, float]]]:
    """The likeliest classes of some rows, with softmax probabilities of the zero-shot logits; of rows that it has."""
    names, ids, said = outcomes.class_names, outcomes.ids, outcomes.prediction
    if source.class_names is None or names is None or ids is None or said is None:
        raise UsageError(
            "competitors need classes with names, in the scores and in the embeddings. Leave --store out."
        )
    if tuple(source.class_names) != tuple(names):
        raise ProvenanceError(
            "the store has other classes than the scores. Give the store that was scored."
        )
    place = {key: position for position, key in enumerate(source.ids)}
    wanted = {place[ids[row]]: row for row in map(int, rows) if ids[row] in place}
    found: dict[int, list[tuple[str, float]]] = {}
    for batch in source.batches(256, rows=torch.tensor(sorted(wanted), dtype=torch.int64)):
        probability = batch.logits.double().softmax(dim=1).numpy()
        for position, answer, p in zip(
            batch.index.tolist(), batch.prediction.tolist(), probability, strict=True
        ):
            row = wanted[position]
            if said[row] not in {UNKNOWN, answer}:
                raise ProvenanceError(
                    f"the store answers {names[answer]!r} where the scores say {names[said[row]]!r} ({ids[row]!r}). "
                    "Give the store that was scored."
                )
            best = np.argsort(-p, kind="stable")[:COMPETITORS]
            found[row] = [(names[k], float(p[k])) for k in best]
    return found


@dataclass(frozen=True, eq=False)
class Points:
    """Some thresholds (P,) from -inf on, how many rows they accept, and how many of those are wrong.

    ``start`` is the position of the chosen threshold, or of the point nearest to what was chosen.
    """

    threshold: Floats
    accepted: Ints
    wrong: Ints
    start: int


def operating_points(
    uncertainty: ArrayLike,
    failure: ArrayLike,
    chosen: float | None,
    n_accepted: int,
    limit: int = MAX_POINTS,
) -> Points:
    """Thresholds that accept about evenly growing numbers of rows, the chosen one exactly among them.

    Where what is accepted is not said by a threshold, the slider stands where about ``n_accepted``
    rows are.
    """
    scores, wrong = check_pair(uncertainty, failure)
    order = np.argsort(scores, kind="stable")
    scores, wrong_below = scores[order], np.concatenate([[0], np.cumsum(wrong[order])])
    distinct = np.unique(scores)
    if len(distinct) > limit - 2:
        rows = np.round(np.linspace(0, len(scores) - 1, limit - 2)).astype(np.int64)
        distinct = np.unique(scores[rows])
    threshold = np.concatenate(
        [[-np.inf], distinct if chosen is None else np.union1d(distinct, [chosen])]
    )
    accepted = np.searchsorted(scores, threshold, side="right")
    nearest = (
        np.argmin(np.abs(accepted - n_accepted))
        if chosen is None
        else np.searchsorted(threshold, chosen)
    )
    return Points(threshold, accepted, wrong_below[accepted], int(nearest))


def _script_data(outcomes: Outcomes, points: Points, *, exact: bool) -> dict[str, Any]:
    """What the slider needs; thresholds to the last bit, accepting nothing as null."""
    failure = outcomes.failure[outcomes.evaluable]
    return {
        "threshold": [None, *points.threshold[1:].tolist()],
        "accepted": points.accepted.tolist(),
        "wrong": points.wrong.tolist(),
        "start": points.start,
        "exact": exact,
        "n": len(failure),
        "n_wrong": int(failure.sum()),
    }


def _provenance(outcomes: Outcomes) -> dict[str, Any]:
    """Where scores come from, and a fingerprint of the numbers themselves."""
    content = bytes_hash(outcomes.uncertainty.tobytes() + outcomes.failure.tobytes())
    said = {
        name: getattr(outcomes, name) for name in ("dataset", "split", "seed", "is_probability")
    }
    return {
        "method": outcomes.method,
        "facts": [
            *flat({**said, **outcomes.provenance}),
            ("sha256 of scores and failures", content[:32]),
        ],
    }


def harmless(text: str) -> str:
    """The text with controls and marks of direction spelled out."""
    return "".join(
        f"\\u{ord(c):04x}" if c in BIDI or unicodedata.category(c) in HARMFUL else c
        for c in text[: TOLD + 1]
    )


def shortened(text: str, most: int = SHOWN) -> str:
    """At most so many characters of it, harmless."""
    safe = harmless(text)
    return safe if len(safe) <= most else f"{safe[: most - 1]}…"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in per cent, without the sign."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}"


def score(value: float) -> str:
    """An uncertainty, to be read; a probability that is not quite 1 does not look like 1."""
    if 0.99995 <= value < 1:
        return "> 0.9999"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"


def flat(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a JSON object, nested ones with a dot between the names."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", NOTHING if value is None else str(value)
