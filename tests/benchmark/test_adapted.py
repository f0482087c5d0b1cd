"""Test a study in which some methods judge adapted answers, and others zero-shot answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vilu
from tests.builders.bench_fakes import config, make_stores
from vilu.errors import UsageError
from vilu.metrics.bootstrap import paired_across_answers
from vilu.metrics.catalog import METRICS
from vilu.outcomes.outcomes import Outcomes
from vilu_bench.studies.config import Config
from vilu_bench.studies.study import run_studies
from vilu_bench.studies.submit import export_cells

METRICS_ACROSS = ("coverage_at_risk_0.05", "aurc")
RISK = METRICS_ACROSS[0]


def study(metrics: tuple[str, ...] = METRICS_ACROSS, **changes: Any) -> Config:
    """Return a study with MCM and a linear probe.

    One probe judges zero-shot answers, one its own.
    """
    return config(
        seeds=1,
        metrics=metrics,
        data={"one": {"stores": {"train": "one-train", "test": "one-test"}}},
        settings={"all": {"kind": "labels"}},
        methods={
            "mcm": {},
            "probe": {"method": "linear_probe"},
            "own": {"method": "linear_probe", "params": {"answer": "adapted"}},
        },
        **changes,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    run_studies([study()], data, output)
    return output


def scores_of(run: Path, method: str) -> Outcomes:
    return Outcomes.load(run / "cells" / "one" / "all" / method / "seed-0.parquet")


def test_every_method_is_judged_by_its_own_answers(data: Path, finished: Path) -> None:
    train = vilu.open_source(data / "one-train")
    test = vilu.open_source(data / "one-test")
    own = vilu.PREDICTORS["linear_probe"](answer="adapted").fit(train)
    expected = vilu.score(own, test)
    scored = scores_of(finished, "own")
    assert scored.answer == "adapted"
    np.testing.assert_array_equal(scored.failure, expected.failure)
    np.testing.assert_array_equal(scored.uncertainty, expected.uncertainty)
    # With the same fit, zero-shot answers are wrong in other rows.
    of_zero_shot = scores_of(finished, "probe")
    assert of_zero_shot.answer == "zero_shot"
    assert (of_zero_shot.failure != scored.failure).any()
    np.testing.assert_array_equal(of_zero_shot.failure, scores_of(finished, "mcm").failure)


def test_methods_are_ranked_and_compared_across_their_answers(data: Path, finished: Path) -> None:
    run = Path(shutil.copytree(finished, data / "copy"))
    (done,) = run_studies([study()], data, run)
    board = done.board
    own = board.find("own", "one", "all")
    probe = board.find("probe", "one", "all")
    assert own is not None
    assert probe is not None
    gap = own.difference_from(probe, RISK)
    assert gap is not None
    # The paired difference must equal ``vilu.compare``, which draws the same rows for both methods.
    sides = []
    for method in ("own", "probe"):
        scored = scores_of(run, method)
        sides.append((scored.uncertainty, scored.failure))
    seed = int(own.results[0].test_rows, 16)
    alone = paired_across_answers(METRICS[RISK].kernel, *sides, n_resamples=40, seed=seed)
    assert gap.value == pytest.approx(alone.difference, abs=1e-12)
    ours = gap.difference(0.95)
    assert (ours.ci_low, ours.ci_high) == pytest.approx((alone.ci_low, alone.ci_high), abs=1e-12)
    text = done.text
    assert "Cov@5% [95 %]" in text
    assert "without strata" in text
    assert "AUROC" not in text


def test_what_compares_nothing_across_answers_is_refused() -> None:
    for metric in ("auroc", "fpr95", "augrc", "ece"):
        with pytest.raises(UsageError, match=f"metrics: {metric} compares nothing here"):
            study(metrics=(*METRICS_ACROSS, metric))
    with pytest.raises(UsageError, match=r"metrics must name coverage_at_risk_0\.05 and aurc"):
        study(metrics=("aurc",))
    view = {"kind": "table", "name": "t", "title": "T", "metrics": ["auroc"]}
    with pytest.raises(UsageError, match="no metric"):
        study(views=[view])


def test_a_method_without_a_posterior_has_no_adapted_answers() -> None:
    with pytest.raises(UsageError, match="adapted"):
        config(metrics=METRICS_ACROSS, methods={"knn_distance": {"params": {"answer": "adapted"}}})


def test_results_are_not_submitted_to_such_a_study(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    (done,) = run_studies([study()], data, finished)
    with pytest.raises(UsageError, match="has a method that judges adapted answers"):
        export_cells([done.board], finished, "own", tmp_path)
