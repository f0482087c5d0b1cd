"""Make labelled images in overlapping classes, and the inputs for reference computations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vilu.embeddings.memory import Embeddings

SCALE = 20.0


def clusters(
    n: int = 80, k: int = 4, d: int = 6, *, seed: int = 0, spread: float = 0.5
) -> Embeddings:
    """Return images around K texts.

    Some images are nearer to another class's text, so the VLM fails on them.
    """
    rng = np.random.default_rng(seed)
    text = unit(np.random.default_rng(7).normal(size=(k, d)))
    target = rng.integers(k, size=n)
    image = unit(text[target] + spread * rng.normal(size=(n, d)))
    features = rng.normal(size=(n, 5)) + np.eye(k, 5)[target] * 3
    return Embeddings(image, text, target=target, logit_scale=SCALE, columns={"features": features})


def with_targets(data: Embeddings, target: NDArray[np.int64]) -> Embeddings:
    """Return the same images with other labels."""
    features = data.column("features", data.usable_rows)
    return Embeddings(
        data.image, data.text, target=target, logit_scale=SCALE, columns={"features": features}
    )


def unit(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return rows with unit norm, in float64."""
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def images(data: Embeddings) -> NDArray[np.float64]:
    """Return the unit-norm images (N, D)."""
    return unit(data.image.numpy())


def answers(data: Embeddings) -> NDArray[np.int64]:
    """Return the zero-shot answers (N,)."""
    return np.asarray((data.image.numpy() @ data.text.numpy().T).argmax(axis=1))


def posterior(data: Embeddings) -> NDArray[np.float64]:
    """Return the zero-shot probabilities (N, K)."""
    logits = SCALE * (data.image.double() @ data.text.double().T)
    return logits.softmax(dim=1).numpy()
