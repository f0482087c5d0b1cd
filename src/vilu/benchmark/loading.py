"""A benchmark as written in TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vilu.benchmark.config import Config
from vilu.errors import UsageError


def load_config(path: Path) -> Config:
    """Read and check a benchmark file.

    Raises:
        UsageError: If it cannot be read, is not TOML, or says something that cannot be.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error
    return parse_config(content, path.name)


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
    if steps[:1] == ["settings"]:
        del steps[2:3]  # the kind, which is no key on the way
    where = f", {'.'.join(steps)}" if steps else ""
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" + ("" if reason.endswith(("?", ".")) else ".")
