"""What makes a run of scoring: the predictor with its weights, and the embeddings."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from vilu.pairs import PairSource
from vilu.predictors.base import FailurePredictor
from vilu.predictors.storage import describe
from vilu.space import digest
from vilu.store.pairs import CaptionStore
from vilu.store.reader import EmbeddingStore
from vilu.types import EmbeddingSource

SAMPLED = 256
"""Rows whose embeddings are part of the fingerprint of a source."""


def predictor_fingerprint(predictor: FailurePredictor) -> str:
    """Hash of everything that ``save`` would write, without a copy of the weights."""
    tensors = dict(predictor.state())
    if predictor.seen_ is not None:
        tensors["seen"] = predictor.seen_.hashes
    weights = {name: [str(t.dtype), list(t.shape), _hash(t)] for name, t in tensors.items()}
    return digest({**describe(predictor), "weights": weights})


def source_fingerprint(source: EmbeddingSource) -> str:
    """Hash of a source: the seal of a store, its shape, its labels, the order of its rows, and a sample of them.

    Hashing every embedding would read all data twice. The sample is 256 rows, evenly spaced over the usable ones, with
    the candidates of the first of them (of the first pool) and two identifiers.
    """
    rows = source.usable_rows
    places = np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).round().astype(np.int64)
    sample = rows[torch.from_numpy(places)]
    pool = rows[: source.pool_size or 1]
    whole = source.n_candidates > 0 and len(pool) >= (source.pool_size or 1)
    return digest(
        {
            "content": source.manifest.content if isinstance(source, EmbeddingStore | CaptionStore) else None,
            "space": source.space.fingerprint,
            "n": len(source),
            "n_candidates": source.n_candidates,
            "class_names": source.class_names,
            "pool_size": source.pool_size,
            "pools": asdict(source.pools) if isinstance(source, PairSource) else None,
            "columns": sorted(source.columns),
            "target": _hash(source.target),
            "status": _hash(torch.from_numpy(np.asarray(source.status))),
            "order": _hash(rows),
            "ids": [source.ids[int(row)] for row in (sample[:1], sample[-1:]) if len(row)],
            "images": _hash(source.image_rows(sample)),
            "texts": _hash(source.candidates(pool).text) if whole else None,
        }
    )


def _hash(tensor: Tensor) -> str:
    """Of the numbers, block by block: what repeats one number for all rows is never written out."""
    found = hashlib.blake2b(digest_size=16)
    for block in (
        tensor.detach().cpu().reshape(len(tensor) if tensor.ndim else 1, math.prod(tensor.shape[1:])).split(2**20)
    ):
        found.update(block.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
