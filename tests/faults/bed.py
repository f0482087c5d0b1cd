"""Run commands on tiny inputs with a fault: break, check, heal, run again and compare."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.builders.array_files import arrays, save
from tests.builders.bench_fakes import make_store
from tests.builders.store_fakes import picture
from tests.command import run
from tests.faults.saboteur import FAULTS, FILLER, MS_BIND, MS_REMOUNT, SIGNALS, mount_flags
from vilu.artifacts.disk import host_hash
from vilu.backbones.catalog import BACKBONES
from vilu.registry import IMPORTED_PLUGINS

HERE = Path(__file__).parent
PLUGIN = "tests.faults.plugin"
FRAME = ("--plugin", PLUGIN)
BENCH = """
name = "small"
seeds = 2
resamples = 20
[data.one]
stores = {{ train = "train", test = "test" }}
[settings.all]
kind = "labels"
[methods.mcm]
[methods.knn_distance]
deterministic = true
[methods.lvu]
params = {{ epochs = 2, hidden = [8] }}
"""
UNBOUND = {"log.jsonl", "times.txt", FILLER}
"""Files that may differ between two runs."""

ERRNOS = {
    "nospace": errno.ENOSPC,
    "readonly": errno.EROFS,
    "denied": errno.EACCES,
    "ioerror": errno.EIO,
}
CODES = {"sigkill": -signal.SIGKILL, "sigterm": 143, "sigint": 130}


@contextmanager
def plugged() -> Iterator[None]:
    """Remove the plug-in's registrations after the block.

    The plug-in registers again if a command asks for it again.
    """
    backbones = dict(BACKBONES)
    try:
        yield
    finally:
        BACKBONES.clear()
        BACKBONES.update(backbones)
        sys.modules.pop(PLUGIN, None)
        if PLUGIN in IMPORTED_PLUGINS:
            IMPORTED_PLUGINS.remove(PLUGIN)


@dataclass(frozen=True)
class Command:
    """A command line, the inputs that must be in its folder, and its output's name."""

    argv: tuple[str, ...]
    output: str
    copies: dict[str, str] = field(default_factory=dict)  # inputs by their name in the work folder


def fit(method: str, *settings: str, store: str = "train") -> Command:
    sets = tuple(word for setting in settings for word in ("--set", setting))
    return Command(
        ("fit", f"{{inputs}}/{store}", "-o", "predictor", "--method", method, *sets), "predictor"
    )


QUICK = ("epochs=3", "hidden=8")
COMMANDS: dict[str, Command] = {
    "embed": Command(
        (
            *FRAME,
            "embed",
            "{inputs}/photos",
            "-o",
            "store",
            "--backbone",
            "fake",
            "--part-size",
            "6",
            "--batch-size",
            "4",
            "--workers",
            "1",
            "--features",
        ),
        "store",
    ),
    "import": Command(
        ("import", "{inputs}/arrays.npz", "-o", "store", "--part-size", "6"), "store"
    ),
    "fit mcm": fit("mcm"),
    "fit mcm_ts": fit("mcm_ts"),
    "fit knn_distance": fit("knn_distance"),
    "fit mahalanobis": fit("mahalanobis"),
    "fit vilu": fit("vilu", *QUICK),
    "fit vilu_plus": fit("vilu_plus", "epochs=2", "width=8", "features=false"),
    "fit stacking": fit("stacking", "members=mcm,margin,knn_vote"),
    "fit deep_ensemble": fit("deep_ensemble", *QUICK, "members=2"),
    "score file": Command(
        ("score", "{inputs}/calibrated", "{inputs}/test", "-o", "scores.parquet"), "scores.parquet"
    ),
    "score folder": Command(
        ("score", "{inputs}/calibrated", "{inputs}/test", "-o", "scores"), "scores"
    ),
    "calibrate": Command(
        ("calibrate", "predictor", "{inputs}/cal", "--max-risk", "0.9"),
        "predictor",
        {"predictor": "mcm"},
    ),
    "monitor": Command(
        (
            "monitor",
            "{inputs}/calibrated",
            "{inputs}/b.parquet",
            "--state",
            "state.parquet",
            "-o",
            "told.json",
        ),
        "state.parquet",
        {"state.parquet": "state.parquet"},
    ),
    "benchmark": Command(
        ("benchmark", "{inputs}/bench.toml", "--data", "{inputs}", "-o", "bench"), "bench"
    ),
    "report": Command(("report", "{inputs}/a.parquet", "-o", "page.html"), "page.html"),
}


