"""Test a predictor with its calibration, as one object and as the folder that the commands use."""

from __future__ import annotations

import copy
import csv
import dataclasses
import gc
import inspect
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.command import run
from tests.conftest import few, toy_embeddings
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.split import SplitParts
from vilu.errors import (
    DataError,
    InfeasibleError,
    NotFittedError,
    ProvenanceError,
    StorageError,
    UsageError,
    ViLUError,
)
from vilu.predictors.persistence.hub import push
from vilu.predictors.persistence.onnx import export_onnx
from vilu.predictors.persistence.storage import load_predictor
from vilu.store.reader import EmbeddingStore
from vilu.triage.ask import fingerprint_of


@pytest.fixture(scope="module")
def parts() -> SplitParts[EmbeddingSource]:
    return toy_embeddings(1500, seed=4).split(fit=0.4, calibration=0.4, test=0.2)


def fitted(train: EmbeddingSource, answer: str = "adapted") -> vilu.Selective:
    return vilu.Selective(vilu.PREDICTORS["linear_probe"](), answer=answer).fit(train)


def nameless(part: EmbeddingSource) -> vilu.Embeddings:
    """Return the rows from a part, without class names."""
    image = part.image_rows(torch.arange(len(part)))
    return vilu.Embeddings(image=image, text=part.text, target=part.target, logit_scale=20.0)


def test_the_accepted_answers_are_those_of_the_command(tmp_path: Path, parts: tuple) -> None:
    train, calibration, test = parts
    model = fitted(train).calibrate(calibration, max_risk=0.2)
    predictor = fitted(train).predictor
    predictor.save(tmp_path / "p")
    by_hand = vilu.calibrate_predictor(tmp_path / "p", calibration, vilu.Target(max_risk=0.2))
    assert model.calibration.rule == by_hand.rule
    expected = vilu.score(load_predictor(tmp_path / "p"), test, calibration=by_hand)
    outcomes = model.predict(test)
    assert outcomes.decision == expected.decision
    assert np.array_equal(outcomes.failure_probability, expected.failure_probability)
    assert outcomes.answer == "adapted"


def test_saved_and_loaded_it_decides_the_same(tmp_path: Path, parts: tuple) -> None:
    train, calibration, test = parts
    model = fitted(train).calibrate(calibration, max_risk=0.2)
    model.save(tmp_path / "model")
    again = vilu.Selective.load(tmp_path / "model")
    assert again.predict(test).decision == model.predict(test).decision
    assert again.calibration == model.calibration
    again.save(tmp_path / "copy")
    for name in ("predictor.json", "weights.safetensors", "risk.json", "calibration.parquet"):
        first, second = (tmp_path / folder / name for folder in ("model", "copy"))
        assert first.read_bytes() == second.read_bytes(), name


def test_the_command_line_takes_the_folder(tmp_path: Path, parts: tuple) -> None:
    train, calibration, _ = parts
    fitted(train).calibrate(calibration, max_risk=0.2).save(tmp_path / "model")
    assert "calibrated" in run("inspect", tmp_path / "model").stdout


def test_a_part_of_a_store_is_enough_for_a_guard(tmp_path: Path) -> None:
    data = toy_embeddings(900, seed=6)
    np.savez(
        tmp_path / "a.npz",
        image=data.image,
        text=data.text,
        target=data.target,
        class_names=list(data.class_names),
    )
    store = vilu.import_arrays(tmp_path / "a.npz", tmp_path / "store", logit_scale=20, logit_bias=0)
    parts = store.split(fit=0.5, calibration=0.5)
    fitted(parts.fit).calibrate(parts.calibration, max_risk=0.3).save(tmp_path / "model")
    guard = vilu.Guard(tmp_path / "model", vectors_only=True)
    answers, _ = guard.answer({guard.arrays[0]: data.image[:3]}, ["a", "b", "c"])
    assert {answer.label for answer in answers} <= set(store.class_names)
    assert {answer.decision for answer in answers} <= {"accept", "review"}


def test_looks_at_the_same_rows_are_counted(tmp_path: Path, parts: tuple) -> None:
    train, calibration, _ = parts
    model = fitted(train)
    for risk in (0.3, 0.25, 0.2):
        model.calibrate(calibration, max_risk=risk)
    assert model.calibration.looks == 3
    model.save(tmp_path / "model")
    again = vilu.Selective.load(tmp_path / "model").calibrate(calibration, max_risk=0.22)
    assert again.calibration.looks == 4


