"""Keeps finished studies in one small file, with all data for their tables, figures and claims.

The file is a Parquet table with a row for every run cell. The row has the cell's document and the
bootstrap values, as whole multiples of ``ROUNDING_STEP``. The file has no scores of single rows,
and only the first ``RESAMPLES`` resamples. The studies' documents are in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from vilu.artifacts.disk import atomic_write, file_hash, make_folder, write_bytes
from vilu.artifacts.documents import first_error, write_json
from vilu.artifacts.paths import claim_file
from vilu.artifacts.tables import parquet_bytes, read_table
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats
from vilu_bench.studies.config import Config
from vilu_bench.studies.parts import Name
from vilu_bench.studies.result import BOOTSTRAP, RUN_AGAIN, CellResult, load_bootstrap
from vilu_bench.studies.study import (
    DOCUMENT,
    STUDIES,
    Archive,
    Rendered,
    archive_of,
    load_studies,
    render_studies,
)
from vilu_bench.studies.views import HistogramView

if TYPE_CHECKING:
    import pyarrow as pa

RESAMPLES: Final = 200
"""Number of resamples that are kept for each cell.

A 95 % interval goes from about the sixth smallest to about the sixth largest of 200 values.
"""

ROUNDING_STEP: Final = 1e-4
"""Bootstrap values are rounded to multiples of this step.

The step is a hundredth of a percentage point. Tables show tenths of a point.
"""

UNDEFINED_MULTIPLE: Final = 65_535
"""The whole number that stands for an undefined bootstrap value."""

Multiples = NDArray[np.uint16]
"""Bootstrap values as multiples of ``ROUNDING_STEP``, or ``UNDEFINED_MULTIPLE``."""

STUDY_NAME: Final = TypeAdapter[str](Name)
"""Checks a study's name."""


def keep_studies(run: Path, file: Path, *, overwrite: bool = False) -> int:
    """Write a run folder's finished studies as one file, and return the number of cells.

    Raises:
        UsageError: If a study shows the scores of single rows. Such scores are not kept.
    """
    claim_file(file, "kept studies", overwrite=overwrite)
    archives = {}
    results: dict[Path, CellResult] = {}
    for board in load_studies(run):
        name = board.config.name
        _refuse_histograms(board.config)
        n_resamples = min(board.config.resamples, RESAMPLES)
        config = board.config.model_copy(update={"resamples": n_resamples})
        archive = archive_of(config, board.results)
        # the fingerprints are in the documents of the cells, so they are not stored twice
        archive_without_cells = archive.model_copy(update={"fingerprints": {}})
        archives[name] = archive_without_cells.model_dump(mode="json")
        for cell, result in board.results.items():
            results[cell.path] = result
    sorted_results = [results[path] for path in sorted(results)]
    columns = _columns(run, sorted_results)
    metadata = {"kind": "kept studies", "studies": archives}
    content = parquet_bytes(columns, metadata, compression="zstd")
    write_bytes(file, content)
    return len(sorted_results)


def _refuse_histograms(config: Config) -> None:
    """Refuse a study that shows the scores of single rows."""
    if any(isinstance(view, HistogramView) for view in config.views):
        raise UsageError(
            f"the study {config.name} has a histogram of the scores of rows, which are not kept. "
            "Keep the studies without it: run them in a folder of their own."
        )


def _columns(run: Path, results: Sequence[CellResult]) -> dict[str, pa.Array]:
    """Make the file's columns: documents, two counts, and a column per metric and resample."""
    import pyarrow as pa

    values_of_cells = [_first_resamples(run, result) for result in results]
    largest_shape = np.max([values.shape for values in values_of_cells], axis=0)
    multiples = np.full((len(results), *largest_shape), UNDEFINED_MULTIPLE, dtype=np.uint16)
    for row, values in enumerate(values_of_cells):
        n_metrics, n_resamples = values.shape
        multiples[row, :n_metrics, :n_resamples] = _to_multiples(values)
    # A cell's resamples differ little. So the first resample is stored, and for every later
    # resample the difference from the first resample. Differences compress better. A negative
    # difference wraps around in 16 bits. The addition in ``_stored_multiples`` undoes the wrap.
    multiples[:, :, 1:] -= multiples[:, :, :1]
    columns = {
        "document": pa.array([_short_document(result) for result in results]),
        "n_metrics": pa.array([len(values) for values in values_of_cells]),
        "n_resamples": pa.array([values.shape[1] for values in values_of_cells]),
    }
    for metric, resample in np.ndindex(*largest_shape):
        columns[f"draw_{metric}_{resample}"] = pa.array(multiples[:, metric, resample])
    return columns


def _first_resamples(run: Path, result: CellResult) -> Floats:
    """Load a cell's bootstrap values (M, B). If the cell was refused, the shape is (0, 0)."""
    if BOOTSTRAP not in result.files:
        return np.empty((0, 0))
    return load_bootstrap(run, result.cell)[:, :RESAMPLES]


