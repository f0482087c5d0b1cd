"""OpenCLIP models, by name and pretraining tag, from the hub or from a local folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vilu.artifacts.hashing import tensors_hash
from vilu.backbones.base import PROBE_IMAGE, DualEncoder, detach_projection, with_bf16_members
from vilu.backbones.loading import (
    load_cached_first,
    load_local,
    require_hub_id,
    tokenizer_identity,
)
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import MissingModelError, ProvenanceError, UsageError
from vilu.extras import import_extra

CONFIG_FILE = "open_clip_config.json"  # the configuration file's name in a folder
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")
IMAGE_PROJECTIONS = ("visual.proj", "visual.head.proj")
"""Possible dotted names for an image tower's last map in open_clip."""
TEXT_PROJECTIONS = ("text_projection", "text.text_projection", "text.proj")
"""Possible dotted names for a text tower's last map in open_clip."""

Transform = Callable[[Image.Image], Tensor]


class Tokenizer(Protocol):
    """The interface that tokenizers have in open_clip."""

    context_length: int

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        """Convert M texts to token numbers (M, L)."""


@dataclass(frozen=True)
class ModelLocation:
    """A model's location."""

    name: str  # the backbone's name, without local paths
    model_name: str  # the model's name in open_clip, with or without a schema such as "hf-hub:"
    repository: str | None  # repository on the hub, or None for a local folder
    # downloads weights missing on this machine, and raises OSError if the download fails
    download_weights: Callable[[], object]
    # for a model name without schema: the pretraining tag, or a checkpoint file's path
    tag: str | None = None
    # whether the weights need QuickGELU. If the model does not use QuickGELU, open_clip only warns.
    quick_gelu: bool = False


def load(
    argument: str, device: torch.device, precision: str, *, tanh_gelu: bool = False
) -> DualEncoder:
    """Load an OpenCLIP model with preprocessing, tokenizer, logit scale and bias.

    Args:
        argument: NAME/TAG, NAME/PATH (a checkpoint file's path), "hf-hub:ORG/NAME", or a folder
            (also as "local-dir:FOLDER") with ``open_clip_config.json`` and weights.
        device: The model's device.
        precision: "fp32" or "bf16" (image tower in bfloat16).
        tanh_gelu: Whether the tanh approximation replaces every GELU.
    """
    open_clip = import_extra("open_clip", "clip")
    location = find_model(open_clip, argument)
    network, transform, tokenizer, tokenizer_id = _load_model(open_clip, location)
    network = network.eval().requires_grad_(requires_grad=False)
    # hashed before the model is changed, because the hash identifies the weights on disk
    weights = tensors_hash(network.state_dict())
    if tanh_gelu:
        use_tanh_gelu(network, location.name)
    network = network.to(device)

    def encode_texts(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts).to(device)
        return cast("Tensor", network.encode_text(tokens))

    probe_pixels = transform(PROBE_IMAGE)[None].to(device)
    pixel_settings = open_clip.get_model_preprocess_cfg(network)
    text_embedding = encode_texts(["a photo"])
    logit_scale = network.logit_scale.exp().item()
    logit_bias = 0.0 if network.logit_bias is None else network.logit_bias.item()
    preprocess = json.dumps(pixel_settings, sort_keys=True)
    space = EmbeddingSpace(
        embed_dim=text_embedding.shape[1],
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        backbone=location.name,
        weights=weights,
        preprocess=preprocess,
        tokenizer=tokenizer_id,
        precision=precision,
    )
    image_projection, text_projection = _detach_projections(network, probe_pixels, encode_texts)
    bf16_tower = None
    if precision == "bf16":
        bf16_tower = with_bf16_members(network, ["visual"]).encode_image
    return DualEncoder(
        space,
        device,
        transform=transform,
        image_tower=network.encode_image,
        text_tower=encode_texts,
        truncates=lambda texts: find_truncated(tokenizer, texts),
        image_projection=image_projection,
        text_projection=text_projection,
        text_cache_key=space.fingerprint,
        bf16_tower=bf16_tower,
        # "size" is a single length, or height and width
        resize_to=int(np.max(pixel_settings["size"])),
    )


