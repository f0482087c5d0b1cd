"""``vilu report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vilu.cli.console import next_step


def report(  # noqa: PLR0913, PLR0917 - one parameter per flag
    run: Annotated[Path, typer.Argument(help="Folder of .parquet files that `vilu score` wrote, or one of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, .html.")],
    main: Annotated[
        str | None, typer.Option(help="Method that the page is about. [the calibrated one, vilu_plus, vilu, the first]")
    ] = None,
    predictor: Annotated[
        Path | None, typer.Option(help="Folder of a calibrated predictor: its rule accepts and abstains.")
    ] = None,
    max_risk: Annotated[
        float, typer.Option(help="Without --predictor: errors among the accepted, on these rows, not certified.")
    ] = 0.05,
    images: Annotated[
        str | None, typer.Option(help="The images that were embedded, as `vilu embed` reads them, for thumbnails.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of --images.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Store that was scored, for the classes that compete with an answer.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page. [data set and split]")] = None,
) -> None:
    """One HTML page about scores: curves, a threshold to move, classes, pictures. Needs no network. Prints the file."""
    from vilu.datasets.catalog import open_dataset
    from vilu.errors import UsageError
    from vilu.files import atomic_write
    from vilu.page.build import report_page
    from vilu.page.choice import read_calibrated
    from vilu.page.scores import read_scores
    from vilu.store.open import open_source

    if output.suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"the page is an .html file. Got {output} instead.")
    if split is not None and images is None:
        raise UsageError("--split is of --images. Give both, or neither.")
    page = report_page(
        read_scores(run),
        main=main,
        calibrated=None if predictor is None else read_calibrated(predictor),
        max_risk=max_risk,
        images=None if images is None else open_dataset(images, split=split),
        embeddings=None if store is None else open_source(store),
        title=title,
    )
    with atomic_write(output) as handle:
        handle.write(page.encode())
    typer.echo(output)
    next_step(f"{len(page) / 1000:,.0f} kB in one file; open it in a browser, or print it")
