"""The samples of a tar file in webdataset's layout, and whether each can be used."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from vilu.datasets.captions import MAX_CAPTION_BYTES
from vilu.datasets.files import MAX_FILE_BYTES, stays_below
from vilu.datasets.formats import SUFFIXES
from vilu.datasets.images import BadImage
from vilu.datasets.tar_members import Member, members

IMAGES: Final = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
CAPTION: Final = "txt"
FAULTS: Final = {
    "interleaved": "members of other samples stand between this one's. Sort the shard by name",
    "duplicate": "two members have one name and extension. Write the shard again",
}


@dataclass(slots=True)
class Sample:
    """Members under one key, by extension; ``fault`` is what is wrong with how they stand in the shard."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    fault: Literal["interleaved", "duplicate"] | None = None

    def image(self) -> Member:
        """The member that holds the image.

        Raises:
            BadImage: If there is none that can be used, or the sample cannot be.
        """
        unsafe = [member.name for member in self.members.values() if not stays_below(member.name)]
        if unsafe:
            raise BadImage("open", "bad_path", f"{unsafe[0]!r}: a name must be relative and must not climb")
        if self.fault is not None:
            raise BadImage("open", self.fault, FAULTS[self.fault])
        name = next((name for name in self.members if name in IMAGES), None)
        member = None if name is None else self.companion(name)
        if member is None:
            raise BadImage(
                "open",
                "missing_image",
                f"the sample has no image; it has {self.listed()} (an extension begins at the name's first dot)",
            )
        if member.size > MAX_FILE_BYTES:
            raise BadImage("open", "too_large", f"{member.size} bytes; at most {MAX_FILE_BYTES} are read")
        return member

    def caption(self) -> Member:
        """The member that holds the caption.

        Raises:
            BadImage: If there is none, or none that can be used.
        """
        member = self.companion(CAPTION)
        if member is None:
            raise BadImage("text", "missing_caption", f"the sample has no .{CAPTION}; it has {self.listed()}")
        if member.size > MAX_CAPTION_BYTES:
            raise BadImage(
                "text", "too_large", f"a caption of {member.size} bytes; at most {MAX_CAPTION_BYTES} are read"
            )
        return member

    def companion(self, extension: str) -> Member | None:
        """The member with an extension; None where there is none.

        Raises:
            BadImage: If it is no plain file.
        """
        member = self.members.get(extension)
        if member is not None and not member.is_file:
            raise BadImage("open", "not_a_file", f"{member.name!r} is a link, a device or sparse, not a plain file")
        return member

    def is_whole(self, companion: str) -> bool:
        """Whether there is an image and its companion."""
        return companion in self.members and not IMAGES.isdisjoint(self.members)

    def listed(self) -> str:
        """The extensions, for messages."""
        return ", ".join(f".{name[:20]}" for name in list(self.members)[:5]) + (
            ", ..." if len(self.members) > 5 else ""
        )


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member by webdataset's rule; None where it has none (hidden files too).

    Example:
        >>> split_name("a.b/c.d.JPG")
        ('a.b/c', 'd.jpg')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def list_samples(path: Path, companion: str) -> tuple[list[Sample], BadImage | None]:
    """The samples of a shard, and what ended the list before its end mark."""
    found: dict[str, Sample] = {}
    trouble = None
    try:
        size = _size(path)
        with path.open("rb") as file:
            _group(members(file, size), found)
    except BadImage as error:
        trouble = error
    except OSError as error:
        trouble = BadImage("open", "bad_shard", f"cannot read the shard: {error.strerror}")
    samples = list(found.values())
    if trouble is not None and samples and samples[-1].fault is None and not samples[-1].is_whole(companion):
        samples.pop()
    return samples, trouble


def _size(path: Path) -> int:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would block
        raise OSError(errno.EINVAL, "not a regular file")
    return found.st_size


def _group(found: Iterable[Member], samples: dict[str, Sample]) -> None:
    last = None
    for member in found:
        parts = split_name(member.name)
        if parts is None and stays_below(member.name):
            continue
        key, extension = parts or (member.name, "")  # no sample, but a name that leads out is never passed over
        sample = samples.setdefault(key, Sample(key))
        if sample.members and sample is not last:
            sample.fault = "interleaved"
        elif extension in sample.members:
            sample.fault = sample.fault or "duplicate"
        sample.members.setdefault(extension, member)
        last = sample
