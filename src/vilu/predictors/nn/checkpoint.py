"""Checkpoints of training: their content, when they are written, and how they are checked.

They are written when an epoch ends. A resumed run ends with the very bits of an undisturbed one. So
a checkpoint holds all that later epochs depend on: weights, momenta, states of the generators and
memories of the loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from vilu.artifacts.documents import read_json, write_json
from vilu.artifacts.hashing import bytes_hash, digest, tensor_hash, tensors_hash
from vilu.callers import warn_caller
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors.nn.head import Dropout
from vilu.predictors.nn.processes import World, current_world

RECORD = re.compile(r"(\d{8,})\.json")
OURS = re.compile(r"\d{8,}\.(json|safetensors)")
AGAIN = "Remove it, and run the training again"

Binding = Mapping[str, object]
"""The inputs of a run, as plain JSON: they must be the same when it goes on."""


class Checkpoint(NamedTuple):
    """A state of training: how far it is, as plain JSON, and the tensors of everything else."""

    position: dict[str, Any]
    tensors: dict[str, Tensor]

    def n_epochs(self) -> int:
        """Finished epochs."""
        epoch = self.position.get("epoch")
        if not _is_count(epoch):
            raise DataError(f"a checkpoint says epoch {epoch!r}.")
        return int(self.position["epoch"])


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


class Keeper:
    """Keeps nothing; the base of those that do."""

    def latest(self) -> Checkpoint | None:
        """The checkpoint to go on from; None: begin at the beginning."""
        return None

    def save(self, make: Callable[[], Checkpoint]) -> None:
        """Keep a state; ``make`` is called only where it is written."""


class FolderKeeper(Keeper):
    """Keeps the two newest checkpoints of one run in its folder.

    Of several processes the leading one writes.
    """

    def __init__(self, folder: Path, binding: Binding, world: World) -> None:
        self.folder = folder
        self.world = world
        # as it will be read back: tuples are lists there
        self.binding = json.loads(json.dumps(binding))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or if that is damaged the one before it, with a warning."""
        record, weights = self.world.call_on_leader(self._newest) or (b"", b"")
        # every process takes the leading one's bytes: their disks may differ
        record = self.world.broadcast(record)
        weights = self.world.broadcast(weights)
        if not record:
            return None
        return Checkpoint(json.loads(record)["position"], safetensors_torch.load(weights))

    def save(self, make: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint, and remove those that are neither this one nor the one before it."""
        self.world.call_on_leader(lambda: self._write(make()))

    def _write(self, checkpoint: Checkpoint) -> None:
        last = max(self._serials(), default=0)
        name = f"{last + 1:08d}"
        tensors = {}
        for key, tensor in checkpoint.tensors.items():
            tensors[key] = tensor.detach().cpu().contiguous()
        weights = safetensors_torch.save(tensors)
        record = {
            "binding": self.binding,
            "position": checkpoint.position,
            "tensors_sha256": bytes_hash(weights),
        }
        # A process may be killed at any moment. The record is written last, and names the bytes of
        # its tensors, so that what has a record is whole. Older checkpoints go only after that.
        make_folder(self.folder)
        write_bytes(self.folder / f"{name}.safetensors", weights)
        write_json(self.folder / f"{name}.json", record)
        self._prune({name, f"{last:08d}"})

    def _serials(self) -> list[int]:
        """Numbers of the checkpoints in the folder, ascending."""
        if not self.folder.is_dir():
            return []
        serials = []
        for path in self.folder.iterdir():
            match = RECORD.fullmatch(path.name)
            if match:
                serials.append(int(match[1]))
        return sorted(serials)

    def _prune(self, names_to_keep: set[str]) -> None:
        """Remove all checkpoints but these."""
        with or_refuse(f"remove a checkpoint in {self.folder}"):
            # sorted: the record of a checkpoint goes before its tensors
            for path in sorted(self.folder.iterdir()):
                if is_ours(path.name) and path.stem not in names_to_keep:
                    path.unlink()

    def _newest(self) -> tuple[bytes, bytes]:
        """Record and tensors of the newest intact checkpoint; empty where there is none at all."""
        serials = self._serials()
        faults = []
        for serial in reversed(serials):
            try:
                record, weights = read_checked(self.folder / f"{serial:08d}.json")
            except DataError as error:
                faults.append(str(error))
                warn_caller(f"a checkpoint is left out: {error}")
                continue
            self._require_same(record["binding"])
            return json.dumps(record).encode(), weights
        if serials:
            raise DataError(
                f"no checkpoint in {self.folder} is intact. {' '.join(faults)} "
                "Remove that folder to begin again."
            )
        return b"", b""

    def _require_same(self, written: dict[str, object]) -> None:
        """Refuse the binding of another run."""
        here = self.binding
        differences = []
        for key in sorted(written.keys() | here.keys()):
            if written.get(key) != here.get(key):
                differences.append(f"{key}: {written.get(key)!r} there, {here.get(key)!r} here")
        if differences:
            raise ProvenanceError(
                f"the checkpoints in {self.folder} are of another training run; "
                f"{'; '.join(differences)}. "
                "Go on with what they were made with, drop them (--restart), "
                "or give another folder."
            )


def is_ours(name: str) -> bool:
    """Whether a file is of a checkpoint, finished or half-written."""
    temporary = TEMPORARY.fullmatch(name)
    if temporary:
        name = temporary["name"]
    return OURS.fullmatch(name) is not None


def read_checked(path: Path) -> tuple[dict[str, Any], bytes]:
    """A record and the bytes of its tensors, checked to be as they were written."""
    record = read_json(path, AGAIN)
    has_binding = isinstance(record.get("binding"), dict)
    has_position = isinstance(record.get("position"), dict)
    if not (has_binding and has_position):
        raise DataError(f"{path} is damaged: it lacks a binding and a position. {AGAIN}.")
    beside = path.with_suffix(".safetensors")
    if not beside.is_file():
        raise DataError(f"{beside} is missing.")
    with or_refuse(f"read {beside}"):
        weights = beside.read_bytes()
    if bytes_hash(weights) != record.get("tensors_sha256"):
        raise DataError(f"{beside} is not the file that {path.name} names.")
    return record, weights


RUN = re.compile(r"run_\d+")
NAMED = "fit.txt"
SAMPLED_IDS = 1024
SAMPLED_ROWS = 64


class Session:
    """Hands out keepers, one per training run in their order."""

    def keeper(self, binding: Callable[[], Binding]) -> Keeper:  # noqa: ARG002
        """The keeper of the next training run; ``binding`` is called only by one that keeps."""
        return Keeper()


class FolderSession(Session):
    """Runs that are kept in the sub-folders of a folder."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self.world = world
        self.n_runs = 0
        self.removed = False

    def keeper(self, binding: Callable[[], Binding]) -> Keeper:
        """The keeper of the next training run."""
        # runs are told apart by their order, which is the same when a fit begins again
        folder = self.folder / f"run_{self.n_runs}"
        self.n_runs += 1
        return FolderKeeper(folder, binding(), self.world)

    def name_fit(self, inputs: str) -> None:
        """Write down the inputs of the fit, for ``named``."""
        self.world.call_on_leader(lambda: write_text(self.folder / NAMED, inputs))

    def named(self) -> str | None:
        """The inputs of the fit, as written down by ``name_fit``; None where nothing is."""
        path = self.folder / NAMED
        with or_refuse(f"read {path}"):
            if not path.is_file():
                return None
            return path.read_text()

    def runs(self) -> list[Path]:
        """Folders of runs that are there."""
        return sorted(path for path in self.folder.iterdir() if RUN.fullmatch(path.name))

    def remove(self) -> None:
        """Remove the checkpoints: the result of the training is saved."""
        if self.world.leads:
            with or_refuse(f"remove the checkpoints in {self.folder}"):
                for run in self.runs():
                    shutil.rmtree(run)
                (self.folder / NAMED).unlink(missing_ok=True)
        self.removed = self.world.leads


# the default is shared by all contexts, which does no harm: it has no state
_session: ContextVar[Session] = ContextVar("session", default=Session())  # noqa: B039


def current_session() -> Session:
    """The session of a ``with checkpointing()`` block; outside one it keeps nothing."""
    return _session.get()


@contextmanager
def checkpointing(folder: str | Path, *, resume: bool = False) -> Iterator[FolderSession]:
    """Keep checkpoints of the training in a ``with`` block, one at the end of every epoch.

    Where several processes train together, this block stands inside theirs
    (``vilu.predictors.nn.processes.world``).

    Args:
        folder: Where; made where it is missing.
        resume: Go on from the checkpoints in the folder, where there are some.

    Raises:
        UsageError: If there are checkpoints and ``resume`` is not wanted.
        BusyError: If another process trains with this folder.
        StorageError: If the file system refuses.
    """
    session = FolderSession(make_folder(folder), current_world())
    lock: AbstractContextManager[object] = nullcontext()
    if session.world.leads:  # the leading process alone touches the folder
        lock = locked(session.folder, "training with the checkpoints in")
    with lock:
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
        _remove_empty(session.folder)


def _remove_empty(folder: Path) -> None:
    """Remove the lock, and the folder unless somebody has put something else into it."""
    with or_refuse(f"remove {folder}"):
        (folder / LOCK).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def data_fingerprint(source: EmbeddingSource, rows: Tensor) -> str:
    """Hash of some rows of a source.

    It covers which rows they are, their targets and space, and a sample of their identifiers and
    embeddings.
    """
    numbers = {
        "rows": rows,
        "target": source.target[rows],
        "image": source.image_rows(spread(rows, SAMPLED_ROWS)),
    }
    ids = [source.ids[row] for row in spread(rows, SAMPLED_IDS).tolist()]
    content = tensors_hash(numbers)
    return digest([source.space.fingerprint, source.n_candidates, source.pool_size, ids, content])


def text_fingerprint(source: EmbeddingSource, rows: Tensor) -> str:
    """Hash of the candidates of some rows: of all shared ones, or of a sample of the captions."""
    text = source.candidates(spread(rows, SAMPLED_ROWS)).text
    return tensor_hash(text)


def spread(rows: Tensor, n: int) -> Tensor:
    """At most ``n`` of the rows (M,), evenly spaced."""
    if not len(rows):
        return rows
    n_places = min(n, len(rows))
    places = torch.linspace(0, len(rows) - 1, n_places, dtype=torch.float64).long()
    return rows[places]


class Stateful(Protocol):
    """Something in a training step that remembers earlier batches."""

    def state(self) -> dict[str, Tensor]:
        """Its memory."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over a ``state``; must refuse tensors of the wrong names or shapes."""


@dataclass
class History:
    """Figures of each epoch; ``kept_epoch`` is the one whose weights were kept (0-based)."""

    loss: list[float] = field(default_factory=list)
    validation_auroc: list[float] = field(default_factory=list)
    kept_epoch: int = -1


@dataclass
class Position:
    """How far a training run is.

    Attributes:
        epoch: Finished epochs.
        chosen_weights: Weights of the epoch that validation chose.
        history: Figures of the finished epochs.
    """

    epoch: int = 0
    chosen_weights: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=History)


