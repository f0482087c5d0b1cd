"""Make arrays as other programs save them, in a file and in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("cat", "dog", "cup", "sea")


def arrays(n: int = 30, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return rows near their class's text. Some rows are unknown, and some are out-of-distribution.

    If a change is ``None``, the array is left out.
    """
    generator = np.random.default_rng(seed)
    text = np.linalg.qr(generator.standard_normal((6, 6)))[0][:4]
    target = generator.integers(4, size=n)
    image = text[target] + 0.3 * generator.standard_normal((n, 6))
    target[::7], target[3::7] = -1, -2
    made = {
        "image": (image / np.linalg.norm(image, axis=1, keepdims=True)).astype(np.float32),
        "text": text.astype(np.float32),
        "target": target,
        "class_names": np.array(NAMES),
        "ids": np.array([f"img/{seed}-{i}.png" for i in range(n)]),
        "logit_scale": np.float32(50),
        "logit_bias": np.array([-1.0]),
        **changes,
    }
    return {name: values for name, values in made.items() if values is not None}


def save(path: Path, values: dict[str, Any], *, packed: bool = False) -> Path:
    """Write an ``.npz`` file, or a folder with ``.npy`` files if the path has no suffix."""
    if path.suffix:
        (np.savez_compressed if packed else np.savez)(path, **values)
        return path
    path.mkdir(parents=True, exist_ok=True)
    for name, array in values.items():
        np.save(path / f"{name}.npy", array)
    return path
