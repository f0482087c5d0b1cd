"""If SIGKILL ends ``embed`` at any moment, the next run must do only the missing work.

The store must have the same bytes as after an undisturbed run. Other tests use a full disk and two
drivers in two processes.
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

# The 35 images are in parts with 10, 10, 10 and 5 images. The parts have 9, 9, 10 and 5 good images
# in 3, 3, 3 and 2 batches. Syncs come in pairs (the file, then its folder). Without columns:
# run.json 0, texts 2, classes.json 4, then 8 per part (vectors, metadata, errors, receipt),
# manifest 38. With columns: texts 2, four columns 4, classes.json 12, then 12 per part (features
# and views before the receipt).
POINTS = {
    "decode-0": 0,
    "decode-22": None,  # decoding runs ahead, so the number of finished parts is open
    "encode-0": 0,
    "encode-4": 1,
    "encode-10": 3,
    "sync-0": 0,  # run.json is missing
    "sync-1": 0,
    "sync-2": 0,  # the texts are half-written
    "sync-5": 0,  # classes.json is there, no part is
    "sync-6": 0,  # the vectors in part 0 are written, not renamed
    "sync-15": 1,  # the vectors in part 1 are renamed ... (part 0 is 6-13)
    "sync-17": 1,  # ... its metadata is renamed
    "sync-20": 1,  # ... its receipt is written, not renamed
    "sync-21": 2,  # ... its receipt is renamed
    "sync-38": 4,  # all parts are there, not sealed
    "encode-7+columns": 0,  # views from the last batch in part 0
    "sync-6+columns": 0,  # the second class column is written, not renamed
    "sync-20+columns": 0,  # the features in part 0 are written, not renamed
    "sync-35+columns": 1,  # the views in part 1 are renamed, its receipt is not written
    "sync-37+columns": 2,  # ... its receipt is renamed
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
"""The moments that CI tests. `make test-slow` tests the others."""

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
        assert time.monotonic() - started < 5  # the refusal comes at once
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
    """If the disk is full, the finished parts must stay, and a run with more room must complete the
    store.

    Wide rows fill 256 KiB after some parts. The test replaces the check for free space, which would
    refuse the work.
    """
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
