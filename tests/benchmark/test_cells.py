from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders.bench_fakes import config, make_store, make_stores
from tests.conftest import toy_embeddings
from vilu.embeddings.columns import TEXT_COLUMNS
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ProvenanceError
from vilu_bench.studies.cells import Cell, fit_inputs_of, group_by_fit, plan_cells, scored_set_of
from vilu_bench.studies.data import (
    StudyData,
    class_halves,
    draw_rows,
    ignore_preprocessing,
    rows_of_classes,
)
from vilu_bench.studies.stores import Part


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Part, Path]:
    root = make_stores(tmp_path_factory.mktemp("stores"))
    return {
        (name, role): root / f"{name}-{role}"
        for name in ("one", "two")
        for role in ("train", "test")
    }


@pytest.fixture
def bench(folders: dict[Part, Path]) -> StudyData:
    return StudyData(config(), folders)


def runs(method: str) -> list[tuple[str, str, int]]:
    """Return the cells in the standard benchmark that are run for a method."""
    return [
        (c.data, c.setting, c.seed)
        for c in plan_cells(config())
        if c.method == method and c.same_as is None
    ]


def test_every_combination_is_a_cell_once() -> None:
    cells = plan_cells(config())
    # There are 3 methods and 2 seeds, and 3 settings on two data sets. The transfer adds the data
    # set that is not its source.
    assert len(cells) == len(set(cells)) == 3 * 2 * (3 * 2 + 1)
    assert {cell.data for cell in cells if cell.setting == "moved"} == {"two"}
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_a_score_without_fit_runs_once_per_test_set() -> None:
    halves = [(data, "unseen", seed) for seed in (0, 1) for data in ("one", "two")]
    assert set(runs("mcm")) == {("one", "all", 0), ("two", "all", 0), *halves}
    alias = next(
        c
        for c in plan_cells(config())
        if (c.method, c.data, c.setting, c.seed) == ("mcm", "two", "moved", 1)
    )
    assert alias.result_cell == Cell("mcm", "two", "all", 0)


def test_a_deterministic_fit_runs_again_only_where_the_seed_draws_rows() -> None:
    drawn = [
        (data, setting, seed)
        for seed in (0, 1)
        for data in ("one", "two")
        for setting in ("few", "unseen")
    ]
    assert set(runs("knn_distance")) == {
        ("one", "all", 0),
        ("two", "all", 0),
        ("two", "moved", 0),
        *drawn,
    }


def test_a_random_fit_runs_everywhere() -> None:
    assert len(runs("lvu")) == 2 * 7


def test_restrictions_of_a_method() -> None:
    methods = {"mcm": {}, "lvu": {"settings": ["few"], "seeds": 1}}
    cells = [c for c in plan_cells(config(methods=methods)) if c.method == "lvu"]
    assert [(c.data, c.setting, c.seed) for c in cells] == [("one", "few", 0), ("two", "few", 0)]
    limited = config(settings={"all": {"kind": "labels", "data": ["two"]}})
    assert {c.data for c in plan_cells(limited)} == {"two"}


def test_a_fit_is_shared_by_what_is_tested_with_it() -> None:
    chosen = config()
    cells = [cell for cell in plan_cells(chosen) if cell.same_as is None]
    groups = group_by_fit(chosen, cells)
    assert sorted(map(str, cells)) == sorted(str(cell) for group in groups for cell in group)
    shared = {
        tuple((c.data, c.setting, c.seed) for c in group) for group in groups if len(group) > 1
    }
    assert shared == {
        (("one", "all", 0), ("two", "moved", 0)),  # for knn_distance and lvu
        (("one", "all", 1), ("two", "moved", 1)),
    }
    assert {group[0].method for group in groups if len(group) > 1} == {"lvu", "knn_distance"}


def test_cells_have_paths_of_their_own() -> None:
    cells = plan_cells(config())
    assert len({cell.path for cell in cells}) == len(cells)
    assert Cell("mcm", "one", "all", 3).path == Path("cells/one/all/mcm/seed-3.json")


