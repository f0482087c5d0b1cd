"""A folder that a run fills part by part: who may write, what is there, and what vouches for it.

``run.json`` says what is made and comes first; the files of a part come before its receipt, so the
part exists if and only if its receipt does and the sizes agree; ``manifest.json`` seals the whole
and comes last. Every file is written atomically, so a kill at any moment costs no more than the
part under way.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, ClassVar, Generic, Protocol, TypeVar

from pydantic import Field

from vilu.artifacts.disk import (
    LOG,
    MANIFEST,
    RUN,
    TEMPORARY,
    file_hash,
    is_leftover,
    locked,
    or_refuse,
    write_bytes,
)
from vilu.artifacts.documents import (
    Document,
    Model,
    digest,
    parse_json,
    read_bounded,
    read_document,
)
from vilu.artifacts.paths import claim_folder, entries, require_no_others
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError, ViLUError
from vilu.progress import Silence, track

OURS = re.compile(r"run\.json|classes\.json|manifest\.json|\w+\.npy|\w+\.parquet|\d+(\.json)?")
"""Names of the files that a run writes; those of marks (``Part.attempts``) are numbers alone."""

ABSENT = "it is not there"

logger = logging.getLogger(__name__)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class FileInfo(Model):
    """Size and SHA-256 of a file."""

    bytes: Count
    sha256: Sha256


class AnyPart(Protocol):
    """A share of the work, with the names of its files."""

    @property
    def number(self) -> int:
        """From 0."""

    @property
    def receipt(self) -> str:
        """Written last."""

    @property
    def files(self) -> tuple[str, ...]:
        """What the receipt vouches for, in the order in which it is written."""


class AnyReceipt(Document):
    """Vouches for the files of a part, by name; each kind says itself where among its fields these two stand."""

    if TYPE_CHECKING:
        fingerprint: str
        files: dict[str, FileInfo]


P = TypeVar("P", bound=AnyPart)
R = TypeVar("R", bound=AnyReceipt)


class Ledger(ABC, Generic[P, R]):
    """What a run has to do in its folder, and what is done."""

    what: ClassVar[
        str
    ]  # what the folder is, what makes it, and what a process that holds it does: for messages
    command: ClassVar[str]
    doing: ClassVar[str]
    kind: ClassVar[str | None] = None  # what its run.json calls it
    documents: ClassVar[tuple[str, ...]] = (RUN, MANIFEST, LOG)
    folders: ClassVar[tuple[str, ...]]  # its sub-folders, those that only some runs have included

    def __init__(self, root: Path, fingerprint: str, parts: Sequence[P], kind: type[R]) -> None:
        self.root, self.fingerprint, self.parts, self._kind = root, fingerprint, parts, kind

    @classmethod
    @contextmanager
    def claim(cls, root: Path, patience: float = 0.0) -> Iterator[None]:
        """Make the folder and hold its lock; the system lets go of it when the process dies."""
        cls.check_place(root)
        with or_refuse(f"write to {root}"):
            root.mkdir(parents=True, exist_ok=True)
        with locked(root, cls.doing, patience):
            yield

    @classmethod
    def check_place(cls, root: Path, *, overwrite: bool = False) -> None:
        """Refuse a folder with anything but a run of this kind; to be overwritten, also one with more than that."""
        is_new = not root.is_dir() or not entries(
            root
        )  # seen before its run.json: another process may begin just now
        begun = is_new or cls.has_begun(root)
        if not begun and (root / RUN).is_file():
            raise UsageError(
                f"{root / RUN} is of no {cls.what}, so nothing there is touched. Give a new folder."
            )
        claim_folder(root, cls.what, lambda _: False, same=begun)
        if overwrite and root.is_dir():
            require_no_others(root, cls.what, cls._others(root))

    @classmethod
    def has_begun(cls, root: Path) -> bool:
        """Whether a run of this kind has begun in a folder, as far as its ``run.json`` can be read."""
        if not (root / RUN).is_file():
            return False
        try:
            return (
                parse_json(read_bounded(root / RUN, "Give another folder", DataError)).get("kind")
                == cls.kind
            )
        except (ValueError, RecursionError):
            return True  # who reads it says what is wrong with it

    @classmethod
    def _others(cls, root: Path) -> Iterator[Path]:
        """What lies in the folder that no run has written."""
        for path in entries(root):
            if path.name in {"receipts", *cls.folders} and path.is_dir():
                yield from (file for file in entries(path) if not OURS.fullmatch(file.name))
            elif path.name not in cls.documents:
                yield path

    @classmethod
    def require_begun(cls, root: Path) -> None:
        """Refuse a folder of something else."""
        if not (root / RUN).is_file():
            raise DataError(
                f"{root} is no {cls.what} (it has no {RUN}). Make one with `{cls.command}`."
            )

    @classmethod
    def require_sealed(cls, root: Path) -> None:
        """Refuse a folder of something else, or one that is not complete."""
        cls.require_begun(root)
        if not (root / MANIFEST).is_file():
            made = cls.made_by(root)
            raise DataError(
                f"{root} is not complete. Run the same `{made}` again: it goes on where it stopped."
            )

    @classmethod
    def made_by(cls, root: Path) -> str:  # noqa: ARG003 - where several commands make such folders, it is asked
        """The command that has begun a folder."""
        return cls.command

    def begin(self, run: Document, folders: Iterable[str]) -> None:
        """Leave what the run is, unless it is there, and the sub-folders, without what killed processes left."""
        if not (self.root / RUN).is_file():
            run.write(self.root / RUN)
        with or_refuse(f"prepare {self.root}"):
            for name in folders:
                (self.root / name).mkdir(exist_ok=True)
        self.clean()

    def clean(self) -> None:
        """Remove what killed processes left half-written, and nothing that another one, here or elsewhere, writes."""
        with or_refuse(f"clean {self.root}"):
            for folder in (self.root, *(self.root / name for name in self.folders)):
                for path in folder.iterdir() if folder.is_dir() else ():
                    match = TEMPORARY.fullmatch(path.name)
                    if match and OURS.fullmatch(match["name"]) and is_leftover(path):
                        path.unlink(missing_ok=True)

    def seal(self, manifest: Document) -> None:
        """Mark the folder as complete."""
        manifest.write(self.root / MANIFEST)

    def unseal(self) -> None:
        """Mark the folder as not complete."""
        with or_refuse(f"change {self.root}"):
            (self.root / MANIFEST).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what a run wrote, if nothing else lies there; ``run.json`` last, so that a kill leaves a run."""
        self.check_place(self.root, overwrite=True)
        self.unseal()
        with or_refuse(f"remove the old {self.what} in {self.root}"):
            for name in ("receipts", *self.folders):
                if (self.root / name).is_dir():
                    shutil.rmtree(self.root / name)
            for name in (*self.documents[1:], RUN):
                (self.root / name).unlink(missing_ok=True)

    @abstractmethod
    def said(self, part: P, receipt: R) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """What a receipt says of its part, and what it should say."""

    def receipt(self, part: P) -> R:
        """The receipt of a part that is there in full."""
        path, again = self.root / part.receipt, self._kind.again
        receipt = read_document(path, self._kind)
        if receipt.fingerprint != self.fingerprint:
            raise ProvenanceError(
                f"{path} belongs to run {receipt.fingerprint}, the folder to run {self.fingerprint}. "
                f"{again} to redo the part."
            )
        said, expected = self.said(part, receipt)
        found, expected = (*said, tuple(receipt.files)), (*expected, part.files)
        if found != expected:
            raise StorageError(
                f"{path} is damaged: it describes {found}, expected {expected}. {again}."
            )
        for name, info in receipt.files.items():
            size = (self.root / name).stat().st_size if (self.root / name).is_file() else None
            if size != info.bytes:
                state = "is missing" if size is None else f"has {size} bytes"
                raise StorageError(
                    f"{self.root / name} {state}, its receipt says {info.bytes} bytes. {again} to redo the part."
                )
        return receipt

    def look_up(self, part: P, *, deep: bool = True) -> R | str:
        """The receipt of a part that is there in full, or else what it lacks; ``deep``: its bytes are looked at too."""
        if not (self.root / part.receipt).exists():
            return ABSENT
        try:
            receipt = self.receipt(part)
            files = Vouched(self.root, [receipt])
            for name in part.files if deep else ():
                files(name)
        except ViLUError as error:
            return str(error)
        return receipt

    def survey(self, *, deep: bool = True) -> tuple[list[P], list[R]]:
        """Parts to do, and the receipts of the others."""
        missing, receipts = [], []
        reads = deep and any((self.root / part.receipt).exists() for part in self.parts)
        with (
            track("Checking parts", len(self.parts), "parts")
            if reads
            else nullcontext(Silence()) as task
        ):
            for part in self.parts:
                found = self.look_up(part, deep=deep)
                task.advance(1)
                if not isinstance(found, str):
                    receipts.append(found)
                    continue
                missing.append(part)
                if found != ABSENT:
                    logger.warning("part %d is done again: %s", part.number, found)
        return missing, receipts

    def verify(self) -> None:
        """Read every byte of every part, and compare it with what was written."""
        for receipt in self.receipts():
            for name, info in receipt.files.items():
                require_hash(self.root / name, info.sha256, self._kind.again)

    def receipts(self) -> list[R]:
        """Those of all parts, each of which must be there in full."""
        return [self.receipt(part) for part in self.parts]

    def write(
        self, part: P, payloads: Mapping[str, bytes], receipt_of: Callable[[dict[str, FileInfo]], R]
    ) -> R:
        """Write the files of a part and then its receipt, each atomically; a kill in between leaves no part."""
        receipt = receipt_of(
            {name: write_hashed(self.root / name, payloads[name]) for name in part.files}
        )
        receipt.write(self.root / part.receipt)
        return receipt


