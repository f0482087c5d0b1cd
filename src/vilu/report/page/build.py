"""The HTML page about a set of scores."""

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
from vilu.calibration.thresholds import percent as bound_in_percent
from vilu.datasets.base import ImageDataset
from vilu.device import torch_defaults
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UNKNOWN, ProvenanceError, UsageError
from vilu.extras import import_extra
from vilu.metrics.catalog import METRICS, not_in_percent
from vilu.metrics.counts import Floats, Ints, check_scores_and_failures
from vilu.outcomes.evaluate import evaluate
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable
from vilu.report.figures import evaluable_scores
from vilu.report.page import charts
from vilu.report.page.charts import Chart, Rate, class_rows, round_percent
from vilu.report.page.choice import (
    CalibratedRule,
    OperatingPoint,
    choose_by_hindsight,
    choose_by_rule,
    choose_main,
)
from vilu.report.page.gallery import Card, make_card, pick_rows, thumbnails
from vilu.text import csp_hash
from vilu.validation import checked

if TYPE_CHECKING:
    from jinja2 import Template

DIRECTION_MARKS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
"""Characters that change the direction of the surrounding text.

Joiners are not in this set, because some scripts and emoji need joiners.
"""

HARMFUL_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that a page escapes: controls, surrogates and line breaks."""

MAX_NAME_CHARACTERS = 60  # maximum number of characters for a name in the page
MAX_TOOLTIP_CHARACTERS = 300  # maximum number of characters for a name in a tooltip
MISSING_VALUE_TEXT = "–"  # shown for a missing value
THRESHOLD_TABLE = "What a threshold would do, and probabilities"
METRICS_OF_TABLES = {
    "How well right and wrong answers are told apart": (
        "auroc", "fpr95", "aupr_failure", "aupr_success", "aurc", "excess_aurc", "augrc",
    ),
    "Wrong within the classes, and pictures of none of the classes": (
        "auroc_within", "fpr95_within", "auroc_outside", "fpr95_outside",
    ),
    THRESHOLD_TABLE: (
        "risk_at_coverage_0.8",
        "coverage_at_risk_0.01", "coverage_at_risk_0.05", "coverage_at_risk_0.1",
        "ece", "ece_mass", "brier", "log_loss",
    ),
}  # fmt: skip
"""Maps a table's caption to the metrics in the table. Every table fits on a sheet of paper.

