"""Test named backbones: what both libraries know about them, and model folders in place
of the hub.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import torch

from tests.builders.tiny_models import open_clip, transformers, write_tiny
from tests.builders.tiny_weights import to_transformers
from vilu.backbones import loading
from vilu.backbones.catalog import (
    BACKBONES,
    CONFIG_FILES,
    find_named_backbone,
    load_backbone,
    named_backbones,
)
from vilu.errors import MissingModelError, ProvenanceError, UsageError
from vilu.extras import suppress_messages
from vilu.store.job import BackboneSpec

ON_THE_HUB = {
    "clip-vit-b32": {"vision": (768, 12, 12, 32), "text": (512, 12, 8), "vocabulary": 49408},
    "clip-vit-b16": {"vision": (768, 12, 12, 16), "text": (512, 12, 8), "vocabulary": 49408},
    "clip-vit-l14": {"vision": (1024, 24, 16, 14), "text": (768, 12, 12), "vocabulary": 49408},
    "siglip-vit-b16": {"vision": (768, 12, 12, 16), "text": (768, 12, 12), "vocabulary": 32000},
    "siglip-vit-l16": {"vision": (1024, 24, 16, 16), "text": (1024, 24, 16), "vocabulary": 32000},
}
"""These are width, layers, heads and patch size from config.json in the transformers
repositories.
"""


def test_names() -> None:
    named = named_backbones()
    assert [name for name in named if name in ON_THE_HUB] == list(ON_THE_HUB)
    assert all(named[name].image_rate > 0 and named[name].text_rate > 0 for name in ON_THE_HUB)
    assert all(kind in BACKBONES for kind in CONFIG_FILES)


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_open_clip_has_it_so(name: str) -> None:
    model = BACKBONES[name]
    architecture, _, tag = model.open_clip.partition("/")
    config, pretrained = (
        open_clip.get_model_config(architecture),
        open_clip.get_pretrained_cfg(architecture, tag),
    )
    assert config["embed_dim"] == model.embed_dim
    assert config["vision_cfg"]["image_size"] == model.image_size
    assert config["text_cfg"]["context_length"] == model.context_length
    assert pretrained["hf_hub"].rstrip("/") == model.open_clip_hub
    assert bool(pretrained.get("quick_gelu")) is model.quick_gelu
    assert ("init_logit_bias" in config) is name.startswith("siglip")


def hub_config(name: str) -> Any:
    """Return the transformers configuration, as on the hub."""
    model, sizes = BACKBONES[name], ON_THE_HUB[name]
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    vision, text = (dict(zip(keys, sizes[tower], strict=False)) for tower in ("vision", "text"))
    for tower in (vision, text):
        tower["intermediate_size"] = 4 * tower["hidden_size"]
    vision["image_size"] = model.image_size
    text |= {"max_position_embeddings": model.context_length, "vocab_size": sizes["vocabulary"]}
    if name.startswith("siglip"):
        return transformers.SiglipConfig(text_config=text, vision_config=vision)
    return transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=model.embed_dim
    )


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_both_libraries_have_the_same_weights(name: str) -> None:
    """Every full-size tensor in open_clip must have its counterpart in transformers.

    The models are on the meta device, which holds no numbers.
    """
    model, config = BACKBONES[name], hub_config(name)
    with torch.device("meta"), suppress_messages():
        first = open_clip.create_model(model.open_clip.partition("/")[0], device="meta")
        second = (
            transformers.SiglipModel if name.startswith("siglip") else transformers.CLIPModel
        )(config)
    shapes = {key: tensor.shape for key, tensor in second.state_dict().items()}
    renamed = to_transformers(dict(first.state_dict()), shapes)
    assert {key: tensor.shape for key, tensor in renamed.items()} == shapes
    assert config.vision_config.hidden_size == model.feature_dim
    assert config.vision_config.hidden_act == (
        "quick_gelu" if model.quick_gelu else "gelu_pytorch_tanh"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with CLIP for open_clip, SigLIP for transformers, and one model for both."""
    folder = tmp_path_factory.mktemp("sites") / "models"
    folder.mkdir()
    write_tiny(folder / "clip-vit-b32", "clip", "open_clip")
    write_tiny(folder / "siglip-vit-b16", "siglip", "hf")
    write_tiny(folder / "clip-vit-l14", "clip", "hf", seed=1)
    shutil.copytree(folder / "clip-vit-b32", folder / "clip-vit-l14", dirs_exist_ok=True)
    return folder


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide an empty hub cache, and fail a test that asks the network."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: pytest.fail("the network was asked"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("spec", "library"),
    [
        ("clip-vit-b32", "open_clip"),
        ("clip-vit-b32@open_clip", "open_clip"),
        ("siglip-vit-b16", "hf"),
        ("siglip-vit-b16@hf", "hf"),
        ("clip-vit-l14", "open_clip"),
        ("clip-vit-l14@hf", "hf"),
    ],
)
def test_models_come_from_the_folder(models: Path, spec: str, library: str) -> None:
    name = spec.partition("@")[0]
    backbone = load_backbone(spec, device="cpu", models=models)
    expected = load_backbone(f"{library}:{models / name}", device="cpu")
    assert backbone.space.weights == expected.space.weights
    assert backbone.space.backbone == (name if library == "open_clip" else f"{name}@hf")
    assert torch.equal(backbone.encode_texts(["a dog"]), expected.encode_texts(["a dog"]))


