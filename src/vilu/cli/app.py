"""The commands, and the options shared by all commands."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.metadata import EntryPoint
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer import Option

from vilu.cli.catalogues import check_datasets, list_, list_datasets
from vilu.cli.console import (
    INPUT_KINDS,
    INPUT_KINDS_OF_PLUGINS,
    OUTPUT_FLAGS,
    RESUMABLE_COMMANDS,
    TERMINATED_EXIT_CODE,
    OutputFlags,
    print_to_stderr,
    require_input_kinds,
    with_output_flags,
)
from vilu.cli.demo_command import demo
from vilu.cli.estimating import estimate
from vilu.cli.help import (
    COMMON,
    EMBEDDINGS,
    GUARANTEES,
    LOOKING_UP,
    PHOTOS,
    RESEARCH,
    SHARING,
    PanelledCommand,
    PanelledGroup,
)
from vilu.cli.images import embed
from vilu.cli.looking import explain, monitor, report
from vilu.cli.predictors import calibrate, convert, evaluate, export, fit, pull, push, score
from vilu.cli.serving import serve
from vilu.cli.stores import import_, inspect
from vilu.cli.tabulate import completions_, detections_, logits_, words_
from vilu.cli.triage import audit_labels, labels, next_, review, triage
from vilu.errors import UsageError
from vilu.process import use_one_heap
from vilu.registry import (
    entry_points,
    load_entry,
    load_plugin,
    names_of_bench,
    refuse_name_of_bench,
)

app = typer.Typer(
    name="vilu",
    cls=PanelledGroup,
    help="How likely is the answer of a frozen vision-language model (CLIP, SigLIP) wrong?",
    epilog="To begin, run `vilu demo`. The usual order is embed, fit, calibrate, score, evaluate; "
    "every command has its own --help. A command writes to a new or empty path, or continues its "
    "own earlier output. --overwrite replaces earlier output of vilu; other files are never "
    "touched. Exit codes: 2 wrong usage (such as a missing path, or an output path in use), 3 bad "
    "data, 4 risk target cannot be reached, 5 missing model, 6 artefacts do not belong together, "
    "7 storage failed, 8 alarm, 75 busy.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


PRIVATE_COMMANDS: Final = frozenset(
    {"audit-labels", "calibrate", "labels", "monitor", "next", "review", "serve", "triage"}
)
"""Commands that write photo paths and labels. By default no other user may read these files."""

OCTAL_NUMBER: Final = re.compile(r"[0-7]{1,4}")
"""Pattern of a umask, such as "022"."""


def show_version(value: bool) -> None:
    """Print the version and exit."""
    if value:
        # This import is here because it takes as much time as the rest of `vilu --help`.
        import importlib.metadata

        version = importlib.metadata.version("vilu")
        typer.echo(version)
        raise typer.Exit


Verbose = Annotated[
    bool,
    Option("--verbose", "-v", help="Log debugging messages.", rich_help_panel=COMMON),
]
Quiet = Annotated[
    bool,
    Option(
        "--quiet", "-q", help="Show no progress, and log only warnings.", rich_help_panel=COMMON
    ),
]
AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.", rich_help_panel=COMMON)]


@app.callback()
def prepare_command(
    context: typer.Context,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    plugin: Annotated[
        list[str] | None,
        Option(
            "--plugin",
            metavar="MODULE",
            help="Import this module, which registers methods, before the command; repeatable.",
        ),
    ] = None,
    umask: Annotated[
        str | None,
        Option(
            metavar="OCTAL",
            envvar="VILU_UMASK",
            help="Rights that new files do not get, such as 022. [077 for commands whose files "
            "hold paths and labels, else as in the shell]",
        ),
    ] = None,
    version: Annotated[  # noqa: ARG001 - the option's callback does the work
        bool,
        Option(
            "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """How likely is the answer of a frozen vision-language model (CLIP, SigLIP) wrong?"""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(UsageError.exit_code)
    flags_before_command = OutputFlags(verbose=verbose, quiet=quiet, as_json=as_json)
    context.with_resource(with_output_flags(flags_before_command))
    _set_umask(context, umask)
    if context.invoked_subcommand == "serve":
        use_one_heap()  # before a plug-in may import pyarrow
    for module in plugin or ():
        load_plugin(module)


def with_common_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags --verbose, --quiet and --json.

    The command `vilu` also has these flags, so a flag may stand before or after the command.

    Raises:
        UsageError: If the command has a parameter with the name of such a flag.
    """

    @wraps(command)
    def run(*, verbose: bool, quiet: bool, as_json: bool, **values: Any) -> None:  # noqa: ANN401
        flags_after_command = OutputFlags(verbose=verbose, quiet=quiet, as_json=as_json)
        with with_output_flags(OUTPUT_FLAGS.get() | flags_after_command):
            command(**values)

    flags = {"verbose": Verbose, "quiet": Quiet, "as_json": AsJson}
    parameters = list(signature(command, eval_str=True).parameters.values())
    clashing_names = [parameter.name for parameter in parameters if parameter.name in flags]
    if clashing_names:
        listed_names = ", ".join(clashing_names)
        raise UsageError(
            f"the command {command.__name__} has parameters that every command of vilu gets: "
            f"{listed_names}. Leave them out."
        )
    for name, annotation in flags.items():
        flag = Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        parameters.append(flag)
    # typer reads the options from ``__signature__``
    vars(run)["__signature__"] = Signature(parameters)
    return run


