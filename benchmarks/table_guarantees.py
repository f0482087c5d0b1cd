"""Whether the guarantee for answer tables holds, in worlds with a known risk.

    python -m benchmarks.table_guarantees [--fits 20] [--calibrations 25] [--seed 0]

A world has 50,000 answers. A method is fitted on 300 answers, and then calibrated many times. Each
calibration draws 500 random answers outside the fit, at a 5 % risk. A calibration is *broken* if
more than 5 % of the accepted answers in the world are wrong. At most 5 % of the calibrations may be
broken. The output has the share of broken calibrations with an exact 95 % interval (Clopper and
Pearson, 2.5 % on each side), and the mean share of accepted answers. The worlds:

- ``useful``: three columns are a hidden certainty with noise, and 18 % of the answers are wrong.
- ``coarse``: like ``useful``, but columns are rounded to steps of 0.5, so many scores are equal.
- ``flat``: 5.1 % of the answers are wrong, for all column values.
"""

from __future__ import annotations

import argparse
from typing import Any, Final

import numpy as np

import vilu
from vilu.calibration.thresholds import lower_bound, upper_bound
from vilu.methods import AnswerProbe, AnswerScore, AnswerScores
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes

MAX_RISK: Final = 0.05
N_ANSWERS: Final = 50_000
N_FIT: Final = 300
N_CALIBRATION: Final = 500
WORLDS: Final = ("useful", "coarse", "flat")


def world_of(name: str, rng: np.random.Generator) -> vilu.AnswerTable:
    """Make all answers in a world, as a table."""
    hidden = rng.normal(size=N_ANSWERS)
    score_a = hidden + rng.normal(size=N_ANSWERS)
    log_of_b = -hidden + rng.normal(size=N_ANSWERS)
    columns: dict[str, Any] = {
        "score_a": score_a,
        "uncertainty_b": np.exp(log_of_b),
        "width": rng.normal(size=N_ANSWERS) - 0.3 * hidden,
    }
    correct = hidden + 0.5 * rng.normal(size=N_ANSWERS) > -1
    if name == "coarse":
        columns = {key: np.round(2 * column) / 2 for key, column in columns.items()}
    if name == "flat":
        correct = rng.random(N_ANSWERS) >= 0.051
    ids = np.arange(N_ANSWERS)
    return vilu.open_table({"id": ids, **columns, "correct": correct})


def broken_and_accepted(
    uncertainty: Floats, failure: Ints, rng: np.random.Generator
) -> tuple[bool, float]:
    """Return whether a calibration is broken, and the share of accepted answers."""
    rows = rng.choice(len(uncertainty), N_CALIBRATION, replace=False)
    calibration = Outcomes(uncertainty[rows], failure[rows])
    rule = vilu.certify(calibration, max_risk=MAX_RISK)
    accepted = rule.accept(uncertainty)
    if not accepted.any():
        return False, 0.0
    return bool(failure[accepted].mean() > MAX_RISK), float(accepted.mean())


def main() -> None:
    """Print a line for every world and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=20)
    parser.add_argument("--calibrations", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("world   method         broken            accepted")
    for place, name in enumerate(WORLDS):
        rng = np.random.default_rng([options.seed, place])
        table = world_of(name, rng)
        for method in (AnswerScore(column="score_a"), AnswerScores(), AnswerProbe()):
            results = []
            for _ in range(options.fits):
                order = rng.permutation(N_ANSWERS)
                predictor = method.fit(table.take(order[:N_FIT]))
                others = order[N_FIT:]
                uncertainty = predictor.predict_uncertainty(table)[others]
                failure = table.failure[others]
                for _ in range(options.calibrations):
                    results.append(broken_and_accepted(uncertainty, failure, rng))
            n_broken = sum(is_broken for is_broken, _ in results)
            low = lower_bound(n_broken, len(results), 0.025)
            high = upper_bound(n_broken, len(results), 0.025)
            accepted = np.mean([share for _, share in results])
            print(
                f"{name:<7} {method.name:<14} {n_broken / len(results):.1%} "
                f"[{low:.1%}, {high:.1%}]  {accepted:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
