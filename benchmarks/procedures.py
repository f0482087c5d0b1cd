"""Compares procedures for testing a guarantee while labels arrive, by replays on stored scores.

    python -m benchmarks.procedures chains STORE... --out build/chains --seeds 5
    python -m benchmarks.procedures replay build/chains [--names before default ...]

``chains`` fits ``vilu_plus`` on more and more labels, chosen as in a triage, and writes the scores
to a file for every set and seed. Existing files are not changed. ``replay`` replays every procedure
on every chain (``benchmarks.replays``), and prints

1. the accepted share of the photos without a label at a guaranteed risk of 5 % (confidence 95 %),
   as a mean over sets, and the difference from ``before`` with its 95 % interval over sets (t).
2. the same over the sets in ``COVERAGE_OF_RANDOM``, and the label count until a procedure is
   half-way, at half of the coverage in this table. The ratio to ``before`` has a 95 % interval by
   bootstrap over seeds.
3. the same shares for every set at 400 labels, as means over seeds, with 95 % intervals over seeds.

With ``--orders`` every chain is replayed in several random photo orders. A seed's share is then a
mean over orders.

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
from typing import Final, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.replays import (
    CHOICE_TO_END_OF_DRAWS,
    CHOICE_TO_FIRST_OPEN,
    DELTA,
    MAX_LABELS,
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

COVERAGE_OF_RANDOM: Final = {
    "caltech66": 0.96,
    "clothing": 0.15,
    "food9": 0.92,
    "pets_in123": 0.77,
    "proto_oxfordpets": 0.57,
    "proto_ucf101": 0.53,
}
"""Maps a set to the coverage of zero-shot answers that random labels reach in the end.

The numbers are those of the arm ``random`` with 2,000 labels (food: 1,200) in
docs/triage-measured.md. CIFAR-10 has 0.02 there, half of which a single lucky run exceeds.
"""

COMPARED_COUNTS: Final = tuple(range(50, MAX_LABELS + 1, 50))
"""Label counts at which the procedures are compared."""

LABELS_IF_NEVER: Final = 2 * MAX_LABELS
"""Count entered for a procedure that does not get half-way with ``MAX_LABELS`` labels."""

N_RESAMPLES: Final = 1_000


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

PARTIAL: Final = ".partial.npz"
"""End of the name of a chain's file that is not complete yet."""


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


def chain_paths(folder: Path) -> list[Path]:
    """Return the files of complete chains in a folder, in order."""
    paths = [path for path in folder.glob("*.npz") if not path.name.endswith(PARTIAL)]
    return sorted(paths)


def write_chains(paths: Iterable[Path], out: Path, seeds: Iterable[int]) -> None:
    """Write the missing chains, seed by seed. For each seed, write the chains of all sets."""
    warnings.simplefilter("ignore")
    logging.getLogger("vilu").setLevel(logging.ERROR)
    out.mkdir(parents=True, exist_ok=True)
    stores = {path.name: EmbeddingStore(path) for path in paths}
    for seed in seeds:
        for name, store in stores.items():
            path = out / f"{name}_{seed}.npz"
            if path.exists():
                continue
            # a killed run leaves no incomplete file with this name
            partial = path.with_suffix(PARTIAL)
            write_chain(store, seed, partial)
            partial.rename(path)
            print(path, flush=True)


# Replays.

Curve = list[Reached]


class Coverages(NamedTuple):
    """The accepted shares of the photos without a label, of one procedure.

    Attributes:
        of_set: Maps a set's name to an array (S, L) of the shares with S seeds, at the L label
            counts in ``COMPARED_COUNTS``. A seed's share is a mean over the photo orders.
        largest_risk: Largest error rate among accepted photos, over all rounds in all replays.
    """

    of_set: dict[str, Floats]
    largest_risk: float


def coverage_at(curve: Curve, n_labels: int) -> float:
    """Return the coverage reached with at most ``n_labels`` labels."""
    reached = [point.coverage for point in curve if point.n_labels <= n_labels]
    return reached[-1] if reached else 0.0


