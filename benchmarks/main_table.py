"""Time to compute ViLU's rows in the main table with 13 sets, with cached embeddings.

The alternative is to encode every image in every epoch. Two rates are measured. One is training
rows per second in the library's loop on random embeddings (D = 512, batches of 1,024), for several
class counts. The second is images per second in the backbone (CLIP ViT-B/32, random weights with
the real size). The time for a set is the row count times 300 epochs, divided by the rate for the
set's class count. The time for the table is the sum over the 13 sets. The time for the alternative
is too small, because decoding and the backward pass through the head are left out.

The time on a GPU is not measured, but guessed from the count of floating point operations and an
assumed rate.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.encode_rates import IMAGES, named_towers, seconds
from vilu.backbones.catalog import named_backbones
from vilu.datasets.known import KNOWN
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.rows import Rows
from vilu.predictors.nn.head import FailureHead
from vilu.predictors.nn.losses import FailureWeight, bce_loss
from vilu.predictors.nn.train import HeadTrainer, TrainConfig

D, BATCH, EPOCHS, REPEATS = 512, 1024, 300, 3
BACKBONE = "clip-vit-b32"
CLASSES = (10, 100, 400, 1000)
"""Measured class counts. A set has the rate for the next larger count."""

GPU_TFLOPS = 6.0
"""Assumed rate: a third of an A100's 19.5 TFLOP/s in float32, as small products are slower."""

GPU_STEP_SECONDS = 3e-3
"""Assumed shortest time of a step, which has some hundred small kernels and a few copies."""

A100 = named_backbones()[BACKBONE].a100_rate or float("nan")

SETS = [entry for entry in KNOWN.values() if not entry.captioned and "train" in entry.sizes]


def training(classes: int) -> tuple[float, float]:
    """Measure training rows per second in the real loop, and count operations per row."""
    rng, n = np.random.default_rng(0), 8 * BATCH
    image, text = (rng.normal(size=(rows, D)) for rows in (n, classes))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text)]
    target = rng.integers(classes, size=n)
    data = Embeddings(unit[0], unit[1], target=target)
    torch.manual_seed(0)
    device = torch.device("cpu")
    config = TrainConfig(1, BATCH, 1e-3, 0.9, 5e-4, 1, 0, None, "fp32", 0, device)
    head = FailureHead(D)
    weight = FailureWeight("batch", 0.9)
    loss = bce_loss(weight)
    trainer = HeadTrainer(head, loss, config)
    trainer.unfreeze_attention()
    rows, generator = Rows(data, torch.arange(n)), torch.Generator().manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        first_batch = next(rows.steps(BATCH, generator))
        trainer.step(first_batch, 1e-3)
    spent = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for batch in rows.steps(BATCH, generator):
            trainer.step(batch, 1e-3)
        elapsed = time.perf_counter() - start
        spent.append(elapsed)
    return n / statistics.median(spent), counter.get_total_flops() / BATCH


def encoding() -> float:
    """Measure images per second in the backbone's image tower."""
    with torch.inference_mode():
        tower = named_towers(BACKBONE)
        tower.run_images()
        return IMAGES / min(seconds(tower.run_images) for _ in range(REPEATS))


def main() -> dict[str, float]:
    """Print the time for the table. Return the hours, and the ratio to the alternative."""
    images = encoding()
    rates = {classes: training(classes) for classes in CLASSES}
    passes = {
        entry.name: (entry.sizes["train"] * EPOCHS, int(entry.n_classes or 0)) for entry in SETS
    }
    at = {
        name: rates[min(c for c in CLASSES if c >= classes)]
        for name, (_, classes) in passes.items()
    }
    head = sum(rows / at[name][0] for name, (rows, _) in passes.items())
    encode = sum(rows for rows, _ in passes.values()) / images
    steps = sum(rows for rows, _ in passes.values()) / BATCH
    work = sum(rows * at[name][1] for name, (rows, _) in passes.items())
    gpu = max(work / (GPU_TFLOPS * 1e12), steps * GPU_STEP_SECONDS)
    total = sum(entry.sizes["train"] for entry in SETS)
    print(
        f"main table, {len(SETS)} sets, {total:,} training rows, {EPOCHS} epochs, "
        f"{torch.get_num_threads()} threads"
    )
    for classes, (rate, flops) in rates.items():
        print(
            f"  {classes:>5} classes: {rate:>9,.0f} training rows/s, {flops / 1e6:.1f} MFLOP a row"
        )
    print(f"  {BACKBONE}: {images:.1f} images/s")
    print(
        f"  with cached embeddings {head / 3600:,.1f} h here; "
        "encoding every image in every epoch would be "
        f"{encode / 3600:,.0f} h more: {encode / head:,.0f} times as long (once: "
        f"{encode / EPOCHS / 3600:,.1f} h)"
    )
    print(
        f"  on a GPU, a guess: {work / 1e12:,.0f} TFLOP in {steps:,.0f} steps are {gpu / 60:.0f} "
        "minutes at "
        f"{GPU_TFLOPS:g} TFLOP/s and at least {1e3 * GPU_STEP_SECONDS:g} ms a step (not measured); "
        "encoding in every "
        f"epoch {total * EPOCHS / A100 / 3600:,.0f} h on an A100 by its published rate"
    )
    return {
        "main_table_reencoding_ratio": encode / head,
        "main_table_hours_here": head / 3600,
        "main_table_gpu_minutes_guess": gpu / 60,
    }


if __name__ == "__main__":
    main()
