"""All methods by class name: ``from vilu.methods import MCM, ViLUPlus``.

The names come from the catalogue of methods. The catalogue also has all registered methods, and
methods that other distributions add. A class is imported on first use. ``dir(vilu.methods)``
imports no class. If two classes have the same name, vilu's class is taken.

For a type checker every name in this module is ``Any``, because the catalogue is only known at run
time. Classes in ``vilu`` itself, such as ``vilu.MCM``, have types.

Examples:
    >>> import vilu
    >>> from vilu.methods import MCM
    >>> MCM is vilu.MCM
    True
    >>> [name for name in dir(vilu.methods) if name.startswith("Linear")]
    ['LinearProbe', 'LinearProbeCV']
"""

from __future__ import annotations

import importlib
from typing import Any

from vilu.errors import did_you_mean
from vilu.registry import METHODS, METHODS_OF_TABLES, entry_points, load_plugins


def __getattr__(name: str) -> Any:  # noqa: ANN401 - every method has a separate class
    if name.startswith("__"):  # the import system and tools ask for such names
        raise AttributeError(f"module 'vilu.methods' has no attribute {name!r}")
    method_of_class = _methods_by_class()
    if name not in method_of_class:
        raise AttributeError(
            f"there is no method with the class {name!r}.{did_you_mean(name, method_of_class)}"
        )
    catalogue = importlib.import_module("vilu.predictors.contract.catalogue")
    return catalogue.find_method(method_of_class[name])


def __dir__() -> list[str]:
    return sorted(_methods_by_class())


def _methods_by_class() -> dict[str, str]:
    """Map every class name to the method's name, without importing the classes."""
    importlib.import_module("vilu.predictors")  # puts vilu's methods into the catalogue
    load_plugins()
    # maps a method's name to "module:class"
    addresses = {**METHODS.addresses, **METHODS_OF_TABLES}
    for entry in entry_points(METHODS.group):
        addresses.setdefault(entry.name, entry.value)  # does not replace a vilu method
    # if two methods have the same class name, the first method stays
    method_of_class: dict[str, str] = {}
    for method, address in addresses.items():
        _, _, class_name = address.partition(":")
        method_of_class.setdefault(class_name, method)
    for method, cls in METHODS.registered.items():
        method_of_class.setdefault(cls.__name__, method)
    return method_of_class
