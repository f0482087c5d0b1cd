"""Executor names, ranks from the environment, a cluster's shares, and engines that start for one
run.
"""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace

import pytest

from tests.command import PYTHONPATH
from tests.executors.conftest import require
from tests.executors.fake_job import FileJob, calls
from vilu.errors import DataError, MissingModelError, UsageError
from vilu.extras import start_ray
from vilu.store.executors import EXECUTORS, make_executor
from vilu.store.executors.local import Rank, RankExecutor


def test_names(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in EXECUTORS:
        if name in {"local", "rank"}:
            assert make_executor(name).name == name
    with pytest.raises(UsageError, match="executor must be one of local, ray, spark, rank"):
        make_executor("dask")
    with pytest.raises(UsageError, match="processes must be at least 1"):
        make_executor("local", 0)
    with pytest.raises(UsageError, match="takes no number of processes"):
        make_executor("rank", 2)


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("spark", "pyspark")])
def test_a_missing_package_is_named_with_its_command(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingModelError, match=rf"pip install 'vilu\[{name}\]'") as caught:
        make_executor(name)
    assert caught.value.exit_code == 5


class FakeRay:
    """A fake Ray that stores the options for ``init`` and finds no cluster at the address
    "auto".
    """

    def __init__(self) -> None:
        self.options: dict[str, object] = {}

    def init(self, **options: object) -> None:
        self.options = options
        if options["address"] == "auto":
            raise ConnectionError("Could not find any running Ray instance.")


def test_ray_starts_here_unless_a_cluster_is_named(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    for none in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", none)
        assert not start_ray(num_cpus=2)
        assert (fake.options["address"], fake.options["num_cpus"]) == ("local", 2)
    monkeypatch.delenv("RAY_ADDRESS")
    assert not start_ray(num_cpus=3)
    assert fake.options["num_cpus"] == 3
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert start_ray(num_cpus=2)
    assert fake.options["address"] == address
    assert "num_cpus" not in fake.options  # Ray refuses this option for a running cluster
    fake.options = {}
    with pytest.raises(UsageError, match=rf"no Ray cluster answers at RAY_ADDRESS={address}"):
        start_ray(num_cpus=2)
    assert fake.options == {}  # Ray itself would try for three minutes
    monkeypatch.setenv("RAY_ADDRESS", "x..y:6379")  # an invalid host name
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        start_ray()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UsageError, match=r"RAY_ADDRESS=auto: Could not find any running Ray"):
        start_ray()


@pytest.mark.engine
def test_an_address_that_ray_refuses_is_named(monkeypatch):
    require("ray")
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(UsageError, match=r"RAY_ADDRESS=nonsense: Invalid address format"):
        start_ray()


def array(number: int, count: int, least: int = 0, **more: str) -> dict[str, str]:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
    return dict(zip(names, map(str, (number, count, least)), strict=True)) | more


def srun(rank: int, world: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(world)}


@pytest.mark.parametrize(
    ("environment", "rank", "world"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8"}, 3, 8),
        ({"RANK": "3", "WORLD_SIZE": "8", **srun(0, 1)}, 3, 8),  # torchrun inside a Slurm job
        (srun(2, 4), 2, 4),
        (array(5, 8), 5, 8),
        (array(12, 3, least=10), 2, 3),
        (array(14, 3, least=10, SLURM_ARRAY_TASK_STEP="2"), 2, 3),
        (array(1, 3) | srun(1, 4), 5, 12),  # srun tasks in each array job
    ],
)
def test_rank_from_the_environment(environment, rank, world):
    assert Rank.from_environment(environment) == Rank(rank, world)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "Found none"),
        ({"RANK": "0"}, "RANK and WORLD_SIZE must be set together. Found RANK alone"),
        ({"WORLD_SIZE": "2"}, "Found WORLD_SIZE alone"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "from 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"SLURM_PROCID": "0"}, "SLURM_PROCID and SLURM_NTASKS"),
        (srun(0, 2) | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID must be a whole number"),
        (srun(0, 2) | {"LOCAL_RANK": "x"}, "LOCAL_RANK must be a whole number"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, "Missing: SLURM_ARRAY_TASK_COUNT, SLURM_ARRAY_TASK_MIN"),
        (array(7, 3, least=1), "array task 7 is not among 3 from 1 on"),
        (array(11, 3, least=10, SLURM_ARRAY_TASK_STEP="2"), "steps of 2"),
    ],
)
def test_a_contradictory_environment_is_refused(environment, message):
    with pytest.raises(UsageError, match=message):
        RankExecutor(environment)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_that_miss_different_parts_leave_no_gap_nor_overlap(tmp_path, world):
    """If ranks start with different missing parts, every part must still be done once.

    The second rank starts when the first rank has finished some parts.
    """
    seen = []
    for rank in range(world):
        left = [part for part in range(11) if part not in seen]
        executor = RankExecutor({"RANK": str(rank), "WORLD_SIZE": str(world)})
        seen += [receipt.part for receipt in executor.run(FileJob(tmp_path), left)]
    assert sorted(seen) == list(range(11))


def machines(*resources: tuple[int, int], alive: bool = True) -> list[dict[str, object]]:
    return [
        {"Alive": alive, "Resources": {"CPU": cpu} | ({"GPU": gpu} if gpu else {})}
        for cpu, gpu in resources
    ]


@pytest.mark.parametrize(
    ("nodes", "processes", "number", "threads", "gpus"),
    [
        (machines((8, 0), (8, 0)), None, 16, 1, None),
        (machines((8, 0), (8, 0), (8, 0)), 4, 4, 4, None),  # at most two on one machine
        (
            machines((16, 0), (8, 1), (8, 1)),
            None,
            2,
            8,
            1.0,
        ),  # the machine without a GPU does not count
        (machines((128, 8)), None, 8, 16, 1.0),
        (machines((16, 1)), 4, 4, 4, 0.25),
        (machines((8, 0)) + machines((8, 4), alive=False), 2, 2, 4, None),
    ],
)
def test_every_actor_fits_on_its_machine(nodes, processes, number, threads, gpus):
    require("ray")
    executor = make_executor("ray", processes)
    total = {"GPU": sum(node["Resources"].get("GPU", 0) for node in nodes if node["Alive"])}
    executor._ray = SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: total)
    plan = executor._plan_for_running_ray()
    found = (plan.n_actors, plan.threads_per_actor, plan.gpus_per_actor)
    assert found == (number, threads, gpus)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray", "spark"])
def test_an_engine_of_our_own_is_gone_afterwards(monkeypatch, tmp_path, name):
    require(name)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    executor = make_executor(name, 2)
    parts = [receipt.part for receipt in executor.run(FileJob(tmp_path, kill={3: 2}), range(8))]
    assert sorted(parts) == list(range(8))
    assert len(calls(tmp_path, 3)) == 3
    with pytest.raises(DataError, match="oh no"):
        list(executor.run(FileJob(tmp_path, fail={1: DataError("oh no")}), range(3)))
    if name == "ray":
        assert not executor._ray.is_initialized()
    else:
        assert executor._spark.SparkContext._active_spark_context is None
