"""How wide the house is: sizes, imports and names of src/vilu, each beside the bar that it must reach.

    python tools/house.py [--report]

Exit code 1 if a bar is missed; with --report the same is printed, and the exit code is 0. What is
counted:

- lines: all of every *.py below src/vilu, but for the files of ``REGISTRATION``, and for examples
  in documentation: from a line with ``>>>``, with the heading above it, to the next blank line or
  the end. Code: the lines among them with something else on them than a comment or documentation,
  which is any string that stands as a statement of its own (docstrings, and those below an
  attribute). Import lines: the lines of code of import statements, wherever they stand.
- folders: those directly below src/vilu that hold Python (``assets`` does not). Modules: the files
  there, but for ``__init__.py`` and ``__main__.py``.
- circles: modules that reach one another by imports, those in functions, for types and by
  ``import_module("...")`` too. That importing ``vilu.a.b`` also runs ``vilu/a/__init__.py`` makes
  no arrow. The facade, ``vilu/__init__.py``, is left aside: a circle through it needs an import of
  it from inside, and these are counted by themselves, one per name.
- chain: modules of which each imports the next, in functions and for types too, as for circles. Who
  reads a command down to its last number goes through so many files at most.
- class names: of all classes, nested ones too, that are defined in two or more files.
- MRO: the classes from ``vilu`` among the bases of a method in ``vilu.PREDICTORS``, itself and
  mixins included.
- totals of files, lines and imports are printed and have no bar: a bar on lines squeezed the code.
- functions: from ``def`` to the last line, docstring included but for its examples, decorators not;
  a nested one also by itself. The 95th percentile is the shortest length that at least 95 % of all
  do not exceed.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1] / "src"
FACADE = "vilu"
PACKAGE = SOURCE / FACADE

REGISTRATION = ("registry.py", "predictors/contract/catalogue.py")
"""Paths below src/vilu whose lines are left aside: how methods, metrics and data sets are registered."""
DOUBLE: dict[str, str] = {}
"""Class names that may mean two things, each with its reason."""

EXAMPLE = re.compile(r"(?:\n *)?(?:\n *Examples?:)?\n *>>>.*(?:\n *\S.*)*")
"""An example in a docstring, with the heading and the blank line above it."""

NOTHING_SAID = {
    tokenize.ENCODING,
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Bar(NamedTuple):
    """What is measured, what it is, and what it may be at most."""

    what: str
    value: float
    limit: float


class Module(NamedTuple):
    """One file, read and parsed."""

    path: str  # below src/vilu
    name: str  # as it is imported
    tree: ast.Module
    lines: int
    code: set[int]


def lines_of(node: ast.stmt) -> range:
    """The lines that a statement stands on."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def documentation(tree: ast.AST) -> Iterator[tuple[ast.Expr, str]]:
    """The strings that stand as statements."""
    ahead = [tree]
    while ahead:
        node = ahead.pop()
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node, node.value.value
        ahead += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]


def example_lines(tree: ast.AST) -> int:
    """How many lines of the file are there for the examples in its documentation."""
    lines = 0
    for _, text in documentation(tree):
        rest = EXAMPLE.sub("", text)
        lines += text.count("\n") - (rest.count("\n") if rest.strip().count("\n") else 0)
    return lines


def read_module(file: Path) -> Module:
    """A file with the numbers of its lines of code."""
    text = file.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.split("\n")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    said = {
        n
        for token in tokens
        if token.type not in NOTHING_SAID
        for n in range(token.start[0], token.end[0] + 1)
    }
    documented = {n for string, _ in documentation(tree) for n in lines_of(string)}
    code = {n for n in said - documented if lines[n - 1].strip()}
    parts = file.relative_to(SOURCE).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(
        file.relative_to(PACKAGE).as_posix(),
        name,
        tree,
        text.count("\n") - example_lines(tree),
        code,
    )


def import_lines(module: Module) -> int:
    """How many of its lines of code belong to import statements."""
    statements = [
        node for node in ast.walk(module.tree) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return len({n for statement in statements for n in lines_of(statement)} & module.code)


def imported(module: Module) -> Iterator[tuple[int, str, str]]:
    """Every import: its line, the module, and the name taken from it ("" for the module itself)."""
    package = module.name if module.path.endswith("__init__.py") else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, source, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            given = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
            yield from ((node.lineno, value, "") for value in given if isinstance(value, str))


def arrows(modules: list[Module]) -> tuple[dict[str, set[str]], list[str]]:
    """Which module imports which, and where the facade is imported from inside."""
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {name: set() for name in names - {FACADE}}
    facade: list[str] = []
    for module in modules:
        if module.name == FACADE:
            continue
        for line, source, taken in imported(module):
            target = f"{source}.{taken}" if f"{source}.{taken}" in names else source
            if target == FACADE:
                facade.append(f"{module.path}:{line}" + (f" takes {taken}" if taken else ""))
            elif target in names:
                graph[module.name].add(target)
    return graph, facade


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The sets of modules of which each reaches each, one a line."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, ahead = set[str](), [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        reached[start] = seen
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph}
    return sorted(", ".join(sorted(circle)) for circle in found if len(circle) > 1)


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The modules of which each imports the next, as many as there are; the graph has no circle."""
    chains: dict[str, list[str]] = {}

    def chain_from(module: str) -> list[str]:
        if module not in chains:
            further = [chain_from(target) for target in sorted(graph[module])]
            chains[module] = [module, *max(further, key=len, default=[])]
        return chains[module]

    return max((chain_from(module) for module in sorted(graph)), key=len)


def double_names(modules: list[Module]) -> dict[str, list[str]]:
    """Class names that are defined in two or more files, and where."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places[node.name][module.path] = f"{module.path}:{node.lineno}"
    return {name: list(places[name].values()) for name in sorted(places) if len(places[name]) > 1}


