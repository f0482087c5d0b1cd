"""The fault matrix: every command, broken at seeded moments of its work, ends the second time as if nothing had been.

Here 20 trials spread over its cells; ``make test-faults`` makes five or more of every cell, with new seeds.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import run, run_process
from tests.conftest import few
from tests.faults.bed import CANNOT, COMMANDS, UNBOUND, Bed, can_mount, contents, plugged, summary
from tests.faults.saboteur import FAULTS
from vilu.predictors.nn.checkpoint import FolderSession

SEED = int(os.environ.get("SEED", "0"))
TRIALS = int(os.environ.get("TRIALS", "0"))
"""Of each cell; 0: the twenty of CI."""

CELLS = [(command, fault) for command in COMMANDS for fault in FAULTS]


def chosen() -> list[tuple[str, str, int]]:
    """Trials of CI: every command once, every fault at least once."""
    order, commands = random.Random(7), list(COMMANDS)
    faults = [*FAULTS, *FAULTS][: len(commands)]
    order.shuffle(faults)
    return [(command, fault, number) for number, (command, fault) in enumerate(zip(commands, faults, strict=True))]


PLAN = [(c, f, SEED + n) for c, f in CELLS for n in range(TRIALS)] if TRIALS else chosen()


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Not below pytest's folder, which other users may not enter."""
    folder = Path(tempfile.mkdtemp(prefix="vilu-faults-"))
    log = Path(os.environ.get("OUT", folder / "trials.jsonl"))
    made = Bed(folder, log.absolute())
    try:
        with plugged():
            yield made
    finally:
        made.close()
        print(f"\n{summary(made.rows)}\n{len(made.rows)} trials, SEED={SEED}")  # noqa: T201
        shutil.rmtree(folder)


@pytest.mark.parametrize(("command", "fault", "seed"), PLAN, ids=lambda value: str(value).replace(" ", "_"))
def test_the_same_command_again(bed: Bed, command: str, fault: str, seed: int) -> None:
    if fault in {"nospace", "readonly"} and not can_mount(bed.folder / "mount"):
        pytest.skip(CANNOT)
    row = bed.trial(command, fault, seed)
    assert row["ok"], row


def test_the_matrix_can_fail(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that ends otherwise than the undisturbed one did is seen."""
    alone = bed.undisturbed("score file")
    others = dict.fromkeys(alone.files, "0" * 64)
    monkeypatch.setattr(bed, "undisturbed", lambda name: type(alone)(**{**vars(alone), "files": others}))
    row = bed.trial("score file", "clock", 0)
    bed.rows.remove(row)
    assert not row["ok"]
    assert row["why"].startswith("again other files")


@pytest.mark.parametrize("name", COMMANDS)
def test_two_undisturbed_runs_give_the_same_bytes(bed: Bed, name: str) -> None:
    if name in {"fit vilu_plus", "fit mcm_ts", "fit mahalanobis"} and not TRIALS:
        pytest.skip("its first run is compared with every trial of `make test-faults`")
    work = bed.prepare(COMMANDS[name])
    bed.fill(work, COMMANDS[name])
    told = bed.ask(work, COMMANDS[name])
    alone = bed.undisturbed(name)
    assert (told["code"], contents(work)) == (alone.code, alone.files), bed.said(work)
    shutil.rmtree(work)


OTHERS = {
    "evaluate": ("evaluate", "a.parquet", "-o", "{out}/table.json", "--resamples", "20"),
    "explain": ("explain", "calibrated", "test", "-o", "{out}/why.json", "-n", "2"),
    "push": ("push", "mcm", "{out}/shared"),
    "render": ("render", "{out}/bench"),
    "pull": ("pull", "./mcm", "-o", "{out}/mine"),
    "export": ("export", "mcm", "-o", "{out}/mcm.onnx"),
}


@pytest.mark.parametrize("name", few(OTHERS, len(OTHERS) - 1))
def test_two_runs_of_the_other_commands(bed: Bed, name: str, tmp_path: Path) -> None:
    found = []
    for out in (tmp_path / "one", tmp_path / "two"):
        out.mkdir()
        if name == "render":
            told = bed.server.ask(
                argv=["benchmark", str(bed.inputs / "bench.toml"), "--data", str(bed.inputs), "-o", str(out / "bench")],
                work=tmp_path, inputs=bed.inputs, **{key: tmp_path / key for key in ("stdout", "stderr", "answer")},
            )  # fmt: skip
            assert told["code"] == 0
            for path in (out / "bench/studies").rglob("*.*"):
                if path.name != "study.json" and path.is_file():
                    path.unlink()
        argv = [word.format(out=out) for word in OTHERS[name]]
        files = {key: tmp_path / key for key in ("stdout", "stderr", "answer")}
        told = bed.server.ask(argv=argv, work=bed.inputs, inputs=bed.inputs, **files)
        assert told["code"] == 0, files["stderr"].read_text()
        found.append(contents(out))
    assert found[0] == found[1]
    assert found[0]


def test_a_fit_that_was_killed_after_its_last_file(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints go when the same fit finds that there is nothing to do; those of another fit stay."""
    words = ("fit", bed.inputs / "train", "-o", tmp_path / "p", "--method", "vilu", "--set", "hidden=8", "--set")
    with monkeypatch.context() as patched:
        patched.setattr(FolderSession, "remove", lambda session: None)
        run(*words, "epochs=2")
    assert (tmp_path / "p.checkpoints/run_0").is_dir()
    before = contents(tmp_path / "p")
    (tmp_path / "p.checkpoints/fit.txt").rename(tmp_path / "name")
    run(*words, "epochs=2")
    assert (tmp_path / "p.checkpoints/run_0").is_dir()
    (tmp_path / "name").rename(tmp_path / "p.checkpoints/fit.txt")
    assert "nothing to do" in run(*words, "epochs=2").stderr
    assert not (tmp_path / "p.checkpoints").exists()
    assert contents(tmp_path / "p") == before


def test_a_study_that_cannot_be_read(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, **_: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_text", broken)
    said = run("benchmark", bed.inputs / "bench.toml", "-o", tmp_path / "out", code=7).stderr
    assert "bench.toml: Input/output error" in said


def test_times_are_in_the_log_alone(bed: Bed) -> None:
    """What may differ is stated: a log, the table of it, and nothing else."""
    assert {"log.jsonl", "times.txt"} <= UNBOUND
    command = COMMANDS["embed"]
    work = bed.prepare(command)
    bed.fill(work, command)
    assert bed.ask(work, command)["code"] == 0
    lines = (work / "store/log.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all('"seconds"' in line for line in lines)
    assert not any(b"seconds" in path.read_bytes() for path in (work / "store/receipts").iterdir())
    shutil.rmtree(work)


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed; the trials patch time.time")
def test_a_clock_that_is_days_behind(bed: Bed, tmp_path: Path) -> None:
    """The second of two real processes lives before the first."""
    store = bed.inputs / "test"
    run_process("score", bed.inputs / "calibrated", store, "-o", tmp_path / "scores")
    before = contents(tmp_path)
    library = os.environ.get("FAKETIME_LIB", "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
    run_process(
        "score", bed.inputs / "calibrated", store, "-o", tmp_path / "scores", LD_PRELOAD=library, FAKETIME="-3d"
    )
    assert contents(tmp_path) == before
