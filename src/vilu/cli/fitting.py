"""``vilu fit``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vilu.cli.console import next_step
from vilu.cli.sources import Direction, Fold, Hard, LogitScale, NearDuplicates, PoolSize, choose_pools

if TYPE_CHECKING:
    from vilu.nn.checkpoint import FolderSession
    from vilu.pairs import Pools
    from vilu.predictors.base import FailurePredictor
    from vilu.types import EmbeddingSource


def fit(  # noqa: PLR0913, PLR0917 - one parameter per flag
    stores: Annotated[
        list[Path],
        typer.Argument(help="Store that `vilu embed` wrote, or shards as LAION's; several with --pseudo."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the predictor.")],
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
    pool_size: PoolSize = None,
    direction: Direction = "image_to_text",
    hard_negatives: Hard = False,
    near_duplicates: NearDuplicates = None,
    fold: Fold = None,
    logit_scale: LogitScale = None,
    init: Annotated[
        Path | None, typer.Option(metavar="PREDICTOR", help="Begin with the weights of a fitted predictor.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="Only so many labelled rows of each class.")] = None,
    pseudo: Annotated[
        bool, typer.Option("--pseudo", help="Class texts as captions, of one or several stores mixed in pools.")
    ] = False,
    checkpoint_minutes: Annotated[
        float, typer.Option(min=0, help="Between two checkpoints within an epoch; one follows every epoch.")
    ] = 10.0,
    restart: Annotated[bool, typer.Option("--restart", help="Drop the checkpoints of an interrupted fit.")] = False,
) -> None:
    """Fit a failure predictor on labelled embeddings. Prints the folder of the predictor.

    Interrupted, the same command goes on where the last checkpoint (beside OUTPUT) was. Under torchrun heads are
    trained by all processes together; the result does not depend on how many there are.
    """
    from vilu.nn.world import world
    from vilu.predictors import find_method
    from vilu.store.open import open_source

    pools = choose_pools(pool_size, direction, hard_negatives, near_duplicates)
    with ExitStack() as stack:
        team = stack.enter_context(world(device))
        predictor = _new_predictor(find_method(method), {"seed": seed, "device": device}, settings or [], init)
        train = _training_set(stores, pools, fold, logit_scale, (shots, seed), pseudo)
        chosen = (
            None
            if validation is None
            else open_source(
                validation, pools=pools, fold=None if fold is None else "validation", logit_scale=logit_scale
            )
        )
        checkpoints = _checkpoints(stack, predictor, output, checkpoint_minutes, restart)
        predictor.fit(train, chosen)
        predictor.notes_ |= _candidates(train)
        if team.leads:
            predictor.save(output)
            if checkpoints is not None:
                checkpoints.remove()
            typer.echo(output)
            next_step(
                f"{predictor.name} fitted on {len(train):,} rows; next: vilu score {output} STORE -o scores.parquet"
            )


def _new_predictor(
    cls: type[FailurePredictor], defaults: dict[str, object], settings: list[str], init: Path | None
) -> FailurePredictor:
    from vilu.predictors.init import initialise
    from vilu.predictors.parameters import build, parameters, parse_settings
    from vilu.predictors.storage import load

    values = {key: value for key, value in defaults.items() if key in parameters(cls)} | parse_settings(settings)
    return build(cls, values) if init is None else initialise(cls, load(init), values)


def _training_set(
    stores: list[Path],
    pools: Pools | None,
    fold: Literal["train", "validation", "test"] | None,
    logit_scale: float | None,
    few: tuple[int | None, int],
    pseudo: bool,
) -> EmbeddingSource:
    """The rows to learn from; ``few`` is the number of rows per class, and a seed."""
    from vilu.errors import UsageError
    from vilu.pairs import Pools
    from vilu.predictors.shots import few_shot
    from vilu.pseudo import PseudoCaptions
    from vilu.store.open import open_source

    n_shots, seed = few
    if not pseudo and len(stores) > 1:
        raise UsageError(f"one store is fitted on, got {len(stores)}. Several can be mixed as captions: add --pseudo.")
    of_pairs = None if pseudo else pools
    sources = [open_source(store, pools=of_pairs, fold=fold, logit_scale=logit_scale) for store in stores]
    if n_shots is not None:
        sources = [few_shot(source, n_shots, seed) for source in sources]
    return PseudoCaptions(sources, pools or Pools(), [store.name for store in stores]) if pseudo else sources[0]


def _candidates(train: EmbeddingSource) -> dict[str, object]:
    """What the images chose from, for the model card."""
    from vilu.space import digest

    if train.pool_size is not None:
        return {"pool_size": train.pool_size}
    names = {} if train.class_names is None else {"classes": digest(train.class_names)}
    return {"n_candidates": train.n_candidates, **names}


def _checkpoints(
    stack: ExitStack, predictor: FailurePredictor, output: Path, minutes: float, restart: bool
) -> FolderSession | None:
    """Checkpoints beside the output of what is trained step by step."""
    from vilu.nn.checkpoint import checkpointing
    from vilu.predictors.heads.head import HeadPredictor

    if not isinstance(predictor, HeadPredictor):
        return None
    folder = output.with_name(f"{output.name}.checkpoints")
    session = stack.enter_context(checkpointing(folder, minutes, resume=True))
    if restart:
        session.remove()
    return session