def coverages_of(
    chains: Iterable[Chain], n_orders: int, replay_chain: Callable[[Chain], Curve]
) -> Coverages:
    """Replay every chain in ``n_orders`` photo orders. ``replay_chain`` returns a chain's curve."""
    of_set: dict[str, list[Floats]] = {}
    risks = []
    for chain in chains:
        of_orders = []
        for number in range(n_orders):
            curve = replay_chain(chain.in_another_order(number))
            risks += [point.risk for point in curve]
            of_orders.append([coverage_at(curve, n_labels) for n_labels in COMPARED_COUNTS])
        of_seed: Floats = np.mean(of_orders, axis=0)
        of_set.setdefault(chain.name, []).append(of_seed)
    arrays = {name: np.array(of_seeds) for name, of_seeds in of_set.items()}
    return Coverages(arrays, max(risks))


def replay_function(procedure: Procedure) -> Callable[[Chain], Curve]:
    """Return a function that replays a procedure on a chain, and returns the rounds."""
    return lambda chain: list(Replay(chain, procedure).rounds())


def exact_look_curve(chain: Chain) -> Curve:
    """Make an exact look at every label count, each as if there were no other look."""
    curve = []
    for n_labels in COMPARED_COUNTS:
        coverage = exact_look(chain, n_labels, ONE_LOOK, EXACT_SHARE)
        reached = Reached(n_labels, coverage, 0.0)
        curve.append(reached)
    return curve


def column_of(n_labels: int) -> int:
    """Return the column of a label count in an array of coverages."""
    return COMPARED_COUNTS.index(n_labels)


def labels_to_half(coverages: Floats, half: float) -> int:
    """Return the first label count whose mean coverage reaches ``half``, or ``LABELS_IF_NEVER``.

    ``coverages`` is an array (S, L).
    """
    has_half = coverages.mean(axis=0) >= half
    if not has_half.any():
        return LABELS_IF_NEVER
    return COMPARED_COUNTS[int(has_half.argmax())]


def half_width(differences: Floats) -> float:
    """Return half the width of a mean's 95 % interval (t), NaN for a single number."""
    n = len(differences)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))


def share_table(of_procedures: Mapping[str, Coverages], sets: Sequence[str]) -> Iterator[str]:
    """Yield mean coverage over sets at every label count, and the difference from ``before``."""
    yield "| procedure | " + " | ".join(f"{n}" for n in LABEL_COUNTS) + " |"
    yield "|---" * (len(LABEL_COUNTS) + 1) + "|"
    before = of_procedures["before"].of_set
    for name, coverages in of_procedures.items():
        cells = []
        for n_labels in LABEL_COUNTS:
            column = column_of(n_labels)
            share = np.array([coverages.of_set[key][:, column].mean() for key in sets])
            share_before = np.array([before[key][:, column].mean() for key in sets])
            difference = share - share_before
            cell = f"{share.mean():.3f}"
            if name != "before":
                cell += f" ({difference.mean():+.3f} ± {half_width(difference):.3f})"
            cells.append(cell)
        yield f"| {name} | " + " | ".join(cells) + " |"


def half_way_counts(of_set: Mapping[str, Floats], sets: Sequence[str]) -> Ints:
    """Return the label count until half-way on every set."""
    counts = [labels_to_half(of_set[key], COVERAGE_OF_RANDOM[key] / 2) for key in sets]
    return np.array(counts, dtype=np.int64)


def mean_ratio(
    of_set: Mapping[str, Floats], before: Mapping[str, Floats], sets: Sequence[str]
) -> float:
    """Return the mean over sets of the labels until half-way, divided by those of ``before``.

    If only ``before`` does not get half-way, its count is ``MAX_LABELS``, so the set's ratio is an
    upper bound. If neither gets half-way, the ratio is 1.
    """
    counts = half_way_counts(of_set, sets)
    counts_before = half_way_counts(before, sets)
    is_reached = counts < LABELS_IF_NEVER
    at_most = np.where(is_reached, MAX_LABELS, LABELS_IF_NEVER)
    ratios = counts / np.minimum(counts_before, at_most)
    return float(ratios.mean())


