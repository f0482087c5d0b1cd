"""Test progress, warnings and errors as people see them."""

from __future__ import annotations

import logging
import warnings

import pytest

from tests.command import run
from vilu.cli import console
from vilu.progress import reporting, track


def test_a_task_is_silent_without_a_reporter(capsys: pytest.CaptureFixture[str]) -> None:
    with track("work", 3, "steps") as task:
        task.advance(3, "note")
    assert capsys.readouterr() == ("", "")


def test_lines_show_count_total_rate_and_note(
    monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 5.0, 20.0, 20.0, 25.0, 27.0, 30.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    caplog.set_level(logging.INFO, "vilu")
    with reporting(console.LogReporter()), track("embed", 100, "images") as task:
        task.advance(10)
        task.advance(30, "2 errors")
        task.advance(20)
    assert caplog.messages == [
        "embed 40/100 images, 2 images/s, 2 errors",
        "embed 60/100 images, 2 images/s",
    ]


def test_bars_draw_to_stderr_and_stop(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(console.BarReporter()), track("embed", 4, "images") as task:
        task.advance(4)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4" in err
    assert "images/s" in err


def test_warnings_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with console.show_warnings():
        warnings.simplefilter("always")
        warnings.warn("look here", stacklevel=1)
        warnings.warn("not for users", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "vilu: warning: look here\n"


def test_hostile_names_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_to_stderr("error", "file \x1b[2Jgone.jpg")
    assert capsys.readouterr().err == "vilu: error: file \\x1b[2Jgone.jpg\n"


def test_an_interrupt_before_a_command_has_begun_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(**_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vilu.cli.app", interrupted)
    assert run("list", "predictors", code=130).stderr == ""


def test_no_name_can_begin_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_to_stderr("error", "key a\nvilu: all is well")
    console.set_verbosity(console.OutputFlags())
    console.log_next_step("key a\n\x9b2J")
    assert (
        capsys.readouterr().err == "vilu: error: key a\\nvilu: all is well\nvilu: key a\\n\\x9b2J\n"
    )


def test_a_table_clips_and_escapes_its_cells() -> None:
    heading, line = console.format_columns([{"class": "x" * 3000, "n": "1\n2"}]).split("\n")
    assert heading.split() == ["class", "n"]
    assert line == "x" * 119 + "…  1\\n2"


def test_a_bar_within_a_bar_is_not_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar within another bar must not be drawn, because Rich refuses two bars at a time.

    While images are embedded, a model that embeds captions also encodes texts.
    """
    with reporting(console.BarReporter()), track("embed", 4, "images") as task:
        with track("encode texts", 2, "texts") as inner:
            inner.advance(2)
        task.advance(4)
    with reporting(console.BarReporter()), track("again", 1, "steps") as task:
        task.advance(1)
    err = capsys.readouterr().err
    assert "4/4" in err
    assert "1/1" in err
    assert "encode" not in err


def test_columns_with_lines_below_their_rows() -> None:
    rows = [
        {"a": "1", "text": "long", "b": "x", "more": ""},
        {"a": "22", "text": "longer", "b": "y", "more": "z"},
    ]
    expected = "a   b\n1   x\n    long\n22  y\n    longer\n    z"
    assert console.format_columns(rows, keys_below=("text", "more")) == expected


def test_columns_are_aligned() -> None:
    assert (
        console.format_columns([{"a": "1", "name": "x"}, {"a": "22", "name": "y"}])
        == "a   name\n1   x\n22  y"
    )
