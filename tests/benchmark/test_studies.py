"""Test the steps from cells to tables, figures, claims and pages, with numbers made by hand."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders.bench_fakes import config, make_stores
from vilu.artifacts.documents import write_json
from vilu.errors import DataError, UsageError
from vilu.metrics import METRICS
from vilu.outcomes.results import ResultRow
from vilu_bench.studies.board import Board
from vilu_bench.studies.cells import Cell, plan_cells
from vilu_bench.studies.claims import decide
from vilu_bench.studies.config import Config
from vilu_bench.studies.exhibits import make_exhibit
from vilu_bench.studies.parts import RANKING_METRICS
from vilu_bench.studies.pivot import table_sheet
from vilu_bench.studies.ranking import times_table
from vilu_bench.studies.result import CellResult, Refusal, load_times
from vilu_bench.studies.sheet import to_csv, to_latex, to_markdown, to_text
from vilu_bench.studies.study import (
    claims_table,
    load_studies,
    render_studies,
    render_study,
    run_studies,
)
from vilu_bench.studies.views import BetterClaim, SteeperClaim, TableView, TrendClaim

B = 400
VALUES = {
    ("mcm", "one"): (0.70, 0.60),
    ("lvu", "one"): (0.80, 0.50),
    ("vilu", "one"): (0.80001, 0.40),
    ("mcm", "two"): (0.60, 0.80),
    ("lvu", "two"): (0.50, 0.90),
    ("vilu", "two"): (0.90, 0.20),
}
"""These are AUROC and FPR95 by method and data set."""


def made(**changes: Any) -> Config:
    stores = {name: {"stores": {"train": "a", "test": "b"}} for name in ("one", "two")}
    stores["one"] |= {"title": "First", "published": "cifar10", "backbone": "clip-vit-b32"}
    stores["two"] |= {"published": "cc12m", "backbone": "compact"}
    return config(
        **{
            "data": stores,
            "settings": {"all": {"kind": "labels"}},
            "methods": {"mcm": {}, "lvu": {}, "vilu": {"title": "ViLU"}, "margin": {}},
            "metrics": ["auroc", "fpr95", "ece"],
            "seeds": 1,
            "study": {"title": "By hand", "published": ["main"]},
            **changes,
        }
    )


def result(cell: Cell, values: tuple[float, float] | None, accuracy: float = 0.6) -> CellResult:
    numbers = (
        {} if values is None else {**dict(zip(RANKING_METRICS, values, strict=True)), "ece": None}
    )
    rows = tuple(
        ResultRow(
            cell.method,
            cell.data,
            cell.setting,
            cell.seed,
            metric,
            value,
            None,
            None,
            100,
            40,
            accuracy,
            0,
            0,
            METRICS[metric].convention,
            why=None if value is not None else "not a probability",
        )
        for metric, value in numbers.items()
    )
    return CellResult(
        fingerprint="f",
        decided_by={},
        method=cell.method,
        data=cell.data,
        setting=cell.setting,
        seed=cell.seed,
        test_rows="r",
        results=rows,
        refused=None if rows else Refusal(error="DataError", reason="it needs views"),
    )


def board(
    chosen: Config | None = None, values: dict[tuple[str, str], tuple[float, float]] = VALUES
) -> Board:
    """Return a board with the same noise (0.01) for all methods on a data set.

    So differences are exact.
    """
    chosen = chosen or made()
    cells = plan_cells(chosen)
    results = {
        cell: result(cell, values.get((cell.method, cell.data)))
        for cell in cells
        if cell.same_as is None
    }
    noise = {
        name: np.random.default_rng(i).normal(size=B) / 100 for i, name in enumerate(chosen.data)
    }

    def bootstrap(cell: Cell) -> np.ndarray:
        return np.stack([value + noise[cell.data] for value in values[cell.method, cell.data]])

    return Board(chosen, cells, results, bootstrap)


def view(**changes: Any) -> TableView:
    return TableView(**{"kind": "table", "name": "table", "title": "A table", **changes})


def test_a_table_by_hand() -> None:
    sheet = table_sheet(board(), view(mean=("one", "two")))
    assert sheet.rows == (("mcm",), ("lvu",), ("ViLU",), ("margin",))
    assert sheet.columns == tuple(
        (data, metric) for data in ("First", "two", "mean") for metric in ("AUROC", "FPR95")
    )
    cells = {(sheet.rows[i][0], *sheet.columns[j]): shown for (i, j), shown in sheet.cells.items()}
    assert cells["ViLU", "two", "AUROC"].value == 0.9
    assert cells["ViLU", "mean", "AUROC"].value == pytest.approx(0.850005)
    assert cells["mcm", "mean", "FPR95"].value == pytest.approx(0.7)
    assert cells["margin", "First", "AUROC"].value is None
    assert cells["margin", "mean", "AUROC"].why == "it needs views"
    ranks = {key: shown.rank for key, shown in cells.items() if shown.rank}
    assert ranks["ViLU", "First", "AUROC"] == "best"
    assert ranks["lvu", "First", "AUROC"] == "second"
    assert ranks["ViLU", "two", "FPR95"] == "best"  # lower is better
    assert ranks["mcm", "two", "FPR95"] == "second"
    assert ("mcm", "First", "AUROC") not in ranks
    ends = cells["mcm", "First", "AUROC"].interval
    noise = np.random.default_rng(0).normal(size=B) / 100
    assert (ends.ci_low, ends.ci_high) == pytest.approx(
        tuple(0.7 + np.quantile(noise, [0.025, 0.975]))
    )


def test_means_alone() -> None:
    settings = {
        "none": {"kind": "labels", "x": 0.5},
        "few": {"kind": "labels", "budget": 1, "x": 1},
    }
    means = {"title": "Means", "mean": ["one", "two"], "means_only": True}
    table = {"kind": "table", "name": "means", "columns": ["setting", "metric"], **means}
    curve = {
        "kind": "curve",
        "name": "curve",
        "x_label": "labels",
        "log": True,
        "ticks": {"0.5": "none"},
        **means,
    }
    chosen = made(settings=settings, views=[table, curve])
    rigged = board(chosen)
    sheet = make_exhibit(rigged, chosen.views[0], Path("unused")).body
    assert sheet.columns == tuple(
        (setting, metric) for setting in ("none", "few") for metric in ("AUROC", "FPR95")
    )
    assert sheet.cells[0, 0].value == pytest.approx(0.65)
    assert sheet.cells[2, 1].value == pytest.approx(0.3)
    assert (sheet.cells[2, 0].rank, sheet.cells[1, 0].rank) == ("best", "second")
    shown = make_exhibit(rigged, chosen.views[1], Path("unused"))
    (panel, of_fpr95) = shown.draw().axes
    assert panel.get_title() == "AUROC, mean of 2 sets"
    assert of_fpr95.get_title() == "FPR95, mean of 2 sets"
    assert panel.get_ylabel() == "AUROC (%), higher is better"
    assert of_fpr95.get_ylabel() == "FPR95 (%), lower is better"
    heights = [line.get_ydata().tolist() for line in panel.get_lines()]
    # This is MCM, whatever the labels.
    assert any(height == pytest.approx([65.0, 65.0]) for height in heights)
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["none", "1"]
    assert shown.body.rows[0] == ("mean", "mcm")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"kind": "table", "means_only": True}, "means_only needs a mean"),
        ({"kind": "table", "mean": ["three"]}, "no data set"),
        ({"kind": "scatter", "mean": ["one"]}, "means are for tables"),
        (
            {"kind": "curve", "x": "data", "panel": "setting", "x_label": "x", "mean": ["one"]},
            "means are for tables",
        ),
    ],
)
def test_means_that_cannot_be(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(views=[{"name": "v", "title": "v", **kind}])


def test_what_the_bootstrap_cannot_tell_from_the_best() -> None:
    """A method must be tied if the bootstrap cannot tell it from the best.

    Two methods are 0.005 apart, with independent noise of 0.01. The difference is no larger than
    its deviation.
    """
    chosen = made(
        methods={"mcm": {}, "lvu": {}, "vilu": {}},
        data={"one": {"stores": {"train": "a", "test": "b"}}},
    )
    cells = plan_cells(chosen)
    values = {"mcm": 0.7, "lvu": 0.795, "vilu": 0.8}
    noise = dict(zip(values, np.random.default_rng(0).normal(size=(3, B)) / 100, strict=True))
    results = {
        cell: result(cell, (values[cell.method], 0.5)) for cell in cells if cell.same_as is None
    }
    rigged = Board(
        chosen,
        cells,
        results,
        lambda cell: np.stack([values[cell.method] + noise[cell.method]] * 2),
    )
    sheet = table_sheet(rigged, view(metrics=("auroc",)))
    assert [sheet.cells[row, 0].is_tied for row in range(3)] == [False, True, False]


@pytest.mark.parametrize("order", [("mcm", "vilu", "lvu"), ("lvu", "vilu", "mcm")])
def test_of_two_equal_bests_the_order_decides_nothing(order: tuple[str, ...]) -> None:
    """If two methods are equally best, their order must not matter.

    MCM and LVU are best. The bootstrap can tell ViLU from MCM, but not from LVU.
    """
    chosen = made(
        methods={name: {} for name in order}, data={"one": {"stores": {"train": "a", "test": "b"}}}
    )
    cells = plan_cells(chosen)
    values = {"mcm": 0.8, "lvu": 0.8, "vilu": 0.79}
    noise = np.random.default_rng(0).normal(size=B) / 10
    draws = {"mcm": np.full(B, 0.8), "lvu": 0.8 + noise, "vilu": np.full(B, 0.79)}
    results = {
        cell: result(cell, (values[cell.method], 0.5)) for cell in cells if cell.same_as is None
    }
    rigged = Board(chosen, cells, results, lambda cell: np.stack([draws[cell.method]] * 2))
    sheet = table_sheet(rigged, view(metrics=("auroc",)))
    tied = {name: sheet.cells[row, 0].is_tied for row, name in enumerate(order)}
    assert tied == {"mcm": False, "lvu": False, "vilu": True}


def test_published_numbers_stand_beside_ours() -> None:
    sheet = table_sheet(board(), view())
    cells = {(sheet.rows[i][0], *sheet.columns[j]): shown for (i, j), shown in sheet.cells.items()}
    theirs = cells["mcm", "First", "AUROC"].published
    assert (theirs.value, theirs.backbone) == (0.8976, "clip-vit-b32")
    assert cells["mcm", "First", "AUROC"].difference == pytest.approx(0.7 - 0.8976)
    assert cells["mcm", "two", "AUROC"].published.value == 0.888
    assert cells["margin", "two", "AUROC"].published is None
    notes = " ".join(sheet.notes)
    assert (
        "another model (compact for clip-vit-b32) and other data (First for cifar10, two for cc12m)"
        in notes
    )
    assert "no result of margin: it needs views" in notes.lower()
    assert any("released checkpoints" in doubt for doubt in sheet.doubts)


def test_means_are_compared_with_means_over_as_many_sets() -> None:
    known = [
        "cifar10",
        "cifar100",
        "caltech101",
        "flowers102",
        "oxford_pets",
        "food101",
        "fgvc_aircraft",
        "eurosat",
    ]
    known += ["dtd", "sun397", "stanford_cars", "ucf101", "imagenet"]
    stores = {"train": "a", "test": "b"}
    data = {
        name: {"stores": stores, "published": name, "backbone": "clip-vit-b32"} for name in known
    }
    values = {("mcm", name): (0.8, 0.7) for name in known}
    rigged = board(made(data=data, methods={"mcm": {}}), values)
    thirteen, twelve = (table_sheet(rigged, view(mean=known[:n])) for n in (13, 12))
    means = [
        sheet.cells[0, sheet.columns.index(("mean", "AUROC"))].published
        for sheet in (thirteen, twelve)
    ]
    assert means[0].value == 0.818
    assert means[1] is None


def test_what_varies_must_be_named() -> None:
    with pytest.raises(UsageError, match=r"several values of data \(one, two\)"):
        made(views=[{"kind": "table", "name": "t", "title": "t", "columns": ["metric"]}])
    with pytest.raises(UsageError, match="both in the rows and in the columns"):
        made(
            views=[
                {
                    "kind": "table",
                    "name": "t",
                    "title": "t",
                    "rows": ["data"],
                    "columns": ["data", "metric"],
                }
            ]
        )


@pytest.fixture(scope="module")
def sheet():
    return table_sheet(board(), view(title="A & B_1 | <i>", mean=("one", "two")))


def test_markdown(sheet) -> None:
    text = to_markdown(sheet)
    lines = text.splitlines()
    assert lines[0] == "**A & B\\_1 \\| &lt;i>**"
    rows = [line for line in lines if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1
    vilu = next(line for line in rows if line.startswith("| ViLU"))
    assert "**80.0** <sub>[" in vilu
    assert "(98.3; -18.3)" in vilu  # 98.31 in the notebooks
    lvu = next(line for line in rows if line.startswith("| lvu"))
    assert "<u>80.0</u>" in lvu
    assert "(96.6?1; -16.6)" in lvu
    assert "?1: the released checkpoints" in text


def test_latex(sheet) -> None:
    text = to_latex(sheet)
    assert r"\caption{A \& B\_1 | <i>}" in text
    assert r"\begin{tabular}{lcccccc}" in text
    assert r"\multicolumn{2}{c}{First}" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    assert [line.count("&") for line in body.splitlines()[1:]] == [6] * 4
    assert r"\textbf{80.0} {\scriptsize [" in body
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_heads_of_latex_span_their_own_columns_alone() -> None:
    """Two data sets end and begin with the setting "all". This must give two heads, not one."""
    chosen = made(methods={"mcm": {}, "lvu": {}})
    text = to_latex(
        table_sheet(board(chosen), view(rows=("metric",), columns=("data", "setting", "method")))
    )
    heads = text[text.index(r"\toprule") : text.index(r"\midrule")].splitlines()
    assert heads[2] == r" & \multicolumn{2}{c}{all} & \multicolumn{2}{c}{all} \\"


def test_csv(sheet) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(sheet))))
    assert len(rows) == len(sheet.cells) == 4 * 6
    row = next(
        r for r in rows if (r["method"], r["data"], r["metric"]) == ("ViLU", "First", "auroc")
    )
    assert float(row["value"]) == 0.80001
    assert float(row["difference"]) == pytest.approx(0.80001 - 0.9831)
    assert (row["n"], row["n_failures"], row["runs"], row["rank"]) == ("100", "40", "1", "best")
    assert row["published_source"].startswith("notebooks")
    assert row["convention"] == METRICS["auroc"].convention
    missing = next(r for r in rows if r["method"] == "margin")
    assert (missing["value"], missing["why"]) == ("", "it needs views")


def test_csv_runs_no_formula() -> None:
    chosen = made(methods={"mcm": {"title": "=cmd()"}, "lvu": {}})
    assert "'=cmd()," in to_csv(table_sheet(board(chosen), view()))


def test_text_lines_up(sheet) -> None:
    lines = to_text(sheet).splitlines()
    assert lines[0] == "A & B_1 | <i>"
    column = lines[1].index("First / FPR95")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines[2:6])


def claim(kind: type, **changes: Any):
    return kind(
        **{
            "kind": kind.__name__.removesuffix("Claim").lower(),
            "says": "so",
            "source": "there",
            **changes,
        }
    )


def better(a: str, b: str, **changes: Any) -> BetterClaim:
    subjects = {"better": {"method": a, "setting": "all"}, "than": {"method": b, "setting": "all"}}
    return claim(BetterClaim, **subjects, **changes)


@pytest.mark.parametrize(
    ("chosen", "ruling", "number"),
    [
        (better("vilu", "mcm"), "holds", 0.200005),
        (better("mcm", "vilu"), "does not hold", -0.200005),
        (better("vilu", "lvu", metric="fpr95", data=("two",)), "holds", 0.7),  # lower is better
        (better("margin", "mcm"), "not tested", None),
    ],
)
def test_claims_of_being_better(chosen: BetterClaim, ruling: str, number: float | None) -> None:
    verdict = decide(board(), chosen)
    assert verdict.ruling == ruling
    assert verdict.number == (None if number is None else pytest.approx(number, abs=1e-12))


def test_a_claim_whose_interval_has_zero_is_open() -> None:
    chosen = made(
        data={"one": {"stores": {"train": "a", "test": "b"}}}, methods={"mcm": {}, "lvu": {}}
    )
    cells = plan_cells(chosen)
    values = {"mcm": 0.7, "lvu": 0.705}
    noise = dict(zip(values, np.random.default_rng(0).normal(size=(2, B)) / 100, strict=True))
    results = {
        cell: result(cell, (values[cell.method], 0.5)) for cell in cells if cell.same_as is None
    }
    rigged = Board(
        chosen,
        cells,
        results,
        lambda cell: np.stack([values[cell.method] + noise[cell.method]] * 2),
    )
    assert decide(rigged, better("lvu", "mcm")).ruling == "open"


def test_claims_of_a_trend() -> None:
    sizes = {f"pool_{x}": {"kind": "labels", "x": x, "pool_size": x} for x in (16, 32, 64)}
    chosen = made(
        settings=sizes, data={"one": {"stores": {"train": "a", "test": "b"}}}, methods={"mcm": {}}
    )
    cells = plan_cells(chosen)
    values = dict(zip(sizes, (0.9, 0.8, 0.75), strict=True))
    results = {
        cell: result(cell, (values[cell.setting], 0.5)) for cell in cells if cell.same_as is None
    }
    noise = np.random.default_rng(0).normal(size=B) / 100
    rigged = Board(
        chosen, cells, results, lambda cell: np.stack([values[cell.setting] + noise] * 2)
    )
    down = decide(
        rigged, claim(TrendClaim, method="mcm", settings=tuple(sizes), metric_goes="down")
    )
    assert (down.ruling, down.number) == (
        "holds",
        pytest.approx(0.075),
    )  # least squares over doublings: -0.15 / 2
    up = decide(rigged, claim(TrendClaim, method="mcm", settings=tuple(sizes), metric_goes="up"))
    assert (up.ruling, up.number) == ("does not hold", pytest.approx(-0.075))


def test_claims_of_depending_on_the_accuracy() -> None:
    stores = {name: {"stores": {"train": "a", "test": "b"}} for name in ("one", "two", "three")}
    chosen = made(data=stores, methods={"mcm": {}, "vilu": {}})
    cells = plan_cells(chosen)
    accuracy = {"one": 0.3, "two": 0.5, "three": 0.7}
    values = {("mcm", name): 0.4 + 0.5 * a for name, a in accuracy.items()}
    values |= {("vilu", name): 0.9 + 0.1 * (a - 0.5) for name, a in accuracy.items()}
    results = {
        cell: result(cell, (values[cell.method, cell.data], 0.5), accuracy[cell.data])
        for cell in cells
        if cell.same_as is None
    }
    noise = np.random.default_rng(0).normal(size=(3, B)) / 1000
    places = {name: noise[i] for i, name in enumerate(stores)}
    rigged = Board(
        chosen,
        cells,
        results,
        lambda cell: np.stack([values[cell.method, cell.data] + places[cell.data]] * 2),
    )
    verdict = decide(rigged, claim(SteeperClaim, steeper="mcm", than="vilu", settings=("all",)))
    assert (verdict.ruling, verdict.number) == ("holds", pytest.approx(0.4))
    assert (
        decide(rigged, claim(SteeperClaim, steeper="vilu", than="mcm", settings=("all",))).ruling
        == "does not hold"
    )
    assert "per 100 points" in verdict.number_in_words
    assert ": +40.0 [" in claims_table(
        chosen, [verdict]
    )  # the steeper line gains 0.4 more, from 0 to 100 %
    two = decide(
        rigged,
        claim(SteeperClaim, steeper="mcm", than="vilu", settings=("all",), data=("one", "two")),
    )
    assert (two.ruling, two.reason) == ("not tested", "a trend line needs 3 cases")


def test_slopes_are_compared_on_the_seeds_that_both_have() -> None:
    """Only seeds that both methods have may count.

    On seed 0, whose rows vilu has too, lvu rises by 0.5 per unit accuracy. On seed 1, which vilu
    lacks, lvu falls.
    """
    accuracy = {
        ("one", 0): 0.3,
        ("two", 0): 0.5,
        ("three", 0): 0.7,
        ("one", 1): 0.2,
        ("two", 1): 0.5,
        ("three", 1): 0.8,
    }
    stores = {name: {"stores": {"train": "a", "test": "b"}} for name in ("one", "two", "three")}
    chosen = made(data=stores, methods={"lvu": {}, "vilu": {"seeds": 1}}, seeds=2)
    slope = {("lvu", 0): 0.5, ("lvu", 1): -0.9, ("vilu", 0): 0.1}

    def value(cell: Cell) -> float:
        return 0.5 + slope[cell.method, cell.seed] * (accuracy[cell.data, cell.seed] - 0.5)

    cells = plan_cells(chosen)
    results = {
        cell: result(cell, (value(cell), 0.5), accuracy[cell.data, cell.seed]) for cell in cells
    }
    rigged = Board(chosen, cells, results, lambda cell: np.full((2, B), value(cell)))
    verdict = decide(rigged, claim(SteeperClaim, steeper="lvu", than="vilu", settings=("all",)))
    assert (verdict.ruling, verdict.number) == ("holds", pytest.approx(0.4))
    assert verdict.number_in_words.endswith("over 3 cases, on the seeds that both have (0)")
    apart = {cell: one for cell, one in results.items() if (cell.method, cell.seed) != ("lvu", 0)}
    strange = Board(chosen, list(apart), apart, rigged.entrants["lvu", "one", "all"].load_bootstrap)
    verdict = decide(strange, claim(SteeperClaim, steeper="lvu", than="vilu", settings=("all",)))
    assert (verdict.ruling, verdict.reason) == ("not tested", "the methods have no seed in common")


def test_a_claim_says_which_seeds_decide() -> None:
    """The claim must use seed 0, which both methods have.

    vilu has one seed, and lvu has two.
    """
    chosen = made(
        data={"one": {"stores": {"train": "a", "test": "b"}}},
        methods={"lvu": {}, "vilu": {"seeds": 1}},
        seeds=2,
    )
    cells = plan_cells(chosen)
    values = {("lvu", 0): 0.7, ("lvu", 1): 0.9, ("vilu", 0): 0.75}
    results = {
        cell: result(cell, (values[cell.method, cell.seed], 0.5))
        for cell in cells
        if cell.same_as is None
    }
    rigged = Board(
        chosen, cells, results, lambda cell: np.full((2, B), values[cell.method, cell.seed])
    )
    verdict = decide(rigged, better("vilu", "lvu"))
    assert (verdict.ruling, verdict.number) == ("holds", pytest.approx(0.05))
    assert verdict.number_in_words.endswith("one, on the seeds that both have (0)")
    notes = " ".join(table_sheet(rigged, view(metrics=("auroc",))).notes)
    assert (
        "1 for vilu; 2 for the others. Methods are compared on the seeds that both have."
        in notes.replace("2 for lvu; 1 for the others.", "1 for vilu; 2 for the others.")
    )


VIEWS = [
    {
        "kind": "table",
        "name": "numbers",
        "title": "Numbers",
        "columns": ["data", "setting", "metric"],
    },
    {"kind": "curve", "name": "lines", "title": "Lines", "x_label": "labels", "log": True},
    {"kind": "scatter", "name": "points", "title": "Points"},
    {
        "kind": "histograms",
        "name": "bars",
        "title": "Bars",
        "methods": ["lvu"],
        "settings": ["all"],
    },
    {"kind": "ranking", "name": "ranking", "title": "Ranking"},
]
GRID = {
    "kind": "grid",
    "parameters": ["learning_rate", "batch_size"],
    "select_on": "all",
    "report_on": "all",
}
CLAIMS = [
    {
        "kind": "better",
        "says": "learning helps",
        "source": "Table 1",
        "better": {"method": "lvu", "setting": "all"},
        "than": {"method": "mcm", "setting": "all"},
    }
]


def real(**changes: Any) -> Config:
    """Return a study that runs on small stores."""
    settings = {"few": {"kind": "labels", "budget": 8, "x": 8}, "all": {"kind": "labels", "x": 24}}
    study = {"title": "A small study", "reproduces": "Table 1", "protocol": "Tiny."}
    return config(
        **{
            "name": "small",
            "settings": settings,
            "views": VIEWS,
            "claims": CLAIMS,
            "study": study,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    run_studies(
        [real(), config(name="plain")], make_stores(tmp_path_factory.mktemp("stores")), output
    )
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_study_has_its_files(run: Path) -> None:
    found = set(files(run / "studies/small"))
    tables = {
        f"tables/{name}{suffix}"
        for name in ("numbers", "lines", "points", "bars")
        for suffix in (".md", ".tex", ".csv", ".txt")
    }
    figures = {
        f"figures/{name}{suffix}"
        for name in ("lines", "points", "bars")
        for suffix in (".png", ".svg")
    }
    assert found == tables | figures | {
        "README.md",
        "table.txt",
        "times.txt",
        "study.json",
        "results.json",
        "results.parquet",
    }
    page = (run / "studies/small/README.md").read_text()
    assert page.startswith("## A small study")
    assert "![Lines](figures/lines.svg)" in page
    assert re.search(r"\| learning helps \| \*\*\w+", page)


def test_studies_of_one_output_share_cells(run: Path) -> None:
    """Both studies have lvu on all labels.

    Its cells must be there once, and both studies must name them.
    """
    first, second = (
        json.loads((run / f"studies/{name}/study.json").read_text())["fingerprints"]
        for name in ("small", "plain")
    )
    shared = first.keys() & second.keys()
    assert {
        f"cells/{data}/all/lvu/seed-{seed}.json" for data in ("one", "two") for seed in (0, 1)
    } <= shared
    assert {path: first[path] for path in shared} == {path: second[path] for path in shared}


def test_a_moved_run_is_shown_again_without_its_data(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "archive"
    for part in ("cells", "studies"):
        shutil.copytree(run / part, moved / part)
    shutil.copy(run / "log.jsonl", moved)
    before = files(moved / "studies")
    for name in before:
        if not name.endswith("study.json"):
            (moved / "studies" / name).unlink()
    render_studies(moved)
    assert files(moved / "studies") == before
    assert "\none   all      mcm " in (moved / "studies/small/times.txt").read_text()
    (moved / "log.jsonl").unlink()
    (one, _) = load_studies(moved)
    # The times are lost with the log, and nothing else.
    assert times_table(one, load_times(moved, one.results)) == ""


def test_a_document_of_all_studies(run: Path, tmp_path: Path) -> None:
    document = tmp_path / "docs" / "results.md"
    document.parent.mkdir()
    render_studies(run, document, "What was found")
    text = document.read_text()
    assert text.startswith("# What was found\n")
    assert "## A small study" in text
    assert "## plain" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (document.parent / link).is_file()


def test_a_document_without_figures_has_no_folder(tmp_path: Path) -> None:
    run_studies([config(name="plain")], make_stores(tmp_path / "stores"), tmp_path / "run")
    document = tmp_path / "docs" / "results.md"
    document.parent.mkdir()
    render_studies(tmp_path / "run", document)
    assert list(document.parent.iterdir()) == [document]


def test_a_document_shows_a_written_part_first(run: Path, tmp_path: Path) -> None:
    document, first = tmp_path / "results.md", tmp_path / "first.txt"
    first.write_text("Read this.\n", encoding="utf-8")
    render_studies(run, document, intro="Then this.", preface_file=first, overwrite=False)
    assert document.read_text().startswith("# Results\n\nRead this.\n\nThen this.\n\n")
    first.write_text("Read that.\n", encoding="utf-8")
    with pytest.raises(UsageError, match="other inputs"):
        render_studies(run, document, intro="Then this.", preface_file=first, overwrite=False)
    first.write_bytes(b"\xff")
    with pytest.raises(DataError, match="must be Markdown in UTF-8"):
        render_studies(run, tmp_path / "another.md", preface_file=first)


def test_a_cell_that_was_made_anew(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "copy"))
    path = moved / "cells/one/all/lvu/seed-0.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "fingerprint": "0" * 32}))
    with pytest.raises(
        DataError, match=r"seed-0\.json is missing, damaged, or newer than the study"
    ):
        load_studies(moved)
    with pytest.raises(DataError, match=r"holds no study.*Make one: vilu benchmark"):
        load_studies(tmp_path)
    (tmp_path / "smoke/studies").mkdir(parents=True)
    with pytest.raises(DataError, match=r"The study of --smoke is in .*smoke"):
        load_studies(tmp_path)
    write_json(moved / "studies/plain/study.json", {})
    with pytest.raises(DataError, match="is not the document of a study"):
        load_studies(moved)


def test_studies_that_contradict_each_other(
    run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = make_stores(tmp_path_factory.mktemp("stores"))
    other = config(name="other", methods={"lvu": {"params": {"epochs": 3, "hidden": [8]}}})
    with pytest.raises(
        UsageError, match=r"small and other both have lvu on .*they differ in parameters"
    ):
        run_studies([real(), other], data, tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"kind": "curve", "x_label": "x", "metrics": ["ece"]}, "no metric with an interval"),
        ({"kind": "scatter", "metrics": ["auroc", "ece"]}, "no metric with an interval"),
        (GRID | {"metrics": ["ece"]}, "no metric with an interval"),
        ({"kind": "curve", "x_label": "x"}, "no setting has an x"),
        ({"kind": "ranking", "data": ["one"]}, "nothing to choose"),
    ],
)
def test_views_that_could_not_be_shown_are_refused_at_once(
    kind: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        made(views=[{"name": "v", "title": "v", **kind}])


def test_two_views_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two views are called v"):
        made(views=[{"kind": "table", "name": "v", "title": title} for title in "ab"])


@pytest.mark.parametrize("x", [(None, 2), (0, 2), (2, 2)])
def test_a_trend_needs_places(x: tuple[float | None, float]) -> None:
    sizes = {f"s{i}": {"kind": "labels", "x": at, "budget": i + 1} for i, at in enumerate(x)}
    with pytest.raises(UsageError, match="needs settings with different x above zero"):
        made(
            settings=sizes,
            claims=[claim(TrendClaim, method="mcm", settings=tuple(sizes), metric_goes="up")],
        )


def test_a_view_without_anything(tmp_path: Path) -> None:
    curve = {"kind": "curve", "name": "c", "title": "C", "x_label": "x"}
    nowhere = made(
        methods={"margin": {}}, settings={"all": {"kind": "labels", "x": 1}}, views=[curve]
    )
    with pytest.raises(DataError, match="nothing to show"):
        make_exhibit(board(nowhere), nowhere.views[0], tmp_path)


def test_a_grid_chooses_by_the_one_and_reports_the_other(tmp_path: Path) -> None:
    params = {
        f"g{lr}_{b}": {"method": "lvu", "params": {"learning_rate": lr, "batch_size": b}}
        for lr in (0.1, 0.01)
        for b in (8, 16)
    }
    params = {name.replace(".", "_"): entry for name, entry in params.items()}
    grid = {
        "kind": "grid",
        "name": "grid",
        "title": "Grid",
        "parameters": ["learning_rate", "batch_size"],
    }
    grid |= {"select_on": "held_out", "report_on": "test"}
    settings = {"held_out": {"kind": "labels", "x": 1}, "test": {"kind": "labels", "pool_size": 4}}
    chosen = made(
        methods=params,
        settings=settings,
        views=[grid],
        data={"one": {"stores": {"train": "a", "test": "b"}}},
    )
    cells = [cell for cell in plan_cells(chosen) if cell.same_as is None]
    values = {cell: (0.6 + 0.01 * i, 0.5) for i, cell in enumerate(cells)}
    best = max(
        (cell for cell in cells if cell.setting == "held_out"), key=lambda cell: values[cell]
    )
    results = {cell: result(cell, values[cell]) for cell in cells}
    rigged = Board(
        chosen, plan_cells(chosen), results, lambda cell: np.full((2, B), values[cell][0])
    )
    shown = make_exhibit(rigged, chosen.views[0], tmp_path)
    (row,) = [i for i, labels in enumerate(shown.body.rows) if labels[-1] == "chosen"]
    rate, batch = chosen.method_entries[best.method].params.values()
    assert shown.body.rows[row] == ("one", str(rate), str(batch), "chosen")
    assert shown.body.cells[row, 0].value == values[best][0]
    twin = next(cell for cell in cells if cell.method == best.method and cell.setting == "test")
    assert shown.body.cells[row, 2].value == values[twin][0]
    figure = shown.draw()
    assert len(figure.axes) == 2


def test_rendering_gives_what_is_printed(run: Path) -> None:
    (board_,) = [found for found in load_studies(run) if found.config.name == "small"]
    assert (run / "studies/small/table.txt").read_text() == render_study(board_, run).text + "\n"
