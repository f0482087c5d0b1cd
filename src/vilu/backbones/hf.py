"""Dual encoders in transformers (CLIP, SigLIP and similar), from the hub or a local folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from vilu.artifacts.hashing import tensors_hash
from vilu.backbones.base import PROBE_IMAGE, DualEncoder, detach_projection, with_bf16_members
from vilu.backbones.loading import (
    load_cached_first,
    load_local,
    require_hub_id,
    tokenizer_identity,
)
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import ProvenanceError, UsageError
from vilu.extras import import_extra

DUAL_ENCODER_MEMBERS = ("get_image_features", "get_text_features", "logit_scale")
"""Members that a transformers dual encoder with a logit scale must have."""

PIXEL_SETTING_PREFIXES = (
    "do_",
    "size",
    "crop_size",
    "resample",
    "rescale_factor",
    "image_mean",
    "image_std",
    "image_processor",
)
"""Name prefixes of the image processor settings that change pixels."""


@dataclass(frozen=True)
class Towers:
    """A transformers model on a device, with the processor."""

    # Any, because transformers has no types for these objects
    model: Any
    processor: Any

    @property
    def n_padded_tokens(self) -> int:
        """Number of tokens per text after padding.

        SigLIP was trained with this padding. CLIP's embeddings do not depend on the padding.
        """
        max_tokens_of_tokenizer = self.processor.tokenizer.model_max_length
        max_tokens_of_tower = self.model.config.text_config.max_position_embeddings
        return int(min(max_tokens_of_tokenizer, max_tokens_of_tower))

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Make the text tower's inputs.

        SigLIP gets no attention mask, because SigLIP was trained to read the padding, too.
        """
        tokens = self.processor(
            text=texts,
            padding="max_length",
            truncation=True,
            max_length=self.n_padded_tokens,
            return_tensors="pt",
        )
        tokens_on_device = tokens.to(self.model.device)
        inputs: dict[str, Tensor] = dict(tokens_on_device.items())
        if self.model.config.model_type.startswith("siglip"):
            inputs.pop("attention_mask", None)
        return inputs

    def truncates(self, texts: list[str]) -> list[bool]:
        """Return for each text whether the text has more tokens than the tower reads.

        Special tokens count, too.
        """
        tokens = self.processor.tokenizer(texts, padding=False, truncation=False, verbose=False)
        return [len(token_ids) > self.n_padded_tokens for token_ids in tokens["input_ids"]]

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Map M texts to embeddings (M, D) with any norm."""
        inputs = self.tokenize(texts)
        return self._embeddings("get_text_features", **inputs)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) to embeddings (B, D) with any norm."""
        return self._embeddings("get_image_features", pixel_values=pixels)

    def _embeddings(self, method_name: str, **inputs: Tensor) -> Tensor:
        """Return the embeddings that the model's method ``method_name`` computes from ``inputs``.

        In transformers 4 the method returns a tensor, in transformers 5 an object with the tensor.
        """
        method = getattr(self.model, method_name)
        output = method(**inputs)
        if isinstance(output, Tensor):
            return output
        return cast("Tensor", output.pooler_output)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Convert an image to pixels (3, H, W)."""
        inputs = self.processor(images=image, return_tensors="pt")
        return cast("Tensor", inputs["pixel_values"][0])

    def resized_side(self) -> int | None:
        """Return an upper limit for the length to which an image's shorter side is resized.

        Return None if the processor does not resize.
        """
        settings = self.processor.image_processor.to_dict()
        if not settings.get("do_resize") or not settings.get("size"):
            return None
        # such as {"shortest_edge": 224}, or {"height": 224, "width": 224}
        size = dict(settings["size"])
        lengths = [length for length in size.values() if length]
        return max(lengths, default=None)

    def pixel_settings(self) -> str:
        """Return the settings for computing the pixels, as JSON.

        The image processor's class is included, because the class decides which library resizes.
        """
        processor = self.processor.image_processor
        settings = {"class": type(processor).__name__}
        all_settings = processor.to_dict()
        for key, value in all_settings.items():
            if key.startswith(PIXEL_SETTING_PREFIXES):
                settings[key] = value
        return json.dumps(settings, sort_keys=True)


def _read_towers(transformers: ModuleType, origin: Path | str, name: str) -> tuple[Towers, str]:
    """Read model and processor, and return both with the tokenizer's identity.

    ``origin`` is the model's folder, or the repository on the hub. ``name`` is the model's name in
    messages. Missing weights raise an error, although transformers only warns.
    """
    model, loading_report = transformers.AutoModel.from_pretrained(
        origin, dtype=torch.float32, output_loading_info=True
    )
    _require_dual_encoder(model, loading_report, name)
    processor = transformers.AutoProcessor.from_pretrained(origin)
    # By default transformers resizes with torchvision. torchvision's pixels differ from Pillow's
    # pixels by up to two grey levels. Pillow is used here, because CLIP was trained with Pillow,
    # and open_clip resizes with Pillow. Both keywords ask for Pillow: transformers 4 reads
    # ``use_fast``, and transformers 5 reads ``backend``.
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
        origin, backend="pil", use_fast=False
    )
    towers = Towers(model, processor)
    if towers.preprocess(PROBE_IMAGE).ndim != 3:
        raise UsageError(
            f"{name} cuts pictures into a varying number of patches; take a model of fixed "
            "resolution."
        )

    def encode(texts: list[str]) -> Tensor:
        return towers.tokenize(texts)["input_ids"]

    return towers, tokenizer_identity(processor.tokenizer, encode)


def _require_dual_encoder(
    model: Any,  # noqa: ANN401 - untyped in transformers
    loading_report: Mapping[str, Iterable[object]],
    name: str,
) -> None:
    """Raise an error for a model with missing weights, or without an image or text tower.

    ``loading_report`` is transformers' report on the loaded weights.
    """
    missing_weights = [*loading_report["missing_keys"], *loading_report["mismatched_keys"]]
    if missing_weights:
        first_name = min(str(weight) for weight in missing_weights)
        raise ProvenanceError(
            f"{name} has no weights for {len(missing_weights)} tensors, the first is {first_name}."
        )
    missing_members = [member for member in DUAL_ENCODER_MEMBERS if not hasattr(model, member)]
    if missing_members:
        listed_members = ", ".join(missing_members)
        raise UsageError(
            f"{name} is a {type(model).__name__}, which has no {listed_members}; a "
            "dual encoder was expected, such as CLIP or SigLIP."
        )


def load(argument: str, device: torch.device, precision: str) -> DualEncoder:
    """Load a transformers dual encoder with the model's processor, logit scale and bias.

    Args:
        argument: ORG/NAME on the hub, or a folder in which both the model and the processor were
            saved by ``save_pretrained``.
        device: The model's device.
        precision: "fp32" or "bf16" (image tower in bfloat16).
    """
    name, towers, tokenizer = _load_towers(argument)
    model = towers.model
    model.eval()
    model.requires_grad_(requires_grad=False)
    weights = tensors_hash(model.state_dict())
    model.to(device)
    probe_pixels = towers.preprocess(PROBE_IMAGE)[None].to(device)
    logit_bias = model.logit_bias.item() if hasattr(model, "logit_bias") else 0.0
    text_embedding = towers.encode_texts(["a photo"])
    logit_scale = model.logit_scale.exp().item()
    preprocess = towers.pixel_settings()
    space = EmbeddingSpace(
        embed_dim=text_embedding.shape[1],
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        backbone=name,
        weights=weights,
        preprocess=preprocess,
        tokenizer=tokenizer,
        precision=precision,
    )
    image_projection, text_projection = _detach_projections(towers, probe_pixels)
    bf16_tower = None
    if precision == "bf16":
        bf16_model = with_bf16_members(model, ["vision_model", "visual_projection"])
        bf16_tower = Towers(bf16_model, towers.processor).encode_images
    return DualEncoder(
        space,
        device,
        transform=towers.preprocess,
        image_tower=towers.encode_images,
        text_tower=towers.encode_texts,
        truncates=towers.truncates,
        image_projection=image_projection,
        text_projection=text_projection,
        text_cache_key=space.fingerprint,
        bf16_tower=bf16_tower,
        resize_to=towers.resized_side(),
    )


def _detach_projections(
    towers: Towers, probe_pixels: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Remove the image tower's and the text tower's last maps, and return these maps.

    See ``detach_projection``.
    """

    def encode_probe_image() -> Tensor:
        return towers.encode_images(probe_pixels)

    def encode_probe_text() -> Tensor:
        return towers.encode_texts(["a photo"])

    image_projection = detach_projection(towers.model, ["visual_projection"], encode_probe_image)
    text_projection = detach_projection(towers.model, ["text_projection"], encode_probe_text)
    return image_projection, text_projection


def _load_towers(argument: str) -> tuple[str, Towers, str]:
    """Load the towers from a folder or the hub.

    Returns the backbone's name, the towers, and the tokenizer's identity.
    """
    transformers = import_extra("transformers", "hf")
    folder = Path(argument).expanduser()
    if argument and folder.is_dir():
        name = f"hf:{folder.resolve().name}"
        read_folder = partial(_read_towers, transformers, folder, name)
        towers, tokenizer = load_local(read_folder, name)
        return name, towers, tokenizer
    require_hub_id(argument)
    name = f"hf:{argument}"
    read_repository = partial(_read_towers, transformers, argument, name)
    towers, tokenizer = load_cached_first(read_repository, name, repository=argument)
    return name, towers, tokenizer
