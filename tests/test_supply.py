"""Test that no format of ours can hold code, and that the network is used only on request."""

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
"""Modules that may use pickle.

The first two have a list of what may be built. The third names torch's error for a pickle. The
fourth talks to the worker processes that it has started.
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
    """Return the calls with their constant arguments by name."""
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
    """The guard watches every test in these processes.

    `make test-offline` runs the whole demo without a network.
    """
    with pytest.raises(ConnectionRefusedError, match="network"), socket.socket() as connection:
        connection.connect(("203.0.113.1", 80))  # an address reserved for examples
    with pytest.raises(ConnectionRefusedError, match="network"):
        socket.getaddrinfo("example.org", 80)
