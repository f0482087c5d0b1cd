"""``vilu calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vilu.cli.console import next_step
from vilu.cli.sources import Data, Direction, Fold, Hard, LogitScale, NearDuplicates, PoolSize, choose_pools, split_of

if TYPE_CHECKING:
    from vilu.decision.record import Record
    from vilu.predictors.probability import Calibrator


def calibrate(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: Annotated[Path, typer.Argument(help="Folder of a fitted predictor; the result is written into it.")],
    store: Data,
    max_risk: Annotated[
        float | None, typer.Option(min=0, max=1, help="Largest error rate among accepted answers, e.g. 0.05.")
    ] = None,
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="With which the promise holds, over draws of the calibration rows.")
    ] = 0.95,
    min_coverage: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least share of answers to accept; alone or with --max-risk.")
    ] = None,
    method: Annotated[
        Literal["ltt", "sgr", "crc", "selection"],
        typer.Option(
            help="ltt: Learn then Test. sgr: selection with guaranteed risk. crc: bounds the mean share of all answers "
            "that is accepted and wrong. selection: bounds the mean share of wrong ones among the accepted of a batch."
        ),
    ] = "ltt",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="A threshold for every predicted class with enough rows.")
    ] = False,
    label_sets: Annotated[
        Literal["lac", "aps"] | None, typer.Option(help="Also sets of labels that hold the right one.")
    ] = None,
    max_miss: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of label sets without the right label.")
    ] = 0.1,
    pool_size: PoolSize = None,
    direction: Direction = "image_to_text",
    hard_negatives: Hard = False,
    near_duplicates: NearDuplicates = None,
    fold: Fold = None,
    logit_scale: LogitScale = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print risk.json instead of a summary.")] = False,
) -> None:
    """Probabilities, and a threshold with a stated risk, from labelled embeddings that the predictor has not seen.

    `vilu score` then writes failure_probability and accept or abstain beside every answer. Without a target only
    probabilities are calibrated. The promise is for rows drawn as the calibration rows were; `vilu monitor` watches it.
    Exit code 4: the target is out of reach; the message says how many rows it would take.
    """
    from vilu.calibration import Target, calibrate_predictor
    from vilu.predictors.storage import load
    from vilu.store.open import open_source

    pools = choose_pools(pool_size, direction, hard_negatives, near_duplicates)
    data = open_source(store, pools=pools, fold=fold, logit_scale=logit_scale)
    target = Target(max_risk, min_coverage, confidence, method, per_class, label_sets, max_miss)
    record = calibrate_predictor(predictor, data, target, dataset=store.name, split=fold or split_of(data))
    calibrator = load(predictor).calibrator_
    typer.echo(json.dumps(record.model_dump(mode="json"), indent=2) if as_json else _summary(record, calibrator))
    next_step(f"calibrated on {record.n:,} rows; next: vilu score {predictor} STORE -o scores.parquet")


def _summary(record: Record, calibrator: Calibrator | None) -> str:
    lines = []
    if calibrator is not None:
        tried = ", ".join(f"{name} {loss:.4f}" for name, loss in calibrator.log_loss.items())
        lines.append(f"probability: {calibrator.form}" + (f" (log-loss in cross-validation: {tried})" if tried else ""))
    if record.rule is not None:
        lines.append(f"decision: {record.rule}")
    if (sets := record.label_sets) is not None:
        lines.append(
            f"label sets: {sets.method}, on average {sets.mean_size:.2f} labels; at most {sets.max_miss:.1%} miss the "
            f"right one ({sets.empirical_miss:.1%} of {sets.n} calibration rows)"
        )
    return "\n".join(lines)
