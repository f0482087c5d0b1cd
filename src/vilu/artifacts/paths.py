"""Where may be written: a place that is new, empty, or holds what the same inputs made.

Any other place is refused.

``--overwrite``, and the library, make anew what vilu has made; files that it does not know as its
own stay as they are.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from vilu.artifacts.disk import MANIFEST, RUN, file_hash, or_refuse
from vilu.artifacts.documents import (
    MADE_WITH,
    SEAL,
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

Table = Literal["scores", "results", "labels", "label errors"]
Kind = Literal[
    Table, "explanation", "monitor report", "monitor state", "page", "study", "ONNX export"
]
"""What a file of ours is, in a message."""

KINDS: dict[str, Kind] = {
    "outcomes": "scores",
    "results": "results",
    "explanations": "explanation",
    "risk_map": "explanation",
    "prompt_gains": "explanation",
    "summary": "explanation",
    "monitoring": "monitor report",
    "monitor": "monitor state",
    "label errors": "label errors",
}
"""By the "kind" that documents and tables of ours name."""

HEADERS: dict[bytes, Kind] = {
    b"row_id,key,pred,pred_name,label,label_name,uncertainty,failure,reason,score_name": "scores",
    b"method,dataset,split,seed,metric,value,ci_low,ci_high,n,n_failures,accuracy,": "results",
    b"path,label,suggested,quality,is_error": "label errors",
    b"path,label,answer,failure_probability,stream,probability,predictor,asked": "labels",
}
"""How our CSVs begin, which name nothing else."""

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "results": (".json", ".parquet", ".csv"),
    "labels": (".csv",),
    "label errors": (".parquet", ".csv"),
    "scores": (".parquet", ".csv"),
    "monitor state": (".parquet",),
}
"""Ends of the names of files, of kinds that have some."""

INPUTS = "inputs"  # key of the digest of what a file was made from
TEXTS: dict[bytes, Kind] = {b"page": "page", b"study": "study", b"results": "results"}
# last line of a text of ours
MARK = re.compile(rb"<!-- made by vilu: (page|study|results) ([0-9a-f]*) -->\n\Z")
ONNX_MARK = re.compile(rb"vilu\.fingerprint\x12.([0-9a-f]{32})", re.DOTALL)
TAIL = 4096  # bytes at either end of a file in which a mark is looked for


def inputs_entry(inputs: str | None) -> dict[str, str]:
    """What a document or a table says of its inputs."""
    if not inputs:
        return {}
    return {INPUTS: inputs}


def write_with_inputs(path: Path, content: dict[str, object], inputs: str) -> None:
    """Write a document with the digest of its inputs."""
    write_json(path, {**content, **inputs_entry(inputs)})


# in the names, after a dot, of files in the making and of locks
PASSING = re.compile(r"\.tmp\Z|\.lock")

# kind of a file of ours, and the digest of its inputs; empty where it does not say
KindAndInputs = tuple[Kind, str]


def mark(kind: str, inputs: str) -> str:
    """Last line of a text (HTML, Markdown), by which it is known as ours."""
    return f"<!-- made by vilu: {kind} {inputs} -->\n"


def claim_file(
    path: str | os.PathLike[str], kind: Kind, inputs: str | None = None, *, overwrite: bool = False
) -> bool:
    """Whether a file is there that was made from the same inputs.

    Any other file is refused, before the work begins.

    Without ``inputs`` (their digest) nobody compares; with ``overwrite`` any file of its kind is
    made anew.

    Raises:
        UsageError: If another file is there, or no folder for it, or its name does not end as one
            of this kind.
        StorageError: If the folder cannot be written to, or the file not be read.
    """
    target = Path(path)
    _require_suffix(target, kind)
    if os.path.lexists(target):
        its_inputs = _require_kind(target, kind)
        is_same = bool(inputs) and its_inputs == inputs
        if is_same and not overwrite and _is_whole(target):
            return True
        if not is_same and not overwrite:
            source = "inputs that it does not name"
            if its_inputs:
                source = "other inputs"
            raise UsageError(
                f"{target} holds the {kind} of {source}. "
                "Give another file, or --overwrite to replace it."
            )
    _require_room(target)
    return False


def _require_suffix(target: Path, kind: Kind) -> None:
    """Refuse a name that does not end as those of a kind of files."""
    suffixes = SUFFIXES.get(kind)
    if suffixes is not None and target.suffix.lower() not in suffixes:
        raise UsageError(
            f"vilu keeps {kind} in a {' or '.join(suffixes)} file. Got {target.name!r} instead."
        )


def _require_kind(target: Path, kind: Kind) -> str:
    """The digest of the inputs of a file of this kind; refuses any other file."""
    ours = kind_and_inputs(target)
    if ours is None or ours[0] != kind:
        raise UsageError(
            f"{target} is there and holds no {kind} of vilu, so it is left alone. "
            "Give another file, or remove it."
        )
    return ours[1]


def claim_folder(
    path: str | os.PathLike[str],
    what: str,
    ours: Callable[[Path], bool],
    *,
    same: bool = False,
    overwrite: bool = False,
) -> bool:
    """Whether a folder holds what the same inputs made.

    A folder with anything else is refused, before the work begins.

    ``ours`` tells whether a path in it is of ``what``; files in the making and locks are not asked
    about. ``same`` says that the same inputs made what is there; with ``overwrite`` it is made anew
    whatever did.

    Raises:
        UsageError: If it is no folder, or something else lies there, or what other inputs made.
        StorageError: If the folder cannot be written to.
    """
    root = Path(path)
    if os.path.lexists(root) and not root.is_dir():
        raise UsageError(f"{root} is a file, so no {what} can be put there. Give a new folder.")
    present: list[Path] = []
    if root.exists():
        present = entries(root)
    if present and same and not overwrite:
        return True
    require_no_others(root, what, (entry for entry in present if not ours(entry)))
    if present and not overwrite:
        raise UsageError(
            f"{root} holds another {what}. Give a new folder, or --overwrite to replace it."
        )
    _require_room(root / what, parents=True)
    return False


def entries(root: Path) -> list[Path]:
    """What lies in a folder, but for locks and files in the making."""
    with or_refuse(f"read {root}"):
        return sorted(path for path in root.iterdir() if not _is_passing(path.name))


def _is_passing(name: str) -> bool:
    """Whether a file is a lock, or still being written."""
    return name.startswith(".") and PASSING.search(name) is not None


def require_no_others(root: Path, what: str, foreign: Iterable[Path]) -> None:
    """Refuse a folder with files that are not ours."""
    first = min(foreign, default=None)
    if first is not None:
        raise UsageError(
            f"{root} holds {str(first.relative_to(root))!r}, which is no part of vilu's {what}, "
            "so nothing there is touched. Give a new folder."
        )


def kind_and_inputs(path: Path) -> KindAndInputs | None:
    """What a file of ours says of itself; None of any other."""
    if not path.is_file():
        return None
    with or_refuse(f"read {path}"):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            facts = _metadata(path)
        elif suffix == ".json":
            facts = _content(path)
        else:
            return _kind_at_ends(path)
    if facts is None:
        return None
    kind = KINDS.get(str(facts.get("kind")))
    if kind is None:
        return None
    return kind, str(facts.get(INPUTS) or "")


def inputs_of(*paths: Path, **settings: object) -> str:
    """Digest of what a command reads, and of its settings."""
    return digest([[content_of(path) for path in paths], settings])


def content_of(path: Path) -> object:
    """Hash of a file; of a table of ours its digest; of a document with a version all else in it.

    Of a folder it is what vouches for it; of one without such documents its listing.
    """
    is_document = path.suffix.lower() == ".json"
    if is_document and MADE_WITH in (_content(path) or {}):
        return _facts_of(path)
    if path.is_file():
        return _file_digest(path)
    names = ["predictor.json", "risk.json", RUN, MANIFEST]
    documents = [[name, _facts_of(path / name)] for name in names if (path / name).is_file()]
    if documents:
        return documents
    listing: list[object] = []
    with or_refuse(f"read {path}"):
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            status = file.stat()
            listing.append([str(file.relative_to(path)), status.st_size, status.st_mtime_ns])
    return listing


def _file_digest(path: Path) -> object:
    """The digest that a table of ours carries; of any other file the hash."""
    if path.suffix.lower() == ".parquet":
        with or_refuse(f"read {path}"):
            metadata = _metadata(path) or {}
        if metadata.get(SEAL):
            return metadata[SEAL]
    return file_hash(path)


def _facts_of(path: Path) -> object:
    """What a document says, whichever vilu wrote and sealed it; of a damaged one the hash."""
    facts = _content(path)
    if facts is None:
        return file_hash(path)
    return without_version(facts, "fingerprint", SEAL)


def _content(path: Path) -> dict[str, Any] | None:
    """What a JSON document says; None of any other file."""
    try:
        return parse_json(read_bounded(path, "Make it again", DataError))
    except (ValueError, RecursionError):
        return None


def _metadata(path: Path) -> dict[str, Any] | None:
    """What a table of ours says of itself; None of any other."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        content = (pyarrow.parquet.read_metadata(path).metadata or {}).get(METADATA_KEY)
        if content is None:
            return None
        return parse_json(content)
    except (pa.ArrowException, ValueError, RecursionError):
        return None


