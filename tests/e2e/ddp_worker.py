"""Train as one process in a group, for ``test_distributed``, and write the results to OUT/RANK.npz.

The test also runs this file alone, without torchrun, and compares the results.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from tests.conftest import toy_embeddings, toy_pairs
from vilu.embeddings.memory import PairEmbeddings
from vilu.embeddings.pairs import Pools
from vilu.embeddings.rows import Rows
from vilu.predictors.nn.checkpoint import checkpointing
from vilu.predictors.nn.head import FailureHead
from vilu.predictors.nn.losses import FailureWeight, bce_loss
from vilu.predictors.nn.processes import World, world
from vilu.predictors.nn.train import HeadTrainer, TrainConfig
from vilu.predictors.vilu.head import HeadPredictor
from vilu.predictors.vilu.vilu import LVU, ViLU
from vilu.progress import Task, reporting
from vilu_bench.methods.ensembles import MCDropout

QUICK = {"hidden": (16, 8), "epochs": 3, "freeze_epochs": 1, "batch_size": 64, "device": "cpu"}


def repeated_pairs(direction: str) -> PairEmbeddings:
    """Return pairs where the last third has the captions from the first third."""
    pairs = toy_pairs(n=192, pool=64)
    text = pairs.text.clone()
    text[128:] = text[:64]
    return PairEmbeddings(pairs.image, text, Pools(64, direction, seed=3), 20.0)


def trained(predictor: HeadPredictor, data: object) -> dict[str, np.ndarray]:
    """Fit the predictor, and return its weights and history."""
    predictor.fit(data)
    history = predictor.notes_["history"]
    found = {name: tensor.numpy() for name, tensor in predictor.state().items()}
    return found | {
        "loss": np.array(history["loss"]),
        "auroc": np.array(history["validation_auroc"]),
    }


def short_last_step() -> dict[str, np.ndarray]:
    """Train on 65 rows in steps with 64 rows.

    In the second step, all processes but one have no row.
    """
    torch.manual_seed(0)
    head = FailureHead(16, (16, 8))
    config = TrainConfig(3, 64, 0.03, 0.9, 2e-3, 1.0, 1, None, "fp32", 0, torch.device("cpu"))
    trainer = HeadTrainer(head, bce_loss(FailureWeight("batch", 0.3)), config)
    history = trainer.run(Rows(toy_embeddings(n=65), torch.arange(65)), None)
    return {name: tensor.numpy() for name, tensor in head.state_dict().items()} | {
        "loss": np.array(history.loss)
    }


class Stop(Exception):
    """The error that ``Brake`` raises."""


class Brake:
    """A progress reporter that allows at most ``steps`` steps."""

    def __init__(self, steps: int, act: Callable[[], object]) -> None:
        self.left, self.act = steps, act

    def start(self, description: str, total: float | None, unit: str) -> Brake:
        return self

    def advance(self, steps: float, note: str = "") -> None:
        self.left -= steps
        if self.left < 0:
            self.act()

    def finish(self, task: Task) -> None:
        pass


def stop() -> None:
    raise Stop


def resumed(folder: Path) -> dict[str, np.ndarray]:
    """Stop the job "classes" in the third step in its second epoch, and resume it with new
    objects.
    """
    data = toy_embeddings(n=330)
    with suppress(Stop), reporting(Brake(7, stop)), checkpointing(folder):
        ViLU(**QUICK).fit(data)
    with checkpointing(folder, resume=True) as session:
        assert [path.name for path in session.run_folders()] == ["run_0"]
        found = trained(ViLU(**QUICK), data)
        session.remove()
    return found


JOBS = {
    "classes": lambda: trained(ViLU(**QUICK), toy_embeddings(n=330)),
    "paper attention": lambda: trained(
        ViLU(**QUICK, attention="paper", weighting="ema"), toy_embeddings(n=330)
    ),
    "pools": lambda: trained(ViLU(**QUICK), toy_pairs(n=512, pool=64)),
    "text to image": lambda: trained(
        ViLU(**QUICK, weighting="ema"), repeated_pairs("text_to_image")
    ),
    "backbone loss": lambda: trained(LVU(**QUICK, loss="loss"), repeated_pairs("image_to_text")),
    "dropout": lambda: trained(MCDropout(**QUICK), toy_embeddings(n=330)),
    "short last step": short_last_step,
}


def run(group: World, folder: Path) -> dict[str, np.ndarray]:
    """Return the results from all jobs as "job/name", and the group size."""
    jobs = {**JOBS, "resumed": lambda: resumed(folder / "checkpoints")}
    found = {f"{job}/{name}": array for job, work in jobs.items() for name, array in work().items()}
    return found | {"size": np.array(group.size)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the fit tests check the warnings about few failures
    with world() as group:
        np.savez(Path(sys.argv[1]) / f"{group.rank}.npz", **run(group, Path(sys.argv[1])))
