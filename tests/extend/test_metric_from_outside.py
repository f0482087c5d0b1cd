"""Test a metric that vilu does not know.

It is written here and added, and must be shown wherever vilu's metrics are. Nothing else is
changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.builders.bench_fakes import benchmark, config, make_stores
from tests.command import run
from vilu.errors import UsageError
from vilu.metrics import METRICS, Metric
from vilu.metrics.counts import Floats, TieCounts, ratio
from vilu.outcomes.evaluate import compare, evaluate
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable
from vilu.report.page.build import report_page
from vilu_bench.studies import facts
from vilu_bench.studies.study import run_studies


def odds_of_half(counts: TieCounts) -> Floats:
    """Return wrong answers per right one, among answers trusted more than the median."""
    kept = 2 * counts.accepted <= counts.n[..., None]
    return ratio(np.where(kept, counts.wrong, 0).sum(-1), np.where(kept, counts.correct, 0).sum(-1))


ODDS = Metric(
    "Odds@50%", odds_of_half, "ties at the median left out", percent=False, name="odds_of_half"
)


@pytest.fixture(autouse=True)
def added() -> Iterator[None]:
    vilu.register(ODDS)
    yield
    del METRICS[ODDS.name]


def outcomes(method: str = "mine", seed: int = 0) -> Outcomes:
    rng = np.random.default_rng(seed)
    failure = (rng.random(200) < 0.4).astype(int)
    return Outcomes(rng.normal(size=200) + failure, failure, method=method, dataset="photos")


def by_hand(one: Outcomes) -> float:
    trusted = one.failure[np.argsort(one.uncertainty)[: len(one) // 2]]
    return float((trusted == 1).sum() / (trusted == 0).sum())


def test_it_is_evaluated_and_stands_in_every_table(tmp_path: Path) -> None:
    one = outcomes()
    table = evaluate(one, n_resamples=100)
    (row,) = table.filter(metric="odds_of_half")
    assert row.value == by_hand(one)
    assert row.ci_low < row.value < row.ci_high
    cell = f"{row.value:.3g} [{row.ci_low:.3g}, {row.ci_high:.3g}]"
    for text in (str(table), table.to_markdown()):
        assert "Odds@50%" in text
        assert cell in text
        assert "in percent, but for Odds@50%" in text
        assert "Odds@50%: ties at the median left out" in text
    for suffix in (".json", ".parquet", ".csv"):
        table.save(tmp_path / f"metrics{suffix}")
        assert ResultTable.load(tmp_path / f"metrics{suffix}") == table


def test_it_is_listed() -> None:
    (row,) = [
        row
        for row in json.loads(run("list", "metrics", "--json").stdout)
        if row["name"] == "odds_of_half"
    ]
    assert (row["title"], row["better"], row["convention"]) == (
        "Odds@50%",
        "lower",
        ODDS.convention,
    )
    assert "Odds@50%" in run("list", "metrics").stdout


def test_two_methods_are_compared_by_it() -> None:
    one = outcomes()
    other = replace(one, uncertainty=np.random.default_rng(1).normal(size=200), method="chance")
    found = compare(one, other, metric="odds_of_half", n_resamples=200)
    assert found.difference == by_hand(one) - by_hand(other)
    assert (
        f"Odds@50%, mine against chance: {found.value_a:.3g} against {found.value_b:.3g}, "
        "difference" in str(found)
    )


def test_the_page_shows_it() -> None:
    one = outcomes()
    page = report_page([one])
    assert "Odds@50%" in page
    assert f">{by_hand(one):.3g}<span" in page
    assert "In per cent, but for Odds@50%" in page


def test_a_benchmark_takes_it(tmp_path: Path) -> None:
    data = make_stores(tmp_path / "stores")
    views = [
        {"kind": "table", "name": "odds", "title": "Odds", "metrics": ["auroc", "odds_of_half"]}
    ]
    more = {
        "settings": {"all": {"kind": "labels"}},
        "methods": {"mcm": {}, "knn_distance": {}},
        "seeds": 1,
    }
    chosen = config(metrics=["auroc", "fpr95", "odds_of_half"], views=views, **more)
    (study,) = run_studies([chosen], data, tmp_path / "out")
    cell = json.loads((tmp_path / "out/cells/one/all/mcm/seed-0.json").read_text())
    (value,) = [row["value"] for row in cell["results"] if row["metric"] == "odds_of_half"]
    assert value == by_hand(Outcomes.load(tmp_path / "out/cells/one/all/mcm/seed-0.parquet"))
    (exhibit,) = study.exhibits
    values = [
        shown.value for shown in exhibit.body.cells.values() if shown.metric == "odds_of_half"
    ]
    assert value in values
    assert "In percent, but for Odds@50%." in study.text
    best = min(found for found in values if found is not None)
    assert best != max(values)
    ranked = [
        shown
        for shown in exhibit.body.cells.values()
        if shown.metric == "odds_of_half" and shown.rank == "best"
    ]
    assert best in [shown.value for shown in ranked]  # lower is better
    ranking = benchmark(chosen.model_copy(update={"views": ()}), data, tmp_path / "out")
    assert "Odds@50%" in ranking.text
    assert f"{value:.3g}" in ranking.text


def test_its_code_decides_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(facts, "code_digest", lambda *modules: str(asked.append(modules)))
    for metrics in (["auroc", "fpr95"], ["auroc", "fpr95", "odds_of_half"]):
        chosen = config(metrics=metrics)
        facts.code_hash_of(chosen, facts.Cell("mcm", "one", "all", 0))
    assert asked[1] == (*asked[0], __name__)


def test_what_cannot_be_added() -> None:
    vilu.register(ODDS)  # adding the same metric twice is allowed
    with pytest.raises(UsageError, match="a name of its own"):
        vilu.register(replace(ODDS, name=""))
    with pytest.raises(UsageError, match="Got 'auroc'; taken are: auroc, fpr95"):
        vilu.register(replace(ODDS, name="auroc"))
    with pytest.raises(
        UsageError, match=r"must give values \(B,\) for counts \(B, G\)\. Got shape \(\)"
    ):
        vilu.register(
            replace(ODDS, name="total", kernel=lambda counts: np.float64(counts.wrong.sum()))
        )
    assert set(METRICS) >= {"auroc", "odds_of_half"}
    assert "total" not in METRICS
