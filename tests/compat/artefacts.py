"""Make one artefact per kind, and compute the numbers that each gives."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import vilu
from tests.builders.array_files import arrays, save
from tests.builders.bench_fakes import make_store
from tests.builders.photo_folders import write_photos
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.command import command_line
from vilu.calibration.likely import LikelyRight
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.service.local_journals import LocalJournals
from vilu.store.job import BackboneSpec
from vilu.triage.label_errors import LabelErrors
from vilu.triage.labels import LabelBook

DATA = Path(__file__).parent / "data"
ARCHIVE = DATA / "artefacts.zip"
NUMBERS = DATA / "numbers.json"

METHODS = ("mcm", "mcm_ts", "linear_probe", "class_gaussians", "stacking", "vilu", "vilu_plus")
SETTINGS: dict[str, dict[str, Any]] = {
    "stacking": {"members": ("mcm", "margin")},
    "vilu": {"epochs": 2, "hidden": (4,)},
    "vilu_plus": {"epochs": 2, "width": 4},
}
"""Parameters that keep the saved files small."""

STUDY = """
seeds = 1
resamples = 20
[data.one]
stores = { train = "study-train", test = "study-test" }
[settings.all]
kind = "labels"
[methods.mcm]
[methods.linear_probe]
"""

COMMANDS: tuple[tuple[object, ...], ...] = (
    ("import", "train.npz", "-o", "train"),
    ("import", "calibration.npz", "-o", "calibration"),
    ("import", "new.npz", "-o", "new"),
    ("fit", "train", "-o", "calibrated", "--method", "linear_probe"),
    ("calibrate", "calibrated", "calibration", "--max-risk", 0.6, "--confidence", 0.8),
    ("score", "calibrated", "new", "-o", "scores.parquet"),
    ("score", "calibrated", "new", "-o", "scores.csv"),
    ("score", "calibrated", "new", "-o", "scores"),
    ("evaluate", "scores.parquet", "-o", "results.json", "--resamples", 10),
    ("evaluate", "scores.parquet", "-o", "results.parquet", "--resamples", 10),
    ("explain", "calibrated", "new", "-n", 2, "-o", "why.json"),
    ("explain", "calibrated", "new", "--summary", "-o", "summary.json"),
    ("monitor", "calibrated", "scores.parquet", "-o", "monitored.json"),
    ("monitor", "calibrated", "scores.parquet", "--state", "state.parquet"),
    ("benchmark", "study.toml", "--data", ".", "-o", "study"),
    ("render", "study", "--keep", "study.parquet"),
    ("triage", "photos", "--classes", "names.txt", "-o", "triage", "-n", 12),
    ("triage", "photos", "--classes", "names.txt", "-o", "triage", "--labels", "known.csv"),
    ("triage", "moving", "--classes", "names.txt", "-o", "moved", "--move"),
    ("import", "bare.npz", "-o", "bare"),
    (
        *("next", "bare", "--predictor", "calibrated", "--for-guarantee", "-o", "draw.csv"),
        *("-n", 60, "--max-risk", 0.6),
    ),
    ("tabulate", "logits", "logits.npy", "--labels", "truth.npy", "-o", "answers.parquet"),
    ("fit", "answers.parquet", "-o", "of-answers", "--method", "answer_probe"),
)

KEPT = (
    "train",
    "calibration",
    "new",
    "captions",
    "predictors",
    "calibrated",
    "scores",
    "scores.csv",
    "scores.parquet",
    "results.json",
    "results.parquet",
    "why.json",
    "summary.json",
    "monitored.json",
    "state.parquet",
    "study",
    "study.parquet",
    "triage",
    "moved/moved.parquet",
    "draw.csv",
    "draw.draw.json",
    "errors.parquet",
    "answers.parquet",
    "of-answers",
    "served",
)

SHOWN = {".png", ".svg", ".html", ".jsonl"}
"""Files for people, which vilu never reads."""

LARGE = ("triage/embeddings/", "triage/predictor/vocabulary")
"""A store, and a vocabulary with 5,000 words. Small ones in both kinds are kept."""


def make(root: Path) -> None:
    """Write every artefact, in a new folder."""
    model = FakeBackbone()
    _write_inputs(root)
    pairs = dataset(24, unlabelled=range(24))
    pairs.class_names = None
    pairs.captions = [f"picture number {number}" for number in range(24)]
    vilu.embed(pairs, model, root / "captions", part_size=12)
    with patch.object(BackboneSpec, "load", lambda self: model):
        for command in COMMANDS:
            run(*command, cwd=root)
    train = vilu.EmbeddingStore(root / "train")
    for name in METHODS:
        predictor = vilu.PREDICTORS[name](**SETTINGS.get(name, {}))
        predictor.fit(train).save(root / "predictors" / name)
    _likely().save(root / "triage" / "predictor")
    _serve(root)
    errors = LabelErrors(["a.png"], ["cat"], ["dog"], np.array([0.1]), np.array([True]))
    errors.save(root / "errors.parquet")


def _likely() -> LikelyRight:
    """Return an estimate from 100 answers. The 80 most trusted answers are right."""
    uncertainty = np.linspace(0.01, 0.5, 100)
    failure = (np.arange(100) >= 80).astype(int)
    return LikelyRight.estimate(JudgedAnswers(uncertainty, failure), uncertainty, max_risk=0.05)


def _serve(root: Path) -> None:
    """Write a service's journals. The service answered ten rows, and got labels for five."""
    journals = LocalJournals(root / "served", {"first": root / "calibrated"})
    ids = [f"photo-{number}" for number in range(10)]
    answers = (np.arange(10) % len(NAMES)).tolist()
    uncertainty = np.linspace(0.05, 0.5, 10).tolist()
    journals.record(ids, {"first": (answers, uncertainty)})
    journals.label(dict.fromkeys(ids[:5], NAMES[0]))
    journals.switch("first")
    journals.close()


