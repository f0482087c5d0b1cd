"""The bars that the source of both packages must reach: src/vilu and src/vilu_bench.

    python tools/house.py [--report]

The exit code is 1 if a bar is missed. With --report the same text is printed, and the exit code
is 0.

A room is a folder directly below a package. The files directly in the package are together a
further room. There are bars for each room, and for each package as a whole. "Per statement" counts
every statement except imports and documentation:

- dense: comprehensions, lambdas, conditional expressions, assignment expressions and boolean
  operators, per statement.
- pairs: assignments with a tuple written out on both sides (``a, b = c, d``), per 1,000 statements.
- nested: statements with a call inside a call, ``f(g())``, or a call on a call's result,
  ``f().g()``, per 1,000 statements. Calls of built-in functions do not count. scikit-learn, httpx,
  rich, pydantic, fastapi, cleanlab and typer have 32 to 51.
- wide: lines with more than 100 characters, code or not.
- vague: variables, parameters and functions with a name in ``VAGUE``, per 1,000 statements. The
  parameter ``other`` of a method with two operands is not counted. Parameters of magic methods are
  not counted.
- longest: the line count of the longest function, from ``def`` to the last line. The docstring
  counts. Examples in the docstring and decorators do not count. A nested function also counts
  separately.
- pronouns, relatives: words in ``PRONOUNS`` and in ``RELATIVES``, per 1,000 words in docstrings and
  comments. A reader has to find the noun for a pronoun. scikit-learn, httpx, rich and pydantic have
  5 to 12 pronouns and 6 to 12 relatives.
- of, semicolons: per 1,000 words in docstrings and comments. "of" stacks nouns, and a semicolon
  hides a second sentence. These four libraries have 11 to 34 times "of", and at most 1 semicolon.

The following bars are for both packages together:

- circles: sets of modules that reach one another by imports. Imports in functions, imports for
  types and ``import_module("...")`` count, too. If a module imports ``vilu.a.b``, Python also runs
  ``vilu/a/__init__.py``, but this does not count as an import. The facade, ``vilu/__init__.py``, is
  left out: a circle through the facade needs a module inside that imports the facade, and such
  imports have a separate bar.
- imports upwards: imports between rooms in vilu against ``MAY_IMPORT``, and imports of vilu_bench
  in vilu.
- chain: the most vilu modules in an import chain. Imports in functions and for types count, too. A
  reader who follows a command to the last number opens at most this many files.
- class names: names of classes, also nested classes, defined in two or more files.
- MRO: how many classes from ``vilu`` are in the method resolution order of each method in
  ``vilu.PREDICTORS``. The method's class and the mixins are counted, too.
- functions: the 95th percentile is the least length that at least 95 % of the functions do not
  exceed.

The totals (files, lines and imports) have no bar, because a bar on lines squeezed the code. The
line totals leave out examples in documentation. Code lines also leave out lines with only a comment
or only documentation.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import io
import math
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1] / "src"
CORE = "vilu"
PACKAGES = (CORE, "vilu_bench")

NOT_YET: dict[str, str] = {}
"""Maps a room or package that may still miss a bar to the reason. Empty by intention."""

ROOM_BARS = {
    "dense": 0.17,
    "pairs": 3.0,
    "nested": 50.0,
    "wide": 0,
    "vague": 2.0,
    "longest": 90,
    "pronouns": 13.0,
    "relatives": 12.0,
    "of": 40.0,
    "semicolons": 2.5,
}
PACKAGE_BARS = ROOM_BARS | {"dense": 0.12, "nested": 45.0}
LONGEST_LINE = 100

BASE = {
    *("errors", "callers", "validation", "artifacts", "text", "progress"),
    *("process", "device", "extras", "registry"),
}
GROUND = BASE | {"embeddings", "metrics"}
SOURCES = GROUND | {"datasets", "backbones", "store"}
DECIDING = SOURCES | {"outcomes", "predictors", "scoring", "calibration"}
MAY_IMPORT: dict[str, set[str] | None] = {
    **dict.fromkeys(BASE, BASE),
    "embeddings": BASE | {"metrics"},
    "metrics": BASE,
    "datasets": BASE | {"embeddings"},
    "backbones": BASE | {"embeddings"},
    "store": BASE | {"embeddings", "datasets", "backbones"},
    "outcomes": BASE | {"metrics"},
    "predictors": GROUND | {"backbones"},
    "methods": BASE | {"predictors"},
    "scoring": GROUND | {"store", "outcomes", "predictors"},
    "calibration": GROUND | {"store", "outcomes", "predictors", "scoring"},
    "tables": DECIDING - {"store", "backbones"},
    "report": DECIDING - {"store", "backbones"},
    "guard": DECIDING,
    "triage": DECIDING | {"report", "guard"},
    "selective": DECIDING | {"triage"},
    "service": DECIDING | {"guard", "tables"},
    "sklearn": BASE | {"metrics", "outcomes", "calibration"},
    "cli": None,
}
"""The rooms in vilu from the ground up, with the rooms that each may import (None: all rooms)."""

VAGUE = {
    *("found", "given", "kept", "made", "said", "told"),
    *("each", "one", "ones", "other", "others", "some", "thing"),
    *("mine", "theirs", "these", "those"),
}
PRONOUNS = {
    *("it", "its", "itself", "they", "them", "their", "theirs"),
    *("one", "ones", "other", "others", "those"),
}
RELATIVES = {"that", "which", "what", "whose", "whom"}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
DENSE = COMPREHENSION | ast.Lambda | ast.IfExp | ast.NamedExpr | ast.BoolOp
BUILTINS = frozenset(dir(builtins))
EXAMPLE = re.compile(r"(?:\n *)?(?:\n *Examples?:)?\n *>>>.*(?:\n *\S.*)*")
"""An example in a docstring, with the heading and the blank line above it."""
LAYOUT_TOKENS = {
    tokenize.ENCODING,
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Module(NamedTuple):
    """A source file, read and parsed."""

    package: str
    path: str  # below src/
    name: str  # name in import statements
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Return whether the module is a folder's ``__init__.py``."""
        return self.path.endswith("/__init__.py")

    @property
    def room(self) -> str:
        """The folder or file directly below the package."""
        return Path(self.path).with_suffix("").parts[1]

    @property
    def measured_with(self) -> str:
        """The room in the table. All files directly in a package are one room."""
        parts = Path(self.path).parts
        if len(parts) == 2:
            return f"{self.package}/*.py"
        return f"{self.package}/{parts[1]}"


