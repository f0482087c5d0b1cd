"""Test that models say at which size JPEGs may be decoded, and that their spaces say so too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.builders.tiny_models import IMAGE_SIZE, write_tiny
from vilu.backbones.base import DualEncoder, jpeg_side_of
from vilu.backbones.catalog import load_backbone
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import ProvenanceError


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("library", ["open_clip", "hf"])
def test_jpegs_are_at_least_twice_as_large_as_the_model_reads(
    kind: Literal["clip", "siglip"], library: Literal["open_clip", "hf"], tmp_path: Path
) -> None:
    write_tiny(tmp_path / "model", kind, library)
    spec = f"{library}:{tmp_path / 'model'}"
    reduced = load_backbone(spec, device="cpu")
    in_full = load_backbone(spec, device="cpu", full_decode=True)
    assert (jpeg_side_of(reduced), jpeg_side_of(in_full)) == (2 * IMAGE_SIZE, None)
    assert reduced.space.reduces_jpegs
    assert reduced.space.with_full_jpegs == in_full.space
    with pytest.raises(ProvenanceError, match="--full-decode"):
        in_full.space.require_match(reduced.space, name="store", other_name="model")


def test_a_model_that_does_not_state_its_size_reads_jpegs_in_full() -> None:
    model = DualEncoder(
        EmbeddingSpace(3, 10.0, preprocess="own"),
        torch.device("cpu"),
        transform=lambda image: torch.zeros(3, 8, 8),
        image_tower=lambda pixels: pixels.mean(dim=(2, 3)),
        text_tower=lambda texts: torch.eye(3),
        truncates=lambda texts: [False] * len(texts),
    )
    model.reduce_jpegs()
    assert jpeg_side_of(model) is None
    assert model.space.preprocess == "own"
