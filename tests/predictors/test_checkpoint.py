"""Test that interrupted training goes on as if it had not been interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Queue

import pytest
import torch
from filelock import FileLock

from tests.command import PYTHONPATH, ROOT
from tests.conftest import toy_embeddings, toy_pairs
from tests.e2e.ddp_worker import QUICK, Brake, Stop, stop
from vilu.artifacts.documents import write_json
from vilu.embeddings.memory import PairEmbeddings
from vilu.embeddings.pairs import Pools
from vilu.embeddings.rows import Rows
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import BusyError, DataError, ProvenanceError, StorageError, UsageError
from vilu.predictors.nn.checkpoint import (
    Checkpoint,
    FolderCheckpointSaver,
    checkpointing,
    current_checkpoint_session,
    data_fingerprint,
    read_checkpoint_files,
    unpack_checkpoint,
)
from vilu.predictors.nn.processes import Group, World
from vilu.predictors.nn.train import HeadTrainer, TrainConfig
from vilu.predictors.vilu.head import HeadPredictor
from vilu.predictors.vilu.vilu import ViLU
from vilu.progress import reporting
from vilu_bench.methods.ensembles import DeepEnsemble, MCDropout

STEPS = 5  # 297 of 330 rows, with batch size 64

pytestmark = pytest.mark.filterwarnings("ignore:only .* among")


def hard_pairs() -> PairEmbeddings:
    pairs = toy_pairs(n=320, pool=64)
    return PairEmbeddings(pairs.image, pairs.text, Pools(64, hard=True), 20.0)


CASES = {
    "classes": (lambda: ViLU(**QUICK), lambda: toy_embeddings(n=330)),
    "pools": (lambda: ViLU(**QUICK, weighting="ema"), hard_pairs),
    "dropout": (lambda: MCDropout(**QUICK, weighting="ema"), lambda: toy_embeddings(n=330)),
    "patience": (lambda: ViLU(**QUICK | {"epochs": 12}, patience=1), lambda: toy_embeddings(n=330)),
    "no momentum": (lambda: ViLU(**QUICK, momentum=0.0), lambda: toy_embeddings(n=330)),
}
"""Each case has a function for the predictor and a function for the data."""


def interrupted(predictor: HeadPredictor, data: object, folder: Path, steps: int) -> None:
    with suppress(Stop), reporting(Brake(steps, stop)), checkpointing(folder):
        predictor.fit(data)
        pytest.fail("it was to be stopped")


def assert_same(one: HeadPredictor, other: HeadPredictor) -> None:
    mine, theirs = one.state(), other.state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert one.notes_ == other.notes_


@pytest.mark.parametrize("steps", [0, 4, 7, 13])
@pytest.mark.parametrize("case", ["classes", "pools", "dropout"])
def test_a_resumed_run_ends_with_the_same_bits(case: str, steps: int, tmp_path: Path) -> None:
    make, data = CASES[case][0], CASES[case][1]()
    steps = min(steps, 10) if case == "pools" else steps
    interrupted(make(), data, tmp_path, steps)
    with checkpointing(tmp_path, resume=True):
        again = make().fit(data)
    assert_same(again, make().fit(data))


@pytest.mark.parametrize("case", ["patience", "no momentum"])
def test_resuming_twice_and_after_the_end(case: str, tmp_path: Path) -> None:
    make, data = CASES[case][0], CASES[case][1]()
    undisturbed = make().fit(data)
    interrupted(make(), data, tmp_path, 6)
    with suppress(Stop), reporting(Brake(9, stop)), checkpointing(tmp_path, resume=True):
        make().fit(data)
    for _ in range(2):  # the second time nothing is left to do
        with checkpointing(tmp_path, resume=True):
            assert_same(make().fit(data), undisturbed)


def test_members_of_an_ensemble_are_runs_of_their_own(tmp_path: Path) -> None:
    data, values = toy_embeddings(n=330), {**QUICK, "members": 3}
    # A reporter counts each member's steps.
    interrupted(DeepEnsemble(**values), data, tmp_path, STEPS * 3 - 1)
    with checkpointing(tmp_path, resume=True) as session:
        again = DeepEnsemble(**values).fit(data)
        assert [path.name for path in session.run_folders()] == ["run_0", "run_1", "run_2"]
    assert_same(again, DeepEnsemble(**values).fit(data))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """A killed run must resume to the same bits.

    SIGKILL comes between steps, or between a checkpoint's syncs: tensors (0, 1) and record (2, 3),
    one checkpoint per epoch.
    """
    points = [
        "step-0",
        "step-8",
        "step-14",
        "sync-0",
        "sync-1",
        "sync-2",
        "sync-3",
        "sync-4",
        "sync-7",
        "sync-10",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "tests.e2e.train_killer", str(tmp_path), *points]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    data = toy_embeddings(n=330)
    undisturbed = MCDropout(**QUICK).fit(data)
    for point in points:
        with checkpointing(tmp_path / point, resume=True) as session:
            assert_same(MCDropout(**QUICK).fit(data), undisturbed)
            names = [path.name for path in (tmp_path / point / "run_0").iterdir()]
            assert len(names) == 4, names  # two checkpoints, and nothing half-written
            session.remove()
        assert not (tmp_path / point).exists()


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Return a folder with checkpoints for the first two epochs in the case "classes"."""
    interrupted(CASES["classes"][0](), toy_embeddings(n=330), tmp_path, 2 * STEPS + 1)
    return tmp_path