class Bar(NamedTuple):
    """A bar for both packages together: the measured quantity, the value and the limit."""

    quantity: str
    value: int
    limit: int


class Import(NamedTuple):
    """The import of a name."""

    line: int
    source: str  # the module
    name: str  # the imported name, "" for the whole module


def read_module(file: Path) -> Module:
    """Read and parse a file in a package."""
    relative = file.relative_to(SOURCE)
    parts = relative.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    path = relative.as_posix()
    name = ".".join(parts)
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    return Module(parts[0], path, name, text, tree)


def read_package(package: str) -> list[Module]:
    """Read every file in a package, except for copies in build/ from a wheel build."""
    folder = SOURCE / package
    files = sorted(folder.rglob("*.py"))
    return [read_module(file) for file in files if file.relative_to(folder).parts[0] != "build"]


# Counts for the room table.


def is_documentation(node: ast.AST) -> bool:
    """Return whether a node is documentation: a statement with a string alone."""
    if not isinstance(node, ast.Expr):
        return False
    return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_counted(node: ast.AST) -> bool:
    """Return whether a node is a statement, except for imports and documentation."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return False
    return isinstance(node, ast.stmt) and not is_documentation(node)


def is_pair(node: ast.AST) -> bool:
    """Return whether a node assigns a written-out tuple to a written-out tuple."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def is_nested(node: ast.AST) -> bool:
    """Return whether a node is a statement with a call inside a call, or on a call's result.

    Statements in the body of the node are left out.
    """
    if not isinstance(node, ast.stmt):
        return False
    parts = ast.iter_child_nodes(node)
    return any(call_depth(part) >= 2 for part in parts if not isinstance(part, ast.stmt))


