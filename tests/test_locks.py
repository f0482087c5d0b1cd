"""Test lock files: who holds one, what dead processes leave, and how other machines matter."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vilu.artifacts.disk import LOCK_FILE, locked
from vilu.errors import BusyError

HOLDER = f"{LOCK_FILE}-holder"

HOLD = """
import sys, time
from pathlib import Path
from vilu.artifacts.disk import locked
with locked(Path(sys.argv[1]), activity="scoring into"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_then_nobody(tmp_path: Path) -> None:
    with locked(tmp_path, activity="scoring into"):
        assert (tmp_path / HOLDER).read_text() == f"process {os.getpid()} of {socket.gethostname()}"
    assert HOLDER not in os.listdir(tmp_path)  # noqa: PTH208 - the lock itself may stay


def test_who_comes_second_is_told_of_the_first_whose_death_frees_the_lock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        named = rf"another process \(process {first.pid} of \S+\) is scoring into .*Wait for it"
        for _ in range(2):  # asking leaves the holder's name in place
            with pytest.raises(BusyError, match=named), locked(tmp_path, activity="scoring into"):
                pytest.fail("two hold the lock")
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert f"process {first.pid} of" in (tmp_path / HOLDER).read_text()
    with caplog.at_level(logging.WARNING, "vilu"), locked(tmp_path, activity="scoring into"):
        assert f"process {os.getpid()} of" in (tmp_path / HOLDER).read_text()
    assert not caplog.messages


def test_the_lock_of_another_machine_is_worth_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The process may have died there, or it may be at work.

    Some file systems give one lock to two machines, so nobody here can tell.
    """
    (tmp_path / HOLDER).write_text("process 12 of elsewhere")
    with caplog.at_level(logging.WARNING, "vilu"), locked(tmp_path, activity="scoring into"):
        (said,) = caplog.messages
    assert (
        f"{tmp_path / HOLDER} names process 12 of elsewhere. "
        "Either it died there, or it is scoring into" in said
    )
    assert HOLDER not in os.listdir(tmp_path)  # noqa: PTH208 - the lock itself may stay


@pytest.mark.parametrize("content", [b"4711\nhost\n", b"\xff\xfe junk", b"x" * 5000])
def test_a_file_of_somebody_else_beside_the_lock_stays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / HOLDER).write_bytes(content)
    with locked(tmp_path, activity="scoring into"):
        assert (tmp_path / HOLDER).read_bytes() == content
    assert (tmp_path / HOLDER).read_bytes() == content


def test_the_name_of_another_machine_that_came_meanwhile_stays(tmp_path: Path) -> None:
    with locked(tmp_path, activity="scoring into"):
        (tmp_path / HOLDER).write_text("process 12 of elsewhere")
    assert (tmp_path / HOLDER).read_text() == "process 12 of elsewhere"


def test_a_link_beside_the_lock_leads_to_no_writing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / HOLDER).symlink_to(tmp_path / "elsewhere")
    with locked(tmp_path / "folder", activity="scoring into"):
        assert not (tmp_path / "elsewhere").exists()


def test_no_room_for_the_name_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with locked(tmp_path, activity="scoring into"):
        assert os.listdir(tmp_path) == [LOCK_FILE]  # noqa: PTH208
