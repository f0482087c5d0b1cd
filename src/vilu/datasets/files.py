"""Files of images: folders of any size are listed, files read with a cap, listings hashed."""

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

_PHOTOS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif")
_BITMAPS = (".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm")
_UNSUPPORTED = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd")
SUFFIXES = _PHOTOS + _BITMAPS + _UNSUPPORTED
"""File name endings that mean an image.

An image that is not supported is listed, too, so that it is reported and not missed.
"""

MISSING: Final = -1


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file of at most ``MAX_FILE_BYTES``; else OSError.

    A pipe would block.
    """
    status = os.stat(path)  # noqa: PTH116  a million calls: os.stat takes the string as it is
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > MAX_FILE_BYTES:
        reason = f"{status.st_size} bytes; at most {MAX_FILE_BYTES} are read"
        raise OSError(errno.EFBIG, reason, str(path))
    with open(path, "rb") as file:  # noqa: PTH123  as above
        return file.read(MAX_FILE_BYTES)


def read_below(folder: Path, path: str) -> bytes:
    """The bytes of a file below a folder."""
    return read_file(resolve_below(folder, path))


def status_below(folder: Path, path: str) -> os.stat_result | None:
    """The status of a file below a folder; None where it is missing or out of bounds.

    Reading the file says again which of the two it is.
    """
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
    return os.path.join(folder, path)  # noqa: PTH118  once per row


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
        self._home: str | None = None
        if home is not None:
            self._home = os.path.realpath(home)
        self._inside: tuple[str, ...] = (_real_prefix(folder),)
        if beside is not None:
            self._inside += (_real_prefix(beside),)

    def resolve(self, path: str) -> str:
        """The path of a file; OutsideError where it, or a link on the way, leads out of bounds."""
        full = self._full(path)
        folder = os.path.dirname(full)  # noqa: PTH120  called once per row
        if not _lies_in(folder, self._inside) or self.leads_out(full):
            reason = f"the file must lie below {self._inside[-1]}, links included"
            raise OutsideError(errno.EACCES, reason, path)
        return full

    def _full(self, path: str) -> str:
        """The path of a file from the folder; from home where it is absolute or climbs."""
        if self._home is None or stays_below(path):
            return resolve_below(self.folder, path)
        if not _can_be_path(path):
            return resolve_below(self.folder, path)  # this refuses it
        return os.path.normpath(os.path.join(self._home, path))  # noqa: PTH118  once per row

    def leads_out(self, full: str) -> bool:
        """Whether a file is a link to one that is out of bounds."""
        if not os.path.islink(full):  # noqa: PTH114  called once per row
            return False
        return not os.path.realpath(full).startswith(self._inside)

    def status(self, path: str) -> os.stat_result | OSError:
        """The status of a file, or why it has none."""
        try:
            return os.stat(self.resolve(path))  # noqa: PTH116  called once per row
        except OSError as error:
            return error.with_traceback(None)

    def real(self, path: str) -> str:
        """Where a path leads, in bounds or not."""
        start = self._home or self.folder
        without_nul = path.replace("\0", "")
        return os.path.realpath(os.path.join(start, without_nul))  # noqa: PTH118  once per row

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        return read_file(self.resolve(path))


def _real_prefix(folder: str | Path) -> str:
    """The real path of a folder with a slash: what lies in it, and nothing else, begins so."""
    return os.path.join(os.path.realpath(folder), "")  # noqa: PTH118  a Path drops the slash


@lru_cache(4096)
def _lies_in(folder: str, inside: tuple[str, ...]) -> bool:
    """Whether a folder is, or is below, one of the folders with these prefixes."""
    return _real_prefix(folder).startswith(inside)


def _can_be_path(path: str) -> bool:
    """Whether a file can have this path: no system takes an empty one, or one with NUL in it."""
    return bool(path) and "\0" not in path


def stays_below(path: str) -> bool:
    """Whether a path is relative and does not climb out, by the rules of POSIX and of Windows."""
    if not _can_be_path(path):
        return False
    parsed = PureWindowsPath(path)  # knows both separators, drives and shares
    climbs = ".." in parsed.parts
    return not parsed.anchor and not climbs


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
    is_plain = path.isascii() and path.isprintable()
    if is_plain and "\\x" not in path:
        return path
    marked = _ESCAPE.sub(rb"\\x5cx\1", _encoded(path))
    text = marked.decode("utf-8", "backslashreplace")
    return _UNREADABLE.sub(_escaped, text)


def _encoded(path: str) -> bytes:
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:  # half a character, as JSON may hold: no file is called so
        return path.encode("utf-8", "surrogatepass")


def _escaped(match: re.Match[str]) -> str:
    """The escapes of the bytes of a character."""
    return "".join(f"\\x{byte:02x}" for byte in match[0].encode())


def _unescaped(match: re.Match[bytes]) -> bytes:
    """The byte that an escape means."""
    digits = match[1].decode()
    return bytes.fromhex(digits)


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
    content = _ESCAPE.sub(_unescaped, _encoded(text))
    path = os.fsdecode(content)
    if portable_name(path) != text:
        return text
    return path


def text_among(name: str, texts: Collection[str]) -> str | None:
    """The text that a name in somebody's table means: itself, or that of the path so called."""
    if name in texts:
        return name
    text = portable_name(name)
    if text not in texts:
        return None
    return text


