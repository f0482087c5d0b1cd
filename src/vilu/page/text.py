"""Text for a page: what a hostile name may do there, and how numbers look."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the order of what stands around them; joiners, which scripts and emoji need, are not among."""

HARMFUL = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Categories of characters that a page has no use for: controls, halves of characters, breaks of lines."""

SHOWN, TOLD = 60, 300
"""Characters of a name that are seen, and that a tooltip tells at most."""

NOTHING = "–"


def harmless(text: str) -> str:
    """The text with controls and marks of direction spelled out."""
    return "".join(
        f"\\u{ord(c):04x}" if c in BIDI or unicodedata.category(c) in HARMFUL else c for c in text[: TOLD + 1]
    )


def shortened(text: str, most: int = SHOWN) -> str:
    """At most so many characters of it, harmless."""
    safe = harmless(text)
    return safe if len(safe) <= most else f"{safe[: most - 1]}…"


def tooltip(text: str) -> str:
    """As much of a long name as a tooltip tells."""
    return shortened(text, TOLD)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in per cent, without the sign."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}"


def count(value: int) -> str:
    """A number with commas."""
    return f"{value:,}"


def goal(value: float) -> str:
    """A fraction that somebody chose, in per cent, without the sign."""
    return f"{round(100 * value, 9):g}"


def score(value: float) -> str:
    """An uncertainty, to be read; a probability that is not quite 1 does not look like 1."""
    if 0.99995 <= value < 1:
        return "> 0.9999"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"


def flat(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of a JSON object, nested ones with a dot between the names."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", NOTHING if value is None else str(value)
