"""The cells of a benchmark: cells to run, and cells that share the result of another cell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from vilu_bench.studies.config import (
    AdaptSetting,
    Config,
    OtherSourceSetting,
    TransferSetting,
    UnionSetting,
    UnseenSetting,
)
from vilu_bench.studies.parts import Role


@dataclass(frozen=True)
class Cell:
    """One method on one data set in one setting with one seed."""

    method: str
    data: str  # data set to test on
    setting: str
    seed: int  # seed for the rows, the class halves and the method
    # An earlier cell with the same result, because all facts that decide the result are equal.
    # None: there is no such cell, so this cell is run.
    same_as: Cell | None = field(default=None, compare=False)

    @property
    def result_cell(self) -> Cell:
        """The cell that was run for this cell's result: ``same_as``, or this cell."""
        return self.same_as or self

    @property
    def path(self) -> Path:
        """Path of the cell's document, below the output folder."""
        return Path("cells", self.data, self.setting, self.method, f"seed-{self.seed}.json")

    def __str__(self) -> str:
        return f"{self.method} on {self.data}, {self.setting}, seed {self.seed}"


@dataclass(frozen=True)
class FitInputs:
    """All facts that decide a fit's training rows and candidates."""

    # Data sets to fit on. Empty: no fit. Several: a union with class texts as captions.
    train: tuple[str, ...] = ()
    # Labels to fit on, as in ``Setting.budget``: a number per class, a share of all labels, "all",
    # or "none" (all rows, without the labels).
    budget: int | float | str = "all"
    rows_seed: int | None = None  # seed that draws the training rows, or None to take all rows
    # Seed that divides the data sets with ``fit_share`` into training and test rows. None: no data
    # set is divided.
    division_seed: int | None = None
    # seed that draws the class halves, or None to take all classes
    halves_seed: int | None = None
    # Whether the data sets of a union may be embedded with different preprocessing, such as
    # different picture sizes. With ``start``: whether the two fits' data sets may.
    across_preprocessing: bool = False
    pool_size: int | None = None  # number of captions in a union's training pool
    unlabelled: bool = False  # whether the fit also gets all training rows without labels
    # The earlier fit whose weights this fit starts from. None: this fit starts from scratch.
    start: FitInputs | None = None

    @property
    def first_fit(self) -> FitInputs:
        """``start`` if there is an earlier fit, or else this fit."""
        return self.start or self


@dataclass(frozen=True)
class ScoredSet:
    """All facts that decide the rows and the candidates to score."""

    data: str
    role: Role
    pool_size: int | None = None  # number of captions in a pool, or None for the data set's number
    # seed that draws the class halves, or None to take all classes
    halves_seed: int | None = None
    # seed that divides the data set into training and test rows, or None for undivided rows
    division_seed: int | None = None
    # whether these rows may be embedded with other preprocessing than the training rows
    across_preprocessing: bool = False


def fit_inputs_of(config: Config, cell: Cell) -> FitInputs:
    """Return the facts that decide a cell's fit."""
    if not config.class_of(cell.method).needs_fit:
        return FitInputs()  # without data sets to fit on
    setting = config.settings[cell.setting]
    if isinstance(setting, UnionSetting):
        division_seed = _division_seed(config, setting.of, cell.seed)
        return FitInputs(
            train=setting.of,
            division_seed=division_seed,
            across_preprocessing=setting.across_preprocessing,
            pool_size=setting.train_pool_size,
        )
    own_fit_inputs = _own_fit_inputs(config, cell)
    if isinstance(setting, AdaptSetting):
        first_fit = FitInputs((setting.source,))
        return replace(
            own_fit_inputs,
            across_preprocessing=setting.across_preprocessing,
            start=first_fit,
        )
    if isinstance(setting, OtherSourceSetting):
        seed = _division_seed(config, setting.sources, cell.seed)
        return replace(own_fit_inputs, train=setting.sources, division_seed=seed)
    return own_fit_inputs


def _own_fit_inputs(config: Config, cell: Cell) -> FitInputs:
    """Return the facts that decide a fit on the tested data set, within the budget."""
    setting = config.settings[cell.setting]
    budget = setting.budget
    if not config.class_of(cell.method).needs_labels:
        budget = "none"
    draws_rows = not isinstance(budget, str)
    halves_seed = _halves_seed(config, cell)
    division_seed = _division_seed(config, (cell.data,), cell.seed)
    return FitInputs(
        train=(cell.data,),
        budget=budget,
        rows_seed=cell.seed if draws_rows else None,
        halves_seed=halves_seed,
        division_seed=division_seed,
        unlabelled=config.method_entries[cell.method].unlabelled,
    )


