"""A plan for a large extraction, replayed event by event: time, lost work and cost.

``python -m benchmarks.simulate_scale --parts 4146 --workers 8 --seconds 114 --price 1.99`` prints
medians with 90 % intervals over seeds. With ``--receipts STORE`` the part times are drawn from the
receipts of a real store. If ``--seconds`` is given too, the times are scaled to this mean.

The model: a free worker takes the next part. A worker's life is exponential. Deaths and preemptions
each have a mean time between failures. When a worker ends, the present work is lost, the part goes
to the front of the queue, and the worker is back after a restart. A poison part kills the worker at
a uniform time within the part. After a part has killed ``ATTEMPTS`` workers, the part is set aside
at once. Preemptions do not count as deaths: a preemption is announced, and the worker removes the
mark from the part before the end. A slow part (straggler) takes longer by a factor. A finished part
is never lost.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vilu.artifacts.disk import LOG_FILE
from vilu.artifacts.documents import read_log

ATTEMPTS = 3
"""A part is set aside after this many deaths (``vilu.store.job.MAX_ATTEMPTS``)."""


@dataclass(frozen=True)
class Plan:
    """The work, the workers, and the failure rates.

    Attributes:
        parts: Number of parts.
        workers: Number of processes, each with an accelerator.
        seconds: Part times to draw from.
        start: Seconds from a worker's start to the first part (imports, model).
        death_hours: Mean hours between a worker's deaths.
        preemption_hours: Mean hours between a worker's preemptions.
        preemption_wait: Seconds until a preempted worker is replaced.
        poison: Share of parts that always kill the worker.
        stragglers: Share of slow parts.
        straggler_factor: A slow part takes this many times as long.
        price: Price for one hour of a worker.
    """

    parts: int
    workers: int
    seconds: tuple[float, ...] = (60.0,)
    start: float = 0.0
    death_hours: float = math.inf
    preemption_hours: float = math.inf
    preemption_wait: float = 0.0
    poison: float = 0.0
    stragglers: float = 0.0
    straggler_factor: float = 1.0
    price: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The results of a replay.

    Attributes:
        hours: Hours until the last part is done.
        wasted: Share of the workers' busy time spent on unfinished attempts.
        deaths: How often a worker ended, preemptions included.
        set_aside: Number of parts set aside, without rows.
        cost: Price for all workers from beginning to end. Waits for a replacement are not paid.
    """

    hours: float
    wasted: float
    deaths: int
    set_aside: int
    cost: float


