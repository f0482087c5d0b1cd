"""Image files: list folders of any size, read files up to a size limit, hash listings."""

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
from pathlib import Path, PurePath, PureWindowsPath
from typing import Final, NamedTuple

from vilu.artifacts.disk import convert_os_errors

MAX_FILE_BYTES: Final = 64 * 2**20  # larger files are not read at all

_PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif")
_BITMAP_SUFFIXES = (".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm")
_PHONE_SUFFIXES = (".avif", ".heic", ".heif", ".hif")
_UNSUPPORTED_SUFFIXES = (".jp2", ".jxl", ".svg", ".psd")
_CANON_NIKON_SONY_RAW = (".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2")
_OTHER_RAW = (".dng", ".raf", ".orf", ".rw2", ".pef", ".srw", ".3fr", ".erf", ".kdc", ".mrw")
RAW_SUFFIXES = _CANON_NIKON_SONY_RAW + _OTHER_RAW + (".x3f", ".iiq", ".rwl")
"""File name endings of RAW photos. RAW photos are not decoded."""

IMAGE_SUFFIXES = (
    _PHOTO_SUFFIXES + _BITMAP_SUFFIXES + _PHONE_SUFFIXES + _UNSUPPORTED_SUFFIXES + RAW_SUFFIXES
)
"""File name endings of images.

Formats without a decoder are included, so that such a file is reported and not skipped.
"""

NO_VALUE: Final = -1  # stands for a missing label, size or time in a listing's hash


def read_file(path: str | Path) -> bytes:
    """Return the bytes in a regular file.

    Raises:
        OSError: If the file is not regular, has more than ``MAX_FILE_BYTES``, or cannot be read.
    """
    # os.stat is faster than Path.stat, and there may be a million calls
    try:
        status = os.stat(path)  # noqa: PTH116
    except ValueError as error:  # the path has a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait without end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > MAX_FILE_BYTES:
        reason = f"{status.st_size} bytes; at most {MAX_FILE_BYTES} are read"
        raise OSError(errno.EFBIG, reason, str(path))
    with open(path, "rb") as file:  # noqa: PTH123  for speed
        return file.read(MAX_FILE_BYTES)


def size_and_time(path: Path) -> tuple[int, int] | None:
    """Return a file's size in bytes and modification time in ns. Without the file, return None.

    Raise StorageError if the file system gives no answer.
    """
    with convert_os_errors(f"cannot read {path}"):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
    return status.st_size, status.st_mtime_ns


def read_below(folder: Path, path: str) -> bytes:
    """Return the bytes in a file below a folder."""
    full_path = resolve_below(folder, path)
    return read_file(full_path)


def status_below(folder: Path, path: str) -> os.stat_result | None:
    """Return the status of a file below a folder.

    If the file is missing, or if ``path`` leads out of the folder, return None. For a path that
    leads out, ``read_below`` raises ForbiddenPathError.
    """
    try:
        return os.stat(resolve_below(folder, path))  # noqa: PTH116  for speed
    except OSError:
        return None


def resolve_below(folder: Path, path: str) -> str:
    """Return the full path of a file below a folder.

    Raises:
        ForbiddenPathError: If ``path`` is absolute, is empty, or contains ".." or NUL.
    """
    if not is_relative_without_dotdot(path):
        raise ForbiddenPathError(
            errno.EACCES, "the path must be relative and stay below its folder", path
        )
    return os.path.join(folder, path)  # noqa: PTH118  for speed


class ForbiddenPathError(OSError):
    """The error for a file outside the allowed folders (``AllowedFolders``)."""


