"""Whether guarantees about the photos of a folder without a label hold.

    python -m benchmarks.closed_folder [--folders 1000] [--risks 0.05 0.2]

The folders are simulated, so the true answers are known. Two predictors are fitted, the second on
more photos than the first. Photos to fit on are picked as in ``vilu triage``: by k-means on the
embeddings, weighted by the uncertainty. A predictor's population is all photos outside the
predictor's fit. These photos are labelled in a random order, fixed before. Whenever a further
eighth of the folder has a label, the tests look (``vilu.calibration.closed_set``).

A folder is *broken* if, at any look, a certified threshold accepts photos without a label, and the
share of wrong answers among these photos is above the largest risk. At most 5 % of the folders may
be broken. The output has the share of broken folders, and a one-sided 95 % bound on this share
(Clopper and Pearson). The output also has the largest share of a folder accepted at a look without
a label, as a mean over the folders. Three tests are compared:

- ``bets``: ``ClosedSetTests``, valid at any time and at all thresholds.
- ``one look``: the exact test at the limit, made once: at the first look at the first predictor.
- ``every look``: the same exact test, repeated at every look. This is not valid.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import vilu
from vilu.calibration.anytime import level_of, threshold_grid
from vilu.calibration.closed_set import ClosedCounts, ClosedSetTests
from vilu.calibration.thresholds import upper_bound
from vilu.metrics.counts import Floats, Ints
from vilu.triage.choose import choose_rows_to_fit

DELTA = 0.05
SIZES = (50, 200, 1_000)
RISKS = (0.05, 0.2)
TESTS = ("bets", "one look", "every look")
DIM = 3
LIMIT = 0.6
"""Share of the population up to the limit for draws."""

SHARE_PICKED = 0.1
"""Share of the folder picked to fit each predictor."""

MAX_PICKED = 40
"""Largest number of photos picked to fit each predictor."""

LOOKS = 3
"""Looks for each predictor. Before each look, an eighth of the folder is labelled."""

KERNEL_WIDTH = 0.3
"""In the predictor, a label at this distance has exp(-1/2) of the weight at distance 0."""

Rate = Callable[[Floats, float], Floats]


def learnable(image: Floats, risk: float) -> Floats:
    """Put most wrong answers on one side of the embeddings, so a predictor can learn this side."""
    return np.where(image[:, 0] > 0.4, 6.2 * risk, 0.2 * risk)


def just_above(image: Floats, risk: float) -> Floats:
    """Set the error rate a little above the largest risk everywhere."""
    return np.full(len(image), 1.02 * risk)


def confident_mistakes(image: Floats, risk: float) -> Floats:
    """Make some answers wrong where the first uncertainty says nothing."""
    return np.where(image[:, 1] > 0.85, 0.9 + 0.3 * risk, 0.3 * risk)


def where_picked(image: Floats, risk: float) -> Floats:
    """Make many answers wrong where photos are picked for a fit, and fewer elsewhere."""
    return np.where(image[:, 0] > 0.8, 0.8 + 0.8 * risk, 0.8 * risk)


WORLDS: dict[str, Rate] = {
    "learnable": learnable,
    "just above": just_above,
    "confident mistakes": confident_mistakes,
    "where picked": where_picked,
}
"""Probability (N,) of a wrong answer, from embeddings (N, D) and the largest risk."""


class Folder:
    """A world's photos with true answers, and the random order of the labels."""

    def __init__(self, world: str, n_photos: int, seed: int, max_risk: float) -> None:
        rng = np.random.default_rng([seed, n_photos])
        image = rng.normal(size=(n_photos, DIM))
        self.image = image / np.linalg.norm(image, axis=1, keepdims=True)
        unlimited_rate = WORLDS[world](self.image, max_risk)
        rate = np.minimum(unlimited_rate, 1.0)
        is_wrong = rng.random(n_photos) < rate
        self.wrong = is_wrong.astype(np.int64)
        self.position = rng.permutation(n_photos)
        # the uncertainty before the first label: informative in some worlds
        self.first_uncertainty = self.image[:, 0] + 0.1 * rng.normal(size=n_photos)
        self.max_risk = max_risk
        self.seed = seed

    def uncertainty(self, picked: Ints) -> Floats:
        """Return the smoothed wrong share (N,) among the picked photos (M,) near each photo."""
        distance = np.linalg.norm(self.image[:, None] - self.image[picked], axis=2)
        weight = np.exp(-0.5 * (distance / KERNEL_WIDTH) ** 2)
        prior = 0.1 + 0.01 * self.first_uncertainty  # the value where no picked photo is near
        smoothed: Floats = (weight @ self.wrong[picked] + prior) / (weight.sum(axis=1) + 1)
        return smoothed


class LookResults(NamedTuple):
    """A test's results at all looks at a folder."""

    broken: bool = False
    accepted: float = 0.0  # largest share of the folder accepted at a look without a label

    def with_look(self, folder: Folder, is_left: NDArray[np.bool_]) -> LookResults:
        """Return the results after a look that accepts the unlabelled photos ``is_left`` (N,)."""
        is_false = bool(folder.wrong[is_left].sum() > folder.max_risk * is_left.sum())
        accepted = max(self.accepted, float(is_left.mean()))
        return LookResults(self.broken or is_false, accepted)


