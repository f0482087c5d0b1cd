"""A benchmark as written in TOML."""

from __future__ import annotations

import difflib
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vilu.benchmark.config import Config
from vilu.errors import UsageError

TABLES = ("data", "settings", "methods")
"""What can be taken from an included file, entry by entry."""


def load_config(path: Path) -> Config:
    """Read and check a benchmark file; its name is that of the file unless it says another.

    Raises:
        UsageError: If it or what it includes cannot be read, is not TOML, or says something that cannot be.
    """
    return parse_config({"name": path.stem, **_with_included(_read(path), path)}, path.name)


def load_configs(paths: Sequence[Path]) -> list[Config]:
    """Several files.

    Raises:
        UsageError: As ``load_config``, and if two have one name.
    """
    configs = [load_config(path) for path in paths]
    twice = [name for name, count in Counter(config.name for config in configs).items() if count > 1]
    if twice:
        raise UsageError(f"two benchmarks are called {twice[0]!r}. Give one another name, as name = ... in its file.")
    return configs


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error


def _with_included(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of a file with what it takes from the one that it includes.

    ``include`` names a file beside it, whose keys hold unless the including file gives them itself; of its tables
    (``data``, ``settings``, ``methods``) those entries hold that ``[use]`` lists, or all of a table that it does not.

    Raises:
        UsageError: If the included file cannot be read, or has no such entry.
    """
    name, use = content.pop("include", None), content.pop("use", {})
    if name is None and use:
        raise UsageError(f"{path.name} has [use], and no include to take from.")
    if name is None:
        return content
    if not isinstance(name, str) or not isinstance(use, dict):
        raise UsageError(f"{path.name}: include must be the name of a file, and [use] a table.")
    included = _read(path.parent / name)
    for table in use:
        if table not in TABLES:
            raise UsageError(f"{path.name}: [use] can choose {', '.join(TABLES)}. Got {table!r} instead.")
    merged = {**included, **content}
    for table in TABLES:
        given = included.get(table, {})
        chosen = use.get(table, list(given))
        unknown = [entry for entry in chosen if entry not in given]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), given, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(given)}."
            raise UsageError(f"{path.name}: {name} has no {unknown[0]!r} in its {table}. {hint}")
        merged[table] = {**{entry: given[entry] for entry in chosen}, **content.get(table, {})}
    return {key: value for key, value in merged.items() if value or key not in TABLES}


def parse_config(content: Mapping[str, Any], name: str = "the benchmark") -> Config:
    """A benchmark from plain tables; ``name`` is for the messages.

    Raises:
        UsageError: If something in it cannot be.
    """
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{name}{_explain(error)}") from error
    for label in config.entries:
        try:
            config.predictor(label)
        except UsageError as error:
            raise UsageError(f"{name}, methods.{label}: {error}") from error
    return config


def _explain(error: ValidationError) -> str:
    """The first finding of pydantic, with the keys that lead to it as they stand in the file."""
    first = error.errors(include_url=False, include_context=False)[0]
    steps = [str(step) for step in first["loc"] if step != "[key]"]
    if steps[:1] in (["settings"], ["views"], ["claims"]):
        del steps[2:3]  # the kind, which is no key on the way
    where = f", {'.'.join(steps)}" if steps else ""
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" + ("" if reason.endswith(("?", ".")) else ".")
