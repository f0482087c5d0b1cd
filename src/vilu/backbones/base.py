"""Backbones: an image encoder and a text encoder with a joint embedding space."""

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
    """A frozen dual encoder with the model's preprocessing and tokenizer.

    Attributes:
        space: Identity of the joint embedding space, with the model's logit scale and bias.
        feature_dim: Width F of the image features: the image tower's output before the projection
            into the joint space. If the projection cannot be separated from the tower, the features
            are the embeddings before normalisation.
        projections: The image tower's last map (D, F) and the text tower's last map (D, F_t), on
            the CPU. None unless both maps are linear without bias.
    """

    space: EmbeddingSpace
    feature_dim: int
    projections: tuple[Tensor, Tensor] | None

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return pixels (3, H, W) float32 on the CPU. All images get equal H and W. Thread-safe."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return unit-norm embeddings (B, D) float32 on the CPU.

        The pixels (B, 3, H, W) may be on any device.
        """

    def encode_images_and_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings as ``encode_images`` does, and features (B, F), in one pass.

        The features are float32 on the CPU, too.
        """

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit-norm embeddings (M, D) float32 on the CPU."""

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether the tokenizer cuts off the end.

        The cut-off end is not embedded.
        """

    def encode_text_features(self, texts: Sequence[str]) -> Tensor:
        """Return the text tower's output (M, F_t) float32 before the map in ``projections``."""


TEXT_BATCH_SIZE = 64  # maximum number of texts to encode at a time


