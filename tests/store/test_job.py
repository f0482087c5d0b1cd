"""Parts one by one: the same bytes from every process, parts that kill their process, and
several processes on one store.
"""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import pickle
import signal
from dataclasses import asdict, dataclass, replace

import pyarrow.parquet as pq
import pytest
import torch

from tests.builders.store_fakes import NAMES, FakeBackbone, dataset, shards, tree
from vilu.datasets.base import POSITIONS_PER_SHARD
from vilu.datasets.images import DEFAULT_LIMITS
from vilu.embeddings.checks import VALID
from vilu.errors import BusyError, DataError, ProvenanceError, StorageError, UsageError
from vilu.progress import reporting
from vilu.store import embed as embed_module
from vilu.store.embed import begin_run, embed, encode_classes, plan_run
from vilu.store.executors.local import Worker, pack_job, unpack_receipt
from vilu.store.inspect import inspect
from vilu.store.job import MAX_ATTEMPTS, BackboneSpec, EmbedJob
from vilu.store.parts import StoreLedger

BAD = {2: b"", 15: b"<html>"}
LENGTHS = (3, 2, 5, 1, 4)


def job_of(data, root, backbone=None, **settings):
    """Return a job on a store that has begun, without a driver."""
    backbone = backbone or FakeBackbone()
    candidates = {} if data.captioned else {"names": NAMES, "templates": ("a photo of a {}.",)}
    inputs = {
        "names": (),
        "templates": (),
        "limits": asdict(DEFAULT_LIMITS),
        "part_size": 2,
        "dtype": "float16",
        "split": None,
    }
    run = plan_run(data, backbone.space, **inputs | candidates | settings)
    root.mkdir(exist_ok=True)
    run = begin_run(root, run, lambda: encode_classes(backbone, run))
    return EmbedJob(root, run, data, backbone, batch_size=4, workers=2)


def run(data, output, backbone=None, **settings):
    names = {} if data.captioned else {"names": NAMES}
    return embed(
        data,
        backbone or FakeBackbone(),
        output,
        **{"batch_size": 4, "part_size": 2} | names | settings,
    )


def marks(root):
    return {path.name: path.stat().st_size for path in (root / "attempts").iterdir()}


def leave_marks(root, part, n):
    (root / f"attempts/{part:05d}").write_bytes(b"x" * n)


@dataclass
class InTurn:
    """An executor that does all parts in this process, from the last to the first.

    Each part gets a job that was pickled and unpickled.
    """

    calls: int = 0

    def run(self, job, parts):
        for part in reversed(parts):
            self.calls += 1
            yield pickle.loads(pickle.dumps(job)).process(part)


@dataclass
class Rank:
    """An executor that does only its own share, as a rank does."""

    rank: int
    world: int

    def run(self, job, parts):
        return job.process_all([part for part in parts if part % self.world == self.rank])


@pytest.mark.parametrize("kind", ["images", "shards", "captions"])
def test_parts_one_by_one_have_the_bytes_of_a_whole_run(tmp_path, kind):
    data = (
        dataset(23, bad=BAD) if kind == "images" else shards(*LENGTHS, captions=kind == "captions")
    )
    run(data, tmp_path / "whole", max_error_rate=0.5)
    executor = InTurn()
    run(data, tmp_path / "parts", max_error_rate=0.5, executor=executor)
    assert executor.calls == (12 if kind == "images" else 3)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert marks(tmp_path / "parts") == marks(tmp_path / "whole") == {}


def test_a_part_that_is_there_is_not_computed_again(tmp_path):
    data, backbone = shards(*LENGTHS), FakeBackbone()
    job = job_of(data, tmp_path, backbone)
    first = job.process(1)
    done, reads = backbone.n_images, len(data.reads)
    assert job.process(1) == first
    assert list(job.process_all([1, 1])) == [first, first]
    assert (backbone.n_images, len(data.reads)) == (done, reads) == (6, 6)
    data.versions[3] += 1
    again = job.process(1)
    assert (backbone.n_images, again.source != first.source, again.files) == (12, True, first.files)
    with pytest.raises(IndexError):
        job.process(3)