def former_text(text: str) -> str:
    """What 0.1.0 made of the path of this text in a book of labels.

    Two paths could have one such text.
    """
    return os.fsencode(path_of(text)).decode("utf-8", "backslashreplace")


def subfolders(folder: str | Path) -> list[str]:
    """Names of the real (not linked), visible folders in a folder, sorted by bytes."""
    names = []
    for entry in _entries(folder):
        is_real_folder = entry.is_dir(follow_symlinks=False)
        if is_real_folder and not _hidden(entry):
            names.append(entry.name)
    return names


def walk_images(
    folder: str | Path, ignored: Counter[str], bounds: Bounds | None = None
) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """Path below ``folder`` and status of every image file, in the byte order of the paths.

    Each file costs one stat. Links to files are followed, links to folders never: no loop, and no
    image listed twice. In place of the status stands the error of a link that leads to itself or
    out of ``bounds``. What is passed over is counted in ``ignored`` under "hidden",
    "linked_folder", "not_image" (by its suffix) or "not_a_file".
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
        if entry.is_symlink():
            return "linked_folder"
        return None
    if not entry.name.lower().endswith(SUFFIXES):
        return "not_image"
    try:
        if not entry.is_file():
            return "not_a_file"
    except OSError:  # it is listed, and its row says why it cannot be read
        return None
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
    if bounds is not None and entry.is_symlink():
        if bounds.leads_out(entry.path):
            return OutsideError(errno.EACCES, "the link leads out of its folder", entry.path)
    try:
        return entry.stat()
    except OSError as error:
        return error.with_traceback(None)


def _hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Entries of a folder, in the order of a walk."""
    hint = "Mend its permissions or leave it out."
    with or_refuse(f"list the folder {folder}", hint), os.scandir(folder) as entries:
        return sorted(entries, key=_place_in_walk)


def _place_in_walk(entry: os.DirEntry[str]) -> bytes:
    """Folders sort with their slash, so that a walk is in the byte order of whole paths."""
    name = os.fsencode(entry.name)
    if entry.is_dir(follow_symlinks=False):
        return name + b"/"
    return name


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
        size = MISSING
        time = MISSING
        if isinstance(status, os.stat_result):
            size = status.st_size
            time = status.st_mtime_ns
        self._hash.update(struct.pack("<Qqqq", len(name), label, size, time) + name)

    def add_texts(self, texts: Iterable[bytes | None]) -> None:
        """Texts of files, in order; None where there is none."""
        for text in texts:
            if text is None:
                self._hash.update(struct.pack("<q", MISSING))
            else:
                self._hash.update(struct.pack("<q", len(text)) + text)

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()
