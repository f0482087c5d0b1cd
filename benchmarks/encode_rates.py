"""Images and texts per second of the named backbones and of the compact model, side by side.

Weights are random and of the real size, so nothing is downloaded: what a tower costs does not
depend on what it has learned. Only the towers run, in float32, on pixels and tokens that are ready.
All take turns, pass by pass, and of each the best pass counts: whatever else the machine does can
only slow one down.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vilu.backbones.catalog import load_backbone, named_backbones
from vilu.extras import import_extra, quiet

IMAGES, TEXTS = 16, 16
COMPACT_SIZES = (128, 224)


@dataclass(frozen=True)
class Towers:
    """The two towers of a model on a batch each, which is ready.

    Attributes:
        name: Of the model.
        pixels: Of a side of an image.
        run_images: Encodes ``IMAGES`` images.
        run_texts: Encodes ``TEXTS`` texts.
        parameters: Number of weights of both towers, in millions; "-" of the compact model, which
            hides them.
    """

    name: str
    pixels: int
    run_images: Callable[[], object]
    run_texts: Callable[[], object]
    parameters: str


def noise(size: int) -> Tensor:
    return torch.rand(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def named(name: str) -> Towers:
    """A named backbone with random weights, as open_clip builds it."""
    entry = named_backbones()[name]
    open_clip = import_extra("open_clip", "clip")
    model_name, _, tag = entry.open_clip.partition("/")
    wants = open_clip.get_pretrained_cfg(model_name, tag)
    with quiet():
        model: Any = open_clip.create_model(
            model_name, force_quick_gelu=bool(wants.get("quick_gelu"))
        ).eval()
    vocabulary = open_clip.get_model_config(model_name)["text_cfg"]["vocab_size"]
    tokens = torch.randint(
        1, vocabulary, (TEXTS, entry.context_length), generator=torch.Generator().manual_seed(0)
    )
    pixels = noise(entry.image_size)
    return Towers(
        name,
        entry.image_size,
        lambda: model.encode_image(pixels),
        lambda: model.encode_text(tokens),
        f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f}",
    )


def compact(size: int) -> Towers:
    """The compact model, which has its weights, on prompts."""
    backbone = load_backbone(f"compact:{size}", device="cpu")
    pixels, texts = noise(size), [f"a photo of thing number {i}." for i in range(TEXTS)]
    return Towers(
        f"compact:{size}",
        size,
        lambda: backbone.encode_images(pixels),
        lambda: backbone.encode_texts(texts),
        "-",
    )


def gflop(run: Callable[[], object], number: int) -> float:
    """10^9 floating point operations per item; a multiplication with its addition is two."""
    run()  # what is done once only is not counted, and memory is warm
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        value=False
    )  # its one big operation would not be counted
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(value=fused)
    return float(counter.get_total_flops()) / number / 1e9


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(repeats: int = 6) -> dict[str, float]:
    """Print a table of all models and return images per second."""
    with torch.inference_mode():
        models = [*map(named, named_backbones()), *map(compact, COMPACT_SIZES)]
        work = [
            (gflop(model.run_images, IMAGES), gflop(model.run_texts, TEXTS)) for model in models
        ]
        rounds = [
            [(seconds(model.run_images), seconds(model.run_texts)) for model in models]
            for _ in range(repeats)
        ]
    print(
        f"{torch.get_num_threads()} threads, float32, {IMAGES} images or {TEXTS} texts a pass, "
        f"best of {repeats} passes"
    )
    row = "{:<16}{:>5}{:>14}{:>14}{:>12}{:>14}{:>11}"
    print(row.format("", "px", "10^6 weights", "GFLOP/image", "images/s", "GFLOP/text", "texts/s"))
    rates = {}
    for i, model in enumerate(models):
        images = IMAGES / min(times[i][0] for times in rounds)
        texts = TEXTS / min(times[i][1] for times in rounds)
        figures = (
            model.parameters,
            f"{work[i][0]:.2f}",
            f"{images:.2f}",
            f"{work[i][1]:.2f}",
            f"{texts:.1f}",
        )
        print(row.format(model.name, model.pixels, *figures))
        rates[f"{model.name}_images_per_s"] = round(images, 2)
    return rates


if __name__ == "__main__":
    print(json.dumps(main()))