def test_drawn_rows_are_so_many_of_every_class() -> None:
    target = np.array([0, 1, 1, 2, -1, 1, 0, 2, 1, -1, 1])
    rows = draw_rows(target, 2, seed=0)
    assert np.array_equal(rows, np.sort(np.unique(rows)))
    assert np.bincount(target[rows]).tolist() == [2, 2, 2]
    assert np.bincount(target[draw_rows(target, 4, seed=0)]).tolist() == [2, 4, 2]
    assert set(rows) <= set(draw_rows(target, 4, seed=0))
    assert len(draw_rows(np.array([-1, -1]), 3, seed=0)) == 0


def test_drawn_rows_are_a_fair_sample() -> None:
    """Every row must be drawn equally often.

    In a class with 10 rows each row is drawn in 3 of 10 cases, within five standard errors for
    1,000 draws.
    """
    target = np.repeat([0, 1], [10, 30])
    counts = np.bincount(
        np.concatenate([draw_rows(target, 3, seed) for seed in range(1000)]), minlength=40
    )
    assert np.abs(counts[:10] / 1000 - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 1000)
    assert np.abs(counts[10:] / 1000 - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / 1000)


def test_class_halves_part_the_classes() -> None:
    for k in (4, 5, 10):
        known, unseen = class_halves(k, seed=3)
        assert sorted([*known, *unseen]) == list(range(k))
        assert len(known) == k // 2
    assert len({tuple(class_halves(10, seed)[0]) for seed in range(20)}) > 10
    with pytest.raises(DataError, match=r"at least 4 classes.*Got 3"):
        class_halves(3, seed=0)


def test_selecting_rows_and_candidates() -> None:
    whole = toy_embeddings(n=40)
    classes = np.array([1, 4])
    rows = rows_of_classes(whole, classes)
    assert set(whole.target[rows].tolist()) == {1, 4}
    foreign = rows_of_classes(whole, np.array([0]))[0]
    part = whole.take(
        np.append(rows, foreign), classes, ("features", "views", "prompts", "unheard-of")
    )
    assert part.class_names == ("class 1", "class 4")
    assert torch.equal(part.candidates(torch.arange(0)).text, whole.text[[1, 4]])
    names = np.array(whole.class_names)[whole.target[rows]]
    assert np.array_equal(np.array(part.class_names)[part.target[:-1]], names)
    assert part.target[-1] == -1
    assert part.ids[0] == whole.ids[rows[0]]
    assert part.space == whole.space
    assert part.columns == {"features", "views", "prompts"}
    index = torch.arange(len(rows))
    for name in part.columns:
        kept = torch.from_numpy(classes if name in TEXT_COLUMNS else rows)
        assert torch.equal(part.column(name, index), whole.column(name, torch.arange(40))[kept])


def train_set(bench: StudyData, cell: Cell, columns: tuple[str, ...] = ()) -> EmbeddingSource:
    return bench.train_set(fit_inputs_of(bench.config, cell), columns)


def test_training_sets(bench: StudyData) -> None:
    assert fit_inputs_of(bench.config, Cell("mcm", "one", "all", 0)).train == ()
    assert train_set(bench, Cell("lvu", "one", "all", 0)) is bench.source("one", "train")
    few, other = (train_set(bench, Cell("lvu", "one", "few", seed)) for seed in (1, 0))
    assert np.bincount(few.target).tolist() == [8] * 5
    assert list(few.ids) != list(other.ids)
    whole = bench.source("one", "train")
    places = [list(whole.ids).index(name) for name in few.ids]
    assert torch.equal(few.image_rows(torch.arange(40)), whole.image_rows(torch.tensor(places)))
    assert few.columns == whole.columns


def test_unseen_classes_are_unseen(bench: StudyData) -> None:
    cell = Cell("lvu", "one", "unseen", 1)
    train, test = train_set(bench, cell, ("features",)), bench.test_set(cell, ("features",))
    assert len(train.class_names) == 2
    assert len(test.class_names) == 3
    assert set(train.class_names).isdisjoint(test.class_names)
    assert (train.target >= 0).all()
    assert (test.target >= 0).all()
    assert train.columns == {"features"}


