"""What commands share: messages, progress, tables and where data come from."""

from __future__ import annotations

import errno
import io
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar, cast

import typer
from typer import Option

from vilu.errors import StorageError, UsageError
from vilu.progress import Reporter, Silence, Task
from vilu.text import aligned, printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from vilu.artifacts.paths import Kind
    from vilu.embeddings.pairs import Pools
    from vilu.embeddings.source import EmbeddingSource

LOG = logging.getLogger("vilu")
LOG_EVERY = 10.0  # seconds between progress lines where there is no terminal
MOST_SEED = 2**63 - 1
MOST_RESAMPLES = 10**6
MOST_WORKERS = 4096
"""Larger numbers on a command line are slips of the finger."""

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
    """Standard output that fails with our errors: StorageError where it is full, exit code 141 where nobody reads."""

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
    return Bars() if sys.stderr.isatty() else Lines()


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
    """Rich bars with count, rate and time left; the screen belongs to them only while a task is under way."""

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
        total = "" if self.total is None else f"/{self.total:,.0f}"
        note = f", {self.note}" if self.note else ""
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
    """Claim the file for a copy of what a command prints, if one is asked for, and give what has it written."""
    if output is None:
        return lambda _: None
    from vilu.artifacts.paths import (  # late: `vilu --help` does without pydantic
        claim_file,
        inputs_of,
    )

    inputs = inputs_of(*read, **settings)
    if claim_file(output, kind, inputs, overwrite=overwrite):
        return lambda _: nothing_to_do(output)
    return lambda write: write(output, inputs)


def existing(value: Any) -> Any:  # noqa: ANN401 - a path, several, or None, as typer has it
    """What a command is to read; the one place that refuses a path that is not there."""
    for path in value if isinstance(value, list | tuple) else [value]:
        if isinstance(path, Path) and not path.exists():
            raise UsageError(f"{path} does not exist.")
    return value


def path_argument(text: str, metavar: str | None = None) -> Any:  # noqa: ANN401 - typer's own
    """A path, or several, that a command reads, with its line of help."""
    return typer.Argument(help=text, metavar=metavar, callback=existing)


def path_option(text: str, metavar: str | None = None) -> Any:  # noqa: ANN401 - typer's own
    """The same as a flag."""
    return Option(help=text, metavar=metavar, callback=existing)


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
        command.wanted = kinds  # type: ignore[attr-defined]
        return command

    return mark


def goes_on(command: Command) -> Command:
    """Says of a command that, stopped and given again, it does the rest of its work."""
    command.goes_on = True  # type: ignore[attr-defined]
    return command


def kind_of(path: Path) -> str | None:
    """What lies at a path, by the names of its files; None where that is no folder of ours."""
    if (path / "predictor.json").is_file():
        return PREDICTOR
    if (path / "run.json").is_file():
        return SCORES if (path / "scores").is_dir() else STORE
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
        swapped = " They are in the wrong order." if len(wrong) == len(PAIR) else ""
        raise UsageError(f"{', and '.join(wrong)}.{swapped} See vilu {command} --help.")


def pairs_of(option: str, texts: Sequence[str] | None, form: str = "NAME=KEY") -> dict[str, str]:
    """What was given as NAME=KEY, ... as a dictionary."""
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


def columns(rows: list[dict[str, str]], below: Sequence[str] = ()) -> str:
    """Rows of one shape as aligned text; what ``below`` names gets a line of its own under its row, if any."""
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


def complete_methods(incomplete: str) -> list[str]:
    """Names of methods, for the shell."""
    from vilu.predictors.contract.catalogue import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


def complete_backbones(incomplete: str) -> list[str]:
    """Names of backbones, and what names begin with, for the shell."""
    from vilu.backbones.catalog import BACKBONES

    return [name for name in BACKBONES.names() if name.startswith(incomplete)]


def complete_datasets(incomplete: str) -> list[str]:
    """Names of data sets, for the shell."""
    from vilu.datasets.known import KNOWN

    return [name for name in KNOWN if name.startswith(incomplete)]