@pytest.mark.usefixtures("no_network")
def test_a_space_does_not_depend_on_where_the_model_lies(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "clip-vit-b32", tmp_path / "elsewhere" / "clip-vit-b32")
    here, there = (
        load_backbone("clip-vit-b32", device="cpu", models=x)
        for x in (models, str(tmp_path / "elsewhere"))
    )
    assert here.space == there.space


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("spec", "missing", "way"),
    [
        (
            "clip-vit-b16",
            "open_clip_config.json or config.json",
            "timm/vit_base_patch16_clip_224.openai",
        ),
        ("clip-vit-b16", "open_clip_config.json or config.json", "openai/clip-vit-base-patch16"),
        ("clip-vit-b32@hf", "config.json", "openai/clip-vit-base-patch32"),
        ("siglip-vit-b16@open_clip", "open_clip_config.json", "timm/ViT-B-16-SigLIP"),
    ],
)
def test_what_is_not_in_the_folder_is_an_error(
    models: Path, spec: str, missing: str, way: str
) -> None:
    folder = models / spec.partition("@")[0]
    with pytest.raises(
        MissingModelError,
        match=rf"no {missing} in the folder {folder},.*hf download {way} --local-dir {folder}`",
    ):
        load_backbone(spec, device="cpu", models=models)


def test_without_a_folder_the_hub_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: False)
    for spec, place in (
        ("clip-vit-b32", "open_clip:ViT-B-32/openai"),
        ("siglip-vit-l16@hf", "hf:google/siglip-large-patch16-256"),
    ):
        with pytest.raises(MissingModelError, match=f"^{place} is not in the local cache"):
            load_backbone(spec, device="cpu")


def test_other_specs_are_what_they_were(models: Path) -> None:
    assert find_named_backbone("compact:64", models) is None
    assert find_named_backbone(f"hf:{models}/x@hf", models) is None
    spec = f"open_clip:{models / 'clip-vit-b32'}"
    assert (
        load_backbone(spec, device="cpu", models=models / "absent").space.backbone
        == "open_clip:clip-vit-b32"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "clip-vit-b32@timm",
            r"clip-vit-b32@open_clip or clip-vit-b32@hf. Got 'clip-vit-b32@timm'",
        ),
        ("clip-vit-b32@", "Got 'clip-vit-b32@'"),
        ("clip-vit-b23", "Did you mean 'clip-vit-b32'"),
        ("siglip-vit-b61@hf", "Did you mean 'siglip-vit-b16'"),
        ("../clip-vit-b32", "there is no backbone"),
    ],
)
def test_names_that_are_none(models: Path, spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_backbone(spec, device="cpu", models=models)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_cfg": {"embed_dim": 32}}, "need quick_gelu true, and model_cfg in .* has false"),
        ({"preprocess_cfg": {}}, "no configuration of open_clip"),
        (["model_cfg"], "no configuration of open_clip"),
        ("\udcff{", "no configuration of open_clip"),
    ],
)
def test_a_configuration_of_another_activation(
    models: Path, tmp_path: Path, content: Any, message: str
) -> None:
    """A configuration without QuickGELU must be refused.

    Without the flag open_clip would compute with GELU, and say nothing.
    """
    folder = shutil.copytree(models / "clip-vit-b32", tmp_path / "clip-vit-b32")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / CONFIG_FILES["open_clip"]).write_text(text, errors="surrogateescape")
    with pytest.raises(ProvenanceError, match=message):
        load_backbone("clip-vit-b32", device="cpu", models=tmp_path)


def test_other_processes_get_the_folder_too(models: Path) -> None:
    spec = pickle.loads(pickle.dumps(BackboneSpec("clip-vit-b32", "cpu", "fp32", models)))
    assert spec.load().space == load_backbone("clip-vit-b32", device="cpu", models=models).space
    assert spec.load() is BackboneSpec("clip-vit-b32", "cpu", models=models).load()


def test_listing_needs_no_model_library() -> None:
    code = (
        "import sys; sys.argv = ['vilu', 'list', 'backbones', '--json']\n"
        "import atexit; atexit.register(lambda: sys.stderr.write(repr(set(sys.modules) & "
        "{'torch', 'open_clip', 'timm', 'transformers'})))\n"
        "from vilu.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()"
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(BACKBONES)
    row = rows["siglip-vit-l16"]
    assert (row["hf"], row["embed_dim"], row["image_size"], row["context_length"]) == (
        "google/siglip-large-patch16-256", 1024, 256, 64,
    )  # fmt: skip
