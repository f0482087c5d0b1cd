"""Compare docs/architecture.md with the code."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import vilu

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "vilu"

HEAVY = {
    "torch",
    "open_clip",
    "timm",
    "transformers",
    "torchvision",
    "matplotlib",
    "pandas",
    "sklearn",
    "pyarrow",
}
LONGEST_NAME = 70
"""The longest test name in characters. A name says the behaviour, and the test has the details."""
FILES = sorted(PACKAGE.rglob("*.py"))
HOUSE = runpy.run_path(str(ROOT / "tools" / "house.py"))
example_lines = HOUSE["example_lines"]


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(tree: ast.AST) -> set[str]:
    """Return the modules in import statements at any depth."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_rooms_import_only_what_the_map_allows() -> None:
    assert HOUSE["imports_upwards"](HOUSE["read_package"]("vilu")) == []


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("from vilu.scoring.score import score", ["scoring"]),
        ("from vilu import scoring", ["scoring"]),
        ("import vilu.scoring.score", ["scoring"]),
        ("from vilu_bench.studies import run", ["vilu_bench"]),
        ("from vilu.text import align_columns", []),
        ("from vilu.store import ledger", []),
    ],
)
def test_an_import_upwards_is_found(statement: str, what: list[str]) -> None:
    scoring = HOUSE["read_module"](PACKAGE / "scoring" / "score.py")
    path = "vilu/store/new.py"
    store = HOUSE["Module"]("vilu", path, "vilu.store.new", statement, ast.parse(statement))
    text = HOUSE["read_module"](PACKAGE / "text.py")
    upwards = HOUSE["imports_upwards"]([scoring, text, store])
    assert [line for line in upwards if line.startswith(path)] == [
        f"{path}:1 imports {room}" for room in what
    ]


def test_what_the_table_of_the_rooms_counts() -> None:
    text = (
        '"""Documentation, and an import, are no statements."""\n'
        "import math\n"
        "found, total = 1, 2\n"
        "small = [x for x in range(9) if x and x > 1]\n"
        "def one(given: int, *rest: int) -> int:\n"
        '    """Text that it ends."""\n'
        "    return given if rest else (lambda some: some)(1)\n"
        "flat = math.exp(len(range(9)))\n"
        "deep = math.exp(math.log(1))\n"
        "chain = open('x').read().split()\n"
        "class Pair:\n"
        "    def joined(self, other: object) -> None: ...\n"
        "    def __exit__(self, *given: object) -> None: ...\n" + "#" * 101 + "\n"
    )
    module = HOUSE["Module"]("vilu", "vilu/x/y.py", "vilu.x.y", text, ast.parse(text))
    # five assignments, three functions, a class, a return, and two bodies with "..."
    statements = 12
    assert HOUSE["measure"]([module]) == {
        "statements": statements,
        "dense": 4 / statements,  # a comprehension, an "and", an "if else", a lambda
        "pairs": 1000 / statements,
        "nested": 2000 / statements,  # deep and chain, while the inner calls in flat are built-ins
        "wide": 1,
        "vague": 4000 / statements,  # found, one, given, some
        "longest": 3,
        "pronouns": 1000 / 11,  # it, among 7 words and 4
        "relatives": 1000 / 11,  # that
        "of": 0,
        "semicolons": 0,
    }


MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROW_OF_A_ROOM = re.compile(r"^\| `(\w+)/` \|.*\| (.*) \|$", re.MULTILINE)
ROW_OF_THE_BENCH = re.compile(r"^\| `(\w+)/` \| [^|]* \|$", re.MULTILINE)


def missing(room: Path, text: str) -> list[str]:
    """Return the modules and folders that a text has in backticks and the room lacks."""
    names = re.findall(r"`([a-z][\w/]*)`", text)
    return [name for name in names if not (room / name).exists() and not is_module(room / name)]


def is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file()


