"""Test products in image towers by oneDNN."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from vilu.backbones.products import ProductsByOneDNN, fast_products, is_onednn_faster

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)

ROUNDING = 1e-5
"""Sums over 64 products near 1, in float32 and another order, differ by up to 64 x 2^-24 x 2."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def limit_to_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def operations_of(layer: nn.Module, rows: torch.Tensor) -> set[str]:
    """Return the names of torch operations that run while ``layer`` is applied to ``rows``."""
    with torch.profiler.profile() as profile, torch.inference_mode():
        layer(rows)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_those_of_torch(
    generator: torch.Generator, shape: tuple[int, ...], *, with_bias: bool
) -> None:
    rows = torch.randn(*shape, generator=generator)
    weight = torch.randn(4, 7, generator=generator)
    bias = torch.randn(4, generator=generator) if with_bias else None
    expected = functional.linear(rows.double(), weight.double(), _double(bias))
    with torch.inference_mode(), ProductsByOneDNN():
        product = functional.linear(rows, weight, bias)
    torch.testing.assert_close(product.double(), expected, atol=ROUNDING, rtol=0)


def _double(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.double()


@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": False}, {"stride": 2}, {"groups": 7}, {"padding": 1}, {"kernel_size": 3}],
    ids=str,
)
@pytest.mark.parametrize("n_images", [1, 5, 17])
def test_convolutions_are_those_of_torch(
    generator: torch.Generator, settings: dict[str, Any], n_images: int
) -> None:
    layer = nn.Conv2d(7, 14, **{"kernel_size": 1} | settings)
    channels = torch.randn(n_images, 7, 6, 6, generator=generator)
    with torch.inference_mode():
        expected = copy.deepcopy(layer).double()(channels.double())
        for images in (channels, channels.to(memory_format=torch.channels_last)):
            with ProductsByOneDNN():
                outcome = layer(images)
            torch.testing.assert_close(outcome.double(), expected, atol=ROUNDING, rtol=0)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.10 warns so
def test_small_batches_are_convolved_by_onednn_in_the_mode_alone(
    generator: torch.Generator, limit_to_one_thread: None
) -> None:
    layer = nn.Conv2d(7, 14, 1)
    channels = torch.randn(3, 7, 6, 6, generator=generator)
    assert "aten::mkldnn_convolution" not in operations_of(layer, channels)
    with ProductsByOneDNN():
        assert "aten::mkldnn_convolution" in operations_of(layer, channels)


def test_attention_of_torch_is_the_same(generator: torch.Generator) -> None:
    """``nn.MultiheadAttention`` has its own fast path, which the mode must not break."""
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    rows = torch.randn(2, 9, 64, generator=generator)
    with torch.inference_mode():
        expected, _ = attention(rows, rows, rows, need_weights=False)
        with ProductsByOneDNN():
            outcome, _ = attention(rows, rows, rows, need_weights=False)
    torch.testing.assert_close(outcome, expected, atol=ROUNDING, rtol=0)


def test_layers_run_by_onednn_in_the_mode_alone(generator: torch.Generator) -> None:
    layer = nn.Linear(7, 4)
    rows = torch.randn(3, 7, generator=generator)
    assert "mkldnn::_linear_pointwise" not in operations_of(layer, rows)
    with ProductsByOneDNN():
        assert "mkldnn::_linear_pointwise" in operations_of(layer, rows)


def test_other_number_formats_are_left_to_torch(generator: torch.Generator) -> None:
    rows = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    with torch.inference_mode(), ProductsByOneDNN():
        product = functional.linear(rows, weight)
    assert torch.equal(product, functional.linear(rows, weight))


def test_other_threads_are_left_alone(generator: torch.Generator) -> None:
    rows = torch.randn(3, 7, generator=generator, requires_grad=True)
    weight = torch.randn(4, 7, generator=generator)
    products: list[torch.Tensor] = []

    def multiply() -> None:
        products.append(functional.linear(rows, weight))

    with ProductsByOneDNN():
        thread = threading.Thread(target=multiply)
        thread.start()
        thread.join()
    products[0].sum().backward()  # oneDNN's product could not be differentiated
    assert rows.grad is not None


def test_only_a_processor_that_gains_uses_it() -> None:
    is_used = isinstance(fast_products(torch.device("cpu")), ProductsByOneDNN)
    assert is_used == is_onednn_faster()
    assert not isinstance(fast_products(torch.device("meta")), ProductsByOneDNN)


def test_arguments_have_the_names_of_torch(generator: torch.Generator) -> None:
    rows = torch.randn(5, 7, generator=generator)
    weight = torch.randn(4, 7, generator=generator)
    pixels = torch.randn(2, 7, 3, 3, generator=generator)
    kernel = weight[:, :, None, None]
    with torch.inference_mode(), ProductsByOneDNN():
        product = functional.linear(input=rows, weight=weight)
        channels = functional.conv2d(input=pixels, weight=kernel)
    expected = torch.einsum("nchw,kc->nkhw", pixels, weight)
    torch.testing.assert_close(product, rows @ weight.T, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(channels, expected, atol=ROUNDING, rtol=0)