def unpickled(model: vilu.Selective) -> vilu.Selective:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", few([unpickled, copy.copy, copy.deepcopy], 1))
def test_a_copy_has_a_calibration_of_its_own(
    copied: Callable[[vilu.Selective], vilu.Selective], tmp_path: Path, parts: tuple
) -> None:
    train, calibration, _ = parts
    model = fitted(train).calibrate(calibration, max_risk=0.3)
    expected = model.calibration
    second = copied(model).calibrate(calibration, max_risk=0.2)
    assert second.calibration.looks == 2
    model.save(tmp_path / "model")
    assert vilu.load(tmp_path / "model").calibration == expected
    uncertainty = model.predict(calibration).uncertainty
    copied(model).fit(calibration)
    assert (model.predict(calibration).uncertainty == uncertainty).all()
    third = copied(model)
    del model
    gc.collect()
    third.save(tmp_path / "third")
    assert vilu.load(tmp_path / "third").calibration == expected


def test_a_copy_knows_of_looks_that_gave_no_rule(parts: tuple) -> None:
    train, calibration, _ = parts
    model = fitted(train)
    with pytest.raises(InfeasibleError):
        model.calibrate(calibration, max_risk=0.001)
    second = copy.deepcopy(model).calibrate(calibration, max_risk=0.3)
    assert second.calibration.looks == 2


