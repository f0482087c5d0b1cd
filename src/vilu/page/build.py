"""``report_page``: scores of one or several methods on the same rows, as one HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

import vilu
from vilu.datasets.base import ImageDataset
from vilu.errors import MissingModelError
from vilu.evaluation import evaluate
from vilu.metrics.catalog import METRICS
from vilu.outcomes import Outcomes
from vilu.page import charts, text
from vilu.page.choice import Calibrated, Choice, by_hindsight, by_rule
from vilu.page.classes import Rate, class_rows
from vilu.page.competitors import competitors
from vilu.page.gallery import Card, make_cards, pick_rows, thumbnails
from vilu.page.points import Points, operating_points
from vilu.page.scores import choose_main
from vilu.results import ResultTable
from vilu.types import EmbeddingSource

if TYPE_CHECKING:
    from jinja2 import Environment

RANKING = ("auroc", "fpr95", "aupr_failure", "aupr_success", "aurc", "excess_aurc", "augrc")
DECIDING = ("risk_at_coverage_0.8", "coverage_at_risk_0.01", "coverage_at_risk_0.05", "coverage_at_risk_0.1")
PROBABILITY = ("ece", "ece_mass", "brier", "log_loss")

MAX_RISK = 0.05
"""Error rate that is aimed at where no rule was calibrated."""


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

    It says how often the model is wrong and how well that is foreseen, shows the curves with an operating point that
    a reader can move, the classes, and pictures of answers worth a look. The same input gives the same bytes.

    Args:
        outcomes: Scores of every method, each with a name of its own, of rows of which some have a known failure.
        main: Name of the method that the page is about; by default the calibrated one, or else ViLU+, ViLU, the first.
        calibrated: The rule that accepts or abstains (``vilu.page.choice.read_calibrated``).
        max_risk: Without a rule: error rate among the accepted, for a threshold found on these rows, which promises
            nothing.
        images: The data set whose record keys are the ids of the outcomes, for thumbnails.
        embeddings: What was scored, for the classes that compete with an answer.
        title: Of the page.

    Raises:
        UsageError: If a name or a setting cannot be.
        DataError: If no row can be evaluated, or the images are not those of the scores.
        ProvenanceError: If the outcomes, the rule or the embeddings are not of the same rows and method.
        MissingModelError: If the extra ``report`` is not installed.
    """
    template = _environment().get_template("page.html.jinja")
    about = choose_main(outcomes, main if main is not None or calibrated is None else calibrated.method)
    methods = [about, *(one for one in outcomes if one is not about)]
    table = evaluate(methods)  # refuses rows without labels before anything else needs them
    choice = by_hindsight(about, max_risk) if calibrated is None else by_rule(about, calibrated)
    points = _points(about, choice)
    style, script = _asset("page.css"), _asset("page.js")
    return template.render(
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        version=vilu.__version__,
        title=title or _title(about),
        main=about,
        methods=methods,
        looks=charts.line_looks(len(methods)),
        choice=choice,
        numbers=_numbers(about, choice, max_risk),
        curves=[one for one in (charts.risk_coverage(methods, choice), charts.roc(methods, choice)) if one],
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
        data=_script_data(about, points, exact=choice.threshold is not None or not choice.accepted.any()),
        provenance=[_provenance(one) for one in methods],
        facts=list(text.flat(choice.facts)),
    )


def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingModelError("the page needs: pip install 'vilu[report]'") from error
    environment = Environment(
        loader=PackageLoader("vilu.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        short=text.shortened, tip=text.tooltip, pct=text.percent, count=text.count, score=text.score, goal=text.goal
    )
    return environment


def _asset(name: str) -> str:
    return resources.files("vilu.page").joinpath("templates", name).read_text(encoding="utf-8")


def _csp_hash(content: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _title(outcomes: Outcomes) -> str:
    return " · ".join(name for name in (outcomes.dataset, outcomes.split) if name) or "Which answers to trust"


def _numbers(outcomes: Outcomes, choice: Choice, max_risk: float) -> dict[str, Any]:
    """What the page says in words."""
    rows = outcomes.evaluable
    failure, accepted = outcomes.failure[rows], choice.accepted[rows]
    target = max_risk if choice.max_risk is None else choice.max_risk
    foreseen = by_hindsight(outcomes, target)
    return {
        "n": len(failure),
        "n_rows": len(outcomes),
        "failures": Rate(int(failure.sum()), len(failure)),
        "accepted": Rate(int(accepted.sum()), len(failure)),
        "wrong": Rate(int(failure[accepted].sum()), int(accepted.sum())),
        "target": target,
        "reachable": float(foreseen.accepted[rows].mean()),
        "n_unlabelled": int(np.count_nonzero(~rows & np.isfinite(outcomes.uncertainty))),
        "n_unusable": int(np.count_nonzero(~np.isfinite(outcomes.uncertainty))),
    }


def _tables(methods: Sequence[Outcomes], table: ResultTable) -> list[dict[str, Any]]:
    """Metrics as rows of cells per method, in two tables that fit on a sheet of paper."""
    found = {(row.method, row.metric): row for row in table}
    present = {row.metric for row in table}
    groups = {
        "How well right and wrong answers are told apart": RANKING,
        "What a threshold would do, and probabilities": DECIDING + PROBABILITY,
    }
    return [
        {
            "caption": caption,
            "metrics": [name for name in names if name in present],
            "rows": [[found.get((one.method, name)) for name in names if name in present] for one in methods],
        }
        for caption, names in groups.items()
    ]


def _gallery(
    outcomes: Outcomes, choice: Choice, images: ImageDataset | None, embeddings: EmbeddingSource | None
) -> dict[str, list[Card]]:
    sections = pick_rows(outcomes, choice)
    rows = list(dict.fromkeys(chain.from_iterable(section.tolist() for section in sections.values())))
    pictures = {} if images is None else thumbnails(outcomes, rows, images)
    others = {} if embeddings is None else competitors(outcomes, rows, embeddings)
    return {name: make_cards(outcomes, choice, section, pictures, others) for name, section in sections.items()}


def _points(outcomes: Outcomes, choice: Choice) -> Points:
    rows = outcomes.evaluable
    n_accepted = int(choice.accepted[rows].sum())
    return operating_points(outcomes.uncertainty[rows], outcomes.failure[rows], choice.threshold, n_accepted)


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
    content = hashlib.sha256(outcomes.uncertainty.tobytes() + outcomes.failure.tobytes()).hexdigest()
    known = {name: getattr(outcomes, name) for name in ("dataset", "split", "seed", "is_probability")}
    return {
        "method": outcomes.method,
        "facts": [*text.flat({**known, **outcomes.provenance}), ("sha256 of scores and failures", content[:32])],
    }
