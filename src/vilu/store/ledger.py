"""A run's folder, filled part by part, so that a killed run can be resumed.

A run is the work of a single command. A part is a fixed share of the rows. The files are written in
this order:

1. ``run.json`` describes the run.
2. For each part, the part's files are written. Then a receipt is written, with the sizes and hashes
   of these files. A part is done only if the receipt exists and the files have these sizes.
3. ``manifest.json`` marks the folder as complete (sealed).

Every file is written atomically. If the process is killed, only the unfinished part is lost.
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
    LOG_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    TEMPORARY_NAME,
    convert_os_errors,
    file_hash,
    is_leftover,
    locked,
    write_bytes,
)
from vilu.artifacts.documents import (
    Document,
    FrozenModel,
    parse_json,
    read_bounded,
    read_document,
    write_document,
)
from vilu.artifacts.hashing import bytes_hash, digest
from vilu.artifacts.paths import claim_folder, folder_entries, refuse_foreign_files
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError, ViLUError
from vilu.progress import SilentProgress, Task, track

RUN_FILE_PATTERN = re.compile(
    r"run\.json|classes\.json|manifest\.json|\w+\.npy|\w+\.parquet|\d+(\.json)?"
)
"""Names of the files that a run writes, except the log.

A receipt's name is digits and ``.json``. The name of a ``Part.attempts_file`` is digits alone.
"""

PART_FILE_PATTERN = re.compile(
    r"(\w+?)s?/\1_\d+\.(npy|parquet)|receipts/\d+\.json|attempts/\d+", re.ASCII
)
"""Paths of a part's files in a run's folder, such as "img_emb/img_emb_00000.npy".

An array's or table's file has the folder's name and the part's number. Its name may lack the
folder's last "s", as in "histograms/histogram_00000.parquet".
"""

RECEIPTS_FOLDER = "receipts"  # name of the folder with the receipts
NO_RECEIPT = "it is not there"  # what ``receipt_or_reason`` returns for a part without a receipt

logger = logging.getLogger(__name__)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class FileInfo(FrozenModel):
    """Size and SHA-256 of a file."""

    bytes: Count
    sha256: Sha256


class AnyPart(Protocol):
    """A part of the work, with the file names."""

    @property
    def number(self) -> int:
        """Number of the part, from 0."""

    @property
    def receipt_file(self) -> str:
        """Name of the receipt file. The receipt is the last file to be written."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files in the receipt, in the order of writing."""


class AnyReceipt(Document):
    """Sizes and hashes of a part's files.

    Every subclass defines ``fingerprint`` and ``files`` again, because the fields in the JSON file
    are in the order of the field definitions.
    """

    if TYPE_CHECKING:
        fingerprint: str
        files: dict[str, FileInfo]


P = TypeVar("P", bound=AnyPart)
R = TypeVar("R", bound=AnyReceipt)


