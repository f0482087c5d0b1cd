"""Writes a study's tables, figures and pages from the finished cells."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vilu.artifacts.disk import LOG_FILE, convert_os_errors, make_folder, write_bytes, write_text
from vilu.artifacts.documents import SCHEMA_VERSION, first_error, read_json, write_json
from vilu.artifacts.paths import claim_file, claim_folder, inputs_digest, kind_and_inputs, text_mark
from vilu.errors import DataError
from vilu.report.style import require_matplotlib, save_figure
from vilu.text import escape_markdown, markdown_rows
from vilu_bench.studies.board import Board
from vilu_bench.studies.cells import Cell, cells_to_run, plan_cells
from vilu_bench.studies.claims import Verdict, decide
from vilu_bench.studies.config import Config
from vilu_bench.studies.exhibits import Exhibit, make_exhibit
from vilu_bench.studies.facts import code_hash_of
from vilu_bench.studies.load import parse_config
from vilu_bench.studies.parts import Section
from vilu_bench.studies.ranking import summarise, times_table
from vilu_bench.studies.result import (
    RUN_AGAIN,
    SCORES,
    CellResult,
    load_bootstrap,
    load_result,
    load_times,
)
from vilu_bench.studies.run import CellShare, run_all
from vilu_bench.studies.sheet import Sheet, to_csv, to_latex, to_markdown, to_text
from vilu_bench.studies.submit import add_submissions
from vilu_bench.studies.views import (
    CurveView,
    GridView,
    HistogramView,
    RankingView,
    ScatterView,
    Study,
)

logger = logging.getLogger("vilu.bench")

DOCUMENT = "study.json"  # name of the file that describes a study
STUDIES = "studies"  # folder with all studies, in a run folder


class Archive(Section):
    """Content of ``study.json``."""

    schema_version: Literal[2] = SCHEMA_VERSION
    kind: str = "study"
    vilu: str  # the vilu version that wrote the file
    config: dict[str, Any]  # the benchmark, with every method named
    fingerprints: dict[str, str]  # result fingerprints, by path of the run cell


def archive_of(config: Config, results: Mapping[Cell, CellResult]) -> Archive:
    """Make the document for a study with these results."""
    full_config = config.with_every_method_named()
    return Archive(
        vilu=importlib.metadata.version("vilu"),
        config=full_config.model_dump(mode="json"),
        fingerprints={cell.path.as_posix(): result.fingerprint for cell, result in results.items()},
    )


def save_study(board: Board, output: Path) -> Path:
    """Write ``study.json`` and return the study's folder."""
    archive = archive_of(board.config, board.results)
    folder = make_folder(output / STUDIES / board.config.name)
    write_json(folder / DOCUMENT, archive.model_dump(mode="json"))
    return folder


def load_studies(output: Path) -> list[Board]:
    """Load the studies in a run folder, sorted by name."""
    documents = sorted((output / STUDIES).glob(f"*/{DOCUMENT}"))
    if not documents:
        hint = "Make one: vilu benchmark CONFIG.toml."
        smoke = output / "smoke"
        if (smoke / STUDIES).is_dir():
            hint = f"The study of --smoke is in {smoke}."
        raise DataError(f"{output} holds no study (no {STUDIES}/NAME/{DOCUMENT}). {hint}")
    return [_load_study(path, output) for path in documents]


def _load_study(path: Path, output: Path) -> Board:
    """Read a study from the document and the cells."""
    try:
        document = read_json(path, RUN_AGAIN)
        archive = Archive.model_validate(document)
    except ValidationError as error:
        fault = first_error(error)
        raise DataError(f"{path} is not the document of a study: {fault}. {RUN_AGAIN}.") from error
    config: Config = parse_config(archive.config, str(path))
    cells = plan_cells(config)
    results = {}
    for cell in cells_to_run(cells):
        result = _archived_result(archive, cell, output)
        if result is None:
            raise DataError(
                f"{output / cell.path} is missing, damaged, "
                f"or newer than the study {path.parent.name}. {RUN_AGAIN}."
            )
        results[cell] = result
    n_older = 0
    for cell, result in results.items():
        if result.decided_by.get("code") != code_hash_of(config, cell):
            n_older += 1
    if n_older:
        n_results = len(results)
        logger.info("%s: %d of %d results are of older code", config.name, n_older, n_results)
    load_cached_bootstrap = cache(partial(load_bootstrap, output))
    return Board(config, cells, results, load_cached_bootstrap)


def _archived_result(archive: Archive, cell: Cell, output: Path) -> CellResult | None:
    """Load a cell's archived result, or return None if the result is missing."""
    fingerprint = archive.fingerprints.get(cell.path.as_posix())
    if fingerprint is None:
        return None
    return load_result(output, cell, fingerprint)


