"""Compares ``Guard`` with the bare forward pass: ``python -m benchmarks.guard [--images 960]``.

Both get the same photos in the same batches. ``Guard`` decodes, embeds, scores and decides. The
bare pass runs the image tower on decoded pixels. Both take turns, five times. The output has the
ratio of images per second, as median and range.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from vilu.backbones.zeroshot import class_texts
from vilu.cli.demo import PROMPT_NAMES
from vilu.datasets.images import decode_image
from vilu.embeddings.memory import Embeddings
from vilu.guard.guard import Guard
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.predictors.plus.vilu_plus import ViLUPlus
from vilu.store.job import BackboneSpec

TURNS = 5


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=960)
    given = parser.parse_args()
    with resources.as_file(resources.files("vilu").joinpath("assets", "clothing.parquet")) as path:
        table = pq.read_table(path, columns=["image", "label"]).slice(0, given.images)
    blobs: list[bytes] = [
        one["bytes"] if isinstance(one, dict) else one for one in table["image"].to_pylist()
    ]
    model = BackboneSpec("compact").load()
    pixels = torch.stack([model.preprocess(decode_image(blob).image) for blob in blobs])
    image = torch.cat([model.encode_images(batch) for batch in pixels.split(32)])
    text = class_texts(model, PROMPT_NAMES)
    data = Embeddings(
        image,
        text,
        target=np.array(table["label"].to_pylist()),
        space=model.space,
        class_names=PROMPT_NAMES,
    )
    with tempfile.TemporaryDirectory() as folder:
        ViLUPlus().fit(data).save(folder)
        Vocabulary.of(data, "float16").save(Path(folder))
        guard = Guard(folder, backbone=model)
        rates: dict[str, list[float]] = {"bare": [], "guard": []}
        for _ in range(TURNS):
            began = time.perf_counter()
            for batch in pixels.split(32):
                model.encode_images(batch)
            rates["bare"].append(len(blobs) / (time.perf_counter() - began))
            began = time.perf_counter()
            n = sum(1 for _ in guard.stream(blobs))
            rates["guard"].append(n / (time.perf_counter() - began))
    ratios = [mine / bare for mine, bare in zip(rates["guard"], rates["bare"], strict=True)]
    for name, found in rates.items():
        print(
            f"{name}: {statistics.median(found):.1f} images/s ({min(found):.1f} to "
            f"{max(found):.1f})"
        )
    print(
        f"guard / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
        f"n = {len(blobs)}"
    )


if __name__ == "__main__":
    main()
