"""Test settings beyond one data set and its labels.

They use captions, shares, validation rows, adapting and unions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import vilu
from tests.builders.bench_fakes import WORDS, benchmark, config, make_store, make_stores
from tests.builders.store_fakes import FakeBackbone, FakeDataset, picture
from vilu.embeddings.checks import hash_names
from vilu.embeddings.pairs import Pools, PseudoCaptions
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import UsageError
from vilu.predictors.contract.predictor import FailurePredictor, Learnt
from vilu.predictors.vilu.fine_tuning import start_from_fitted
from vilu.store.embed import embed
from vilu.store.reader import open_source
from vilu_bench.studies.cells import Cell, fit_inputs_of, group_by_fit, needed_parts, plan_cells
from vilu_bench.studies.config import Config
from vilu_bench.studies.data import StudyData, divide_rows, draw_share, held_out_mask
from vilu_bench.studies.facts import deciding_facts
from vilu_bench.studies.parts import Data, StorePaths
from vilu_bench.studies.run import run_all
from vilu_bench.studies.stores import find_stores

ALL = {"all": {"kind": "labels"}}
SMALL = {"epochs": 2, "hidden": [8]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return stores for two data sets with classes, for validation rows, and for 200 captions."""
    root = make_stores(tmp_path_factory.mktemp("stores"))
    make_store(root / "one-validation", 40, 5_000)
    captions = [f"picture number {i}" for i in range(200)]
    pictures = [picture(7_000 + i) for i in range(200)]
    embed(
        FakeDataset(pictures, [None] * 200, class_names=None, captions=captions),
        FakeBackbone(),
        root / "pairs",
    )
    return root


def made(**changes: Any) -> Config:
    stores = {name: {"train": f"{name}-train", "test": f"{name}-test"} for name in ("one", "two")}
    entries = {
        "one": {
            "stores": {**stores["one"], "validation": "one-validation"},
            "validation": "validation",
        },
        "two": {"stores": stores["two"], "validation": 0.25},
        "pairs": {"stores": {"train": "pairs", "test": "pairs"}, "captions": True, "pool_size": 8},
    }
    methods = {"mcm": {}, "lvu": {"params": SMALL}, "vilu": {"params": SMALL}}
    return config(**{"data": entries, "methods": methods, "seeds": 1, **changes})


def bench_of(chosen: Config, data: Path) -> StudyData:
    return StudyData(
        chosen, find_stores(chosen, needed_parts(chosen, plan_cells(chosen)), data, Path("unused"))
    )


def scores(output: Path, data: str, setting: str, method: str, seed: int = 0) -> np.ndarray:
    return vilu.Outcomes.load(
        output / f"cells/{data}/{setting}/{method}/seed-{seed}.parquet"
    ).uncertainty


def test_a_share_of_the_rows_is_drawn_at_random_and_nested() -> None:
    target = np.where(np.arange(1000) % 10, np.arange(1000) % 7, -1)
    shares = [set(draw_share(target, share, 3).tolist()) for share in (0.025, 0.1, 0.5)]
    # There are 900 labelled rows, and 22.5 rounds to even.
    assert [len(rows) for rows in shares] == [
        22,
        90,
        450,
    ]
    assert shares[0] < shares[1] < shares[2]
    assert all(target[row] >= 0 for row in shares[2])
    assert shares[0] != set(draw_share(target, 0.025, 4).tolist())
    assert len(draw_share(target, 1e-6, 0)) == 1


def test_held_out_rows_are_a_matter_of_their_names() -> None:
    """A row's name alone must decide whether the row is held out.

    With 1,000 names a quarter is held out, within five standard errors. The same rows are held out
    in any order.
    """
    names = [f"row {i}" for i in range(1000)]
    mask = held_out_mask(hash_names(names), 0.25)
    assert abs(mask.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 1000)
    assert np.array_equal(held_out_mask(hash_names(names[::-1]), 0.25), mask[::-1])
    assert (held_out_mask(hash_names(names), 0.1) <= mask).all()


