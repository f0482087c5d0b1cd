"""The metrics by name, each with the convention that goes into its result row."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pkgutil import resolve_name
from typing import Any, Literal

import numpy as np

from vilu.errors import UsageError
from vilu.metrics.counts import Floats, TieCounts
from vilu.registry import ADDERS

Kernel = Callable[[TieCounts], Floats]


@dataclass(frozen=True)
class Metric:
    """A metric with all its choices made.

    Attributes:
        title: Heading of its column.
        kernel: Its value (...) from counts (..., G).
        convention: What was chosen where the literature differs.
        of_probability: Whether it has a meaning only for failure probabilities.
        higher_is_better: Which way is better.
        percent: Whether tables show it in percent; else as it is.
        wanted: "always": ``evaluate`` computes it, and its table has a column; "evaluated": a column only where metrics
            are chosen; "chosen": computed only then.
        name: What it is asked for by.
    """

    title: str
    kernel: Kernel
    convention: str
    of_probability: bool = False
    higher_is_better: bool = False
    percent: bool = True
    wanted: Literal["always", "evaluated", "chosen"] = "always"
    name: str = ""

    def show(self, value: float, sign: str = "") -> str:
        """A value, or with the sign "+" a difference, as tables have it."""
        return f"{100 * value:{sign}.1f}" if self.percent else f"{value:{sign}.3g}"

    def brackets(self, low: float, high: float, sign: str = "") -> str:
        """An interval as tables have it."""
        return f"[{self.show(low, sign)}, {self.show(high, sign)}]"


def _entry(name: str, kernel: str, choices: Mapping[str, object] | None = None, **facts: Any) -> Metric:  # noqa: ANN401
    found = resolve_name(kernel)
    return Metric(name=name, kernel=partial(found, **choices) if choices else found, **facts)


_TEXT = resources.files("vilu").joinpath("assets", "metrics.toml").read_text(encoding="utf-8")

METRICS = {name: _entry(name, **facts) for name, facts in tomllib.loads(_TEXT).items()}
"""By name: ours, from ``assets/metrics.toml``, then those that were added."""


def evaluated_metrics() -> list[str]:
    """What ``evaluate`` computes unless others are chosen: ours, then those that were added."""
    return [name for name, metric in METRICS.items() if metric.wanted != "chosen"]


DEFAULT_METRICS = tuple(evaluated_metrics())
"""What ``evaluate`` computes of ours; those of a probability only where the uncertainty is one."""


def get_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UsageError: If there is none, naming the nearest.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no metric is called {name!r}.{hint} There are: {', '.join(METRICS)}.")
    return METRICS[name]


def add_metric(metric: Metric) -> None:
    """Make a metric one of those of this process: evaluated, shown and benchmarked like ours.

    Raises:
        UsageError: If it has no name, another metric has it, or the kernel does not give a value for each resample.
    """
    if not metric.name or METRICS.get(metric.name, metric) != metric:
        raise UsageError(
            f"a metric needs a name of its own, such as Metric(..., name='my_metric'). Got {metric.name!r}; taken are: "
            f"{', '.join(METRICS)}."
        )
    counts = np.array([[2, 1, 0], [1, 1, 1]])  # two resamples of three scores
    shape = np.shape(metric.kernel(TieCounts(np.array([0.0, 0.5, 1.0]), counts, counts[:, ::-1])))
    if shape != (2,):
        raise UsageError(f"the kernel of {metric.name} must give values (B,) for counts (B, G). Got shape {shape}.")
    METRICS[metric.name] = metric


def _add(thing: object) -> bool:
    if isinstance(thing, Metric):
        add_metric(thing)
    return isinstance(thing, Metric)


ADDERS["a vilu.metrics.catalog.Metric"] = _add


def but_for(metrics: Iterable[Metric]) -> str:
    """What follows "in percent" where some are not."""
    plain = [metric.title for metric in metrics if not metric.percent]
    return f", but for {', '.join(plain)}" if plain else ""
