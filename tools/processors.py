"""Run the tests as other processors and numbers of threads round, and in a random order.

    python tools/processors.py [--only NAME ...] [PYTEST ARGUMENTS]

Without arguments the whole suite runs.

Each library has its own switch and obeys no other's: torch's kernels, MKL and oneDNN below them,
numpy's loops, and OpenBLAS below numpy and scipy. What was in force is asked of the libraries,
since they ignore a switch that a processor lacks, but for OpenBLAS, which is told of no more than
there is. The table and the whole output of each run are in build/processors, as the runs end.
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
    """Environment of one level, but for MKL's, which has two switches."""
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
    """What the libraries say of themselves."""
    verbose = environment | {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=verbose, capture_output=True, text=True, check=True
    )
    return iter(dict.fromkeys(found.group() for found in SAID.finditer(done.stdout)))


def run(name: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status of one run, and its row of the table."""
    threads, switched, more = RUNS[name]
    of_threads = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    # MKL takes no more threads than there are cores unless it is told to; and threads without a
    # core are not to spin
    environment = (
        os.environ | switched | of_threads | {"MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "PASSIVE"}
    )
    workers = max((os.cpu_count() or 1) // threads, 1)
    # one worker runs a whole file: what a file's tests share is made once
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
    """All runs, and the table."""
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
