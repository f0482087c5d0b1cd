"""Test dry runs against numbers by hand, from stores, listings and the catalogue.

Nothing is embedded or run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders.bench_fakes import config, make_stores
from tests.builders.known_trees import make_tree
from vilu.errors import UsageError
from vilu_bench.studies.config import Config
from vilu_bench.studies.dry_run import describe_plans, plan_study

ALL = {"all": {"kind": "labels"}}


def made(entry: dict[str, Any], **changes: Any) -> Config:
    lvu = {"params": {"epochs": 3}}
    return config(
        **{
            "data": {"one": entry},
            "settings": ALL,
            "methods": {"mcm": {}, "lvu": lvu},
            "seeds": 2,
            **changes,
        }
    )


def test_embedded_parts_are_counted_in_their_stores(tmp_path: Path) -> None:
    data = make_stores(tmp_path)
    plan = plan_study(
        made({"stores": {"train": "one-train", "test": "one-test"}}), data, tmp_path / "out"
    )
    assert [(part.part, part.images, part.state) for part in plan.parts] == [
        ("test", 60, "embedded"),
        ("train", 120, "embedded"),
    ]
    assert plan.parts[1].n_bytes == 120 * (16 + 192) * 2  # embeddings and features, half precision
    files = sum(
        path.stat().st_size
        for name in ("img_emb", "features")
        for path in (data / "one-train" / name).iterdir()
    )
    assert plan.parts[1].n_bytes == pytest.approx(files, rel=0.02)  # npy headers
    assert (plan.cells, plan.runs, plan.fits) == (4, 3, 2)


def test_images_at_hand_are_listed(tmp_path: Path) -> None:
    make_tree("dtd", tmp_path)
    entry = {
        "dataset": "dtd",
        "backbone": "clip-vit-b32",
        "validation": "validation",
        "views": 3,
        "features": False,
    }
    plan = plan_study(made(entry), tmp_path, tmp_path / "out")
    parts = {part.part: part for part in plan.parts}
    assert set(parts) == {"train", "validation", "test"}
    assert sum(part.images for part in plan.parts) == 64
    assert {(part.counted, part.state) for part in plan.parts} == {("listing", "to embed")}
    test = parts["test"]
    assert test.n_bytes == test.images * 512 * (1 + 3) * 2
    assert not (tmp_path / "out").exists()


def test_what_is_not_here_is_in_the_catalogue(tmp_path: Path) -> None:
    entries = {
        "imagenet": {
            "dataset": "imagenet",
            "backbone": "siglip-vit-l16",
            "validation": 0.02,
            "views": 0,
        },
        "cc12m": {
            "dataset": "cc12m",
            "captions": True,
            "backbone": "clip-vit-b32",
            "features": False,
        },
    }
    plan = plan_study(made({}, data=entries), tmp_path, tmp_path / "out")
    parts = {(part.data, part.part): part for part in plan.parts}
    assert parts["imagenet", "train"].images == 1_281_167
    assert parts["imagenet", "train"].n_bytes == 1_281_167 * (1024 + 1024) * 2
    assert parts["cc12m", "pairs"].images == 12_423_374
    assert parts["cc12m", "pairs"].n_bytes == 12_423_374 * 2 * 512 * 2
    assert {part.state for part in plan.parts} == {"no images here"}
    text = describe_plans([plan, plan])
    assert "1,281,167*" in text
    assert "together: 3 sets of embeddings" in text  # sets that both studies need count once


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    make_tree("dtd", tmp_path)
    plan = plan_study(
        made({"dataset": "dtd", "backbone": "clip-vit-b32", "test": "tset"}),
        tmp_path,
        tmp_path / "out",
    )
    states = {part.part: (part.state, part.images) for part in plan.parts}
    assert states["train"][0] == "to embed"
    assert states["test"] == ("unreadable", None)
    assert "one (test) cannot be read: " in describe_plans([plan])
    assert "tset" in describe_plans([plan])


def test_a_data_set_of_no_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'dtd'"):
        made({"dataset": "dtdd"})


def test_unknown_sizes_are_said(tmp_path: Path) -> None:
    plan = plan_study(
        made({"source": "nowhere", "backbone": "open_clip:RN50/openai"}), tmp_path, tmp_path
    )
    assert [(part.images, part.n_bytes) for part in plan.parts] == [(None, None)] * 2
    assert plan.runs == 3
    rows = [line.split() for line in describe_plans([plan]).splitlines() if line.startswith("one ")]
    assert [(row[3], row[-1]) for row in rows] == [("?", "?")] * 2
