from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from vilu.backbones import loading
from vilu.backbones.catalog import load_backbone
from vilu.backbones.loading import quiet, tensors_sha256
from vilu.errors import MissingModelError, ProvenanceError, UsageError

transformers = pytest.importorskip("transformers")

TEXTS = ["a dog.", "a photo of two cats", "b", "a text that is longer than the tower can read"]
LENGTH = 16
ENDS = {"<|startoftext|>": 0, "<|endoftext|>": 1}
VOCABULARY = ENDS | {
    sign + end: 2 + i
    for i, (sign, end) in enumerate((s, e) for s in "abcdefghijklmnopqrstuvwxyz.," for e in ("", "</w>"))
}
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {
    **WIDTHS,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {**WIDTHS, "image_size": 32, "patch_size": 16}


def write(folder: Path, model: Any, processor: Any) -> Any:
    """A model with random weights on the disk, as ``save_pretrained`` lays it out."""
    with torch.no_grad():
        model.logit_scale.fill_(math.log(33.0))
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-7.5)
    with quiet():
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
    return model


def tokenizer() -> Any:
    return transformers.CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=LENGTH)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    with quiet():
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
        )
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    return folder, write(folder, model, transformers.CLIPProcessor(pixels, tokenizer()))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    with quiet():
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))
    pixels = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("models") / "tiny-siglip"
    return folder, write(folder, model, transformers.SiglipProcessor(pixels, tokenizer()))


