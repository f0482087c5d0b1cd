"""Where may be written: a place that is new, empty, or holds what the same inputs made. Anything else is refused.

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
MARK = re.compile(
    rb"<!-- made by vilu: (page|study|results) ([0-9a-f]*) -->\n\Z"
)  # last line of a text of ours
ONNX_MARK = re.compile(rb"vilu\.fingerprint\x12.([0-9a-f]{32})", re.DOTALL)
TAIL = 4096  # bytes at either end of a file in which a mark is looked for


def said_of(inputs: str | None) -> dict[str, str]:
    """What a document or a table says of its inputs."""
    return {INPUTS: inputs} if inputs else {}


def write_said(path: Path, content: dict[str, object], inputs: str) -> None:
    """Write a document with the digest of its inputs."""
    write_json(path, {**content, **said_of(inputs)})


PASSING = re.compile(
    r"\.tmp\Z|\.lock"
)  # in the names, after a dot, of files in the making and of locks

Made = tuple[
    Kind, str
]  # kind of a file of ours, and the digest of its inputs; empty where it does not say


def mark(kind: str, inputs: str) -> str:
    """Last line of a text (HTML, Markdown), by which it is known as ours."""
    return f"<!-- made by vilu: {kind} {inputs} -->\n"


def claim_file(
    path: str | os.PathLike[str], kind: Kind, inputs: str | None = None, *, overwrite: bool = False
) -> bool:
    """Whether a file is there that was made from the same inputs; refuses any other, before the work begins.

    Without ``inputs`` (their digest) nobody compares; with ``overwrite`` any file of its kind is
    made anew.

    Raises:
        UsageError: If another file is there, or no folder for it, or its name does not end as one
            of this kind.
        StorageError: If the folder cannot be written to, or the file not be read.
    """
    target = Path(path)
    if target.suffix.lower() not in (suffixes := SUFFIXES.get(kind, (target.suffix.lower(),))):
        raise UsageError(
            f"vilu keeps {kind} in a {' or '.join(suffixes)} file. Got {target.name!r} instead."
        )
    if os.path.lexists(target):
        found = made(target)
        if found is None or found[0] != kind:
            raise UsageError(
                f"{target} is there and holds no {kind} of vilu, so it is left alone. Give another file, or remove it."
            )
        same = bool(inputs) and found[1] == inputs
        if same and not overwrite and _is_whole(target):
            return True
        if not (same or overwrite):
            raise UsageError(
                f"{target} holds the {kind} of {'other inputs' if found[1] else 'inputs that it does not name'}. "
                "Give another file, or --overwrite to replace it."
            )
    _require_room(target)
    return False


def claim_folder(
    path: str | os.PathLike[str],
    what: str,
    ours: Callable[[Path], bool],
    *,
    same: bool = False,
    overwrite: bool = False,
) -> bool:
    """Whether a folder holds what the same inputs made; refuses one with anything else, before the work begins.

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
    found = entries(root) if root.exists() else []
    if found and same and not overwrite:
        return True
    require_no_others(root, what, (entry for entry in found if not ours(entry)))
    if found and not overwrite:
        raise UsageError(
            f"{root} holds another {what}. Give a new folder, or --overwrite to replace it."
        )
    _require_room(root / what, parents=True)
    return False


def entries(root: Path) -> list[Path]:
    """What lies in a folder, but for locks and files in the making."""
    with or_refuse(f"read {root}"):
        found = [
            path
            for path in root.iterdir()
            if not path.name.startswith(".") or not PASSING.search(path.name)
        ]
    return sorted(found)


def require_no_others(root: Path, what: str, others: Iterable[Path]) -> None:
    """Refuse a folder with files that are not ours."""
    first = min(others, default=None)
    if first is not None:
        raise UsageError(
            f"{root} holds {str(first.relative_to(root))!r}, which is no part of vilu's {what}, so nothing there is "
            "touched. Give a new folder."
        )


def made(path: Path) -> Made | None:
    """What a file of ours says of itself; None of any other."""
    if not path.is_file():
        return None
    with or_refuse(f"read {path}"):
        suffix = path.suffix.lower()
        if suffix not in {".json", ".parquet"}:
            return _made_of_ends(path)
        said = _metadata(path) if suffix == ".parquet" else _content(path)
    kind = KINDS.get(str((said or {}).get("kind")))
    return None if said is None or kind is None else (kind, str(said.get(INPUTS) or ""))


def inputs_of(*paths: Path, **settings: object) -> str:
    """Digest of what a command reads, and of its settings."""
    return digest([[content_of(path) for path in paths], settings])


def content_of(path: Path) -> object:
    """Hash of a file; of a table of ours its digest; of a document with a version all else in it.

    Of a folder what vouches for it, else its listing.
    """
    if path.suffix.lower() == ".json" and MADE_WITH in (_content(path) or {}):
        return _said(path)
    if path.is_file():
        with or_refuse(f"read {path}"):
            said = _metadata(path) if path.suffix.lower() == ".parquet" else None
        return (said or {}).get(SEAL) or file_hash(path)
    documents = ["predictor.json", "risk.json", RUN, MANIFEST]
    if found := [[name, _said(path / name)] for name in documents if (path / name).is_file()]:
        return found
    with or_refuse(f"read {path}"):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [
            [str(file.relative_to(path)), (at := file.stat()).st_size, at.st_mtime_ns]
            for file in files
        ]


def _said(path: Path) -> object:
    """What a document says, whichever vilu wrote and sealed it; of a damaged one the hash."""
    found = _content(path)
    if found is None:
        return file_hash(path)
    return without_version(found, "fingerprint", SEAL)


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
        said = (pyarrow.parquet.read_metadata(path).metadata or {}).get(METADATA_KEY)
        return None if said is None else parse_json(said)
    except (pa.ArrowException, ValueError, RecursionError):
        return None


def _made_of_ends(path: Path) -> Made | None:
    """By how a file begins (CSV) or ends."""
    with path.open("rb") as handle:
        start = handle.read(TAIL)
        handle.seek(max(os.fstat(handle.fileno()).st_size - TAIL, 0))
        end = handle.read()
    for header, kind in HEADERS.items():
        if start.startswith(header):
            return kind, ""
    if exported := ONNX_MARK.search(end):
        return "ONNX export", exported[1].decode()
    if written := MARK.search(end):
        return TEXTS[written[1]], written[2].decode()
    return ("page", "") if b"Made by vilu " in end and end.rstrip().endswith(b"</html>") else None


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


def _require_room(target: Path, *, parents: bool = False) -> None:
    """Refuse a place whose folder is not there (``parents``: cannot be made), or cannot be written to."""
    folder = target.parent
    while parents and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise UsageError(
            f"cannot write {target}: the folder {folder} {what}. Make it, or give another place."
        )
    if not os.access(
        folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        raise StorageError(
            f"cannot write {target}: {folder} is not writable. Give a folder that is."
        )