def _short_document(result: CellResult) -> str:
    """Write a cell's document as JSON text, with fewer facts in ``decided_by``.

    Only the hash of the code is stored. Rendering compares this hash with the present code.
    """
    code = {"code": result.decided_by.get("code")}
    short = result.model_copy(update={"decided_by": code, "files": {}})
    document = short.model_dump(mode="json")
    return json.dumps(document, separators=(",", ":"))


def _to_multiples(values: Floats) -> Multiples:
    defined_values = np.nan_to_num(values)  # NaN is no whole number, and is replaced below
    multiples = np.rint(defined_values / ROUNDING_STEP).astype(np.uint16)
    multiples[np.isnan(values)] = UNDEFINED_MULTIPLE
    return multiples


def _to_values(multiples: Multiples) -> Floats:
    values: Floats = multiples.astype(np.float64) * ROUNDING_STEP
    values[multiples == UNDEFINED_MULTIPLE] = np.nan
    return values


def render_kept_file(
    file: Path,
    document: Path | None = None,
    title: str = "Results",
    intro: str = "",
    *,
    preface_file: Path | None = None,
    overwrite: bool = True,
) -> list[Rendered]:
    """Render the studies in a file that ``keep_studies`` wrote.

    Only the document and the document's figures are written. The further arguments are as in
    ``render_studies``.
    """
    with TemporaryDirectory() as folder:
        run = Path(folder)
        restore_run(file, run)
        return render_studies(
            run, document, title, intro, preface_file=preface_file, overwrite=overwrite
        )


def restore_run(file: Path, run: Path) -> None:
    """Write a run folder from a file by ``keep_studies``, without the scores of single rows.

    Raises:
        DataError: If the file is damaged, or if ``keep_studies`` did not write the file.
    """
    table, metadata = read_table(file, ["document"])
    studies = metadata.get("studies")
    if metadata.get("kind") != "kept studies" or not isinstance(studies, dict):
        raise DataError(
            f"{file} is not a file of kept studies. Give the output folder of `vilu benchmark`, or "
            "a file of `vilu render RUN --keep FILE`."
        )
    try:
        documents = table["document"].to_pylist()
        results = [CellResult.model_validate_json(text) for text in documents]
        fingerprints = {result.cell.path.as_posix(): result.fingerprint for result in results}
        for name, content in studies.items():
            archive = Archive.model_validate(content)
            STUDY_NAME.validate_python(name)  # the study's name becomes a folder name
            folder = make_folder(run / STUDIES / name)
            complete_archive = archive.model_copy(update={"fingerprints": fingerprints})
            write_json(folder / DOCUMENT, complete_archive.model_dump(mode="json"))
        multiples = _stored_multiples(table)
        n_metrics = table["n_metrics"].to_pylist()
        n_resamples = table["n_resamples"].to_pylist()
        for row, result in enumerate(results):
            own_multiples = multiples[row, : n_metrics[row], : n_resamples[row]]  # without padding
            _restore_cell(result, own_multiples, run)
    except ValidationError as error:
        damage = first_error(error)
        raise DataError(f"{file} is damaged: {damage}. {RUN_AGAIN}.") from error
    except KeyError as error:  # a column is missing
        raise DataError(f"{file} is damaged: it has no column {error}. {RUN_AGAIN}.") from error


def _stored_multiples(table: pa.Table) -> Multiples:
    """Read a table's bootstrap values (cells, M, B) as multiples of the step."""
    metrics = set()
    resamples = set()
    for name in table.column_names:
        if name.startswith("draw_"):  # the name is draw_METRIC_RESAMPLE, with two indices
            _, metric, resample = name.split("_")
            metrics.add(int(metric))
            resamples.add(int(resample))
    multiples = np.empty((len(table), len(metrics), len(resamples)), dtype=np.uint16)
    for metric_index, resample_index in np.ndindex(len(metrics), len(resamples)):
        column = table[f"draw_{metric_index}_{resample_index}"]
        multiples[:, metric_index, resample_index] = column.to_numpy()
    # later resamples are stored as differences from the first
    multiples[:, :, 1:] += multiples[:, :, :1]
    return multiples


def _restore_cell(result: CellResult, multiples: Multiples, run: Path) -> None:
    """Write a cell's files: the document, and bootstrap values from ``multiples`` (M, B)."""
    path = run / result.cell.path
    make_folder(path.parent)
    files = {}
    if result.refused is None:
        bootstrap_file = path.with_suffix(BOOTSTRAP)
        with atomic_write(bootstrap_file) as handle:
            values = _to_values(multiples)
            np.save(handle, values, allow_pickle=False)
        files[BOOTSTRAP] = file_hash(bootstrap_file)
    complete_result = result.model_copy(update={"files": files})
    write_json(path, complete_result.model_dump(mode="json"))
