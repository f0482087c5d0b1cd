"""``vilu benchmark`` as users run it, on existing stores and on the photos that ship with the
package.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests import command
from tests.builders.bench_fakes import make_stores
from vilu.predictors import PREDICTORS

STORES = """
seeds = 3
resamples = 100
{more}
[data.one]
stores = {{ train = "one-train", test = "one-test" }}

[settings.all]
kind = "labels"

[settings.unseen]
kind = "unseen"
"""

PHOTOS = """
[data.clothing]
source = "package:clothing.parquet"
classes = [
  "dress", "hat", "sweater", "coat", "jeans", "shirt", "shoe", "shorts", "skirt", "t-shirt",
]
test = "validation+test"
limit = 20
views = 1

[settings.all]
kind = "labels"

[methods.mcm]
[methods.knn_vote]
"""


def run(*args: object, code: int = 0, name: str = "benchmark") -> CompletedProcess[str]:
    return command.run(name, *args, code=code)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stores(tmp_path_factory.mktemp("stores"))


def write(folder: Path, text: str, more: str = "") -> Path:
    path = folder / "benchmark.toml"
    path.write_text(text.format(more=more) if "{more}" in text else text)
    return path


@pytest.mark.slow
def test_every_method_in_the_smoke_form(data: Path, tmp_path: Path) -> None:
    config = write(tmp_path, STORES)
    text = run(config, "--data", data, "-o", tmp_path / "out", "--smoke").stdout
    for method in PREDICTORS:
        assert f" {method}" in text, f"{method} is neither ranked nor refused"
    assert "all contests" in text
    table = (tmp_path / "out/smoke/studies/benchmark/table.txt").read_text()
    assert text.startswith(table.rstrip())
    assert "wall time" in text.removeprefix(table.rstrip())  # the time is no part of the study
    (plan,) = json.loads(
        run(config, "--data", data, "-o", tmp_path / "out", "--smoke", "--dry-run", "--json").stdout
    )
    assert {cell["method"] for cell in plan["listed"]} == set(PREDICTORS)
    assert {part["state"] for part in plan["parts"]} == {"embedded"}


def test_tables_and_json(data: Path, tmp_path: Path) -> None:
    config = write(tmp_path, STORES + "\n[methods.mcm]\n[methods.margin]\n")
    args = config, "--data", data, "-o", tmp_path / "out"
    assert "runs: 8 results from 0 fits" in run(*args, "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    found = json.loads(run(*args, "--json").stdout)["benchmark"]
    assert [block["setting"] for block in found["blocks"]] == ["all", "unseen"]
    # All labels: one test set for the three seeds. Unseen classes: three test sets.
    assert [line["n_runs"] for block in found["blocks"] for line in block["lines"]] == [1, 1, 3, 3]
    assert found["n_contests"] == 6
    again = json.loads(run(tmp_path / "out", "--json", name="render").stdout)
    assert again == {"benchmark": found}


def test_a_kept_file_stands_for_its_run(data: Path, tmp_path: Path) -> None:
    config = write(tmp_path, STORES + "\n[methods.mcm]\n[methods.margin]\n")
    run(config, "--data", data, "-o", tmp_path / "out")
    file, page = tmp_path / "kept.parquet", tmp_path / "page.md"
    written = run(tmp_path / "out", "--keep", file, name="render")
    assert f"8 cells are kept in {file}" in written.stderr
    run(file, "--document", page, name="render")
    assert "## benchmark" in page.read_text()
    refused = run(file, "--keep", tmp_path / "again.parquet", name="render", code=2)
    assert "has no scores of rows, which --keep and --submitted need" in refused.stderr


def test_shares_of_the_work_make_the_whole(data: Path, tmp_path: Path) -> None:
    """After two shares, the full command must run nothing again and print the tables from a single
    run.

    The shares may come in any order.
    """
    config = write(tmp_path, STORES + "\n[methods.mcm]\n[methods.margin]\n[methods.entropy]\n")
    args = config, "--data", data
    for shard in ("2/2", "1/2"):
        done = run(*args, "-o", tmp_path / "shared", "--shard", shard)
        assert done.stdout == ""
        assert f"share {shard} is done" in done.stderr
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared/cells").rglob("*.json")}
    assert len(cells) == 3 * 4
    text = re.sub(
        r"[\d,]+\n", "\n", run(*args, "-o", tmp_path / "shared").stdout
    )  # the speed differs
    assert {path: path.stat().st_mtime_ns for path in cells} == cells
    assert text == re.sub(r"[\d,]+\n", "\n", run(*args, "-o", tmp_path / "alone").stdout)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_shares_that_cannot_be(data: Path, tmp_path: Path, shard: str) -> None:
    config = write(tmp_path, STORES + "\n[methods.mcm]\n")
    done = run(config, "--data", data, "-o", tmp_path / "out", "--shard", shard, code=2)
    assert "--shard takes I/N" in done.stderr


def test_a_share_needs_embeddings(tmp_path: Path) -> None:
    config = write(tmp_path, PHOTOS)
    done = run(config, "-o", tmp_path / "out", "--shard", "1/2", code=2)
    assert (
        "2 sets are missing, the first is clothing (test). Make them all once, with --embed-only"
        in done.stderr
    )


@pytest.mark.slow
def test_photos_are_embedded_once(tmp_path: Path) -> None:
    config = write(tmp_path, PHOTOS)
    args = config, "-o", tmp_path / "out", "--smoke"
    first = run(*args)
    assert "clothing, all (all labels): 20 answers" in first.stdout
    stores = sorted(
        path.name.rpartition("-")[0] for path in (tmp_path / "out/smoke/stores").iterdir()
    )
    assert stores == ["clothing-test", "clothing-train"]
    again = run(*args)
    assert again.stdout == first.stdout
    assert "part 0: 20 rows" in first.stderr
    assert "part 0" not in again.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a process of its own there")
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_benchmark_goes_on(data: Path, tmp_path: Path, jobs: int) -> None:
    slow = "[methods.lvu.params]\nepochs = 4000\n"
    config = write(tmp_path, STORES + "\n[methods.mcm]\n" + slow)
    args = config, "--data", data, "-o", tmp_path / "out", "--jobs", jobs
    process = subprocess.Popen(
        command.command("benchmark", *args), stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "out").rglob("seed-*.json")):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    # If the exception passed through the string's exec, Python kills itself with the signal. A
    # shell shows 130 in both cases.
    assert process.returncode in {130, -signal.SIGINT}, stderr
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("seed-*.json")}
    quick = write(tmp_path, STORES + "\n[methods.mcm]\n")
    run(quick, "--data", data, "-o", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_faults_in_the_file(tmp_path: Path) -> None:
    config = write(tmp_path, STORES.replace("seeds", "sedes"))
    done = run(config, "-o", tmp_path / "out", code=2)
    assert (
        "vilu: error: benchmark.toml: there is no key 'sedes'. Did you mean 'seeds'?" in done.stderr
    )
    assert not (tmp_path / "out").exists()
