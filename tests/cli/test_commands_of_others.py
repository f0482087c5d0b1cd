"""Test commands that other packages add to vilu."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from vilu.cli.app import add_plugin_command, app
from vilu.errors import UsageError


def test_a_command_with_a_flag_of_vilu_stops_no_other_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clash(quiet: bool = False) -> None:
        """Do something quietly."""

    module = ModuleType("another_package")
    vars(module)["clash"] = clash
    monkeypatch.setitem(sys.modules, "another_package", module)
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    add_plugin_command(EntryPoint("clash", "another_package:clash", "vilu.commands"))
    whole = typer.main.get_command(app)
    assert CliRunner().invoke(app, ["list", "metrics"]).exit_code == 0
    assert "clash" in whole.commands
    failed = CliRunner().invoke(app, ["clash", "--quiet"])
    assert isinstance(failed.exception, UsageError)
    assert "parameters that every command of vilu gets: quiet" in str(failed.exception)
