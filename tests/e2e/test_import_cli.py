"""Import arrays and folders with out-of-distribution pictures, and evaluate them, through the
command line.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.builders.array_files import arrays, save
from tests.builders.store_fakes import picture
from tests.command import command, run
from tests.faults.bed import FRAME, plugged
from tests.store.test_importing import files
from vilu.artifacts.disk import locked

GIVEN = ("--logit-scale", "50", "--logit-bias", "0")


def test_arrays_to_results(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("test", 1)):
        save(
            tmp_path / f"{name}.npz",
            arrays(120, seed=seed, text=arrays()["text"], logit_scale=None, logit_bias=None),
        )
        done = run(
            "import",
            f"{name}.npz",
            "-o",
            name,
            *GIVEN,
            "--model",
            "ViT-B/32",
            "--source",
            "a page",
            cwd=tmp_path,
        )
        assert done.stdout == f"{name}\n"
    assert (
        "120 embeddings, 0 unusable rows; next: vilu score PREDICTOR test -o scores.parquet"
        in done.stderr
    )
    run("fit", "train", "-o", "predictor", "--method", "mcm", cwd=tmp_path)
    run("score", "predictor", "test", "-o", "scores.parquet", cwd=tmp_path)
    outcomes = vilu.Outcomes.load(tmp_path / "scores.parquet")
    target = arrays(120, seed=1)["target"]
    assert set(outcomes.failure[target == -2].tolist()) == {1}
    assert set(outcomes.failure[target == -1].tolist()) == {-1}
    said = run("inspect", "test", "--deep", cwd=tmp_path).stdout
    assert "imported     a page" in said
    assert "model        ViT-B/32, precision not known, logit scale 50, bias 0" in said
    assert "templates not known" in said
    labels = json.loads(run("inspect", "test", "--json", cwd=tmp_path).stdout)["labels"]
    assert labels == {"inside": int((target >= 0).sum()), "outside": int((target == -2).sum()),
                      "unknown": int((target == -1).sum())}  # fmt: skip


def said_next(cwd: Path, *words: object) -> list[str]:
    """Run a command that makes a store, and return the command that it says is next."""
    said = run(*words, cwd=cwd).stderr
    _, _, command_line = said.strip().rpartition("; next: vilu ")
    return shlex.split(command_line)


@pytest.mark.parametrize(("kind", "method"), [("texts", "vilu_zero"), ("logits", "mcm")])
def test_the_next_command_without_labels_runs(tmp_path: Path, kind: str, method: str) -> None:
    values = arrays(120)
    (tmp_path / "names.txt").write_text("\n".join(values["class_names"]))
    words: tuple[str, ...] = ("import", "--logits", "logits.npy", "--classes", "names.txt")
    np.save(tmp_path / "logits.npy", values["image"] @ values["text"].T)
    if kind == "texts":
        words = ("import", "a.npz", *GIVEN)
        del values["target"]
        save(tmp_path / "a.npz", values)
    fit = said_next(tmp_path, *words, "-o", "store")
    assert fit == ["fit", "store", "--method", method, "-o", "predictor"]
    assert run(*fit, cwd=tmp_path).stdout == "predictor\n"


def test_photos_to_calibrate_on_without_labels_are_labelled_first(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("calibration", 1)):
        values = arrays(120, seed=seed, text=arrays()["text"])
        del values["target"]
        save(tmp_path / f"{name}.npz", values)
    run(*said_next(tmp_path, "import", "train.npz", *GIVEN, "-o", "train"), cwd=tmp_path)
    ask = said_next(tmp_path, "import", "calibration.npz", *GIVEN, "-o", "calibration")
    assert ask[:4] == ["next", "calibration", "--predictor", "PREDICTOR"]
    ask[3] = "predictor"
    assert run(*ask, cwd=tmp_path).stdout == "next.csv\n"


@pytest.mark.parametrize("has_names", [True, False])
def test_next_says_what_it_needs_of_logits_alone(tmp_path: Path, has_names: bool) -> None:
    values = arrays(120)
    logits = {"class_names": values["class_names"], "logits": values["image"] @ values["text"].T}
    if has_names:
        logits["ids"] = np.array([f"row {i}" for i in range(120)])
    save(tmp_path / "a.npz", logits)
    run("import", "a.npz", "-o", "calibration", cwd=tmp_path)
    run("fit", "calibration", "--method", "mcm", "-o", "predictor", cwd=tmp_path)
    words = ("next", "calibration", "--predictor", "predictor", "-o", "next.csv")
    assert "has logits alone" in run(*words, code=2, cwd=tmp_path).stderr
    ask = (*words, "--for-guarantee", "-n", "60", "--max-risk", "0.2")
    if has_names:
        assert run(*ask, cwd=tmp_path).stdout == "next.csv\n"
        return
    refused = run(*ask, code=3, cwd=tmp_path).stderr
    assert "Import them again with the array ids" in refused


def test_what_it_says_when_the_scale_is_missing(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", arrays(logit_scale=None))
    told = run("import", "a.npz", "-o", "store", code=2, cwd=tmp_path).stderr
    assert "vilu: error: the arrays have no logit_scale" in told
    assert "Give --logit-scale: OpenAI's CLIP has --logit-scale 100 --logit-bias 0" in told
    assert not (tmp_path / "store").exists()


def test_what_is_said_against_the_arrays_counts_and_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", arrays(logit_scale=np.log(50)))
    told = run("import", "a.npz", "-o", "store", "--logit-scale", "50", cwd=tmp_path).stderr
    assert "logit_scale is 50 as given; the 3.91202 in the arrays is ignored" in told
    assert vilu.EmbeddingStore(tmp_path / "store").space.logit_scale == 50


def test_other_names_and_classes_in_a_file(tmp_path: Path) -> None:
    values = arrays(class_names=None)
    save(tmp_path / "a.npz", {**values, "text_single": values["text"], "words": np.array(["x"])})
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    line = (
        "import",
        "a.npz",
        "-o",
        "store",
        "--key",
        "text=text_single",
        "--classes",
        "names.txt",
        "--outside",
        "c",
    )
    told = run(*line, cwd=tmp_path).stderr
    assert "not imported: text, words" in told
    assert vilu.EmbeddingStore(tmp_path / "store").class_names == ("a", "b", "d")
    assert "-q" not in line
    assert run("-q", *line, cwd=tmp_path).stderr == ""
    assert "is complete: there is nothing to do" in run(*line, cwd=tmp_path).stderr
    told = run(*line[:-1], "e", code=2, cwd=tmp_path).stderr
    assert "no class or label 'e' for --outside. Classes are 'a', 'b', 'c', 'd'" in told
    told = run(*line[:-2], code=6, cwd=tmp_path).stderr
    assert "outside was ['c'] and is now []" in told
    (tmp_path / "names.txt").write_text("a\tb\nc\td\n")
    assert "must have one name per line" in run(*line, code=2, cwd=tmp_path).stderr
    for wrong in ("text", "=x", "text=a", "other=text"):
        assert run(*line, "--key", wrong, code=2, cwd=tmp_path).stderr


def test_exit_codes(tmp_path: Path) -> None:
    values = arrays()
    values["image"][3] = np.nan
    save(tmp_path / "a.npz", values)
    told = run("import", "a.npz", "-o", "store", code=3, cwd=tmp_path).stderr
    assert "repeat with --max-error-rate 0.034" in told
    run("import", "a.npz", "-o", "store", "--max-error-rate", "0.034", cwd=tmp_path)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-100])
    run("import", "a.npz", "-o", "store", code=3, cwd=tmp_path)
    run("import", "nothing.npz", "-o", "store", code=2, cwd=tmp_path)
    save(tmp_path / "a.npz", arrays(seed=3))
    run("import", "a.npz", "-o", "store", code=6, cwd=tmp_path)
    with locked(tmp_path / "store", activity="importing into"):
        run("import", "a.npz", "-o", "store", "--overwrite", code=75, cwd=tmp_path)
    run("import", "a.npz", "-o", "store", "--overwrite", cwd=tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    run("import", "a.npz", "-o", "mine", "--overwrite", code=2, cwd=tmp_path)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(tmp_path: Path, stop: signal.Signals) -> None:
    """If an import is stopped, the same command must complete it with the bytes from an
    undisturbed run.
    """
    folder = save(tmp_path / "arrays", arrays(4000))
    line = ("import", folder, "--part-size", "5", "-o")
    run(*line, tmp_path / "whole")
    store = tmp_path / "store"
    process = subprocess.Popen(
        command(*line, store),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not list(store.glob("receipts/*7.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(stop)
    told = process.communicate()[1]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(
        stop, -signal.SIGKILL
    )
    if stop != signal.SIGKILL:
        assert (
            f"vilu: stopped: finished parts are in {store}; "
            "the same command goes on with the rest." in told
        )
    assert not (store / "manifest.json").exists()
    done = {
        path: path.stat().st_mtime_ns
        for path in (store / "receipts").iterdir()
        if path.suffix == ".json"
    }
    run(*line, store)
    assert files(store) == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done


def photos(root: Path) -> None:
    for i in range(12):
        path = root / "photos" / ("cat", "dog", "moth")[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))


@pytest.fixture
def _plugged() -> Iterator[None]:
    with plugged():
        yield


@pytest.mark.usefixtures("_plugged")
def test_folders_of_no_class(tmp_path: Path) -> None:
    photos(tmp_path)
    line = (*FRAME, "embed", "photos", "-o", "store", "--backbone", "fake")
    run(*line, "--outside", "moth", cwd=tmp_path)
    store = vilu.EmbeddingStore(tmp_path / "store")
    assert store.class_names == ("cat", "dog")
    assert store.outside.sum() == 4
    assert (
        "8 inside (66.7%), 4 outside (33.3%); outside are 'moth'"
        in run("inspect", "store", cwd=tmp_path).stdout
    )
    told = run(*line, "--outside", "mouth", code=2, cwd=tmp_path).stderr
    assert (
        "no class or label 'mouth' for --outside; it has cat, dog, moth. Did you mean 'moth'?"
        in told
    )
    assert "outside was ['moth'] and is now []" in run(*line, code=6, cwd=tmp_path).stderr
    told = run(*line, "--outside", "moth", cwd=tmp_path).stderr
    assert "there is nothing to do" in told
    run(*line, "--overwrite", cwd=tmp_path)
    assert not vilu.EmbeddingStore(tmp_path / "store").outside.any()
