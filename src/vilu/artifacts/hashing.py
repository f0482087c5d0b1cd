"""Hashes of plain JSON, bytes, files and tensors.

Equal inputs have equal hashes on every machine and with every vilu version.
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

MAX_BLOCK_SIZE = 2**20
"""Maximum number of entries in a block of rows, unless a single row has more.

A tensor is copied block by block, to limit the copy's memory.
"""


def digest(value: object) -> str:
    """Compute a short hash (blake2b, 16 bytes, in hex) of any value that JSON can represent.

    Examples:
        >>> from vilu.artifacts.hashing import digest
        >>> digest({"a": 1, "b": [2.5]}) == digest({"b": [2.5], "a": 1})  # in any order of keys
        True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # a file name that is no valid UTF-8 contains surrogates
    content = text.encode("utf-8", "surrogatepass")
    hash_of_content = hashlib.blake2b(content, digest_size=16)
    return hash_of_content.hexdigest()


def bytes_hash(content: bytes) -> str:
    """Compute the SHA-256 of bytes, in hex."""
    hash_of_content = hashlib.sha256(content)
    return hash_of_content.hexdigest()


def stream_hash(handle: BufferedReader) -> str:
    """Compute the SHA-256 of an open file from the current position to the end, in hex.

    See also ``disk.file_hash``.
    """
    hash_of_stream = hashlib.file_digest(handle, "sha256")
    return hash_of_stream.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """Compute the SHA-256 of a tensor's type, shape and numbers. All devices give the same hash.

    Examples:
        >>> import torch
        >>> from vilu.artifacts.hashing import tensor_hash
        >>> ones = torch.ones(3, 2)
        >>> tensor_hash(ones) == tensor_hash(torch.ones(1, 1).expand(3, 2))  # same numbers
        True
        >>> tensor_hash(ones) == tensor_hash(ones.T)  # another shape
        False
    """
    return tensors_hash({"": tensor})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of named tensors, sorted by name."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for block in _blocks(tensor):
            sha256.update(block)
    return sha256.hexdigest()


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes, in blocks of rows with about ``MAX_BLOCK_SIZE`` entries.

    A tensor with repeated rows (``Tensor.expand``) may take little memory, but a copy of the whole
    tensor would take much. So only one block is copied at a time.
    """
    if not tensor.numel():
        return
    n_rows = tensor.shape[0] if tensor.ndim else 1
    width = math.prod(tensor.shape[1:])
    rows = tensor.reshape(n_rows, width)
    rows_per_block = max(MAX_BLOCK_SIZE // width, 1)
    for block in rows.split(rows_per_block):
        yield _bytes_of(block)


def _bytes_of(block: Tensor) -> memoryview:
    """Return a tensor's bytes, in the order of the entries."""
    import torch

    block = block.cpu().contiguous()
    single_bytes = block.view(torch.uint8)
    return single_bytes.numpy().data
