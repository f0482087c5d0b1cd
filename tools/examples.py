"""Share of public functions and classes with an example in the docstring, by room.

    python tools/examples.py [--missing]

The exit code is 1 below ``MIN_PERCENT`` %. --missing lists the functions without an example. Each
function is counted once:

- the functions and classes in ``vilu.__all__`` and ``vilu.metrics.__all__``, and the methods in
  ``vilu.PREDICTORS``.
- the public functions in the bodies of these classes and of their base classes in ``vilu``.
  Attributes, properties and constants are not counted.

A function has an example if the function's docstring has a line with ``>>>``. Two more cases count
for a function in a class. A base class or a subclass has an example in a function with the same
name, or an example in one of these classes calls the function. `make test` runs the examples, so
here the examples are not checked.
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

MIN_PERCENT = 80  # per cent
EXAMPLE_LINE = re.compile(r"^\s*(?:>>>|\.\.\.) (.*)", re.MULTILINE)
"""A code line in a docstring example."""


def example_code(item: object) -> str:
    """Return the code lines in the docstring examples of ``item``."""
    lines = EXAMPLE_LINE.findall(item.__doc__ or "")
    return "\n".join(lines)


def own_bases(cls: type) -> Iterator[type]:
    """Return the class and the base classes from this package."""
    return (base for base in cls.__mro__ if base.__module__.partition(".")[0] == vilu.__name__)


def public_functions(cls: type) -> dict[str, Any]:
    """Return the public functions in a class body, by name."""
    bodies = {
        name: getattr(value, "__func__", value)
        for name, value in vars(cls).items()
        if name[0] != "_"
    }
    return {name: value for name, value in bodies.items() if inspect.isfunction(value)}


def public_objects() -> list[object]:
    """List objects with a public name, and the registered methods defined in this package."""
    named_objects = [
        getattr(module, name) for module in (vilu, vilu.metrics) for name in module.__all__
    ]
    return [
        *named_objects,
        *(method for method in vilu.PREDICTORS.values() if method in own_bases(method)),
    ]


def has_example_by_object(objects: list[object]) -> dict[Any, bool]:
    """Map each counted function and class to whether there is an example."""
    public_classes = dict.fromkeys(item for item in objects if isinstance(item, type))
    has_example = {
        item: bool(example_code(item))
        for item in [*filter(inspect.isfunction, objects), *public_classes]
    }
    bases = [base for public_class in public_classes for base in own_bases(public_class)]
    classes = dict.fromkeys(bases)
    for cls in classes:
        family = [other for other in classes if issubclass(cls, other) or issubclass(other, cls)]
        functions = public_functions(cls)
        for name, function in functions.items():
            codes_of_same_name = [
                example_code(public_functions(other)[name])
                for other in family
                if name in public_functions(other)
            ]
            are_called = (re.search(rf"\.{name}\(", example_code(other)) for other in family)
            has_example[function] = (
                has_example.get(function, False) or any(codes_of_same_name) or any(are_called)
            )
    return has_example


def table_row(room: str, has_example: list[bool]) -> str:
    """Format a table row: the number counted, the number with an example, and the share."""
    n = len(has_example)
    n_with_example = sum(has_example)
    return f"{room:<14}{n:>8}{n_with_example:>9}{100 * n_with_example / n:>8.1f}"


def main() -> int:
    """Count examples, print the table, and return the exit code."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--missing", action="store_true", help="name what has no example")
    lists_missing = parser.parse_args().missing
    rooms: dict[str, dict[str, bool]] = defaultdict(dict)
    objects = public_objects()
    has_example_of = has_example_by_object(objects)
    for item, has_example in has_example_of.items():
        rooms[item.__module__.split(".")[1]][f"{item.__module__}.{item.__qualname__}"] = has_example
    print(f"{'room':<14}{'called':>8}{'example':>9}{'%':>8}")
    for room, items_of_room in sorted(rooms.items()):
        has_example_in_room = list(items_of_room.values())
        print(table_row(room, has_example_in_room))
        for name in sorted(
            name for name in items_of_room if lists_missing and not items_of_room[name]
        ):
            print(f"    {name}")
    all_items = [
        has_example for items_of_room in rooms.values() for has_example in items_of_room.values()
    ]
    print(
        table_row("all", all_items),
        f"At least {MIN_PERCENT} % of what users call must have an example.",
        sep="\n\n",
    )
    return int(100 * sum(all_items) < MIN_PERCENT * len(all_items))


if __name__ == "__main__":
    sys.exit(main())
