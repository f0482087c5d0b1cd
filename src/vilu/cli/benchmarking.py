"""``vilu benchmark``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vilu.cli.console import columns, next_step


def benchmark(
    config: Annotated[Path, typer.Argument(help="TOML file, such as configs/methods.toml (see docs/benchmark.md).")],
    data: Annotated[Path, typer.Option(help="Folder that the paths in the file are relative to.")] = Path(
        "../shared/data"
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for embeddings, cells and tables.")] = Path(
        "benchmark-output"
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Processes; the number changes no result.")] = 1,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Everything, but tiny: few images, seeds and epochs; in OUTPUT/smoke.")
    ] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Print the cells and what is done; run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare every method on several data sets, over seeds, label budgets and transfer.

    Prints tables, best method first, and writes them to the output folder. Interrupt it at any moment: the next run
    does what is missing.
    """
    from vilu.benchmark.loading import load_config
    from vilu.benchmark.run import benchmark as run_benchmark
    from vilu.benchmark.run import list_cells
    from vilu.benchmark.smoke import shrink

    chosen = load_config(config)
    if smoke:
        chosen, output = shrink(chosen), output / "smoke"
    if list_only:
        cells = list_cells(chosen, data, output)
        typer.echo(json.dumps(cells, indent=2) if as_json else columns(cells))
        next_step(f"{sum(cell['state'] == 'to do' for cell in cells)} of {len(cells)} cells are to be run")
        return
    report = run_benchmark(chosen, data, output, jobs=jobs)
    typer.echo(json.dumps(report.summary.to_dict(), indent=2) if as_json else report.text)
    next_step(f"tables and every cell are in {output}")
