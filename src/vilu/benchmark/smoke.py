"""The same benchmark, small enough to try out."""

from __future__ import annotations

from typing import Any

from vilu.benchmark.config import Config, Method
from vilu.benchmark.parts import ROLES, Data
from vilu.benchmark.settings import AnySetting, Union
from vilu.predictors.parameters import parameters

SEEDS, RESAMPLES, IMAGES, VIEWS, EPOCHS, POOL = 1, 50, 120, 2, 2, 4


def shrink(config: Config) -> Config:
    """Few images (or one tar file), seeds, resamples and epochs, small pools; all data, settings and methods stay."""
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
    """Few images and views; the compact model sees smaller pictures, any other stays as it is."""
    backbone = "compact:64" if entry.backbone.partition(":")[0] == "compact" else entry.backbone
    limit = min([IMAGES, *filter(None, (entry.limit_of(role) for role in ROLES))])
    pool_size, views = min(entry.pool_size, POOL), min(entry.views, VIEWS)
    changes = {"limit": limit, "shards": 1, "views": views, "backbone": backbone, "pool_size": pool_size}
    return entry.model_copy(update=changes)


def _shallow(setting: AnySetting) -> AnySetting:
    changes: dict[str, Any] = {"pool_size": setting.pool_size and min(setting.pool_size, POOL)}
    if isinstance(setting, Union):
        changes["train_pool_size"] = min(setting.train_pool_size, POOL)
    return setting.model_copy(update=changes)


def _quick(config: Config, label: str, entry: Method) -> Method:
    if "epochs" not in parameters(config.class_of(label)):
        return entry
    return entry.model_copy(update={"params": {**entry.params, "epochs": EPOCHS}, "steps": None})
