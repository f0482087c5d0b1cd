"""Run the command line of ``vilu`` in this process or in a new one."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import typer

from vilu.cli import main

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
"""The path for a process that needs the fakes, and this source whatever is installed."""

made_once = functools.cache(
    typer.main.get_command
)  # typer builds this from 27 functions in 60 ms, so do it once


def run(*args: object, code: int = 0, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run the command in this process, and require this exit code."""
    done = command_line(*args, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done


def command_line(*args: object, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run the command in this process, because importing torch takes longer than most commands.

    If the command line does not turn an exception into a message, the exception passes through.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.getsignal(number))
        stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        logger = logging.getLogger("vilu")
        stack.callback(logger.setLevel, logger.level)
        stack.callback(logger.handlers.__setitem__, slice(None), logger.handlers[:])
        stack.enter_context(warnings.catch_warnings())
        warnings.resetwarnings()  # pytest makes errors from warnings
        stack.enter_context(patch.object(typer.main, "get_command", made_once))
        stack.enter_context(patch.object(sys, "argv", ["vilu", *map(str, args)]))
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as left:
            ended = left.code or 0
        else:
            ended = 0
    return CompletedProcess([*map(str, args)], int(ended), out.getvalue(), err.getvalue())


def command(*args: object) -> list[str]:
    """Return the words that start the command in a new process."""
    return [sys.executable, "-m", "vilu.cli", *map(str, args)]


def run_process(
    *args: object, code: int = 0, cwd: Path | None = None, **env: str
) -> CompletedProcess[str]:
    """Run the command in a new process with more environment variables."""
    env, words = {**os.environ, **env}, command(*args)
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done
