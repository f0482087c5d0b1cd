"""Dual encoders of transformers (CLIP, SigLIP and their kin), from the hub or from a local folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from vilu.artifacts.hashing import tensors_hash
from vilu.backbones.base import DualEncoder, detach_projection
from vilu.backbones.loading import (
    load_cached_first,
    load_local,
    require_hub_id,
    tokenizer_identity,
)
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import ProvenanceError, UsageError
from vilu.extras import import_extra

MEMBERS = ("get_image_features", "get_text_features", "logit_scale")
"""What a model of transformers must have to be a dual encoder with a temperature of its own."""

PIXEL_SETTINGS = (
    *("do_", "size", "crop_size", "resample", "rescale_factor"),
    *("image_mean", "image_std", "image_processor"),
)
"""How the settings of an image processor begin that change pixels."""


@dataclass(frozen=True)
class Towers:
    """A model of transformers on its device, and its processor (both untyped there)."""

    model: Any
    processor: Any

    @property
    def text_length(self) -> int:
        """Tokens of a text, which is padded to it: SigLIP was trained so, and to CLIP it makes no difference."""
        lengths = (
            self.processor.tokenizer.model_max_length,
            self.model.config.text_config.max_position_embeddings,
        )
        return int(min(lengths))

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """What the text tower takes; never a mask for SigLIP, which reads its padding."""
        tokens = self.processor(
            text=texts,
            padding="max_length",
            truncation=True,
            max_length=self.text_length,
            return_tensors="pt",
        )
        masked = not self.model.config.model_type.startswith("siglip")
        return {
            name: rows
            for name, rows in tokens.to(self.model.device).items()
            if masked or name != "attention_mask"
        }

    def truncates(self, texts: list[str]) -> list[bool]:
        """Whether texts have more tokens, with the special ones, than the tower reads."""
        tokens = self.processor.tokenizer(texts, padding=False, truncation=False, verbose=False)[
            "input_ids"
        ]
        return [len(text) > self.text_length for text in tokens]

    def encode_texts(self, texts: list[str]) -> Tensor:
        """(M, D)."""
        return self._features("get_text_features", **self.tokenize(texts))

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, D)."""
        return self._features("get_image_features", pixel_values=pixels)

    def _features(self, tower: str, **inputs: Tensor) -> Tensor:
        """Embeddings from a tower: it answers with a tensor in transformers 4, with an output object in 5."""
        output = getattr(self.model, tower)(**inputs)
        return output if isinstance(output, Tensor) else cast("Tensor", output.pooler_output)

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, H, W)."""
        return cast("Tensor", self.processor(images=image, return_tensors="pt")["pixel_values"][0])

    def pixel_settings(self) -> str:
        """What decides about pixels, as JSON: the class, which says who resizes, and its settings."""
        processor = self.processor.image_processor
        settings = {
            key: value
            for key, value in processor.to_dict().items()
            if key.startswith(PIXEL_SETTINGS)
        }
        return json.dumps({"class": type(processor).__name__, **settings}, sort_keys=True)


def _read(transformers: ModuleType, origin: Path | str, name: str) -> tuple[Towers, str]:
    """Model, processor and the tokenizer's identity, or an error where transformers would only warn."""
    model, report = transformers.AutoModel.from_pretrained(
        origin, dtype=torch.float32, output_loading_info=True
    )
    if unfilled := sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"]))):
        raise ProvenanceError(
            f"{name} has no weights for {len(unfilled)} tensors, the first is {unfilled[0]}."
        )
    if absent := [member for member in MEMBERS if not hasattr(model, member)]:
        raise UsageError(
            f"{name} is a {type(model).__name__}, which has no {', '.join(absent)}; a dual encoder was expected, "
            "such as CLIP or SigLIP."
        )
    processor = transformers.AutoProcessor.from_pretrained(origin)
    # By default transformers resizes with torchvision, which is up to two grey levels off Pillow,
    # with which CLIP was trained and open_clip resizes; transformers 4 knows the other keyword.
    processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
        origin, backend="pil", use_fast=False
    )
    towers = Towers(model, processor)
    if towers.pixels(Image.new("RGB", (64, 64))).ndim != 3:
        raise UsageError(
            f"{name} cuts pictures into patches of varying number; take a model of fixed resolution."
        )
    return towers, tokenizer_identity(
        towers.processor.tokenizer, lambda texts: towers.tokenize(texts)["input_ids"]
    )


def load(argument: str, device: torch.device, precision: str) -> DualEncoder:
    """A dual encoder of transformers with its own processor, logit scale and logit bias.

    Args:
        argument: ORG/NAME on the hub, or a folder that ``save_pretrained`` of model and processor
            wrote.
        device: Where to put it.
        precision: "fp32" or "bf16" (image tower under autocast).
    """
    transformers = import_extra("transformers", "hf")
    folder = Path(argument).expanduser()
    if argument and folder.is_dir():
        name = f"hf:{folder.resolve().name}"
        towers, tokenizer = load_local(lambda: _read(transformers, folder, name), name)
    else:
        require_hub_id(argument)
        name = f"hf:{argument}"
        towers, tokenizer = load_cached_first(
            lambda: _read(transformers, argument, name), name, argument
        )
    model = towers.model.eval().requires_grad_(requires_grad=False)
    weights = tensors_hash(model.state_dict())
    model.to(device)
    probe = towers.pixels(Image.new("RGB", (64, 64)))[None].to(device)
    space = EmbeddingSpace(
        embed_dim=towers.encode_texts(["a photo"]).shape[1],
        logit_scale=model.logit_scale.exp().item(),
        logit_bias=model.logit_bias.item() if hasattr(model, "logit_bias") else 0.0,
        backbone=name,
        weights=weights,
        preprocess=towers.pixel_settings(),
        tokenizer=tokenizer,
        precision=precision,
    )
    return DualEncoder(
        space,
        device,
        transform=towers.pixels,
        image_tower=towers.encode_images,
        text_tower=towers.encode_texts,
        truncates=towers.truncates,
        image_projection=detach_projection(
            model, ["visual_projection"], lambda: towers.encode_images(probe)
        ),
        text_projection=detach_projection(
            model, ["text_projection"], lambda: towers.encode_texts(["a photo"])
        ),
        texts_known_as=space.fingerprint,
    )
