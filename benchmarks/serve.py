"""``vilu serve`` under load, compared with ``Guard``.

    python -m benchmarks.serve PREDICTOR IMAGES [--seconds 300] [--turns 1]

The server runs on a core of this machine, and the clients run on a second core. A JSON line is
printed after every step:

- ``turn``: images/s of both. First ``Guard`` alone answers all images, on the server's core. Then
  32 clients ask for ``seconds / turns``. Each client sends an image as soon as the last image is
  answered. On a machine with other work, many short turns are fairer than one long turn.
- ``steady``: all turns together. The line has the ratio between both rates with a lower bound,
  latencies compared with the time for a full batch, resident memory every 10 s, and lost and wrong
  answers.
- ``overload``: ten times as many images per second are sent as the service can answer. The line has
  the number of 429 responses, latencies for answered requests, and the seconds until a single
  request is as quick again as before.
- ``stop``: SIGTERM under load. The line counts complete requests without an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil
from scipy import stats

import vilu

if TYPE_CHECKING:
    from vilu.guard.guard import Answer, Guard

CLIENTS: Final = 32
SECONDS_BETWEEN_READINGS: Final = 10
"""Seconds between two readings of the service's memory."""
OVERLOAD_FACTOR: Final = 10
"""The step ``overload`` sends this multiple of the images that the service can answer."""

SERVER_CORE: Final = 0
CLIENT_CORE: Final = 1

MAX_ROUNDING: Final = 2e-3
"""Largest difference between probabilities from rounding when batch sizes differ."""

READINESS_REQUEST: Final = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def requests_of(images: Sequence[bytes]) -> list[bytes]:
    """Build the bytes of complete requests, a request for each image."""
    requests = []
    for content in images:
        body = (
            b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
            + content
            + b"\r\n--x--\r\n"
        )
        head = (
            "POST /v1/answers HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; "
            "boundary=x\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        head_bytes = head.encode()
        requests.append(head_bytes + body)
    return requests


class Client:
    """A connection, opened again after a close."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Return status (0: nobody listens, -1: the connection ended too early) and body."""
        if self.streams is None:
            try:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return 0, b""
        try:
            reader, writer = self.streams
            writer.write(request)
            head_bytes = await reader.readuntil(b"\r\n\r\n")
            head = head_bytes.decode("latin-1").lower()
            _, _, after_name = head.partition("content-length: ")
            length = int(after_name.partition("\r\n")[0])
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return -1, b""
        if "connection: close" in head:
            self.close()
        return int(head.split(" ", 2)[1]), body

    def close(self) -> None:
        """Close the connection."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


class LoadResult:
    """Counts and latencies for some clients' requests.

    Args:
        expected: ``Guard``'s answers about the images.
    """

    def __init__(self, expected: Sequence[Answer]) -> None:
        self.expected = expected
        self.status: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.wrong = 0

    async def ask(self, client: Client, place: int, request: bytes) -> None:
        """Ask about the image at an index, and compare the answer with ``Guard``'s."""
        began = time.perf_counter()
        status, body = await client.ask(request)
        self.status[status] += 1
        if status != 200:
            return
        elapsed = time.perf_counter() - began
        self.seconds.append(elapsed)
        (answer,) = json.loads(body)["answers"]
        self.wrong += not is_same(answer, self.expected[place])

    def summary(self) -> dict[str, Any]:
        """Return counts and latencies."""
        seconds = np.array(self.seconds or [np.nan])
        p50, p99 = np.quantile(seconds, [0.5, 0.99])
        return {
            "status": dict(self.status),
            "wrong": self.wrong,
            "p50": round(p50, 4),
            "p99": round(p99, 4),
        }


def is_same(answer: dict[str, Any], expected: Answer) -> bool:
    """Return whether an answer equals ``Guard``'s, up to rounding when batch sizes differ."""
    probability = answer["failure_probability"]
    if probability is None or expected.failure_probability is None:
        return bool(answer["label"] == expected.label)
    difference = abs(probability - expected.failure_probability)
    if answer["label"] == expected.label and difference < MAX_ROUNDING:
        return True
    # the labels may differ if both are equally likely up to rounding
    return bool(difference < 0.05)


async def ask_steadily(
    port: int, requests: Sequence[bytes], places: Iterator[int], load: LoadResult, seconds: float
) -> None:
    """Let all clients ask. Each client asks again after every answer."""
    end = time.perf_counter() + seconds

    async def ask_again_and_again() -> None:
        client = Client(port)
        while time.perf_counter() < end:
            place = next(places)
            await load.ask(client, place, requests[place])
        client.close()

    clients = [ask_again_and_again() for _ in range(CLIENTS)]
    await asyncio.gather(*clients)


async def ask_and_watch(
    port: int,
    requests: Sequence[bytes],
    places: Iterator[int],
    load: LoadResult,
    seconds: float,
    process: psutil.Process,
) -> list[float]:
    """Ask like ``ask_steadily``, and return readings of the process's resident MB."""
    sizes: list[float] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_READINGS)
            memory = process.memory_info()
            sizes.append(round(memory.rss / 2**20, 1))

    watching = asyncio.create_task(watch())
    await ask_steadily(port, requests, places, load, seconds)
    watching.cancel()
    return sizes