def make_inputs(folder: Path) -> Path:
    """Write pictures, stores, predictors, scores and a study for all commands."""
    for i in range(21):
        path = folder / "photos" / f"n{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    save(folder / "arrays.npz", arrays())
    for first, (name, n) in enumerate(
        {"train": 60, "test": 200, "cal": 120, "more": 120, "late": 120}.items()
    ):
        make_store(folder / name, n, 1000 * first)
    for name in ("mcm", "calibrated"):
        run("fit", folder / "train", "-o", folder / name, "--method", "mcm")
    run("calibrate", folder / "calibrated", folder / "cal", "--max-risk", "0.9")
    for name, store in (("a", "test"), ("b", "more"), ("c", "late")):
        run("score", folder / "calibrated", folder / store, "-o", folder / f"{name}.parquet")
    watch = (
        "monitor",
        folder / "calibrated",
        folder / "a.parquet",
        "--state",
        folder / "state.parquet",
    )
    run(*watch)
    (folder / "bench.toml").write_text(BENCH.format())
    return folder


class Server:
    """The process that forks the commands (``tests.faults.server``)."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        words = [sys.executable, "-m", "tests.faults.server"]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE.parents[1],
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        return self.process.stdout.readline().strip()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Run a command and return how it ended."""
        (told,) = self.ask_all([request])
        return told

    def ask_all(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run several commands at once and return how they ended."""
        self.process.stdin.write(json.dumps(requests, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()  # it has nothing to finish
        self.process.wait(10)
        self.process.stdout.close()


def is_lock(path: Path) -> bool:
    return path.name.startswith(".lock") or path.name.endswith(".lock")


def contents(work: Path) -> dict[str, str]:
    """Return a hash for every file except locks, logs and temporary files."""
    return {
        path.relative_to(work).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(work.rglob("*"))
        if path.is_file()
        and path.name not in UNBOUND
        and not is_lock(path)
        and not path.name.endswith(".tmp")
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time for every file."""
    found = {
        path: path.stat() for path in folder.rglob("*") if path.is_file() and not is_lock(path)
    }
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@dataclass(frozen=True)
class Undisturbed:
    """The results from a command that no fault disturbs."""

    code: int
    files: dict[str, str]
    versions: frozenset[
        tuple[str, str]
    ]  # every file that was renamed into place, and the files that were there before
    steps: int
    seconds: float


class Broken(AssertionError):
    """The error for a trial that did not end as it must."""


def require(condition: object, said: str) -> None:
    if not condition:
        raise Broken(said)


class Bed:
    """The place where trials run.

    Args:
        folder: Folder for everything, readable by all users.
        log: File that gets a line per trial.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.inputs = make_inputs(folder / "inputs")
        self.before = stamps(self.inputs)
        self.server = Server()
        self.undisturbed = cache(self._undisturbed)
        self.rows: list[dict[str, Any]] = []
        self.number = 0

    def close(self) -> None:
        self.server.close()

    def prepare(self, command: Command) -> Path:
        """Make and return an empty work folder."""
        self.number += 1
        work = self.folder / f"work-{self.number}"
        work.mkdir()
        return work

    def fill(self, work: Path, command: Command) -> dict[str, str]:
        """Copy the command's inputs into the folder, and add foreign files.

        Return the foreign files, which the command must not change.
        """
        for name, source in command.copies.items():
            copy = shutil.copytree if (self.inputs / source).is_dir() else shutil.copy2
            copy(self.inputs / source, work / name)
        foreign = {
            "notes.txt": "mine",
            f".{command.output}.{host_hash()}.{os.getpid()}.00000000.tmp": "of a process that "
            "lives",
            f".{command.output}.0123abcd.1.00000000.tmp": "of another machine",
            f".{command.output}~": "of an editor",
        }
        for name, text in foreign.items():
            (work / name).write_text(text)
        return foreign

    def request(self, work: Path, command: Command, number: int = 0, **more: Any) -> dict[str, Any]:
        argv = [word.format(inputs=self.inputs) for word in command.argv]
        files = {
            name: self.folder / f"{work.name}.{number}.{name}"
            for name in ("stdout", "stderr", "answer")
        }
        return {"argv": argv, "work": work, "inputs": self.inputs, **files, **more}

    def ask(self, work: Path, command: Command, **more: Any) -> dict[str, Any]:
        return self.server.ask(**self.request(work, command, **more))

    def said(self, work: Path, number: int = 0) -> str:
        return (self.folder / f"{work.name}.{number}.stderr").read_text()

    def _undisturbed(self, name: str) -> Undisturbed:
        command = COMMANDS[name]
        work = self.prepare(command)
        self.fill(work, command)
        before = contents(work)
        told = self.ask(work, command, record=True)
        require(told["code"] in {0, 8}, f"{name} alone ends with {told['code']}: {self.said(work)}")
        files = contents(work)
        shutil.rmtree(work)
        versions = {(path, content) for path, content in told["versions"]} | set(before.items())
        return Undisturbed(told["code"], files, frozenset(versions), told["steps"], told["seconds"])

    def trial(self, name: str, fault: str, seed: int) -> dict[str, Any]:
        """Run one trial, and log its outcome, good or bad."""
        row: dict[str, Any] = {"command": name, "fault": fault, "seed": seed}
        try:
            self._trial(
                COMMANDS[name],
                self.undisturbed(name),
                fault,
                random.Random(f"{name} {fault} {seed}"),
                row,
            )
            row["ok"] = True
        except Broken as error:
            row |= {"ok": False, "why": str(error)}
        self.rows.append(row)
        with self.log.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        return row

    def _trial(
        self,
        command: Command,
        alone: Undisturbed,
        fault: str,
        chance: random.Random,
        row: dict[str, Any],
    ) -> None:
        work = self.prepare(command)
        with mounted(work, fault):
            foreign = self.fill(work, command)
            told = self.ask(work, command, **self._moment(fault, alone, chance, row))
            row |= {key: told[key] for key in ("code", "struck", "seconds")}
            said = self.said(work)
            heal(work)
            self._require_end(fault, told, said, alone)
            self._require_whole(work, alone)
            again = self.ask(work, command)
            row["again"] = again["code"]
            require(
                again["code"] == alone.code,
                f"again it ends with {again['code']}: {self.said(work)}",
            )
            found = contents(work)
            other = sorted(
                path for path in alone.files | found if alone.files.get(path) != found.get(path)
            )
            require(not other, f"again other files: {other}")
            left = [path.name for path in work.rglob("*.tmp") if path.name not in foreign]
            require(not left, f"left over: {left}")
            for path, text in foreign.items():
                require(
                    (work / path).is_file() and (work / path).read_text() == text,
                    f"{path} was touched",
                )
        require(stamps(self.inputs) == self.before, "inputs were touched")
        shutil.rmtree(work)

    def _moment(
        self, fault: str, alone: Undisturbed, chance: random.Random, row: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the moment for the fault.

        A signal comes at a step, or from outside at a time. Every other fault comes at a step.
        """
        if fault in SIGNALS and chance.random() < 0.4:
            row["after"] = chance.uniform(0.02, 0.95) * alone.seconds
            return {"kill_after": row["after"], "signal": int(SIGNALS[fault])}
        row["at"] = chance.randint(1, alone.steps)
        return {"fault": fault, "at": row["at"], "seed": chance.randrange(2**32)}

    def _require_end(self, fault: str, told: dict[str, Any], said: str, alone: Undisturbed) -> None:
        """Check the exit code and the message."""
        code = told["code"]
        require(told["seconds"] >= 0, f"it hangs: {said}")
        require("Traceback" not in said, f"traceback: {said}")
        if fault == "clock" or code == alone.code:
            require(code == alone.code, f"ends with {code}: {said}")
        elif fault in SIGNALS:
            require(
                code in {CODES[fault], -SIGNALS[fault]},
                f"ends with {code}, not {CODES[fault]}: {said}",
            )
        else:
            require(code == 7, f"ends with {code}, not 7: {said}")
            why = os.strerror(ERRNOS[fault])
            words_before_the_work = {
                "nospace": "MiB are free. Make room",
                "readonly": "is not writable",
                "denied": "is not writable",
            }
            early = words_before_the_work.get(fault, why)
            require(
                "vilu: error: " in said and (why in said or early in said),
                f"the message does not say {why!r}: {said}",
            )

    def _require_whole(self, work: Path, alone: Undisturbed) -> None:
        """Check that every file under a final name is a file that the undisturbed run puts
        there.
        """
        found = {
            (path, content) for path, content in contents(work).items() if "/attempts/" not in path
        }
        partial = sorted(path for path, _ in found - alone.versions)
        require(not partial, f"partial or other files under final names: {partial}")


def heal(work: Path) -> None:
    """Remove the fault."""
    mount_flags(work, MS_REMOUNT | MS_BIND)
    for folder, _, _ in os.walk(work):
        Path(folder).chmod(0o755)
    (work / FILLER).unlink(missing_ok=True)


CANNOT = "needs the right to mount (root on Linux)"


@contextmanager
def mounted(work: Path, fault: str) -> Iterator[None]:
    """Mount what the fault needs: a small disk, or a folder that can be made read-only."""
    if fault not in {"nospace", "readonly"}:
        yield
        return
    options = (
        ("-t", "tmpfs", "-o", "size=8m,mode=0755", "tmpfs")
        if fault == "nospace"
        else ("--bind", str(work))
    )
    subprocess.run(["mount", *options, str(work)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(work)], check=True)


@cache
def can_mount(folder: Path) -> bool:
    """Return whether this machine allows mounts."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    folder.mkdir(exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    ).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table with good trials and all trials, by command and fault."""
    from vilu.text import align_columns

    def cell(command: str, fault: str) -> str:
        found = [row["ok"] for row in rows if (row["command"], row["fault"]) == (command, fault)]
        return f"{sum(found)}/{len(found)}" if found else "-"

    lines = [[command, *(cell(command, fault) for fault in FAULTS)] for command in COMMANDS]
    return "\n".join(align_columns([["", *FAULTS], *lines]))
