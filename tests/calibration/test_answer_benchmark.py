"""Test the measurement behind docs/answers.md, on small sets with a known outcome."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks import answer_guarantees, answer_summary, answer_tables, answers
from benchmarks.mixes import experts, fit_weights, judged_by_mixes, linear_probe

import vilu
from vilu.predictors.contract.held_out import JudgedAnswers

K, DIM = 4, 8


def rows(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images near the axis for their class, and the classes.

    ``TEXT`` exchanges the texts for two classes, so half the zero-shot answers are wrong.
    """
    rng = np.random.default_rng(seed)
    target = np.arange(n) % K
    image = np.eye(K, DIM)[target] + 0.1 * rng.normal(size=(n, DIM))
    return image / np.linalg.norm(image, axis=1, keepdims=True), target


TEXT = np.eye(K, DIM)[[1, 0, 2, 3]]


def test_mixes_follow_the_probe_where_it_is_right() -> None:
    image, target = rows(80, seed=0)
    train = vilu.Embeddings(image, TEXT, target=target)
    weights = fit_weights(train, target, seed=0)
    assert weights.cross_fitted
    assert weights.mix > 0.9  # half the zero-shot answers are wrong
    new_image, new_target = rows(40, seed=1)
    both = experts(linear_probe().fit(train), vilu.Embeddings(new_image, TEXT))
    for judged in judged_by_mixes(both, weights, new_target).values():
        assert judged.failure.mean() < 0.1
        assert ((judged.uncertainty >= 0) & (judged.uncertainty <= 1)).all()


def test_one_label_a_class_leaves_equal_weights() -> None:
    image, target = rows(K, seed=0)
    weights = fit_weights(vilu.Embeddings(image, TEXT, target=target), target, seed=0)
    assert not weights.cross_fitted
    assert (weights.mix, *weights.pool) == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_a_run_is_taken_up_again_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, target = rows(64, seed=0)  # eight labels per class in a half, so no network is trained
    np.savez(tmp_path / "cifar10_b32.npz", image=image, text=TEXT, target=target)
    cells = tmp_path / "cells.jsonl"
    answers.main([str(tmp_path), str(cells), "--divisions", "1"])
    written = cells.read_text()
    assert len(written.splitlines()) == len(answers.LABELS)
    capsys.readouterr()
    answers.main([str(tmp_path), str(cells), "--divisions", "1"])
    assert cells.read_text() == written
    assert not capsys.readouterr().out
    summary = tmp_path / "summary.json.xz"
    answer_summary.main([str(cells), str(summary), "--resamples", "20"])
    capsys.readouterr()
    answer_tables.main([str(summary)])
    shown = capsys.readouterr().out
    assert "Divisions: [0]; sets: 1." in shown
    assert "| all | adapted, ViLU+ | 100.0 [100.0, 100.0] |" in shown


def line_of(n_labels: int, division: int, failure: str, name: str = "cifar10") -> str:
    """Return a cell's line with four rows. All methods but "pool" have these failures."""
    rules = [{"coverage": 0.5, "risk": risk} for risk in (0.0, 0.2, None)]
    result = {"rank": [0, 1, 2, 3], "failure": failure, "certified": rules, "seconds": 2.0}
    methods = dict.fromkeys(answers.ANSWERS, result)
    methods["pool"] = {**result, "failure": "0000"}
    reason = "the labels are few: nothing was compared"
    cell = {
        "name": f"{name}_b32",
        "n_labels": n_labels,
        "division": division,
        "n": 8,
        "rows": [0, 2, 4, 6],
        "methods": methods,
        "notes": {
            "choice": ["adapted", "80 % interval"],
            "choice_images": ["zero_shot", reason],
            "cross_fitted": True,
        },
    }
    return json.dumps(cell)


