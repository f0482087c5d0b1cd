"""Compares procedures for testing a guarantee while labels arrive, by replays on stored scores.

    python -m benchmarks.procedures chains STORE... --out build/chains --seeds 5
    python -m benchmarks.procedures replay build/chains [--names before default ...]

``chains`` fits ``vilu_plus`` on more and more labels, chosen as in a triage, and writes the scores
to a file for every set and seed. Existing files are not changed. ``replay`` replays every procedure
on every chain (``benchmarks.replays``), and prints

1. the accepted share of the photos without a label at a guaranteed risk of 5 % (confidence 95 %),
   as a mean over sets, and the difference from ``before`` with a 95 % interval (t).
2. the same over the sets in docs/triage.md, and the label count until a procedure is half-way, at
   half of the final coverage that random labels reach.
3. the same shares for every set at 400 labels, as means over seeds.

The labels on both sides are counted. Only photos on the calibration side are used. On the fit side
photos are picked, so the photos without a label are not a random sample.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from scipy import stats

from benchmarks.replays import (
    CHOICE_TO_END_OF_DRAWS,
    CHOICE_TO_FIRST_OPEN,
    DELTA,
    Chain,
    Procedure,
    Reached,
    Replay,
    exact_look,
    follow_labels,
    raise_limit_if_certified,
)
from benchmarks.risk_tests import Bets, ExactLook, PlannedLooks, WeightedBets
from vilu.calibration.anytime import SEQUENCE_STARTS, level_of
from vilu.embeddings.columns import AnswerKind
from vilu.metrics.counts import Floats, Ints
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.scoring.score import score
from vilu.store.reader import EmbeddingStore
from vilu.triage.choose import choose_rows_to_fit
from vilu.triage.fitting import METHOD_WITH_LABELS, METHOD_WITHOUT_LABELS, fit_predictor
from vilu.triage.forecast import LABELS_ENOUGH_FOR_DRAW, MAX_LABELS_BEFORE_DRAW, SHARE_WORTH_A_DRAW
from vilu.triage.labels import sides_and_positions
from vilu.triage.photos import Photos
from vilu.triage.run import CANDIDATE_COVERAGE_FACTOR

LABEL_COUNTS: Final = (100, 150, 200, 300, 400, 600, 800)
LABELS_OF_SET_TABLE: Final = 400
"""Label count for the table of single sets."""

LABELS_PER_FIT: Final = 50
"""Labels from one fit in a chain to the next."""

MAX_FIT_LABELS: Final = 500
"""Labels in a chain's last fit."""

HALF_OF_RANDOM: Final = {
    "caltech66": 0.62,
    "cifar10c": 0.15,
    "clothing": 0.25,
    "food9": 0.30,
    "pets_in123": 0.71,
    "proto_oxfordpets": 0.51,
    "proto_ucf101": 0.31,
}
"""Maps a set to half of the final coverage that random labels reach (docs/triage.md)."""

LABELS_IF_NEVER: Final = 1_600
"""Assumed label count for a set where a procedure does not get half-way."""


def harmonic_level(attempt: int, delta: float) -> float:
    """Return predictor number k's level in the procedure ``before``: delta / (k (k + 1))."""
    return delta / (attempt * (attempt + 1))


MAX_SHARE_HANDED_ON: Final = 0.35
"""Maximum share of the level that a certified limit passes to the next predictor."""

WHOLE_LEVEL: Final = 1 / dict(SEQUENCE_STARTS)[64]
"""With this ``planned_share``, ``Trial.plan`` plans the limit for the whole level."""

DEFAULT_PROCEDURE: Final = Procedure(
    test=Bets(SEQUENCE_STARTS, handed_on=0.0),
    level_of=level_of,
    planned_share=1.0,
    label_choice=CHOICE_TO_FIRST_OPEN,
    move_limit=raise_limit_if_certified,
    most_to_fit=MAX_LABELS_BEFORE_DRAW,
    share_worth_a_draw=SHARE_WORTH_A_DRAW,
    enough_to_fit=LABELS_ENOUGH_FOR_DRAW,
    candidate_part=1.0,
    worth_more=CANDIDATE_COVERAGE_FACTOR,
    grown_before_a_look=1.25,
)

