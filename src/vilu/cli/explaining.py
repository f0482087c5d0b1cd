"""``vilu explain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vilu.cli.console import next_step, printable
from vilu.cli.sources import Data, Direction, Fold, Hard, LogitScale, NearDuplicates, PoolSize, choose_pools

if TYPE_CHECKING:
    from vilu.explaining.prompts import PromptGains
    from vilu.explaining.risk import RiskMap
    from vilu.predictors.base import FailurePredictor
    from vilu.types import EmbeddingSource


def explain(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: Annotated[Path, typer.Argument(help="Folder that `vilu fit` or `vilu convert` wrote.")],
    store: Data,
    train: Annotated[
        Path | None, typer.Option(help="Labelled store that the predictor was fitted on: for the nearest rows in it.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option(help="Explain the row with this key; repeatable.")] = None,
    row: Annotated[list[int] | None, typer.Option(min=0, help="Explain the row of this number; repeatable.")] = None,
    n: Annotated[int, typer.Option("-n", "--most-uncertain", min=1, help="Else the so many most uncertain.")] = 10,
    candidates: Annotated[int, typer.Option(min=1, help="Competitors of each answer to show.")] = 5,
    neighbours: Annotated[int, typer.Option(min=1, help="Training failures, and successes, to show.")] = 3,
    background: Annotated[int, typer.Option(min=1, help="Rows that an attribution compares with.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the background, or of the folds of --summary.")] = 0,
    summary: Annotated[
        bool, typer.Option("--summary", help="All rows: which confusions cost the most, which texts to improve.")
    ] = False,
    coverage: Annotated[float, typer.Option(help="With --summary: share of answers that are accepted.")] = 0.8,
    pool_size: PoolSize = None,
    direction: Direction = "image_to_text",
    hard_negatives: Hard = False,
    near_duplicates: NearDuplicates = None,
    fold: Fold = None,
    logit_scale: LogitScale = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
) -> None:
    """Why answers are suspicious, from embeddings alone: competitors, training rows alike, what moved the score."""
    from vilu.explaining.explain import Depth
    from vilu.explaining.explain import explain as explain_rows
    from vilu.explaining.explanation import require_json, save_json
    from vilu.predictors.storage import load
    from vilu.store.open import open_source

    if output is not None:
        require_json(output)
    pools = choose_pools(pool_size, direction, hard_negatives, near_duplicates)
    data = open_source(store, pools=pools, fold=fold, logit_scale=logit_scale)
    fitted = load(predictor)
    if summary:
        _refuse_rows(train, key, row)
        risk, gains = _summary(fitted, data, coverage, seed)
        content: dict[str, Any] = {"risk_map": risk.to_dict(), "prompt_gains": gains and gains.to_dict()}
        text = str(risk) if gains is None else f"{risk}\n\n{gains}"
        following = f"to see single rows: vilu explain {predictor} {store}"
    else:
        known = (
            None if train is None else open_source(train, pools=pools, fold=fold and "train", logit_scale=logit_scale)
        )
        wanted = [*(key or ()), *(row or ())]
        depth = Depth(candidates, neighbours, background, seed)
        found = explain_rows(fitted, data, known, wanted or None, n=n, depth=depth)
        content, text = found.to_dict(), str(found)
        following = f"{len(found)} rows explained; where the failures are: vilu explain {predictor} {store} --summary"
    if output is not None:
        save_json(output, content)
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False) if as_json else printable(text))
    next_step(following)


def _refuse_rows(train: Path | None, key: list[str] | None, row: list[int] | None) -> None:
    from vilu.errors import UsageError

    if train is not None or key or row:
        raise UsageError("--summary is about all rows of the store. Leave --train, --key and --row out.")


def _summary(
    predictor: FailurePredictor, data: EmbeddingSource, coverage: float, seed: int
) -> tuple[RiskMap, PromptGains | None]:
    """The risk map and, where there are labels, what better texts would gain."""
    from vilu.explaining.competition import strongest_competitor
    from vilu.explaining.prompts import prompt_gains
    from vilu.explaining.risk import risk_map
    from vilu.scoring import score
    from vilu.types import UNKNOWN

    outcomes = score(predictor, data)
    if bool((data.target != UNKNOWN).any()):
        return risk_map(outcomes, coverage=coverage), prompt_gains(data, seed=seed)
    return risk_map(outcomes, strongest_competitor(predictor, data), coverage=coverage), None
