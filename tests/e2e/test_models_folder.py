"""Named backbones from a local folder, without a network, in the command line and in other
processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.builders.tiny_models import write_tiny
from tests.command import run_process
from tests.e2e.test_cli import NAMES, PHOTOS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "names.txt").write_text(NAMES)
    (folder / "models").mkdir()
    write_tiny(folder / "models" / "clip-vit-b32", "clip", "open_clip")
    write_tiny(folder / "models" / "siglip-vit-b16", "siglip", "hf")
    return folder


def embed(site: Path, backbone: str, *options: object, code: int = 0) -> str:
    arguments = (
        "embed",
        PHOTOS,
        "--split",
        "test",
        "--limit",
        60,
        "--classes",
        "names.txt",
        "--models",
        "models",
    )
    done = run_process(
        *arguments,
        "--backbone",
        backbone,
        "-o",
        backbone,
        *options,
        cwd=site,
        code=code,
        HF_HUB_OFFLINE="1",
    )
    return done.stderr


@pytest.mark.parametrize(
    ("backbone", "name", "options"),
    [
        ("clip-vit-b32", "clip-vit-b32", ("--executor", "local", "--processes", 1, "--features")),
        ("siglip-vit-b16", "siglip-vit-b16@hf", ()),
    ],
)
@pytest.mark.slow
def test_embedding_with_a_folder_of_models(
    site: Path, backbone: str, name: str, options: tuple[object, ...]
) -> None:
    embed(site, backbone, *options)
    store = vilu.EmbeddingStore(site / backbone)
    assert (store.space.backbone, len(store)) == (name, 60)
    assert str(site) not in json.dumps([store.space.preprocess, store.space.tokenizer])
    outcomes = vilu.score(vilu.MCM().fit(store), store)
    assert (
        len(np.unique(outcomes.prediction)) >= 3
    )  # random weights still give different answers, so users can try the folder
    assert 0 < outcomes.failure.mean() < 1


def test_a_model_that_is_not_in_the_folder(site: Path) -> None:
    stderr = embed(site, "clip-vit-l14", code=5)
    assert "hf download timm/vit_large_patch14_clip_224.openai --local-dir" in stderr
    assert not (site / "clip-vit-l14").exists()
