"""The tensors that a method saves: checks of their names, types and sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.predictors.nn.head import with_weights

SHOWN = 8
"""Number of names of tensors that a message lists."""


class StateLayout(NamedTuple):
    """The tensors that a method needs: its own tensors, and the weights of its network."""

    method: str
    names: tuple[str, ...]  # of its own tensors; all other tensors are weights of its network
    forms: str  # of its own tensors: see ``require_forms``
    make_network: Callable[[dict[str, Tensor], EmbeddingSpace], nn.Module | None] | None

    def read(
        self, tensors: dict[str, Tensor], space: EmbeddingSpace | None
    ) -> tuple[dict[str, Tensor], nn.Module | None]:
        """Split tensors into the method's own tensors and its network, which gets its weights.

        Raises:
            DataError: If tensors are missing, superfluous, or of the wrong types or shapes.
        """
        if tensors and space is None:
            raise DataError("the saved predictor has weights but no embedding space.")
        # contiguous, as tensors that are read from a file are
        own = {name: tensors[name].contiguous() for name in tensors if name in self.names}
        network = None
        if space is not None and self.make_network is not None:
            with torch.device("meta"):  # allocates and initialises no weights
                network = self.make_network(tensors, space)
        if network is not None:
            weights = {name: tensors[name] for name in tensors if name not in self.names}
            network = with_weights(network, weights, self.method).requires_grad_(False)
        elif tensors.keys() != set(self.names):
            raise DataError(self._other_names(tensors))
        width = 0 if space is None else space.embed_dim
        require_forms(self.method, own, self.forms, width)
        return own, network

    def _other_names(self, tensors: Mapping[str, Tensor]) -> str:
        expected = f"{self.method} has no weights"
        if self.names:
            expected = f"a {self.method} holds {', '.join(self.names)}"
        return f"{expected}. The file has {', '.join(sorted(tensors)[:SHOWN])}."


FORM = re.compile(r"(\S+):([fdi?])(\w*)<?(\w?)")
"""Name, type, letters of the sizes, and the letter of the size that all values are below."""

TYPES = {"f": torch.float32, "d": torch.float64, "i": torch.int64, "?": torch.bool}


def require_forms(method: str, tensors: dict[str, Tensor], forms: str, width: int) -> None:
    """Refuse tensors of other types or sizes than ``forms`` describes.

    An example of ``forms`` is "bank:fND classes:fKD labels:iN<K". Every form has a name, a type (a
    key of ``TYPES``), and one letter for every size:

    - The same letter stands for the same size in all forms. D is the ``width`` of the embeddings.
    - Sizes with small letters may be 0, but only all of them at once.
    - "<K" means that all values are from 0 to K - 1.
    """
    sizes = {"D": width, "1": 1, "2": 2}
    expected_forms = [form for form in FORM.findall(forms) if form[0] in tensors]
    is_empty = _has_small_sizes_of_zero(tensors, expected_forms)
    for name, kind, letters, bound in expected_forms:
        tensor = tensors[name]
        shape = tuple(tensor.shape)
        expected = _expected_shape(letters, shape, sizes, is_empty=is_empty)
        who = f"{name} of {method} must be"
        if tensor.dtype != TYPES[kind] or shape != expected:
            raise DataError(
                f"{who} {TYPES[kind]} of shape {expected}. "
                f"Got {tensor.dtype} of shape {shape} instead."
            )
        if bound and not 0 <= int(tensor.min()) <= int(tensor.max()) < sizes[bound]:
            raise DataError(
                f"{who} from 0 to {sizes[bound] - 1}. Got {tensor.min()} to {tensor.max()} instead."
            )


def _has_small_sizes_of_zero(
    tensors: Mapping[str, Tensor], forms: Sequence[tuple[str, str, str, str]]
) -> bool:
    """Whether the first tensor whose sizes all have small letters has a size of 0."""
    for name, _, letters, _ in forms:
        if letters.islower():
            return 0 in tensors[name].shape
    return False


def _expected_shape(
    letters: str, shape: tuple[int, ...], sizes: dict[str, int], *, is_empty: bool
) -> tuple[int, ...]:
    """The expected shape of a tensor, by the letters of its sizes.

    The size of a new letter is that of the tensor, at least 1, and is added to ``sizes``.
    """
    own_sizes = shape + (0,) * len(letters)  # padded, for a tensor of too few dimensions
    expected = []
    for letter, own in zip(letters, own_sizes, strict=False):
        if is_empty and letter.islower():
            expected.append(0)
        else:
            expected.append(sizes.setdefault(letter.upper(), max(own, 1)))
    return tuple(expected)
