"""Studies as one function: everything that is missing is embedded and run, and everything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vilu.benchmark.config import Config
from vilu.benchmark.presentation import CurveView, GridView, HistogramView, ScatterView
from vilu.benchmark.run import Share, run_all
from vilu.report.style import require_matplotlib
from vilu.studies.archive import load_studies, save_study
from vilu.studies.render import Rendered, render, write_document

FIGURES = (CurveView, ScatterView, HistogramView, GridView)
"""Views that are drawn."""


def run_studies(
    configs: Sequence[Config],
    data: Path,
    output: Path,
    *,
    jobs: int = 1,
    models: Path | None = None,
    share: Share | None = None,
    embed_only: bool = False,
) -> list[Rendered]:
    """Run some benchmarks and write what they show; arguments and errors as ``vilu.benchmark.run.run_all``.

    Raises:
        MissingModelError: Also if there are figures to draw and no matplotlib, before anything runs.
    """
    if any(isinstance(view, FIGURES) for config in configs for view in config.views):
        require_matplotlib()
    boards = run_all(configs, data, output, jobs=jobs, models=models, share=share, embed_only=embed_only)
    for board in boards:
        save_study(board, output)
    return [render(board, output) for board in boards]


def render_studies(
    output: Path, document: Path | None = None, title: str = "Results", intro: str = ""
) -> list[Rendered]:
    """Write everything anew from the cells of a run folder, without data, embeddings or computation.

    Args:
        output: The run folder.
        document: A Markdown file for all studies together, its figures in a folder of its name beside it.
        title: Of the document.
        intro: Its first paragraph.

    Raises:
        DataError: If the folder holds no study, or cells are missing.
        StorageError: If the file system refuses.
    """
    studies = [render(board, output) for board in load_studies(output)]
    if document is not None:
        write_document(studies, document, title, intro)
    return studies
