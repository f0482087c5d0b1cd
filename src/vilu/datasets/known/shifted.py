"""Entries of the catalogue: the two test sets that were made after ImageNet-1k, with its classes."""

from __future__ import annotations

from typing import Final

from vilu.datasets.known.entry import TEMPLATE, KnownDataset
from vilu.datasets.known.imagenet import imagenet_sketch, imagenet_v2
from vilu.datasets.known.listing import ListReader

SHIFTED: Final = (
    KnownDataset(
        name="imagenet_v2",
        title="ImageNet-V2 (matched frequency)",
        n_classes=1000,
        sizes={"shots": 5_000, "test": 5_000},
        licence="as ImageNet; see the site",
        n_bytes=1_250_000_000,
        url="https://huggingface.co/datasets/vaishaal/ImageNetV2",
        how="Download imagenetv2-matched-frequency.tar.gz and unpack it.",
        folders=(
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2/imagenetv2-matched-frequency-format-val",
        ),
        marks=("[0-9]*",),
        reader=ListReader(imagenet_v2),
        reference="Recht et al., ICML 2019",
        coop_template=TEMPLATE,
    ),
    KnownDataset(
        name="imagenet_sketch",
        title="ImageNet-Sketch",
        n_classes=1000,
        sizes={"shots+test": 50_889},
        licence="see the site",
        n_bytes=7_600_000_000,
        url="https://github.com/HaohanWang/ImageNet-Sketch",
        how="Download ImageNet-Sketch.zip and unpack it.",
        folders=("sketch", "imagenet-sketch/images", "imagenet-sketch/sketch", "imagenet-sketch"),
        marks=("n[0-9]*",),
        reader=ListReader(imagenet_sketch),
        reference="Wang et al., NeurIPS 2019",
        coop_template=TEMPLATE,
    ),
)