class Ledger(ABC, Generic[P, R]):
    """A run's folder, with finished parts and missing parts."""

    folder_kind: ClassVar[str]  # name of such a folder in messages
    command: ClassVar[str]  # command that makes the folder, for messages
    activity: ClassVar[str]  # work under the lock, for messages: "scoring into"
    kind: ClassVar[str | None] = None  # value of "kind" in run.json. None: no such field.
    # files directly in the folder
    documents: ClassVar[tuple[str, ...]] = (RUN_FILE, MANIFEST_FILE, LOG_FILE)
    folders: ClassVar[tuple[str, ...]]  # all possible sub-folders in a run
    # paths of all possible files in the sub-folders, other than the parts' files
    further_files: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, root: Path, fingerprint: str, parts: Sequence[P], receipt_type: type[R]
    ) -> None:
        self.root = root
        self.fingerprint = fingerprint
        self.parts = parts
        self._receipt_type = receipt_type

    @classmethod
    @contextmanager
    def lock_folder(cls, root: Path, wait_seconds: float = 0.0) -> Iterator[None]:
        """Make the folder, and hold the folder's lock in the block.

        If another process holds the lock, wait for at most ``wait_seconds``. The system releases
        the lock if this process dies.
        """
        # checked before the folder is made, so that a refusal leaves no new folder behind
        cls.check_folder(root)
        with convert_os_errors(f"cannot write to {root}"):
            root.mkdir(parents=True, exist_ok=True)
        # Because of the lock, only one process at a time can begin, seal, unseal or clear the
        # folder. Parts need no lock, because every process would write the same bytes.
        with locked(root, activity=cls.activity, wait_seconds=wait_seconds):
            yield

    @classmethod
    def check_folder(cls, root: Path, *, overwrite: bool = False) -> None:
        """Raise UsageError if a folder is not empty and has no run of this kind.

        With ``overwrite``, also raise UsageError if the folder has a file that no run writes.
        """
        # The search for any file comes before the search for run.json. In the opposite order,
        # another process could begin a run in between. Then this new run's files would be refused.
        is_empty = not root.is_dir() or not folder_entries(root)
        may_be_used = is_empty or cls.has_begun(root)
        if not may_be_used and has_file(root / RUN_FILE):
            raise UsageError(
                f"{root / RUN_FILE} is of no {cls.folder_kind}, so nothing there is touched. Give "
                "a new folder."
            )
        # ``may_be_used`` already decides. If it is True, ``has_same_inputs`` makes ``claim_folder``
        # accept the files in the folder. If it is False, ``claim_folder`` refuses every file,
        # because ``is_part_of_result`` recognises no file.
        claim_folder(
            root, cls.folder_kind, is_part_of_result=lambda _: False, has_same_inputs=may_be_used
        )
        if overwrite and root.is_dir():
            # without this check, remove_run() would also remove the user's files in the sub-folders
            foreign_files = cls._foreign_files(root)
            refuse_foreign_files(root, cls.folder_kind, foreign_files)

    @classmethod
    def has_begun(cls, root: Path) -> bool:
        """Return whether a folder has a ``run.json`` of this kind, or a damaged ``run.json``."""
        if not has_file(root / RUN_FILE):
            return False
        try:
            document = read_bounded(root / RUN_FILE, "Give another folder", DataError)
            content = parse_json(document)
        except (ValueError, RecursionError):
            # The file is damaged, and the next reader reports the damage. False would lead to the
            # wrong message that the run is of another kind.
            return True
        return content.get("kind") == cls.kind

    @classmethod
    def _foreign_files(cls, root: Path) -> Iterator[Path]:
        """Yield the files and folders in ``root`` that no run writes."""
        folder_names = {RECEIPTS_FOLDER, *cls.folders}
        for path in folder_entries(root):
            if path.name in folder_names and path.is_dir():
                for file in folder_entries(path):
                    name = f"{path.name}/{file.name}"
                    is_part_file = PART_FILE_PATTERN.fullmatch(name) is not None
                    if not is_part_file and name not in cls.further_files:
                        yield file
            elif path.name not in cls.documents:
                yield path

    @classmethod
    def require_begun(cls, root: Path) -> None:
        """Raise DataError if a folder has no ``run.json``."""
        if not has_file(root / RUN_FILE):
            raise DataError(
                f"{root} is no {cls.folder_kind} (it has no {RUN_FILE}). Make one with "
                f"`{cls.command}`."
            )

    @classmethod
    def require_sealed(cls, root: Path) -> None:
        """Raise DataError if a folder has no ``run.json``, or is not complete."""
        cls.require_begun(root)
        # The manifest is written after the last part, so a manifest shows that all parts are done.
        if not has_file(root / MANIFEST_FILE):
            raise DataError(
                f"{root} is not complete. Run the same `{cls.command_of(root)}` again: it goes on "
                "where it stopped."
            )

    @classmethod
    def command_of(cls, root: Path) -> str:  # noqa: ARG003 - a subclass reads the folder
        """Return the command that began a folder."""
        return cls.command

    def begin(self, run: Document, folders: Iterable[str]) -> None:
        """Write ``run.json`` if missing, make the sub-folders, and remove temporary files."""
        # run.json is written first, because a folder with parts and without run.json is refused. An
        # existing run.json is never replaced, because run.json describes the parts in the folder.
        if not has_file(self.root / RUN_FILE):
            write_document(self.root / RUN_FILE, run)
        with convert_os_errors(f"cannot prepare {self.root}"):
            for name in folders:
                (self.root / name).mkdir(exist_ok=True)
        self.remove_temporary_files()

    def remove_temporary_files(self) -> None:
        """Remove the temporary files of dead processes."""
        folder_paths = [self.root / name for name in self.folders]
        with convert_os_errors(f"cannot clean {self.root}"):
            for folder in [self.root, *folder_paths]:
                if folder.is_dir():
                    _remove_leftovers(folder)

    def seal(self, manifest: Document) -> None:
        """Mark the folder as complete: write the manifest, after the last part."""
        write_document(self.root / MANIFEST_FILE, manifest)

    def unseal(self) -> None:
        """Mark the folder as not complete: remove the manifest, before a part is replaced."""
        # Otherwise, a kill between two parts would leave a manifest that does not fit the parts.
        with convert_os_errors(f"cannot change {self.root}"):
            (self.root / MANIFEST_FILE).unlink(missing_ok=True)

    def remove_run(self) -> None:
        """Remove a run's files. Raise UsageError if the folder also has foreign files."""
        self.check_folder(self.root, overwrite=True)
        # The manifest is removed first, so that no reader opens a partly removed folder.
        self.unseal()
        with convert_os_errors(f"cannot remove the old {self.folder_kind} in {self.root}"):
            for name in (RECEIPTS_FOLDER, *self.folders):
                if (self.root / name).is_dir():
                    shutil.rmtree(self.root / name)
            # run.json is removed last. Otherwise an interrupted removal could leave files without
            # run.json, and ``check_folder`` would refuse such a folder.
            documents = [name for name in self.documents if name != RUN_FILE]
            for name in (*documents, RUN_FILE):
                (self.root / name).unlink(missing_ok=True)

    @abstractmethod
    def facts_of_receipt_and_plan(
        self, part: P, receipt: R
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """Return two tuples: the facts stated in the receipt, and the facts planned for ``part``.

        The two tuples are equal if the receipt belongs to this part.
        """

    def receipt(self, part: P) -> R:
        """Return a part's receipt, after checking that the part's files have the right sizes.

        Raises:
            StorageError: If the receipt is damaged, or a file is missing or has another size.
            ProvenanceError: If the receipt belongs to another run.
        """
        path = self.root / part.receipt_file
        receipt = read_document(path, self._receipt_type)
        # an undamaged receipt may be a copy from another run's folder with other inputs
        if receipt.fingerprint != self.fingerprint:
            raise ProvenanceError(
                f"{path} belongs to run {receipt.fingerprint}, the folder to run "
                f"{self.fingerprint}. {self._receipt_type.remedy} to redo the part."
            )
        self._require_same_part(part, receipt)
        for name, info in receipt.files.items():
            self._require_size(name, info.bytes)
        return receipt

    def _require_same_part(self, part: P, receipt: R) -> None:
        """Raise StorageError if a receipt describes another part."""
        # another part's row count would give wrong row numbers to all later rows
        receipt_facts, planned_facts = self.facts_of_receipt_and_plan(part, receipt)
        described_part = (*receipt_facts, tuple(receipt.files))
        expected_part = (*planned_facts, part.files)
        if described_part != expected_part:
            raise StorageError(
                f"{self.root / part.receipt_file} is damaged: it describes {described_part}, "
                f"expected {expected_part}. {self._receipt_type.remedy}."
            )

    def _require_size(self, name: str, n_bytes: int) -> None:
        """Raise StorageError if a file is missing, or has another size than in the receipt."""
        # The whole file was written before the receipt. But the folder may be an incomplete copy,
        # or someone may have changed or removed the file later.
        path = self.root / name
        n_bytes_on_disk = path.stat().st_size if has_file(path) else None
        if n_bytes_on_disk == n_bytes:
            return
        state = "is missing" if n_bytes_on_disk is None else f"has {n_bytes_on_disk} bytes"
        raise StorageError(
            f"{path} {state}, its receipt says {n_bytes} bytes. "
            f"{self._receipt_type.remedy} to redo the part."
        )

    def receipt_or_reason(self, part: P, *, check_hashes: bool = True) -> R | str:
        """Return a finished part's receipt. If the part is not done, return the reason.

        With ``check_hashes``, the part's files are also compared with their hashes.
        """
        # the receipt is written last, so a part without a receipt is not done
        with convert_os_errors(f"cannot read {self.root}"):
            if not (self.root / part.receipt_file).exists():
                return NO_RECEIPT
        try:
            receipt = self.receipt(part)
            if check_hashes:
                # a damaged disk can change bytes without changing sizes
                verify_file = FileVerifier(self.root, [receipt])
                for name in part.files:
                    verify_file(name)
        except ViLUError as error:
            # the error is returned and not raised, because a damaged part is done again
            return str(error)
        return receipt

    def check_parts(self, *, check_hashes: bool = True) -> tuple[list[P], list[R]]:
        """Return the missing parts, and the receipts for the finished parts.

        ``check_hashes`` is passed on to ``receipt_or_reason``.
        """
        missing_parts: list[P] = []
        receipts: list[R] = []
        with self._checking_progress(check_hashes=check_hashes) as task:
            for part in self.parts:
                receipt_or_reason = self.receipt_or_reason(part, check_hashes=check_hashes)
                task.advance(1)
                if isinstance(receipt_or_reason, self._receipt_type):
                    receipts.append(receipt_or_reason)
                    continue
                reason = receipt_or_reason
                missing_parts.append(part)
                if reason != NO_RECEIPT:
                    logger.warning("part %d is done again: %s", part.number, reason)
        return missing_parts, receipts

    def _checking_progress(self, *, check_hashes: bool) -> AbstractContextManager[Task]:
        """Return a progress bar if the check will read files, otherwise a silent substitute."""
        with convert_os_errors(f"cannot read {self.root}"):
            has_receipts = any((self.root / part.receipt_file).exists() for part in self.parts)
        if check_hashes and has_receipts:
            return track("Checking parts", len(self.parts), "parts")
        return nullcontext(SilentProgress())

    def verify(self) -> None:
        """Read all parts' files, and compare them with the hashes in the receipts."""
        for receipt in self.receipts():
            for name, info in receipt.files.items():
                require_hash(self.root / name, info.sha256, self._receipt_type.remedy)

    def receipts(self) -> list[R]:
        """Return the receipts for all parts. Raise the same errors as ``receipt``."""
        return [self.receipt(part) for part in self.parts]

    def write_files(
        self,
        part: P,
        payloads: Mapping[str, bytes],
        make_receipt: Callable[[dict[str, FileInfo]], R],
    ) -> R:
        """Write a part's files and then the receipt, each atomically.

        Args:
            part: The part.
            payloads: Maps each file name to the file's content.
            make_receipt: Function that makes the receipt from a mapping: each file name to the
                file's size and hash.
        """
        info_of_file: dict[str, FileInfo] = {}
        for name in part.files:
            info_of_file[name] = write_hashed(self.root / name, payloads[name])
        # The receipt is written last. If the process is killed before, the part has no receipt and
        # is done again. If the receipt were written first, the receipt could list missing files.
        receipt = make_receipt(info_of_file)
        write_document(self.root / part.receipt_file, receipt)
        return receipt


def has_file(path: Path) -> bool:
    """Return whether a path is a file. Raise StorageError if the folder cannot be read."""
    with convert_os_errors(f"cannot read {path}"):
        return path.is_file()


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a run's dead processes from a folder."""
    for path in folder.iterdir():
        match = TEMPORARY_NAME.fullmatch(path.name)
        is_temporary = match is not None and RUN_FILE_PATTERN.fullmatch(match["name"])
        # Files from other programs stay. So do the files of a living process, on this or another
        # machine, because the process is still writing.
        if is_temporary and is_leftover(path):
            # another process may have removed the file in the meantime
            path.unlink(missing_ok=True)


def write_hashed(path: Path, payload: bytes) -> FileInfo:
    """Write ``payload`` into a file atomically, and return the file's size and hash."""
    write_bytes(path, payload)
    # The hash is computed from ``payload`` and not from the file. So if writing damaged the file, a
    # later comparison with the hash reveals the damage.
    sha256 = bytes_hash(payload)
    return FileInfo(bytes=len(payload), sha256=sha256)


def require_hash(path: Path, sha256: str, remedy: str, document: str = "its receipt") -> None:
    """Raise StorageError if a file's SHA-256 is not ``sha256``.

    Args:
        path: The file.
        sha256: The expected hash.
        remedy: Advice for messages: how to make the file again.
        document: Name of the document with the hash, for messages.
    """
    if file_hash(path) != sha256:
        raise StorageError(
            f"{path} is damaged: its SHA-256 is not the one stated in {document}. {remedy}."
        )


# identities of the files that had the right hash (``require_hash_once``)
_verified_files: set[tuple[int | str, ...]] = set()
_single_thread_lock = Lock()


def _replace_lock_in_child() -> None:
    # A fork copies a held lock, but not the thread that holds the lock. In the child nobody could
    # release the lock, so the child gets a new lock.
    global _single_thread_lock  # noqa: PLW0603 - the lock belongs to the whole process
    _single_thread_lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_replace_lock_in_child)


