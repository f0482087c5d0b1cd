"""What commands share: messages, progress, tables and where data come from."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import typer

from vilu.errors import StorageError, UsageError
from vilu.progress import Reporter, Silence, Task
from vilu.text import aligned, printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from vilu.artifacts.paths import Kind

LOG = logging.getLogger("vilu")
LOG_EVERY = 10.0  # seconds between progress lines where there is no terminal
# exit codes: 128 and the number of SIGINT, of SIGPIPE, of SIGTERM
INTERRUPTED = 130
PIPE_CLOSED = 141
TERMINATED = 143


def complain(level: str, message: str) -> None:
    """One line on stderr; control characters of hostile names are escaped."""
    with suppress(OSError):  # where stderr is gone nobody can be told; the exit code still says it
        sys.stderr.write(f"vilu: {level}: {printable(message)}\n")


class Escaping(logging.Formatter):
    """One line for each record, in which no name can steer the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The message; a traceback would come after it as it is."""
        return printable(super().formatMessage(record))


class CarefulOutput:
    """Standard output that fails with our errors.

    It raises StorageError where the disk is full, and exits with code 141 where nobody reads.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the stream has
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write; what the encoding lacks is escaped."""
        if text == "":  # which typer writes to try the stream, and keeps the answer to itself
            return 0
        with self._judged():
            try:
                return self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Flush."""
        with self._judged():
            self.stream.flush()

    @contextmanager
    def _judged(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                # or what is left would fail again at the very end
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if error.errno == errno.EPIPE:
                raise SystemExit(PIPE_CLOSED) from error
            raise StorageError(f"cannot write to stdout: {error.strerror or error}.") from error


@contextmanager
def careful_output() -> Iterator[None]:
    """A block in which ``print`` and ``typer.echo`` write to a ``CarefulOutput``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a path is printed as the bytes that it is
        sys.stdout.reconfigure(errors="surrogateescape")
    with redirect_stdout(cast("TextIO", CarefulOutput(sys.stdout))):
        yield


@contextmanager
def show_warnings() -> Iterator[None]:
    """Python warnings as one readable line each, without a source line."""

    def show(
        message: Warning | str, category: type[Warning], *_where: object, **_more: object
    ) -> None:
        if issubclass(category, UserWarning):
            complain("warning", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def set_verbosity(*, verbose: bool, quiet: bool) -> None:
    """-v shows debugging messages of vilu, -q only warnings."""
    level = logging.INFO
    if verbose:
        level = logging.DEBUG
    elif quiet:
        level = logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(Escaping("vilu: %(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(level)


def make_reporter(*, quiet: bool) -> Reporter | None:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing with -q."""
    if quiet:
        return None
    if sys.stderr.isatty():
        return Bars()
    return Lines()


class Bar:
    """A task on a rich bar."""

    def __init__(
        self, progress: Progress, description: str, total: float | None, unit: str
    ) -> None:
        self.progress = progress
        self.id = progress.add_task(description, total=total, unit=unit, note="")

    def advance(self, steps: float, note: str = "") -> None:
        """Move the bar."""
        self.progress.update(self.id, advance=steps, note=note)


class Bars:
    """Rich bars with count, rate and time left.

    The screen belongs to them only while a task is under way.
    """

    shown: Bar | None = None

    def start(self, description: str, total: float | None, unit: str) -> Task:
        """Show a new bar; a task within another has none."""
        if self.shown is not None:
            return Silence()
        from rich import progress as bars
        from rich.console import Console
        from rich.text import Text

        class Speed(bars.ProgressColumn):
            def render(self, task: bars.Task) -> Text:
                speed = task.finished_speed or task.speed or 0
                return Text(f"{speed:,.0f} {task.fields['unit']}/s")

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
        self.shown = Bar(progress, description, total, unit)
        return self.shown

    def finish(self, task: Task) -> None:
        """Leave the bar as it stands."""
        if isinstance(task, Bar):
            task.progress.stop()
            self.shown = None


class LoggedTask:
    """A task that is logged now and then."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.logged_done = 0.0
        self.note = ""
        self.started = time.monotonic()
        self.logged = self.started

    def advance(self, steps: float, note: str = "") -> None:
        """Count, and log when ten seconds have passed."""
        self.done += steps
        self.note = note
        if time.monotonic() - self.logged >= LOG_EVERY:
            self.log()

    def log(self) -> None:
        """Log the count and the rate."""
        self.logged = time.monotonic()
        self.logged_done = self.done
        seconds = max(self.logged - self.started, 1e-9)
        total = ""
        if self.total is not None:
            total = f"/{self.total:,.0f}"
        note = ""
        if self.note:
            note = f", {self.note}"
        count = f"{self.done:,.0f}"
        rate = f"{self.done / seconds:,.0f} {self.unit}/s"
        LOG.info("%s %s%s %s, %s%s", self.description, count, total, self.unit, rate, note)


class Lines:
    """For pipes and logs."""

    def start(self, description: str, total: float | None, unit: str) -> LoggedTask:
        """Begin to count."""
        return LoggedTask(description, total, unit)

    def finish(self, task: Task) -> None:
        """Log how it ended, if it took two seconds and the last line did not say it."""
        if not isinstance(task, LoggedTask) or task.done == task.logged_done:
            return
        if time.monotonic() - task.started > 2:
            task.log()


def next_step(message: str) -> None:
    """The closing line of a command."""
    LOG.info("%s", printable(message))  # a name that no handler could write


def shell(*words: object) -> str:
    """A command that can be pasted into a shell."""
    return shlex.join(map(str, words))


def nothing_to_do(output: Path) -> None:
    """The closing line of a command that found its result."""
    LOG.info("%s holds what the same inputs gave: there is nothing to do", output)


def keeping(
    output: Path | None, kind: Kind, read: Iterable[Path], *, overwrite: bool, **settings: object
) -> Callable[[Callable[[Path, str], None]], None]:
    """Claim the file for a copy of what a command prints, if one is asked for.

    What is returned takes the function that writes the copy to a path, with the digest of all that
    was read, and calls it unless no copy is wanted or the same copy is there.
    """
    inputs = ""
    is_there = False
    if output is not None:
        # late: `vilu --help` does without pydantic
        from vilu.artifacts.paths import claim_file, inputs_of

        inputs = inputs_of(*read, **settings)
        is_there = claim_file(output, kind, inputs, overwrite=overwrite)

    def keep(write: Callable[[Path, str], None]) -> None:
        if output is None:
            return
        if is_there:
            nothing_to_do(output)
        else:
            write(output, inputs)

    return keep


STORE = "a store of embeddings"
PREDICTOR = "a predictor"
SCORES = "scores"
STUDIES = "the output of a benchmark"
PAIR = {"predictor": PREDICTOR, "store": STORE}
BOTH = {**PAIR, "second": STORE}
WANTED: dict[str, dict[str, str]] = {
    "embed": {"source": "images"},
    "import": {"source": "arrays"},
    "fit": {"stores": STORE, "validation": STORE, "init": PREDICTOR, "second": STORE},
    "calibrate": BOTH,
    "score": BOTH,
    "explain": {**BOTH, "train": STORE},
    "evaluate": {"scores": SCORES},
    "monitor": {"predictor": PREDICTOR, "scores": SCORES, "late_labels": SCORES},
    "report": {"run": SCORES, **PAIR},
    "export": {"predictor": PREDICTOR},
    "push": {"predictor": PREDICTOR},
}
"""What lies at the paths that a command reads, by the names of its parameters; arguments first."""

Command = TypeVar("Command", bound=Callable[..., None])


def wants(**kinds: str) -> Callable[[Command], Command]:
    """Says of a command of another package what ``WANTED`` says of ours."""

    def mark(command: Command) -> Command:
        # a function takes attributes, and its type names none
        command.wanted = kinds  # type: ignore[attr-defined]
        return command

    return mark


def goes_on(command: Command) -> Command:
    """Says of a command that, stopped and given again, it does the rest of its work."""
    # a function takes attributes, and its type names none
    command.goes_on = True  # type: ignore[attr-defined]
    return command


def kind_of(path: Path) -> str | None:
    """What lies at a path, by the names of its files; None where that is no folder of ours."""
    if (path / "predictor.json").is_file():
        return PREDICTOR
    if (path / "run.json").is_file():
        if (path / "scores").is_dir():
            return SCORES
        return STORE
    if (path / "cells").is_dir() or (path / "studies").is_dir():
        return STUDIES
    return None


def _paths(value: Any) -> list[Path]:  # noqa: ANN401 - one path, several, or None
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [Path(path) for path in value]
    return [Path(value)]


def require_kinds(command: str, values: Mapping[str, Any], wanted_kinds: Mapping[str, str]) -> None:
    """Refuse an empty path, and one with another kind of thing than the command reads there."""
    is_empty = Path() in values.values() or values.get("source") == ""
    if "" in sys.argv and is_empty:
        raise UsageError(
            "an argument is empty where a path should be. Write . if this folder is meant."
        )
    wrong = []
    for name, wanted in wanted_kinds.items():
        for path in _paths(values.get(name)):
            kind = kind_of(path)
            if kind not in {None, wanted}:
                wrong.append(f"{path} is {kind}, where {wanted} should be")
    if wrong:
        swapped = ""
        if len(wrong) == len(PAIR):
            swapped = " They are in the wrong order."
        raise UsageError(f"{', and '.join(wrong)}.{swapped} See vilu {command} --help.")


def pairs_of(option: str, texts: Sequence[str] | None, form: str = "NAME=KEY") -> dict[str, str]:
    """Words of the form NAME=KEY, which an option has several times, as a dictionary."""
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not (name and sign):
            raise UsageError(f"{option} must be {form}. Got {text!r} instead.")
        if name in pairs:
            kind = form.partition("=")[0].lower()
            raise UsageError(f"{option} can name a {kind} only once.")
        pairs[name] = value
    return pairs


def named_paths(*paths: Path | None) -> list[Path]:
    """The paths that a command line names, of those that it may name."""
    return [path for path in paths if path is not None]


def print_result(facts: object, text: str, *, as_json: bool) -> None:
    """Print the result of a command, as JSON or for people."""
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(text)


def columns(rows: list[dict[str, str]], below: Sequence[str] = ()) -> str:
    """Rows of one shape as aligned text.

    Every cell that ``below`` names gets a line of its own under its row, unless it is empty.
    """
    names = [name for name in rows[0] if name not in below]
    cells = [[row[name] for name in names] for row in rows]
    heading, *lines = aligned([names, *cells])
    text = [heading]
    for line, row in zip(lines, rows, strict=True):
        text.append(line)
        for name in below:
            if row[name]:
                text.append(f"    {row[name]}")
    return "\n".join(text)
