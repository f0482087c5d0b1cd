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
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
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
    """A line each, its cells (as ``shown``) padded to the width of their column; numbers are not told from words."""
    cells = [[shown(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def markdown_rows(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, of cells that are Markdown already."""
    head, *body = ("| " + " | ".join(line) + " |" for line in (heading, *lines))
    return [head, "|---" * len(heading) + "|", *body]


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
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def printable(text: str, kept: str = "") -> str:
    """Line breaks, terminal control and the like, but for what is ``kept``, escaped: names come from files."""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


def shown(text: str) -> str:
    """A name from a file as it stands in text for a terminal: printable, and no longer than ``WIDEST``."""
    line = printable(text)
    return line if len(line) <= WIDEST else line[: WIDEST - 1] + "…"


def span(values: Iterable[object]) -> str:
    """The different values that occur, in their order: "10/20"."""
    return "/".join(dict.fromkeys(map(str, values)))


def short(text: str, length: int) -> str:
    """On one line, and no longer than ``length``."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def rest(n: int, shown: int, what: str) -> list[str]:
    """A line on what a table leaves out; none where it shows all."""
    return [f"... and {n - shown:,} more {what} (--json has all)"] if n > shown else []


def csp_hash(content: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def page_of(package: str, name: str, images: str) -> tuple[str, str]:
    """A page from templates, with its style and its script in it, and the policy by which it loads nothing else.

    ``images`` says from where the page may show images.
    """
    from importlib import resources  # late: it takes longer than the rest of this module

    folder = resources.files(package).joinpath("templates")
    style, script, page = (
        folder.joinpath(f"{name}.{kind}").read_text("utf-8") for kind in ("css", "js", "html")
    )
    policy = (
        f"default-src 'none'; img-src {images} data:; connect-src 'self'; style-src '{csp_hash(style)}'; "
        f"script-src '{csp_hash(script)}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.replace("{{style}}", style).replace("{{script}}", script), policy
