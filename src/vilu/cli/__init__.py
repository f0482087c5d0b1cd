"""The command line: each command calls a public function.

A command writes the result to stdout, and writes the log and the progress to stderr.

Exit codes:

- 0: done
- 2: wrong usage, such as a missing path or an output path already in use
- 3: bad data
- 4: the risk target cannot be reached
- 5: a model is missing
- 6: artefacts do not belong together
- 7: the storage failed
- 8: a guarantee is void (`vilu monitor`)
- 75: another process holds the lock
- 130: Ctrl-C
- 141: the reader closed stdout
- 143: SIGTERM

Any other exit code means a bug. Then a traceback is printed.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import signal
import sys
import threading
from types import FrameType
from typing import Any, Final, TextIO

import typer

from vilu.artifacts.disk import advice_to_owner
from vilu.cli.app import app
from vilu.cli.console import (
    INTERRUPTED_EXIT_CODE,
    TERMINATED_EXIT_CODE,
    checked_output,
    print_to_stderr,
    show_warnings,
)
from vilu.errors import StorageError, UsageError, ViLUError, did_you_mean
from vilu.process import keep_ray_on_this_machine, tune_process

OPTIONS_HINT_PATTERN: Final = re.compile(r" \(Possible options: .*\)$")
"""End of typer's message about an unknown option, such as " (Possible options: --key, --keep)"."""
UNKNOWN_CHOICE_PATTERN: Final = re.compile(r"'(?P<given>[^']*)' is not one of (?P<known>.*)")
"""typer's message about an unknown value, such as "'cup' is not one of 'cpu', 'cuda'"."""
QUOTED_VALUE_PATTERN: Final = re.compile(r"'([^']+)'")
"""A value in the group ``known`` of ``UNKNOWN_CHOICE_PATTERN``, such as "'cpu'"."""
TYPER_USAGE_ERROR: type[Any] = typer.BadParameter.__bases__[0]
"""Class of typer's exceptions for an invalid command line.

typer does not export this class. It exports the subclass ``BadParameter``.
"""

MEMORY_ERRORS = (MemoryError, ImportError, RuntimeError)
"""Exceptions for a lack of memory. ImportError and RuntimeError may also have other reasons."""

MEMORY_ERROR_PHRASES = ("failed to map segment", "can't allocate memory", "can't start new thread")
"""Words for a lack of memory in messages from the library loader, torch and Python."""


def entry() -> None:
    """Run the command line as a process's main program.

    At the end, the process exits without the libraries' clean-up. The clean-up would take up to a
    second.
    """
    tune_process()
    keep_ray_on_this_machine()
    exit_code = 1  # stays 1 if ``main`` fails with a traceback

    def flush_and_exit() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(exit_code)

    # Imports make a million objects and no garbage. With a high threshold, the garbage collector
    # searches these objects less often, which saves 0.1 s.
    gc.set_threshold(50_000)
    # atexit runs functions in reverse order, after all threads have ended. ``flush_and_exit`` is
    # registered first and so runs last.
    atexit.register(flush_and_exit)
    try:
        main()
    except SystemExit as system_exit:
        exit_code = int(system_exit.code or 0)
        raise


def main() -> None:
    """Run this process's command line. Raise SystemExit with the exit code."""
    sys.stdout = _usable_stream(sys.stdout)
    sys.stderr = _usable_stream(sys.stderr)
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _resend_lost_signal
    with checked_output():
        exit_code = _run_command()
        # The work is done, so a signal from now on ends the process without a message.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.exit(exit_code)


def _usable_stream(stream: TextIO | None) -> TextIO:
    """Return ``stream``. For None, return a stream to nowhere.

    Python sets ``sys.stderr`` to None if the caller closed stderr, as a shell does for ``2>&-``.
    """
    if stream is not None:
        return stream
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123