def pack(
    at: Position,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    stateful: Sequence[Stateful],
) -> Checkpoint:
    """Everything that the rest of a training run depends on.

    ``order`` is the generator of the shuffling.
    """
    parts: dict[str, Mapping[str, Tensor]] = {
        "head": head.state_dict(),
        "kept": at.chosen_weights,
        "momentum": _momenta(optimizer),
        "masks": _mask_states(head),
        "loop": {"order": order.get_state()},
    }
    for i, memory in enumerate(stateful):
        parts[f"memory{i}"] = memory.state()
    tensors = {}
    for part, content in parts.items():
        for name, tensor in content.items():
            tensors[f"{part}.{name}"] = tensor
    history = dataclasses.asdict(at.history)
    return Checkpoint({"epoch": at.epoch, "history": history}, tensors)


def unpack(
    checkpoint: Checkpoint,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    stateful: Sequence[Stateful],
) -> Position:
    """The inverse of ``pack``: fill all of these, and return the position."""
    parts = _parts(checkpoint)
    weights = head.state_dict()  # shares memory with the head
    load("weights", parts.get("head", {}), weights)
    chosen_weights = parts.get("kept", {})
    _require_same_kinds("kept weights", chosen_weights, weights)
    _load_momenta(parts.get("momentum", {}), optimizer)
    _load_masks(parts.get("masks", {}), head)
    for i, memory in enumerate(stateful):
        memory.restore(parts.get(f"memory{i}", {}))
    loop = {"order": order.get_state()}
    load("state of the loop", parts.get("loop", {}), loop)
    order.set_state(loop["order"])
    return Position(checkpoint.n_epochs(), chosen_weights, _history(checkpoint.position))


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Tensors of each part, by their names in it."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        part, _, name_in_part = name.partition(".")
        parts.setdefault(part, {})[name_in_part] = tensor
    return parts


