"""What can be named: methods, and what other kinds add; of this package, and from outside of it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.predictors.base import FailurePredictor

Added = TypeVar("Added")

PREDICTORS: dict[str, type[FailurePredictor]] = {}
"""Every method by its name; ``vilu.predictors`` fills it."""

ADDERS: dict[str, Callable[[object], bool]] = {}
"""Kind -> what adds a thing of this kind and says so; False where the thing is of another kind."""

KINDS = "a subclass of vilu.FailurePredictor"

GROUP = "vilu.predictors"
"""Entry points of methods that other distributions bring: name = "module:Class"."""

PLUGINS = "VILU_PLUGINS"
"""Environment variable: modules that ``load_plugin`` has imported, separated by commas; child processes inherit it."""


def register(thing: Added) -> Added:
    """Make a method known by its name in this process: it is listed, fitted, saved and benchmarked as ours are.

    As a decorator it gives its argument back. For all processes (commands, workers) an entry point of the group
    "vilu.predictors" names the class, or ``--plugin MODULE`` imports the module that calls this.

    Args:
        thing: A subclass of ``FailurePredictor``.

    Raises:
        UsageError: If it is nothing that can be registered, lacks something, or its name is taken.
    """
    if not any(adder(thing) for adder in ADDERS.values()):
        raise UsageError(f"register takes {' or '.join(ADDERS) or KINDS}. Got {thing!r} instead.")
    return thing


def unregister(name: str) -> None:
    """Forget a method; the inverse of ``register``."""
    PREDICTORS.pop(name, None)


def add_predictor(cls: type[FailurePredictor]) -> None:
    """Put a method into ``PREDICTORS``; refuses one that could not be listed, built or saved."""
    where = f"{cls.__module__}.{cls.__qualname__}"
    missing = [key for key in ("name", "summary", "reference") if not getattr(cls, key, None)]
    if missing:
        raise UsageError(f"the method {where} has no {' and no '.join(missing)}. Set it as a class attribute.")
    if PREDICTORS.get(cls.name, cls) is not cls:
        raise UsageError(f"there is a method {cls.name!r} already, {PREDICTORS[cls.name].__name__}. Rename {where}.")
    if "__dataclass_params__" not in vars(cls):
        raise UsageError(f"the method {where} must be a dataclass, so that its parameters are known. Decorate it.")
    if inspect.isabstract(cls):
        raise UsageError(f"the method {where} lacks {', '.join(sorted(cls.__abstractmethods__))}. Define it.")
    without = [f.name for f in dataclasses.fields(cls) if f.init and f.default is f.default_factory]
    if without:
        raise UsageError(f"the method {where} needs a default for {', '.join(without)}: `vilu fit` gives none.")
    PREDICTORS[cls.name] = cls


def entry_points() -> dict[str, metadata.EntryPoint]:
    """Methods of other distributions by name, none of them imported."""
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def method_names() -> list[str]:
    """Of all methods that are known without an import: ours, the registered ones, and those of entry points."""
    return list(dict.fromkeys([*PREDICTORS, *entry_points()]))


def find_method(name: str) -> type[FailurePredictor]:
    """The class of a method; one of an entry point is imported now.

    Raises:
        UsageError: If there is none of this name; the nearest is named.
    """
    if name in PREDICTORS:
        return PREDICTORS[name]
    known = method_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no method {name!r}; known are {', '.join(known)}.{hint}")
    entry = entry_points()[name]
    try:
        found = register(entry.load())
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the method {name!r} ({entry.value}) cannot be imported: {error}.") from error
    if PREDICTORS.get(name) is not found:
        raise UsageError(f"the entry point {name!r} leads to {entry.value}, which has another name.")
    return PREDICTORS[name]


def load_plugin(module: str) -> None:
    """Import a module that registers something, in this process and in those that it starts.

    Raises:
        UsageError: If it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"the plugin {module!r} cannot be imported: {error}.") from error
    modules = plugins()
    os.environ[PLUGINS] = ",".join(dict.fromkeys([*modules, module]))


def load_plugins() -> None:
    """Import what ``VILU_PLUGINS`` names."""
    for module in plugins():
        load_plugin(module)


def plugins() -> list[str]:
    """The modules of ``VILU_PLUGINS``."""
    return [module for module in os.environ.get(PLUGINS, "").split(",") if module]
