"""Reading the file of a study, with what it includes."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vilu.backbones.zeroshot import named_templates
from vilu.errors import StorageError, UsageError, nearest
from vilu.predictors.contract.parameters import parameters
from vilu_bench.studies.config import AnySetting, Config, Method, Union
from vilu_bench.studies.parts import ROLES, Data

TABLES = ("data", "settings", "methods")  # what can be taken from an included file, entry by entry


def load_config(path: Path) -> Config:
    """Read and check a benchmark file; its name is that of the file unless it says another."""
    return parse_config({"name": path.stem, **_with_included(_read(path), path)}, path.name)


def load_configs(paths: Sequence[Path]) -> list[Config]:
    """Several files."""
    configs = [load_config(path) for path in paths]
    if twice := [
        name for name, count in Counter(config.name for config in configs).items() if count > 1
    ]:
        raise UsageError(
            f"two benchmarks are called {twice[0]!r}. Give one another name, as name = ... in its file."
        )
    return configs


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        kind = (
            UsageError if isinstance(error, FileNotFoundError | IsADirectoryError) else StorageError
        )
        raise kind(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error
    for table in TABLES:
        if not isinstance(content.get(table, {}), dict):
            raise UsageError(
                f"{path}: {table} must be a table, as [{table}.NAME]. Got {content[table]!r:.80} instead."
            )
    return content


def _with_included(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of a file with what it takes from the one that it includes.

    ``include`` names a file beside it, whose keys hold unless the including file gives them itself;
    of its tables (``data``, ``settings``, ``methods``) those entries hold that ``[use]`` lists, or
    all of a table that it does not.
    """
    name, use = content.pop("include", None), content.pop("use", {})
    if name is None:
        if use:
            raise UsageError(f"{path.name} has [use], and no include to take from.")
        return content
    if (
        not isinstance(name, str)
        or not isinstance(use, dict)
        or not all(isinstance(of, list) for of in use.values())
    ):
        raise UsageError(
            f'{path.name}: include must be the name of a file, and [use] hold lists, as data = ["x"].'
        )
    if other := [table for table in use if table not in TABLES]:
        raise UsageError(
            f"{path.name}: [use] can choose {', '.join(TABLES)}. Got {other[0]!r} instead."
        )
    included = _read(path.parent / name)
    merged = included | content
    for table in TABLES:
        given = included.get(table, {})
        chosen = use.get(table, list(given))
        for entry in chosen:
            if entry not in list(given):  # it may be a list, which no table has
                hint = nearest(str(entry), given) or f" It has: {', '.join(given)}"
                raise UsageError(f"{path.name}: {name} has no {entry!r} in its {table}.{hint}")
        merged[table] = {entry: given[entry] for entry in chosen} | content.get(table, {})
    return {key: value for key, value in merged.items() if value or key not in TABLES}


def parse_config(content: Mapping[str, Any], name: str = "the benchmark") -> Config:
    """A benchmark from plain tables; ``name`` is for the messages."""
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


SEEDS, RESAMPLES, IMAGES, VIEWS, PROMPTS, EPOCHS, POOL = 1, 50, 120, 2, 2, 2, 4


def shrink(config: Config) -> Config:
    """Few images (or one tar file), prompts, seeds and epochs, small pools; all data, settings and methods stay."""
    changes: dict[str, Any] = {
        "seeds": min(config.seeds, SEEDS),
        "resamples": min(config.resamples, RESAMPLES),
        "data": {name: _small(entry) for name, entry in config.data.items()},
        "settings": {name: _shallow(setting) for name, setting in config.settings.items()},
        "methods": {label: _quick(config, label, entry) for label, entry in config.entries.items()},
        "all_methods": False,
    }
    return Config(**{name: getattr(config, name) for name in Config.model_fields} | changes)


def _small(entry: Data) -> Data:
    """Few images, views and prompts; the compact model sees smaller pictures, any other stays as it is."""
    backbone = "compact:64" if entry.backbone.partition(":")[0] == "compact" else entry.backbone
    limit = min([IMAGES, *filter(None, (entry.limit_of(role) for role in ROLES))])
    pool_size, views = min(entry.pool_size, POOL), min(entry.views, VIEWS)
    changes = {
        "limit": limit,
        "shards": 1,
        "views": views,
        "backbone": backbone,
        "pool_size": pool_size,
    }
    return entry.model_copy(update=changes | {"prompts": named_templates(entry.prompts)[:PROMPTS]})


def _shallow(setting: AnySetting) -> AnySetting:
    changes: dict[str, Any] = {"pool_size": setting.pool_size and min(setting.pool_size, POOL)}
    if isinstance(setting, Union):
        changes["train_pool_size"] = min(setting.train_pool_size, POOL)
    return setting.model_copy(update=changes)


def _quick(config: Config, label: str, entry: Method) -> Method:
    if "epochs" not in parameters(config.class_of(label)):
        return entry
    return entry.model_copy(update={"params": {**entry.params, "epochs": EPOCHS}, "steps": None})
