"""Test training by several processes.

The weights must be the same for any number of processes, and on all processes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.command import PYTHONPATH, ROOT
from tests.e2e import ddp_worker
from vilu.artifacts.disk import locked
from vilu.errors import UsageError
from vilu.predictors.nn.processes import (
    TORCHRUN_VARIABLES,
    Group,
    World,
    current_world,
    read_environment,
    world,
)
from vilu.predictors.nn.train import require_rows_for_processes

WORKER = "tests.e2e.ddp_worker"
COMPLETE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    here = {name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES}
    return here | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": str(torch.get_num_threads())} | more


def by_hand(folder: Path, *program: str) -> list[str]:
    """Start two processes with the variables that torchrun would set. Return what they print."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, *(program or ("-m", WORKER)), str(folder)],
            env=environment(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return [out for out, _ in said]


def by_torchrun(folder: Path) -> None:
    """Start four processes with torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        "-m",
        WORKER,
    ]
    done = subprocess.run(
        [*command, str(folder)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:only .* among")
@pytest.mark.parametrize(("size", "start"), [(2, by_hand), (4, by_torchrun)])
def test_the_number_of_processes_does_not_matter(
    size: int, start: Callable[[Path], None], tmp_path: Path
) -> None:
    """1 x 64, 2 x 32 and 4 x 16 rows a step must give the same weights.

    The weights are near one and differ by a few float32 roundings, over a dozen steps. A group that
    was stopped and resumed must end with the same bits as one that was not.
    """
    alone = ddp_worker.run(World(), tmp_path / "alone")
    start(tmp_path)
    ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(size)]
    assert all(int(found.pop("size")) == size for found in ranks)
    alone.pop("size")
    for found in ranks:
        assert found.keys() == alone.keys()
        for key in found:
            np.testing.assert_allclose(found[key], alone[key], rtol=1e-6, atol=1e-6, err_msg=key)
            # All processes hold the same bits.
            assert np.array_equal(found[key], ranks[0][key]), key
            assert np.array_equal(found[key], found[key.replace("resumed/", "classes/")]), key


FITS_THAT_FAIL = """
import sys
from pathlib import Path
from tests.conftest import toy_embeddings
from tests.e2e.ddp_worker import QUICK
from vilu.errors import ViLUError
from vilu.predictors.nn.checkpoint import checkpointing
from vilu.predictors.nn.processes import world
from vilu.predictors.vilu.vilu import ViLU

def fit_in(folder):
    try:
        with checkpointing(folder, resume="earlier" not in folder.name) as session:
            session.write_fit_digest("these inputs")
            ViLU(**QUICK).fit(toy_embeddings(n=330))
    except ViLUError as error:
        print(error.exit_code, error)

with world(timeout=60):
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        fit_in(folder)
"""


@pytest.mark.slow
def test_an_error_of_the_leading_process_reaches_the_others(tmp_path: Path) -> None:
    """The other processes must fail with the same error.

    Before, they ended with "connection closed by peer", or waited until the time was over.
    """
    cannot_name = tmp_path / "0"
    (cannot_name / "fit.txt").mkdir(parents=True)
    cannot_save = tmp_path / "1"
    cannot_save.mkdir()
    (cannot_save / "run_0").touch()  # a file where the checkpoint folder should be
    cannot_read = tmp_path / "2"
    (cannot_read / "run_0").mkdir(parents=True)
    (cannot_read / "run_0" / "00000001.json").write_text("{")
    (tmp_path / "3").touch()  # a file where the folder should be
    (tmp_path / "4 earlier" / "run_0").mkdir(parents=True)
    busy = tmp_path / "5"
    busy.mkdir()
    with locked(busy, activity="training with"):
        leading, second = by_hand(tmp_path, "-c", FITS_THAT_FAIL)
    errors = leading.splitlines()
    assert [error[:2] for error in errors] == ["7 ", "7 ", "3 ", "7 ", "2 ", "75"]
    assert "fit.txt" in errors[0]
    assert "run_0" in errors[1]
    assert "no checkpoint in" in errors[2]
    assert "4 earlier holds checkpoints of an earlier run" in errors[4]
    assert "is training with the checkpoints in" in errors[5]
    kinds = ["StorageError", "StorageError", "DataError", "StorageError", "UsageError", "BusyError"]
    expected = []
    for error, kind in zip(errors, kinds, strict=True):
        code, _, message = error.partition(" ")
        expected.append(f"{code} the leading process stopped with {kind}: {message}")
    assert second.splitlines() == expected


def test_one_process_is_a_world() -> None:
    values, gradient = torch.rand(5), torch.rand(3)
    before = gradient.clone()
    with world(environment={}) as one:
        assert current_world() is one
        assert (one.rank, one.size, one.is_leader) == (0, 1, True)
        one.sum_(gradient)
        assert torch.equal(gradient, before)
        assert torch.equal(one.mean(values), values.mean())
        assert one.gather(values) is values
        assert one.total(7) == 7
        assert one.broadcast(b"abc") == b"abc"
        assert one.call_on_leader(lambda: 7) == 7
    assert current_world().size == 1


def test_torchrun_with_one_process_needs_no_group() -> None:
    alone = {**COMPLETE, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with world(environment=alone) as one:
        assert one.size == 1
    assert not torch.distributed.is_initialized()


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_shares_are_all_rows_once_and_as_equal_as_can_be(n_rows: int, size: int) -> None:
    shares = [Group(rank, size, torch.device("cpu")).process_slice(n_rows) for rank in range(size)]
    assert [row for share in shares for row in range(n_rows)[share]] == list(range(n_rows))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"MASTER_ADDR": None, "LOCAL_RANK": None},
            "LOCAL_RANK, MASTER_ADDR not set, but RANK, WORLD_SIZE, MASTER_PORT",
        ),
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' must be whole numbers"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0"}, "LOCAL_RANK=1 not above RANK"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(
    changes: dict[str, str | None], message: str
) -> None:
    given_ = {name: value for name, value in {**COMPLETE, **changes}.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        read_environment(given_)


def test_variables_of_others_are_no_group() -> None:
    assert read_environment({"MASTER_ADDR": "there", "LOCAL_RANK": "3"}) == (0, 1, 0)
    assert read_environment(COMPLETE) == (1, 2, 1)


def test_a_group_that_cannot_be_reached_is_an_error() -> None:
    lost = {**COMPLETE, "MASTER_PORT": str(free_port())}
    with (
        pytest.raises(UsageError, match=r"process 1 of 2 cannot join the others at 127\.0\.0\.1:"),
        world("cpu", lost, timeout=1),
    ):
        pass
    assert current_world().size == 1


def test_more_processes_than_rows_of_a_step_are_refused() -> None:
    require_rows_for_processes(4, Group(0, 4, torch.device("cpu")))
    with pytest.raises(UsageError, match="a step of 3 rows cannot be shared by 4 processes"):
        require_rows_for_processes(3, Group(0, 4, torch.device("cpu")))
