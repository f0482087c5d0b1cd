"""Read the members of a tar file and report all damage.

The reader of the standard library stops without an error at some kinds of damage.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from vilu.datasets.files import portable_name
from vilu.datasets.images import BadImage

BLOCK: Final = tarfile.BLOCKSIZE
# larger extension headers are refused; a normal one holds a name and a few times of modification
MAX_HEADER_BYTES: Final = 2**20
MAX_NAME_BYTES: Final = 1024
MAX_MEMBERS: Final = 500_000  # the member list of a shard is in memory: about 400 bytes per member
FILES: Final = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
NO_DATA: Final = frozenset(tarfile.SUPPORTED_TYPES) - frozenset(tarfile.REGULAR_TYPES)
"""Types without data: links, devices, folders. The size in their header does not count.

A header of an unknown type is followed by as many bytes of data as it states.
"""
PAX: Final = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE})
EXTENSIONS: Final = PAX | {tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}

COMPRESSED: Final = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}
"""First bytes of compressed files, and the program that uncompresses them.

Such files are often named like a tar file.
"""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar file whose bytes are all in the file."""

    name: str  # name of the member as UTF-8 text (``portable_name``)
    start: int  # position in the tar file of the first byte of data
    size: int  # number of bytes of data
    is_file: bool  # whether it is a plain file: no link, no device, not sparse


def members(file: BinaryIO, size: int, max_members: int = MAX_MEMBERS) -> Iterator[Member]:
    """Yield the members of a tar file of ``size`` bytes in order, without folders.

    Raises:
        BadImage: After the last whole member. Kind "truncated_shard": the file ends too early.
            A file without an end mark counts as truncated, because only the end mark shows that
            no member is missing. Kind "bad_shard": any other damage.
    """
    position = 0
    count = 0
    extended: dict[bytes, bytes] = {}
    while True:
        header = _read_header(file, position)
        if header is None:
            return
        begin = position
        position = _start_of_data(file, header, begin)
        if header.type in EXTENSIONS:
            body = _read_body(file, position, header.size, size)
            _extend(extended, header.type, body, begin)
            position += _padded(header.size)
            continue
        member = _member(header, extended, position, begin)
        extended = {}  # an extension header is valid for the next member only
        # a link may state the size of its target, but no data follow its header
        length = 0 if header.type in NO_DATA else member.size
        if position + length > size:
            raise BadImage(
                "open", "truncated_shard", f"the shard ends inside {member.name!r}; {_AGAIN}"
            )
        position += _padded(length)
        if header.isdir():
            continue
        count += 1
        if count > max_members:
            raise BadImage(
                "open", "bad_shard", f"more than {max_members} members. Write smaller shards"
            )
        yield member


_AGAIN: Final = "members before the break are kept. Write or download it again"


def _read_header(file: BinaryIO, position: int) -> tarfile.TarInfo | None:
    """Return the header at a position; None at the end mark."""
    file.seek(position)
    block = file.read(BLOCK)
    is_first = position == 0
    if is_first:
        _refuse_compressed(block)
    is_end_mark = block == bytes(BLOCK)
    if is_end_mark:
        # members behind the end mark (as after `cat a.tar b.tar`) are ignored by most readers
        if any(file.read(MAX_HEADER_BYTES)):
            raise BadImage(
                "open",
                "bad_shard",
                "more bytes follow the end mark. Join shards with `tar -A`, not `cat`",
            )
        return None
    # an empty file is a truncated shard, but a file shorter than a block is no tar file at all,
    # which _parse_header reports
    may_be_truncated = not is_first or block == b""
    if len(block) < BLOCK and may_be_truncated:
        raise BadImage(
            "open", "truncated_shard", f"the shard ends at byte {position + len(block)}; {_AGAIN}"
        )
    return _parse_header(block, position)


def _refuse_compressed(block: bytes) -> None:
    """Raise BadImage where a shard begins with the first bytes of a compressed file."""
    for magic, program in COMPRESSED.items():
        if block.startswith(magic):
            raise BadImage(
                "open",
                "bad_shard",
                f"the shard is compressed, so it cannot be read in parts: {program} it",
            )


def _parse_header(block: bytes, position: int) -> tarfile.TarInfo:
    where = "this is no tar file"
    if position > 0:
        where = f"the header at byte {position} is damaged, and what follows it is lost"
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadImage("open", "bad_shard", f"{where}: {error}. Write it again") from error
    if header.size < 0:
        raise BadImage("open", "bad_shard", f"{where}: a size of {header.size}. Write it again")
    return header


