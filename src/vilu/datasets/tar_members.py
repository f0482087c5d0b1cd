"""Read a tar file's members and report all damage.

At some kinds of damage, the standard library's reader stops without an error.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from vilu.datasets.files import portable_name
from vilu.datasets.images import BadImage

BLOCK_BYTES: Final = tarfile.BLOCKSIZE  # a tar file consists of blocks with this number of bytes
# Larger extension headers are errors. A normal header holds only a name and a few timestamps.
MAX_HEADER_BYTES: Final = 2**20
# Maximum number of zeros at the end, including the end mark. Tar programs write at most about
# 10 KB, or 1 MiB for tapes.
MAX_PADDING_BYTES: Final = 2**20
MAX_NAME_LENGTH: Final = 1024
MAX_MEMBERS: Final = 500_000  # a shard's member list is in memory: about 400 bytes per member
# types for plain files
PLAIN_FILE_TYPES: Final = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
TYPES_WITHOUT_DATA: Final = frozenset(tarfile.SUPPORTED_TYPES) - frozenset(tarfile.REGULAR_TYPES)
"""Types for members without data: links, devices, folders. The size in the header is ignored.

A member with an unknown type has as many data bytes as stated in the header.
"""
# types for extension headers, which describe the members after the header
PAX_TYPES: Final = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE})
EXTENSION_TYPES: Final = PAX_TYPES | {
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}

UNCOMPRESS_PROGRAMS: Final = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}
"""Maps a compressed file's first bytes to a program for uncompressing the file.

A compressed file is often named like a tar file.
"""


@dataclass(frozen=True, slots=True)
class Member:
    """A member in a tar file. All of the member's bytes are in the file."""

    name: str  # the member's name as UTF-8 text (``portable_name``)
    start: int  # where the data begin in the tar file
    size: int  # number of data bytes
    is_file: bool  # whether the member is a plain file, and no link, device or sparse file


def read_members(
    file: BinaryIO, file_size: int, max_members: int = MAX_MEMBERS
) -> Iterator[Member]:
    """Yield the members in a tar file with ``file_size`` bytes in order, without folders.

    Raises:
        BadImage: After the last whole member. Kind "truncated_shard" means that the file ends too
            early. A file without an end mark counts as truncated, because only the end mark shows
            that no member is missing. A file with more than ``MAX_PADDING_BYTES`` zeros at the end
            counts as truncated, too: a download program may reserve the whole file as zeros, and
            stop before the end. Kind "bad_shard" means any other damage.
    """
    position = 0
    n_members = 0
    extension_fields: dict[bytes, bytes] = {}  # the next member's fields, from extension headers
    while True:  # each pass reads a header
        header = _read_header(file, position, file_size)
        if header is None:
            return
        header_start = position
        position = _start_of_data(file, header, header_start)
        if header.type in EXTENSION_TYPES:
            body = _read_body(file, position, header.size, file_size)
            _add_extension_fields(extension_fields, header.type, body, header_start)
            position += _round_up_to_blocks(header.size)
            continue
        member = _make_member(header, extension_fields, position, header_start)
        extension_fields = {}  # an extension header is valid for the next member only
        # a link may state the target's size, but no data follow the link's header
        n_data_bytes = 0 if header.type in TYPES_WITHOUT_DATA else member.size
        if position + n_data_bytes > file_size:
            raise BadImage(
                f"the shard ends inside {member.name!r}; {_TRUNCATION_HINT}",
                stage="open",
                kind="truncated_shard",
            )
        position += _round_up_to_blocks(n_data_bytes)
        if header.isdir():
            continue
        n_members += 1
        if n_members > max_members:
            raise _bad_shard(f"more than {max_members} members. Write smaller shards")
        yield member


def _bad_shard(message: str) -> BadImage:
    """Return the error for a whole shard, for any reason except truncation."""
    return BadImage(message, stage="open", kind="bad_shard")


_TRUNCATION_HINT: Final = "members before the break are kept. Write or download it again"


