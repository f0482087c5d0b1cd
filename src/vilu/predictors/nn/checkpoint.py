"""Training checkpoints: their content, and when checkpoints are written and checked.

A checkpoint is written at the end of an epoch. A resumed run gives the same weights as an
uninterrupted run, bit for bit. So a checkpoint has everything needed for later epochs: weights,
momenta, generator states, and the states of losses that remember earlier batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from vilu.artifacts.disk import (
    LOCK_FILE,
    TEMPORARY_NAME,
    convert_os_errors,
    locked,
    make_folder,
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

RECORD_NAME = re.compile(r"(\d{8,})\.json")
"""Name of a checkpoint's record: the serial number, in at least eight digits ("00000012.json")."""
CHECKPOINT_FILE_NAME = re.compile(r"\d{8,}\.(json|safetensors)")
"""Name of one of a checkpoint's two files: the record, or the tensors ("00000012.safetensors")."""
RERUN_ADVICE = "Remove it, and run the training again"
"""Advice in messages about a damaged file."""

RunInputs = Mapping[str, object]
"""A training run's inputs, as plain JSON. Only a run with the same inputs is resumed."""


class Checkpoint(NamedTuple):
    """A training state.

    ``position`` is plain JSON: how many epochs are finished, with the losses and AUROCs in these
    epochs. ``tensors`` has everything else.
    """

    position: dict[str, Any]
    tensors: dict[str, Tensor]

    def n_epochs(self) -> int:
        """Read the number of finished epochs. Refuse a position without a count."""
        epoch = self.position.get("epoch")
        if not _is_count(epoch):
            raise DataError(f"a checkpoint has {epoch!r} as its number of finished epochs.")
        return int(self.position["epoch"])


def _is_count(number: object) -> bool:
    """Return whether a value is an integer of at least 0."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


class CheckpointSaver:
    """Saves a training run's checkpoints, and finds the latest checkpoint.

    This base class saves nothing.
    """

    def latest_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, or None to start from the beginning."""
        return None

    def save(self, make_checkpoint: Callable[[], Checkpoint]) -> None:
        """Save the result of ``make_checkpoint``.

        ``make_checkpoint`` is called only in a process that writes the checkpoint.
        """