PROCEDURE_BEFORE: Final = Procedure(
    test=Bets(((8, 0.1), (16, 0.1), (32, 0.2), (64, 0.6)), handed_on=0.0),
    level_of=harmonic_level,
    planned_share=WHOLE_LEVEL,
    label_choice=CHOICE_TO_END_OF_DRAWS,
    move_limit=raise_limit_if_certified,
    most_to_fit=50,
    share_worth_a_draw=0.0,
    enough_to_fit=50,
    candidate_part=1 / 3,
    worth_more=1.1,
    grown_before_a_look=1.5,
)

EXACT_SHARE: Final = 3.0
"""``planned_share`` for exact tests.

An exact test certifies with about as many labels as bets with three times the level.
"""


def planned_looks(growth: float, first_share: float, decay: float, n_looks: int) -> Procedure:
    """Make the default procedure with planned looks in place of bets."""
    test = PlannedLooks(SEQUENCE_STARTS, 0.0, growth, first_share, decay, n_looks)
    return replace(DEFAULT_PROCEDURE, test=test, planned_share=EXACT_SHARE)


def weighted_draws(floor: float) -> Procedure:
    """Make the default procedure with draws by predicted risk, and weighted bets."""
    weighted_bets = WeightedBets(SEQUENCE_STARTS, 0.0, floor)
    return replace(DEFAULT_PROCEDURE, test=weighted_bets)


PROCEDURES: Final = {
    "before": PROCEDURE_BEFORE,
    "default": DEFAULT_PROCEDURE,
    "default, levels handed on": replace(
        DEFAULT_PROCEDURE, test=Bets(SEQUENCE_STARTS, MAX_SHARE_HANDED_ON)
    ),
    "default, labels in the old order": replace(
        DEFAULT_PROCEDURE, label_choice=CHOICE_TO_END_OF_DRAWS
    ),
    "looks x 1.1, 50 % first": planned_looks(1.1, first_share=0.5, decay=0.9, n_looks=24),
    "looks x 1.15, 30 % first": planned_looks(1.15, first_share=0.3, decay=0.85, n_looks=18),
    "looks x 1.3, 40 % first": planned_looks(1.3, first_share=0.4, decay=0.7, n_looks=10),
    "looks x 1.3, 10 % first": planned_looks(1.3, first_share=0.1, decay=0.9, n_looks=10),
    "looks x 2, 50 % first": planned_looks(2.0, first_share=0.5, decay=0.5, n_looks=4),
    "weighted draws, floor 0.8": weighted_draws(floor=0.8),
    "weighted draws, floor 0.5": weighted_draws(floor=0.5),
    "weighted draws, floor 0.25": weighted_draws(floor=0.25),
    "limit follows the labels": replace(DEFAULT_PROCEDURE, move_limit=follow_labels),
}
"""Maps the name in the tables to the procedure."""

ONE_LOOK: Final = ExactLook(SEQUENCE_STARTS, handed_on=0.0)
ONE_LOOK_NAME: Final = "one exact look"


# Chains.


def write_chain(store: EmbeddingStore, seed: int, path: Path) -> None:
    """Fit on more and more labels from a store, and write every fit's scores for all rows."""
    photos = Photos([(store, np.arange(len(store)))], {})
    names = list(store.class_names or ())
    class_of = dict(zip(photos.ids, [names[k] for k in store.target.tolist()], strict=True))
    is_calibration, position = sides_and_positions(photos.pictures, seed)
    fit_side = np.flatnonzero(~is_calibration)
    rows: Ints = np.zeros(0, np.int64)
    zero_shot = fit_predictor(METHOD_WITHOUT_LABELS, photos, rows, seed)
    uncertainty, failure = judge_photos(zero_shot, photos, store, "zero_shot")
    uncertainties = [uncertainty]
    failures = [failure]
    n_fit = [0]
    while len(rows) < min(MAX_FIT_LABELS, len(fit_side)):
        open_rows = np.setdiff1d(fit_side, rows)
        rows_to_add = choose_rows_to_fit(photos, open_rows, uncertainty, LABELS_PER_FIT, seed)
        rows = np.sort(np.concatenate([rows, rows_to_add]))
        labelled = [photos.ids[row] for row in rows.tolist()]
        photos.set_labels({key: class_of[key] for key in labelled}, ())
        predictor = fit_predictor(METHOD_WITH_LABELS, photos, rows, seed)
        uncertainty, failure = judge_photos(predictor, photos, store, "adapted")
        uncertainties.append(uncertainty)
        failures.append(failure)
        n_fit.append(len(rows))
    np.savez_compressed(
        path,
        u=np.array(uncertainties),
        wrong=np.array(failures),
        n_fit=n_fit,
        cal=is_calibration,
        pos=position,
        n_classes=len(names),
    )


