"""Processes on this machine: deaths, errors and signals, with a job that needs no images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.builders.interrupted_children import interrupted_children
from tests.command import PYTHONPATH
from tests.conftest import few
from tests.executors.fake_job import EmptyJob, FileJob, calls
from tests.executors.test_acceptance import wait_for_death
from vilu.errors import DataError, StorageError, UsageError
from vilu.store.executors import local, make_executor
from vilu.store.executors.local import threads_per_process
from vilu.store.job import MAX_ATTEMPTS


def done(job, parts, processes=2, max_deaths=local.MAX_DEATHS):
    executor = local.LocalExecutor(processes, max_deaths)
    return sorted(receipt.part for receipt in executor.run(job, parts))


def test_a_dead_workers_part_is_done_by_another_one(tmp_path):
    assert done(FileJob(tmp_path, kill={3: 1}), range(6)) == list(range(6))
    assert [len(calls(tmp_path, part)) for part in range(6)] == [1, 1, 1, 2, 1, 1]
    assert len({line.split()[0] for line in calls(tmp_path, 3)}) == 2
    threads = threads_per_process(2)
    assert {tuple(line.split()[1:]) for part in range(6) for line in calls(tmp_path, part)} == {
        (str(threads),) * 2
    }


@pytest.mark.slow
def test_a_worker_without_work_takes_over_from_a_dead_one(tmp_path):
    """If a worker dies, an idle worker must take over its part.

    Part 1 is done long before the process for part 0 dies.
    """
    assert done(FileJob(tmp_path, kill={0: 1}), [0, 1]) == [0, 1]


@pytest.mark.slow
def test_a_part_that_kills_without_end_is_given_up_and_the_others_stay(tmp_path):
    assert local.MAX_DEATHS > MAX_ATTEMPTS + 1  # the job sets the part aside earlier
    with pytest.raises(StorageError, match=r"2 times in part 2, last with signal SIGKILL"):
        done(FileJob(tmp_path, kill={2: 99}), range(4), processes=1, max_deaths=2)
    assert len(calls(tmp_path, 2)) == 2
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["0.txt", "1.txt"]


@pytest.mark.parametrize("error", few([DataError("a bad label"), KeyError("a bug")], 1))
def test_an_error_keeps_its_type(tmp_path, error):
    with pytest.raises(type(error), match=r"a b\w\w label|a bug") as caught:
        done(FileJob(tmp_path, fail={1: error}), range(3), processes=1)
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert ("process" in notes) == isinstance(error, KeyError)  # a bug has its traceback


@pytest.mark.slow
def test_an_error_that_cannot_travel_comes_as_text(tmp_path):
    with pytest.raises(UnicodeDecodeError):
        done(
            FileJob(tmp_path, fail={0: UnicodeDecodeError("utf-8", b"x", 0, 1, "odd")}),
            [0],
            processes=1,
        )
    with pytest.raises(RuntimeError, match="Stubborn: needs two"):
        done(FileJob(tmp_path, fail={0: "stubborn"}), [0], processes=1)


@pytest.mark.slow
def test_a_job_that_cannot_travel_is_refused(tmp_path):
    with pytest.raises(DataError, match="this job cannot travel"):
        done(FileJob(tmp_path, broken=True), range(2), processes=1)
    with pytest.raises(UsageError, match="cannot go to other processes"):
        done(FileJob(tmp_path, fail={0: lambda: None}), range(2))


def test_no_parts_need_no_process():
    assert done(EmptyJob(), []) == []


@pytest.mark.slow
def test_workers_are_stopped_when_the_driver_loses_interest(tmp_path):
    receipts = make_executor("local", 2).run(FileJob(tmp_path, slow=0.1), range(100))
    next(receipts)
    receipts.close()
    assert [
        child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())
    ] == []


@pytest.mark.slow
def test_ten_thousand_parts_need_little_memory():
    driver = psutil.Process()
    receipts = make_executor("local", 2).run(EmptyJob(), range(10_000))
    next(receipts)
    before, started, most = driver.memory_info().rss, time.perf_counter(), 0
    for n, _ in enumerate(receipts, start=1):
        if n % 500 == 0:
            most = max(most, driver.memory_info().rss)
    assert n == 9_999
    assert most - before < 50e6
    sys.stdout.write(
        f"{1e3 * (time.perf_counter() - started) / n:.2f} ms per part, "
        f"{(most - before) / 1e6:.1f} MB\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a single process there")
def test_ctrl_c_while_workers_start_reaches_the_driver_only(tmp_path, capfd, caplog):
    """Ctrl-C must not end a worker, from the worker's first moment to its last import.

    Each worker gets SIGINT every few milliseconds, and the run must go on as if nothing happened.
    """
    with interrupted_children() as interrupted:
        assert done(FileJob(tmp_path), range(4)) == list(range(4))
    assert len(interrupted) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert caplog.messages == []  # no worker has died


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (signal.SIGINT, signal.SIGTERM)),
        signal.SIGKILL,
    ],
)
def test_workers_end_with_their_driver(tmp_path, kind):
    """If the driver ends, its workers must end long before their part would."""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [
        sys.executable,
        "-m",
        "tests.executors.driver",
        "slowly",
        "local",
        tmp_path / "s",
        tmp_path,
    ]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as driver:
        end = time.monotonic() + 60
        while not (tmp_path / "pictures").exists():
            assert driver.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        driver.send_signal(kind)
        driver.wait(30)
    wait_for_death(tmp_path, 5)
    if kind == signal.SIGINT:
        assert list((tmp_path / "s").rglob("*.tmp")) == []
