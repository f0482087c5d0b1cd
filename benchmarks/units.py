"""Do guarantees hold if pictures have copies? ``python -m benchmarks.units [SET.npz ...]``.

First, copies within the calibration rows: 40 rows, each ten times, are evidence for 40 rows only.
400 rows are drawn from a simulated world, without copies or with copies. The copies are equal or
have noise. There are 200 draws for each kind. Second, copies of fitted rows: a predictor is fitted
on 300 rows and calibrated on near copies of the same rows. "Counted as files" is a calibration from
scores alone. A rule is "broken" if the error rate among the accepted answers in 40,000 separate
rows is above 5 %. Intervals are exact 95 % intervals.

Sets (arrays ``image``, ``text``, ``target``) are halved twenty times at random. No half should be
refused, and the accepted share should hardly change.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import vilu
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.calibration.thresholds import lower_bound, upper_bound
from vilu.errors import DataError, InfeasibleError
from vilu.metrics.counts import Floats
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu_bench.methods.neighbours import KNNVote

WIDTH, CLASSES, SCALE = 128, 10, 20.0
N_POPULATION = 40_000
MAX_RISK = 0.05
DRAWS, HALVES = 200, 20
NOISE = 0.006
"""Noise in each of 128 coordinates. The cosine between two copies is then 0.995.

In 512 coordinates a noise of 0.003 has this effect.
"""

NOTHING_ACCEPTED, REFUSED = "nothing accepted", "refused"


def unit_rows(rows: Floats) -> Floats:
    """Scale rows to unit norm."""
    scaled: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


class World:
    """Images from ten classes, some blurred, so that doubtful answers are more often wrong."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        text = self.random.normal(size=(CLASSES, WIDTH))
        self.text = unit_rows(text)

    def rows(self, n: int) -> tuple[Floats, NDArray[np.int64]]:
        """Draw unit images (N, D), and the images' classes."""
        target = self.random.integers(CLASSES, size=n)
        blur = self.random.uniform(0.4, 3.2, size=(n, 1)) / np.sqrt(WIDTH) * 2
        image = self.text[target] + blur * self.random.normal(size=(n, WIDTH))
        return unit_rows(image), target

    def near_copies(self, image: Floats, noise: float) -> Floats:
        """Make near copies of images, with noise in every coordinate."""
        moved: Floats = image + noise * self.random.normal(size=image.shape)
        return unit_rows(moved)

    def embeddings(self, image: Floats, target: NDArray[np.int64]) -> vilu.Embeddings:
        """Return the images as a source."""
        return vilu.Embeddings(image, self.text, target=target, logit_scale=SCALE)


def verdict(rule: object, everything: Outcomes) -> str:
    """Judge a rule: "broken" or "kept", or ``NOTHING_ACCEPTED`` if no row is accepted."""
    accepted = rule.accept(everything.uncertainty)  # type: ignore[attr-defined]
    if not accepted.any():
        return NOTHING_ACCEPTED
    risk = everything.failure[accepted].mean()
    return "broken" if risk > MAX_RISK else "kept"


def verdict_without_copies(
    predictor: FailurePredictor, data: vilu.Embeddings, everything: Outcomes
) -> str:
    """Judge a calibration from scores alone."""
    rows = vilu.score(predictor, data)
    scores_alone = Outcomes(rows.uncertainty, rows.failure)
    rule = vilu.certify(scores_alone, max_risk=MAX_RISK)
    return verdict(rule, everything)


def verdict_with_copies(
    predictor: FailurePredictor, data: vilu.Embeddings, everything: Outcomes
) -> str:
    """Judge vilu's calibration, which recognises copies."""
    with tempfile.TemporaryDirectory() as folder:
        predictor.save(folder)
        try:
            target = Target(max_risk=MAX_RISK)
            record = calibrate_predictor(folder, data, target)
        except InfeasibleError:
            return NOTHING_ACCEPTED
        except DataError:
            return REFUSED
    return verdict(record.rule, everything)


CALIBRATIONS: dict[str, Callable[[FailurePredictor, vilu.Embeddings, Outcomes], str]] = {
    "counted as files": verdict_without_copies,
    "today": verdict_with_copies,
}

SETTINGS = {
    "400 rows": (400, 1, 0.0),
    "40 rows x 10, equal": (40, 10, 0.0),
    "40 rows x 10, noise": (40, 10, NOISE),
    "60 rows x 5, equal": (60, 5, 0.0),
    "60 rows x 5, noise": (60, 5, NOISE),
    "200 rows x 2, noise": (200, 2, NOISE),
}
"""Row count, how often each row occurs, and noise."""


