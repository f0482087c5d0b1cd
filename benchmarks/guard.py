"""Compares ``Guard`` with the bare forward pass: ``python -m benchmarks.guard [--images 960]``.

Both get the same photos in the same batches. ``Guard`` decodes, embeds, scores and decides. The
bare pass runs the image tower on decoded pixels. Both take turns, five times. The output has the
ratio of both rates (images per second), as median and range.
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

from vilu.backbones.zeroshot import embed_class_names
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
    options = parser.parse_args()
    with resources.as_file(resources.files("vilu").joinpath("assets", "clothing.parquet")) as path:
        table = pq.read_table(path, columns=["image", "label"]).slice(0, options.images)
    image_files: list[bytes] = [
        one["bytes"] if isinstance(one, dict) else one for one in table["image"].to_pylist()
    ]
    model = BackboneSpec("compact").load()
    pixels = torch.stack([model.preprocess(decode_image(blob).image) for blob in image_files])
    image = torch.cat([model.encode_images(batch) for batch in pixels.split(32)])
    text = embed_class_names(model, PROMPT_NAMES)
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
            start = time.perf_counter()
            for batch in pixels.split(32):
                model.encode_images(batch)
            rates["bare"].append(len(image_files) / (time.perf_counter() - start))
            start = time.perf_counter()
            n = sum(1 for _ in guard.stream(image_files))
            rates["guard"].append(n / (time.perf_counter() - start))
    ratios = [mine / bare for mine, bare in zip(rates["guard"], rates["bare"], strict=True)]
    for name, rates_of_turns in rates.items():
        print(
            f"{name}: {statistics.median(rates_of_turns):.1f} images/s "
            f"({min(rates_of_turns):.1f} to "
            f"{max(rates_of_turns):.1f})"
        )
    print(
        f"guard / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
        f"n = {len(image_files)}"
    )


if __name__ == "__main__":
    main()