def look_results(folder: Folder) -> dict[str, LookResults]:
    """Fit both predictors, draw labels, and look with every test after every draw."""
    n = len(folder.wrong)
    source = vilu.Embeddings(folder.image, np.eye(DIM))
    is_picked = np.zeros(n, np.bool_)
    uncertainty = folder.first_uncertainty
    results = dict.fromkeys(TESTS, LookResults())
    n_picks = min(max(int(SHARE_PICKED * n), 5), MAX_PICKED)
    for attempt in (1, 2):
        # Photos already drawn may be picked, too. Otherwise only photos without a label would leave
        # the population, and the photos left without a label would differ from the drawn photos.
        rows = np.flatnonzero(~is_picked)
        picks = choose_rows_to_fit(source, rows, uncertainty, n_picks, folder.seed)
        is_picked[picks] = True
        uncertainty = folder.uncertainty(np.flatnonzero(is_picked))
        looks = tests_of(folder, uncertainty[~is_picked], attempt)
        is_below = ~is_picked & (uncertainty <= looks.limit)
        for look in range(1, LOOKS + 1):
            n_looks = (attempt - 1) * LOOKS + look
            drawn = is_below & (folder.position < n_looks * n // 8)
            is_left = is_below & ~drawn
            at = looks.index_of_laxest_certified_threshold(uncertainty[drawn], folder.wrong[drawn])
            if at is not None:
                is_accepted = is_left & (uncertainty <= looks.grid[at])
                results["bets"] = results["bets"].with_look(folder, is_accepted)
            if is_shown_exactly(folder, drawn, is_left):
                results["every look"] = results["every look"].with_look(folder, is_left)
                if n_looks == 1:
                    results["one look"] = results["one look"].with_look(folder, is_left)
    return results


def exact_tail(wrong: int, drawn: int, n_photos: int, total: int) -> float:
    """Compute the p-value of "``total`` or more photos are answered wrongly", for a single look.

    The p-value is the probability that at most ``wrong`` drawn answers are wrong if ``total`` of
    all photos are wrong (hypergeometric). With more wrong photos this probability is smaller, so
    the p-value is valid for all larger numbers, too.

    Examples:
        >>> from benchmarks.closed_folder import exact_tail
        >>> exact_tail(wrong=0, drawn=2, n_photos=4, total=2)  # (2 / 4) (1 / 3)
        0.16666666666666666
    """
    if total > n_photos - (drawn - wrong):
        return 0.0
    ways = 0
    for n_wrong in range(wrong + 1):
        ways += math.comb(total, n_wrong) * math.comb(n_photos - total, drawn - n_wrong)
    return ways / math.comb(n_photos, drawn)


def is_shown_exactly(folder: Folder, drawn: NDArray[np.bool_], is_left: NDArray[np.bool_]) -> bool:
    """Return whether the exact test, made once, shows the guarantee for the photos ``is_left``."""
    n_wrong = int(folder.wrong[drawn].sum())
    n_drawn = int(drawn.sum())
    n_left = int(is_left.sum())
    if not n_left:
        return False
    total = n_wrong + math.floor(folder.max_risk * n_left) + 1
    return exact_tail(n_wrong, n_drawn, n_drawn + n_left, total) <= DELTA


def tests_of(folder: Folder, population: Floats, attempt: int) -> ClosedSetTests:
    """Make a predictor's tests on the uncertainties (M,) of a population."""
    limit = float(np.quantile(population, LIMIT, method="higher"))
    grid = threshold_grid(population, limit)
    no_scores = np.zeros(0)
    no_failure = np.zeros(0, np.int64)
    closed = ClosedCounts.of(grid, population, aside_scores=no_scores, aside_failure=no_failure)
    level = level_of(attempt, DELTA)
    return ClosedSetTests(grid, folder.max_risk, level, closed, limit)


class BrokenFolders(NamedTuple):
    """How many folders are broken, and the accepted share."""

    n: int
    n_broken: int
    accepted: float  # largest share of a folder accepted at a look, as a mean over the folders

    def __str__(self) -> str:
        share = self.n_broken / self.n
        bound = upper_bound(self.n_broken, self.n, 0.05)
        return f"{100 * self.accepted:.1f} | {100 * share:.2f} (≤ {100 * bound:.2f}) | {self.n:,}"


def measure(world: str, n_photos: int, max_risk: float, n_folders: int) -> dict[str, BrokenFolders]:
    """Look at many folders of a world, and evaluate every test."""
    all_results = []
    for seed in range(n_folders):
        folder = Folder(world, n_photos, seed, max_risk)
        results_of_folder = look_results(folder)
        all_results.append(results_of_folder)
    broken = {}
    for test in TESTS:
        n_broken = sum(results[test].broken for results in all_results)
        accepted = float(np.mean([results[test].accepted for results in all_results]))
        broken[test] = BrokenFolders(n_folders, n_broken, accepted)
    return broken


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a JSON line for every world, size, risk and test, and then a table."""
    parser = argparse.ArgumentParser(description="Guarantees about photos without a label.")
    parser.add_argument(
        "--folders", type=int, default=1_000, help="number of folders for every line"
    )
    parser.add_argument("--risks", type=float, nargs="+", default=RISKS, help="largest risks")
    options = parser.parse_args(arguments)
    total: dict[tuple[str, float], list[BrokenFolders]] = {}
    for max_risk in options.risks:
        for world in WORLDS:
            for n_photos in SIZES:
                by_test = measure(world, n_photos, max_risk, options.folders)
                for test, broken in by_test.items():
                    facts = {"test": test, "risk": max_risk, "world": world, "photos": n_photos}
                    counts = broken._asdict()
                    print(json.dumps({**facts, **counts}), flush=True)
                    total.setdefault((test, max_risk), []).append(broken)
    print("| test | risk | accepted | broken | folders |\n|---|---|---|---|---|")
    for (test, max_risk), parts in total.items():
        n = sum(part.n for part in parts)
        n_broken = sum(part.n_broken for part in parts)
        accepted = float(np.mean([part.accepted for part in parts]))
        print(f"| {test} | {max_risk} | {BrokenFolders(n, n_broken, accepted)} |")


if __name__ == "__main__":
    main()
