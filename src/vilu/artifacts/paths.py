"""Checks of output paths, so that no user's file is overwritten.

A path is accepted if nothing is there yet, if the path is an empty folder, or if the result from
the same inputs is there. Otherwise the path is refused. With ``--overwrite``, or when called as a
library, vilu replaces files written by vilu. Files that vilu does not recognise are never changed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vilu.artifacts.disk import MANIFEST_FILE, RUN_FILE, convert_os_errors, file_hash
from vilu.artifacts.documents import (
    DIGEST_KEY,
    VERSION_KEY,
    parse_json,
    read_bounded,
    read_json,
    without_version,
    write_json,
)
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import METADATA_KEY, read_table
from vilu.errors import DataError, StorageError, UsageError, ViLUError

logger = logging.getLogger("vilu")

TableKind = Literal["answers", "scores", "results", "labels", "label errors"]
FileKind = Literal[
    TableKind,
    "explanation",
    "monitor report",
    "monitor state",
    "page",
    "study",
    "kept studies",
    "ONNX export",
]
"""The kinds of files written by vilu, as named in messages."""

KIND_OF_ENTRY: dict[str, FileKind] = {
    "answers": "answers",
    "outcomes": "scores",
    "results": "results",
    "explanations": "explanation",
    "risk_map": "explanation",
    "prompt_gains": "explanation",
    "summary": "explanation",
    "monitoring": "monitor report",
    "monitor": "monitor state",
    "label errors": "label errors",
    "kept studies": "kept studies",
}
"""Maps the value of "kind", in a document or in a table's metadata, to the file's kind."""

KIND_OF_CSV_HEADER: dict[bytes, FileKind] = {
    b"row_id,key,pred,pred_name,label,label_name,uncertainty,failure,reason,score_name": "scores",
    b"method,dataset,split,seed,metric,value,ci_low,ci_high,n,n_failures,accuracy,": "results",
    b"path,label,suggested,quality,is_error": "label errors",
    b"path,label,answer,failure_probability,stream,probability,predictor,asked": "labels",
}
"""Maps a CSV file's beginning to the file's kind. CSV files have no metadata."""

SUFFIXES_OF_KIND: dict[FileKind, tuple[str, ...]] = {
    "results": (".json", ".parquet", ".csv"),
    "labels": (".csv",),
    "answers": (".parquet", ".csv"),
    "label errors": (".parquet", ".csv"),
    "scores": (".parquet", ".csv"),
    "monitor state": (".parquet",),
    "kept studies": (".parquet",),
}
"""Maps file kinds with a fixed format to the allowed suffixes."""

# maximum number of files and folders to list in a folder without a document of vilu
MAX_LISTED_ENTRIES = 100_000
INPUTS_KEY = "inputs"  # key of a file's inputs digest

TEXT_MARK_PATTERN = re.compile(
    rb"<!-- made by vilu: (?P<kind>page|study|results) (?P<inputs>[0-9a-f]*) -->\n\Z"
)
"""Pattern for the last line in a text (HTML, Markdown) written by vilu: kind and inputs digest.

The inputs digest is a hash of what the file was made from (``inputs_digest``).
"""

KIND_OF_TEXT: dict[bytes, FileKind] = {b"page": "page", b"study": "study", b"results": "results"}
"""Maps the word for the kind in a text's last line to the file's kind."""

ONNX_MARK_PATTERN = re.compile(rb"vilu\.fingerprint\x12.(?P<inputs>[0-9a-f]{32})", re.DOTALL)
r"""Pattern of the entry "vilu.fingerprint" in an ONNX file's metadata.