def _momenta(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The momentum of each parameter that has learned, by its number."""
    momenta = {}
    for number, state in optimizer.state_dict()["state"].items():
        if state["momentum_buffer"] is not None:  # without momentum there is none
            momenta[str(number)] = state["momentum_buffer"]
    return momenta


def _load_momenta(saved: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter that learns its saved momentum; refuse where some are missing."""
    groups = [group["params"] for group in optimizer.param_groups]
    expected = {}
    for name, parameter in _numbered(itertools.chain(*groups)).items():
        if parameter.requires_grad and optimizer.defaults["momentum"]:
            expected[name] = parameter
    _require_same_kinds("momenta", saved, expected)
    momenta = {int(name): {"momentum_buffer": momentum} for name, momentum in saved.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": momenta})


def _load_masks(saved: Mapping[str, Tensor], head: nn.Module) -> None:
    states = _mask_states(head)
    load("states of masks", saved, states)
    for generator, state in zip(generators_of(head), states.values(), strict=True):
        generator.set_state(state)


def _mask_states(head: nn.Module) -> dict[str, Tensor]:
    return _numbered([generator.get_state() for generator in generators_of(head)])


def _numbered(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def generators_of(head: nn.Module) -> list[torch.Generator]:
    """Generators of the masks of a head."""
    return [module.generator for module in head.modules() if isinstance(module, Dropout)]


def load(what: str, saved: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names, shapes and types."""
    _require_same_kinds(what, saved, into)
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


def _require_same_kinds(
    what: str, saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Refuse tensors of other names, shapes or types."""
    saved_kinds = _kinds(saved)
    expected_kinds = _kinds(expected)
    if saved_kinds == expected_kinds:
        return
    differing = sorted(saved_kinds.keys() ^ expected_kinds.keys())
    if not differing:
        differing = [name for name in saved_kinds if saved_kinds[name] != expected_kinds[name]]
    raise DataError(
        f"the {what} of a checkpoint do not fit; they differ in {', '.join(differing[:4])}."
    )


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _history(position: Mapping[str, Any]) -> History:
    """The history in a position, which must be one of numbers."""
    history = position.get("history")
    names = {"loss", "validation_auroc", "kept_epoch"}
    if not isinstance(history, dict) or history.keys() != names:
        raise DataError("a checkpoint has no history.")
    loss = history["loss"]
    validation_auroc = history["validation_auroc"]
    kept_epoch = history["kept_epoch"]
    has_numbers = _is_list_of_numbers(loss) and _is_list_of_numbers(validation_auroc)
    if not has_numbers or type(kept_epoch) is not int:
        raise DataError("the history of a checkpoint is not of numbers.")
    return History(list(loss), list(validation_auroc), kept_epoch)


def _is_list_of_numbers(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_finite, values))


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
