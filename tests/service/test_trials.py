"""Trials of what a machine and its users do to a service and to commands, with their outcomes."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.builders.photo_folders import KINDS, photo
from tests.command import command_line
from tests.service.conftest import Running, hosted, served
from tests.service.test_bad_company import connected, monitored


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_reads_nothing_of_a_service(predictors: tuple[Path, Path]) -> None:
    before = os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory() as home:
            Path(home).chmod(0o755)
            with served(predictors[0], "--state", f"{home}/s") as running:
                running.post("/v1/answers", files={"a": photo(0, 0)})
            paths = [Path(home, "s"), *Path(home, "s").rglob("*")]
            assert "rows.sqlite" in {path.name for path in paths}
            for path in paths:
                words = ["ls" if path.is_dir() else "cat", path]
                done = subprocess.run(words, user=65534, capture_output=True, check=False)
                assert b"Permission denied" in done.stderr
    finally:
        os.umask(before)


def test_a_service_that_is_stopped_for_a_while_goes_on(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """SIGSTOP and SIGCONT: all requests are answered, and each row counts once."""
    statuses: list[int] = []

    def ask(running: Running, number: int) -> None:
        image = photo(number % KINDS, number)
        statuses.append(running.post("/v1/answers", files={"a": image}).status_code)

    with served(predictors[0], "--state", tmp_path / "s") as running:
        assert running.process is not None
        running.process.send_signal(signal.SIGSTOP)
        threads = [threading.Thread(target=ask, args=(running, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        assert statuses == []
        running.process.send_signal(signal.SIGCONT)
        for thread in threads:
            thread.join(30)
        assert statuses == [200] * 8
        assert monitored(running)["rows"] == 8


def test_a_clock_that_is_set_back_under_a_service(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are known by their numbers; their times are as the clock said."""
    clock = iter(range(2_000_000_000, 0, -86_400))
    with hosted(predictors[0], tmp_path / "s") as running:
        with monkeypatch.context() as patch:
            patch.setattr("vilu.service.rows.time.time", lambda: float(next(clock)))
            for number in range(5):
                image = photo(number, number)
                assert running.post("/v1/answers", files={"a": image}).status_code == 200
        before = monitored(running)
    assert before["rows"] == 5
    with hosted(predictors[0], tmp_path / "s") as running:
        assert monitored(running) == before
    assert not list((tmp_path / "s").rglob("*.aside-*"))
    (file,) = (tmp_path / "s").glob("*/rows.sqlite")
    with closing(sqlite3.connect(file)) as table:
        times = [when for (when,) in table.execute("SELECT time FROM rows ORDER BY n")]
    assert times == sorted(times, reverse=True)


@contextmanager
def few_descriptors(n: int) -> Iterator[None]:
    """A block in which processes are started that may open n files each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_do_not_take_the_last_descriptor(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        with few_descriptors(128):
            state = ("--state", tmp_path / "s")
            running = stack.enter_context(served(predictors[0], *state, ready=False))
        running.wait_ready()
        idle = [connected(running.url) for _ in range(200)]
        time.sleep(1)
        for connection in idle:
            connection.close()
        running.wait_ready()
        assert running.post("/v1/answers", files={"a": photo(0, 0)}).status_code == 200


def test_a_plugin_that_raises_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_of_nobody.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = command_line("--plugin", "plugin_of_nobody", "list", "method")
    assert done.returncode == 2
    words = "the plugin 'plugin_of_nobody' failed at its import: ZeroDivisionError"
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_huge_toml_file_is_not_parsed(tmp_path: Path) -> None:
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as file:
        file.truncate(100_000_000)
    began = time.monotonic()
    done = command_line("benchmark", huge, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "is larger than 4,194,304 bytes" in done.stderr
    assert time.monotonic() - began < 10
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["../../etc", "org/../../../etc", "org/..", "..", "a/b/c/../../.."]
)
def test_a_name_of_a_hub_leads_to_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Neither as a folder beside the work folder nor as a name in the cache of the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    work = tmp_path / "a" / "b" / "work"
    work.mkdir(parents=True)
    done = command_line("pull", name, "-o", "pulled", cwd=work)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
