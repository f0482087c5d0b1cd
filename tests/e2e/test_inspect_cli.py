"""``vilu inspect`` on every artefact, intact and damaged."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vilu
from tests.command import command_line, run
from tests.compat.artefacts import unpack
from vilu.artifacts.documents import write_json
from vilu.errors import DataError

WORDS = {
    "new": "50 x ",
    "captions": "captions     one per image",
    "scores": "scores, 50 rows",
    "calibrated": "predictor linear_probe, calibrated: ",
    "predictors/mcm": "predictor mcm, not calibrated",
    "scores.parquet": "outcomes, 50 rows",
    "state.parquet": "monitor, ",
    "results.json": "results, ",
    "why.json": "explanations",
    "study": "benchmark, 1 studies, 2 cells",
    "triage": "labels.parquet: labels, ",
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("kept"))


@pytest.mark.parametrize(("name", "words"), WORDS.items(), ids=list(WORDS))
def test_what_an_artefact_is(kept: Path, name: str, words: str) -> None:
    assert words in run("inspect", kept / name).stdout
    assert json.loads(run("inspect", kept / name, "--json").stdout)


EDITS: dict[str, Callable[[dict], None]] = {
    "threshold": lambda rule: rule["thresholds"][""].update(threshold=0.99999),
    "n_wrong": lambda rule: rule["thresholds"][""].update(n_wrong=0),
    "n_accepted": lambda rule: rule["thresholds"][""].update(n_accepted=1),
    "n": lambda rule: rule["thresholds"][""].update(n=7),
    "risk_bound": lambda rule: rule["thresholds"][""].update(risk_bound=1e-6),
    "max_risk": lambda rule: rule.update(max_risk=1e-6),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_a_rule_is_held_against_its_rows(edit: Callable[[dict], None], tmp_path: Path) -> None:
    """If an edited rule does not follow from its rows, it must be refused, although its digest
    agrees.
    """
    path = unpack(tmp_path) / "calibrated"
    content = json.loads((path / "risk.json").read_text())
    edit(content["rule"])
    write_json(path / "risk.json", content)
    with pytest.raises(DataError, match=r"risk\.json is damaged"):
        vilu.Monitor.of_folder(path)
    assert "risk.json is damaged" in run("inspect", path, code=3).stderr


def test_a_damaged_document_is_named(tmp_path: Path) -> None:
    path = unpack(tmp_path) / "results.json"
    path.write_text(path.read_text().replace("auroc", "aurco", 1))
    assert "results.json is damaged" in run("inspect", path, code=3).stderr


def test_what_is_none_of_ours(tmp_path: Path) -> None:
    assert "is no output of vilu" in run("inspect", tmp_path, code=3).stderr
    (tmp_path / "notes.txt").write_text("x")
    assert "cannot be checked by itself" in run("inspect", tmp_path / "notes.txt", code=3).stderr


@pytest.mark.parametrize("beginning", [b"", b" \n", codecs.BOM_UTF8])
def test_a_list_for_other_programs_is_named(beginning: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_bytes(beginning + b'[{"data": {}}]')
    assert "begins like a JSON list" in run("inspect", path, code=3).stderr


def test_no_pipe_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tasks.json")
    assert "tasks.json is missing" in run("inspect", tmp_path, code=3).stderr


def test_a_table_of_answers_with_the_columns_of_a_list_is_shown(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("id,path,stream,label,score_a\na,a.png,x,cat,0.5\n")
    assert "table of answers, 1 row" in run("inspect", table).stdout


@pytest.mark.parametrize("kind", [False, -1e300, [[]], None])
def test_a_kind_that_is_no_text_is_refused(kind: object, tmp_path: Path) -> None:
    write_json(tmp_path / "why.json", {"schema_version": 2, "kind": kind})
    done = command_line("inspect", tmp_path / "why.json")
    assert done.returncode == DataError.exit_code
    assert "why.json is damaged: its kind is no text. Make it again." in done.stderr
