"""Test cells that others ran.

They are handed in as files, checked row by row, and shown beside a study's cells.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.builders.bench_fakes import config, make_store
from tests.command import run
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import read_table, write_table
from vilu.errors import DataError
from vilu.outcomes.outcomes import Outcomes
from vilu_bench.studies.load import load_configs
from vilu_bench.studies.study import load_studies, run_studies
from vilu_bench.studies.submit import SUBMISSION_KEY, add_submissions

OURS: dict[str, Any] = {"mcm": {}, "knn_distance": {"deterministic": True}}
THEIRS = {
    "margin": {},
    "distance": {"method": "knn_distance", "params": {"k": 3}, "deterministic": True},
}
VIEWS = [
    {
        "kind": "table",
        "name": "all",
        "title": "All",
        "rows": ["method", "setting"],
        "mean": ["one"],
    },
    {
        "kind": "table",
        "name": "mcm",
        "title": "One",
        "methods": ["mcm"],
        "rows": ["data"],
        "columns": ["setting", "metric"],
    },
]


def study(methods: dict[str, Any], views: Sequence[dict[str, Any]] = ()) -> Any:
    data = {"one": {"stores": {"train": "one-train", "test": "one-test"}}}
    settings = {"all": {"kind": "labels"}, "few": {"kind": "labels", "budget": 8}}
    views = views or [*VIEWS, {"kind": "ranking", "name": "r", "title": "R"}]
    return config(data=data, settings=settings, methods=methods, views=views, resamples=1000)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three runs and with the files that others hand in.

    The runs hold our methods, their methods beside one of ours, and all methods.
    """
    root = tmp_path_factory.mktemp("submit")
    stores = root / "stores"
    make_store(stores / "one-train", 120, 0)
    make_store(stores / "one-test", 60, 1_000)
    for name, methods in {
        "ours": OURS,
        "theirs": {"mcm": {}, **THEIRS},
        "whole": OURS | THEIRS,
    }.items():
        run_studies([study(methods)], stores, root / name)
    for label in THEIRS:
        assert run("submit", root / "theirs", label, "-o", root / "handed").stdout.strip() == str(
            root / "handed"
        )
    return root


@pytest.fixture
def ours(home: Path, tmp_path: Path) -> Path:
    for name in ("ours", "handed"):
        shutil.copytree(home / name, tmp_path / name)
    return tmp_path


FILE = "handed/one/few/distance/seed-1.parquet"


def test_one_file_a_result_with_its_rows_and_what_made_them(home: Path) -> None:
    found = sorted(
        path.relative_to(home / "handed").as_posix()
        for path in (home / "handed").rglob("*.parquet")
    )
    places = {
        "margin": ["all/margin/seed-0"]
    }  # nothing is fitted, and no seed changes the test rows
    places["distance"] = ["all/distance/seed-0", "few/distance/seed-0", "few/distance/seed-1"]
    assert found == sorted(f"one/{place}.parquet" for of in places.values() for place in of)
    scores = Outcomes.load(home / FILE)
    cell = Outcomes.load(home / "theirs/cells/one/few/distance/seed-1.parquet")
    assert np.array_equal(scores.uncertainty, cell.uncertainty)
    # These are scores like any others.
    assert "distance" in run("evaluate", home / FILE, "--resamples", 10).stdout
    said = Outcomes.load(home / "handed/one/all/margin/seed-0.parquet").provenance[SUBMISSION_KEY]
    assert said["stands_for"] == [["all", 0], ["few", 0], ["all", 1], ["few", 1]]
    assert (said["made_by"], said["result"]["decided_by"]["method"]) == ("", "margin")


def test_the_tables_are_as_if_they_had_been_run_here(home: Path, ours: Path) -> None:
    before = {
        path.name: path.read_bytes() for path in (ours / "ours/studies/benchmark/tables").iterdir()
    }
    told = run("render", ours / "ours", "--submitted", ours / "handed").stdout
    tables = ours / "ours/studies/benchmark/tables"
    here = (tables / "all.csv").read_text()
    for label in THEIRS:
        here = here.replace(f"{label} (submitted)", label)
        assert label in told.split()
    whole = (home / "whole/studies/benchmark/tables/all.csv").read_text()
    assert sorted(here.splitlines()) == sorted(whole.splitlines())
    # A table for one method has no room for more.
    assert (tables / "mcm.csv").read_bytes() == before["mcm.csv"]
    run("render", ours / "ours")
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == before


@pytest.mark.parametrize(
    "view",
    [
        {"kind": "histograms"},
        {
            "kind": "grid",
            "parameters": ["k", "max_bank"],
            "select_on": "all",
            "report_on": "few",
        },
    ],
)
def test_views_of_the_run_alone_show_no_guests(
    home: Path, tmp_path: Path, view: dict[str, Any]
) -> None:
    of_all = {"name": "own", "title": "Of every method", **view}
    params = {"k": 3, "max_bank": 100}
    methods = {"mcm": {}, "knn": {"method": "knn_distance", "params": params}}
    run_studies([study(methods, [of_all])], home / "stores", tmp_path / "run")
    (figure,) = (tmp_path / "run/studies/benchmark/figures").glob("own*.svg")
    before = figure.read_bytes()
    run("render", tmp_path / "run", "--submitted", home / "handed")
    assert figure.read_bytes() == before


