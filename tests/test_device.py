"""Devices by name, and what the process keeps for those who compute in it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from threading import Event, Thread

import pytest
import torch

import vilu
from tests.conftest import toy_embeddings
from vilu.device import KEPT_BY, resolve_device, seeded, torch_defaults
from vilu.errors import UsageError
from vilu.predictors.nn.head import FailureHead

BLOCKS = """
import resource, torch
from vilu.device import torch_defaults

def made() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with torch_defaults():
    pass
print(made(), 2**26 // resource.getpagesize())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="what is freed is kept by glibc alone"
)
@pytest.mark.parametrize("given", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_pages_of_a_large_block_are_made_once(given: dict[str, str]) -> None:
    """Eight blocks of 64 MiB, one after the other; whoever sets what is kept himself is obeyed."""
    environment = {name: value for name, value in os.environ.items() if name not in KEPT_BY}
    told = subprocess.check_output(
        [sys.executable, "-c", BLOCKS], env=environment | given, text=True
    )
    made, pages = map(int, told.split())
    assert made > 7 * pages if given else made < 2 * pages


@pytest.mark.skipif(sys.platform != "linux", reason="torch computes with libgomp on Linux alone")
@pytest.mark.parametrize(("given", "spins"), [({}, "3000"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_threads_do_not_spin_for_long(given: dict[str, str], spins: str) -> None:
    """What libgomp has read, as it says itself; whoever sets how threads wait is obeyed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    }
    told = subprocess.run(
        [sys.executable, "-c", "import vilu, torch"],
        env=environment | given | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in told.stderr


def test_threads_leave_the_callers_default_type_as_it_was() -> None:
    """It is of the whole process: who began last, and found ours, must not give that back;
    nor who ends first, his.
    """
    inside, leave = Event(), Event()

    def other() -> torch.dtype:
        with torch_defaults():
            inside.set()
            assert leave.wait(10)
            return torch.get_default_dtype()

    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(1) as pool:
            with torch_defaults():
                told = pool.submit(other)
                assert inside.wait(10)
            leave.set()
            assert told.result() is torch.float32
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_fit_that_stayed_behind() -> None:
    """A thread that made a network while another forked held the lock in the child for ever."""
    inside, leave = Event(), Event()

    def other() -> None:
        with seeded(0):
            inside.set()
            assert leave.wait(20)

    with ThreadPoolExecutor(1) as threads:
        told = threads.submit(other)
        assert inside.wait(10)
        child = get_context("fork").Process(target=_seeded_once)
        child.start()
        child.join(10)
        leave.set()
        told.result()
    ended = child.exitcode
    child.kill()
    assert ended == 0


def _seeded_once() -> None:
    with seeded(0):
        pass


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