class FolderCheckpointSaver(CheckpointSaver):
    """Keeps a training run's two newest checkpoints in a folder.

    If several processes train together, only the leading process writes.
    """

    def __init__(self, folder: Path, run_inputs: RunInputs, world: World) -> None:
        self.folder = folder
        self.world = world
        # JSON has no tuples, so the inputs read from a checkpoint have lists instead. This run's
        # inputs are converted in the same way, to compare both.
        inputs_text = json.dumps(run_inputs)
        self.run_inputs = json.loads(inputs_text)

    def latest_checkpoint(self) -> Checkpoint | None:
        """Return the newest intact checkpoint. Warn about damaged checkpoints."""
        # Only the leading process reads, because the other processes may have other disks. In the
        # other processes the call returns None, and ``broadcast`` gives them the leader's bytes.
        record, weight_bytes = self.world.call_on_leader(self._read_newest) or (b"", b"")
        record = self.world.broadcast(record)
        weight_bytes = self.world.broadcast(weight_bytes)
        if not record:
            return None
        position = json.loads(record)["position"]
        tensors = safetensors_torch.load(weight_bytes)
        return Checkpoint(position, tensors)

    def save(self, make_checkpoint: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint. Of the older checkpoints, keep only the newest."""

        def write_checkpoint() -> None:
            checkpoint = make_checkpoint()
            self._write(checkpoint)

        self.world.call_on_leader(write_checkpoint)

    def _write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint under the next serial number, and keep a single older checkpoint."""
        previous_serial = max(self._serials(), default=0)
        previous_name = f"{previous_serial:08d}"
        name = f"{previous_serial + 1:08d}"
        tensors = {}
        for key, tensor in checkpoint.tensors.items():
            detached_tensor = tensor.detach()
            tensors[key] = detached_tensor.cpu().contiguous()
        weight_bytes = safetensors_torch.save(tensors)
        record = {
            "binding": self.run_inputs,
            "position": checkpoint.position,
            "tensors_sha256": bytes_hash(weight_bytes),
        }
        # The process may be killed at any moment. The record is written after the tensors, so a
        # checkpoint with a record is complete. Older checkpoints are removed last.
        make_folder(self.folder)
        write_bytes(self.folder / f"{name}.safetensors", weight_bytes)
        write_json(self.folder / f"{name}.json", record)
        self._prune(names_to_keep={name, previous_name})

    def _serials(self) -> list[int]:
        """List the serial numbers of the checkpoints in the folder, ascending."""
        if not self.folder.is_dir():
            return []
        serials = []
        for path in self.folder.iterdir():
            match = RECORD_NAME.fullmatch(path.name)
            if match:
                serials.append(int(match[1]))
        return sorted(serials)

    def _prune(self, names_to_keep: set[str]) -> None:
        """Remove all checkpoint files except the files in ``names_to_keep``."""
        with convert_os_errors(f"cannot remove a checkpoint in {self.folder}"):
            # The paths are sorted, so a checkpoint's record (.json) is removed before its tensors
            # (.safetensors). No record is left without tensors.
            for path in sorted(self.folder.iterdir()):
                if is_checkpoint_file(path.name) and path.stem not in names_to_keep:
                    path.unlink()

    def _read_newest(self) -> tuple[bytes, bytes]:
        """Read the newest intact checkpoint. Return its record and its tensors, as bytes.

        If the folder has no checkpoints, both are empty.

        Raises:
            DataError: If all checkpoints are damaged.
        """
        serials = self._serials()
        faults = []
        for serial in reversed(serials):
            try:
                record, weight_bytes = read_checkpoint_files(self.folder / f"{serial:08d}.json")
            except DataError as error:
                faults.append(str(error))
                warn_caller(f"a checkpoint is left out: {error}")
                continue
            self._require_same_inputs(record["binding"])
            return json.dumps(record).encode(), weight_bytes
        if serials:
            raise DataError(
                f"no checkpoint in {self.folder} is intact. {' '.join(faults)} "
                "Remove that folder to begin again."
            )
        return b"", b""

    def _require_same_inputs(self, saved_inputs: dict[str, object]) -> None:
        """Refuse a checkpoint whose run had other inputs than this run.

        ``saved_inputs`` are the "binding" in the checkpoint's record.
        """
        differences = []
        for key in sorted(saved_inputs.keys() | self.run_inputs.keys()):
            saved_value = saved_inputs.get(key)
            own_value = self.run_inputs.get(key)
            if saved_value != own_value:
                differences.append(f"{key}: {saved_value!r} there, {own_value!r} here")
        if differences:
            raise ProvenanceError(
                f"the checkpoints in {self.folder} are of another training run; "
                f"{'; '.join(differences)}. "
                "Use the settings and data of that run, remove this folder, or give another one."
            )


def is_checkpoint_file(name: str) -> bool:
    """Return whether a file has the name of a checkpoint file, or of its temporary form."""
    temporary_name = TEMPORARY_NAME.fullmatch(name)
    if temporary_name:
        name = temporary_name["name"]
    return CHECKPOINT_FILE_NAME.fullmatch(name) is not None


def read_checkpoint_files(path: Path) -> tuple[dict[str, Any], bytes]:
    """Read the record at ``path`` and the tensors' bytes, and check their hashes."""
    record = read_json(path, RERUN_ADVICE)
    has_binding = isinstance(record.get("binding"), dict)
    has_position = isinstance(record.get("position"), dict)
    if not (has_binding and has_position):
        raise DataError(f"{path} is damaged: it lacks a binding and a position. {RERUN_ADVICE}.")
    tensors_path = path.with_suffix(".safetensors")
    if not tensors_path.is_file():
        raise DataError(f"{tensors_path} is missing.")
    with convert_os_errors(f"cannot read {tensors_path}"):
        weight_bytes = tensors_path.read_bytes()
    if bytes_hash(weight_bytes) != record.get("tensors_sha256"):
        raise DataError(f"{tensors_path} is not the file that {path.name} names.")
    return record, weight_bytes


RUN_FOLDER_NAME = re.compile(r"run_\d+")
"""Name of a training run's sub-folder."""
FIT_DIGEST_FILE = "fit.txt"
"""Name of the file with the digest of a fit's inputs."""
MAX_SAMPLED_IDS = 1024
"""Largest number of identifiers in a data fingerprint."""
MAX_SAMPLED_ROWS = 64
"""Largest number of embeddings in a data fingerprint."""


class Session:
    """A fit with one or more training runs. Each run gets a ``CheckpointSaver``.

    This base class gives savers that save nothing.
    """

    def saver(self, run_inputs: Callable[[], RunInputs]) -> CheckpointSaver:  # noqa: ARG002
        """Return the saver for the next training run.

        ``run_inputs`` returns the run's inputs, and is called only if checkpoints are saved.
        """
        return CheckpointSaver()


class FolderSession(Session):
    """A fit with checkpoints in a folder, and a sub-folder for each training run."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self.world = world
        self.n_runs = 0
        self.is_removed = False

    def saver(self, run_inputs: Callable[[], RunInputs]) -> CheckpointSaver:
        """Return the saver for the next training run."""
        # A run is recognised by its number. When a fit is repeated, the runs have the same order.
        folder = self.folder / f"run_{self.n_runs}"
        self.n_runs += 1
        inputs = run_inputs()
        return FolderCheckpointSaver(folder, inputs, self.world)

    def write_fit_digest(self, inputs_digest: str) -> None:
        """Write the digest of the fit's inputs to a file."""
        self.world.call_on_leader(lambda: write_text(self.folder / FIT_DIGEST_FILE, inputs_digest))

    def read_fit_digest(self) -> str | None:
        """Read the digest written by ``write_fit_digest``. Without a digest, return None."""
        path = self.folder / FIT_DIGEST_FILE
        with convert_os_errors(f"cannot read {path}"):
            if not path.is_file():
                return None
            return path.read_text()

    def run_folders(self) -> list[Path]:
        """List the existing sub-folders with training runs."""
        return sorted(
            path for path in self.folder.iterdir() if RUN_FOLDER_NAME.fullmatch(path.name)
        )

    def remove(self) -> None:
        """Remove the checkpoints, after the training result was saved."""
        if self.world.is_leader:
            with convert_os_errors(f"cannot remove the checkpoints in {self.folder}"):
                for run_folder in self.run_folders():
                    shutil.rmtree(run_folder)
                (self.folder / FIT_DIGEST_FILE).unlink(missing_ok=True)
        # only the leading process removes the folder, at the end of ``checkpointing``
        self.is_removed = self.world.is_leader


# All contexts share the default session. Sharing is harmless, because this session has no state.
_session: ContextVar[Session] = ContextVar("session", default=Session())  # noqa: B039


def current_checkpoint_session() -> Session:
    """Return the session of the current ``with checkpointing()`` block.

    Outside such a block, the result is a session without checkpoints.
    """
    return _session.get()


@contextmanager
def checkpointing(folder: str | Path, *, resume: bool = False) -> Iterator[FolderSession]:
    """Save a checkpoint at the end of every training epoch in a ``with`` block.

    If several processes train together, the block must be inside the block of
    ``vilu.predictors.nn.processes.world``.

    Args:
        folder: Folder for the checkpoints. A missing folder is created.
        resume: Resume training from the checkpoints in the folder, if there are any.

    Raises:
        UsageError: If there are checkpoints and ``resume`` is false.
        BusyError: If another process trains with this folder.
        StorageError: If the file system refuses an operation.
    """
    session = FolderSession(Path(folder), current_world())
    with ExitStack() as lock_stack:
        # Only the leading process uses the folder. All processes raise the same error.
        session.world.call_on_leader(lambda: _claim_folder(session, lock_stack, resume=resume))
        token = _session.set(session)
        try:
            yield session
        finally:
            _session.reset(token)
    if session.is_removed:
        _remove_empty(session.folder)


def _claim_folder(session: FolderSession, lock_stack: ExitStack, *, resume: bool) -> None:
    """Make a session's folder, and lock the folder until ``lock_stack`` is closed.

    Raises:
        UsageError, BusyError, StorageError: As in ``checkpointing``.
    """
    folder = make_folder(session.folder)
    lock = locked(folder, activity="training with the checkpoints in")
    lock_stack.enter_context(lock)
    if session.run_folders() and not resume:
        raise UsageError(
            f"{folder} holds checkpoints of an earlier run. Resume it, or give another folder."
        )


def _remove_empty(folder: Path) -> None:
    """Remove the lock file, and then the folder if the folder is empty."""
    with convert_os_errors(f"cannot remove {folder}"):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def data_fingerprint(source: EmbeddingSource, rows: Tensor) -> str:
    """Hash those rows of a source whose indices are ``rows``.

    The hash depends on the indices, the targets, the embedding space, the candidate count, the pool
    size, and a sample of the identifiers and image embeddings.
    """
    rows_of_images = evenly_spaced_rows(rows, MAX_SAMPLED_ROWS)
    tensors = {
        "rows": rows,
        "target": source.target[rows],
        "image": source.image_rows(rows_of_images),
    }
    rows_of_ids = evenly_spaced_rows(rows, MAX_SAMPLED_IDS)
    ids = [source.ids[row] for row in rows_of_ids.tolist()]
    content = tensors_hash(tensors)
    return digest([source.space.fingerprint, source.n_candidates, source.pool_size, ids, content])


def text_fingerprint(source: EmbeddingSource, rows: Tensor) -> str:
    """Hash the texts of all shared candidates, or the captions of sampled rows."""
    sampled_rows = evenly_spaced_rows(rows, MAX_SAMPLED_ROWS)
    text = source.candidates(sampled_rows).text
    return tensor_hash(text)


def evenly_spaced_rows(rows: Tensor, n: int) -> Tensor:
    """Return at most ``n`` of the rows (M,), evenly spaced."""
    if not len(rows):
        return rows
    n_sampled = min(n, len(rows))
    exact_positions = torch.linspace(0, len(rows) - 1, n_sampled, dtype=torch.float64)
    positions = exact_positions.long()
    return rows[positions]


class Stateful(Protocol):
    """A part of the training step that remembers earlier batches, such as a moving average."""

    def state(self) -> dict[str, Tensor]:
        """Return what is remembered from earlier batches, as tensors by name."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Replace the memory by a ``state``. Refuse tensors with wrong names or shapes."""


@dataclass
class History:
    """Loss and validation AUROC in each epoch.

    ``kept_epoch`` is the number of the epoch whose weights are the result so far. The first epoch
    has the number 0. Before the first epoch ends, ``kept_epoch`` is -1.
    """

    loss: list[float] = field(default_factory=list)
    validation_auroc: list[float] = field(default_factory=list)
    kept_epoch: int = -1


@dataclass
class Position:
    """A training run's progress.

    Attributes:
        epoch: How many epochs are finished.
        chosen_weights: Weights from the epoch chosen by validation so far.
        history: Loss and validation AUROC in the finished epochs.
    """

    epoch: int = 0
    chosen_weights: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=History)