async def overload(
    port: int, requests: Sequence[bytes], load: LoadResult, rate: float, seconds: float
) -> dict[str, Any]:
    """Send images at ten times the rate over new connections, then single images until quick."""

    async def ask_once(place: int) -> None:
        client = Client(port)
        await load.ask(client, place, requests[place])
        client.close()

    tasks: set[asyncio.Task[None]] = set()
    n_sent = 0
    began = time.perf_counter()
    for place in cycle(range(len(requests))):
        due = began + n_sent / (OVERLOAD_FACTOR * rate)
        if due > began + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.add(asyncio.create_task(ask_once(place)))
        n_sent += 1
    await asyncio.gather(*tasks)
    ended = time.perf_counter()
    quick = LoadResult(load.expected)
    while not (quick.seconds and quick.seconds[-1] < 2 / rate + 0.2):
        await quick.ask(Client(port), 0, requests[0])
    return {
        **load.summary(),
        "offered/s": round(n_sent / (ended - began), 1),
        "recovery": round(time.perf_counter() - ended, 3),
    }


async def stop(
    port: int, requests: Sequence[bytes], load: LoadResult, server: subprocess.Popen[str]
) -> dict[str, Any]:
    """Send SIGTERM while all clients ask. The clients ask until nobody listens (status 0).

    Status -1 is a connection closed before an answer.
    """
    places = cycle(range(len(requests)))

    async def ask_until_the_end() -> None:
        client = Client(port)
        while not (load.status[0] or load.status[-1]) or client.streams is not None:
            place = next(places)
            await load.ask(client, place, requests[place])

    async def end() -> None:
        await asyncio.sleep(3)
        server.send_signal(signal.SIGTERM)

    clients = [ask_until_the_end() for _ in range(CLIENTS)]
    ending = end()
    await asyncio.gather(*clients, ending)
    code = server.wait(60)
    return {**load.summary(), "exit code": code}


def show(step: str, facts: dict[str, Any]) -> None:
    """Print a line."""
    print(json.dumps({"step": step, **facts}), flush=True)


def guard_rate(guard: Guard, images: Sequence[bytes]) -> float:
    """Measure the images/s of ``Guard`` alone, on the server's core."""
    os.sched_setaffinity(0, {SERVER_CORE})
    began = time.perf_counter()
    guard(images)
    seconds = time.perf_counter() - began
    os.sched_setaffinity(0, {CLIENT_CORE})
    return len(images) / seconds


def lower_bound(ratios: Sequence[float]) -> float | None:
    """Return the mean ratio's one-sided 95 % bound (Student's t over turns), None for one turn."""
    n = len(ratios)
    if n == 1:
        return None
    error = float(np.std(ratios, ddof=1)) / n**0.5
    return round(float(np.mean(ratios) - stats.t.ppf(0.95, n - 1) * error), 3)


def steady(
    guard: Guard, images: Sequence[bytes], port: int, server: int, options: argparse.Namespace
) -> tuple[LoadResult, float]:
    """Run all turns. Return the clients' load, and the median of ``Guard``'s rates."""
    requests = requests_of(images)
    places = cycle(range(len(requests)))
    load = LoadResult(guard(images))
    seconds = options.seconds / options.turns
    process = psutil.Process(server)
    sizes: list[list[float]] = []
    rates: list[float] = []
    ratios: list[float] = []
    for _ in range(options.turns):
        rates.append(guard_rate(guard, images))
        n_before = len(load.seconds)
        began = time.perf_counter()
        sizes.append(asyncio.run(ask_and_watch(port, requests, places, load, seconds, process)))
        rate = (len(load.seconds) - n_before) / (time.perf_counter() - began)
        ratios.append(rate / rates[-1])
        facts = {"guard/s": round(rates[-1], 2), "service/s": round(rate, 2), "MB": sizes[-1]}
        show("turn", facts)
    full_batch = guard.batch_size / float(np.median(rates))
    summary = load.summary()
    facts = {
        **summary,
        "ratio": round(float(np.mean(ratios)), 3),
        "lower bound": lower_bound(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "p99 in full batches": round(summary["p99"] / full_batch, 2),
        f"MB every {SECONDS_BETWEEN_READINGS} s of each turn": sizes,
    }
    show("steady", facts)
    return load, float(np.median(rates))


def main() -> None:
    """Start the server, and print the results of every step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("predictor", type=Path)
    parser.add_argument("images", type=Path, help="A folder of images.")
    parser.add_argument("--n", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=300, help="Seconds of all turns.")
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    paths = sorted(path for path in options.images.rglob("*") if path.is_file())[: options.n]
    images = [path.read_bytes() for path in paths]
    requests = requests_of(images)
    os.sched_setaffinity(0, {SERVER_CORE})
    vilu.tune_process()  # as in the service's command
    from vilu.guard.guard import Guard

    guard = Guard(options.predictor, workers=1)
    words = [sys.executable, "-m", "vilu.cli", "-q", "serve", str(options.predictor)]
    with tempfile.TemporaryDirectory() as state, (Path(state) / "log").open("w") as log:
        words += ["--port", "0", "--state", f"{state}/state"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as server:
            began = time.perf_counter()
            port = int(next(iter(server.stdout or ())).rpartition(":")[2])
            while asyncio.run(Client(port).ask(READINESS_REQUEST))[0] != 200:
                time.sleep(0.05)
            show("ready", {"seconds": round(time.perf_counter() - began, 2)})
            load, rate = steady(guard, images, port, server.pid, options)
            seconds = min(30.0, options.seconds)
            over = LoadResult(load.expected)
            show("overload", asyncio.run(overload(port, requests, over, rate, seconds)))
            ending = LoadResult(load.expected)
            show("stop", asyncio.run(stop(port, requests, ending, server)))


if __name__ == "__main__":
    main()
