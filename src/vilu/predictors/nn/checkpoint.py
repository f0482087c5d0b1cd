"""Checkpoints of training: what is kept, when, and how it is checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from vilu.artifacts.disk import (
    LOCK,
    TEMPORARY,
    locked,
    make_folder,
    or_refuse,
    write_bytes,
    write_text,
)
from vilu.artifacts.documents import digest, read_json, write_json
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors.nn.head import Dropout
from vilu.predictors.nn.processes import World, current_world

RECORD = re.compile(r"(\d{8,})\.json")
OURS = re.compile(r"\d{8,}\.(json|safetensors)")
AGAIN = "Remove it, and run the training again"

Binding = Mapping[str, object]
"""What a run is a run of, as plain JSON: it must be the same when it begins again."""


class Checkpoint(NamedTuple):
    """A state of training: how far it is, as plain JSON, and the tensors of everything else."""

    position: dict[str, Any]
    tensors: dict[str, Tensor]

    def numbers(self) -> tuple[int, int]:
        """Finished epochs, and finished steps of the next one."""
        numbers = self.position.get("epoch"), self.position.get("step")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise DataError(f"a checkpoint says epoch {numbers[0]!r} and step {numbers[1]!r}.")
        return int(self.position["epoch"]), int(self.position["step"])


class Keeper:
    """Keeps nothing; the base of those that do."""

    def latest(self) -> Checkpoint | None:
        """Where to go on; None: at the beginning."""
        return None

    def due(self) -> bool:
        """Whether it is time for a checkpoint in the middle of an epoch."""
        return False

    def save(self, make: Callable[[], Checkpoint]) -> None:
        """Keep a state, which is made only where it is written."""


class FolderKeeper(Keeper):
    """Keeps the two newest checkpoints of one run in its folder; of several processes the leading one writes."""

    def __init__(self, folder: Path, binding: Binding, every: float, world: World) -> None:
        self.folder, self.every, self.world = folder, every, world
        self.binding = json.loads(json.dumps(binding))
        self.saved_at = time.monotonic()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or if that is damaged the one before it, with a warning."""
        record, weights = self._newest() if self.world.leads else (b"", b"")
        record, weights = self.world.broadcast(record), self.world.broadcast(weights)
        if not record:
            return None
        return Checkpoint(json.loads(record)["position"], safetensors_torch.load(weights))

    def due(self) -> bool:
        """Whether ``every`` minutes have passed since the last one."""
        return self.world.leads and time.monotonic() - self.saved_at >= 60 * self.every

    def save(self, make: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint, and remove those that are neither this one nor the one before it."""
        if not self.world.leads:
            return
        found, serials = make(), self._serials()
        name = f"{max(serials, default=0) + 1:08d}"
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in found.tensors.items()}
        weights = safetensors_torch.save(tensors)
        make_folder(self.folder)
        write_bytes(self.folder / f"{name}.safetensors", weights)
        record = {
            "binding": self.binding,
            "position": found.position,
            "tensors_sha256": hashlib.sha256(weights).hexdigest(),
        }
        write_json(self.folder / f"{name}.json", record)
        self._prune({name, f"{max(serials, default=0):08d}"})
        self.saved_at = time.monotonic()

    def _serials(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in map(RECORD.fullmatch, names) if match)

    def _prune(self, kept: set[str]) -> None:
        with or_refuse(f"remove a checkpoint in {self.folder}"):
            for path in sorted(
                self.folder.iterdir()
            ):  # of a name the record goes before its tensors
                if is_ours(path.name) and path.stem not in kept:
                    path.unlink()

    def _newest(self) -> tuple[bytes, bytes]:
        serials, faults = self._serials(), list[str]()
        for serial in reversed(serials):
            try:
                record, weights = read_checked(self.folder / f"{serial:08d}.json")
            except DataError as error:
                faults.append(str(error))
                warnings.warn(f"a checkpoint is left out: {error}", stacklevel=4)
                continue
            self._require_same(record["binding"])
            return json.dumps(record).encode(), weights
        if serials:
            raise DataError(
                f"no checkpoint in {self.folder} is intact. {' '.join(faults)} Remove that folder to begin again."
            )
        return b"", b""

    def _require_same(self, found: dict[str, object]) -> None:
        differences = [
            f"{key}: {found.get(key)!r} there, {self.binding.get(key)!r} here"
            for key in sorted(found.keys() | self.binding.keys())
            if found.get(key) != self.binding.get(key)
        ]
        if differences:
            raise ProvenanceError(
                f"the checkpoints in {self.folder} are of another training run; {'; '.join(differences)}. "
                "Go on with what they were made with, drop them (--restart), or give another folder."
            )


def is_ours(name: str) -> bool:
    """Whether a file is of a checkpoint, finished or half-written."""
    match = TEMPORARY.fullmatch(name)
    return OURS.fullmatch(match["name"] if match else name) is not None


def read_checked(path: Path) -> tuple[dict[str, Any], bytes]:
    """A record and the bytes of its tensors, as they were written."""
    record = read_json(path, AGAIN)
    if not all(isinstance(record.get(name), dict) for name in ("binding", "position")):
        raise DataError(f"{path} is damaged: it lacks a binding and a position. {AGAIN}.")
    beside = path.with_suffix(".safetensors")
    if not beside.is_file():
        raise DataError(f"{beside} is missing.")
    with or_refuse(f"read {beside}"):
        weights = beside.read_bytes()
    if hashlib.sha256(weights).hexdigest() != record.get("tensors_sha256"):
        raise DataError(f"{beside} is not the file that {path.name} names.")
    return record, weights


RUN = re.compile(r"run_\d+")
NAMED = "fit.txt"
SAMPLED_IDS, SAMPLED_ROWS = 1024, 64


class Session:
    """Hands out keepers, one per training run in their order."""

    def keeper(self, binding: Callable[[], Binding]) -> Keeper:  # noqa: ARG002 - nothing to bind here
        """Of the next training run; ``binding`` is asked for only where something is kept."""
        return Keeper()


class FolderSession(Session):
    """Runs that are kept in the sub-folders of a folder."""

    def __init__(self, folder: Path, every: float, world: World) -> None:
        self.folder, self.every, self.world, self.n_runs, self.removed = (
            folder,
            every,
            world,
            0,
            False,
        )

    def keeper(self, binding: Callable[[], Binding]) -> Keeper:
        """One that keeps."""
        self.n_runs += 1
        return FolderKeeper(
            self.folder / f"run_{self.n_runs - 1}", binding(), self.every, self.world
        )

    def name_fit(self, inputs: str) -> None:
        """Leave what the checkpoints are of, for ``named``."""
        if self.world.leads:
            write_text(self.folder / NAMED, inputs)

    def named(self) -> str | None:
        """What the checkpoints are said to be of; None where nothing is said."""
        with or_refuse(f"read {self.folder / NAMED}"):
            return (self.folder / NAMED).read_text() if (self.folder / NAMED).is_file() else None

    def runs(self) -> list[Path]:
        """Folders of runs that are there."""
        return sorted(path for path in self.folder.iterdir() if RUN.fullmatch(path.name))

    def remove(self) -> None:
        """Remove the checkpoints: what they led to is saved."""
        with or_refuse(f"remove the checkpoints in {self.folder}"):
            for run in self.runs() if self.world.leads else ():
                shutil.rmtree(run)
            if self.world.leads:
                (self.folder / NAMED).unlink(missing_ok=True)
        self.removed = self.world.leads


_session: ContextVar[Session] = ContextVar("session", default=Session())  # noqa: B039 - it has no state


def current_session() -> Session:
    """Who keeps the running code's checkpoints; nobody, outside a ``with checkpointing()`` block."""
    return _session.get()


@contextmanager
def checkpointing(
    folder: str | Path, every: float = 10.0, *, resume: bool = False
) -> Iterator[FolderSession]:
    """Keep checkpoints of the training in a ``with`` block: at the end of every epoch, and within long ones.

    Where several processes train together, this block stands inside theirs
    (``vilu.predictors.nn.processes.world``).

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
    with (
        locked(session.folder, "training with the checkpoints in")
        if session.world.leads
        else nullcontext()
    ):
        if session.world.leads and session.runs() and not resume:
            raise UsageError(
                f"{folder} holds checkpoints of an earlier run. Resume it, or give another folder."
            )
        token = _session.set(session)
        try:
            yield session
        finally:
            _session.reset(token)
    if session.removed:
        with or_refuse(f"remove {session.folder}"):
            (session.folder / LOCK).unlink(missing_ok=True)
            if not any(session.folder.iterdir()):
                session.folder.rmdir()


def data_fingerprint(source: EmbeddingSource, rows: Tensor) -> str:
    """Hash of some rows of a source: which, their targets and space, and a sample of identifiers and embeddings."""
    hashed = hashlib.blake2b(digest_size=16)
    for numbers in (rows, source.target[rows], source.image_rows(spread(rows, SAMPLED_ROWS))):
        hashed.update(numbers.numpy().tobytes())
    ids = [source.ids[row] for row in spread(rows, SAMPLED_IDS).tolist()]
    return digest(
        [source.space.fingerprint, source.n_candidates, source.pool_size, ids, hashed.hexdigest()]
    )


def text_fingerprint(source: EmbeddingSource, rows: Tensor) -> str:
    """Hash of what some rows of a source choose from: of all shared candidates, or of a sample of the captions."""
    text = source.candidates(spread(rows, SAMPLED_ROWS)).text
    return hashlib.blake2b(text.numpy().tobytes(), digest_size=16).hexdigest()


def spread(rows: Tensor, n: int) -> Tensor:
    """At most ``n`` of the rows (M,), evenly spaced."""
    return (
        rows[torch.linspace(0, len(rows) - 1, min(n, len(rows)), dtype=torch.float64).long()]
        if len(rows)
        else rows
    )


class Stateful(Protocol):
    """Something in a loss that remembers earlier batches."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse; must refuse tensors of the wrong names or shapes."""


@dataclass
class History:
    """What happened, one entry an epoch; ``kept_epoch`` is the one whose weights were kept (0-based)."""

    loss: list[float] = field(default_factory=list)
    validation_auroc: list[float] = field(default_factory=list)
    kept_epoch: int = -1


@dataclass
class Position:
    """How far a training run is.

    ``order`` is the state of the shuffling at the start of the epoch, ``total`` the sum of its
    losses so far, ``step`` its finished steps, and ``kept`` the weights of the epoch that
    validation chose.
    """

    order: Tensor
    total: Tensor
    epoch: int = 0
    step: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=History)


