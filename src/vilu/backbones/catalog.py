"""Backbones by name."""

from __future__ import annotations

import difflib
import importlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vilu.errors import MissingModelError, ProvenanceError, UsageError

if TYPE_CHECKING:
    from vilu.backbones.base import Backbone


FORMATS = {"open_clip": "open_clip_config.json", "hf": "config.json"}
"""The libraries that load a named backbone, each with the file by which its folders are known."""

USUAL = "open_clip"


@dataclass(frozen=True)
class NamedBackbone:
    """A model that two libraries know, at one resolution.

    Attributes:
        title: For tables.
        open_clip: NAME/TAG in open_clip's registry.
        open_clip_hub: Repository of these weights for open_clip.
        hf: Repository of the same weights for transformers.
        embed_dim: Width D of the joint space.
        feature_dim: Width F of the image features.
        image_size: Pixels of a side.
        context_length: Tokens of a text, the special ones included.
        quick_gelu: Whether the weights want QuickGELU, x sigmoid(1.702 x), in place of GELU.
        tanh_gelu: Whether they were trained with GELU's tanh approximation, Flax's default, as transformers has it;
            open_clip has the exact function, unless it is told so.
        image_gflop: 10^9 floating point operations of the image tower per image.
        image_rate: Images per second of the image tower in float32 on 2 CPU cores (``benchmarks/encode_rates.py``).
        text_rate: Texts per second of the text tower, likewise.
        a100_rate: Published images per second on one A100 (``A100_SOURCE``); None where none is.
        reference: Where the model comes from.
    """

    title: str
    open_clip: str
    open_clip_hub: str
    hf: str
    embed_dim: int
    feature_dim: int
    image_size: int
    context_length: int
    quick_gelu: bool
    tanh_gelu: bool
    image_gflop: float
    image_rate: float
    text_rate: float
    a100_rate: float | None
    reference: str


A100_SOURCE = "clip-retrieval, docs/distributed_clip_inference.md"

CLIP = "Radford et al., ICML 2021"
SIGLIP = "Zhai et al., ICCV 2023"

NAMED: dict[str, NamedBackbone] = {
    "clip-vit-b32": NamedBackbone(
        title="CLIP ViT-B/32",
        open_clip="ViT-B-32/openai",
        open_clip_hub="timm/vit_base_patch32_clip_224.openai",
        hf="openai/clip-vit-base-patch32",
        embed_dim=512,
        feature_dim=768,
        image_size=224,
        context_length=77,
        quick_gelu=True,
        tanh_gelu=False,
        image_gflop=8.7,
        image_rate=19.1,
        text_rate=24.9,
        a100_rate=2500.0,
        reference=CLIP,
    ),
    "clip-vit-b16": NamedBackbone(
        title="CLIP ViT-B/16",
        open_clip="ViT-B-16/openai",
        open_clip_hub="timm/vit_base_patch16_clip_224.openai",
        hf="openai/clip-vit-base-patch16",
        embed_dim=512,
        feature_dim=768,
        image_size=224,
        context_length=77,
        quick_gelu=True,
        tanh_gelu=False,
        image_gflop=33.7,
        image_rate=4.0,
        text_rate=25.9,
        a100_rate=1100.0,
        reference=CLIP,
    ),
    "clip-vit-l14": NamedBackbone(
        title="CLIP ViT-L/14",
        open_clip="ViT-L-14/openai",
        open_clip_hub="timm/vit_large_patch14_clip_224.openai",
        hf="openai/clip-vit-large-patch14",
        embed_dim=768,
        feature_dim=1024,
        image_size=224,
        context_length=77,
        quick_gelu=True,
        tanh_gelu=False,
        image_gflop=155.5,
        image_rate=0.89,
        text_rate=12.0,
        a100_rate=312.0,
        reference=CLIP,
    ),
    "siglip-vit-b16": NamedBackbone(
        title="SigLIP ViT-B/16",
        open_clip="ViT-B-16-SigLIP/webli",
        open_clip_hub="timm/ViT-B-16-SigLIP",
        hf="google/siglip-base-patch16-224",
        embed_dim=768,
        feature_dim=768,
        image_size=224,
        context_length=64,
        quick_gelu=False,
        tanh_gelu=True,
        image_gflop=34.0,
        image_rate=4.8,
        text_rate=15.7,
        a100_rate=None,
        reference=SIGLIP,
    ),
    "siglip-vit-l16": NamedBackbone(
        title="SigLIP ViT-L/16",
        open_clip="ViT-L-16-SigLIP-256/webli",
        open_clip_hub="timm/ViT-L-16-SigLIP-256",
        hf="google/siglip-large-patch16-256",
        embed_dim=1024,
        feature_dim=1024,
        image_size=256,
        context_length=64,
        quick_gelu=False,
        tanh_gelu=True,
        image_gflop=156.1,
        image_rate=0.96,
        text_rate=4.2,
        a100_rate=None,
        reference=SIGLIP,
    ),
}


