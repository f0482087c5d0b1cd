"""Two models on the same photos, embedded, fitted, calibrated and scored through the command
line.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import vilu
from tests.command import run
from tests.e2e.test_cli import NAMES, PHOTOS
from vilu import TwoModels, open_source


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write stores from the compact model at two sizes, and fit a duo on them."""
    folder = tmp_path_factory.mktemp("duo")
    (folder / "names.txt").write_text(NAMES)
    for size in (96, 64):
        for split, limit in (("train", 120), ("validation", 40), ("test", 60)):
            run(
                "embed", PHOTOS, "-o", folder / f"{split}{size}", "--backbone", f"compact:{size}",
                "--classes", folder / "names.txt", "--split", split, "--limit", limit,
            )  # fmt: skip
    run(
        "fit",
        folder / "train96",
        "--method",
        "duo",
        "-o",
        folder / "duo",
        "--second",
        folder / "train64",
    )
    return folder


def both(work: Path, split: str) -> TwoModels:
    return TwoModels(open_source(work / f"{split}96"), open_source(work / f"{split}64"))


def test_scores_are_the_librarys_in_a_file_and_in_a_folder(work: Path) -> None:
    expected = (
        vilu.PREDICTORS["duo"]().fit(both(work, "train")).predict_uncertainty(both(work, "test"))
    )
    second = "--second", work / "test64"
    for name in ("scores.parquet", "scores"):
        run("score", work / "duo", work / "test96", "-o", work / name, *second)
    table = pq.read_table(work / "scores.parquet")
    assert np.array_equal(table["uncertainty"].to_numpy(), expected)
    assert vilu.Outcomes.load(work / "scores.parquet").split == "test"
    assert np.array_equal(vilu.ScoreFolder(work / "scores").outcomes().uncertainty, expected)
    rows = json.loads(run("evaluate", work / "scores.parquet", "--json", "--resamples", 20).stdout)
    assert {row["n"] for row in rows if row["metric"] == "auroc"} == {60}
    done = run("score", work / "duo", work / "test96", "-o", work / "scores.parquet", *second)
    assert "there is nothing to do" in done.stderr


def test_a_calibration_takes_both(work: Path) -> None:
    second = "--second", work / "validation64"
    done = run("calibrate", work / "duo", work / "validation96", *second)
    next_command = f"vilu score {work / 'duo'} STORE --second SECOND_STORE -o scores.parquet"
    assert f"next: {next_command}" in done.stderr
    run("push", work / "duo", work / "shelf")
    pulled = run("pull", work / "shelf", "-o", work / "pulled").stderr
    pulled_command = f"vilu score {work / 'pulled'} STORE --second SECOND_STORE -o scores.parquet"
    assert f"next: {pulled_command}" in pulled
    run(
        "score",
        work / "duo",
        work / "test96",
        "-o",
        work / "calibrated.csv",
        "--second",
        work / "test64",
    )
    assert "failure_probability" in (work / "calibrated.csv").read_text().splitlines()[0]


def test_an_explanation_says_that_it_has_none_of_the_score(work: Path) -> None:
    command = "explain", work / "duo", work / "test96", "--second", work / "test64"
    done = run(*command, "-n", 2, "--json")
    assert "no attribution is defined for duo" in json.dumps(json.loads(done.stdout))
    next_command = f"vilu {' '.join(map(str, command))} --summary"
    assert f"where the failures are: {next_command}" in done.stderr


def test_what_is_wrong_with_the_second_store_is_told(work: Path) -> None:
    command = "fit", work / "train96", "--method", "duo", "-o", work / "none"
    told = run(*command, code=3).stderr
    assert "needs the column 'second_image'" in told
    assert "--second STORE" in told
    told = run(*command, "--second", work / "test64", code=3).stderr
    assert "120 of 120 rows are not among the 60 rows of the second source" in told
    assert "(compared by their pictures)" in told
    assert "is a predictor, where a store" in run(*command, "--second", work / "duo", code=2).stderr
    assert "does not exist" in run(*command, "--second", work / "nowhere", code=2).stderr
    assert (
        "--pseudo turns classes into captions"
        in run(*command, "--second", work / "train64", "--pseudo", code=2).stderr
    )
    told = run(
        "score",
        work / "duo",
        work / "test96",
        "-o",
        work / "s.csv",
        "--second",
        work / "test96",
        code=6,
    ).stderr
    assert "the second model of the fitted duo" in told
    assert not (work / "none").exists()


def test_another_second_store_is_another_fit(work: Path) -> None:
    again = run(
        "fit", work / "train96", "--method", "duo", "-o", work / "duo", "--second", work / "train64"
    )
    assert "there is nothing to do" in again.stderr
    told = run(
        "fit",
        work / "train96",
        "--method",
        "duo",
        "-o",
        work / "duo",
        "--second",
        work / "train96",
        code=2,
    )
    assert "--overwrite" in told.stderr


def test_a_study_takes_both(work: Path) -> None:
    stores = {
        key: ", ".join(f'{role} = "{role}{size}"' for role in ("train", "test"))
        for key, size in (("stores", 96), ("second", 64))
    }
    (work / "study.toml").write_text(
        f"""
seeds = 1
resamples = 20
[data.photos]
stores = {{ {stores["stores"]} }}
second = {{ {stores["second"]} }}
[data.alone]
stores = {{ {stores["stores"]} }}
[settings.all]
kind = "labels"
[settings.few]
kind = "labels"
budget = 5
[methods.mcm]
[methods.duo]
"""
    )
    run("benchmark", work / "study.toml", "--data", work, "-o", work / "run")
    cells = work / "run" / "cells"
    for setting in ("all", "few"):
        scored = vilu.Outcomes.load(cells / "photos" / setting / "duo" / "seed-0.parquet")
        train = both(work, "train")
        if setting == "all":
            expected = vilu.PREDICTORS["duo"]().fit(train).predict_uncertainty(both(work, "test"))
            assert np.array_equal(scored.uncertainty, expected)
        assert len(scored) == 60
        refused = json.loads((cells / "alone" / setting / "duo" / "seed-0.json").read_text())[
            "refused"
        ]
        assert "needs the column 'second_image'" in refused["reason"]
