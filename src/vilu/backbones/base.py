"""What a backbone is: two encoders of one embedding space, and the projections behind them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from vilu.artifacts.disk import cache_folder, make_folder, write_bytes
from vilu.artifacts.hashing import digest, tensor_hash
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import StorageError
from vilu.progress import Silence, Task, track

logger = logging.getLogger(__name__)


@runtime_checkable
class Backbone(Protocol):
    """A frozen dual encoder; preprocessing and tokenizer come from the model, never from a default.

    Attributes:
        space: Identity of the joint embedding space, with the model's own logit scale and bias.
        feature_dim: Width F of the image features: the image tower's output before its projection
            into the joint space, or where it has none that can be told apart, its output before
            normalisation.
        projections: Last maps (D, F) of the image tower and (D, F_t) of the text tower where both
            are linear without bias, on the CPU; None where they are not.
    """

    space: EmbeddingSpace
    feature_dim: int
    projections: tuple[Tensor, Tensor] | None

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32 pixels on the CPU, of one size for all images. Thread-safe."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 unit-norm embeddings on the CPU of (B, 3, H, W) pixels on any device."""

    def encode_images_and_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the features (B, F) float32 behind them on the CPU, from one pass."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(M, D) float32 unit-norm embeddings on the CPU."""

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        """Of each text, whether the tokenizer cuts it off, so that the embedding lacks its end."""

    def encode_text_features(self, texts: Sequence[str]) -> Tensor:
        """(M, F_t) float32 output of the text tower before its projection in ``projections``."""


TEXT_BATCH = 64


