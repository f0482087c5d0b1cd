"""Data that many tests share: small, seeded, with failures that can be predicted by construction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vilu.types import Embeddings

SHARED = Path(__file__).resolve().parents[2] / "shared"


def toy_embeddings(
    n: int = 600, k: int = 5, d: int = 16, *, seed: int = 0, ids_from: int | None = 0, scale: float = 20.0
) -> Embeddings:
    """Images of K classes, half of them blurred; a blurred image says so in its last coordinate and is often missed."""
    rng = np.random.default_rng(seed)
    text = np.random.default_rng(99).normal(size=(k, d))
    text[:, -1] = 0
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    target = rng.integers(k, size=n)
    blurred = rng.random(n) < 0.5
    noise = rng.normal(size=(n, d)) * np.where(blurred, 0.6, 0.05)[:, None]
    noise[:, -1] = np.where(blurred, 1.0, -1.0)
    ids = None if ids_from is None else [f"row-{i}" for i in range(ids_from, ids_from + n)]
    image = text[target] + noise
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    return Embeddings(image, text, target, scale, class_names=[f"class {i}" for i in range(k)], ids=ids)


def toy_pairs(n: int = 256, pool: int = 32, d: int = 16, *, seed: int = 0):
    """Image-caption pairs of the same kind."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(n, d))
    text[:, -1] = 0
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    blurred = rng.random(n) < 0.5
    noise = rng.normal(size=(n, d)) * np.where(blurred, 0.6, 0.02)[:, None]
    noise[:, -1] = np.where(blurred, 1.0, -1.0)
    image = text + noise
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    return Embeddings.pairs(image, text, pool_size=pool, logit_scale=20.0)


@pytest.fixture(scope="session")
def train() -> Embeddings:
    return toy_embeddings()


@pytest.fixture(scope="session")
def test() -> Embeddings:
    return toy_embeddings(seed=1, ids_from=10_000)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED
