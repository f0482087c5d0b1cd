"""Test the same random weights in open_clip and in transformers.

The embeddings from the same pictures must be the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders.tiny_models import LENGTH, ROOM, write_tiny
from tests.builders.tiny_tokenizers import siglip_ids
from tests.builders.tiny_weights import LOGIT_BIAS, LOGIT_SCALE, pictures
from vilu.backbones.base import Backbone
from vilu.backbones.catalog import load_backbone
from vilu.backbones.open_clip import use_tanh_gelu
from vilu.errors import ProvenanceError

AGREE = 1e-5
"""This is the tolerance for coordinates of unit vectors.

The towers reach these by some hundreds of float32 sums in another order.
"""

KINDS = ("clip", "siglip")
SIZES = [(32, 32), (60, 40), (40, 61), (20, 16), (200, 65)]
TEXTS = [
    "a photo of a dog.",
    "A  photo of a DOG.",
    "what's up, doc?",
    "t-shirt",
    "x",
    "",
    "日本 & 2,048",
    "a red house by the sea " * 20,
]
Pair = tuple[Backbone, Backbone]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), kind, tanh=True)


def make_pair(folder: Path, kind: str, *, tanh: bool | None) -> Pair:
    """Return the same model from both libraries. ``tanh`` sets the GELU in open_clip."""
    write_tiny(folder / "first", kind, "open_clip", seed=3, tanh=tanh)
    write_tiny(folder / "second", kind, "hf", seed=3)
    first, second = (
        load_backbone(f"{library}:{folder / name}", device="cpu")
        for library, name in (("open_clip", "first"), ("hf", "second"))
    )
    return first, second


def embed(backbone: Backbone, width: int, height: int, n: int = 12) -> torch.Tensor:
    return backbone.encode_images(
        torch.stack(
            [
                backbone.preprocess(picture)
                for picture in pictures(n, seed=5, width=width, height=height)
            ]
        )
    )


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_images(pair: Pair, width: int, height: int) -> None:
    first, second = pair
    for picture in pictures(3, seed=5, width=width, height=height):
        assert (
            first.preprocess(picture) - second.preprocess(picture)
        ).abs().max() < 1e-6  # for numbers up to 3
    rows = embed(first, width, height)
    torch.testing.assert_close(rows, embed(second, width, height), atol=AGREE, rtol=0)
    assert (rows @ rows.T - torch.eye(len(rows))).max() < 0.999  # the pictures are told apart


def test_texts(pair: Pair, kind: str) -> None:
    first, second = pair
    rows = first.encode_texts(TEXTS)
    torch.testing.assert_close(rows, second.encode_texts(TEXTS), atol=AGREE, rtol=0)
    different = rows[[0, *range(2, len(TEXTS))]]  # case and spaces change nothing
    torch.testing.assert_close(rows[0], rows[1], atol=AGREE, rtol=0)
    assert (different @ different.T - torch.eye(len(different))).max() < 0.999
    assert first.truncates(TEXTS) == second.truncates(TEXTS) == [False] * 7 + [True]


def test_scale_bias_and_sizes(pair: Pair, kind: str) -> None:
    first, second = (backbone.space for backbone in pair)
    assert first.logit_scale == pytest.approx(LOGIT_SCALE, rel=1e-6)
    assert second.logit_scale == pytest.approx(first.logit_scale, rel=1e-6)
    assert first.logit_bias == second.logit_bias == (0.0 if kind == "clip" else LOGIT_BIAS)
    assert first.embed_dim == second.embed_dim
    assert pair[0].feature_dim == pair[1].feature_dim == 64
    assert [maps is None for maps in (pair[0].projections, pair[1].projections)] == [
        kind == "siglip"
    ] * 2


def test_features_and_last_maps(pair: Pair) -> None:
    pixels = torch.stack([pair[0].preprocess(picture) for picture in pictures(8)])
    (_, first), (_, second) = (backbone.encode_images_and_features(pixels) for backbone in pair)
    # Features are up to 30 long, so some 30 times as far off.
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    first, second = (backbone.encode_text_features(TEXTS) for backbone in pair)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    if pair[0].projections is not None and pair[1].projections is not None:
        assert all(
            torch.equal(a, b) for a, b in zip(pair[0].projections, pair[1].projections, strict=True)
        )


def test_padding_is_part_of_siglip(tmp_path: Path) -> None:
    """With less padding the embedding must change.

    So the agreement above is no accident with texts that need no padding.
    """
    model = write_tiny(tmp_path / "siglip", "siglip", "hf", seed=3)
    text = "a photo of a dog"
    backbone = load_backbone(f"hf:{tmp_path / 'siglip'}", device="cpu")
    with torch.no_grad():
        full, half = (
            model.get_text_features(input_ids=siglip_ids([text], length)).pooler_output
            for length in (LENGTH["siglip"], LENGTH["siglip"] // 2)
        )
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(backbone.encode_texts([text]), full).item() == pytest.approx(1, abs=1e-6)
    assert cosine(full, half).item() < 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_words_there_is_room_for(kind: str, tmp_path: Path) -> None:
    texts = ["a " * n for n in (ROOM[kind], ROOM[kind] + 1)]
    for backbone in make_pair(tmp_path, kind, tanh=True):
        assert backbone.truncates(texts) == [False, True]


@pytest.mark.parametrize("name", ["clip-vit-b32", "siglip-vit-b16"])
def test_a_named_backbone_is_one_model_by_either_library(name: str, tmp_path: Path) -> None:
    """Both libraries must give the same embeddings, each with its own configuration.

    For SigLIP, open_clip's GELU is set to the one from training.
    """
    for library in ("open_clip", "hf"):
        write_tiny(tmp_path / library / name, name.partition("-")[0], library, seed=3)
    first = load_backbone(name, device="cpu", models=tmp_path / "open_clip")
    second = load_backbone(f"{name}@hf", device="cpu", models=tmp_path / "hf")
    torch.testing.assert_close(embed(first, 40, 40), embed(second, 40, 40), atol=AGREE, rtol=0)
    torch.testing.assert_close(
        first.encode_texts(TEXTS), second.encode_texts(TEXTS), atol=AGREE, rtol=0
    )


def test_a_model_without_gelu_is_another_one() -> None:
    with pytest.raises(ProvenanceError, match="thing has no GELU"):
        use_tanh_gelu(torch.nn.Linear(2, 2), "thing")


class TestKnownDifferences:
    """Pin where the libraries differ on the published models, and by how much."""

    def test_gelu_of_siglip(self, tmp_path: Path) -> None:
        """If the GELU is not named, open_clip uses the exact one.

        transformers and the training code use its tanh approximation.
        """
        first, second = make_pair(tmp_path, "siglip", tanh=None)
        for difference in (
            embed(first, 32, 32) - embed(second, 32, 32),
            first.encode_texts(TEXTS) - second.encode_texts(TEXTS),
        ):
            assert AGREE < difference.abs().max() < 1e-3

    def test_crop_of_clip(self, tmp_path: Path) -> None:
        """If the longer side is longer by 3, 7, 11, ... pixels, transformers crops one pixel before
        open_clip.
        """
        first, second = make_pair(tmp_path, "clip", tanh=True)
        for longer, moves in ((33, 0), (34, 0), (35, 1), (36, 0), (39, 1)):
            (picture,) = pictures(1, width=32, height=longer)
            a, b = first.preprocess(picture), second.preprocess(picture)
            np.testing.assert_allclose(a[:, : 32 - moves], b[:, moves:], atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_cleaning_of_texts(self, kind: str, tmp_path: Path) -> None:
        """open_clip undoes HTML entities and curly quotes first. transformers takes them as they
        are.
        """
        first, second = make_pair(tmp_path, kind, tanh=True)
        clean, raw = ["cat & dog", "'dog'"], ["cat &amp; dog", "‘dog’"]
        for text, same in zip(raw, clean, strict=True):
            torch.testing.assert_close(
                first.encode_texts([text]), first.encode_texts([same]), atol=AGREE, rtol=0
            )
            assert (second.encode_texts([text]) - first.encode_texts([text])).abs().max() > 1e-3