def functions(modules: list[Module]) -> list[tuple[int, str]]:
    """The lines of each function, and which it is; shortest first."""
    return sorted(
        (len(lines_of(node)) - example_lines(node), f"{module.path}:{node.lineno} {node.name}")
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def ancestries() -> list[tuple[int, str]]:
    """How many of our classes each method's MRO has, and which; fewest first."""
    sys.path.insert(0, str(SOURCE))
    import vilu

    if Path(vilu.__file__ or "").parent != PACKAGE:
        sys.exit(f"vilu was imported from {vilu.__file__}, and the files measured are in {PACKAGE}")
    ours = {
        name: [
            base.__name__ for base in method.__mro__ if base.__module__.partition(".")[0] == FACADE
        ]
        for name, method in vilu.PREDICTORS.items()
    }
    return sorted((len(bases), f"{name}: {', '.join(bases)}") for name, bases in ours.items())


def measure(
    modules: list[Module],
) -> tuple[dict[str, float], list[Bar], dict[str, list[str]]]:
    """Totals, which have no bar; the bars; and what the reader wants to see by name."""
    counted = [module for module in modules if module.path not in REGISTRATION]
    code = sum(len(module.code) for module in counted)
    graph, facade = arrows(modules)
    loops, doubles, sizes, ours = (
        circles(graph),
        double_names(modules),
        functions(modules),
        ancestries(),
    )
    chain = [] if loops else longest_chain(graph)
    folders = {module.path.partition("/")[0] for module in modules if "/" in module.path}
    files = {module.path for module in modules if "/" not in module.path} - {
        "__init__.py",
        "__main__.py",
    }
    totals = {
        "source files": len(modules),
        "lines": sum(module.lines for module in counted),
        "lines of code": code,
        "import lines, % of the lines of code": 100 * sum(map(import_lines, counted)) / code,
        "arrows between modules": sum(map(len, graph.values())),
        "folders directly below src/vilu": len(folders),
        "modules directly below src/vilu": len(files),
    }
    bars = [
        Bar("import circles", len(loops), 0),
        Bar("modules in the longest chain of imports", len(chain), 20),
        Bar("imports of the facade from inside", len(facade), 0),
        Bar("class names that mean two things", len(doubles), 3),
        Bar("- of these without a reason, or the reverse", len(doubles.keys() ^ DOUBLE.keys()), 0),
        Bar("our classes in the deepest MRO of a method", ours[-1][0], 4),
        Bar("lines of a function, 95th percentile", sizes[math.ceil(0.95 * len(sizes)) - 1][0], 32),
        Bar("lines of a function, longest", sizes[-1][0], 140),
    ]
    lists = {
        "import circles": loops,
        "longest chain of imports": chain,
        "imports of the facade from inside": facade,
        "class names that mean two things": [
            f"{name}: {', '.join(places)}" for name, places in doubles.items()
        ],
        "methods with the deepest MRO": [text for depth, text in ours if depth == ours[-1][0]],
        "longest function": [f"{sizes[-1][1]}, {sizes[-1][0]} lines"],
    }
    return totals, bars, lists


def number(value: float) -> str:
    """A count, or a share with a decimal."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--report",
        action="store_true",
        help="only print: the exit code is 0 with a bar missed, too",
    )
    report = parser.parse_args().report
    modules = [read_module(file) for file in sorted(PACKAGE.rglob("*.py"))]
    gone = set(REGISTRATION) - {module.path for module in modules}
    if gone:
        sys.exit(f"REGISTRATION names files that src/vilu does not have: {', '.join(sorted(gone))}")
    totals, bars, lists = measure(modules)
    lines = [f"{what:<44}{number(value):>10}" for what, value in totals.items()]
    lines += ["", f"{'what':<44}{'value':>10}{'must reach':>13}   ok"]
    for bar in bars:
        judged = "yes" if bar.value <= bar.limit else "NO"
        lines.append(
            f"{bar.what:<44}{number(bar.value):>10}{'≤ ' + number(bar.limit):>13}   {judged}"
        )
    for title, items in lists.items():
        lines += ["", f"{title}: {len(items)}", *(f"  {item}" for item in items)]
    print("\n".join(lines))
    missed = any(bar.value > bar.limit for bar in bars)
    return 1 if missed and not report else 0


if __name__ == "__main__":
    sys.exit(main())
