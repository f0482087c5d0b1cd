"""Checks of arguments: ranges, choices, and annotated types."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from vilu.errors import DataError, UsageError

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

LARGEST_SEED = 2**63 - 1
"""Largest seed that all random number generators accept."""

MAX_CHECKED_ELEMENTS = 100
"""Number of elements at a list's beginning to check for the right type."""

MAX_CHOICES_JOINED_BY_OR = 2
"""Maximum number of choices joined by "or" in a message. Longer lists begin with "one of"."""


def require_at_least(name: str, value: int, least: int) -> None:
    """Raise UsageError if a number is less than ``least``."""
    if value < least:
        raise UsageError(f"{name} must be at least {least}. Got {value} instead.")


def require_between(name: str, value: float, interval: str = "(0, 1)") -> None:
    """Raise UsageError if a number is not in an interval from 0 to 1, such as "(0, 1]"."""
    if 0 < value < 1:
        return
    if value == 0 and interval.startswith("["):
        return
    if value == 1 and interval.endswith("]"):
        return
    raise UsageError(f"{name} must be in {interval}. Got {value} instead.")


def require_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError if a value is not one of the choices."""
    if value not in choices:
        listed_choices = ", ".join(choices)
        raise UsageError(f"{name} must be one of {listed_choices}. Got {value!r} instead.")


def refuse_masked(values: Any, name: str) -> None:  # noqa: ANN401 - any argument
    """Raise DataError for a numpy array with masked numbers, because vilu ignores the mask."""
    is_masked = type(values).__name__ == "MaskedArray"  # by name, without importing numpy
    if is_masked and values.mask.any():
        raise DataError(
            f"{name} has {values.mask.sum()} numbers that are masked. "
            "Leave those rows out, or fill them."
        )


def require_mask(name: str, mask: Any, n: int) -> Any:  # noqa: ANN401 - arrays, without numpy
    """Return the mask if it is a Boolean array (N,). Otherwise raise DataError."""
    if mask.dtype != bool or mask.shape != (n,):
        raise DataError(
            f"{name} must have one Boolean per row ({n}). Got {mask.dtype} {mask.shape} instead."
        )
    return mask


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to check the argument types against the annotations.

    A number may be given as a numpy number or as an array without dimensions. The function gets a
    Python number. True and "1" do not count as numbers. Arrays are not checked here.

    Every error begins with the called function's name, such as "score" or "MCM.fit".

    Raises:
        UsageError: If an argument has a wrong type. The message states both types.
        TypeError: If there are too many arguments, too few, or unknown arguments.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def checked_function(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_name_of_call(function, args)}: {error}") from None
        arguments = bound.arguments
        for name, type_hint in _type_hints(function).items():
            if name in arguments:
                arguments[name] = _as_python(arguments[name], type_hint)
                problem = _problem_of_argument(name, arguments[name], type_hint, arguments)
                if problem:
                    raise UsageError(f"{_name_of_call(function, args)}: {problem}")
        return function(*bound.args, **bound.kwargs)

    return checked_function


def _name_of_call(function: Callable[..., object], args: tuple[object, ...]) -> str:
    """Return a function's name, such as "score" or "MCM.fit". A constructor has the class name."""
    # a method's first argument is the object, and a class method's first argument is the class
    owner = args[0] if args else None
    if not isinstance(owner, type):
        owner = type(owner)
    # A function inside a function "f" has a name such as "f.<locals>.MCM.fit".
    _, _, name_in_source = function.__qualname__.rpartition("<locals>.")
    is_method = "." in name_in_source and hasattr(owner, function.__name__)
    if not is_method:
        return name_in_source
    if function.__name__ == "__init__":
        return owner.__name__
    return f"{owner.__name__}.{function.__name__}"


def checked_fields(cls: C) -> C:
    """Decorate a dataclass to get a ``checked`` constructor."""
    # mypy does not allow a new constructor, but here the change is intended, as in ``dataclass``
    cls.__init__ = checked(cls.__init__)  # type: ignore[misc]
    return cls


