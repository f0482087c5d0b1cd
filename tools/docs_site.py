"""Hooks for MkDocs (mkdocs.yml) that generate the site's pages without a file in docs/.

- The navigation comes from docs/index.md: the second-level headings, and the pages listed below
  each heading.
- Every command has a page with the command-line help, in the groups of ``vilu --help``.
- Every task (``TASKS``) has an API page. Together these pages have every public name
  (``vilu.__all__``).
- Every example has a page with the script, the printed output and the picture. The order is that of
  examples/README.md, and the table there becomes cards.
- A file outside docs/ becomes part of the site if a page links to the file (SECURITY.md,
  deploy/alerts.yml, ...). So the same link works in the repository and on the site.
- Every link in the built site is checked. A dead link within the site, or a resource loaded from
  elsewhere, is a warning, and therefore an error with ``--strict``.
"""

from __future__ import annotations

import html
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import vilu
from vilu.cli.app import app
from vilu.cli.help import with_range_in_words

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
GALLERY = "examples/README.md"
OUTSIDE_DOCS = "repository"
"""The site's folder for files outside docs/ and examples/."""
LOG = logging.getLogger("mkdocs.plugins.docs_site")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
"""The target of a relative link, without the anchor."""
REFERENCE = "Reference"
"""The navigation section with the pages for Python and for the command line at the end."""
TASKS = {
    "Begin": "Embeddings Selective ViLUPlus load",
    "Data": "EmbeddingStore open_source import_arrays open_dataset load_backbone embed "
    "ExtraColumns PairEmbeddings Pools PseudoCaptions TwoModels EmbeddingSource EmbeddingSpace "
    "Batch OUTSIDE",
    "Predictors": "MCM Doctor Entropy Margin MaxLogit ViLU LVU PREDICTORS FailurePredictor",
    "Score and evaluate": "score score_parts ScoreFolder Outcomes evaluate compare ResultTable",
    "Guarantees": "certify certify_clusters Rule Target calibrate_predictor Calibration estimate "
    "Estimate",
    "Deploy and monitor": "Guard Answer Monitor tune_process",
    "Tables of answers": "open_table AnswerTable",
    "Explain and report": "explain prompt_gains risk_map report_page",
    "Extend": "register convert_official",
}
"""API pages: a task that a reader has, and the public names for this task."""
NO_PAGE = {"__version__", "methods", "metrics"}
"""Public names without an entry on the pages of ``TASKS``. The two modules have separate pages."""
EXAMPLE = re.compile(r"^\| (?P<question>.*?) \| \[(?P<name>\w+)\.py\].*\n", re.MULTILINE)
"""A row of the table in examples/README.md."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Build the navigation."""
    navigation: list[Any] = [{"Home": "index.md"}]
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for title, pages in sections(index):
        generated_pages = [{"Python": list(api_pages())}, {"Command line": commands_by_group()}]
        navigation.append({title: [*pages, *generated_pages] if title == REFERENCE else pages})
    config.nav = navigation
    return config


def sections(index: str) -> Iterator[tuple[str, list[Any]]]:
    """Yield each second-level heading with the pages listed below the heading."""
    for part in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        listed = re.findall(r"^- .*?(?=^- |^$|\Z)", body, flags=re.MULTILINE | re.DOTALL)
        targets = [
            target for item in listed for target in LINK.findall(item) if target.endswith(".md")
        ]
        if targets:
            paths = [(DOCS / target).resolve() for target in targets]
            uris: list[Any] = [uri_of(path) for path in paths]
            if GALLERY in uris:
                place = uris.index(GALLERY)
                uris[place : place + 1] = [{"Examples": [GALLERY, *gallery_pages()]}]
            yield title, uris


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the linked files outside docs/."""
    generated_pages = command_pages() | api_pages() | example_pages()
    for uri, text in generated_pages.items():
        page_file = File.generated(config, uri, content=text)
        files.append(page_file)
    for path in EXAMPLES.glob("pictures/*"):
        uri = uri_of(path)
        picture_file = File.generated(config, uri, abs_src_path=str(path))
        files.append(picture_file)
    pages_to_read = [
        DOCS / page.src_uri
        for page in files.documentation_pages()
        if (DOCS / page.src_uri).exists()
    ]
    while pages_to_read:
        page = pages_to_read.pop()
        for path in linked_files(page):
            uri = uri_of(path)
            if files.get_file_from_path(uri) is None:
                linked_file = File.generated(config, uri, abs_src_path=str(path))
                files.append(linked_file)
                pages_to_read += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:  # noqa: ANN401 - what MkDocs adds
    """Rewrite a page's links for the site. Links within docs/ do not change."""
    source = source_of(page.file.src_uri)
    if page.file.src_uri == GALLERY:
        markdown = gallery_cards(markdown)

    def site_link(match: re.Match[str]) -> str:
        normal_path = os.path.normpath(source.parent / match[1])
        path = Path(normal_path)
        if not path.is_file():
            return match[1]
        uri = uri_of(path)
        folder = posixpath.dirname(page.file.src_uri)
        return posixpath.relpath(uri, folder)

    return LINK.sub(site_link, markdown)