def test_validation_rows_are_a_store_or_a_share(data: Path) -> None:
    few = {"kind": "labels", "budget": 4, "data": ["one", "two"]}
    chosen = made(settings={"all": {"kind": "labels"}, "few": few})
    bench = bench_of(chosen, data)
    origins = {name: fit_inputs_of(chosen, Cell("lvu", name, "all", 0)) for name in ("one", "two")}
    validation = {name: bench.validation_set(origin) for name, origin in origins.items()}
    assert len(validation["one"]) == 40
    train = bench.train_set(origins["two"], ())
    assert len(validation["two"]) + len(train) == 80
    assert set(validation["two"].ids).isdisjoint(train.ids)
    assert bench.validation_set(fit_inputs_of(chosen, Cell("lvu", "one", "few", 0))) is None
    tiny = made(
        data={"two": {"stores": {"train": "two-train", "test": "two-test"}, "validation": 1e-6}},
        settings=ALL,
    )
    assert bench_of(tiny, data).validation_set(origins["two"]) is None
    bench.check()


@pytest.mark.parametrize("named", [{}, {"validation": "validation"}])
def test_a_store_of_validation_rows_needs_no_further_key(named: dict, data: Path) -> None:
    stores = {name: f"one-{name}" for name in ("train", "validation", "test")}
    settings = {"all": {"kind": "labels"}, "chosen": {"kind": "labels", "test_on": "validation"}}
    chosen = made(data={"one": {"stores": stores, **named}}, settings=settings)
    bench = bench_of(chosen, data)
    fit_inputs = fit_inputs_of(chosen, Cell("lvu", "one", "all", 0))
    assert len(bench.validation_set(fit_inputs)) == 40
    assert len(bench.test_set(Cell("mcm", "one", "chosen", 0), ())) == 40


def test_a_store_of_validation_rows_counts_in_python_too() -> None:
    stores = StorePaths(train="a", test="b", validation="c")
    assert Data(stores=stores).validation == "validation"
    assert Data(stores=StorePaths(train="a", test="b")).validation is None
    assert Data(source="x").validation is None


def test_a_share_counts_beside_a_store_of_validation_rows(data: Path) -> None:
    """A study of 0.2.0 may name both, and is still read."""
    stores = {name: f"one-{name}" for name in ("train", "validation", "test")}
    chosen = made(data={"one": {"stores": stores, "validation": 0.25}}, settings=ALL)
    bench = bench_of(chosen, data)
    fit_inputs = fit_inputs_of(chosen, Cell("lvu", "one", "all", 0))
    n_validation = len(bench.validation_set(fit_inputs))
    assert n_validation + len(bench.train_set(fit_inputs, ())) == 120  # the rows of "one-train"


def test_selection_sees_the_validation_rows(data: Path, tmp_path: Path) -> None:
    benchmark(made(settings={"all": {"kind": "labels", "data": ["one", "two"]}}), data, tmp_path)
    stores = {
        name: vilu.EmbeddingStore(data / f"one-{name}") for name in ("train", "validation", "test")
    }
    predictor = vilu.ViLU(epochs=2, hidden=(8,), device="cpu").fit(
        stores["train"], stores["validation"]
    )
    expected = predictor.predict_uncertainty(stores["test"])
    assert scores(tmp_path, "one", "all", "vilu") == pytest.approx(expected, abs=1e-6)


def test_testing_on_validation_rows(data: Path, tmp_path: Path) -> None:
    settings = {
        "chosen": {"kind": "labels", "test_on": "validation", "data": ["one", "two"]},
        "all": {"kind": "labels", "data": ["one", "two"]},
    }
    chosen = made(settings=settings)
    report = benchmark(chosen, data, tmp_path)
    n = {(block.data, block.setting): block.n for block in report.summary.blocks}
    bench = bench_of(chosen, data)
    assert n["one", "chosen"] == (40,)
    assert n["two", "chosen"] == (len(bench.source("two", "validation")),)
    assert n["one", "all"] == (60,)
    groups = group_by_fit(chosen, [cell for cell in plan_cells(chosen) if cell.method == "vilu"])
    assert [{cell.setting for cell in group} for group in groups] == [{"chosen", "all"}] * 2
    with pytest.raises(
        UsageError, match=r"settings\.chosen tests on validation rows, and data\.pairs names none"
    ):
        made(settings={"chosen": {"kind": "labels", "test_on": "validation"}})


