"""The command line: each command calls one public function; stdout is the result, stderr the log and the progress.

Exit codes: 0 done, 2 usage (a path that is not there, a place that is taken), 3 data, 4 the risk
target is out of reach, 5 a model is missing, 6 artefacts do not fit together, 7 storage, 8 a
guarantee is void (`vilu monitor`), 75 busy, 130 Ctrl-C, 141 nobody reads stdout any more, 143
SIGTERM; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import typer

from vilu.cli.app import app
from vilu.cli.console import INTERRUPTED, TERMINATED, careful_output, complain, show_warnings
from vilu.errors import StorageError, UsageError, ViLUError
from vilu.process import tune_process
from vilu.text import printable

MISUSE: type[Any] = typer.BadParameter.__bases__[0]
"""What typer raises for a command line that cannot be; it gives it no name."""


def entry() -> None:
    """The command as a process, which ends with its work: to take the libraries down would take up to a second more."""
    tune_process()
    code = 1

    def leave() -> None:
        logging.shutdown()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)

    gc.set_threshold(
        50_000
    )  # imports make a million objects, none of them garbage: 0.1 s of looking for it
    atexit.register(
        leave
    )  # threads have been waited for then, and what is registered later has been done
    try:
        main()
    except SystemExit as left:
        code = int(left.code or 0)
        raise


def main() -> None:
    """The command line of this process; raises SystemExit with the exit code."""
    given = (sys.stdout, sys.stderr)  # None where they are closed (2>&-)
    sys.stdout, sys.stderr = (one or open(os.devnull, "w", encoding="utf-8") for one in given)  # noqa: PTH123, SIM115
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _again
    with careful_output():
        code = _run()
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # the work is over: what comes now ends the process, silently
            signal.signal(number, signal.SIG_DFL)
        sys.exit(code)


def _run() -> int:
    """The exit code."""
    try:
        with show_warnings():
            return int(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:  # before a command has begun, which would say what is kept
        return INTERRUPTED
    except MISUSE as error:
        told = io.StringIO()
        error.show(told)
        sys.stderr.write(printable(told.getvalue(), "\n"))
        return UsageError.exit_code
    except ViLUError as error:
        complain("error", str(error))
        return error.exit_code
    except OSError as error:
        if error.filename is None:  # no file of the user's, but a bug
            raise
        complain("error", f"the file system refused {error.filename}: {error.strerror}.")
        return StorageError.exit_code


def _again(lost: Any) -> None:  # noqa: ANN401 - its type has no name
    """A signal that came while a library could not pass on what it raises comes again; all else is told as ever."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if number is None:
        sys.__unraisablehook__(lost)
    else:
        threading.Timer(0.01, os.kill, [os.getpid(), number]).start()


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Unwind as Ctrl-C does, so that locks and temporary files go."""
    sys.exit(TERMINATED)
