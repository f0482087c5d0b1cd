"""The cells of a benchmark: what is run, and what needs no run of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """What decides the rows and candidates of a fit, beside the data sets themselves."""

    # data sets to fit on, several as one with class texts for captions; none: nothing is fitted
    train: tuple[str, ...] = ()
    # labelled rows per class to fit on, a share of all, "all", or "none": all rows, but no label
    budget: int | float | str = "all"
    rows_seed: int | None = None  # seed that draws the training rows; None where all are taken
    # seed that divides sets of rows into those to fit on and those to test on; None where all are
    # two sets
    division_seed: int | None = None
    # seed that draws the class halves; None where all classes are taken
    halves_seed: int | None = None
    # whether the parts of a union, or a fit and the one that it begins from, may be of different
    # picture sizes
    across_preprocessing: bool = False
    pool_size: int | None = None  # of a union: captions that an image has to choose from
    unlabelled: bool = False  # whether all rows go with them without labels
    # where the weights come from that the fit begins with; None: from nothing
    start: Origin | None = None

    @property
    def first(self) -> Origin:
        """The fit that comes first."""
        return self.start or self


@dataclass(frozen=True)
class ScoredSet:
    """What decides the rows and candidates that a method is tested on: those that it scores."""

    data: str
    role: Role  # which of its parts
    # captions that an image has to choose from; None: as the data set says
    pool_size: int | None = None
    # seed that draws the class halves; None where all classes are taken
    halves_seed: int | None = None
    division_seed: int | None = None  # as for ``Origin``
    # whether they may be of another picture size than the rows that were fitted on
    across_preprocessing: bool = False


def origin_of(config: Config, cell: Cell) -> Origin:
    """Where the training rows of a cell come from."""
    if not config.class_of(cell.method).needs_fit:
        return Origin()
    setting = config.settings[cell.setting]
    if isinstance(setting, Union):
        return Origin(
            train=setting.of,
            division_seed=_division_seed(config, setting.of, cell.seed),
            across_preprocessing=setting.across_preprocessing,
            pool_size=setting.train_pool_size,
        )
    own = _own_origin(config, cell)
    if isinstance(setting, Adapt):
        return replace(
            own,
            across_preprocessing=setting.across_preprocessing,
            start=Origin((setting.source,)),
        )
    if isinstance(setting, FromOther):
        seed = _division_seed(config, setting.sources, cell.seed)
        return replace(own, train=setting.sources, division_seed=seed)
    return own


def _own_origin(config: Config, cell: Cell) -> Origin:
    """Training rows of the data set that is tested on, within the budget."""
    setting = config.settings[cell.setting]
    budget = setting.budget
    if not config.class_of(cell.method).needs_labels:
        budget = "none"
    draws_rows = not isinstance(budget, str)
    return Origin(
        train=(cell.data,),
        budget=budget,
        rows_seed=cell.seed if draws_rows else None,
        halves_seed=_halves_seed(config, cell),
        division_seed=_division_seed(config, (cell.data,), cell.seed),
        unlabelled=config.entries[cell.method].unlabelled,
    )


def scored_set_of(config: Config, cell: Cell) -> ScoredSet:
    """What a cell is tested on."""
    setting = config.settings[cell.setting]
    across_preprocessing = False
    if isinstance(setting, Transfer | Union) and config.class_of(cell.method).needs_fit:
        across_preprocessing = setting.across_preprocessing
    return ScoredSet(
        data=cell.data,
        role=setting.test_on,
        pool_size=setting.pool_size,
        halves_seed=_halves_seed(config, cell),
        division_seed=_division_seed(config, (cell.data,), cell.seed),
        across_preprocessing=across_preprocessing,
    )


def _halves_seed(config: Config, cell: Cell) -> int | None:
    if isinstance(config.settings[cell.setting], Unseen):
        return cell.seed
    return None


def _division_seed(config: Config, data: Iterable[str], seed: int) -> int | None:
    """The seed, where it divides one of some data sets."""
    for name in data:
        if config.data[name].fit_share is not None:
            return seed
    return None


def plan(config: Config) -> tuple[Cell, ...]:
    """Every cell, seed by seed; each result is computed once, in the first cell that needs it."""
    first: dict[object, Cell] = {}
    cells = []
    for cell in _grid(config):
        key = (*fit_of(config, cell), scored_set_of(config, cell))
        if key in first:
            cells.append(replace(cell, same_as=first[key]))
        else:
            first[key] = cell
            cells.append(cell)
    return tuple(cells)


def own_results(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that are run, since none before has their result."""
    return [cell for cell in cells if cell.same_as is None]


def fit_of(config: Config, cell: Cell) -> tuple[str, Origin, int | None]:
    """What decides the fit of a cell: method, training rows, and the seed where it matters."""
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
        key: object = cell  # where nothing is fitted, nothing is shared
        if origin.train:
            key = (method, origin.first, seed)
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


def needed_parts(config: Config, cells: Iterable[Cell]) -> dict[tuple[str, Role], None]:
    """Data sets and roles that some cells read, in order."""
    needed: dict[tuple[str, Role], None] = {}
    for cell in cells:
        origin = origin_of(config, cell)
        for step in (origin.first, origin):
            for data in step.train:
                needed[data, "train"] = None
            if selects(step) and isinstance(config.data[step.train[0]].validation, str):
                needed[step.train[0], "validation"] = None
        scored = scored_set_of(config, cell)
        validation = config.data[scored.data].validation
        if scored.role == "validation" and isinstance(validation, float):
            needed[scored.data, "train"] = None  # it is a share of the training rows
        else:
            needed[scored.data, scored.role] = None
    return needed


def selects(origin: Origin) -> bool:
    """Whether a fit may select on validation rows: it is of one whole set, as they are."""
    return (
        len(origin.train) == 1
        and origin.budget == "all"
        and origin.halves_seed is None
        and origin.pool_size is None
    )


def _grid(config: Config) -> list[Cell]:
    """Every cell that is wanted, seed by seed."""
    cells: list[Cell] = []
    for seed in range(config.seeds):
        for data in config.data:
            for setting in config.settings:
                if config.is_tested_on(setting, data):
                    cells += _cells_in(config, data, setting, seed)
    return cells


def _cells_in(config: Config, data: str, setting: str, seed: int) -> Iterator[Cell]:
    """The cells of every method that is wanted there."""
    for label, method in config.entries.items():
        if not config.is_run_in(label, setting):
            continue
        if method.data is not None and data not in method.data:
            continue
        if method.seeds is not None and seed >= method.seeds:
            continue
        yield Cell(label, data, setting, seed)
