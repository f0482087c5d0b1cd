"""Text for people: tables as aligned text, Markdown and LaTeX, and cells with escapes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence

EMPTY_CELL = "-"  # cell without a number
MAX_CELL_LENGTH = 120  # maximum number of characters in an aligned table's cell
# characters with a meaning in Markdown, and the replacements
_MARKDOWN_ESCAPES = str.maketrans({"\\": r"\\", "|": r"\|", "<": "&lt;", "_": r"\_", "*": r"\*"})
_LATEX_ESCAPES = str.maketrans(
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
"""Characters that are commands or unknown in LaTeX, and the replacements."""


def align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Format lines of cells as text, with columns aligned at the left ends.

    Cells are escaped and shortened by ``to_terminal_text``.
    """
    cells = [[to_terminal_text(cell) for cell in line] for line in lines]
    widths: list[int] = []
    for column in zip(*cells, strict=True):  # each column's cells
        widths.append(max(map(len, column)))
    aligned_lines: list[str] = []
    for line in cells:
        padded_cells = map(str.ljust, line, widths)
        padded_line = "  ".join(padded_cells)
        aligned_lines.append(padded_line.rstrip())
    return aligned_lines


def markdown_rows(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table's lines. The cells must already be valid Markdown."""
    rows = [_markdown_row(heading), "|---" * len(heading) + "|"]
    for line in lines:
        rows.append(_markdown_row(line))
    return rows


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def latex_rows(lines: Iterable[Sequence[str]]) -> list[str]:
    """Return a LaTeX table's lines. The cells must already be valid LaTeX."""
    return [" & ".join(line) + r" \\" for line in lines]


def escape_markdown(text: str) -> str:
    """Escape the characters in a text that have a meaning in Markdown."""
    return text.translate(_MARKDOWN_ESCAPES)


def escape_latex(text: str) -> str:
    """Escape the characters in a text that have a meaning in LaTeX."""
    return text.translate(_LATEX_ESCAPES)


def escape_formula(text: str) -> str:
    """Put an apostrophe before a text if a spreadsheet would run the text as a formula."""
    if text.startswith(("=", "+", "-", "@")):
        return f"'{text}"
    return text


def escape_unprintable(text: str, keep: str = "") -> str:
    """Escape all non-printable characters in a text, except the characters in ``keep``.

    Names come from files, and may contain line breaks or control sequences for the terminal.
    """
    characters: list[str] = []
    for character in text:
        if character.isprintable() or character in keep:
            characters.append(character)
        else:
            escape = character.encode("unicode_escape")
            characters.append(escape.decode())
    return "".join(characters)


def to_terminal_text(text: str) -> str:
    """Make a name printable for a terminal, and shorten it to ``MAX_CELL_LENGTH`` characters."""
    printable_text = escape_unprintable(text)
    return _cut(printable_text, MAX_CELL_LENGTH)


def _cut(line: str, length: int) -> str:
    """Shorten a line to ``length`` characters. A shortened line ends with an ellipsis."""
    if len(line) <= length:
        return line
    return line[: length - 1] + "…"


def join_distinct(values: Iterable[object]) -> str:
    """Join values with slashes, each value once, in the order of appearance, such as "10/20"."""
    return "/".join(dict.fromkeys(map(str, values)))


def plural(n: int, noun: str) -> str:
    """Join a number and a noun with a plural in "s", such as "1 row" or "1,200 rows"."""
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {noun}s"


def shorten_line(text: str, length: int) -> str:
    """Put a text on one line, and shorten it to ``length`` characters."""
    words = text.split()
    line = " ".join(words)
    return _cut(line, length)


def hidden_rows_line(n: int, n_shown: int, noun: str) -> list[str]:
    """Return a list with one line about the number of hidden rows, or [] if no row is hidden.

    ``n_shown`` of ``n`` rows are shown. ``noun`` says what the rows are, in the plural.
    """
    if n <= n_shown:
        return []
    return [f"... and {n - n_shown:,} more {noun} (--json has all)"]


def csp_hash(content: str) -> str:
    """Compute the hash that allows an inline script or style in a Content-Security-Policy."""
    sha256 = hashlib.sha256(content.encode())
    encoded_digest = base64.b64encode(sha256.digest())
    return f"sha256-{encoded_digest.decode()}"


def render_page(package: str, name: str, images: str) -> tuple[str, str]:
    """Return an HTML page with style and script, and the page's Content-Security-Policy.

    The page, the style and the script come from the folder ``templates`` of ``package``, from the
    files ``name`` with the suffixes .html, .css and .js. The policy allows only this style and this
    script. Images are allowed from the source ``images``, such as "blob:", and from data: URLs.
    """
    from importlib import resources  # imported here because this import is slower than the module

    folder = resources.files(package).joinpath("templates")
    style = folder.joinpath(f"{name}.css").read_text("utf-8")
    script = folder.joinpath(f"{name}.js").read_text("utf-8")
    page = folder.joinpath(f"{name}.html").read_text("utf-8")
    policy = (
        f"default-src 'none'; img-src {images} data:; connect-src 'self'; "
        f"style-src '{csp_hash(style)}'; script-src '{csp_hash(script)}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    page = page.replace("{{style}}", style)
    page = page.replace("{{script}}", script)
    return page, policy