def judge_photos(
    predictor: FailurePredictor, photos: Photos, store: EmbeddingStore, answer: AnswerKind
) -> tuple[Floats, Ints]:
    """Return the uncertainty (N,) of a kind of answers to all photos, and which are wrong (N,)."""
    judge = predictor.judging(answer)
    outcomes = score(judge, photos)
    is_wrong = np.asarray(outcomes.prediction) != store.target.numpy()
    return outcomes.uncertainty, is_wrong.astype(np.int64)


def write_chains(paths: Iterable[Path], out: Path, n_seeds: int) -> None:
    """Write the missing chains, seed by seed. For each seed, write the chains of all sets."""
    warnings.simplefilter("ignore")
    logging.getLogger("vilu").setLevel(logging.ERROR)
    out.mkdir(parents=True, exist_ok=True)
    stores = {path.name: EmbeddingStore(path) for path in paths}
    for seed in range(n_seeds):
        for name, store in stores.items():
            path = out / f"{name}_{seed}.npz"
            if path.exists():
                continue
            # a killed run leaves no incomplete file with this name
            partial = path.with_suffix(".partial.npz")
            write_chain(store, seed, partial)
            partial.rename(path)
            print(path, flush=True)


# Replays.

Curve = list[Reached]
Curves = dict[str, list[Curve]]
"""Maps a set's name to the set's curves, one for each seed."""


def curves_of(chains: Iterable[Chain], replay_chain: Callable[[Chain], Curve]) -> Curves:
    """Return the curves by set. ``replay_chain`` returns a chain's curve."""
    curves: Curves = {}
    for chain in chains:
        curves.setdefault(chain.name, []).append(replay_chain(chain))
    return curves


def replay_function(procedure: Procedure) -> Callable[[Chain], Curve]:
    """Return a function that replays a procedure on a chain, and returns the rounds."""
    return lambda chain: list(Replay(chain, procedure).rounds())


def exact_look_curve(chain: Chain) -> Curve:
    """Make an exact look at every label count, each as if there were no other look."""
    curve = []
    for n_labels in LABEL_COUNTS:
        coverage = exact_look(chain, n_labels, ONE_LOOK, EXACT_SHARE)
        reached = Reached(n_labels, coverage, 0.0)
        curve.append(reached)
    return curve


def coverage_at(curve: Curve, n_labels: int) -> float:
    """Return the coverage reached with at most ``n_labels`` labels."""
    reached = [point.coverage for point in curve if point.n_labels <= n_labels]
    return reached[-1] if reached else 0.0


def mean_coverage(curves: Sequence[Curve], n_labels: int) -> float:
    """Average over seeds the coverage reached with at most ``n_labels`` labels."""
    coverages = [coverage_at(curve, n_labels) for curve in curves]
    return float(np.mean(coverages))


def labels_to_half(curves: Sequence[Curve], half: float) -> int:
    """Return the first label count whose mean coverage reaches ``half``, or ``LABELS_IF_NEVER``."""
    numbers = {point.n_labels for curve in curves for point in curve}
    for n_labels in sorted(numbers):
        if mean_coverage(curves, n_labels) >= half:
            return n_labels
    return LABELS_IF_NEVER


def half_width(differences: Floats) -> float:
    """Return half the width of a mean's 95 % interval (t), NaN for a single number."""
    n = len(differences)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))


def share_table(all_curves: Mapping[str, Curves], sets: Sequence[str]) -> Iterator[str]:
    """Yield mean coverage over sets at every label count, and the difference from ``before``."""
    yield "| procedure | " + " | ".join(f"{n}" for n in LABEL_COUNTS) + " |"
    yield "|---" * (len(LABEL_COUNTS) + 1) + "|"
    before = all_curves["before"]
    for name, curves in all_curves.items():
        cells = []
        for size in LABEL_COUNTS:
            shares = [mean_coverage(curves[key], size) for key in sets]
            shares_before = [mean_coverage(before[key], size) for key in sets]
            share = np.array(shares)
            difference = share - np.array(shares_before)
            cell = f"{share.mean():.3f}"
            if name != "before":
                cell += f" ({difference.mean():+.3f} ± {half_width(difference):.3f})"
            cells.append(cell)
        yield f"| {name} | " + " | ".join(cells) + " |"


