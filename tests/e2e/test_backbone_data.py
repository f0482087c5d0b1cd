from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vilu.backbones.catalog import load_backbone
from vilu.backbones.zeroshot import embed_class_names

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(
        not DATA.is_dir(), reason="needs the shared data folder beside the checkout"
    ),
]

CLOTHES = [
    "dress",
    "hat",
    "sweater",
    "coat",
    "jeans",
    "shirt",
    "shoe",
    "shorts",
    "skirt",
    "t-shirt",
]
ACCURACY = 0.571
"""The share over all 3,781 photos, where 2,158 answers are right."""
SAMPLE = 400


def test_zero_shot_accuracy_on_clothing() -> None:
    pytest.importorskip("timm")
    table = pq.read_table(DATA / "clothing.parquet")
    sample = np.random.default_rng(0).choice(len(table), SAMPLE, replace=False)
    backbone = load_backbone("compact", device="cpu")
    text = embed_class_names(backbone, CLOTHES)
    right = 0
    for start in range(0, SAMPLE, 50):
        rows = table.take(sample[start : start + 50])
        images = [Image.open(io.BytesIO(cell)) for cell in rows["image"].to_pylist()]
        embeddings = backbone.encode_images(
            torch.stack([backbone.preprocess(image) for image in images])
        )
        right += int(
            ((embeddings @ text.T).argmax(dim=1).numpy() == rows["label"].to_numpy()).sum()
        )
    # Three standard deviations for a sample without replacement.
    spread = np.sqrt(ACCURACY * (1 - ACCURACY) / SAMPLE * (1 - SAMPLE / len(table)))
    assert right / SAMPLE == pytest.approx(ACCURACY, abs=3 * spread)