def test_captions_in_pools(data: Path, tmp_path: Path) -> None:
    settings = {
        "all": {"kind": "labels", "data": ["pairs"]},
        "large": {"kind": "labels", "data": ["pairs"], "pool_size": 16},
    }
    methods = {"mcm": {}, "vilu": {"params": SMALL}, "knn_vote": {}}
    report = benchmark(made(settings=settings, methods=methods), data, tmp_path)
    test = {size: open_source(data / "pairs", pools=Pools(size), fold="test") for size in (8, 16)}
    train = open_source(data / "pairs", pools=Pools(8), fold="train")
    predictor = vilu.ViLU(epochs=2, hidden=(8,), device="cpu").fit(train)
    for size, setting in ((8, "all"), (16, "large")):
        expected = predictor.predict_uncertainty(test[size])
        found = scores(tmp_path, "pairs", setting, "vilu")
        assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
        assert np.isnan(found).sum() == len(test[size]) % size
        outcomes = vilu.score(vilu.MCM(), test[size])
        kept = vilu.Outcomes.load(tmp_path / f"cells/pairs/{setting}/mcm/seed-0.parquet")
        assert np.array_equal(kept.failure, outcomes.failure)
    (reason,) = {block.refused["knn_vote"] for block in report.summary.blocks}
    assert "does not work on image-caption pairs" in reason


def test_transfer_from_captions(data: Path, tmp_path: Path) -> None:
    settings = {"moved": {"kind": "transfer", "source": "pairs", "data": ["one"]}}
    benchmark(made(settings=settings), data, tmp_path)
    train = open_source(data / "pairs", pools=Pools(8), fold="train")
    predictor = vilu.ViLU(epochs=2, hidden=(8,), device="cpu").fit(train)
    expected = predictor.predict_uncertainty(vilu.EmbeddingStore(data / "one-test"))
    assert scores(tmp_path, "one", "moved", "vilu") == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore:only .* successes")
def test_adapting_goes_on_from_another_fit(data: Path, tmp_path: Path) -> None:
    settings = {
        "zero": {
            "kind": "transfer",
            "source": "one",
            "across_preprocessing": True,
            "data": ["two"],
        },
        "few": {
            "kind": "adapt",
            "source": "one",
            "budget": 6,
            "across_preprocessing": True,
            "data": ["two"],
        },
    }
    small = {"epochs": 2, "width": 8}
    chosen = made(
        settings=settings,
        methods={"mcm": {}, "vilu": {"params": SMALL}, "vilu_plus": {"params": small}},
    )
    report = benchmark(chosen, data, tmp_path)
    bench = bench_of(chosen, data)
    groups = group_by_fit(chosen, [cell for cell in plan_cells(chosen) if cell.method == "vilu"])
    assert [[cell.setting for cell in group] for group in groups] == [["zero", "few"]]
    first = vilu.ViLU(epochs=2, hidden=(8,), device="cpu").fit(
        bench.source("one", "train"), bench.source("one", "validation")
    )
    few = bench.train_set(fit_inputs_of(chosen, Cell("vilu", "two", "few", 0)), ())
    assert np.bincount(few.target).tolist() == [6] * 5
    first.space_ = few.space
    adapted = start_from_fitted(vilu.ViLU, first).fit(few)
    expected = adapted.predict_uncertainty(bench.source("two", "test"))
    assert scores(tmp_path, "two", "few", "vilu") == pytest.approx(expected, abs=1e-5)
    assert not np.allclose(
        scores(tmp_path, "two", "zero", "vilu"), scores(tmp_path, "two", "few", "vilu")
    )
    refused = {block.setting: block.refused for block in report.summary.blocks}
    assert "does not begin from another fit" in refused["few"]["vilu_plus"]
    assert refused["zero"] == {}
    kept = [
        cell for cell in plan_cells(chosen) if cell.method == "mcm" and cell.same_as is not None
    ]
    # Nothing is fitted, so one result serves both settings.
    assert [cell.setting for cell in kept] == ["few"]