Metrics without a value are left out. Metrics from add-on packages are in ``THRESHOLD_TABLE``.
"""

MAX_RISK = 0.05  # target for the error rate, if no rule was calibrated
MAX_POINTS = 500  # maximum number of thresholds that the page's slider can select
MAX_COMPETITORS = 3  # maximum number of likeliest classes on a card, including the answer
COMPETITOR_BATCH_ROWS = 256  # rows read at the same time to find the likeliest classes


@checked
@torch_defaults()
def report_page(
    outcomes: Sequence[Outcomes],
    *,
    main: str | None = None,
    calibrated: CalibratedRule | None = None,
    max_risk: float = MAX_RISK,
    images: ImageDataset | None = None,
    embeddings: EmbeddingSource | None = None,
    title: str | None = None,
    table: ResultTable | None = None,
) -> str:
    """Make an HTML page on one or several methods for the same rows.

    The page shows how often the model is wrong, and how well the methods predict this. The page has
    curves with a movable operating point, tables of metrics and classes, and an answer gallery. The
    page needs no other file and no network, and it can be printed. Equal input gives equal bytes.

    Args:
        outcomes: Scores from every method on the same rows. Every method has a distinct name, and
            some rows have a known failure.
        main: Name of the page's main method. The default is the calibrated method, or else ViLU+,
            ViLU, or the first method.
        calibrated: The rule for accepting answers (``vilu.report.page.choice.read_calibrated``).
        max_risk: Largest error rate among the accepted answers. Only used without a rule, to choose
            a threshold on these rows. Such a threshold guarantees nothing.
        images: Data set for thumbnails. A row's id is the key of its image in the data set.
        embeddings: The scored embeddings, for an answer's likeliest classes.
        title: The page title.
        table: The metrics of these outcomes from ``vilu.evaluate``, computed here if None.

    Raises:
        UsageError: If a method's name or another argument is invalid.
        DataError: If no row can be evaluated, or if the images are not the scored images.
        ProvenanceError: If the outcomes, the rule or the embeddings do not belong together.
        MissingModelError: If the extra ``report`` is not installed.

    Examples:
        >>> import vilu
        >>> outcomes = vilu.Outcomes(
        ...     [0.1, 0.2, 0.3, 0.4] * 30, [0, 0, 0, 1] * 30, method="mine", dataset="pets"
        ... )
        >>> page = vilu.report_page([outcomes], title="Pets")
        >>> page.count("<svg")  # figures
        3
        >>> "<script src" in page, "<link" in page  # the page loads nothing
        (False, False)
    """
    template = find_template("page.html.jinja")
    if main is None and calibrated is not None:
        main = calibrated.method
    main_outcomes = choose_main(outcomes, main)
    methods = [main_outcomes]  # the main method is always the first
    for method_outcomes in outcomes:
        if method_outcomes is not main_outcomes:
            methods.append(method_outcomes)
    if table is None:
        # This comes before the charts, because ``evaluate`` refuses outcomes without usable rows.
        table = evaluate(methods)
    if calibrated is None:
        operating_point = choose_by_hindsight(main_outcomes, max_risk)
    else:
        operating_point = choose_by_rule(main_outcomes, calibrated)
    uncertainty, failure = evaluable_scores(main_outcomes)
    n_accepted = int(operating_point.accepted[main_outcomes.evaluable].sum())
    points = slider_points(uncertainty, failure, operating_point.threshold, n_accepted)
    return render_page(
        template,
        script=read_asset("page.js"),
        title=title or _default_title(main_outcomes),
        main=main_outcomes,
        methods=methods,
        line_styles=charts.svg_line_styles(
            [method_outcomes.method or "" for method_outcomes in methods]
        ),
        operating_point=operating_point,
        numbers=_page_numbers(main_outcomes, operating_point, max_risk),
        curves=_curves(methods, operating_point),
        histograms=_histograms(methods, points),
        reliability=charts.reliability(methods),
        tables=_tables(methods, table),
        metrics=METRICS,
        classes=class_rows(main_outcomes, operating_point),
        gallery=_gallery(main_outcomes, operating_point, images, embeddings),
        with_pictures=images is not None,
        data=_script_data(main_outcomes, operating_point, points),
        provenance=[_provenance(method_outcomes) for method_outcomes in methods],
        facts=list(flat_items(operating_point.facts)),
    )


def _curves(methods: Sequence[Outcomes], operating_point: OperatingPoint) -> list[Chart]:
    """Make the risk-coverage chart and, if there are right and wrong answers, the ROC chart."""
    curves = [charts.risk_coverage(methods, operating_point)]
    roc = charts.roc(methods, operating_point)
    if roc is not None:
        curves.append(roc)
    return curves


def _histograms(methods: Sequence[Outcomes], points: SliderPoints) -> list[Chart]:
    """Make one histogram per method. The main method comes first, and has the threshold."""
    histograms = []
    for number, method_outcomes in enumerate(methods):
        is_main = number == 0
        threshold = points.threshold[points.start_index] if is_main else None
        histogram = charts.histogram(method_outcomes, threshold, number)
        histograms.append(histogram)
    return histograms


def render_page(template: Template, *, script: str = "", **values: object) -> str:
    """Render a page with one style and one script. A security policy forbids all others."""
    style = read_asset("page.css")
    style_hash = csp_hash(style)
    script_hash = csp_hash(script)
    version = importlib.metadata.version("vilu")
    return template.render(
        style=style,
        script=script,
        style_hash=style_hash,
        script_hash=script_hash,
        version=version,
        **values,
    )


@cache
def find_template(name: str) -> Template:
    """Load a template with all filters. Raise MissingModelError without the extra ``report``."""
    jinja2 = import_extra("jinja2", "report")
    loader = jinja2.PackageLoader("vilu.report.page")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tip = partial(shorten_name, max_characters=MAX_TOOLTIP_CHARACTERS)
    environment.filters.update(short=shorten_name, tip=tip, pct=percent, bound=bound_in_percent)
    environment.filters.update(count="{:,}".format, score=format_score, round_pct=round_percent)
    template: Template = environment.get_template(name)
    return template


def read_asset(name: str) -> str:
    """Read the text of a style or a script."""
    package_folder = resources.files("vilu.report.page")
    file = package_folder.joinpath("templates", name)
    return file.read_text(encoding="utf-8")


def _default_title(outcomes: Outcomes) -> str:
    """Return the default page title."""
    names = [name for name in (outcomes.dataset, outcomes.split) if name]
    if not names:
        return "Which answers to trust"
    return " · ".join(names)


def _page_numbers(
    outcomes: Outcomes, operating_point: OperatingPoint, max_risk: float
) -> dict[str, Any]:
    """Collect the numbers that the page's text shows."""
    is_evaluable = outcomes.evaluable
    failure = outcomes.failure[is_evaluable]
    accepted = operating_point.accepted[is_evaluable]
    target = max_risk if operating_point.max_risk is None else operating_point.max_risk
    hindsight_point = choose_by_hindsight(outcomes, target)
    tally = outcomes.tally()
    design_effect = tally.scores.design_effect
    has_score = np.isfinite(outcomes.uncertainty)
    n_accepted = int(accepted.sum())
    n_outside = int(outcomes.outside[is_evaluable].sum())
    n_failures = int(failure.sum())
    n_accepted_failures = int(failure[accepted].sum())
    return {
        "n": len(failure),
        "n_pictures": tally.scores.n_pictures,
        "unit": "cluster" if tally.has_clusters else "picture",
        "n_rows": len(outcomes),
        "failures": Rate(n_failures, len(failure), design_effect),
        "outside": Rate(n_outside, len(failure), design_effect),
        "accepted": Rate(n_accepted, len(failure), design_effect),
        "wrong": Rate(n_accepted_failures, n_accepted, design_effect),
        "target": target,
        # the share of answers that a threshold chosen by hindsight would accept
        "reachable": float(hindsight_point.accepted[is_evaluable].mean()),
        "n_unlabelled": int(np.count_nonzero(has_score & ~is_evaluable)),
        "n_unusable": int(np.count_nonzero(~has_score)),
    }


