"""Test that equal content has one hash in any container. Another hash would break saved files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vilu.artifacts.disk import file_hash
from vilu.artifacts.hashing import bytes_hash, digest, tensor_hash, tensors_hash


def test_hashes_are_those_of_every_version() -> None:
    assert digest({"b": [2.5, None], "a": "ä"}) == "9b6315eb9c747cb185930ecc37def6c3"
    assert bytes_hash(b"vilu") == (
        "b8500165a07a675b06451727f92ac8813da20346a5072c8a76675d986e9d6310"
    )
    assert tensor_hash(torch.arange(6.0).reshape(2, 3)) == (
        "beb826c3348e27828246ed6ff6acd32feca6365bc312f2a4c2a10461ace10fc1"
    )


def test_a_file_has_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"vilu")
    assert file_hash(path) == bytes_hash(b"vilu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_blocks_give_the_hash_of_all_the_bytes(dtype: torch.dtype) -> None:
    tensor = (torch.arange(3 * 2**19) % 2).reshape(-1, 3).to(dtype)
    header = f" {dtype} {tuple(tensor.shape)}\n".encode()
    assert tensor_hash(tensor) == bytes_hash(header + tensor.numpy().tobytes())


@pytest.mark.parametrize(
    "different",
    [
        torch.zeros(6),
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.eye(3)[:2],
    ],
    ids=["dimensions", "shape", "type", "numbers"],
)
def test_other_tensors_have_other_hashes(different: torch.Tensor) -> None:
    assert tensor_hash(different) != tensor_hash(torch.zeros(2, 3))


def test_the_layout_in_memory_does_not_matter() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert tensor_hash(tensor.T.contiguous().T) == tensor_hash(tensor)
    assert tensor_hash(torch.tensor(1.0).expand(4, 2)) == tensor_hash(torch.ones(4, 2))
    assert tensor_hash(tensor.requires_grad_()) == tensor_hash(tensor.detach())


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0)])
def test_tensors_without_rows_or_dimensions_have_one(shape: tuple[int, ...]) -> None:
    assert tensor_hash(torch.zeros(shape)) == tensor_hash(torch.zeros(shape))


def test_names_count_and_their_order_does_not() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    assert tensors_hash({"a": a, "b": b}) == tensors_hash({"b": b, "a": a})
    assert tensors_hash({"a": a, "b": b}) != tensors_hash({"a": b, "b": a})
