"""The commands and what they have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from vilu.cli.console import make_reporter, set_verbosity
from vilu.cli.images import datasets, embed, inspect, list_catalogue
from vilu.cli.looking import explain, monitor, report
from vilu.cli.predictors import calibrate, convert, evaluate, export, fit, pull, push, score
from vilu.cli.studies import benchmark, demo, pools, render
from vilu.progress import reporting
from vilu.registry import load_plugin

app = typer.Typer(
    name="vilu",
    help="How likely is the answer of a frozen vision-language model (CLIP, SigLIP) wrong?",
    epilog="New here: `vilu demo`. The flow: embed, fit, calibrate, score, evaluate; every command has its own --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        import importlib.metadata  # as long as the rest of --help

        typer.echo(importlib.metadata.version("vilu"))
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log debugging messages.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log but warnings.")] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="MODULE", help="Import a module that registers methods first; repeatable."),
    ] = None,
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """How likely is the answer of a frozen vision-language model (CLIP, SigLIP) wrong?"""
    set_verbosity(verbose=verbose, quiet=quiet)
    reporter = make_reporter(quiet=quiet)
    if reporter is not None:
        context.with_resource(reporting(reporter))
    for module in plugin or ():
        load_plugin(module)


ON_DATA = (demo, embed, inspect, fit, calibrate, score, evaluate, report, explain, monitor, pools, benchmark, render)
for command in ON_DATA:
    app.command()(command)
app.command("list")(list_catalogue)
for command in (convert, export, push, pull):
    app.command()(command)
app.add_typer(datasets, name="datasets")