def _tables(methods: Sequence[Outcomes], table: ResultTable) -> list[dict[str, Any]]:
    """Make the metric tables, with one row of cells per method."""
    cells = {(row.method, row.metric): row for row in table}
    present_names = dict.fromkeys(row.metric for row in table)
    listed_names = set(chain.from_iterable(METRICS_OF_TABLES.values()))
    names_not_listed = tuple(name for name in present_names if name not in listed_names)
    names_of_table = METRICS_OF_TABLES | {
        THRESHOLD_TABLE: METRICS_OF_TABLES[THRESHOLD_TABLE] + names_not_listed
    }
    tables = []
    for caption, names in names_of_table.items():
        metrics = [name for name in names if name in present_names]
        if not metrics:
            continue
        rows = []
        for method_outcomes in methods:
            cells_of_method = [cells.get((method_outcomes.method, name)) for name in metrics]
            rows.append(cells_of_method)
        percent_exceptions = not_in_percent(METRICS[name] for name in metrics)
        tables.append(
            {
                "caption": caption,
                "percent_exceptions": percent_exceptions,
                "metrics": metrics,
                "rows": rows,
            }
        )
    return tables


def _gallery(
    outcomes: Outcomes,
    operating_point: OperatingPoint,
    images: ImageDataset | None,
    embeddings: EmbeddingSource | None,
) -> dict[str, list[Card]]:
    """Make the cards for every gallery section."""
    picked_rows = pick_rows(outcomes, operating_point)
    sections = {name: rows.tolist() for name, rows in picked_rows.items()}
    rows_of_sections = chain.from_iterable(sections.values())
    rows = list(dict.fromkeys(rows_of_sections))
    pictures = {} if images is None else thumbnails(outcomes, rows, images)
    classes_by_row = {} if embeddings is None else likeliest_classes(outcomes, rows, embeddings)
    cards = {}
    for row in rows:
        picture = pictures.get(row)
        competitors = classes_by_row.get(row, ())
        cards[row] = make_card(outcomes, operating_point, row, picture, competitors)
    gallery = {}
    for name, rows_of_section in sections.items():
        gallery[name] = [cards[row] for row in rows_of_section]
    return gallery