Protobuf puts two bytes between the key and the value: \x12 and the value's length.
"""

N_SEARCHED_BYTES = 4096  # bytes to search at the beginning and at the end of a file


def inputs_entry(inputs: str | None) -> dict[str, str]:
    """Return {"inputs": inputs}, an entry for a document or a table. Return {} without a digest."""
    if not inputs:
        return {}
    return {INPUTS_KEY: inputs}


def write_with_inputs(path: Path, content: dict[str, object], inputs: str) -> None:
    """Write a document with the content ``content`` and the inputs digest ``inputs``."""
    content_with_inputs = {**content, **inputs_entry(inputs)}
    write_json(path, content_with_inputs)


# Every name of a lock or temporary file begins with a dot, and has a part with this pattern.
LOCK_OR_TEMPORARY_NAME = re.compile(r"\.tmp\Z|\.lock")


class KindAndInputs(NamedTuple):
    """The kind and the inputs stated in a file of vilu."""

    kind: FileKind
    inputs: str  # the inputs digest, or "" if the file has no digest


def text_mark(kind: str, inputs: str) -> str:
    """Return a text's last line (HTML, Markdown), by which vilu later recognises the file."""
    return f"<!-- made by vilu: {kind} {inputs} -->\n"


def claim_file(
    path: str | os.PathLike[str],
    kind: FileKind,
    inputs: str | None = None,
    *,
    overwrite: bool = False,
) -> bool:
    """Check an output file before the work begins.

    Args:
        path: The output file.
        kind: The kind of file to write.
        inputs: The inputs digest, or None if inputs are not compared.
        overwrite: Whether to replace an existing file of the same kind, made from any inputs.

    Returns:
        True if the file already exists, is not damaged and was made from the same inputs. False if
        the file must be written.

    Raises:
        UsageError: If another file exists at this path, if the folder does not exist, or if the
            suffix is wrong for this kind.
        StorageError: If the folder cannot be written to, or if the file cannot be read.
    """
    target = Path(path)
    _require_suffix(target, kind)
    if os.path.lexists(target):
        recorded_inputs = _recorded_inputs(target, kind)
        has_same_inputs = bool(inputs) and recorded_inputs == inputs
        if has_same_inputs and not overwrite and _is_undamaged(target):
            return True
        if not has_same_inputs and not overwrite:
            described_inputs = "inputs that it does not name"
            if recorded_inputs:
                described_inputs = "other inputs"
            raise UsageError(
                f"{target} holds the {kind} of {described_inputs}. "
                "Give another file, or --overwrite to replace it."
            )
    # the file must be written: it is missing, damaged or to be replaced
    _require_writable_folder(target.parent, target=target)
    return False


def _require_suffix(target: Path, kind: FileKind) -> None:
    """Raise UsageError if the suffix of a file is wrong for this kind."""
    suffixes = SUFFIXES_OF_KIND.get(kind)
    if suffixes is not None and target.suffix.lower() not in suffixes:
        listed_suffixes = " or ".join(suffixes)
        raise UsageError(
            f"vilu keeps {kind} in a {listed_suffixes} file. Got {target.name!r} instead."
        )


def _recorded_inputs(target: Path, kind: FileKind) -> str:
    """Return the inputs digest stated in a file. Raise UsageError if the file's kind is wrong."""
    recorded = kind_and_inputs(target)
    if recorded is None or recorded.kind != kind:
        raise UsageError(
            f"{target} is there and holds no {kind} of vilu, so it is left alone. "
            "Give another file, or remove it."
        )
    return recorded.inputs


def claim_folder(
    path: str | os.PathLike[str],
    result_kind: str,
    is_part_of_result: Callable[[Path], bool],
    *,
    has_same_inputs: bool = False,
    overwrite: bool = False,
) -> bool:
    """Check an output folder before the work begins.

    Args:
        path: The output folder. The folder is not made here.
        result_kind: The result's kind, for messages.
        is_part_of_result: Function that returns whether a file in the folder belongs to a result of
            this kind. Not called for temporary files and locks.
        has_same_inputs: Whether the existing result was made from the same inputs.
        overwrite: Whether to replace an existing result, made from any inputs.

    Returns:
        True if the folder already has the result from the same inputs. False if the result must be
        written.

    Raises:
        UsageError: If the path is no folder, or if the folder has files that belong to no result,
            or a result from different inputs.
        StorageError: If the folder cannot be written to.
    """
    root = Path(path)
    exists = os.path.lexists(root)  # also true for a link without a target
    if exists and not root.is_dir():
        raise UsageError(
            f"{root} is a file, so no {result_kind} can be put there. Give a new folder."
        )
    entries: list[Path] = []
    if root.exists():
        entries = folder_entries(root)
    if entries and has_same_inputs and not overwrite:
        return True
    foreign_paths = [path for path in entries if not is_part_of_result(path)]
    refuse_foreign_files(root, result_kind, foreign_paths)
    if entries and not overwrite:
        raise UsageError(
            f"{root} holds another {result_kind}. Give a new folder, or --overwrite to replace it."
        )
    # a missing folder can be made if the nearest existing parent is writable
    _require_writable_folder(_first_existing(root), target=root)
    return False


