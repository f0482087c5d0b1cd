"""How methods, metrics, data sets and backbones from outside of this package become known.

``register`` makes them known in one process, an entry point or a plugin in all of them.
"""

from __future__ import annotations

import importlib
import logging
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vilu.errors import StorageError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Added = TypeVar("Added")

logger = logging.getLogger(__name__)

ADDERS: dict[str, Callable[[object], bool]] = {}
"""Kind -> what adds a thing of it and says so;

False where it is of another kind. Each room puts its own here.
"""

SECTIONS = {"backbones": "vilu.backbones.catalog:add_tables"}
"""Section of a TOML file -> the function that takes its tables; others come by entry points."""

SECTION_GROUP = "vilu.sections"
"""Entry points of other distributions: NAME = "module:function" of a section [NAME.…]."""

PLUGINS = "VILU_PLUGINS"
"""Environment variable of a user: modules that every process imports, with commas between."""

IMPORTED: list[str] = []
"""Plugins that ``load_plugin`` has imported in this process."""


def register(thing: Added) -> Added:
    """Make a thing known by its name in this process.

    It is listed, used, evaluated and benchmarked as ours are. As a decorator it gives its argument
    back. For all processes (commands, workers) ``--plugin MODULE`` imports the module that calls
    this, or an entry point of a distribution, named as the thing, leads to it; the groups are
    "vilu.predictors", "vilu.metrics", "vilu.datasets", "vilu.layouts", "vilu.backbones" and
    "vilu.commands".

    Args:
        thing: A subclass of ``FailurePredictor``; a ``vilu.metrics.catalog.Metric`` with a name; a
            ``vilu.datasets.known.KnownDataset``; a ``BackboneKind`` or ``NamedBackbone`` of
            ``vilu.backbones.catalog``; or the path of a TOML file with tables [datasets.NAME] and
            [backbones.NAME], whose keys are those of ``assets/datasets.toml`` and
            ``assets/backbones.toml``.

    Raises:
        UsageError: If it is nothing that can be registered, lacks something, or its name is taken.

    Examples:
        >>> import vilu
        >>> metric = vilu.metrics.Metric(
        ...     "Wrong", lambda c: c.n_wrong / c.n, "share of wrong answers", name="wrong"
        ... )
        >>> _ = vilu.register(metric)
        >>> vilu.evaluate(
        ...     vilu.Outcomes([1, 2, 3, 4] * 30, [0, 0, 0, 1] * 30), metrics=["wrong"]
        ... ).value("wrong")
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
    tables_by_section = toml_tables(path)
    takers = dict(SECTIONS)
    for entry in entry_points(SECTION_GROUP):
        takers[entry.name] = entry.value
    for name in tables_by_section:
        if name not in takers:
            known = ", ".join(f"[{section}.NAME]" for section in sorted(takers, reverse=True))
            raise UsageError(f"{path} has a section [{name}]; there are {known}.")
    for name, tables in tables_by_section.items():
        module, _, function = takers[name].partition(":")
        getattr(importlib.import_module(module), function)(tables)


def toml_tables(source: Path | str) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file, or of TOML text, by name."""
    try:
        tables = tomllib.loads(
            source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        )
    except PermissionError as error:
        raise StorageError(f"cannot read {source}: {error.strerror}.") from error
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{source if isinstance(source, Path) else 'the text'} is not TOML: {error}."
        ) from error
    bare = next((name for name, table in tables.items() if not isinstance(table, dict)), None)
    if bare is not None:
        raise UsageError(
            f"{bare!r} stands outside a table. Write [NAME], and what there is to say of it below."
        )
    return tables


