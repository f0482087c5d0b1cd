"""The command line: each command calls one public function.

stdout is the result, stderr the log and the progress.

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
from typing import Any, TextIO

import typer

from vilu.cli.app import app
from vilu.cli.console import INTERRUPTED, TERMINATED, careful_output, complain, show_warnings
from vilu.errors import StorageError, UsageError, ViLUError
from vilu.process import tune_process
from vilu.text import printable

MISUSE: type[Any] = typer.BadParameter.__bases__[0]
"""What typer raises for a command line that cannot be; it gives it no name."""


def entry() -> None:
    """The command as a process, which ends with its work.

    The libraries are not taken down, which would take up to a second more.
    """
    tune_process()
    code = 1

    def leave() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)

    # imports make a million objects, none of them garbage: 0.1 s of looking for it
    gc.set_threshold(50_000)
    # threads have been waited for then, and what is registered later has been done
    atexit.register(leave)
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
        raise


def main() -> None:
    """The command line of this process; raises SystemExit with the exit code."""
    sys.stdout = _open_stream(sys.stdout)
    sys.stderr = _open_stream(sys.stderr)
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _again
    with careful_output():
        code = _run()
        # the work is over: what comes now ends the process, silently
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.exit(code)


def _open_stream(stream: TextIO | None) -> TextIO:
    """The stream; where it is closed (``2>&-``), Python has None, and nobody reads the new one."""
    if stream is not None:
        return stream
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123


def _run() -> int:
    """The exit code."""
    try:
        with show_warnings():
            return int(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:  # before a command has begun, which would say what is kept
        return INTERRUPTED
    except MISUSE as error:
        message = io.StringIO()
        error.show(message)
        sys.stderr.write(printable(message.getvalue(), "\n"))
        return UsageError.exit_code
    except ViLUError as error:
        complain("error", str(error))
        return error.exit_code
    except OSError as error:
        if error.filename is None:  # no file of the user's, but a bug
            raise
        complain("error", f"the file system refused {error.filename}: {error.strerror}.")
        return StorageError.exit_code


def _again(failure: Any) -> None:  # noqa: ANN401 - its type has no name
    """Send a signal again that came while a library could not pass on what it raises.

    Python reports every other failure as ever.
    """
    signals = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    number = signals.get(failure.exc_type)
    if number is None:
        sys.__unraisablehook__(failure)
    else:
        threading.Timer(0.01, os.kill, [os.getpid(), number]).start()


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Unwind as Ctrl-C does, so that locks and temporary files go."""
    sys.exit(TERMINATED)
