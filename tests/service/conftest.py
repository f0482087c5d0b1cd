"""Fixtures that start a service on a free port, in a thread or in its own process. The model is
a fake that loads at once.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.builders.photo_folders import KINDS, photo, truth_of
from tests.builders.store_fakes import NAMES, FakeBackbone, FakeDataset
from tests.command import command, run
from tests.faults.bed import FRAME
from vilu.service.limits import ClientLimits
from vilu.service.rows import RowFile
from vilu.service.server import HostedService
from vilu.service.setup import Setup
from vilu.store.embed import embed
from vilu.store.job import BackboneSpec


@dataclass
class Running:
    """Hold the address, the messages and the process that belong to a running service."""

    url: str
    said: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **settings)

    def request(self, method: str, path: str, **settings: Any) -> httpx.Response:
        with self.client() as client:
            return client.request(method, path, **settings)

    def get(self, path: str, **settings: Any) -> httpx.Response:
        return self.request("GET", path, **settings)

    def post(self, path: str, **settings: Any) -> httpx.Response:
        return self.request("POST", path, **settings)

    def wait_ready(self) -> None:
        for _ in range(600):
            if self.get("/readyz").status_code == 200:
                return
            time.sleep(0.05)
        pytest.fail(f"not ready: {self.said}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def hosted(
    first: Path, state: Path, *, second: Path | None = None, keep: Path | None = None, **more: Any
) -> Iterator[Running]:
    """Run the service in a thread inside this process until the block ends."""
    size = {name: more.pop(name) for name in ("batch_size",) if name in more}
    addresses, faults = list[str](), list[BaseException]()
    told = threading.Event()

    def tell(what: str) -> None:
        addresses.append(what)
        told.set() if what == "ready" else None

    def work() -> None:
        try:
            host.run()
        except BaseException as error:  # noqa: BLE001 - raised below
            faults.append(error)
            told.set()

    handler = logging.Handler()
    running = Running("")
    handler.emit = lambda entry: running.said.append(entry.getMessage())  # type: ignore[method-assign]
    access, before = logging.getLogger("vilu.access"), logging.getLogger("vilu.access").level
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    host = HostedService(
        Setup(first, second, state, ClientLimits(**more), keep, workers=2, **size),
        "127.0.0.1",
        0,
        tell,
    )
    thread = threading.Thread(target=work)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BackboneSpec, "load", lambda self: FakeBackbone())
            thread.start()
            assert told.wait(60)
        if faults:
            raise faults[0]
        running.url = addresses[0]
        yield running
    finally:
        host.stop()
        thread.join(60)
        access.removeHandler(handler)
        access.setLevel(before)


@contextmanager
def served(*args: object, ready: bool = True, plugin: str | None = None) -> Iterator[Running]:
    """Run ``vilu serve`` with these arguments in its own process until the block ends."""
    frame = FRAME if plugin is None else (*FRAME, "--plugin", plugin)
    words = command(*frame, "serve", "--port", 0, *args)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        found = Running(process.stdout.readline().strip(), process=process)
        lines = process.stderr
        assert lines is not None
        told = threading.Thread(target=lambda: found.said.extend(iter(lines.readline, "")))
        told.start()
        try:
            if ready:
                found.wait_ready()
            yield found
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(30)
            told.join(10)


def labelled(n: int, first: int) -> FakeDataset:
    """Return n photos with their right labels, where the kinds take turns."""
    numbers = range(first, first + n)
    return FakeDataset(
        [photo(number % KINDS, number) for number in numbers],
        [NAMES.index(truth_of(number % KINDS)) for number in numbers],
        [f"{number}.png" for number in numbers],
        class_names=NAMES,
    )


@pytest.fixture
def left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the journals that a test leaves open, as a kill would leave them.

    Python 3.13 warns if a connection is collected and was not closed before.
    """
    opened: list[RowFile] = []
    begin = RowFile.__init__

    def noted(file: RowFile, *arguments: Any, **settings: Any) -> None:
        opened.append(file)
        begin(file, *arguments, **settings)

    monkeypatch.setattr(RowFile, "__init__", noted)
    yield
    for file in opened:
        if hasattr(file, "_connection"):
            file._connection.close()


@pytest.fixture(scope="session")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two calibrated predictors for the same model."""
    home = tmp_path_factory.mktemp("predictors")
    embed(labelled(150, 10_000), FakeBackbone(), home / "train", names=NAMES)
    embed(labelled(300, 20_000), FakeBackbone(), home / "cal", names=NAMES)
    for name, risk in (("linear_probe", "0.1"), ("mcm", "0.45")):
        run("fit", home / "train", "-o", home / name, "--method", name)
        run("calibrate", home / name, home / "cal", "--max-risk", risk)
    return home / "linear_probe", home / "mcm"


@pytest.fixture(scope="module")
def service(
    predictors: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Return one service for the tests that change nothing."""
    with hosted(predictors[0], tmp_path_factory.mktemp("state") / "s") as running:
        yield running


@pytest.fixture
def photos() -> Callable[[int], list[bytes]]:
    """Return a function that makes n photos, where the kinds take turns."""
    return lambda n: [photo(number % KINDS, number) for number in range(n)]
