"""Run the tests as on other processors, with other thread counts, and in a random order.

    python tools/processors.py [--only NAME ...] [PYTEST ARGUMENTS]

Without arguments the whole suite runs.

Each library has a separate switch: torch's kernels, MKL and oneDNN below torch, numpy's loops, and
OpenBLAS below numpy and scipy. If the processor lacks the instructions, a library ignores the
switch. So each library is asked for the settings in force. OpenBLAS is an exception, and is only
told about instructions that the processor has. The table and each run's whole output are in
build/processors, written as the runs end.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "processors"
CPU_FEATURES = cast("dict[str, Any]", np.show_config(mode="dicts"))["SIMD Extensions"]["found"]
AVX512_FEATURES = [name for name in CPU_FEATURES if "512" in name or name == "X86_V4"]


def switches(*, torch: str, onednn: str, openblas: str, numpy_without: list[str]) -> dict[str, str]:
    """Return a level's environment variables, except for MKL: MKL has two switches."""
    return {
        "ATEN_CPU_CAPABILITY": torch,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "OPENBLAS_CORETYPE": openblas,
        "NPY_DISABLE_CPU_FEATURES": " ".join(numpy_without),
    }


LOW_SWITCHES = switches(
    torch="default", onednn="SSE41", openblas="Prescott", numpy_without=CPU_FEATURES
)
MIDDLE_SWITCHES = switches(
    torch="avx2", onednn="AVX2", openblas="Haswell", numpy_without=AVX512_FEATURES
)
HIGH_SWITCHES = switches(
    torch="avx512",
    onednn="DEFAULT",
    openblas="SkylakeX" if AVX512_FEATURES else "Haswell",
    numpy_without=[],
)

RUNS: dict[str, tuple[int, dict[str, str], list[str]]] = {
    "low-1": (1, LOW_SWITCHES | {"MKL_CBWR": "COMPATIBLE"}, []),
    "low-4": (4, LOW_SWITCHES | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, []),
    "avx2-2": (2, MIDDLE_SWITCHES | {"MKL_CBWR": "AVX2"}, []),
    "high-2": (2, HIGH_SWITCHES | {"MKL_CBWR": "AVX512"}, []),
    "high-4": (4, HIGH_SWITCHES | {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}, []),
    "random": (1, {}, ["-p", "randomly", "-v"]),
}
"""Maps a run's name to threads, environment and pytest arguments."""

PROBE = """
import numpy as np, threadpoolctl, torch
torch.ones(64, 64) @ torch.ones(64, 64)  # MKL and oneDNN say what they are when they are first used
torch.nn.functional.conv2d(torch.ones(8, 16, 64, 64), torch.ones(16, 16, 3, 3))
print("torch", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), "threads")
loops = np.lib.introspect.opt_func_info(func_name="^(add|exp)$", signature="float")
print("numpy", {name: {of[key]["current"] for key in of} for name, of in loops.items()})
pools = threadpoolctl.threadpool_info()
print("openblas", [pool["architecture"] for pool in pools if "architecture" in pool])
"""
REPORTED = re.compile(
    r"^(?:torch|numpy|openblas) .*|^MKL_VERBOSE oneMKL[^,]*|CNR:.* NThr:\d+$"
    r"|onednn_verbose,.*isa:.*",
    re.M,
)


def settings_in_force(environment: dict[str, str]) -> Iterator[str]:
    """Yield the settings in force, as reported by the libraries."""
    verbose_environment = environment | {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    probe_run = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=verbose_environment,
        capture_output=True,
        text=True,
        check=True,
    )
    reported_settings = [match.group() for match in REPORTED.finditer(probe_run.stdout)]
    return iter(dict.fromkeys(reported_settings))


def run_tests(name: str, arguments: list[str]) -> tuple[int, str]:
    """Do a run, and return the exit status and the table row."""
    threads, switches_of_run, extra_arguments = RUNS[name]
    thread_limits = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    # by default MKL uses at most as many threads as cores, so MKL_DYNAMIC is off. Threads without a
    # core must not spin.
    environment = (
        os.environ
        | switches_of_run
        | thread_limits
        | {"MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "PASSIVE"}
    )
    workers = max((os.cpu_count() or 1) // threads, 1)
    # one worker runs a whole file, so fixtures shared by the tests of a file are made once
    worker_arguments = ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *worker_arguments,
        "--tb=short",
        *extra_arguments,
        *arguments,
    ]
    start = time.monotonic()
    with (OUTPUT / f"{name}.log").open("w") as log:
        switch_lines = [f"{key}={value}" for key, value in switches_of_run.items()]
        settings = [*switch_lines, *settings_in_force(environment), "", ""]
        log.write("\n".join(settings))
        log.flush()
        status = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False
        ).returncode
    text = (OUTPUT / f"{name}.log").read_text()
    print(
        text[: text.index("\n\n")],
        *re.findall(r"^(?:FAILED|ERROR) .*|^Using --randomly-seed.*", text, re.M),
        sep="\n",
    )
    last_line = text.splitlines()[-1]
    counts = {
        outcome: n for n, outcome in re.findall(r"(\d+) (passed|failed|error|skipped)", last_line)
    }
    cells = [counts.get(outcome, "0") for outcome in ("passed", "failed", "error", "skipped")]
    return status, f"| {name} | {threads} | {' | '.join(cells)} | {time.monotonic() - start:.0f} |"


def main() -> int:
    """Do all runs, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=RUNS, help="one of the runs; repeatable")
    options, arguments = parser.parse_known_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    table = [
        "| run | threads | passed | failed | errors | skipped | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    has_failed = False
    for name in options.only or RUNS:
        print(f"== {name}", flush=True)
        status, row = run_tests(name, arguments)
        has_failed |= status != 0
        table.append(row)
        text = "\n".join(table) + "\n"
        (OUTPUT / "table.md").write_text(text)
        print(row, flush=True)
    print("\n".join(table))
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
