"""Image embeddings without labels, kept on their device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vilu.embeddings.checks import (
    NONFINITE,
    NORM_TOLERANCE,
    SAFE_NORMS,
    VALID,
    ZERO_NORM,
    IdentityKind,
    RowNumbers,
    as_matrix,
    require_usable_rows,
)
from vilu.embeddings.columns import ROW_COLUMNS
from vilu.embeddings.similarity import index_of_first_equal
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import UNKNOWN, DataError


class NewImages(EmbeddingSource):
    """Embeddings of new images on their device, with the same K candidates for all images.

    Image embeddings and logits do not leave the device. A row without a usable embedding is marked
    in ``status``. In batches, a candidate's embedding replaces an unusable embedding, so that no
    row has to be left out of a batch.

    Args:
        image: (N, D) embeddings. The rows are normalised to unit norm.
        text: (K, D) unit-norm candidates, all different.
        space: The embedding space.
        class_names: K names.
        columns: Columns for rows, for candidates and for the model (``vilu.embeddings.columns``).
        ids: N identifiers. By default the row numbers.
        dtype: Number format for rounding the rows, as in a store. None: no rounding.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        space: EmbeddingSpace,
        *,
        class_names: tuple[str, ...] | None = None,
        columns: Mapping[str, Tensor] | None = None,
        ids: Sequence[str] | None = None,
        dtype: str | None = None,
    ) -> None:
        self.device = image.device
        self.space = space
        self.class_names = class_names
        self.text = text.to(self.device)
        any_candidate = self.text[0]
        self.image, self._status = usable_rows(image, substitute=any_candidate)
        if dtype is not None:
            self.image = self.image.to(getattr(torch, dtype)).float()
        self._columns = {name: rows.to(self.device) for name, rows in (columns or {}).items()}
        self.columns = frozenset(self._columns)
        self.ids = RowNumbers(len(image)) if ids is None else ids
        self.target = torch.full((len(image),), UNKNOWN, device="cpu")

    @classmethod
    def from_arrays(
        cls, image: ArrayLike | Tensor, text: ArrayLike | Tensor, space: EmbeddingSpace
    ) -> NewImages:
        """Check images (N, D) and candidates (K, D), and return a source with both.

        Raises:
            DataError: If a shape is wrong, a candidate is not usable, or two candidates are equal.
        """
        candidates = require_usable_rows(text, "text")
        require_width("text", candidates, space)
        first_equal_index = index_of_first_equal(candidates)
        own_index = torch.arange(len(candidates))
        if not torch.equal(first_equal_index, own_index):
            raise DataError(
                "text must have different rows, because equal rows are one answer. Leave out the "
                "repeats, or merge them: vilu.Embeddings(image, text)."
            )
        image_rows = image_matrix(image, space)
        return cls(image_rows, candidates, space)

    @property
    def is_on_cpu(self) -> bool:
        """Whether the images are in CPU memory."""
        return self.image.device.type == "cpu"

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """Status codes (N,), as in ``EmbeddingSource``."""
        codes: NDArray[np.uint8] = self._status.numpy(force=True)
        return codes

    @property
    def is_usable(self) -> Tensor:
        """Mask (N,) of the rows with a usable embedding, on the images' device."""
        return self._status == VALID

    @property
    def identified_by(self) -> tuple[IdentityKind, ...]:
        """Kinds of row identity. Empty if the images are not on the CPU.

        To hash images on another device, the embeddings would have to be copied to the CPU.
        """
        return super().identified_by if self.is_on_cpu else ()

    def picture_identities(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return picture identities (M,), all -1 (unknown) if the images are not on the CPU."""
        if self.is_on_cpu:
            return super().picture_identities(rows)
        n_rows = len(self) if rows is None else len(rows)
        return np.full(n_rows, UNKNOWN, dtype=np.int64)

    def image_rows(self, index: Tensor) -> Tensor:
        """Return the embeddings (B, D) at ``index`` (B,). ``index`` must be on the CPU."""
        return self._select_rows(self.image, index)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return column ``name``, as in ``EmbeddingSource``."""
        if name in ROW_COLUMNS and name in self._columns:
            return self._select_rows(self._columns[name], index)
        return super().column(name, index)

    def _select_rows(self, rows: Tensor, index: Tensor) -> Tensor:
        """Select the rows (B, ...) of ``rows`` (N, ...) with the indices ``index`` (B,).

        ``index`` is on the CPU, so comparing its entries does not wait for the device of ``rows``.
        """
        are_consecutive = len(index) > 0 and bool((index.diff() == 1).all())
        if are_consecutive:
            start = int(index[0])
            return rows[start : start + len(index)]
        device_index = index.to(self.device)
        return rows.index_select(0, device_index)

    @cached_property
    def _first_equal_index(self) -> Tensor:
        """As in ``Batch``: for every candidate, the index (K,) of the first equal candidate.

        Here this is the candidate's own index, because all candidates are different.
        """
        return torch.arange(len(self.text), device=self.device)

    def _batch(self, index: Tensor, columns: Sequence[str]) -> Batch:
        image = self.image_rows(index)
        unknown_target = torch.full((len(index),), UNKNOWN, device=self.device)
        column_tensors = {name: self.column(name, index) for name in columns}
        batch = Batch(
            image=image,
            text=self.text,
            target=unknown_target,
            index=index,
            logit_scale=self.space.logit_scale,
            logit_bias=self.space.logit_bias,
            columns=column_tensors,
        )
        # The batch's cached property is set here, so that no batch has to compute it.
        batch.__dict__["first_equal_index"] = self._first_equal_index
        return batch


def image_matrix(values: ArrayLike | Tensor, space: EmbeddingSpace) -> Tensor:
    """Check image embeddings (N, D), and return them as a tensor on their device.

    Raises:
        DataError: If ``values`` are not a matrix of real numbers, or if the rows are not as wide
            as the space.
    """
    if not isinstance(values, Tensor):
        values = as_matrix(values, "image")
    image = values.detach()
    if image.is_complex() or image.dtype == torch.bool:
        raise DataError(f"image must hold real numbers. Got dtype {image.dtype} instead.")
    if image.ndim != 2:
        shape = tuple(image.shape)
        raise DataError(f"image must be a matrix (rows, width). Got shape {shape} instead.")
    if not image.is_floating_point():
        image = image.float()
    require_width("image", image, space)
    return image


def require_width(name: str, rows: Tensor, space: EmbeddingSpace) -> None:
    """Raise DataError if ``rows`` are not as wide as the space."""
    if rows.shape[1] != space.embed_dim:
        raise DataError(
            f"{name} must have rows of the width {space.embed_dim}, as the rows of the fit have. "
            f"Got {rows.shape[1]} instead."
        )


def usable_rows(rows: Tensor, substitute: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise rows (N, D) on their device. Return float32 rows, and the status codes (N,).

    ``vilu.embeddings.checks.unit_rows`` does the same on the CPU. There are two differences. Here,
    ``substitute`` (D,) replaces an unusable row, and no warning is given.
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    is_finite = torch.isfinite(largest)  # ``largest`` is NaN if a number in the row is NaN
    is_usable = is_finite & (largest > 0)
    float32_rows = rows.float()
    norm = torch.linalg.vector_norm(float32_rows, dim=1, keepdim=True)
    smallest_safe, largest_safe = SAFE_NORMS
    is_safe = (norm > smallest_safe) & (norm < largest_safe)
    # A row with an unsafe norm is first divided by its largest number, so that no square overflows
    # or underflows.
    scaled_rows = (rows / largest).float()
    normalised_scaled = scaled_rows / torch.linalg.vector_norm(scaled_rows, dim=1, keepdim=True)
    normalised_rows = torch.where(is_safe, float32_rows / norm, normalised_scaled)
    has_unit_norm = (norm - 1).abs() <= NORM_TOLERANCE  # such rows stay unchanged
    normalised_rows = torch.where(has_unit_norm, float32_rows, normalised_rows)
    status = torch.full_like(is_finite, VALID, dtype=torch.uint8)
    status = status.masked_fill(largest == 0, ZERO_NORM)
    status = status.masked_fill(~is_finite, NONFINITE)
    return torch.where(is_usable, normalised_rows, substitute), status.squeeze(1)
