from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vilu.backbones.base import TEXT_BATCH_SIZE, DualEncoder, encode_in_batches
from vilu.embeddings.space import EmbeddingSpace

WIDTH = 4
CPU = torch.device("cpu")


def lengths(texts: list[str]) -> Tensor:
    return torch.tensor([[float(len(text)), 1.0, 0.0, 0.0] for text in texts])


def encoder(precision: str = "fp32", head: bool = False) -> DualEncoder:
    weight = torch.linspace(-1, 1, WIDTH * 12).reshape(WIDTH, 12)
    return DualEncoder(
        EmbeddingSpace(WIDTH, 10.0, precision=precision),
        CPU,
        transform=lambda image: torch.zeros(3, 2, 2),
        image_tower=lambda pixels: torch.nn.functional.linear(pixels.flatten(1), weight),
        image_head=(lambda rows: rows @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        if head
        else None,
        text_tower=lengths,
        truncates=lambda texts: [len(text) > 9 for text in texts],
    )


@given(st.lists(st.text(max_size=9), min_size=1, max_size=3 * TEXT_BATCH_SIZE))
def test_batches_come_back_in_the_order_of_the_texts(texts: list[str]) -> None:
    sizes: list[int] = []

    def encode(batch: list[str]) -> Tensor:
        sizes.append(len(batch))
        return lengths(batch)

    rows = encode_in_batches(encode, texts)
    assert rows[:, 0].tolist() == [len(text) for text in texts]
    assert max(sizes) <= TEXT_BATCH_SIZE
    assert sum(sizes) == len(texts)


def test_embeddings_are_the_normalised_output_of_tower_and_head() -> None:
    pixels = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-1, 1, WIDTH * 12, dtype=torch.float64).reshape(WIDTH, 12)
    expected = (
        pixels.double().flatten(1)
        @ weight.T
        @ torch.diag(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    )
    expected /= expected.norm(dim=1, keepdim=True)
    rows = encoder(head=True).encode_images(pixels)
    # 12 products and a norm in float32 make 20 roundings, each 6e-8, for numbers below 1.
    torch.testing.assert_close(rows.double(), expected, atol=1.2e-6, rtol=0)


def test_bf16_rounds_the_tower_and_nothing_else() -> None:
    pixels = torch.rand(64, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    exact, rounded = (encoder(p, head=True).encode_images(pixels) for p in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    # If the head were in bf16 too, only 8-bit numbers would be left. The float32 normalisation
    # leaves more.
    assert not torch.equal(rounded, rounded.bfloat16().float())
    # bf16 keeps 8 bits: a relative 2^-9 each for pixels, weights and the result, in vectors with
    # norm 1.
    difference = (exact - rounded).abs().max().item()
    assert 0 < difference < 3 * 2**-8


def test_no_text_is_asked_for_nothing() -> None:
    assert encoder().truncates(("short", "rather longer")) == [False, True]
    assert encoder().truncates([]) == []


def test_outer_autocast_changes_nothing() -> None:
    pixels = torch.rand(3, 3, 2, 2)
    plain = encoder(head=True).encode_images(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(head=True).encode_images(pixels), plain)


def test_embeddings_can_be_trained_on() -> None:
    parameter = torch.ones(WIDTH, requires_grad=True)
    for rows in (encoder().encode_images(torch.rand(2, 3, 2, 2)), encoder().encode_texts(["a"])):
        (rows @ parameter).sum().backward()  # autograd refuses tensors made in inference mode
    assert parameter.grad is not None
    assert parameter.grad.abs().sum() > 0


def test_projections_are_the_last_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    image_map, text_map = (
        torch.randn(3, 12, generator=generator),
        torch.randn(3, WIDTH, generator=generator),
    )
    linear = DualEncoder(
        EmbeddingSpace(3, 10.0),
        CPU,
        transform=lambda image: torch.zeros(3, 2, 2),
        image_tower=lambda pixels: pixels.flatten(1),
        text_tower=lengths,
        truncates=lambda texts: [len(text) > 9 for text in texts],
        image_projection=image_map,
        text_projection=text_map,
    )
    pixels = torch.rand(5, 3, 2, 2, generator=generator)
    rows, features = linear.encode_images_and_features(pixels)
    assert torch.equal(features, pixels.flatten(1))
    assert torch.equal(rows, linear.encode_images(pixels))
    torch.testing.assert_close(rows, torch.nn.functional.normalize(features @ image_map.T, dim=1))
    texts = ["a", "bb", "ccc"]
    assert torch.equal(linear.encode_text_features(texts), lengths(texts))
    torch.testing.assert_close(
        linear.encode_texts(texts),
        torch.nn.functional.normalize(lengths(texts) @ text_map.T, dim=1),
    )
    assert linear.feature_dim == 12
    assert linear.projections is not None
    (
        features.sum() + torch.ones(1, requires_grad=True)
    ).backward()  # Autograd refuses tensors made in inference mode.


def test_no_text_is_an_empty_matrix() -> None:
    assert encoder().encode_texts([]).shape == (0, WIDTH)


@pytest.mark.parametrize("count", [1, TEXT_BATCH_SIZE, TEXT_BATCH_SIZE + 1])
def test_texts_have_unit_norm(count: int) -> None:
    rows = encoder().encode_texts([f"{i}" for i in range(count)])
    assert rows.shape == (count, WIDTH)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(count))
