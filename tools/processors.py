"""Run the tests as on other processors, with other numbers of threads, and in a random order.

    python tools/processors.py [--only NAME ...] [PYTEST ARGUMENTS]

Without arguments the whole suite runs.

Each library has a separate switch: torch's kernels, MKL and oneDNN below torch, numpy's loops, and
OpenBLAS below numpy and scipy. A library ignores a switch if the processor lacks the instructions.
So the libraries are asked for the settings in force. OpenBLAS is an exception, and is only told of
instructions that the processor has. The table and the whole output of each run are in
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
FOUND = cast("dict[str, Any]", np.show_config(mode="dicts"))["SIMD Extensions"]["found"]
WIDE = [name for name in FOUND if "512" in name or name == "X86_V4"]


def switches(*, torch: str, onednn: str, openblas: str, numpy_without: list[str]) -> dict[str, str]:
    """Environment variables of a level, except for MKL: MKL has two switches."""
    return {
        "ATEN_CPU_CAPABILITY": torch,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "OPENBLAS_CORETYPE": openblas,
        "NPY_DISABLE_CPU_FEATURES": " ".join(numpy_without),
    }


LOW = switches(torch="default", onednn="SSE41", openblas="Prescott", numpy_without=FOUND)
MIDDLE = switches(torch="avx2", onednn="AVX2", openblas="Haswell", numpy_without=WIDE)
HIGH = switches(
    torch="avx512", onednn="DEFAULT", openblas="SkylakeX" if WIDE else "Haswell", numpy_without=[]
)

RUNS: dict[str, tuple[int, dict[str, str], list[str]]] = {
    "low-1": (1, LOW | {"MKL_CBWR": "COMPATIBLE"}, []),
    "low-4": (4, LOW | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, []),
    "avx2-2": (2, MIDDLE | {"MKL_CBWR": "AVX2"}, []),
    "high-2": (2, HIGH | {"MKL_CBWR": "AVX512"}, []),
    "high-4": (4, HIGH | {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}, []),
    "random": (1, {}, ["-p", "randomly", "-v"]),
}
"""Name -> threads, environment, arguments of pytest."""

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
SAID = re.compile(
    r"^(?:torch|numpy|openblas) .*|^MKL_VERBOSE oneMKL[^,]*|CNR:.* NThr:\d+$"
    r"|onednn_verbose,.*isa:.*",
    re.M,
)


def in_force(environment: dict[str, str]) -> Iterator[str]:
    """Yield the settings in force, as reported by the libraries."""
    verbose = environment | {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=verbose, capture_output=True, text=True, check=True
    )
    return iter(dict.fromkeys(found.group() for found in SAID.finditer(done.stdout)))


def run(name: str, arguments: list[str]) -> tuple[int, str]:
    """Do a run; returns the exit status, and the row of the table."""
    threads, switched, more = RUNS[name]
    of_threads = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    # by default MKL uses at most as many threads as cores, so MKL_DYNAMIC is off; threads without a
    # core must not spin
    environment = (
        os.environ | switched | of_threads | {"MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "PASSIVE"}
    )
    workers = max((os.cpu_count() or 1) // threads, 1)
    # one worker runs a whole file, so fixtures shared by the tests of a file are made once
    spread = ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    command = [sys.executable, "-m", "pytest", *spread, "--tb=short", *more, *arguments]
    start = time.monotonic()
    with (OUTPUT / f"{name}.log").open("w") as log:
        log.write(
            "\n".join(
                [f"{key}={value}" for key, value in switched.items()]
                + [*in_force(environment), "", ""]
            )
        )
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
    counts = {
        word: n
        for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", text.splitlines()[-1])
    }
    cells = [counts.get(word, "0") for word in ("passed", "failed", "error", "skipped")]
    return status, f"| {name} | {threads} | {' | '.join(cells)} | {time.monotonic() - start:.0f} |"


def main() -> int:
    """Do all runs, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=RUNS, help="one of the runs; repeatable")
    chosen, arguments = parser.parse_known_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    table = [
        "| run | threads | passed | failed | errors | skipped | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    failed = False
    for name in chosen.only or RUNS:
        print(f"== {name}", flush=True)
        status, row = run(name, arguments)
        failed |= status != 0
        table.append(row)
        (OUTPUT / "table.md").write_text("\n".join(table) + "\n")
        print(row, flush=True)
    print("\n".join(table))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
