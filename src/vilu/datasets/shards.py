"""Which tar files are meant: a folder of them, one, or a pattern with braces."""

from __future__ import annotations

import os
import re
from itertools import product
from math import prod
from pathlib import Path
from typing import Final

from vilu.datasets.files import subfolders
from vilu.datasets.formats import SUFFIXES
from vilu.errors import DataError, StorageError, UsageError

SUFFIX: Final = ".tar"
COMPRESSED: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
MAX_SHARDS: Final = 1_000_000


def find_shards(source: str | Path) -> list[Path] | None:
    """The shards that a source names, in order; None where it is something else.

    A folder's are in the byte order of their names; a pattern's in the order of the shell, the last braces fastest.

    Raises:
        UsageError: If it is a URL, a pattern that cannot be expanded or whose files are not all there, or a folder that
            holds something else to read as well.
        DataError: If the tars are compressed.
        StorageError: If the folder cannot be listed.
    """
    text, path = os.fspath(source), Path(source)
    exists = os.path.exists(path)  # noqa: PTH110  Path raises on a pattern that is longer than any name
    if exists and path.is_dir():
        return _in_folder(path)
    _refuse_others(text, exists)
    if exists or "{" not in text:
        return [path] if exists and path.suffix.lower() == SUFFIX else None
    paths = [Path(name) for name in expand_braces(text)]
    missing = [name for name in paths if not name.exists()]
    if missing:
        raise UsageError(
            f"{text} names {len(paths)} shards; {len(missing)} are not there, the first is {missing[0]}. "
            "Mend the pattern or download them."
        )
    other = next((name for name in paths if name.suffix.lower() != SUFFIX), None)
    if other is not None:
        raise UsageError(f"a pattern names shards ending in {SUFFIX}. {text} names {other}.")
    return paths


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for: ``{a,b}`` lists, ``{00..10}`` numbers (as wide as written), no nesting.

    Raises:
        UsageError: If braces do not match, are nested, hold neither a list nor two numbers, or mean too many names.

    Example:
        >>> expand_braces("{a,b}-{08..10}.tar")
        ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if any(mark in piece for piece in pieces for mark in "{}"):
        raise UsageError(f"{pattern}: braces must match and cannot be nested.")
    ranges = [_alternatives(piece, pattern) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if prod(len(names) for names in ranges) > MAX_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} names. Name fewer shards.")
    return ["".join(names) for names in product(*ranges)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    if "," in inside:
        return inside.split(",")
    match = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inside)
    if match is None:
        raise UsageError(f"{pattern}: braces hold a list {{a,b}} or two numbers {{00..10}}. Found {{{inside}}}.")
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} names. Name fewer shards.")
    padded = any(len(end) > 1 and end.startswith("0") for end in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    step = 1 if last >= first else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]


def _in_folder(folder: Path) -> list[Path] | None:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    except OSError as error:
        raise StorageError(f"cannot list the folder {folder}: {error}. Mend its permissions.") from error
    shards = sorted((name for name in names if name.lower().endswith(SUFFIX)), key=os.fsencode)
    images = next((name for name in names if name.lower().endswith(SUFFIXES)), None)
    others = [] if not shards else subfolders(folder) if images is None else [images]
    if others:
        raise UsageError(
            f"{folder} holds tar files and {others[0]!r}, so what to read is unclear. "
            f"Move the tar files out, or name them: '{folder}/{{{shards[0]},...}}'."
        )
    compressed = next((name for name in names if name.lower().endswith(COMPRESSED)), None)
    if not shards and images is None and compressed is not None and not subfolders(folder):
        _refuse_compressed(str(folder / compressed))
    return [folder / name for name in shards] or None


def _refuse_others(text: str, exists: bool) -> None:
    if not exists and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):  # two letters: not a drive
        raise UsageError(f"{text} is no file: nothing is downloaded and no command is run. Give files on a disk.")
    if text.lower().endswith(COMPRESSED):
        _refuse_compressed(text)


def _refuse_compressed(name: str) -> None:
    raise DataError(
        f"{name} is compressed, so it cannot be read in parts. Uncompress it (gunzip, unxz, unzstd) to a {SUFFIX} file."
    )
