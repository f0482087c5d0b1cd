"""What a user deploys works where the second package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.command import run_process
from vilu.cli.demo import PROMPT_NAMES
from vilu.embeddings.memory import Embeddings
from vilu_bench.methods.neighbours import KNNVote

WORKER = Path(__file__).with_name("core_worker.py")
FEW = {"train": 120, "validation": 120, "test": 100}
"""Photos of the demo's splits that the test takes."""

ABSENT = '''
import sys


class Absent:
    """Finds no module of the second package, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vilu_bench":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
'''


@pytest.fixture
def without_bench(tmp_path: Path) -> dict[str, str]:
    """Environment of a process that does not find the second package."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(ABSENT)
    path = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path}


def write_few_photos(path: Path) -> None:
    """Some photos of each split of the demo's table."""
    whole = pq.read_table(str(resources.files("vilu").joinpath("assets", "clothing.parquet")))
    rows: list[int] = []
    for split, n in FEW.items():
        of_split = np.flatnonzero(pc.equal(whole["split"], split).to_numpy())
        rows.extend(of_split[np.linspace(0, len(of_split) - 1, n).astype(int)].tolist())
    pq.write_table(whole.take(rows), path)


def test_photos_to_a_service(tmp_path: Path, without_bench: dict[str, str]) -> None:
    write_few_photos(tmp_path / "few.parquet")
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


def test_what_it_would_need_is_named(tmp_path: Path, without_bench: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    text = np.eye(4, 16)
    target = rng.integers(4, size=100)
    image = text[target] + 0.3 * rng.normal(size=(100, 16))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    KNNVote(k=2).fit(Embeddings(image, text, target=target)).save(tmp_path / "voters")
    arrays = {"image": image, "text": text, "target": target, "class_names": list("abcd")}
    np.savez(tmp_path / "new.npz", **arrays, logit_scale=20.0, logit_bias=0.0)
    run_process("import", "new.npz", "-o", "new", cwd=tmp_path, **without_bench)
    for words in (("score", "voters", "new", "-o", "s.parquet"), ("benchmark", "here/main")):
        refused = run_process(*words, code=2, cwd=tmp_path, **without_bench)
        assert "Install vilu-bench." in refused.stderr
