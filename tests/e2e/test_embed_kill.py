"""SIGKILL at any moment of ``embed``:
the next run gives the bytes of an undisturbed one and does only what is missing.

Also a disk that is really full, and two drivers that really are two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders.store_fakes import NAMES, FakeBackbone, dataset, tree
from tests.command import PYTHONPATH
from tests.conftest import few
from vilu.errors import BusyError, DataError, StorageError
from vilu.store.embed import ExtraColumns, embed
from vilu.store.inspect import inspect
from vilu.store.reader import EmbeddingStore

KILLER = Path(__file__).with_name("embed_killer.py")
BAD = {4: b"", 17: b"<html>"}
SETTINGS = {"names": NAMES, "batch_size": 4, "part_size": 10, "max_error_rate": 0.5}
COLUMNS = {"columns": ExtraColumns(features=True, views=2, prompts=("the {}.",))}

# 35 images in parts of 10, 10, 10, 5 with 9, 9, 10, 5 good ones, in 3, 3, 3, 2 batches. Syncs come
# in pairs (file, then its folder): run.json 0, texts 2, classes.json 4, then 8 per part (vectors,
# metadata, errors, receipt), manifest 38. With columns: texts 2, four columns 4, classes.json 12,
# then 12 per part (features and views before the receipt).
POINTS = {
    "decode-0": 0,
    "decode-22": None,  # decoding runs ahead of the parts, so how many are finished is open
    "encode-0": 0,
    "encode-4": 1,
    "encode-10": 3,
    "sync-0": 0,  # run.json not there yet
    "sync-1": 0,
    "sync-2": 0,  # texts half-written
    "sync-5": 0,  # classes.json there, no part
    "sync-6": 0,  # vectors of part 0 written, not renamed
    "sync-15": 1,  # vectors of part 1 renamed ... (part 0 is 6-13)
    "sync-17": 1,  # ... its metadata renamed
    "sync-20": 1,  # ... its receipt written, not renamed
    "sync-21": 2,  # ... its receipt renamed
    "sync-38": 4,  # all parts there, not sealed
    "encode-7+columns": 0,  # views of the last batch of part 0
    "sync-6+columns": 0,  # second column of the classes written, not renamed
    "sync-20+columns": 0,  # features of part 0 written, not renamed
    "sync-35+columns": 1,  # views of part 1 renamed, its receipt not written
    "sync-37+columns": 2,  # ... its receipt renamed
}
GOOD = [9, 9, 10, 5]


IN_EVERY_RUN = (
    "decode-22",
    "encode-4",
    "sync-0",
    "sync-6",
    "sync-21",
    "sync-38",
    "encode-7+columns",
    "sync-35+columns",
)
"""The others are in `make test-slow`."""

HALF_WRITTEN = {
    "sync-0",
    "sync-2",
    "sync-6",
    "sync-20",
    "sync-38",
    "sync-6+columns",
    "sync-20+columns",
}


@pytest.fixture(scope="module")
def killed(request, tmp_path_factory):
    wanted = [
        item.callspec.params["point"]
        for item in request.session.items
        if "killed" in item.fixturenames
    ]
    root = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    subprocess.run(
        [sys.executable, KILLER, root, *wanted], check=True, env=environment, timeout=120
    )
    half_written = {path.relative_to(root).parts[0] for path in root.rglob("*.tmp")}
    assert half_written - {"decode-22"} == HALF_WRITTEN & set(
        wanted
    )  # a decoding thread may die while a part is being written
    return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trees = {}
    for name, columns in (("plain", {}), ("columns", COLUMNS)):
        root = tmp_path_factory.mktemp("undisturbed") / name
        embed(dataset(35, bad=BAD), FakeBackbone(), root, **SETTINGS, **columns)
        trees[name] = tree(root)
    return trees


@pytest.mark.parametrize(
    "point", few(sorted(POINTS, key=lambda point: point not in IN_EVERY_RUN), len(IN_EVERY_RUN))
)
def test_a_kill_costs_the_part_under_way_and_no_byte(killed, undisturbed, point):
    root, columns = killed / point, COLUMNS if point.endswith("+columns") else {}
    finished = len(list(root.glob("receipts/*.json")))
    assert finished == (finished if POINTS[point] is None else POINTS[point])
    if (root / "run.json").exists():
        report = inspect(root, deep=True)
        assert (report.sealed, report.parts_done) == (False, finished)
    with pytest.raises(DataError):
        EmbeddingStore(root)
    backbone = FakeBackbone()
    store = embed(dataset(35, bad=BAD), backbone, root, **SETTINGS, **columns)
    assert backbone.n_images == sum(GOOD[finished:]) * (3 if columns else 1)
    assert tree(root) == undisturbed["columns" if columns else "plain"]
    assert (len(store), inspect(root, deep=True).problems) == (33, [])
    assert not list(root.rglob("*.tmp"))


LOCKER = """
import sys, time
from vilu.store.parts import StoreLedger
from pathlib import Path
with StoreLedger.lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_driver_lets_go_of_the_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, tmp_path / "s"], stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        started = time.monotonic()
        with pytest.raises(BusyError):
            embed(dataset(5), FakeBackbone(), tmp_path / "s", names=NAMES)
        assert time.monotonic() - started < 5  # at once, not after waiting
        other.kill()
    assert len(embed(dataset(5), FakeBackbone(), tmp_path / "s", names=NAMES)) == 5


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or subprocess.run(mount, check=False).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_full(small_disk, monkeypatch):
    """Wide rows fill 256 KiB after some parts; the check beforehand is told that there is room."""
    data, backbone = dataset(64), FakeBackbone(dim=2048)
    settings = {"names": NAMES, "batch_size": 8, "part_size": 8, "templates": ("{}",)}
    with pytest.raises(StorageError, match="64 embeddings need"):
        embed(data, backbone, small_disk / "s", **settings)
    assert backbone.n_images == 0
    monkeypatch.setattr("vilu.store.embed.require_disk_space", lambda *_: None)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        embed(data, backbone, small_disk / "s", **settings)
    assert caught.value.exit_code == 7
    assert not list(small_disk.rglob("*.tmp"))
    report = inspect(small_disk / "s", deep=True)
    assert 0 < report.parts_done < 8
    assert (report.sealed, report.problems) == (False, [])
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    rest = FakeBackbone(dim=2048)
    assert len(embed(data, rest, small_disk / "s", **settings)) == 64
    assert rest.n_images == 64 - 8 * report.parts_done