def newest(folder: Path) -> Path:
    return max((folder / "run_0").glob("*.json"))


def test_two_are_kept_and_none_is_half_written(stopped: Path) -> None:
    names = sorted(path.name for path in (stopped / "run_0").iterdir())
    assert names == [f"0000000{n}.{kind}" for n in (1, 2) for kind in ("json", "safetensors")]
    positions = [
        read_checkpoint_files(path)[0]["position"]
        for path in sorted((stopped / "run_0").glob("*.json"))
    ]
    assert [position["epoch"] for position in positions] == [1, 2]


@pytest.mark.parametrize("damage", ["flip", "cut", "no tensors", "no json", "other json", "record"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage: str, stopped: Path) -> None:
    record = newest(stopped)
    weights = record.with_suffix(".safetensors")
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "no tensors":
        weights.unlink()
    elif damage == "no json":
        record.write_bytes(record.read_bytes()[:-20])
    elif damage == "other json":
        record.write_text("[1, 2]")
    else:
        changed = json.loads(record.read_bytes())
        changed["position"]["epoch"] = 0
        record.write_text(json.dumps(changed))
    make, data = CASES["classes"][0], toy_embeddings(n=330)
    with (
        pytest.warns(UserWarning, match="a checkpoint is left out: .*00000002"),
        checkpointing(stopped, resume=True),
    ):
        again = make().fit(data)
    assert_same(again, make().fit(data))


def test_no_intact_checkpoint_is_an_error(stopped: Path) -> None:
    for path in (stopped / "run_0").glob("*.safetensors"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"no checkpoint in .* is intact"),
        checkpointing(stopped, resume=True),
    ):
        CASES["classes"][0]().fit(toy_embeddings(n=330))


def relabelled():
    data = toy_embeddings(n=330)
    data.target[5] = (data.target[5] + 1) % 5
    return data


