"""Registration of methods, metrics, data sets and backbones from outside this package.

``register`` adds an object in the current process. An entry point or a plugin adds an object in
every process.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vilu.errors import MissingModelError, StorageError, UsageError, ViLUError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Added = TypeVar("Added")

logger = logging.getLogger(__name__)

REGISTER_FUNCTIONS: dict[str, Callable[[object], bool]] = {}
"""Maps an object kind's description to the function for registering objects of this kind.

For any other object, the function returns False. Every subpackage with a catalogue adds a function
here.
"""

FUNCTION_OF_SECTION = {"backbones": "vilu.backbones.catalog:add_tables"}
"""Maps a section in TOML files to "module:function", which registers the section's tables.

Entry points in the group ``SECTION_GROUP`` add further sections.
"""

SECTION_GROUP = "vilu.sections"
"""Group of entry points NAME = "module:function", each for the section [NAME.…] in TOML files."""

MAX_TOML_BYTES = 2**22
"""A TOML file's maximum size in bytes."""
PLUGINS_VARIABLE = "VILU_PLUGINS"
"""Environment variable with comma-separated names of modules to import in every process."""

IMPORTED_PLUGINS: list[str] = []
"""Names of the modules imported by ``load_plugin`` in this process."""


def register(thing: Added) -> Added:
    """Register a method, metric, data set or backbone by its name in this process.

    Afterwards the object can be listed, used, evaluated and benchmarked like vilu's objects.
    ``register`` returns the argument, so ``register`` can be a decorator. There are two ways to
    register an object in all processes (commands and workers):

    - Pass ``--plugin MODULE`` to import a module with a call of this function.
    - Install a distribution with an entry point. The entry point's name is the object's name. The
      groups are "vilu.predictors", "vilu.metrics", "vilu.datasets", "vilu.layouts",
      "vilu.backbones" and "vilu.commands".

    Args:
        thing: Any of the following: a subclass of ``FailurePredictor``, a
            ``vilu.metrics.catalog.Metric`` with a name, a ``vilu.datasets.known.KnownDataset``, a
            ``BackboneKind`` or ``NamedBackbone`` from ``vilu.backbones.catalog``, or the path to a
            TOML file with tables [datasets.NAME] and [backbones.NAME]. The tables have the keys of
            ``assets/datasets.toml`` and ``assets/backbones.toml``.

    Raises:
        UsageError: If the object cannot be registered, if a part is missing, or if the name is
            already in use.

    Examples:
        >>> import vilu
        >>> def share_of_wrong(counts):
        ...     return counts.n_wrong / counts.n
        >>> metric = vilu.metrics.Metric(
        ...     "Wrong", share_of_wrong, "share of wrong answers", name="wrong"
        ... )
        >>> registered = vilu.register(metric)  # until this process ends
        >>> outcomes = vilu.Outcomes(uncertainty=[1, 2, 3, 4] * 30, failure=[0, 0, 0, 1] * 30)
        >>> vilu.evaluate(outcomes, metrics=["wrong"]).value("wrong")
        0.25
        >>> del vilu.metrics.METRICS["wrong"]
    """
    if isinstance(thing, str | os.PathLike) and Path(thing).suffix == ".toml":
        _register_file(Path(thing))
    elif not _register_object(thing):
        kinds = ", or ".join(["the path of a TOML file", *REGISTER_FUNCTIONS])
        raise UsageError(f"register takes {kinds}. Got {thing!r} instead.")
    return thing


def _register_object(new_object: object) -> bool:
    """Register an object with the function for its kind. Return False if there is no such kind."""
    return any(register_if_kind(new_object) for register_if_kind in REGISTER_FUNCTIONS.values())


def _register_file(path: Path) -> None:
    """Register the tables in a TOML file."""
    tables_by_section = toml_tables(path)
    function_of_section = dict(FUNCTION_OF_SECTION)
    for entry in entry_points(SECTION_GROUP):
        function_of_section[entry.name] = entry.value
    # no table is registered if the name of any section is wrong
    for section in tables_by_section:
        if section not in function_of_section:
            refuse_name_of_bench(SECTION_GROUP, section)
            # in reverse order, [datasets.NAME] comes before [backbones.NAME]
            known_sections = ", ".join(
                f"[{name}.NAME]" for name in sorted(function_of_section, reverse=True)
            )
            raise UsageError(f"{path} has a section [{section}]; there are {known_sections}.")
    for section, tables in tables_by_section.items():
        module, _, name = function_of_section[section].partition(":")
        register_tables = getattr(importlib.import_module(module), name)
        register_tables(tables)


