"""Functions that all commands share: messages, progress, tables, and checks for input paths."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import typer

from vilu.errors import StorageError, UsageError
from vilu.progress import Reporter, SilentProgress, Task, reporting
from vilu.text import align_columns, escape_unprintable

if TYPE_CHECKING:
    from rich.progress import Progress

    from vilu.artifacts.paths import FileKind

logger = logging.getLogger("vilu")
LOG_INTERVAL_SECONDS = 10.0  # time between a task's log lines, if stderr is no terminal

# Exit codes: 128 + the signal number (SIGINT, SIGPIPE, SIGTERM).
INTERRUPTED_EXIT_CODE = 130
PIPE_CLOSED_EXIT_CODE = 141
TERMINATED_EXIT_CODE = 143


def print_to_stderr(level: str, message: str) -> None:
    """Write a line to stderr. Control characters, for example in file names, are escaped."""
    with suppress(OSError):  # stderr may be closed. Then only the exit code reports the error
        printable_message = escape_unprintable(message)
        sys.stderr.write(f"vilu: {level}: {printable_message}\n")


class EscapingFormatter(logging.Formatter):
    """Log formatter with escaped control characters, so file names cannot control the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Format the message on one line. A traceback after the message is not escaped."""
        message = super().formatMessage(record)
        return escape_unprintable(message)


class CheckedOutput:
    """Standard output. Failed writes raise vilu errors.

    A failed write, such as to a full disk, raises StorageError. A closed pipe exits with code 141.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the stream has
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text. Characters missing in the encoding are escaped."""
        if text == "":
            # Typer writes "" to test the stream, and ignores errors from this test. So the test
            # writes nothing: an error comes only when a real text is written.
            return 0
        with self._convert_write_errors():
            try:
                return self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                escaped = text.encode(encoding, "backslashreplace")
                encodable_text = escaped.decode(encoding)
                return self.stream.write(encodable_text)

    def flush(self) -> None:
        """Write the text in the buffer."""
        with self._convert_write_errors():
            self.stream.flush()

    @contextmanager
    def _convert_write_errors(self) -> Iterator[None]:
        """Raise StorageError for an OSError in the block. For a closed pipe, exit with code 141."""
        try:
            yield
        except OSError as error:
            with suppress(OSError, ValueError), open(os.devnull, "wb") as devnull:  # noqa: PTH123
                # Let the stream write to nowhere. Otherwise Python would write the rest of the
                # buffer at the exit, and fail again.
                os.dup2(devnull.fileno(), self.stream.fileno())
            if error.errno == errno.EPIPE:
                raise SystemExit(PIPE_CLOSED_EXIT_CODE) from error
            raise StorageError(f"cannot write to stdout: {error.strerror or error}.") from error


@contextmanager
def checked_output() -> Iterator[None]:
    """Let ``print`` and ``typer.echo`` write to a ``CheckedOutput`` during the block."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Print a path as its original bytes, even if the bytes are no valid UTF-8.
        sys.stdout.reconfigure(errors="surrogateescape")
    with redirect_stdout(cast("TextIO", CheckedOutput(sys.stdout))):
        yield