@dataclass(frozen=True)
class Place:
    """Where a named backbone is loaded from.

    Attributes:
        name: In embedding spaces: NAME by open_clip, NAME@hf by transformers, wherever the weights lie.
        spec: KIND:ARGUMENT of the loader.
        options: More for the loader.
    """

    name: str
    spec: str
    options: dict[str, bool]


def find_named(spec: str, models: Path | None = None) -> Place | None:
    """Where NAME, NAME@open_clip or NAME@hf is: on the hub, or in the sub-folder NAME of ``models``.

    Without a library, open_clip takes it from the hub; from a folder, the library whose files lie there.

    Returns:
        The place; None where ``spec`` is no named backbone.

    Raises:
        UsageError: If there is no such library.
        MissingModelError: If ``models`` is given and the model is not in it, or not in the format asked for.
        ProvenanceError: If its configuration in that folder cannot be read, or is of another activation.
    """
    name, sign, kind = spec.partition("@")
    if name not in NAMED:
        return None
    if sign and kind not in FORMATS:
        raise UsageError(f"{name} is loaded by {' or '.join(f'{name}@{known}' for known in FORMATS)}. Got {spec!r}.")
    if models is None:
        kind = kind or USUAL
        argument: str = getattr(NAMED[name], kind)
    else:
        folder = Path(models) / name
        kind = _format_of(folder, NAMED[name], [kind] if kind else list(FORMATS))
        if kind == "open_clip":
            _require_activation(folder / FORMATS[kind], NAMED[name])
        argument = str(folder)
    options = {"tanh_gelu": NAMED[name].tanh_gelu} if kind == "open_clip" else {}
    return Place(name if kind == USUAL else f"{name}@{kind}", f"{kind}:{argument}", options)


def _format_of(folder: Path, model: NamedBackbone, kinds: list[str]) -> str:
    """The first of these formats that lies in a folder."""
    for kind in kinds:
        if (folder / FORMATS[kind]).is_file():
            return kind
    files = " or ".join(FORMATS[kind] for kind in kinds)
    repositories = {"open_clip": model.open_clip_hub, "hf": model.hf}
    ways = " or ".join(f"`hf download {repositories[kind]} --local-dir {folder}`" for kind in kinds)
    raise MissingModelError(
        f"there is no {files} in the folder {folder}, where {model.title} was expected. Where there is a network, "
        f"{ways} makes that folder; given a folder of models, vilu downloads nothing."
    )


def _require_activation(file: Path, model: NamedBackbone) -> None:
    """Refuse a folder of open_clip that says GELU of weights which want QuickGELU: open_clip computes with it."""
    try:
        quick_gelu = bool(json.loads(file.read_bytes())["model_cfg"].get("quick_gelu", False))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ProvenanceError(
            f"{file} is no configuration of open_clip ({error!r}); expected model_cfg in it."
        ) from error
    if quick_gelu != model.quick_gelu:
        raise ProvenanceError(
            f"the weights of {model.title} want quick_gelu {json.dumps(model.quick_gelu)}, and model_cfg in {file} has "
            f"{json.dumps(quick_gelu)}: every embedding would be another. Set it there, if these are the weights."
        )


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
