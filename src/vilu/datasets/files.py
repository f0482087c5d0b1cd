"""Files of images: listing folders of any size, reading with a cap, hashing a listing as it goes by."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Final

from vilu.artifacts.disk import or_refuse

MAX_FILE_BYTES: Final = 64 * 2**20  # larger files are not read at all

SUFFIXES = (
    *(
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
    ),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd"),
)
"""File name endings that mean an image; those of the last line so that it is reported as unsupported, not missed."""

MISSING: Final = -1


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file (a pipe would block) of at most ``MAX_FILE_BYTES``; else OSError."""
    found = os.stat(path)  # noqa: PTH116  a million calls: os.stat takes the string as it is
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if found.st_size > MAX_FILE_BYTES:
        raise OSError(
            errno.EFBIG, f"{found.st_size} bytes; at most {MAX_FILE_BYTES} are read", str(path)
        )
    with open(path, "rb") as file:  # noqa: PTH123  as above
        return file.read(MAX_FILE_BYTES)


def read_below(folder: Path, path: str) -> bytes:
    """The bytes of a file below a folder."""
    return read_file(resolve_below(folder, path))


def status_below(folder: Path, path: str) -> os.stat_result | None:
    """The status of a file below a folder; None where it is missing or out of bounds, which reading it tells again."""
    try:
        return os.stat(resolve_below(folder, path))  # noqa: PTH116  called once per row
    except OSError:
        return None


def resolve_below(folder: Path, path: str) -> str:
    """The path of a file below a folder; OSError where it is absolute or climbs out."""
    if not stays_below(path):
        raise OutsideError(
            errno.EACCES, "the path must be relative and stay below its folder", path
        )
    return os.path.join(folder, path)  # noqa: PTH118  called once per row


class OutsideError(OSError):
    """A file lies where none of this data set may be."""


class Bounds:
    """Where the files of a data set may be: nothing outside is read, whatever paths and links say.

    Args:
        folder: What paths are relative to, and stay below.
        home: Where paths that are absolute or climb (``..``) count from; those that end below
            ``folder`` are fine then. None: there may be none.
        beside: Another folder that links may lead into.
    """

    def __init__(
        self, folder: Path, *, home: Path | None = None, beside: Path | None = None
    ) -> None:
        self.folder = folder
        self._home = None if home is None else os.path.realpath(home)
        folders = (folder,) if beside is None else (folder, beside)
        self._inside = tuple(os.path.join(os.path.realpath(one), "") for one in folders)  # noqa: PTH118 with its slash

    def resolve(self, path: str) -> str:
        """The path of a file; OutsideError where that, or what a link on the way leads to, is out of bounds."""
        if self._home is None or stays_below(path) or not path or "\0" in path:
            full = resolve_below(self.folder, path)
        else:
            full = os.path.normpath(os.path.join(self._home, path))  # noqa: PTH118  called once per row
        if not _lies_in(os.path.dirname(full), self._inside) or self.leads_out(full):  # noqa: PTH120  as above
            raise OutsideError(
                errno.EACCES, f"the file must lie below {self._inside[-1]}, links included", path
            )
        return full

    def leads_out(self, full: str) -> bool:
        """Whether a file is a link to one that is out of bounds."""
        return os.path.islink(full) and not os.path.realpath(full).startswith(self._inside)  # noqa: PTH114

    def status(self, path: str) -> os.stat_result | OSError:
        """The status of a file, or why it has none."""
        try:
            return os.stat(self.resolve(path))  # noqa: PTH116  called once per row
        except OSError as error:
            return error.with_traceback(None)

    def real(self, path: str) -> str:
        """Where a path leads, in bounds or not."""
        return os.path.realpath(os.path.join(self._home or self.folder, path.replace("\0", "")))  # noqa: PTH118

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        return read_file(self.resolve(path))


@lru_cache(4096)
def _lies_in(folder: str, inside: tuple[str, ...]) -> bool:
    """Whether a folder is, or is below, one of these, which end in a slash."""
    return os.path.join(os.path.realpath(folder), "").startswith(inside)  # noqa: PTH118


def stays_below(path: str) -> bool:
    """Whether a path is relative and does not climb out, by the rules of POSIX and of Windows."""
    parsed = PureWindowsPath(path)  # knows both separators, drives and shares
    return bool(path) and "\0" not in path and not parsed.anchor and ".." not in parsed.parts


_UNREADABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\N{ARABIC LETTER MARK}\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
"""Characters that a terminal obeys: controls, line ends, and marks of direction."""

_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")


