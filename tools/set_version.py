"""Set the version in all files, and begin the version's section in the changelog.

    python tools/set_version.py VERSION [--date YYYY-MM-DD]

Changes both pyproject.toml (and the pin for vilu-bench), the conda recipe, and CHANGELOG.md: the
unreleased section gets the version and the date. The changelog page only says what to change first.
The lists (Added, Changed, Fixed) move to docs/changes-VERSION.md. Commit the result, then tag the
commit.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNRELEASED = "## [Unreleased]\n"
LISTS = "### Added\n"


def set_version(root: Path, version: str, date: str) -> None:
    """Change every file. All files are read before the first file is written."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        sys.exit(f"a version is MAJOR.MINOR.PATCH. Got {version!r}.")
    new_texts = {}
    for name, pattern, replacement in (
        ("pyproject.toml", r'^version = ".*"$', f'version = "{version}"'),
        ("src/vilu_bench/pyproject.toml", r'^version = ".*"$', f'version = "{version}"'),
        ("deploy/conda/recipe.yaml", r'^  version: ".*"$', f'  version: "{version}"'),
    ):
        old_text = read_text(root / name)
        new_texts[root / name] = replace_once(root / name, old_text, pattern, replacement)
    bench = root / "src/vilu_bench/pyproject.toml"
    pin = f'"vilu[report]=={version}"'
    new_texts[bench] = replace_once(bench, new_texts[bench], r'"vilu\[report\]==.*?"', pin)
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    page, lists = divide_changelog(changelog, version, date)
    new_texts[root / "CHANGELOG.md"] = page
    new_texts[root / "docs" / f"changes-{version}.md"] = lists
    for path, text in new_texts.items():
        path.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a file's text."""
    return path.read_text(encoding="utf-8")


def replace_once(path: Path, text: str, pattern: str, replacement: str) -> str:
    """Replace the single match of a pattern in a file's text."""
    new_text, n = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if n != 1:
        sys.exit(f"{path} has {n} places like {pattern}, expected 1.")
    return new_text


def divide_changelog(changelog: str, version: str, date: str) -> tuple[str, str]:
    """Return the changelog with the new section, and the lists for a separate page."""
    before, _, rest = changelog.partition(UNRELEASED)
    section, following, older = rest.partition("\n## [")
    page, heading, lists = section.partition(LISTS)
    if not heading:
        sys.exit("CHANGELOG.md has no heading '### Added' in its unreleased section.")
    link = f"All changes: [docs/changes-{version}.md](docs/changes-{version}.md).\n"
    new_changelog = f"{before}{UNRELEASED}\n## [{version}] - {date}\n{page}{link}{following}{older}"
    # links in the lists start at the root, but the page is in a folder below the root
    moved_lists = re.sub(r"\]\(docs/", "](", lists)
    return (
        new_changelog,
        f"# All changes of {version}\n\n## Added\n{moved_lists.replace('### ', '## ')}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("version")
    now = datetime.datetime.now(datetime.UTC)
    today = now.date()
    parser.add_argument("--date", default=today.isoformat())
    options = parser.parse_args()
    set_version(ROOT, options.version, options.date)
