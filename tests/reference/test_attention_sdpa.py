"""Attention over a pool without its matrix:
against the dense form in float64, and torch's own kernel and gradient.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.embeddings.test_similarity import noisy, unit
from vilu.embeddings.source import Batch
from vilu.predictors.nn import head as attention
from vilu.predictors.nn.head import ATTENTION, CrossAttention, FailureHead, attend

D, H, SCALE = 32, 24, 20.0


@pytest.fixture(params=list(ATTENTION))
def module(request: pytest.FixtureRequest) -> CrossAttention:
    torch.manual_seed(0)
    made = ATTENTION[request.param](D)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def matrices(module: CrossAttention) -> tuple[list[Tensor], float]:
    """Query, key and value matrices in float64, leaves, and the multiplier;
    from the definitions.
    """
    if isinstance(module, attention.OfficialAttention):
        image, text = module.image, module.text
        query, shared = (m.detach().double().requires_grad_() for m in (image, text))
        return [query, shared, shared], SCALE
    names = (module.query, module.key, module.value_projection)
    return [m.detach().double().requires_grad_() for m in names], 1 / math.sqrt(D)


def run(
    module: CrossAttention, image: Tensor, text: Tensor, after: Tensor, towards: Tensor
) -> list[Tensor]:
    """Result and gradients of the module's matrices and of the one behind."""
    out = module(image, text, SCALE, after)
    return [out.detach(), *torch.autograd.grad(out, [*module.parameters(), after], towards)]


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To 1e-5 of the largest entry of each."""
    scaled = [
        (a.double() - b.double()).abs().max() / b.abs().max()
        for a, b in zip(found, expected, strict=True)
    ]
    return max(scaled) < 1e-5


@pytest.mark.parametrize(("b", "k"), [(200, 200), (200, 3), (3, 200), (1, 1), (129, 301)])
@pytest.mark.parametrize("cells", [1, 1000, 2**22])
def test_both_forms_are_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, module: CrossAttention, b: int, k: int, cells: int
) -> None:
    """In one row a tile, in tiles that do not divide B, and as a chain; the gradients too."""
    monkeypatch.setattr(attention, "TILE_CELLS", cells)
    text = unit(k, D, 0)
    image, after, towards = noisy(text, b), torch.randn(H, D, requires_grad=True), torch.randn(b, H)
    (query, key, value), scale = matrices(module)
    last = after.detach().double().requires_grad_()
    weights = torch.softmax(scale * (image.double() @ query.T) @ (text.double() @ key.T).T, dim=1)
    out = weights @ (text.double() @ value.T) @ last.T
    leaves = [query, key] if key is value else [query, key, value]
    if (
        b * k == 1
    ):  # one candidate has the weight one: the gradients of query and key are zero but for rounding
        assert close(run(module, image, text, after, towards)[:1], [out.detach()])
        return
    expected = [out.detach(), *torch.autograd.grad(out, [*leaves, last], towards.double())]
    assert close(run(module, image, text, after, towards), expected)


def test_it_is_scaled_dot_product_attention() -> None:
    """Also torch's own gradient of the query."""
    text = unit(300, D, 0)
    query = noisy(text, 257).requires_grad_()
    towards = torch.randn(257, D)
    theirs = functional.scaled_dot_product_attention(query, text, text, scale=SCALE)
    ours = attend(query, text, SCALE)
    found, expected = (
        [out.detach(), *torch.autograd.grad(out, query, towards)] for out in (ours, theirs)
    )
    assert close(found, expected)


def test_gradient_by_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE_CELLS", 20)
    text = unit(7, 6, 0).double()
    assert torch.autograd.gradcheck(
        lambda q: attend(q, text, 3.0), noisy(unit(7, 6, 1), 9).double().requires_grad_()
    )


class Watch(TorchDispatchMode):
    """Notes the size of the largest tensor that a kernel gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple) else (result,)
        self.largest = max(
            self.largest, *(part.numel() for part in made if isinstance(part, Tensor)), 0
        )
        return result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cells", [6000, 2**22])
def test_no_tensor_is_as_large_as_rows_times_candidates(
    monkeypatch: pytest.MonkeyPatch, training: bool, cells: int
) -> None:
    """Forward and backward of the whole head on a pool of 600 pairs;
    where it fits into one tile, one such tensor.
    """
    monkeypatch.setattr(attention, "TILE_CELLS", cells)
    torch.manual_seed(0)
    head, text = FailureHead(D, (H, 8)), unit(600, D, 0)
    batch = Batch(noisy(text, 600), text, torch.arange(600), torch.arange(600), SCALE)
    assert len(batch.failure) == 600  # the zero-shot answers come before, in tiles of their own
    with Watch() as watch, torch.set_grad_enabled(training):
        logit = head(batch)
        if training:
            logit.sum().backward()
    assert watch.largest == (600 * D if cells == 6000 else 600 * 600)
    if training:
        assert float(head.attention.image.grad.abs().sum()) > 0


def test_autocast_leaves_the_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query and average in float32; only the product with what follows is the MLP's."""
    text = unit(300, D, 0)
    image, module, eye = noisy(text, 300), ATTENTION["official"](D), torch.eye(D)
    exact = module(image, text, SCALE, eye)
    for cells in (2**22, 1000):
        monkeypatch.setattr(attention, "TILE_CELLS", cells)
        with torch.autocast("cpu", torch.bfloat16):
            query = module(image, text, SCALE, eye)
        # two products in bfloat16, each rounding by 2^-8; logits of 20 in bfloat16 would be off by
        # 20 of them
        assert (query.float() - exact).abs().max() < 3 * 2**-8 * exact.abs().max()


def test_texts_that_want_a_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="gives them no gradient"):
        attend(torch.eye(3), torch.eye(3).requires_grad_(), 1.0)
