"""``vilu score``, ``evaluate`` and ``convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vilu.cli.console import next_step
from vilu.cli.sources import Data, Direction, Fold, Hard, LogitScale, NearDuplicates, PoolSize, choose_pools, split_of

Predictor = Annotated[Path, typer.Argument(help="Folder that `vilu fit` or `vilu convert` wrote.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the predictor.")]


def score(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: Predictor,
    store: Data,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File, .parquet or .csv; or a folder, for any number of rows."),
    ],
    pool_size: PoolSize = None,
    direction: Direction = "image_to_text",
    hard_negatives: Hard = False,
    near_duplicates: NearDuplicates = None,
    fold: Fold = None,
    logit_scale: LogitScale = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder of scores of another run.")] = False,
) -> None:
    """Write per image the zero-shot answer and its uncertainty (higher = more likely wrong). Prints file or folder.

    Of a predictor that `vilu calibrate` has calibrated also the probability of failure, accept or abstain with the
    reason, and label sets. A folder is written part by part in bounded memory; interrupted, the same command does what
    is missing.
    """
    from vilu.decision.apply import Decider
    from vilu.errors import UsageError
    from vilu.predictors.storage import load
    from vilu.scores.write import score_parts
    from vilu.scoring import score as score_rows
    from vilu.store.open import open_source

    pools = choose_pools(pool_size, direction, hard_negatives, near_duplicates)
    data = open_source(store, pools=pools, fold=fold, logit_scale=logit_scale)
    fitted, split = load(predictor), fold or split_of(data)
    decider = Decider.of_folder(fitted, predictor)
    if output.suffix.lower() in {".parquet", ".csv"}:
        score_rows(fitted, data, dataset=store.name, split=split, decider=decider).save(output)
    elif output.suffix and not output.is_dir():
        raise UsageError(f"scores go to a .parquet or .csv file, or to a folder without suffix. Got {output} instead.")
    else:
        score_parts(fitted, data, output, dataset=store.name, split=split, overwrite=overwrite, decider=decider)
    typer.echo(output)
    next_step(f"{len(data):,} rows scored; next, where failures are known: vilu evaluate {output}")


def evaluate(
    scores: Annotated[list[Path], typer.Argument(help="Files or folders that `vilu score` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print tidy rows as JSON instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the rows, .json, .parquet or .csv.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples behind each interval.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Failure-prediction metrics with bootstrap intervals, one line per file."""
    from vilu.evaluation import evaluate as evaluate_outcomes
    from vilu.outcomes import Outcomes
    from vilu.scores.folder import ScoreFolder

    found = [ScoreFolder(path) if path.is_dir() else Outcomes.load(path) for path in scores]
    table = evaluate_outcomes(found, n_resamples=resamples, seed=seed)
    if output is not None:
        table.save(output)
    typer.echo(json.dumps(table.to_dicts(), indent=2) if as_json else str(table))


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint (.ckpt) of the reference implementation.")],
    output: Output,
    logit_scale: Annotated[float, typer.Option(help="Of the VLM; the checkpoint does not hold it.")] = 100.0,
    embed_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Embedding width; only for a head without attention that sees the caption."),
    ] = None,
) -> None:
    """Read a checkpoint of the reference implementation, executing nothing in it. Prints the predictor's folder."""
    from vilu.predictors.convert import convert_official

    predictor = convert_official(checkpoint, logit_scale, embed_dim=embed_dim)
    predictor.save(output)
    typer.echo(output)
    next_step(f"a {predictor.name} head; next: vilu score {output} STORE -o scores.parquet")