def single_thread_lock() -> Lock:
    """Return the lock for work that only one thread in this process may do at a time.

    A process forked from this process gets a new lock, which no thread holds.
    """
    return _single_thread_lock


def require_hash_once(path: Path, sha256: str, remedy: str, document: str = "its receipt") -> Path:
    """Check a file's hash unless this process has done so before. Return the path.

    A file is hashed again only if the file's device, inode, size or times have changed. A later
    change is noticed only by the next call. Threads may call this function at the same time. The
    arguments are the same as for ``require_hash``.
    """
    with convert_os_errors(f"cannot read {path}"):
        file_stat = path.stat()
    # The path does not identify a file, because another file may have taken its place. Device and
    # inode do.
    times = (file_stat.st_mtime_ns, file_stat.st_ctime_ns)
    file_identity = (file_stat.st_dev, file_stat.st_ino, file_stat.st_size, *times, sha256)
    # the lock is held while hashing, so that two threads do not hash the same file
    with single_thread_lock():
        if file_identity not in _verified_files:
            require_hash(path, sha256, remedy, document)
            _verified_files.add(file_identity)
    return path


class FileVerifier:
    """Verifies the files in parts. Call it with a file name to get the verified file's path.

    The file is compared with the hash in the receipt.
    """

    def __init__(self, root: Path, receipts: Sequence[AnyReceipt]) -> None:
        self._root = root
        self._remedy = receipts[0].remedy if receipts else ""  # without receipts, never used
        self._hash_of_file: dict[str, str] = {}  # file name -> the file's SHA-256
        for receipt in receipts:
            for name, info in receipt.files.items():
                self._hash_of_file[name] = info.sha256

    def __call__(self, name: str) -> Path:
        """Verify the file ``name``, and return the path. Raise StorageError if it is damaged."""
        return require_hash_once(self._root / name, self._hash_of_file[name], self._remedy)


