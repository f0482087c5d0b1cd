"""``vilu pools``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vilu.cli.console import next_step
from vilu.cli.sources import Data, Direction, Fold, Hard, LogitScale, NearDuplicates

if TYPE_CHECKING:
    from vilu.predictors.base import FailurePredictor

PUBLISHED = "128,512,1024,2048,4096,8192,16384,32768"


def pools(  # noqa: PLR0913, PLR0917 - one parameter per flag
    store: Data,
    predictors: Annotated[
        list[str],
        typer.Argument(help="Folders that `vilu fit` wrote, or methods that need no fit (mcm, margin)."),
    ],
    sizes: Annotated[str, typer.Option(help="Pool sizes, joined by commas.")] = PUBLISHED,
    draws: Annotated[int, typer.Option(min=1, help="Drawings of the pools, which are averaged.")] = 1,
    direction: Direction = "image_to_text",
    hard_negatives: Hard = False,
    near_duplicates: NearDuplicates = None,
    fold: Fold = None,
    logit_scale: LogitScale = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print tidy rows as JSON instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the rows, .json, .parquet or .csv.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=0, help="Bootstrap resamples behind each interval.")] = 1000,
) -> None:
    """Failure prediction on image-caption pairs against the number of captions to choose from: AUROC / FPR95.

    A method that does not work on pairs is refused with the reason. Sizes that the pairs do not fill are left out.
    """
    from vilu.pairs import Pools
    from vilu.pool_sizes import over_pool_sizes, size_table
    from vilu.store.open import open_source

    found = over_pool_sizes(
        {Path(name).name: _predictor(name) for name in predictors},
        lambda pools: open_source(store, pools=pools, fold=fold, logit_scale=logit_scale),
        _sizes(sizes),
        pools=Pools(direction=direction, hard=hard_negatives, near_duplicates=near_duplicates),
        draws=draws,
        dataset=store.name,
        n_resamples=resamples,
    )
    if output is not None:
        found.save(output)
    typer.echo(json.dumps(found.to_dicts(), indent=2) if as_json else size_table(found))
    next_step("AUROC / FPR95 in percent; positive=correct for FPR95" + (f", ± over {draws} draws" if draws > 1 else ""))


def _predictor(name: str) -> FailurePredictor:
    """A saved predictor, or a method by its name."""
    from vilu.errors import UsageError
    from vilu.predictors import find_method
    from vilu.predictors.storage import load

    if Path(name).name != name or Path(name).is_dir():
        return load(name)
    cls = find_method(name)
    if cls.needs_fit:
        raise UsageError(
            f"{name} must be fitted first: vilu fit STORE -o {name} --method {name}, then give its folder."
        )
    return cls()


def _sizes(text: str) -> list[int]:
    from vilu.errors import UsageError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 1 for word in words):
        raise UsageError(f"--sizes must be whole numbers from 2, joined by commas. Got {text!r} instead.")
    return sorted({int(word) for word in words})
