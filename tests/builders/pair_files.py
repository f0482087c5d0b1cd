"""Write image-caption pairs to disk by hand.

The pairs are a sealed store with captions, or shards as others publish them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vilu.artifacts.disk import file_hash
from vilu.artifacts.documents import read_document, write_document, write_json
from vilu.artifacts.hashing import digest
from vilu.embeddings.space import EmbeddingSpace
from vilu.store.ledger import FileInfo, content_hash
from vilu.store.manifest import Manifest, Receipt, Run, StoreInputs
from vilu.store.parts import PICTURE_DIGEST_BYTES, metadata_schema, plan_parts

DIM = 8
SPACE = EmbeddingSpace(
    DIM, 20.0, backbone="fake", weights="w", preprocess="p", tokenizer="t", precision="fp32"
)


def unit_pairs(n: int, seed: int = 0, dtype: str = "<f2") -> tuple[np.ndarray, np.ndarray]:
    """Return unit-norm images and captions near to them, each (n, DIM)."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((n, DIM))
    text = image + rng.standard_normal((n, DIM))
    return tuple(
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype) for x in (image, text)
    )


def write_store(
    root: Path,
    image: np.ndarray,
    text: np.ndarray,
    captions: Sequence[str],
    part_size: int = 10,
    features: np.ndarray | None = None,
    lost: Sequence[int] = (),
) -> list[int]:
    """Write the store for a run on n captioned images, and return the images that it holds.

    The images at ``lost`` failed.
    """
    n = len(image)
    fields = {
        "dataset_fingerprint": "d",
        "n_in": n,
        "split": None,
        "space": SPACE,
        "names": (),
        "folders": None,
        "templates": (),
        "limits": {},
        "part_size": part_size,
        "dtype": "float16",
        "captions": True,
        "features": None if features is None else features.shape[1],
    }
    run = Run(
        **fields,
        fingerprint=digest(StoreInputs(**fields).fingerprint_fields()),
        dataset="pets",
        vilu="0",
    )
    arrays = {"img_emb": image, "text_emb": text, "features": features}
    receipts = []
    for part in plan_parts(run):
        kept = [i for i in range(part.start, part.stop) if i not in lost]
        for name in part.files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        for name in part.array_names:
            np.save(root / part.array_file(name), arrays[name][kept].astype("<f2"))
        rows = [
            {
                "position": i,
                "key": f"{i:04d}",
                "label": None,
                "width": 9,
                "height": 9,
                "n_frames": 1,
                "flags": 0,
                "caption": captions[i],
                "picture": sha256(image[i].tobytes()).digest()[:PICTURE_DIGEST_BYTES],
            }
            for i in kept
        ]
        pq.write_table(pa.Table.from_pylist(rows, metadata_schema(run)), root / part.metadata_file)
        (root / part.errors_file).write_bytes(b"")
        receipts.append(write_receipt(root, run, part, len(kept)))
    n_lost = n - sum(receipt.n_ok for receipt in receipts)
    counts = {
        "n_in": n,
        "n_ok": n - n_lost,
        "n_error": n_lost,
        "errors": {"decode": n_lost} if n_lost else {},
    }
    manifest = Manifest(
        **run.model_dump() | counts, parts=len(receipts), classes="", content=content_hash(receipts)
    )
    write_document(root / "run.json", run)
    write_document(root / "manifest.json", manifest)
    return [i for i in range(n) if i not in lost]


def write_receipt(root: Path, run: Run, part, n_ok: int) -> Receipt:
    files = {
        name: FileInfo(bytes=(root / name).stat().st_size, sha256=file_hash(root / name))
        for name in part.files
    }
    n_lost = len(part) - n_ok
    receipt = Receipt(
        fingerprint=run.fingerprint,
        part=part.number,
        start=part.start,
        stop=part.stop,
        files=files,
        batch_size=1,
        n_in=len(part),
        n_ok=n_ok,
        n_error=n_lost,
        errors={"decode": n_lost} if n_lost else {},
    )
    (root / part.receipt_file).parent.mkdir(exist_ok=True)
    write_document(root / part.receipt_file, receipt)
    return receipt


def reseal(root: Path, name: str) -> None:
    """Update a changed file's receipt and the manifest, so that the seals are whole again."""
    receipts = sorted((root / "receipts").iterdir())
    documents = [read_document(path, Receipt) for path in receipts]
    for path, document in zip(receipts, documents, strict=True):
        if name in document.files:
            document.files[name] = FileInfo(
                bytes=(root / name).stat().st_size, sha256=file_hash(root / name)
            )
            write_document(path, document)
    manifest = json.loads((root / "manifest.json").read_text())
    write_json(root / "manifest.json", manifest | {"content": content_hash(documents)})


LAYOUTS = {
    "clip-retrieval": ("img_emb/img_emb_{:04d}.npy", "text_emb/text_emb_{:04d}.npy"),
    "laion": ("images/img_emb_{}.npy", "texts/text_emb_{}.npy"),
    "split": ("train/images/{}.npy", "train/texts/{}.npy"),
    "folders": ("images/{:02d}.npy", "texts/{:02d}.npy"),
    "pair": ("images.npy", "texts.npy"),
    "one shard": ("img_emb.npy", "text_emb.npy"),
}


def write_shards(
    root: Path,
    image: np.ndarray,
    text: np.ndarray,
    layout: str = "clip-retrieval",
    sizes: Sequence[int] | None = None,
    metadata: pa.Table | None = None,
) -> Path:
    """Write shards in a layout, with the given sizes. The metadata files have LAION's names."""
    sizes = [len(image)] if sizes is None or "{" not in LAYOUTS[layout][0] else sizes
    start = 0
    for number, size in enumerate(sizes):
        rows = slice(start, start + size)
        for pattern, array in zip(LAYOUTS[layout], (image, text), strict=True):
            path = root / pattern.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array[rows])
        if metadata is not None:
            (root / "metadata").mkdir(exist_ok=True)
            pq.write_table(metadata[rows], root / f"metadata/metadata_{number:03d}.parquet")
        start += size
    assert start == len(image)
    return root
