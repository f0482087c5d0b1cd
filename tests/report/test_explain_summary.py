"""Test risk maps and better texts by hand-worked cases, brute force and planted faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError, UsageError
from vilu.metrics import risk_at_coverage
from vilu.report.explain.competitors import strongest_competitor
from vilu.report.explain.prompts import FOLDS, MIXES, paired_interval

NAMES = ("cat", "dog", "car")


def outcomes(**changes: object) -> vilu.Outcomes:
    """Return ten answers, five of them wrong, with two ties at the threshold for eight answers."""
    values: dict[str, object] = {
        "uncertainty": [0.1, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.9],
        "failure": [0, 1, 0, 1, 0, 0, 0, 1, 1, 1],
        "prediction": [0, 0, 1, 0, 1, 2, 2, 0, 1, 2],
        "target": [0, 1, 1, 1, 1, 2, 2, 2, 0, 0],
        "class_names": NAMES,
        "is_probability": True,
    }
    return vilu.Outcomes(**values | changes)


def test_confusions_by_hand() -> None:
    found = vilu.risk_map(outcomes())
    rows = {(row.answer, row.instead): row for row in found.rows}
    assert [(r.answer, r.instead) for r in found.rows] == [
        ("cat", "dog"), ("cat", "car"), ("dog", "cat"), ("car", "cat"),
    ]  # fmt: skip
    cats = rows["cat", "dog"]
    assert (cats.failures, cats.accepted, cats.share) == (2, 2, pytest.approx(2 / 5))
    assert (cats.uncertainty, cats.risk) == (pytest.approx(0.25), pytest.approx(2 / 8))
    # seven rows are below .7 and eight are kept, so each of the two tied ones counts half
    assert (rows["cat", "car"].accepted, rows["dog", "cat"].accepted) == (0.5, 0.5)
    assert (rows["car", "cat"].failures, rows["car", "cat"].accepted) == (1, 0)
    assert (found.threshold, found.failures, found.n) == (0.7, 5, 10)
    assert "cat       dog" in str(found)


@pytest.mark.parametrize("coverage", [0.05, 0.37, 0.8, 1.0])
def test_costs_add_up_to_the_selective_risk(test: Embeddings, coverage: float) -> None:
    scored = vilu.score(vilu.MCM(), test)
    scored = vilu.Outcomes(
        np.round(scored.uncertainty, 2),
        scored.failure,
        scored.prediction,
        scored.target,
        class_names=test.class_names,
    )  # with many ties
    found = vilu.risk_map(scored, coverage=coverage)
    expected = risk_at_coverage(scored.uncertainty, scored.failure, coverage)
    assert found.risk == pytest.approx(expected, abs=1e-12)
    assert sum(row.risk for row in found.rows) == pytest.approx(expected, abs=1e-12)
    assert sum(row.failures for row in found.rows) == scored.failure.sum() == found.failures
    assert sum(row.share for row in found.rows) == pytest.approx(1, abs=1e-12)


def test_without_labels_failures_are_expected_ones(test: Embeddings) -> None:
    bare = Embeddings(
        test.image, test.text, target=None, logit_scale=20.0, class_names=test.class_names
    )
    scored = vilu.score(vilu.MCM(), bare)
    competitor = strongest_competitor(vilu.MCM(), bare)
    found = vilu.risk_map(scored, competitor)
    assert not found.labelled
    assert found.failures == pytest.approx(scored.uncertainty.sum(), rel=1e-12)
    for row in found.rows:
        answer, other = (test.class_names.index(name) for name in (row.answer, row.instead))
        mine = (scored.prediction == answer) & (competitor == other)
        assert row.failures == pytest.approx(scored.uncertainty[mine].sum(), rel=1e-9)
        assert row.uncertainty == pytest.approx(
            np.average(scored.uncertainty[mine], weights=scored.uncertainty[mine]), rel=1e-9
        )
    assert "competitor" in str(found)
    assert f"{found.risk:.2%} are expected to be wrong." in str(found)


def test_some_labels_count_and_the_rest_is_left_out() -> None:
    failure, target = [0, 1, -1, 1] + [-1] * 6, [0, 1, -1, 1] + [-1] * 6
    found = vilu.risk_map(outcomes(failure=failure, target=target))
    assert (found.labelled, found.n, found.n_left_out, found.failures) == (True, 3, 7, 2)
    assert "7 rows without score or label left out" in str(found)


def test_maps_that_mean_nothing_are_refused() -> None:
    unknown = {"failure": [-1] * 10, "target": None}
    with pytest.raises(UsageError, match="gives a score"):
        vilu.risk_map(outcomes(**unknown, is_probability=False, method="energy"))
    with pytest.raises(UsageError, match="strongest competitor"):
        vilu.risk_map(outcomes(**unknown))
    with pytest.raises(DataError, match="one entry per row"):
        vilu.risk_map(outcomes(**unknown), [1, 2])
    with pytest.raises(DataError, match="no targets"):
        vilu.risk_map(outcomes(target=None))
    with pytest.raises(DataError, match="needs the answers"):
        vilu.risk_map(outcomes(prediction=None))
    with pytest.raises(UsageError, match="coverage must be"):
        vilu.risk_map(outcomes(), coverage=0)
    with pytest.raises(UsageError, match="captions"):
        vilu.risk_map(vilu.score(vilu.MCM(), toy_pairs()))
    with pytest.raises(UsageError, match="captions"):
        strongest_competitor(vilu.MCM(), toy_pairs())
    with pytest.raises(UsageError, match="captions"):
        vilu.prompt_gains(toy_pairs())


def test_a_clean_sheet_has_no_confusions() -> None:
    right = vilu.Outcomes([0.1, 0.2], [0, 0], [0, 1], [0, 1], class_names=NAMES)
    found = vilu.risk_map(right)
    assert (found.rows, found.risk) == ((), 0.0)
    assert "0.00% are wrong" in str(found)


def planted(n: int = 400, *, seed: int = 0) -> Embeddings:
    """Return images between a common direction and their class's direction.

    The text for class 2 points elsewhere.
    """
    rng = np.random.default_rng(seed)
    d, k = 24, 6
    texts = np.eye(d)[:k] + 0.5 * np.eye(d)[20]
    target = rng.integers(k, size=n)
    image = 0.6 * np.eye(d)[target] + 1.0 * np.eye(d)[21] + rng.normal(size=(n, d)) * 0.12
    texts[2] = np.eye(d)[15] + 0.5 * np.eye(d)[20]
    image, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, texts))
    return Embeddings(
        image, texts, target=target, logit_scale=50.0, class_names=[f"class {c}" for c in range(k)]
    )


def brute_gains(data: Embeddings, folds: int, seed: int) -> dict[str, tuple[int, int]]:
    """Count rows saved and lost per class in float64, one row, class and mix at a time."""
    n, k = len(data), len(data.text)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    fold = np.empty(n, dtype=int)
    fold[order] = np.arange(n) % folds
    x, t, y = data.image.double().numpy(), data.text.double().numpy(), data.target.numpy()
    cosine = x @ t.T
    now = cosine.argmax(axis=1)

    def change(row: int, c: int, mix: tuple[float, float], without: set[int]) -> int:
        kept = ~np.isin(fold, list(without))
        means = np.stack([x[kept & (y == j)].mean(axis=0) for j in range(k)])
        mean = means.mean(axis=0)
        text = t[c] + mix[0] * (means[c] - mean + mix[1] * mean)
        logits = cosine[row].copy()
        logits[c] = x[row] @ (text / np.linalg.norm(text))
        return int(logits.argmax() == y[row]) - int(now[row] == y[row])

    found = {}
    for c in range(k):
        saved = lost = 0
        for f in range(folds):
            gains = [
                sum(change(i, c, mix, {f, fold[i]}) for i in range(n) if fold[i] != f)
                for mix in MIXES
            ]
            if max(gains) > 0:
                best = MIXES[int(np.argmax(gains))]
                changed = [change(i, c, best, {f}) for i in range(n) if fold[i] == f]
                saved, lost = saved + changed.count(1), lost + changed.count(-1)
        found[data.class_names[c]] = (saved, lost)
    return found


def test_better_texts_against_brute_force() -> None:
    data = planted(60)
    found = vilu.prompt_gains(data, folds=3, seed=5)
    assert {row.name: (row.saved, row.lost) for row in found.rows} == brute_gains(data, 3, 5)
    assert any(row.lost for row in found.rows) or any(row.saved for row in found.rows)


def test_the_planted_fault_is_found_and_no_other() -> None:
    data = planted()
    found = vilu.prompt_gains(data)
    first, *others = found.rows
    wrong = (data.image @ data.text.T).argmax(dim=1) != data.target
    assert first.name == "class 2"
    assert first.failures == int((wrong & (data.target == 2)).sum())
    assert first.saved >= 0.8 * first.failures
    assert first.gain == pytest.approx((first.saved - first.lost) / 400)
    assert 0 < first.low < first.gain < first.high
    assert max(row.gain for row in others) < 0.02
    assert (found.folds, found.n) == (FOLDS, 400)
    assert found.accuracy == pytest.approx(1 - float(wrong.double().mean()))
    assert "class 2" in str(found)


def test_labels_that_say_nothing_gain_nothing() -> None:
    """A fit on the measured rows would gain here, with 10 classes, random labels and 60 rows."""
    rng = np.random.default_rng(0)
    gains = []
    for seed in range(5):
        data = Embeddings(
            rng.normal(size=(60, 32)),
            rng.normal(size=(10, 32)),
            target=rng.integers(10, size=60),
            logit_scale=20.0,
        )
        gains += [row.gain for row in vilu.prompt_gains(data, seed=seed).rows]
    # 50 estimates near zero, each from a few rows among 60, have a standard deviation near 0.04.
    # Three standard errors of their mean are 3 * 0.04 / sqrt(50) = 0.017.
    assert abs(np.mean(gains)) < 0.02


pytestmark = pytest.mark.filterwarnings("ignore:.*not of unit norm")


def test_rows_without_label_and_classes_without_images() -> None:
    data = planted(100)
    target = data.target.clone()
    target[target == 4] = -1
    found = vilu.prompt_gains(Embeddings(data.image, data.text, target=target, logit_scale=50.0))
    assert found.n == int((target >= 0).sum())
    row = next(row for row in found.rows if row.name == "candidate 4")
    assert (row.n, row.failures, row.saved, row.lost) == (0, 0, 0, 0)


def test_gains_that_cannot_be_estimated_are_refused() -> None:
    data = toy_embeddings(n=10)
    with pytest.raises(UsageError, match="at least 3"):
        vilu.prompt_gains(data, folds=2)
    with pytest.raises(DataError, match="Got 0 such rows"):
        vilu.prompt_gains(Embeddings(data.image, data.text, target=None, logit_scale=20.0))
    with pytest.raises(DataError, match="one candidate"):
        vilu.prompt_gains(Embeddings(data.image, data.text[:1], target=None, logit_scale=20.0))


def test_the_interval_covers() -> None:
    """At least 95 % of the intervals must hold the difference, within three standard errors.

    The tables are drawn with known shares.
    """
    rng = np.random.default_rng(1)
    for shares, n in (((0.1, 0.02), 200), ((0.01, 0.01), 300), ((0.3, 0.25), 100)):
        tables = rng.multinomial(n, [*shares, 1 - sum(shares)], size=2000)
        ends = np.array([paired_interval(int(b), int(c), n) for b, c, _ in tables])
        inside = (ends[:, 0] <= shares[0] - shares[1]) & (shares[0] - shares[1] <= ends[:, 1])
        assert inside.mean() > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 2000)