class AllowedFolders:
    """The allowed folders for a data set's files. No file outside these folders is read.

    A file's real location is checked, after all links have been followed.

    Args:
        folder: Folder where relative paths start. Files must be below this folder.
        table_folder: Folder of the table that lists the files. Paths with ".." start from this
            folder. Absolute paths and paths with ".." are accepted if the file is below ``folder``.
            If ``table_folder`` is None, these paths raise an error.
        link_folder: A second allowed folder for link targets.
        follow_links: Whether links may lead anywhere, and links to folders are followed, too. Paths
            still have to be below ``folder``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        table_folder: Path | None = None,
        link_folder: Path | None = None,
        follow_links: bool = False,
    ) -> None:
        self.folder = folder
        self.follow_links = follow_links
        self._table_folder: str | None = None
        if table_folder is not None:
            self._table_folder = os.path.realpath(table_folder)
        # prefixes that allowed files' real paths have
        self._prefixes: tuple[str, ...] = (_real_prefix(folder),)
        if link_folder is not None:
            self._prefixes += (_real_prefix(link_folder),)

    def resolve(self, path: str) -> str:
        """Return a file's full path.

        Raises:
            FileNotFoundError: If no file can have this path.
            ForbiddenPathError: If the path, or a link on it, leads out of the allowed folders.
        """
        full_path = self._full_path(path)
        if self.follow_links:
            return full_path
        # The result for the folder is cached, so this check is fast. In an allowed folder, only a
        # file that is a link can lead out.
        folder = os.path.dirname(full_path)  # noqa: PTH120  for speed
        is_folder_inside = _has_real_prefix(folder, self._prefixes)
        if not is_folder_inside or self.is_forbidden_link(full_path):
            folders = " or ".join(self._prefixes)
            reason = f"the file must lie below {folders}, links included"
            raise ForbiddenPathError(errno.EACCES, reason, path)
        return full_path

    def _full_path(self, path: str) -> str:
        """Return a file's full path, starting from ``folder``.

        There is an exception if ``table_folder`` is not None: a path with ".." starts from
        ``table_folder``, and an absolute path is used unchanged.

        Raises:
            FileNotFoundError: If no file can have this path.
            ForbiddenPathError: If the path is absolute or contains "..", and ``table_folder`` is
                None.
        """
        if not _can_be_path(path):
            raise FileNotFoundError(errno.ENOENT, "an empty path, or one with NUL", path)
        # by the rules of this system: "c:1.png" and "a\\b.png" are file names on POSIX
        parsed = PurePath(path)
        leads_out = parsed.anchor != "" or ".." in parsed.parts
        if not leads_out:
            return os.path.join(self.folder, path)  # noqa: PTH118  for speed
        if self._table_folder is None:
            raise ForbiddenPathError(
                errno.EACCES, "the path must be relative and stay below its folder", path
            )
        return os.path.normpath(os.path.join(self._table_folder, path))  # noqa: PTH118  for speed

    def is_forbidden_link(self, full_path: str) -> bool:
        """Return whether a file is a link that leads out of the allowed folders."""
        if self.follow_links or not os.path.islink(full_path):  # noqa: PTH114  for speed
            return False
        return not os.path.realpath(full_path).startswith(self._prefixes)

    def status(self, path: str) -> os.stat_result | OSError:
        """Return a file's status, or the system call's error."""
        try:
            return os.stat(self.resolve(path))  # noqa: PTH116  for speed
        except OSError as error:
            return error.with_traceback(None)

    def real_path(self, path: str) -> str:
        """Return a file's real path, after all links. The path may be forbidden."""
        start = self._table_folder or self.folder
        without_nul = path.replace("\0", "")  # os.path.realpath raises an error at a NUL
        return os.path.realpath(os.path.join(start, without_nul))  # noqa: PTH118  for speed

    def read(self, path: str) -> bytes:
        """Return the bytes in a file."""
        full_path = self.resolve(path)
        return read_file(full_path)


def _real_prefix(folder: str | Path) -> str:
    """Return a folder's real path with a slash at the end.

    A file's real path begins with this text if, and only if, the file is below the folder.
    """
    return os.path.join(os.path.realpath(folder), "")  # noqa: PTH118  a Path drops the slash


@lru_cache(4096)
def _has_real_prefix(folder: str, prefixes: tuple[str, ...]) -> bool:
    """Return whether a folder's real path begins with a prefix in ``prefixes`` (``_real_prefix``).

    The results are cached, because most files in a data set are in few folders.
    """
    real_prefix = _real_prefix(folder)
    return real_prefix.startswith(prefixes)


def _can_be_path(path: str) -> bool:
    """Return whether a path is possible. No system accepts an empty path, or a path with NUL."""
    return bool(path) and "\0" not in path


def is_relative_without_dotdot(path: str) -> bool:
    """Return whether a path is relative and without "..", by POSIX and Windows rules."""
    if not _can_be_path(path):
        return False
    parsed = PureWindowsPath(path)  # understands both separators, drives and network shares
    is_relative = parsed.anchor == ""
    return is_relative and ".." not in parsed.parts


_CONTROL_CHARACTERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\N{ARABIC LETTER MARK}\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
"""Characters for controlling a terminal: controls, line ends, text direction marks."""

_ESCAPE_PATTERN = re.compile(rb"\\x([0-9a-f]{2})")  # such as \xe9