def _read_header(file: BinaryIO, position: int, file_size: int) -> tarfile.TarInfo | None:
    """Return the header at a position, or None at the end mark."""
    file.seek(position)
    block = file.read(BLOCK_BYTES)
    is_first = position == 0
    if is_first:
        _refuse_compressed(block)
    is_end_mark = block == bytes(BLOCK_BYTES)  # a block of zeros
    if is_end_mark:
        _require_end(file, position, file_size)
        return None
    # An empty file is a truncated shard. A file with some bytes, but fewer than a block, is not a
    # tar file. For such a file, _parse_header reports the error.
    may_be_truncated = not is_first or block == b""
    if len(block) < BLOCK_BYTES and may_be_truncated:
        raise BadImage(
            f"the shard ends at byte {file_size}; {_TRUNCATION_HINT}",
            stage="open",
            kind="truncated_shard",
        )
    return _parse_header(block, position)


def _require_end(file: BinaryIO, end_mark_start: int, file_size: int) -> None:
    """Raise BadImage if anything but padding follows the end mark.

    The end mark begins at the position ``end_mark_start``. Its block has just been read from
    ``file``.
    """
    # Most readers ignore members behind the end mark. `cat a.tar b.tar` writes such members.
    has_more = any(file.read(MAX_PADDING_BYTES))  # a byte other than 0
    if has_more:
        raise _bad_shard("more bytes follow the end mark. Join shards with `tar -A`, not `cat`")
    n_bytes = file_size - end_mark_start
    if n_bytes > MAX_PADDING_BYTES:
        raise BadImage(
            f"the last {n_bytes} bytes are no members, as after a download that was not finished; "
            f"{_TRUNCATION_HINT}",
            stage="open",
            kind="truncated_shard",
        )


def _refuse_compressed(block: bytes) -> None:
    """Raise BadImage if a shard begins with the first bytes of a compressed file."""
    for magic, program in UNCOMPRESS_PROGRAMS.items():
        if block.startswith(magic):
            raise _bad_shard(
                f"the shard is compressed, so it cannot be read in parts: {program} it"
            )


def _parse_header(block: bytes, position: int) -> tarfile.TarInfo:
    """Return the header in a block at a position. Raise BadImage if the block is not a header."""
    problem = "this is no tar file"
    if position > 0:
        problem = f"the header at byte {position} is damaged, and what follows it is lost"
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _bad_shard(f"{problem}: {error}. Write it again") from error
    if header.size < 0:
        raise _bad_shard(f"{problem}: a size of {header.size}. Write it again")
    return header


def _start_of_data(file: BinaryIO, header: tarfile.TarInfo, header_start: int) -> int:
    """Return the position of a member's first data byte.

    The data begin behind the header. In an old GNU sparse file, the sparse map's blocks are between
    the header and the data.
    """
    position = header_start + BLOCK_BYTES
    if header.type != tarfile.GNUTYPE_SPARSE:
        return position
    # the size in the header excludes the sparse map's blocks, so skip these blocks
    flag_index = HEADER_FLAG_INDEX
    while _has_flag(file, position - BLOCK_BYTES, flag_index):
        position += BLOCK_BYTES
        flag_index = SPARSE_MAP_FLAG_INDEX
    return position


HEADER_FLAG_INDEX: Final = 482
"""Index of a byte in a header. If a sparse map block follows, the byte is not 0."""
SPARSE_MAP_FLAG_INDEX: Final = 504
"""Index of the same byte in a sparse map block."""


def _has_flag(file: BinaryIO, position: int, flag_index: int) -> bool:
    """Return whether the byte at ``flag_index`` in the block at ``position`` is not 0."""
    file.seek(position)
    block = file.read(BLOCK_BYTES)
    if len(block) < BLOCK_BYTES:
        raise BadImage(
            f"the shard ends inside a header; {_TRUNCATION_HINT}",
            stage="open",
            kind="truncated_shard",
        )
    return block[flag_index] != 0