def test_a_model_without_its_folder_is_not_saved(tmp_path: Path, parts: tuple) -> None:
    train, calibration, _ = parts
    model = fitted(train).calibrate(calibration, max_risk=0.3)
    shutil.rmtree(model.folder)
    with pytest.raises(StorageError, match="holds no calibration any more"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_fork_leaves_the_folder_to_its_parent(
    parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process id stands for a forked child, in which the object is collected."""
    model = vilu.Selective(vilu.MCM()).calibrate(parts[1], max_risk=0.5)
    folder = model.folder
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 0)
        del model
        gc.collect()
    assert (folder / "risk.json").is_file()
    shutil.rmtree(folder)


def test_a_new_fit_drops_the_calibration(parts: tuple) -> None:
    train, calibration, test = parts
    model = fitted(train).calibrate(calibration, max_risk=0.2)
    model.fit(train)
    assert "not calibrated" in repr(model)
    with pytest.raises(UsageError, match="call calibrate on labelled rows"):
        model.predict(test)


def test_the_chosen_answers_are_judged_after_a_look_at_its_folder(parts: tuple) -> None:
    model = vilu.Selective(vilu.PREDICTORS["linear_probe"]()).fit(parts[0])
    assert model.folder.is_dir()
    model.calibrate(parts[1], max_risk=0.3)
    assert model.choice is not None
    assert model.predictor.answer == model.choice.answer == "adapted"


def test_a_fitted_predictor_is_kept(parts: tuple) -> None:
    train, calibration, _ = parts
    predictor = vilu.PREDICTORS["linear_probe"]().fit(train)
    model = vilu.Selective(predictor).calibrate(calibration, max_risk=0.3)
    assert predictor.calibrator_ is None  # the caller's predictor stays unchanged
    unfitted = vilu.PREDICTORS["linear_probe"]()
    vilu.Selective(unfitted).fit(train)
    assert unfitted.space_ is None
    assert model.calibration.rows.answer == "zero_shot"
    assert "with confidence" in repr(model)


def test_what_is_missing_is_said(tmp_path: Path, parts: tuple) -> None:
    train, calibration, _ = parts
    unfitted = vilu.Selective(vilu.PREDICTORS["linear_probe"]())
    with pytest.raises(NotFittedError, match="Call fit first"):
        unfitted.calibrate(calibration, max_risk=0.1)
    with pytest.raises(UsageError, match="takes a target, or max_risk"):
        fitted(train).calibrate(calibration)
    with pytest.raises(UsageError, match="mcm has no posterior"):
        vilu.Selective(vilu.MCM(), answer="adapted")
    with pytest.raises(UsageError, match="not calibrated"):
        fitted(train).save(tmp_path / "model")
    with pytest.raises(InfeasibleError, match="cannot be guaranteed"):
        fitted(train).calibrate(calibration.take(range(20)), max_risk=0.01)
    with pytest.raises(DataError, match="were used to fit"):
        fitted(train).calibrate(train, max_risk=0.2)


def test_a_folder_is_loaded_as_what_it_is(tmp_path: Path, parts: tuple) -> None:
    train, calibration, test = parts
    model = fitted(train)
    model.predictor.save(tmp_path / "p")
    assert type(vilu.load(tmp_path / "p")) is vilu.PREDICTORS["linear_probe"]
    vilu.calibrate_predictor(tmp_path / "p", calibration, vilu.Target(max_risk=0.2))
    loaded = vilu.load(tmp_path / "p")
    assert isinstance(loaded, vilu.Selective)
    expected = model.calibrate(calibration, max_risk=0.2).predict(test)
    assert loaded.predict(test).decision == expected.decision
    model.save(tmp_path / "model")
    first, second = (sorted((tmp_path / name).glob("[!.]*")) for name in ("p", "model"))
    assert [path.name for path in first] == [path.name for path in second]
    for path, other in zip(first, second, strict=True):
        assert path.read_bytes() == other.read_bytes(), path.name


def test_every_field_of_a_target_is_an_argument(parts: tuple) -> None:
    train, calibration, _ = parts
    model = fitted(train)
    fields = {field.name for field in dataclasses.fields(vilu.Target)}
    assert fields <= inspect.signature(model.calibrate).parameters.keys()
    for method in ("ltt", "crc", "selection"):
        model.calibrate(calibration, max_risk=0.2, method=method)
        assert model.calibration.rule.method == method
    model.calibrate(calibration, label_sets="lac", max_miss=0.2)
    assert model.calibration.label_sets.max_miss == 0.2
    with pytest.raises(UsageError, match="one of the two"):
        model.calibrate(calibration, vilu.Target(max_risk=0.2), confidence=0.9)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """Return a store without labels. Each id holds the row's right class."""
    folder = tmp_path_factory.mktemp("unlabelled")
    rows = toy_embeddings(1200, k=3, seed=5)
    np.savez(
        folder / "rows.npz",
        image=rows.image.numpy(),
        text=rows.text.numpy(),
        ids=np.array([f"{row} {int(label)}" for row, label in enumerate(rows.target)]),
        class_names=np.array(rows.class_names),
    )
    return vilu.import_arrays(
        folder / "rows.npz", folder / "store", logit_scale=20.0, logit_bias=0.0
    )


def fill_in(path: Path) -> None:
    """Write the right class into every row in a label table."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            label = row["path"].split()[1]
            writer.writerow(row | {"label": f"class {label}"})


def label_until_calibrated(
    model: vilu.Selective, store: EmbeddingStore, target: vilu.Target, folder: Path
) -> list[Path]:
    """Fill in the labels that a model asks for, until its target is met. Return their files."""
    files: list[Path] = []
    while model.calibration is None:
        file = folder / f"{len(files)}.csv"
        model.next_labels(store, file, n=60, max_risk=target.max_risk, labels=files)
        files.append(file)
        with pytest.raises(DataError, match="of the labels that were asked for are missing"):
            model.calibrate(store, target, labels=files)
        fill_in(file)
        with suppress(InfeasibleError):  # not shown yet, so more labels are asked for
            model.calibrate(store, target, labels=files)
    return files


def test_labels_that_it_asks_for_one_after_another_make_its_guarantee(
    tmp_path: Path, store: EmbeddingStore
) -> None:
    model = fitted(toy_embeddings(600, k=3, seed=6, ids_from=10_000))
    command = tmp_path / "p"
    model.predictor.save(command)
    target = vilu.Target(max_risk=0.2, method="anytime")
    files = label_until_calibrated(model, store, target, tmp_path)
    assert model.calibration is not None
    by_command = ("calibrate", command, store.path, "--method", "anytime", "--max-risk", 0.2)
    run(*by_command, *(word for file in files for word in ("--labels", file)))
    assert model.calibration.rule == vilu.load(command).calibration.rule
    accepted = np.array(model.predict(store).decision) == "accept"
    assert accepted.mean() > 0.3
    model.save(tmp_path / "saved")
    assert vilu.load(tmp_path / "saved").calibration == model.calibration
    again = model.calibration
    assert model.calibrate(store, target, labels=files).calibration == again


def test_a_changed_label_takes_the_whole_calibration_back(
    tmp_path: Path, store: EmbeddingStore
) -> None:
    model = fitted(toy_embeddings(600, k=3, seed=6, ids_from=10_000))
    target = vilu.Target(max_risk=0.2, method="anytime")
    files = label_until_calibrated(model, store, target, tmp_path)
    assert model.calibration is not None
    assert model.vocabulary is not None
    for file in files:
        file.write_text(file.read_text().replace(",class 0", ",class 1"))
    with pytest.raises(ViLUError):
        model.calibrate(store, target, labels=files)
    assert (model.calibration, model.vocabulary) == (None, None)
    assert model.predictor.calibrator_ == load_predictor(model.folder).calibrator_


def test_predictors_that_differ_have_shares_of_their_own() -> None:
    """If predictors have no weights, their method and parameters must tell them apart."""
    predictors = [vilu.MCM(), vilu.PREDICTORS["entropy"](), vilu.MCM(answer="given")]
    predictors += [vilu.PREDICTORS["gen"](gamma=gamma) for gamma in (0.1, 0.5)]
    names = {fingerprint_of(predictor) for predictor in predictors}
    assert len(names) == len(predictors)
    assert fingerprint_of(vilu.MCM()) == fingerprint_of(vilu.MCM())


def test_labels_one_after_another_need_a_store_and_a_risk_alone(
    tmp_path: Path, store: EmbeddingStore, parts: tuple
) -> None:
    model = fitted(toy_embeddings(600, k=3, seed=6, ids_from=10_000))
    with pytest.raises(UsageError, match="anytime takes the store"):
        model.calibrate(parts[1], max_risk=0.2, method="anytime")
    with pytest.raises(UsageError, match="allows no other target"):
        model.calibrate(store, max_risk=0.2, method="anytime", min_coverage=0.5)
    with pytest.raises(UsageError, match="Leave labels and seed out"):
        model.calibrate(store, max_risk=0.2, labels=["next.csv"])
    with pytest.raises(UsageError, match="Leave labels and seed out"):
        model.calibrate(store, max_risk=0.2, seed=1)
    with pytest.raises(UsageError, match="Leave dataset and split out"):
        model.calibrate(store, max_risk=0.2, method="anytime", split="val")
    unsure = vilu.Selective(vilu.PREDICTORS["max_logit"]())
    with pytest.raises(UsageError, match="max_logit has none"):
        unsure.next_labels(store, tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()
    with pytest.raises(UsageError, match="would be lost"):
        model.next_labels(store, tmp_path / "a.csv", labels=[tmp_path / "a.csv"])
    with pytest.raises(UsageError, match="has next_labels"):
        vilu.calibrate_predictor(
            model.folder, parts[1], vilu.Target(max_risk=0.2, method="anytime")
        )


def test_it_stands_in_place_of_its_folder(tmp_path: Path, parts: tuple) -> None:
    train, calibration, test = parts
    model = vilu.Selective(vilu.PREDICTORS["linear_probe"]()).fit(train)
    model.calibrate(calibration, max_risk=0.2)
    expected = model.predict(test)
    assert vilu.score(model, test).decision == expected.decision
    scores = vilu.score_parts(model, test, tmp_path / "scores")
    assert scores.outcomes().decision == expected.decision
    with pytest.raises(UsageError, match="decides by its own calibration"):
        vilu.score(model, test, calibration=model.calibration)
    monitor = vilu.Monitor.of_folder(model)
    assert monitor.risk == model.calibration.fingerprint
    push(model, str(tmp_path / "shelf"))
    assert vilu.load(tmp_path / "shelf").calibration == model.calibration
    assert model.calibration.guarantee_text in (tmp_path / "shelf" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("answer", few(["adapted", "zero_shot"], 1))
def test_its_score_is_exported(answer: str, tmp_path: Path, parts: tuple) -> None:
    pytest.importorskip("onnxscript")
    data = [nameless(part) for part in parts[:2]]
    model = vilu.Selective(vilu.ViLUPlus(), answer=answer).fit(data[0])
    model.calibrate(data[1], max_risk=0.3)
    assert export_onnx(model, tmp_path / "head.onnx") < 1e-4


@pytest.mark.slow
def test_a_model_without_a_name_is_exported(tmp_path: Path, parts: tuple) -> None:
    """No variable holds the model, so the export alone keeps its folder."""
    pytest.importorskip("onnxscript")
    model = vilu.Selective(vilu.MCM()).fit(parts[0]).calibrate(parts[1], max_risk=0.3)
    model.save(tmp_path / "model")
    difference = export_onnx(vilu.load(tmp_path / "model"), tmp_path / "head.onnx")
    assert difference < 1e-4


def test_a_guard_takes_it_or_says_what_is_missing(parts: tuple) -> None:
    train, calibration, test = parts
    model = fitted(train).calibrate(calibration, max_risk=0.2)
    guard = vilu.Guard(model, vectors_only=True)
    image = test.image_rows(test.usable_rows[:3])
    answers, _ = guard.answer({guard.arrays[0]: image}, ["a", "b", "c"])
    assert tuple(answer.decision for answer in answers) == model.predict(image).decision
    with pytest.raises(ProvenanceError, match="a model that is not named"):
        vilu.Guard(model)
    without_names = vilu.Selective(vilu.MCM()).calibrate(nameless(calibration), max_risk=0.5)
    with pytest.raises(DataError, match="have no names"):
        vilu.Guard(without_names, vectors_only=True)
    with pytest.raises(DataError, match="calibrated on captions, or not at all"):
        vilu.Guard(fitted(train), vectors_only=True)