@pytest.mark.filterwarnings("ignore:.* training rows are left out")
def test_a_union_learns_from_all(data: Path, tmp_path: Path) -> None:
    settings = {
        "union": {
            "kind": "union",
            "of": ["one", "pairs"],
            "train_pool_size": 8,
            "data": ["one", "two"],
        },
        "across": {
            "kind": "union",
            "of": ["one", "two"],
            "train_pool_size": 8,
            "across_preprocessing": True,
            "data": ["two"],
        },
    }
    report = benchmark(
        made(settings=settings, methods={"mcm": {}, "vilu": {"params": SMALL}}), data, tmp_path
    )
    sources = [
        vilu.EmbeddingStore(data / "one-train"),
        open_source(data / "pairs", pools=Pools(8), fold="train"),
    ]
    predictor = vilu.ViLU(epochs=2, hidden=(8,), device="cpu").fit(
        PseudoCaptions(sources, 8, ["one", "pairs"])
    )
    expected = predictor.predict_uncertainty(vilu.EmbeddingStore(data / "one-test"))
    assert scores(tmp_path, "one", "union", "vilu") == pytest.approx(expected, abs=1e-6)
    refused = {(block.data, block.setting): block.refused for block in report.summary.blocks}
    assert "preprocess" in refused["two", "union"]["vilu"]
    assert refused["two", "across"] == {}


def test_shares_of_the_labels(data: Path, tmp_path: Path) -> None:
    settings = {"half": {"kind": "labels", "budget": 0.5, "data": ["one"]}}
    benchmark(made(settings=settings, seeds=2), data, tmp_path)
    one = made(settings=settings)
    sets = [
        bench_of(one, data).train_set(fit_inputs_of(one, Cell("lvu", "one", "half", seed)), ())
        for seed in (0, 1)
    ]
    assert [len(rows) for rows in sets] == [60, 60]
    assert list(sets[0].ids) != list(sets[1].ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"few": {"kind": "labels", "budget": 3}},
            r"settings\.few draws rows or classes, and data\.pairs has captions",
        ),
        ({"half": {"kind": "unseen"}}, r"settings\.half draws rows or classes"),
        ({"moved": {"kind": "transfer", "source": "pairs", "budget": 3}}, "draws rows or classes"),
        ({"a": {"kind": "adapt", "source": "one"}}, r"settings\.a: to adapt, give a budget"),
        ({"u": {"kind": "union", "of": []}}, r"settings\.u\.of: .*at least 1 item"),
        (
            {"u": {"kind": "union", "of": ["one"], "budget": 1}},
            r"settings\.u\.budget: Input should be 'all'",
        ),
        (
            {"u": {"kind": "union", "of": ["one"], "budget": "none"}},
            r"settings\.u\.budget: Input should be 'all'",
        ),
        ({"u": {"kind": "union", "of": ["nine"]}}, r"no data set \(settings\.u\) 'nine'"),
        ({"all": {"kind": "labels", "budget": 1.5}}, 'must be "all", "none", a number'),
        (
            {"a": {"kind": "adapt", "source": "one", "budget": "none"}},
            r"settings\.a: to adapt, give a budget",
        ),
        (
            {"all": {"kind": "labels", "pool_size": 1}},
            r"settings\.all\.pool_size: Input should be greater",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(settings=settings)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"stores": {"train": "a", "test": "b"}, "dataset": "dtd"}, "either a source or stores"),
        ({}, "a source, or the name of a known dataset, or stores"),
        ({"source": "x", "captions": True, "classes": ["a", "b"]}, "captions have no classes"),
        ({"source": "x", "captions": True, "validation": 0.1}, "captions have no classes"),
        ({"source": "x", "captions": True, "negatives": True}, "captions have no classes"),
        ({"source": "x", "captions": True, "limit": {"train": 3}}, "their limit is one number"),
        (
            {"source": "x", "shift": {"kinds": ["blurr"]}},
            "no kind of shift 'blurr'. Did you mean 'blur'",
        ),
        ({"source": "x", "shift": {"severity": 6}}, "less than or equal to 5"),
        ({"source": "x", "validation": 1.0}, "data.one.validation"),
        (
            {"stores": {"train": "a", "test": "b"}, "fit_share": 0.5},
            "fit_share divides one set of rows",
        ),
        (
            {"source": "x", "train": "t", "test": "t", "fit_share": 0.5, "validation": 0.1},
            "without validation",
        ),
        (
            {"source": "x", "captions": True, "train": "t", "test": "t", "fit_share": 0.5},
            "without captions",
        ),
        ({"source": "x", "train": "t", "test": "t", "fit_share": 1.0}, "less than 1"),
    ],
)
def test_data_sets_that_cannot_be(entry: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(data={"one": entry}, settings={"all": {"kind": "labels"}})


ONE_SET = {"stores": {"train": "one-train", "test": "one-train"}, "fit_share": 0.5}


@dataclasses.dataclass
class Distance(FailurePredictor):
    """Score the distance to the mean of training rows.

    The method never sees their labels.
    """

    name: ClassVar[str] = "distance_to_mean"
    summary: ClassVar[str] = "distance to the mean of unlabelled rows"
    reference: ClassVar[str] = "a test"
    needs_labels: ClassVar[bool] = False
    tensors: ClassVar[tuple[str, ...]] = ("mean",)

    def _learn(
        self, train: Rows, failure: torch.Tensor, validation: EmbeddingSource | None
    ) -> Learnt:
        assert (failure == -1).all()
        assert (train.source.target == -1).all()
        assert not train.source.outside.any()
        return Learnt({"mean": train.source.image_rows(train.index).mean(dim=0)})

    def _score(self, batch: Batch) -> torch.Tensor:
        return (batch.image - self.tensor("mean", batch.image.device)).norm(dim=1)


@pytest.fixture
def unlabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vilu.PREDICTORS, Distance.name, Distance)