def test_the_map_names_every_room_and_files_that_there_are() -> None:
    rows = ROW_OF_A_ROOM.findall(MAP)
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {room for room, _ in rows} | {"artifacts"} == folders
    for room, opened_first in rows:
        assert missing(PACKAGE / room, opened_first) == [], room
    (beside,) = re.findall(r"^Beside the rooms .*?\n\n(.*?)\n\n", MAP, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", beside)) >= HOUSE["BASE"]


def test_the_map_names_the_rooms_and_files_of_the_bench() -> None:
    bench = ROOT / "src" / "vilu_bench"
    # An installation leaves vilu_bench.egg-info there, and a wheel that is built in place leaves
    # build/.
    folders = {path.name for path in bench.iterdir() if path.is_dir() and path.name.isidentifier()}
    rooms = set(ROW_OF_THE_BENCH.findall(MAP))
    assert rooms == folders - {"assets", "__pycache__", "build"}
    (studies,) = re.findall(r"^\| `studies/` \| (.*)\|$", MAP, re.MULTILINE)
    assert missing(bench / "studies", studies) == []
    files = {path.stem for path in (bench / "studies").glob("*.py")} - {"__init__"}
    assert files - set(re.findall(r"`(\w+)`", studies)) == set()


def test_the_map_names_files_and_functions_that_there_are() -> None:
    (table,) = re.findall(
        r"^\| where \| in `src/vilu` \|\n(.*?)\n\n", MAP, re.MULTILINE | re.DOTALL
    )
    named = re.findall(r"`(\w+/\w+\.py)`(?: \(`([\w.]+)`\))?", table)
    assert len(named) == 7
    for file, name in named:
        assert f"def {name.rpartition('.')[2]}(" in (PACKAGE / file).read_text() or not name


def test_the_core_knows_nothing_of_the_bench() -> None:
    using = []
    for path in FILES:
        modules = imported(ast.parse(path.read_text()))
        if any(module.partition(".")[0] == "vilu_bench" for module in modules):
            using.append(name_of(path))
    assert using == []


def test_model_libraries_stay_in_their_rooms() -> None:
    models = {"open_clip", "timm", "transformers", "torchvision"}
    found = {}
    for path in FILES:
        foreign = {"backbones": {"matplotlib"}, "report": models}.get(
            room_of(path), models | {"matplotlib"}
        )
        used = {m.split(".")[0] for m in imported(ast.parse(path.read_text()))} & foreign
        if used:
            found[name_of(path)] = used
    assert found == {}


@pytest.mark.parametrize(
    ("plain", "example"),
    [
        ('"""One line.{}"""\n', "\n\n    Example:\n        >>> 1 + 1\n        2\n    "),
        (
            '"""One line.\n\n    More.{}\n    """\n',
            "\n\n    Examples:\n        >>> f(1)\n        2",
        ),
        ('"""One line.\n\n    {}Not an example.\n    """\n', "    >>> f(1)\n        2\n\n    "),
    ],
    ids=["alone", "at the end", "in between"],
)
def test_examples_do_not_count_as_lines(plain: str, example: str) -> None:
    without, with_it = (
        f"def f(x):\n    {plain.format(part)}    return x\n" for part in ("", example)
    )
    assert example_lines(ast.parse(without)) == 0
    assert len(with_it.splitlines()) - example_lines(ast.parse(with_it)) == len(
        without.splitlines()
    )


def test_what_users_call_without_an_example_is_found() -> None:
    class Base:
        def one(self) -> None: ...

        def two(self) -> None: ...

        def three(self) -> None: ...

    class Public(Base):
        """Is named.

        >>> Public().two()
        """

        @staticmethod
        def one() -> None:
            """>>> Public.one()"""

        def _own(self) -> None: ...

    Base.__module__ = Public.__module__ = "vilu.toy"
    tool = runpy.run_path(str(ROOT / "tools" / "examples.py"))
    has = {
        Public: True,
        Public.one: True,
        Base.one: True,
        Base.two: True,
        Base.three: False,
        name_of: False,
    }
    assert tool["has_example_by_object"]([Public, name_of, 3]) == has


COMPILER = {"torch._dynamo", "sympy"}
if version("torch").startswith("2.10."):  # imports sympy with its layers, without the compiler
    COMPILER = {"torch._dynamo"}


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import vilu", HEAVY),
        ("import vilu; vilu.metrics.auroc([0.1, 0.9], [0, 1])", HEAVY),
        ("import sys; sys.argv = ['vilu', '--help']; from vilu.cli import main; main()", HEAVY),
        ("import vilu; vilu.ViLU; vilu.EmbeddingStore", HEAVY - {"torch", "pyarrow"}),
        ("import vilu.service.server", HEAVY - {"pyarrow"}),
        (
            "import torch, vilu; space = vilu.EmbeddingSpace(embed_dim=4, logit_scale=1.0)\n"
            "head = vilu.ViLU().module({}, space)\n"
            "vilu.ViLU().take(head.state_dict(), space)",
            COMPILER,  # takes a second and a half
        ),
    ],
)
def test_heavy_libraries_are_imported_late(code: str, heavy: set[str]) -> None:
    check = (
        "import atexit, sys\n"
        f"say = lambda: sys.stderr.write(repr(sorted(set(sys.modules) & {heavy!r})))\n"
        "atexit.register(say)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check + code], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]"


def test_scores_are_evaluated_without_torch(tmp_path: Path) -> None:
    outcomes = vilu.Outcomes(uncertainty=[0.1, 0.9, 0.4, 0.6], failure=[0, 1, 1, 0])
    outcomes.save(tmp_path / "scores.parquet")
    arguments = ["vilu", "evaluate", str(tmp_path / "scores.parquet"), "--resamples", "9"]
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"sys.argv = {arguments!r}\n"
        "from vilu.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


FEW_MODULES = 20


def test_a_score_of_the_logits_loads_few_modules() -> None:
    code = (
        "import sys, vilu\n"
        "data = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.0, 1.0]])\n"
        "vilu.MCM().predict_uncertainty(data)\n"
        "for name, module in sys.modules.items():\n"
        "    if name.startswith('vilu.') and not hasattr(module, '__path__'):\n"
        "        print(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "vilu.predictors.zero_shot" in modules
    assert len(modules) <= FEW_MODULES, modules


@pytest.mark.parametrize("package", [vilu, vilu.metrics], ids=["vilu", "metrics"])
def test_every_public_name_exists(package: ModuleType) -> None:
    assert sorted(package.__all__) == dir(package)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize(
    ("path", "package", "beside"),
    [
        ("__init__.py", vilu, {"methods": "vilu", "metrics": "vilu"}),
        ("metrics/__init__.py", vilu.metrics, {}),
    ],
    ids=["vilu", "metrics"],
)
def test_type_checkers_see_every_public_name(
    path: str, package: ModuleType, beside: dict[str, str]
) -> None:
    statements = ast.parse((PACKAGE / path).read_text()).body
    checked = next(node for node in statements if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert seen == {**package._MODULE_OF_NAME, **beside}


def test_names_of_tests_are_short() -> None:
    long = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and node.name.startswith("test_") and len(node.name) > LONGEST_NAME:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert long == []
