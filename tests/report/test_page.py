"""Test the page from ``vilu report``: its numbers, its choices, and hostile names in it."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import scipy.stats

from tests.builders.page_data import NAMES, outcomes_of, write_pictures
from tests.conftest import toy_embeddings
from vilu import MCM, Outcomes, certify, certify_clusters, load, open_dataset, report_page, score
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.rules import Rule
from vilu.calibration.target import Target
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.report.page import build
from vilu.report.page.build import slider_points
from vilu.report.page.charts import Rate, class_rows, round_ticks, thin_points
from vilu.report.page.choice import (
    CalibratedRule,
    choose_by_hindsight,
    choose_by_rule,
    choose_main,
    read_calibrated,
    read_scores,
)
from vilu.report.page.gallery import pick_rows
from vilu.text import csp_hash

if TYPE_CHECKING:
    from playwright.sync_api import Browser


class Reader(HTMLParser):
    """A parser that keeps every element with its attributes, and the texts by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.texts.setdefault(self.elements[-1][0], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page() -> str:
    return report_page([outcomes_of(), outcomes_of(seed=1, method="mcm", noise=0.5)])


def test_the_sentence_and_the_figures_are_numpys(page: str) -> None:
    one = outcomes_of()
    best = max(t for t in one.uncertainty if one.failure[one.uncertainty <= t].mean() <= 0.05)
    accepted = one.uncertainty <= best
    plain = page.replace("&nbsp;", " ")
    assert f"<strong>{100 * one.failure.mean():.1f} %</strong> are wrong" in plain
    assert (
        f"<strong>{100 * accepted.mean():.1f} %</strong> of the answers can be accepted at 5 % "
        "errors" in plain
    )
    assert f"<small>{accepted.sum()} of 400</small>" in plain
    assert f"<dd>{100 * one.failure[accepted].mean():.1f} %" in plain
    assert "Not certified" in plain


def test_every_operating_point_is_what_counting_gives(page: str) -> None:
    one, data = outcomes_of(), data_of(page)
    assert data["threshold"][0] is None
    assert (data["accepted"][0], data["wrong"][0]) == (0, 0)
    for t, accepted, wrong in zip(
        data["threshold"][1:], data["accepted"][1:], data["wrong"][1:], strict=True
    ):
        assert accepted == np.sum(one.uncertainty <= t)
        assert wrong == np.sum(one.failure[one.uncertainty <= t])
    assert (data["n"], data["n_wrong"]) == (400, one.failure.sum())


@pytest.mark.parametrize("chosen", [0.123456789012345, -3.0, 17.0])
def test_thinning_keeps_the_chosen_threshold_and_both_ends(chosen: float) -> None:
    rng = np.random.default_rng(0)
    scores, failure = rng.random(20_000), rng.random(20_000) < 0.3
    points = slider_points(scores, failure, chosen, 0)
    assert len(points.threshold) <= 500
    assert points.threshold[points.start_index] == chosen
    assert points.n_accepted[points.start_index] == np.sum(scores <= chosen)
    assert points.n_wrong[points.start_index] == np.sum(failure[scores <= chosen])
    assert (points.n_accepted[0], points.n_accepted[-1]) == (0, 20_000)
    assert np.diff(points.n_accepted).max() <= 2 * 20_000 / 490  # evenly, up to rounding


def test_without_one_threshold_the_slider_accepts_as_many() -> None:
    points = slider_points([0.1, 0.2, 0.2, 0.4], [0, 0, 1, 1], None, 3)
    assert points.threshold.tolist() == [-np.inf, 0.1, 0.2, 0.4]
    assert points.start_index == 2


def test_hindsight_is_the_largest_threshold_and_may_be_none() -> None:
    one = dataclasses.replace(
        outcomes_of(4), uncertainty=[0.1, 0.2, 0.3, 0.4], failure=[0, 1, 0, 0]
    )
    assert choose_by_hindsight(one, 0.25).threshold == 0.4
    assert choose_by_hindsight(one, 0.2).threshold == 0.1
    nothing = choose_by_hindsight(dataclasses.replace(one, failure=[1, 0, 0, 0]), 0.2)
    assert nothing.threshold is None
    assert not nothing.accepted.any()
    with pytest.raises(UsageError, match="max_risk must be in"):
        choose_by_hindsight(one, 1.0)
    upside_down = outcomes_of()
    upside_down = dataclasses.replace(upside_down, uncertainty=1 - upside_down.uncertainty)
    page = report_page([upside_down])
    assert "No threshold on" in page
    assert data_of(page)["start"] == 0


def test_rules_accept_as_they_say() -> None:
    one = outcomes_of()
    rule = certify(outcomes_of(seed=5), max_risk=0.2)
    choice = choose_by_rule(one, CalibratedRule(rule, "vilu_plus", facts={"source": "cafe"}))
    assert np.array_equal(choice.accepted, one.uncertainty <= rule.threshold)
    page = report_page([one], calibrated=CalibratedRule(rule, facts={"source": "cafe"}))
    assert "Calibrated on other rows" in page
    assert "with confidence 95% at most 20.00%" in page
    assert "cafe" in page
    assert data_of(page)["threshold"][data_of(page)["start"]] == rule.threshold

    floored = Rule.model_validate(
        {
            **rule.model_dump(),
            "thresholds": {"": {**rule.thresholds[""].model_dump(), "floor": 0.1}},
        }
    )
    choice = choose_by_rule(one, CalibratedRule(floored, "vilu_plus"))
    assert np.array_equal(
        choice.accepted, (one.uncertainty > 0.1) & (one.uncertainty <= rule.threshold)
    )
    assert choice.threshold is None
    assert re.search(
        r"<dt>Threshold</dt><dd>0\.1\d* to 0\.\d+</dd>",
        report_page([one], calibrated=CalibratedRule(floored)),
    )

    grouped = certify(outcomes_of(seed=5), max_risk=0.3, groups="prediction")
    limits = [grouped.thresholds[NAMES[k]].threshold for k in one.prediction]
    by_hand = [
        limit is not None and u <= limit for u, limit in zip(one.uncertainty, limits, strict=True)
    ]
    choice = choose_by_rule(one, CalibratedRule(grouped))
    assert choice.accepted.tolist() == by_hand
    assert choice.threshold is None
    assert not data_of(report_page([one], calibrated=CalibratedRule(grouped)))["exact"]

    of_batches = certify(outcomes_of(seed=5), max_risk=0.2, method="selection")
    batch = choose_by_rule(one, CalibratedRule(of_batches))
    assert batch.accepted.any()
    assert np.array_equal(batch.accepted, one.uncertainty <= batch.threshold)

    with pytest.raises(ProvenanceError, match="'mcm'"):
        choose_by_rule(one, CalibratedRule(rule, "mcm"))
    decided = dataclasses.replace(one, provenance={"risk": "beef"})
    with pytest.raises(ProvenanceError, match="'beef'"):
        choose_by_rule(decided, CalibratedRule(rule, fingerprint="cafe"))


def bursts_of(sizes: np.ndarray) -> Outcomes:
    """Return rows of bursts with these numbers of rows. Rows of a burst are about as certain."""
    rng = np.random.default_rng(0)
    bursts = np.repeat(np.arange(len(sizes)), sizes)
    noise = rng.uniform(-0.1, 0.1, len(bursts))
    return Outcomes(
        0.1 + 0.8 * rng.random(len(sizes))[bursts] + noise,
        rng.random(len(sizes))[bursts] < 0.1,
        cluster=bursts.astype(str),
        method="table",
    )


THRESHOLD = re.compile(r"<dt>Threshold</dt><dd>\s*([^<]*?)\s*(?:<small>([^<]*)</small>)?</dd>")


@pytest.mark.filterwarnings("ignore:rows of one cluster")
def test_a_rule_about_majorities_is_shown_as_one() -> None:
    outcomes = bursts_of(np.full(300, 3))
    rule = certify_clusters(outcomes, outcomes.cluster, "majority", max_risk=0.3)
    page = report_page([outcomes], calibrated=CalibratedRule(rule))
    accepted = rule.accept(outcomes.uncertainty, clusters=outcomes.cluster)
    assert accepted.any()
    assert (accepted != (outcomes.uncertainty <= rule.threshold)).any()
    assert not data_of(page)["exact"]
    threshold, unit = THRESHOLD.search(page).groups()
    assert float(threshold) == pytest.approx(rule.threshold, rel=1e-3)  # four digits are shown
    assert unit == "of a cluster"
    assert "A cluster is accepted where the mean uncertainty of its rows is at most" in page
    assert "The numbers below are about single rows" in page
    assert "To review, least uncertain" in page
    assert "These 900 rows are of 300 clusters" in page

    none = certify_clusters(outcomes, outcomes.cluster, "majority", max_risk=0.001)
    page = report_page([outcomes], calibrated=CalibratedRule(none))
    assert THRESHOLD.search(page).group(1) == "none"
    assert '<th scope="col">clusters</th>' in page
    assert "The numbers below" not in page


@pytest.mark.filterwarnings("ignore:rows of one cluster")
@pytest.mark.parametrize("n_large", [0, 5])
def test_a_rule_about_rows_of_clusters_is_shown_as_one(n_large: int) -> None:
    calibration = bursts_of(np.full(300, 3))
    rule = certify_clusters(calibration, calibration.cluster, "ratio", max_risk=0.3)
    outcomes = bursts_of(np.r_[np.full(290, 3), np.full(n_large, 30)])
    page = report_page([outcomes], calibrated=CalibratedRule(rule))
    data = data_of(page)
    assert data["exact"] == (n_large == 0)  # else rows of large clusters lie below the threshold
    assert data["threshold"][data["start"]] == rule.threshold
    threshold, unit = THRESHOLD.search(page).groups()
    assert float(threshold) == pytest.approx(rule.threshold, rel=1e-3)
    assert unit is None
    assert "unless its cluster has more than 3 rows;" in page


def test_a_rule_by_class_with_one_class_has_a_table() -> None:
    of_one = outcomes_of(seed=5)
    of_one = dataclasses.replace(of_one, prediction=np.zeros(len(of_one), dtype=np.int64))
    rule = certify(of_one, max_risk=0.3, groups="prediction")
    assert len(rule.thresholds) == 1
    page = report_page([outcomes_of()], calibrated=CalibratedRule(rule))
    assert THRESHOLD.search(page).group(1) == "several"
    assert "at most the threshold of its group;" in page
    assert "What was calibrated, per group of answers" in page


def test_a_rule_that_certifies_nothing_is_shown_as_such() -> None:
    rule = certify(outcomes_of(40, seed=5), max_risk=0.01)
    page = report_page([outcomes_of()], calibrated=CalibratedRule(rule))
    assert "nothing is accepted" in page
    assert str(rule.thresholds[""].why) in page.replace("&gt;", ">")
    assert data_of(page)["start"] == 0


def test_classes_by_brute_force_and_scipy() -> None:
    one = outcomes_of()
    choice = choose_by_hindsight(one, 0.1)
    rows, left = class_rows(one, choice)
    assert left == 0
    assert [row.failures.k for row in rows] == sorted(
        (row.failures.k for row in rows), reverse=True
    )
    for row in rows:
        mine = one.prediction == NAMES.index(row.name)
        assert (row.failures.n, row.failures.k) == (mine.sum(), one.failure[mine].sum())
        assert row.accepted == Rate(int((mine & choice.accepted).sum()), int(mine.sum()))
        assert row.accepted_failures.k == one.failure[mine & choice.accepted].sum()
        interval = scipy.stats.binomtest(row.failures.k, row.failures.n).proportion_ci(
            0.95, "exact"
        )
        assert (row.failures.low, row.failures.high) == pytest.approx(
            (interval.low, interval.high), abs=1e-9
        )
    assert (Rate(0, 0).value, Rate(0, 0).high) == (None, 1.0)


def test_metrics_and_their_intervals_stand_in_the_table(page: str) -> None:
    from sklearn.metrics import roc_auc_score

    for one in (outcomes_of(), outcomes_of(seed=1, method="mcm", noise=0.5)):
        value = f"{100 * roc_auc_score(one.failure, one.uncertainty):.1f}"
        assert re.search(rf'<td>{value}<span class="interval">\d+\.\d–\d+\.\d</span></td>', page)


def test_the_page_says_of_ece_what_its_interval_is(page: str) -> None:
    assert (
        "stratified by failure. ECE: 1,000 draws of the noise of its bins, "
        "corrected for their bias." in page
    )
    assert "bootstrap intervals" not in page


def test_the_gallery_shows_the_rows_that_it_says() -> None:
    one = outcomes_of()
    choice = choose_by_hindsight(one, 0.05)
    rows = pick_rows(one, choice)
    assert (
        one.uncertainty[rows["suspicious"]].tolist() == sorted(one.uncertainty, reverse=True)[:24]
    )
    assert (
        one.uncertainty[rows["confident"]].tolist()
        == sorted(one.uncertainty[one.failure == 1])[:24]
    )
    assert (
        one.uncertainty[rows["nearest"]].tolist()
        == sorted(u for u in one.uncertainty if u > choice.threshold)[:24]
    )


def test_pictures_are_shown_and_damaged_ones_say_why(tmp_path: Path) -> None:
    one = outcomes_of()
    worst = int(np.argsort(-one.uncertainty, kind="stable")[0])
    images = open_dataset(write_pictures(tmp_path / "images.parquet", 400, frozenset({worst})))
    page = report_page([one], images=images)
    pictures = Reader(page).all("img")
    assert len(pictures) == 71
    assert all(picture["src"].startswith("data:image/webp;base64,") for picture in pictures)
    assert all(picture["alt"] for picture in pictures)
    assert "No picture: no image: " in page
    other = dataclasses.replace(one, ids=[f"other-{i}" for i in range(400)])
    with pytest.raises(DataError, match="has none of the images"):
        report_page([other], images=images)


def test_competitors_are_the_zero_shot_posterior() -> None:
    source = toy_embeddings(300)
    one = score(MCM().fit(source), toy_embeddings(300, seed=3, ids_from=900), dataset="toy")
    data = toy_embeddings(300, seed=3, ids_from=900)
    page = report_page([one], embeddings=data)
    worst = int(np.argsort(-one.uncertainty, kind="stable")[0])
    logits = 20.0 * (data.image[worst].double() @ data.text.double().T).numpy()
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    first = page[page.index('<ol class="competitors"') :]
    shown = [int(v) for v in re.findall(r'class="p">(\d+)&nbsp;%', first[: first.index("</ol>")])]
    assert shown == pytest.approx(100 * np.sort(p)[::-1][:3], abs=0.51)
    with pytest.raises(ProvenanceError, match="the store answers"):
        report_page(
            [dataclasses.replace(one, prediction=(one.prediction + 1) % 5)], embeddings=data
        )
    with pytest.raises(ProvenanceError, match="none of the rows that are shown, such as '"):
        report_page([one], embeddings=toy_embeddings(300, seed=3, ids_from=5000))


def test_a_page_of_calibration_rows_says_so(tmp_path: Path) -> None:
    MCM().fit(toy_embeddings()).save(tmp_path)
    data = toy_embeddings(seed=4, ids_from=5000)
    calibrate_predictor(tmp_path, data, Target(max_risk=0.3))
    calibrated = read_calibrated(tmp_path)
    rows = score(load(tmp_path), data)
    with pytest.warns(UserWarning, match=f"{len(rows)} of {len(rows)} rows are calibration rows"):
        page = report_page([rows], calibrated=calibrated)
    assert f"Calibrated on {len(rows)} of these rows" in page
    assert "Calibrated on other rows" not in page
    others = score(load(tmp_path), toy_embeddings(seed=6, ids_from=9000))
    assert "Calibrated on other rows" in report_page([others], calibrated=calibrated)


def test_the_rule_beside_a_predictor_is_read_and_bound_to_its_scores(tmp_path: Path) -> None:
    MCM().fit(toy_embeddings()).save(tmp_path)
    with pytest.raises(DataError, match="is not calibrated"):
        read_calibrated(tmp_path)
    record = calibrate_predictor(
        tmp_path, toy_embeddings(seed=4, ids_from=5000), Target(max_risk=0.3)
    )
    calibrated = read_calibrated(tmp_path)
    assert calibrated.rule == record.rule
    assert (calibrated.method, calibrated.facts["predictor"]) == ("mcm", record.predictor)
    one = score(load(tmp_path), toy_embeddings(300, seed=3, ids_from=900))
    page = report_page([one], calibrated=calibrated)
    assert record.predictor in page
    assert data_of(page)["accepted"][data_of(page)["start"]] == np.sum(
        one.uncertainty <= record.rule.threshold
    )


HOSTILE = "<script>alert(1)</script>\"'\u202e\u2066\x00\n\ud800&" + "x" * 500


def test_hostile_names_are_harmless() -> None:
    storable = HOSTILE.replace("\ud800", "")  # provenance is JSON
    one = outcomes_of(
        method=HOSTILE,
        dataset=HOSTILE,
        split=HOSTILE,
        provenance={storable: {storable: storable}},
        class_names=[HOSTILE] * 4,
    )
    one = dataclasses.replace(one, ids=[f"{HOSTILE}{i}" for i in range(400)])
    page = report_page([one], title=HOSTILE)
    page.encode()  # lone surrogates are gone
    read = Reader(page)
    assert [s.get("type") for s in read.all("script")] == ["application/json", None]
    assert "alert(1)" not in "".join(read.texts["script"])
    assert not any(
        key.startswith("on") or key == "style"
        for _, attributes in read.elements
        for key in attributes
    )
    assert not set(page) & (build.DIRECTION_MARKS | {"\x00"})
    assert "x" * 301 not in page
    assert "\\u202e" in page
    assert len(page) < 400_000


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    read = Reader(page)
    for tag, attributes in read.elements:
        for key in ("src", "href", "action", "data", "srcset", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/webp;base64,")), (
                tag,
                key,
            )
    assert not re.search(r"@import|url\((?!#)", page)
    policy = next(meta["content"] for meta in read.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert f"style-src '{csp_hash(style)}'" in policy
    assert [f"script-src '{csp_hash(one)}'" in policy for one in script] == [True]


def test_the_same_scores_give_the_same_small_page(page: str) -> None:
    assert page == report_page([outcomes_of(), outcomes_of(seed=1, method="mcm", noise=0.5)])
    many = [outcomes_of(20_000, seed=i, method=f"m{i}") for i in range(12)]
    assert len(report_page(many)) < 300_000


def test_raw_uncertainties_and_answers_that_are_all_right() -> None:
    one = dataclasses.replace(outcomes_of(), is_probability=False)
    assert "Stated and found" not in report_page([one])
    calibrated = dataclasses.replace(one, failure_probability=np.clip(one.uncertainty, 0.01, 0.99))
    assert "Stated and found" in report_page([calibrated])
    right = dataclasses.replace(one, failure=np.zeros(400), uncertainty=np.ones(400))
    with pytest.warns(UserWarning, match="intervals are wide"):
        page = report_page([right])
    assert "(ROC)" not in page
    assert "none of 400 answers is wrong" in page


def test_unknown_and_unscored_rows_are_counted_and_left_out() -> None:
    base = outcomes_of()
    u, failure = base.uncertainty.copy(), base.failure.copy()
    u[:5], failure[5:12] = np.nan, -1
    one = dataclasses.replace(
        base, uncertainty=u, failure=failure, reason=["nonfinite"] * 5 + [None] * 395
    )
    page = report_page([one])
    assert "7 rows whose right answer is not known, 5 without an uncertainty" in page
    assert data_of(page)["n"] == 388


def test_methods_of_other_rows_are_refused_and_one_is_chosen() -> None:
    a, b = outcomes_of(method="mcm"), outcomes_of(seed=1, method="vilu_plus (features)")
    assert choose_main([a, b], None) is b
    assert choose_main([a, b], "mcm") is a
    with pytest.raises(UsageError, match="Did you mean 'mcm'"):
        choose_main([a, b], "mcn")
    with pytest.raises(UsageError, match="name of its own"):
        choose_main([a, a], None)
    with pytest.raises(
        ProvenanceError, match="mcm on toy and vilu on toy must be of the same rows"
    ):
        choose_main([a, outcomes_of(200, method="vilu")], None)
    flipped = dataclasses.replace(b, failure=1 - b.failure)
    with pytest.raises(ProvenanceError, match="400 failures differ"):
        choose_main([a, flipped], None)


def test_scores_are_called_after_their_files_where_names_repeat(tmp_path: Path) -> None:
    for name, method in (("a", "vilu"), ("b", "vilu"), ("c", "mcm"), ("d", None)):
        outcomes_of(40, method=method).save(tmp_path / f"{name}.parquet")
    assert [one.method for one in read_scores(tmp_path)] == ["vilu (a)", "vilu (b)", "mcm", "d"]
    assert [one.method for one in read_scores(tmp_path / "c.parquet")] == ["mcm"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        read_scores(tmp_path / "empty")


def test_ticks_are_round_and_lines_keep_their_ends() -> None:
    assert round_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert round_ticks(-4.2, 6.1) == [-4, -2, 0, 2, 4, 6]
    x = np.linspace(0, 1, 5000)
    xs, ys = thin_points(x, x**2, 100)
    assert len(xs) <= 100
    assert (xs[0], ys[0], xs[-1], ys[-1]) == (0, 0, 1, 1)
    assert np.abs(np.interp(x, xs, ys) - x**2).max() < 1e-3  # parabola chords over steps of 2 %


def test_a_predictor_is_no_scores(tmp_path: Path) -> None:
    """A page from a predictor's calibration rows would always confirm its rule.

    The rule was chosen on these rows.
    """
    MCM().fit(toy_embeddings()).save(tmp_path)
    calibrate_predictor(tmp_path, toy_embeddings(seed=1, ids_from=10_000), Target(max_risk=0.5))
    with pytest.raises(
        UsageError, match=r"is the folder of a predictor.*Give scores of other rows.*--predictor"
    ):
        read_scores(tmp_path)


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_the_page_is_as_dark_as_the_system(
    browser: Browser, page: str, scheme: Literal["light", "dark"], is_dark: bool
) -> None:
    opened = browser.new_page(color_scheme=scheme)
    opened.set_content(page)
    colour = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = opened.evaluate("getComputedStyle(document.body).color")
    opened.close()
    red = int(re.findall(r"\d+", colour)[0])
    assert (red < 64) == is_dark
    assert (int(re.findall(r"\d+", ink)[0]) > 192) == is_dark
