"""What docs/stability.md promises to keep: names and commands only come, and go only with notice."""

from __future__ import annotations

from pathlib import Path

import typer

import vilu
from vilu.cli.app import app


def commands(group: object, above: str = "vilu") -> set[str]:
    """Every command with the words before it."""
    found: set[str] = set()
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, f"{above} {name}") or {f"{above} {name}"}
    return found


def test_what_was_public_is_public() -> None:
    """A release adds its `names()` to the file; a line is taken out when its notice is over."""
    recorded = set(Path(__file__).with_name("public_names.txt").read_text(encoding="utf-8").splitlines())
    assert len(recorded) > 80
    assert recorded - names() == set()


def names() -> set[str]:
    """All there is now."""
    python = {f"vilu.{name}" for name in vilu.__all__} | {f"vilu.metrics.{name}" for name in vilu.metrics.__all__}
    return python | commands(typer.main.get_command(app))
