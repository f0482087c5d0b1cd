from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

import vilu
from tests.builders.bench_fakes import Report, benchmark, config, make_stores
from tests.builders.interrupted_children import interrupted_children
from tests.conftest import toy_embeddings
from vilu.artifacts.disk import host_hash
from vilu.artifacts.documents import read_log
from vilu.embeddings.source import Batch
from vilu.errors import BusyError, DataError, ProvenanceError, StorageError, UsageError
from vilu.outcomes.results import ResultTable
from vilu.predictors import PREDICTORS
from vilu.predictors.zero_shot import MCM
from vilu.store.importing import import_arrays
from vilu_bench.studies import facts
from vilu_bench.studies.cells import Cell, needed_parts, plan_cells
from vilu_bench.studies.config import Config
from vilu_bench.studies.data import StudyData
from vilu_bench.studies.result import load_result
from vilu_bench.studies.stores import find_stores
from vilu_bench.studies.study import render_studies


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Return a finished benchmark's folder and report. Tests work on copies."""
    output = tmp_path_factory.mktemp("first")
    return output, benchmark(config(), data, output)


@pytest.fixture
def output(first: tuple[Path, Report], tmp_path: Path) -> Path:
    return Path(shutil.copytree(first[0], tmp_path / "copy"))


def contents(root: Path) -> dict[str, bytes]:
    """Return every file in a benchmark, except files that depend on the clock."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in {".lock", "log.jsonl", "times.txt"}:
            files[path.relative_to(root).as_posix()] = path.read_bytes()
    return files


def plain(report: Report) -> dict:
    return json.loads(json.dumps(report.summary.to_dict()))


def ran(root: Path, before: dict[str, int]) -> set[str]:
    """Return the cells that were written since ``before``."""
    return {name for name, time in times(root).items() if before.get(name) != time}


def times(root: Path) -> dict[str, int]:
    cells = root / "cells"
    return {
        path.relative_to(cells).as_posix(): path.stat().st_mtime_ns
        for path in cells.rglob("*.json")
    }


def test_every_run_has_its_files(first: tuple[Path, Report]) -> None:
    output, report = first
    runs = [cell for cell in plan_cells(config()) if cell.same_as is None]
    folder = output / "studies/benchmark"
    assert set(times(output)) == {cell.path.relative_to("cells").as_posix() for cell in runs}
    cell = json.loads((output / "cells/one/all/lvu/seed-1.json").read_text())
    assert (cell["method"], cell["n_train"], cell["refused"]) == ("lvu", 120, None)
    assert [row["metric"] for row in cell["results"]] == ["auroc", "fpr95", "augrc", "aurc", "ece"]
    assert cell["decided_by"]["parameters"]["epochs"] == 2
    assert "timing" not in cell
    (told,) = [line for line in read_log(output) if line["cell"] == "cells/one/all/lvu/seed-1.json"]
    assert told["rows_per_second"] == pytest.approx(60 / told["score_seconds"])
    assert str(output) not in json.dumps(cell)
    scores = vilu.Outcomes.load(output / "cells/one/all/lvu/seed-1.parquet")
    assert vilu.metrics.auroc(scores.uncertainty, scores.failure) == cell["results"][0]["value"]
    assert np.load(output / "cells/one/all/lvu/seed-1.npy").shape == (2, 40)
    assert "one, all (all labels): 60 answers" in (folder / "table.txt").read_text()
    written = json.loads((folder / "results.json").read_text())
    assert (written["blocks"], written["standings"]) == (
        plain(report)["blocks"],
        plain(report)["standings"],
    )
    assert written["config"]["methods"]["lvu"]["params"] == {"epochs": 2, "hidden": [8]}
    table = ResultTable.load(folder / "results.parquet")
    assert (
        table.value("auroc", method="lvu", dataset="one", split="all", seed=1)
        == cell["results"][0]["value"]
    )
    assert len(table.filter(method="mcm", dataset="two", split="moved", metric="auroc")) == 1


def test_results_are_what_the_library_gives(first: tuple[Path, Report], data: Path) -> None:
    predictor = vilu.LVU(seed=1, epochs=2, hidden=(8,), device="cpu").fit(
        vilu.EmbeddingStore(data / "one-train")
    )
    expected = predictor.predict_uncertainty(vilu.EmbeddingStore(data / "one-test"))
    found = vilu.Outcomes.load(first[0] / "cells/one/all/lvu/seed-1.parquet").uncertainty
    assert found == pytest.approx(expected, abs=1e-6)  # its sums may run over several threads


def test_a_second_run_does_nothing(output: Path, data: Path) -> None:
    before, files = times(output), contents(output)
    benchmark(config(), data, output)
    assert ran(output, before) == set()
    assert contents(output) == files


@pytest.mark.parametrize("suffix", [".json", ".npy", ".parquet"])
def test_what_is_deleted_is_run_again_alone(output: Path, data: Path, suffix: str) -> None:
    before, files = times(output), contents(output)
    (output / "cells/two/few/lvu/seed-1").with_suffix(suffix).unlink()
    benchmark(config(), data, output)
    assert ran(output, before) == {"two/few/lvu/seed-1.json"}
    assert contents(output) == files


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_what_is_damaged_is_run_again(output: Path, data: Path, suffix: str) -> None:
    before, files = times(output), contents(output)
    (output / "cells/two/few/lvu/seed-1").with_suffix(suffix).write_bytes(b"{}")
    benchmark(config(), data, output)
    assert ran(output, before) == {"two/few/lvu/seed-1.json"}
    assert contents(output) == files


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".json", "is damaged"),
        (".npy", "is not the file of its cell"),
        (".parquet", "is gone"),
    ],
)
def test_what_is_damaged_is_said_and_only_a_run_says_that_it_runs_again(
    output: Path, data: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = (output / "cells/two/few/lvu/seed-1").with_suffix(suffix)
    path.write_bytes(b"{")
    if suffix == ".parquet":
        path.unlink()
    with pytest.raises(DataError, match=r"Run its `vilu benchmark` again"):
        render_studies(output)
    assert f"{path} {damage}" in caplog.text
    assert "run again" not in caplog.text
    with caplog.at_level("INFO", logger="vilu"):
        benchmark(config(), data, output)
    assert "1 cells are of older code, other data or other parameters, or damaged" in caplog.text


def test_a_changed_parameter_runs_its_method_again(output: Path, data: Path) -> None:
    before = times(output)
    methods = {**config().model_dump()["methods"], "lvu": {"params": {"epochs": 3, "hidden": [8]}}}
    benchmark(config(methods=methods), data, output)
    assert ran(output, before) == {name for name in before if "/lvu/" in name}


def test_a_new_seed_runs_alone(output: Path, data: Path) -> None:
    before = times(output)
    benchmark(config(seeds=3), data, output)
    new = ran(output, before)
    assert new == {name for name in times(output) if name.endswith("seed-2.json")}
    assert len(new) == 7 + 4 + 2


def test_other_embeddings_run_again(output: Path, data: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(data, tmp_path / "stores"))
    before = times(output)
    swapped = {
        name: {"stores": {"train": f"{name}-train", "test": f"{name}-test"}}
        for name in ("one", "two")
    }
    swapped["two"]["limit"] = 40
    benchmark(config(data=swapped), moved, output)
    assert ran(output, before) == {name for name in before if name.startswith("two/")}


def test_a_changed_method_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a method's code or a module-level import changes, it must run again.

    Comments, docstrings and other methods do not count.
    """
    predictors = tmp_path / "vilu" / "predictors"
    predictors.mkdir(parents=True)

    def digest_with(method: str, helper: str) -> str:
        (predictors / "mine.py").write_text(
            f"from vilu.predictors import helper\nimport vilu.outside\n{method}"
        )
        (predictors / "helper.py").write_text(helper)
        (predictors / "__init__.py").write_text(
            f"from vilu.predictors.other import x  # {method}{helper}"
        )
        facts._hash_and_imports.cache_clear()
        facts.code_digest.cache_clear()
        return facts.code_digest("vilu.predictors.mine")

    with monkeypatch.context() as patch:
        patch.setattr(facts, "SOURCE_FOLDER", tmp_path)
        first = digest_with("def f():\n    return 1\n", "A = 1\n")
        assert (
            digest_with('"""Says."""\ndef f():\n    """So."""\n    return 1  # one\n', "A = 1\n")
            == first
        )
        assert digest_with("def f():\n    return 2\n", "A = 1\n") != first
        assert digest_with("def f():\n    return 1\n", "A = 2\n") != first
    facts._hash_and_imports.cache_clear()
    facts.code_digest.cache_clear()
    assert facts.code_digest("vilu.predictors.zero_shot") != facts.code_digest(
        "vilu.predictors.vilu.vilu"
    )


