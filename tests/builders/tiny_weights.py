"""Draw random weights for small models, and translate names from open_clip to transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.builders.tiny_tokenizers import WORDS

LOGIT_SCALE, LOGIT_BIAS = 20.0, -7.5
"""Smaller than in trained models, because there the embeddings are closer together."""

VALUES = {"attn.in_proj_weight": 3, "attn.qkv.weight": 3, "attn_pool.kv.weight": 2}
"""Number of equal parts in each weight. The last part makes the attention's values."""

BLOCK = {
    "ln_1": "layer_norm1",
    "norm1": "layer_norm1",
    "ln_2": "layer_norm2",
    "norm2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.proj": "self_attn.out_proj",
}
"""Members of a transformer block: open_clip's names and timm's, with transformers' names."""

CLIP = {
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
SIGLIP = {
    "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual.trunk.norm": "vision_model.post_layernorm",
    "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
    "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
    "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
    "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
    "text.token_embedding": "text_model.embeddings.token_embedding",
    "text.ln_final": "text_model.final_layer_norm",
    "text.text_projection": "text_model.head",
}
WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.trunk.attn_pool.latent": "vision_model.head.probe",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
TRANSPOSED = {"visual.proj", "text_projection"}
TOWERS = {
    "visual.transformer.resblocks": "vision_model",
    "visual.trunk.blocks": "vision_model",
    "transformer.resblocks": "text_model",
    "text.transformer.resblocks": "text_model",
}


def to_transformers(state: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return open_clip's weights for CLIP or SigLIP, with the names and shapes in transformers."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for new, part in _translate(name, tensor):
            assert new not in renamed, new
            renamed[new] = part.reshape(shapes[new]).contiguous()
    pool = "visual.trunk.attn_pool"
    if f"{pool}.q.weight" in state:
        for end in ("weight", "bias"):
            joined = torch.cat([state[f"{pool}.q.{end}"], state[f"{pool}.kv.{end}"]])
            renamed[f"vision_model.head.attention.in_proj_{end}"] = joined
    assert renamed.keys() == shapes.keys(), renamed.keys() ^ shapes.keys()
    return renamed


def _translate(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in WHOLE:
        yield WHOLE[name], tensor.T if name in TRANSPOSED else tensor
        return
    member, _, end = name.rpartition(".")
    block = re.fullmatch(r"(.+)\.(\d+)\.([a-z].+?)[._](weight|bias)", name)
    if block and block[1] in TOWERS:
        yield from _translate_block(
            f"{TOWERS[block[1]]}.encoder.layers.{block[2]}", block[3], block[4], tensor
        )
    elif not name.startswith(("visual.trunk.attn_pool.q.", "visual.trunk.attn_pool.kv.")):
        yield f"{(CLIP | SIGLIP)[member]}.{end}", tensor


def _translate_block(
    layer: str, member: str, end: str, tensor: Tensor
) -> Iterator[tuple[str, Tensor]]:
    if member in {"attn.in_proj", "attn.qkv"}:
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{layer}.self_attn.{letter}_proj.{end}", part
    else:
        yield f"{layer}.{BLOCK.get(member, member)}.{end}", tensor


def pictures(n: int, *, seed: int = 0, width: int = 32, height: int = 32) -> list[Image.Image]:
    """Return images, each in one colour with smooth blotches in other colours."""
    rng = np.random.default_rng(seed)
    coarse = np.round(
        255 * (0.7 * rng.random((n, 1, 1, 3)) + 0.3 * rng.random((n, 4, 4, 3)))
    ).astype(np.uint8)
    return [
        Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC) for array in coarse
    ]


def draw_weights(
    model: nn.Module, tokenize: Callable[[list[str]], Tensor], seed: int
) -> dict[str, Tensor]:
    """Return random weights for an open_clip model, so that embeddings differ.

    Random towers give nearly the same vector for all images and texts. So attention has large
    values, and the mean over some images and texts is subtracted from each tower's last bias.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.stack(
        [torch.from_numpy(np.array(picture)) for picture in pictures(64, seed=seed)]
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _draw(name, weight, generator)
        model.logit_scale.fill_(math.log(LOGIT_SCALE))
        image = model.encode_image((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.27).mean(dim=0)
        text = model.encode_text(tokenize([f"a photo of a {word}." for word in WORDS])).mean(dim=0)
        if model.logit_bias is None:
            model.visual.ln_post.bias -= image @ torch.linalg.pinv(model.visual.proj)
            model.ln_final.bias -= text @ torch.linalg.pinv(model.text_projection)
        else:
            model.logit_bias.fill_(LOGIT_BIAS)
            model.visual.trunk.attn_pool.mlp.fc2.bias -= image
            model.text.text_projection.bias -= text
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _draw(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Fill a weight.

    Maps keep their input's variance. Every bias and gain differs from its default.
    """
    weight.normal_(generator=generator)
    if name.endswith(("pos_embed", "positional_embedding", "class_embedding")):
        weight.mul_(0.3)
    elif weight.ndim <= 1:
        weight.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)
    elif name.endswith(("token_embedding.weight", "latent")):
        return
    else:
        weight.div_(math.sqrt(weight.shape[0] if name in TRANSPOSED else weight[0].numel()))
        for member, parts in VALUES.items():
            if member in name:
                weight[-(len(weight) // parts) :] *= 4