def _run_command() -> int:
    """Run the command and return the exit code."""
    try:
        with show_warnings():
            return int(app(standalone_mode=False) or 0)  # typer raises errors, and prints none
    except KeyboardInterrupt:  # a command that had begun has already printed a message
        return INTERRUPTED_EXIT_CODE
    except TYPER_USAGE_ERROR as error:
        message = _usage_error_message(error)
        print_to_stderr("error", message)
        return UsageError.exit_code
    except ViLUError as error:
        print_to_stderr("error", str(error))
        return error.exit_code
    except MEMORY_ERRORS as error:
        if not _is_about_memory(error):
            raise
        details = str(error) or "no details"
        print_to_stderr(
            "error", f"there is not enough memory ({details}).{_memory_limit_sentence()}"
        )
        return StorageError.exit_code
    except OSError as error:
        if error.filename is None:  # an error without a file is a bug
            raise
        advice = advice_to_owner(error)
        print_to_stderr(
            "error", f"the file system refused {error.filename}: {error.strerror}.{advice}"
        )
        return StorageError.exit_code


def _usage_error_message(error: Any) -> str:  # noqa: ANN401 - typer exports no name for its type
    """Return a message about a wrong command line. The last sentence names the help command."""
    message = error.format_message().replace("Value error, ", "")  # without pydantic's prefix
    message = OPTIONS_HINT_PATTERN.sub("", message)
    sentence = f"{message[:1].lower()}{message[1:]}"
    if not sentence.endswith((".", "?")):
        sentence += "."
    sentence += _suggestion(error, message)
    command = "vilu"
    if error.ctx is not None:
        # the root may have another name than "vilu", such as "python -m vilu.cli"
        program = error.ctx.find_root().command_path
        command += error.ctx.command_path.removeprefix(program)
    return f"{sentence} See {command} --help."


def _suggestion(error: Any, message: str) -> str:  # noqa: ANN401 - typer exports no name for it
    """Return a question such as " Did you mean 'cpu'?". Return "" if no known word is similar."""
    similar_options = getattr(error, "possibilities", None)
    if similar_options:
        return did_you_mean(error.option_name, similar_options)
    unknown_choice = UNKNOWN_CHOICE_PATTERN.search(message)
    if unknown_choice is not None:
        known_values = QUOTED_VALUE_PATTERN.findall(unknown_choice["known"])
        return did_you_mean(unknown_choice["given"], known_values, cutoff=0.5)
    return ""


def _is_about_memory(error: Exception) -> bool:
    """Return whether the error is about missing memory for a value, a library or a thread."""
    if isinstance(error, MemoryError):
        return True
    return any(phrase in str(error) for phrase in MEMORY_ERROR_PHRASES)


def _memory_limit_sentence() -> str:
    """State the memory limit of this process in a sentence. Return "" if there is no limit."""
    if sys.platform == "win32":
        return ""
    import resource

    max_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if max_bytes == resource.RLIM_INFINITY:
        return ""
    return f" `ulimit -v` allows this process {max_bytes // 2**20:,} MiB."


def _resend_lost_signal(unraisable: Any) -> None:  # noqa: ANN401 - Python exports no type
    """Send SIGINT or SIGTERM again if the signal's exception was lost.

    SIGINT raises KeyboardInterrupt, and SIGTERM raises SystemExit. Code that cannot raise
    exceptions, such as a destructor or a C callback, loses them. Python reports all other lost
    exceptions as usual.
    """
    signal_of_exception = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    signal_number = signal_of_exception.get(unraisable.exc_type)
    if signal_number is None:
        sys.__unraisablehook__(unraisable)
    else:
        # Send the signal after a short time. By then, the main thread has left the code that lost
        # the exception.
        timer = threading.Timer(0.01, os.kill, [os.getpid(), signal_number])
        timer.start()


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Raise SystemExit on SIGTERM, so that locks and temporary files are removed."""
    sys.exit(TERMINATED_EXIT_CODE)
