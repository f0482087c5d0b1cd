"""The tensors that a method saves: their names, types and sizes, checked before it holds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.predictors.nn.head import with_weights

SHOWN = 8
"""Names of tensors that a message lists."""


class StateLayout(NamedTuple):
    """What a method is to hold."""

    method: str
    names: tuple[str, ...]  # of its own tensors; all others are weights of its network
    forms: str  # of its own tensors: see ``require_forms``
    make_network: Callable[[dict[str, Tensor], EmbeddingSpace], nn.Module | None] | None

    def read(
        self, tensors: dict[str, Tensor], space: EmbeddingSpace | None
    ) -> tuple[dict[str, Tensor], nn.Module | None]:
        """Its own tensors, and its network with its weights.

        Raises:
            DataError: If tensors are missing or too many, or of the wrong types or shapes.
        """
        if tensors and space is None:
            raise DataError("the saved predictor has weights but no embedding space.")
        # laid out as in a file
        own = {name: tensors[name].contiguous() for name in tensors if name in self.names}
        network = None
        if space is not None and self.make_network is not None:
            with torch.device("meta"):  # no numbers are drawn
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
TYPES = {"f": torch.float32, "d": torch.float64, "i": torch.int64, "?": torch.bool}


def require_forms(method: str, tensors: dict[str, Tensor], forms: str, width: int) -> None:
    """Refuse tensors that are not as ``forms`` says, such as "bank:fND classes:fKD labels:iN<K": name, type and sizes.

    A letter is one size, D the ``width`` of the embeddings; small letters may be 0, all of them.
    <K: from 0 to K - 1.
    """
    sizes = {"D": width, "1": 1, "2": 2}
    there = [found for found in FORM.findall(forms) if found[0] in tensors]
    nothing = 0 in next(
        (tensors[name].shape for name, _, letters, _ in there if letters.islower()), ()
    )
    for name, kind, letters, bound in there:
        tensor, shape = tensors[name], tuple(tensors[name].shape)
        given = zip(letters, shape + (0,) * len(letters), strict=False)
        expected = tuple(
            0 if nothing and x.islower() else sizes.setdefault(x.upper(), max(n, 1))
            for x, n in given
        )
        who = f"{name} of {method} must be"
        if (tensor.dtype, shape) != (TYPES[kind], expected):
            raise DataError(
                f"{who} {TYPES[kind]} of shape {expected}. Got {tensor.dtype} of shape {shape} instead."
            )
        if bound and not 0 <= int(tensor.min()) <= int(tensor.max()) < sizes[bound]:
            raise DataError(
                f"{who} from 0 to {sizes[bound] - 1}. Got {tensor.min()} to {tensor.max()} instead."
            )
