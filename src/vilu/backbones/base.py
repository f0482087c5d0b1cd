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
        feature_dim: Width F of the image features: the image tower's output before its projection into the joint
            space, or where it has none that can be told apart, its output before normalisation.
        projections: Last maps (D, F) of the image tower and (D, F_t) of the text tower where both are linear without
            bias, on the CPU; None where they are not.
    """

    space: EmbeddingSpace
    feature_dim: int
    projections: tuple[Tensor, Tensor] | None

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32 pixels on the CPU, of one size for all images. Thread-safe."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 unit-norm embeddings on the CPU of (B, 3, H, W) pixels; moves them to its own device."""

    def encode_images_and_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the features (B, F) float32 behind them on the CPU, from one pass."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(M, D) float32 unit-norm embeddings on the CPU."""

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        """Of each text, whether the model's tokenizer cuts it off, so that its end has no say in the embedding."""

    def encode_text_features(self, texts: Sequence[str]) -> Tensor:
        """(M, F_t) float32 output of the text tower before its projection, where ``projections`` has one."""
