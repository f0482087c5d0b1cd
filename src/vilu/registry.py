"""Registration of methods, metrics, data sets and backbones from outside of this package.

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
"""Maps the description of a kind of objects to the function for registering such an object.

The function returns False if the object is of another kind. Every subpackage with a catalogue adds
a function here.
"""

FUNCTION_OF_SECTION = {"backbones": "vilu.backbones.catalog:add_tables"}
"""Maps a section of TOML files to "module:function", the function that registers the tables.

Entry points of the group ``SECTION_GROUP`` add further sections.
"""

SECTION_GROUP = "vilu.sections"
"""Group of entry points NAME = "module:function", each for the section [NAME.…] of TOML files."""

MAX_TOML_BYTES = 2**22
"""Maximum size of a TOML file in bytes."""
PLUGINS_VARIABLE = "VILU_PLUGINS"
"""Environment variable with comma-separated names of modules to import in every process."""

IMPORTED_PLUGINS: list[str] = []
"""Names of the modules imported by ``load_plugin`` in this process."""


def register(thing: Added) -> Added:
    """Register a method, metric, data set or backbone by its name in this process.

    Afterwards the object can be listed, used, evaluated and benchmarked like the objects of vilu.
    ``register`` returns the argument, so ``register`` can be a decorator. There are two ways to
    register an object in all processes (commands and workers):

    - Pass ``--plugin MODULE`` to import a module with a call of this function.
    - Install a distribution with an entry point. The name of the entry point is the name of the
      object. The groups are "vilu.predictors", "vilu.metrics", "vilu.datasets", "vilu.layouts",
      "vilu.backbones" and "vilu.commands".

    Args:
        thing: Any of the following: a subclass of ``FailurePredictor``; a
            ``vilu.metrics.catalog.Metric`` with a name; a ``vilu.datasets.known.KnownDataset``; a
            ``BackboneKind`` or ``NamedBackbone`` of ``vilu.backbones.catalog``; the path of a TOML
            file with tables [datasets.NAME] and [backbones.NAME]. The tables have the keys of
            ``assets/datasets.toml`` and ``assets/backbones.toml``.

    Raises:
        UsageError: If the object cannot be registered, if a part of the object is missing, or if
            the name is already in use.

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
    elif not any(register_if_kind(thing) for register_if_kind in REGISTER_FUNCTIONS.values()):
        kinds = ", or ".join(["the path of a TOML file", *REGISTER_FUNCTIONS])
        raise UsageError(f"register takes {kinds}. Got {thing!r} instead.")
    return thing


def _register_file(path: Path) -> None:
    """Register the tables of a TOML file."""
    tables_by_section = toml_tables(path)
    function_of_section = dict(FUNCTION_OF_SECTION)
    for entry in entry_points(SECTION_GROUP):
        function_of_section[entry.name] = entry.value
    for section in tables_by_section:
        if section not in function_of_section:
            refuse_name_of_bench(SECTION_GROUP, section)
            known_sections = ", ".join(
                f"[{name}.NAME]" for name in sorted(function_of_section, reverse=True)
            )
            raise UsageError(f"{path} has a section [{section}]; there are {known_sections}.")
    for section, tables in tables_by_section.items():
        module, _, name = function_of_section[section].partition(":")
        register_tables = getattr(importlib.import_module(module), name)
        register_tables(tables)


def read_toml_text(path: Path) -> str:
    """Read a TOML file; UsageError for a large file (``MAX_TOML_BYTES``): parsing would be slow."""
    with path.open("rb") as file:
        content = file.read(MAX_TOML_BYTES + 1)
    if len(content) > MAX_TOML_BYTES:
        raise UsageError(
            f"{path} is larger than {MAX_TOML_BYTES:,} bytes. Give a smaller TOML file."
        )
    return content.decode()


def toml_tables(source: Path | str) -> dict[str, dict[str, Any]]:
    """Parse a TOML file (a ``Path``) or TOML text (a ``str``); return tables by name."""
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

    The order is: objects of this package in the order of adding, then registered objects, then
    objects of entry points by name. Earlier lookups do not change the order.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind  # kind of the objects, for messages
        self.group = group  # group of entry points
        self.registered: dict[str, Added] = {}  # objects registered in this process
        # maps the names of objects of this package, imported on first use, to "module:object"
        self.addresses: dict[str, str] = {}
        self._has_imported_all = False
        self._entry_names: list[str] = []  # sorted names of the imported entry points

    def names(self) -> list[str]:
        """All names, without importing any entry point."""
        load_plugins()
        entry_names = sorted(entry.name for entry in self._entries())
        return self._in_order(entry_names)

    def _in_order(self, entry_names: Sequence[str]) -> list[str]:
        """Names of this package, then registered names, then names of entry points."""
        # an entry point is in ``registered``, too, after a lookup
        registered_names = [name for name in self.registered if name not in entry_names]
        return list(dict.fromkeys([*self.addresses, *registered_names, *entry_names]))

    def add_addresses(self, addresses: Mapping[str, str]) -> None:
        """Add objects of this package without importing them.

        ``addresses`` maps the name of an object to "module:object".
        """
        self.addresses.update(addresses)

    def __getitem__(self, name: str) -> Added:
        if name not in self.registered and name in self.addresses:
            self._import_object(name)
        if name not in self.registered:
            load_plugins()
        if name not in self.registered:
            entry = next((entry for entry in self._entries() if entry.name == name), None)
            if entry is not None:
                self._import_entry(entry)
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
        return iter([name for name in self._in_order(self._entry_names) if name in self.registered])

    def _import_all(self) -> None:
        """Import all objects of the catalogue."""
        for name in self.addresses:
            if name not in self.registered:
                self._import_object(name)
        reasons = []
        for entry in self._entries():
            try:
                self._import_entry(entry)
            except ViLUError as error:
                reasons.append(str(error))
        for reason in dict.fromkeys(reasons):
            logger.warning("left out: %s", reason)
        self._entry_names = sorted(entry.name for entry in self._entries())

    def _import_object(self, name: str) -> None:
        """Import an object of this package, and register it."""
        module, _, attribute = self.addresses[name].partition(":")
        imported_module = importlib.import_module(module)
        register(getattr(imported_module, attribute))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _entries(self) -> list[EntryPoint]:
        return entry_points(self.group)

    def _import_entry(self, entry: EntryPoint) -> None:
        """Import the object of an entry point, and register it."""
        imported_object = register_entry(entry, self.kind)
        # If the entry point is the path of a TOML file, the object with this name was made from a
        # table of the file. So this object cannot equal ``imported_object``.
        is_file = isinstance(imported_object, str | os.PathLike)
        object_of_name = self.registered.get(entry.name)
        is_same = is_file or object_of_name == imported_object
        if object_of_name is None or not is_same:
            described_entry = _entry_in_words(entry, self.kind)
            raise UsageError(f"{described_entry} has another name than its entry point.")