def ratio_interval(
    of_set: Mapping[str, Floats], before: Mapping[str, Floats], sets: Sequence[str]
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval over seeds of ``mean_ratio``. One seed gives NaN.

    Both procedures have the same seeds, so each resample takes the same seeds from both.
    """
    if min(len(of_set[key]) for key in sets) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(N_RESAMPLES):
        resampled = {}
        resampled_before = {}
        for key in sets:
            n_seeds = len(of_set[key])
            seeds = rng.integers(n_seeds, size=n_seeds)
            resampled[key] = of_set[key][seeds]
            resampled_before[key] = before[key][seeds]
        ratios.append(mean_ratio(resampled, resampled_before, sets))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def half_way_table(of_procedures: Mapping[str, Coverages], sets: Sequence[str]) -> Iterator[str]:
    """Yield the label count until half-way on every set, and the mean ratio to ``before``."""
    yield "| procedure | " + " | ".join(sets) + " | mean ratio |"
    yield "|---" * (len(sets) + 2) + "|"
    before = of_procedures["before"].of_set
    for name, coverages in of_procedures.items():
        counts = half_way_counts(coverages.of_set, sets)
        ratio = mean_ratio(coverages.of_set, before, sets)
        low, high = ratio_interval(coverages.of_set, before, sets)
        cells = [str(n) if n < LABELS_IF_NEVER else "–" for n in counts.tolist()]
        yield f"| {name} | " + " | ".join(cells) + f" | {ratio:.2f} [{low:.2f}, {high:.2f}] |"


def set_table(of_procedures: Mapping[str, Coverages], sets: Sequence[str]) -> Iterator[str]:
    """Yield every set's coverage at ``LABELS_OF_SET_TABLE`` labels, and the gain on ``before``."""
    before = of_procedures["before"].of_set
    yield "| procedure | " + " | ".join(f"{key} ({len(before[key])})" for key in sets) + " |"
    yield "|---" * (len(sets) + 1) + "|"
    column = column_of(LABELS_OF_SET_TABLE)
    for name, coverages in of_procedures.items():
        cells = []
        for key in sets:
            share = coverages.of_set[key][:, column]
            difference = share - before[key][:, column]
            cell = f"{share.mean():.2f}"
            if name != "before":
                cell += f" ({difference.mean():+.2f} ± {half_width(difference):.2f})"
            cells.append(cell)
        yield f"| {name} | " + " | ".join(cells) + " |"


def replay(folder: Path, names: Sequence[str], n_orders: int) -> None:
    """Replay the procedures on all chains in a folder, and print the tables.

    Every chain is replayed in ``n_orders`` random photo orders. All orders of a chain have the same
    fits, so the tables average over orders, and their intervals are over seeds.
    """
    chains = [Chain.load(path) for path in chain_paths(folder)]
    of_procedures = {}
    for name in ("before", *names):
        replay_chain = replay_function(PROCEDURES[name])
        of_procedures[name] = coverages_of(chains, n_orders, replay_chain)
        print(f"{name}: at most {of_procedures[name].largest_risk:.3f} wrong", flush=True)
    of_procedures[ONE_LOOK_NAME] = coverages_of(chains, n_orders, exact_look_curve)
    sets = list(of_procedures["before"].of_set)
    sets_with_half = [key for key in sets if key in COVERAGE_OF_RANDOM]
    n_replays = len(chains) * n_orders
    print(f"\n{len(sets)} sets, {n_replays} replays, level {DELTA}\n")
    lines = share_table(of_procedures, sets)
    print("\n".join(lines) + "\n")
    if sets_with_half:
        print(f"{len(sets_with_half)} sets where the coverage of random labels is known\n")
        lines = share_table(of_procedures, sets_with_half)
        print("\n".join(lines) + "\n")
        lines = half_way_table(of_procedures, sets_with_half)
        print("\n".join(lines) + "\n")
    print(f"At {LABELS_OF_SET_TABLE} labels, by set (number of seeds)\n")
    print("\n".join(set_table(of_procedures, sets)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or replay chains."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    chains = commands.add_parser("chains", help="Fit once for every set, seed and labels.")
    chains.add_argument("stores", type=Path, nargs="+")
    chains.add_argument("--out", type=Path, default=Path("build/chains"))
    chains.add_argument("--seeds", type=int, default=5, help="Number of seeds.")
    chains.add_argument("--first-seed", type=int, default=0)
    replays = commands.add_parser("replay", help="Compare procedures on the chains of a folder.")
    replays.add_argument("folder", type=Path)
    names = [name for name in PROCEDURES if name != "before"]
    replays.add_argument("--names", nargs="+", choices=names, default=names)
    replays.add_argument("--orders", type=int, default=1, help="Random orders of every chain.")
    options = parser.parse_args(arguments)
    if options.command == "chains":
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        write_chains(options.stores, options.out, seeds)
    else:
        replay(options.folder, options.names, options.orders)


if __name__ == "__main__":
    main()
