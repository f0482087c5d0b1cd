"""What the method's own answers gain over zero-shot ones, and whether guarantees about them hold.

    python -m benchmarks.answers ARRAYS [--divisions 2] [--draws 200] [--labels 5 16 0]

ARRAYS is a folder of ``.npz`` files with ``image``, ``text`` and ``target`` (CLIP's logit scale of
100). Each set is divided into halves, which a seed draws. Methods are fitted on the labels of one
half, so many a class (0: all of them), and the other half is read:

- ``zero-shot``: the zero-shot answers, judged by ViLU+;
- ``adapted``: the answers of ViLU+, and ``+ images``: with the images of the fitted half beside;
- ``probe``: the answers of the linear probe, judged by itself.

Per method: accuracy, and the largest coverage with at most 5, 10 and 20 % wrong (hindsight). Then
calibrations: rows of the other half, as many as it has, are drawn with replacement, so that this
half is the population and the risk of every threshold is known. ``certified`` is the mean coverage
of the rules at 5 % with a confidence of 95 %, ``broken`` the share of rules whose true risk is
above 5 %, with its one-sided 95 % bound (Clopper and Pearson).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import beta

import vilu
from vilu.metrics import coverage_at_risk
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes

RISKS = (0.05, 0.1, 0.2)
MAX_RISK = RISKS[0]
METHODS = ("zero-shot", "adapted", "+ images", "probe")


@dataclass
class Figures:
    """What was read of one method at one number of labels, over sets and divisions."""

    accuracy: list[float] = field(default_factory=list)
    coverage: list[list[float]] = field(default_factory=list)  # at each of ``RISKS``
    certified: list[float] = field(default_factory=list)  # mean over the calibrations of a set
    n_broken: int = 0
    n_calibrations: int = 0

    def __iadd__(self, other: Figures) -> Figures:
        self.accuracy += other.accuracy
        self.coverage += other.coverage
        self.certified += other.certified
        self.n_broken += other.n_broken
        self.n_calibrations += other.n_calibrations
        return self


def few_per_class(target: Ints, rows: Ints, n: int, rng: np.random.Generator) -> Ints:
    """At most ``n`` random rows of every class, of these; all of them where n is 0."""
    if n == 0:
        return rows
    chosen = []
    for label in np.unique(target[rows]):
        of_class = rows[target[rows] == label]
        chosen.append(rng.permutation(of_class)[:n])
    return np.sort(np.concatenate(chosen))


def outcomes_of(
    arrays: dict[str, np.ndarray], n_labels: int, seed: int
) -> Iterator[tuple[str, Outcomes]]:
    """Scores of the second half by every method that is fitted on the first."""
    image, text = arrays["image"].astype(np.float32), arrays["text"].astype(np.float32)
    target = arrays["target"]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(target))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    labelled = few_per_class(target, first, n_labels, rng)
    train = vilu.Embeddings(image[labelled], text, target=target[labelled])
    new = vilu.Embeddings(image[second], text, target=target[second])
    images = vilu.Embeddings(image[first], text)
    zero_shot = vilu.ViLUPlus(seed=seed).fit(train)
    yield "zero-shot", vilu.score(zero_shot, new)
    yield "adapted", vilu.score(vilu.ViLUPlus(seed=seed, answer="adapted").fit(train), new)
    beside = vilu.ViLUPlus(seed=seed, answer="adapted").fit(train, unlabelled=images)
    yield "+ images", vilu.score(beside, new)
    probe = vilu.PREDICTORS["linear_probe"](answer="adapted").fit(train)
    yield "probe", vilu.score(probe, new)


def calibrate_often(outcomes: Outcomes, draws: int, seed: int, figures: Figures) -> None:
    """Add the rules of so many calibrations, whose true risk these outcomes are."""
    rng = np.random.default_rng(seed)
    u, failure = outcomes.uncertainty, outcomes.failure
    coverages = []
    for _ in range(draws):
        rows = rng.integers(len(u), size=len(u))
        rule = vilu.certify(Outcomes(u[rows], failure[rows]), max_risk=MAX_RISK)
        accepted = rule.accept(u)
        coverages.append(float(accepted.mean()))
        if accepted.any():
            figures.n_broken += bool(failure[accepted].mean() > MAX_RISK)
    figures.n_calibrations += draws
    figures.certified.append(float(np.mean(coverages)))


def add(outcomes: Outcomes, draws: int, seed: int, figures: Figures) -> None:
    """Add everything that is read of one set."""
    u, failure = outcomes.uncertainty, outcomes.failure
    figures.accuracy.append(1 - float(failure.mean()))
    figures.coverage.append([float(coverage_at_risk(u, failure, risk=risk)) for risk in RISKS])
    calibrate_often(outcomes, draws, seed, figures)


def upper_bound(n_broken: int, n: int) -> float:
    """One-sided 95 % upper bound of a share."""
    if n_broken == n:
        return 1.0
    return float(beta.ppf(0.95, n_broken + 1, n - n_broken))


def line(name: str, figures: Figures) -> str:
    """The means of a method."""
    means: Floats = 100 * np.mean(figures.coverage, axis=0)
    broken = figures.n_broken / figures.n_calibrations
    bound = upper_bound(figures.n_broken, figures.n_calibrations)
    hindsight = "  ".join(f"{value:5.1f}" for value in means)
    return (
        f"{name:10} accuracy {100 * np.mean(figures.accuracy):5.1f}  coverage {hindsight}  "
        f"certified {100 * np.mean(figures.certified):5.1f}  "
        f"broken {100 * broken:4.1f} (at most {100 * bound:.1f}) of {figures.n_calibrations:,}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for every set, and the means over the sets."""
    parser = argparse.ArgumentParser(description="What adapted answers gain.")
    parser.add_argument("arrays", type=Path, help="folder of .npz files")
    parser.add_argument("--divisions", type=int, default=2)
    parser.add_argument("--draws", type=int, default=200, help="calibrations of a set")
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 16, 0], help="0: all")
    parser.add_argument("--leave-out", nargs="+", default=["words", "imagenet1k"])
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", UserWarning)  # classes with few rows
    files = []
    for path in sorted(options.arrays.glob("*.npz")):
        if not path.name.startswith(tuple(options.leave_out)):
            files.append(path)
    for n_labels in options.labels:
        total = {name: Figures() for name in METHODS}
        for path in files:
            arrays = dict(np.load(path))
            of_set = {name: Figures() for name in METHODS}
            for seed in range(options.divisions):
                for name, outcomes in outcomes_of(arrays, n_labels, seed):
                    add(outcomes, options.draws, seed, of_set[name])
            for name, figures in of_set.items():
                total[name] += figures
                print(f"{n_labels or 'all':>4} {path.stem:24} {line(name, figures)}", flush=True)
        for name, figures in total.items():
            print(f"{n_labels or 'all':>4} {'MEAN':24} {line(name, figures)}", flush=True)


if __name__ == "__main__":
    main()
