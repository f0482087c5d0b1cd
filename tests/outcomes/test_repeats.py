"""Test rows that show one picture: they are reported, and resampled together.

This holds in memory, in folders, in reports and in comparisons.
"""

from __future__ import annotations

import json
import re
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.builders.page_data import outcomes_of
from tests.command import run
from tests.conftest import toy_embeddings, variant
from tests.tables.answers import columns
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.rows import SCORING_BATCH
from vilu.errors import UsageError
from vilu.metrics.counts import has_repeated_picture
from vilu.predictors.contract.seen import MAX_HASHES
from vilu.scoring import score_folder

SAID = "rows of one picture are no independent answers: the {} rows of {} show {} pictures"
METRICS = ["auroc", "fpr95", "augrc", "brier", "ece"]


def repeated(data: Embeddings, times: int) -> Embeddings:
    rows = torch.arange(len(data)).repeat(times)
    ids = [f"row {row}" for row in range(len(rows))]
    return variant(data, image=data.image[rows], target=data.target[rows], columns={}, ids=ids)


def ends(table: vilu.ResultTable) -> np.ndarray:
    return np.array([[row.value, row.ci_low, row.ci_high] for row in table], dtype=np.float64)


def test_repeats_are_told_and_do_not_narrow_an_interval(tmp_path: Path) -> None:
    data, predictor = toy_embeddings(n=400), vilu.MCM()
    once = vilu.evaluate(vilu.score(predictor, data), metrics=METRICS, n_resamples=200)
    for times in (2, 20):
        scores = vilu.score(predictor, repeated(data, times))
        with pytest.warns(UserWarning, match=SAID.format(400 * times, "mcm", 400)):
            table = vilu.evaluate(scores, metrics=METRICS, n_resamples=200)
        # Equal up to rounding, because blocks of another size sum products in another order.
        assert ends(table) == pytest.approx(ends(once), abs=1e-6)
        row = table.rows[0]
        assert (row.n, row.n_pictures) == (400 * times, 400)
        assert row.interval == "95 % stratified bootstrap, 200 resamples of pictures"
        assert f"{400 * times} answers for 400 pictures, " in str(table)
        for name in ("a.json", "a.parquet", "a.csv"):
            table.save(tmp_path / name)
            assert vilu.ResultTable.load(tmp_path / name) == table
    assert once.rows[0].n_pictures is None
    assert "n_pictures" not in once.to_dicts()[0]


