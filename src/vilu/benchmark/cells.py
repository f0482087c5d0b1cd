"""The cells of a benchmark: what is run, and what needs no run of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vilu.benchmark.config import Config
from vilu.benchmark.parts import Transfer, Unseen


@dataclass(frozen=True)
class Cell:
    """One method on one data set in one setting with one seed.

    Attributes:
        method: Its label.
        data: Data set that is tested on.
        setting: Name of the setting.
        seed: Seed of the rows, the class halves and the method.
        same_as: The cell whose result this one shares, since nothing that decides the result differs; None: it is run.
    """

    method: str
    data: str
    setting: str
    seed: int
    same_as: Cell | None = field(default=None, compare=False)

    @property
    def run(self) -> Cell:
        """The cell that holds the result."""
        return self.same_as or self

    @property
    def path(self) -> Path:
        """Of its result, below the output folder."""
        return Path("cells", self.data, self.setting, self.method, f"seed-{self.seed}.json")

    def __str__(self) -> str:
        return f"{self.method} on {self.data}, {self.setting}, seed {self.seed}"


@dataclass(frozen=True)
class Origin:
    """What decides the rows and candidates of a cell, beside the data sets themselves.

    Attributes:
        test: Data set to test on.
        train: Data set to fit on; None where nothing is fitted.
        budget: Labelled rows per class to fit on, or "all".
        rows_seed: Seed that draws the training rows; None where all are taken.
        halves_seed: Seed that draws the class halves; None where all classes are taken.
        across_preprocessing: Whether training rows may be of another picture size.
    """

    test: str
    train: str | None
    budget: int | str
    rows_seed: int | None
    halves_seed: int | None
    across_preprocessing: bool


def origin_of(config: Config, cell: Cell) -> Origin:
    """Where the rows of a cell come from."""
    setting = config.settings[cell.setting]
    halves_seed = cell.seed if isinstance(setting, Unseen) else None
    if not config.class_of(cell.method).needs_fit:
        return Origin(cell.data, None, "all", None, halves_seed, across_preprocessing=False)
    transfer = setting if isinstance(setting, Transfer) else None
    return Origin(
        test=cell.data,
        train=transfer.source if transfer else cell.data,
        budget=setting.budget,
        rows_seed=None if setting.budget == "all" else cell.seed,
        halves_seed=halves_seed,
        across_preprocessing=transfer is not None and transfer.across_preprocessing,
    )


def plan(config: Config) -> tuple[Cell, ...]:
    """Every cell, seed by seed; each result is computed once, in the first cell that needs it."""
    first: dict[object, Cell] = {}
    cells = []
    for cell in _grid(config):
        seed = cell.seed if config.depends_on_seed(cell.method) else None
        key = (cell.method, origin_of(config, cell), seed)
        earlier = first.setdefault(key, cell)
        cells.append(cell if earlier is cell else replace(cell, same_as=earlier))
    return tuple(cells)


def sharing_a_fit(config: Config, cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells grouped by the fit that they need, in the order of the first of each group.

    A method fitted on one data set is tested on several: those cells differ in their test set alone.
    """
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        origin = origin_of(config, cell)
        seed = cell.seed if config.depends_on_seed(cell.method) else None
        fit = (cell.method, origin.train, origin.budget, origin.rows_seed, origin.halves_seed, seed)
        groups.setdefault(cell if origin.train is None else fit, []).append(cell)
    return list(groups.values())


def _grid(config: Config) -> list[Cell]:
    return [
        Cell(label, data, setting, seed)
        for seed in range(config.seeds)
        for data in config.data
        for setting in config.settings
        if config.is_tested_on(setting, data)
        for label, method in config.entries.items()
        if method.settings is None or setting in method.settings
        if method.seeds is None or seed < method.seeds
    ]