def lines_on_repeated_rows(seed: int, draws: int) -> Iterator[str]:
    """Yield a line for each setting and each kind of calibration."""
    world = World(seed)
    predictor = vilu.MCM()
    everything = vilu.score(predictor, world.embeddings(*world.rows(N_POPULATION)))
    yield f"error rate of all answers: {everything.failure.mean():.1%}"
    for name, (n, times, noise) in SETTINGS.items():
        verdicts: dict[str, list[str]] = {way: [] for way in CALIBRATIONS}
        for _ in range(draws):
            image, target = world.rows(n)
            repeated = np.repeat(image, times, axis=0)
            if noise:
                repeated = world.near_copies(repeated, noise)
            repeated_target = np.repeat(target, times)
            data = world.embeddings(repeated, repeated_target)
            for way, run in CALIBRATIONS.items():
                verdict_of_way = run(predictor, data, everything)
                verdicts[way].append(verdict_of_way)
        for way, reached in verdicts.items():
            yield verdict_line(f"{name}, {way}", reached)


def lines_on_fitted_rows(seed: int, draws: int) -> Iterator[str]:
    """Yield the same lines for a predictor that remembers the fitted rows."""
    world = World(seed)
    image, target = world.rows(300)
    train = world.embeddings(image, target)
    predictor = KNNVote(k=1)
    predictor.fit(train)
    everything = vilu.score(predictor, world.embeddings(*world.rows(N_POPULATION)))
    for share in (0.0, 0.02, 0.5, 1.0):
        verdicts: dict[str, list[str]] = {way: [] for way in CALIBRATIONS}
        for _ in range(draws):
            n_copies = round(300 * share)
            copied = world.random.permutation(300)[:n_copies]
            fresh, labels = world.rows(300 - n_copies)
            near_copies = world.near_copies(image[copied], NOISE / 2)
            rows = np.concatenate([fresh, near_copies])
            target_of_rows = np.concatenate([labels, target[copied]])
            data = world.embeddings(rows, target_of_rows)
            for way, run in CALIBRATIONS.items():
                verdict_of_way = run(predictor, data, everything)
                verdicts[way].append(verdict_of_way)
        for way, reached in verdicts.items():
            yield verdict_line(f"{share:.0%} near copies of fitted rows, {way}", reached)


def verdict_line(name: str, verdicts: list[str]) -> str:
    """Format how often a guarantee was broken, with the interval, and how often none was given."""
    n, broken = len(verdicts), verdicts.count("broken")
    low, high = lower_bound(broken, n, 0.025), upper_bound(broken, n, 0.025)
    return (
        f"{name}: broken {broken / n:.1%} ({low:.1%} to {high:.1%}), "
        f"{NOTHING_ACCEPTED} {verdicts.count(NOTHING_ACCEPTED) / n:.1%}, "
        f"{REFUSED} {verdicts.count(REFUSED) / n:.1%}"
    )


def halves_line(path: Path, seed: int) -> str:
    """Return a real set's line: refused halves, and accepted shares of the second half."""
    arrays = np.load(path, allow_pickle=False)
    random = np.random.default_rng(seed)
    image = arrays["image"].astype(np.float32)
    refused, before, after = 0, [], []
    for _ in range(HALVES):
        order = random.permutation(len(image))
        parts = []
        for places in np.array_split(order, 2):
            target = arrays["target"][places]
            parts.append(
                vilu.Embeddings(image[places], arrays["text"], target=target, logit_scale=100.0)
            )
        train, rest = parts
        predictor = KNNVote(k=10).fit(train)
        outcomes = vilu.score(predictor, rest)
        scores_alone = Outcomes(outcomes.uncertainty, outcomes.failure)
        as_before = vilu.certify(scores_alone, max_risk=MAX_RISK)
        is_accepted = as_before.accept(outcomes.uncertainty)
        before.append(is_accepted.mean())
        with tempfile.TemporaryDirectory() as folder:
            predictor.save(folder)
            try:
                rule = calibrate_predictor(folder, rest, Target(max_risk=MAX_RISK)).rule
                after.append(rule.accept(outcomes.uncertainty).mean())  # type: ignore[union-attr]
            except InfeasibleError:
                after.append(0.0)
            except DataError:
                refused += 1
    return (
        f"{path.stem}: {refused} of {HALVES} halves refused, "
        f"accepted {np.mean(before):.2%} counted as files, {np.mean(after):.2%} today"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Whether guarantees hold on copies.")
    parser.add_argument("sets", nargs="*", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=DRAWS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for words in lines_on_repeated_rows(options.seed, options.draws):
        print(words, flush=True)
    for words in lines_on_fitted_rows(options.seed, options.draws):
        print(words, flush=True)
    for path in options.sets:
        print(halves_line(path, options.seed), flush=True)


if __name__ == "__main__":
    main()