def lines_of(name: str = "cifar10") -> list[str]:
    """Return the lines of two divisions. In a third division, label counts are missing."""
    lines = [line_of(1, 2, "1111", name)]
    for n_labels in answers.LABELS:
        lines.append(line_of(n_labels, 0, "0001", name))
        lines.append(line_of(n_labels, 1, "0100", name))
    return lines


def test_a_summary_keeps_what_its_cells_say(tmp_path: Path) -> None:
    file = tmp_path / "summary.json.xz"
    made = answer_summary.summarise(lines_of(), resamples=50)
    answer_summary.save(made, file)
    summary = answer_summary.load(file)
    assert summary.divisions == [0, 1]
    reading = summary.readings["cifar10", 16, "adapted"]
    assert reading.values["accuracy"].value == 0.75
    assert reading.values["0.05"].value == (0.75 + 0.25) / 2
    draws = reading.values["accuracy"].draws
    assert len(draws) == 50
    assert 0 < draws.min() < 0.75 < draws.max() <= 1  # rows 0, 2, 4 and 6 are resampled
    before = made.readings["cifar10", 16, "adapted"].values["accuracy"].draws
    assert draws == pytest.approx(before, abs=answer_summary.ROUNDING_STEP / 2)
    assert [rules.above for rules in reading.certified] == [[0, 0], [1, 1], [0, 0]]
    assert summary.readings["cifar10", 16, "pool"].values["accuracy"].value == 1
    assert summary.notes["cifar10", 16] == (2, 2, [0, 2], 2)


def test_another_set_changes_no_draw() -> None:
    alone = answer_summary.summarise(lines_of(), resamples=20)
    both = answer_summary.summarise(lines_of() + lines_of("caltech66"), resamples=20)
    draws = [made.readings["cifar10", 1, "mcm"].values["accuracy"].draws for made in (alone, both)]
    assert draws[0].tolist() == draws[1].tolist()


def test_every_set_has_its_own_best_baseline() -> None:
    lines = []
    for name, best in (("cifar10", "pool"), ("caltech66", "tip_adapter")):
        for line in lines_of(name):
            cell = json.loads(line)
            results = cell["methods"]
            results["pool"] = results["mcm"]
            results[best] = {**results["mcm"], "failure": "0000"}
            lines.append(json.dumps(cell))
    summary = answer_summary.summarise(lines, resamples=20)
    for n_labels in answers.LABELS:
        pair = ("adapted", answer_tables.BEST_BASELINE)
        lead = answer_tables.difference(summary.readings, summary.names, n_labels, pair)
        # adapted answers accept 0.75 and 0.25 in the two divisions, each best baseline accepts all
        assert lead.value == 0.5 - 1
        pool = answer_tables.difference(
            summary.readings, summary.names, n_labels, ("adapted", "pool")
        )
        assert pool.value == (0.5 - 1) / 2


def test_cells_with_other_methods_or_without_a_division_are_refused() -> None:
    cell = json.loads(line_of(1, 0, "0001"))
    del cell["methods"]["tip_adapter"]
    with pytest.raises(ValueError, match="has other methods"):
        answer_summary.summarise([json.dumps(cell)], resamples=1)
    with pytest.raises(ValueError, match="no division has a cell"):
        answer_summary.summarise([line_of(1, 0, "0001")], resamples=1)


def test_a_rule_is_broken_where_its_population_says_so() -> None:
    n = 2_000
    uncertainty = np.linspace(0, 1, n)
    right = JudgedAnswers(uncertainty, np.zeros(n, dtype=np.int64))
    all_right = answer_guarantees.calibrate_often(right, n_rules=5, seed=0)
    assert all_right.n_broken == 0
    assert all_right.coverage > 0.98
    # Every 15th answer is wrong, so every rule that accepts answers is broken.
    wrong = JudgedAnswers(uncertainty, (np.arange(n) % 15 == 14).astype(np.int64))
    sure = answer_guarantees.calibrate_often(wrong, n_rules=200, seed=0)
    assert sure.n_broken <= 20  # 5 % among 200, and three standard deviations
