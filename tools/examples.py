"""How much of what users call has an example in its documentation, room by room.

    python tools/examples.py [--missing]

Exit code 1 below ``LEAST`` %; --missing names what has none. What is counted, each function once:

- the functions and classes of ``vilu.__all__`` and ``vilu.metrics.__all__``, and the methods of
  ``vilu.PREDICTORS``;
- the public functions in the bodies of these classes, and of those of ours that they inherit from.
  Attributes, properties and constants are not called.

It has an example if its own documentation has a line of one (``>>>``). A function of a class has
one also where that of the same name has one in a class above or below, or where the example of such
a class or of its own calls it. That the examples are right is for the tests: `make test` runs each
of them.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import vilu

LEAST = 80  # per cent
SHOWN = re.compile(r"^\s*(?:>>>|\.\.\.) (.*)", re.MULTILINE)
"""What a reader types, in a docstring."""


def typed(thing: object) -> str:
    """The lines of code in the examples of its own documentation."""
    return "\n".join(SHOWN.findall(thing.__doc__ or ""))


def ours(cls: type) -> Iterator[type]:
    """The class and those that it inherits from, as far as they are of this package."""
    return (base for base in cls.__mro__ if base.__module__.partition(".")[0] == vilu.__name__)


def functions(cls: type) -> dict[str, Any]:
    """The public functions in the body of a class, by name."""
    bodies = {
        name: getattr(value, "__func__", value)
        for name, value in vars(cls).items()
        if name[0] != "_"
    }
    return {name: value for name, value in bodies.items() if inspect.isfunction(value)}


def public() -> list[object]:
    """What has a public name; methods that others have added are not ours."""
    named = [getattr(place, name) for place in (vilu, vilu.metrics) for name in place.__all__]
    return [*named, *(method for method in vilu.PREDICTORS.values() if method in ours(method))]


def called(named: list[object]) -> dict[Any, bool]:
    """What users call of these things, and whether it has an example."""
    tops = dict.fromkeys(thing for thing in named if isinstance(thing, type))
    found = {thing: bool(typed(thing)) for thing in [*filter(inspect.isfunction, named), *tops]}
    classes = dict.fromkeys(base for top in tops for base in ours(top))
    for cls in classes:
        family = [other for other in classes if issubclass(cls, other) or issubclass(other, cls)]
        for name, function in functions(cls).items():
            same = [typed(functions(other)[name]) for other in family if name in functions(other)]
            uses = (re.search(rf"\.{name}\(", typed(other)) for other in family)
            found[function] = found.get(function, False) or any(same) or any(uses)
    return found


def line(what: str, has: list[bool]) -> str:
    """How many there are, how many have an example, and the share."""
    return f"{what:<14}{len(has):>8}{sum(has):>9}{100 * sum(has) / len(has):>8.1f}"


def main() -> int:
    """Count, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--missing", action="store_true", help="name what has no example")
    missing = parser.parse_args().missing
    rooms: dict[str, dict[str, bool]] = defaultdict(dict)
    for thing, has in called(public()).items():
        rooms[thing.__module__.split(".")[1]][f"{thing.__module__}.{thing.__qualname__}"] = has
    print(f"{'room':<14}{'called':>8}{'example':>9}{'%':>8}")
    for room, things in sorted(rooms.items()):
        print(line(room, list(things.values())))
        for name in sorted(name for name in things if missing and not things[name]):
            print(f"    {name}")
    everything = [has for things in rooms.values() for has in things.values()]
    print(
        line("all", everything),
        f"At least {LEAST} % of what users call must have an example.",
        sep="\n\n",
    )
    return int(100 * sum(everything) < LEAST * len(everything))


if __name__ == "__main__":
    sys.exit(main())
