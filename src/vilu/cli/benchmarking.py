"""``vilu benchmark`` and ``vilu render``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vilu.cli.console import next_step

if TYPE_CHECKING:
    from vilu.studies.render import Rendered


def benchmark(  # noqa: PLR0913, PLR0917 - one parameter per flag
    configs: Annotated[
        list[Path],
        typer.Argument(metavar="CONFIG.toml...", help="Files such as configs/here/*.toml (see docs/benchmark.md)."),
    ],
    data: Annotated[Path, typer.Option(help="Folder that the paths in the files are relative to.")] = Path(
        "../shared/data"
    ),
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for embeddings, cells, tables and figures.")
    ] = Path("benchmark-output"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes; the number changes no result.")] = 1,
    models: Annotated[
        Path | None, typer.Option(help="Folder with named backbones, in place of the model hub's cache.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only share I of N of the cells, for one of N machines; then run without."),
    ] = None,
    embed_only: Annotated[bool, typer.Option("--embed-only", help="Make the embeddings and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be embedded and run, its bytes and time; do nothing.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Everything, but tiny: few images, seeds and epochs; in OUTPUT/smoke.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare methods on data sets, over seeds, label budgets, pools, shifts and transfer: the studies of the paper.

    Prints tables and writes them, with figures, to OUTPUT/studies. Interrupt it at any moment: the next run does what
    is missing. Studies in one output share embeddings and cells.
    """
    from vilu.benchmark.loading import load_configs
    from vilu.benchmark.run import Share
    from vilu.benchmark.smoke import shrink
    from vilu.studies.run import run_studies

    chosen = load_configs(configs)
    if smoke:
        chosen, output = [shrink(config) for config in chosen], output / "smoke"
    if dry_run:
        from vilu.benchmark.estimate import estimate
        from vilu.benchmark.estimate_text import describe

        plans = [estimate(config, data, output) for config in chosen]
        typer.echo(json.dumps([plan.to_dict() for plan in plans], indent=2) if as_json else describe(plans))
        return
    share = None if shard is None else Share.parse(shard)
    studies = run_studies(chosen, data, output, jobs=jobs, models=models, share=share, embed_only=embed_only)
    _print(studies, as_json=as_json)
    if embed_only:
        next_step(f"the embeddings are in {output / 'stores'}")
    elif share is not None and share.of > 1:
        next_step(f"share {shard} is done; when all are, run the same without --shard to see the results")
    else:
        next_step(f"tables and figures are in {output / 'studies'}, every cell in {output / 'cells'}")


def render(
    run: Annotated[Path, typer.Argument(help="Output folder of `vilu benchmark`; its stores are not needed.")],
    document: Annotated[
        Path | None, typer.Option(help="Also write all studies as one Markdown file, figures in a folder beside it.")
    ] = None,
    title: Annotated[str, typer.Option(help="Of that file.")] = "Results",
    intro: Annotated[str, typer.Option(help="First paragraph of that file.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Make the tables and figures of finished studies anew, from their cells alone."""
    from vilu.studies.run import render_studies

    _print(render_studies(run, document, title, intro), as_json=as_json)
    next_step(f"tables and figures are in {run / 'studies'}" + (f", all of them in {document}" if document else ""))


def _print(studies: list[Rendered], *, as_json: bool) -> None:
    from vilu.benchmark.summary import summarise

    if as_json:
        found = {study.board.config.name: summarise(study.board).to_dict() for study in studies}
        typer.echo(json.dumps(found, indent=2))
    elif studies:
        many = len(studies) > 1
        parts = [f"{f'=== {study.board.config.name} ===' + chr(10) if many else ''}{study.text}" for study in studies]
        typer.echo("\n\n".join(parts))
