"""If a service is stopped or killed under load, it must lose no accepted request and count none
twice.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.command import PYTHONPATH
from tests.service.conftest import Running, hosted, served
from vilu.service.limits import ClientLimits
from vilu.service.server import HostedService
from vilu.service.setup import Setup

Answered = dict[str, list[str]]


def ask_until(
    running: Running, ended: threading.Event, photos: list[bytes], who: int, answered: Answered
) -> list[str]:
    """Send requests one after another on one connection, and return the failures.

    The rows in each answer are added to ``answered``, which all connections share.
    """
    failed: list[str] = []
    with httpx.Client(base_url=running.url, timeout=20) as client:
        for number in range(100_000):
            name = f"{who}-{number}"
            try:
                image = ("images", ("a", photos[number % len(photos)]))
                reply = client.post(
                    "/v1/answers", files=[image, image], headers={"X-Request-Id": name}
                )
            except httpx.ConnectError:
                break  # the service no longer listens, so it accepted nothing
            except httpx.TransportError as error:
                failed.append(type(error).__name__)
                break
            if reply.status_code == 200:
                answered[name] = [one["row"] for one in reply.json()["answers"]]
            elif reply.status_code not in {429, 503}:
                failed.append(str(reply.status_code))
            if ended.is_set() and number % 3 == 0:
                break
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_under_load(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    photos: Callable[[int], list[bytes]],
    how: signal.Signals,
) -> None:
    answered: Answered = {}
    failed: list[str] = []
    settings = ("--state", tmp_path / "s", "--batch-size", 4, "--queue", 12)
    with served(predictors[0], *settings, ready=False) as running:
        assert running.get("/healthz").status_code == 200  # before the model is loaded
        early = running.get("/readyz")
        assert (early.status_code, early.headers["retry-after"]) == (503, "1")
        running.wait_ready()
        ended, images = threading.Event(), photos(9)
        threads = [
            threading.Thread(
                target=lambda who=who: failed.extend(
                    ask_until(running, ended, images, who, answered)
                )
            )
            for who in range(8)
        ]
        for thread in threads:
            thread.start()
        latest = time.monotonic() + 60
        while len(answered) <= 20 and time.monotonic() < latest:
            time.sleep(0.05)
        code = running.stop(how)
        ended.set()
        for thread in threads:
            thread.join(30)
    assert len(answered) > 20
    rows = [row for one in answered.values() for row in one]
    (kept,) = (tmp_path / "s").glob("*/rows.sqlite")
    with closing(sqlite3.connect(kept)) as table:
        there = [row for (row,) in table.execute("SELECT id FROM rows")]
    assert len(set(there)) == len(there)
    assert set(rows) <= set(there)  # every answered row is on the disk
    # If a connection is closed between two requests, httpx raises the same errors as for a broken
    # one.
    assert set(failed) <= {"ReadError", "RemoteProtocolError", "WriteError"}
    if how is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[how]
        lines = [json.loads(line) for line in running.said if line.startswith("{")]
        said = Counter(line["status"] for line in lines if line["path"] == "/v1/answers")
        assert said.keys() <= {200, 429}
        assert said[200] == len(
            answered
        )  # every accepted request has an answer that its client got
        assert set(rows) == set(there)
    name = next(iter(answered))
    image = ("images", ("a", images[int(name.partition("-")[2]) % len(images)]))
    with hosted(predictors[0], tmp_path / "s") as again:
        reply = again.post("/v1/answers", files=[image, image], headers={"X-Request-Id": name})
        assert [one["row"] for one in reply.json()["answers"]] == answered[name]
        (monitor,) = again.get("/v1/monitor").json()["monitors"]
        pictures = {row.partition("-")[2] for row in there}
        assert monitor["status"]["rows"] == len(pictures)  # each counts once
    assert "Traceback" not in "\n".join(running.said)
    assert not list((tmp_path / "s").glob("*/*.aside-*"))  # a kill is no damage


SLOW_DECODERS = """
import threading
import time

from vilu.store.pipeline import Decoder

decode = Decoder.__call__


def slow(decoder, image):
    if threading.current_thread().name.startswith("vilu-decode"):
        time.sleep(3)
    return decode(decoder, image)


Decoder.__call__ = slow
"""


@pytest.mark.slow
def test_a_second_interrupt_drops_no_request(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    photos: Callable[[int], list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A form that cannot be read comes first: it must leave nothing of itself in the log."""
    (tmp_path / "slow_decoders.py").write_text(SLOW_DECODERS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), PYTHONPATH]))
    replies: list[httpx.Response] = []
    with served(predictors[0], "--state", tmp_path / "s", plugin="slow_decoders") as running:
        form = {"Content-Type": "multipart/form-data; boundary=a"}
        assert running.post("/v1/answers", content=b"--x", headers=form).status_code == 400
        files = {"a": photos(1)[0]}
        asker = threading.Thread(
            target=lambda: replies.append(running.post("/v1/answers", files=files))
        )
        asker.start()
        while "vilu_images_under_way 1.0" not in running.get("/metrics").text:
            time.sleep(0.05)
        assert running.process is not None
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert running.stop(signal.SIGINT) == 130
        asker.join(30)
    assert [reply.status_code for reply in replies] == [200]
    of_people = [line for line in running.said if not line.startswith("{")]
    assert all(line.startswith("vilu: ") for line in of_people if line.strip())


def test_a_stop_waits_as_long_as_a_request_may_take(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    limits = ClientLimits(upload_seconds=30, answer_seconds=300)
    setup = Setup(predictors[0], None, tmp_path / "s", limits, None)
    host = HostedService(setup, "127.0.0.1", 0, announce=lambda _: None)
    host.bound_socket.close()
    assert host.server.config.timeout_graceful_shutdown is not None
    assert host.server.config.timeout_graceful_shutdown > 330