def test_intervals_against_any_method_come_from_the_rows(home: Path, ours: Path) -> None:
    submitted = add_submissions(load_studies(ours / "ours"), ours / "ours", [ours / FILE])
    # In the last board both methods ran together.
    boards = [*submitted, *load_studies(home / "whole")]
    pairs = [
        (board.find("distance", "one", "few"), board.find("knn_distance", "one", "few"))
        for board in boards
    ]
    found, whole = (
        a.quantity("auroc", [1]) - b.quantity("auroc", [1])
        for a, b in pairs
        if a is not None and b is not None
    )
    assert found.difference(0.9) == whole.difference(0.9)
    mine, other = (
        Outcomes.load(p)
        for p in (ours / FILE, ours / "ours/cells/one/few/knn_distance/seed-1.parquet")
    )
    wrong, u, v = mine.failure == 1, mine.uncertainty, other.uncertainty
    assert found.value == pytest.approx(
        auroc(u[wrong], u[~wrong]) - auroc(v[wrong], v[~wrong]), abs=1e-12
    )
    rng, differences = np.random.default_rng(0), []
    for _ in range(4_000):
        bad, good = (rng.choice(np.flatnonzero(kind), kind.sum()) for kind in (wrong, ~wrong))
        differences.append(auroc(u[bad], u[good]) - auroc(v[bad], v[good]))
    low, high = np.quantile(differences, [0.05, 0.95])
    ends = found.interval(0.9)
    # The board's ends come from 1,000 resamples.
    assert (ends.ci_low, ends.ci_high) == pytest.approx((low, high), abs=0.08 * (high - low))


def auroc(wrong: Any, right: Any) -> float:
    """Return the share of pairs in which the wrong answer is more uncertain. A tie counts half."""
    return float((np.sign(wrong[:, None] - right) / 2 + 0.5).mean())