def describe_value(value: object) -> str:
    """Describe a value briefly, for a message."""
    if value is None or isinstance(value, str | bytes | Real):
        return f"{value!r:.80}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = _with_article(type(value).__name__)
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{kind} of shape {tuple(shape)}"  # also a ``torch.Size``
    return kind


def _with_article(name: str) -> str:
    """Put "a" or "an" before a name."""
    article = "an" if name[0].lower() in "aeio" else "a"  # "u" mostly sounds as in "unit"
    return f"{article} {name}"


@cache
def _type_hints(function: Callable[..., object]) -> dict[str, Any]:
    """Map parameter names to the annotated types.

    Positional-only parameters, *args and **kwargs are left out.
    """
    annotations = {}
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            continue
        if parameter.annotation is not parameter.empty:
            annotations[name] = parameter.annotation
    # get_type_hints needs the function's module, to find the names in the annotations
    annotated_object = SimpleNamespace(__annotations__=annotations)
    module_names = inspect.unwrap(function).__globals__
    return typing.get_type_hints(annotated_object, module_names, include_extras=True)


def _problem_of_argument(
    name: str,
    value: Any,  # noqa: ANN401 - any argument
    type_hint: object,
    arguments: Mapping[str, object],
) -> str | None:
    """Describe what is wrong with an argument. Return None if the argument is right."""
    if not _is_of_type(value, type_hint):
        swapped_name = _fitting_argument(name, type_hint, arguments)
        question = f" {swapped_name} is one: are they swapped?" if swapped_name else ""
        requirement = f"{name} must be {_type_in_words(type_hint)}."
        return f"{requirement} Got {describe_value(value)} instead.{question}"
    if name == "seed" and value is not None and not 0 <= value <= LARGEST_SEED:
        return f"seed must be from 0 to 2^63 - 1. Got {value} instead."
    return None


def _fitting_argument(name: str, type_hint: object, arguments: Mapping[str, object]) -> str | None:
    """Return the name of an argument besides ``name`` that has the type expected for ``name``.

    ``type_hint`` is the type expected for ``name``. Return None if no argument has this type, or if
    this type is not from vilu. vilu's types have an attribute ``how_to_make`` with a description.
    """
    types = get_args(type_hint) or (type_hint,)  # of a union, all types
    if not any(hasattr(kind, "how_to_make") for kind in types):
        return None
    for candidate, value in arguments.items():
        if candidate != name and _is_of_type(value, type_hint):
            return candidate
    return None