def test_one_set_is_divided_by_the_seed() -> None:
    fit, others = divide_rows(101, 0.3, 0)
    assert np.array_equal(np.sort(np.concatenate([fit, others])), np.arange(101))
    assert (len(fit), len(others)) == (30, 71)
    assert not np.array_equal(fit, divide_rows(101, 0.3, 1)[0])
    # Each row is in a half with probability 1/2. Over 400 seeds its share is within five standard
    # errors.
    share = np.mean(
        [np.isin(np.arange(20), divide_rows(20, 0.5, seed)[0]) for seed in range(400)], axis=0
    )
    assert np.abs(share - 0.5).max() < 5 * np.sqrt(0.25 / 400)


def test_what_is_fitted_on_is_not_tested_on(data: Path, tmp_path: Path) -> None:
    settings = {"all": {"kind": "labels"}, "few": {"kind": "labels", "budget": 2}}
    methods = {"mcm": {}, "knn_distance": {"deterministic": True}}
    chosen = made(data={"one": ONE_SET}, settings=settings, methods=methods, seeds=2)
    bench, cells = bench_of(chosen, data), plan_cells(chosen)
    bench.check()
    names = set()
    for seed in (0, 1):
        test = bench.test_set(Cell("mcm", "one", "all", seed), ())
        assert set(test.ids) == set(
            bench.test_set(Cell("knn_distance", "one", "few", seed), ()).ids
        )
        for setting in ("all", "few"):
            train = bench.train_set(
                fit_inputs_of(chosen, Cell("knn_distance", "one", setting, seed)), ()
            )
            assert set(train.ids).isdisjoint(test.ids)
            assert len(train) == (60 if setting == "all" else 10)
        assert len(set(train.ids) | set(test.ids)) == 70
        names.add(bench.truth(Cell("mcm", "one", "all", seed)).rows_hash)
    assert len(names) == 2
    # If a method has no fit, it has one result for each division, whatever the labels.
    assert [(cell.seed, cell.result_cell.setting) for cell in cells if cell.method == "mcm"] == [
        (0, "all"), (0, "all"), (1, "all"), (1, "all"),
    ]  # fmt: skip
    assert all(cell.same_as is None for cell in cells if cell.method == "knn_distance")
    report = benchmark(chosen, data, tmp_path)
    assert {block.n for block in report.summary.blocks} == {(60,)}
    whole = vilu.EmbeddingStore(data / "one-train")
    fit, others = (whole.take(rows) for rows in divide_rows(120, 0.5, 1))
    expected = vilu.PREDICTORS["knn_distance"]().fit(fit).predict_uncertainty(others)
    assert scores(tmp_path, "one", "all", "knn_distance", 1) == pytest.approx(expected, abs=1e-6)
    # A second run must read the finished cells, and write none of them again.
    cell_files = list(tmp_path.glob("**/cells/**/*.json"))
    assert cell_files
    cells_before = {path: path.stat().st_mtime_ns for path in cell_files}
    assert benchmark(chosen, data, tmp_path).text == report.text
    cells_after = {path: path.stat().st_mtime_ns for path in cells_before}
    assert cells_after == cells_before