def pack(
    at: Position, head: nn.Module, momenta: Mapping[Tensor, Tensor], stateful: Sequence[Stateful]
) -> Checkpoint:
    """Everything that the rest of a training run depends on; ``momenta`` of each parameter that learns, in order."""
    parts = {
        "head": head.state_dict(),
        "kept": at.kept,
        "momentum": {str(i): momentum for i, momentum in enumerate(momenta.values())},
        "masks": {str(i): generator.get_state() for i, generator in enumerate(generators_of(head))},
        "loop": {"order": at.order, "total": at.total},
        **{f"memory{i}": each.state() for i, each in enumerate(stateful)},
    }
    tensors = {
        f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()
    }
    return Checkpoint(
        {"epoch": at.epoch, "step": at.step, "history": dataclasses.asdict(at.history)}, tensors
    )


def unpack(
    checkpoint: Checkpoint,
    head: nn.Module,
    momenta: Mapping[Tensor, Tensor],
    stateful: Sequence[Stateful],
) -> Position:
    """The inverse of ``pack``: fill head, momenta and memories, and say where to go on."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    weights = head.state_dict()
    load("weights", parts.get("head", {}), weights)
    kept = parts.get("kept", {})
    if kept:
        load(
            "kept weights",
            kept,
            {name: torch.empty_like(tensor) for name, tensor in weights.items()},
        )
    device = next(iter(weights.values())).device
    known = {str(i): momentum for i, momentum in enumerate(momenta.values())}
    for name, momentum in parts.get("momentum", {}).items():
        if name not in known or momentum.shape != known[name].shape:
            raise DataError(
                f"a checkpoint has momentum {name!r} of shape {tuple(momentum.shape)} for no weight here."
            )
        known[name].copy_(momentum)
    masks = {str(i): generator.get_state() for i, generator in enumerate(generators_of(head))}
    load("states of masks", parts.get("masks", {}), masks)
    for i, generator in enumerate(generators_of(head)):
        generator.set_state(masks[str(i)])
    for i, each in enumerate(stateful):
        each.restore(parts.get(f"memory{i}", {}))
    loop = {"order": torch.Generator().get_state(), "total": torch.zeros(())}
    load("state of the loop", parts.get("loop", {}), loop)
    total, history = loop["total"].to(device), _history(checkpoint.position)
    return Position(loop["order"], total, *checkpoint.numbers(), kept, history)


def generators_of(head: nn.Module) -> list[torch.Generator]:
    """Generators of the masks of a head."""
    return [module.generator for module in head.modules() if isinstance(module, Dropout)]


def load(what: str, found: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names."""
    kinds = [
        {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        for tensors in (found, into)
    ]
    if kinds[0] != kinds[1]:
        differing = sorted(kinds[0].keys() ^ kinds[1].keys()) or [
            n for n in kinds[0] if kinds[0][n] != kinds[1][n]
        ]
        raise DataError(
            f"the {what} of a checkpoint do not fit; they differ in {', '.join(differing[:4])}."
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(found[name])


def _history(position: Mapping[str, Any]) -> History:
    found = position.get("history")
    if not isinstance(found, dict) or found.keys() != {"loss", "validation_auroc", "kept_epoch"}:
        raise DataError("a checkpoint has no history.")
    lists = found["loss"], found["validation_auroc"]
    numbers = all(isinstance(values, list) and all(map(_is_finite, values)) for values in lists)
    if not numbers or type(found["kept_epoch"]) is not int:
        raise DataError("the history of a checkpoint is not of numbers.")
    return History(list(lists[0]), list(lists[1]), found["kept_epoch"])


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
