"""Make tiny tar files, whole and hostile."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.builders.image_files import encode, picture
from vilu.datasets.base import ImageDataset
from vilu.datasets.images import BadImage, read_caption, read_image

PICTURE = encode(picture(size=(8, 8)), "PNG")

Entry = tuple[str, bytes | tarfile.TarInfo]


def entry(name: str, kind: bytes, link: str = "") -> Entry:
    """Return a member that is no plain file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return name, info


def tar_bytes(*entries: Entry, format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002  tarfile's own name for it
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in entries:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pair(key: str, caption: str | bytes = "a picture") -> list[Entry]:
    text = caption.encode() if isinstance(caption, str) else caption
    return [(f"{key}.png", PICTURE), (f"{key}.txt", text)]


def raw_header(name: bytes, size: int, kind: bytes, prefix: bytes = b"ustar\0" + b"00") -> bytes:
    """Return a hand-made header block. The checksum is right, whatever the header says."""
    head = (
        name.ljust(100, b"\0")
        + b"0000644\0"
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"00000000000\0"
    )
    tail = kind + bytes(100) + prefix
    block = head + b" " * 8 + tail.ljust(512 - 156, b"\0")
    return head + b"%06o\0 " % sum(block) + block[156:]


def write_shard(folder: Path, data: bytes, name: str = "0.tar") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def outcomes(
    dataset: ImageDataset, start: int = 0, stop: int | None = None
) -> list[tuple[str, str]]:
    """Return each record's key with its caption or label.

    If a record cannot be used, return its key with the stage and kind of the error.
    """
    found = []
    for record in dataset.records(start, len(dataset) if stop is None else stop):
        try:
            read_image(record)
            found.append(
                (record.key, read_caption(record) if dataset.captioned else str(record.label))
            )
        except BadImage as error:
            found.append(
                (record.key, f"{error.stage}:{error.kind}" if str(error) else "no message")
            )
    return found
