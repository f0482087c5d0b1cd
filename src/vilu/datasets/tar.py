"""Tars of samples (webdataset): images with captions or labels, shard by shard."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Final, Literal, NoReturn

from vilu.artifacts.disk import or_refuse
from vilu.datasets.base import SHARD, ImageRecord
from vilu.datasets.classes import class_table
from vilu.datasets.files import (
    MAX_FILE_BYTES,
    MISSING,
    SUFFIXES,
    ListingHash,
    is_file,
    portable_name,
    stays_below,
    subfolders,
)
from vilu.datasets.images import MAX_CAPTION_BYTES, BadImage, Kind, Stage, decode_caption
from vilu.datasets.tar_members import Member, members
from vilu.errors import OUTSIDE, DataError, UsageError

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
        """The member that holds the image."""
        if unsafe := [
            member.name for member in self.members.values() if not stays_below(member.name)
        ]:
            raise BadImage(
                "open", "bad_path", f"{unsafe[0]!r}: a name must be relative and must not climb"
            )
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
            raise BadImage(
                "open", "too_large", f"{member.size} bytes; at most {MAX_FILE_BYTES} are read"
            )
        return member

    def caption(self) -> Member:
        """The member that holds the caption."""
        member = self.companion(CAPTION)
        if member is None:
            raise BadImage(
                "text", "missing_caption", f"the sample has no .{CAPTION}; it has {self.listed()}"
            )
        if member.size > MAX_CAPTION_BYTES:
            raise BadImage(
                "text",
                "too_large",
                f"a caption of {member.size} bytes; at most {MAX_CAPTION_BYTES} are read",
            )
        return member

    def companion(self, extension: str) -> Member | None:
        """The member with an extension, which is a plain file; None where there is none."""
        member = self.members.get(extension)
        if member is not None and not member.is_file:
            raise BadImage(
                "open",
                "not_a_file",
                f"{member.name!r} is a link, a device or sparse, not a plain file",
            )
        return member

    def is_whole(self, companion: str) -> bool:
        """Whether there is an image and its companion."""
        return companion in self.members and not IMAGES.isdisjoint(self.members)

    def listed(self) -> str:
        """The extensions, for messages."""
        more = ", ..." if len(self.members) > 5 else ""
        return ", ".join(f".{name[:20]}" for name in list(self.members)[:5]) + more


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member by webdataset's rule; None where it has none (hidden files too).

    Examples:
        >>> from vilu.datasets.tar import split_name
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
    if (
        trouble is not None
        and samples
        and samples[-1].fault is None
        and not samples[-1].is_whole(companion)
    ):
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
        key, extension = parts or (
            member.name,
            "",
        )  # no sample, but a name that leads out is never passed over
        sample = samples.setdefault(key, Sample(key))
        if sample.members and sample is not last:
            sample.fault = "interleaved"
        elif extension in sample.members:
            sample.fault = sample.fault or "duplicate"
        sample.members.setdefault(extension, member)
        last = sample


LABEL: Final = "cls"
MAX_LABEL_BYTES: Final = 32


class TarShards:
    """Images in tar files in webdataset's layout, with captions; or with labels, where a classes file is given.

    Members whose names are alike up to the first dot of the base name are one sample: its image is
    the first with an image's extension, its caption ``.txt``, its label ``.cls`` (a whole number;
    without one it is unknown); others are not looked at. Keys are ``shard#key``, and of what is
    wrong with a whole shard ``shard``. Nothing is opened before ``records``, nothing is ever
    unpacked, and memory holds the member list of one shard.

    Every sample is a record. One that cannot be used raises ``BadImage`` on reading, of kind
    "bad_path" (absolute or climbing out), "interleaved" (its members do not stand together; one
    record for all of it), "duplicate" (an extension twice), "not_a_file" (link, device, sparse),
    "missing_image", "missing_caption", "too_large", "bad_label"; and what ``decode_caption`` and
    ``decode_image`` find. A shard that ends early or cannot be read (on) is one record more, of
    kind "truncated_shard" or "bad_shard"; the sample at the break is part of it unless nothing of
    that lacks.

    A classes file is in label order, or says the labels. ``outside`` names classes, or labels
    beyond them (``strays``: only reading the tars would tell whether they occur), of images of none
    of the classes, as -2 always is.

    Source: https://github.com/webdataset/webdataset (the layout).
    """

    def __init__(
        self,
        source: str,
        paths: Sequence[Path],
        *,
        classes: Path | None = None,
        outside: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.classes = class_table(None, classes, by_position=True)
        self.class_names = self.classes.names if self.classes else None
        self.captioned = self.classes is None
        n_classes = len(self.class_names or ())
        self.strays = frozenset(
            name for name in outside if name.isdecimal() and int(name) >= n_classes
        )
        self._paths = [path.absolute() for path in paths]
        self._names = _shard_names(self._paths)
        listing = ListingHash(
            "tar", *((*self.classes.folders, *self.classes.names) if self.classes else ())
        )
        for name in self._names:
            listing.add(name, MISSING, None)
        self.fingerprint = listing.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """The samples of shards start ... stop - 1, each shard's own trouble after its samples."""
        for number in range(len(self))[start:stop]:
            samples, trouble = list_samples(
                self._paths[number], CAPTION if self.captioned else LABEL
            )
            first = number * SHARD
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

    def _record(self, number: int, sample: Sample, position: int) -> ImageRecord:
        path, key = self._paths[number], f"{self._names[number]}#{sample.key}"
        try:
            image = sample.image()
            caption = partial(_read_caption, path, sample.caption()) if self.captioned else None
            label = None if self.captioned else self._label(path, sample.companion(LABEL))
        except BadImage as error:
            return _bad(key, error, position, self.captioned)
        return ImageRecord(
            key, label, partial(_read_at, path, image.start, image.size), caption, position
        )

    def _label(self, path: Path, member: Member | None) -> int | None:
        if member is None:
            return None
        n_classes = len(self.class_names or ())
        try:
            text = _read_at(path, member.start, min(member.size, MAX_LABEL_BYTES + 1)).strip()
        except OSError as error:
            raise BadImage(
                "text", "read_error", f"cannot read the label: {error.strerror}"
            ) from error
        if text.decode("latin-1") in {str(OUTSIDE), *self.strays}:
            return OUTSIDE
        label = int(text) if text.isdigit() and len(text) <= MAX_LABEL_BYTES else -1
        if not 0 <= label < n_classes:
            raise BadImage(
                "text",
                "bad_label",
                f"the label must be 0 to {n_classes - 1}, or -2. Found {text!r}",
            )
        return label


