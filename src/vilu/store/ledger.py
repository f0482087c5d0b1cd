"""A folder that a run fills part by part: who may write, what is there, and what vouches for it.

``run.json`` says what is made and comes first; the files of a part come before its receipt, so the
part exists if and only if its receipt does and the sizes agree; ``manifest.json`` seals the whole
and comes last. Every file is written atomically, so a kill at any moment costs no more than the
part under way.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from vilu.artifacts.documents import Document, Model, parse_json, read_bounded, read_document
from vilu.artifacts.hashing import bytes_hash, digest
from vilu.artifacts.paths import claim_folder, entries, require_no_others
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError, ViLUError
from vilu.progress import Silence, Task, track

OURS = re.compile(r"run\.json|classes\.json|manifest\.json|\w+\.npy|\w+\.parquet|\d+(\.json)?")
"""Names of the files that a run writes; those of marks (``Part.attempts``) are numbers alone."""

RECEIPTS = "receipts"  # folder of the receipts
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
    """Vouches for the files of a part, by name; each kind places these two among its own fields."""

    if TYPE_CHECKING:
        fingerprint: str
        files: dict[str, FileInfo]


P = TypeVar("P", bound=AnyPart)
R = TypeVar("R", bound=AnyReceipt)


class Ledger(ABC, Generic[P, R]):
    """What a run has to do in its folder, and what is done."""

    what: ClassVar[str]  # what the folder is, for messages
    command: ClassVar[str]  # what makes it, for messages
    doing: ClassVar[str]  # what a process does that holds its lock, for messages
    kind: ClassVar[str | None] = None  # what its run.json calls it
    documents: ClassVar[tuple[str, ...]] = (RUN, MANIFEST, LOG)
    folders: ClassVar[tuple[str, ...]]  # its sub-folders, those that only some runs have included

    def __init__(self, root: Path, fingerprint: str, parts: Sequence[P], kind: type[R]) -> None:
        self.root = root
        self.fingerprint = fingerprint
        self.parts = parts
        self._kind = kind

    @classmethod
    @contextmanager
    def claim(cls, root: Path, patience: float = 0.0) -> Iterator[None]:
        """Make the folder and hold its lock; the system lets go of it when the process dies."""
        # The place is checked before the folder is made: a refusal must leave nothing behind.
        cls.check_place(root)
        with or_refuse(f"write to {root}"):
            root.mkdir(parents=True, exist_ok=True)
        # The lock is for what concerns the whole folder: two drivers could otherwise seal, unseal
        # and clear it under each other's hands. Parts need none, every writer has the same bytes.
        with locked(root, cls.doing, patience):
            yield

    @classmethod
    def check_place(cls, root: Path, *, overwrite: bool = False) -> None:
        """Refuse a folder with anything but a run of this kind.

        To be overwritten, it may hold nothing but the files of that run.
        """
        # Looked at before its run.json: another process may begin here just now, and its files
        # would then be taken for somebody else's.
        is_new = not root.is_dir() or not entries(root)
        begun = is_new or cls.has_begun(root)
        if not begun and (root / RUN).is_file():
            raise UsageError(
                f"{root / RUN} is of no {cls.what}, so nothing there is touched. Give a new folder."
            )
        claim_folder(root, cls.what, lambda _: False, same=begun)
        if overwrite and root.is_dir():
            # clear() removes whole sub-folders, so a user's own file in one would go with it
            require_no_others(root, cls.what, cls._foreign_files(root))

    @classmethod
    def has_begun(cls, root: Path) -> bool:
        """Whether a run of this kind has begun in a folder, as far as ``run.json`` tells."""
        if not (root / RUN).is_file():
            return False
        try:
            content = parse_json(read_bounded(root / RUN, "Give another folder", DataError))
        except (ValueError, RecursionError):
            # Whoever reads it next says what is wrong with it; "of another kind" would mislead.
            return True
        return content.get("kind") == cls.kind

    @classmethod
    def _foreign_files(cls, root: Path) -> Iterator[Path]:
        """The files and folders in the folder that no run has written."""
        run_folders = {RECEIPTS, *cls.folders}
        for path in entries(root):
            if path.name in run_folders and path.is_dir():
                for file in entries(path):
                    if not OURS.fullmatch(file.name):
                        yield file
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
        # Parts alone do not tell that all are there: only the manifest is written after the last.
        if not (root / MANIFEST).is_file():
            raise DataError(
                f"{root} is not complete. Run the same `{cls.made_by(root)}` again: it goes on "
                "where it stopped."
            )

    @classmethod
    def made_by(cls, root: Path) -> str:  # noqa: ARG003 - asked where several commands make them
        """The command that has begun a folder."""
        return cls.command

    def begin(self, run: Document, folders: Iterable[str]) -> None:
        """Write ``run.json``, unless it is there, make the sub-folders, and remove leftovers."""
        # run.json comes first: parts without it would belong to no run that anybody knows, and the
        # next command would refuse the folder as somebody else's. It is never replaced: parts that
        # are there belong to the run that it names.
        if not (self.root / RUN).is_file():
            run.write(self.root / RUN)
        with or_refuse(f"prepare {self.root}"):
            for name in folders:
                (self.root / name).mkdir(exist_ok=True)
        self.clean()

    def clean(self) -> None:
        """Remove the half-written files of processes that are dead, and no others."""
        folders = [self.root / name for name in self.folders]
        with or_refuse(f"clean {self.root}"):
            for folder in [self.root, *folders]:
                if folder.is_dir():
                    _remove_leftovers(folder)

    def seal(self, manifest: Document) -> None:
        """Mark the folder as complete."""
        # Readers take the manifest as the promise that every part is there: written any earlier,
        # a kill before the last part would leave a folder that opens and lacks rows.
        manifest.write(self.root / MANIFEST)

    def unseal(self) -> None:
        """Mark the folder as not complete."""
        # To be called before the first part is written anew: a kill between two parts would leave
        # a manifest that vouches for parts which are no longer there.
        with or_refuse(f"change {self.root}"):
            (self.root / MANIFEST).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the files that a run wrote, if nothing else lies there."""
        self.check_place(self.root, overwrite=True)
        # The manifest goes first: no reader may open what is half removed.
        self.unseal()
        with or_refuse(f"remove the old {self.what} in {self.root}"):
            for name in (RECEIPTS, *self.folders):
                if (self.root / name).is_dir():
                    shutil.rmtree(self.root / name)
            # run.json goes last: a kill before that leaves a run, which can be cleared again or
            # gone on with; without it the rest would be somebody else's, and be refused.
            for name in (*self.documents[1:], RUN):
                (self.root / name).unlink(missing_ok=True)

    @abstractmethod
    def stated_and_planned(
        self, part: P, receipt: R
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """The facts that a receipt states of its part, and the same facts as the run has them."""

    def receipt(self, part: P) -> R:
        """The receipt of a part that is there in full."""
        path = self.root / part.receipt
        receipt = read_document(path, self._kind)
        # A receipt that was copied from another folder is whole, and of other inputs: its rows
        # would be mixed with ours.
        if receipt.fingerprint != self.fingerprint:
            raise ProvenanceError(
                f"{path} belongs to run {receipt.fingerprint}, the folder to run "
                f"{self.fingerprint}. {self._kind.again} to redo the part."
            )
        self._require_facts(part, receipt)
        for name, info in receipt.files.items():
            self._require_size(name, info.bytes)
        return receipt

    def _require_facts(self, part: P, receipt: R) -> None:
        """Refuse a receipt that describes another part."""
        # A receipt under the number of another part would shift all rows after it.
        stated, planned = self.stated_and_planned(part, receipt)
        described = (*stated, tuple(receipt.files))
        expected = (*planned, part.files)
        if described != expected:
            raise StorageError(
                f"{self.root / part.receipt} is damaged: it describes {described}, expected "
                f"{expected}. {self._kind.again}."
            )

    def _require_size(self, name: str, n_bytes: int) -> None:
        """Refuse a file that is missing or has another size than its receipt says."""
        # The receipt was written after the file, so on this disk the file is whole; but a copy of
        # the folder may have been cut short, and a file may have been removed.
        path = self.root / name
        if not path.is_file():
            state = "is missing"
        else:
            n_there = path.stat().st_size
            if n_there == n_bytes:
                return
            state = f"has {n_there} bytes"
        raise StorageError(
            f"{path} {state}, its receipt says {n_bytes} bytes. "
            f"{self._kind.again} to redo the part."
        )

    def look_up(self, part: P, *, deep: bool = True) -> R | str:
        """The receipt of a part that is there in full, or else what the part lacks.

        ``deep``: its bytes are hashed too.
        """
        # The files come before the receipt, so without it the part counts as not begun.
        if not (self.root / part.receipt).exists():
            return ABSENT
        try:
            receipt = self.receipt(part)
            if deep:
                # a damaged disk changes bytes and leaves sizes as they are
                verified = Vouched(self.root, [receipt])
                for name in part.files:
                    verified(name)
        except ViLUError as error:
            # not raised: a part that is damaged is done again, and the message says why
            return str(error)
        return receipt

    def survey(self, *, deep: bool = True) -> tuple[list[P], list[R]]:
        """Parts to do, and the receipts of the parts that are done."""
        missing: list[P] = []
        receipts: list[R] = []
        with self._survey_progress(deep=deep) as task:
            for part in self.parts:
                outcome = self.look_up(part, deep=deep)
                task.advance(1)
                if not isinstance(outcome, str):
                    receipts.append(outcome)
                    continue
                missing.append(part)
                if outcome != ABSENT:
                    logger.warning("part %d is done again: %s", part.number, outcome)
        return missing, receipts

    def _survey_progress(self, *, deep: bool) -> AbstractContextManager[Task]:
        """Progress that is shown where a survey reads files; without receipts it takes no time."""
        if deep and any((self.root / part.receipt).exists() for part in self.parts):
            return track("Checking parts", len(self.parts), "parts")
        return nullcontext(Silence())

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
        """Write the files of a part and then its receipt, each atomically."""
        infos: dict[str, FileInfo] = {}
        for name in part.files:
            infos[name] = write_hashed(self.root / name, payloads[name])
        # The receipt comes last: a kill before it leaves files that nobody reads, and the part is
        # done again. Written first, it would vouch for files that are not there.
        receipt = receipt_of(infos)
        receipt.write(self.root / part.receipt)
        return receipt


def _remove_leftovers(folder: Path) -> None:
    """Remove from a folder the files of a run that a dead process was still writing."""
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        # Three guards: a file of another program stays, and so does one of which a process that
        # is alive, here or on another machine, is to rename it in a moment.
        if match is None or not OURS.fullmatch(match["name"]):
            continue
        if is_leftover(path):
            # another process may clean at the same time
            path.unlink(missing_ok=True)


def write_hashed(path: Path, payload: bytes) -> FileInfo:
    """Write a file atomically; its size and hash are of the bytes that were to be written."""
    write_bytes(path, payload)
    # Not read back: a disk that has changed bytes on the way would be vouched for.
    return FileInfo(bytes=len(payload), sha256=bytes_hash(payload))


def require_hash(path: Path, sha256: str, again: str, voucher: str = "its receipt") -> None:
    """Refuse a file with other bytes than those that its voucher names."""
    if file_hash(path) != sha256:
        raise StorageError(
            f"{path} is damaged: it does not hold the bytes that {voucher} vouches for. {again}."
        )


_verified: set[tuple[int | str, ...]] = set()
_verifying = Lock()


def _unlock_in_child() -> None:
    # A fork copies the lock as it is, but not the thread that holds it: nobody would ever let go
    # of it in the child, which would wait for it without end.
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
        state = path.stat()
    # The path is not in the key: a file that took the place of a verified one has another inode,
    # and has to be read.
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns, sha256)
    # Hashing is within the lock: threads that open the same part at once would each read all of it.
    with alone():
        if key not in _verified:
            require_hash(path, sha256, again, voucher)
            _verified.add(key)
    return path


