"""How long things took here, to say how long they will take: a guess to plan by, not a measurement."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from vilu.backbones.named import NAMED
from vilu.benchmark.config import MAX_EPOCHS, Config, is_trained
from vilu.predictors.parameters import parameters

COMPACT_RATE, COMPACT_SIDE = 42.0, 224
"""Images a second of the compact model on two cores at a picture size; the time goes with the number of pixels."""

DEFAULT_STEPS = 6000
"""What a head makes without ``epochs`` or ``steps`` (``vilu.nn.plan``)."""

REFERENCE_WIDTH = 768
"""Embedding width of the run that the seconds per row are from."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a method on one core, at ``REFERENCE_WIDTH`` and ten classes.

    Attributes:
        fit: Per training row, and per pass over them where there are several; 0 where nothing is fitted.
        score: Per test row.
    """

    fit: float
    score: float


@cache
def costs() -> dict[str, Cost]:
    """By method, from a run of configs/here/main.toml (tools/make_rates.py)."""
    text = resources.files("vilu").joinpath("assets", "rates.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["method"]: Cost(float(row["fit_us"]) * 1e-6, float(row["score_us"]) * 1e-6) for row in rows}


def image_rate(backbone: str) -> float | None:
    """Images a second on two CPU cores; None where it is not known."""
    if backbone in NAMED:
        return NAMED[backbone].image_rate
    kind, _, side = backbone.partition(":")
    return COMPACT_RATE * (COMPACT_SIDE / int(side or COMPACT_SIDE)) ** 2 if kind == "compact" else None


def passed_rows(config: Config, label: str, n_train: int) -> int:
    """Rows that a fit passes over: those of every epoch of a trained network, once for the others."""
    entry, cls = config.entries[label], config.class_of(label)
    if not is_trained(str(entry.method)):
        return n_train
    values: dict[str, Any] = {name: field.default for name, field in parameters(cls).items()} | entry.params
    if values["epochs"] is not None:
        return int(values["epochs"]) * n_train
    by_steps = (entry.steps or DEFAULT_STEPS) * int(values["batch_size"])
    return min(max(by_steps, n_train), MAX_EPOCHS * n_train)


def cell_seconds(config: Config, label: str, n_train: int, n_test: int, width: int) -> tuple[float, float] | None:
    """Seconds of the fit and of scoring on one core; None where the method was not timed."""
    cost = costs().get(str(config.entries[label].method))
    if cost is None:
        return None
    wide = width / REFERENCE_WIDTH
    return cost.fit * passed_rows(config, label, n_train) * wide, cost.score * n_test * wide
