"""``vilu explain`` through the real command line, on noise that a toy model embedded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.command import run
from vilu.store.embed import embed


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write stores with labelled and unlabelled noise, and a predictor."""
    folder = tmp_path_factory.mktemp("explain")
    for name, first, n, unlabelled in (
        ("train", 0, 90, []),
        ("test", 90, 40, []),
        ("bare", 90, 40, range(40)),
    ):
        data = dataset(n, unlabelled=list(unlabelled))
        data.blobs = dataset(first + n).blobs[first:]
        data.keys = [f"{name}/{i}.png" for i in range(n)]
        embed(data, FakeBackbone(), folder / name, names=NAMES)
    train = vilu.open_source(folder / "train")
    vilu.ViLUPlus(width=8, epochs=2).fit(train).save(folder / "plus")
    return folder


def test_the_command_says_what_the_library_says(work: Path) -> None:
    done = run(
        "explain", work / "plus", work / "test", "--train", work / "train", "-n", 3, "--json"
    )
    train, test = vilu.open_source(work / "train"), vilu.open_source(work / "test")
    expected = vilu.explain(vilu.load(work / "plus"), test, train, n=3).to_dict()
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))
    uncertainty = vilu.load(work / "plus").predict_uncertainty(test)
    assert [row["row"] for row in expected["rows"]] == np.argsort(-uncertainty, kind="stable")[
        :3
    ].tolist()
    assert "3 rows explained" in done.stderr


def test_chosen_rows_as_text_and_in_a_file(work: Path) -> None:
    done = run(
        "explain",
        work / "plus",
        work / "train",
        "--key",
        "train/7.png",
        "--row",
        2,
        "-o",
        work / "why.json",
    )
    for words in (
        "row 7  train/7.png",
        "row 2  train/2.png",
        "posterior of the pooled experts",
        "log-odds of failure",
    ):
        assert words in done.stdout
    assert "neighbours    left out: no training rows given" in done.stdout
    assert "2 of 2 explained rows were used to fit this vilu_plus" in done.stderr
    assert [row["row"] for row in json.loads((work / "why.json").read_text())["rows"]] == [7, 2]


def test_summaries_with_and_without_labels(work: Path) -> None:
    summary = ["--summary", "--coverage", 0.5, "-o", work / "summary.json"]
    done = run("explain", work / "plus", work / "test", *summary)
    assert "accepted risk" in done.stdout
    assert "95 % interval" in done.stdout
    found = json.loads((work / "summary.json").read_text())
    outcomes = vilu.score(vilu.load(work / "plus"), vilu.open_source(work / "test"))
    risk = vilu.metrics.risk_at_coverage(outcomes.uncertainty, outcomes.failure, 0.5)
    assert found["risk_map"]["risk"] == pytest.approx(risk, abs=1e-12)
    assert {row["name"] for row in found["prompt_gains"]["rows"]} == set(NAMES)
    done = run("explain", work / "plus", work / "bare", *summary, "--json", "--overwrite")
    bare = json.loads(done.stdout)
    written = json.loads((work / "summary.json").read_text())
    assert bare == {
        key: written[key] for key in written if key not in {"schema_version", "inputs", "digest"}
    }
    assert bare["prompt_gains"] is None
    assert bare["risk_map"]["labelled"] is False
    assert bare["risk_map"]["failures"] == pytest.approx(outcomes.uncertainty.sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["{work}/plus", "{work}/test", "--key", "nobody"], 3, "no row has the key 'nobody'"),
        (
            ["{work}/plus", "{work}/test", "--summary", "--row", "1"],
            2,
            "Leave --train, --key and --row out",
        ),
        (["{work}/plus", "{work}/test", "-o", "{work}/why.txt"], 2, ".json file"),
        (["{work}/plus", "{work}/test", "--coverage", "0.5"], 2, "--coverage needs --summary"),
        (
            ["{work}", "{work}/test", "--summary", "--coverage", "1.5"],
            2,
            "coverage must be in (0, 1]",
        ),  # refused at once
    ],
)
def test_errors_say_what_and_how(work: Path, args: list[str], code: int, message: str) -> None:
    done = run("explain", *(arg.format(work=work) for arg in args), code=code)
    assert message in done.stderr
    assert done.stdout == ""
