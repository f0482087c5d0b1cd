"""How things from outside of this package become known: in one process by ``register``, in all by what is imported."""

from __future__ import annotations

import importlib
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vilu.errors import StorageError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Added = TypeVar("Added")

ADDERS: dict[str, Callable[[object], bool]] = {}
"""Kind -> what adds a thing of it and says so; False where it is of another kind. Each room puts its own here."""

SECTIONS = {"datasets": "vilu.datasets.known", "backbones": "vilu.backbones.catalog"}
"""Section of a TOML file -> the module whose ``add_tables`` takes its tables."""

PLUGINS = "VILU_PLUGINS"
"""Environment variable: modules that ``load_plugin`` has imported, separated by commas; child processes inherit it."""


def register(thing: Added) -> Added:
    """Make a thing known by its name in this process: it is listed, used, evaluated and benchmarked as ours are.

    As a decorator it gives its argument back. For all processes (commands, workers) ``--plugin MODULE`` imports the
    module that calls this, or, for a method, an entry point of the group "vilu.predictors" names the class.

    Args:
        thing: A subclass of ``FailurePredictor``; a ``vilu.metrics.catalog.Metric`` with a name; a
            ``vilu.datasets.known.KnownDataset``; or the path of a TOML file with tables [datasets.NAME] and
            [backbones.NAME], whose keys are those of ``assets/datasets.toml`` and ``assets/backbones.toml``.

    Raises:
        UsageError: If it is nothing that can be registered, lacks something, or its name is taken.

    Examples:
        >>> import vilu
        >>> metric = vilu.metrics.Metric("Wrong", lambda c: c.n_wrong / c.n, "share of wrong answers", name="wrong")
        >>> _ = vilu.register(metric)
        >>> vilu.evaluate(vilu.Outcomes([1, 2, 3, 4] * 30, [0, 0, 0, 1] * 30), metrics=["wrong"]).value("wrong")
        0.25
        >>> del vilu.metrics.METRICS["wrong"]  # as it was
    """
    if isinstance(thing, str | os.PathLike) and Path(thing).suffix == ".toml":
        _register_file(Path(thing))
    elif not any(adder(thing) for adder in ADDERS.values()):
        kinds = ", or ".join(["the path of a TOML file", *ADDERS])
        raise UsageError(f"register takes {kinds}. Got {thing!r} instead.")
    return thing


def _register_file(path: Path) -> None:
    sections = toml_tables(path)
    unknown = next((name for name in sections if name not in SECTIONS), None)
    if unknown is not None:
        known = ", ".join(f"[{name}.NAME]" for name in SECTIONS)
        raise UsageError(f"{path} has a section [{unknown}]; there are {known}.")
    for name, tables in sections.items():
        importlib.import_module(SECTIONS[name]).add_tables(tables)


def toml_tables(source: Path | str) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file, or of TOML text, by name."""
    try:
        tables = tomllib.loads(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except PermissionError as error:
        raise StorageError(f"cannot read {source}: {error.strerror}.") from error
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{source if isinstance(source, Path) else 'the text'} is not TOML: {error}.") from error
    bare = next((name for name, table in tables.items() if not isinstance(table, dict)), None)
    if bare is not None:
        raise UsageError(f"{bare!r} stands outside a table. Write [NAME], and what there is to say of it below.")
    return tables


def entry_points(group: str) -> dict[str, EntryPoint]:
    """What other distributions bring (name = "module:Class"), by name, none of it imported."""
    from importlib import metadata  # late: `vilu --help` does without

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