def resealed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Write changed content with a correct digest, as a deceiver would."""
    table, metadata = read_table(path, ())
    columns = {
        name: np.array(table[name].to_pylist()) for name in ("row_id", "uncertainty", "failure")
    }
    change(columns, metadata["provenance"][SUBMISSION_KEY])
    kinds = {"row_id": pa.int64(), "uncertainty": pa.float64(), "failure": pa.int8()}
    n = len(columns["row_id"])
    others = {
        name: table[name].combine_chunks()[:n] for name in table.column_names if name not in kinds
    }
    write_table(
        path, {**{name: pa.array(columns[name], kinds[name]) for name in kinds}, **others}, metadata
    )


def rows_of(columns: dict[str, Any], keep: Any) -> None:
    columns.update({name: column[keep] for name, column in columns.items()})


def claim(said: dict[str, Any], **changes: Any) -> None:
    said["result"]["decided_by"] |= changes
    said["result"]["fingerprint"] = digest(said["result"]["decided_by"])


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "a better score": (
        lambda c, _: c.update(uncertainty=c["uncertainty"] + c["failure"]),
        "its rows give auroc = .*; aurc = .*, and it says",
    ),
    "a row less": (lambda c, _: rows_of(c, slice(0, -1)), "it has 59 rows, and there are 60"),
    "a row twice": (
        lambda c, _: c["row_id"].__setitem__(3, 2),
        "every row once, in order: row_id must be 0 to 59",
    ),
    "another label": (
        lambda c, _: c["failure"].__setitem__(0, 1 - c["failure"][0]),
        "row 0 has another truth than here",
    ),
    "no number": (
        lambda c, _: c["uncertainty"].__setitem__(4, np.inf),
        "uncertainty must be finite. Got 1 infinite",
    ),
    "a better claim": (
        lambda _, s: s["result"]["results"][0].update(value=0.999),
        "auroc = .* says 0.999",
    ),
    "two better claims": (
        lambda _, s: [said.update(value=0.999) for said in s["result"]["results"][:2]],
        r"auroc = .* says 0\.999; .* says 0\.999",
    ),
    "another set": (lambda _, s: claim(s, test="0" * 32), "it differs in test"),
    "edited facts": (
        lambda _, s: s["result"]["decided_by"].update(method="mcm"),
        "its fingerprint does not match",
    ),
    "other rows": (
        lambda _, s: s["result"].update(test_rows="0" * 32),
        "it was tested on other rows. Embed or import",
    ),
    "more labels": (
        lambda _, s: claim(s, train=s["result"]["decided_by"]["train"] | {"budget": "all"}),
        "it was fitted with the budget all, here the budget is 8",
    ),
    "other training": (
        lambda _, s: claim(s, train=s["result"]["decided_by"]["train"] | {"rows": ["0" * 32]}),
        "it was fitted on rows that no method of the study was",
    ),
    "more rows to select on": (
        lambda _, s: claim(s, train=s["result"]["decided_by"]["train"] | {"validation": "0" * 32}),
        "it was selected on validation rows that no method of the study saw",
    ),
    "an earlier fit": (
        lambda _, s: claim(s, train=s["result"]["decided_by"]["train"] | {"start": {"rows": []}}),
        "its first fit was on rows that no method of the study saw",
    ),
    "another cell": (
        lambda _, s: s["result"].update(seed=0),
        "one, few, seed 0, and its scores are of another",
    ),
    "another place": (
        lambda _, s: s.update(stands_for=[["none", 0]]),
        "no study in .* has a result with its data set, setting and seed",
    ),
    "a key more": (
        lambda _, s: s.update(more=1),
        "is no cell as `vilu submit` writes it: .* no key 'more'",
    ),
    "a name that is markup": (
        lambda _, s: s["result"].update(method="<b>"),
        r"is no cell as `vilu submit` writes it: result\.method",
    ),
    "a maker that is markup": (
        lambda _, s: s.update(made_by="[x](y)"),
        "as `vilu submit` writes it: made_by",
    ),
    "our name": (
        lambda _, s: s["result"].update(method="mcm"),
        "says that it is mcm on one, few, seed 1",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_not_as_it_says_is_refused(ours: Path, what: str) -> None:
    change, reason = CHANGES[what]
    resealed(ours / FILE, change)
    with pytest.raises(DataError, match=reason) as refused:
        add_submissions(load_studies(ours / "ours"), ours / "ours", [ours / FILE])
    assert str(ours / FILE) in str(refused.value)


def test_an_edit_without_a_new_digest_is_refused(ours: Path) -> None:
    table = pq.read_table(ours / FILE)
    at = table.column_names.index("uncertainty")
    pq.write_table(
        table.set_column(at, "uncertainty", pa.array(np.linspace(0, 1, 60))), ours / FILE
    )
    told = run("render", ours / "ours", "--submitted", ours / "handed", code=3).stderr
    assert "was changed by another program: its rows are not what its digest says" in told


def test_a_nan_with_a_made_up_reason_is_refused(ours: Path) -> None:
    scores = Outcomes.load(ours / FILE)
    u = np.where(np.arange(60) == 7, np.nan, scores.uncertainty)
    replace(scores, uncertainty=u, reason=["hard" if row == 7 else None for row in range(60)]).save(
        ours / FILE
    )
    with pytest.raises(DataError, match="row 7 has no uncertainty, but has one here"):
        add_submissions(load_studies(ours / "ours"), ours / "ours", [ours / FILE])


def test_a_method_of_the_study_may_be_handed_in_as_the_same_alone(home: Path, ours: Path) -> None:
    run("submit", home / "whole", "knn_distance", "-o", ours / "again")
    (board,) = add_submissions(
        load_studies(ours / "ours"), ours / "ours", sorted((ours / "again").rglob("*.parquet"))
    )
    assert board.config.submitted_methods == ()
    path = ours / "again/one/few/knn_distance/seed-1.parquet"
    shutil.copy(ours / FILE, path)
    resealed(path, lambda _, said: said["result"].update(method="knn_distance"))
    named = Outcomes.load(path)
    replace(named, method="knn_distance").save(path)
    with pytest.raises(
        DataError, match=r"there is a 'knn_distance' with other scores. Hand in yours"
    ):
        add_submissions(load_studies(ours / "ours"), ours / "ours", [path])


def test_what_cannot_be_handed_in(ours: Path) -> None:
    assert (
        "has a result of a method 'lvu'"
        in run("submit", ours / "ours", "lvu", "-o", ours / "x", code=2).stderr
    )
    (ours / "empty").mkdir()
    assert (
        "there is no cell to show beside"
        in run("render", ours / "ours", "--submitted", ours / "empty", code=3).stderr
    )
    scores = Outcomes.load(ours / FILE)
    replace(scores, provenance={}).save(ours / FILE)
    with pytest.raises(DataError, match=r"is no cell as `vilu submit` writes it"):
        add_submissions(load_studies(ours / "ours"), ours / "ours", [ours / FILE])
    margin = ours / "handed/one/all/margin/seed-0.parquet"
    again = Path(shutil.copy(margin, ours / "copy.parquet"))
    (board,) = add_submissions(load_studies(ours / "ours"), ours / "ours", [margin, again])
    assert board.config.submitted_methods == ("margin",)
    other = Outcomes.load(again)
    # The order is the same, and so are the metrics.
    replace(other, uncertainty=other.uncertainty * 2).save(again)
    with pytest.raises(DataError, match="there is a 'margin' with other scores"):
        add_submissions(load_studies(ours / "ours"), ours / "ours", [margin, again])


def test_the_study_of_a_row_is_of_the_settings_and_seeds_of_the_whole() -> None:
    row, whole = load_configs(["clip_row", "clip/none"])
    assert row.data.items() <= whole.data.items()
    assert row.settings == whole.settings
    assert (row.seeds, row.resamples, row.metrics) == (whole.seeds, whole.resamples, whole.metrics)
