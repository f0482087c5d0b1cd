"""Rules for every executor: the same bytes after any death, no part twice in the store, and no
part lost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.builders.store_fakes import FakeBackbone, tree
from tests.command import PYTHONPATH
from tests.conftest import few
from tests.executors.fakes import BAD, N_PARTS, PER_PART, SETTINGS, Clumsy, pictures, pictures_seen
from vilu.errors import BusyError, DataError, ProvenanceError
from vilu.store.embed import embed
from vilu.store.executors import EXECUTORS, make_executor
from vilu.store.executors.local import RankExecutor
from vilu.store.inspect import inspect
from vilu.store.parts import StoreLedger
from vilu.store.reader import EmbeddingStore

N_BAD = len(BAD)
POISON = 5
GOOD = [sum(i not in BAD for i in range(p * PER_PART, (p + 1) * PER_PART)) for p in range(N_PARTS)]
IN_SESSION = [name for name in EXECUTORS if name != "rank"]


def run(name: str, root: Path, model: FakeBackbone, workers: int = 2, **settings: object):
    """Embed with an executor, where ranks run one after the other."""
    if name != "rank":
        return embed(
            pictures(), model, root, executor=make_executor(name, workers), **SETTINGS | settings
        )
    for rank in range(workers):
        executor = RankExecutor({"RANK": str(rank), "WORLD_SIZE": str(workers)})
        store = embed(
            pictures(), model, root, executor=executor, shared=True, **SETTINGS | settings
        )
    return store


def drive(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a driver in its own process until it ends."""
    everything = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "tests.executors.driver", *map(str, arguments)]
    return subprocess.run(command, env=everything, stdout=subprocess.PIPE, timeout=120, check=False)


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_death(log: Path, seconds: float = 60) -> None:
    """Wait until every worker that preprocessed a picture has ended."""
    end = time.monotonic() + seconds
    while left := {process for process, _ in pictures_seen(log) if alive(process)}:
        assert time.monotonic() < end, f"workers {left} outlive their driver"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the files in a store that one process writes without an executor."""
    root = tmp_path_factory.mktemp("undisturbed") / "s"
    embed(pictures(), FakeBackbone(), root, **SETTINGS)
    return tree(root)


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *((name, 2) for name in ("local", "ray", "rank")),
        *(
            pytest.param(name, n, marks=pytest.mark.slow)
            for name in ("local", "ray", "rank")
            for n in (1, 4)
        ),
        ("spark", 2),
    ],  # a Spark context fixes its number
)
def test_the_same_bytes_for_any_number_of_workers(
    engines, tmp_path, undisturbed, capfd, name, workers
):
    """The store must have the same bytes for every number of workers.

    Five per cent of the samples are bad, and the error table must be the same, too.
    """
    engines(name)
    store = run(name, tmp_path / "s", FakeBackbone(), workers)
    assert "INFO" not in capfd.readouterr().err  # Ray Data logs in its own threads
    assert tree(tmp_path / "s") == undisturbed
    manifest = store.manifest
    assert (manifest.n_in, manifest.n_error) == (N_PARTS * PER_PART, N_BAD)
    assert manifest.n_in == manifest.n_ok + manifest.n_error == len(store) + N_BAD
    errors = [
        row
        for p in sorted((tmp_path / "s/errors").iterdir())
        for row in pq.read_table(p).to_pylist()
    ]
    assert [row["position"] for row in errors] == sorted(BAD)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_SESSION)
def test_workers_killed_while_they_decode_encode_and_rename(
    engines, tmp_path, log, undisturbed, name
):
    engines(name)
    accidents = {"decode": 1, "encode": 4, "rename": 7}
    run(name, tmp_path / "s", Clumsy(log, accidents))
    assert {path.name for path in log.iterdir()} == {
        "pictures",
        *accidents,
    }  # all three accidents happened
    assert tree(tmp_path / "s") == undisturbed
    assert inspect(tmp_path / "s", deep=True).problems == []


@pytest.mark.slow
def test_ranks_killed_while_they_decode_encode_and_rename(tmp_path, log, undisturbed):
    accidents = {"decode": 1, "encode": 4, "rename": 7}
    ends = json.loads(
        drive("ranks", "rank", tmp_path / "s", log, ACCIDENTS=json.dumps(accidents)).stdout
    )
    assert ends == [-9, -9, -9, 0]
    assert tree(tmp_path / "s") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    few(["local", "rank", "ray", "spark"], 1),
)
def test_a_killed_driver_costs_only_what_was_missing(engines, tmp_path, log, undisturbed, name):
    engines(name)
    assert drive("third", name, tmp_path / "s", log).returncode == -9
    wait_for_death(log)
    done = {int(path.stem) for path in (tmp_path / "s/receipts").glob("*.json")}
    assert N_PARTS // 3 <= len(done) < N_PARTS
    before = len(pictures_seen(log))
    run(name, tmp_path / "s", Clumsy(log), 1 if name == "rank" else 2)
    again = [part for _, part in pictures_seen(log)[before:]]
    assert sorted(again) == sorted(p for p in set(range(N_PARTS)) - done for _ in range(GOOD[p]))
    assert tree(tmp_path / "s") == undisturbed


@pytest.mark.parametrize(
    "name", few(sorted(IN_SESSION, key=lambda name: name == "local"), len(IN_SESSION) - 1)
)
def test_the_second_of_two_drivers_is_sent_away(engines, tmp_path, undisturbed, name):
    engines(name)
    with StoreLedger.lock_folder(tmp_path / "s"), pytest.raises(BusyError) as caught:
        run(name, tmp_path / "s", FakeBackbone())
    assert caught.value.exit_code == 75
    run(name, tmp_path / "s", FakeBackbone())
    assert tree(tmp_path / "s") == undisturbed


def test_two_ranks_at_once_both_end_well(tmp_path, log, undisturbed):
    stores = {}

    def embed_rank(rank: int) -> None:
        executor = RankExecutor({"RANK": str(rank), "WORLD_SIZE": "2"})
        model = Clumsy(log, slow=0.02)
        stores[rank] = embed(
            pictures(), model, tmp_path / "s", executor=executor, shared=True, **SETTINGS
        )

    ranks = [threading.Thread(target=embed_rank, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(stores) == 2
    assert any(store is not None for store in stores.values())  # the last rank sealed it
    assert len(pictures_seen(log)) == sum(GOOD)  # no part was done twice
    assert tree(tmp_path / "s") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_SESSION)
def test_a_part_that_always_kills_is_set_aside(engines, tmp_path, log, undisturbed, name):
    engines(name)
    with pytest.raises(DataError) as caught:
        run(name, tmp_path / "s", Clumsy(log, {"poison": POISON}))
    assert caught.value.exit_code == 3
    check_poisoned(tmp_path / "s", log, undisturbed)
    store = run(name, tmp_path / "s", FakeBackbone(), max_error_rate=0.2)
    assert len(store) == N_PARTS * PER_PART - N_BAD - GOOD[POISON]


@pytest.mark.slow
def test_a_part_that_always_kills_its_rank_is_set_aside(tmp_path, log, undisturbed):
    ends = json.loads(
        drive("ranks", "rank", tmp_path / "s", log, ACCIDENTS=json.dumps({"poison": POISON})).stdout
    )
    assert ends[:4] == [-9, -9, -9, 3]
    check_poisoned(tmp_path / "s", log, undisturbed)


def check_poisoned(root: Path, log: Path, undisturbed: dict[str, str]) -> None:
    assert len({process for process, part in pictures_seen(log) if part == POISON}) == 3
    errors = pq.read_table(root / f"errors/errors_{POISON:05d}.parquet").to_pylist()
    assert [row["kind"] for row in errors] == ["crash"] * PER_PART
    other = {name: content for name, content in tree(root).items() if f"{POISON:05d}" not in name}
    expected = {
        name for name in undisturbed if f"{POISON:05d}" not in name and name != "manifest.json"
    }
    assert other == {name: undisturbed[name] for name in expected}


@pytest.mark.parametrize("name", EXECUTORS)
def test_other_preprocessing_is_refused_and_nothing_overwritten(
    engines, tmp_path, undisturbed, name
):
    engines(name)
    embed(pictures(), FakeBackbone(), tmp_path / "s", **SETTINGS)
    with pytest.raises(ProvenanceError, match="preprocess") as caught:
        run(name, tmp_path / "s", FakeBackbone(preprocess="9x9"))
    assert caught.value.exit_code == 6
    assert tree(tmp_path / "s") == undisturbed
    assert len(EmbeddingStore(tmp_path / "s")) == sum(GOOD)