def entry_points(group: str) -> list[EntryPoint]:
    """The entry points of a group, from all distributions of this environment."""
    from importlib import metadata  # imported here to keep `import vilu` fast

    return list(metadata.entry_points(group=group))


@cache
def names_of_bench() -> dict[str, list[str]]:
    """Map each group of entry points to the names added by vilu-bench, installed or not."""
    package = resources.files("vilu")
    file = package.joinpath("assets", "bench.toml")
    text = file.read_text(encoding="utf-8")
    return tomllib.loads(text)


def refuse_name_of_bench(group: str, name: str) -> None:
    """Raise MissingModelError if only vilu-bench adds a name to a group of entry points.

    This function is called for a name missing in all installed packages.
    """
    if name in names_of_bench().get(group, ()):
        raise MissingModelError(
            f"{name!r} is part of vilu-bench, which is not installed. This needs: "
            "pip install 'vilu[bench]'."
        )


def load_entry(entry: EntryPoint, kind: str) -> Any:  # noqa: ANN401 - any object
    """Import the object of an entry point; ``kind`` is the kind of the object, for messages.

    Raises:
        UsageError: If the object cannot be imported. The message names a missing package.
    """
    try:
        return entry.load()
    # The import runs code of another package, and may raise any exception. The new error names the
    # distribution of this package.
    except Exception as error:
        raise _import_error(entry, kind, error) from error


def register_entry(entry: EntryPoint, kind: str) -> Any:  # noqa: ANN401 - any object
    """Import the object of an entry point and register it; UsageError if this is impossible."""
    imported_object = load_entry(entry, kind)
    try:
        return register(imported_object)
    except UsageError as error:
        raise _import_error(entry, kind, error) from error


def _import_error(entry: EntryPoint, kind: str, error: Exception) -> UsageError:
    """The error for an entry point that cannot be imported; names a missing package."""
    message = f"{_entry_in_words(entry, kind)} cannot be imported: {type(error).__name__}: {error}"
    package, *_ = re.split("[.:]", entry.value)  # the value is "package.module:object"
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        message = f"{message}. Install {package.replace('_', '-')}."
    return UsageError(message)


def _entry_in_words(entry: EntryPoint, kind: str) -> str:
    """Text with the name, the distribution and the value of an entry point."""
    distribution = entry.dist.name if entry.dist else "?"
    return f"the {kind} {entry.name!r} of {distribution} ({entry.value})"


def load_plugin(module: str) -> None:
    """Import a module that calls ``register``.

    Worker processes of this process import the module, too.

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
    # The import runs code of other people, and may raise any exception. A new error repeats the
    # exception in a sentence with the name of the plugin.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"the plugin {module!r} failed at its import: {reason:.300}.") from error
    if module not in IMPORTED_PLUGINS:
        IMPORTED_PLUGINS.append(module)


def load_plugins() -> None:
    """Import all plugins of this process, unless imported already."""
    for module in plugins():
        load_plugin(module)


def plugins() -> list[str]:
    """Names of the plugins of this process, from ``VILU_PLUGINS`` and from ``load_plugin``."""
    joined_names = os.environ.get(PLUGINS_VARIABLE, "")
    modules_of_user = [name for name in joined_names.split(",") if name]
    return list(dict.fromkeys([*modules_of_user, *IMPORTED_PLUGINS]))


METHODS = Catalogue[Any]("method", "vilu.predictors")
"""All methods by name, for modules that must not import the methods.

``vilu.predictors.contract.catalogue.PREDICTORS`` is the same catalogue, with types.
"""

METHODS_OF_TABLES = {
    "answer_scores": "vilu.tables.methods:AnswerScores",
    "answer_probe": "vilu.tables.methods:AnswerProbe",
    "answer_score": "vilu.tables.methods:AnswerScore",
}
"""Maps each method for scoring tables of answers (not embeddings) to "module:class"."""
