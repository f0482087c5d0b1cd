"""Images and texts per second on one core, for the named backbones and the compact model.

    python -m benchmarks.encode_rates [NAME ...]

Weights are random and have the real size, so nothing is downloaded. The weights do not change a
tower's time. Only the towers run, on prepared pixels and tokens. Image towers run in float32 and in
bfloat16, text towers in float32. All towers take turns, pass by pass, on one thread. A tower's
result is the processor time of the fastest pass, because other work on the machine can only slow
down a pass.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vilu.backbones.base import with_bf16_members
from vilu.backbones.catalog import load_backbone, named_backbones
from vilu.backbones.products import fast_products
from vilu.extras import import_extra, suppress_messages
from vilu.process import keep_freed_memory

IMAGES, TEXTS = 16, 16
COMPACT_SIZES = {"compact:128": 128, "compact:224": 224}


@dataclass(frozen=True)
class Towers:
    """The two towers in a model, each with a prepared batch.

    Attributes:
        name: Name of the model.
        pixels: Width and height of an image.
        run_images: Encodes ``IMAGES`` images in float32.
        run_images_bf16: Encodes these images in bfloat16.
        run_texts: Encodes ``TEXTS`` texts.
        parameters: Weights in both towers, in millions. "-" for the compact model, since these
            weights are not accessible.
    """

    name: str
    pixels: int
    run_images: Callable[[], object]
    run_images_bf16: Callable[[], object]
    run_texts: Callable[[], object]
    parameters: str


def noise_images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(IMAGES, 3, size, size, generator=generator)


def named_towers(name: str) -> Towers:
    """Build a named backbone with random weights, as open_clip does."""
    entry = named_backbones()[name]
    open_clip = import_extra("open_clip", "clip")
    model_name, _, tag = entry.open_clip.partition("/")
    wants = open_clip.get_pretrained_cfg(model_name, tag)
    with suppress_messages():
        quick_gelu = bool(wants.get("quick_gelu"))
        model: Any = open_clip.create_model(model_name, force_quick_gelu=quick_gelu)
        model.eval()
    vocabulary = open_clip.get_model_config(model_name)["text_cfg"]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocabulary, (TEXTS, entry.context_length), generator=generator)
    pixels = noise_images(entry.image_size)
    rounded = with_bf16_members(model, ["visual"])

    def encode_in_float32() -> Tensor:
        with fast_products(torch.device("cpu")):  # as an embedding does
            rows: Tensor = model.encode_image(pixels)
        return rows

    n_weights = sum(weight.numel() for weight in model.parameters())
    return Towers(
        name,
        entry.image_size,
        encode_in_float32,
        lambda: rounded.encode_image(pixels.bfloat16()),
        lambda: model.encode_text(tokens),
        f"{n_weights / 1e6:.0f}",
    )


def compact_towers(name: str) -> Towers:
    """Load the compact model with the real weights. The texts are prompts."""
    size = COMPACT_SIZES[name]
    backbone = load_backbone(name, device="cpu")
    rounded = load_backbone(name, device="cpu", precision="bf16")
    pixels, texts = noise_images(size), [f"a photo of thing number {i}." for i in range(TEXTS)]
    return Towers(
        name,
        size,
        lambda: backbone.encode_images(pixels),
        lambda: rounded.encode_images(pixels),
        lambda: backbone.encode_texts(texts),
        "-",
    )


def gflop(run: Callable[[], object], number: int) -> float:
    """Count floating point operations per item, in 10^9. A multiply and an add are two."""
    run()  # not counted: work done only in the first run. Memory is warm then.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        value=False
    )  # the fast path's single big operation would not be counted
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


def processor_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(*names: str, repeats: int = 6) -> dict[str, float]:
    """Print a table for named models (default: all). Return images per second on a core."""
    keep_freed_memory()
    torch.set_num_threads(1)
    chosen = names or (*named_backbones(), *COMPACT_SIZES)
    with torch.inference_mode():
        models = [
            compact_towers(name) if name in COMPACT_SIZES else named_towers(name) for name in chosen
        ]
        work = [
            (gflop(model.run_images, IMAGES), gflop(model.run_texts, TEXTS)) for model in models
        ]
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
        for _ in range(repeats):
            for model in models:
                in_fp32 = processor_seconds(model.run_images)
                in_bf16 = processor_seconds(model.run_images_bf16)
                texts = processor_seconds(model.run_texts)
                times[model.name].append((in_fp32, in_bf16, texts))
    print(f"one thread, {IMAGES} images or {TEXTS} texts a pass, best of {repeats} passes")
    row = "{:<16}{:>5}{:>14}{:>14}{:>12}{:>12}{:>14}{:>11}"
    columns = ("10^6 weights", "GFLOP/image", "fp32/s", "bf16/s", "GFLOP/text", "texts/s")
    print(row.format("", "px", *columns))
    rates = {}
    for model, (per_image, per_text) in zip(models, work, strict=True):
        fp32, bf16, texts = map(min, zip(*times[model.name], strict=True))
        figures = (
            model.parameters,
            f"{per_image:.2f}",
            f"{IMAGES / fp32:.2f}",
            f"{IMAGES / bf16:.2f}",
            f"{per_text:.2f}",
            f"{TEXTS / texts:.1f}",
        )
        print(row.format(model.name, model.pixels, *figures), flush=True)
        rates[f"{model.name}_fp32_per_s"] = round(IMAGES / fp32, 2)
        rates[f"{model.name}_bf16_per_s"] = round(IMAGES / bf16, 2)
    return rates


if __name__ == "__main__":
    figures = main(*sys.argv[1:])
    print(json.dumps(figures))
