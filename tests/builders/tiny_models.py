"""Write small models with the real architectures and random weights, in either library's folders.

CLIP is as OpenAI trained it: QuickGELU, a causal text tower, and the byte pairs from open_clip.
SigLIP has timm's tower with attention pooling, a text tower that reads its padding, a logit bias
and a SentencePiece vocabulary. Only the widths are reduced. The same kind and seed give the same
weights in both formats.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.builders.tiny_tokenizers import (
    clip_tokenizer,
    siglip_ids,
    siglip_tokenizer,
    t5_tokenizer,
    vocabulary_size,
)
from tests.builders.tiny_weights import draw_weights, to_transformers
from vilu.backbones.open_clip import CONFIG_FILE
from vilu.extras import suppress_messages

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

Kind = Literal["clip", "siglip"]
Format = Literal["open_clip", "hf"]

IMAGE_SIZE, PATCH, LAYERS, HEADS, WIDTH = 32, 8, 2, 2, 64
CLIP_DIM, CLIP_TEXT_WIDTH, CLIP_VOCABULARY = 32, 48, 49408
LENGTH = {"clip": 77, "siglip": 64}
ROOM = {"clip": 75, "siglip": 63}
"""Number of tokens without start and end. SigLIP has no start."""

PIXELS: dict[str, dict[str, Any]] = {
    "clip": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
}


def write_tiny(
    folder: Path, kind: Kind, fmt: Format, *, seed: int = 0, tanh: bool | None = None
) -> nn.Module:
    """Save a small model with its tokenizer and preprocessing.

    Args:
        folder: A new folder. For open_clip's SigLIP, the image tower's widths are in ``trunk``
            below the folder, and the configuration names ``trunk`` by its absolute path.
        kind: The architecture.
        fmt: "open_clip" for a folder as from ``push_to_hf_hub``, "hf" for a folder as from
            ``save_pretrained``.
        seed: Seed for the weights.
        tanh: Whether SigLIP's GELU is the tanh approximation. By default it is as in the libraries
            for published weights: the approximation in transformers, and not in open_clip.

    Returns:
        The model, from the library that ``fmt`` names.
    """
    folder.mkdir(parents=True)
    if fmt == "hf":
        return _write_hf(folder, kind, seed, tanh=tanh is not False)
    model = save_open_clip(
        folder, config(kind, folder / "trunk", tanh=bool(tanh)), PIXELS[kind], weights(kind, seed)
    )
    if kind == "siglip":
        t5_tokenizer().save_pretrained(folder)
    return model


@cache
def weights(kind: Kind, seed: int) -> dict[str, Tensor]:
    """Return random weights, under open_clip's names."""
    with tempfile.TemporaryDirectory() as folder:
        model = build(config(kind, Path(folder), tanh=True))
    return draw_weights(model, open_clip.SimpleTokenizer() if kind == "clip" else siglip_ids, seed)


def config(kind: Kind, trunk: Path, *, tanh: bool = False) -> dict[str, Any]:
    """Return open_clip's configuration for a model.

    SigLIP's image tower finds its widths in the folder ``trunk``.
    """
    text = {"context_length": LENGTH[kind], "heads": HEADS, "layers": LAYERS}
    if kind == "clip":
        vision = {
            "width": WIDTH,
            "head_width": WIDTH // HEADS,
            "layers": LAYERS,
            "patch_size": PATCH,
        }
        return {
            "embed_dim": CLIP_DIM,
            "quick_gelu": True,
            "vision_cfg": {**vision, "image_size": IMAGE_SIZE},
            "text_cfg": {**text, "vocab_size": CLIP_VOCABULARY, "width": CLIP_TEXT_WIDTH},
        }
    trunk.mkdir(exist_ok=True)
    widths = {
        "embed_dim": WIDTH,
        "depth": LAYERS,
        "num_heads": HEADS,
        "img_size": IMAGE_SIZE,
        "patch_size": PATCH,
    }
    arguments = {**widths, **({"act_layer": "gelu_tanh"} if tanh else {})}
    timm = {
        "architecture": "vit_base_patch16_siglip_224",
        "pretrained_cfg": {},
        "model_args": arguments,
    }
    (trunk / "config.json").write_text(json.dumps(timm))
    return {
        "embed_dim": WIDTH,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "timm_model_name": f"local-dir:{trunk.resolve()}",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **text,
            "vocab_size": vocabulary_size(),
            "width": WIDTH,
            "hf_tokenizer_name": "beside the weights",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            **({"act_kwargs": {"approximate": "tanh"}} if tanh else {}),
        },
    }


def build(model_config: dict[str, Any]) -> nn.Module:
    """Return open_clip's model for a configuration."""
    kind = open_clip.CustomTextCLIP if model_config.get("custom_text") else open_clip.CLIP
    with suppress_messages():
        return kind(
            **{key: value for key, value in model_config.items() if key != "custom_text"}
        ).eval()


def save_open_clip(
    folder: Path, model_config: dict[str, Any], pixels: dict[str, Any], state: dict[str, Tensor]
) -> nn.Module:
    """Write a model's folder as open_clip's ``push_to_hf_hub`` does, without the tokenizer."""
    model = build(model_config)
    model.load_state_dict(state)
    (folder / CONFIG_FILE).write_text(
        json.dumps({"model_cfg": model_config, "preprocess_cfg": pixels})
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def hf_config(kind: Kind, *, tanh: bool = True) -> Any:
    """Return transformers' configuration for the same model."""
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    text = {**sizes, "max_position_embeddings": LENGTH[kind]}
    vision = {**sizes, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": PATCH}
    if kind == "clip":
        text |= {"hidden_size": CLIP_TEXT_WIDTH, "intermediate_size": 4 * CLIP_TEXT_WIDTH}
        text |= {
            "vocab_size": CLIP_VOCABULARY,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        }  # as on the hub
        return transformers.CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=CLIP_DIM
        )
    act = {"hidden_act": "gelu_pytorch_tanh" if tanh else "gelu"}
    text |= {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "vocab_size": vocabulary_size(),
        **act,
    }
    return transformers.SiglipConfig(text_config=text, vision_config={**vision, **act})


def _write_hf(folder: Path, kind: Kind, seed: int, *, tanh: bool) -> Any:
    mean, std = PIXELS[kind]["mean"], PIXELS[kind]["std"]
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    with suppress_messages():
        if kind == "clip":
            model = transformers.CLIPModel(hf_config(kind))
            pixels = transformers.CLIPImageProcessor(
                size={"shortest_edge": IMAGE_SIZE}, crop_size=square, image_mean=mean, image_std=std
            )
            processor = transformers.CLIPProcessor(pixels, clip_tokenizer())
        else:
            model = transformers.SiglipModel(hf_config(kind, tanh=tanh))
            pixels = transformers.SiglipImageProcessor(size=square, image_mean=mean, image_std=std)
            processor = transformers.SiglipProcessor(pixels, siglip_tokenizer())
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(to_transformers(weights(kind, seed), shapes))
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
    return model