def test_seeds_of_repeated_rows_have_a_mean(tmp_path: Path) -> None:
    outcomes = [
        vilu.Outcomes(np.arange(80.0), [0, 1] * 40, seed=seed, picture=np.arange(80) // (seed + 1))
        for seed in (0, 1)
    ]
    with pytest.warns(UserWarning, match="the 80 rows of the scores show 40 pictures"):
        table = vilu.evaluate(outcomes, metrics=["auroc"], n_resamples=10)
    (mean,) = table.mean_over_seeds()
    assert (mean.n, mean.n_pictures) == (80, 60)


def test_a_few_repeats_are_counted_without_a_warning() -> None:
    picture = np.arange(4000)
    picture[:20] = picture[20:40]
    outcomes = vilu.Outcomes(np.arange(4000.0) % 7, np.arange(4000) % 2, picture=picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = vilu.evaluate(outcomes, metrics=["auroc"], n_resamples=10)
    assert table.rows[0].n_pictures == 3980


@pytest.mark.filterwarnings("ignore:rows of one picture")
def test_few_pictures_are_few_however_often_they_stand() -> None:
    uncertainty, failure = np.tile(np.arange(40.0), 50), np.tile(np.arange(40) % 4 == 0, 50)
    outcomes = vilu.Outcomes(uncertainty, failure, picture=np.tile(np.arange(40), 50))
    with pytest.warns(UserWarning, match="intervals are wide: the scores has only 10 wrong"):
        vilu.evaluate(outcomes, metrics=["auroc"], n_resamples=10)


def test_a_comparison_of_repeats_is_that_of_the_pictures() -> None:
    data = toy_embeddings(n=400)
    methods = vilu.MCM(), vilu.PREDICTORS["margin"]()
    once = vilu.compare(*(vilu.score(method, data) for method in methods), n_resamples=200)
    a, b = (vilu.score(method, repeated(data, 5)) for method in methods)
    for pair in ((a, b), (replace(a, picture=None), b), (a, replace(b, picture=None))):
        several = vilu.compare(*pair, n_resamples=200)
        assert (several.n, several.n_pictures) == (2000, 400)
        assert several.ci_low == pytest.approx(once.ci_low, abs=1e-6)
        assert several.ci_high == pytest.approx(once.ci_high, abs=1e-6)
        assert "(2000 answers for 400 pictures, " in str(several)


@pytest.mark.parametrize("compared", [2**24, 100])
def test_a_folder_of_parts_knows_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: int
) -> None:
    monkeypatch.setattr(score_folder, "IDENTITIES_PER_PASS", compared)
    data = toy_embeddings(n=4000)
    data.target[::10] = -1
    rows = repeated(data, 3)
    folder = vilu.score_parts(vilu.MCM(), rows, tmp_path / "scores", rows_per_part=1)
    assert folder.run.parts[2].stop == len(rows)  # in three parts
    with pytest.warns(UserWarning, match=SAID.format(10_800, "mcm", 3600)):
        table = vilu.evaluate(folder, metrics=METRICS, n_resamples=100)
    with pytest.warns(UserWarning, match=SAID.format(10_800, "mcm", 3600)):
        assert vilu.evaluate(folder.outcomes(), metrics=METRICS, n_resamples=100) == table
    assert (table.rows[0].n_pictures, table.rows[0].n_unlabelled) == (3600, 1200)
    whole = vilu.score_parts(vilu.MCM(), data, tmp_path / "once")
    assert isinstance(whole.tally().scores, vilu.metrics.histogram.Histogram)


def test_a_folder_of_parts_knows_clusters(tmp_path: Path) -> None:
    n = 2 * SCORING_BATCH
    cluster = [f"page {row % 400}" for row in range(n)]  # rows of a page are in both parts
    answers = {**columns(n), "cluster": cluster}
    answer_score = vilu.methods.AnswerScore(column="score_a")
    source = vilu.open_table(answers)
    folder = vilu.score_parts(answer_score, source, tmp_path / "scores", rows_per_part=1)
    assert len(folder.run.parts) == 2
    said = f"the {n} rows of answer_score .given. are of 400 clusters"
    with pytest.warns(UserWarning, match=f"rows of one cluster are no independent answers: {said}"):
        table = vilu.evaluate(folder, metrics=["auroc"], n_resamples=50)
    with pytest.warns(UserWarning, match=said):
        assert vilu.evaluate(folder.outcomes(), metrics=["auroc"], n_resamples=50) == table
    assert table.rows[0].interval == "95 % stratified bootstrap, 50 resamples of clusters"


@pytest.mark.filterwarnings("ignore:(rows of one picture|400 of 800 rows|only 18 failures)")
def test_a_folder_of_repeats_tells_rows_of_the_fit(tmp_path: Path) -> None:
    data = toy_embeddings(n=400)
    predictor = vilu.LVU(epochs=1, hidden=(4,)).fit(data[:200])
    folder = vilu.score_parts(predictor, repeated(data, 2), tmp_path / "scores")
    with pytest.warns(UserWarning, match="at least 400 of them for lvu"):
        vilu.evaluate(folder, metrics=["auroc"], n_resamples=10)


def test_the_search_for_a_repeated_picture_takes_little_memory() -> None:
    """A folder of ten million rows is evaluated beside a program of a few hundred megabytes."""
    n = 1_000_000
    picture = np.random.default_rng(0).permutation(n)
    picture[:10] = -1  # unknown pictures are no repeats
    tracemalloc.start()
    try:
        assert not has_repeated_picture(picture)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # a copy to sort takes 8 bytes per row, the sort may take 4, and a mask takes 1
    assert peak < 16 * n
    picture[-1] = picture[20]
    assert has_repeated_picture(picture)


def test_the_command_tells_repeats_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    rows = repeated(toy_embeddings(n=400), 2)
    vilu.score(vilu.MCM(), rows).save(tmp_path / "file.parquet")
    vilu.score_parts(vilu.MCM(), rows, tmp_path / "folder")
    for name in ("file.parquet", "folder"):
        done = run("evaluate", tmp_path / name, "--json", "--resamples", 50)
        assert {row["n_pictures"] for row in json.loads(done.stdout)} == {400}
        assert SAID.format(800, "mcm", 400) in done.stderr


@pytest.mark.filterwarnings("ignore:rows of one picture")
def test_a_page_counts_pictures() -> None:
    once = outcomes_of()
    rows = np.tile(np.arange(400), 5)
    several = replace(once.take(rows), picture=rows)
    pages = [vilu.report_page([one]) for one in (once, several)]
    assert "These 2,000 rows show 400 pictures." in pages[1]
    assert "rows show" not in pages[0]
    intervals = [re.findall('<span class="interval">[^<]*</span>', page) for page in pages]
    # The last intervals belong to failures in four classes, and to failures among their accepted
    # answers.
    assert intervals[1][-8:] == intervals[0][-8:]


def test_a_fit_tells_repeated_rows(train: Embeddings, caplog: pytest.LogCaptureFixture) -> None:
    def messages_of_fit(data: vilu.EmbeddingSource) -> str:
        caplog.clear()
        vilu.PREDICTORS["knn_distance"]().fit(data)
        return caplog.text

    twice = messages_of_fit(repeated(train, 2))
    assert "the 1,200 training rows have only 600 different pictures: the other" in twice
    few = Embeddings(
        torch.cat([train.image, train.image[:5]]),
        train.text,
        target=torch.cat([train.target, train.target[:5]]),
        logit_scale=20.0,
    )
    assert messages_of_fit(few) == ""


def test_a_large_fit_tells_repeated_rows_from_a_sample(
    caplog: pytest.LogCaptureFixture,
) -> None:
    n = 2 * MAX_HASHES
    data = toy_embeddings(n=n, k=2, d=8)
    vilu.PREDICTORS["mcm_ts"]().fit(data)
    assert caplog.text == ""
    vilu.PREDICTORS["mcm_ts"]().fit(repeated(data, 2))
    (number,) = re.findall(rf"the {2 * n:,} training rows have only about ([\d,]+)", caplog.text)
    # the estimate from a bottom-k sketch has a standard error of 1 / sqrt(k)
    assert int(number.replace(",", "")) == pytest.approx(n, rel=5 / MAX_HASHES**0.5)


@pytest.mark.parametrize("known_by", ["picture", "ids"])
def test_folds_of_one_division_are_no_seeds(known_by: str) -> None:
    def part(rows: range, seed: int) -> vilu.Outcomes:
        names = {"ids": [f"{row}.jpg" for row in rows], "picture": list(rows)}
        uncertainty = np.random.default_rng(seed).random(len(rows))
        return vilu.Outcomes(
            uncertainty,
            np.arange(len(rows)) % 2,
            method="mcm",
            dataset="pets",
            seed=seed,
            **{known_by: names[known_by]},
        )

    folds = [part(range(start, start + 300), seed=start) for start in (0, 300, 600)]
    table = vilu.evaluate(folds, metrics=["auroc"], n_resamples=0)
    with pytest.raises(
        UsageError, match=r"the 3 results of mcm on pets are of different rows.*Outcomes.concat"
    ):
        table.mean_over_seeds()
    assert len(vilu.evaluate(vilu.Outcomes.concat(folds), metrics=["auroc"]).mean_over_seeds()) == 1
    overlapping = [part(range(start, start + 300), seed=start) for start in (0, 200)]
    (mean,) = vilu.evaluate(overlapping, metrics=["auroc"], n_resamples=0).mean_over_seeds()
    assert mean.interval == "mean of 2 seeds, one standard deviation"