def test_a_union_of_divided_sets_is_not_fitted_on_what_is_tested_on(data: Path) -> None:
    entries = {
        "one": ONE_SET,
        "more": {"stores": {"train": "one-test", "test": "one-test"}, "fit_share": 0.3},
    }
    entries["two"] = {"stores": {"train": "two-train", "test": "two-test"}}
    of = {"of": ["one", "more", "two"], "across_preprocessing": True}
    chosen = made(
        data=entries, settings={"joint": {"kind": "union", "train_pool_size": 8, **of}}, seeds=2
    )
    bench = bench_of(chosen, data)
    fits = []
    for seed in (0, 1):
        cells = {name: Cell("lvu", name, "joint", seed) for name in chosen.data}
        # There is one fit for all data sets.
        (origin,) = {fit_inputs_of(chosen, cell) for cell in cells.values()}
        train = bench.train_set(origin, ())
        assert isinstance(train, PseudoCaptions)
        # The fit rows are 1/2 of the first 120, then 60 * 0.3, then all 80.
        assert [len(source) for source in train.sources] == [
            60,
            18,
            80,
        ]
        fits.append(set(train.ids))
        for name, cell in cells.items():
            assert fits[-1].isdisjoint(f"{name}/{key}" for key in bench.test_set(cell, ()).ids)
    assert fits[0] != fits[1]
    facts = [deciding_facts(bench, Cell("lvu", "one", "joint", seed))["train"] for seed in (0, 1)]
    assert [(of["fit_share"], of["division_seed"]) for of in facts] == [
        ([0.5, 0.3, None], 0),
        ([0.5, 0.3, None], 1),
    ]


def test_a_set_that_only_one_of_two_studies_divides_is_refused(data: Path, tmp_path: Path) -> None:
    whole = made(
        name="whole", data={"one": {"stores": ONE_SET["stores"]}}, settings=ALL, methods={"mcm": {}}
    )
    half = made(name="half", data={"one": ONE_SET}, settings=ALL, methods={"mcm": {}})
    for both in ([whole, half], [half, whole]):
        with pytest.raises(
            UsageError, match=r"both have mcm on one.* they differ in fit_share, division_seed"
        ):
            run_all(both, data, tmp_path / "run")


def test_a_picture_that_is_there_twice_is_not_in_fit_and_test(
    tmp_path: Path,
) -> None:
    pictures, labels = [picture(row % 60) for row in range(90)], [row % 3 for row in range(90)]
    twice = FakeDataset(
        pictures, labels, [f"{row}.png" for row in range(90)], class_names=tuple("abc")
    )
    embed(twice, FakeBackbone(), tmp_path / "twice", names=WORDS[:3])
    entry = {"stores": {"train": "twice", "test": "twice"}, "fit_share": 0.5}
    chosen = made(data={"twice": entry}, settings=ALL, methods={"mcm": {}, "knn_distance": {}})
    bench, cell = bench_of(chosen, tmp_path), Cell("knn_distance", "twice", "all", 0)
    with pytest.warns(
        UserWarning, match="of 45 rows to fit on of twice are left out: they are tested on"
    ):
        train = bench.train_set(fit_inputs_of(chosen, cell), ())
    rows, others = (part.tolist() for part in divide_rows(90, 0.5, 0))
    tested = {row % 60 for row in others}
    assert list(bench.test_set(cell, ()).ids) == [f"{row}.png" for row in others]
    assert list(train.ids) == [f"{row}.png" for row in rows if row % 60 not in tested]
    assert 0 < len(train) < 45
    benchmark(chosen, tmp_path, tmp_path / "run")
    assert "they are tested on" in (tmp_path / "run" / cell.path).read_text()


