"""Test that a calibration counts each picture once, even if many files show it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.calibration.test_copies import joined, rows
from vilu.artifacts.documents import write_document
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.errors import DataError, InfeasibleError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.storage import load_predictor


def repeated(n: int, times: int, **columns: object) -> Outcomes:
    """Return outcomes for n pictures, all answered rightly. Each picture has several files."""
    uncertainty = np.repeat(np.linspace(0, 0.5, n), times)
    picture = np.repeat(np.arange(n), times)
    return Outcomes(uncertainty, np.zeros(n * times), picture=picture, **columns)


def test_forty_rows_ten_times_over_are_forty_rows() -> None:
    """Copies must not count: 60 rows without error show 5 %, and 40 rows do not, however often
    copied.
    """
    many = vilu.certify(repeated(40, 10), max_risk=0.05)
    once = vilu.certify(repeated(40, 1), max_risk=0.05)
    assert not many.feasible
    assert many.thresholds == once.thresholds
    assert many.thresholds[""].n_needed == 60


@pytest.mark.parametrize("method", ["ltt", "crc"])
def test_the_sentence_gives_files_and_pictures(method: str) -> None:
    selector = vilu.certify(repeated(400, 3), max_risk=0.1, method=method)
    assert selector.n == 400
    assert "1,200 files show 400 pictures" in str(selector)
    assert "files show" not in str(vilu.certify(repeated(400, 1), max_risk=0.1, method=method))


def test_a_coverage_counts_pictures() -> None:
    selector = vilu.certify(repeated(100, 5), min_coverage=0.5)
    assert selector.threshold == vilu.certify(repeated(100, 1), min_coverage=0.5).threshold


def test_stated_shares_count_pictures() -> None:
    columns = {"target": np.tile([0, 1], 200), "class_names": ["cat", "dog"]}
    shares = {"cat": 0.5, "dog": 0.5}
    once = vilu.certify(repeated(400, 1, **columns), max_risk=0.1, class_shares=shares)
    columns["target"] = np.repeat(columns["target"], 4)
    many = vilu.certify(repeated(400, 4, **columns), max_risk=0.1, class_shares=shares)
    assert many.thresholds == once.thresholds


def test_groups_count_pictures() -> None:
    groups = np.repeat(["day", "night"] * 100, 3).tolist()
    selector = vilu.certify(repeated(200, 3), max_risk=0.1, groups=groups)
    assert {name: one.n for name, one in selector.thresholds.items()} == {
        "day": 100,
        "night": 100,
    }


def test_selection_counts_pictures() -> None:
    outcomes = repeated(40, 10)
    assert vilu.certify(outcomes, max_risk=0.05, method="selection").n == 40
    assert "400 files show 40 pictures" in str(
        vilu.certify(outcomes, max_risk=0.05, method="selection")
    )
    with pytest.raises(InfeasibleError, match="with 10 calibration rows"):
        vilu.certify(repeated(10, 10), max_risk=0.05, method="selection")


def test_a_picture_with_contradictory_labels_is_wrong_once() -> None:
    failure = np.zeros(300)
    failure[3] = 1  # the first file of the second picture
    rows_of = Outcomes(np.repeat(np.arange(100) / 100, 3), failure, picture=np.arange(300) // 3)
    assert vilu.certify(rows_of, max_risk=0.5).n_wrong == 1
    failure[4:6] = 1  # now all files for the second picture are wrong
    rows_of = Outcomes(rows_of.uncertainty, failure, picture=rows_of.picture)
    assert vilu.certify(rows_of, max_risk=0.5).n_wrong == 1


def test_rows_whose_picture_is_not_known_are_pictures_of_their_own() -> None:
    outcomes = Outcomes(np.linspace(0, 0.5, 100), np.zeros(100), picture=np.full(100, -1))
    assert vilu.certify(outcomes, max_risk=0.05).n == 100


def files(n: int, times: int, noise: float = 0.0) -> vilu.Embeddings:
    """Return n pictures in several files each, equal or with noise in every coordinate."""
    pictures = joined(rows(n, seed=5))
    return joined(*(rows(n, seed=seed, copied=pictures, noise=noise) for seed in range(times)))


def test_a_saved_predictor_is_calibrated_on_pictures(tmp_path: Path) -> None:
    for name, times in (("once", 1), ("many", 4)):
        vilu.MCM().save(tmp_path / name)
        target = Target(max_risk=0.2, label_sets="lac")
        calibrate_predictor(tmp_path / name, files(200, times), target)
    once, many = Calibration.load(tmp_path / "once"), Calibration.load(tmp_path / "many")
    assert (many.n, many.rule.n) == (once.n, once.rule.n) == (200, 200)
    assert many.rule.thresholds == once.rule.thresholds
    assert many.label_sets == once.label_sets
    assert "800 files show 200 pictures" in many.guarantee_text
    calibrators = [load_predictor(tmp_path / name).calibrator_ for name in ("once", "many")]
    assert calibrators[0].n == calibrators[1].n == 200


def test_the_probability_of_failure_is_learned_from_pictures() -> None:
    once, many = (
        vilu.MCM().calibrate_probability(files(200, 1)),
        vilu.MCM().calibrate_probability(files(200, 4)),
    )
    assert many.calibrator_.n == once.calibrator_.n == 200
    assert many.calibrator_.n_failures == once.calibrator_.n_failures
    # Float32 products with more rows may be rounded in another way, by 2e-7 in a logit.
    log_odds = np.linspace(-5, 5, 11)
    expected = pytest.approx(once.calibrator_(log_odds), abs=1e-5)
    assert many.calibrator_(log_odds) == expected


def test_near_copies_are_said_and_certify_nothing_by_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vilu.MCM().save(tmp_path)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(InfeasibleError, match="there are 40 rows"):
            calibrate_predictor(tmp_path, files(40, 10, noise=0.003), Target(max_risk=0.05))
        record = calibrate_predictor(tmp_path, files(200, 2, noise=0.003), Target(max_risk=0.2))
    assert "400 pictures, 200 where near copies count once" in caplog.text
    assert "400 pictures, 200 where near copies count once" in record.guarantee_text
    # Reading a calibration verifies which rows count.
    assert Calibration.load(tmp_path) == record
    assert (len(record.rows), record.n, record.rule.n) == (400, 400, 200)


def test_a_record_that_leaves_out_other_rows_is_damaged(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    record = calibrate_predictor(tmp_path, files(200, 2, noise=0.003), Target(max_risk=0.2))
    for places in (record.near_copies[1:], (*record.near_copies, 4000)):
        write_document(tmp_path / "risk.json", record.model_copy(update={"near_copies": places}))
        with pytest.raises(DataError, match=r"does not follow from calibration\.parquet"):
            Calibration.load(tmp_path)


def test_captions_of_one_picture_count_once() -> None:
    """A picture with several captions must count once, although each caption is another question.

    Which caption counts must not depend on the answers.
    """
    picture = np.arange(600) // 5
    failure = (np.arange(600) % 5 == 4).astype(int)  # the last caption among five is always wrong
    outcomes = Outcomes(
        np.linspace(0, 1, 600), failure, picture=picture, provenance={"pool_size": 100}
    )
    selector = vilu.certify(outcomes, max_risk=0.05)
    assert (selector.n, selector.n_wrong) == (120, 0)


def test_what_is_missing_is_said_of_pictures(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    with pytest.raises(
        InfeasibleError, match=r"there are 40 rows.* The 400 files show 40 pictures"
    ):
        calibrate_predictor(tmp_path, files(40, 10), Target(max_risk=0.05))
