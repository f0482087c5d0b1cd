"""Memory growth of ``vilu serve`` under requests, in bytes per row.

    python -m benchmarks.serve_memory PREDICTOR [--requests 200000] [--warm 20000] [--rows 1]

Requests with random vectors are sent in sequence over each of ``--clients`` connections. The memory
is read after ``--warm`` requests, and again after each of ``PARTS`` equal parts. Each time there
are two readings:

- "any moment": as soon as the part has ended. The service returns freed memory once a minute, so
  this reading may include memory freed in the last minute.
- "at rest": after ``REST_SECONDS`` seconds without a request, and after the service was told to
  return freed memory (``benchmarks.returning``).

Every reading has two numbers:

- "resident": all pages of the process in memory. The system may remove and reload pages of files
  (libraries), so this number changes without any request.
- "own": the pages without a file (``Anonymous`` in smaps_rollup). Growth is seen here.

The slope is that of the least-squares line through all readings. The slope's upper bound is a
one-sided 95 % bound by Student's t. Two heap readings differ by megabytes in both directions. So
the mean growth over the parts would have a bound three times as wide, because only the first and
the last reading count. The correlation between neighbouring residuals is printed, too: the bound is
too low with a positive correlation, and too high with a negative correlation. A line is printed
after every part, so a run that ends early is useful. Needs Linux.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.serve import Client

PARTS = 20
REST_SECONDS = 5


def request_of(vectors: np.ndarray) -> bytes:
    """Build the bytes of a complete request with vectors (B, D)."""
    rows = np.round(vectors, 5).tolist()
    text = json.dumps({"embeddings": rows})
    body = text.encode()
    head = (
        "POST /v1/scores HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def send(port: int, n_requests: int, n_rows: int, width: int, seed: int) -> None:
    """Send requests over one connection. A refused request is sent again after a moment."""
    client = Client(port)
    generator = np.random.default_rng(seed)
    n_answered = 0
    vectors = generator.standard_normal((n_rows, width))
    request = request_of(vectors)
    while n_answered < n_requests:
        status, body = await client.ask(request)
        if status == 429:
            await asyncio.sleep(0.05)
            continue
        if status != 200:
            raise SystemExit(f"status {status} after {n_answered} requests: {body[:200]!r}")
        n_answered += 1
        vectors = generator.standard_normal((n_rows, width))
        request = request_of(vectors)
    client.close()


async def send_all(port: int, options: argparse.Namespace, n_requests: int, seed: int) -> None:
    """Send requests over all connections."""
    share = n_requests // options.clients
    seeds = [options.clients * seed + client for client in range(options.clients)]
    shape = (options.rows, options.width)
    clients = [send(port, share, *shape, seed_of_client) for seed_of_client in seeds]
    await asyncio.gather(*clients)


def memory_of(process: int) -> dict[str, int]:
    """Read a process's resident memory, and the memory in pages without a file, in bytes."""
    sizes = {}
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    for line in text.splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        sizes[name.rstrip(":")] = 1024 * int(kilobytes)
    return {"resident": sizes["Rss"], "own": sizes["Anonymous"]}


def settled_memory_of(process: int) -> dict[str, int]:
    """Read a service's memory at rest, after freed memory is returned."""
    time.sleep(REST_SECONDS)
    os.kill(process, signal.SIGUSR1)
    time.sleep(1)
    return memory_of(process)


def slope_of(sizes: Sequence[int], n_rows: int) -> dict[str, float]:
    """Compute growth per row in bytes, and the upper bound. ``n_rows`` came between two sizes.

    The dictionary has the bound only from three sizes on, and the correlation from four.
    """
    n_before = n_rows * np.arange(len(sizes))  # rows before each size was read
    line = stats.linregress(n_before, sizes)
    facts = {"bytes a row": round(float(line.slope), 1)}
    if len(sizes) > 2:
        quantile = float(stats.t.ppf(0.95, len(sizes) - 2))
        facts["upper bound"] = round(float(line.slope + quantile * line.stderr), 1)
    if len(sizes) > 3:
        residuals = np.asarray(sizes) - line.intercept - line.slope * n_before
        correlation = np.corrcoef(residuals[1:], residuals[:-1])[0, 1]
        facts["correlation of residuals"] = round(float(correlation), 2)
    return facts


class Readings:
    """The memory of a process after each part, read in both ways."""

    def __init__(self, process: int) -> None:
        self.process = process
        self.sizes: dict[str, list[dict[str, int]]] = {"any moment": [], "at rest": []}

    def read(self) -> None:
        """Read the memory now, and once more at rest."""
        memory = memory_of(self.process)
        self.sizes["any moment"].append(memory)
        settled_memory = settled_memory_of(self.process)
        self.sizes["at rest"].append(settled_memory)

    def facts(self, n_rows: int) -> dict[str, Any]:
        """Return first size, last size and slope for every reading. A part has ``n_rows`` rows."""
        facts: dict[str, Any] = {}
        for reading, sizes in self.sizes.items():
            for kind in sizes[0]:
                of_kind = [size[kind] for size in sizes]
                megabytes = [round(of_kind[index] / 2**20, 1) for index in (0, -1)]
                facts[f"{kind}, {reading}"] = {"MB": megabytes, **slope_of(of_kind, n_rows)}
        return facts


def measure(port: int, process: int, options: argparse.Namespace) -> None:
    """Warm up, then print the memory after every part, and the slopes so far."""
    asyncio.run(send_all(port, options, options.warm, seed=0))
    readings = Readings(process)
    readings.read()
    began = time.perf_counter()
    share = options.requests // (PARTS * options.clients)
    n_of_part = share * options.clients
    for part in range(1, PARTS + 1):
        asyncio.run(send_all(port, options, n_of_part, seed=part))
        readings.read()
        facts: dict[str, Any] = {"requests": part * n_of_part, "rows": options.rows}
        facts["requests/s"] = round(part * n_of_part / (time.perf_counter() - began), 1)
        print(json.dumps(facts | readings.facts(n_of_part * options.rows)), flush=True)


def main() -> None:
    """Start the service, and print the growth of the memory."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("predictor", type=Path)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--warm", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1, help="Number of rows of a request.")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--width", type=int, default=512, help="Width of the embeddings.")
    parser.add_argument("--plugin", help="Module with the backbone, if a plug-in has it.")
    options = parser.parse_args()
    command = [sys.executable, "-m", "vilu.cli", "-q", "--plugin", "benchmarks.returning"]
    if options.plugin is not None:
        command += ["--plugin", options.plugin]
    command += ["serve", str(options.predictor)]
    with tempfile.TemporaryDirectory() as state, (Path(state) / "log").open("w") as log:
        words = [*command, "--port", "0", "--state", f"{state}/state"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as server:
            port = int(next(iter(server.stdout or ())).rpartition(":")[2])
            ready = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
            while asyncio.run(Client(port).ask(ready))[0] != 200:
                time.sleep(0.2)
            measure(port, server.pid, options)
            server.terminate()


if __name__ == "__main__":
    main()