def test_receipts_come_in_order_with_those_that_are_there(tmp_path):
    job = job_of(shards(*LENGTHS), tmp_path)
    job.process(1)
    assert [receipt.part for receipt in job.process_all([0, 1, 2])] == [0, 1, 2]
    assert [receipt.n_in for receipt in job.process_all([2, 0])] == [4, 5]


def test_a_model_by_name_is_loaded_once_and_must_be_the_right_one(tmp_path, monkeypatch):
    loaded = []

    def load(name, *, device, precision, models, full_decode):
        loaded.append((name, device, precision, models, full_decode))
        return FakeBackbone(weights=name)

    monkeypatch.setattr("vilu.store.job.load_backbone", load)
    spec = BackboneSpec("w0", "cpu")
    store = run(shards(*LENGTHS), tmp_path / "s", spec, executor=InTurn())
    assert loaded == [("w0", "cpu", "fp32", None, False)]
    assert store.space.weights == "w0"
    (tmp_path / "s/receipts/00001.json").unlink()
    job = replace(job_of(shards(*LENGTHS), tmp_path / "t"), backbone=BackboneSpec("w1"))
    with pytest.raises(
        ProvenanceError,
        match=r"weights: 'w0' \(.*run.json\) against 'w1' \(the model of this process\)",
    ):
        job.process(0)
    assert marks(tmp_path / "t") == {}


def test_a_job_leaves_the_threads_and_a_worker_has_its_share(tmp_path):
    before = torch.get_num_threads()
    job = job_of(shards(*LENGTHS), tmp_path)
    try:
        torch.set_num_threads(3)
        job.process(0)
        assert torch.get_num_threads() == 3
        unpack_receipt(Worker(pack_job(job, 2)).do_part(1))  # as in its own process
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Failing(FakeBackbone):
    def encode_images(self, pixels):
        raise RuntimeError("out of memory")


def test_an_exception_leaves_no_mark_and_no_receipt(tmp_path):
    job = job_of(shards(*LENGTHS), tmp_path, Failing())
    leave_marks(tmp_path, 1, 2)
    for part in (0, 1):
        with pytest.raises(RuntimeError, match="out of memory"):
            job.process(part)
    assert marks(tmp_path) == {}
    assert not list((tmp_path / "receipts").iterdir())


@pytest.fixture
def one_thread():
    """Let torch use one thread during a test, because a fork loses the other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_child(function):
    """Run ``function`` in a forked process, and return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.usefixtures("one_thread")
def test_a_part_that_kills_is_given_up_after_three_deaths(tmp_path, caplog):
    data = shards(*LENGTHS, deadly=2 * POSITIONS_PER_SHARD + 3)
    job = job_of(data, tmp_path)
    for deaths in range(MAX_ATTEMPTS):
        assert marks(tmp_path) == ({"00001": deaths} if deaths else {})
        assert in_child(lambda: job.process(1)) == -signal.SIGKILL
    with caplog.at_level(logging.WARNING, "vilu"):
        receipt = job.process(1)
    assert (receipt.n_in, receipt.n_ok, receipt.errors) == (6, 0, {"crash": 6})
    assert "part 1 was given up after 3 processes had died in it: its 6 images" in caplog.text
    assert data.reads == []  # no read after the listing
    assert marks(tmp_path) == {}
    errors = pq.read_table(tmp_path / "errors/errors_00001.parquet").to_pydict()
    assert errors["key"] == [f"02.tar#{k}" for k in range(5)] + ["03.tar#0"]
    assert (set(errors["stage"]), set(errors["kind"])) == ({"process"}, {"crash"})
    assert job.process(1) == receipt  # the part is not tried again
    store = run(data, tmp_path, max_error_rate=0.5)
    assert (len(store), store.manifest.errors) == (9, {"crash": 6})
    assert inspect(tmp_path, deep=True).problems == []


