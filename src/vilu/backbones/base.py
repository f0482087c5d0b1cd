"""What the rest of vilu needs of a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor

from vilu.space import EmbeddingSpace


class Backbone(Protocol):
    """A frozen dual encoder; preprocessing and tokenizer come from the model, never from a default.

    Attributes:
        space: Identity of the joint embedding space, with the model's own logit scale and bias.
    """

    space: EmbeddingSpace

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32 pixels on the CPU, of one size for all images. Thread-safe."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 unit-norm embeddings on the CPU of (B, 3, H, W) pixels; moves them to its own device."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(M, D) float32 unit-norm embeddings on the CPU."""
