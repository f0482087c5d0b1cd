"""Test the repository in examples/plugin.

Its method, metric, data set and backbone must be found by their entry points alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.builders.known_images import rows, save
from tests.command import run, run_process
from vilu.backbones.catalog import BACKBONES
from vilu.datasets.known import KNOWN
from vilu.errors import UsageError
from vilu.metrics import METRICS
from vilu.predictors.contract.catalogue import find_method

TEMPLATE = Path(__file__).resolve().parents[2] / "examples" / "plugin"
PROJECT = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["project"]
CATALOGUES = (vilu.PREDICTORS, METRICS, KNOWN, BACKBONES)
LISTS = {
    "quadratic_entropy": "list predictors",
    "youden": "list metrics",
    "beans": "datasets list",
    "colours": "list backbones",
}


def put(site: Path, entries: dict[str, dict[str, str]]) -> None:
    """Copy the template's package to a folder, with the files that an installation writes."""
    shutil.copytree(TEMPLATE / "src", site, dirs_exist_ok=True)
    info = site / f"{PROJECT['name'].replace('-', '_')}-{PROJECT['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n"
    )
    (info / "top_level.txt").write_text("vilu_example\n")
    lines = [
        (f"[{group}]", *(f"{name} = {value}" for name, value in of.items()))
        for group, of in entries.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(line for several in lines for line in several))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a package folder for this process. Afterwards the process forgets its packages."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    for catalogue in CATALOGUES:
        monkeypatch.setattr(catalogue, "registered", dict(catalogue.registered))
        monkeypatch.setattr(catalogue, "_has_imported_all", False)
        monkeypatch.setattr(catalogue, "_entry_names", [])
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.partition(".")[0] == "vilu_example"]:
        del sys.modules[name]


def store(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(5, 8))
    target = np.arange(200) % 5
    arrays = {
        "image": text[target] + 1.5 * rng.normal(size=(200, 8)),
        "text": text,
        "target": target,
    }
    np.savez(
        folder / "arrays.npz",
        **arrays,
        class_names=np.array(list("abcde")),
        logit_scale=5.0,
        logit_bias=0.0,
    )
    return folder / "arrays.npz"


def photos(folder: Path, sizes: tuple[int, int, int]) -> Path:
    """Write a few photos in the data set's layout, and return the folder."""
    turns = [
        split
        for split, n in zip(("train", "validation", "test"), sizes, strict=True)
        for _ in range(n)
    ]
    for row in rows(3 * sum(sizes), 3, tuple(turns)):
        save(folder / "beans" / row.split / f"leaf{row.label}" / f"{row.number}.jpg", row)
    return folder


def check_flow(command, tmp_path: Path) -> None:
    """Check the whole flow: list, fit, score, evaluate and embed. Run it by ``command``."""
    for name, words in LISTS.items():
        found = {row["name"]: row for row in json.loads(command(*words.split(), "--json").stdout)}
        assert name in found
    command("import", store(tmp_path), "-o", tmp_path / "store")
    command("fit", tmp_path / "store", "--method", "quadratic_entropy", "-o", tmp_path / "fit")
    saved = json.loads((tmp_path / "fit/predictor.json").read_text())
    assert saved["home"] == {"distribution": "vilu-example", "module": "vilu_example.method"}
    command("score", tmp_path / "fit", tmp_path / "store", "-o", tmp_path / "scores.parquet")
    table = command("evaluate", tmp_path / "scores.parquet", "--json", "--resamples", 50).stdout
    values = {row["metric"]: row for row in json.loads(table)}
    scored = vilu.Outcomes.load(tmp_path / "scores.parquet")
    u, wrong = scored.uncertainty, scored.failure == 1
    gaps = [(u[~wrong] <= t).mean() - (u[wrong] <= t).mean() for t in np.unique(u)]
    assert values["youden"]["value"] == max(gaps) > 0.2
    assert values["youden"]["ci_low"] < max(gaps) < values["youden"]["ci_high"]
    home = photos(tmp_path / "data", (3, 1, 2))
    # The data set is not complete, because there are few photos.
    told = command("datasets", "check", home, "beans", code=3).stdout
    assert (
        "train 9/9 (published 1,034) validation 3/3 (published 133) test 6/6 (published 128)"
        in told
    )
    words = ("--dataset", "beans", "--split", "test", "--backbone", "colours")
    command("embed", home, *words, "-o", tmp_path / "beans")
    embedded = vilu.EmbeddingStore(tmp_path / "beans")
    assert (len(embedded), embedded.space.backbone) == (6, "colours")


def test_it_is_found_by_every_command(site: Path, tmp_path: Path) -> None:
    put(site, PROJECT["entry-points"])
    assert list(LISTS) == [name for group in PROJECT["entry-points"].values() for name in group]
    check_flow(run, tmp_path)


def test_a_broken_one_is_named_and_stops_nothing_else(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = {
        group: {"broken": "nowhere:Else"} | of for group, of in PROJECT["entry-points"].items()
    }
    entries["vilu.metrics"] |= {
        "faulty": "vilu_example.faulty:METRIC",
        "auroc": "vilu_example.metric:YOUDEN",
    }
    put(site, entries)
    (site / "vilu_example/faulty.py").write_text("METRIC = 1 / 0\n")
    for words in LISTS.values():
        run(*words.split())
    reason = (
        "'broken' of vilu-example (nowhere:Else) cannot be imported: "
        "ModuleNotFoundError: No module named 'nowhere'. Install nowhere."
    )
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said == [  # each message once
        f"left out: the method {reason}",
        f"left out: the metric {reason}",
        "left out: the metric 'faulty' of vilu-example (vilu_example.faulty:METRIC) cannot be "
        "imported: "
        "ZeroDivisionError: division by zero",
        "left out: the metric 'auroc' of vilu-example (vilu_example.metric:YOUDEN) has another "
        "name than its entry "
        "point.",
        f"left out: the data set {reason}",
        f"left out: the backbone {reason}",
    ]
    for ask in (find_method, METRICS.__getitem__, KNOWN.__getitem__, BACKBONES.__getitem__):
        with pytest.raises(
            UsageError, match=r"'broken' of vilu-example \(nowhere:Else\) cannot be imported"
        ):
            ask("broken")


def test_nothing_is_imported_before_its_name_is_asked_for(site: Path) -> None:
    put(site, PROJECT["entry-points"])
    assert "quadratic_entropy" in vilu.PREDICTORS.names()
    assert METRICS["auroc"].name == "auroc"
    assert "vilu_example" not in sys.modules
    assert BACKBONES["colours"].loader == "vilu_example.backbone:load"
    assert "vilu_example.backbone" not in sys.modules
    assert METRICS["youden"].title == "Youden's J"
    assert "vilu_example.method" not in sys.modules


@pytest.mark.slow
def test_installed_by_pip_it_does_the_same_and_passes_its_own_tests(tmp_path: Path) -> None:
    # The build writes beside the source, so it gets a copy.
    site, copy = (
        tmp_path / "site",
        shutil.copytree(TEMPLATE, tmp_path / "copy"),
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", site, copy], check=True)
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    check_flow(lambda *words, **more: run_process(*words, **more, PYTHONPATH=paths), tmp_path)
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        copy / "tests",
        site / "vilu_example",
    ]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        tests, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert "8 passed" in done.stdout, done.stdout + done.stderr