def _shard_names(paths: Sequence[Path]) -> list[str]:
    """Paths below the folder that all have in common; without the sign that ends them in keys."""
    common = os.path.commonpath({path.parent for path in paths})
    names = [
        portable_name(path.relative_to(common).as_posix()).replace("#", "%23") for path in paths
    ]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UsageError(f"the shard {twice} is named more than once. Name each once.")
    return names


def _read_at(path: Path, start: int, size: int) -> bytes:
    """Bytes of a shard.

    Opens it anew: threads share no position, and a record can be sent to another process.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise OSError(errno.EIO, "the shard became shorter while it was in use")
    return data


def _read_caption(path: Path, member: Member) -> str:
    return decode_caption(_read_at(path, member.start, member.size))


def _bad(key: str, error: BadImage, position: int, captioned: bool) -> ImageRecord:
    """A record that raises the error when it is read."""
    refuse = partial(_refuse, error.stage, error.kind, str(error))
    return ImageRecord(key, None, refuse, refuse if captioned else None, position)


def _refuse(stage: Stage, kind: Kind, message: str) -> NoReturn:
    raise BadImage(stage, kind, message)


SUFFIX: Final = ".tar"
COMPRESSED_SUFFIXES: Final = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".tzst",
)
MAX_SHARDS: Final = 1_000_000


def find_shards(source: str | Path) -> list[Path] | None:
    """The shards that a source names, in order; None where it is something else.

    A folder's are in the byte order of their names; a pattern's in the order of the shell, the last
    braces fastest. URLs, compressed tars, and folders that hold something else to read as well, are
    refused.
    """
    text, path = os.fspath(source), Path(source)
    exists = os.path.exists(path)  # noqa: PTH110  Path raises on a pattern that is longer than any name
    if exists and path.is_dir():
        return _in_folder(path)
    _refuse_others(text, exists)
    if exists or "{" not in text:
        return [path] if exists and path.suffix.lower() == SUFFIX else None
    paths = [Path(name) for name in expand_braces(text)]
    if missing := [name for name in paths if not name.exists()]:
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

    Examples:
        >>> from vilu.datasets.tar import expand_braces
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
        raise UsageError(
            f"{pattern}: braces hold a list {{a,b}} or two numbers {{00..10}}. Found {{{inside}}}."
        )
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} names. Name fewer shards.")
    width = (
        max(map(len, match.groups()))
        if any(len(end) > 1 and end[0] == "0" for end in match.groups())
        else 0
    )
    step = 1 if last >= first else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]


def _in_folder(folder: Path) -> list[Path] | None:
    with (
        or_refuse(f"list the folder {folder}", "Mend its permissions."),
        os.scandir(folder) as entries,
    ):
        names = [entry.name for entry in entries if entry.name[0] != "." and is_file(entry)]
    shards = sorted((name for name in names if name.lower().endswith(SUFFIX)), key=os.fsencode)
    images = next((name for name in names if name.lower().endswith(SUFFIXES)), None)
    others = [] if not shards else subfolders(folder) if images is None else [images]
    if others:
        raise UsageError(
            f"{folder} holds tar files and {others[0]!r}, so what to read is unclear. "
            f"Move the tar files out, or name them: '{folder}/{{{shards[0]},...}}'."
        )
    compressed = next((name for name in names if name.lower().endswith(COMPRESSED_SUFFIXES)), None)
    if not shards and images is None and compressed is not None and not subfolders(folder):
        _refuse_compressed(str(folder / compressed))
    return [folder / name for name in shards] or None


def _refuse_others(text: str, exists: bool) -> None:
    if not exists and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):  # two letters: not a drive
        raise UsageError(
            f"{text} is no file: nothing is downloaded and no command is run. Give files on a disk."
        )
    if text.lower().endswith(COMPRESSED_SUFFIXES):
        _refuse_compressed(text)


def _refuse_compressed(name: str) -> None:
    raise DataError(
        f"{name} is compressed, so it cannot be read in parts. Uncompress it (gunzip, unxz, unzstd) to a {SUFFIX} file."
    )