def folder_entries(root: Path) -> list[Path]:
    """Return the sorted paths in a folder, without locks and temporary files."""
    with convert_os_errors(f"cannot read {root}"):
        return sorted(path for path in root.iterdir() if not _is_lock_or_temporary(path.name))


def _is_lock_or_temporary(name: str) -> bool:
    """Return whether a file with this name is a lock or a temporary file."""
    return name.startswith(".") and LOCK_OR_TEMPORARY_NAME.search(name) is not None


def refuse_foreign_files(root: Path, result_kind: str, foreign_paths: Iterable[Path]) -> None:
    """Raise UsageError if an output folder has foreign files.

    Args:
        root: The output folder.
        result_kind: The result's kind, for the message.
        foreign_paths: The files in ``root`` that belong to no result of this kind.
    """
    first_foreign_path = min(foreign_paths, default=None)
    if first_foreign_path is not None:
        name_in_folder = str(first_foreign_path.relative_to(root))
        raise UsageError(
            f"{root} holds {name_in_folder!r}, which is no part of "
            f"vilu's {result_kind}, so nothing there is touched. Give a new folder."
        )


def kind_and_inputs(path: Path) -> KindAndInputs | None:
    """Return the kind and inputs digest that a file of vilu states, or None for any other file."""
    if not path.is_file():
        return None
    with convert_os_errors(f"cannot read {path}"):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            entries = _table_metadata(path)
        elif suffix == ".json":
            entries = _document_content(path)
        else:
            return _kind_by_bytes(path)
    if entries is None:
        return None
    stated_kind = entries.get("kind")
    kind = KIND_OF_ENTRY.get(str(stated_kind))
    if kind is None:
        return None
    inputs = entries.get(INPUTS_KEY) or ""
    return KindAndInputs(kind, str(inputs))


def inputs_digest(*paths: Path, **settings: object) -> str:
    """Compute a digest from a command's settings and from the files that the command reads."""
    identities = [content_identity(path) for path in paths]
    return digest([identities, settings])


def content_identity(path: Path) -> object:
    """Return a JSON value that identifies the content of a file or folder.

    - A JSON document with the vilu version: the document's content, without version and digest.
    - A Parquet table of vilu: the digest in the table's metadata.
    - Any other file: the SHA-256 of the bytes.
    - A folder with documents of vilu (``predictor.json``, ...): these documents' names and
      contents, without versions and digests as above.
    - A folder without such documents: the files' names, sizes and modification times.
    """
    content = _document_content(path) if path.suffix.lower() == ".json" else None
    is_document_of_vilu = content is not None and VERSION_KEY in content
    if is_document_of_vilu:
        return _document_identity(path)
    if path.is_file():
        return _table_or_file_digest(path)
    documents: list[object] = []
    for name in ("predictor.json", "risk.json", RUN_FILE, MANIFEST_FILE):
        if (path / name).is_file():
            identity = _document_identity(path / name)
            documents.append([name, identity])
    return documents or list_files(path)


def list_files(folder: Path, max_entries: int = MAX_LISTED_ENTRIES) -> list[object]:
    """List name, size and modification time of every file in a folder, at any depth.

    Raises UsageError for more than ``max_entries`` files and folders. Otherwise, a user who names a
    whole disk by mistake would wait for minutes.
    """
    files: list[Path] = []
    with convert_os_errors(f"cannot read {folder}"):
        for n_earlier, path in enumerate(folder.rglob("*")):
            if n_earlier == max_entries:
                raise UsageError(
                    f"{folder} has no document of vilu, and more than {max_entries:,} files "
                    "and folders. Check the path."
                )
            if path.is_file():
                files.append(path)
        listing: list[object] = []
        for file in sorted(files):
            status = file.stat()
            name = str(file.relative_to(folder))
            listing.append([name, status.st_size, status.st_mtime_ns])
    return listing


