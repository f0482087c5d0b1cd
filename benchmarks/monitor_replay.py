"""How soon does a monitor see a shift, and how often is there a false alarm?

    python -m benchmarks.monitor_replay CLEAN SHIFTED... --predictor FOLDER...

CLEAN and SHIFTED are stores of class data. A SHIFTED store has some of CLEAN's images, damaged
(``vilu_bench.known_datasets.shift``) and with the same keys. The predictors were fitted on other
images.

A replay draws 3,000 calibration rows from CLEAN at random, and 1,500 rows from CLEAN to arrive
first. Then 1,500 rows from CLEAN, or from a SHIFTED store, arrive. No image occurs both clean and
shifted. Every tenth row is audited. An alarm's delay is counted from the first shifted row. An
alarm before this row is a false alarm.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import vilu
from vilu.metrics.counts import Ints
from vilu.predictors.persistence.storage import load_predictor

N_CALIBRATION, N_BEFORE, N_AFTER = 3000, 1500, 1500
LIMIT, AUDITED, MAX_RISK = 500, 0.1, 0.2


def part(
    outcomes: vilu.Outcomes, rows: Ints, audited: NDArray[np.bool_] | None = None
) -> vilu.Outcomes:
    """Return the outcomes at ``rows``. With ``audited``, only audited rows have failures."""
    failure = outcomes.failure[rows]
    if outcomes.prediction is None:
        raise ValueError("scores of class stores say what was answered")
    return vilu.Outcomes(
        outcomes.uncertainty[rows],
        failure if audited is None else np.where(audited, failure, -1),
        prediction=outcomes.prediction[rows],
        class_names=outcomes.class_names,
    )


def replay(
    clean: vilu.Outcomes,
    shifted: Sequence[vilu.Outcomes],
    seed: int,
) -> list[dict[str, int | None]]:
    """Return the rows of each test's alarm and of the first alarm, counted from the change.

    The first dict is for CLEAN alone, and the next dicts are for the SHIFTED stores.
    """
    rng = np.random.default_rng(seed)
    where = {key: row for row, key in enumerate(clean.ids or ())}
    n_shifted = len(shifted[0])
    after = rng.permutation(n_shifted)[:N_AFTER]
    twins = np.array([where[key] for key in shifted[0].ids or ()])[after]
    rows_without_twin = np.setdiff1d(np.arange(len(clean)), twins)
    others = rng.permutation(rows_without_twin)
    first, undisturbed, calibration = np.split(others, [N_BEFORE, N_BEFORE + N_AFTER])
    rows = part(clean, calibration[:N_CALIBRATION])
    monitor = vilu.Monitor(rows, vilu.certify(rows, max_risk=MAX_RISK), seed=seed)
    audited = rng.random(N_BEFORE + N_AFTER) < AUDITED
    monitor.update(part(clean, first, audited[:N_BEFORE]))
    found = []
    for outcomes, chosen in [(clean, undisturbed), *((one, after) for one in shifted)]:
        branch = copy.deepcopy(monitor)
        status = branch.update(part(outcomes, chosen, audited[N_BEFORE:]))
        alarms = {test.name: test.raised_at for test in status.tests} | {"any": status.raised_at}
        found.append(
            {name: None if row is None else row - N_BEFORE for name, row in alarms.items()}
        )
    return found


def report(name: str, alarms: list[dict[str, int | None]]) -> dict[str, float]:
    """Print and return the results from a shift's replays."""
    n = len(alarms)
    ever = {test: sum(one[test] is not None for one in alarms) / n for test in alarms[0]}
    delays = np.array([np.inf if (row := one["any"]) is None else row for one in alarms])
    before, soon = float(np.mean(delays < 0)), float(np.mean((delays >= 0) & (delays < LIMIT)))
    fair = delays[delays >= 0]
    within = float(np.mean(fair < LIMIT))
    delay_quantiles = np.quantile(fair, [0.1, 0.5, 0.9], method="inverted_cdf")
    quantiles = " / ".join(f"{q:.0f}" for q in delay_quantiles)
    shares = [f"{test} {share:.1%}" for test, share in ever.items() if test != "any"]
    each = ", ".join(shares)
    print(
        f"  {name}: any alarm {ever['any']:.1%} ({each}); before the change {before:.1%}; "
        f"of the others within {LIMIT} "
        f"rows {within:.1%}; delay 10 / 50 / 90 % {quantiles}"
    )
    return {"ever": ever["any"], "before": before, "soon": soon, "within": within}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Replay, print and return the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor_replay")
    parser.add_argument("clean", type=Path)
    parser.add_argument("shifted", type=Path, nargs="+")
    parser.add_argument("--predictor", type=Path, action="append", required=True)
    parser.add_argument("--replays", type=int, default=200)
    options = parser.parse_args(arguments)
    figures: dict[str, float] = {}
    for folder in options.predictor:
        predictor = load_predictor(folder)
        clean, *shifted = (
            vilu.score(predictor, vilu.open_source(path))
            for path in (options.clean, *options.shifted)
        )
        start = time.perf_counter()
        alarms = [replay(clean, shifted, seed) for seed in range(options.replays)]
        rows = options.replays * (N_BEFORE + (1 + len(shifted)) * N_AFTER)
        spent = (time.perf_counter() - start) / rows
        print(f"{folder.name}, {options.replays} replays, {1e6 * spent:.0f} microseconds a row:")
        for name, column in zip(
            (options.clean, *options.shifted), zip(*alarms, strict=True), strict=True
        ):
            found = report("undisturbed" if name == options.clean else name.name, list(column))
            figures |= {
                f"monitor_{folder.name}_{name.name}_{key}": value for key, value in found.items()
            }
    return figures


if __name__ == "__main__":
    main()
