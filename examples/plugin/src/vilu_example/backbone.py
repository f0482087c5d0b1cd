"""A backbone: an image is its mean colour, and a text is the colours that it names."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from vilu.backbones.base import DualEncoder
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import UsageError

COLOURS = {
    "black": (0.0, 0.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "green": (0.0, 1.0, 0.0),
    "red": (1.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
}
GREY = (0.5, 0.5, 0.5)
SIDE = 32  # pixels


def load(argument: str, device: torch.device, precision: str) -> DualEncoder:
    """Load the backbone of ``--backbone colours``.

    Args:
        argument: The text after a colon, as in ``colours:TEXT``. This backbone takes none.
        device: The device of the model.
        precision: "fp32" or "bf16".
    """
    if argument:
        raise UsageError(f"the backbone is called colours. Got colours:{argument} instead.")
    space = EmbeddingSpace(
        embed_dim=4,
        logit_scale=10.0,
        backbone="colours",
        weights="1",
        preprocess=f"{SIDE}x{SIDE}",
        tokenizer="words",
        precision=precision,
    )
    return DualEncoder(
        space,
        device,
        transform=to_pixels,
        image_tower=image_tower,
        text_tower=text_tower,
        truncates=truncates,
    )


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an image to pixels (3, SIDE, SIDE) from 0 to 1."""
    small_image = image.convert("RGB").resize((SIDE, SIDE))
    flat_pixels = torch.frombuffer(bytearray(small_image.tobytes()), dtype=torch.uint8)
    return flat_pixels.reshape(SIDE, SIDE, 3).permute(2, 0, 1) / 255


def image_tower(pixels: Tensor) -> Tensor:
    """Compute the vectors (B, 4) of images from their pixels (B, 3, SIDE, SIDE)."""
    colour = pixels.mean(dim=(2, 3))
    return to_vectors(colour)


def text_tower(texts: list[str]) -> Tensor:
    """Compute the vectors (B, 4) of texts."""
    colours = [mean_colour(text) for text in texts]
    return to_vectors(torch.tensor(colours))


def truncates(texts: list[str]) -> list[bool]:
    """Say for each text whether its end is cut off. This backbone reads all words."""
    return [False] * len(texts)


def mean_colour(text: str) -> list[float]:
    """Compute the mean of the colours that a text names.

    If the text names no colour, the result is grey.

    >>> mean_colour("a red and white fish")
    [1.0, 0.5, 0.5]
    """
    words = text.lower().split()
    colours = [COLOURS[word] for word in words if word in COLOURS]
    if not colours:
        colours = [GREY]
    return torch.tensor(colours).mean(dim=0).tolist()


def to_vectors(colour: Tensor) -> Tensor:
    """Convert colours (B, 3) to vectors (B, 4).

    The last number is always 0.5, so no vector is zero.
    """
    centred = colour - 0.5
    last_number = torch.full_like(centred[:, :1], 0.5)
    return torch.cat([centred, last_number], dim=1)
