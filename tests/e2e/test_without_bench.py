"""Everything that a user deploys works without the second package, vilu_bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders.clothes import write_few_photos
from tests.command import ROOT, run
from vilu.cli.demo import PROMPT_NAMES
from vilu.embeddings.memory import Embeddings
from vilu.registry import names_of_bench
from vilu_bench.methods.neighbours import KNNVote

BENCH = ROOT / "src" / "vilu_bench"
WORKER = Path(__file__).with_name("core_worker.py")
FEW = {"train": 120, "validation": 120, "test": 100}
"""The number of photos that the test takes from each demo split."""

ABSENT = '''
import sys


class Absent:
    """Finds no module of the second package, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vilu_bench":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
'''

UNINSTALLED = (
    ABSENT
    + """
import importlib.metadata as metadata

every = metadata.distributions


def but_for_the_second(**context):
    return (found for found in every(**context) if found.name != "vilu-bench")


metadata.distributions = but_for_the_second
"""
)


def environment(folder: Path, start: str) -> dict[str, str]:
    """Return an environment whose processes run ``start`` before anything else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(start)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def without_bench(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the second package is not installed."""
    return environment(tmp_path / "uninstalled", UNINSTALLED)


@pytest.fixture
def without_its_code(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the second package has entry points but no code."""
    return environment(tmp_path / "hidden", ABSENT)


@pytest.fixture
def voters(tmp_path: Path) -> Path:
    """Write a folder with a predictor from the second package, and rows to score."""
    rng = np.random.default_rng(0)
    text = np.eye(4, 16)
    target = rng.integers(4, size=100)
    image = text[target] + 0.3 * rng.normal(size=(100, 16))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    KNNVote(k=2).fit(Embeddings(image, text, target=target)).save(tmp_path / "voters")
    arrays = {"image": image, "text": text, "target": target, "class_names": list("abcd")}
    np.savez(tmp_path / "new.npz", **arrays, logit_scale=20.0, logit_bias=0.0)
    run("import", "new.npz", "-o", "new", cwd=tmp_path)
    (tmp_path / "run" / "cells").mkdir(parents=True)
    return tmp_path


@pytest.mark.slow
def test_photos_to_a_service(tmp_path: Path, without_bench: dict[str, str]) -> None:
    write_few_photos(tmp_path / "few.parquet", FEW)
    folder = tmp_path / "work"
    folder.mkdir()
    root = WORKER.parents[2]
    path = os.pathsep.join([without_bench["PYTHONPATH"], str(root)])
    done = subprocess.run(
        [sys.executable, WORKER, folder, tmp_path / "few.parquet"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "demo/report.html").is_file()
    assert (folder / "demo/triage/decisions.csv").is_file()
    assert "holds" in (folder / "monitor.txt").read_text()
    assert (folder / "page.html").is_file()
    reply = json.loads((folder / "answers.json").read_text())
    assert reply["guarantee"] == "holds"
    (answer,) = reply["answers"]
    assert answer["label"] in PROMPT_NAMES
    assert answer["decision"] in {"accept", "review"}


NEEDING = (
    ("score", "voters", "new", "-o", "scores.parquet"),
    ("inspect", "voters"),
    ("inspect", "run"),
    ("fit", "new", "-o", "head", "--method", "sirc"),
    ("embed", "new.npz", "--dataset", "cifar10", "-o", "emb"),
    ("benchmark", "here/main", "--dry-run"),
    ("pools", "new", "mcm", "--sizes", "4"),
)

SEVERAL = """
import json, sys
from tests.builders.clothes import write_few_photos
from tests.command import command_line

done = [command_line(*words) for words in json.loads(sys.argv[1])]
print(json.dumps([[one.returncode, one.stdout, one.stderr] for one in done]))
"""
"""Commands that run in one process, because imports take longer than a command."""


def run_several(commands: Iterable[tuple[str, ...]], cwd: Path, path: str) -> list[list[Any]]:
    """Run commands in a process with this PYTHONPATH, and return their exit codes, outputs and
    messages.
    """
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(list(commands))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([path, str(ROOT / "src"), str(ROOT)])},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[list[Any]] = json.loads(done.stdout)
    return results


def test_what_to_install_is_named(voters: Path, without_bench: dict[str, str]) -> None:
    shown = (("--help",), ("datasets", "list"))
    results = run_several((*NEEDING, *shown), voters, without_bench["PYTHONPATH"])
    for command, (code, _, message) in zip(NEEDING, results, strict=False):
        assert code == 5, (command, message)
        assert "part of vilu-bench, which is not installed" in message, command
        assert "pip install 'vilu[bench]'" in message, command
    (_, help_, _), (_, _, listed) = results[len(NEEDING) :]
    assert "triage" in help_
    assert "benchmark" not in help_
    assert "pip install 'vilu[bench]'" in listed


@pytest.mark.slow
def test_what_has_lost_its_code_is_named(voters: Path, without_its_code: dict[str, str]) -> None:
    commands = (("score", "voters", "new", "-o", "s.parquet"), ("benchmark", "here/main"))
    for code, _, message in run_several(commands, voters, without_its_code["PYTHONPATH"]):
        assert code == 2
        assert "Install vilu-bench." in message


def test_the_core_knows_the_names_of_the_bench() -> None:
    """The core must know every name in the second package except the folder layouts.

    A folder does not name its own layout, so the core needs no names for layouts.
    """
    project = tomllib.loads((BENCH / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["entry-points"]
    expected = {group: list(names) for group, names in entries.items() if group != "vilu.layouts"}
    assert names_of_bench() == expected
