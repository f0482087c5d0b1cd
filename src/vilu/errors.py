"""Every error that vilu raises on purpose, each with the exit code of the command line; checks of settings.

A message says what was found, what was expected, and how to mend it. Here too: the codes of what
has no class, which every room reads.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType, SimpleNamespace, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

UNKNOWN = -1
"""A label, an answer or a failure that is not known."""

OUTSIDE = -2
"""Label, in files and where data come in, of a picture of none of the classes; inside, ``outside`` says so."""

# stands in place of a label, in files, of a picture that nobody can name: it is not known
NO_NAME = "(skip)"


class ViLUError(Exception):
    """Base of all errors that are the user's to mend; never a bug."""

    exit_code: ClassVar[int] = 1


class UsageError(ViLUError, ValueError):
    """An argument or a hyper-parameter that cannot be."""

    exit_code = 2


class NotFittedError(ViLUError, ValueError, AttributeError):
    """A predictor was asked for scores before ``fit``."""

    exit_code = 2


class DataError(ViLUError, ValueError):
    """Data that cannot be used: empty, malformed, degenerate, or beyond the error budget."""

    exit_code = 3


class InfeasibleError(ViLUError):
    """A promise that these calibration rows cannot support, or that nobody has made.

    The message says how many rows would be needed, or how it is made.
    """

    exit_code = 4


class MissingModelError(ViLUError):
    """Model weights or an optional dependency are not on this machine."""

    exit_code = 5


class ProvenanceError(ViLUError, ValueError):
    """Two artefacts do not belong together: other backbone, width, preprocessing, or schema."""

    exit_code = 6


class StorageError(ViLUError, OSError):
    """The file system refused: disk full, read-only, or a damaged file."""

    exit_code = 7


class BusyError(ViLUError):
    """Another process holds the lock; trying again later can succeed."""

    exit_code = 75


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question whether the nearest of the known names was meant; "" where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def require_at_least(name: str, value: int, least: int) -> None:
    """Refuse a smaller number."""
    if value < least:
        raise UsageError(f"{name} must be at least {least}. Got {value} instead.")


def require_between(name: str, value: float, interval: str = "(0, 1)") -> None:
    """Refuse a number that is not between 0 and 1; the brackets say whether these are allowed."""
    ends = {0.0: interval.startswith("["), 1.0: interval.endswith("]")}
    if not (0 < value < 1 or ends.get(value)):
        raise UsageError(f"{name} must be in {interval}. Got {value} instead.")


def require_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse another word."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}. Got {value!r} instead.")


def refuse_masked(values: Any, name: str) -> None:  # noqa: ANN401 - any argument
    """Refuse an array of numpy some numbers of which are masked: what lies below the mask would be taken for them."""
    if type(values).__name__ == "MaskedArray" and values.mask.any():  # without numpy
        raise DataError(
            f"{name} has {values.mask.sum()} numbers that are masked. Leave those rows out, or fill them."
        )


def require_mask(name: str, mask: Any, n: int) -> Any:  # noqa: ANN401 - arrays, without numpy
    """The array (N,), if it is Boolean."""
    if mask.dtype != bool or mask.shape != (n,):
        raise DataError(
            f"{name} must have one Boolean per row ({n}). Got {mask.dtype} {mask.shape} instead."
        )
    return mask


P = ParamSpec("P")
R = TypeVar("R")
LARGEST_SEED = 2**63 - 1


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which refuses arguments of other types than it is annotated with, before it begins.

    Numbers may be numpy's, or of an array of no dimension, and come as Python's; True is no number
    and "1" is none; arrays are the function's own to check.

    Raises:
        UsageError: With what was found and what was expected; of a number of arguments that cannot
            be, TypeError.
    """
    shape = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = shape.bind(*args, **kwargs)
        given = bound.arguments
        for name, hint in _hints(function).items():
            if name in given:
                given[name] = _plain(given[name], hint)
                _check(name, given[name], hint, given)
        return function(*bound.args, **bound.kwargs)

    return call


C = TypeVar("C", bound=type)


def checked_fields(cls: C) -> C:
    """A dataclass whose constructor is ``checked``."""
    # mypy has no type for the constructor of any class, of which this one is replaced on purpose,
    # as dataclass does
    cls.__init__ = checked(cls.__init__)  # type: ignore[misc]
    return cls


@cache
def _hints(function: Callable[..., object]) -> dict[str, Any]:
    """Types of the parameters that have one name and one value."""
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {
        name: p.annotation
        for name, p in inspect.signature(function).parameters.items()
        if p.kind in single
    }
    written = SimpleNamespace(
        __annotations__={
            n: hint for n, hint in found.items() if hint is not inspect.Parameter.empty
        }
    )
    return typing.get_type_hints(written, inspect.unwrap(function).__globals__, include_extras=True)


def _check(name: str, value: Any, hint: object, given: Mapping[str, object]) -> None:  # noqa: ANN401 - any argument
    if not _fits(value, hint):
        other = next(
            (n for n, v in given.items() if n != name and hasattr(hint, "how") and _fits(v, hint)),
            None,
        )
        swapped = f" {other} is one: are they swapped?" if other else ""
        raise UsageError(f"{name} must be {_expected(hint)}. Got {found(value)} instead.{swapped}")
    if (
        name == "seed" and value is not None and not 0 <= value <= LARGEST_SEED
    ):  # what every generator takes
        raise UsageError(f"seed must be from 0 to 2^63 - 1. Got {value} instead.")


def _is_bool(value: object) -> bool:
    return type(value).__name__ in {"bool", "bool_"}  # numpy's, too, without numpy


def _plain(value: Any, hint: object) -> Any:  # noqa: ANN401 - any argument
    """A number or text of numpy's or torch's as Python's, where one is asked for: it is written to JSON, or hashed.

    Also of an array of no dimension, which is how a model holds its logit scale.
    """
    if getattr(value, "shape", None) != () or not {int, float, bool, str} & {hint, *get_args(hint)}:
        return value
    return (value.detach() if hasattr(value, "detach") else value).item()


def _fits(value: object, hint: object) -> bool:
    """Whether a value is of an annotated type, as far as that can be told without reading it all."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    return RULES[kind][0](value, inner) if kind in RULES else _is_one(value, kind, inner)


