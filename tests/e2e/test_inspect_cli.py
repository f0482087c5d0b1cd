"""``vilu inspect`` on every artefact, and ``--seal`` on those that an earlier vilu wrote."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import run
from tests.compat.bed import tree
from tests.compat.conftest import kept as unpacked
from vilu.artifacts import documents
from vilu.artifacts.documents import read_json, vouched
from vilu.artifacts.tables import read_table

kept = unpacked
KINDS = {
    "stores": ("val", "captions", "tars"),
    "scores": ("folder", "coverage.parquet", "aps.parquet"),
    "monitors": ("calm-state.parquet", "calm.parquet"),
    "study": (".",),
}


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_SAID", set())


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names]
)
def test_old_artefacts_are_sealed(
    kind: str,
    name: str,
    kept: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Unsealed, they say so once;
    sealed, they say the same as before, and any change of a document is an error.
    """
    source, path = kept(kind) / name, tmp_path / "it"
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(
        source, path := path.with_suffix(source.suffix)
    )
    before = tree(path) if path.is_dir() else {path.name: path.read_bytes()}
    with caplog.at_level(logging.WARNING, "vilu"):
        run("inspect", path)
    lines = [
        record.getMessage()
        for record in caplog.records
        if "carries no digest" in record.getMessage()
    ]
    assert len(lines) >= 1
    assert all("`vilu inspect --seal` adds one" in line for line in lines)
    assert len(lines) == len(set(lines))
    done = json.loads(run("inspect", path, "--seal", "--json").stdout)
    assert done["sealed"]
    caplog.clear()
    documents._SAID.clear()
    with caplog.at_level(logging.WARNING, "vilu"):
        run("inspect", path)
    assert not [record for record in caplog.records if "carries no digest" in record.getMessage()]
    assert json.loads(run("inspect", path, "--seal", "--json").stdout)["sealed"] == []
    sealed = [Path(file) for file in done["sealed"]]
    for file in sealed:
        if file.suffix == ".json":
            old = before[str(file.relative_to(path)) if path.is_dir() else file.name]
            assert read_json(file, "Make it again") == json.loads(old)
        elif path.is_dir():
            (tmp_path / "old.parquet").write_bytes(before[str(file.relative_to(path))])
            with vouched():
                (now, facts), (then, said) = (
                    read_table(file, ()),
                    read_table(tmp_path / "old.parquet", ()),
                )
            assert now.equals(then)
            assert facts == said


def test_what_is_none_of_ours(tmp_path: Path) -> None:
    assert "is none of ours" in run("inspect", tmp_path, code=3).stderr
    (tmp_path / "notes.txt").write_text("x")
    assert (
        "no file that vouches for itself" in run("inspect", tmp_path / "notes.txt", code=3).stderr
    )
