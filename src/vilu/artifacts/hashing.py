"""Identity: the hash of plain JSON, of bytes, of a file, and of tensors.

Equal inputs have equal hashes on every machine: no version of anything is part of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_NUMBERS = 2**20
"""Numbers of a tensor that are copied together, so that one on a device is never copied whole."""


def digest(value: object) -> str:
    """Short hash (blake2b, 16 bytes, hex) of anything that JSON can write.

    Examples:
        >>> from vilu.artifacts.hashing import digest
        >>> digest({"a": 1, "b": [2.5]}) == digest({"b": [2.5], "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    content = text.encode("utf-8", "surrogatepass")  # names of files may be no UTF-8
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def bytes_hash(content: bytes) -> str:
    """SHA-256 of bytes, as ``stream_hash`` gives it for a file that holds them."""
    return hashlib.sha256(content).hexdigest()


def stream_hash(handle: BufferedReader) -> str:
    """SHA-256 of all that an open file still holds; ``disk.file_hash`` opens one."""
    return hashlib.file_digest(handle, "sha256").hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of the type, the shape and the numbers of a tensor, wherever it lies.

    Examples:
        >>> import torch
        >>> from vilu.artifacts.hashing import tensor_hash
        >>> ones = torch.ones(3, 2)
        >>> tensor_hash(ones) == tensor_hash(torch.ones(1, 1).expand(3, 2))
        True
        >>> tensor_hash(ones) == tensor_hash(ones.T)
        False
    """
    return tensors_hash({"": tensor})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for block in _blocks(tensor):
            total.update(block)
    return total.hexdigest()


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor block by block.

    What repeats one number for all rows (``expand``) is never written out as a whole.
    """
    import torch

    if not tensor.numel():
        return
    n_rows = tensor.shape[0] if tensor.ndim else 1
    width = math.prod(tensor.shape[1:])
    rows = tensor.reshape(n_rows, width)
    for block in rows.split(max(BLOCK_NUMBERS // width, 1)):
        yield block.cpu().contiguous().view(torch.uint8).numpy().data