def likeliest_classes(
    outcomes: Outcomes, rows: Iterable[int], source: EmbeddingSource
) -> dict[int, list[tuple[str, float]]]:
    """Return the likeliest classes for some rows, with zero-shot probabilities.

    Rows missing in the source are left out.

    Raises:
        UsageError: If the outcomes or the source have no class names.
        ProvenanceError: If the source and the outcomes have different classes or answers, or if
            all rows are missing in the source.
    """
    names = outcomes.class_names
    ids = outcomes.ids
    scored_answer = outcomes.prediction if outcomes.zero_shot is None else outcomes.zero_shot
    if source.class_names is None or names is None or ids is None or scored_answer is None:
        raise UsageError(
            "competitors need classes with names, in the scores and in the embeddings. "
            "Leave --store out."
        )
    if tuple(source.class_names) != tuple(names):
        raise ProvenanceError(
            "the store has other classes than the scores. Give the store that was scored."
        )
    row_of_position = _map_positions_to_rows(ids, list(rows), source)
    classes_by_row: dict[int, list[tuple[str, float]]] = {}
    positions = torch.tensor(sorted(row_of_position), dtype=torch.int64)
    for batch in source.batches(COMPETITOR_BATCH_ROWS, rows=positions):
        probability = batch.logits.double().softmax(dim=1).numpy()
        columns = (batch.index.tolist(), batch.prediction.tolist(), probability)
        for position, answer, probabilities in zip(*columns, strict=True):
            row = row_of_position[position]
            is_same_answer = scored_answer[row] in {UNKNOWN, answer}  # as far as known
            if not is_same_answer:
                raise ProvenanceError(
                    f"the store answers {names[answer]!r} where the scores say "
                    f"{names[scored_answer[row]]!r} ({ids[row]!r}). Give the store that was scored."
                )
            class_indices = np.argsort(-probabilities, kind="stable")[:MAX_COMPETITORS]
            classes_by_row[row] = [(names[k], float(probabilities[k])) for k in class_indices]
    return classes_by_row


def _map_positions_to_rows(
    ids: Sequence[str], rows: Sequence[int], source: EmbeddingSource
) -> dict[int, int]:
    """Map positions in the source to the ``rows`` with the same ids.

    Rows missing in the source are left out. If all rows are missing, ProvenanceError is raised.
    """
    position_of_key = {key: position for position, key in enumerate(source.ids)}
    row_of_position = {}
    for row in map(int, rows):
        position = position_of_key.get(ids[row])
        if position is not None:
            row_of_position[position] = row
    if rows and not row_of_position:
        raise ProvenanceError(
            f"the store has none of the rows that are shown, such as {ids[rows[0]]!r}. Give the "
            "store that was scored."
        )
    return row_of_position


@dataclass(frozen=True, eq=False)
class SliderPoints:
    """The P thresholds that the page's slider can select."""

    threshold: Floats  # (P,) ascending, the first is -inf
    n_accepted: Ints  # (P,) number of accepted rows at each threshold
    n_wrong: Ints  # (P,) number of wrong rows among the accepted rows
    # Index of the threshold that the slider shows first. This is the chosen threshold, or if the
    # rule is not a single threshold, the threshold that accepts about as many rows as the rule.
    start_index: int


