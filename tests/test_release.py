"""Test that a package has the same bytes at every build, and that the changelog has its version."""

from __future__ import annotations

import gzip
import io
import re
import runpy
import shutil
import subprocess
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import vilu

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BENCH = tomllib.loads((ROOT / "src" / "vilu_bench" / "pyproject.toml").read_text())
VERSIONED = (
    "pyproject.toml",
    "src/vilu_bench/pyproject.toml",
    "deploy/conda/recipe.yaml",
    "CHANGELOG.md",
)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
REPACK = runpy.run_path(str(ROOT / "tools" / "repack.py"))["repack"]
FILES = {"p-1/PKG-INFO": b"Name: p\n", "p-1/run.sh": b"true\n", "p-1/src/p.py": b"x = 1\n"}


def package(names: list[str], when: int, who: str) -> bytes:
    made = io.BytesIO()
    with (
        gzip.GzipFile("any", "wb", fileobj=made, mtime=when) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname, member.uid = (
                len(FILES[name]),
                when,
                who,
                when % 1000,
            )
            member.mode = (0o755 if name.endswith(".sh") else 0o644) & (
                0o777 if when % 2 else 0o700
            )
            tar.addfile(member, io.BytesIO(FILES[name]))
    return made.getvalue()


def test_two_builds_are_the_same_bytes() -> None:
    first, second = (
        package(list(FILES), 1_700_000_001, "a"),
        package(list(FILES)[::-1], 1_700_000_100, "b"),
    )
    assert first != second
    assert REPACK(first, 5) == REPACK(second, 5)
    with tarfile.open(fileobj=io.BytesIO(REPACK(first, 5))) as tar:
        held = {
            member.name: (tar.extractfile(member).read(), member.mtime, member.mode)
            for member in tar
        }  # type: ignore[union-attr]
    assert held == {
        name: (FILES[name], 5, 0o755 if name.endswith(".sh") else 0o644) for name in FILES
    }


def test_both_packages_have_one_version_whose_changes_are_told() -> None:
    version = PROJECT["version"]
    assert vilu.__version__ == metadata.version("vilu") == version
    assert BENCH["project"]["version"] == version
    assert BENCH["project"]["dependencies"] == [f"vilu[report]=={version}"]
    told = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert told[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", told[1])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy the files that hold a version, and return their folder."""
    for name in VERSIONED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs").mkdir()
    changelog = tmp_path / "CHANGELOG.md"
    lists = "### Added\n\n- One.\n- Two.\n\n### Fixed\n\n- Three.\n"
    released = changelog.read_text().partition("\n## [0.1.0]")[2]
    changelog.write_text(f"## [Unreleased]\n\nA page.\n\n{lists}\n## [0.1.0]{released}")
    return tmp_path


def test_a_version_is_set_everywhere_at_once(checkout: Path) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "set_version.py"))
    tool["set_version"](checkout, "7.8.9", "2031-02-03")
    texts = {name: (checkout / name).read_text() for name in VERSIONED}
    assert tomllib.loads(texts["pyproject.toml"])["project"]["version"] == "7.8.9"
    bench = tomllib.loads(texts["src/vilu_bench/pyproject.toml"])["project"]
    assert (bench["version"], bench["dependencies"]) == ("7.8.9", ["vilu[report]==7.8.9"])
    assert yaml.safe_load(texts["deploy/conda/recipe.yaml"])["context"]["version"] == "7.8.9"
    headings = re.findall(r"^## (.*)$", texts["CHANGELOG.md"], flags=re.MULTILINE)
    assert headings[:2] == ["[Unreleased]", "[7.8.9] - 2031-02-03"]
    lists = (checkout / "docs" / "changes-7.8.9.md").read_text()
    assert re.findall(r"^- (.*)$", lists, re.MULTILINE) == ["One.", "Two.", "Three."]
    assert "A page." in texts["CHANGELOG.md"]
    assert "One." not in texts["CHANGELOG.md"]


def test_the_changelog_of_a_release_is_a_page() -> None:
    sections = (ROOT / "CHANGELOG.md").read_text().partition("## [0.1.0]")[0].split("\n## [")
    assert all(len(section.splitlines()) < 80 for section in sections[2:])


def test_the_recipe_for_conda_needs_what_the_packages_need() -> None:
    """The conda builder is not here, so this test compares the requirements."""
    recipe = yaml.safe_load((ROOT / "deploy" / "conda" / "recipe.yaml").read_text())
    assert recipe["context"]["version"] == PROJECT["version"]
    core, bench = recipe["outputs"]
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    needed = ["python >=3.11"]
    for requirement in PROJECT["dependencies"]:
        name, least = requirement.split(">=")
        needed.append(f"{names.get(name, name)} >={least}")
    assert core["requirements"]["run"] == needed
    report = [requirement.split(">=") for requirement in PROJECT["optional-dependencies"]["report"]]
    expected = [f"{names.get(name, name)} >={least}" for name, least in report]
    assert bench["requirements"]["run"] == ["python >=3.11", "vilu ==${{ version }}", *expected]
    assert [output["package"]["name"] for output in recipe["outputs"]] == ["vilu", "vilu-bench"]


def test_every_extra_is_tried_alone() -> None:
    extras = runpy.run_path(str(ROOT / "tools" / "extras.py"))
    assert (
        extras["EXTRAS"].keys() | extras["WITHOUT_COMMAND"]
        == PROJECT["optional-dependencies"].keys()
    )


def test_the_second_package_is_whole() -> None:
    """The package lies directly in its own folder, so its parts must be listed by hand."""
    folder = ROOT / "src" / "vilu_bench"
    folders = {path.parent for path in folder.rglob("__init__.py") if "build" not in path.parts}
    names = {".".join(path.relative_to(folder.parent).parts) for path in folders}
    settings = BENCH["tool"]["setuptools"]
    assert set(settings["packages"]) == names
    patterns = settings["package-data"]["vilu_bench"]
    data = {path for pattern in patterns for path in folder.glob(pattern)}
    beside = {folder / name for name in ("LICENSE", "README.md", "pyproject.toml")}
    listed = subprocess.run(
        ["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True
    )
    files = {folder / name for name in listed.stdout.split()}
    assert {path for path in files - beside if path.suffix != ".py"} == data
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_that_there_are(workflow: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    for job in jobs.values():
        assert job["timeout-minutes"]
        in_matrix = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in job["steps"]:
            name = re.fullmatch(r"(?:sudo )?make ([\w-]+)", step.get("run", ""))
            if name is not None:
                assert name[1] in targets
        assert set(in_matrix) <= targets
