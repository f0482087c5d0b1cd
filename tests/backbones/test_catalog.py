from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from vilu.backbones.catalog import BACKBONES, BackboneKind, load_backbone
from vilu.errors import UsageError

KINDS = [entry for entry in BACKBONES.values() if isinstance(entry, BackboneKind)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_loaders_exist(kind: BackboneKind) -> None:
    module, _, function = kind.loader.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert kind.description.startswith(kind.name)


@pytest.mark.parametrize(
    ("spec", "hint"), [("compct", "'compact'"), ("openclip:ViT-B-32/openai", "'open_clip'")]
)
def test_unknown_kind_names_the_nearest(spec: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {hint}"):
        load_backbone(spec)


def test_unknown_kind_without_a_near_one() -> None:
    with pytest.raises(
        UsageError, match=r"known are compact, open_clip, hf, clip-vit-b32,.*siglip-vit-l16\.$"
    ):
        load_backbone("resnet50")


def test_unknown_precision_and_device() -> None:
    with pytest.raises(UsageError, match="precision must be one of fp32, bf16"):
        load_backbone("compact", precision="fp8")
    with pytest.raises(UsageError, match="device must be"):
        load_backbone("compact", device="gpu")


def test_listing_needs_no_torch() -> None:
    code = "import sys, vilu.backbones.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
