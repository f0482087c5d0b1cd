"""Checks for the names, types and sizes of a method's saved tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.predictors.nn.head import load_weights

MAX_SHOWN_NAMES = 8
"""How many tensor names a message lists."""


class StateLayout(NamedTuple):
    """A method's saved tensors: the method's own tensors, and a network's weights."""

    method_name: str
    names: tuple[str, ...]  # names of the method's own tensors. All further tensors are weights
    forms: str  # types and sizes of the method's own tensors, see ``require_forms``
    # function that makes the network for the tensors and the space, or None without a network
    make_network: Callable[[dict[str, Tensor], EmbeddingSpace], nn.Module | None] | None

    def read(
        self, tensors: dict[str, Tensor], space: EmbeddingSpace | None
    ) -> tuple[dict[str, Tensor], nn.Module | None]:
        """Split saved tensors into the method's own tensors and a network with the saved weights.

        Raises:
            DataError: If tensors are missing or superfluous, or have wrong types or shapes.
        """
        if tensors and space is None:
            raise DataError("the saved predictor has weights but no embedding space.")
        # contiguous like tensors from a file, so that results are the same bit for bit
        method_tensors = {
            name: tensors[name].contiguous() for name in tensors if name in self.names
        }
        network = None
        if space is not None and self.make_network is not None:
            with torch.device("meta"):  # on this device no weights are allocated or initialised
                network = self.make_network(tensors, space)
        if network is not None:
            weights = {name: tensors[name] for name in tensors if name not in self.names}
            network = load_weights(network, weights, self.method_name)
            network.requires_grad_(False)
        elif tensors.keys() != set(self.names):
            message = self._wrong_names_message(tensors)
            raise DataError(message)
        width = 0
        if space is not None:
            width = space.embed_dim
        require_forms(self.method_name, method_tensors, self.forms, width)
        return method_tensors, network

    def _wrong_names_message(self, tensors: Mapping[str, Tensor]) -> str:
        """Return the message for tensors whose names are not the method's tensor names."""
        expectation = f"{self.method_name} has no weights"
        if self.names:
            expectation = f"a {self.method_name} holds {', '.join(self.names)}"
        shown_names = sorted(tensors)[:MAX_SHOWN_NAMES]
        return f"{expectation}. The file has {', '.join(shown_names)}."


FORM_PATTERN = re.compile(r"(\S+):([fdi?])(\w*)<?(\w?)")
"""Form of a tensor: name, type, a letter for each size, and the size that bounds the values.

For example, "labels:iN<K" has the parts "labels", "i", "N" and "K". ``require_forms`` explains the
parts.
"""

TYPE_OF_LETTER = {"f": torch.float32, "d": torch.float64, "i": torch.int64, "?": torch.bool}
"""Tensor types by letter in a form."""


def require_forms(method_name: str, tensors: dict[str, Tensor], forms: str, width: int) -> None:
    """Refuse tensors whose types or sizes differ from ``forms``.

    An example for ``forms`` is "bank:fND classes:fKD labels:iN<K": a float32 bank (N, D), float32
    classes (K, D), and int64 labels (N,). Every form has a name, a type (a key of
    ``TYPE_OF_LETTER``), and a letter for every size:

    - The same letter stands for the same size in all forms. D is the embedding ``width``.
    - A size with a small letter may be 0. If one such size is 0, all such sizes must be 0.
    - "<K" means that all values are from 0 to K - 1.
    """
    sizes = {"D": width, "1": 1, "2": 2}  # known sizes, by letter or digit
    expected_forms = [_Form(*form) for form in FORM_PATTERN.findall(forms)]
    present_forms = [form for form in expected_forms if form.name in tensors]
    small_sizes_are_zero = _has_small_sizes_of_zero(tensors, present_forms)
    for name, type_letter, size_letters, bound in present_forms:
        tensor = tensors[name]
        dtype = TYPE_OF_LETTER[type_letter]
        shape = tuple(tensor.shape)
        expected_shape = _expected_shape(
            size_letters, shape, sizes, small_sizes_are_zero=small_sizes_are_zero
        )
        subject = f"{name} of {method_name} must be"
        if tensor.dtype != dtype or shape != expected_shape:
            raise DataError(
                f"{subject} {dtype} of shape {expected_shape}. "
                f"Got {tensor.dtype} of shape {shape} instead."
            )
        if bound:
            smallest = int(tensor.min())
            largest = int(tensor.max())
            if smallest < 0 or largest >= sizes[bound]:
                raise DataError(
                    f"{subject} from 0 to {sizes[bound] - 1}. Got {smallest} to {largest} instead."
                )


class _Form(NamedTuple):
    """Form for a single tensor, as parsed by ``FORM_PATTERN``."""

    name: str
    type_letter: str
    size_letters: str  # a letter for each size
    bound: str  # letter for the size above all values, empty without a bound


def _has_small_sizes_of_zero(tensors: Mapping[str, Tensor], forms: Sequence[_Form]) -> bool:
    """Return whether the first tensor with only small letters in its form has a size of 0."""
    for name, _, size_letters, _ in forms:
        if size_letters.islower():
            return 0 in tensors[name].shape
    return False


def _expected_shape(
    size_letters: str, shape: tuple[int, ...], sizes: dict[str, int], *, small_sizes_are_zero: bool
) -> tuple[int, ...]:
    """Compute the shape that a tensor of this ``shape`` must have, from the size letters.

    If ``small_sizes_are_zero``, all sizes with small letters must be 0. A letter missing in
    ``sizes`` is added with the tensor's size, or with 1 if this size is 0.
    """
    expected_shape = []
    for dimension, letter in enumerate(size_letters):
        if small_sizes_are_zero and letter.islower():
            expected_shape.append(0)
            continue
        actual_size = 0  # for a dimension missing in the tensor
        if dimension < len(shape):
            actual_size = shape[dimension]
        # the letter's known size, or else this tensor's size
        expected_size = sizes.setdefault(letter.upper(), max(actual_size, 1))
        expected_shape.append(expected_size)
    return tuple(expected_shape)