@pytest.mark.parametrize(
    ("predictor", "data", "names"),
    [
        (
            ViLU(**QUICK, learning_rate=0.02),
            toy_embeddings(n=330),
            "learning_rate: 0.03 there, 0.02 here",
        ),
        (ViLU(**QUICK, seed=1), toy_embeddings(n=330), "seed: 0 there, 1 here.*; training rows"),
        (
            MCDropout(**QUICK),
            toy_embeddings(n=330),
            "dropout: None there, 0.1 here; method: 'vilu' there",
        ),
        (ViLU(**QUICK), toy_embeddings(n=331), "training rows"),
        (ViLU(**QUICK), toy_embeddings(n=330, seed=1), "training rows"),
        (ViLU(**QUICK), toy_embeddings(n=330, scale=21.0), "training rows"),
        (ViLU(**QUICK), relabelled(), "training rows"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    predictor, data, names: str, stopped: Path
) -> None:
    with (
        pytest.raises(ProvenanceError, match=f"of another training run; .*{names}"),
        checkpointing(stopped, resume=True),
    ):
        predictor.fit(data)


@pytest.mark.parametrize("case", ["classes", "pools"])
def test_a_checkpoint_of_other_texts_is_refused(case: str, tmp_path: Path) -> None:
    """Changed texts must be noticed even if every answer stays as it is."""
    make, data, other = CASES[case][0], CASES[case][1](), CASES[case][1]()
    other.text = torch.nn.functional.normalize(other.text + 1e-5 * torch.eye(16)[3], dim=1)
    interrupted(make(), data, tmp_path, 7)
    with pytest.raises(ProvenanceError, match="run; texts: "), checkpointing(tmp_path, resume=True):
        make().fit(other)


def test_another_validation_set_and_another_device_name(stopped: Path, tmp_path: Path) -> None:
    with checkpointing(stopped, resume=True):
        ViLU(**QUICK | {"device": "auto"}).fit(toy_embeddings(n=330))
    validation = toy_embeddings(n=100, seed=3, ids_from=5000)
    with (
        pytest.raises(ProvenanceError, match="validation rows"),
        checkpointing(stopped, resume=True),
    ):
        ViLU(**QUICK).fit(toy_embeddings(n=330), validation)


def test_a_folder_in_use_or_used_before_is_refused(stopped: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="holds checkpoints of an earlier run"),
        checkpointing(stopped),
    ):
        pass
    lock = FileLock(tmp_path / ".lock")
    with (
        lock,
        pytest.raises(BusyError, match="another process is training"),
        checkpointing(tmp_path, resume=True),
    ):
        pass


def test_nothing_is_kept_outside_a_block(tmp_path: Path) -> None:
    with checkpointing(tmp_path) as session:
        assert current_checkpoint_session() is session
    saver = current_checkpoint_session().saver(
        lambda: pytest.fail("asked for what it does not need")
    )
    assert saver.latest_checkpoint() is None


@pytest.mark.parametrize(
    ("schema", "reason"),
    [(99, "has schema version 99"), (1, r"made before vilu 0.2.0 \(schema 1\). Remove it")],
)
def test_another_schema_is_refused(stopped: Path, schema: int, reason: str) -> None:
    record = json.loads(newest(stopped).read_bytes())
    write_json(newest(stopped), {**record, "schema_version": schema})
    with pytest.raises(ProvenanceError, match=reason), checkpointing(stopped, resume=True):
        ViLU(**QUICK).fit(toy_embeddings(n=330))


def small_trainer() -> HeadTrainer:
    torch.manual_seed(0)
    config = TrainConfig(1, 64, 0.03, 0.9, 2e-3, 1.0, 1, None, "fp32", 0, torch.device("cpu"))
    return HeadTrainer(
        ViLU(hidden=(4,)).module({}, EmbeddingSpace(16, 20.0)),
        lambda batch, logit: logit.mean(),
        config,
    )


@pytest.mark.parametrize(
    "broken",
    ["missing", "shape", "dtype", "momentum", "no momentum", "epoch", "history", "nan"],
)
def test_tensors_that_do_not_fit_are_refused(broken: str, tmp_path: Path) -> None:
    """Tensors must be refused if another code version wrote them, although their files are whole
    and the run is the same.
    """
    trainer = small_trainer()
    saver = FolderCheckpointSaver(tmp_path, {}, World())
    trainer.saver = saver
    data = toy_embeddings(n=64)
    trainer.run(Rows(data, torch.arange(64)), None)
    found = saver.latest_checkpoint()
    tensors, position = dict(found.tensors), json.loads(json.dumps(found.position))
    unpack_checkpoint(
        Checkpoint(position, tensors), trainer.head, trainer.optimizer, trainer.order_generator, ()
    )
    if broken == "missing":
        del tensors["head.first_bias"]
    elif broken == "shape":
        tensors["head.first_bias"] = torch.zeros(5)
    elif broken == "dtype":
        tensors["head.first_bias"] = tensors["head.first_bias"].double()
    elif broken == "momentum":
        tensors["momentum.99"] = torch.zeros(5)
    elif broken == "no momentum":
        del tensors["momentum.0"]
    elif broken == "epoch":
        position["epoch"] = "1"
    elif broken == "history":
        del position["history"]
    else:
        position["history"]["loss"] = [float("nan")]
    with pytest.raises(DataError, match="checkpoint"):
        unpack_checkpoint(
            Checkpoint(position, tensors),
            trainer.head,
            trainer.optimizer,
            trainer.order_generator,
            (),
        )


def test_fingerprint_of_rows_sees_what_matters() -> None:
    data, rows = toy_embeddings(n=100), torch.arange(80)
    first = data_fingerprint(data, rows)
    assert data_fingerprint(toy_embeddings(n=100), rows) == first
    moved = toy_embeddings(n=100)
    moved.image[0] = -moved.image[0]
    others = [
        (data, rows[1:]),
        (data, rows.flip(0)),
        (moved, rows),
        (toy_embeddings(n=100, ids_from=7), rows),
        (toy_embeddings(n=100, scale=10.0), rows),
    ]
    assert len({first, *(data_fingerprint(*other) for other in others)}) == 6
    pairs = toy_pairs(n=64, pool=32)
    other = toy_pairs(n=64, pool=16)
    assert data_fingerprint(pairs, torch.arange(64)) != data_fingerprint(other, torch.arange(64))


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with checkpointing(tmp_path):
        MCDropout(**QUICK).fit(toy_embeddings(n=330))
    assert torch.equal(torch.get_rng_state(), before)


class QueueGroup(Group):
    """Stand for one of two processes, which are threads here.

    The leader's broadcast goes through a queue.
    """

    def __init__(self, rank: int, sent: Queue[bytes]) -> None:
        super().__init__(rank, 2, torch.device("cpu"))
        self.sent = sent

    def broadcast(self, data: bytes) -> bytes:
        if self.is_leader:
            self.sent.put(data)
            return data
        return self.sent.get(timeout=10)


def test_all_processes_raise_the_error_of_the_leading_one(tmp_path: Path) -> None:
    (tmp_path / "run").touch()  # a file where the checkpoint folder should be
    state = Checkpoint({"epoch": 1}, {})
    sent: Queue[bytes] = Queue()

    def error_of(rank: int) -> StorageError:
        saver = FolderCheckpointSaver(tmp_path / "run", {}, QueueGroup(rank, sent))
        with pytest.raises(StorageError) as caught:
            saver.save(lambda: state)
        return caught.value

    with ThreadPoolExecutor(2) as processes:
        leading, second = processes.map(error_of, range(2))
    assert str(tmp_path / "run") in str(leading)
    assert str(second) == f"the leading process stopped with StorageError: {leading}"

    def fail() -> None:
        raise ZeroDivisionError("in the code")

    with pytest.raises(ZeroDivisionError):
        QueueGroup(0, sent).call_on_leader(fail)
    with pytest.raises(RuntimeError, match="stopped with ZeroDivisionError: in the code"):
        QueueGroup(1, sent).call_on_leader(fail)
    assert QueueGroup(0, sent).call_on_leader(lambda: 7) == 7
    assert QueueGroup(1, sent).call_on_leader(lambda: 7) is None


def test_only_the_leading_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(1, 2, torch.device("cpu"))
    monkeypatch.setattr(group, "broadcast", lambda data: data)  # the leader has no error
    saver = FolderCheckpointSaver(tmp_path / "run", {}, group)
    saver.save(lambda: pytest.fail("made what is not written"))
    assert not (tmp_path / "run").exists()