@contextmanager
def show_warnings() -> Iterator[None]:
    """Show every UserWarning in the block as one line, and hide other Python warnings."""

    def show(
        message: Warning | str, category: type[Warning], *_where: object, **_more: object
    ) -> None:
        if issubclass(category, UserWarning):
            print_to_stderr("warning", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@dataclass(frozen=True)
class OutputFlags:
    """The flags --verbose, --quiet and --json, which decide on a command's output and logs."""

    verbose: bool = False
    quiet: bool = False
    as_json: bool = False

    def __or__(self, other: OutputFlags) -> OutputFlags:
        """Combine the flags before a command with the flags after the command."""
        return OutputFlags(
            verbose=self.verbose or other.verbose,
            quiet=self.quiet or other.quiet,
            as_json=self.as_json or other.as_json,
        )


OUTPUT_FLAGS: ContextVar[OutputFlags] = ContextVar("OUTPUT_FLAGS")
"""The running command's flags."""


@contextmanager
def with_output_flags(flags: OutputFlags) -> Iterator[None]:
    """Let logs, progress and results follow the flags during the block."""
    set_verbosity(flags)
    token = OUTPUT_FLAGS.set(flags)
    try:
        with reporting(make_reporter(quiet=flags.quiet)):
            yield
    finally:
        OUTPUT_FLAGS.reset(token)


def set_verbosity(flags: OutputFlags) -> None:
    """Set the log level: debug messages with -v, only warnings with -q."""
    level = logging.INFO
    if flags.verbose:
        level = logging.DEBUG
    elif flags.quiet:
        level = logging.WARNING
    handler = logging.StreamHandler()
    formatter = EscapingFormatter("vilu: %(message)s")
    handler.setFormatter(formatter)
    logger.handlers[:] = [handler]
    logger.setLevel(level)


def make_reporter(*, quiet: bool) -> Reporter:
    """Return the reporter for the running command.

    A terminal shows bars. Elsewhere a log line comes every ten seconds. With -q nothing is shown.
    """
    if quiet:
        return SilentProgress()
    if sys.stderr.isatty():
        return BarReporter()
    return LogReporter()


class Bar:
    """A task with a progress bar. The library ``rich`` draws the bar."""

    def __init__(
        self, progress: Progress, description: str, total: float | None, unit: str
    ) -> None:
        self.progress = progress
        self.task_id = progress.add_task(description, total=total, unit=unit, note="")

    def advance(self, steps: float, note: str = "") -> None:
        """Move the bar."""
        self.progress.update(self.task_id, advance=steps, note=note)


class BarReporter:
    """Reporter with a progress bar: count, rate and time left.

    rich draws one bar at a time. After the task, the bar stays on the screen.
    """

    current_bar: Bar | None = None  # the running task's bar

    def start(self, description: str, total: float | None, unit: str) -> Task:
        """Show a new bar. A task gets no bar if another task is running."""
        if self.current_bar is not None:
            return SilentProgress()
        from rich import progress as bars
        from rich.console import Console
        from rich.text import Text

        class Speed(bars.ProgressColumn):
            def render(self, task: bars.Task) -> Text:
                speed = task.finished_speed or task.speed or 0
                speed_with_unit = _format_speed(speed, task.fields["unit"])
                return Text(speed_with_unit)

        progress = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            Speed(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        progress.start()
        self.current_bar = Bar(progress, description, total, unit)
        return self.current_bar

    def finish(self, task: Task) -> None:
        """Stop the bar in the current state."""
        if isinstance(task, Bar):
            task.progress.stop()
            self.current_bar = None


class LoggedTask:
    """A task with a log line about the progress every ten seconds."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.n_done = 0.0  # steps done so far
        self.n_logged = 0.0  # value of ``n_done`` in the last log line
        self.note = ""
        self.start_time = time.monotonic()
        self.log_time = self.start_time  # time of the last log line, at first the start

    def advance(self, steps: float, note: str = "") -> None:
        """Count the steps, and log the count if the last log line is ten seconds old."""
        self.n_done += steps
        self.note = note
        if time.monotonic() - self.log_time >= LOG_INTERVAL_SECONDS:
            self.log()

    def log(self) -> None:
        """Log the count and the rate."""
        self.log_time = time.monotonic()
        self.n_logged = self.n_done
        seconds = max(self.log_time - self.start_time, 1e-9)  # never 0, for the division below
        total = ""
        if self.total is not None:
            total = f"/{self.total:,.0f}"
        note = ""
        if self.note:
            note = f", {self.note}"
        count = f"{self.n_done:,.0f}"
        speed = _format_speed(self.n_done / seconds, self.unit)
        logger.info("%s %s%s %s, %s%s", self.description, count, total, self.unit, speed, note)


def _format_speed(speed: float, unit: str) -> str:
    """Format a speed with the unit: "12 images/s", "0.2 cells/s"."""
    if 0 < speed < 1:
        return f"{speed:.1g} {unit}/s"
    return f"{speed:,.0f} {unit}/s"


class LogReporter:
    """Reporter that logs the progress, for output to a file or pipe."""

    def start(self, description: str, total: float | None, unit: str) -> LoggedTask:
        """Start a task."""
        return LoggedTask(description, total, unit)

    def finish(self, task: Task) -> None:
        """Log the final count, unless it was logged already or the task took under two seconds."""
        if not isinstance(task, LoggedTask):
            return
        is_logged = task.n_done == task.n_logged
        seconds = time.monotonic() - task.start_time
        if seconds > 2 and not is_logged:
            task.log()


def log_next_step(message: str) -> None:
    """Log a command's closing line, usually what to do next."""
    # The message is escaped, because log handlers cannot write file names with invalid UTF-8.
    logger.info("%s", escape_unprintable(message))


def shell_command(*words: object) -> str:
    """Join words to a command for pasting into a shell."""
    return shlex.join(map(str, words))


def log_nothing_to_do(output: Path) -> None:
    """Log a command's closing line if the result already exists."""
    logger.info("%s already has the result of the same inputs: there is nothing to do", output)


ResultWriter = Callable[[Path, str], None]
"""Function ``write(path, inputs)`` that writes a result. ``inputs`` is the input digest."""


def prepare_output(
    output: Path | None,
    kind: FileKind,
    input_paths: Iterable[Path],
    *,
    overwrite: bool,
    **settings: object,
) -> Callable[[ResultWriter], None]:
    """Check the output file before a command's work. Return a function that writes the file.

    Args:
        output: The output file. None if the user asks for no file.
        kind: The result's kind.
        input_paths: Paths that the command reads.
        overwrite: Whether another result may be replaced.
        **settings: All further values that influence the result.

    Returns:
        The function ``write_output(write)``, to be called after the work. ``write_output`` calls
        ``write(path, inputs)``, where ``inputs`` is the digest of ``input_paths`` and ``settings``.
        If the file already has the result for these inputs, ``write_output`` only logs this. If
        there is no output file, ``write_output`` does nothing.
    """
    input_digest = ""
    has_result = False
    if output is not None:
        # This import is here because `vilu --help` must not import pydantic.
        from vilu.artifacts.paths import claim_file, inputs_digest

        input_digest = inputs_digest(*input_paths, **settings)
        has_result = claim_file(output, kind, input_digest, overwrite=overwrite)

    def write_output(write: ResultWriter) -> None:
        if output is None:
            return
        if has_result:
            log_nothing_to_do(output)
        else:
            write(output, input_digest)

    return write_output


# Input kinds, as named in messages.
STORE_KIND = "a store of embeddings"
PREDICTOR_KIND = "a predictor"
SCORES_KIND = "scores"
BENCHMARK_KIND = "the output of a benchmark"
SWAPPED_PAIRS = {(PREDICTOR_KIND, STORE_KIND), (STORE_KIND, PREDICTOR_KIND)}
"""Wanted and actual kinds if the user swaps a predictor and a store."""
# Input kinds for the parameters of several commands.
PREDICTOR_AND_STORE_KINDS = {"predictor": PREDICTOR_KIND, "store": STORE_KIND}
KINDS_WITH_SECOND_STORE = {**PREDICTOR_AND_STORE_KINDS, "second": STORE_KIND}
INPUT_KINDS: dict[str, dict[str, str]] = {
    "embed": {"source": "images"},
    "import": {"source": "arrays"},
    "fit": {
        "stores": STORE_KIND,
        "validation": STORE_KIND,
        "init": PREDICTOR_KIND,
        "second": STORE_KIND,
    },
    "calibrate": KINDS_WITH_SECOND_STORE,
    "score": KINDS_WITH_SECOND_STORE,
    "explain": {**KINDS_WITH_SECOND_STORE, "train": STORE_KIND},
    "evaluate": {"scores": SCORES_KIND},
    "estimate": {"data": STORE_KIND, "predictor": PREDICTOR_KIND, "second": STORE_KIND},
    "monitor": {"predictor": PREDICTOR_KIND, "scores": SCORES_KIND, "late_labels": SCORES_KIND},
    "report": {"run": SCORES_KIND, **PREDICTOR_AND_STORE_KINDS},
    "export": {"predictor": PREDICTOR_KIND},
    "push": {"predictor": PREDICTOR_KIND},
}
"""Maps a command's name to the expected input kinds by parameter.

A message names the inputs in this order: a command's arguments come before the options.
"""

Command = TypeVar("Command", bound=Callable[..., None])

INPUT_KINDS_OF_PLUGINS: dict[str, Mapping[str, str]] = {}
"""For commands from other packages: maps a command function's name to the expected input kinds.

The decorator ``wants_inputs`` adds the entries.
"""

RESUMABLE_COMMANDS: set[str] = set()
"""Names of command functions that continue their work after a stop.

The decorator ``resumable`` adds the names.
"""


def wants_inputs(**kinds: str) -> Callable[[Command], Command]:
    """Return a decorator for another package's command: ``kinds`` are the expected input kinds."""

    def mark(command: Command) -> Command:
        INPUT_KINDS_OF_PLUGINS[command.__name__] = kinds
        return command

    return mark


def resumable(command: Command) -> Command:
    """Mark a command that continues after a stop if the same command runs again."""
    RESUMABLE_COMMANDS.add(command.__name__)
    return command


def input_kind(path: Path) -> str | None:
    """Recognise a vilu folder's kind by the files inside. Return None for any other path."""
    if (path / "predictor.json").is_file():
        return PREDICTOR_KIND
    if (path / "run.json").is_file():
        if (path / "scores").is_dir():
            return SCORES_KIND
        return STORE_KIND
    if (path / "cells").is_dir() or (path / "studies").is_dir():
        return BENCHMARK_KIND
    return None


def _paths_in(value: Any) -> list[Path]:  # noqa: ANN401 - one path, several, or None
    """Return the paths in a parameter's value."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [Path(path) for path in value]
    return [Path(value)]


def require_input_kinds(
    command: str, values: Mapping[str, Any], wanted_kinds: Mapping[str, str]
) -> None:
    """Raise UsageError for an empty path, or for a folder of another kind than expected.

    Args:
        command: The command's name.
        values: The parameter values.
        wanted_kinds: Maps a parameter to the expected input kind.
    """
    # "" and "." give the same ``Path()``. Only the command line shows the difference.
    has_empty_or_dot_path = Path() in values.values()
    has_empty_source = values.get("source") == ""  # `vilu embed` takes the source as a text
    if (has_empty_or_dot_path or has_empty_source) and "" in sys.argv:
        raise UsageError(
            "an argument is empty where a path should be. Write . if this folder is meant."
        )
    wrong_path_texts = []
    wrong_pairs = set()  # for every wrong path, the wanted kind and the actual kind
    for parameter, wanted_kind in wanted_kinds.items():
        for path in _paths_in(values.get(parameter)):
            kind = input_kind(path)
            if kind not in {None, wanted_kind}:
                wrong_path_texts.append(f"{path} is {kind}, where {wanted_kind} should be")
                wrong_pairs.add((wanted_kind, kind))
    if wrong_path_texts:
        advice = ""
        if wrong_pairs == SWAPPED_PAIRS:
            advice = " They are in the wrong order."
        raise UsageError(f"{', and '.join(wrong_path_texts)}.{advice} See vilu {command} --help.")


def parse_pairs(option: str, texts: Sequence[str] | None, form: str = "NAME=KEY") -> dict[str, str]:
    """Parse a repeatable option's values NAME=KEY into a dictionary.

    ``form`` stands for such a value in messages.
    """
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals_sign, value = text.partition("=")
        if not (name and equals_sign):
            raise UsageError(f"{option} must be {form}. Got {text!r} instead.")
        if name in pairs:
            name_in_words, _, _ = form.lower().partition("=")  # NAME=KEY gives "name"
            raise UsageError(f"{option} can name a {name_in_words} only once.")
        pairs[name] = value
    return pairs


def present_paths(*paths: Path | None) -> list[Path]:
    """Return the paths that are not None."""
    return [path for path in paths if path is not None]


def wants_json() -> bool:
    """Return whether the running command prints the result as JSON."""
    return OUTPUT_FLAGS.get(OutputFlags()).as_json


def print_result(facts: object, text: str) -> None:
    """Print a command's result: ``facts`` as JSON with --json, else ``text``."""
    if wants_json():
        document = json.dumps(facts, indent=2)
        typer.echo(document)
    else:
        typer.echo(text)


def print_outputs(*outputs: Path | str) -> None:
    """Print the files, folders or addresses that a command made. With --json, print a list."""
    names = [str(output) for output in outputs]
    text = "\n".join(names)
    print_result({"outputs": names}, text)


def format_columns(rows: list[dict[str, str]], keys_below: Sequence[str] = ()) -> str:
    """Format rows with equal keys as an aligned table. Return "" if there is no row.

    Keys in ``keys_below`` have no column. Instead, such a key's cell is printed on its own line
    below the row, unless the cell is empty.
    """
    if not rows:
        return ""
    names = [name for name in rows[0] if name not in keys_below]
    cells = [[row[name] for name in names] for row in rows]
    heading, *lines = align_columns([names, *cells])
    printed_lines = [heading]
    for line, row in zip(lines, rows, strict=True):
        printed_lines.append(line)
        for name in keys_below:
            if row[name]:
                printed_lines.append(f"    {row[name]}")
    return "\n".join(printed_lines)