def _table_or_file_digest(path: Path) -> object:
    """Return the digest in the metadata of a vilu Parquet table, or any other file's SHA-256."""
    if path.suffix.lower() == ".parquet":
        with convert_os_errors(f"cannot read {path}"):
            metadata = _table_metadata(path) or {}
        if metadata.get(DIGEST_KEY):
            return metadata[DIGEST_KEY]
    return file_hash(path)


def _document_identity(path: Path) -> object:
    """Return a document's content, without the vilu version and the digest.

    If the document is damaged, return the file's SHA-256.
    """
    content = _document_content(path)
    if content is None:
        return file_hash(path)
    # the digest's key is "fingerprint" in ``predictor.json``, and ``DIGEST_KEY`` elsewhere
    return without_version(content, "fingerprint", DIGEST_KEY)


def _document_content(path: Path) -> dict[str, Any] | None:
    """Return a JSON document's content. Return None if the file is missing or damaged."""
    try:
        content = read_bounded(path, "Make it again", DataError)
        return parse_json(content)
    except (ValueError, RecursionError):
        return None


def _table_metadata(path: Path) -> dict[str, Any] | None:
    """Return a table's vilu metadata. Return None for a table from another program."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path).metadata
        if metadata is None or METADATA_KEY not in metadata:
            return None
        return parse_json(metadata[METADATA_KEY])
    except (pa.ArrowException, ValueError, RecursionError):
        return None


def _kind_by_bytes(path: Path) -> KindAndInputs | None:
    """Recognise a file of vilu by the bytes at the beginning or at the end.

    CSV files are recognised by the header. All other files are recognised by a mark at the end.
    Returns None if both are missing.
    """
    with path.open("rb") as handle:
        start = handle.read(N_SEARCHED_BYTES)
        size = os.fstat(handle.fileno()).st_size
        handle.seek(max(size - N_SEARCHED_BYTES, 0))
        end = handle.read()
    for header, kind in KIND_OF_CSV_HEADER.items():
        if start.startswith(header):
            return KindAndInputs(kind, inputs="")
    onnx_match = ONNX_MARK_PATTERN.search(end)
    if onnx_match:
        inputs = onnx_match["inputs"].decode()
        return KindAndInputs("ONNX export", inputs)
    text_match = TEXT_MARK_PATTERN.search(end)
    if text_match:
        kind_of_text = KIND_OF_TEXT[text_match["kind"]]
        inputs = text_match["inputs"].decode()
        return KindAndInputs(kind_of_text, inputs)
    # a page of vilu without the mark, and so without the inputs digest
    if b"Made by vilu " in end and end.rstrip().endswith(b"</html>"):
        return KindAndInputs("page", inputs="")
    return None


def _is_undamaged(path: Path) -> bool:
    """Return whether a file's content matches its digest. Without a digest, return True."""
    suffix = path.suffix.lower()
    try:  # reading raises an error if the content does not match
        if suffix == ".json":
            read_json(path, "Make it again")
        elif suffix == ".parquet":
            read_table(path, text_columns=())
    except ViLUError as error:
        # the error message names the file
        logger.warning("it is made again: %s", error)
        return False
    return True


def _first_existing(folder: Path) -> Path:
    """Return the folder if existing, otherwise the nearest existing parent."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _require_writable_folder(folder: Path, target: Path) -> None:
    """Raise an error if ``folder`` does not exist or cannot be written to.

    Messages name ``target`` as the file that cannot be written.
    """
    if not folder.is_dir():
        problem = "does not exist"
        if folder.exists():
            problem = "is no folder"
        raise UsageError(
            f"cannot write {target}: the folder {folder} {problem}. Make it, or give another place."
        )
    # By default, os.access checks the rights of the user who started the process. The process may
    # now run as another user (the effective user). If the system can check the effective user's
    # rights, these are checked.
    as_effective_user = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=as_effective_user):
        raise StorageError(
            f"cannot write {target}: {folder} is not writable. Give a folder that is."
        )