def _is_bool(value: object) -> bool:
    return type(value).__name__ in {"bool", "bool_"}  # also numpy.bool_, without importing numpy


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not _is_bool(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not _is_bool(value)


def _as_python(value: Any, type_hint: object) -> Any:  # noqa: ANN401 - any argument
    """Convert a number or text from numpy or torch to Python, for JSON and hashes.

    Arrays without dimensions, such as a model's logit scale, are converted, too.
    """
    types = {type_hint, *get_args(type_hint)}
    wants_plain_type = not types.isdisjoint({int, float, bool, str})
    has_no_dimension = getattr(value, "shape", None) == ()
    if not (wants_plain_type and has_no_dimension):
        return value
    if hasattr(value, "detach"):  # a tensor
        value = value.detach()
    return value.item()


def _is_of_type(value: object, type_hint: object) -> bool:
    """Return whether a value has an annotated type. Check only a list's first elements."""
    kind = get_origin(type_hint) or type_hint
    type_arguments = get_args(type_hint)
    if kind in TYPE_CHECKS:
        is_of_type, _ = TYPE_CHECKS[kind]
        return is_of_type(value, type_arguments)
    return _is_instance(value, kind, type_arguments)


def _is_instance(value: object, kind: object, type_arguments: tuple[object, ...]) -> bool:
    """Return whether a value is an instance of a type. Return True for types without a test."""
    if not isinstance(kind, type):
        return True
    is_protocol = getattr(kind, "_is_protocol", False)
    is_runtime_protocol = getattr(kind, "_is_runtime_protocol", False)
    if is_protocol and not is_runtime_protocol:
        return True
    is_array_type = hasattr(kind, "dtype")
    is_mapping = issubclass(kind, Mapping)
    has_element_type = bool(type_arguments) and issubclass(kind, Collection)
    if has_element_type and not is_array_type and not is_mapping:
        element, *_ = type_arguments
        return _has_elements(value, kind, element)
    return isinstance(value, kind)


def _has_elements(value: Any, kind: type, element: object) -> bool:  # noqa: ANN401 - any argument
    """Return whether a value is a collection, and the first elements have the type ``element``."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return False
    if isinstance(value, list | tuple):
        return all(_is_of_type(item, element) for item in value[:MAX_CHECKED_ELEMENTS])
    if hasattr(value, "dtype"):
        is_vector = type(value).__module__ == "numpy" and value.ndim == 1
        return is_vector and all(
            _is_of_type(item, element) for item in value[:MAX_CHECKED_ELEMENTS]
        )
    # A source of embeddings has __getitem__, too, but is not iterable. So a source is no list.
    is_ordered = hasattr(value, "__getitem__") and isinstance(value, Iterable)
    return isinstance(value, kind) or is_ordered


def _type_in_words(type_hint: object) -> str:
    """Describe a type, for a message."""
    kind = get_origin(type_hint) or type_hint
    type_arguments = get_args(type_hint)
    if kind in TYPE_CHECKS:
        _, describe_type = TYPE_CHECKS[kind]
        return describe_type(type_arguments)
    if isinstance(kind, type) and type_arguments and issubclass(kind, Sequence):
        return f"a list, each {_type_in_words(type_arguments[0])}"
    name = getattr(kind, "__name__", str(kind))
    return str(getattr(kind, "how_to_make", _with_article(name)))


def _is_any_of(value: object, types: tuple[object, ...]) -> bool:
    """Return whether a value has any of the types, or a numpy type is among the types.

    An argument that can be an array is checked by the decorated function, not here.
    """
    for type_hint in types:
        module = getattr(get_origin(type_hint) or type_hint, "__module__", None) or ""
        if module.startswith("numpy._"):  # such as numpy._typing, with the types in ``ArrayLike``
            return True
    return any(_is_of_type(value, type_hint) for type_hint in types)


def _any_in_words(types: tuple[object, ...]) -> str:
    names = [_type_in_words(type_hint) for type_hint in types]
    return " or ".join(dict.fromkeys(names))


def _is_choice(value: object, choices: tuple[object, ...]) -> bool:
    """Return whether a value equals a choice in value and type. So True does not count as 1."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _choices_in_words(choices: tuple[object, ...]) -> str:
    names = [repr(choice) for choice in choices]
    if len(names) > MAX_CHOICES_JOINED_BY_OR:
        return f"one of {', '.join(names)}"
    return " or ".join(names)


ValueTest = Callable[[object, Any], bool]
TypeDescription = Callable[[Any], str]

TYPE_CHECKS: dict[object, tuple[ValueTest, TypeDescription]] = {
    Any: (lambda _, __: True, lambda _: "anything"),
    Union: (_is_any_of, _any_in_words),
    UnionType: (_is_any_of, _any_in_words),
    Annotated: (
        lambda value, type_arguments: _is_of_type(value, type_arguments[0]),
        lambda type_arguments: _type_in_words(type_arguments[0]),
    ),
    Literal: (_is_choice, _choices_in_words),
    int: (lambda value, _: _is_whole(value), lambda _: "a whole number"),
    float: (lambda value, _: _is_number(value), lambda _: "a number"),
    bool: (lambda value, _: _is_bool(value), lambda _: "True or False"),
    str: (lambda value, _: isinstance(value, str), lambda _: "a text"),
    NoneType: (lambda value, _: value is None, lambda _: "None"),
}
"""Maps a type to two functions: the first tests a value, the second describes the type.

Both functions also get the type's arguments, such as the choices in a ``Literal``.
"""