def _start_of_data(file: BinaryIO, header: tarfile.TarInfo, begin: int) -> int:
    """Return the position of a member's first byte of data.

    The data begin behind the header and, in an old GNU sparse file, behind the blocks of its map.
    """
    position = begin + BLOCK
    if header.type != tarfile.GNUTYPE_SPARSE:
        return position
    # the size in the header does not include the blocks of the sparse map, so they are skipped here
    flag = SPARSE_FLAG
    while _flag_of_block(file, position - BLOCK, flag):
        position += BLOCK
        flag = SPARSE_MAP_FLAG
    return position


SPARSE_FLAG: Final = 482
"""Index in a header of the byte that says whether a block of the sparse map follows."""
SPARSE_MAP_FLAG: Final = 504
"""Index of the same byte in a block of the sparse map."""


def _flag_of_block(file: BinaryIO, position: int, flag: int) -> bool:
    """Whether the byte at index ``flag`` of the block at ``position`` is not zero."""
    file.seek(position)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise BadImage("open", "truncated_shard", f"the shard ends inside a header; {_AGAIN}")
    return block[flag] != 0


def _read_body(file: BinaryIO, position: int, length: int, size: int) -> bytes:
    """Return the ``length`` bytes of an extension header in a file of ``size`` bytes."""
    if length > MAX_HEADER_BYTES:  # damaged headers can state many GB, which would fill the memory
        raise BadImage(
            "open",
            "bad_shard",
            f"an extension header of {length} bytes; at most {MAX_HEADER_BYTES} are read",
        )
    if position + length > size:
        raise BadImage("open", "truncated_shard", f"the shard ends inside a header; {_AGAIN}")
    file.seek(position)
    return file.read(length)


def _extend(extended: dict[bytes, bytes], kind: bytes, body: bytes, position: int) -> None:
    """Add to ``extended`` what an extension header states about the next member."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        extended[b"path"] = body.partition(b"\0")[0]
    elif kind in PAX:
        extended |= _pax_fields(body, position)
    elif kind == tarfile.XGLTYPE and _pax_fields(body, position):
        # a size for all members would give a wrong position for each header after the first
        raise BadImage(
            "open", "bad_shard", f"the header at byte {position} gives all members one name or size"
        )


_PAX_LENGTH: Final = re.compile(rb"([1-9][0-9]{0,6}) ")


def _pax_fields(body: bytes, position: int) -> dict[bytes, bytes]:
    """Return the fields of a pax header that change name, size or type of the member.

    The header is a series of records. A record is ``LENGTH KEY=VALUE`` and a line feed, where
    LENGTH is the number of bytes of the whole record.
    """
    fields = {}
    begin = 0
    while begin < len(body) and body[begin] != 0:
        length = _PAX_LENGTH.match(body, begin)
        if length is None:
            raise _damaged_header(position)
        end = begin + int(length[1])
        # a damaged file may state any length: the record must end behind its own digits, so that
        # the loop ends, and within the header
        is_inside = length.end() < end <= len(body)
        if not is_inside or body[end - 1] != ord("\n"):
            raise _damaged_header(position)
        key, _, value = body[length.end() : end - 1].partition(b"=")
        if key in {b"path", b"size"} or key.startswith(b"GNU.sparse."):
            fields[key] = value
        begin = end
    return fields


def _damaged_header(position: int) -> BadImage:
    return BadImage(
        "open", "bad_shard", f"the header at byte {position} is damaged. Write the shard again"
    )


def _member(
    header: tarfile.TarInfo, extended: dict[bytes, bytes], start: int, position: int
) -> Member:
    """Return the member of a header, with name and size from extension headers where they exist."""
    is_sparse = any(key.startswith(b"GNU.sparse.") for key in extended)
    raw = extended.get(b"GNU.sparse.name", extended.get(b"path"))
    name = header.name if raw is None else raw.decode("utf-8", "surrogateescape")
    length = extended.get(b"size", b"%d" % header.size)
    if not re.fullmatch(rb"[0-9]{1,19}", length):
        raise BadImage(
            "open", "bad_shard", f"the header at byte {position} gives a size of {length[:30]!r}"
        )
    if len(name) > MAX_NAME_BYTES:
        raise BadImage(
            "open",
            "bad_shard",
            f"a name of {len(name)} characters; at most {MAX_NAME_BYTES} are read",
        )
    is_file = header.type in FILES and not is_sparse
    return Member(portable_name(name), start, int(length), is_file)


def _padded(length: int) -> int:
    """Return a number of bytes, rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK
