"""Makes src/vilu/assets/clothing.parquet, the photos of `vilu demo`, from the CC0 clothing set.

    python tools/make_demo_photos.py PATH/TO/clothing.parquet

Input: columns image (bytes), label, key, and the class names in the schema metadata. Output: the
central square from every photo at 160 pixels a side as WebP, split anew into train, validation and
test (60, 10, 30 %), stratified by class. The same input and the same Pillow give the same bytes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import train_test_split

SIDE, QUALITY, MAX_BYTES = 160, 36, 8_000_000
TARGET = Path(__file__).parents[1] / "src" / "vilu" / "assets" / "clothing.parquet"


def shrink(data: bytes) -> bytes:
    """Crop a photo to the central square, and reduce the size."""
    photo = Image.open(io.BytesIO(data))
    image = photo.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize(
        (SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    buffer = io.BytesIO()
    square.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def split_of(label: NDArray[np.int32]) -> list[str]:
    """Return a split per row, stratified by class."""
    rows = np.arange(len(label))
    rest, test = train_test_split(rows, test_size=0.3, stratify=label, random_state=0)
    _, validation = train_test_split(rest, test_size=1 / 7, stratify=label[rest], random_state=0)
    split = np.full(len(label), "train", dtype=object)
    split[test], split[validation] = "test", "validation"
    return [str(name) for name in split]


def main() -> None:
    """Read and shrink the photos, split the rows, and write the asset."""
    source = pq.read_table(sys.argv[1])
    photos = [shrink(data.as_py()) for data in source["image"]]
    labels = source["label"].to_numpy()
    splits = split_of(labels)
    # The folder is the old split. This file has a new split, so the folder is dropped.
    keys = [key.as_py().split("/", 1)[1] for key in source["key"]]
    columns = {
        "image": pa.array(photos, pa.binary()),
        "label": source["label"],
        "split": pa.array(splits),
        "key": pa.array(keys),
    }
    names = source.schema.metadata[b"class_names"]
    metadata = {"class_names": names, "licence": "CC0-1.0"}
    table_without_metadata = pa.table(columns)
    table = table_without_metadata.replace_schema_metadata(metadata)
    pq.write_table(table, TARGET, row_group_size=512, compression="none", use_dictionary=["split"])
    size = TARGET.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"{TARGET.name} has {size:,} bytes; at most {MAX_BYTES:,} may ship")
    print(f"{TARGET.name}: {len(photos):,} photos, {size:,} bytes")


if __name__ == "__main__":
    main()
