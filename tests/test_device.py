"""Test devices by name, and fits that run at once in several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

import vilu
from tests.conftest import toy_embeddings
from vilu.device import SeparateGenerator, resolve_device
from vilu.errors import UsageError
from vilu.predictors.nn.head import FailureHead


@pytest.mark.parametrize(("method", "times"), [("lvu", 16), ("pvu", 8), ("vilu_plus", 2)])
def test_fits_in_threads_are_those_of_the_seed(method: str, times: int) -> None:
    """All threads share torch's own generator.

    Two networks once took their numbers from one stream, half each.
    """
    data = toy_embeddings(n=400, k=3)

    def fitted(_: int) -> list[float]:
        return (
            vilu.PREDICTORS[method](epochs=1, seed=3).fit(data).predict_uncertainty(data).tolist()
        )

    alone, before = fitted(0), torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fitted, range(times))) == [alone] * times
    assert torch.equal(torch.get_rng_state(), before)


def test_a_method_may_fit_another_one_for_its_network() -> None:
    """A fit inside a fit once waited for itself forever."""
    data, found = toy_embeddings(n=400, k=3), list[list[float]]()

    class Teacher(vilu.LVU):
        def module(
            self, tensors: dict[str, torch.Tensor], space: vilu.EmbeddingSpace
        ) -> FailureHead:
            vilu.LVU(epochs=1, seed=5).fit(data)
            return super().module(tensors, space)

    def fitted(kind: type[vilu.LVU]) -> None:
        found.append(kind(epochs=1, seed=3).fit(data).predict_uncertainty(data).tolist())

    fit = Thread(target=fitted, args=(Teacher,), daemon=True)
    fit.start()
    fit.join(20)
    assert not fit.is_alive()
    fitted(vilu.LVU)
    assert found[0] == found[1]


DRAWS: list[Callable[[], Tensor]] = [
    lambda: torch.rand(2, 3),
    lambda: torch.randn((2, 3), device="cpu"),
    lambda: torch.normal(torch.zeros(2, 3), 1.0),
    lambda: torch.empty(2, 3).uniform_(),
    lambda: torch.empty(2, 3).normal_(0.0, 1.0),
    lambda: torch.empty(2, 3).bernoulli_(0.5),
    lambda: nn.init.uniform_(torch.empty(2, 3)),
    lambda: nn.init.normal_(torch.empty(2, 3), std=0.02),
    lambda: nn.init.trunc_normal_(tensor=torch.empty(2, 3)),
    lambda: nn.init.orthogonal_(torch.empty(2, 3)),
    lambda: nn.init.xavier_uniform_(torch.empty(2, 3)),
    lambda: nn.init.xavier_normal_(torch.empty(2, 3)),
    lambda: nn.init.kaiming_uniform_(torch.empty(2, 3)),
    lambda: nn.init.kaiming_normal_(torch.empty(2, 3)),
    lambda: nn.MultiheadAttention(4, 2).in_proj_weight,
    lambda: nn.Embedding(2, 3).weight,
]
"""Every kind of draw that the libraries make while they build a model."""


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_of_a_block_come_from_its_own_generator(draw: Callable[[], Tensor]) -> None:
    """The numbers are those for seed 0, and torch's generator does not move."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with SeparateGenerator() as block:
        drawn = draw().detach().clone()
        after_one_draw = block.generator.get_state()
        again = draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(after_one_draw, torch.Generator().manual_seed(0).get_state())
    assert not torch.equal(block.generator.get_state(), after_one_draw)
    assert again.shape == drawn.shape
    torch.manual_seed(0)
    assert torch.equal(draw(), drawn)


def test_a_block_leaves_named_generators_and_other_threads_alone() -> None:
    own = torch.Generator().manual_seed(5)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)
    from_global = torch.rand(3)
    torch.manual_seed(7)
    with SeparateGenerator() as block, ThreadPoolExecutor(1) as second_thread:
        start = block.generator.get_state()
        assert torch.equal(torch.rand(3, generator=own), expected)
        assert torch.equal(second_thread.submit(torch.rand, 3).result(), from_global)
        assert torch.rand(3, device="meta").is_meta
        assert torch.equal(block.generator.get_state(), start)


def test_a_network_of_transformers_leaves_the_global_generator_alone() -> None:
    """open_clip builds its text towers in this way. Functions in torch are replaced meanwhile."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    before = torch.get_rng_state()
    with SeparateGenerator():
        network = transformers.AutoModel.from_config(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.embeddings.word_embeddings.weight.std() > 0


@pytest.mark.parametrize(
    "name",
    [
        "gpu",
        "cpu:",
        "cuda:x",
        "cuda:²",
        pytest.param("cuda:" + "9" * 5000, id="cuda:9..."),
        "cuda:99",
        "cpu:9999",
        "",
    ],
)
def test_a_device_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"device must be auto, cpu|is not on this machine. Found: .*cpu"
    ):
        resolve_device(name)
