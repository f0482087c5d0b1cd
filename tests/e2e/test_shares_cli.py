"""A guarantee for stated class shares and out-of-distribution shares, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.builders.array_files import NAMES, arrays, save
from tests.command import run

RISK = 0.1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write stores with 1,400 rows, and fit a predictor.

    One row in seven is out of distribution and lies between the classes.
    """
    root = tmp_path_factory.mktemp("shares")
    for name, seed in (("cal", 1), ("new", 2)):
        made, strange = arrays(1400), np.arange(3, 1400, 7)
        made["image"][strange] = made["text"].mean(axis=0)
        made["image"] += (
            np.random.default_rng(seed).normal(0, 0.1, made["image"].shape).astype(np.float32)
        )
        made["image"] /= np.linalg.norm(made["image"], axis=1, keepdims=True)
        save(root / f"{name}.npz", made)
        run("import", f"{name}.npz", "-o", name, cwd=root)
    run("fit", "cal", "-o", "predictor", "--method", "mcm", cwd=root)
    (root / "shares.csv").write_text("class,share\ncat,0.7\ndog,0.1\ncup,0.2\nsea,0\n")
    return root


def test_a_guarantee_for_stated_shares(place: Path) -> None:
    asked = ("calibrate", "predictor", "cal", "--max-risk", str(RISK), "--outside-share", "0.3")
    asked = (*asked, "--class-shares", "shares.csv")
    said = run(*asked, cwd=place)
    assert (
        "for up to 30.0% of out-of-distribution images like those shown and at the stated shares "
        "of 4 classes" in said.stdout
    )
    assert "calibrated so already" in run(*asked, cwd=place).stderr
    rule = json.loads((place / "predictor" / "risk.json").read_text())["rule"]
    assert rule["outside_share"] == 0.3
    assert rule["class_shares"] == {"cat": 0.7, "dog": 0.1, "cup": 0.2, "sea": 0.0}
    assert (
        "already" in run(*asked[:-2], code=2, cwd=place).stderr
    )  # another guarantee needs --overwrite

    run("score", "predictor", "new", "-o", "scores.parquet", cwd=place)
    scores = vilu.Outcomes.load(place / "scores.parquet")
    accepted, known = np.array(scores.decision) == "accept", scores.evaluable
    assert set(np.array(scores.decision_reason, dtype=object)[~accepted & known]) == {
        "above_threshold"
    }
    strata = [
        (0.7 * rule["class_shares"][name], known & (scores.target == place))
        for place, name in enumerate(NAMES)
    ]
    strata.append((0.3, scores.outside))
    wrong = sum(
        share * np.mean(accepted[rows] & (scores.failure[rows] == 1)) for share, rows in strata
    )
    taken = sum(share * np.mean(accepted[rows]) for share, rows in strata)
    assert 0.5 < taken < 0.75
    assert wrong / taken <= RISK


def test_what_cannot_be_guaranteed(place: Path) -> None:
    calibrate = ("calibrate", "predictor", "cal", "--overwrite")
    told = run(
        *calibrate, "--max-risk", "0.001", "--outside-share", "0.3", code=4, cwd=place
    ).stderr
    assert "too few rows for the stated shares: (inside) has 1,000 and needs" in told
    told = run(
        *calibrate, "--max-risk", "0.1", "--class-shares", "shares.csv", code=2, cwd=place
    ).stderr
    assert "200 of these rows are of none of the classes" in told
    assert "--outside-share" in told
    for content, code, message in (
        ("class,share\ncat,0.7\n", 2, "must add up to 1"),
        ("class,share\ncow,1\n", 2, "'cow', which is none of the 4 classes"),
        (
            "class,share\ncat,0.7\ncup,0.3\n",
            2,
            "no share is stated of 2 of the 4 classes: 'dog', 'sea'",
        ),
        ("name,share\ncat,1\n", 3, "must have the columns class and share"),
    ):
        (place / "wrong.csv").write_text(content)
        wrong = ("--max-risk", "0.1", "--outside-share", "0", "--class-shares", "wrong.csv")
        assert message in run(*calibrate, *wrong, code=code, cwd=place).stderr