RULING_TEXTS = {
    "holds": ("**holds**", "**Holds**"),
    "does not hold": ("**does not hold**", "**Does not hold**"),
    "open": ("**open**: zero is in the interval", "**Open**, since zero is in the interval"),
    "not tested": ("**not tested**", "**Not tested**"),
}
"""Maps each ruling to two Markdown texts: the first for a table, the second for a heading."""


def study_page(
    config: Config,
    exhibits: Sequence[Exhibit],
    verdicts: Sequence[Verdict],
    figure_path: Callable[[str], str],
) -> str:
    """Write a study as Markdown, with headings from level two.

    ``figure_path`` maps a view's name to the figure's path.
    """
    study = config.study
    parts = [f"## {study.title if study else config.name}"]
    if study is not None:
        parts += _about_paragraph(study)
    verdicts_of_speaker = {
        "the paper": paper_verdicts(verdicts),
        "this project": our_verdicts(verdicts),
    }
    for speaker, verdicts_on_claims in verdicts_of_speaker.items():
        if verdicts_on_claims:
            parts.append(f"What {speaker} says, and what is found here:")
            parts.append(claims_table(config, verdicts_on_claims))
    for exhibit in exhibits:
        if exhibit.draw is not None:
            title = escape_markdown(exhibit.title)
            path = figure_path(exhibit.name)
            parts.append(f"![{title}]({path})")
        parts.append(_body_in_markdown(exhibit))
    return "\n\n".join(parts) + "\n"


def _about_paragraph(study: Study) -> list[str]:
    """Write a paragraph on the reproduced publication and the study's protocol.

    If the study states neither, the list is empty.
    """
    sentences = []
    if study.reproduces:
        sentences.append(f"Reproduces: {study.reproduces}.")
    if study.protocol:
        sentences.append(study.protocol)
    if not sentences:
        return []
    return [" ".join(sentences).strip()]


def _body_in_markdown(exhibit: Exhibit) -> str:
    if isinstance(exhibit.body, str):
        return f"```\n{exhibit.body}\n```"
    return to_markdown(exhibit.body).rstrip()


