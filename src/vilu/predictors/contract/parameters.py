"""Hyper-parameters of a method, checked and converted by the dataclass annotations."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from inspect import get_annotations
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_type_hints

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from vilu.errors import UsageError, did_you_mean
from vilu.validation import LARGEST_SEED


class Parametrised(Protocol):
    """A dataclass with a ``name``, and with parameters as fields."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


# Class of the predictor that a function makes or returns. Public signatures show this name.
Made = TypeVar("Made", bound=Parametrised)


def parameters(predictor: Parametrised | type[Parametrised]) -> dict[str, dataclasses.Field[Any]]:
    """Return the constructor's parameters by name."""
    return {field.name: field for field in dataclasses.fields(predictor) if field.init}


def check_parameters(predictor: Parametrised) -> None:
    """Refuse values outside the annotated types and ranges."""
    for name in parameters(predictor):
        convert_parameter(type(predictor), name, getattr(predictor, name), strict=True)


def build_predictor(cls: type[Made], values: Mapping[str, object]) -> Made:
    """Make a predictor from parameters, which may be strings (``--set key=value``)."""
    require_known_parameters(cls, values)
    converted_values = {
        name: convert_parameter(cls, name, value, strict=False) for name, value in values.items()
    }
    return cls(**converted_values)


def require_known_parameters(cls: type[Parametrised], names: Iterable[str]) -> None:
    """Refuse names of unknown parameters."""
    known_parameters = parameters(cls)
    for name in names:
        if name not in known_parameters:
            suggestion = did_you_mean(name, known_parameters)
            if not suggestion:  # no known name is similar: the message lists all names
                listing = ", ".join(known_parameters) or "none"
                suggestion = f" It has: {listing}."
            raise UsageError(f"{cls.name} has no parameter {name!r}.{suggestion}")


def convert_parameter(cls: type[Parametrised], name: str, value: object, *, strict: bool) -> object:
    """Convert a parameter's value to the annotated type.

    With ``strict`` the string "3" and the value True are not accepted as numbers. numpy numbers are
    accepted.
    """
    hint, adapter = _type_and_checker(cls, name)
    if strict:
        value = _plain_value(value)
    else:
        takes_tuple = "tuple" in str(hint)
        value = _parsed_value(value, takes_tuple=takes_tuple)
    try:
        converted_value: object = adapter.validate_python(value, strict=strict)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        reason = message.replace("Input should be", "must be")
        raise UsageError(
            f"the {name!r} parameter of {cls.name} {reason}. Got {value!r:.200} instead."
        ) from error
    return converted_value


def _plain_value(value: object) -> object:
    """Convert a numpy number to a Python number, and a list to a tuple."""
    if isinstance(value, np.generic):
        number: object = value.item()
        return number
    if isinstance(value, list):
        return tuple(value)
    return value


def _parsed_value(value: object, *, takes_tuple: bool) -> object:
    """Parse "none" and tuples from the command line. Later pydantic parses all remaining values.

    ``takes_tuple`` says whether the parameter's type allows a tuple.
    """
    if value in ("none", "None", "null"):
        return None
    if takes_tuple and isinstance(value, str):
        # "(16,8)" gives ["16", "8"]
        return [part for part in value.strip("()[]").split(",") if part.strip()]
    return value


@cache
def _type_and_checker(cls: type[Parametrised], name: str) -> tuple[Any, TypeAdapter[Any]]:
    """Return a parameter's type and checker. Cached, because making a checker is slow."""
    hint = _annotated_type(cls, name)
    # in all methods the seed has the range accepted by every random number generator
    if name == "seed":
        hint = Annotated[hint, Field(ge=0, le=LARGEST_SEED)]
    return hint, TypeAdapter(hint)


def _annotated_type(cls: type[Parametrised], name: str) -> Any:  # noqa: ANN401 - any type
    """Evaluate a parameter's annotated type in the module with the declaring class.

    Annotations of all remaining attributes are left alone, since some types are imported only for
    type checkers.
    """
    owner = next(base for base in cls.__mro__ if name in get_annotations(base))
    annotation = get_annotations(owner)[name]
    # an object with this annotation only
    stand_in = SimpleNamespace(__annotations__={name: annotation})
    module_names = vars(sys.modules[owner.__module__])
    return get_type_hints(stand_in, module_names, include_extras=True)[name]


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """Split settings: ``["epochs=50"]`` gives ``{"epochs": "50"}``."""
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(
                f"--set takes KEY=VALUE, as in --set epochs=50. Got {setting!r} instead."
            )
        if key in values:
            raise UsageError(f"--set gives {key!r} twice.")
        values[key] = value.strip()
    return values


def get_params(self: Parametrised, deep: bool = True) -> dict[str, Any]:  # noqa: ARG001
    """Return the parameters by name, as in scikit-learn.

    ``deep`` has no effect, since no parameter is an object with parameters.

    Examples:
        >>> import vilu
        >>> vilu.PREDICTORS["gen"](gamma=0.5).get_params()
        {'answer': 'zero_shot', 'gamma': 0.5, 'largest': 100}
    """
    return {name: getattr(self, name) for name in parameters(self)}


def set_params(self: Made, **values: object) -> Made:
    """Change parameters by name, as in scikit-learn. The values are checked at the next use.

    Raises:
        UsageError: If no parameter has the given name.

    Examples:
        >>> import vilu
        >>> vilu.PREDICTORS["gen"]().set_params(gamma=0.5)
        GEN(gamma=0.5)
    """
    require_known_parameters(type(self), values)
    for name, value in values.items():
        setattr(self, name, value)
    return self


def constructor_call(self: Parametrised) -> str:
    """Return the ``repr``: a constructor call with all non-default parameters."""
    arguments = []
    for name, parameter in parameters(self).items():
        value = getattr(self, name)
        if value != parameter.default:
            arguments.append(f"{name}={value!r}")
    return f"{type(self).__name__}({', '.join(arguments)})"


def refuse_scikit_learn(self: Parametrised) -> object:
    """Refuse use in scikit-learn. Its cross-validation, searches and pipelines call this first.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        f"{type(self).__name__} takes sources of embeddings, not arrays of features, so "
        "scikit-learn's cross-validation, searches and pipelines cannot use it. Take rows of a "
        "source: data.take(rows)."
    )
