"""What ends up on a user's machine: no pickle in our formats, no network unless asked for."""

from __future__ import annotations

import ast
import socket
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
UNPICKLERS = {
    "vilu_bench/known_datasets/cifar.py": {"pickle", "pickletools"},
    "vilu/predictors/persistence/convert.py": {"pickle"},
    "vilu/backbones/loading.py": {"pickle"},
    "vilu/store/executors/local.py": {"pickle"},
}
"""Who may open pickles: the first two with a list of what may be built, the third names torch's
error for one, and the fourth talks to the worker processes that it has started.
"""
CODE = {
    "pickle",
    "pickletools",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
}
SHELLS = {"subprocess", "pty", "commands", "popen2"}


def imports(tree: ast.AST) -> set[str]:
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    return {
        name.split(".")[0]
        for name in names
        | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    }


def calls(tree: ast.AST) -> list[tuple[str, dict[str, object]]]:
    """Calls of ``module.function`` with their constant arguments by name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {
                one.arg: one.value.value
                for one in node.keywords
                if one.arg and isinstance(one.value, ast.Constant)
            }
            found.append((ast.unparse(node.func), given))
    return found


def test_no_format_of_ours_can_hold_code() -> None:
    for path in SOURCE.rglob("*.py"):
        name, tree = path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text())
        assert imports(tree) & CODE <= UNPICKLERS.get(name, set()), name
        assert not imports(tree) & SHELLS, name
        for function, given in calls(tree):
            assert function not in {"torch.save", "eval", "exec", "os.system", "os.popen"}, (
                name,
                function,
            )
            if function == "torch.load":
                assert given.get("weights_only") is True, name
            if function in {"np.load", "np.save"}:
                assert given.get("allow_pickle") is False, name


def test_the_guard_of_the_tests_sees_the_network() -> None:
    """It watches every test of these processes;

    `make test-offline` runs the whole demo where there is no network.
    """
    with pytest.raises(ConnectionRefusedError, match="network"), socket.socket() as connection:
        connection.connect(("203.0.113.1", 80))  # of the block that is for examples
    with pytest.raises(ConnectionRefusedError, match="network"):
        socket.getaddrinfo("example.org", 80)