@pytest.mark.usefixtures("one_thread")
def test_a_part_whose_listing_kills_is_given_up_by_shard(tmp_path):
    data = shards(*LENGTHS, deadly_listing=2)
    job = job_of(data, tmp_path)
    leave_marks(tmp_path, 1, MAX_ATTEMPTS)
    assert in_child(lambda: job.process(1)) == -signal.SIGKILL
    receipt = job.process(1)
    assert (receipt.n_in, receipt.errors) == (2, {"bad_shard": 2})
    errors = pq.read_table(tmp_path / "errors/errors_00001.parquet").to_pydict()
    assert (errors["key"], errors["position"]) == (
        ["shard 2", "shard 3"],
        [2 * POSITIONS_PER_SHARD, 3 * POSITIONS_PER_SHARD],
    )
    with pytest.raises(DataError, match=r"2 of 5 shards .* is lost: shard 2 \(3 processes died"):
        run(data, tmp_path, max_error_rate=0.5)
    with pytest.warns(UserWarning, match="2 of 5 shards"):
        run(data, tmp_path, allow_bad_shards=True)
    assert inspect(tmp_path, deep=True).problems == []


def test_a_part_without_listing_is_given_up_by_shard_or_position(tmp_path, caplog):
    job = job_of(shards(*LENGTHS, unlistable=3), tmp_path / "shards")
    leave_marks(tmp_path / "shards", 1, MAX_ATTEMPTS)
    assert job.process(1).errors == {"bad_shard": 2}
    assert "part 1 cannot be listed either: RuntimeError: cannot list shard 3" in caplog.text
    data = dataset(5)
    job = job_of(data, tmp_path / "images")
    data.records = lambda start, stop: iter(())
    leave_marks(tmp_path / "images", 2, MAX_ATTEMPTS)
    receipt = job.process(2)
    assert (receipt.n_in, receipt.errors) == (1, {"crash": 1})
    assert pq.read_table(tmp_path / "images/errors/errors_00002.parquet")["key"].to_pylist() == [
        "image 4"
    ]


@pytest.mark.usefixtures("one_thread")
def test_a_death_is_not_laid_at_the_door_of_the_part_before(tmp_path):
    """If a process dies, the part before must not be blamed.

    Decoding runs ahead, so both parts have a mark. Then each part is tried alone.
    """
    job = job_of(shards(*LENGTHS, deadly=2 * POSITIONS_PER_SHARD), tmp_path)
    everything = [0, 1, 2]
    deaths = [in_child(lambda: list(job.process_all(everything))) for _ in range(MAX_ATTEMPTS)]
    assert deaths == [-signal.SIGKILL] * MAX_ATTEMPTS
    receipts = list(job.process_all(everything))
    assert [receipt.n_error for receipt in receipts] == [0, 6, 0]


def test_a_driver_that_is_alone_begins_anew(tmp_path):
    job = job_of(shards(*LENGTHS), tmp_path)
    leave_marks(tmp_path, 1, MAX_ATTEMPTS)
    assert len(run(job.dataset, tmp_path)) == 15
    assert marks(tmp_path) == {}


def test_a_store_is_overwritten_after_a_kill(tmp_path):
    data = shards(*LENGTHS, deadly=2 * POSITIONS_PER_SHARD)
    job = job_of(data, tmp_path)
    assert in_child(lambda: job.process(1)) == -signal.SIGKILL
    assert marks(tmp_path) == {"00001": 1}
    data.deadly = None
    assert len(run(data, tmp_path, overwrite=True)) == 15


def test_marks_that_cannot_be_made_are_an_error_of_the_store(tmp_path):
    job = job_of(shards(*LENGTHS), tmp_path)
    (tmp_path / "attempts").rmdir()
    (tmp_path / "attempts").write_bytes(b"")
    with pytest.raises(StorageError, match="attempts"):
        job.process(0)


