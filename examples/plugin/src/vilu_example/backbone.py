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
    """What ``--backbone colours`` gives; ``argument`` is what follows a colon, here nothing."""
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
        image_tower=lambda pixels: to_vectors(pixels.mean(dim=(2, 3))),
        text_tower=lambda texts: to_vectors(torch.tensor([mean_colour(text) for text in texts])),
        truncates=lambda texts: [False] * len(texts),
    )


def to_pixels(image: Image.Image) -> Tensor:
    """(3, SIDE, SIDE) pixels from 0 to 1."""
    small = image.convert("RGB").resize((SIDE, SIDE))
    flat = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return flat.reshape(SIDE, SIDE, 3).permute(2, 0, 1) / 255


def mean_colour(text: str) -> list[float]:
    """The mean of the colours that a text names; grey where it names none.

    >>> mean_colour("a red and white fish")
    [1.0, 0.5, 0.5]
    """
    named = [COLOURS[word] for word in text.lower().split() if word in COLOURS]
    return torch.tensor(named or [GREY]).mean(dim=0).tolist()


def to_vectors(colour: Tensor) -> Tensor:
    """(B, 3) colours to (B, 4) vectors, none of which is zero: the last number is always 0.5."""
    centred = colour - 0.5
    return torch.cat([centred, torch.full_like(centred[:, :1], 0.5)], dim=1)