def portable_name(path: str) -> str:
    r"""The path as text for tables and screens; no two paths have one text.

    Bytes that are not UTF-8, and those of characters that a terminal obeys, become ``\xNN``: a
    backslash, x and two hexadecimal digits. A backslash that would look like the beginning of such
    an escape becomes ``\x5c``. All else stays as it is. ``path_of`` gives the path back.

    Examples:
        >>> import os
        >>> from vilu.datasets.files import portable_name
        >>> for name in (b"day 1/caf\xe9.jpg", b"caf\\xe9.jpg", b"\x1b[2J.jpg", b"a\\b.jpg"):
        ...     print(portable_name(os.fsdecode(name)))
        day 1/caf\xe9.jpg
        caf\x5cxe9.jpg
        \x1b[2J.jpg
        a\b.jpg
    """
    if path.isascii() and path.isprintable() and "\\x" not in path:
        return path
    marked = _ESCAPE.sub(rb"\\x5cx\1", _encoded(path))
    text = marked.decode("utf-8", "backslashreplace")
    return _UNREADABLE.sub(lambda match: _escaped(match[0]), text)


def _encoded(path: str) -> bytes:
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:  # half a character, as JSON may hold: no file is called so
        return path.encode("utf-8", "surrogatepass")


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def path_of(text: str) -> str:
    r"""The path that ``portable_name`` has made a text of; any other text is a path itself.

    Examples:
        >>> import os
        >>> from vilu.datasets.files import path_of
        >>> os.fsencode(path_of(r"caf\xe9.jpg")), path_of(r"caf\x5cxe9.jpg")
        (b'caf\xe9.jpg', 'caf\\xe9.jpg')
    """
    if "\\x" not in text:
        return text
    content = _ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), _encoded(text))
    path = os.fsdecode(content)
    return path if portable_name(path) == text else text


def text_among(name: str, texts: Collection[str]) -> str | None:
    """The text that a name in somebody's table means: itself, or that of the path so called."""
    if name in texts:
        return name
    text = portable_name(name)
    return text if text in texts else None


def former_text(text: str) -> str:
    """What 0.1.0 made of the path of this text in a book of labels; two paths could have one such text."""
    return os.fsencode(path_of(text)).decode("utf-8", "backslashreplace")


def subfolders(folder: str | Path) -> list[str]:
    """Names of the real (not linked), visible folders in a folder, sorted by bytes."""
    return [
        entry.name
        for entry in _entries(folder)
        if entry.is_dir(follow_symlinks=False) and not _hidden(entry)
    ]


def walk_images(
    folder: str | Path, ignored: Counter[str], bounds: Bounds | None = None
) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """Path below ``folder`` and status of every image file, in the byte order of the paths; one stat per file.

    Links to files are followed, links to folders never: no loop, and no image listed twice. In
    place of the status stands the error of a link that leads to itself or out of ``bounds``. What
    is passed over is counted in ``ignored`` under "hidden", "linked_folder", "not_image" (by its
    suffix) or "not_a_file".
    """
    skip = len(os.path.join(folder, ""))  # noqa: PTH118  length of the prefix of every entry's path
    pending = _entries(folder)[::-1]
    while pending:
        entry = pending.pop()
        reason = _reason_to_ignore(entry)
        if reason:
            ignored[reason] += 1
        elif _is_folder(entry):
            pending.extend(_entries(entry.path)[::-1])
        else:
            yield entry.path[skip:].replace(os.sep, "/"), _status_of(entry, bounds)


def _reason_to_ignore(entry: os.DirEntry[str]) -> str | None:
    if _hidden(entry):
        return "hidden"
    if _is_folder(entry):
        return "linked_folder" if entry.is_symlink() else None
    if not entry.name.lower().endswith(SUFFIXES):
        return "not_image"
    try:
        return None if entry.is_file() else "not_a_file"
    except OSError:  # it is listed, and its row says why it cannot be read
        return None


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file, or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _status_of(entry: os.DirEntry[str], bounds: Bounds | None) -> os.stat_result | OSError:
    if bounds is not None and entry.is_symlink() and bounds.leads_out(entry.path):
        return OutsideError(errno.EACCES, "the link leads out of its folder", entry.path)
    try:
        return entry.stat()
    except OSError as error:
        return error.with_traceback(None)


def _hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Entries of a folder; a folder's name sorts with its slash, so that a walk is in byte order of whole paths."""
    hint = "Mend its permissions or leave it out."
    with or_refuse(f"list the folder {folder}", hint), os.scandir(folder) as entries:
        return sorted(
            entries,
            key=lambda e: os.fsencode(e.name) + (b"/" if e.is_dir(follow_symlinks=False) else b""),
        )


class ListingHash:
    """Hash over keys, labels, sizes and times of modification, fed one file at a time.

    Args:
        context: What else decides the meaning of the listing (class folders, split).
    """

    def __init__(self, *context: str) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        for text in context:
            self.add(text, MISSING, None)

    def add(self, key: str, label: int, status: os.stat_result | OSError | None) -> None:
        """One file; without a status where it is missing."""
        name = key.encode("utf-8", "surrogateescape")
        size, time = MISSING, MISSING
        if isinstance(status, os.stat_result):
            size, time = status.st_size, status.st_mtime_ns
        self._hash.update(struct.pack("<Qqqq", len(name), label, size, time) + name)

    def add_texts(self, texts: Iterable[bytes | None]) -> None:
        """Texts of files, in order; None where there is none."""
        for text in texts:
            self._hash.update(
                struct.pack("<q", MISSING if text is None else len(text)) + (text or b"")
            )

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()
