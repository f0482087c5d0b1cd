"""Checkpoints of training: written while it runs, read when it begins again, without the trainer knowing where.

Nothing is kept by default; ``with checkpointing(folder)`` keeps. Each training run in the block, in its order, has a
folder ``run_0``, ``run_1``, ... (``vilu.nn.keeper``).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from vilu.errors import StorageError, UsageError
from vilu.files import LOCK, locked, make_folder
from vilu.nn.keeper import Binding, FolderKeeper, Keeper
from vilu.nn.world import World, current_world
from vilu.space import digest
from vilu.types import EmbeddingSource

RUN = re.compile(r"run_\d+")
SAMPLED_IDS, SAMPLED_ROWS = 1024, 64


class Session:
    """Hands out keepers, one per training run in their order."""

    def keeper(self, binding: Callable[[], Binding]) -> Keeper:  # noqa: ARG002 - nothing to bind here
        """Of the next training run; ``binding`` is asked for only where something is kept."""
        return Keeper()


class FolderSession(Session):
    """Runs that are kept in the sub-folders of a folder."""

    def __init__(self, folder: Path, every: float, world: World) -> None:
        self.folder, self.every, self.world, self.n_runs, self.removed = folder, every, world, 0, False

    def keeper(self, binding: Callable[[], Binding]) -> Keeper:
        """One that keeps."""
        keeper = FolderKeeper(self.folder / f"run_{self.n_runs}", binding(), self.every, self.world)
        self.n_runs += 1
        return keeper

    def runs(self) -> list[Path]:
        """Folders of runs that are there."""
        return sorted(path for path in self.folder.iterdir() if RUN.fullmatch(path.name))

    def remove(self) -> None:
        """Remove the checkpoints: what they led to is saved.

        Raises:
            StorageError: If the file system refuses.
        """
        try:
            for run in self.runs() if self.world.leads else ():
                shutil.rmtree(run)
            self.removed = self.world.leads
        except OSError as error:
            raise StorageError(f"cannot remove the checkpoints in {self.folder}: {error.strerror or error}.") from error


_session: ContextVar[Session] = ContextVar("session", default=Session())  # noqa: B039 - it has no state


def current_session() -> Session:
    """Who keeps the running code's checkpoints; nobody, outside a ``with checkpointing()`` block."""
    return _session.get()


@contextmanager
def checkpointing(folder: str | Path, every: float = 10.0, *, resume: bool = False) -> Iterator[FolderSession]:
    """Keep checkpoints of the training in a ``with`` block: at the end of every epoch, and within long ones.

    Where several processes train together, this block stands inside theirs (``vilu.nn.world.world``).

    Args:
        folder: Where; made where it is missing.
        every: Minutes between two checkpoints within an epoch.
        resume: Go on from the checkpoints in the folder, where there are some.

    Raises:
        UsageError: If there are checkpoints and ``resume`` is not wanted, or ``every`` is negative.
        BusyError: If another process trains with this folder.
        StorageError: If the file system refuses.
    """
    if not every >= 0:
        raise UsageError(f"minutes between checkpoints must not be negative. Got {every} instead.")
    session = FolderSession(make_folder(folder), every, current_world())
    with locked(session.folder, "training with the checkpoints in") if session.world.leads else nullcontext():
        if session.world.leads and session.runs() and not resume:
            raise UsageError(f"{folder} holds checkpoints of an earlier run. Resume it, or give another folder.")
        token = _session.set(session)
        try:
            yield session
        finally:
            _session.reset(token)
    if session.removed:
        (session.folder / LOCK).unlink(missing_ok=True)
        if not any(session.folder.iterdir()):
            session.folder.rmdir()


def data_fingerprint(source: EmbeddingSource, rows: Tensor) -> str:
    """Hash of some rows of a source: which, their targets and space, and a sample of identifiers and embeddings.

    Args:
        source: Where the rows are.
        rows: (M,) int64 positions.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for numbers in (rows, source.target[rows]):
        hashed.update(numbers.numpy().tobytes())
    ids = [source.ids[row] for row in spread(rows, SAMPLED_IDS).tolist()]
    hashed.update(source.image_rows(spread(rows, SAMPLED_ROWS)).numpy().tobytes())
    return digest([source.space.fingerprint, source.n_candidates, source.pool_size, ids, hashed.hexdigest()])


def spread(rows: Tensor, n: int) -> Tensor:
    """At most ``n`` of the rows (M,), evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows)), dtype=torch.float64).long()] if len(rows) else rows
