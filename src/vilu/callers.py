"""Warnings that point at the line of whoever called vilu."""

from __future__ import annotations

import sys
import warnings

OWN = {"vilu", "vilu_bench"}
"""Packages whose lines no warning points at."""

WRAPPERS = {"contextlib", "functools"}
"""Modules of Python that stand between a decorated function of ours and its caller."""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the caller: the innermost one outside this package and ``vilu_bench``.

    Examples:
        >>> import warnings
        >>> from vilu.callers import warn_caller
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_caller("few rows")
        >>> print(caught[0].message)
        few rows
    """
    frame = sys._getframe(1)  # inspect.stack would read the source of all files
    level = 2  # 1 would be this function
    while frame.f_back is not None and _is_own(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


def _is_own(module: str) -> bool:
    return module in WRAPPERS or module.partition(".")[0] in OWN