class Links(HTMLParser):
    """Anchors, loaded resources and link targets in a built page."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.link_targets: list[str] = []
        self.loaded_resources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect an element's attributes."""
        for name, value in attrs:
            if name in {"id", "name"} and value:
                self.anchors.add(value)
            elif name in {"href", "src"} and value:
                (self.link_targets if tag == "a" else self.loaded_resources).append(value)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Warn about dead links in the site, and about resources from elsewhere."""
    site, base_url = Path(config.site_dir), "http://here/"
    pages = {path.relative_to(site).as_posix(): Links() for path in sorted(site.rglob("*.html"))}
    for place, page in pages.items():
        html_text = (site / place).read_text(encoding="utf-8")
        page.feed(html_text)
    for place, page in pages.items():
        for link in [*page.link_targets, *page.loaded_resources]:
            full_link = urljoin(f"{base_url}{place}", link)
            url, anchor = urldefrag(full_link)
            if not url.startswith(base_url):
                if link in page.loaded_resources:
                    LOG.warning("%s loads %s", place, link)
                continue
            quoted_target = url.removeprefix(base_url)
            target = unquote(quoted_target)
            target += "index.html" if target.endswith("/") or not target else ""
            if not (site / target).is_file() or (
                anchor and unquote(anchor) not in pages[target].anchors
            ):
                LOG.warning("%s links to %s, which is not there", place, link)


def linked_files(page: Path) -> Iterator[Path]:
    """Yield the repository files linked from a page."""
    markdown = page.read_text(encoding="utf-8")
    for target in LINK.findall(markdown):
        normal_path = os.path.normpath(page.parent / target)
        path = Path(normal_path)
        if path.is_file() and path.is_relative_to(ROOT):
            yield path


def uri_of(path: Path) -> str:
    """Return the place of a repository file in the site's sources."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(DOCS):
        place = path.relative_to(DOCS)
        return place.as_posix()
    inside = path.relative_to(ROOT)
    if path.is_relative_to(EXAMPLES):
        is_script = path.suffix == ".py" and path.parent == EXAMPLES
        page = inside.with_suffix(".md") if is_script else inside
        return page.as_posix()
    return (OUTSIDE_DOCS / inside).as_posix()


def source_of(uri: str) -> Path:
    """Return the repository file for a place in the site's sources. Inverse of ``uri_of``."""
    parts = PurePosixPath(uri).parts
    if parts[0] == EXAMPLES.name:
        return ROOT / uri
    return ROOT.joinpath(*parts[1:]) if parts[0] == OUTSIDE_DOCS else DOCS / uri


def gallery_pages() -> list[str]:
    """Return pages below the examples page: the scripts, and further pages linked from there."""
    return [
        *example_pages(),
        *(uri_of(path) for path in linked_files(ROOT / GALLERY) if path.suffix == ".md"),
    ]


def example_pages() -> dict[str, str]:
    """Return the pages for the examples and for the example data, by place."""
    gallery = (ROOT / GALLERY).read_text(encoding="utf-8")
    listed = [row["name"] for row in EXAMPLE.finditer(gallery)]
    return {f"examples/{name}.md": example_page(name) for name in [*listed, "example_data"]}


