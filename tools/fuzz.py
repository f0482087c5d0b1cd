"""Fuzz the parsers for bytes from outside, guided by the coverage of our code (atheris).

    python tools/fuzz.py [TARGET ...] [--runs 5000] [--seed 1]

Each target in tests/fuzz/targets.py runs in a separate process. The first inputs are the target's
valid files. An input that makes the target fail is written to tests/fuzz/corpus/TARGET/, and
`make test` repeats this input from then on. The exit code is 1 if there is such an input.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "fuzz" / "corpus"


def main() -> int:
    """Fuzz the targets in turn, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*")
    parser.add_argument(
        "--runs", type=int, default=5000, help="inputs for each target, times its share"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz(options.child, options.runs, options.seed)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    from tests.fuzz.targets import TARGETS

    failed = []
    for name in options.targets or TARGETS:
        runs = max(round(options.runs * TARGETS[name].share), 1)
        command = [
            sys.executable,
            __file__,
            "--child",
            name,
            "--runs",
            str(runs),
            "--seed",
            str(options.seed),
        ]
        finished_run = subprocess.run(
            command, check=False, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        last_status = next(
            (
                line
                for line in reversed(finished_run.stderr.splitlines())
                if line.startswith(("Done", "#"))
            ),
            "",
        )
        print(
            f"{name}: {'ok' if finished_run.returncode == 0 else 'FAILED'} {last_status}",
            flush=True,
        )
        if finished_run.returncode:
            print("\n".join(finished_run.stderr.splitlines()[-40:]), flush=True)
            failed.append(name)
    return bool(failed)


def fuzz(name: str, runs: int, seed: int) -> None:
    """Fuzz a target until the process ends."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    import atheris

    with atheris.instrument_imports(
        include=["vilu"]
    ):  # also modules that are imported only when needed
        from tests.fuzz.guard import guarded
        from tests.fuzz.targets import TARGETS, kept

        target, kept_state = TARGETS[name], kept()
        for data in target.seeds():
            with TemporaryDirectory(prefix="vilu-fuzz-") as folder:
                target.case(Path(folder), data)

    def run_input(data: bytes) -> None:
        with TemporaryDirectory(prefix="vilu-fuzz-") as folder, guarded(Path(folder), kept_state):
            target.case(Path(folder), data)

    crash_folder = CORPUS / name
    crash_folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="vilu-seeds-") as seeds:
        for number, data in enumerate(target.seeds()):
            (Path(seeds) / str(number)).write_bytes(data)
        options = [
            f"-runs={runs}",
            f"-seed={seed}",
            "-max_len=65536",
            "-rss_limit_mb=0",
            f"-artifact_prefix={crash_folder}/",
        ]
        atheris.Setup([sys.argv[0], *options, seeds], run_input)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
