"""``vilu demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vilu.cli.console import next_step


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the table, the figures and the cache.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Real photos, end to end: embed 10 kinds of clothes with a small model, and see which answers to distrust.

    Takes minutes the first time on two cores, and seconds the second time. Prints a table; figures are saved.
    """
    from vilu.demo import run

    result = run(output, seed=seed)
    typer.echo(result.text)
    next_step(f"figures and tables are in {output}; your own images: vilu embed FOLDER -o emb")