def paper_verdicts(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Keep the verdicts on claims by publications."""
    return [verdict for verdict in verdicts if not verdict.claim.is_ours]


def our_verdicts(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Keep the verdicts on claims by this project."""
    return [verdict for verdict in verdicts if verdict.claim.is_ours]


def claims_in_markdown(verdicts: Iterable[Sequence[Verdict]]) -> str:
    """List the claims of several studies in Markdown: the paper's claims, then our claims."""
    all_verdicts = list(itertools.chain.from_iterable(verdicts))
    sections = []
    for heading, section_verdicts in (
        ("## The paper's claims here", paper_verdicts(all_verdicts)),
        ("## Ours", our_verdicts(all_verdicts)),
    ):
        if section_verdicts:
            sections.append(_claims_section(heading, section_verdicts))
    return "\n".join(sections)


def _claims_section(heading: str, verdicts: Iterable[Verdict]) -> str:
    """Write a heading, followed by a Markdown list of claims, grouped by ruling."""
    lines_by_ruling: dict[str, list[str]] = {ruling: [] for ruling in RULING_TEXTS}
    for verdict in verdicts:
        claim_text = escape_markdown(verdict.claim.says)
        source = "" if verdict.claim.is_ours else f" ({escape_markdown(verdict.claim.source)})"
        lines_by_ruling[verdict.ruling].append(f"- {claim_text}{source}")
    parts = [heading]
    for ruling, (_, text_in_heading) in RULING_TEXTS.items():
        lines = lines_by_ruling[ruling]
        if lines:
            parts.append("\n".join([f"{text_in_heading} ({len(lines)}):", "", *lines]))
    return "\n\n".join([*parts, ""])


def claims_table(config: Config, verdicts: Sequence[Verdict]) -> str:
    """Make a Markdown table of claims, with rulings and deciding numbers."""
    lines = []
    for verdict in verdicts:
        claim_text = escape_markdown(verdict.claim.says)
        ruling, _ = RULING_TEXTS[verdict.ruling]
        source = escape_markdown(verdict.claim.source)
        number = _deciding_number(verdict)
        lines.append([claim_text, ruling, number, source])
    table = markdown_rows(["claim", "here", "by", "source"], lines)
    note = (
        f"Brackets: {100 * config.confidence:g} % bootstrap interval; "
        "a positive number speaks for the claim."
    )
    return "\n".join([*table, "", f"<sub>{note}</sub>"])


def _deciding_number(verdict: Verdict) -> str:
    """Write the number that decides a claim, with its interval, or why there is no number."""
    interval = verdict.interval
    if verdict.number is None or interval is None:
        return str(verdict.reason)
    return (
        f"{escape_markdown(verdict.number_in_words)}: {100 * verdict.number:+.1f} "
        f"[{100 * interval.ci_low:+.1f}, {100 * interval.ci_high:+.1f}] points"
    )


TABLE_WRITERS = {".md": to_markdown, ".tex": to_latex, ".csv": to_csv, ".txt": to_text}
FIGURE_SUFFIXES = (".svg", ".png")
"""Formats for a figure, in saving order.

If the PNG was saved first, the layout of the SVG would change. In this order, both files have the
same bytes as if each was saved from a new drawing.
"""


@dataclass(frozen=True)
class Rendered:
    """A study's tables, figures and verdicts."""

    board: Board
    exhibits: tuple[Exhibit, ...]
    verdicts: tuple[Verdict, ...]  # verdicts on the study's claims
    text: str  # exhibits and claims, for a terminal
    times: str  # wall times, for a terminal, not in ``text``, because times differ between runs


def render_study(board: Board, output: Path) -> Rendered:
    """Write all tables, figures and pages for a study, below ``output/studies/NAME``.

    - ``tables/VIEW.{md,tex,csv,txt}`` and ``figures/VIEW.{png,svg}``: each view
    - ``README.md``: the page
    - ``table.txt``: the printed text
    - ``results.json`` and ``results.parquet``: every number, and the configuration
    - ``times.txt``: wall times, which no other file contains
    """
    config = board.config
    folder = output / STUDIES / config.name
    views = config.views or (DEFAULT_VIEW,)
    exhibits = tuple(make_exhibit(board, view, output) for view in views)
    verdicts = tuple(decide(board, claim) for claim in config.claims)
    text = _terminal_text(exhibits, verdicts)
    time_of_cell = load_times(output, board.results)
    times = times_table(board, time_of_cell)
    _write_results(board, folder)
    for exhibit in exhibits:
        _write_exhibit(exhibit, folder)
    write_text(folder / "table.txt", text + "\n")
    if times:
        write_text(folder / "times.txt", times + "\n")
    figure_path = "figures/{}.svg".format  # maps a view's name to the figure's path
    page = study_page(config, exhibits, verdicts, figure_path)
    write_text(folder / "README.md", page)
    return Rendered(board, exhibits, verdicts, text, times)


def _terminal_text(exhibits: Iterable[Exhibit], verdicts: Sequence[Verdict]) -> str:
    """Write exhibits and claims as text for a terminal."""
    parts = []
    for exhibit in exhibits:
        parts.append(exhibit.body if isinstance(exhibit.body, str) else to_text(exhibit.body))
    if verdicts:
        lines = ["claims:"]
        for verdict in verdicts:
            ruling = verdict.ruling.upper()
            lines.append(f"{ruling}: {verdict.claim.says} ({verdict.number_in_words})")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write_document(
    studies: Sequence[Rendered],
    output: Path,
    document: Path,
    title: str,
    intro: str,
    inputs: str = "",
) -> None:
    """Write several studies below ``output`` as one Markdown file.

    The figures are copied to the folder with the file's name, without suffix. Without figures
    there is no folder.
    """
    figures = document.with_suffix("")
    parts = [f"# {title}", ""]
    if intro:
        parts += [intro, ""]
    claims = claims_in_markdown([study.verdicts for study in studies])
    parts.append(claims)
    for study in studies:
        _copy_figures(study, output, figures)
        name = study.board.config.name
        # maps a view's name to the figure's path
        figure_path = f"{figures.name}/{name}-{{}}.svg".format
        page = study_page(study.board.config, study.exhibits, study.verdicts, figure_path)
        parts.append(page)
    text = "\n".join(parts) + "\n" + text_mark("study", inputs)
    write_text(document, text)


def _copy_figures(study: Rendered, output: Path, folder: Path) -> None:
    """Copy a study's figures to ``folder``, as ``STUDY-VIEW.svg``."""
    name = study.board.config.name
    for exhibit in study.exhibits:
        if exhibit.draw is not None:
            figure_file = output / STUDIES / name / "figures" / f"{exhibit.name}.svg"
            make_folder(folder)
            write_bytes(folder / f"{name}-{figure_file.name}", figure_file.read_bytes())


def _write_results(board: Board, folder: Path) -> None:
    summary = summarise(board)
    full_config = board.config.with_every_method_named()
    content = {"kind": "benchmark", "config": full_config.model_dump(mode="json")}
    write_json(folder / "results.json", {**content, **summary.to_dict()})
    summary.results.write(folder / "results.parquet")


def _write_exhibit(exhibit: Exhibit, folder: Path) -> None:
    """Write a view's tables and figures."""
    if isinstance(exhibit.body, Sheet):
        tables = make_folder(folder / "tables")
        for suffix, write_table in TABLE_WRITERS.items():
            table = write_table(exhibit.body)
            write_text(tables / f"{exhibit.name}{suffix}", table)
    if exhibit.draw is not None:
        figures = make_folder(folder / "figures")
        drawing = exhibit.draw()
        for suffix in FIGURE_SUFFIXES:
            save_figure(drawing, figures / f"{exhibit.name}{suffix}")


DEFAULT_VIEW = RankingView(kind="ranking", name="ranking", title="Every method, best first")
"""View for a study without views in the configuration."""

VIEWS_WITH_FIGURE = (CurveView, ScatterView, HistogramView, GridView)


def run_studies(
    configs: Sequence[Config],
    data: Path,
    output: Path,
    *,
    jobs: int = 1,
    models: Path | None = None,
    share: CellShare | None = None,
    embed_only: bool = False,
) -> list[Rendered]:
    """Run some benchmarks, and write the tables and figures.

    The arguments and the errors are the same as for ``run_all``.
    """
    _claim_folders(configs, output)
    views = itertools.chain.from_iterable(config.views for config in configs)
    if any(isinstance(view, VIEWS_WITH_FIGURE) for view in views):
        require_matplotlib()
    boards = run_all(
        configs, data, output, jobs=jobs, models=models, share=share, embed_only=embed_only
    )
    for board in boards:
        save_study(board, output)
    return [render_study(board, output) for board in boards]


def _claim_folders(configs: Iterable[Config], output: Path) -> None:
    """Refuse an output folder or a study's folder with files that vilu did not write."""
    is_begun = (output / "stores").is_dir() or (output / "cells").is_dir()
    if not is_begun:
        claim_folder(
            output,
            "benchmark",
            is_part_of_result=lambda path: path.name in {"smoke", LOG_FILE},
            overwrite=True,
        )
    for config in configs:
        folder = output / STUDIES / config.name
        # without a study's document, every file in the folder is treated as foreign
        has_document = (folder / DOCUMENT).is_file()
        claim_folder(
            folder, "study", is_part_of_result=lambda _: False, has_same_inputs=has_document
        )


def render_studies(
    output: Path,
    document: Path | None = None,
    title: str = "Results",
    intro: str = "",
    *,
    preface_file: Path | None = None,
    submissions_folder: Path | None = None,
    overwrite: bool = True,
) -> list[Rendered]:
    """Write all tables and figures again from the cells in a run folder.

    Neither data nor embeddings are needed.

    Args:
        output: The run folder.
        document: Markdown file to write for all studies together. The figures are written to the
            folder with the same name, without suffix.
        title: Heading of the document.
        intro: First paragraph of the document.
        preface_file: Markdown file in UTF-8, shown between the heading and ``intro``.
        submissions_folder: Folder with submitted cells, to show beside the run folder's cells.
        overwrite: Whether to replace an existing document.
    """
    boards = load_studies(output)
    submitted_files: list[Path] = []
    if submissions_folder is not None:
        submitted_files = sorted(submissions_folder.rglob(f"*{SCORES}"))
        boards = add_submissions(boards, output, submitted_files)
    if document is None:
        return [render_study(board, output) for board in boards]
    if preface_file is not None:
        intro = f"{_read_markdown(preface_file)}\n\n{intro}".strip()
    sources = [output / STUDIES / board.config.name / DOCUMENT for board in boards]
    inputs = inputs_digest(*sources, *submitted_files, title=title, intro=intro)
    is_document_of_vilu = kind_and_inputs(document) is not None
    is_document_current = claim_file(document, "study", inputs, overwrite=overwrite)
    figures = document.with_suffix("")
    # if vilu did not write the document, every file in the figure folder is treated as foreign
    claim_folder(
        figures, "document's figures", lambda _: False, has_same_inputs=is_document_of_vilu
    )
    studies = [render_study(board, output) for board in boards]
    if is_document_current:
        logger.info("%s holds these studies already: there is nothing to do", document)
    else:
        write_document(studies, output, document, title, intro, inputs)
    return studies


def _read_markdown(path: Path) -> str:
    """Read Markdown from a user's file.

    Raises:
        DataError: If the file is not UTF-8.
        StorageError: If the file cannot be read.
    """
    with convert_os_errors(f"cannot read {path}"):
        content = path.read_bytes()
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be Markdown in UTF-8: {error}. Save it as UTF-8.") from error
