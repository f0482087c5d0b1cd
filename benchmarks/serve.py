"""``vilu serve`` under load, beside ``Guard``.

    python -m benchmarks.serve PREDICTOR IMAGES [--seconds 300]

The server runs on one core, its clients on another, both on this machine. Printed, one JSON line a
step:

- ``guard``: images/s of ``Guard`` alone, on the server's core, over the same bytes;
- ``steady``: 32 clients who each send an image as soon as the last one is answered: images/s, its
  ratio to ``guard``, latencies beside the time of a full batch, resident memory after one minute
  and at the end, lost and wrong answers;
- ``overload``: ten times as many images a second as it can answer, whoever waits: how many got 429,
  latencies of those that were answered, and the seconds until a single request is as quick again as
  before;
- ``stop``: SIGTERM under load: requests that were sent whole and got no answer.
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
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil

CLIENTS, OVER = 32, 10
HALF_STEP = 2e-3
"""How far batches of another size may move a probability; beyond, it is another answer."""


def requests_of(images: Sequence[bytes]) -> list[bytes]:
    """Whole requests, one image each."""
    found = []
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
        found.append(head.encode() + body)
    return found


class Client:
    """One connection, opened anew where it was closed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; 0 where nobody listens, -1 where the connection ended before."""
        if self.streams is None:
            try:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return 0, b""
        try:
            reader, writer = self.streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return -1, b""
        if "connection: close" in head:
            self.close()
        return int(head.split(" ", 2)[1]), body

    def close(self) -> None:
        """Let go of the connection."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


class Load:
    """What clients met."""

    def __init__(self, expected: Sequence[tuple[str | None, float | None]]) -> None:
        self.expected = expected
        self.status: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.wrong = 0

    async def one(self, client: Client, place: int, request: bytes) -> None:
        """Ask, and hold the answer against ``Guard``'s."""
        began = time.perf_counter()
        status, body = await client.ask(request)
        self.status[status] += 1
        if status != 200:
            return
        self.seconds.append(time.perf_counter() - began)
        (said,) = json.loads(body)["answers"]
        label, p = self.expected[place]
        same = said["label"] == label and (
            p is None or abs(said["failure_probability"] - p) < HALF_STEP
        )
        near = (
            p is not None
            and said["failure_probability"] is not None
            and abs(said["failure_probability"] - p) < 0.05
        )
        self.wrong += not (same or near)

    def told(self) -> dict[str, Any]:
        """Counts and latencies."""
        seconds = np.array(self.seconds or [np.nan])
        p50, p99 = np.quantile(seconds, [0.5, 0.99])
        return {
            "status": dict(self.status),
            "wrong": self.wrong,
            "p50": round(p50, 4),
            "p99": round(p99, 4),
        }


async def steady(
    port: int, requests: Sequence[bytes], load: Load, seconds: float, server: psutil.Process
) -> dict[str, Any]:
    """All clients, each asking again as soon as it was answered."""
    places, end, memory = (
        cycle(range(len(requests))),
        time.perf_counter() + seconds,
        dict[str, int](),
    )

    async def client() -> None:
        mine = Client(port)
        while time.perf_counter() < end:
            place = next(places)
            await load.one(mine, place, requests[place])
        mine.close()

    async def watch() -> None:
        await asyncio.sleep(min(60.0, seconds / 3))
        memory["minute"] = server.memory_info().rss

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)), watch())
    taken = time.perf_counter() - began
    memory["end"] = server.memory_info().rss
    grown = memory["end"] / memory["minute"] - 1
    return {
        **load.told(),
        "images/s": round(len(load.seconds) / taken, 2),
        "memory": memory,
        "grown": round(grown, 4),
    }