def example_page(name: str) -> str:
    """Build an example's page: the docstring, the picture, the printed output and the script."""
    script = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    _, docstring, code = script.split('"""', 2)
    title, _, docstring_body = docstring.partition("\n")
    output = EXAMPLES / "output" / f"{name}.txt"
    words = name.replace("_", " ")
    parts = [
        f"---\ntitle: {words.capitalize()}\n---\n\n# {title}",
        docstring_body.strip(),
    ]
    if picture_path := picture_of(name):
        parts.append(f"![What {name}.py draws]({picture_path})")
    if output.exists():
        printed_text = output.read_text(encoding="utf-8")
        parts += ["It prints:", f"```text\n{printed_text.rstrip()}\n```"]
    parts += [f"## examples/{name}.py", f"```python\n{code.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def picture_of(name: str) -> str | None:
    """Return the path of an example's picture, relative to the page, or None without a picture."""
    return next((f"pictures/{path.name}" for path in EXAMPLES.glob(f"pictures/{name}.*")), None)


def gallery_cards(markdown: str) -> str:
    """Return the examples page with a card in place of every table row."""
    card_texts = []
    for row in EXAMPLE.finditer(markdown):
        name, picture_path = row["name"], picture_of(row["name"])
        printed_text = (EXAMPLES / "output" / f"{name}.txt").read_text(encoding="utf-8")
        text_without_end = printed_text.rstrip()
        last_line = text_without_end.rpartition("\n")[2]
        card_body = (
            f"[![]({picture_path})]({name}.md)"
            if picture_path
            else f"*{escape_markdown(last_line)}*"
        )
        card = f"**[{row['question']}]({name}.md)**\n\n{card_body}"
        indented_card = card.replace("\n", "\n    ")
        card_texts.append("-   " + indented_card)
    grid = "\n\n".join(['<div class="grid cards" markdown>', *card_texts, "</div>", ""])
    without_rows = EXAMPLE.sub("", markdown)
    return re.sub(r"^\| question .*\n\|[-|]+\n", lambda _: grid, without_rows, flags=re.MULTILINE)


def command_pages() -> dict[str, str]:
    """Return the application's command pages, by place."""
    application = typer.main.get_command(app)
    return {place_of_command(names): text for names, text in command_texts(application, ("vilu",))}


def place_of_command(names: tuple[str, ...]) -> str:
    """Return the place of a command's page."""
    return f"commands/{'-'.join(names[1:])}.md"


def commands_by_group() -> list[dict[str, list[str]]]:
    """Return command pages by group, as in ``vilu --help``."""
    application: Any = typer.main.get_command(app)
    groups: dict[str, list[str]] = {}
    for names, _ in command_texts(application, ("vilu",)):
        panel = application.commands[names[1]].rich_help_panel
        groups.setdefault(panel or "Others", []).append(place_of_command(names))
    return [{group: places} for group, places in groups.items()]


def command_texts(
    command: Any,  # noqa: ANN401 - typer gives its commands no public type
    names: tuple[str, ...],
    parent_context: Any = None,  # noqa: ANN401
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield a command's names and page. For a group, yield those for every command inside."""
    context = typer.Context(
        command, info_name=names[-1], parent=parent_context, **command.context_settings
    )
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from command_texts(inner, (*names, name), context)
        return
    entries_of_kind: dict[str, list[str]] = {"argument": [], "option": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None:
            continue
        name, help_text = record
        if parameter.param_type_name == "argument":
            name = parameter.metavar
        entry = f"`{name}`\n:   {escape_markdown(with_range_in_words(help_text))}\n"
        entries_of_kind[parameter.param_type_name].append(entry)
    usage = command.get_usage(context).replace("Usage: ", "")
    text = [f"# {' '.join(names)}", escape_markdown(command.help or ""), f"```\n{usage}\n```"]
    for kind, entries in entries_of_kind.items():
        text += [f"## {kind.title()}s", *entries] if entries else []
    if command.epilog:
        text.append(escape_markdown(command.epilog))
    yield names, "\n\n".join(text) + "\n"


def escape_markdown(text: str) -> str:
    """Escape text for Markdown, except for `code`."""
    parts = re.split(r"(`[^`]+`)", text)
    escaped = [
        part if i % 2 else re.sub(r"([\\*_\[\]|#])", r"\\\1", html.escape(part))
        for i, part in enumerate(parts)
    ]
    return "".join(escaped)


def api_pages() -> dict[str, str]:
    """Return task pages by place, then metrics, scikit-learn, and methods not in ``vilu``."""
    listed = [name for names in TASKS.values() for name in names.split()]
    if sorted(listed) != sorted(set(vilu.__all__) - NO_PAGE):
        unmatched_names = sorted(set(listed) ^ (set(vilu.__all__) - NO_PAGE))
        raise ValueError(
            f"TASKS must list every public name of vilu once. Look at: {unmatched_names}."
        )
    pages = {}
    for task, names in TASKS.items():
        file_name = task.lower().replace(" ", "-")
        place = f"python/{file_name}.md"
        names_of_task = names.split()
        pages[place] = api_page(task, names_of_task)
    metrics = [f"metrics.{name}" for name in vilu.metrics.__all__]
    pages["python/metrics.md"] = api_page("Metrics", metrics)
    pages["python/sklearn.md"] = api_page("scikit-learn", ["sklearn.SelectiveClassifier"])
    return {**pages, "python/methods.md": methods_page()}


def api_page(title: str, names: list[str]) -> str:
    """Build an API page with directives for mkdocstrings."""
    return "\n\n".join([f"# {title}", *(f"::: vilu.{name}" for name in names)]) + "\n"


def methods_page() -> str:
    """Build the page for predictors without a public name in ``vilu``."""
    parts = [
        "# More methods",
        "These have no name in `vilu` but one in `vilu.PREDICTORS` (and `vilu fit --method`).",
    ]
    for name, method in vilu.PREDICTORS.items():
        if method.__name__ not in vilu.__all__:
            path = f"{method.__module__}.{method.__qualname__}"
            parts.append(
                f"::: {path}\n    options:\n      heading: {name}\n      toc_label: {name}"
            )
    return "\n\n".join(parts) + "\n"