def slider_points(
    uncertainty: ArrayLike,
    failure: ArrayLike,
    chosen_threshold: float | None,
    n_accepted: int,
    limit: int = MAX_POINTS,
) -> SliderPoints:
    """Select thresholds for the slider, with about evenly spaced numbers of accepted rows.

    Args:
        uncertainty: (N,) uncertainties.
        failure: (N,) 1 for a wrong answer, 0 for a right answer.
        chosen_threshold: Threshold that is always included. None if no single threshold decides
            which rows are accepted.
        n_accepted: Number of rows that the rule accepts. If ``chosen_threshold`` is None, the
            slider starts at the threshold that accepts about as many rows.
        limit: Maximum number of thresholds.
    """
    scores, wrong = check_scores_and_failures(uncertainty, failure)
    order = np.argsort(scores, kind="stable")
    ascending_scores = scores[order]
    # entry i counts the wrong answers among the i least uncertain rows
    n_wrong_of_first = np.concatenate([[0], np.cumsum(wrong[order])])
    thresholds = np.unique(ascending_scores)
    max_thresholds = limit - 2  # -inf and the chosen threshold are added below
    if len(thresholds) > max_thresholds:
        evenly_spaced = np.linspace(0, len(ascending_scores) - 1, max_thresholds)
        indices = np.round(evenly_spaced).astype(np.int64)
        thresholds = np.unique(ascending_scores[indices])
    if chosen_threshold is not None:
        thresholds = np.union1d(thresholds, [chosen_threshold])
    thresholds = np.concatenate([[-np.inf], thresholds])
    # "right" also counts the scores equal to a threshold, which are accepted
    accepted_counts = np.searchsorted(ascending_scores, thresholds, side="right")
    if chosen_threshold is None:
        start_index = int(np.argmin(np.abs(accepted_counts - n_accepted)))
    else:
        start_index = int(np.searchsorted(thresholds, chosen_threshold))
    return SliderPoints(
        threshold=thresholds,
        n_accepted=accepted_counts,
        n_wrong=n_wrong_of_first[accepted_counts],
        start_index=start_index,
    )


def _script_data(
    outcomes: Outcomes, operating_point: OperatingPoint, points: SliderPoints
) -> dict[str, Any]:
    """Return the slider's data, for JSON. The first threshold, -inf, becomes null."""
    failure = outcomes.failure[outcomes.evaluable]
    # whether the threshold at the slider's start position accepts exactly the chosen rows
    exact = not operating_point.accepted.any()
    if operating_point.threshold is not None:
        is_below = outcomes.uncertainty <= operating_point.threshold
        exact = np.array_equal(is_below, operating_point.accepted)
    return {
        "threshold": [None, *points.threshold[1:].tolist()],
        "accepted": points.n_accepted.tolist(),
        "wrong": points.n_wrong.tolist(),
        "start": points.start_index,
        "exact": exact,
        "n": len(failure),
        "n_wrong": int(failure.sum()),
    }


def _provenance(outcomes: Outcomes) -> dict[str, Any]:
    """Return a method's name, the scores' origin, and a fingerprint of the numbers."""
    content = outcomes.uncertainty.tobytes() + outcomes.failure.tobytes()
    fingerprint = bytes_hash(content)
    origin = {
        "dataset": outcomes.dataset,
        "split": outcomes.split,
        "seed": outcomes.seed,
        "is_probability": outcomes.is_probability,
    }
    if outcomes.answer != "zero_shot":
        origin["answer"] = outcomes.answer
    facts = list(flat_items({**origin, **outcomes.provenance}))
    facts.append(("sha256 of scores and failures", fingerprint[:32]))
    return {"method": outcomes.method, "facts": facts}


def escape_harmful(text: str) -> str:
    r"""Escape a text's control characters and direction marks, as in ``\u202e``."""
    safe = ""
    # A page never shows more than this maximum. A single character above the maximum makes
    # ``shorten_name`` cut the text.
    for character in text[: MAX_TOOLTIP_CHARACTERS + 1]:
        is_harmful = (
            character in DIRECTION_MARKS or unicodedata.category(character) in HARMFUL_CATEGORIES
        )
        safe += f"\\u{ord(character):04x}" if is_harmful else character
    return safe


def shorten_name(text: str, max_characters: int = MAX_NAME_CHARACTERS) -> str:
    """Escape a text with ``escape_harmful``, and shorten the text to at most ``max_characters``."""
    safe = escape_harmful(text)
    if len(safe) <= max_characters:
        return safe
    return f"{safe[: max_characters - 1]}…"


def percent(value: float | None, digits: int = 1) -> str:
    """Format a fraction in percent, without the percent sign."""
    return MISSING_VALUE_TEXT if value is None else f"{100 * value:.{digits}f}"


def format_score(value: float) -> str:
    """Format an uncertainty. A value slightly less than 1 is not rounded to 1."""
    if 0.99995 <= value < 1:  # four digits would show 1
        return "> 0.9999"
    is_readable = value == 0 or 1e-3 <= abs(value) < 1e6
    return f"{value:.4g}" if is_readable else f"{value:.2e}"


def flat_items(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a JSON object's names and values. Names of nested objects are joined by dots."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", MISSING_VALUE_TEXT if value is None else str(value)
