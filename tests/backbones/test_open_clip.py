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
from safetensors.torch import save_file
from torch.nn.functional import normalize

from tests.builders.tiny_models import (
    IMAGE_SIZE,
    PIXELS,
    ROOM,
    build,
    config,
    open_clip,
    save_open_clip,
    write_tiny,
)
from tests.builders.tiny_tokenizers import siglip_ids
from vilu.artifacts.hashing import tensors_hash
from vilu.backbones import loading
from vilu.backbones.base import DualEncoder
from vilu.backbones.catalog import load_backbone
from vilu.backbones.open_clip import CONFIG_FILE, find_truncated
from vilu.errors import MissingModelError, ProvenanceError, StorageError, UsageError

TEXTS = ["a photo of a dog", "two cats", "a very long sentence about a red house by the sea " * 7]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    return folder, write_tiny(folder, "clip", "open_clip")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("models") / "tiny-siglip"
    return folder, write_tiny(folder, "siglip", "open_clip")


def noise() -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_embeddings_are_those_of_the_model(
    kind: str, prefix: str, request: pytest.FixtureRequest
) -> None:
    folder, model = request.getfixturevalue(kind)
    backbone = load_backbone(f"open_clip:{prefix}{folder}", device="cpu")
    pixels = noise()
    tokens = siglip_ids(TEXTS) if kind == "siglip" else open_clip.SimpleTokenizer()(TEXTS)
    with torch.no_grad():
        image, text = (
            model.encode_image(pixels, normalize=True),
            model.encode_text(tokens, normalize=True),
        )
    # Both sides use the same arithmetic in the same library. Only the batching of texts differs.
    torch.testing.assert_close(backbone.encode_images(pixels), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(backbone.encode_texts(TEXTS), text, atol=1e-6, rtol=0)


# "!" has the token number 0, as CLIP's padding has.
@pytest.mark.parametrize(("kind", "word"), [("clip", "a"), ("clip", "!"), ("siglip", "a")])
def test_texts_are_cut_off_where_start_words_and_end_do_not_fit(
    kind: str, word: str, request: pytest.FixtureRequest
) -> None:
    backbone = load_backbone(f"open_clip:{request.getfixturevalue(kind)[0]}", device="cpu")
    words = [word, "photo"] * 50
    texts = [" ".join(words[:n]) for n in (1, ROOM[kind], ROOM[kind] + 1, 100)]
    assert backbone.truncates(texts) == [False, False, True, True]
    assert backbone.truncates([]) == []


@pytest.mark.parametrize("kind", ["WordPiece with an end", "text-to-text with its end as padding"])
def test_tokenizers_of_transformers_in_open_clip(kind: str) -> None:
    """Cut-off texts must be found if a tokenizer pads with its end, or with its own sign."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "dog": 3}
    fast = Tokenizer(models.WordLevel(words, "dog"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if kind.startswith("Word") else "$A [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    wrapped = open_clip.tokenizer.HFTokenizer.__new__(open_clip.tokenizer.HFTokenizer)
    pad = "[PAD]" if kind.startswith("Word") else "[SEP]"
    wrapped.tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token=pad)
    wrapped.context_length, wrapped.tokenizer_mode, wrapped.strip_sep_token = 8, "", False
    wrapped.clean_fn = str.strip
    special = 2 if kind.startswith("Word") else 1
    texts = [" ".join(["dog"] * n) for n in (1, 8 - special, 9 - special, 20)]
    assert find_truncated(wrapped, texts) == [False, False, True, True]


def test_features_of_clip_lead_to_its_embeddings_by_linear_maps(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    backbone = load_backbone(f"open_clip:{folder}", device="cpu")
    pixels = noise()
    tokens = open_clip.SimpleTokenizer(context_length=77)(TEXTS)
    seen: list[torch.Tensor] = []
    with (
        torch.no_grad(),
        model.visual.ln_post.register_forward_hook(lambda *call: seen.append(call[2])),
    ):
        embedding = model.encode_image(pixels, normalize=True)
    image, features = backbone.encode_images_and_features(pixels)
    assert torch.equal(image, backbone.encode_images(pixels))
    # These features are the class token after its layer norm.
    torch.testing.assert_close(features, seen[0][:, 0], atol=1e-5, rtol=0)
    maps = backbone.projections
    assert maps is not None
    assert (backbone.feature_dim, maps[0].shape, maps[1].shape) == (64, (32, 64), (32, 48))
    torch.testing.assert_close(normalize(features @ maps[0].T, dim=1), embedding, atol=1e-6, rtol=0)
    text = normalize(backbone.encode_text_features(TEXTS) @ maps[1].T, dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            text, model.encode_text(tokens, normalize=True), atol=1e-6, rtol=0
        )


def test_a_text_tower_of_its_own_has_a_map_too(tmp_path: Path) -> None:
    own = {**config("clip", tmp_path), "custom_text": True}
    model = save_open_clip(tmp_path, own, PIXELS["clip"], build(own).state_dict())
    backbone = load_backbone(f"open_clip:{tmp_path}", device="cpu")
    assert backbone.projections is not None
    assert torch.equal(backbone.projections[1], model.text.text_projection.T)
    text = normalize(backbone.encode_text_features(TEXTS) @ backbone.projections[1].T, dim=1)
    torch.testing.assert_close(text, backbone.encode_texts(TEXTS), atol=1e-6, rtol=0)


def test_a_map_with_a_bias_is_not_linear(siglip: tuple[Path, Any]) -> None:
    """If the last map has a bias, it must stay in its tower, and the features are the tower's
    output.

    SigLIP's text tower has such a bias.
    """
    folder, model = siglip
    backbone = load_backbone(f"open_clip:{folder}", device="cpu")
    assert (backbone.projections, backbone.feature_dim) == (None, 64)
    features = backbone.encode_text_features(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(
            features, model.encode_text(siglip_ids(TEXTS)), atol=1e-5, rtol=0
        )
    torch.testing.assert_close(
        backbone.encode_texts(TEXTS), normalize(features, dim=1), atol=1e-6, rtol=0
    )


def test_space_of_clip(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    space = load_backbone(f"open_clip:{folder}", device="cpu").space
    assert space.embed_dim == 32
    assert space.logit_scale == pytest.approx(20.0, rel=1e-6)
    assert space.logit_bias == 0.0
    assert space.backbone == "open_clip:tiny-clip"
    assert space.weights == tensors_hash(model.state_dict())
    assert json.loads(space.with_full_jpegs.preprocess or "") == {
        **PIXELS["clip"],
        "size": [32, 32],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "mode": "RGB",
        "fill_color": 0,
    }
    assert str(folder.parent) not in repr(space)


def test_space_of_siglip(siglip: tuple[Path, Any], clip: tuple[Path, Any]) -> None:
    space = load_backbone(f"open_clip:{siglip[0]}", device="cpu", precision="bf16").space
    assert space.logit_scale == pytest.approx(20.0, rel=1e-6)
    assert space.logit_bias == -7.5
    assert space.precision == "bf16"
    # The two have different vocabularies.
    assert space.tokenizer != load_backbone(f"open_clip:{clip[0]}", device="cpu").space.tokenizer


def test_pixels_follow_the_configuration(
    clip: tuple[Path, Any], siglip: tuple[Path, Any], tmp_path: Path
) -> None:
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    )
    shortest = np.asarray(picture.resize((32, 48), Image.Resampling.BICUBIC))[8:40] / 255
    expected = (shortest - PIXELS["clip"]["mean"]) / PIXELS["clip"]["std"]
    pixels = load_backbone(f"open_clip:{clip[0]}", device="cpu").preprocess(picture)
    # These are float32 numbers up to 2, after three operations.
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    for interpolation, resampling in (
        ("bicubic", Image.Resampling.BICUBIC),
        ("bilinear", Image.Resampling.BILINEAR),
    ):
        folder = shutil.copytree(siglip[0], tmp_path / interpolation)
        settings = json.loads((folder / CONFIG_FILE).read_text())
        settings["preprocess_cfg"]["interpolation"] = interpolation
        (folder / CONFIG_FILE).write_text(json.dumps(settings))
        squash = np.asarray(picture.resize((32, 32), resampling)) / 255
        pixels = load_backbone(f"open_clip:{folder}", device="cpu").preprocess(picture)
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), squash * 2 - 1, atol=1e-6)


def test_folder_without_weights_is_not_a_random_model(
    clip: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copy(clip[0] / CONFIG_FILE, tmp_path)
    with pytest.raises(MissingModelError, match="no weights"):
        load_backbone(f"open_clip:{tmp_path}", device="cpu")
    (tmp_path / CONFIG_FILE).unlink()
    for spec in (str(tmp_path), f"local-dir:{tmp_path / 'absent'}"):
        with pytest.raises(MissingModelError, match=f"no {CONFIG_FILE}"):
            load_backbone(f"open_clip:{spec}", device="cpu")


def test_weights_that_do_not_fit(clip: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(clip[0], tmp_path / "other")
    settings = json.loads((folder / CONFIG_FILE).read_text())
    settings["model_cfg"]["embed_dim"] = 8
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    with pytest.raises(
        ProvenanceError, match=r"open_clip:other do not make a model together.*size mismatch"
    ):
        load_backbone(f"open_clip:{folder}", device="cpu")
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(ProvenanceError, match="valid config"):
        load_backbone(f"open_clip:{folder}", device="cpu")


def test_damaged_weights(clip: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(clip[0], tmp_path / "cut")
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(StorageError, match="damaged"):
        load_backbone(f"open_clip:{folder}", device="cpu")


class Trap:
    """Run a command when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_weights_are_not_executed(
    siglip: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(siglip[0], tmp_path / "trap")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(siglip[1].state_dict(), folder / "open_clip_pytorch_model.bin")
    assert load_backbone(f"open_clip:{folder}", device="cpu").space.weights == tensors_hash(
        siglip[1].state_dict()
    )
    torch.save({"logit_scale": Trap()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(StorageError, match="more than plain tensors"):
        load_backbone(f"open_clip:{folder}", device="cpu")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def cache(clip: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a hub cache that holds the tiny model as org/tiny, and block the network."""
    revision = "0" * 40
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(clip[0], repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: pytest.fail("the network was asked"))
    return repository


def test_hub_model_comes_from_the_cache(cache: Path, clip: tuple[Path, Any]) -> None:
    space = load_backbone("open_clip:hf-hub:org/tiny", device="cpu").space
    assert space.backbone == "open_clip:hf-hub:org/tiny"
    assert space.weights == tensors_hash(clip[1].state_dict())


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_tag_brings_preprocessing_and_activation(
    cache: Path, clip: tuple[Path, Any], quick_gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag must bring its activation.

    If a tag's weights want QuickGELU, open_clip itself only warns, and computes other embeddings.
    """
    tag = {"hf_hub": "org/tiny/", "quick_gelu": quick_gelu, **PIXELS["siglip"]}
    silent = {key: value for key, value in config("clip", cache).items() if key != "quick_gelu"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", silent)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"made_here": tag})
    backbone = load_backbone("open_clip:tiny/made_here", device="cpu")
    model = build({**silent, "quick_gelu": quick_gelu})
    model.load_state_dict(clip[1].state_dict())
    pixels = noise()
    with torch.no_grad():
        expected = model.encode_image(pixels, normalize=True)
        quick = clip[1].encode_image(pixels, normalize=True)
    torch.testing.assert_close(backbone.encode_images(pixels), expected, atol=1e-6, rtol=0)
    assert bool(torch.allclose(expected, quick, atol=1e-5)) is quick_gelu
    settings = json.loads(backbone.space.with_full_jpegs.preprocess or "")
    assert settings["mean"] == PIXELS["siglip"]["mean"]


@pytest.mark.parametrize(
    ("spec", "repository"),
    [
        ("ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("hf-hub:org/absent", "org/absent"),
    ],
)
def test_absent_offline(
    spec: str, repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: False)
    with pytest.raises(
        MissingModelError,
        match=f"open_clip:{spec} is not in the local cache.*download {repository}`",
    ):
        load_backbone(f"open_clip:{spec}", device="cpu")


def test_a_model_without_a_repository_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"hf_hub": "weights.pt", "url": ""}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: entry)
    with pytest.raises(UsageError, match=r"no repository .* 'weights\.pt', expected ORG/NAME"):
        load_backbone("open_clip:ViT-B-32/openai")


@pytest.fixture
def registered(clip: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Register the tiny model as "tiny" in open_clip.

    Return the model, whose weights are random.
    """
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config("clip", clip[0]))
    return clip[1]


@pytest.mark.parametrize("form", ["training", "weights", "safetensors"])
def test_a_checkpoint_file_of_ones_own(registered: Any, form: str, tmp_path: Path) -> None:
    """A file may come from open_clip's training, hold the weights alone, or be safetensors."""
    state = registered.state_dict()
    file = tmp_path / "epoch_1.pt"
    if form == "training":
        parallel = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 1, "name": "run", "state_dict": parallel}, file)
    elif form == "weights":
        torch.save(state, file)
    else:
        file = tmp_path / "epoch_1.safetensors"
        save_file(state, file)
    backbone = load_backbone(f"open_clip:tiny/{file}", device="cpu")
    assert backbone.space.backbone == f"open_clip:tiny/{file.name}"
    assert backbone.space.weights == tensors_hash(state)
    # A saved predictor knows only the file's name, and finds the file in a models folder.
    again = load_backbone(backbone.space.backbone, device="cpu", models=tmp_path)
    assert again.space == backbone.space


@pytest.mark.usefixtures("registered")
def test_checkpoint_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"'here\.pt', and there is no such file.*open_clip:tiny/PATH"
    ):
        load_backbone("open_clip:tiny/here.pt", device="cpu", models=tmp_path)
    torch.save({"logit_scale": torch.tensor(3.0)}, tmp_path / "part.pt")
    with pytest.raises(ProvenanceError, match="do not make a model together"):
        load_backbone(f"open_clip:tiny/{tmp_path}/part.pt", device="cpu")
    torch.save({"logit_scale": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(StorageError, match="more than plain tensors"):
        load_backbone(f"open_clip:tiny/{tmp_path}/trap.pt", device="cpu")


def test_a_folder_of_weights_is_found_in_a_folder_of_models(clip: tuple[Path, Any]) -> None:
    folder, _ = clip
    space = load_backbone(f"open_clip:{folder}", device="cpu").space
    again = load_backbone(space.backbone or "", device="cpu", models=folder.parent)
    assert again.space == space


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"no model 'ViT-B-23'.*ViT-B-32"):
        load_backbone("open_clip:ViT-B-23/openai")
    with pytest.raises(UsageError, match=r"no pretraining tag 'laion'.*laion2b_e16"):
        load_backbone("open_clip:ViT-B-32/laion")
    for spec in ("open_clip", "open_clip:"):
        with pytest.raises(UsageError, match="Expected NAME/TAG"):
            load_backbone(spec)
    with pytest.raises(UsageError, match="ORG/NAME"):
        load_backbone("open_clip:hf-hub:")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingModelError, match=r"pip install 'vilu\[clip\]'"):
        load_backbone("open_clip:ViT-B-32/openai")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_bf16_rounds_the_image_tower_alone(kind: str, request: pytest.FixtureRequest) -> None:
    folder, _ = request.getfixturevalue(kind)
    exact = load_backbone(f"open_clip:{folder}", device="cpu")
    rounded = load_backbone(f"open_clip:{folder}", device="cpu", precision="bf16")
    side = rounded.preprocess(Image.new("RGB", (40, 40))).shape[-1]
    pixels = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert isinstance(rounded, DualEncoder)
    assert torch.equal(rounded.in_float32().encode_images(pixels), exact.encode_images(pixels))
    assert torch.equal(rounded.encode_texts(["a b"]), exact.encode_texts(["a b"]))
    cosines = (rounded.encode_images(pixels) * exact.encode_images(pixels)).sum(dim=1)
    # bfloat16 keeps 8 bits. So a result is off by a few hundredths at most.
    assert 0.995 < float(cosines.min()) < 1 - 1e-7
