"""The one runtime of all backbones: batching, precision, device and normalisation around two towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vilu.space import EmbeddingSpace

TEXT_BATCH = 64


def encode_in_batches(encode: Callable[[list[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """(M, D) rows of at least one text, ``TEXT_BATCH`` at a time; texts of like length together need less padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[start : start + TEXT_BATCH] for start in range(0, len(order), TEXT_BATCH)]
    rows = torch.cat([encode([texts[i] for i in batch]) for batch in batches])
    return rows[torch.tensor(order).argsort().to(rows.device)]


class DualEncoder:
    """A frozen dual encoder (the ``Backbone`` protocol), put together from what a loader found.

    Args:
        space: Identity of the joint space; its ``precision`` "bf16" runs the image tower under autocast.
        device: Where the towers are.
        transform: Image to (3, H, W) pixels; thread-safe.
        image_tower: (B, 3, H, W) pixels to features.
        text_tower: M texts to (M, D) embeddings of any norm, always in float32.
        image_head: Features in float32 to (B, D) embeddings of any norm; None where the tower ends in them.
    """

    def __init__(
        self,
        space: EmbeddingSpace,
        device: torch.device,
        *,
        transform: Callable[[Image.Image], Tensor],
        image_tower: Callable[[Tensor], Tensor],
        text_tower: Callable[[list[str]], Tensor],
        image_head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.space = space
        self.device = device
        self._transform = transform
        self._image_tower = image_tower
        self._image_head = image_head
        self._text_tower = text_tower

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32 pixels on the CPU."""
        return self._transform(image)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 unit-norm embeddings on the CPU of (B, 3, H, W) pixels."""
        bf16 = self.space.precision == "bf16"
        with torch.inference_mode():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                rows = self._image_tower(pixels.to(self.device)).float()
            if self._image_head is not None:
                with torch.autocast(self.device.type, enabled=False):
                    rows = self._image_head(rows)
        return _unit(rows)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(M, D) float32 unit-norm embeddings on the CPU."""
        if not texts:
            return torch.empty(0, self.space.embed_dim)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            rows = encode_in_batches(self._text_tower, texts)
        return _unit(rows)


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit norm; made outside inference mode, so that a predictor can train on them."""
    return functional.normalize(rows.float(), dim=-1).cpu()