class PickledByPath:
    """Base for objects that read a folder and are pickled as the folder's path.

    Unpickling opens the folder again. If the folder has changed since, ProvenanceError is raised.

    Attributes:
        path: The folder.
        folder_hash: Hash of the folder's content. A different hash means a changed folder.
        options: Keyword arguments for opening the folder, besides the path.
    """

    path: Path
    folder_hash: str
    options: Mapping[str, object] = {}

    def __reduce__(
        self,
    ) -> tuple[Callable[..., PickledByPath], tuple[object, ...], dict[str, object] | None]:
        # The path is absolute, because the unpickling process may have another working folder.
        arguments = (type(self), self.path.absolute(), dict(self.options), self.folder_hash)
        # After ``PairSource.without``, some rows are left out, and ``_remaining_pairs`` is set. No
        # file records the left-out rows, so the attributes that depend on them are pickled, too.
        attributes = vars(self)
        if "_remaining_pairs" not in attributes:
            return reopen, arguments, None
        names = ("_remaining_pairs", "usable_rows", "status")
        row_attributes = {name: attributes[name] for name in names}
        return reopen, arguments, row_attributes


def reopen(
    open_folder: Callable[..., PickledByPath],
    path: Path,
    options: Mapping[str, object],
    pickled_hash: str,
) -> PickledByPath:
    """Open a pickled object's folder again. Raise ProvenanceError if the folder has changed.

    Args:
        open_folder: The object's class.
        path: The folder.
        options: Keyword arguments for the class.
        pickled_hash: The object's ``folder_hash`` when the object was pickled.
    """
    reader = open_folder(path, **options)
    # without this check, a worker process could read other rows than its parent
    if reader.folder_hash != pickled_hash:
        raise ProvenanceError(
            f"{path} has changed since it was pickled: its fingerprint was {pickled_hash} and is "
            f"now {reader.folder_hash}. Open it again and repeat what was begun with it."
        )
    return reader


def content_hash(receipts: Iterable[AnyReceipt]) -> str:
    """Return a single hash over all files' hashes, in the order of the parts."""
    # The manifest has this hash. It reveals a part that was copied from another run with the same
    # inputs. Such a part's receipt fits the run, but rounding may have given other numbers.
    hashes: list[str] = []
    for receipt in receipts:
        hashes += [info.sha256 for info in receipt.files.values()]
    return digest(hashes)