def portable_name(path: str) -> str:
    r"""Return a path as text for tables and screens. Different paths have different texts.

    Two kinds of bytes become ``\xNN`` (a backslash, x and two hexadecimal digits): bytes that are
    not UTF-8, and bytes in characters that control a terminal. A backslash that looks like the
    beginning of such an escape becomes ``\x5c``. The path's remaining text is unchanged.
    ``original_path`` is the inverse function.

    Examples:
        >>> import os
        >>> from vilu.datasets.files import portable_name
        >>> not_utf8 = os.fsdecode(b"caf\xe9.jpg")
        >>> clears_terminal = "\x1b[2J.jpg"
        >>> looks_like_escape = r"caf\xe9.jpg"
        >>> for path in (not_utf8, clears_terminal, looks_like_escape):
        ...     print(portable_name(path))
        caf\xe9.jpg
        \x1b[2J.jpg
        caf\x5cxe9.jpg
    """
    is_plain = path.isascii() and path.isprintable()
    if is_plain and "\\x" not in path:
        return path
    # if the path already has a text like an escape, the backslash in this text is escaped
    path_bytes = _ESCAPE_PATTERN.sub(rb"\\x5cx\1", _path_bytes(path))
    text = path_bytes.decode("utf-8", "backslashreplace")
    return _CONTROL_CHARACTERS.sub(_escape_character, text)


def _path_bytes(path: str) -> bytes:
    """Return a path's bytes."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:  # a surrogate: possible in JSON, but not in a file name
        return path.encode("utf-8", "surrogatepass")


def _escape_character(match: re.Match[str]) -> str:
    """Return the escapes for a character's UTF-8 bytes."""
    return "".join(f"\\x{byte:02x}" for byte in match[0].encode())


def _unescape_byte(match: re.Match[bytes]) -> bytes:
    """Return the byte that an escape stands for."""
    digits = match[1].decode()
    return bytes.fromhex(digits)


def original_path(text: str) -> str:
    r"""Return the path for which ``portable_name`` returns ``text``.

    If ``portable_name`` cannot return ``text``, the result is ``text``.

    Examples:
        >>> import os
        >>> from vilu.datasets.files import original_path
        >>> os.fsencode(original_path(r"caf\xe9.jpg"))  # the escape becomes one byte
        b'caf\xe9.jpg'
        >>> print(original_path(r"caf\x5cxe9.jpg"))  # the path contains a backslash
        caf\xe9.jpg
    """
    if "\\x" not in text:
        return text
    escaped_bytes = _path_bytes(text)
    path_bytes = _ESCAPE_PATTERN.sub(_unescape_byte, escaped_bytes)
    path = os.fsdecode(path_bytes)
    if portable_name(path) != text:
        return text
    return path


def matching_text(name: str, texts: Collection[str]) -> str | None:
    """Return the text in ``texts`` that fits a name in a user's table, or None.

    If ``name`` is in ``texts``, the result is ``name``. Otherwise, ``portable_name(name)`` is
    looked up in ``texts``.
    """
    if name in texts:
        return name
    text = portable_name(name)
    if text not in texts:
        return None
    return text


def text_of_version_0_1(text: str) -> str:
    """Return vilu 0.1.0's text for the path that is now written as ``text``.

    Label books from vilu 0.1.0 have such texts. The texts were not unique: two paths could have the
    same text.
    """
    path = original_path(text)
    path_bytes = os.fsencode(path)
    return path_bytes.decode("utf-8", "backslashreplace")


def subfolders(folder: str | Path, *, follow_links: bool = False) -> list[str]:
    """Return the names of the sub-folders, sorted by bytes, without hidden and linked folders.

    With ``follow_links``, linked folders are included.
    """
    names = []
    for entry in _sorted_entries(folder):
        is_folder = _is_folder(entry) if follow_links else entry.is_dir(follow_symlinks=False)
        if is_folder and not _is_hidden(entry):
            names.append(entry.name)
    return names


def walk_images(
    folder: str | Path, ignored_counts: Counter[str], allowed_folders: AllowedFolders | None = None
) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """Yield the path below ``folder`` and the status of every image file, sorted by path bytes.

    Each file costs a call to ``stat``. Links to files are followed. Links to folders are followed
    only if ``allowed_folders`` has ``follow_links``. If a link leads to itself, to a folder that
    contains the link, or out of ``allowed_folders``, an error is yielded instead of the status.
    Skipped entries are counted in ``ignored_counts`` under "hidden", "linked_folder", "not_image"
    (by suffix) or "not_a_file".
    """
    follows_links = allowed_folders is not None and allowed_folders.follow_links
    prefix = os.path.join(folder, "")  # noqa: PTH118  a Path drops the slash
    # Entries are taken from the stack's end. So entries are added in reverse order.
    pending_entries = [_PendingEntry(entry, ()) for entry in reversed(_sorted_entries(folder))]
    while pending_entries:
        entry, folders_of_links = pending_entries.pop()
        path = entry.path.removeprefix(prefix).replace(os.sep, "/")
        reason = _reason_to_ignore(entry, follows_links=follows_links)
        if reason:
            ignored_counts[reason] += 1
        elif not _is_folder(entry):
            yield path, _status_of(entry, allowed_folders)
        elif entry.is_symlink() and _leads_to_container(entry, folders_of_links):
            yield path, OSError(errno.ELOOP, "the link leads to a folder that contains it", path)
        else:
            if entry.is_symlink():
                folders_of_links = (*folders_of_links, *_folders_at_ends(entry))
            for inner_entry in reversed(_sorted_entries(entry.path)):
                pending_entries.append(_PendingEntry(inner_entry, folders_of_links))