def _read_body(file: BinaryIO, position: int, length: int, file_size: int) -> bytes:
    """Return an extension header's data: ``length`` bytes from ``position`` on.

    ``file_size`` is the tar file's size in bytes.
    """
    if length > MAX_HEADER_BYTES:  # a damaged header can state many GB, too much for the memory
        raise _bad_shard(
            f"an extension header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
        )
    if position + length > file_size:
        raise BadImage(
            f"the shard ends inside a header; {_TRUNCATION_HINT}",
            stage="open",
            kind="truncated_shard",
        )
    file.seek(position)
    return file.read(length)


def _add_extension_fields(
    extension_fields: dict[bytes, bytes], header_type: bytes, body: bytes, position: int
) -> None:
    """Add an extension header's fields to ``extension_fields``.

    ``body`` are the header's data, and ``position`` is the header's position in the file.
    """
    if header_type == tarfile.GNUTYPE_LONGNAME:
        name, _, _ = body.partition(b"\0")
        extension_fields[b"path"] = name
    elif header_type in PAX_TYPES:
        extension_fields |= _pax_fields(body, position)
    elif header_type == tarfile.XGLTYPE and _pax_fields(body, position):
        # The name or size in a global header is valid for all members. Such a field is an error,
        # because all later headers' positions would be wrong.
        raise _bad_shard(f"the header at byte {position} gives all members one name or size")


_PAX_LENGTH: Final = re.compile(rb"([1-9][0-9]{0,6}) ")  # such as "30 " in "30 path=..."


def _pax_fields(body: bytes, position: int) -> dict[bytes, bytes]:
    """Return the fields in a pax header that change the member's name, size or type.

    The header is a series of records. A record is ``LENGTH KEY=VALUE`` and a line feed. LENGTH is
    the whole record's number of bytes. ``body`` are the records, and ``position`` is the header's
    position in the file.
    """
    fields = {}
    begin = 0
    while begin < len(body) and body[begin] != 0:
        length_match = _PAX_LENGTH.match(body, begin)
        if length_match is None:
            raise _damaged_header(position)
        end = begin + int(length_match[1])
        # A damaged file may state any length. The record must end behind the length's digits.
        # Otherwise this loop would not end. The record must also end within the header.
        text_start = length_match.end()
        is_inside = text_start < end <= len(body)
        if not is_inside or body[end - 1] != ord("\n"):
            raise _damaged_header(position)
        key, _, value = body[text_start : end - 1].partition(b"=")
        if key in {b"path", b"size"} or key.startswith(b"GNU.sparse."):
            fields[key] = value
        begin = end
    return fields


def _damaged_header(position: int) -> BadImage:
    """Return the error for a damaged header at a position."""
    return _bad_shard(f"the header at byte {position} is damaged. Write the shard again")


def _make_member(
    header: tarfile.TarInfo,
    extension_fields: dict[bytes, bytes],
    data_start: int,
    header_start: int,
) -> Member:
    """Return the member described by a header. Fields from extension headers have precedence.

    ``data_start`` and ``header_start`` are the positions of the member's data and header.
    """
    is_sparse = any(key.startswith(b"GNU.sparse.") for key in extension_fields)
    # in a sparse file, "path" is a made-up name, so "GNU.sparse.name" has precedence
    extended_path = extension_fields.get(b"path")
    extended_name = extension_fields.get(b"GNU.sparse.name", extended_path)
    name = header.name
    if extended_name is not None:
        name = extended_name.decode("utf-8", "surrogateescape")
    size_in_header = str(header.size).encode()
    size = extension_fields.get(b"size", size_in_header)
    if not re.fullmatch(rb"[0-9]{1,19}", size):
        raise _bad_shard(f"the header at byte {header_start} gives a size of {size[:30]!r}")
    if len(name) > MAX_NAME_LENGTH:
        raise _bad_shard(f"a name of {len(name)} characters; at most {MAX_NAME_LENGTH} are read")
    is_file = header.type in PLAIN_FILE_TYPES and not is_sparse
    member_name = portable_name(name)
    return Member(member_name, data_start, int(size), is_file)


def _round_up_to_blocks(n_bytes: int) -> int:
    """Round a number of bytes up to whole blocks."""
    n_blocks = (n_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES
    return n_blocks * BLOCK_BYTES
