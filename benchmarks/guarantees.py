"""Whether guaranteed risks hold on real scores.

    python -m benchmarks.guarantees SCORES.parquet ...

Each file comes from `vilu score`, with labels. The predictor was fitted on other rows. The rows are
split 200 times at random into calibration and test rows. A guarantee is about the risk of all
answers up to the threshold. No file has all answers, so the whole file is taken instead: a
guarantee is "broken" if the file's risk at the threshold is above the target. "Seen above" is how
often a user would see a risk above the target on the test rows alone. The error rate on the test
rows has noise, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import vilu
from vilu.metrics import coverage_at_risk
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes

SPLITS = 200
Accept = Callable[[Floats], NDArray[np.bool_]]
"""Function from uncertainties (N,) to a mask (N,) of accepted rows."""


def accepted_by(method: str, max_risk: float) -> Callable[[Outcomes], Accept]:
    """Return a function that calibrates on outcomes, and returns the rule's ``accept``."""
    return lambda rows: vilu.certify(rows, max_risk=max_risk, method=method).accept  # type: ignore[arg-type]


def replay(
    u: Floats, failure: Ints, method: str, max_risk: float, n_calibration: int
) -> dict[str, float]:
    """Calibrate and test on every split, and return the means over the splits."""
    calibrate, rng = accepted_by(method, max_risk), np.random.default_rng(0)
    coverage, broken, above, shares = [], [], [], []
    for _ in range(SPLITS):
        order = rng.permutation(len(u))
        calibration, test = order[:n_calibration], order[n_calibration:]
        rows = Outcomes(u[calibration], failure[calibration])
        accept = calibrate(rows)
        accepted = accept(u[test])
        everything = accept(u)
        if method == "selection":  # judges the rows of one call together
            limit = u[test][accepted].max() if accepted.any() else -np.inf
            everything = u <= limit
        joint = method == "crc"
        coverage.append(accepted.mean())
        risk = _risk(everything, failure, joint)
        risk_of_test = _risk(accepted, failure[test], joint)
        broken.append(risk > max_risk)
        above.append(risk_of_test > max_risk)
        shares.append(risk_of_test)
    accepts_nothing = np.array(coverage) == 0
    return {
        "coverage": float(np.mean(coverage)),
        "sd": float(np.std(coverage)),
        "broken": float(np.mean(broken)),
        "seen above": float(np.mean(above)),
        "mean risk": float(np.mean(shares)),
        "nothing": float(np.mean(accepts_nothing)),
    }


def _risk(accepted: NDArray[np.bool_], failure: Ints, joint: bool) -> float:
    wrong = int(failure[accepted].sum())
    return wrong / (len(failure) if joint else max(int(np.count_nonzero(accepted)), 1))


def main() -> None:
    """Print a line per file, method and size."""
    parser = argparse.ArgumentParser(description="Whether guaranteed risks hold on real scores.")
    parser.add_argument("scores", nargs="+", type=Path)
    parser.add_argument("--max-risk", type=float, default=0.05)
    parser.add_argument(
        "--calibration", type=int, nargs="*", help="calibration rows [half of the file]"
    )
    options = parser.parse_args()
    for path in options.scores:
        outcomes = Outcomes.load(path)
        keep = outcomes.evaluable
        u, failure = outcomes.uncertainty[keep], outcomes.failure[keep]
        best = coverage_at_risk(u, failure, options.max_risk)
        print(
            f"{path.name}: {outcomes.method}, {len(u)} rows, {failure.mean():.1%} wrong, "
            f"hindsight {best:.1%}"
        )
        for n_calibration in options.calibration or [len(u) // 2]:
            for method in ("ltt", "crc", "selection"):
                found = replay(u, failure, method, options.max_risk, n_calibration)
                figure_texts = [f"{name} {value:.1%}" for name, value in found.items()]
                print(f"  {n_calibration} calibration rows, {method}: {', '.join(figure_texts)}")


if __name__ == "__main__":
    main()
