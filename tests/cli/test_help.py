"""Test the commands' help, and the flags that every command has before and after its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.command import run
from vilu.cli.app import app
from vilu.cli.help import GROUPS, OPTIONS

ROOT: Any = typer.main.get_command(app)
COMMANDS = [name for name, command in ROOT.commands.items() if not hasattr(command, "commands")]
MOST_NEEDED = 8


def headings(text: str) -> list[str]:
    """Return the group headings in a help text."""
    lines = text.splitlines()
    return [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]


def test_help_lists_the_commands_in_groups() -> None:
    text = run("--help").stdout
    assert headings(text) == [
        "Options",
        "Photos",
        "Embeddings and scores",
        "Guarantees",
        "Share and serve",
        "Look up",
        "From other packages",
    ]
    photos = text.split("Photos:")[1].split("Embeddings and scores:")[0]
    assert [line.split()[0] for line in photos.split("\n") if line[:3].strip()] == [
        "triage",
        "review",
        "labels",
        "demo",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_options_stand_in_known_groups_with_few_first(name: str) -> None:
    text = run(name, "--help").stdout
    groups = headings(text)
    assert set(groups) <= set(GROUPS)
    assert groups == [group for group in GROUPS if group in groups]
    options = [p for p in ROOT.commands[name].params if p.param_type_name == "option"]
    assert sum(option.rich_help_panel in {None, OPTIONS} for option in options) <= MOST_NEEDED


@pytest.mark.parametrize("name", COMMANDS)
def test_values_are_named_by_what_they_are(name: str) -> None:
    text = run(name, "--help").stdout
    assert "<str>" not in text
    assert "<path>" not in text
    assert "range>" not in text
    assert "list[" not in text
    assert "x>=" not in text
    assert "<=x" not in text


@pytest.mark.parametrize("words", [["--json", "list", "metrics"], ["list", "metrics", "--json"]])
def test_flags_stand_before_and_after_a_command(words: list[str]) -> None:
    assert any(row["name"] == "auroc" for row in json.loads(run(*words).stdout))


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_hides_the_next_step_wherever_it_stands(place: str) -> None:
    words = ["list", "datasets"]
    assert "vilu datasets list" in run(*words).stderr
    quiet = ["-q", *words] if place == "before" else [*words, "-q"]
    assert run(*quiet).stderr == ""


def test_a_command_that_writes_names_its_files_as_json(tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    table.write_text("path,label\na.png,cat\n", encoding="utf-8")
    done = run("labels", table, "-o", tmp_path / "labels.csv", "--json")
    assert json.loads(done.stdout) == {"outputs": [str(tmp_path / "labels.csv")]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fitt"], "no such command 'fitt'. Did you mean 'fit'? See vilu --help."),
        (["fit"], "missing argument 'STORES'. See vilu fit --help."),
        (["datasets"], "missing command. See vilu datasets --help."),
        (["list", "metrix"], "'metrix' is not one of 'predictors', 'backbones'"),
        (["--jsn", "list"], "no such option: --jsn. Did you mean '--json'? See vilu --help."),
        (["list", "predictor"], "'metrics'. Did you mean 'predictors'? See vilu list --help."),
    ],
)
def test_wrong_command_lines_have_one_style_of_error(words: list[str], message: str) -> None:
    (line,) = run(*words, code=2).stderr.splitlines()
    assert line.startswith("vilu: error: ")
    assert message in line