class Catalogue(MutableMapping[str, Added]):
    """Things of one kind by name: ours, registered ones, and those of other distributions.

    Other distributions offer theirs by entry points. An entry point is imported when its name is
    asked for, or everything is. Where that fails, who asked for the name is told why by an error,
    and who asked for everything by a warning beside all the others.
    """

    def __init__(self, what: str, group: str) -> None:
        self.what, self.group = what, group
        self.here: dict[str, Added] = {}  # what needs no import
        # name -> "module:object" of ours, imported when asked for
        self.offered: dict[str, str] = {}
        self._all_taken = False

    def names(self) -> list[str]:
        """All of them, without an import of an entry point."""
        load_plugins()
        of_others = [entry.name for entry in self._entries()]
        return list(dict.fromkeys([*self.offered, *self.here, *of_others]))

    def offer(self, places: Mapping[str, str]) -> None:
        """Name things of this package by "module:object", without an import of them."""
        self.offered.update(places)

    def __getitem__(self, name: str) -> Added:
        if name not in self.here and name in self.offered:
            self._take_offered(name)
        if name not in self.here:
            load_plugins()
        if name not in self.here:
            self._take_entry(name)
        return self.here[name]

    def __setitem__(self, name: str, thing: Added) -> None:
        self.here[name] = thing

    def __delitem__(self, name: str) -> None:
        del self.here[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        if not self._all_taken:
            self._all_taken = True
            self._take_all()
        return iter(self.here)

    def _take_all(self) -> None:
        """Import everything.

        Ours come first, in the order of the offer, then what was registered, then others'.
        """
        for name in self.offered:
            if name not in self.here:
                self._take_offered(name)
        in_order = {name: self.here[name] for name in self.offered}
        self.here = in_order | self.here
        reasons = []
        for entry in self._entries():
            try:
                self._take(entry)
            except UsageError as error:
                reasons.append(str(error))
        for reason in dict.fromkeys(reasons):
            logger.warning("left out: %s", reason)

    def _take_offered(self, name: str) -> None:
        module, _, attribute = self.offered[name].partition(":")
        register(getattr(importlib.import_module(module), attribute))

    def _take_entry(self, name: str) -> None:
        for entry in self._entries():
            if entry.name == name:
                self._take(entry)
                return

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _entries(self) -> list[EntryPoint]:
        return entry_points(self.group)

    def _take(self, entry: EntryPoint) -> None:
        """Import what an entry point leads to, and register it."""
        loaded = register_entry(entry, self.what)
        is_file = isinstance(loaded, str | os.PathLike)  # of tables, which have names of their own
        if entry.name not in self.here or not (is_file or self.here[entry.name] == loaded):
            raise UsageError(
                f"{_in_words(entry, self.what)} has another name than its entry point."
            )


def entry_points(group: str) -> list[EntryPoint]:
    """What the distributions of this environment offer for a group."""
    from importlib import metadata  # late: `import vilu` does without

    return list(metadata.entry_points(group=group))


def load_entry(entry: EntryPoint, what: str) -> Any:  # noqa: ANN401 - whatever it leads to
    """What an entry point leads to.

    Raises:
        UsageError: If it cannot be imported; a package that is missing is named.
    """
    try:
        return entry.load()
    # importing runs third-party code, which may raise anything: it is raised again, naming who
    # installed it
    except Exception as error:
        raise _not_imported(entry, what, error) from error


def register_entry(entry: EntryPoint, what: str) -> Any:  # noqa: ANN401 - whatever it leads to
    """Register what an entry point leads to; errors are those of ``load_entry``."""
    loaded = load_entry(entry, what)
    try:
        return register(loaded)
    except UsageError as error:
        raise _not_imported(entry, what, error) from error


def _not_imported(entry: EntryPoint, what: str, error: Exception) -> UsageError:
    message = f"{_in_words(entry, what)} cannot be imported: {type(error).__name__}: {error}"
    package = entry.value.partition(":")[0].partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        message = f"{message}. Install {package.replace('_', '-')}."
    return UsageError(message)


def _in_words(entry: EntryPoint, what: str) -> str:
    distribution = entry.dist.name if entry.dist else "?"
    return f"the {what} {entry.name!r} of {distribution} ({entry.value})"


def load_plugin(module: str) -> None:
    """Import a module that registers something.

    Processes that are started for a job here get ``plugins()`` with it, and import them, too.

    Raises:
        UsageError: If it cannot be imported.
    """
    if not module or module.startswith("."):
        raise UsageError(
            f"a plugin is called by its whole name, such as package.module. Got {module!r} instead."
        )
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"the plugin {module!r} cannot be imported: {error}.") from error
    if module not in IMPORTED:
        IMPORTED.append(module)


def load_plugins() -> None:
    """Import the plugins of this process, where they are not imported yet."""
    for module in plugins():
        load_plugin(module)


def plugins() -> list[str]:
    """The plugins of this process: those of ``VILU_PLUGINS``, and those imported by their names."""
    of_user = [module for module in os.environ.get(PLUGINS, "").split(",") if module]
    return list(dict.fromkeys([*of_user, *IMPORTED]))


METHODS = Catalogue[Any]("method", "vilu.predictors")
"""All methods by their names, for whoever needs the names and must not import the methods.

``vilu.predictors.contract.catalogue.PREDICTORS`` is the same catalogue with its types.
"""
