"""Test which targets ``calibrate_predictor`` refuses before it computes anything, and captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vilu
from tests.builders.bench_fakes import make_store
from tests.conftest import toy_embeddings, toy_pairs
from vilu.artifacts.documents import write_json
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.embeddings.source import Batch
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors.persistence.files import RISK
from vilu.predictors.persistence.storage import load_predictor
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.predictors.plus.ood import SeesOutside


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(per_class=True), "leave method and per_class out"),
        (Target(method="crc"), "leave method and per_class out"),
        (Target(max_risk=0.1, method="selection", per_class=True), "selection takes a max_risk"),
        (Target(min_coverage=0.5, method="selection"), "selection takes a max_risk"),
        (
            Target(max_risk=0.1, method="anytime"),
            "one of ltt.* vilu.Selective has next_labels",
        ),
        (Target(max_risk=2.0), "max_risk must be in"),
        (Target(max_risk=0.1, label_sets="lac", max_miss=1.0), "max_miss must be in"),
        (Target(max_risk=0.1, max_miss=0.05), r"max_miss \(0.05\) is for label sets"),
    ],
)
def test_targets_are_checked_first(target: Target, message: str, tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        # There are too few rows for any calibration, so the refusal must come first.
        calibrate_predictor(tmp_path, toy_embeddings(n=5), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("at", ["Vocabulary.save", "save_calibration"])
def test_a_calibration_that_was_cut_off_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str
) -> None:
    """If a calibration is interrupted, the same command must make it again.

    So the record is written last. Otherwise the next run would find nothing to do.
    """

    def cut(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    store, folder = vilu.open_source(make_store(tmp_path / "store", 120, 0)), tmp_path / "predictor"
    vilu.MCM().save(folder)
    with monkeypatch.context() as patch:
        patch.setattr(f"vilu.calibration.procedure.{at}", cut)
        with pytest.raises(KeyboardInterrupt):
            calibrate_predictor(folder, store, Target(max_risk=0.9), overwrite=False)
    assert not (folder / RISK).exists()
    calibrate_predictor(folder, store, Target(max_risk=0.9), overwrite=False)
    assert Vocabulary.load(folder).names == store.class_names


def test_one_other_row_makes_another_calibration(tmp_path: Path) -> None:
    """If a single row changes, the calibration is another one.

    Rows outside a store are all compared, as labelled rows without a store are.
    """
    data, target = toy_embeddings(n=700), Target(max_risk=0.4)
    vilu.MCM().save(tmp_path)
    taken = data.take(np.arange(690))
    found = calibrate_predictor(tmp_path, taken, target)
    assert calibrate_predictor(tmp_path, taken, target, overwrite=False) == found
    for row in (1, 500):
        data.image[row] = -data.image[row]
        with pytest.raises(UsageError, match="is calibrated already, on 690 rows"):
            calibrate_predictor(tmp_path, taken, target, overwrite=False)
        data.image[row] = -data.image[row]


def test_captions(tmp_path: Path) -> None:
    pairs, new = toy_pairs(n=512, pool=32), toy_pairs(n=128, pool=32, seed=1)
    vilu.MCM().save(tmp_path)
    for target, message in (
        (Target(max_risk=0.4, per_class=True), "no thresholds per class"),
        (Target(max_risk=0.4, label_sets="aps"), "label sets need classes"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate_predictor(tmp_path, pairs, target)
    record = calibrate_predictor(tmp_path, pairs, Target(max_risk=0.4))
    assert (record.n, record.pool_size, record.n_candidates) == (512, 32, None)
    predictor = load_predictor(tmp_path)
    calibration = Calibration.load(tmp_path)
    outcomes = vilu.score(predictor, new, calibration=calibration)
    accepted = outcomes.uncertainty <= record.rule.threshold
    assert outcomes.decision == tuple(np.where(accepted, "accept", "review"))
    with pytest.raises(ProvenanceError, match="pools of 32, and these have pools of 16"):
        vilu.score(predictor, toy_pairs(n=128, pool=16), calibration=calibration)


def test_a_row_without_a_score_is_not_accepted_and_says_why(tmp_path: Path) -> None:
    data = toy_embeddings(n=300, k=2, ids_from=None)
    vilu.MCM().save(tmp_path)
    calibrate_predictor(tmp_path, data, Target(max_risk=0.5, label_sets="lac"))
    predictor = load_predictor(tmp_path)
    calibration = Calibration.load(tmp_path)
    broken = toy_embeddings(n=20, k=2, ids_from=None)
    broken.image[4] = np.nan
    holes = vilu.Embeddings(
        broken.image, broken.text, logit_scale=20.0, class_names=broken.class_names
    )
    outcomes = vilu.score(predictor, holes, calibration=calibration)
    assert (outcomes.decision[4], outcomes.decision_reason[4], outcomes.label_set[4]) == (
        "review",
        "nonfinite",
        None,
    )
    assert np.isnan(outcomes.failure_probability[4])
    assert {text for row, text in enumerate(outcomes.decision) if row != 4} <= {"accept", "review"}


def with_ood(n: int, seed: int) -> vilu.Embeddings:
    """Return toy images with a fifth out of distribution.

    The out-of-distribution images point anywhere, so their similarities are low.
    """
    data, rng = toy_embeddings(n, seed=seed, ids_from=1000 * seed), np.random.default_rng(seed)
    image, target = data.image.numpy().copy(), data.target.numpy().copy()
    ood = rng.random(n) < 0.2
    image[ood] = rng.normal(size=(ood.sum(), image.shape[1]))
    target[ood] = -2
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    return vilu.Embeddings(
        image,
        data.text,
        target=target,
        logit_scale=20.0,
        class_names=data.class_names,
        ids=data.ids,
    )


class Seeing(SeesOutside, vilu.MCM):
    """MCM that takes an image for out-of-distribution if no text is near."""

    name = "seeing"

    def outside_log_odds(self, batch: Batch) -> Tensor:
        return torch.where(batch.logits.amax(dim=1) < 7, torch.inf, -torch.inf).double()

    def outside_probability(self, batch: Batch) -> Tensor:
        return torch.sigmoid(self.outside_log_odds(batch))


def test_stated_shares_are_kept_and_ood_images_named(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    stated = Target(max_risk=0.15, outside_share=0.1)
    record = calibrate_predictor(tmp_path, with_ood(1500, 1), stated)
    assert record.rule is not None
    assert "for up to 10.0% of out-of-distribution images" in str(record.guarantee_text)
    assert Calibration.load(tmp_path) == record
    assert calibrate_predictor(tmp_path, with_ood(1500, 1), stated, overwrite=False) == record
    new = with_ood(400, 2)
    scores = vilu.score(load_predictor(tmp_path), new, calibration=record)
    assert set(scores.decision_reason or ()) == {None, "above_threshold"}
    seeing = Seeing()
    seeing.calibrator_ = load_predictor(tmp_path).calibrator_
    seen = vilu.score(seeing, new, calibration=record)
    named = np.array([reason == "outside" for reason in seen.decision_reason or ()])
    to_review = np.array([decision == "review" for decision in scores.decision or ()])
    assert seen.decision == scores.decision
    assert 0 < named.sum() < to_review.sum()
    assert np.array_equal(
        named, to_review & ((20 * new.image @ new.text.T).amax(dim=1) < 7).numpy()
    )
    edited = json.loads((tmp_path / "risk.json").read_text())
    edited["rule"]["outside_share"] = 0.6
    write_json(tmp_path / "risk.json", edited)
    with pytest.raises(DataError, match="does not follow from"):
        Calibration.load(tmp_path)