@pytest.mark.filterwarnings("ignore:vilu_plus is fitted on")
def test_rows_that_the_budget_leaves_out_go_beside_without_labels(
    data: Path, tmp_path: Path
) -> None:
    methods = {
        "bare": {"method": "vilu_plus"},
        "beside": {"method": "vilu_plus", "unlabelled": True},
    }
    settings = {"few": {"kind": "labels", "budget": 2}}
    chosen = made(data={"one": ONE_SET}, settings=settings, methods=methods)
    bench = bench_of(chosen, data)
    bare, beside = (fit_inputs_of(chosen, Cell(label, "one", "few", 0)) for label in methods)
    few, rest = bench.train_set(beside, ()), bench.unlabelled_set(beside)
    assert bench.unlabelled_set(bare) is None
    assert rest is not None
    assert (rest.target == -1).all()
    assert set(few.ids) < set(rest.ids)
    assert set(rest.ids).isdisjoint(bench.test_set(Cell("beside", "one", "few", 0), ()).ids)
    benchmark(chosen, data, tmp_path)
    expected = [vilu.PREDICTORS["vilu_plus"]().fit(few, unlabelled=more) for more in (None, rest)]
    test = bench.test_set(Cell("beside", "one", "few", 0), ())
    for label, fit in zip(methods, expected, strict=True):
        assert scores(tmp_path, "one", "few", label, 0) == pytest.approx(
            fit.predict_uncertainty(test), abs=1e-6
        )
    with pytest.raises(UsageError, match="learns nothing from rows without labels"):
        made(data={"one": ONE_SET}, settings=settings, methods={"mcm": {"unlabelled": True}})
    joint = settings | {"joint": {"kind": "union", "of": ["one"]}}
    with pytest.raises(
        UsageError, match=r"methods\.beside: .* in the union joint\. List .* without joint"
    ):
        made(data={"one": ONE_SET}, settings=joint, methods=methods)
    made(
        data={"one": ONE_SET},
        settings=joint,
        methods={"beside": methods["beside"] | {"settings": ["few"]}},
    )


@pytest.mark.usefixtures("unlabelled")
def test_without_labels_only_methods_run_that_need_none(data: Path, tmp_path: Path) -> None:
    settings = {
        "none": {"kind": "labels", "budget": "none"},
        "few": {"kind": "labels", "budget": 2},
    }
    methods = {"mcm": {}, "knn_distance": {}, Distance.name: {}}
    halves = {"unseen": {"kind": "unseen"}}
    chosen = made(data={"one": ONE_SET}, settings=settings | halves, methods=methods)
    cells = plan_cells(chosen)
    assert [cell.method for cell in cells if cell.setting == "none"] == ["mcm", Distance.name]
    shared = {
        cell.setting: cell.result_cell.setting for cell in cells if cell.method == Distance.name
    }
    assert shared == {"none": "none", "few": "none", "unseen": "unseen"}
    origin = fit_inputs_of(chosen, Cell(Distance.name, "one", "few", 0))
    assert (origin.budget, origin.rows_seed) == ("none", None)
    report = benchmark(chosen, data, tmp_path)
    assert not any(block.refused for block in report.summary.blocks)
    fit, others = (
        vilu.EmbeddingStore(data / "one-train").take(rows) for rows in divide_rows(120, 0.5, 0)
    )
    found = scores(tmp_path, "one", "none", Distance.name)
    expected = torch.stack(
        [
            row - fit.image_rows(torch.arange(60)).mean(0)
            for row in others.image_rows(torch.arange(60))
        ]
    )
    assert found == pytest.approx(expected.norm(dim=1).numpy(), abs=1e-5)


def test_a_store_that_is_not_named(data: Path) -> None:
    settings = {"chosen": {"kind": "labels", "test_on": "validation"}}
    entry = {"stores": {"train": "one-train", "test": "one-test"}, "validation": "validation"}
    chosen = config(data={"one": entry}, settings=settings, methods={"mcm": {}})
    with pytest.raises(
        UsageError,
        match=r"data\.one has no store of its validation rows. Name it, as stores\.validation",
    ):
        bench_of(chosen, data)


def test_a_folder_of_stores_that_is_not_there(data: Path) -> None:
    entry = {"stores": {"train": "one-train", "test": "one-test"}}
    chosen = config(data={"one": entry}, methods={"mcm": {}})
    with pytest.raises(UsageError, match=r"nowhere.* is no folder.*--data FOLDER"):
        bench_of(chosen, data / "nowhere")
