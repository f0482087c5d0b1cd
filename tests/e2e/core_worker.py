"""Run every step that a user deploys, from photos to a service, in a process that must not import
vilu_bench.

    python core_worker.py FOLDER PHOTOS

PHOTOS is a table with a few photos. FOLDER is empty at first, and each step writes its files there.
``answers.json`` holds the service's reply, and ``monitor.txt`` holds the monitor's report.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import httpx

from tests.command import run
from vilu.cli import demo
from vilu.service.limits import ClientLimits
from vilu.service.server import HostedService
from vilu.service.setup import Setup

SECONDS = 60  # time limit for a service to be ready, or to stop


def run_demo(folder: Path, photos: Path) -> None:
    """Run the command from `make demo` on a few photos instead of its 3,781."""
    few = patch.object(demo.resources, "as_file", lambda _: nullcontext(photos))
    few_epochs = patch.dict(demo.TRAINING_SETTINGS, epochs=3)
    with few, few_epochs:
        run("demo", "-o", "demo", cwd=folder)


def run_commands(folder: Path) -> str:
    """Run each command from the demo's embeddings to a monitored rule, and return the monitor's
    report.
    """
    (stores,) = (folder / "demo/cache").glob("*/embeddings")
    run("fit", stores / "train", "-o", "predictor", cwd=folder)
    run("calibrate", "predictor", stores / "validation", "--max-risk", 0.5, cwd=folder)
    run("score", "predictor", stores / "test", "-o", "scores.parquet", cwd=folder)
    run("evaluate", "scores.parquet", cwd=folder)
    run("explain", "predictor", stores / "test", "--row", 0, cwd=folder)
    run("report", "scores.parquet", "-o", "page.html", cwd=folder)
    run("inspect", "predictor", cwd=folder)
    return run("monitor", "predictor", "scores.parquet", "--shuffle", cwd=folder).stdout


@contextmanager
def served(predictor: Path) -> Iterator[str]:
    """Start a service on a free port, and yield its address when it is ready."""
    messages: list[str] = []
    is_ready = threading.Event()

    def listen(message: str) -> None:
        messages.append(message)
        if message == "ready":
            is_ready.set()

    setup = Setup(predictor, None, predictor.with_suffix(".serving"), ClientLimits(), None)
    host = HostedService(setup, "127.0.0.1", 0, listen)
    thread = threading.Thread(target=host.run, daemon=True)
    thread.start()
    if not is_ready.wait(SECONDS):
        sys.exit(f"the service is not ready: {messages}")
    yield messages[0]
    host.stop()
    thread.join(SECONDS)


def main(folder: Path, photos: Path) -> None:
    """Run every step on the files that the step before left."""
    run_demo(folder, photos)
    (folder / "monitor.txt").write_text(run_commands(folder))
    first = min((folder / "demo/photos").iterdir())
    with served(folder / "predictor") as address:
        form = {"images": (first.name, first.read_bytes())}
        reply = httpx.post(f"{address}/v1/answers", files=form, timeout=SECONDS).raise_for_status()
    (folder / "answers.json").write_text(json.dumps(reply.json()))
    if any(name.partition(".")[0] == "vilu_bench" for name in sys.modules):
        sys.exit("vilu_bench was imported")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
