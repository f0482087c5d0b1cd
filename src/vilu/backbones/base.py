"""Backbones: an image encoder and a text encoder of the same embedding space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from vilu.artifacts.disk import cache_folder, make_folder, write_bytes
from vilu.artifacts.hashing import digest, tensor_hash
from vilu.backbones.products import fast_products
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import StorageError
from vilu.progress import SilentProgress, Task, track

logger = logging.getLogger(__name__)


@runtime_checkable
class Backbone(Protocol):
    """A frozen dual encoder with the preprocessing and the tokenizer of its model.

    Attributes:
        space: Identity of the joint embedding space, with the logit scale and bias of the model.
        feature_dim: Width F of the image features: the output of the image tower before the
            projection into the joint space. If the projection cannot be separated from the tower,
            the features are the embeddings before normalisation.
        projections: Last maps (D, F) of the image tower and (D, F_t) of the text tower, on the CPU.
            None unless both maps are linear without bias.
    """

    space: EmbeddingSpace
    feature_dim: int
    projections: tuple[Tensor, Tensor] | None

    def preprocess(self, image: Image.Image) -> Tensor:
        """Pixels (3, H, W) float32 on the CPU; H and W are equal for all images. Thread-safe."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit-norm embeddings (B, D) float32 on the CPU.

        The pixels (B, 3, H, W) may be on any device.
        """

    def encode_images_and_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of ``encode_images``, and features (B, F) float32 on the CPU, in one pass."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings (M, D) float32 on the CPU."""

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        """For each text, whether the tokenizer cuts off the end. The end is then not embedded."""

    def encode_text_features(self, texts: Sequence[str]) -> Tensor:
        """Output (M, F_t) float32 of the text tower before the projection in ``projections``."""


TEXT_BATCH_SIZE = 64  # maximum number of texts to encode at a time