async def overload(
    port: int, requests: Sequence[bytes], load: Load, rate: float, seconds: float
) -> dict[str, Any]:
    """Images at ten times the rate, on their own connections; then single ones until quick."""
    tasks, began = set[asyncio.Task[None]](), time.perf_counter()
    for n, place in enumerate(cycle(range(len(requests)))):
        due = began + n / (OVER * rate)
        if due > began + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))

        async def alone(place: int) -> None:
            mine = Client(port)
            await load.one(mine, place, requests[place])
            mine.close()

        tasks.add(asyncio.create_task(alone(place)))
    await asyncio.gather(*tasks)
    offered, ended = n / (time.perf_counter() - began), time.perf_counter()
    quick = Load(load.expected)
    while not (quick.seconds and quick.seconds[-1] < 2 / rate + 0.2):
        await quick.one(Client(port), 0, requests[0])
    return {
        **load.told(),
        "offered/s": round(offered, 1),
        "recovery": round(time.perf_counter() - ended, 3),
    }


async def stop(
    port: int, requests: Sequence[bytes], load: Load, server: subprocess.Popen[str]
) -> dict[str, Any]:
    """SIGTERM while all clients ask, until nobody listens (0); -1 is a closed connection."""
    places = cycle(range(len(requests)))

    async def client() -> None:
        mine = Client(port)
        while not (load.status[0] or load.status[-1]) or mine.streams is not None:
            place = next(places)
            await load.one(mine, place, requests[place])

    async def end() -> None:
        await asyncio.sleep(3)
        server.send_signal(signal.SIGTERM)

    await asyncio.gather(*(client() for _ in range(CLIENTS)), end())
    code = server.wait(60)
    return {**load.told(), "exit code": code}


def main() -> None:
    """Start the server, and print what every step found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("predictor", type=Path)
    parser.add_argument("images", type=Path, help="A folder of images.")
    parser.add_argument("--n", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=300)
    given = parser.parse_args()
    paths = sorted(path for path in given.images.rglob("*") if path.is_file())[: given.n]
    images = [path.read_bytes() for path in paths]
    os.sched_setaffinity(0, {0})
    from vilu.guard.guard import Guard

    guard, rates = Guard(given.predictor, workers=1), list[float]()
    for _ in range(3):
        began = time.perf_counter()
        answers = guard(images)
        rates.append(len(images) / (time.perf_counter() - began))
    rate = float(np.median(rates))
    full = guard.batch_size / rate
    print(
        json.dumps(
            {
                "step": "guard",
                "images/s": [round(one, 2) for one in rates],
                "full batch": round(full, 4),
            }
        ),
        flush=True,
    )
    expected = [(answer.label, answer.failure_probability) for answer in answers]
    del guard
    with tempfile.TemporaryDirectory() as state:
        command = [
            str(Path(sys.executable).with_name("vilu")),
            "-q",
            "serve",
            str(given.predictor),
            "--port",
            "0",
            "--state",
            state,
        ]
        with subprocess.Popen(
            [*command, "--workers", "1"], stdout=subprocess.PIPE, text=True
        ) as server:
            os.sched_setaffinity(0, {1})
            port, requests = (
                int(next(iter(server.stdout or ())).rpartition(":")[2]),
                requests_of(images),
            )
            began = time.perf_counter()
            ready = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
            while asyncio.run(Client(port).ask(ready))[0] != 200:
                time.sleep(0.05)
            print(
                json.dumps({"step": "ready", "seconds": round(time.perf_counter() - began, 2)}),
                flush=True,
            )
            found = asyncio.run(
                steady(port, requests, Load(expected), given.seconds, psutil.Process(server.pid))
            )
            more = {
                "ratio": round(found["images/s"] / rate, 3),
                "p99 in full batches": round(found["p99"] / full, 2),
            }
            print(json.dumps({"step": "steady", **found, **more}), flush=True)
            over = asyncio.run(
                overload(port, requests, Load(expected), rate, min(30.0, given.seconds))
            )
            more = {"p99 against steady": round(over["p99"] / found["p99"], 2)}
            print(json.dumps({"step": "overload", **over, **more}), flush=True)
            print(
                json.dumps(
                    {"step": "stop", **asyncio.run(stop(port, requests, Load(expected), server))}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
