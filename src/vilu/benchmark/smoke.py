"""The same benchmark, small enough to try out."""

from __future__ import annotations

from vilu.benchmark.config import Config, Method
from vilu.benchmark.parts import Data
from vilu.predictors.parameters import parameters

SEEDS, RESAMPLES, IMAGES, VIEWS, EPOCHS = 2, 50, 120, 2, 2


def shrink(config: Config) -> Config:
    """Few images, seeds, resamples and epochs; every data set, setting and method stays."""
    data = {name: _small(entry) for name, entry in config.data.items()}
    methods = {label: _quick(config, label, entry) for label, entry in config.entries.items()}
    small = {"seeds": min(config.seeds, SEEDS), "resamples": min(config.resamples, RESAMPLES)}
    whole = {name: getattr(config, name) for name in Config.model_fields}
    return Config(**whole | small | {"data": data, "methods": methods, "all_methods": False})


def _small(entry: Data) -> Data:
    """Few images and views; the compact model sees smaller pictures, any other stays as it is."""
    backbone = "compact:64" if entry.backbone.partition(":")[0] == "compact" else entry.backbone
    limit, views = min(entry.limit or IMAGES, IMAGES), min(entry.views, VIEWS)
    return entry.model_copy(update={"limit": limit, "views": views, "backbone": backbone})


def _quick(config: Config, label: str, entry: Method) -> Method:
    if "epochs" not in parameters(config.class_of(label)):
        return entry
    return entry.model_copy(update={"params": {**entry.params, "epochs": EPOCHS}, "steps": None})
