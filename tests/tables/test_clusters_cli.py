"""Test clusters and estimates on the command line, from tables of answers and from stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vilu
from tests.command import run
from tests.tables.answers import written
from vilu.artifacts.documents import write_json
from vilu.calibration.clusters import majority_outcomes
from vilu.errors import UsageError
from vilu.outcomes.outcomes import Outcomes


def bursts(n_clusters: int, seed: int, n_labelled: int | None = None) -> dict[str, Any]:
    """Return bursts with three photos whose scores are nearly equal. One photo in ten dissents.

    Each burst is right or wrong. A photo that agrees has the burst's result, and a dissenting
    photo has the opposite one.
    """
    random = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(n_clusters), 3)
    n = len(cluster)
    doubt = random.random(n_clusters)
    burst_is_wrong = random.random(n_clusters) < doubt**4
    dissents = random.random(n) < 0.1
    correct = (burst_is_wrong[cluster] == dissents).astype(int).tolist()
    if n_labelled is not None:
        labelled = set(random.permutation(n)[:n_labelled].tolist())
        correct = [value if row in labelled else "" for row, value in enumerate(correct)]
    return {
        "id": [f"{seed}-{row}" for row in range(n)],
        "answer": np.where(dissents, "fox", "cat").tolist(),
        "score": (1 - doubt[cluster] + 0.01 * random.random(n)).tolist(),
        "correct": correct,
        "cluster": [f"burst{index}" for index in cluster],
    }


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bursts")
    written(folder / "calibration.csv", bursts(400, seed=1))
    written(folder / "new.csv", bursts(200, seed=2))
    written(folder / "few.csv", bursts(500, seed=3, n_labelled=100))
    return folder


@pytest.mark.parametrize("risk", ["majority", "ratio"])
def test_a_risk_of_clusters_from_a_table_to_decisions(
    tables: Path, tmp_path: Path, risk: str
) -> None:
    folder = tmp_path / "calibration"
    command = ("calibrate", tables / "calibration.csv", "--max-risk", 0.2, "-o", folder)
    done = run(*command, "--cluster-risk", risk)
    sentence = {
        "majority": "of the accepted clusters have a wrong majority answer",
        "ratio": "of the accepted answers are wrong, of clusters of up to 3 rows",
    }
    assert sentence[risk] in done.stdout
    data = vilu.open_table(tables / "calibration.csv")
    assert data.cluster is not None
    rows = Outcomes(
        -data.numbers["score"],
        data.failure,
        prediction=[int(answer == "fox") for answer in data.answer or ()],
    )
    by_hand = vilu.certify_clusters(rows, data.cluster, risk, max_risk=0.2)
    # loading checks that the rule follows from the rows
    saved = vilu.Calibration.load(folder).rule
    assert saved is not None
    assert saved.thresholds == by_hand.thresholds
    assert saved.clusters == by_hand.clusters

    scores = tmp_path / "scores.parquet"
    run("score", folder, tables / "new.csv", "-o", scores)
    outcomes = Outcomes.load(scores)
    accepted = [decision == "accept" for decision in outcomes.decision or ()]
    new = vilu.open_table(tables / "new.csv")
    expected = by_hand.accept(-new.numbers["score"], clusters=new.cluster)
    assert accepted == expected.tolist()
    assert outcomes.cluster == new.cluster


def test_a_guarantee_by_the_test_of_0_2_0_is_made_again(tables: Path, tmp_path: Path) -> None:
    """vilu 0.2.0 left the largest cluster out of the test, and the guarantee was not valid."""
    folder = tmp_path / "calibration"
    command = ("calibrate", tables / "calibration.csv", "--max-risk", 0.2, "-o", folder)
    run(*command, "--cluster-risk", "ratio")
    path = folder / "risk.json"
    document = json.loads(path.read_text())
    document["vilu"] = "0.2.0"
    document["rule"]["clusters"]["n"] -= 1
    write_json(path, document)
    refused = run("score", folder, tables / "new.csv", "-o", tmp_path / "s.csv", code=6)
    assert "by vilu 0.2.0. Its test left the largest cluster out" in refused.stderr
    assert "Run `vilu calibrate` again" in refused.stderr
    calibration = (folder, tables / "calibration.csv", "--max-risk", 0.2)
    run("calibrate", *calibration, "--cluster-risk", "ratio")
    run("score", folder, tables / "new.csv", "-o", tmp_path / "s.csv")


def test_the_majority_of_texts_answers_for_a_cluster(tables: Path) -> None:
    data = vilu.open_table(tables / "calibration.csv")
    from vilu.tables.scores import scores_of_columns

    (outcomes,) = scores_of_columns(data)
    assert outcomes.cluster is not None
    clusters = majority_outcomes(outcomes, outcomes.cluster)
    # burst 0 by hand: the most frequent answer for its three photos, and whether it is right
    answers = (data.answer or ())[:3]
    common = max(set(answers), key=answers.count)
    row = answers.index(common)
    assert clusters.failure[0] == data.failure[row]


def test_without_a_risk_of_clusters_rows_that_correlate_warn(tables: Path, tmp_path: Path) -> None:
    command = ("calibrate", tables / "calibration.csv", "--max-risk", 0.2)
    done = run(*command, "-o", tmp_path / "calibration")
    assert "which are wrong together with a correlation of" in done.stderr
    assert "Clusters count with --cluster-risk" in done.stderr


def test_rows_one_by_one_are_refused_under_a_risk_of_clusters(tables: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    command = ("calibrate", tables / "calibration.csv", "--max-risk", 0.2, "-o", folder)
    run(*command, "--cluster-risk", "majority")
    refused = run("score", folder, tables / "new.csv", "-o", tmp_path / "parts", code=2)
    assert "rules about clusters judge all rows of a batch together" in refused.stderr
    scores = tmp_path / "scores.parquet"
    run("score", folder, tables / "new.csv", "-o", scores)
    refused = run("monitor", folder, scores, code=6)
    assert "about clusters of rows, and not about rows that come one by one" in refused.stderr


def test_impossible_risks_of_clusters_are_refused(tables: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    command = ("calibrate", tables / "calibration.csv", "-o", folder)
    refused = run(*command, "--min-coverage", 0.5, "--cluster-risk", "majority", code=2)
    assert "a cluster_risk takes a max_risk" in refused.stderr
    refused = run(
        *command, "--max-risk", 0.1, "--cluster-risk", "majority", "--largest-cluster", 3, code=2
    )
    assert 'largest_cluster is for the cluster_risk "ratio"' in refused.stderr
    refused = run(*command, "--max-risk", 0.2, "--per-class", code=2)
    assert "a table of answers has no classes" in refused.stderr
    content = bursts(100, seed=1)
    del content["cluster"]
    alone = written(tmp_path / "alone.csv", content)
    refused = run(
        "calibrate", alone, "--max-risk", 0.1, "--cluster-risk", "ratio", "-o", folder, code=3
    )
    assert "needs the cluster of every row: the column cluster" in refused.stderr


def test_intervals_of_an_evaluation_are_of_clusters(tmp_path: Path) -> None:
    def width_of(path: Path) -> float:
        rows = json.loads(run("evaluate", path, "--json", "--resamples", 200).stdout)
        (auroc,) = (row for row in rows if row["metric"] == "auroc")
        return float(auroc["ci_high"] - auroc["ci_low"])

    content = bursts(400, seed=1)
    # all rows in a burst get one result
    content["correct"] = np.repeat(content["correct"][::3], 3).tolist()
    by_clusters = written(tmp_path / "clusters.csv", content)
    del content["cluster"]
    by_rows = written(tmp_path / "rows.csv", content)
    # 400 draws in place of 1,200: up to sqrt(3) times as wide
    assert width_of(by_clusters) > 1.4 * width_of(by_rows)


def test_estimate_of_a_table_with_few_labels(tables: Path) -> None:
    done = run("estimate", tables / "few.csv")
    assert "1,500 rows, of which 100 have a label" in done.stdout
    assert "must be a random sample" in done.stdout
    (error_rate,) = json.loads(run("estimate", tables / "few.csv", "--json").stdout)
    truth = 1 - np.mean(bursts(500, seed=3)["correct"])
    assert error_rate["low"] <= truth <= error_rate["high"]
    assert error_rate["n_labelled"] == 100


def test_estimate_refuses_labels_of_the_most_doubtful(tables: Path, tmp_path: Path) -> None:
    content = bursts(500, seed=3)
    doubtful = set(np.argsort(content["score"])[:100].tolist())
    content["correct"] = [
        value if row in doubtful else "" for row, value in enumerate(content["correct"])
    ]
    chosen = written(tmp_path / "chosen.csv", content)
    refused = run("estimate", chosen, code=3)
    assert "100 labelled rows are no random sample of the 1,500 rows" in refused.stderr


def test_estimate_refuses_labels_that_were_asked_for_to_fit_on(tmp_path: Path) -> None:
    content = bursts(100, seed=3)
    content["asked_for"] = ["fit", "calibration"] * 150
    refused = run("estimate", written(tmp_path / "next.csv", content), code=2)
    assert "`vilu next` chose 150 labelled rows of this table to fit on" in refused.stderr


@pytest.fixture(scope="module")
def under_another_name(tables: Path) -> Path:
    """Write the calibration table with its clusters in a numeric column ``burst``."""
    content = bursts(400, seed=1)
    content["burst"] = np.repeat(np.arange(400), 3).tolist()
    del content["cluster"]
    return written(tables / "bursts.csv", content)


def test_another_column_names_the_clusters(
    tables: Path, under_another_name: Path, tmp_path: Path
) -> None:
    alike = ("--max-risk", 0.2, "--cluster-risk", "majority", "-o")
    run("calibrate", tables / "calibration.csv", *alike, tmp_path / "first")
    named = ("--clusters", "burst")
    calibrated = run("calibrate", under_another_name, *alike, tmp_path / "second", *named)
    hint = f"next: vilu score {tmp_path / 'second'} TABLE --clusters burst -o scores.parquet"
    assert hint in calibrated.stderr
    first, second = (vilu.Calibration.load(tmp_path / name) for name in ("first", "second"))
    assert first.rule.thresholds == second.rule.thresholds

    scores = tmp_path / "scores.parquet"
    score = ("score", tmp_path / "second", under_another_name, "-o", scores)
    assert "needs the cluster of each" in run(*score, code=2).stderr
    run(*score, *named)
    assert Outcomes.load(scores).cluster[:4] == ("0", "0", "0", "1")

    def width(*flags: str) -> float:
        done = run("evaluate", under_another_name, "--json", "--resamples", 100, *flags)
        (row,) = (row for row in json.loads(done.stdout) if row["metric"] == "auroc")
        assert row.get("n_pictures") == (400 if flags else None)
        return float(row["ci_high"] - row["ci_low"])

    assert width(*named) != width()


def test_a_column_of_clusters_that_is_missing_or_useless_is_refused(
    tables: Path, under_another_name: Path, tmp_path: Path
) -> None:
    missing = run("estimate", under_another_name, "--clusters", "page", code=3)
    assert "no column 'page' with the clusters of its rows. It has id, answer" in missing.stderr
    scores = tmp_path / "scores.csv"
    Outcomes([0.1, 0.9], [0, 1]).save(scores)
    refused = run("evaluate", scores, "--clusters", "page", code=2)
    assert "scores have the clusters of their table" in refused.stderr
    with pytest.raises(UsageError, match="Name the column when you read it"):
        vilu.open_table(vilu.open_table(under_another_name), clusters="burst")


def test_next_asks_for_whole_clusters(tables: Path, tmp_path: Path) -> None:
    """Half of the clusters are for the fit, and half are a random sample for calibration.

    The second table holds other clusters than the first.
    """
    folder = tmp_path / "calibration"
    run("calibrate", tables / "calibration.csv", "-o", folder)
    content = bursts(600, seed=5)
    truth = dict(zip(content["id"], content["correct"], strict=True))
    cluster_of = dict(zip(content["id"], content["cluster"], strict=True))
    # burst0 has a label, so it is left out
    content["correct"] = [content["correct"][0], *[""] * 1799]
    new = written(tmp_path / "new.csv", content)
    ask = ("next", new, "--predictor", folder, "--next", 240)
    done = run(*ask, "-o", tmp_path / "first.csv")
    assert "240 answers of 80 whole clusters to label" in done.stderr
    first = vilu.open_table(tmp_path / "first.csv")
    run(*ask, "--labels", tmp_path / "first.csv", "-o", tmp_path / "second.csv")
    second = vilu.open_table(tmp_path / "second.csv")
    assert "burst0" not in first.cluster + second.cluster
    assert not set(first.cluster) & set(second.cluster)
    for table in (first, second):
        assert all(table.cluster.count(name) == 3 for name in table.cluster)
        purposes = dict(zip(table.cluster, table.asked_for, strict=True))
        assert list(purposes.values()).count("calibration") == 40
        of_rows = [purposes[cluster_of[key]] for key in table.ids]
        assert list(table.asked_for) == of_rows  # a cluster has one purpose
    # 80 random clusters: as many wrong answers as in all rows, within 4 standard errors
    correct = []
    for table in (first, second):
        for key, purpose in zip(table.ids, table.asked_for, strict=True):
            if purpose == "calibration":
                correct.append(truth[key])
    share = np.mean(list(truth.values()))
    assert np.mean(correct) == pytest.approx(share, abs=4 * (share * (1 - share) / 80) ** 0.5)


def test_estimate_says_how_many_answers_of_a_table_each_class_has(
    tables: Path, tmp_path: Path
) -> None:
    """If an answer is wrong, the other animal is right."""
    content = bursts(500, seed=3, n_labelled=200)
    other = {"cat": "fox", "fox": "cat"}
    everything = bursts(500, seed=3)
    of_class = []
    for answer, correct in zip(everything["answer"], everything["correct"], strict=True):
        of_class.append(answer if correct == 1 else other[answer])
    table = written(tmp_path / "few.csv", content)
    refused = run("estimate", table, "--classes", code=3)
    assert "is wrong, so another class is right. Write it into the column truth" in refused.stderr

    content["truth"] = [""] * 1500
    for row, correct in enumerate(content["correct"]):
        if correct == 0:
            content["truth"][row] = other[content["answer"][row]]
    table = written(tmp_path / "truth.csv", content)
    facts = json.loads(run("estimate", table, "--classes", "--json").stdout)
    assert [fact["name"] for fact in facts] == ["error rate", "cat", "fox"]
    for fact in facts[1:]:
        assert fact["low"] <= of_class.count(fact["name"]) / 1500 <= fact["high"]
    assert sum(fact["share"] for fact in facts[1:]) == pytest.approx(1, abs=0.02)
    assert "fox: " in run("estimate", table, "--classes").stdout
    lines = table.read_text().replace("fox", '"fo\nx"')
    with_breaks = tmp_path / "breaks.csv"
    with_breaks.write_text(lines)
    assert r"  fo\nx: " in run("estimate", with_breaks, "--classes").stdout

    del content["answer"]
    no_answers = written(tmp_path / "no.csv", content)
    refused = run("estimate", no_answers, "--classes", code=3)
    assert "shares of classes need the column answer" in refused.stderr
