"""Damage files and edit documents, as a seed decides."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EDGE = 200
"""The number of bytes in a header or a footer."""

KINDS = ("flip header", "flip data", "flip footer", "cut", "empty", "swap")


def damage(kind: str, path: Path, others: list[Path], draw: random.Random) -> list[Path] | None:
    """Damage a file and return the files that changed, or None if this damage is impossible
    here.
    """
    content = path.read_bytes()
    if kind == "swap":
        alike = [
            other
            for other in others
            if other.suffix == path.suffix and other.read_bytes() != content
        ]
        if not alike:
            return None
        other = draw.choice(alike)
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return [path, other]
    if not content:
        return None
    path.write_bytes(_changed(kind, content, draw))
    return [path]


def _changed(kind: str, content: bytes, draw: random.Random) -> bytes:
    n = len(content)
    if kind == "empty":
        return b""
    if kind == "cut":
        return content[: draw.randrange(n)]
    edge = min(EDGE, n)
    first, last = {"flip header": (0, edge), "flip data": (0, n), "flip footer": (n - edge, n)}[
        kind
    ]
    place = draw.randrange(first, last)
    changed = bytearray(content)
    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    -(10**30),
    0.5,
    -0.5,
    1e-320,
    1e300,
    -1e300,
    "",
    "x",
    "0",
    "-1",
    "nan",
    "../../x",
    "a/b",
    "/",
    "\x00",
    "\u202e",
    "é" * 300,
    "{}",
    "'" * 3,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [[[[[[[[1]]]]]]]],
    {"a": {"b": {"c": [1]}}},
    float("nan"),
    float("inf"),
]


def edited(document: Any, draw: random.Random) -> Any:
    """Return a copy with one or two changes.

    A change deletes, renames, adds or moves a key or an entry, or changes its type or value.
    """
    content = json.loads(json.dumps(document))
    for _ in range(draw.choice((1, 1, 1, 2))):
        _edit(content, draw)
    return content


def _edit(content: Any, draw: random.Random) -> None:
    places = list(_places(content))
    if not places:
        return
    holder, key = draw.choice(places)
    change = draw.choice((_delete, _replace, _retype, _shift, _rename, _repeat))
    change(holder, key, draw)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = (
        value.keys()
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    )
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _delete(holder: Any, key: Any, _: random.Random) -> None:
    del holder[key]


def _replace(holder: Any, key: Any, draw: random.Random) -> None:
    holder[key] = draw.choice(STRANGE)


def _retype(holder: Any, key: Any, draw: random.Random) -> None:
    """Put the same value into another type."""
    value = holder[key]
    ways: list[Callable[[Any], Any]] = [
        str,
        lambda x: [x],
        lambda x: {"a": x},
        lambda x: not x,
        json.dumps,
    ]
    holder[key] = draw.choice(ways)(value)


def _shift(holder: Any, key: Any, draw: random.Random) -> None:
    """Change a number, change a letter in a text, or reverse a list."""
    value = holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = draw.choice(
            (-value, value + 1, value - 1, value * 2, value * 10**9, float(value) / 3)
        )
    elif isinstance(value, str):
        place = draw.randrange(len(value) + 1)
        holder[key] = value[:place] + draw.choice("x0/.\\é\n") + value[place + draw.randrange(2) :]
    elif isinstance(value, list):
        value.reverse()
    else:
        holder[key] = [list(pair) for pair in value.items()]  # JSON form, for a second edit


def _rename(holder: Any, key: Any, draw: random.Random) -> None:
    if isinstance(holder, dict):
        holder[draw.choice((f"{key}x", "digest", "kind", "", *map(str, holder)))] = holder.pop(key)


def _repeat(holder: Any, key: Any, draw: random.Random) -> None:
    if isinstance(holder, list):
        holder.extend([holder[key]] * draw.choice((1, 3, 100)))
    else:
        holder[f"more {draw.randrange(9)}"] = holder[key]
