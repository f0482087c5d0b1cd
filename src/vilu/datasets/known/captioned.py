"""Entries of the catalogue: image-caption pairs. Their authors publish links; img2dataset downloads the images.

Sizes are numbers of published links, of which more die each year; sizes in bytes are those that img2dataset's own
examples report, at 256 pixels.
"""

from __future__ import annotations

from typing import Final

from vilu.datasets.known.archives import ShardReader
from vilu.datasets.known.entry import KnownDataset

SHARDS: Final = ("*.tar", "*/*.tar")

CAPTIONED: Final = (
    KnownDataset(
        name="cc3m",
        title="CC3M (Conceptual Captions)",
        n_classes=None,
        sizes={"all": 3_334_173},  # 3,318,333 for training and 15,840 for validation
        licence="links: any use; images: their owners'",
        n_bytes=None,
        url="https://ai.google.com/research/ConceptualCaptions/download",
        how="Download the lists of links and run img2dataset with --output_format webdataset into cc3m/, or cc3m/train "
        "and cc3m/validation.",
        folders=("cc3m",),
        marks=SHARDS,
        reader=ShardReader(),
        reference="Sharma et al., ACL 2018",
    ),
    KnownDataset(
        name="cc12m",
        title="CC12M (Conceptual 12M)",
        n_classes=None,
        sizes={"all": 12_423_374},
        licence="links: any use; images: their owners'",
        n_bytes=331_000_000_000,
        url="https://github.com/google-research-datasets/conceptual-12m",
        how="Download cc12m.tsv and run img2dataset with --output_format webdataset into cc12m/.",
        folders=("cc12m",),
        marks=SHARDS,
        reader=ShardReader(),
        reference="Changpinyo et al., CVPR 2021",
    ),
    KnownDataset(
        name="laion400m",
        title="LAION-400M",
        n_classes=None,
        sizes={"all": 413_000_000},  # as published: 413M
        licence="links: CC BY 4.0; images: their owners'",
        n_bytes=10_000_000_000_000,
        url="https://laion.ai/blog/laion-400-open-dataset/",
        how="See the site for whether the links can be had at present; run img2dataset with --output_format "
        "webdataset into laion400m-data/. Ready embeddings need no images: `vilu score PREDICTOR FOLDER`.",
        folders=("laion400m", "laion400m-data"),
        marks=SHARDS,
        reader=ShardReader(),
        reference="Schuhmann et al., NeurIPS Workshops 2021",
    ),
)
