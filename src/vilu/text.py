"""Text for people: aligned, Markdown and LaTeX tables, and what stands in their cells."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence

NOTHING = "-"  # what stands where there is no number
WIDEST = 120  # signs of a cell of an aligned table
_MARKDOWN = str.maketrans({"\\": r"\\", "|": r"\|", "<": "&lt;", "_": r"\_", "*": r"\*"})
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash ",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde ",
        "^": r"\textasciicircum ",
        "≈": r"$\approx$",
        "≥": r"$\geq$",
        "→": r"$\rightarrow$",
        "×": r"$\times$",
        "…": r"\ldots ",
        "±": r"$\pm$",
    }
)
"""Signs that mean something in LaTeX, or nothing."""


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose cells (as ``shown``) are padded to their column; numbers count as words."""
    cells = [[shown(cell) for cell in line] for line in lines]
    widths: list[int] = []
    for column in zip(*cells, strict=True):
        widths.append(max(map(len, column)))
    padded: list[str] = []
    for line in cells:
        padded.append("  ".join(map(str.ljust, line, widths)).rstrip())
    return padded


def markdown_rows(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, of cells that are Markdown already."""
    rows = [_markdown_row(heading), "|---" * len(heading) + "|"]
    for line in lines:
        rows.append(_markdown_row(line))
    return rows


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def latex_rows(lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a LaTeX table, of cells that are LaTeX already."""
    return [" & ".join(line) + r" \\" for line in lines]


def in_markdown(text: str) -> str:
    """Text in which Markdown sees no marks."""
    return text.translate(_MARKDOWN)


def in_latex(text: str) -> str:
    """Text in which LaTeX sees no commands."""
    return text.translate(_LATEX)


def harmless(text: str) -> str:
    """Text that no spreadsheet runs as a formula."""
    if text.startswith(("=", "+", "-", "@")):
        return f"'{text}"
    return text


def printable(text: str, keep: str = "") -> str:
    """Text with line breaks, terminal control and the like escaped, but for the signs to keep.

    Names come from files.
    """
    signs: list[str] = []
    for sign in text:
        if sign.isprintable() or sign in keep:
            signs.append(sign)
        else:
            signs.append(sign.encode("unicode_escape").decode())
    return "".join(signs)


def shown(text: str) -> str:
    """A name from a file as it stands in text for a terminal: printable, at most ``WIDEST``."""
    return _cut(printable(text), WIDEST)


def _cut(line: str, length: int) -> str:
    if len(line) <= length:
        return line
    return line[: length - 1] + "…"


def span(values: Iterable[object]) -> str:
    """The different values that occur, in their order: "10/20"."""
    return "/".join(dict.fromkeys(map(str, values)))


def short(text: str, length: int) -> str:
    """On one line, and no longer than ``length``."""
    return _cut(" ".join(text.split()), length)


def rest(n: int, shown: int, what: str) -> list[str]:
    """A line on what a table leaves out; none where it shows all."""
    if n <= shown:
        return []
    return [f"... and {n - shown:,} more {what} (--json has all)"]


def csp_hash(content: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def page_of(package: str, name: str, images: str) -> tuple[str, str]:
    """A page from templates, its style and script within, and the policy that loads nothing else.

    ``images`` says from where the page may show images.
    """
    from importlib import resources  # late: it takes longer than the rest of this module

    folder = resources.files(package).joinpath("templates")
    style = folder.joinpath(f"{name}.css").read_text("utf-8")
    script = folder.joinpath(f"{name}.js").read_text("utf-8")
    page = folder.joinpath(f"{name}.html").read_text("utf-8")
    policy = (
        f"default-src 'none'; img-src {images} data:; connect-src 'self'; "
        f"style-src '{csp_hash(style)}'; script-src '{csp_hash(script)}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.replace("{{style}}", style).replace("{{script}}", script), policy
