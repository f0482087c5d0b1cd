"""From finished cells to the tables, figures and pages of a study."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vilu.artifacts.disk import LOG, make_folder, write_bytes, write_text
from vilu.artifacts.documents import SCHEMA_VERSION, explain, read_json, write_json
from vilu.artifacts.paths import claim_file, claim_folder, inputs_of, made, mark
from vilu.errors import DataError
from vilu.report.style import require_matplotlib, save
from vilu.text import in_markdown, markdown_rows
from vilu_bench.studies.board import Board
from vilu_bench.studies.cells import own_results, plan
from vilu_bench.studies.claims import Verdict, decide
from vilu_bench.studies.config import Config
from vilu_bench.studies.exhibits import Exhibit, exhibit
from vilu_bench.studies.facts import code_of
from vilu_bench.studies.load import parse_config
from vilu_bench.studies.parts import Section
from vilu_bench.studies.ranking import summarise, times_table
from vilu_bench.studies.result import AGAIN, SCORES, load_bootstrap, load_result, load_times
from vilu_bench.studies.run import Share, run_all
from vilu_bench.studies.sheet import Sheet, to_csv, to_latex, to_markdown, to_text
from vilu_bench.studies.submit import take_in
from vilu_bench.studies.views import CurveView, GridView, HistogramView, RankingView, ScatterView

logger = logging.getLogger(__name__)

DOCUMENT = "study.json"
STUDIES = "studies"


class Archive(Section):
    """The document."""

    schema_version: Literal[2] = SCHEMA_VERSION
    kind: str = "study"
    vilu: str  # version that wrote it
    config: dict[str, Any]  # the benchmark, with every method named
    fingerprints: dict[str, str]  # of every cell that is run, by its path


def save_study(board: Board, output: Path) -> Path:
    """Write ``study.json``; returns its folder."""
    config = board.config
    archive = Archive(
        vilu=importlib.metadata.version("vilu"),
        config=config.complete().model_dump(mode="json"),
        fingerprints={
            cell.path.as_posix(): result.fingerprint for cell, result in board.results.items()
        },
    )
    folder = make_folder(output / STUDIES / config.name)
    write_json(folder / DOCUMENT, archive.model_dump(mode="json"))
    return folder


def load_studies(output: Path) -> list[Board]:
    """The studies of a run folder, by name."""
    found = sorted((output / STUDIES).glob(f"*/{DOCUMENT}"))
    if not found:
        raise DataError(
            f"{output} holds no study (no {STUDIES}/NAME/{DOCUMENT}). Make one: vilu benchmark CONFIG.toml."
        )
    return [_load(path, output) for path in found]


def _load(path: Path, output: Path) -> Board:
    try:
        archive = Archive.model_validate(read_json(path, AGAIN))
    except ValidationError as error:
        raise DataError(
            f"{path} is not the document of a study: {explain(error)}. {AGAIN}."
        ) from error
    config: Config = parse_config(archive.config, str(path))
    cells = plan(config)
    results = {}
    for cell in own_results(cells):
        fingerprint = archive.fingerprints.get(cell.path.as_posix())
        result = None if fingerprint is None else load_result(output, cell, fingerprint)
        if result is None:
            raise DataError(
                f"{output / cell.path} is missing, damaged, or newer than the study {path.parent.name}. {AGAIN}."
            )
        results[cell] = result
    older = sum(
        result.decided_by.get("code") != code_of(config, cell) for cell, result in results.items()
    )
    if older:
        logger.info("%s: %d of %d results are of older code", config.name, older, len(results))
    return Board(config, cells, results, cache(lambda cell: load_bootstrap(output, cell)))


RULINGS = {
    "holds": ("**holds**", "**Holds**"),
    "does not hold": ("**does not hold**", "**Does not hold**"),
    "open": ("**open**: zero is in the interval", "**Open**, since zero is in the interval"),
    "not tested": ("**not tested**", "**Not tested**"),
}
"""In a table, and as a heading."""


def page(
    config: Config,
    exhibits: Sequence[Exhibit],
    verdicts: Sequence[Verdict],
    figure: Callable[[str], str],
) -> str:
    """Markdown of a study, to stand below a heading of level one."""
    study = config.study
    parts = [f"## {study.title if study else config.name}"]
    if study is not None and (study.reproduces or study.protocol):
        reproduces = f"Reproduces: {study.reproduces}." if study.reproduces else ""
        parts.append(f"{reproduces} {study.protocol}".strip())
    if verdicts:
        parts += ["What the paper says, and what is found here:", claims_table(config, verdicts)]
    for one in exhibits:
        if one.draw is not None:
            parts.append(f"![{in_markdown(one.title)}]({figure(one.name)})")
        parts.append(
            f"```\n{one.body}\n```" if isinstance(one.body, str) else to_markdown(one.body).rstrip()
        )
    return "\n\n".join(parts) + "\n"


def all_claims(verdicts: Iterable[Sequence[Verdict]]) -> str:
    """Every claim of several studies under what became of it."""
    found: dict[str, list[Verdict]] = {ruling: [] for ruling in RULINGS}
    for verdict in (one for several in verdicts for one in several):
        found[verdict.ruling].append(verdict)
    parts = []
    for ruling, (_, heading) in RULINGS.items():
        lines = [
            f"- {in_markdown(one.claim.says)} ({in_markdown(one.claim.source)})"
            for one in found[ruling]
        ]
        if lines:
            parts.append("\n".join([f"{heading} ({len(lines)}):", "", *lines]))
    return "\n\n".join(["## The paper's claims here", *parts, ""]) if parts else ""


def claims_table(config: Config, verdicts: Sequence[Verdict]) -> str:
    """Claims with what decides them, as Markdown."""
    lines = []
    for verdict in verdicts:
        ends = verdict.interval
        number = str(verdict.reason)
        if verdict.number is not None and ends is not None:
            number = (
                f"{in_markdown(verdict.what)}: {100 * verdict.number:+.1f} [{100 * ends.ci_low:+.1f}, "
                f"{100 * ends.ci_high:+.1f}] points"
            )
        lines.append(
            [
                in_markdown(verdict.claim.says),
                RULINGS[verdict.ruling][0],
                number,
                in_markdown(verdict.claim.source),
            ]
        )
    note = f"Brackets: {100 * config.confidence:g} % bootstrap interval; a positive number speaks for the claim."
    table = markdown_rows(["claim", "here", "by", "source"], lines)
    return "\n".join([*table, "", f"<sub>{note}</sub>"])


FORMATS = {".md": to_markdown, ".tex": to_latex, ".csv": to_csv, ".txt": to_text}
FIGURE_SUFFIXES = (".svg", ".png")
"""In this order one drawing gives the bytes that two would: a PNG before moves the layout of an SVG."""


@dataclass(frozen=True)
class Rendered:
    """What a study looks like."""

    board: Board
    exhibits: tuple[Exhibit, ...]
    verdicts: tuple[Verdict, ...]  # on its claims
    text: str  # for a terminal
    times: str  # the same, of wall times, which differ from run to run


def render(board: Board, output: Path) -> Rendered:
    """Write everything that a study shows, below ``output/studies/NAME``.

    Files: ``tables/VIEW.{md,tex,csv,txt}``, ``figures/VIEW.{png,svg}``, ``README.md`` (the page),
    ``table.txt`` (what is printed), ``results.json`` and ``results.parquet`` (every number and the
    configuration), and ``times.txt``, alone with what a clock decides.
    """
    config, folder = board.config, output / STUDIES / board.config.name
    exhibits = tuple(exhibit(board, view, output) for view in config.views or [DEFAULT])
    verdicts = tuple(decide(board, claim) for claim in config.claims)
    text = "\n\n".join(
        [
            *(one.body if isinstance(one.body, str) else to_text(one.body) for one in exhibits),
            *_in_words(verdicts),
        ]
    )
    done = Rendered(
        board, exhibits, verdicts, text, times_table(board, load_times(output, board.results))
    )
    _write_results(board, folder)
    for one in exhibits:
        _write_exhibit(one, folder)
    write_text(folder / "table.txt", text + "\n")
    if done.times:
        write_text(folder / "times.txt", done.times + "\n")
    write_text(
        folder / "README.md", page(config, exhibits, verdicts, lambda name: f"figures/{name}.svg")
    )
    return done


def write_document(
    studies: Sequence[Rendered],
    output: Path,
    document: Path,
    title: str,
    intro: str,
    inputs: str = "",
) -> None:
    """One Markdown file of several studies below ``output``, their figures in a folder of its name beside it."""
    figures = make_folder(document.with_suffix(""))
    parts = [
        f"# {title}",
        "",
        *([intro, ""] if intro else []),
        all_claims([study.verdicts for study in studies]),
    ]
    for study in studies:
        name = study.board.config.name
        for one in study.exhibits:
            if one.draw is not None:
                drawn = output / STUDIES / name / "figures" / f"{one.name}.svg"
                write_bytes(figures / f"{name}-{drawn.name}", drawn.read_bytes())
        parts.append(
            page(
                study.board.config,
                study.exhibits,
                study.verdicts,
                f"{figures.name}/{name}-{{}}.svg".format,
            )
        )
    write_text(document, "\n".join(parts) + "\n" + mark("study", inputs))


def _in_words(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [
        f"{verdict.ruling.upper()}: {verdict.claim.says} ({verdict.what})" for verdict in verdicts
    ]
    return ["\n".join(["claims:", *lines])] if lines else []


def _write_results(board: Board, folder: Path) -> None:
    summary = summarise(board)
    config = board.config.complete().model_dump(mode="json")
    content = {"kind": "benchmark", "config": config}
    write_json(folder / "results.json", {**content, **summary.to_dict()})
    summary.results.write(folder / "results.parquet")


def _write_exhibit(one: Exhibit, folder: Path) -> None:
    if isinstance(one.body, Sheet):
        tables = make_folder(folder / "tables")
        for suffix, written in FORMATS.items():
            write_text(tables / f"{one.name}{suffix}", written(one.body))
    if one.draw is not None:
        figures = make_folder(folder / "figures")
        drawn = one.draw()
        for suffix in FIGURE_SUFFIXES:
            save(drawn, figures / f"{one.name}{suffix}")


DEFAULT = RankingView(kind="ranking", name="ranking", title="Every method, best first")
"""View of a study that names none."""

DRAWN = (CurveView, ScatterView, HistogramView, GridView)  # views that are drawn


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
    """Run some benchmarks and write what they show; arguments and errors as ``vilu_bench.studies.run.run_all``."""
    begun = any((output / name).is_dir() for name in ("stores", "cells"))
    if not begun:
        claim_folder(output, "benchmark", lambda path: path.name in {"smoke", LOG}, overwrite=True)
    for config in configs:
        folder = output / STUDIES / config.name
        claim_folder(folder, "study", lambda _: False, same=(folder / DOCUMENT).is_file())
    if any(isinstance(view, DRAWN) for config in configs for view in config.views):
        require_matplotlib()
    boards = run_all(
        configs, data, output, jobs=jobs, models=models, share=share, embed_only=embed_only
    )
    for board in boards:
        save_study(board, output)
    return [render(board, output) for board in boards]


def render_studies(
    output: Path,
    document: Path | None = None,
    title: str = "Results",
    intro: str = "",
    *,
    submitted: Path | None = None,
    overwrite: bool = True,
) -> list[Rendered]:
    """Write everything anew from the cells of a run folder, without data, embeddings or computation.

    A ``document`` is a Markdown file for all studies together, its figures in a folder of its name
    beside it. ``submitted`` is a folder of cells that others ran, to show beside those of the run
    folder.
    """
    files = [] if submitted is None else sorted(submitted.rglob(f"*{SCORES}"))
    boards, inputs, there = load_studies(output), "", False
    if submitted is not None:
        boards = take_in(boards, output, files)
    if document is not None:
        said = [*(output / STUDIES / board.config.name / DOCUMENT for board in boards), *files]
        inputs = inputs_of(*said, title=title, intro=intro)
        ours = made(document) is not None
        there = claim_file(document, "study", inputs, overwrite=overwrite)
        claim_folder(document.with_suffix(""), "document's figures", lambda _: False, same=ours)
    studies = [render(board, output) for board in boards]
    if there:
        logger.info("%s holds these studies already: there is nothing to do", document)
    elif document is not None:
        write_document(studies, output, document, title, intro, inputs)
    return studies
