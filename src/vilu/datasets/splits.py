"""``--split``: one name, or several joined by ``+``."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from vilu.errors import UsageError


def parse_split(split: str, available: Collection[str], source: str) -> tuple[str, ...]:
    """The names in ``split``, each once and each available.

    Raises:
        UsageError: If one is empty, repeated, or unknown; the message lists what there is.
    """
    names = tuple(name.strip() for name in split.split("+"))
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"--split must name each split once, joined by '+'. Got {split!r} instead.")
    unknown = next((name for name in names if name not in available), None)
    if unknown is None:
        return names
    if not available:
        raise UsageError(f"{source} has no splits. Leave --split {split} out.")
    nearest = difflib.get_close_matches(unknown, available, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UsageError(f"{source} has no split {unknown!r}; it has {', '.join(sorted(available))}.{hint}")