def test_errors_of_the_model_are_not_laid_at_the_door_of_the_marks(tmp_path):
    class Exhausted(FakeBackbone):
        def encode_images(self, pixels):
            raise OSError(errno.ENOMEM, "no memory for the pixels")

    with pytest.raises(OSError, match="no memory for the pixels") as told:
        run(dataset(5), tmp_path, Exhausted())
    assert told.value.errno == errno.ENOMEM
    assert marks(tmp_path) == {}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_share_a_store(tmp_path, order, caplog):
    data = dataset(23, bad=BAD)
    run(data, tmp_path / "alone", max_error_rate=0.5)
    models = [FakeBackbone() for _ in order]
    caplog.set_level(logging.INFO, "vilu")
    for done, rank in enumerate(order):
        settings = {"executor": Rank(rank, 3), "shared": True, "max_error_rate": 0.5}
        store = run(data, tmp_path / "s", models[rank], **settings)
        assert (store is None) == (done < 2)
        if store is None:
            assert f"{12 - 4 * (done + 1)} parts are still missing" in caplog.messages[-1]
    assert sum(model.n_images for model in models) == 21
    assert all(model.n_images > 0 for model in models)
    assert models[order[1]].n_texts == 0  # the first one encoded the class texts
    assert tree(tmp_path / "s") == tree(tmp_path / "alone")


def test_ranks_at_work_hold_no_lock_and_lose_no_file(tmp_path):
    """A rank that joins, works and ends must not disturb a rank that is in the middle of a part."""
    data = dataset(8)

    class Slow(Rank):
        def run(self, job, parts):
            for receipt in super().run(job, parts):
                if receipt.part == 0:
                    assert run(data, tmp_path / "s", executor=Rank(1, 2), shared=True) is None
                yield receipt

    store = run(data, tmp_path / "s", executor=Slow(0, 2), shared=True)
    assert len(store) == 8
    assert (store.status == VALID).all()


def test_ranks_wait_for_the_lock_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "LOCK_WAIT_SECONDS", 0.1)
    with StoreLedger.lock_folder(tmp_path / "s"), pytest.raises(BusyError):
        run(dataset(5), tmp_path / "s", executor=Rank(0, 2), shared=True)


def test_ranks_give_up_what_killed_others_and_keep_marks(tmp_path):
    job = job_of(dataset(6), tmp_path)
    leave_marks(tmp_path, 0, 2)
    leave_marks(tmp_path, 1, MAX_ATTEMPTS)
    assert run(job.dataset, tmp_path, executor=Rank(1, 2), shared=True) is None
    assert marks(tmp_path) == {"00000": 2}
    assert json.loads((tmp_path / "receipts/00001.json").read_text())["errors"] == {"crash": 2}


def test_ranks_do_not_replace_a_store(tmp_path):
    with pytest.raises(UsageError, match="cannot replace"):
        run(dataset(5), tmp_path / "s", executor=Rank(0, 2), shared=True, overwrite=True)
    assert not (tmp_path / "s").exists()


def test_the_last_rank_keeps_the_budget(tmp_path):
    data = dataset(8, bad={0: b"", 7: b""})
    assert run(data, tmp_path, executor=Rank(0, 2), shared=True) is None
    with pytest.raises(DataError, match=r"2 of 8 images"):
        run(data, tmp_path, executor=Rank(1, 2), shared=True)


def test_an_executor_that_leaves_parts_out_seals_nothing(tmp_path):
    with pytest.raises(StorageError, match=r"receipts/00000.json is missing"):
        run(dataset(8), tmp_path, executor=Rank(1, 2))
    assert not (tmp_path / "manifest.json").exists()


def test_progress_of_an_executor_is_told_by_receipt(tmp_path):
    class Recorder:
        def __init__(self):
            self.steps = []

        def start(self, description, total, unit):
            return self

        def advance(self, steps, note=""):
            self.steps.append((steps, note))

        def finish(self, task):
            pass

    recorder = Recorder()
    with reporting(recorder):
        run(shards(*LENGTHS), tmp_path, executor=InTurn())
    assert recorder.steps == [(0, ""), (4, "0 errors"), (6, "0 errors"), (5, "0 errors")]
