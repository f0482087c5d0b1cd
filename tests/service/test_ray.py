"""The service under Ray Serve on this machine: it gives the same answers and has one monitor. A
killed replica loses only the requests that it was working on.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.builders.photo_folders import photo
from tests.builders.store_fakes import FakeBackbone
from tests.command import PYTHONPATH
from tests.service.conftest import Running, served
from vilu.errors import UsageError
from vilu.guard.guard import Guard
from vilu.service.ray_serve import parse_replicas

RECOVERS = 30.0
"""The seconds within which all replicas must be back."""

CLIENTS = 4


class Asking:
    """Run clients until the block ends, where each sends one image after another."""

    def __init__(self, running: Running, expected: list[str | None]) -> None:
        self.running, self.expected = running, expected
        self.told: Counter[int | str] = Counter()
        self.rows: set[str] = set()
        self.wrong = 0
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(who,)) for who in range(CLIENTS)]

    def _ask(self, who: int) -> None:
        images = [photo(number, number) for number in range(len(self.expected))]
        with httpx.Client(base_url=self.running.url, timeout=20) as client:
            number = 0
            while not self.ended.is_set():
                number = number + 1
                place = number % len(images)
                try:
                    name = {"X-Request-Id": f"{who}-{number}"}
                    reply = client.post("/v1/answers", files={"a": images[place]}, headers=name)
                except httpx.TransportError as error:
                    self.told[type(error).__name__] += 1
                    continue
                self.told[reply.status_code] += 1
                if reply.status_code == 200:
                    (one,) = reply.json()["answers"]
                    self.wrong += one["label"] != self.expected[place]
                    self.rows.add(one["row"])

    def __enter__(self) -> Asking:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(30)


def replicas(running: Running) -> set[int]:
    found = set()
    assert running.process is not None
    for child in psutil.Process(running.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "ServeReplica" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


@pytest.mark.engine
def test_two_replicas_and_the_death_of_one(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = Guard(predictors[0], backbone=FakeBackbone())(
        [photo(number, number) for number in range(9)]
    )
    ray = ("--executor", "ray", "--replicas", "2", "--port", port)
    with served(predictors[0], "--state", tmp_path / "s", *ray) as running:
        with Asking(running, [answer.label for answer in said]) as asking:
            time.sleep(3)
            (dies, stays), began = sorted(replicas(running)), time.monotonic()
            psutil.Process(dies).kill()
            while len(replicas(running) - {dies}) < 2:
                assert time.monotonic() - began < RECOVERS
                time.sleep(0.2)
            recovered = time.monotonic() - began
            time.sleep(3)
        lost = sum(n for status, n in asking.told.items() if status not in {200, 429})
        print(f"{dict(asking.told)}, two replicas again after {recovered:.1f} s")  # noqa: T201
        assert stays in replicas(running)
        assert asking.told[200] > 100
        assert asking.wrong == 0
        assert lost <= CLIENTS  # the requests that the killed replica was working on
        (monitor,) = running.get("/v1/monitor").json()["monitors"]
        pictures = {row.partition("-")[2] for row in asking.rows}
        assert len(pictures) <= monitor["status"]["rows"] <= len(pictures) + lost
        assert running.stop() == 143


@pytest.mark.engine
def test_a_ray_that_is_started_listens_to_this_machine_alone(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = ("--executor", "ray", "--port", port)
    with served(predictors[0], "--state", tmp_path / "s", *ray) as running:
        addresses = listened(running)
        assert port in {number for _, number in addresses}
        loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert {host for host, _ in addresses} <= loopback
        running.stop()


def listened(running: Running) -> set[tuple[str, int]]:
    """Return the addresses and ports at which the service's processes listen."""
    assert running.process is not None
    parent = psutil.Process(running.process.pid)
    found = set()
    for process in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, connection.laddr.port))
    return found


def test_numbers_of_replicas() -> None:
    assert [parse_replicas(said) for said in ("1", "3", "1:8")] == [(1, 1), (3, 3), (1, 8)]
    for wrong in ("0", "2:1", "a", ":2", "1:2:3", ""):
        with pytest.raises(UsageError, match="--replicas"):
            parse_replicas(wrong)
