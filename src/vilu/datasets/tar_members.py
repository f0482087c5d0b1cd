"""Members of a tar file, read so that damage is reported.

The standard library's reader stops silently at some kinds of damage.
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
# larger extension headers are refused; honest ones hold a name and a few times
MAX_HEADER_BYTES: Final = 2**20
MAX_NAME_BYTES: Final = 1024
MAX_MEMBERS: Final = 500_000  # the list of one shard is in memory: about 400 bytes a member
FILES: Final = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
NO_DATA: Final = frozenset(tarfile.SUPPORTED_TYPES) - frozenset(tarfile.REGULAR_TYPES)
"""Links, devices, folders: their size says nothing of what follows.

Types that nobody knows are followed by data.
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
"""First bytes of what is often named like a tar, and the program that undoes it."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member that is whole."""

    name: str  # its name as text that UTF-8 can hold (``portable_name``)
    start: int  # where its bytes begin in the file
    size: int  # how many there are
    is_file: bool  # whether it is a plain file: no link, no device, not sparse


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """The members of a tar file of ``size`` bytes in order, without folders.

    After the last whole member raises BadImage: "truncated_shard" where the file ends too early
    (also where only the end mark is missing: nothing else tells that whole members are), else
    "bad_shard".
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
        extended = {}  # a name or size is of the next member alone, and must not reach a later one
        # a link may state the size of its target, and no byte of that follows
        length = 0 if header.type in NO_DATA else member.size
        if position + length > size:
            raise BadImage(
                "open", "truncated_shard", f"the shard ends inside {member.name!r}; {_AGAIN}"
            )
        position += _padded(length)
        if header.isdir():
            continue
        count += 1
        if count > MAX_MEMBERS:
            raise BadImage(
                "open", "bad_shard", f"more than {MAX_MEMBERS} members. Write smaller shards"
            )
        yield member


_AGAIN: Final = "members before the break are kept. Write or download it again"


def _read_header(file: BinaryIO, position: int) -> tarfile.TarInfo | None:
    """The header at a position; None at the end mark."""
    file.seek(position)
    block = file.read(BLOCK)
    is_first = position == 0
    if is_first:
        _refuse_compressed(block)
    is_end_mark = block == bytes(BLOCK)
    if is_end_mark:
        if any(file.read(MAX_HEADER_BYTES)):  # what `cat` puts there, hardly any reader sees
            raise BadImage(
                "open",
                "bad_shard",
                "more bytes follow the end mark. Join shards with `tar -A`, not `cat`",
            )
        return None
    # a short first block is no truncated shard, unless it is empty: it is no tar file at all
    may_be_truncated = not is_first or block == b""
    if len(block) < BLOCK and may_be_truncated:
        raise BadImage(
            "open", "truncated_shard", f"the shard ends at byte {position + len(block)}; {_AGAIN}"
        )
    return _parse_header(block, position)


def _refuse_compressed(block: bytes) -> None:
    """BadImage where the first block of a shard is that of a compressed file."""
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
    """Where a member's data begins: behind its header, and the maps of an old GNU sparse file."""
    position = begin + BLOCK
    if header.type != tarfile.GNUTYPE_SPARSE:
        return position
    # the size in the header leaves these blocks out: the next header would be sought too early
    flag = SPARSE_FLAG
    while _flag_of_block(file, position - BLOCK, flag):
        position += BLOCK
        flag = SPARSE_MAP_FLAG
    return position


SPARSE_FLAG: Final = 482
"""Place in a header of the byte that says whether a block of the sparse map follows."""
SPARSE_MAP_FLAG: Final = 504
"""The same place in a block of the map."""


def _flag_of_block(file: BinaryIO, position: int, flag: int) -> bool:
    file.seek(position)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise BadImage("open", "truncated_shard", f"the shard ends inside a header; {_AGAIN}")
    return block[flag] != 0


def _read_body(file: BinaryIO, position: int, length: int, size: int) -> bytes:
    if length > MAX_HEADER_BYTES:  # a stated size of many GB would be read into memory
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
    """Note what an extension header says of the member behind it."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        extended[b"path"] = body.partition(b"\0")[0]
    elif kind in PAX:
        extended |= _pax_fields(body, position)
    elif kind == tarfile.XGLTYPE and _pax_fields(body, position):
        # one size for all members would make each header behind the first be sought elsewhere
        raise BadImage(
            "open", "bad_shard", f"the header at byte {position} gives all members one name or size"
        )


_PAX_LENGTH: Final = re.compile(rb"([1-9][0-9]{0,6}) ")


def _pax_fields(body: bytes, position: int) -> dict[bytes, bytes]:
    """The fields of a pax header that decide what the member is.

    The header is a series of records, each ``LENGTH KEY=VALUE`` and a line feed; LENGTH counts the
    whole record.
    """
    fields = {}
    begin = 0
    while begin < len(body) and body[begin] != 0:
        length = _PAX_LENGTH.match(body, begin)
        if length is None:
            raise _damaged_header(position)
        end = begin + int(length[1])
        # the length is the file's word: past the body, or short of its own digits, it would read
        # other bytes as a field, or never move on
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
    """The member of a header, with the name and size that the extension headers give it."""
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
    return -(-length // BLOCK) * BLOCK
