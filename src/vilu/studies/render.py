"""Studies as files: tables in four formats, figures in two, the verdicts on claims, and a page that shows it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vilu.benchmark.board import Board
from vilu.benchmark.config import Config
from vilu.benchmark.presentation import AnyView, RankingView
from vilu.benchmark.summary import summarise
from vilu.files import atomic_write, make_folder, write_json
from vilu.report.style import save
from vilu.studies.archive import STUDIES
from vilu.studies.claims import Verdict, decide
from vilu.studies.exhibits import Exhibit, exhibit
from vilu.studies.formats import to_csv, to_latex, to_markdown, to_text
from vilu.studies.page import all_claims, page
from vilu.studies.sheet import Sheet

FORMATS = {".md": to_markdown, ".tex": to_latex, ".csv": to_csv, ".txt": to_text}
FIGURES = (".png", ".svg")


@dataclass(frozen=True)
class Rendered:
    """What a study looks like.

    Attributes:
        board: Its results.
        exhibits: Tables and figures.
        verdicts: On its claims.
        text: For a terminal.
    """

    board: Board
    exhibits: tuple[Exhibit, ...]
    verdicts: tuple[Verdict, ...]
    text: str


def render(board: Board, output: Path) -> Rendered:
    """Write everything that a study shows, below ``output/studies/NAME``.

    Files: ``tables/VIEW.{md,tex,csv,txt}``, ``figures/VIEW.{png,svg}``, ``README.md`` (the page), ``table.txt`` (what
    is printed), ``results.json`` and ``results.parquet`` (every number and the configuration).

    Raises:
        UsageError: If a view does not fit the results.
        MissingModelError: If there are figures and matplotlib is not installed.
        StorageError: If the file system refuses.
    """
    config, folder = board.config, output / STUDIES / board.config.name
    exhibits = tuple(exhibit(board, view, output) for view in views_of(config))
    verdicts = tuple(decide(board, claim) for claim in config.claims)
    text = "\n\n".join([*(_in_text(one) for one in exhibits), *_in_words(verdicts)])
    done = Rendered(board, exhibits, verdicts, text)
    _write_results(board, folder)
    for one in exhibits:
        _write_exhibit(one, folder)
    _write(folder / "table.txt", text + "\n")
    _write(folder / "README.md", page(config, exhibits, verdicts, lambda name: f"figures/{name}.svg"))
    return done


def write_document(studies: Sequence[Rendered], document: Path, title: str, intro: str) -> None:
    """One Markdown file of several studies, its figures in a folder of its name beside it.

    Raises:
        StorageError: If the file system refuses.
    """
    figures = make_folder(document.with_suffix(""))
    parts = [f"# {title}", "", *([intro, ""] if intro else []), all_claims([study.verdicts for study in studies])]
    for study in studies:
        name = study.board.config.name
        for one in study.exhibits:
            if one.draw is not None:
                save(one.draw(), figures / f"{name}-{one.name}.svg")
        parts.append(page(study.board.config, study.exhibits, study.verdicts, f"{figures.name}/{name}-{{}}.svg".format))
    _write(document, "\n".join(parts))


def views_of(config: Config) -> tuple[AnyView, ...]:
    """The views of a study; a ranking where it names none."""
    return config.views or (RankingView(kind="ranking", name="ranking", title="Every method, best first"),)


def _in_text(one: Exhibit) -> str:
    return one.body if isinstance(one.body, str) else to_text(one.body)


def _in_words(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [f"{verdict.ruling.upper()}: {verdict.claim.says} ({verdict.what})" for verdict in verdicts]
    return ["\n".join(["claims:", *lines])] if lines else []


def _write_results(board: Board, folder: Path) -> None:
    summary = summarise(board)
    config = board.config.complete().model_dump(mode="json")
    content = {"schema_version": 1, "kind": "benchmark", "config": config}
    write_json(folder / "results.json", {**content, **summary.to_dict()})
    summary.results.save(folder / "results.parquet")


def _write_exhibit(one: Exhibit, folder: Path) -> None:
    if isinstance(one.body, Sheet):
        tables = make_folder(folder / "tables")
        for suffix, written in FORMATS.items():
            _write(tables / f"{one.name}{suffix}", written(one.body))
    if one.draw is not None:
        figures = make_folder(folder / "figures")
        for suffix in FIGURES:
            save(one.draw(), figures / f"{one.name}{suffix}")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as handle:
        handle.write(text.encode())
