"""The files of a predictor, copied and nothing else, and a folder that is there at once or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vilu.document import MAX_DOCUMENT_BYTES
from vilu.errors import DataError, StorageError, UsageError, ViLUError
from vilu.files import host_hash, make_folder
from vilu.predictors.storage import CARD, MAX_JSON_BYTES, PREDICTOR, RISK, WEIGHTS, load, read_record

FILES = {
    WEIGHTS: 4 << 30,
    PREDICTOR: MAX_JSON_BYTES,
    CARD: 1 << 20,
    RISK: MAX_DOCUMENT_BYTES,
    "calibration.parquet": 1 << 30,
}
"""All that is shared of a predictor's folder, with the most bytes of each; no pickle, no code."""


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """An empty folder next to ``target``, on the same file system; it is gone after the block.

    Raises:
        StorageError: If the file system refuses.
    """
    make_folder(target.parent)
    name = f".{target.name}.{host_hash()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    folder = make_folder(target.with_name(name))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_files(source: Path, destination: Path, *, links: bool) -> str:
    """Copy what ``FILES`` names, load the copy once, and return its fingerprint.

    Args:
        source: A saved predictor.
        destination: A folder that is there and empty.
        links: Whether symbolic links are followed, as a cache of the hub has them; else they are refused.

    Raises:
        UsageError: If a file is a symbolic link, and ``links`` is not set.
        DataError: If a file is too large, or the files are not those of a predictor.
        StorageError: If the file system refuses.
    """
    if not source.is_dir():
        raise DataError(f"no predictor here: {source} is no folder. Make one with `vilu fit`.")
    try:
        for name, limit in FILES.items():
            path = source / name
            if path.is_symlink() and not links:
                raise UsageError(f"{path} is a symbolic link, so it could be anything on this machine. Copy the file.")
            if path.is_file():
                _copy(path, destination / name, limit)
    except ViLUError:
        raise
    except OSError as error:
        raise StorageError(f"cannot copy {source} to {destination}: {error.strerror or error}.") from error
    return check(destination, source)


def _copy(path: Path, target: Path, limit: int) -> None:
    require_size(str(path), path.stat().st_size, limit)
    with path.open("rb") as source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())


def require_size(name: str, size: int, limit: int) -> None:
    """Refuse a file that no predictor has.

    Raises:
        DataError: If it is larger than ``limit`` bytes.
    """
    if size > limit:
        raise DataError(f"{name} has {size:,} bytes; of this file at most {limit:,} are expected in a predictor.")


def check(folder: Path, name: object) -> str:
    """Load a predictor once, and return its fingerprint.

    Raises:
        DataError: If it cannot be loaded, however it fails.
        ProvenanceError: If a newer vilu wrote it.
    """
    try:
        load(folder)
        return str(read_record(folder / PREDICTOR)["fingerprint"])
    except ViLUError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # foreign files, any content
        raise DataError(
            f"{name} holds a damaged predictor: {type(error).__name__}: {error}".rstrip(".") + "."
        ) from error


def require_ours(target: Path) -> None:
    """Refuse a place that has other files than a predictor's: they would be lost.

    Raises:
        UsageError: Naming one of them.
    """
    if not target.exists():
        return
    foreign = [path.name for path in target.iterdir() if path.name not in FILES] if target.is_dir() else [target.name]
    if foreign:
        raise UsageError(f"{target} holds {min(foreign)!r}, which is none of a predictor's files. Give a new folder.")


def require_same(target: Path, fingerprint: str) -> None:
    """Refuse a place that has another predictor.

    Raises:
        UsageError: If it has.
    """
    if not target.exists() or not any(target.iterdir()):
        return
    found = read_record(target / PREDICTOR).get("fingerprint") if (target / PREDICTOR).is_file() else None
    if found != fingerprint:
        raise UsageError(f"{target} holds another predictor. Give a new folder, or --overwrite to replace it.")


def place(staged: Path, target: Path) -> None:
    """Put a finished folder in the place of ``target``; a reader sees the old one, the new one, or for a moment none.

    Raises:
        StorageError: If the file system refuses; the old folder is then back in its place.
    """
    try:
        with beside(target) as aside:
            old = aside / "old"
            if target.exists():
                target.rename(old)
            try:
                staged.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
    except OSError as error:
        raise StorageError(f"cannot put the predictor into {target}: {error.strerror or error}.") from error