Predictor = Annotated[Path, path_argument("Folder that `vilu fit` or `vilu convert` wrote.")]
Data = Annotated[
    Path,
    path_argument(
        "Store that `vilu embed` or `vilu import` wrote, or precomputed embeddings in shards as LAION's."
    ),
]
Overwrite = Annotated[
    bool,
    Option(
        "--overwrite",
        help="Make it anew in place of what vilu made there; what is not vilu's is never touched.",
    ),
]
Fold = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Reading:
    """How stores are read; every field is a flag of the commands that have ``@reads``."""

    pool_size: Annotated[
        int | None,
        Option(
            "--pool-size", min=2, help="Pairs: captions that each image has to choose from. [1024]"
        ),
    ] = None
    direction: Annotated[
        Literal["image_to_text", "text_to_image"],
        Option(help="Pairs: which side is asked for the other."),
    ] = "image_to_text"
    hard: Annotated[
        bool, Option("--hard-negatives", help="Pairs: pools of rows that are alike.")
    ] = False
    near_duplicates: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            metavar="COSINE",
            help="Pairs: captions from this cosine on are the same answer.",
        ),
    ] = None
    fold: Annotated[
        Fold | None,
        Option(help="Pairs: only captions of this fold (60/10/30 % by hash of the caption). [all]"),
    ] = None
    logit_scale: Annotated[
        float | None,
        Option(
            min=0,
            help="Of the model behind precomputed embeddings (100 for CLIP); stores know their own.",
        ),
    ] = None
    second: Annotated[
        Path | None,
        path_option("The same images embedded by a second model, for method duo.", metavar="STORE"),
    ] = None

    @property
    def settings(self) -> dict[str, object]:
        """The flags that say how, for the digest of what a command reads."""
        flags = asdict(self)
        if flags.pop("second") is not None:
            flags["second"] = True
        return flags

    @property
    def read(self) -> list[Path]:
        """What is read beside the stores that a command names."""
        return [] if self.second is None else [self.second]

    @property
    def pools(self) -> Pools | None:
        """None where the flags ask for nothing special, so that class stores are fine."""
        rest = (self.direction, self.hard, self.near_duplicates)
        if self.pool_size is None and rest == ("image_to_text", False, None):
            return None
        from vilu.embeddings.pairs import Pools

        size = Pools.size if self.pool_size is None else self.pool_size
        return Pools(size, *rest)

    def open(self, store: Path, role: Fold | None = None) -> EmbeddingSource:
        """A store; where a fold is asked for, that of a role."""
        return self.open_in(self.pools, store, role)

    def open_both(self, store: Path) -> EmbeddingSource:
        """A store with what the second model says of its rows, where there is one."""
        return self.with_second(self.open(store))

    def with_second(self, data: EmbeddingSource) -> EmbeddingSource:
        """The same with the rows of ``second``."""
        if self.second is None:
            return data
        from vilu.embeddings.two_models import TwoModels
        from vilu.store.reader import open_source

        return TwoModels(data, open_source(self.second))

    def open_in(
        self, pools: Pools | None, store: Path, role: Fold | None = None
    ) -> EmbeddingSource:
        """The same in other pools."""
        from vilu.store.reader import open_source

        fold = self.fold
        if fold is not None and role is not None:
            fold = role
        return open_source(store, pools=pools, fold=fold, logit_scale=self.logit_scale)

    def split_of(self, data: EmbeddingSource) -> str | None:
        """Name of the part of the data that is read; None where the store does not say."""
        from vilu.embeddings.two_models import TwoModels
        from vilu.store.reader import CaptionStore, EmbeddingStore

        if self.fold is not None:
            return self.fold
        first = data.first if isinstance(data, TwoModels) else data
        if isinstance(first, EmbeddingStore | CaptionStore):
            return first.manifest.split
        return None


def reads(command: Callable[..., None], *, without: Collection[str] = ()) -> Callable[..., None]:
    """The command with flags in place of its parameter ``reading``: all but those that may be left out."""
    flags = dict(signature(Reading, eval_str=True).parameters)
    for name in without:
        del flags[name]

    @wraps(command)
    def flagged(**values: Any) -> None:  # noqa: ANN401 - what the flags hold
        reading = Reading(**{name: values.pop(name) for name in flags})
        command(reading=reading, **values)

    expanded: list[Parameter] = []
    for name, parameter in signature(command, eval_str=True).parameters.items():
        if name == "reading":
            expanded += flags.values()
        else:
            expanded.append(parameter)
    vars(flagged)["__signature__"] = Signature(expanded)  # what typer makes the command line from
    return flagged


Json = Annotated[bool, Option("--json", help="Print JSON instead of text.")]
RowsJson = Annotated[bool, Option("--json", help="Print tidy rows as JSON instead of a table.")]
RowsFile = Annotated[
    Path | None, Option("--output", "-o", help="Also write the rows, .json, .parquet or .csv.")
]
JsonFile = Annotated[
    Path | None, Option("--output", "-o", help="Also write the JSON to this file.")
]
