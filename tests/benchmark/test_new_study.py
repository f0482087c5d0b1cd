"""Test that `vilu init` writes a benchmark file that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.bench_fakes import make_store, make_stores
from tests.command import run


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stores(tmp_path_factory.mktemp("stores"))


@pytest.mark.parametrize("test", ["one-test", None])
def test_new_file_runs_as_it_is(stores: Path, tmp_path: Path, test: str | None) -> None:
    more = [] if test is None else ["--test", stores / test]
    file = tmp_path / "study.toml"
    run("init", stores / "one-train", *more, "-o", file)
    done = run("benchmark", file, "--data", stores, "-o", tmp_path / "out", "--smoke")
    for method in ("mcm", "margin", "linear_probe", "vilu_zero", "vilu_plus"):
        assert method in done.stdout
    assert "5 labels a class" in done.stdout


def test_new_file_never_replaces_another(stores: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    run("init", stores / "one-train", "-o", file)
    before = file.read_bytes()
    done = run("init", stores / "one-train", "-o", file, code=2)
    assert "exists already" in done.stderr
    assert file.read_bytes() == before


def test_stores_that_no_study_can_use_are_refused(stores: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    bare = make_store(tmp_path / "bare", 20, 9_000, labelled=False)
    assert "has no labels" in run("init", bare, "-o", file, code=2).stderr
    alone = make_store(tmp_path / "alone", 20, 9_500, k=1)
    assert "has one class" in run("init", alone, "-o", file, code=2).stderr
    other = run("init", stores / "one-train", "--test", stores / "two-test", "-o", file, code=2)
    assert "different classes" in other.stderr
    assert "is a .toml file" in run("init", bare, "-o", tmp_path / "study.txt", code=2).stderr
    assert not file.exists()
