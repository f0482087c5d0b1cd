"""What a user deploys works where the second package is not installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.builders.photo_folders import write_photos
from tests.command import run_process
from vilu.embeddings.memory import Embeddings
from vilu_bench.methods.neighbours import KNNVote

ABSENT = '''
import sys


class Absent:
    """Finds no module of the second package, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vilu_bench":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
'''

CLASSES, WIDTH, ROWS = 4, 16, 900


def write_arrays(path: Path, seed: int) -> Path:
    """Images near the text of their class, so that a few answers are wrong."""
    rng = np.random.default_rng(seed)
    text = np.eye(CLASSES, WIDTH)
    target = rng.integers(CLASSES, size=ROWS)
    image = text[target] + 0.3 * rng.normal(size=(ROWS, WIDTH))
    np.savez(path, image=image, text=text, target=target, class_names=np.array(list("abcd")))
    return path


@pytest.fixture
def without_bench(tmp_path: Path) -> dict[str, str]:
    """Environment of a process that does not find the second package."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(ABSENT)
    path = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path}


def test_stores_to_decisions(tmp_path: Path, without_bench: dict[str, str]) -> None:
    def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        return run_process(*words, code=code, cwd=tmp_path, **without_bench)

    scale = ("--logit-scale", 20, "--logit-bias", 0)
    for seed, name in enumerate(("train", "calibration", "new")):
        write_arrays(tmp_path / f"{name}.npz", seed)
        run("import", f"{name}.npz", "-o", name, *scale)
    run("fit", "train", "-o", "predictor")
    run("calibrate", "predictor", "calibration", "--max-risk", 0.1)
    run("score", "predictor", "new", "-o", "scores.parquet")
    assert "auroc" in run("evaluate", "scores.parquet", "--json").stdout
    assert "holds" in run("monitor", "predictor", "scores.parquet", "--shuffle").stdout
    run("explain", "predictor", "new", "--row", 0)
    run("report", "scores.parquet", "-o", "page.html")
    run("inspect", "predictor")


def test_a_folder_of_photos(tmp_path: Path, without_bench: dict[str, str]) -> None:
    write_photos(tmp_path / "photos", 60)
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    words = ("triage", "photos", "--classes", "names.txt", "-o", "out")
    run_process(*words, cwd=tmp_path, **without_bench)
    assert (tmp_path / "out/decisions.csv").is_file()


def test_what_it_would_need_is_named(tmp_path: Path, without_bench: dict[str, str]) -> None:
    image = np.eye(2)[[0] * 40]
    data = Embeddings(image, np.eye(2), [0, 0, 0, 1] * 10)
    KNNVote(k=2).fit(data).save(tmp_path / "voters")
    write_arrays(tmp_path / "new.npz", 0)
    scale = ("--logit-scale", 20, "--logit-bias", 0)
    run_process("import", "new.npz", "-o", "new", *scale, cwd=tmp_path, **without_bench)
    for words in (("score", "voters", "new", "-o", "s.parquet"), ("benchmark", "study.toml")):
        refused = run_process(*words, code=2, cwd=tmp_path, **without_bench)
        assert "Install vilu-bench." in refused.stderr
