"""Test that the links, commands, options and names in the documents exist."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import vilu
from tests.command import run
from vilu.cli.app import app
from vilu.report.style import DARK_RULE
from vilu_bench.studies.dry_run import describe_plans, plan_study
from vilu_bench.studies.load import load_configs

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text()
SHOWN = "\n".join(page.read_text() for page in PAGES)
COMMANDS = sorted(set(re.findall(r"^vilu ([a-z-]+)", SHOWN, re.MULTILINE)))
CITED = re.compile(r"tests/(\w+/)?test_\w+\.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_index_lists_every_page() -> None:
    """The site's navigation is read from the index."""
    docs = ROOT / "docs"
    listed = set(re.findall(r"\]\(([^)]+)\)", (docs / "index.md").read_text()))
    assert {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")} - listed == {
        "index.md"
    }


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.splitlines()) <= 110
    assert len(README.split()) <= 750


def test_the_readme_shows_commands() -> None:
    assert {"embed", "fit", "score", "evaluate"} <= set(
        re.findall(r"^vilu (\w+)", README, re.MULTILINE)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_options_that_are_shown_exist(command: str) -> None:
    shown = run(command, "--help").stdout
    for line in re.findall(rf"^vilu {command} [^#\n]*", SHOWN, re.MULTILINE):
        for option in re.findall(r"\s(--?[a-z][a-z-]*)", line):
            assert re.search(rf"(^|\s|,){option}\b", shown), (
                f"{option} is not an option of vilu {command}"
            )


def options(group: object, above: str = "vilu") -> Iterator[tuple[str, str]]:
    """Yield each command's name and a pattern for the names of each option."""
    for name, command in getattr(group, "commands", {}).items():
        yield from options(command, f"{above} {name}")
        for parameter in command.params:
            if parameter.param_type_name == "option":
                yield f"{above} {name}", "|".join(map(re.escape, parameter.opts))


def test_every_option_is_needed_by_a_page_or_an_example() -> None:
    others = [*ROOT.glob("examples/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    text = SHOWN + "\n".join(file.read_text(encoding="utf-8") for file in others)
    without = [
        f"{command} {option}"
        for command, option in options(typer.main.get_command(app))
        if not re.search(rf"(?<![\w-])(?:{option})(?![\w-])", text)
    ]
    assert without == []


def test_names_in_the_readme_exist() -> None:
    for name in set(re.findall(r"\bvilu\.([A-Za-z_]+)\(", README)):
        assert hasattr(vilu, name), name


def test_python_in_the_readme_parses() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


@pytest.mark.parametrize(
    "drawing", [*ROOT.glob("docs/**/*.svg"), *ROOT.glob("examples/**/*.svg")], ids=lambda p: p.name
)
def test_drawings_have_a_dark_form(drawing: Path) -> None:
    assert drawing.read_text(encoding="utf-8").count(DARK_RULE) == 1


def test_the_example_of_the_concepts_gives_the_numbers_of_its_text() -> None:
    ran = doctest.testfile(str(ROOT / "docs" / "concepts.md"), module_relative=False)
    assert ran.attempted >= 6
    assert ran.failed == 0


def test_the_bytes_of_the_paper_are_what_a_dry_run_says_today(tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "output"
    today = describe_plans([plan_study(config, data, output) for config in load_configs(["paper"])])
    (told,) = re.findall(r"^together: (.* GiB);", today, re.MULTILINE)
    assert told in (ROOT / "docs" / "dry-run.md").read_text(encoding="utf-8")


def test_every_promise_of_reliability_names_a_file_of_tests() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) > 70
    for row in rows:
        assert "`::" not in row, f"a test is cited by its name: {row}"
        cited = re.findall(r"`(tests/[^`]+)`", row)
        assert len(cited) == len(set(cited)), f"a file is cited twice: {row}"
        for file in cited:
            assert CITED.fullmatch(file), f"{file} is not cited as tests/ROOM/test_NAME.py"
            assert (ROOT / file).is_file(), file
    numbered = [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert numbered == list(range(1, 39)), "the rows of what was found are 1 to 38"


def source_text() -> str:
    """Return the code of both packages, with strings over several lines joined."""
    files = sorted((ROOT / "src").rglob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r'^## "(.*)"$', page, re.MULTILINE)
    assert len(messages) > 10
    code = source_text()
    assert [message for message in messages if message not in code] == []