def _kind_at_ends(path: Path) -> KindAndInputs | None:
    """By how a file begins (CSV) or ends."""
    with path.open("rb") as handle:
        start = handle.read(TAIL)
        handle.seek(max(os.fstat(handle.fileno()).st_size - TAIL, 0))
        end = handle.read()
    for header, kind in HEADERS.items():
        if start.startswith(header):
            return kind, ""
    exported = ONNX_MARK.search(end)
    if exported:
        return "ONNX export", exported[1].decode()
    text = MARK.search(end)
    if text:
        return TEXTS[text[1]], text[2].decode()
    # a page that names no inputs
    if b"Made by vilu " in end and end.rstrip().endswith(b"</html>"):
        return "page", ""
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file of ours has the content that its digest is of, where it has one."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            read_json(path, "Make it again")
        elif suffix == ".parquet":
            read_table(path, ())
    except ViLUError as error:
        logger.warning("it is made again: %s", error)
        return False
    return True


def _first_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there; at last the root."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _require_room(target: Path, *, parents: bool = False) -> None:
    """Refuse a place whose folder is not there, or cannot be written to.

    With ``parents`` it is enough that the folder can be made.
    """
    folder = target.parent
    if parents:
        folder = _first_existing(folder)
    if not folder.is_dir():
        fault = "does not exist"
        if folder.exists():
            fault = "is no folder"
        raise UsageError(
            f"cannot write {target}: the folder {folder} {fault}. Make it, or give another place."
        )
    as_effective_user = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=as_effective_user):
        raise StorageError(
            f"cannot write {target}: {folder} is not writable. Give a folder that is."
        )
