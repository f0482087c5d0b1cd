"""The backbones: kinds, which take a name each library understands, and those with a name of their own."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.backbones.named import NAMED, find_named
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.backbones.base import Backbone

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class BackboneKind:
    """Where to find a kind of backbone, without importing it.

    Attributes:
        loader: "module:function", called with what follows the colon of the spec, the device and the precision.
        description: For people.
        extra: Optional dependency that it needs.
    """

    loader: str
    description: str
    extra: str


BACKBONES = {
    "compact": BackboneKind(
        "vilu.backbones.compact:load",
        "compact or compact:SIZE, a small model from PyPI packages (EfficientNet-Lite0 + MiniLM); needs no model hub",
        "compact",
    ),
    "open_clip": BackboneKind(
        "vilu.backbones.open_clip:load",
        "open_clip:NAME/TAG, open_clip:hf-hub:ORG/NAME or open_clip:FOLDER, every model of OpenCLIP",
        "clip",
    ),
    "hf": BackboneKind(
        "vilu.backbones.hf:load",
        "hf:ORG/NAME or hf:FOLDER, CLIP, SigLIP and other dual encoders of transformers",
        "hf",
    ),
}


def load_backbone(
    spec: str, *, device: str = "auto", precision: str = "fp32", models: str | Path | None = None
) -> Backbone:
    """The frozen dual encoder that ``spec`` names, ready to encode.

    Args:
        spec: NAME of ``NAMED`` (by open_clip; NAME@hf by transformers), or KIND or KIND:ARGUMENT, see ``BACKBONES``.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "fp32", or "bf16" for the image tower under autocast; what comes out is always float32.
        models: Folder with a sub-folder for each named backbone, in the format of either library. Named backbones then
            come from there and never from the hub; to other specs it makes no difference.

    Raises:
        UsageError: If the spec, the device or the precision is unknown.
        MissingModelError: If the weights or an optional dependency are not on this machine, or not in ``models``.
        ProvenanceError: If the weights do not fit the model.
    """
    from vilu.device import resolve_device

    place = find_named(spec, None if models is None else Path(models))
    kind, _, argument = (place.spec if place else spec).partition(":")
    if kind not in BACKBONES:
        known = [*BACKBONES, *NAMED]
        near = difflib.get_close_matches(kind.partition("@")[0], known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no backbone {spec!r}; known are {', '.join(known)}.{hint}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}. Got {precision!r} instead.")
    module, _, function = BACKBONES[kind].loader.partition(":")
    load = getattr(importlib.import_module(module), function)
    options = place.options if place else {}
    backbone: Backbone = load(argument, resolve_device(device), precision, **options)
    if place:
        backbone.space = replace(backbone.space, backbone=place.name)
    return backbone