def write_hashed(path: Path, payload: bytes) -> FileInfo:
    """Write a file atomically; its size and hash are of what was meant to be written."""
    write_bytes(path, payload)
    return FileInfo(bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest())


def require_hash(path: Path, sha256: str, again: str, voucher: str = "its receipt") -> None:
    """Refuse a file with other bytes than those that its voucher names."""
    if file_hash(path) != sha256:
        raise StorageError(
            f"{path} is damaged: it does not hold the bytes that {voucher} vouches for. {again}."
        )


_verified: set[tuple[int | str, ...]] = set()
_verifying = Lock()


def _unlock_in_child() -> None:
    global _verifying  # noqa: PLW0603 - a thread that held it stayed behind in the parent
    _verifying = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def alone() -> Lock:
    """The lock of what one thread does at a time; a forked process finds it open."""
    return _verifying


def require_hash_once(path: Path, sha256: str, again: str, voucher: str = "its receipt") -> Path:
    """The path of a file, which ``require_hash`` has let pass in this process.

    The bytes are read again only if the system says that the file is another one or was written to
    since (device, inode, size, times). What happens to a file after it was opened is not seen.
    Threads may ask at the same time.
    """
    with or_refuse(f"read {path}"):
        found = path.stat()
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, sha256)
    with alone():
        if key not in _verified:
            require_hash(path, sha256, again, voucher)
            _verified.add(key)
    return path