def _detach_projections(
    network: Any,  # noqa: ANN401 - untyped in open_clip
    probe_pixels: Tensor,
    encode_texts: Callable[[list[str]], Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Remove the image tower's and the text tower's last maps, and return these maps.

    See ``detach_projection``.
    """

    def encode_probe_image() -> Tensor:
        embedding: Tensor = network.encode_image(probe_pixels)
        return embedding

    def encode_probe_text() -> Tensor:
        return encode_texts(["a photo"])

    image_projection = detach_projection(network, IMAGE_PROJECTIONS, encode_probe_image)
    text_projection = detach_projection(network, TEXT_PROJECTIONS, encode_probe_text)
    return image_projection, text_projection


def _load_model(
    open_clip: ModuleType, location: ModelLocation
) -> tuple[Any, Transform, Tokenizer, str]:
    """Load the network, the preprocessing, the tokenizer, and the tokenizer's identity."""

    def read() -> tuple[Any, Transform, Tokenizer, str]:
        location.download_weights()
        network, transform = open_clip.create_model_from_pretrained(
            location.model_name, pretrained=location.tag, force_quick_gelu=location.quick_gelu
        )
        network.float()  # needed if the caller has changed torch's default type
        tokenizer = open_clip.get_tokenizer(location.model_name)
        # an open_clip tokenizer is also the function for encoding texts
        tokenizer_id = tokenizer_identity(tokenizer, encode=tokenizer)
        return network, transform, tokenizer, tokenizer_id

    if location.repository is None:
        return load_local(read, location.name)
    return load_cached_first(read, location.name, location.repository)


def use_tanh_gelu(network: nn.Module, name: str) -> None:
    """Replace every GELU in a model by the tanh approximation."""
    activations = [module for module in network.modules() if isinstance(module, nn.GELU)]
    if not activations:
        raise ProvenanceError(
            f"{name} has no GELU, so it cannot be a model that was trained with the tanh form of "
            "GELU."
        )
    for activation in activations:
        activation.approximate = "tanh"


def find_truncated(tokenizer: Tokenizer, texts: list[str]) -> list[bool]:
    """Return for each text whether an open_clip tokenizer truncates the text.

    The tokenizers do not report truncation. So every text is tokenized twice: with the tokenizer's
    limit L, and with the limit L + 1. The first L tokens in both results are compared. If the text
    fits, these tokens are equal. If the text is truncated, token number L differs. With limit L,
    token L is the end token. With limit L + 1, token L is the text's next token.
    """
    limit = tokenizer.context_length
    tokens = tokenizer(texts)
    tokens_of_longer_limit = tokenizer(texts, context_length=limit + 1)
    is_different = tokens != tokens_of_longer_limit[:, :limit]
    is_truncated = is_different.any(dim=1)
    return [bool(flag) for flag in is_truncated]


def find_model(open_clip: ModuleType, argument: str) -> ModelLocation:
    """Return the location of the model named by ``argument``."""
    if argument.startswith("hf-hub:"):
        return _hub_location(open_clip, argument)
    folder_path = argument.removeprefix("local-dir:")
    folder = Path(folder_path).expanduser()
    if argument.startswith("local-dir:") or (argument and folder.is_dir()):
        name = f"open_clip:{folder.resolve().name}"
        return ModelLocation(
            name=name,
            model_name=f"local-dir:{folder}",
            repository=None,
            download_weights=lambda: _require_weights(folder),
        )
    return _registry_location(open_clip, argument)


def _hub_location(open_clip: ModuleType, argument: str) -> ModelLocation:
    """Return a hub model's location, hf-hub:ORG/NAME. The configuration is on the hub, too."""
    hub_id = argument.removeprefix("hf-hub:")
    repository = require_hub_id(hub_id)  # ORG/NAME, checked
    hub = open_clip.pretrained

    def download_weights() -> None:
        hub.download_pretrained_from_hf(repository, filename=CONFIG_FILE)
        hub.download_pretrained_from_hf(repository)  # the weights

    return ModelLocation(
        name=f"open_clip:{argument}",
        model_name=argument,
        repository=repository,
        download_weights=download_weights,
    )


def _registry_location(open_clip: ModuleType, argument: str) -> ModelLocation:
    """Return a model's location in open_clip's registry: NAME/TAG, or NAME/PATH with weights."""
    model_name, _, tag = argument.partition("/")
    if model_name not in open_clip.list_models():
        similar_names = difflib.get_close_matches(model_name, open_clip.list_models(), n=3)
        raise UsageError(
            f"open_clip has no model {model_name!r}, and there is no such folder. Expected "
            "NAME/TAG, NAME/PATH of a checkpoint file, hf-hub:ORG/NAME or a folder. Near names: "
            f"{', '.join(similar_names) or 'none'}."
        )
    pretrained_config = open_clip.get_pretrained_cfg(model_name, tag)
    if not pretrained_config:
        return _file_location(open_clip, model_name, tag)
    hub = open_clip.pretrained
    entry = pretrained_config.get("hf_hub", "")  # ORG/NAME/FILE, or ORG/NAME/ for the usual file
    repository, _, _ = entry.rpartition("/")
    if not repository:
        raise UsageError(
            f"the registry of open_clip names no repository of the model hub for {argument} (its "
            f"entry is {entry!r}, expected ORG/NAME/FILE). Choose another tag, or give a folder "
            f"with {CONFIG_FILE} and weights."
        )
    return ModelLocation(
        name=f"open_clip:{argument}",
        model_name=model_name,
        repository=repository,
        download_weights=lambda: hub.download_pretrained(pretrained_config),
        tag=tag,
        quick_gelu=bool(pretrained_config.get("quick_gelu")),
    )


def _file_location(open_clip: ModuleType, model_name: str, path: str) -> ModelLocation:
    """Return the location of a model in open_clip's registry with the weights in a file."""
    file = Path(path).expanduser()
    if not path or not file.is_file():
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        similar_tags = difflib.get_close_matches(path, tags, n=3, cutoff=0.3) or tags[:3]
        raise UsageError(
            f"{model_name} of open_clip has no pretraining tag {path!r}, and there is no such "
            f"file. Near tags: {', '.join(similar_tags) or 'none'}. For weights of your own give "
            f"open_clip:{model_name}/PATH, or the folder of the file with --models."
        )
    return ModelLocation(
        name=f"open_clip:{model_name}/{file.name}",
        model_name=model_name,
        repository=None,
        download_weights=lambda: None,  # the file is on this machine
        tag=str(file),
    )


def _require_weights(folder: Path) -> None:
    """Raise MissingModelError for a folder without a configuration or without weights.

    open_clip would create a model with random weights for such a folder.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise MissingModelError(
            f"the folder {folder} has no {CONFIG_FILE}; open_clip's `push_to_hf_hub` writes one."
        )
    has_weights = any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir())
    if not has_weights:
        raise MissingModelError(
            f"the folder {folder} has no weights; expected a file such as "
            "open_clip_model.safetensors."
        )