def read_toml_text(path: Path) -> str:
    """Read a TOML file. Raise UsageError for a large file, because parsing would be slow."""
    with path.open("rb") as file:
        content = file.read(MAX_TOML_BYTES + 1)
    if len(content) > MAX_TOML_BYTES:
        raise UsageError(
            f"{path} is larger than {MAX_TOML_BYTES:,} bytes. Give a smaller TOML file."
        )
    return content.decode()


def toml_tables(source: Path | str) -> dict[str, dict[str, Any]]:
    """Parse a TOML file (a ``Path``) or TOML text (a ``str``), and return the tables by name."""
    try:
        text = read_toml_text(source) if isinstance(source, Path) else source
        tables = tomllib.loads(text)
    except PermissionError as error:
        raise StorageError(f"cannot read {source}: {error.strerror}.") from error
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        source_name = source if isinstance(source, Path) else "the text"
        raise UsageError(f"{source_name} is not TOML: {error}.") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(
                f"{name!r} is in no table. Write [NAME], and its keys and values below it."
            )
    return tables


class Catalogue(MutableMapping[str, Added]):
    """Objects of one kind by name, from vilu, from ``register`` and from other distributions.

    Other distributions add objects by entry points. An entry point is imported when the name is
    looked up, or when the catalogue is iterated. If the import fails, a lookup raises an error, but
    an iteration only logs a warning and leaves the entry point out.

    The order is: this package's objects in the order of adding, then registered objects, then
    objects from entry points by name. Earlier lookups do not change the order.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind  # what the objects are, for messages
        self.group = group  # group of entry points
        self.registered: dict[str, Added] = {}  # objects registered in this process
        # maps names of this package's objects, imported on first use, to "module:object"
        self.addresses: dict[str, str] = {}
        self._has_imported_all = False
        self._entry_names: list[str] = []  # the imported entry points' sorted names

    def names(self) -> list[str]:
        """Return all names, without importing any entry point."""
        load_plugins()
        entry_names = sorted(entry.name for entry in self._entries())
        return self._in_order(entry_names)

    def _in_order(self, entry_names: Sequence[str]) -> list[str]:
        """Return this package's names, then registered names, then names of entry points."""
        # after a lookup, an entry point's name is in ``registered``, too
        registered_names = [name for name in self.registered if name not in entry_names]
        return list(dict.fromkeys([*self.addresses, *registered_names, *entry_names]))

    def add_addresses(self, addresses: Mapping[str, str]) -> None:
        """Add objects from this package without importing the objects.

        ``addresses`` maps an object's name to "module:object".
        """
        self.addresses.update(addresses)

    def __getitem__(self, name: str) -> Added:
        if name not in self.registered and name in self.addresses:
            self._import_object(name)
        if name not in self.registered:
            load_plugins()  # a plug-in may register the name
        if name not in self.registered:
            for entry in self._entries():
                if entry.name == name:
                    self._import_entry(entry)
                    break
        return self.registered[name]

    def __setitem__(self, name: str, thing: Added) -> None:
        self.registered[name] = thing

    def __delitem__(self, name: str) -> None:
        del self.registered[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        if not self._has_imported_all:
            self._has_imported_all = True
            self._import_all()
        # entry points that failed to import are not in ``registered``
        return iter([name for name in self._in_order(self._entry_names) if name in self.registered])

    def _import_all(self) -> None:
        """Import all objects in the catalogue."""
        for name in self.addresses:
            if name not in self.registered:
                self._import_object(name)
        reasons = []
        for entry in self._entries():
            try:
                self._import_entry(entry)
            except ViLUError as error:
                reasons.append(str(error))
        for reason in dict.fromkeys(reasons):  # each reason once
            logger.warning("left out: %s", reason)
        self._entry_names = sorted(entry.name for entry in self._entries())

    def _import_object(self, name: str) -> None:
        """Import an object from this package, and register the object."""
        module, _, attribute = self.addresses[name].partition(":")
        imported_module = importlib.import_module(module)
        register(getattr(imported_module, attribute))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _entries(self) -> list[EntryPoint]:
        return entry_points(self.group)

    def _import_entry(self, entry: EntryPoint) -> None:
        """Import an entry point's object, and register the object."""
        imported_object = register_entry(entry, self.kind)
        object_of_name = self.registered.get(entry.name)
        # The entry point may be the path of a TOML file. Then the object with this name was made
        # from a table in the file, and cannot equal ``imported_object``.
        is_file = isinstance(imported_object, str | os.PathLike)
        is_same = is_file or object_of_name == imported_object
        if object_of_name is None or not is_same:
            described_entry = _entry_in_words(entry, self.kind)
            raise UsageError(f"{described_entry} has another name than its entry point.")


def entry_points(group: str) -> list[EntryPoint]:
    """Return a group's entry points, from all distributions in this environment."""
    from importlib import metadata  # imported here to keep `import vilu` fast

    return list(metadata.entry_points(group=group))


@cache
def names_of_bench() -> dict[str, list[str]]:
    """Map each entry point group to the names that vilu-bench adds, installed or not."""
    package = resources.files("vilu")
    file = package.joinpath("assets", "bench.toml")
    text = file.read_text(encoding="utf-8")
    return tomllib.loads(text)


def refuse_name_of_bench(group: str, name: str) -> None:
    """Raise MissingModelError if only vilu-bench adds a name to an entry point group.

    This function is called for a name missing in all installed packages.
    """
    if name in names_of_bench().get(group, ()):
        raise MissingModelError(
            f"{name!r} is part of vilu-bench, which is not installed. This needs: "
            "pip install 'vilu[bench]'."
        )


def load_entry(entry: EntryPoint, kind: str) -> Any:  # noqa: ANN401 - any object
    """Import an entry point's object. ``kind`` says in messages what the object is.

    Raises:
        UsageError: If the object cannot be imported. The message names a missing package.
    """
    try:
        return entry.load()
    # The import runs code from outside vilu, and may raise any exception. The new error names the
    # distribution with this code.
    except Exception as error:
        raise _import_error(entry, kind, error) from error


def register_entry(entry: EntryPoint, kind: str) -> Any:  # noqa: ANN401 - any object
    """Import an entry point's object and register the object. Raise UsageError if this fails."""
    imported_object = load_entry(entry, kind)
    try:
        return register(imported_object)
    except UsageError as error:
        raise _import_error(entry, kind, error) from error


def _import_error(entry: EntryPoint, kind: str, error: Exception) -> UsageError:
    """Make the error for an entry point that cannot be imported. Name a missing package."""
    message = f"{_entry_in_words(entry, kind)} cannot be imported: {type(error).__name__}: {error}"
    package, *_ = re.split("[.:]", entry.value)  # the value is "package.module:object"
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        message = f"{message}. Install {package.replace('_', '-')}."
    return UsageError(message)


def _entry_in_words(entry: EntryPoint, kind: str) -> str:
    """Return a text with an entry point's name, distribution and value."""
    distribution = entry.dist.name if entry.dist else "?"
    return f"the {kind} {entry.name!r} of {distribution} ({entry.value})"


def load_plugin(module: str) -> None:
    """Import a module that calls ``register``.

    This process's workers import the module, too.

    Raises:
        UsageError: If the module cannot be imported, or raises any exception.
    """
    if not module or module.startswith("."):
        raise UsageError(
            f"a plugin is called by its whole name, such as package.module. Got {module!r} instead."
        )
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"the plugin {module!r} cannot be imported: {error}.") from error
    # The import runs code from outside vilu, and may raise any exception. A new error repeats the
    # exception in a sentence with the plugin's name.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise UsageError(f"the plugin {module!r} failed at its import: {reason:.300}.") from error
    if module not in IMPORTED_PLUGINS:
        IMPORTED_PLUGINS.append(module)


def load_plugins() -> None:
    """Import all of this process's plugins, unless imported already."""
    for module in plugins():
        load_plugin(module)


def plugins() -> list[str]:
    """Return the names of this process's plugins, from ``VILU_PLUGINS`` and ``load_plugin``."""
    joined_names = os.environ.get(PLUGINS_VARIABLE, "")
    modules_of_user = [name for name in joined_names.split(",") if name]
    return list(dict.fromkeys([*modules_of_user, *IMPORTED_PLUGINS]))


METHODS = Catalogue[Any]("method", "vilu.predictors")
"""All methods by name, for modules that must not import the methods.

``vilu.predictors.contract.catalogue.PREDICTORS`` is this catalogue, with types.
"""

METHODS_OF_TABLES = {
    "answer_scores": "vilu.tables.methods:AnswerScores",
    "answer_probe": "vilu.tables.methods:AnswerProbe",
    "answer_score": "vilu.tables.methods:AnswerScore",
}
"""Maps each method for scoring answer tables (not embeddings) to "module:class"."""
