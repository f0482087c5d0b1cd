"""Every command that writes must give the same results with a newer version of vilu."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.builders.array_files import arrays, save
from tests.builders.bench_fakes import make_store
from tests.builders.photo_folders import write_photos
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.builders.versions import NEWER, OLDER, raise_version
from tests.command import command_line
from vilu.artifacts.documents import DIGEST_KEY, content_digest
from vilu.calibration.calibration import Calibration
from vilu.cli.demo import demo_key
from vilu.service.local_journals import LocalJournals
from vilu.store.embed import embed
from vilu.store.job import BackboneSpec

BENCHMARK = """
seeds = 1
resamples = 20
[data.one]
stores = { train = "bench-train", test = "bench-test" }
[settings.all]
kind = "labels"
[methods.mcm]
[methods.lvu.params]
epochs = 1
hidden = [4]
"""

RULE = ("--max-risk", 0.6, "--confidence", 0.8)

COMMANDS: tuple[tuple[object, ...], ...] = (
    ("embed", "known.csv", "--root", "photos", "-o", "photos-store", "--backbone", "fake"),
    ("import", "train.npz", "-o", "train"),
    ("import", "calibration.npz", "-o", "calibration"),
    ("import", "new.npz", "-o", "new"),
    ("fit", "train", "-o", "head", "--method", "vilu_plus"),
    ("calibrate", "head", "calibration", *RULE),
    ("score", "head", "new", "-o", "scores.parquet"),
    ("score", "head", "new", "-o", "scores"),
    ("evaluate", "scores.parquet", "-o", "results.json", "--resamples", 10),
    ("explain", "head", "new", "-n", 2, "-o", "why.json"),
    ("monitor", "head", "scores.parquet", "-o", "monitored.json"),
    ("monitor", "head", "scores.parquet", "--state", "state.parquet"),
    ("report", "scores.parquet", "--predictor", "head", "-o", "page.html"),
    ("export", "head", "-o", "head.onnx"),
    ("push", "head", "./shelf"),
    ("pull", "./shelf", "-o", "pulled"),
    ("pools", "pairs", "mcm", "--sizes", "4,8", "-o", "sizes.json", "--resamples", 10),
    ("benchmark", "study.toml", "--data", ".", "-o", "bench"),
    ("submit", "bench", "lvu", "-o", "handed-in"),
    ("render", "bench", "--document", "studies.md", "--submitted", "handed-in"),
    ("triage", "photos", "--classes", "names.txt", "-o", "out", "-n", 12),
    ("triage", "photos", "--classes", "names.txt", "-o", "out", "-n", 12, "--labels", "known.csv"),
    ("review", "out", "-o", "tasks.json", "--to", "label-studio"),
    ("labels", "known.csv", "-o", "answers.csv"),
    ("next", "train", "--predictor", "head", "-o", "next.csv", "-n", 4, "--overwrite"),
    ("audit-labels", "train", "-o", "wrong.csv"),
)
UNSAID = {".lock", "log.jsonl", "times.txt"}


@pytest.fixture
def newer() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def work(tmp_path: Path, newer: pytest.MonkeyPatch) -> Path:
    model = FakeBackbone()
    newer.setattr(BackboneSpec, "load", lambda self: model)
    truth = write_photos(tmp_path / "photos", 60)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    with (tmp_path / "known.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *list(truth.items())[:24]])
    negatives = np.linalg.qr(np.random.default_rng(5).standard_normal((6, 6)))[0]
    rows = arrays(220, negatives=negatives)
    by_row = {"image", "target", "ids"}
    for name, first, last in (("train", 0, 80), ("calibration", 80, 170), ("new", 170, 220)):
        part = {key: rows[key][first:last] if key in by_row else rows[key] for key in rows}
        save(tmp_path / f"{name}.npz", part)
    pairs = dataset(40, unlabelled=range(40))
    pairs.class_names = None
    pairs.captions = [f"picture number {number}" for number in range(40)]
    embed(pairs, model, tmp_path / "pairs", part_size=20)
    make_store(tmp_path / "bench-train", 60, 0)
    make_store(tmp_path / "bench-test", 30, 1_000)
    (tmp_path / "study.toml").write_text(BENCHMARK)
    return tmp_path


def do(*arguments: object, cwd: Path) -> int:
    done = command_line(*arguments, cwd=cwd)
    assert done.returncode in {0, 8}, (arguments, done.stderr)
    return done.returncode


def content_of(path: Path) -> object:
    """Return a file's content without vilu's version and without the times at which labels were
    requested.
    """
    content = re.sub(rb",\d{10}\n", b"\n", path.read_bytes())
    if path.suffix != ".json":
        return content.replace(NEWER.encode(), OLDER.encode())
    document = json.loads(content)
    if not isinstance(document, dict):
        return document
    return content_digest(document, "fingerprint", DIGEST_KEY)


def files_of(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): content_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNSAID
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_newer_version_goes_on_with_all_that_an_older_one_made(
    work: Path, newer: pytest.MonkeyPatch
) -> None:
    codes = [do(*arguments, cwd=work) for arguments in COMMANDS]
    before = files_of(work)
    raise_version(newer)
    assert [do(*arguments, cwd=work) for arguments in COMMANDS] == codes
    after = files_of(work)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_a_newer_version_makes_again_is_the_same(
    work: Path, newer: pytest.MonkeyPatch
) -> None:
    """If a newer version fits and calibrates again, the results from the older version must stay
    valid.
    """
    for arguments in COMMANDS[1:16]:
        do(*arguments, cwd=work)
    before = Calibration.load(work / "head").fingerprint
    LocalJournals(work / "served", {"first": work / "head"}).close()
    served = sorted(path.name for path in (work / "served").iterdir())
    raise_version(newer)
    do(*COMMANDS[4], "--overwrite", cwd=work)
    do(*COMMANDS[5], "--overwrite", cwd=work)
    again = Calibration.load(work / "head")
    assert (again.vilu, again.fingerprint) == (NEWER, before)
    for arguments in COMMANDS[6:16]:
        do(*arguments, cwd=work)
    LocalJournals(work / "served", {"first": work / "head"}).close()
    assert sorted(path.name for path in (work / "served").iterdir()) == served


def test_the_demo_finds_what_an_older_version_made(
    tmp_path: Path, newer: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos.parquet").write_bytes(b"photos")
    before = demo_key(tmp_path / "photos.parquet", 0)
    raise_version(newer)
    assert demo_key(tmp_path / "photos.parquet", 0) == before
    assert demo_key(tmp_path / "photos.parquet", 1) != before