def scored_set_of(config: Config, cell: Cell) -> ScoredSet:
    """Return the facts that decide which rows a cell is tested on."""
    setting = config.settings[cell.setting]
    across_preprocessing = False
    if (
        isinstance(setting, TransferSetting | UnionSetting)
        and config.class_of(cell.method).needs_fit
    ):
        across_preprocessing = setting.across_preprocessing
    halves_seed = _halves_seed(config, cell)
    division_seed = _division_seed(config, (cell.data,), cell.seed)
    return ScoredSet(
        data=cell.data,
        role=setting.test_on,
        pool_size=setting.pool_size,
        halves_seed=halves_seed,
        division_seed=division_seed,
        across_preprocessing=across_preprocessing,
    )


def _halves_seed(config: Config, cell: Cell) -> int | None:
    """Return the cell's seed if the setting draws class halves, or else None."""
    if isinstance(config.settings[cell.setting], UnseenSetting):
        return cell.seed
    return None


def _division_seed(config: Config, data: Iterable[str], seed: int) -> int | None:
    """Return ``seed`` if any of these data sets divides its rows by a seed, or else None."""
    for name in data:
        if config.data[name].fit_share is not None:
            return seed
    return None


def plan_cells(config: Config) -> tuple[Cell, ...]:
    """Plan all cells, seed by seed. A cell gets ``same_as`` if an earlier cell has its result."""
    # maps the facts that decide a result to the first cell with this result
    first_cell: dict[object, Cell] = {}
    cells = []
    for cell in _all_cells(config):
        scored_set = scored_set_of(config, cell)
        deciding_facts = (*fit_key(config, cell), scored_set)
        if deciding_facts in first_cell:
            sharing_cell = replace(cell, same_as=first_cell[deciding_facts])
            cells.append(sharing_cell)
        else:
            first_cell[deciding_facts] = cell
            cells.append(cell)
    return tuple(cells)


def cells_to_run(cells: Iterable[Cell]) -> list[Cell]:
    """Leave out cells that have the same result as an earlier cell."""
    return [cell for cell in cells if cell.same_as is None]


def fit_key(config: Config, cell: Cell) -> tuple[str, FitInputs, int | None]:
    """Return the key of a cell's fit: method, training rows, and seed.

    If the method's scores do not depend on the seed, the seed in the key is None.
    """
    fit_inputs = fit_inputs_of(config, cell)
    seed = cell.seed if config.depends_on_seed(cell.method) else None
    return cell.method, fit_inputs, seed


def group_by_fit(config: Config, cells: Iterable[Cell]) -> list[list[Cell]]:
    """Group cells by their first fit. The groups are in the order of their first cells.

    Cells share a fit in two cases: the fitted predictor is tested on several data sets, or several
    fits start from this fit's weights.
    """
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        method, fit_inputs, seed = fit_key(config, cell)
        group_key: object = cell  # a cell without a fit is a separate group
        if fit_inputs.train:
            group_key = (method, fit_inputs.first_fit, seed)
        groups.setdefault(group_key, []).append(cell)
    return list(groups.values())


def needed_parts(config: Config, cells: Iterable[Cell]) -> dict[tuple[str, Role], None]:
    """List the parts (data set, role) to read for the cells, as dict keys in order of first use."""
    needed: dict[tuple[str, Role], None] = {}
    for cell in cells:
        fit_inputs = fit_inputs_of(config, cell)
        # If there is a single fit, both are the same fit. Adding its parts twice does no harm.
        for fit in (fit_inputs.first_fit, fit_inputs):
            for data in fit.train:
                needed[data, "train"] = None
            if may_select_on_validation(fit):
                data = fit.train[0]
                # a number instead of a name is a share of the training rows, and no part
                if isinstance(config.data[data].validation, str):
                    needed[data, "validation"] = None
        scored_set = scored_set_of(config, cell)
        validation = config.data[scored_set.data].validation
        if scored_set.role == "validation" and isinstance(validation, float):
            needed[scored_set.data, "train"] = None  # the validation rows are a share of these rows
        else:
            needed[scored_set.data, scored_set.role] = None
    return needed


def may_select_on_validation(fit_inputs: FitInputs) -> bool:
    """Return whether a fit may use validation rows to select, for example, the epoch count.

    Only a fit on all labels and classes of a single data set may do so.
    """
    return (
        len(fit_inputs.train) == 1
        and fit_inputs.budget == "all"
        and fit_inputs.halves_seed is None
        and fit_inputs.pool_size is None
    )


def _all_cells(config: Config) -> list[Cell]:
    """List every cell of the benchmark, seed by seed."""
    cells: list[Cell] = []
    for seed in range(config.seeds):
        for data in config.data:
            for setting in config.settings:
                if config.is_tested_on(setting, data):
                    cells += _cells_in(config, data, setting, seed)
    return cells


def _cells_in(config: Config, data: str, setting: str, seed: int) -> Iterator[Cell]:
    """Yield the cells of all methods for a data set, a setting and a seed."""
    n_seeds = config.settings[setting].seeds
    if n_seeds is not None and seed >= n_seeds:
        return
    for label, method in config.method_entries.items():
        if not config.is_run_in(label, setting):
            continue
        if method.data is not None and data not in method.data:
            continue
        if method.seeds is not None and seed >= method.seeds:
            continue
        yield Cell(label, data, setting, seed)
