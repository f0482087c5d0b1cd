"""Warnings at the code line that called vilu."""

from __future__ import annotations

import sys
import warnings

OWN_PACKAGES = {"vilu", "vilu_bench"}
"""vilu's packages. Code in these packages does not count as the caller."""

WRAPPER_MODULES = {"contextlib", "functools"}
"""Python modules. Code in these modules does not count as the caller, either.

Decorators from these modules wrap vilu's functions. So code in these modules runs between the
caller and the function.
"""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the innermost caller outside ``vilu`` and ``vilu_bench``.

    Examples:
        >>> import warnings
        >>> from vilu.callers import warn_caller
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_caller("few rows")
        >>> print(caught[0].message)
        few rows
    """
    frame = sys._getframe(1)  # faster than inspect.stack, which reads the source files
    level = 2  # stack level 1 is this function, level 2 is this function's caller
    while frame.f_back is not None and _is_skipped(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


def _is_skipped(module: str) -> bool:
    """Return whether code in this module does not count as the caller."""
    package, _, _ = module.partition(".")
    return module in WRAPPER_MODULES or package in OWN_PACKAGES