def encode_in_batches(encode: Callable[[list[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """(M, D) rows of at least one text, ``TEXT_BATCH`` at a time."""
    # texts of like length together need less padding
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[start : start + TEXT_BATCH] for start in range(0, len(order), TEXT_BATCH)]
    rows: list[Tensor] = []
    with _progress(len(texts)) as task:
        for batch in batches:
            rows.append(encode([texts[i] for i in batch]))
            task.advance(len(batch))
    encoded = torch.cat(rows)
    place = torch.tensor(order).argsort()  # of each text among the encoded ones
    return encoded[place.to(encoded.device)]


def _progress(n_texts: int) -> AbstractContextManager[Task]:
    """Progress of more than one batch of texts; one batch is done at once."""
    if n_texts > TEXT_BATCH:
        return track("encode texts", n_texts, "texts")
    return nullcontext(Silence())


class DualEncoder:
    """A frozen dual encoder (the ``Backbone`` protocol), put together from what a loader found.

    Args:
        space: Identity of the joint space; its ``precision`` "bf16" runs the image tower under
            autocast.
        device: Where the towers are.
        transform: Image to (3, H, W) pixels; thread-safe.
        image_tower: (B, 3, H, W) pixels to (B, F) features.
        text_tower: M texts to (M, F_t) features, always in float32.
        truncates: M texts to M answers, whether the tower's tokenizer cuts the text off.
        image_head: Image features in float32 to (B, D) embeddings of any norm; None where the tower
            ends in them.
        image_projection: The same as a matrix (D, F), where it is one.
        text_projection: (D, F_t) from text features to embeddings of any norm; None where the tower
            ends in them.
        feature_dim: F; not needed where there is no ``image_head``.
        texts_known_as: What fixes the embeddings of texts, for the user's cache; None where nothing
            does.
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
        texts_known_as: str | None = None,
    ) -> None:
        self.space = space
        self._texts_known_as = texts_known_as
        self.device = device
        self.projections: tuple[Tensor, Tensor] | None = None
        if image_projection is not None and text_projection is not None:
            self.projections = (image_projection.float().cpu(), text_projection.float().cpu())
        width = space.embed_dim if image_projection is None else image_projection.shape[1]
        self.feature_dim = feature_dim or width
        self._transform = transform
        self._image_tower = image_tower
        self._image_head = image_head or _linear(image_projection)
        self._text_tower = text_tower
        self._text_head = _linear(text_projection)
        self._truncates = truncates

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32 pixels on the CPU."""
        return self._transform(image).float()  # torchvision follows the default type

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 unit-norm embeddings on the CPU of (B, 3, H, W) pixels."""
        return _unit(self._run_image_tower(pixels)[0])

    def encode_images_and_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the features (B, F) float32 behind them on the CPU."""
        rows, features = self._run_image_tower(pixels)
        return _unit(rows), features.clone().cpu()

    def _run_image_tower(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of any norm, and the features behind them, both in float32."""
        device = self.device.type
        is_bf16 = self.space.precision == "bf16"
        # in inference mode no graph is made, and an export is such a graph
        grad_mode = nullcontext() if torch.compiler.is_exporting() else torch.inference_mode()
        with grad_mode:
            with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
                features = self._image_tower(pixels.to(self.device)).float()
            with torch.autocast(device, enabled=False):
                return self._image_head(features), features

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(M, D) float32 unit-norm embeddings on the CPU."""
        if not texts:
            return torch.empty(0, self.space.embed_dim, dtype=torch.float32)

        def encode(batch: list[str]) -> Tensor:
            return self._text_head(self._text_tower(batch))

        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            rows = encode_in_batches(encode, texts)
        return _unit(rows)

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """As ``encode_texts``, of texts that come again: the user's cache keeps their rows."""
        if self._texts_known_as is None:
            return self.encode_texts(texts)
        identity = digest([self._texts_known_as, self.device.type, list(texts)])
        return cached_rows(f"texts-{identity}", lambda: self.encode_texts(texts))

    def truncates(self, texts: Sequence[str]) -> list[bool]:
        """Of each text, whether the tokenizer cuts it off."""
        return self._truncates(list(texts)) if texts else []

    def encode_text_features(self, texts: Sequence[str]) -> Tensor:
        """(M, F_t) float32 features on the CPU of at least one text."""
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            rows = encode_in_batches(self._text_tower, texts)
        return rows.float().clone().cpu()


MOST_KEPT = 2**22
"""Numbers of a tensor in the user's cache: 16 MiB."""


def cached_rows(name: str, make: Callable[[], Tensor]) -> Tensor:
    """Rows on the CPU that take seconds to make: from the user's cache, or made and put there."""
    path = cache_folder() / f"{name}.safetensors"
    cached = _read_cached(path)
    if cached is not None:
        return cached
    rows = make().cpu().contiguous()
    if rows.numel() <= MOST_KEPT:
        try:
            make_folder(path.parent)
            write_bytes(path, save({"rows": rows}, {"sha256": tensor_hash(rows)}))
        except StorageError as error:
            logger.debug("%s is not kept: %s", path, error)  # the next process makes it again
    return rows


def _read_cached(path: Path) -> Tensor | None:
    """The rows in a file of the cache; None where it is absent, unreadable or damaged."""
    try:
        with safe_open(path, "pt") as handle:
            rows: Tensor = handle.get_tensor("rows")
            metadata = handle.metadata() or {}
    except (OSError, SafetensorError):
        logger.debug("%s is not there yet, or is unreadable", path)
        return None
    if metadata.get("sha256") == tensor_hash(rows):
        return rows
    logger.warning("%s is damaged, and is made anew", path)
    return None


def _linear(projection: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The map of a matrix (D, F); without one, the identity."""
    if projection is None:
        return lambda rows: rows
    return lambda rows: rows @ projection.T


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit norm; made outside inference mode, so that a predictor can train on them."""
    return functional.normalize(rows.float(), dim=-1).cpu()


# largest difference, of the largest entry, by which two orders of the same float32 sums may differ
ROUNDING = 1e-4


def detach_projection(
    network: nn.Module, paths: Sequence[str], run: Callable[[], Tensor]
) -> Tensor | None:
    """Take the last map out of a tower, which from then on gives what went into it.

    A map counts only if it is linear without bias and what the tower gives on a probe is its image:
    nothing in a library says that a member called ``proj`` is applied last.

    ``paths`` say where it may be, as dotted names: a matrix (F, D) applied from the right, or an
    ``nn.Linear``; ``run`` is the tower on a probe, (1, D). Returned is the map (D, F); None where
    there is none, and the network is as it was.
    """
    modules = dict(network.named_modules())
    for path in paths:
        parent, _, name = path.rpartition(".")
        owner = modules.get(parent)
        member = getattr(owner, name, None)
        weight = _matrix(member)
        if owner is None or weight is None:
            continue
        expected = run()
        # a module must stay a module; open_clip leaves a parameter out where it is None
        setattr(owner, name, nn.Identity() if isinstance(member, nn.Linear) else None)
        if _maps(weight, run(), expected):
            return weight
        setattr(owner, name, member)
    return None


def _matrix(member: object) -> Tensor | None:
    """(D, F) of a member that may be a linear map without bias."""
    if isinstance(member, nn.Linear):
        parameters = [name for name, _ in member.named_parameters()]
        return member.weight.detach() if parameters == ["weight"] else None
    if isinstance(member, nn.Parameter) and member.ndim == 2:
        return member.detach().T
    return None


def _maps(weight: Tensor, features: Tensor, expected: Tensor) -> bool:
    """Whether the probe's embedding is the image of its features."""
    if features.shape[-1] != weight.shape[1] or expected.shape[-1] != weight.shape[0]:
        return False
    error = (features @ weight.T - expected).abs().max()
    return bool(error < ROUNDING * expected.abs().max())
