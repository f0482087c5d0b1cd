"""Reads a study's file, and the file that it includes."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from vilu.backbones.zeroshot import expand_template_names
from vilu.errors import StorageError, UsageError, did_you_mean
from vilu.predictors.contract.parameters import parameters
from vilu.registry import read_toml_text
from vilu_bench.studies.config import AnySetting, Config, Method, UnionSetting
from vilu_bench.studies.parts import ROLES, Data

CONFIGS: Final = Path(__file__).resolve().parents[1] / "configs"
"""Folder with the studies that ship with vilu.

The studies in the folder GROUP include the file GROUP.toml.
"""

SELECTABLE_TABLES = ("data", "settings", "methods")  # tables whose entries ``[use]`` can select


def load_config(path: Path) -> Config:
    """Read and check a benchmark file. The file's name is the default name for the benchmark."""
    tables = _read_tables(path)
    content = _with_included(tables, path)
    return parse_config({"name": path.stem, **content}, path.name)


def load_configs(names: Sequence[Path | str]) -> list[Config]:
    """Read and check several benchmarks. ``find_studies`` says which names are possible.

    Raises:
        UsageError: If a file or study does not exist, the content is invalid, or two benchmarks
            have the same name.
    """
    paths: list[Path] = []
    for name in names:
        paths += find_studies(name)
    configs = [load_config(path) for path in paths]
    name_counts = Counter(config.name for config in configs)
    for name, count in name_counts.items():
        if count > 1:
            raise UsageError(
                f"two benchmarks are called {name!r}. "
                "Give one another name, as name = ... in its file."
            )
    return configs


def study_names() -> list[str]:
    """Name the studies that ship with vilu, as "GROUP/NAME" or "NAME"."""
    names = []
    for path in sorted(CONFIGS.rglob("*.toml")):
        study = path.with_suffix("")
        is_group = study.is_dir()
        if not is_group:  # a group's file only has parts that studies include
            relative_path = study.relative_to(CONFIGS)
            names.append(relative_path.as_posix())
    return names


def find_studies(name: Path | str) -> list[Path]:
    """Find the benchmark files for a name.

    The name may be a file path, the name of a study that ships with vilu ("here/main"), or the name
    of a group ("here"). If both a file and a study have this name, the file is taken.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return [path]
    studies = study_names()
    matching = [study for study in studies if study == str(name) or study.startswith(f"{name}/")]
    if not matching:
        all_names = ", ".join(studies)
        suggestion = did_you_mean(str(name), studies)
        raise UsageError(
            f"{name} does not exist: there is no file and no study of this name. "
            f"Studies that come with vilu_bench: {all_names}.{suggestion}"
        )
    return [CONFIGS / f"{study}.toml" for study in matching]


def _read_tables(path: Path) -> dict[str, Any]:
    """Read a benchmark file, and check that ``SELECTABLE_TABLES`` are tables in the file."""
    try:
        text = read_toml_text(path)
        content = tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error
    for table in SELECTABLE_TABLES:
        if not isinstance(content.get(table, {}), dict):
            raise UsageError(
                f"{path}: {table} must be a table, as [{table}.NAME]. "
                f"Got {content[table]!r:.80} instead."
            )
    return content


def _with_included(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Merge a file's content with the content of the included file.

    ``include`` names a file in the same folder. A key in the including file replaces the same key
    in the included file. In the tables ``data``, ``settings`` and ``methods``, an entry replaces
    the included entry with the same name. If ``[use]`` lists entries for a table, only the listed
    entries are taken from the included file. If ``[use]`` does not name a table, all entries in the
    table are taken.
    """
    name = content.pop("include", None)
    selections = content.pop("use", {})
    if name is None:
        if selections:
            raise UsageError(f"{path.name} has [use], and no include to take from.")
        return content
    _check_include(name, selections, path)
    included = _read_tables(path.parent / name)
    merged = included | content
    for table in SELECTABLE_TABLES:
        entries = included.get(table, {})
        if table in selections:
            entries = _select_entries(entries, selections[table], f"{path.name}: {name}", table)
        merged[table] = entries | content.get(table, {})
        if not merged[table]:  # neither file has an entry
            del merged[table]
    return merged


def _check_include(name: object, selections: Any, path: Path) -> None:  # noqa: ANN401 - TOML
    """Refuse an invalid ``include``, or an invalid table ``use``."""
    if not isinstance(name, str) or not _is_table_of_lists(selections):
        raise UsageError(
            f"{path.name}: include must be the name of a file, "
            'and [use] must hold lists, as data = ["x"].'
        )
    for table in selections:
        if table not in SELECTABLE_TABLES:
            selectable = ", ".join(SELECTABLE_TABLES)
            raise UsageError(f"{path.name}: [use] can choose {selectable}. Got {table!r} instead.")