def half_way_table(all_curves: Mapping[str, Curves], sets: Sequence[str]) -> Iterator[str]:
    """Yield the label count until half-way on every set, and the mean ratio to ``before``."""
    yield "| procedure | " + " | ".join(sets) + " | mean ratio |"
    yield "|---" * (len(sets) + 2) + "|"
    before = [labels_to_half(all_curves["before"][key], HALF_OF_RANDOM[key]) for key in sets]
    for name, curves in all_curves.items():
        numbers = [labels_to_half(curves[key], HALF_OF_RANDOM[key]) for key in sets]
        ratios = np.array(numbers) / np.array(before)
        ratio = np.mean(ratios)
        cells = [str(n) if n < LABELS_IF_NEVER else "–" for n in numbers]
        yield f"| {name} | " + " | ".join(cells) + f" | {ratio:.2f} |"


def set_table(all_curves: Mapping[str, Curves], sets: Sequence[str]) -> Iterator[str]:
    """Yield every set's coverage at ``LABELS_OF_SET_TABLE`` labels, and the gain on ``before``."""
    before = all_curves["before"]
    yield "| procedure | " + " | ".join(f"{key} ({len(before[key])})" for key in sets) + " |"
    yield "|---" * (len(sets) + 1) + "|"
    for name, curves in all_curves.items():
        cells = []
        for key in sets:
            shares = [coverage_at(curve, LABELS_OF_SET_TABLE) for curve in curves[key]]
            shares_before = [coverage_at(curve, LABELS_OF_SET_TABLE) for curve in before[key]]
            share = np.array(shares)
            difference = share - np.array(shares_before)
            cell = f"{share.mean():.2f}"
            if name != "before":
                cell += f" ({difference.mean():+.2f} ± {half_width(difference):.2f})"
            cells.append(cell)
        yield f"| {name} | " + " | ".join(cells) + " |"


def largest_risk(curves: Curves) -> float:
    """Return the largest error rate among accepted photos, over all rounds in all chains."""
    risks = []
    for of_set in curves.values():
        for curve in of_set:
            risks += [point.risk for point in curve]
    return max(risks)


def replay(folder: Path, names: Sequence[str], n_orders: int) -> None:
    """Replay the procedures on all chains in a folder, and print the tables.

    Every chain is replayed in ``n_orders`` random photo orders. All orders of a chain have the same
    fits, so with several orders there are no intervals over seeds.
    """
    chains = []
    for path in sorted(folder.glob("*.npz")):
        chain = Chain.load(path)
        chains += [chain.in_another_order(number) for number in range(n_orders)]
    all_curves = {}
    for name in ("before", *names):
        replay_chain = replay_function(PROCEDURES[name])
        all_curves[name] = curves_of(chains, replay_chain)
        print(f"{name}: at most {largest_risk(all_curves[name]):.3f} wrong", flush=True)
    all_curves[ONE_LOOK_NAME] = curves_of(chains, exact_look_curve)
    sets = list(all_curves["before"])
    sets_with_half = [key for key in sets if key in HALF_OF_RANDOM]
    print(f"\n{len(sets)} sets, {len(chains)} replays, level {DELTA}\n")
    lines = share_table(all_curves, sets)
    print("\n".join(lines) + "\n")
    if sets_with_half:
        print(f"{len(sets_with_half)} sets with a known half of the coverage of random labels\n")
        lines = share_table(all_curves, sets_with_half)
        print("\n".join(lines) + "\n")
        lines = half_way_table(all_curves, sets_with_half)
        print("\n".join(lines) + "\n")
    if n_orders == 1:
        print(f"At {LABELS_OF_SET_TABLE} labels, by set (number of seeds)\n")
        print("\n".join(set_table(all_curves, sets)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or replay chains."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    chains = commands.add_parser("chains", help="Fit once for every set, seed and labels.")
    chains.add_argument("stores", type=Path, nargs="+")
    chains.add_argument("--out", type=Path, default=Path("build/chains"))
    chains.add_argument("--seeds", type=int, default=5)
    replays = commands.add_parser("replay", help="Compare procedures on the chains of a folder.")
    replays.add_argument("folder", type=Path)
    names = [name for name in PROCEDURES if name != "before"]
    replays.add_argument("--names", nargs="+", choices=names, default=names)
    replays.add_argument("--orders", type=int, default=1, help="Random orders of every chain.")
    options = parser.parse_args(arguments)
    if options.command == "chains":
        write_chains(options.stores, options.out, options.seeds)
    else:
        replay(options.folder, options.names, options.orders)


if __name__ == "__main__":
    main()