def _write_inputs(root: Path) -> None:
    truth = write_photos(root / "photos", 40)
    (root / "names.txt").write_text("\n".join(NAMES))
    (root / "study.toml").write_text(STUDY)
    with (root / "known.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *list(truth.items())[:16]])
    rows = arrays(620)
    by_row = {"image", "target", "ids"}
    parts = (("train", 0, 80), ("calibration", 80, 170), ("new", 170, 220), ("bare", 220, 620))
    for name, first, last in parts:
        part = {key: rows[key][first:last] if key in by_row else rows[key] for key in rows}
        if name == "bare":
            del part["target"]
        save(root / f"{name}.npz", part)
    write_photos(root / "moving", 12)
    logits = 8 * rows["image"] @ rows["text"].T
    np.save(root / "logits.npy", logits)
    hidden = logits + np.random.default_rng(2).gumbel(size=logits.shape)
    np.save(root / "truth.npy", hidden.argmax(axis=1))
    make_store(root / "study-train", 60, 0)
    make_store(root / "study-test", 30, 1_000)


def run(*arguments: object, cwd: Path) -> str:
    """Return a command's standard output. It must succeed, or end with a monitor's alarm."""
    done = command_line(*arguments, cwd=cwd)
    assert done.returncode in {0, 8}, (arguments, done.stderr)
    return done.stdout


def pack(root: Path) -> None:
    """Write the artefacts to the archive, without the shown files and the large ones."""
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in KEPT:
            path = root / name
            files = [path] if path.is_file() else sorted(path.rglob("*"))
            for file in files:
                if not file.is_file() or file.suffix in SHOWN or file.name == ".lock":
                    continue
                place = file.relative_to(root).as_posix()
                if not place.startswith(LARGE):
                    entry = zipfile.ZipInfo(place)
                    archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


def unpack(root: Path) -> Path:
    """Unpack the kept artefacts into a new folder, and return the folder."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(root)
    return root


def numbers(root: Path) -> dict[str, Any]:
    """Return the artefacts' numbers, as plain JSON."""
    new = vilu.EmbeddingStore(root / "new")
    found: dict[str, Any] = {
        "store": _of_source(new),
        "captions": _of_source(vilu.open_source(root / "captions", pools=vilu.Pools(8))),
    }
    for name in METHODS:
        predictor = vilu.load(root / "predictors" / name)
        found[f"predictor {name}"] = predictor.predict_uncertainty(new).tolist()
    calibrated = vilu.load(root / "calibrated")
    found["probability"] = calibrated.predict_failure_probability(new).tolist()
    for name in ("scores.parquet", "scores.csv", "triage/decisions.parquet"):
        found[name] = _of_outcomes(vilu.Outcomes.load(root / name))
    found["scores"] = _of_outcomes(vilu.ScoreFolder(root / "scores").outcomes())
    for name in ("results.json", "results.parquet"):
        rows = vilu.ResultTable.load(root / name).to_dicts()
        found[name] = [[row["metric"], row["value"]] for row in rows]
    found["monitor"] = _of_monitor(root)
    explained = json.loads((root / "why.json").read_text())["rows"]
    found["explanation"] = [[row["key"], row["answer"], row["uncertainty"]] for row in explained]
    found["labels"] = sorted(LabelBook.load(root / "triage" / "labels.parquet").labels.items())
    table = vilu.open_table(root / "answers.parquet")
    found["answers"] = vilu.load(root / "of-answers").predict_uncertainty(table).tolist()
    likely_right = LikelyRight.find(root / "triage" / "predictor")
    found["likely"] = None if likely_right is None else likely_right.threshold
    found["served"] = _of_journals(root)
    found["study"] = vilu.ResultTable.load(_results(root)).to_dicts()
    return found


def _results(root: Path) -> Path:
    (path,) = (root / "study" / "studies").glob("*/results.parquet")
    return path


def _of_source(source: vilu.EmbeddingSource) -> dict[str, Any]:
    every = torch.arange(len(source))
    rows = source.image_rows if source.pool_size is None else source.picture_rows
    return {
        "ids": list(source.ids),
        "target": source.target.tolist(),
        "status": np.asarray(source.status).tolist(),
        "image": rows(every).double().sum(dim=1).tolist(),
    }


def _of_outcomes(outcomes: vilu.Outcomes) -> dict[str, Any]:
    uncertainty = np.nan_to_num(outcomes.uncertainty, nan=-1.0)
    return {
        "uncertainty": uncertainty.tolist(),
        "failure": outcomes.failure.tolist(),
        "decision": list(outcomes.decision or ()),
    }


def _of_journals(root: Path) -> list[object]:
    """Return the journals' status, from a copy, because journals are opened for writing."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(root / "served", Path(folder) / "served")
        journals = LocalJournals(copy, {"first": root / "calibrated"})
        status = journals.statuses()["first"]
        journals.close()
    return [status.verdict, status.rows]


def _of_monitor(root: Path) -> list[object]:
    monitor = vilu.Monitor.of_folder(root / "calibrated").resume(root / "state.parquet")
    status = monitor.status
    return [status.verdict, status.rows, status.unscored]