def encode_in_batches(encode: Callable[[list[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """Encode M >= 1 texts to rows (M, D), ``TEXT_BATCH_SIZE`` texts at a time."""
    # indices sorted by text length, because texts of similar length need less padding
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
    row_of_text = text_of_row.argsort()  # text -> row in ``sorted_rows``: inverse of ``order``
    return sorted_rows[row_of_text.to(sorted_rows.device)]


def _progress(n_texts: int) -> AbstractContextManager[Task]:
    """Return a progress display for ``n_texts`` texts, or a silent one for a single batch."""
    if n_texts > TEXT_BATCH_SIZE:
        return track("encode texts", n_texts, "texts")
    task = SilentProgress()
    return nullcontext(task)


MIN_JPEG_FACTOR: Final = 2
"""A reduced JPEG's minimum side, as a multiple of the side that a model needs.

With this factor, resizing still averages over several pixels. So the resized pixels change by only
about half a grey level.
"""


def jpeg_side_of(backbone: Backbone) -> int | None:
    """Return the least length to which decoding may reduce a JPEG's shorter side.

    If None is returned, JPEGs are decoded in full for this model.
    """
    side: int | None = getattr(backbone, "jpeg_side", None)
    return side


class DualEncoder:
    """A frozen dual encoder (the ``Backbone`` protocol), assembled from a model's parts.

    Args:
        space: Identity of the joint space. If ``space.precision`` is "bf16", images are encoded in
            bfloat16: by ``bf16_tower`` if given, else by ``image_tower`` under autocast.
        device: The towers' device.
        transform: Thread-safe function from an image to pixels (3, H, W).
        image_tower: Function from pixels (B, 3, H, W) to features (B, F).
        text_tower: Function from M texts to features (M, F_t), always in float32.
        truncates: Function from M texts to M booleans: whether the tokenizer truncates each text.
        image_head: Function from image features in float32 to embeddings (B, D) with any norm.
            None: the head is ``image_projection``.
        image_projection: Matrix (D, F) from image features to embeddings with any norm. None: the
            image tower already returns embeddings, unless there is an ``image_head``.
        text_projection: Matrix (D, F_t) from text features to embeddings with any norm. None: the
            text tower already returns embeddings.
        feature_dim: Width F, needed only if there is an ``image_head``.
        text_cache_key: Text that identifies the model, with everything that text embeddings depend
            on. It is a part of the key in the user's cache. None: text embeddings are not cached.
        bf16_tower: Function from bfloat16 pixels (B, 3, H, W) to features (B, F): the image tower
            with weights in bfloat16. With such weights, autocast need not convert weights.
        resize_to: Upper limit, in pixels, for the length to which ``transform`` resizes an image's
            shorter side. None: not known, so JPEGs are never decoded at a reduced size.

    Attributes:
        jpeg_side: Least length to which decoding may reduce a JPEG's shorter side. None: JPEGs are
            decoded in full.
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
        """Let JPEGs be decoded at a reduced size, if the size that the model needs is known."""
        if self._resize_to is None:
            return
        self.jpeg_side = MIN_JPEG_FACTOR * self._resize_to
        self.space = self.space.with_reduced_jpegs

    def in_float32(self) -> DualEncoder:
        """Return a model that computes in float32, with the same weights in memory."""
        model = copy(self)
        model.space = replace(self.space, precision="fp32")
        return model

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return pixels (3, H, W) float32 on the CPU."""
        # torchvision uses torch's default type, and a caller may have changed this type
        pixels = self._transform(image)
        return pixels.float()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return unit-norm embeddings (B, D) float32 on the CPU, from pixels (B, 3, H, W)."""
        rows, _ = self._run_image_tower(pixels)
        return _normalise(rows)

    def encode_images_and_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings as ``encode_images`` does, and features (B, F) float32 on the CPU."""
        rows, features = self._run_image_tower(pixels)
        embeddings = _normalise(rows)
        # tensors from inference mode cannot be trained on, but a copy made outside this mode can
        trainable_features = features.clone()
        return embeddings, trainable_features.cpu()

    def _run_image_tower(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, D) with any norm and features (B, F), both in float32."""
        # an export needs the graph, and inference mode would not record a graph
        grad_mode = nullcontext() if torch.compiler.is_exporting() else torch.inference_mode()
        with grad_mode:
            features = self._features(pixels.to(self.device))
            with torch.autocast(self.device.type, enabled=False):
                return self._image_head(features), features

    def _features(self, pixels: Tensor) -> Tensor:
        """Run the image tower in the space's precision. Return features (B, F) in float32."""
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
        # the same float32 products, computed by the library that is faster on this processor
        with torch.autocast(device_type, enabled=False), fast_products(self.device):
            features = self._image_tower(pixels)
            return features.float()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit-norm embeddings (M, D) float32 on the CPU."""
        if not texts:
            return torch.empty(0, self.space.embed_dim, dtype=torch.float32)

        def encode(batch: list[str]) -> Tensor:
            features = self._text_tower(batch)
            return self._text_head(features)

        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            rows = encode_in_batches(encode, texts)
        return _normalise(rows)

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings as ``encode_texts`` does, from the user's cache if stored there."""
        if self._text_cache_key is None:
            return self.encode_texts(texts)
        key = digest([self._text_cache_key, self.device.type, list(texts)])

        def encode() -> Tensor:
            return self.encode_texts(texts)

        return load_or_compute_rows(f"texts-{key}", encode)

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        """Return for each text whether the tokenizer truncates the text."""
        return self._truncates(list(texts)) if texts else []

    def encode_text_features(self, texts: Sequence[str]) -> Tensor:
        """Return features (M, F_t) float32 on the CPU for M >= 1 texts."""
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            rows = encode_in_batches(self._text_tower, texts)
        float32_rows = rows.float()
        # tensors from inference mode cannot be trained on, but a copy made outside this mode can
        trainable_rows = float32_rows.clone()
        return trainable_rows.cpu()


MAX_CACHED_ENTRIES = 2**22
"""Maximum number of float32 entries (16 MiB) in a cached tensor."""


def load_or_compute_rows(name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return rows on the CPU from the user's cache. If the rows are missing, ``compute`` them.

    Computed rows are written to the cache, unless the rows have more than ``MAX_CACHED_ENTRIES``
    entries.
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
    """Return the rows in a cache file, or None if the file is absent, unreadable or damaged."""
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
    """Return a function that maps rows (B, F) to rows (B, D) by the matrix ``projection`` (D, F).

    Without a matrix, the function returns rows unchanged.
    """
    if projection is None:
        return lambda rows: rows
    return lambda rows: rows @ projection.T


def _normalise(rows: Tensor) -> Tensor:
    """Normalise rows to unit norm, and copy the result to the CPU.

    The function must run outside inference mode. Predictors cannot be trained on tensors made in
    inference mode.
    """
    float32_rows = rows.float()
    unit_rows = functional.normalize(float32_rows, dim=-1)
    return unit_rows.cpu()


def with_bf16_members(network: nn.Module, names: Sequence[str]) -> Any:  # noqa: ANN401 - any class
    """Copy a network. In the copy, the members ``names`` have weights in bfloat16.

    The copy has the network's class. All members not in ``names`` are shared. A name that the
    network lacks is ignored.
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


PROBE_IMAGE = Image.new("RGB", (64, 64))  # image for trying a tower
PROJECTION_TOLERANCE = 1e-4
"""Largest accepted rounding error in an embedding, relative to the largest entry."""


def detach_projection(
    network: nn.Module, candidates: Sequence[str], run_probe: Callable[[], Tensor]
) -> Tensor | None:
    """Remove the last linear map from a tower, so that the tower returns the map's input.

    A member such as ``proj`` need not be applied last. Therefore a map is removed only if the map
    is linear without bias, and maps a probe's features to the probe's embedding.

    Args:
        network: The model with the tower. The model is changed in place.
        candidates: Dotted names of members that may be the last map. A member is a matrix (F, D),
            applied from the right, or an ``nn.Linear``.
        run_probe: Function that runs the tower on a probe. The function returns (1, D) before the
            map is removed, and (1, F) afterwards.

    Returns:
        The map (D, F). None if no member is the last map. Then the network is not changed.
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
        # a module can only be replaced by a module. For a parameter, open_clip accepts None.
        substitute = nn.Identity() if isinstance(member, nn.Linear) else None
        setattr(parent, name, substitute)
        features = run_probe()
        if _is_mapped(features, weight, embedding):
            return weight
        setattr(parent, name, member)  # put back, because this was not the last map
    return None


def _linear_weight(member: object) -> Tensor | None:
    """Return the matrix (D, F) if a member is a linear map without bias, otherwise None."""
    if isinstance(member, nn.Linear):
        parameters = [name for name, _ in member.named_parameters()]
        return member.weight.detach() if parameters == ["weight"] else None
    if isinstance(member, nn.Parameter) and member.ndim == 2:
        return member.detach().T
    return None


def _is_mapped(features: Tensor, weight: Tensor, embedding: Tensor) -> bool:
    """Return whether ``weight`` (D, F) maps the probe's features (1, F) to ``embedding`` (1, D)."""
    if weight.shape != (embedding.shape[-1], features.shape[-1]):
        return False
    largest_error = (features @ weight.T - embedding).abs().max()
    largest_entry = embedding.abs().max()
    return bool(largest_error < PROJECTION_TOLERANCE * largest_entry)
