"""Test the search for calibration rows that are near copies of fit rows."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import vilu
from vilu.calibration.copies import Copies
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.errors import DataError
from vilu_bench.methods.neighbours import KNNVote

WIDTH = 256


def rows(n: int, seed: int, copied: vilu.Embeddings | None = None, noise: float = 0.0) -> dict:
    """Return arrays for n new rows, or for noisy copies of the first n rows in a set."""
    rng = np.random.default_rng(seed)
    text = np.random.default_rng(99).normal(size=(3, WIDTH)) / np.sqrt(WIDTH)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    if copied is None:
        target = rng.integers(3, size=n)
        image = text[target] + rng.normal(size=(n, WIDTH)) / 5
    else:
        target = copied.target.numpy()[:n]
        image = copied.image[:n].numpy() + noise * rng.normal(size=(n, WIDTH))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    return {"image": image, "text": text, "target": target}


def joined(*parts: dict) -> vilu.Embeddings:
    image = np.concatenate([part["image"] for part in parts])
    target = np.concatenate([part["target"] for part in parts])
    return vilu.Embeddings(image, parts[0]["text"], target=target, logit_scale=20.0)


def fitted(folder: Path, n: int = 200) -> vilu.Embeddings:
    train = joined(rows(n, seed=0))
    KNNVote(k=3).fit(train).save(folder)
    return train


def test_calibration_on_near_copies_of_fitted_rows_is_refused(tmp_path: Path) -> None:
    train = fitted(tmp_path)
    copies = rows(5, seed=1, copied=train, noise=0.003)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=r"5 of 205 .* 0\.995 .* more than 1%"):
        calibrate_predictor(tmp_path, joined(rows(200, seed=2), copies), Target(max_risk=0.9))
    assert not (tmp_path / "risk.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == [
        name for name in before if name.endswith(".json")
    ]


def test_a_few_near_copies_of_fitted_rows_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = fitted(tmp_path)
    near = rows(4, seed=1, copied=train, noise=0.01)  # a cosine near 0.987
    with caplog.at_level(logging.WARNING):
        calibrate_predictor(tmp_path, joined(rows(200, seed=2), near), Target(max_risk=0.9))
    assert "4 of 204 calibration rows have a cosine of at least 0.98 with a row" in caplog.text


def test_copies_are_as_they_are_among_the_fitted_rows(tmp_path: Path) -> None:
    """A calibration set must not be refused if it has no more near copies than the fit rows have
    among themselves.
    """
    scenes = joined(rows(200, seed=0))
    bursts = [rows(200, seed=seed, copied=scenes, noise=0.002) for seed in (1, 2, 3)]
    KNNVote(k=3).fit(joined(*bursts[:2])).save(tmp_path)
    assert calibrate_predictor(tmp_path, joined(bursts[2]), Target(max_risk=0.9)).n > 0


def test_without_a_sample_it_is_said_that_copies_cannot_be_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted(tmp_path)
    (tmp_path / "sample.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        calibrate_predictor(tmp_path, joined(rows(200, seed=2)), Target(max_risk=0.9))
    assert "cannot be searched for among the calibration rows" in caplog.text


def test_outcomes_of_fitted_rows_are_refused() -> None:
    """``vilu.certify`` must refuse fit rows, as the command and ``predictor.calibrate_probability``
    do.
    """
    train, fresh = joined(rows(200, seed=0)), joined(rows(200, seed=2))
    predictor = KNNVote(k=3).fit(train)
    with pytest.warns(UserWarning, match="were used to fit"):
        outcomes = vilu.score(predictor, train)
    for method in ("ltt", "selection"):
        with pytest.raises(DataError, match=r"200 of these rows were used to fit .* Score rows"):
            vilu.certify(outcomes, max_risk=0.9, method=method)
    assert vilu.certify(vilu.score(predictor, fresh), max_risk=0.9).feasible


def test_a_few_fitted_rows_among_outcomes_are_said() -> None:
    train = joined(rows(200, seed=0))
    first = {"image": train.image[:1], "text": train.text, "target": train.target[:1]}
    predictor = KNNVote(k=3).fit(train)
    with pytest.warns(UserWarning, match="were used to fit"):
        outcomes = vilu.score(predictor, joined(rows(200, seed=2), first))
    with pytest.warns(UserWarning, match=r"1 of these rows were used to fit .* Score rows"):
        vilu.certify(outcomes, max_risk=0.9)


def test_the_bounds_of_a_number_of_copies_hold() -> None:
    """Each bound may miss the copy count in at most 5 % of draws.

    A copy, among 60, is found if its fit row is in the sample, with probability 0.2.
    """
    rng, n_copies, draws = np.random.default_rng(0), 60, 2000
    found = [Copies(int(k), 1000, 0.2) for k in rng.binomial(n_copies, 0.2, size=draws)]
    allowed = 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)
    assert np.mean([copies.upper_n_copies < n_copies for copies in found]) <= allowed
    assert np.mean([copies.lower_n_copies > n_copies for copies in found]) <= allowed
    whole = Copies(7, 100, 1.0)
    assert (whole.lower_n_copies, whole.upper_n_copies, whole.estimated_share) == (7, 7, 0.07)
    assert Copies(0, 100, 0.5).lower_n_copies == 0