def pack_checkpoint(
    position: Position,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    order_generator: torch.Generator,
    stateful_parts: Sequence[Stateful],
) -> Checkpoint:
    """Make a checkpoint with everything needed for the rest of a training run.

    ``position`` is the run's progress. ``order_generator`` shuffles the rows.
    ``stateful_parts`` are the parts of a step that remember earlier batches.
    """
    parts: dict[str, Mapping[str, Tensor]] = {
        "head": head.state_dict(),
        "kept": position.chosen_weights,
        "momentum": _momenta(optimizer),
        "masks": _mask_states(head),
        "loop": {"order": order_generator.get_state()},
    }
    for i, stateful_part in enumerate(stateful_parts):
        parts[f"memory{i}"] = stateful_part.state()
    tensors = {}
    for part, content in parts.items():
        for name, tensor in content.items():
            tensors[f"{part}.{name}"] = tensor
    history = dataclasses.asdict(position.history)
    return Checkpoint({"epoch": position.epoch, "history": history}, tensors)


def unpack_checkpoint(
    checkpoint: Checkpoint,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    order_generator: torch.Generator,
    stateful_parts: Sequence[Stateful],
) -> Position:
    """Restore the head, the optimizer, the generators and the ``stateful_parts``.

    Returns the position. This is the inverse of ``pack_checkpoint``.
    """
    parts = _tensors_by_part(checkpoint)
    head_weights = head.state_dict()  # shares memory with the head, so copying sets the weights
    copy_tensors_into(head_weights, saved_tensors=parts["head"], tensors_name="weights")
    chosen_weights = parts["kept"]
    _require_same_forms("kept weights", chosen_weights, head_weights)
    _load_momenta(parts["momentum"], optimizer)
    _load_masks(parts["masks"], head)
    for i, stateful_part in enumerate(stateful_parts):
        stateful_part.restore(parts[f"memory{i}"])
    loop = {"order": order_generator.get_state()}
    copy_tensors_into(loop, saved_tensors=parts["loop"], tensors_name="state of the loop")
    order_generator.set_state(loop["order"])
    n_epochs = checkpoint.n_epochs()
    history = _history(checkpoint.position)
    return Position(n_epochs, chosen_weights, history)