def _is_one(value: object, kind: object, inner: tuple[object, ...]) -> bool:
    """Whether a value is an instance; of what is no class, or a protocol that cannot be tested, it counts as one."""
    if not isinstance(kind, type) or (
        getattr(kind, "_is_protocol", False) and not _is_testable(kind)
    ):
        return True
    if (
        not inner
        or not issubclass(kind, Collection)
        or issubclass(kind, Mapping)
        or hasattr(kind, "dtype")
    ):
        return isinstance(value, kind)
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return False
    if isinstance(value, list | tuple):
        return all(_fits(one, inner[0]) for one in value[:TRIED])
    array: Any = value
    if hasattr(value, "dtype"):
        return (
            type(value).__module__ == "numpy"
            and array.ndim == 1
            and all(_fits(one, inner[0]) for one in array[:TRIED])
        )
    return isinstance(value, kind) or hasattr(value, "__getitem__")


def _is_testable(kind: type) -> bool:
    return bool(getattr(kind, "_is_runtime_protocol", False))


def _expected(hint: object) -> str:
    """A type in words."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in RULES:
        return RULES[kind][1](inner)
    if isinstance(kind, type) and inner and issubclass(kind, Sequence):
        return f"a list, each {_expected(inner[0])}"
    name = getattr(kind, "__name__", str(kind))
    return str(getattr(kind, "how", f"{'an' if name[0] in 'AEIO' else 'a'} {name}"))


def _any_of(value: object, inner: tuple[object, ...]) -> bool:
    """Whether one type fits; where arrays are among them, anything may be one, and the function looks itself."""
    takes_arrays = any(
        (getattr(get_origin(one) or one, "__module__", None) or "").startswith("numpy._")
        for one in inner
    )
    return takes_arrays or any(_fits(value, one) for one in inner)


def _either(inner: tuple[object, ...]) -> str:
    return " or ".join(dict.fromkeys(map(_expected, inner)))


RULES: dict[object, tuple[Callable[[object, Any], bool], Callable[[Any], str]]] = {
    Any: (lambda _, __: True, lambda _: "anything"),
    Union: (_any_of, _either),
    UnionType: (_any_of, _either),
    Annotated: (lambda value, inner: _fits(value, inner[0]), lambda inner: _expected(inner[0])),
    Literal: (
        lambda value, inner: any(type(value) is type(one) and value == one for one in inner),
        lambda inner: (
            f"one of {', '.join(map(repr, inner))}"
            if len(inner) > 2
            else " or ".join(map(repr, inner))
        ),
    ),
    int: (
        lambda value, _: isinstance(value, Integral) and not _is_bool(value),
        lambda _: "a whole number",
    ),
    float: (lambda value, _: isinstance(value, Real) and not _is_bool(value), lambda _: "a number"),
    bool: (lambda value, _: _is_bool(value), lambda _: "True or False"),
    str: (lambda value, _: isinstance(value, str), lambda _: "a text"),
    NoneType: (lambda value, _: value is None, lambda _: "None"),
}
"""Of a type: whether a value with the type's arguments is one, and how it is called."""

TRIED = 100  # elements of a list whose types are looked at


def found(value: object) -> str:
    """A value in a few words."""
    if value is None or isinstance(value, str | bytes | Real):
        return f"{value!r:.80}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (
        f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    )