def test_transfer_takes_rows_of_the_source(bench: StudyData) -> None:
    cell = Cell("lvu", "two", "moved", 0)
    train, test = train_set(bench, cell), bench.test_set(cell, ())
    assert train.class_names == bench.source("one", "train").class_names
    assert train.space == test.space
    assert train.space.preprocess == "8x8"
    assert bench.source("two", "test").space.preprocess == "9x9"
    strict = config(settings={"moved": {"kind": "transfer", "source": "one"}})
    assert not scored_set_of(strict, cell).across_preprocessing


def test_only_the_preprocessing_may_differ() -> None:
    source = toy_embeddings(n=20)
    here = EmbeddingSpace(
        16, 20.0, backbone="a:1", weights="w", preprocess="p", tokenizer="t", precision="fp32"
    )
    source.space = here
    other = dataclasses.replace(here, backbone="a:2", preprocess="q")
    assert ignore_preprocessing(source, other).space == other
    assert source.space == here
    for change in (
        {"weights": "v"},
        {"logit_scale": 10.0},
        {"tokenizer": "u"},
        {"precision": "bf16"},
    ):
        assert ignore_preprocessing(source, dataclasses.replace(here, **change)).space == here


def test_truth_is_that_of_the_zero_shot_answers(bench: StudyData) -> None:
    test = bench.source("one", "test")
    truth = bench.truth(Cell("mcm", "one", "all", 0))
    answers = (test.image_rows(torch.arange(len(test))) @ test.text.T).argmax(dim=1)
    assert np.array_equal(truth.failure, (answers != test.target).numpy())
    assert truth.reason == (None,) * 60
    assert truth.rows_hash == bench.truth(Cell("lvu", "one", "few", 1)).rows_hash
    assert (
        len(
            {
                truth.rows_hash,
                *(bench.truth(Cell("mcm", "one", "unseen", seed)).rows_hash for seed in (0, 1)),
            }
        )
        == 3
    )


def test_a_limit_keeps_evenly_spaced_rows(folders: dict[Part, Path]) -> None:
    data = {"one": {"stores": {"train": "-", "test": "-"}, "limit": 30}}
    settings = {"all": {"kind": "labels"}}
    some = StudyData(config(data=data, settings=settings), folders)
    whole = StudyData(config(), folders)
    ids = list(whole.source("one", "train").ids)
    assert list(some.source("one", "train").ids) == ids[::4]
    assert some.source("one", "train").columns == whole.source("one", "train").columns
    assert some.fingerprint("one", "train") != whole.fingerprint("one", "train")


def test_parts_that_do_not_belong_together(folders: dict[Part, Path], tmp_path: Path) -> None:
    bench = StudyData(config(), {**folders, ("one", "test"): folders["one", "train"]})
    with pytest.raises(DataError, match=r"120 of 120 test rows of one are in its train part, too"):
        bench.check()
    bench = StudyData(config(), {**folders, ("one", "test"): folders["two", "test"]})
    with pytest.raises(ProvenanceError, match=r"preprocess: '8x8' \(the training set of one\)"):
        bench.check()
    bare = make_store(tmp_path / "bare", 20, 5_000, labelled=False)
    with pytest.raises(
        DataError, match="the test set of one has no labels, so nothing can be measured on it"
    ):
        StudyData(config(), {**folders, ("one", "test"): bare}).check()
    StudyData(config(), folders).check()


def test_a_setting_may_have_fewer_seeds() -> None:
    settings = {
        "few": {"kind": "labels", "budget": 8},
        "all": {"kind": "labels", "seeds": 1},
    }
    cells = plan_cells(config(seeds=3, settings=settings, methods={"lvu": {}}))
    seeds = {(cell.setting, cell.seed) for cell in cells}
    assert seeds == {("few", 0), ("few", 1), ("few", 2), ("all", 0)}
