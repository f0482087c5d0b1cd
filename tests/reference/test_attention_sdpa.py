"""Test pool attention that never builds its whole matrix, against the dense form in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.embeddings.test_similarity import noisy, unit
from vilu.embeddings.source import Batch
from vilu.predictors.nn import head as attention
from vilu.predictors.nn.head import ATTENTION_CLASSES, CrossAttention, FailureHead

D, H, SCALE = 32, 24, 20.0
AFTER = unit(7, D, 5)
"""These are the weights for the layer that takes the average."""


@pytest.fixture(params=list(ATTENTION_CLASSES))
def module(request: pytest.FixtureRequest) -> CrossAttention:
    torch.manual_seed(0)
    made = ATTENTION_CLASSES[request.param](D)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def matrices(module: CrossAttention) -> tuple[list[Tensor], float]:
    """Return query, key and value matrices as float64 leaves, and the multiplier, from the
    definitions.
    """
    if isinstance(module, attention.OfficialAttention):
        image, text = module.image, module.text
        query, shared = (m.detach().double().requires_grad_() for m in (image, text))
        return [query, shared, shared], SCALE
    names = (module.query, module.key, module.value_projection)
    return [m.detach().double().requires_grad_() for m in names], 1 / math.sqrt(D)


def run(module: CrossAttention, image: Tensor, text: Tensor, towards: Tensor) -> list[Tensor]:
    """Return the module's result and the gradients for its matrices."""
    out = module(image, text, SCALE, AFTER)
    return [out.detach(), *torch.autograd.grad(out, [*module.parameters()], towards)]


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether all tensors agree to 1e-5 times their largest entry."""
    scaled = [
        (a.double() - b.double()).abs().max() / b.abs().max()
        for a, b in zip(found, expected, strict=True)
    ]
    return max(scaled) < 1e-5


@pytest.mark.parametrize(("b", "k"), [(200, 200), (200, 3), (3, 200), (1, 1), (129, 301)])
def test_both_forms_are_the_dense_one(module: CrossAttention, b: int, k: int) -> None:
    """Results and gradients must be equal with fewer and with more texts than rows."""
    text = unit(k, D, 0)
    image, towards = noisy(text, b), torch.randn(b, len(AFTER))
    (query, key, value), scale = matrices(module)
    weights = torch.softmax(scale * (image.double() @ query.T) @ (text.double() @ key.T).T, dim=1)
    out = weights @ (text.double() @ value.T) @ AFTER.double().T
    leaves = [query, key] if key is value else [query, key, value]
    # With one candidate the weight is one, so the gradients for query and key are zero up to
    # rounding.
    if b * k == 1:
        assert close(run(module, image, text, towards)[:1], [out.detach()])
        return
    expected = [out.detach(), *torch.autograd.grad(out, leaves, towards.double())]
    assert close(run(module, image, text, towards), expected)


class Watch(TorchDispatchMode):
    """Note the largest tensor size that a kernel returns."""

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
def test_no_tensor_is_as_large_as_rows_times_candidates(
    monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """Run the whole head forward and backward on a pool with 600 pairs."""
    monkeypatch.setattr("vilu.embeddings.similarity.MAX_TILE_LOGITS", 6000)
    torch.manual_seed(0)
    head, text = FailureHead(D, (H, 8)), unit(600, D, 0)
    batch = Batch(noisy(text, 600), text, torch.arange(600), torch.arange(600), SCALE)
    assert len(batch.failure) == 600  # zero-shot answers come first, in their own tiles
    with Watch() as watch, torch.set_grad_enabled(training):
        logit = head(batch)
        if training:
            logit.sum().backward()
    assert watch.largest == 600 * D
    if training:
        assert float(head.attention.image.grad.abs().sum()) > 0


def test_autocast_leaves_the_attention_alone() -> None:
    """Attention must stay in float32.

    In bfloat16, logits near 20 would be off by 20 roundings (2^-8 each).
    """
    text = unit(300, D, 0)
    image, module = noisy(text, 300), ATTENTION_CLASSES["official"](D)
    exact = module(image, text, SCALE, AFTER)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(image, text, SCALE, AFTER), exact)
