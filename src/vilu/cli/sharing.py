"""``vilu export``, ``push`` and ``pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vilu.cli.console import next_step

Predictor = Annotated[Path, typer.Argument(help="Folder that `vilu fit` or `vilu convert` wrote.")]
Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="ORG/NAME on the model hub; or a folder, as ./DIR or /DIR.")
]
Revision = Annotated[str | None, typer.Option(help="On the hub. [main]")]


def export(
    predictor: Predictor,
    output: Annotated[Path, typer.Option("--output", "-o", help="File, .onnx.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="As ONNX, whatever the name of the file.")] = False,
) -> None:
    """Write the score of a predictor for other runtimes, checked against the predictor. Prints the file.

    Inputs image (N, D) and text (K, D), of unit norm; outputs uncertainty (N,) and prediction (N,).
    """
    from vilu.errors import UsageError
    from vilu.sharing.onnx import export_onnx

    if not onnx and output.suffix.lower() != ".onnx":
        raise UsageError(f"a predictor is exported as ONNX: give a file that ends in .onnx, or --onnx. Got {output}.")
    difference = export_onnx(predictor, output)
    typer.echo(output)
    next_step(f"onnxruntime gives the predictor's uncertainties; they differ by {difference:.1g} at most")


def push(
    predictor: Predictor,
    repository: Repository,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repository that is made. [as its owner has it]")
    ] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another predictor in a folder.")] = False,
) -> None:
    """Copy a predictor and its card to the model hub (HF_TOKEN), or to a folder. Prints where it is."""
    from vilu.sharing.hub import push as push_predictor

    place = push_predictor(predictor, repository, private=private, revision=revision, overwrite=overwrite)
    typer.echo(place)
    next_step(f"pushed; elsewhere: vilu pull {repository} -o predictor")


def pull(
    repository: Repository,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the predictor.")],
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another predictor.")] = False,
) -> None:
    """Copy a predictor from the model hub, or from a folder, and check it. Prints the folder of the predictor."""
    from vilu.sharing.hub import pull as pull_predictor

    typer.echo(pull_predictor(repository, output, revision=revision, overwrite=overwrite))
    next_step(f"next: vilu score {output} STORE -o scores.parquet")
