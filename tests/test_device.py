"""Devices by name, and fits at once in several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch

import vilu
from tests.conftest import toy_embeddings
from vilu.device import resolve_device
from vilu.errors import UsageError
from vilu.predictors.nn.head import FailureHead


@pytest.mark.parametrize(("method", "times"), [("lvu", 16), ("pvu", 8), ("vilu_plus", 2)])
def test_fits_in_threads_are_those_of_the_seed(method: str, times: int) -> None:
    """torch's own generator is of the whole process:
    two networks were made of one stream of numbers, half of each.
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
    """It waited for itself, for ever."""
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
