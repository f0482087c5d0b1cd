"""How things from outside of this package become known: in one process by ``register``, in all by what is imported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib import metadata
from typing import TypeVar

from vilu.errors import UsageError

Added = TypeVar("Added")

ADDERS: dict[str, Callable[[object], bool]] = {}
"""Kind -> what adds a thing of this kind and says so; False where the thing is of another kind."""

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
        kinds = " or ".join(ADDERS) or "a class derived from one of vilu"
        raise UsageError(f"register takes {kinds}. Got {thing!r} instead.")
    return thing


def entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    """What other distributions bring (name = "module:Class"), by name, none of it imported."""
    return {entry.name: entry for entry in metadata.entry_points(group=group)}


def load_plugin(module: str) -> None:
    """Import a module that registers something, in this process and in those that it starts.

    Raises:
        UsageError: If it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"the plugin {module!r} cannot be imported: {error}.") from error
    os.environ[PLUGINS] = ",".join(dict.fromkeys([*plugins(), module]))


def load_plugins() -> None:
    """Import what ``VILU_PLUGINS`` names."""
    for module in plugins():
        load_plugin(module)


def plugins() -> list[str]:
    """The modules of ``VILU_PLUGINS``."""
    return [module for module in os.environ.get(PLUGINS, "").split(",") if module]