def encode_in_batches(encode: Callable[[list[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """Encode M >= 1 texts to rows (M, D), ``TEXT_BATCH_SIZE`` texts at a time."""
    # indices sorted by length of the text, because texts of similar length need less padding
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    starts = range(0, len(order), TEXT_BATCH_SIZE)
    batches = [order[start : start + TEXT_BATCH_SIZE] for start in starts]
    rows: list[Tensor] = []
    with _progress(len(texts)) as task:
        for batch in batches:
            batch_rows = encode([texts[i] for i in batch])
            rows.append(batch_rows)
            task.advance(len(batch))
    sorted_rows = torch.cat(rows)
    text_of_row = torch.tensor(order)
    row_of_text = text_of_row.argsort()  # text -> row in ``sorted_rows``: inverse of order
    return sorted_rows[row_of_text.to(sorted_rows.device)]


def _progress(n_texts: int) -> AbstractContextManager[Task]:
    """The progress display for ``n_texts`` texts; silent if all texts fit into a single batch."""
    if n_texts > TEXT_BATCH_SIZE:
        return track("encode texts", n_texts, "texts")
    silence = SilentProgress()
    return nullcontext(silence)


MIN_JPEG_FACTOR: Final = 2
"""Minimum side of a reduced JPEG, as a multiple of the side needed by a model.

With this factor, resizing still averages over several pixels. So the resized pixels change by only
about half a grey level.
"""


def jpeg_side_of(backbone: Backbone) -> int | None:
    """Least length of the shorter side to which JPEGs may be reduced in decoding.

    None: JPEGs are decoded in full for this model.
    """
    side: int | None = getattr(backbone, "jpeg_side", None)
    return side


class DualEncoder:
    """A frozen dual encoder (the ``Backbone`` protocol), assembled from parts of a model.

    Args:
        space: Identity of the joint space. If ``space.precision`` is "bf16", images are encoded in
            bfloat16: by ``bf16_tower`` if given, else by ``image_tower`` under autocast.
        device: Device of the towers.
        transform: Function from an image to pixels (3, H, W); thread-safe.
        image_tower: Function from pixels (B, 3, H, W) to features (B, F).
        text_tower: Function from M texts to features (M, F_t); always in float32.
        truncates: Function from M texts to M booleans: whether the tokenizer truncates each text.
        image_head: Function from image features in float32 to embeddings (B, D) of any norm. None:
            the head is ``image_projection``.
        image_projection: Matrix (D, F) from image features to embeddings of any norm. None: the
            image tower already returns embeddings, unless there is an ``image_head``.
        text_projection: Matrix (D, F_t) from text features to embeddings of any norm. None: the
            text tower already returns embeddings.
        feature_dim: Width F; needed only if there is an ``image_head``.
        text_cache_key: Text that identifies everything that determines the embeddings of texts. The
            key of texts in the user's cache includes this text. None: texts are not cached.
        bf16_tower: Function from bfloat16 pixels (B, 3, H, W) to features (B, F): the image tower
            with weights in bfloat16. Then autocast need not convert the weights.
        resize_to: Length in pixels to which ``transform`` resizes the shorter side of an image, or
            a larger number. None: not known, so JPEGs are never decoded at a reduced size.

    Attributes:
        jpeg_side: Least length of the shorter side to which JPEGs may be reduced in decoding. None:
            JPEGs are decoded in full.
    """

    def __init__(  # noqa: PLR0913 - one argument per part
        self,
        space: EmbeddingSpace,
        device: torch.device,
        *,
        transform: Callable[[Image.Image], Tensor],
        image_tower: Callable[[Tensor], Tensor],
        text_tower: Callable[[list[str]], Tensor],
        truncates: Callable[[list[str]], list[bool]],
        image_head: Callable[[Tensor], Tensor] | None = None,
        image_projection: Tensor | None = None,
        text_projection: Tensor | None = None,
        feature_dim: int | None = None,
        text_cache_key: str | None = None,
        bf16_tower: Callable[[Tensor], Tensor] | None = None,
        resize_to: int | None = None,
    ) -> None:
        self.space = space
        self.jpeg_side: int | None = None
        self._resize_to = resize_to
        self._text_cache_key = text_cache_key
        self.device = device
        self.projections: tuple[Tensor, Tensor] | None = None
        if image_projection is not None and text_projection is not None:
            self.projections = (image_projection.float().cpu(), text_projection.float().cpu())
        width = space.embed_dim if image_projection is None else image_projection.shape[1]
        self.feature_dim = feature_dim or width
        self._transform = transform
        self._image_tower = image_tower
        self._bf16_tower = bf16_tower
        self._image_head = image_head or _linear_map(image_projection)
        self._text_tower = text_tower
        self._text_head = _linear_map(text_projection)
        self._truncates = truncates

    def reduce_jpegs(self) -> None:
        """Let JPEGs be decoded at a reduced size, if the size needed by the model is known."""
        if self._resize_to is None:
            return
        self.jpeg_side = MIN_JPEG_FACTOR * self._resize_to
        self.space = self.space.with_reduced_jpegs

    def in_float32(self) -> DualEncoder:
        """Return the same model in float32; weights are shared."""
        model = copy(self)
        model.space = replace(self.space, precision="fp32")
        return model

    def preprocess(self, image: Image.Image) -> Tensor:
        """Pixels (3, H, W) float32 on the CPU."""
        # torchvision uses torch's default type, and a caller may have changed this type
        pixels = self._transform(image)
        return pixels.float()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit-norm embeddings (B, D) float32 on the CPU; the pixels are (B, 3, H, W)."""
        rows, _ = self._run_image_tower(pixels)
        return _normalise(rows)

    def encode_images_and_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of ``encode_images``, and features (B, F) float32 on the CPU."""
        rows, features = self._run_image_tower(pixels)
        embeddings = _normalise(rows)
        # tensors of inference mode cannot be trained on, but a copy from outside this mode can
        trainable_features = features.clone()
        return embeddings, trainable_features.cpu()

    def _run_image_tower(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) of any norm and features (B, F), both in float32."""
        # an export needs the graph, and inference mode would not record a graph
        grad_mode = nullcontext() if torch.compiler.is_exporting() else torch.inference_mode()
        with grad_mode:
            features = self._features(pixels.to(self.device))
            with torch.autocast(self.device.type, enabled=False):
                return self._image_head(features), features

    def _features(self, pixels: Tensor) -> Tensor:
        """Run the image tower in the precision of the space; features (B, F) in float32."""
        device_type = self.device.type
        is_bf16 = self.space.precision == "bf16"
        if is_bf16 and self._bf16_tower is not None:
            with torch.autocast(device_type, enabled=False):
                bf16_pixels = pixels.bfloat16()
                features = self._bf16_tower(bf16_pixels)
                return features.float()
        if is_bf16:
            with torch.autocast(device_type, torch.bfloat16):
                features = self._image_tower(pixels)
                return features.float()
        # the same float32 products, from the faster library on this processor
        with torch.autocast(device_type, enabled=False), fast_products(self.device):
            features = self._image_tower(pixels)
            return features.float()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings (M, D) float32 on the CPU."""
        if not texts:
            return torch.empty(0, self.space.embed_dim, dtype=torch.float32)

        def encode(batch: list[str]) -> Tensor:
            features = self._text_tower(batch)
            return self._text_head(features)

        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            rows = encode_in_batches(encode, texts)
        return _normalise(rows)

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of ``encode_texts``, from the user's cache if stored there."""
        if self._text_cache_key is None:
            return self.encode_texts(texts)
        key = digest([self._text_cache_key, self.device.type, list(texts)])

        def encode() -> Tensor:
            return self.encode_texts(texts)

        return load_or_compute_rows(f"texts-{key}", encode)

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        """Whether the tokenizer truncates each text."""
        return self._truncates(list(texts)) if texts else []

    def encode_text_features(self, texts: Sequence[str]) -> Tensor:
        """Features (M, F_t) float32 on the CPU; ``texts`` are M >= 1 texts."""
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            rows = encode_in_batches(self._text_tower, texts)
        float32_rows = rows.float()
        trainable_rows = float32_rows.clone()
        return trainable_rows.cpu()


MAX_CACHED_ENTRIES = 2**22
"""Maximum number of float32 entries (16 MiB) of a tensor in the user's cache."""


def load_or_compute_rows(name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return rows on the CPU from the user's cache; missing rows are computed by ``compute``.

    Computed rows are written to the cache, unless they have more than ``MAX_CACHED_ENTRIES``.
    """
    path = cache_folder() / f"{name}.safetensors"
    rows_in_cache = _read_cached(path)
    if rows_in_cache is not None:
        return rows_in_cache
    rows = compute()
    rows = rows.cpu().contiguous()
    if rows.numel() <= MAX_CACHED_ENTRIES:
        try:
            make_folder(path.parent)
            metadata = {"sha256": tensor_hash(rows)}
            content = save({"rows": rows}, metadata)
            write_bytes(path, content)
        except StorageError as error:
            # not raised, because the next process can compute the rows again
            logger.debug("%s is not stored: %s", path, error)
    return rows


def _read_cached(path: Path) -> Tensor | None:
    """The rows in a file of the cache; None if the file is absent, unreadable or damaged."""
    try:
        with safe_open(path, "pt") as handle:
            rows: Tensor = handle.get_tensor("rows")
            metadata = handle.metadata() or {}
    except (OSError, SafetensorError):
        logger.debug("%s is not there yet, or is unreadable", path)
        return None
    if metadata.get("sha256") == tensor_hash(rows):
        return rows
    logger.warning("%s is damaged, and is computed again", path)
    return None


def _linear_map(projection: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that maps rows (B, F) to rows (B, D) by the matrix ``projection`` (D, F).

    Without a matrix, the function returns rows unchanged.
    """
    if projection is None:
        return lambda rows: rows
    return lambda rows: rows @ projection.T


def _normalise(rows: Tensor) -> Tensor:
    """Normalise rows to unit norm, and copy them to the CPU.

    The function must run outside inference mode. Predictors cannot be trained on tensors made in
    inference mode.
    """
    float32_rows = rows.float()
    unit_rows = functional.normalize(float32_rows, dim=-1)
    return unit_rows.cpu()


def with_bf16_members(network: nn.Module, names: Sequence[str]) -> Any:  # noqa: ANN401 - any class
    """Copy a network. In the copy, the members ``names`` have weights in bfloat16.

    The copy has the class of the network. All other members are shared. A name that the network
    lacks is ignored.
    """
    # ``deepcopy`` does not copy the objects in the memo, so both networks share these objects
    shared_memo: dict[int, Any] = {}
    for name, member in network.named_children():
        if name not in names:
            shared_memo[id(member)] = member
    twin = deepcopy(network, shared_memo)
    for name, member in twin.named_children():
        if name in names:
            member.bfloat16()
    return twin


PROJECTION_TOLERANCE = 1e-4
"""Largest accepted rounding error of an embedding, relative to the largest entry."""


def detach_projection(
    network: nn.Module, candidates: Sequence[str], run_probe: Callable[[], Tensor]
) -> Tensor | None:
    """Remove the last linear map from a tower, so that the tower returns the features before it.

    A member such as ``proj`` need not be applied last. Therefore a map is removed only if it is
    linear without bias, and maps the features of a probe to the embedding of the probe.

    Args:
        network: The model with the tower. The model is changed in place.
        candidates: Dotted names of members that may be the last map. A member is a matrix (F, D),
            applied from the right, or an ``nn.Linear``.
        run_probe: Function that runs the tower on a probe. It returns (1, D) before the removal of
            the map, and (1, F) afterwards.

    Returns:
        The map (D, F). None if no member is the last map; then the network is not changed.
    """
    modules = dict(network.named_modules())
    for dotted_name in candidates:
        parent_name, _, name = dotted_name.rpartition(".")
        parent = modules.get(parent_name)
        member = getattr(parent, name, None)
        weight = _linear_weight(member)
        if parent is None or weight is None:
            continue
        embedding = run_probe()
        # a module can only be replaced by a module; for a parameter, open_clip accepts None
        substitute = nn.Identity() if isinstance(member, nn.Linear) else None
        setattr(parent, name, substitute)
        features = run_probe()
        if _is_mapped(features, weight, embedding):
            return weight
        setattr(parent, name, member)  # put back, because this was not the last map
    return None


def _linear_weight(member: object) -> Tensor | None:
    """Matrix (D, F) of a linear map without bias; None for any other member."""
    if isinstance(member, nn.Linear):
        parameters = [name for name, _ in member.named_parameters()]
        return member.weight.detach() if parameters == ["weight"] else None
    if isinstance(member, nn.Parameter) and member.ndim == 2:
        return member.detach().T
    return None


def _is_mapped(features: Tensor, weight: Tensor, embedding: Tensor) -> bool:
    """Whether ``weight`` (D, F) maps the features (1, F) of the probe to ``embedding`` (1, D)."""
    if weight.shape != (embedding.shape[-1], features.shape[-1]):
        return False
    errors = (features @ weight.T - embedding).abs()
    entries = embedding.abs()
    return bool(errors.max() < PROJECTION_TOLERANCE * entries.max())
