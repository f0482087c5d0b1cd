"""Image-caption pairs in webdataset tars, with an account of every sample: nothing is skipped without a record."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from vilu.datasets.base import Record
from vilu.datasets.captions import decode_caption
from vilu.datasets.classes import class_table
from vilu.datasets.files import MISSING, ListingHash, portable_name
from vilu.datasets.images import BadImage, Kind, Stage
from vilu.datasets.tar_members import Member
from vilu.datasets.tar_samples import CAPTION, Sample, list_samples
from vilu.errors import UsageError

LABEL: Final = "cls"
MAX_LABEL_BYTES: Final = 32
SHARD_SHIFT: Final = 32
"""``Record.position`` is the shard's number times 2 to this, plus the sample's."""


class TarShards:
    """Images in tar files in webdataset's layout, with captions; or with labels, where a classes file is given.

    Members whose names are alike up to the first dot of the base name are one sample: its image is the first with an
    image's extension, its caption ``.txt``, its label ``.cls`` (a whole number; without one it is unknown); others are
    not looked at. Keys are ``shard#key``, and of what is wrong with a whole shard ``shard``. Nothing is opened before
    ``records``, nothing is ever unpacked, and memory holds the member list of one shard.

    Every sample is a record. One that cannot be used raises ``BadImage`` on reading, of kind "bad_path" (absolute or
    climbing out), "interleaved" (its members do not stand together; one record for all of it), "duplicate" (an
    extension twice), "not_a_file" (link, device, sparse), "missing_image", "missing_caption", "too_large", "bad_label";
    and what ``decode_caption`` and ``decode_image`` find. A shard that ends early or cannot be read (on) is one record
    more, of kind "truncated_shard" or "bad_shard"; the sample at the break is part of it unless nothing of that lacks.

    Args:
        source: Where it came from, for people.
        paths: The shards, in order.
        classes: A classes file, in label order.

    Attributes:
        classes: Raw and prompt names; None when captioned.

    Raises:
        UsageError: If a shard occurs twice.

    Reference:
        https://github.com/webdataset/webdataset (the layout).
    """

    def __init__(self, source: str, paths: Sequence[Path], *, classes: Path | None = None) -> None:
        self.source = source
        self.classes = class_table(None, classes)
        self.class_names = self.classes.names if self.classes else None
        self.captioned = self.classes is None
        self._paths = [path.absolute() for path in paths]
        self._names = _shard_names(self._paths)
        listing = ListingHash("tar", *((*self.classes.folders, *self.classes.names) if self.classes else ()))
        for name in self._names:
            listing.add(name, MISSING, None)
        self.fingerprint = listing.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The samples of shards start ... stop - 1, each shard's own trouble after its samples."""
        for number in range(len(self))[start:stop]:
            samples, trouble = list_samples(self._paths[number], CAPTION if self.captioned else LABEL)
            first = number << SHARD_SHIFT
            for position, sample in enumerate(samples, first):
                yield self._record(number, sample, position)
            if trouble is not None:
                yield _bad(self._names[number], trouble, first + len(samples), self.captioned)

    def shard_fingerprint(self, start: int, stop: int) -> str:
        """Hash of names, sizes and times of modification of shards start ... stop - 1."""
        listing = ListingHash()
        for name, path in zip(self._names[start:stop], self._paths[start:stop], strict=True):
            try:
                listing.add(name, MISSING, path.stat())
            except OSError:  # recorded as missing here, and as the shard's error when it is read
                listing.add(name, MISSING, None)
        return listing.hexdigest()

    def _record(self, number: int, sample: Sample, position: int) -> Record:
        path, key = self._paths[number], f"{self._names[number]}#{sample.key}"
        try:
            image = sample.image()
            caption = partial(_read_caption, path, sample.caption()) if self.captioned else None
            label = None if self.captioned else self._label(path, sample.companion(LABEL))
        except BadImage as error:
            return _bad(key, error, position, self.captioned)
        read = partial(_read_at, path, image.start, image.size)
        return Record(key, label, read, caption, position)

    def _label(self, path: Path, member: Member | None) -> int | None:
        if member is None:
            return None
        n_classes = len(self.class_names or ())
        try:
            text = _read_at(path, member.start, min(member.size, MAX_LABEL_BYTES + 1)).strip()
        except OSError as error:
            raise BadImage("text", "read_error", f"cannot read the label: {error.strerror}") from error
        label = int(text) if text.isdigit() and len(text) <= MAX_LABEL_BYTES else -1
        if not 0 <= label < n_classes:
            raise BadImage("text", "bad_label", f"the label must be 0 to {n_classes - 1}. Found {text!r}")
        return label


def _shard_names(paths: Sequence[Path]) -> list[str]:
    """Paths below the folder that all have in common; without the sign that ends them in keys."""
    common = os.path.commonpath({path.parent for path in paths})
    names = [portable_name(path.relative_to(common).as_posix()).replace("#", "%23") for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UsageError(f"the shard {twice} is named more than once. Name each once.")
    return names


def _read_at(path: Path, start: int, size: int) -> bytes:
    """Bytes of a shard. Opens it anew: threads share no position, and a record can be sent to another process.

    Raises:
        OSError: If they cannot be read any more.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise OSError(errno.EIO, "the shard became shorter while it was in use")
    return data


def _read_caption(path: Path, member: Member) -> str:
    return decode_caption(_read_at(path, member.start, member.size))


def _bad(key: str, error: BadImage, position: int, captioned: bool) -> Record:
    """A record that raises the error when it is read."""
    refuse = partial(_refuse, error.stage, error.kind, str(error))
    return Record(key, None, refuse, refuse if captioned else None, position)


def _refuse(stage: Stage, kind: Kind, message: str) -> NoReturn:
    raise BadImage(stage, kind, message)
