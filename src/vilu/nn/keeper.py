"""Files of checkpoints: a training run's two newest, each ``NNNNNNNN.safetensors`` and ``NNNNNNNN.json``.

The second is written last: it has the hash of the tensors, how far the run is, and what it is a run of.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.files import TEMPORARY, atomic_write, make_folder, write_json
from vilu.nn.world import World
from vilu.space import digest

SCHEMA = 1
RECORD = re.compile(r"(\d{8,})\.json")
OURS = re.compile(r"\d{8,}\.(json|safetensors)")
MAX_RECORD_BYTES = 64 << 20

Binding = Mapping[str, object]
"""What a run is a run of, as plain JSON: it must be the same when it begins again."""


class Checkpoint(NamedTuple):
    """A state of training.

    Attributes:
        position: How far it is, as plain JSON.
        tensors: Everything else.
    """

    position: dict[str, Any]
    tensors: dict[str, Tensor]

    def numbers(self) -> tuple[int, int]:
        """Finished epochs, and finished steps of the next one.

        Raises:
            DataError: If they are not there.
        """
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
    """Keeps the two newest checkpoints of one run in a folder; of several processes the leading one writes.

    Args:
        folder: Where; of this run alone.
        binding: What the run is.
        every: Minutes between two checkpoints within an epoch.
        world: The processes that train together.
    """

    def __init__(self, folder: Path, binding: Binding, every: float, world: World) -> None:
        self.folder, self.every, self.world = folder, every, world
        self.binding = json.loads(json.dumps(binding))
        self.saved_at = time.monotonic()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or if that is damaged the one before it, with a warning.

        Raises:
            ProvenanceError: If it is of another run; what differs is named.
            DataError: If there are checkpoints and all are damaged.
        """
        record, weights = self._newest() if self.world.leads else (b"", b"")
        record, weights = self.world.broadcast(record), self.world.broadcast(weights)
        if not record:
            return None
        from safetensors.torch import load

        return Checkpoint(json.loads(record)["position"], load(weights))

    def due(self) -> bool:
        """Whether ``every`` minutes have passed since the last one."""
        return self.world.leads and time.monotonic() - self.saved_at >= 60 * self.every

    def save(self, make: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint, and remove those that are neither this one nor the one before it.

        Raises:
            StorageError: If the file system refuses.
        """
        if not self.world.leads:
            return
        from safetensors.torch import save

        found, serials = make(), self._serials()
        name = f"{max(serials, default=0) + 1:08d}"
        weights = save({key: tensor.detach().cpu().contiguous() for key, tensor in found.tensors.items()})
        make_folder(self.folder)
        with atomic_write(self.folder / f"{name}.safetensors") as handle:
            handle.write(weights)
        record = {
            "schema": SCHEMA,
            "binding": self.binding,
            "position": found.position,
            "tensors_sha256": hashlib.sha256(weights).hexdigest(),
        }
        write_json(self.folder / f"{name}.json", {**record, "digest": digest(record)})
        self._prune({name, f"{max(serials, default=0):08d}"})
        self.saved_at = time.monotonic()

    def _serials(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in map(RECORD.fullmatch, names) if match)

    def _prune(self, kept: set[str]) -> None:
        try:
            for path in sorted(self.folder.iterdir()):  # of a name the record goes before its tensors
                if is_ours(path.name) and path.stem not in kept:
                    path.unlink()
        except OSError as error:
            raise StorageError(f"cannot remove a checkpoint in {self.folder}: {error.strerror or error}.") from error

    def _newest(self) -> tuple[bytes, bytes]:
        serials = self._serials()
        for serial in reversed(serials):
            try:
                record, weights = read_checked(self.folder / f"{serial:08d}.json")
            except DataError as error:
                warnings.warn(f"a checkpoint is left out: {error}", stacklevel=4)
                continue
            self._require_same(record["binding"])
            return json.dumps(record).encode(), weights
        if serials:
            raise DataError(f"no checkpoint in {self.folder} is intact. Remove that folder to begin again.")
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
    """A record and the bytes of its tensors, as they were written.

    Raises:
        DataError: If one of them is not.
        ProvenanceError: If a newer schema wrote it.
        StorageError: If the file system refuses.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_RECORD_BYTES else b""
        weights = path.with_suffix(".safetensors").read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing.") from error
    except OSError as error:
        raise StorageError(f"cannot read {path.with_suffix('')}: {error.strerror or error}.") from error
    try:
        record = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not JSON.") from error
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise DataError(f"{path} does not describe a checkpoint.")
    if record["schema"] > SCHEMA:
        raise ProvenanceError(f"{path} has schema {record['schema']}; this vilu reads up to {SCHEMA}. Update vilu.")
    if record.pop("digest", None) != digest(record):
        raise DataError(f"{path} does not have the content that it was written with.")
    if hashlib.sha256(weights).hexdigest() != record["tensors_sha256"]:
        raise DataError(f"{path.with_suffix('.safetensors')} is not the file that {path.name} names.")
    return record, weights