class Vouched:
    """Files of parts by name: the path of each, once its bytes are those of its receipt (``require_hash_once``)."""

    def __init__(self, root: Path, receipts: Sequence[AnyReceipt]) -> None:
        self._root, self._again = root, receipts[0].again if receipts else ""
        self._sha256 = {
            name: info.sha256 for receipt in receipts for name, info in receipt.files.items()
        }

    def __call__(self, name: str) -> Path:
        """The path of one; StorageError if it is damaged."""
        return require_hash_once(self._root / name, self._sha256[name], self._again)


class Reopened:
    """What lies in a folder and is pickled as its path: opened again where it arrives, and refused if it has changed.

    Attributes:
        path: The folder.
        seal: Hash of what makes it another one.
        options: What it was opened with beside the path.
    """

    path: Path
    seal: str
    options: Mapping[str, object] = {}

    def __reduce__(
        self,
    ) -> tuple[Callable[..., Reopened], tuple[object, ...], dict[str, object] | None]:
        # what ``without`` has set is in no file
        own = (
            {name: vars(self)[name] for name in ("_left", "usable_rows", "status")}
            if "_left" in vars(self)
            else None
        )
        return reopen, (type(self), self.path.absolute(), dict(self.options), self.seal), own


def reopen(
    kind: Callable[..., Reopened], path: Path, options: Mapping[str, object], seal: str
) -> Reopened:
    """What was pickled, from its folder; ProvenanceError if that is another one now."""
    found = kind(path, **options)
    if found.seal != seal:
        raise ProvenanceError(
            f"{path} has changed since it was pickled: its fingerprint was {seal} and is now {found.seal}. "
            "Open it again and repeat what was begun with it."
        )
    return found


def content_hash(receipts: Iterable[AnyReceipt]) -> str:
    """Hash over the hashes of every file of every part, in order."""
    return digest([info.sha256 for receipt in receipts for info in receipt.files.values()])
