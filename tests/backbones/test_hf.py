from __future__ import annotations

import json
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

from tests.builders.tiny_models import IMAGE_SIZE, LENGTH, ROOM, open_clip, transformers, write_tiny
from tests.builders.tiny_tokenizers import clip_tokenizer, siglip_ids
from vilu.artifacts.hashing import tensors_hash
from vilu.backbones import loading
from vilu.backbones.base import DualEncoder
from vilu.backbones.catalog import load_backbone
from vilu.errors import MissingModelError, ProvenanceError, UsageError
from vilu.extras import suppress_messages

TEXTS = ["a dog.", "a photo of two cats", "b", "a text that is longer than the tower can read " * 9]
CLEAN = [text.strip(" .") for text in TEXTS]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    return folder, write_tiny(folder, "clip", "hf")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("models") / "tiny-siglip"
    return folder, write_tiny(folder, "siglip", "hf")


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Return the text towers' inputs, made by other tokenizers.

    CLIP's inputs have a mask over the padding. SigLIP's have none.
    """
    if kind == "siglip":
        return {"input_ids": siglip_ids(CLEAN)}
    ids = open_clip.SimpleTokenizer()(TEXTS)
    mask = torch.arange(LENGTH["clip"]) <= ids.argmax(dim=1, keepdim=True)
    return {"input_ids": ids, "attention_mask": mask.long()}


def noise() -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_are_those_of_the_model(kind: str, request: pytest.FixtureRequest) -> None:
    folder, model = request.getfixturevalue(kind)
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    pixels = noise()
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(**inputs(kind)).pooler_output
    # Both sides use the same arithmetic in the same library. Only the batching of texts differs.
    torch.testing.assert_close(
        backbone.encode_images(pixels), image / image.norm(dim=1, keepdim=True), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        backbone.encode_texts(TEXTS), text / text.norm(dim=1, keepdim=True), atol=1e-6, rtol=0
    )


def test_features_of_clip_lead_to_its_embeddings_by_linear_maps(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    pixels = noise()
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
    assert backbone.feature_dim == 64
    torch.testing.assert_close(normalize(features @ maps[0].T, dim=1), image, atol=1e-6, rtol=0)
    text = normalize(backbone.encode_text_features(TEXTS) @ maps[1].T, dim=1)
    torch.testing.assert_close(text, backbone.encode_texts(TEXTS), atol=1e-6, rtol=0)


def test_features_of_siglip_are_its_embeddings_before_normalisation(
    siglip: tuple[Path, Any],
) -> None:
    folder, model = siglip
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    pixels = noise()
    image, features = backbone.encode_images_and_features(pixels)
    with torch.no_grad():
        torch.testing.assert_close(
            features, model.get_image_features(pixel_values=pixels).pooler_output, atol=1e-5, rtol=0
        )
    torch.testing.assert_close(normalize(features, dim=1), image, atol=1e-6, rtol=0)
    assert (backbone.projections, backbone.feature_dim) == (None, 64)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_do_not_depend_on_their_company(kind: str, request: pytest.FixtureRequest) -> None:
    backbone = load_backbone(f"hf:{request.getfixturevalue(kind)[0]}", device="cpu")
    alone = torch.cat([backbone.encode_texts([text]) for text in TEXTS])
    torch.testing.assert_close(backbone.encode_texts(TEXTS), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_are_cut_off_where_start_words_and_end_do_not_fit(
    kind: str, request: pytest.FixtureRequest
) -> None:
    backbone = load_backbone(f"hf:{request.getfixturevalue(kind)[0]}", device="cpu")
    texts = ["", "a " * ROOM[kind], "a " * (ROOM[kind] + 1), "a b " * LENGTH[kind]]
    assert backbone.truncates(texts) == [False, False, True, True]
    assert backbone.truncates([]) == []
    rows = backbone.encode_texts(["a " * n for n in range(ROOM[kind] - 1, ROOM[kind] + 3)])
    # The part that is cut off changes nothing. Once all room is taken, longer texts are the same.
    # Equal rows of a product may differ by rounding.
    differences = [float((rows[i] - rows[i + 1]).abs().max()) for i in range(3)]
    assert [difference < 1e-6 for difference in differences] == [False, True, True]


def test_space(clip: tuple[Path, Any], siglip: tuple[Path, Any]) -> None:
    space = load_backbone(f"hf:{clip[0]}", device="cpu").space
    assert (space.embed_dim, space.logit_bias, space.backbone) == (32, 0.0, "hf:tiny-clip")
    assert space.logit_scale == pytest.approx(20.0, rel=1e-6)
    assert space.weights == tensors_hash(clip[1].state_dict())
    assert str(clip[0].parent) not in repr(space)
    space = load_backbone(f"hf:{siglip[0]}", device="cpu", precision="bf16").space
    assert (space.embed_dim, space.logit_bias, space.precision) == (64, -7.5, "bf16")
    assert space.logit_scale == pytest.approx(20.0, rel=1e-6)


def test_siglip_reads_its_padding_whatever_its_tokenizer_gives(
    siglip: tuple[Path, Any], tmp_path: Path
) -> None:
    """SigLIP must read its padding even if its tokenizer gives a mask.

    The tokenizer in transformers gives a mask unless its settings say otherwise. The settings on
    the hub say otherwise.
    """
    folder = shutil.copytree(siglip[0], tmp_path / "masking")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with suppress_messages():
        assert "attention_mask" in transformers.AutoTokenizer.from_pretrained(folder)(TEXTS)
    rows = load_backbone(f"hf:{folder}", device="cpu").encode_texts(TEXTS)
    assert torch.equal(rows, load_backbone(f"hf:{siglip[0]}", device="cpu").encode_texts(TEXTS))


def test_pixels_follow_the_processor(siglip: tuple[Path, Any]) -> None:
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    )
    backbone = load_backbone(f"hf:{siglip[0]}", device="cpu")
    # The expected pixels are resized by Pillow. torchvision, the default in transformers, is a grey
    # level off in places.
    expected = (
        np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 127.5
        - 1
    )
    np.testing.assert_allclose(backbone.preprocess(picture).numpy(), expected, atol=1e-6)
    settings = json.loads(backbone.space.with_full_jpegs.preprocess or "")
    assert settings["class"] == "SiglipImageProcessorPil"
    assert settings["image_mean"] == [0.5, 0.5, 0.5]
    assert settings["size"] == {"height": 32, "width": 32}


def test_weights_that_do_not_fill_the_model(clip: tuple[Path, Any], tmp_path: Path) -> None:
    """Missing weights must be refused. transformers only warns, and draws them at random."""
    folder = shutil.copytree(clip[0], tmp_path / "holed")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ProvenanceError, match=r"no weights for 1 tensors, the first is visual_projection\.weight"
    ):
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
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with suppress_messages():
        transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99)).save_pretrained(
            tmp_path
        )
        clip_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a BertModel, which has no get_image_features"):
        load_backbone(f"hf:{tmp_path}", device="cpu")


def test_patches_of_varying_number(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.Siglip2Config(
        text_config={**sizes, "vocab_size": 49408},
        vision_config={**sizes, "patch_size": 16, "num_patches": 16},
    )
    pixels = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
    with suppress_messages():
        transformers.Siglip2Model(config).save_pretrained(tmp_path / "naflex")
        transformers.Siglip2Processor(pixels, clip_tokenizer()).save_pretrained(tmp_path / "naflex")
    with pytest.raises(
        UsageError, match="hf:naflex cuts pictures into a varying number of patches"
    ):
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
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: pytest.fail("the network was asked"))
    space = load_backbone("hf:org/tiny", device="cpu").space
    assert (space.backbone, space.weights) == ("hf:org/tiny", tensors_hash(clip[1].state_dict()))


def test_absent_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: False)
    with pytest.raises(
        MissingModelError, match=r"hf:org/absent is not in the local cache.*download org/absent"
    ):
        load_backbone("hf:org/absent", device="cpu")


@pytest.mark.parametrize(
    "argument", ["", "./models/absent", "/absent", "~/absent", "a/b/c", "../absent"]
)
def test_neither_folder_nor_hub(argument: str) -> None:
    with pytest.raises(UsageError, match="expected a folder that exists, or ORG/NAME"):
        load_backbone(f"hf:{argument}", device="cpu")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingModelError, match=r"pip install 'vilu\[hf\]'"):
        load_backbone("hf:org/name")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_bf16_rounds_the_image_tower_alone(kind: str, request: pytest.FixtureRequest) -> None:
    folder, _ = request.getfixturevalue(kind)
    exact = load_backbone(f"hf:{folder}", device="cpu")
    rounded = load_backbone(f"hf:{folder}", device="cpu", precision="bf16")
    pixels = rounded.preprocess(Image.new("RGB", (40, 40), "red"))[None]
    assert isinstance(rounded, DualEncoder)
    assert torch.equal(rounded.in_float32().encode_images(pixels), exact.encode_images(pixels))
    assert torch.equal(rounded.encode_texts(["a b"]), exact.encode_texts(["a b"]))
    cosines = (rounded.encode_images(pixels) * exact.encode_images(pixels)).sum(dim=1)
    # bfloat16 keeps 8 bits. So a result is off by a few hundredths at most.
    assert 0.995 < float(cosines.min()) < 1 - 1e-7
