"""Run the command line in forks from one process that has imported everything.

Requests come as JSON lines on stdin, and answers go as JSON lines to stdout. The process itself
computes nothing, so a fork loses no thread, and a run needs no time for imports.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import json
import os
import pkgutil
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import vilu
import vilu.cli
from tests.faults import plugin  # noqa: F401 - what the plug-in needs is imported once
from tests.faults.saboteur import Saboteur
from vilu.predictors import PREDICTORS
from vilu_bench.studies import facts

ALSO = (
    *(
        "torch._dynamo",
        "sklearn.linear_model",
        "sklearn.isotonic",
        "scipy.optimize",
        "scipy.stats",
        "threadpoolctl",
    ),
    *(
        "filelock",
        "pyarrow.parquet",
        "pyarrow.csv",
        "pyarrow.compute",
        "matplotlib.pyplot",
        "jinja2",
    ),
    "PIL.PngImagePlugin",
)


def import_all() -> None:
    """Import every module in vilu, and the modules that vilu imports late."""
    warnings.simplefilter("ignore")
    for module in pkgutil.walk_packages(vilu.__path__, "vilu."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ALSO:
        importlib.import_module(name)
    for method in ("mcm", "knn_distance", "lvu"):
        facts.code_digest(
            *PREDICTORS[method]().modules
        )  # for the study in ``bed``, since code does not change between trials
    from vilu.scoring import score

    defaults = inspect.unwrap(score.score_parts).__kwdefaults__
    score.SCORING_BATCH = defaults["rows_per_part"] = 64  # several parts with few rows


def child(request: dict[str, Any]) -> None:
    """Run one command, and exit as a process does on its own."""
    work = Path(request["work"])
    os.chdir(work)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # children in a background shell ignore it
    for stream, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    chosen = {name: request.get(name) for name in ("fault", "at")}
    saboteur = Saboteur(
        work,
        Path(request["inputs"]),
        **chosen,
        seed=request.get("seed", 0),
        record=bool(request.get("record")),
    )
    code = 1
    sys.argv = ["vilu", *request["argv"]]
    warnings.resetwarnings()
    try:
        saboteur.install()
        vilu.cli.main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:  # noqa: BLE001 - what the interpreter would show
        traceback.print_exc()
    saboteur.busy = True  # the work is over
    threading._shutdown()  # as the interpreter does, so a thread that hangs is a bug
    atexit._run_exitfuncs()
    for late in (signal.SIGINT, signal.SIGTERM):
        signal.signal(late, signal.SIG_IGN)  # only the answer is left to write
    sys.stdout.flush()
    told = {"steps": saboteur.n, "struck": saboteur.struck, "versions": sorted(saboteur.versions)}
    answer = Path(request["answer"])
    unfinished = answer.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(told))
    unfinished.replace(answer)  # despite SIGKILL, the answer is whole or missing
    os._exit(code)


def begin(request: dict[str, Any], gate: int) -> int:
    """Fork a child that waits until the gate is closed, and return its process id.

    The gate lets several children start together.
    """
    Path(request["answer"]).unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    try:
        os.close(request["holder"])
        os.read(gate, 1)
        child(request)
    finally:
        os._exit(99)


def serve(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fork the children, wait, and return how each ended.

    ``kill_after`` and ``signal`` kill a child from outside.
    """
    gate, holder = os.pipe()
    pids = [begin({**request, "holder": holder}, gate) for request in requests]
    os.close(gate)
    begun = time.monotonic()
    os.close(holder)
    ends: dict[int, tuple[int, float]] = {}
    killed = set()
    while len(ends) < len(pids):
        time.sleep(0.002)
        spent = time.monotonic() - begun
        for pid, request in zip(pids, requests, strict=True):
            if pid in ends:
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            after = request.get("kill_after")
            if found:
                ends[pid] = status, -1.0 if pid in killed else spent
            elif after is not None and spent >= after and not request.get("struck"):
                os.kill(pid, request["signal"])
                request["struck"] = True
            elif spent > request.get("limit", 240.0) and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
    return [_told(request, *ends[pid]) for pid, request in zip(pids, requests, strict=True)]


def _told(request: dict[str, Any], status: int, seconds: float) -> dict[str, Any]:
    answer = Path(request["answer"])
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    told = (
        json.loads(answer.read_text())
        if answer.exists()
        else {"steps": None, "struck": None, "versions": []}
    )
    return {"code": code, "seconds": seconds, **told}


if __name__ == "__main__":
    import_all()
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)  # noqa: T201
