"""Test finished studies in one small file, and the documents made from that file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.builders.bench_fakes import config, make_stores
from vilu.artifacts.tables import parquet_bytes, read_table
from vilu.errors import DataError, UsageError
from vilu_bench.studies.keep import (
    RESAMPLES,
    ROUNDING_STEP,
    keep_studies,
    render_kept_file,
    restore_run,
)
from vilu_bench.studies.result import load_bootstrap
from vilu_bench.studies.study import load_studies, render_studies, run_studies

TABLE = {
    "kind": "table",
    "name": "numbers",
    "title": "Numbers",
    "columns": ["data", "setting", "metric"],
}
CURVE = {"kind": "curve", "name": "lines", "title": "Lines", "x_label": "labels"}
CLAIMS = [
    {
        "kind": "better",
        "says": f"{name} is better",
        "source": source,
        "better": {"method": name, "setting": "all"},
        "than": {"method": "mcm", "setting": "all"},
        "data": ["one"],
    }
    for name, source in (("lvu", "Table 1"), ("knn_distance", "this project"))
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    settings = {"few": {"kind": "labels", "budget": 8, "x": 8}, "all": {"kind": "labels", "x": 24}}
    study = config(
        name="small",
        settings=settings,
        views=[TABLE, CURVE],
        claims=CLAIMS,
        resamples=RESAMPLES + 50,
    )
    run_studies([study], make_stores(tmp_path_factory.mktemp("stores")), output)
    return output


@pytest.fixture(scope="module")
def file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "kept.parquet"
    keep_studies(run, path)
    return path


def test_bootstrap_values_are_kept_to_a_hundredth_of_a_point(
    run: Path, file: Path, tmp_path: Path
) -> None:
    restore_run(file, tmp_path)
    (before,) = load_studies(run)
    (after,) = load_studies(tmp_path)
    assert after.config.resamples == RESAMPLES
    assert before.results.keys() == after.results.keys()
    for cell, result in before.results.items():
        assert after.results[cell].results == result.results
        if result.refused is None:
            draws = load_bootstrap(run, cell)[:, :RESAMPLES]
            np.testing.assert_allclose(
                load_bootstrap(tmp_path, cell), draws, atol=ROUNDING_STEP / 2 + 1e-9
            )


def test_a_document_is_made_of_the_file_alone(run: Path, file: Path, tmp_path: Path) -> None:
    whole, short = tmp_path / "whole.md", tmp_path / "short.md"
    render_studies(run, whole, "Results")
    render_kept_file(file, short, "Results")
    assert {path.name for path in tmp_path.iterdir()} == {"whole.md", "whole", "short.md", "short"}
    rows = [
        [
            re.sub("<sub>.*?</sub>|≈", "", line)
            for line in page.read_text().splitlines()
            if "|" in line
        ]
        for page in (whole, short)
    ]
    assert len(rows[0]) > 10
    numbers = [[row for row in page if "points" not in row] for page in rows]
    assert numbers[0] == numbers[1]  # intervals and their decisions may differ
    assert f"{RESAMPLES} resamples" in short.read_text()


def test_the_same_file_gives_the_same_document(file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.md", tmp_path / "second.md"
    render_kept_file(file, first)
    render_kept_file(file, second)
    assert first.read_text().replace("first/", "second/") == second.read_text()
    render_kept_file(file, first, overwrite=False)  # nothing to do


def test_claims_of_this_project_have_a_list_of_their_own(file: Path, tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    render_kept_file(file, document)
    paper, ours = document.read_text().split("\n## small")[0].split("## Ours\n")
    assert "- lvu is better (Table 1)" in paper
    assert "knn" not in paper
    assert "- knn\\_distance is better\n" in ours
    assert "What this project says, and what is found here:" in document.read_text()


def test_what_is_no_file_of_kept_studies(run: Path, file: Path, tmp_path: Path) -> None:
    results = run / "studies" / "small" / "results.parquet"
    with pytest.raises(DataError, match="is not a file of kept studies"):
        restore_run(results, tmp_path / "run")
    with pytest.raises(UsageError, match=r"\.parquet"):
        keep_studies(run, tmp_path / "kept.json")
    with pytest.raises(UsageError, match="--overwrite"):
        keep_studies(run, file)


def test_a_file_writes_into_its_folder_alone(file: Path, tmp_path: Path) -> None:
    table, metadata = read_table(file, ["document"])
    outside = tmp_path / "outside"
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    for name in (str(outside), "../../outside"):
        studies = {name: next(iter(metadata["studies"].values()))}
        forged = tmp_path / "forged.parquet"
        forged.write_bytes(parquet_bytes(columns, {"kind": "kept studies", "studies": studies}))
        with pytest.raises(DataError, match="is damaged"):
            restore_run(forged, tmp_path / "run" / "folder")
        assert not outside.exists()
        assert not (tmp_path / "run" / "outside").exists()


def test_studies_of_few_and_of_many_resamples_are_kept(tmp_path: Path) -> None:
    settings = {"all": {"kind": "labels"}}
    studies = [
        config(name=f"of-{n}", settings=settings, methods={name: {}}, views=[TABLE], resamples=n)
        for name, n in (("mcm", 20), ("margin", 30))
    ]
    run_studies(studies, make_stores(tmp_path / "stores"), tmp_path / "run")
    keep_studies(tmp_path / "run", tmp_path / "kept.parquet")
    restore_run(tmp_path / "kept.parquet", tmp_path / "again")
    for board in load_studies(tmp_path / "run"):
        for cell in board.results:
            before = load_bootstrap(tmp_path / "run", cell)
            after = load_bootstrap(tmp_path / "again", cell)
            np.testing.assert_allclose(after, before, atol=ROUNDING_STEP / 2 + 1e-9)


def test_a_changed_bit_is_noticed_or_changes_nothing(file: Path, tmp_path: Path) -> None:
    """Some bytes in a Parquet file's footer are never read, so damage there may go unnoticed."""
    restore_run(file, tmp_path / "whole")
    content = file.read_bytes()
    damaged = tmp_path / "damaged.parquet"
    n_noticed = 0
    for number, position in enumerate(np.linspace(0, len(content) - 1, 30, dtype=int)):
        changed = bytearray(content)
        changed[position] ^= 1
        damaged.write_bytes(bytes(changed))
        folder = tmp_path / str(number)
        try:
            restore_run(damaged, folder)
        except DataError:
            n_noticed += 1
        else:
            assert contents(folder) == contents(tmp_path / "whole"), position
    assert n_noticed >= 15  # data and documents are more than half the file


def contents(folder: Path) -> dict[str, bytes]:
    """Return a folder's files by their paths in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_study_with_a_histogram_is_refused(tmp_path: Path) -> None:
    bars = {"kind": "histograms", "name": "bars", "title": "Bars", "settings": ["all"]}
    study = config(
        name="bars", views=[bars], methods={"mcm": {}}, settings={"all": {"kind": "labels"}}
    )
    run_studies([study], make_stores(tmp_path / "stores"), tmp_path / "run")
    with pytest.raises(UsageError, match="has a histogram of the scores of rows"):
        keep_studies(tmp_path / "run", tmp_path / "kept.parquet")