def call_depth(node: ast.AST) -> int:
    """Return the most calls inside one another. Calls of built-in functions do not count."""
    depth = 0
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt):
            depth = max(depth, call_depth(child))
    if not isinstance(node, ast.Call):
        return depth
    is_builtin = isinstance(node.func, ast.Name) and node.func.id in BUILTINS
    return depth if is_builtin else depth + 1


def parameters(function: FUNCTION | ast.Lambda) -> list[str]:
    """Return a function's parameter names."""
    arguments = function.args
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for rest in (arguments.vararg, arguments.kwarg):
        if rest is not None:
            listed.append(rest)
    return [argument.arg for argument in listed]


def names_bound(node: ast.AST) -> list[str]:
    """Return the variables, parameters and functions that a node defines."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Lambda):
        return parameters(node)
    if not isinstance(node, FUNCTION):
        return []
    names = [node.name.strip("_")]
    is_magic = node.name.startswith("__")
    has_two_operands = parameters(node) == ["self", "other"]
    if not is_magic and not has_two_operands:
        names += parameters(node)
    return names


@cache  # a file is counted for its room and for its package
def counts_of(module: Module) -> dict[str, int]:
    """Count what a file has of each measured thing."""
    counts = dict.fromkeys(("statements", "dense", "pairs", "nested", "vague"), 0)
    for node in ast.walk(module.tree):
        counts["statements"] += is_counted(node)
        counts["dense"] += isinstance(node, DENSE)
        counts["pairs"] += is_pair(node)
        counts["nested"] += is_nested(node)
        counts["vague"] += sum(name in VAGUE for name in names_bound(node))
    counts["wide"] = sum(len(line) > LONGEST_LINE for line in module.text.splitlines())
    return counts


def measure(modules: list[Module]) -> dict[str, float]:
    """Compute the measures for a room or a package, by name."""
    total: Counter[str] = Counter()
    for module in modules:
        total.update(counts_of(module))
    statements = max(1, total["statements"])
    lengths = functions(modules)
    longest = 0
    if lengths:
        longest, _ = lengths[-1]
    return {
        "statements": total["statements"],
        "dense": total["dense"] / statements,
        "pairs": 1000 * total["pairs"] / statements,
        "nested": 1000 * total["nested"] / statements,
        "wide": total["wide"],
        "vague": 1000 * total["vague"] / statements,
        "longest": longest,
        **prose_shares(modules),
    }


# Words in docstrings and comments.


@cache
def prose_of(module: Module) -> str:
    """Return the docstrings and comments of a file in lower case, without examples."""
    texts = [EXAMPLE.sub("", text) for _, text in documentation(module.tree)]
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            texts.append(token.string)
    return " ".join(texts).lower()


def prose_shares(modules: list[Module]) -> dict[str, float]:
    """Return how often pronouns, relative words, "of" and semicolons stand in 1,000 words."""
    words: list[str] = []
    n_semicolons = 0
    for module in modules:
        prose = prose_of(module)
        words += re.findall(r"[a-z']+", prose)
        n_semicolons += prose.count(";")
    n_words = max(1, len(words))
    return {
        "pronouns": 1000 * sum(word in PRONOUNS for word in words) / n_words,
        "relatives": 1000 * sum(word in RELATIVES for word in words) / n_words,
        "of": 1000 * words.count("of") / n_words,
        "semicolons": 1000 * n_semicolons / n_words,
    }


def lines_of(node: ast.stmt) -> range:
    """Return a statement's line numbers."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def documentation(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yield the statements with a string alone, and the text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node, node.value.value