def _is_table_of_lists(selections: object) -> bool:
    """Return whether a value from TOML is a table of lists."""
    if not isinstance(selections, dict):
        return False
    return all(isinstance(names, list) for names in selections.values())


def _select_entries(
    entries: Mapping[str, Any], names: Sequence[object], file_names: str, table: str
) -> dict[str, Any]:
    """Select the entries of an included table that ``names`` lists.

    ``file_names`` and ``table`` name the files and the table in errors.
    """
    selected = {}
    for name in names:
        if not isinstance(name, str) or name not in entries:
            hint = did_you_mean(str(name), entries) or f" It has: {', '.join(entries)}"
            raise UsageError(f"{file_names} has no {name!r} in its {table}.{hint}")
        selected[name] = entries[name]
    return selected


def parse_config(content: Mapping[str, Any], name: str = "the benchmark") -> Config:
    """Make a benchmark from plain tables. Error messages begin with ``name``."""
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise UsageError(_error_message(name, error)) from error
    for label in config.method_entries:
        try:
            config.predictor(label)
        except UsageError as error:
            raise UsageError(f"{name}, methods.{label}: {error}") from error
    return config


def _error_message(name: str, error: ValidationError) -> str:
    """Describe pydantic's first error: the file, the keys that lead to it, the reason."""
    first_error, *_ = error.errors(include_url=False, include_context=False)
    # pydantic marks an invalid key by a further step "[key]"
    steps = [str(step) for step in first_error["loc"] if step != "[key]"]
    if steps and steps[0] in {"settings", "views", "claims"}:
        # The third step (if present) is the kind of setting, view or claim. The kind is not a key
        # in the file.
        del steps[2:3]
    reason = first_error["msg"].removeprefix("Value error, ")
    if not reason.endswith(("?", ".")):
        reason += "."
    if not steps:
        return f"{name}: {reason}"
    return f"{name}, {'.'.join(steps)}: {reason}"


# ``shrink_config`` cuts the numbers in a benchmark to these numbers
SMOKE_SEEDS = 1
SMOKE_RESAMPLES = 50
SMOKE_IMAGES = 120
SMOKE_VIEWS = 2
SMOKE_PROMPTS = 2
SMOKE_EPOCHS = 2
SMOKE_POOL = 4


def shrink_config(config: Config) -> Config:
    """Return a copy with few images, prompts, seeds and epochs.

    The copy has the same data sets, settings and methods.
    """
    content: dict[str, Any] = {name: getattr(config, name) for name in Config.model_fields}
    content["seeds"] = min(config.seeds, SMOKE_SEEDS)
    content["resamples"] = min(config.resamples, SMOKE_RESAMPLES)
    content["data"] = {name: _shrink_data(entry) for name, entry in config.data.items()}
    content["settings"] = {
        name: _shrink_pools(setting) for name, setting in config.settings.items()
    }
    methods = {}
    for label, entry in config.method_entries.items():
        methods[label] = _shrink_epochs(config, label, entry)
    content["methods"] = methods
    content["all_methods"] = False
    return Config(**content)


def _shrink_data(entry: Data) -> Data:
    """Cut a data set to few images (or a single tar file), views and prompts.

    The compact model gets pictures of 64 x 64 pixels.
    """
    limits = [SMOKE_IMAGES]  # the smallest limit is for all roles
    for role in ROLES:
        limit = entry.limit_of(role)
        if limit is not None:
            limits.append(limit)
    changes: dict[str, Any] = {
        "limit": min(limits),
        "shards": 1,
        "views": min(entry.views, SMOKE_VIEWS),
        "pool_size": min(entry.pool_size, SMOKE_POOL),
        "prompts": expand_template_names(entry.prompts)[:SMOKE_PROMPTS],
    }
    family, _, _ = entry.backbone.partition(":")
    if family == "compact":
        changes["backbone"] = "compact:64"
    return entry.model_copy(update=changes)


def _shrink_pools(setting: AnySetting) -> AnySetting:
    """Return a copy of a setting with small pools."""
    changes = {}
    if setting.pool_size is not None:
        changes["pool_size"] = min(setting.pool_size, SMOKE_POOL)
    if isinstance(setting, UnionSetting):
        changes["train_pool_size"] = min(setting.train_pool_size, SMOKE_POOL)
    return setting.model_copy(update=changes)


def _shrink_epochs(config: Config, label: str, entry: Method) -> Method:
    """Return a method's entry, with few epochs if the method has epochs."""
    cls = config.class_of(label)
    if "epochs" not in parameters(cls):
        return entry
    return entry.model_copy(
        update={"params": {**entry.params, "epochs": SMOKE_EPOCHS}, "steps": None}
    )