def _set_umask(context: typer.Context, umask: str | None) -> None:
    """Set the umask: the rights that new files do not get. Restore the old umask at the end."""
    if umask is None and context.invoked_subcommand not in PRIVATE_COMMANDS:
        return
    octal_umask = "077" if umask is None else umask  # 077: no rights for other users
    if not OCTAL_NUMBER.fullmatch(octal_umask):
        raise UsageError(
            f"--umask is an octal number such as 022. Got {octal_umask!r:.40} instead."
        )
    umask_before = os.umask(int(octal_umask, 8))
    context.call_on_close(lambda: os.umask(umask_before))  # when the command ends


def with_stop_message(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command: check the input paths, and print a message after Ctrl-C or SIGTERM.

    The message says what happens if the same command runs again.
    """

    @wraps(command)
    def run_with_message(**values: Any) -> None:  # noqa: ANN401 - arguments of the command
        name = command_name(command)
        wanted_kinds: Mapping[str, str] = INPUT_KINDS.get(name, {})
        if command.__name__ in INPUT_KINDS_OF_PLUGINS:  # a command from another package
            wanted_kinds = INPUT_KINDS_OF_PLUGINS[command.__name__]
        require_input_kinds(name, values, wanted_kinds)
        try:
            command(**values)
        except KeyboardInterrupt:
            message = _stop_message(command, values)
            print_to_stderr("stopped", message)
            raise
        except SystemExit as system_exit:
            if system_exit.code == TERMINATED_EXIT_CODE:
                message = _stop_message(command, values)
                print_to_stderr("stopped", message)
            raise

    return run_with_message


def command_name(command: Callable[..., None]) -> str:
    """Return a command's name: "audit-labels" for ``audit_labels``, and "list" for ``list_``."""
    return command.__name__.removesuffix("_").replace("_", "-")


def _stop_message(command: Callable[..., None], values: dict[str, Any]) -> str:
    """Return the message for a stopped command: what exists, and what running it again does."""
    name = command_name(command)
    output: Path | None = values.get("output")
    is_resumed = command.__name__ in RESUMABLE_COMMANDS
    if name == "score" and output is not None:
        is_folder = not output.suffix
        is_resumed = is_folder  # a folder is written in parts, but a file at once
    if is_resumed:
        return f"finished parts are in {output}; the same command goes on with the rest."
    if name == "serve":
        return (
            "every accepted request is answered, and the journals are on the disk; the same "
            "command goes on with them."
        )
    if name == "review" and values.get("serve"):
        return f"every answer is in {output}; the same command goes on with the rest."
    checkpoints = Path(f"{output}.checkpoints")
    if name == "fit" and checkpoints.is_dir():
        return f"the same command goes on from the last checkpoint in {checkpoints}."
    return "no incomplete file was left; the same command starts again from the beginning."


COMMANDS: Final[Mapping[str, tuple[Callable[..., None], ...]]] = {
    PHOTOS: (triage, review, labels, demo),
    EMBEDDINGS: (embed, import_, fit, score, evaluate, estimate, report, explain),
    GUARANTEES: (calibrate, monitor, next_, audit_labels),
    SHARING: (serve, export, push, pull, convert),
    LOOKING_UP: (inspect, list_),
}
"""Maps a group name to the commands in the group, in the order of `vilu --help`."""


def add_command(
    group: typer.Typer, name: str, command: Callable[..., None], panel: str | None = None
) -> None:
    """Add a command to a command group, with checks and the common flags."""
    stoppable_command = with_stop_message(command)
    wrapped_command = with_common_flags(stoppable_command)
    register = group.command(name, cls=PanelledCommand, rich_help_panel=panel)
    register(wrapped_command)


for panel, commands in COMMANDS.items():
    for command in commands:
        add_command(app, command_name(command), command, panel)
datasets_group = typer.Typer(
    cls=PanelledGroup,
    help="Data sets that vilu can open by name: their description, and which are on this disk.",
)
add_command(datasets_group, "list", list_datasets)
add_command(datasets_group, "check", check_datasets)
app.add_typer(datasets_group, name="datasets", rich_help_panel=LOOKING_UP)
tabulate_group = typer.Typer(
    cls=PanelledGroup,
    help="Make a table of answers from files of language models, detectors, Tesseract or "
    "classifiers.",
)
for command in (completions_, detections_, logits_, words_):
    add_command(tabulate_group, command_name(command), command)
app.add_typer(tabulate_group, name="tabulate", rich_help_panel=EMBEDDINGS)


COMMAND_GROUP: Final = "vilu.commands"
"""Entry-point group for additional commands."""


def command_that_raises(error: UsageError) -> Callable[[], None]:
    """Make a command that raises ``error``, in place of a command that cannot be imported."""

    def command() -> None:
        raise error

    command.__doc__ = str(error)
    return command


ALLOW_ANY_ARGUMENTS: Final = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Settings for a command that only raises an error, whatever arguments the user gives."""


def add_plugin_command(entry: EntryPoint) -> None:
    """Add a command from another package. If the import fails, the command raises the error."""
    try:
        command = load_entry(entry, "command")
        add_command(app, entry.name, command, RESEARCH)
    except UsageError as error:
        failing_command = command_that_raises(error)
        register = app.command(
            entry.name, context_settings=ALLOW_ANY_ARGUMENTS, rich_help_panel=RESEARCH
        )
        register(failing_command)


def add_missing_bench_commands() -> None:
    """Add the missing vilu-bench commands. Each such command tells how to install vilu-bench."""
    installed = {entry.name for entry in entry_points(COMMAND_GROUP)}
    for name in names_of_bench()[COMMAND_GROUP]:
        if name not in installed:
            register = app.command(name, context_settings=ALLOW_ANY_ARGUMENTS, hidden=True)
            register(refuse_bench_command)


def refuse_bench_command(context: typer.Context) -> None:
    """Say how to install this command, which comes with the package vilu-bench."""
    refuse_name_of_bench(COMMAND_GROUP, str(context.info_name))


for entry in entry_points(COMMAND_GROUP):
    add_plugin_command(entry)
add_missing_bench_commands()
