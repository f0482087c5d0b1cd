"""Warnings at the line of code that called vilu."""

from __future__ import annotations

import sys
import warnings

OWN_PACKAGES = {"vilu", "vilu_bench"}
"""Packages of vilu. Code in these packages does not count as the caller."""

WRAPPER_MODULES = {"contextlib", "functools"}
"""Modules of Python. Code in these modules does not count as the caller, either.

Decorators of these modules wrap functions of vilu. So code of these modules runs between the caller
and the function.
"""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the innermost caller outside of ``vilu`` and ``vilu_bench``.

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
    level = 2  # stack level 1 is this function, level 2 is the caller of this function
    while frame.f_back is not None and _is_skipped(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


def _is_skipped(module: str) -> bool:
    """Whether code of this module does not count as the caller."""
    package, _, _ = module.partition(".")
    return module in WRAPPER_MODULES or package in OWN_PACKAGES