@cache
def example_lines(tree: ast.AST) -> int:
    """Count the lines used for examples in a file's documentation."""
    lines = 0
    for _, text in documentation(tree):
        rest = EXAMPLE.sub("", text)
        lines_left = 0
        if "\n" in rest.strip():  # else the closing quotes need no separate line
            lines_left = rest.count("\n")
        lines += text.count("\n") - lines_left
    return lines


def functions(modules: list[Module]) -> list[tuple[int, str]]:
    """List each function's length in lines, place and name, shortest first."""
    lengths = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, FUNCTION):
                length = len(lines_of(node)) - example_lines(node)
                lengths.append((length, f"{module.path}:{node.lineno} {node.name}"))
    return sorted(lengths)


# Imports.


@cache
def imports_of(module: Module) -> list[Import]:
    """List every import, also in functions."""
    package = module.name
    if not module.is_package:
        package = module.name.rpartition(".")[0]
    imports = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.append(Import(node.lineno, alias.name, ""))
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                imports.append(Import(node.lineno, source, alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    imports.append(Import(node.lineno, argument.value, ""))
    return imports


def import_graph(modules: list[Module]) -> tuple[dict[str, set[str]], list[str]]:
    """Map each module to the imported modules. Also list imports of the facade from inside."""
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    from_inside = []
    for module in modules:
        if module.name == CORE:
            continue
        targets = graph.setdefault(module.name, set())
        for line, source, name in imports_of(module):
            target = source
            if f"{source}.{name}" in names:
                target = f"{source}.{name}"
            if target == CORE and module.package == CORE:
                from_inside.append(f"{module.path}:{line} takes {name or 'the package'}")
            elif target in names and target != CORE:
                targets.add(target)
    return graph, from_inside


def reached_from(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Return all modules reached by imports from ``start``."""
    reached: set[str] = set()
    modules_to_visit = [start]
    while modules_to_visit:
        new_modules = graph[modules_to_visit.pop()] - reached
        reached |= new_modules
        modules_to_visit += new_modules
    return reached


def import_circles(graph: dict[str, set[str]]) -> list[str]:
    """Return a text line for each set of modules that all reach one another."""
    reached = {start: reached_from(start, graph) for start in graph}
    sets = set()
    for start in graph:
        circle = {target for target in reached[start] if start in reached[target]}
        if len(circle) > 1:
            names = ", ".join(sorted(circle))
            sets.add(names)
    return sorted(sets)


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """Find the longest chain in which each module imports the next. No circle is allowed."""
    chains: dict[str, list[str]] = {}

    def chain_from(module: str) -> list[str]:
        if module not in chains:
            longest: list[str] = []
            for target in sorted(graph[module]):
                chain = chain_from(target)
                if len(chain) > len(longest):
                    longest = chain
            chains[module] = [module, *longest]
        return chains[module]

    return max((chain_from(module) for module in sorted(graph)), key=len)


def imports_upwards(modules: list[Module]) -> list[str]:
    """List imports in vilu against ``MAY_IMPORT``."""
    rooms = {module.room for module in modules if module.package == CORE} - {"__init__"}
    upwards = [f"{room} is not on the map" for room in sorted(rooms - MAY_IMPORT.keys())]
    for module in modules:
        if module.package != CORE or module.room not in MAY_IMPORT:
            continue
        allowed = MAY_IMPORT[module.room]
        for line, source, name in imports_of(module):
            imported_name = f"{source}.{name}".rstrip(".")
            package, *path = imported_name.split(".")
            if package in PACKAGES and package != CORE:
                upwards.append(f"{module.path}:{line} imports {package}")
            if package != CORE or not path or path[0] not in rooms:
                continue
            room = path[0]
            if allowed is not None and room not in allowed | {module.room}:
                upwards.append(f"{module.path}:{line} imports {room}")
    return upwards


# Classes.


def repeated_class_names(modules: list[Module]) -> list[str]:
    """List class names defined in two or more files, with the places."""
    definitions: dict[str, dict[str, int]] = defaultdict(dict)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                definitions[node.name][module.path] = node.lineno
    doubles = []
    for name in sorted(definitions):
        lines = definitions[name]
        if len(lines) > 1:
            places = ", ".join(f"{path}:{lines[path]}" for path in lines)
            doubles.append(f"{name}: {places}")
    return doubles


def ancestries() -> list[tuple[int, str]]:
    """Count and name our classes in each method's MRO, fewest first."""
    sys.path.insert(0, str(SOURCE))
    import vilu

    package = SOURCE / CORE
    if Path(vilu.__file__ or "").parent != package:
        sys.exit(f"vilu was imported from {vilu.__file__}, and the files measured are in {package}")
    n_bases_and_names = []
    for name, method in vilu.PREDICTORS.items():
        own_bases = []
        for base in method.__mro__:
            if base.__module__.partition(".")[0] == CORE:
                own_bases.append(base.__name__)
        base_names = ", ".join(own_bases)
        n_bases_and_names.append((len(own_bases), f"{name}: {base_names}"))
    return sorted(n_bases_and_names)


# Printed tables.


def code_lines(module: Module) -> set[int]:
    """Return the line numbers of a module's code."""
    lines = module.text.split("\n")
    numbers: set[int] = set()
    source = io.StringIO(module.text)
    for token in tokenize.generate_tokens(source.readline):
        if token.type not in LAYOUT_TOKENS:
            numbers.update(range(token.start[0], token.end[0] + 1))
    for statement, _ in documentation(module.tree):
        documentation_lines = lines_of(statement)
        numbers.difference_update(documentation_lines)
    return {number for number in numbers if lines[number - 1].strip()}


def import_lines(module: Module) -> set[int]:
    """Return the line numbers of a module's import statements."""
    numbers: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines_of_import = lines_of(node)
            numbers.update(lines_of_import)
    return numbers


def size_texts(modules: list[Module]) -> list[str]:
    """Describe a package's sizes, in words."""
    lines = sum(module.text.count("\n") - example_lines(module.tree) for module in modules)
    code = sum(len(code_lines(module)) for module in modules)
    imports = sum(len(import_lines(module)) for module in modules)
    folders = {Path(module.path).parts[1] for module in modules if module.path.count("/") > 1}
    graph, _ = import_graph(modules)
    n_imports = sum(len(targets) for targets in graph.values())
    return [
        f"{len(modules):,} files in {len(folders)} rooms",
        f"{lines:,} lines, {code:,} of code, {imports:,} of imports ({100 * imports / code:.1f} %)",
        f"{n_imports:,} imports between its modules",
    ]


def rooms_and_packages(modules: list[Module]) -> Iterator[tuple[str, list[Module]]]:
    """Yield the rooms and packages in table order, with the modules."""
    for package in PACKAGES:
        inside = [module for module in modules if module.package == package]
        for room in sorted({module.measured_with for module in inside}):
            yield room, [module for module in inside if module.measured_with == room]
        yield package, inside


def judge_rooms(modules: list[Module]) -> tuple[list[str], list[str]]:
    """Return the table lines, and the rooms and packages that miss a bar."""
    lines = [f"{'':28}{'statements':>11}" + "".join(f"{name:>10}" for name in ROOM_BARS)]
    missing = []
    rows = dict(rooms_and_packages(modules))
    unknown = NOT_YET.keys() - rows.keys()
    if unknown:
        unknown_names = ", ".join(sorted(unknown))
        sys.exit(f"NOT_YET names what is no room: {unknown_names}")
    for room, files in rows.items():
        figures = measure(files)
        bars = PACKAGE_BARS if room in PACKAGES else ROOM_BARS
        missed_bars = [name for name, limit in bars.items() if figures[name] > limit]
        line = f"{room:28}{figures['statements']:>11,}"
        for name in bars:
            line += f"{format_value(figures[name], name):>10}"
        if missed_bars and room in NOT_YET:
            line += f"   not yet: {', '.join(missed_bars)} ({NOT_YET[room]})"
        elif missed_bars:
            line += f"   NO: {', '.join(missed_bars)}"
            missing.append(room)
        elif room in NOT_YET:
            line += "   reaches all: it need not stand in NOT_YET"
        lines.append(line)
    lines += ["", bars_line("of a room", ROOM_BARS), bars_line("of a package", PACKAGE_BARS)]
    return lines, missing


def format_value(value: float, name: str) -> str:
    """Format a value with the column's number of decimals."""
    decimals = {"dense": 3, "pairs": 1, "vague": 1, "pronouns": 1, "relatives": 1}.get(name, 0)
    return f"{value:,.{decimals}f}"


def bars_line(group: str, bars: dict[str, float]) -> str:
    """Format a line with the column limits."""
    limits = [f"{limit:>10}" for limit in bars.values()]
    return f"{'at most, ' + group:39}" + "".join(limits)


def judge_bars(modules: list[Module]) -> tuple[list[str], list[str]]:
    """Return the lines on both packages together, and the missed bars."""
    graph, from_inside = import_graph(modules)
    ancestries_by_depth = ancestries()
    lengths = functions(modules)
    deepest, _ = ancestries_by_depth[-1]
    percentile, _ = lengths[math.ceil(0.95 * len(lengths)) - 1]
    lists = {
        "import circles": import_circles(graph),
        "imports upwards": imports_upwards(modules),
        "imports of the facade from inside": from_inside,
        "class names that mean two things": repeated_class_names(modules),
    }
    bars = [Bar(title, len(items), 0) for title, items in lists.items()]
    bars.append(Bar("our classes in the deepest MRO of a method", deepest, 4))
    if not lists["import circles"]:
        core = [module for module in modules if module.package == CORE]
        graph, _ = import_graph(core)
        bars.append(Bar("modules in the longest chain of imports", len(longest_chain(graph)), 20))
    bars.append(Bar("lines of a function, 95th percentile", percentile, 30))
    lines = [f"{'of both packages':<44}{'value':>10}{'at most':>10}"]
    missing = []
    for bar in bars:
        line = f"{bar.quantity:<44}{bar.value:>10}{bar.limit:>10}"
        if bar.value > bar.limit:
            line += "   NO"
            missing.append(bar.quantity)
        lines.append(line)
    lists["methods with the deepest MRO"] = [
        text for depth, text in ancestries_by_depth if depth == deepest
    ]
    lists["longest functions"] = [f"{name}, {length} lines" for length, name in lengths[-3:]]
    for title, items in lists.items():
        if items:
            lines += ["", f"{title}:", *(f"  {item}" for item in items)]
    return lines, missing


def main() -> int:
    """Measure both packages, print the tables, and return the exit code."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument(
        "--report",
        action="store_true",
        help="only print: the exit code is 0 with a bar missed, too",
    )
    is_report = parser.parse_args().report
    modules = []
    for package in PACKAGES:
        files = read_package(package)
        modules += files
        sizes = size_texts(files)
        print(f"{package}: {'; '.join(sizes)}")
    rows, rooms_missing = judge_rooms(modules)
    bars, bars_missing = judge_bars(modules)
    missing = rooms_missing + bars_missing
    print("\n".join(["", *rows, "", *bars]))
    if missing:
        print(f"\nA bar is missed by: {', '.join(missing)}.")
    return 1 if missing and not is_report else 0


if __name__ == "__main__":
    sys.exit(main())