def test_code_outside_vilu_is_hashed_by_its_own_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imports from the method's own package must count too. The folder must not count."""

    def digest_with(folder: Path, helper: str) -> str:
        (folder / "strangers").mkdir(parents=True, exist_ok=True)
        (folder / "strangers" / "__init__.py").write_text("from strangers import others\n")
        (folder / "strangers" / "mine.py").write_text(
            "from . import helper\nfrom .helper import A\n"
        )
        (folder / "strangers" / "helper.py").write_text(helper)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            for name in ("strangers", "strangers.mine", "strangers.helper", "strangers.others"):
                patch.delitem(sys.modules, name, raising=False)
            (folder / "strangers" / "others.py").write_text("")
            importlib.import_module("strangers.mine")
            facts._hash_and_imports.cache_clear()
            facts.code_digest.cache_clear()
            return facts.code_digest("strangers.mine")

    first = digest_with(tmp_path / "a", "A = 1  # one\n")
    assert digest_with(tmp_path / "b", "A = 1\n") == first
    assert digest_with(tmp_path / "c", "A = 2\n") != first
    with pytest.raises(UsageError, match=r"strangers\.gone has no source file"):
        facts.code_digest("strangers.gone")


def test_cells_of_older_code_are_shown_and_counted(
    output: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert (
        "vilu"
        not in json.loads((output / "cells/one/all/lvu/seed-1.json").read_text())["decided_by"]
    )
    n = len(times(output))
    (text,) = (study.text for study in render_studies(output))
    caplog.clear()
    with caplog.at_level("INFO", logger="vilu"):
        assert [study.text for study in render_studies(output)] == [text]
        assert "older code" not in caplog.text
        monkeypatch.setattr(facts, "code_digest", lambda *_: "another")
        assert [study.text for study in render_studies(output)] == [text]
        assert f"benchmark: {n} of {n} results are of older code" in caplog.text
        benchmark(config(), data, output)
        assert f"benchmark: {n} cells are of older code" in caplog.text


@pytest.mark.slow
def test_two_jobs_give_the_files_of_one(
    first: tuple[Path, Report], data: Path, tmp_path: Path
) -> None:
    # Ctrl-C is for this process. It must not end a worker that starts.
    with interrupted_children() as interrupted:
        report = benchmark(config(), data, tmp_path, jobs=2)
    assert interrupted
    assert contents(tmp_path) == contents(first[0])
    assert plain(report) == plain(first[1])
    assert multiprocessing.active_children() == []


def test_refusals_are_results(data: Path, tmp_path: Path) -> None:
    methods = {"mcm": {}, "knn_vote": {}, "lvu": {"params": {"epochs": 1, "hidden": [4]}}}
    settings = {
        "strict": {"kind": "transfer", "source": "one"},
        "unseen": {"kind": "unseen"},
    }
    chosen = config(methods=methods, settings=settings, seeds=1)
    report = benchmark(chosen, data, tmp_path)
    blocks = {(block.data, block.setting): block for block in report.summary.blocks}
    refused = blocks["two", "strict"].refused
    assert "preprocess: '8x8' (the fitted lvu) against '9x9' (the data to score)" in refused["lvu"]
    assert refused["knn_vote"].startswith(
        "it scores the 5 classes that it is fitted on, and 1 of the 5 candidates"
    )
    assert (
        blocks["one", "unseen"]
        .refused["knn_vote"]
        .startswith("it scores the 2 classes that it is fitted on, and 3")
    )
    assert "mcm" in {line.method for line in blocks["two", "strict"].lines}
    cell = json.loads((tmp_path / "cells/two/strict/lvu/seed-0.json").read_text())
    assert (cell["refused"]["error"], cell["results"], cell["files"]) == ("ProvenanceError", [], {})
    assert "no result: knn_vote" in report.text
    before = times(tmp_path)
    benchmark(chosen, data, tmp_path)
    assert ran(tmp_path, before) == set()


def test_a_resumed_group_has_what_a_whole_one_has(data: Path, tmp_path: Path) -> None:
    """A resumed group must have the same files.

    Two cells share one fit. If the first cell is there, the second is made with its own fit,
    warnings and all.
    """
    settings = {
        "few": {"kind": "labels", "budget": 5, "data": ["one"]},
        "moved": {"kind": "transfer", "source": "one", "budget": 5, "across_preprocessing": True},
    }
    chosen = config(
        methods={"lvu": {"params": {"epochs": 1, "hidden": [4]}}}, settings=settings, seeds=1
    )
    benchmark(chosen, data, tmp_path)
    files = contents(tmp_path)
    assert "expect an unreliable fit" in files["cells/two/moved/lvu/seed-0.json"].decode()
    (tmp_path / "cells/two/moved/lvu/seed-0.json").unlink()
    benchmark(chosen, data, tmp_path)
    assert contents(tmp_path) == files


def test_a_draw_without_successes_is_refused_for_its_seed_alone(data: Path, tmp_path: Path) -> None:
    """Only seeds without a right answer may be refused.

    A draw has 5 rows, one per class, and the accuracy is near a fifth. So a third of the draws has
    no right answer.
    """
    methods = {"lvu": {"params": {"epochs": 1, "hidden": [4]}}}
    settings = {"tiny": {"kind": "labels", "budget": 1, "data": ["one"]}}
    report = benchmark(config(methods=methods, settings=settings, seeds=8), data, tmp_path)
    (line,) = report.summary.blocks[0].lines
    assert 0 < len(line.refused_seeds) < 8
    assert line.n_runs == 8 - len(line.refused_seeds)
    assert f"{line.n_runs} (not {'/'.join(map(str, line.refused_seeds))})" in report.text


@dataclass
class Broken(MCM):
    name: ClassVar[str] = "broken"

    def _score(self, batch: Batch) -> torch.Tensor:
        raise ZeroDivisionError("a bug")


@dataclass
class Interrupted(MCM):
    name: ClassVar[str] = "interrupted"

    def _score(self, batch: Batch) -> torch.Tensor:
        raise KeyboardInterrupt


def with_method(cls: type[MCM], monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(PREDICTORS, cls.name, cls)
    return config(
        methods={"mcm": {}, cls.name: {}, "margin": {}},
        settings={"all": {"kind": "labels"}},
        seeds=1,
    )


def test_a_fault_names_its_cell(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        benchmark(with_method(Broken, monkeypatch), data, tmp_path)
    assert caught.value.__notes__ == ["in the cell: broken on one, all, seed 0"]
    assert set(times(tmp_path)) == {"one/all/mcm/seed-0.json"}


def test_finished_cells_survive_an_interrupt(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        benchmark(with_method(Interrupted, monkeypatch), data, tmp_path)
    before = times(tmp_path)
    assert set(before) == {"one/all/mcm/seed-0.json"}
    monkeypatch.setattr(Interrupted, "_score", MCM._score)
    benchmark(with_method(Interrupted, monkeypatch), data, tmp_path)
    assert len(ran(tmp_path, before)) == 5
    assert not (set(before) & ran(tmp_path, before))


def test_what_changes_meanwhile_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If somebody edits a method while worker processes start, the change must be reported.

    The workers' cells then come from other code than ours.
    """
    monkeypatch.setattr("vilu_bench.studies.run.run_cells", lambda *_, n_done: None)
    with pytest.raises(
        ProvenanceError, match=r"31 cells do not fit the code or the data.* Start it again"
    ):
        benchmark(config(), data, tmp_path)


def test_leftovers_of_a_killed_run_go(output: Path, data: Path) -> None:
    # No process has this number.
    leftover = output / f"cells/one/all/mcm/.seed-0.json.{host_hash()}.99999999.deadbeef.tmp"
    leftover.write_bytes(b"half")
    benchmark(config(), data, output)
    assert not leftover.exists()


def test_one_benchmark_at_a_time(data: Path, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(BusyError, match="another benchmark is at work"),
    ):
        benchmark(config(), data, tmp_path)


def test_jobs_must_be_positive(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="jobs must be at least 1"):
        benchmark(config(), data, tmp_path, jobs=0)


def test_a_folder_that_cannot_be_read(output: Path, data: Path) -> None:
    cell = Cell("mcm", "one", "all", 0)
    path = output / cell.path
    fingerprint = json.loads(path.read_text())["fingerprint"]
    assert load_result(output, cell, fingerprint).cell == cell
    assert load_result(output, cell, "another") is None
    path.with_suffix(".npy").unlink()
    path.with_suffix(".npy").mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        load_result(output, cell, fingerprint)


def test_scores_hold_the_rows_of_the_test_set(first: tuple[Path, Report]) -> None:
    table = pq.read_table(first[0] / "cells/one/all/mcm/seed-0.parquet")
    assert len(table) == 60
    assert set(np.unique(table["failure"])) <= {0, 1}


def test_what_else_decides_a_fit_is_in_its_fingerprint(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fingerprint must name a stacking's members, an adaptation's start, and a
    union's captions.
    """
    stacking = PREDICTORS["stacking"]()
    assert {"vilu.predictors.stacking", "vilu.predictors.zero_shot"} <= set(stacking.modules)
    settings = {
        "all": {"kind": "labels"},
        "adapt": {"kind": "adapt", "source": "one", "budget": 2, "across_preprocessing": True},
        "union": {
            "kind": "union",
            "of": ["one", "two"],
            "train_pool_size": 8,
            "across_preprocessing": True,
        },
    }
    chosen = config(settings=settings)
    bench = StudyData(
        chosen, find_stores(chosen, needed_parts(chosen, plan_cells(chosen)), data, Path("unused"))
    )
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(facts, "code_digest", lambda *modules: str(asked.append(modules)))
    for setting in settings:
        facts.deciding_facts(bench, Cell("lvu", "two", setting, 0))
    lvu = type(PREDICTORS["lvu"]()).__module__
    assert asked == [
        (lvu,),
        (lvu, "vilu.predictors.vilu.fine_tuning"),
        (lvu, "vilu.embeddings.pairs"),
    ]


def imported(folder: Path, n: int, seed: int, n_outside: int) -> None:
    """Write a store with toy embeddings. The first ``n_outside`` rows show none of the classes."""
    data = toy_embeddings(n=n, seed=seed)
    target = data.target.clone()
    target[:n_outside] = vilu.OUTSIDE
    folder.parent.mkdir(exist_ok=True)
    path = folder.with_suffix(".npz")
    ids = np.array([f"{seed}-{i}" for i in range(n)])
    np.savez(
        path,
        image=data.image,
        text=data.text,
        target=target,
        class_names=np.array(data.class_names),
        ids=ids,
    )
    import_arrays(path, folder, logit_scale=20, logit_bias=0)


def test_pictures_of_none_of_the_classes_are_counted(tmp_path: Path) -> None:
    """Every result must count these pictures, and the metrics on them work like others.

    The scores must say which rows they are.
    """
    data = tmp_path / "stores"
    imported(data / "one-train", 300, 0, 10)
    imported(data / "one-test", 200, 1, 40)
    only = {"one": {"stores": {"train": "one-train", "test": "one-test"}}}
    metrics = ["auroc", "fpr95", "auroc_within", "auroc_outside"]
    settings = {"all": {"kind": "labels"}, "few": {"kind": "labels", "budget": 8}}
    found = benchmark(
        config(seeds=1, data=only, settings=settings, metrics=metrics), data, tmp_path / "out"
    )
    assert "AUROC outside" in found.text
    assert re.search(
        r"one, all .*: 200 answers, \d+ wrong, 40 of them for pictures of none of the classes",
        found.text,
    )
    paths = [path for path in (tmp_path / "out").rglob("*.json") if "lvu" in path.as_posix()]
    results = {json.loads(path.read_text())["setting"]: path for path in paths}
    assert json.loads(results["few"].read_text())["n_train"] == 5 * 8 + 10
    result = json.loads((path := results["all"]).read_text())
    assert result["n_train"] == 300
    assert {(row["n"], row["n_outside"]) for row in result["results"]} == {(200, 40)}
    outcomes = vilu.Outcomes.load(path.with_suffix(".parquet"))
    assert np.flatnonzero(outcomes.outside).tolist() == list(range(40))
    again = vilu.evaluate(outcomes, metrics=metrics, n_resamples=0)
    assert [row["value"] for row in result["results"]] == [row.value for row in again]


def test_results_of_the_classes_alone_say_nothing_of_others(first: tuple[Path, Report]) -> None:
    for path in first[0].rglob("*.json"):
        assert "n_outside" not in path.read_text()