class _PendingEntry(NamedTuple):
    """An entry in a folder, not yet visited by ``walk_images``."""

    entry: os.DirEntry[str]
    folders_of_links: tuple[str, ...]  # the folders at both ends of every link on the path


def _folders_at_ends(link: os.DirEntry[str]) -> tuple[str, str]:
    """Return the real folder that contains a link, and the real folder at the link's target."""
    container = os.path.dirname(link.path)  # noqa: PTH120  for speed
    return _real_prefix(container), _real_prefix(link.path)


def _leads_to_container(link: os.DirEntry[str], folders_of_links: tuple[str, ...]) -> bool:
    """Return whether a link leads to a folder that contains the link, perhaps through more links.

    ``folders_of_links`` are the folders at both ends of every link on the path to this link.
    """
    container, target = _folders_at_ends(link)
    # ``target`` contains a folder if the folder's path begins with ``target``
    return any(folder.startswith(target) for folder in (*folders_of_links, container))


def _reason_to_ignore(entry: os.DirEntry[str], *, follows_links: bool) -> str | None:
    """Return why ``walk_images`` skips an entry. For an image or a folder, return None."""
    if _is_hidden(entry):
        return "hidden"
    if _is_folder(entry):
        is_skipped = entry.is_symlink() and not follows_links
        return "linked_folder" if is_skipped else None
    if not entry.name.lower().endswith(IMAGE_SUFFIXES):
        return "not_image"
    try:
        if not entry.is_file():
            return "not_a_file"
    except OSError:  # not skipped: the file's error row will state the reason
        return None
    return None


def is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file or a link to a file. Return False for a link to itself."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one. Return False for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _status_of(
    entry: os.DirEntry[str], allowed_folders: AllowedFolders | None
) -> os.stat_result | OSError:
    """Return a file's status, or the error from the system call or ``allowed_folders``."""
    if allowed_folders is not None and entry.is_symlink():
        if allowed_folders.is_forbidden_link(entry.path):
            return ForbiddenPathError(errno.EACCES, "the link leads out of its folder", entry.path)
    try:
        return entry.stat()
    except OSError as error:
        return error.with_traceback(None)


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _sorted_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return a folder's entries in the order of ``walk_images``."""
    hint = "Check its permissions or leave it out."
    with convert_os_errors(f"cannot list the folder {folder}", hint), os.scandir(folder) as entries:
        return sorted(entries, key=_sort_key)


def _sort_key(entry: os.DirEntry[str]) -> bytes:
    """Return the name as bytes, with a slash at the end for a folder.

    So a walk yields whole paths in byte order: "a b.jpg" before "a/1.jpg", because " " is less than
    "/". Without the slash, the folder "a" would come before "a b.jpg".
    """
    name = os.fsencode(entry.name)
    if entry.is_dir(follow_symlinks=False):
        return name + b"/"
    return name


class ListingHash:
    """A hash of keys, labels, sizes and modification times. Files are added to the hash.

    Args:
        context: Further texts that change the listing's meaning (class folders, split).
    """

    def __init__(self, *context: str) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        for text in context:
            self.add(text, label=NO_VALUE, status=None)

    def add(self, key: str, label: int, status: os.stat_result | OSError | None) -> None:
        """Add a file. If the file is missing or not readable, ``status`` is None or an error."""
        name = key.encode("utf-8", "surrogateescape")
        size = NO_VALUE
        time = NO_VALUE
        if isinstance(status, os.stat_result):
            size = status.st_size
            time = status.st_mtime_ns
        # four whole numbers of 64 bits, then the name. The first number is the name's length.
        numbers = struct.pack("<Qqqq", len(name), label, size, time)
        self._hash.update(numbers + name)

    def add_texts(self, texts: Iterable[bytes | None]) -> None:
        """Add the files' texts, in order. None stands for a file without a text."""
        for text in texts:
            if text is None:
                self._hash.update(struct.pack("<q", NO_VALUE))
            else:
                length = struct.pack("<q", len(text))
                self._hash.update(length + text)

    def hexdigest(self) -> str:
        """Return the hash as 32 hexadecimal digits."""
        return self._hash.hexdigest()
