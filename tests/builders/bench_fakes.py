"""Make small stores and configurations for benchmark tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.builders.store_fakes import FakeBackbone, FakeDataset, picture
from vilu.store.embed import ExtraColumns, embed
from vilu_bench.studies.config import Config
from vilu_bench.studies.load import parse_config
from vilu_bench.studies.ranking import Summary, summarise
from vilu_bench.studies.study import run_studies

WORDS = ("cat", "dog", "car", "cup", "hat", "sea")


def make_store(
    folder: Path,
    n: int,
    first: int,
    *,
    k: int = 5,
    preprocess: str = "8x8",
    words: int = 0,
    labelled: bool = True,
) -> Path:
    """Write a store with n random images, and return its folder.

    Images with different numbers differ, and so do their keys.
    """
    labels = np.random.default_rng(first).integers(k, size=n).tolist()
    images = FakeDataset(
        [picture(first + i) for i in range(n)],
        labels if labelled else [None] * n,
        [f"img/{first + i:06d}.png" for i in range(n)],
        class_names=tuple(f"n{i}" for i in range(k)),
    )
    names = WORDS[words : words + k]
    embed(
        images,
        FakeBackbone(preprocess=preprocess),
        folder,
        names=names,
        columns=ExtraColumns(features=True, prompts=["the {}", "a {}"]),
    )
    return folder


def make_stores(root: Path) -> Path:
    """Write stores ``one`` and ``two``. They have other rows and classes, and another
    preprocessing.
    """
    make_store(root / "one-train", 120, 0)
    make_store(root / "one-test", 60, 1_000)
    make_store(root / "two-train", 80, 2_000, preprocess="9x9", words=1)
    make_store(root / "two-test", 50, 3_000, preprocess="9x9", words=1)
    return root


def tables(**changes: Any) -> dict[str, Any]:
    """Return a benchmark on those stores, as in TOML."""
    return {
        "seeds": 2,
        "resamples": 40,
        "data": {
            name: {"stores": {"train": f"{name}-train", "test": f"{name}-test"}}
            for name in ("one", "two")
        },
        "settings": {
            "all": {"kind": "labels"},
            "few": {"kind": "labels", "budget": 8},
            "unseen": {"kind": "unseen"},
            "moved": {"kind": "transfer", "source": "one", "across_preprocessing": True},
        },
        "methods": {
            "mcm": {},
            "knn_distance": {"deterministic": True},
            "lvu": {"params": {"epochs": 2, "hidden": [8]}},
        },
        **changes,
    }


def config(**changes: Any) -> Config:
    return parse_config(tables(**changes))


@dataclass(frozen=True)
class Report:
    """Result from one benchmark."""

    text: str
    summary: Summary


def benchmark(chosen: Config, data: Path, output: Path, **options: Any) -> Report:
    """Run one benchmark."""
    (study,) = run_studies([chosen], data, output, **options)
    return Report(study.text, summarise(study.board))
