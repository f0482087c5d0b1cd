"""``vilu monitor``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vilu.cli.console import next_step

if TYPE_CHECKING:
    from vilu.decision.monitor import Monitor
    from vilu.outcomes import Outcomes

ALARM = 8
"""Exit code: the guarantee should no longer be relied on."""


def monitor(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: Annotated[Path, typer.Argument(help="Folder of a predictor that `vilu calibrate` has calibrated.")],
    scores: Annotated[
        list[Path] | None,
        typer.Argument(help="Files or folders that `vilu score` wrote, in the order in which the rows arrived."),
    ] = None,
    late_labels: Annotated[
        list[Path] | None,
        typer.Option(help="Scores of rows monitored before, with failures that were not known then; repeatable."),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="File, .parquet: go on from it if it is there, and leave the new state in it.")
    ] = None,
    false_alarm: Annotated[
        float, typer.Option(min=0, max=1, help="Probability of any alarm without cause, however long one watches.")
    ] = 0.05,
    shuffle: Annotated[
        bool,
        typer.Option("--shuffle", help="Take the rows of each file in random order: it has none of arrival."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers that break ties, and of --shuffle.")] = 0,
    backend: Annotated[Literal["vilu", "mapie"], typer.Option(help="Whose tests: ours, or MAPIE's.")] = "vilu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")] = None,
) -> None:
    """Say whether the calibrated promise still holds for the rows that arrive, as far as scores and labels show.

    Exit code 0: holds. 8: the rows have shifted, so the guarantee is void, or the promise is broken; the first row of
    the alarm, the reason and what to do are printed. Rows with a known failure are audited; they must be a random
    sample of the accepted ones.
    """
    from vilu.errors import UsageError
    from vilu.files import locked, write_json
    from vilu.progress import track

    new, late = scores or [], late_labels or []
    if not new and not late:
        raise UsageError("nothing to monitor: give SCORES, --late-labels or both.")
    with ExitStack() as stack:
        if state is not None and state.parent.is_dir():
            stack.enter_context(locked(state.parent, "monitoring with a state in"))
        watching = _open(predictor, backend, state, false_alarm, seed)
        batches: list[dict[str, Any]] = []
        task = stack.enter_context(track("monitor", len(new) + len(late), "files"))
        for path, take in [*((path, watching.update) for path in new), *((path, watching.audit) for path in late)]:
            outcomes = _scores(path)
            status = take(_shuffled(outcomes, [seed, watching.rows]) if shuffle else outcomes)
            batches.append({"scores": str(path), "rows": status.rows, "verdict": status.verdict})
            task.advance(1, status.verdict)
        if state is not None:
            watching.save(state)
    document = {"predictor": str(predictor), "batches": batches, **watching.status.model_dump(mode="json")}
    if output is not None:
        write_json(output, document)
    typer.echo(json.dumps(document, indent=2) if as_json else str(watching.status))
    if watching.status.alarm:
        raise typer.Exit(ALARM)
    if state is not None:
        next_step(f"next rows: vilu monitor {predictor} SCORES --state {state}")


def _open(predictor: Path, backend: str, state: Path | None, false_alarm: float, seed: int) -> Monitor:
    """The monitor of a folder whose calibration belongs to its predictor, where the last call left it."""
    from vilu.decision.monitor import Monitor
    from vilu.decision.monitor_mapie import MapieMonitor
    from vilu.errors import UsageError

    if state is not None and backend == "mapie":
        raise UsageError("the tests of MAPIE keep no state. Leave out --state, or take --backend vilu.")
    kind = MapieMonitor if backend == "mapie" else Monitor
    found = kind.of_folder(predictor, false_alarm=false_alarm, seed=seed)
    return found.resume(state) if state is not None and state.exists() else found


def _scores(path: Path) -> Outcomes:
    from vilu.outcomes import Outcomes
    from vilu.scores.folder import ScoreFolder

    return ScoreFolder(path).outcomes() if path.is_dir() else Outcomes.load(path)


def _shuffled(outcomes: Outcomes, seed: list[int]) -> Outcomes:
    """What a monitor looks at, in random order."""
    import numpy as np

    from vilu.outcomes import Outcomes

    order = np.random.default_rng(seed).permutation(len(outcomes))
    return Outcomes(
        uncertainty=outcomes.uncertainty[order],
        failure=outcomes.failure[order],
        prediction=None if outcomes.prediction is None else outcomes.prediction[order],
        ids=None if outcomes.ids is None else [outcomes.ids[row] for row in order],
        reason=None if outcomes.reason is None else [outcomes.reason[row] for row in order],
        class_names=outcomes.class_names,
        method=outcomes.method,
        provenance=outcomes.provenance,
    )
