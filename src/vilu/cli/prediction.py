"""``vilu fit``, ``score``, ``evaluate`` and ``convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vilu.cli.console import next_step

Predictor = Annotated[Path, typer.Argument(help="Folder that `vilu fit` or `vilu convert` wrote.")]
Store = Annotated[Path, typer.Argument(help="Folder that `vilu embed` wrote.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the predictor.")]


def fit(
    store: Store,
    output: Output,
    method: Annotated[str, typer.Option(help="See `vilu list predictors`.")] = "vilu_plus",
    validation: Annotated[
        Path | None, typer.Option(help="Store to select on; without it a part of the training rows is held out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter, e.g. epochs=50; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Fit a failure predictor on a store of labelled embeddings. Prints the folder of the predictor."""
    from vilu.predictors import find_method
    from vilu.predictors.parameters import build, parameters, parse_settings
    from vilu.store.reader import EmbeddingStore

    cls = find_method(method)
    values = {"seed": seed, "device": device}
    defaults = {key: value for key, value in values.items() if key in parameters(cls)}
    predictor = build(cls, {**defaults, **parse_settings(settings or [])})
    train = EmbeddingStore(store)
    predictor.fit(train, None if validation is None else EmbeddingStore(validation))
    predictor.save(output)
    typer.echo(output)
    next_step(f"{method} fitted on {len(train):,} rows; next: vilu score {output} STORE -o scores.parquet")


def score(
    predictor: Predictor,
    store: Store,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, .parquet or .csv.")],
) -> None:
    """Write per image the zero-shot answer and its uncertainty (higher = more likely wrong). Prints the file."""
    from vilu.predictors.storage import load
    from vilu.scoring import score as score_rows
    from vilu.store.reader import EmbeddingStore

    data = EmbeddingStore(store)
    outcomes = score_rows(load(predictor), data, dataset=store.name, split=data.manifest.split)
    outcomes.save(output)
    typer.echo(output)
    next_step(f"{len(outcomes):,} rows scored; next, where labels are known: vilu evaluate {output}")


def evaluate(
    scores: Annotated[list[Path], typer.Argument(help="Files that `vilu score` wrote, .parquet or .csv.")],
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

    outcomes = [Outcomes.load(path) for path in scores]
    table = evaluate_outcomes(outcomes, n_resamples=resamples, seed=seed)
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