def padded_ids() -> torch.Tensor:
    """Token numbers by hand: start, the signs (the last of a word is its own token), end, and ends up to LENGTH."""
    rows = []
    for text in TEXTS:
        words = text.replace(".", " .").split()
        signs = [sign + ("</w>" if i == len(word) - 1 else "") for word in words for i, sign in enumerate(word)]
        ids = [0, *(VOCABULARY[sign] for sign in signs)][: LENGTH - 1]
        rows.append([*ids, *[1] * (LENGTH - len(ids))])
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_are_those_of_the_model(kind: str, request: pytest.FixtureRequest) -> None:
    folder, model = request.getfixturevalue(kind)
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = padded_ids()
    ends = (ids == 1).int().argmax(dim=1, keepdim=True)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(
            input_ids=ids, attention_mask=(torch.arange(LENGTH) <= ends).long()
        ).pooler_output
    # the same arithmetic in the same library: only the batching of the texts differs
    torch.testing.assert_close(
        backbone.encode_images(pixels), image / image.norm(dim=1, keepdim=True), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(backbone.encode_texts(TEXTS), text / text.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)


def test_features_of_clip_lead_to_its_embeddings_by_linear_maps(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        embedding = model.visual_projection(pooled)
    image, features = backbone.encode_images_and_features(pixels)
    torch.testing.assert_close(features, pooled, atol=1e-6, rtol=0)
    torch.testing.assert_close(image, normalize(embedding, dim=1), atol=1e-6, rtol=0)
    maps = backbone.projections
    assert maps is not None
    assert torch.equal(maps[0], model.visual_projection.weight)
    assert torch.equal(maps[1], model.text_projection.weight)
    assert backbone.feature_dim == 16
    torch.testing.assert_close(normalize(features @ maps[0].T, dim=1), image, atol=1e-6, rtol=0)
    text = normalize(backbone.encode_text_features(TEXTS) @ maps[1].T, dim=1)
    torch.testing.assert_close(text, backbone.encode_texts(TEXTS), atol=1e-6, rtol=0)


def test_features_of_siglip_are_its_embeddings_before_normalisation(siglip: tuple[Path, Any]) -> None:
    folder, model = siglip
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    image, features = backbone.encode_images_and_features(pixels)
    with torch.no_grad():
        torch.testing.assert_close(
            features, model.get_image_features(pixel_values=pixels).pooler_output, atol=1e-6, rtol=0
        )
    torch.testing.assert_close(normalize(features, dim=1), image, atol=1e-6, rtol=0)
    assert (backbone.projections, backbone.feature_dim) == (None, 16)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_do_not_depend_on_their_company(kind: str, request: pytest.FixtureRequest) -> None:
    backbone = load_backbone(f"hf:{request.getfixturevalue(kind)[0]}", device="cpu")
    alone = torch.cat([backbone.encode_texts([text]) for text in TEXTS])
    torch.testing.assert_close(backbone.encode_texts(TEXTS), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_are_cut_off_where_start_signs_and_end_do_not_fit(kind: str, request: pytest.FixtureRequest) -> None:
    backbone = load_backbone(f"hf:{request.getfixturevalue(kind)[0]}", device="cpu")
    texts = ["", "a" * (LENGTH - 2), "a" * (LENGTH - 1), "a b " * LENGTH]
    assert backbone.truncates(texts) == [False, False, True, True]
    assert backbone.truncates([]) == []
    rows = backbone.encode_texts(["a" * n for n in range(LENGTH - 3, LENGTH + 1)])
    # what is cut off has no say: from one sign too many on, all texts are one
    assert [torch.equal(rows[i], rows[i + 1]) for i in range(3)] == [False, False, True]


def test_space(clip: tuple[Path, Any], siglip: tuple[Path, Any]) -> None:
    space = load_backbone(f"hf:{clip[0]}", device="cpu").space
    assert (space.embed_dim, space.logit_bias, space.backbone) == (8, 0.0, "hf:tiny-clip")
    assert space.logit_scale == pytest.approx(33.0, rel=1e-6)
    assert space.weights == tensors_sha256(clip[1].state_dict())
    assert str(clip[0].parent) not in repr(space)
    space = load_backbone(f"hf:{siglip[0]}", device="cpu", precision="bf16").space
    assert (space.embed_dim, space.logit_bias, space.precision) == (16, -7.5, "bf16")
    assert space.logit_scale == pytest.approx(33.0, rel=1e-6)


def test_pixels_follow_the_processor(siglip: tuple[Path, Any]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    backbone = load_backbone(f"hf:{siglip[0]}", device="cpu")
    # of the right size already, so nothing is resampled: x / 255 to mean 0.5, std 0.5
    expected = np.asarray(picture).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(backbone.preprocess(picture).numpy(), expected, atol=1e-6)
    assert backbone.preprocess(picture.resize((50, 70))).shape == (3, 32, 32)
    settings = json.loads(backbone.space.preprocess or "")
    assert settings["image_mean"] == [0.5, 0.5, 0.5]
    assert settings["size"] == {"height": 32, "width": 32}


def test_weights_that_do_not_fill_the_model(clip: tuple[Path, Any], tmp_path: Path) -> None:
    """transformers only warns, and draws the missing ones at random."""
    folder = shutil.copytree(clip[0], tmp_path / "holed")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProvenanceError, match=r"no weights for 1 tensors, the first is visual_projection\.weight"):
        load_backbone(f"hf:{folder}", device="cpu")


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("model.safetensors", MissingModelError, "hf:part cannot be loaded from this folder"),
        ("config.json", ProvenanceError, "files of hf:part do not make a model together"),
        ("tokenizer.json", ProvenanceError, "vocabulary is missing"),  # transformers makes one up
    ],
)
def test_folder_that_lacks_a_file(
    clip: tuple[Path, Any], tmp_path: Path, file: str, error: type[Exception], message: str
) -> None:
    folder = shutil.copytree(clip[0], tmp_path / "part")
    (folder / file).unlink()
    with pytest.raises(error, match=message):
        load_backbone(f"hf:{folder}", device="cpu")


def test_not_a_dual_encoder(tmp_path: Path) -> None:
    config = transformers.BertConfig(**WIDTHS, vocab_size=len(VOCABULARY))
    with quiet():
        transformers.BertModel(config).save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a BertModel, which has no get_image_features"):
        load_backbone(f"hf:{tmp_path}", device="cpu")


def test_patches_of_varying_number(tmp_path: Path) -> None:
    vision = {**WIDTHS, "patch_size": 16, "num_patches": 16}
    with quiet():
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))
    pixels = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
    write(tmp_path / "naflex", model, transformers.Siglip2Processor(pixels, tokenizer()))
    with pytest.raises(UsageError, match="hf:naflex cuts pictures into patches of varying number"):
        load_backbone(f"hf:{tmp_path / 'naflex'}", device="cpu")


def test_hub_model_comes_from_the_cache(
    clip: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0" * 40
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(clip[0], repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "hub_reachable", lambda: pytest.fail("the network was asked"))
    space = load_backbone("hf:org/tiny", device="cpu").space
    assert (space.backbone, space.weights) == ("hf:org/tiny", tensors_sha256(clip[1].state_dict()))


def test_absent_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    with pytest.raises(MissingModelError, match=r"hf:org/absent is not in the local cache.*download org/absent"):
        load_backbone("hf:org/absent", device="cpu")


@pytest.mark.parametrize("argument", ["", "./models/absent", "/absent", "~/absent", "a/b/c", "../absent"])
def test_neither_folder_nor_hub(argument: str) -> None:
    with pytest.raises(UsageError, match="expected a folder that exists, or ORG/NAME"):
        load_backbone(f"hf:{argument}", device="cpu")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingModelError, match=r"pip install 'vilu\[hf\]'"):
        load_backbone("hf:org/name")
