"""Share of the public functions and classes with an example in the docstring, by room.

    python tools/examples.py [--missing]

The exit code is 1 below ``LEAST`` %. --missing lists the functions without an example. Each
function is counted once:

- the functions and classes of ``vilu.__all__`` and ``vilu.metrics.__all__``, and the methods of
  ``vilu.PREDICTORS``;
- the public functions in the bodies of these classes and of their base classes in ``vilu``.
  Attributes, properties and constants are not counted.

A function has an example if the docstring of the function has a line with ``>>>``. Two more cases
count for a function of a class: a function of the same name has an example in a base class or a
subclass, or the example of one of these classes calls the function. `make test` runs the examples,
so here the examples are not checked.
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
"""A line of code in an example of a docstring."""


def typed(thing: object) -> str:
    """The lines of code in the examples of the docstring of ``thing``."""
    return "\n".join(SHOWN.findall(thing.__doc__ or ""))


def ours(cls: type) -> Iterator[type]:
    """The class and the base classes from this package."""
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
    """Objects with a public name, and the registered methods defined in this package."""
    named = [getattr(place, name) for place in (vilu, vilu.metrics) for name in place.__all__]
    return [*named, *(method for method in vilu.PREDICTORS.values() if method in ours(method))]


def called(named: list[object]) -> dict[Any, bool]:
    """Map each counted function and class to whether there is an example."""
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
    """A row of the table: the number counted, the number with an example, and the share."""
    return f"{what:<14}{len(has):>8}{sum(has):>9}{100 * sum(has) / len(has):>8.1f}"


def main() -> int:
    """Count examples, print the table, and return the exit code."""
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
