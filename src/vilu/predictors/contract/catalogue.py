"""All methods by name: from this package, from registration, and from entry points."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

from vilu.errors import UsageError, did_you_mean
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.registry import (
    METHODS,
    METHODS_OF_TABLES,
    REGISTER_FUNCTIONS,
    Catalogue,
    refuse_name_of_bench,
)

# ``vilu/predictors/__init__.py`` adds this package's methods
PREDICTORS: Catalogue[type[FailurePredictor]] = METHODS


def add_predictor(cls: object) -> bool:
    """Add a method to ``PREDICTORS``. Return False if ``cls`` does not extend ``FailurePredictor``.

    Raises:
        UsageError: If the method could not be listed, built or saved.
    """
    if not (isinstance(cls, type) and issubclass(cls, FailurePredictor)):
        return False
    class_path = f"{cls.__module__}.{cls.__qualname__}"
    required_attributes = ("name", "summary", "reference")
    missing_attributes = [
        attribute for attribute in required_attributes if not getattr(cls, attribute, None)
    ]
    if missing_attributes:
        raise UsageError(
            f"the method {class_path} has no {' and no '.join(missing_attributes)}. "
            "Set it as a class attribute."
        )
    _require_free_name(cls)
    if "__dataclass_params__" not in vars(cls):
        raise UsageError(
            f"the method {class_path} must be a dataclass, so that its parameters are known. "
            "Decorate it."
        )
    if inspect.isabstract(cls):
        undefined_methods = ", ".join(sorted(cls.__abstractmethods__))
        raise UsageError(f"the method {class_path} lacks {undefined_methods}. Define it.")
    parameters_without_default = []
    for field in dataclasses.fields(cls):
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if field.init and not has_default:
            parameters_without_default.append(field.name)
    if parameters_without_default:
        raise UsageError(
            f"the method {class_path} needs a default for {', '.join(parameters_without_default)}: "
            "`vilu fit` gives none."
        )
    PREDICTORS[cls.name] = cls
    return True


def _require_free_name(cls: type[FailurePredictor]) -> None:
    """Raise UsageError if another method has the name of ``cls``."""
    class_address = f"{cls.__module__}:{cls.__qualname__}"
    # a method of this package keeps its name even if its module is not imported yet
    own_addresses = {**PREDICTORS.addresses, **METHODS_OF_TABLES}
    # if nobody has the name, the two results are the address of ``cls``, and ``cls``
    own_address = own_addresses.get(cls.name)
    registered_class = PREDICTORS.registered.get(cls.name)
    if own_address is not None and own_address != class_address:
        _, _, owner = own_address.partition(":")
    elif registered_class is not None and registered_class is not cls:
        owner = registered_class.__name__
    else:
        return
    raise UsageError(
        f"there is a method {cls.name!r} already, {owner}. "
        f"Rename {cls.__module__}.{cls.__qualname__}."
    )


REGISTER_FUNCTIONS["a subclass of vilu.FailurePredictor"] = add_predictor


def method_names() -> list[str]:
    """List the names of all methods. Methods from entry points are not imported for the list."""
    return [*PREDICTORS.names(), *METHODS_OF_TABLES]


def find_method(name: str) -> type[FailurePredictor]:
    """Return the class of the method with this name. A method from an entry point is imported now.

    Examples:
        >>> import vilu
        >>> from vilu.predictors.contract.catalogue import find_method
        >>> find_method("mcm") is vilu.MCM
        True
        >>> find_method("answer_probe").__name__  # a method for tables of answers
        'AnswerProbe'
    """
    if name in METHODS_OF_TABLES:
        module, _, class_name = METHODS_OF_TABLES[name].partition(":")
        imported_module = importlib.import_module(module)
        method: type[FailurePredictor] = getattr(imported_module, class_name)
        return method
    if name not in PREDICTORS:
        refuse_name_of_bench(PREDICTORS.group, name)
        known = method_names()
        known_names = ", ".join(known)
        hint = did_you_mean(name, known)
        raise UsageError(f"there is no method {name!r}; known are {known_names}.{hint}")
    return PREDICTORS[name]