class Replay:
    """The state of a replay. A worker is represented by the time when the worker is free."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.random = plan, np.random.default_rng(seed)
        seconds = np.asarray(plan.seconds)
        self.need = self.random.choice(seconds, plan.parts)
        slow = self.random.random(plan.parts) < plan.stragglers
        self.need[slow] *= plan.straggler_factor
        self.poison = self.random.random(plan.parts) < plan.poison
        self.tries: NDArray[np.int64] = np.zeros(plan.parts, dtype=np.int64)
        self.useful = self.lost = self.unpaid = self.end = 0.0
        self.deaths = self.set_aside = 0

    def run(self) -> Outcome:
        """Replay until every part is done or set aside."""
        free = [self.plan.start] * min(self.plan.workers, self.plan.parts)
        running: list[tuple[float, int, float]] = []
        waiting = deque(range(self.plan.parts))
        heapq.heapify(free)
        while waiting or running:
            if waiting and free and (not running or free[0] <= running[0][0]):
                begin = heapq.heappop(free)
                next_part = waiting.popleft()
                self._begin(begin, next_part, running)
                continue
            when, part, back = heapq.heappop(running)
            if part >= 0:  # the part was lost with the worker
                waiting.appendleft(part)
            else:
                self.end = max(self.end, when)
            heapq.heappush(free, back)
        worked = self.useful + self.lost
        paid = self.plan.workers * self.end - self.unpaid
        wasted = self.lost / worked if worked else 0.0
        return Outcome(
            self.end / 3600, wasted, self.deaths, self.set_aside, paid / 3600 * self.plan.price
        )

    def _begin(self, now: float, part: int, running: list[tuple[float, int, float]]) -> None:
        """Start a part at the time ``now``: add the end to ``running``.

        An entry has the end, the part (-1 for a finished part, else the lost part), and the time
        when the worker is free again.
        """
        plan, need = self.plan, float(self.need[part])
        if self.tries[part] == ATTEMPTS:
            self.set_aside += 1
            heapq.heappush(running, (now, -1, now))
            return
        death = self._wait(plan.death_hours)
        preemption = self._wait(plan.preemption_hours)
        if self.poison[part]:
            death = min(death, need * self.random.random())
        if min(death, preemption) >= need:
            self.useful += need
            heapq.heappush(running, (now + need, -1, now + need))
            return
        lived = min(death, preemption)
        pause = plan.preemption_wait if preemption < death else 0.0
        self.tries[part] += death <= preemption
        self.deaths += 1
        self.lost += lived
        self.unpaid += pause
        heapq.heappush(running, (now + lived, part, now + lived + pause + plan.start))

    def _wait(self, hours: float) -> float:
        return math.inf if math.isinf(hours) else float(self.random.exponential(hours * 3600))


def seconds_of(store: Path) -> tuple[float, ...]:
    """Read the wall times of a store's parts."""
    found = {
        line["part"]: float(line["seconds"])
        for line in read_log(store)
        if {"part", "seconds"} <= line.keys()
    }
    if not found:
        raise SystemExit(
            f"{store} has no times of parts in its {LOG_FILE}: give a store that `vilu embed` wrote"
        )
    return tuple(found[part] for part in sorted(found))


def summary(plan: Plan, seeds: int) -> dict[str, tuple[float, float, float]]:
    """Compute the 5 %, 50 % and 95 % quantiles of every outcome over seeds."""
    outcomes = [Replay(plan, seed).run() for seed in range(seeds)]
    names = ("hours", "wasted", "deaths", "set_aside", "cost")
    quantiles = {
        name: np.quantile([getattr(outcome, name) for outcome in outcomes], (0.05, 0.5, 0.95))
        for name in names
    }
    return {
        name: (float(low), float(middle), float(high))
        for name, (low, middle, high) in quantiles.items()
    }


def parse(arguments: list[str] | None = None) -> tuple[Plan, int]:
    """Read the plan and the seed count from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--seconds", type=float, help="mean time of a part")
    parser.add_argument(
        "--receipts", type=Path, help="a store; times are drawn from those of its parts"
    )
    parser.add_argument("--seeds", type=int, default=20)
    defaults = Plan(1, 1)
    for name in (
        "start", "death_hours", "preemption_hours", "preemption_wait",
        "poison", "stragglers", "straggler_factor", "price",
    ):  # fmt: skip
        option = name.replace("_", "-")
        parser.add_argument(f"--{option}", type=float, default=getattr(defaults, name))
    given = vars(parser.parse_args(arguments))
    store, mean, seeds = given.pop("receipts"), given.pop("seconds"), given.pop("seeds")
    if store is None and mean is None:
        parser.error("give --seconds or --receipts")
    times = np.asarray(seconds_of(store) if store is not None else (mean,), dtype=float)
    if mean is not None:
        times = times * mean / times.mean()
    plan = Plan(**given)
    return replace(plan, seconds=tuple(times.tolist())), seeds


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the plan's outcome and return the medians."""
    plan, seeds = parse(arguments)
    found = summary(plan, seeds)
    scale = {"wasted": (100.0, "%")}
    for name, values in found.items():
        factor, unit = scale.get(name, (1.0, ""))
        low, middle, high = (value * factor for value in values)
        print(
            f"{name:10} {middle:10.2f}{unit}  (90 % interval {low:.2f} to {high:.2f} over {seeds} "
            "seeds)"
        )
    return {name: values[1] for name, values in found.items()}


if __name__ == "__main__":
    main()
