"""Imports a few-shot cache as a store.

    python -m benchmarks.clip_cache FOLDER --classes names.txt -o STORES/proto_dtd

Methods like Tip-Adapter store a data set's embeddings as tensors with unit norm, and repositories
publish these files:

- ``test_f.pt``, ``val_f.pt``: (N, D) images. ``test_l.pt``, ``val_l.pt``: (N,) classes of the
  images.
- ``keys_16shots.pt``: (D, S) labelled training images. ``values_16shots.pt``: (S, K) classes of
  these images, one-hot.

The store's rows are the images of ``--splits``, split by split. The texts come from ``--texts``.
Without ``--texts``, a class's text is the mean of the labelled training images in the class. Then
there is no gap between the modalities, and failures are the failures of a few-shot classifier. Only
tensors are read from the files, and no code in the files is run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vilu import import_arrays
from vilu.errors import DataError


def tensor(path: Path) -> Tensor:
    """Read the tensor in a ``.pt`` or ``.npy`` file."""
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(array)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Tensor):
        raise DataError(f"{path} must hold one tensor. Got {type(loaded).__name__} instead.")
    return loaded.detach()


def class_means(folder: Path, shots: int) -> Tensor:
    """Average each class's labelled training images, and scale the means (K, D) to unit norm."""
    keys, values = (
        tensor(folder / f"{name}_{shots}shots.pt").float() for name in ("keys", "values")
    )
    if keys.ndim != 2 or values.ndim != 2 or keys.shape[1] != len(values):
        raise DataError(
            f"keys must be (D, S) and values (S, K). Got {tuple(keys.shape)} and "
            f"{tuple(values.shape)} in {folder}."
        )
    return normalize((keys @ values).T, dim=1)


def text_matrix(path: Path, width: int) -> Tensor:
    """Return the texts (K, D) from a file with texts (K, D) or (D, K)."""
    texts = tensor(path)
    if (
        texts.ndim != 2 or list(texts.shape).count(width) != 1
    ):  # in a square matrix the side D is unknown
        raise DataError(
            f"{path} must be ({width}, K) or (K, {width}), K not {width}. "
            f"Got {tuple(texts.shape)} instead."
        )
    return texts if texts.shape[1] == width else texts.T


def main() -> None:
    """Import a cache."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the cache")
    parser.add_argument(
        "--classes", type=Path, required=True, help="class names in label order, one per line"
    )
    parser.add_argument("--splits", default="test", help="joined by commas [test]")
    parser.add_argument(
        "--shots",
        type=int,
        default=16,
        help="labelled training images per class, for the texts [16]",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        help="embeddings of texts, .pt or .npy, in place of the training images",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="store to make")
    options = parser.parse_args()
    splits, names = (
        options.splits.split(","),
        [name.strip() for name in options.classes.read_text().splitlines()],
    )
    image, target = (
        torch.cat([tensor(options.folder / f"{one}_{kind}.pt") for one in splits]) for kind in "fl"
    )
    text = (
        text_matrix(options.texts, image.shape[1])
        if options.texts
        else class_means(options.folder, options.shots)
    )
    with tempfile.TemporaryDirectory() as place:
        for name, values in {"image": image, "target": target.long(), "text": text}.items():
            np.save(Path(place) / f"{name}.npy", np.ascontiguousarray(values.numpy()))
        import_arrays(
            place,
            options.output,
            logit_scale=100,
            logit_bias=0,
            class_names=[name for name in names if name],
            split=options.splits,
        )
    print(options.output)


if __name__ == "__main__":
    main()
