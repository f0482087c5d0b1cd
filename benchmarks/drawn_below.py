"""Rows drawn up to a limit for one test: does the guarantee hold, and what do 300 labels accept?

    python -m benchmarks.drawn_below simulate [--draws 10000] [--worlds flat ...]
    python -m benchmarks.drawn_below measure STORE... --out build/drawn.csv [--seeds 20] [--first 0]
    python -m benchmarks.drawn_below table build/drawn.csv

``simulate``: rows of a world have a uniform rank in [0, 1), and a claimed and a true error rate at
every rank. 500 rows of the fit side choose the limit. Of 2,000 rows of the calibration side, 300
are drawn among those up to the limit, and their answers are right or wrong by the true rate. A
draw is *broken* if the true risk of the certified threshold is above 5 %. That may happen to 5 % of
the draws. Shown are the share of broken draws, its one-sided 95 % bound (Clopper and Pearson), and
the mean share of the answers that is accepted. The worlds:

- ``flat``: every answer is wrong with probability 5.01 %, so that whatever is certified is broken;
- ``honest``: the error rate is claimed rightly, and rises to 50 %;
- ``too sure``: twice as many answers are wrong as is claimed;
- ``trusted``: of the tenth that is trusted most 6 % are wrong, then 1 %, then more and more;
- ``few``: ``honest``, but 40 rows choose the limit, and 400 rows are on the calibration side;
- ``tied``: ``too sure`` with scores of ten values;
- ``same rows``: ``too sure``, but the limit is chosen by the calibration side itself, the rows that
  are drawn from. No command does that. It shows how much depends on the fit side.

``measure``: ``vilu_plus`` is fitted on 200 random labels of the fit side of a store, and judges its
adapted answers. 300 labels of the calibration side are tested at a risk of 5 % and a confidence of
95 %, once drawn up to the limit, and once uniformly among all rows. Coverage and risk are those of
the whole calibration side. A line is written for every store and seed, as it comes.

``table``: means over seeds, with 95 % intervals (t).
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from scipy import stats

import vilu
from vilu.calibration.thresholds import upper_bound
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.catalogue import find_method
from vilu.predictors.contract.parameters import build
from vilu.scoring.score import score
from vilu.store.reader import EmbeddingStore
from vilu.triage.choose import choose_limit_of_draw
from vilu.triage.labels import side_of
from vilu.triage.photos import Photos

MAX_RISK: Final = 0.05
DELTA: Final = 0.05
N_LABELS: Final = 300
N_TO_FIT: Final = 200

RANKS: Final = (np.arange(100_000) + 0.5) / 100_000
"""Ranks at which the true risk of a threshold is computed."""


# Simulation.


@dataclass(frozen=True)
class World:
    """Claimed and true error rates (M,) at the ranks (M,) of a world, and the numbers of rows."""

    claimed: Floats
    true: Floats
    n_fit: int = 500
    n_calibration: int = 2_000
    by_same_rows: bool = False


def worlds() -> dict[str, World]:
    """The simulated worlds, by name."""
    rising = 0.5 * RANKS**3
    doubled = np.minimum(2 * rising, 1)
    trusted = np.where(RANKS < 0.1, 0.06, 0.01 + rising)
    ten_values = np.ceil(10 * RANKS) / 10
    return {
        "flat": World(claimed=0.04 * RANKS, true=np.full(len(RANKS), 0.0501)),
        "honest": World(claimed=rising, true=rising),
        "too sure": World(claimed=rising, true=doubled),
        "trusted": World(claimed=rising, true=trusted),
        "few": World(claimed=rising, true=rising, n_fit=40, n_calibration=400),
        "tied": World(claimed=0.5 * ten_values**3, true=doubled),
        "same rows": World(claimed=rising, true=doubled, by_same_rows=True),
    }


def simulated(world: World, rng: np.random.Generator) -> tuple[float, float]:
    """Share of all answers that one draw accepts, and their true risk; (0, 0) for no answer."""
    rank = rng.integers(len(RANKS), size=world.n_calibration)
    uncertainty = world.claimed[rank]
    chooses = world.claimed[rng.integers(len(RANKS), size=world.n_fit)]
    if world.by_same_rows:
        chooses = uncertainty
    limit, _ = choose_limit_of_draw(chooses, N_LABELS, MAX_RISK, DELTA)
    below = np.flatnonzero(uncertainty <= limit)
    drawn = rng.permutation(below)[:N_LABELS]
    failure = (rng.random(len(drawn)) < world.true[rank[drawn]]).astype(np.int64)
    threshold = certified(uncertainty[drawn], failure)
    is_accepted = world.claimed <= threshold
    if not is_accepted.any():
        return 0.0, 0.0
    return float(is_accepted.mean()), float(world.true[is_accepted].mean())


def certified(uncertainty: Floats, failure: Ints) -> float:
    """The threshold that the drawn labels certify; -inf if there is none."""
    if not len(uncertainty):
        return -math.inf
    rule = vilu.certify(
        Outcomes(uncertainty, failure), max_risk=MAX_RISK, confidence=1 - DELTA, method="ltt"
    )
    return -math.inf if rule.threshold is None else rule.threshold


def simulate(names: Iterable[str], n_draws: int) -> None:
    """Print a line for every world."""
    print("world | draws | broken | 95 % bound | accepted")
    for name in names:
        world = worlds()[name]
        rng = np.random.default_rng(0)
        shares = []
        n_broken = 0
        for _ in range(n_draws):
            share, risk = simulated(world, rng)
            shares.append(share)
            n_broken += risk > MAX_RISK
        bound = upper_bound(n_broken, n_draws, 0.05)
        broken = n_broken / n_draws
        print(
            f"{name} | {n_draws} | {broken:.4f} | {bound:.4f} | {np.mean(shares):.3f}", flush=True
        )


# Real embeddings.


def measured(store: EmbeddingStore, seed: int) -> dict[str, float]:
    """Coverage and risk of both kinds of 300 labels on a store, and what the best limit accepts."""
    photos = Photos([(store, np.arange(len(store)))], {})
    is_calibration, _ = side_of(photos.pictures, seed)
    rng = np.random.default_rng(seed)
    fit_side = rng.permutation(np.flatnonzero(~is_calibration))
    predictor = build(find_method("vilu_plus"), {"seed": seed, "answer": "adapted"})
    predictor.fit(store.take(fit_side[:N_TO_FIT]))
    outcomes = score(predictor, store)
    uncertainty = outcomes.uncertainty
    failure = outcomes.failure
    calibration = np.flatnonzero(is_calibration)
    scores = uncertainty[calibration]
    wrong = failure[calibration]
    limit, _ = choose_limit_of_draw(uncertainty[fit_side[N_TO_FIT:]], N_LABELS, MAX_RISK, DELTA)
    order = rng.permutation(len(calibration))
    below = order[scores[order] <= limit]
    result = {}
    for name, rows in (("drawn", below[:N_LABELS]), ("uniform", order[:N_LABELS])):
        is_accepted = scores <= certified(scores[rows], wrong[rows])
        result[f"{name}_coverage"] = float(is_accepted.mean())
        result[f"{name}_risk"] = float(wrong[is_accepted].mean()) if is_accepted.any() else 0.0
    result["limit_coverage"] = float((scores <= limit).mean())
    result["hindsight"] = vilu.metrics.coverage_at_risk(scores, wrong, MAX_RISK)
    return result


def measure(paths: Sequence[Path], out: Path, seeds: range) -> None:
    """Append a line for every store and seed that the file lacks."""
    warnings.simplefilter("ignore")
    logging.getLogger("vilu").setLevel(logging.ERROR)
    known = set()
    if out.exists():
        known = {(line["store"], int(line["seed"])) for line in lines_of(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for path in paths:
            if (path.name, seed) in known:
                continue
            result = measured(EmbeddingStore(path), seed)
            line = {"store": path.name, "seed": seed, **result}
            is_new = not out.exists()
            with out.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(line))
                if is_new:
                    writer.writeheader()
                writer.writerow(line)


def lines_of(path: Path) -> list[dict[str, str]]:
    """The lines of a file that ``measure`` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path) -> None:
    """Print means over seeds, a line for every store."""
    by_store: dict[str, list[Mapping[str, str]]] = {}
    for line in lines_of(path):
        by_store.setdefault(line["store"], []).append(line)
    print("| set (seeds) | best in hindsight | 300 uniform | 300 drawn | difference | broken |")
    print("|---|---|---|---|---|---|")
    for store, lines in sorted(by_store.items()):
        column = {name: np.array([float(line[name]) for line in lines]) for name in COLUMNS}
        gain = column["drawn_coverage"] - column["uniform_coverage"]
        n_broken = [int((column[f"{kind}_risk"] > MAX_RISK).sum()) for kind in KINDS]
        print(
            f"| {store} ({len(lines)}) | {column['hindsight'].mean():.1%} "
            f"| {column['uniform_coverage'].mean():.1%} | {column['drawn_coverage'].mean():.1%} "
            f"| {gain.mean():+.1%} ± {half_width(gain):.1%} | {n_broken[0]}, {n_broken[1]} |"
        )


KINDS: Final = ("uniform", "drawn")
COLUMNS: Final = (
    "hindsight",
    *(f"{kind}_{what}" for kind in KINDS for what in ("coverage", "risk")),
)


def half_width(values: Floats) -> float:
    """Half the width of the 95 % interval (t) of a mean."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    simulation = commands.add_parser("simulate")
    simulation.add_argument("--draws", type=int, default=10_000)
    simulation.add_argument("--worlds", nargs="+", default=list(worlds()))
    measuring = commands.add_parser("measure")
    measuring.add_argument("stores", type=Path, nargs="+")
    measuring.add_argument("--out", type=Path, default=Path("build/drawn.csv"))
    measuring.add_argument("--first", type=int, default=0)
    measuring.add_argument("--seeds", type=int, default=20)
    printing = commands.add_parser("table")
    printing.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "simulate":
        simulate(options.worlds, options.draws)
    elif options.command == "measure":
        measure(options.stores, options.out, range(options.first, options.first + options.seeds))
    else:
        table(options.file)


if __name__ == "__main__":
    main()