def _tensors_by_part(checkpoint: Checkpoint) -> defaultdict[str, dict[str, Tensor]]:
    """Group a checkpoint's tensors by part, such as "head". Each part maps names to tensors.

    A part without tensors is an empty dictionary.
    """
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in checkpoint.tensors.items():
        part, _, name_in_part = name.partition(".")
        parts[part][name_in_part] = tensor
    return parts


def _momenta(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return each trained parameter's momentum, by parameter number."""
    momenta = {}
    states = optimizer.state_dict()["state"]
    for number, state in states.items():
        momentum = state["momentum_buffer"]
        if momentum is not None:
            momenta[str(number)] = momentum
    return momenta


def _load_momenta(saved_momenta: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Set every trained parameter's momentum. Refuse missing or further momenta."""
    # an optimizer's state numbers the parameters of all groups in sequence
    groups = [group["params"] for group in optimizer.param_groups]
    all_parameters = _keyed_by_number(itertools.chain(*groups))
    trained_parameters = {}
    for name, parameter in all_parameters.items():
        if parameter.requires_grad and optimizer.defaults["momentum"]:
            trained_parameters[name] = parameter
    _require_same_forms("momenta", saved_momenta, trained_parameters)
    momenta = {int(name): {"momentum_buffer": momentum} for name, momentum in saved_momenta.items()}
    optimizer_state = optimizer.state_dict()
    optimizer.load_state_dict({**optimizer_state, "state": momenta})


def _load_masks(saved_states: Mapping[str, Tensor], head: nn.Module) -> None:
    """Set the states of the generators for dropout masks."""
    states = _mask_states(head)
    copy_tensors_into(states, saved_tensors=saved_states, tensors_name="states of masks")
    for generator, state in zip(generators_of(head), states.values(), strict=True):
        generator.set_state(state)


def _mask_states(head: nn.Module) -> dict[str, Tensor]:
    """Return the states of the generators for dropout masks, by number."""
    states = [generator.get_state() for generator in generators_of(head)]
    return _keyed_by_number(states)


def _keyed_by_number(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Map each tensor's position in the sequence, as a string, to the tensor."""
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def generators_of(head: nn.Module) -> list[torch.Generator]:
    """Return the generators for a head's dropout masks."""
    return [module.generator for module in head.modules() if isinstance(module, Dropout)]


def copy_tensors_into(
    destination: Mapping[str, Tensor], *, saved_tensors: Mapping[str, Tensor], tensors_name: str
) -> None:
    """Copy every saved tensor into the tensor of ``destination`` with the same name.

    Both must have the same names, and tensors with the same name must have the same shape and type.
    Error messages call the tensors ``tensors_name``.
    """
    _require_same_forms(tensors_name, saved_tensors, destination)
    with torch.no_grad():
        for name, tensor in destination.items():
            tensor.copy_(saved_tensors[name])


def _require_same_forms(
    tensors_name: str, saved_tensors: Mapping[str, Tensor], expected_tensors: Mapping[str, Tensor]
) -> None:
    """Refuse saved tensors whose names, shapes or types differ from the expected tensors."""
    saved_forms = _forms(saved_tensors)
    expected_forms = _forms(expected_tensors)
    if saved_forms == expected_forms:
        return
    differing_names = sorted(saved_forms.keys() ^ expected_forms.keys())  # in only one of the two
    if not differing_names:
        differing_names = [
            name for name in saved_forms if saved_forms[name] != expected_forms[name]
        ]
    first_names = ", ".join(differing_names[:4])
    raise DataError(f"the {tensors_name} of a checkpoint do not fit; they differ in {first_names}.")


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return each tensor's shape and type, by name."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _history(position: Mapping[str, Any]) -> History:
    """Read the history in a position. Refuse a history with anything but numbers."""
    history = position.get("history")
    names = {"loss", "validation_auroc", "kept_epoch"}
    if not isinstance(history, dict) or history.keys() != names:
        raise DataError("a checkpoint has no history.")
    loss = history["loss"]
    validation_auroc = history["validation_auroc"]
    kept_epoch = history["kept_epoch"]
    has_numbers = _is_list_of_numbers(loss) and _is_list_of_numbers(validation_auroc)
    if not has_numbers or type(kept_epoch) is not int:
        raise DataError("the history in a checkpoint does not consist of numbers.")
    return History(list(loss), list(validation_auroc), kept_epoch)


def _is_list_of_numbers(values: object) -> bool:
    """Return whether a value is a list of finite floats."""
    return isinstance(values, list) and all(map(_is_finite, values))


def _is_finite(value: object) -> bool:
    """Return whether a value is a finite float."""
    return isinstance(value, float) and math.isfinite(value)