class Vouched:
    """Files of parts by name: the path of each, once its bytes are those of its receipt."""

    def __init__(self, root: Path, receipts: Sequence[AnyReceipt]) -> None:
        self._root = root
        self._again = receipts[0].again if receipts else ""
        self._sha256: dict[str, str] = {}
        for receipt in receipts:
            for name, info in receipt.files.items():
                self._sha256[name] = info.sha256

    def __call__(self, name: str) -> Path:
        """The path of one; StorageError if it is damaged."""
        return require_hash_once(self._root / name, self._sha256[name], self._again)


class Reopened:
    """What lies in a folder and is pickled as its path.

    It is opened again where it arrives, and refused if it has changed.

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
        # The path is absolute: the process that opens it may have another working folder.
        arguments = (type(self), self.path.absolute(), dict(self.options), self.seal)
        # Which rows ``without`` has set aside is in no file, and would be lost on the way.
        state = vars(self)
        if "_left" not in state:
            return reopen, arguments, None
        own = {name: state[name] for name in ("_left", "usable_rows", "status")}
        return reopen, arguments, own


def reopen(
    kind: Callable[..., Reopened], path: Path, options: Mapping[str, object], seal: str
) -> Reopened:
    """What was pickled, from its folder; ProvenanceError if that is another one now."""
    reopened = kind(path, **options)
    # A worker would otherwise read other rows than the process that sent it.
    if reopened.seal != seal:
        raise ProvenanceError(
            f"{path} has changed since it was pickled: its fingerprint was {seal} and is now "
            f"{reopened.seal}. Open it again and repeat what was begun with it."
        )
    return reopened


def content_hash(receipts: Iterable[AnyReceipt]) -> str:
    """Hash over the hashes of every file of every part, in order."""
    # In the manifest it ties the parts together: a part of another run of the same inputs, whose
    # bytes differ by rounding, would otherwise pass.
    hashes: list[str] = []
    for receipt in receipts:
        hashes += [info.sha256 for info in receipt.files.values()]
    return digest(hashes)
