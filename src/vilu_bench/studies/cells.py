"""The cells of a benchmark: what is run, and what needs no run of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vilu_bench.studies.config import Adapt, Config, FromOther, Transfer, Union, Unseen
from vilu_bench.studies.parts import Role


@dataclass(frozen=True)
class Cell:
    """One method on one data set in one setting with one seed."""

    method: str
    data: str  # data set that is tested on
    setting: str
    seed: int  # seed of the rows, the class halves and the method
    # the cell whose result this one shares, since nothing that decides the result differs; None: it
    # is run
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
    """What decides the rows and candidates that a method is fitted on, beside the data sets themselves."""

    # data sets to fit on, several as one with class texts for captions; none: nothing is fitted
    train: tuple[str, ...] = ()
    # labelled rows per class to fit on, a share of all, "all", or "none": all rows, but no label
    budget: int | float | str = "all"
    rows_seed: int | None = None  # seed that draws the training rows; None where all are taken
    # seed that divides sets of rows into those to fit on and those to test on; None where all are
    # two sets
    division_seed: int | None = None
    halves_seed: int | None = (
        None  # seed that draws the class halves; None where all classes are taken
    )
    # whether the parts of a union, or a fit and the one that it begins from, may be of different
    # picture sizes
    across_preprocessing: bool = False
    pool_size: int | None = None  # of a union: captions that an image has to choose from
    unlabelled: bool = False  # whether all rows go with them without labels
    start: Origin | None = (
        None  # where the weights come from that the fit begins with; None: from nothing
    )

    @property
    def first(self) -> Origin:
        """The fit that comes first."""
        return self.start or self


@dataclass(frozen=True)
class ScoredSet:
    """What decides the rows and candidates that a method is tested on: those that it scores."""

    data: str
    role: Role  # which of its parts
    pool_size: int | None = (
        None  # captions that an image has to choose from; None: as the data set says
    )
    halves_seed: int | None = (
        None  # seed that draws the class halves; None where all classes are taken
    )
    division_seed: int | None = None  # as for ``Origin``
    across_preprocessing: bool = (
        False  # whether they may be of another picture size than the rows that were fitted on
    )


def origin_of(config: Config, cell: Cell) -> Origin:
    """Where the training rows of a cell come from."""
    setting, cls = config.settings[cell.setting], config.class_of(cell.method)
    if not cls.needs_fit:
        return Origin()
    budget = setting.budget if cls.needs_labels else "none"
    few = Origin(
        train=(cell.data,),
        budget=budget,
        rows_seed=None if isinstance(budget, str) else cell.seed,
        halves_seed=cell.seed if isinstance(setting, Unseen) else None,
        division_seed=_division_seed(config, cell),
        unlabelled=config.entries[cell.method].unlabelled,
    )
    match setting:
        case Adapt():
            return replace(
                few,
                across_preprocessing=setting.across_preprocessing,
                start=Origin((setting.source,)),
            )
        case FromOther():
            return replace(
                few,
                train=setting.sources,
                division_seed=_division_seed(config, cell, setting.source),
            )
        case Union():
            across, pool_size = setting.across_preprocessing, setting.train_pool_size
            seed = _division_seed(config, cell, *setting.of)
            return Origin(
                setting.of, division_seed=seed, across_preprocessing=across, pool_size=pool_size
            )
    return few


def scored_set_of(config: Config, cell: Cell) -> ScoredSet:
    """What a cell is tested on."""
    setting = config.settings[cell.setting]
    halves_seed = cell.seed if isinstance(setting, Unseen) else None
    needs_fit = config.class_of(cell.method).needs_fit
    across = needs_fit and isinstance(setting, Transfer | Union) and setting.across_preprocessing
    return ScoredSet(
        cell.data,
        setting.test_on,
        setting.pool_size,
        halves_seed,
        _division_seed(config, cell),
        across,
    )


def _division_seed(config: Config, cell: Cell, *data: str) -> int | None:
    return (
        None
        if all(config.data[name].fit_share is None for name in data or [cell.data])
        else cell.seed
    )


def plan(config: Config) -> tuple[Cell, ...]:
    """Every cell, seed by seed; each result is computed once, in the first cell that needs it."""
    first: dict[object, Cell] = {}
    cells = []
    for cell in _grid(config):
        key = (*fit_of(config, cell), scored_set_of(config, cell))
        earlier = first.setdefault(key, cell)
        cells.append(cell if earlier is cell else replace(cell, same_as=earlier))
    return tuple(cells)


def own_results(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that are run, since none before has their result."""
    return [cell for cell in cells if cell.same_as is None]


def fit_of(config: Config, cell: Cell) -> tuple[str, Origin, int | None]:
    """What decides the fit of a cell: method, training rows, and the method's own seed where it matters."""
    seed = cell.seed if config.depends_on_seed(cell.method) else None
    return cell.method, origin_of(config, cell), seed


def sharing_a_fit(config: Config, cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells grouped by the first fit that they need, in the order of the first of each group.

    A method fitted on one data set is tested on several, or goes on from there: those cells share
    that fit.
    """
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        method, origin, seed = fit_of(config, cell)
        groups.setdefault((method, origin.first, seed) if origin.train else cell, []).append(cell)
    return list(groups.values())


def needed_parts(config: Config, cells: Iterable[Cell]) -> dict[tuple[str, Role], None]:
    """Data sets and roles that some cells read, in order."""
    needed: dict[tuple[str, Role], None] = {}
    for cell in cells:
        test, origin = scored_set_of(config, cell), origin_of(config, cell)
        for step in (origin.first, origin):
            needed |= dict.fromkeys((data, "train") for data in step.train)
            if selects(step) and isinstance(config.data[step.train[0]].validation, str):
                needed[step.train[0], "validation"] = None
        share_of_training = test.role == "validation" and isinstance(
            config.data[test.data].validation, float
        )
        needed[test.data, "train" if share_of_training else test.role] = None
    return needed


def selects(origin: Origin) -> bool:
    """Whether a fit may select on the validation rows of its data set: one whole set, so that they are of its kind."""
    return (
        len(origin.train) == 1
        and origin.budget == "all"
        and origin.halves_seed is None
        and origin.pool_size is None
    )


def _grid(config: Config) -> list[Cell]:
    return [
        Cell(label, data, setting, seed)
        for seed in range(config.seeds)
        for data in config.data
        for setting in config.settings
        if config.is_tested_on(setting, data)
        for label, method in config.entries.items()
        if config.is_run_in(label, setting)
        if method.data is None or data in method.data
        if method.seeds is None or seed < method.seeds
    ]
