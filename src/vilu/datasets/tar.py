"""Tar files in webdataset's layout (shards): images with captions or labels."""

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

IMAGES: Final = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)  # extensions of images
CAPTION: Final = "txt"  # extension of captions
# the two errors in the order of members, with their messages
FAULTS: Final = {
    "interleaved": "members of other samples are between its members. Sort the shard by name",
    "duplicate": "two members have the same name and extension. Write the shard again",
}


@dataclass(slots=True)
class Sample:
    """The members of a shard that have one key: an image with its caption or label."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)  # members by extension
    fault: Literal["interleaved", "duplicate"] | None = None  # error in their order, if any

    def image(self) -> Member:
        """Return the member that holds the image; BadImage where the sample has no usable image."""
        for member in self.members.values():
            if not stays_below(member.name):
                raise BadImage(
                    "open",
                    "bad_path",
                    f"{member.name!r}: a name must be relative and without '..'",
                )
        if self.fault is not None:
            raise BadImage("open", self.fault, FAULTS[self.fault])
        extension = next((name for name in self.members if name in IMAGES), None)
        image = None if extension is None else self.companion(extension)
        if image is None:
            raise BadImage(
                "open",
                "missing_image",
                f"the sample has no image; it has {self.listed()} "
                "(an extension begins at the name's first dot)",
            )
        if image.size > MAX_FILE_BYTES:
            raise BadImage(
                "open", "too_large", f"{image.size} bytes; at most {MAX_FILE_BYTES} are read"
            )
        return image

    def caption(self) -> Member:
        """Return the member that holds the caption; BadImage where none is usable."""
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
        """Return the member with an extension; None if there is no such member.

        BadImage if the member is no plain file.
        """
        member = self.members.get(extension)
        if member is not None and not member.is_file:
            raise BadImage(
                "open",
                "not_a_file",
                f"{member.name!r} is a link, a device or sparse, not a plain file",
            )
        return member

    def is_whole(self, companion: str) -> bool:
        """Whether the sample has an image and a member with the extension ``companion``."""
        if companion not in self.members:
            return False
        return not IMAGES.isdisjoint(self.members)

    def listed(self) -> str:
        """Return the first extensions of the members, for messages."""
        shown = [f".{name[:20]}" for name in list(self.members)[:5]]
        if len(self.members) > 5:
            shown.append("...")
        return ", ".join(shown)


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case extension of a member, split at the first dot of the base name.

    None where the member has no extension, or no name before the extension (hidden files).

    Examples:
        >>> from vilu.datasets.tar import split_name
        >>> split_name("images/001.JPG")
        ('images/001', 'jpg')
        >>> split_name("v1.0/001.left.jpg")  # a dot in the folder does not count
        ('v1.0/001', 'left.jpg')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if stem == "" or dot == "":
        return None
    return folder + slash + stem, extension.lower()


def list_samples(path: Path, companion: str) -> tuple[list[Sample], BadImage | None]:
    """Return the samples of a shard, and the error that ended the reading early (or None).

    ``companion`` is the extension of captions or labels, without which a sample is incomplete.
    """
    by_key: dict[str, Sample] = {}
    error_of_shard = None
    try:
        size = _size(path)
        with path.open("rb") as file:
            _group_by_key(members(file, size), by_key)
    except BadImage as error:
        error_of_shard = error
    except OSError as error:
        error_of_shard = BadImage("open", "bad_shard", f"cannot read the shard: {error.strerror}")
    samples = list(by_key.values())
    if error_of_shard is None or not samples:
        return samples, error_of_shard
    # The last sample may lack members that were behind the damage. In this case, the sample gets no
    # record of its own, because the error of the shard counts for all samples that are lost.
    last = samples[-1]
    is_cut = last.fault is None and not last.is_whole(companion)
    if is_cut:
        samples.pop()
    return samples, error_of_shard


def _size(path: Path) -> int:
    """Return the size of a regular file in bytes; OSError where the file is not regular."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait without end
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_size


def _group_by_key(shard: Iterable[Member], samples: dict[str, Sample]) -> None:
    """Add the members of a shard to the samples of their keys, and mark errors in their order."""
    last = None  # the sample to which the previous member belongs
    for member in shard:
        key_and_extension = split_name(member.name)
        if key_and_extension is None:
            if stays_below(member.name):
                continue  # the member belongs to no sample
            # a name that leads out of the folder is always reported, as a sample with a bad image
            key_and_extension = (member.name, "")
        key, extension = key_and_extension
        sample = samples.setdefault(key, Sample(key))  # a new sample at its first member
        is_new = not sample.members
        if not is_new and sample is not last:
            sample.fault = "interleaved"
        elif extension in sample.members and sample.fault is None:
            sample.fault = "duplicate"
        sample.members.setdefault(extension, member)  # of two equal names, the first member counts
        last = sample


LABEL: Final = "cls"  # extension of labels
MAX_LABEL_BYTES: Final = 32


class TarShards:
    """Images in tar files in webdataset's layout, with labels or with captions.

    If there is a classes file, the images have labels. Otherwise they have captions.

    A sample consists of all members whose names are equal up to the first dot of the base name. The
    image of a sample is the first member with the extension of an image. The caption is in the
    member ``.txt``. The label is a whole number in the member ``.cls``. Without this member, the
    label is unknown. Other members are ignored. The key of a record is ``shard#key``; the key of an
    error of a whole shard is ``shard``. No tar file is opened before ``records`` is called, and no
    tar file is unpacked. Memory holds the member list of one shard at a time.

    Every sample is a record. A record that cannot be used raises ``BadImage`` on reading. Its kind
    is one of these, or a kind of ``decode_caption`` or ``decode_image``:

    - "bad_path": a name is absolute or contains "..".
    - "interleaved": members of other samples are between the members of this sample. There is one
      record for the whole sample.
    - "duplicate": two members have the same extension.
    - "not_a_file": a member is a link, a device or a sparse file.
    - "missing_image", "missing_caption", "too_large", "bad_label".

    A shard that ends early or cannot be read to its end gives one more record, of kind
    "truncated_shard" or "bad_shard". An incomplete last sample before the damage is counted in
    this record and has no record of its own.

    The lines of a classes file are in label order, or begin with the labels. ``outside`` has names
    of classes, or labels that are no class. Images with these labels, and images with label -2,
    belong to none of the classes. ``strays`` are the labels in ``outside`` that are no class. It is
    not checked that they occur, because this would take a read of all tar files.

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
        self.class_names: tuple[str, ...] | None = None
        context = ["tar"]
        if self.classes is not None:
            self.class_names = self.classes.names
            context += [*self.classes.folders, *self.classes.names]
        self.captioned = self.classes is None
        self.strays = self._labels_beyond(outside)
        self._paths = [path.absolute() for path in paths]
        self._names = _shard_names(self._paths)
        listing = ListingHash(*context)
        for name in self._names:
            listing.add(name, label=MISSING, status=None)
        self.fingerprint = listing.hexdigest()

    @property
    def _n_classes(self) -> int:
        return len(self.class_names or ())

    def _labels_beyond(self, outside: Sequence[str]) -> frozenset[str]:
        """Return the texts in ``outside`` that are numbers but not the label of a class."""
        numbers = [name for name in outside if name.isdecimal()]
        return frozenset(name for name in numbers if int(name) >= self._n_classes)

    def __len__(self) -> int:
        return len(self._paths)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the samples of shards start ... stop - 1, and after a damaged shard its error."""
        companion = CAPTION if self.captioned else LABEL
        for number in range(len(self))[start:stop]:  # the slice ends at the last shard
            samples, error_of_shard = list_samples(self._paths[number], companion)
            # Every shard has a fixed range of positions. So if a damaged shard loses samples, the
            # positions in later shards stay the same.
            first = number * SHARD
            for position, sample in enumerate(samples, first):
                yield self._record(number, sample, position)
            if error_of_shard is not None:
                next_position = first + len(samples)
                yield _bad(self._names[number], error_of_shard, next_position, self.captioned)

    def shard_fingerprint(self, start: int, stop: int) -> str:
        """Return a hash of names, sizes and times of modification of shards start ... stop - 1."""
        listing = ListingHash()
        for name, path in zip(self._names[start:stop], self._paths[start:stop], strict=True):
            try:
                listing.add(name, label=MISSING, status=path.stat())
            except OSError:  # the shard is hashed as missing, and reading it reports the error
                listing.add(name, label=MISSING, status=None)
        return listing.hexdigest()

    def _record(self, number: int, sample: Sample, position: int) -> ImageRecord:
        """Return the record of a sample; if the sample is unusable, reading it raises BadImage."""
        path = self._paths[number]
        key = f"{self._names[number]}#{sample.key}"
        label = None
        caption = None
        try:
            image = sample.image()
            if self.captioned:
                caption = partial(_read_caption, path, sample.caption())
            else:
                label = self._label(path, sample.companion(LABEL))
        except BadImage as error:
            return _bad(key, error, position, self.captioned)
        read = partial(_read_at, path, image.start, image.size)
        return ImageRecord(key, label, read, caption, position)

    def _label(self, path: Path, member: Member | None) -> int | None:
        """Return the label in a member; None without a member, -2 for none of the classes."""
        if member is None:
            return None
        size = min(member.size, MAX_LABEL_BYTES + 1)  # one byte more shows that a label is too long
        try:
            text = _read_at(path, member.start, size).strip()
        except OSError as error:
            raise BadImage(
                "text", "read_error", f"cannot read the label: {error.strerror}"
            ) from error
        # Latin-1, because it decodes any bytes without an error
        if text.decode("latin-1") in {str(OUTSIDE), *self.strays}:
            return OUTSIDE
        is_number = text.isdigit() and len(text) <= MAX_LABEL_BYTES
        if not is_number or int(text) >= self._n_classes:
            raise BadImage(
                "text",
                "bad_label",
                f"the label must be 0 to {self._n_classes - 1}, or -2. Found {text!r}",
            )
        return int(text)


def _shard_names(paths: Sequence[Path]) -> list[str]:
    """Return the paths of the shards relative to their common folder.

    "#" is replaced by "%23", because in a key "#" separates the name of the shard from the rest.
    """
    common = os.path.commonpath({path.parent for path in paths})
    names = []
    for path in paths:
        name = portable_name(path.relative_to(common).as_posix())
        names.append(name.replace("#", "%23"))
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(f"the shard {name} is named more than once. Name each once.")
    return names


def _read_at(path: Path, start: int, size: int) -> bytes:
    """Return ``size`` bytes of a shard from the position ``start`` on.

    The file is opened in every call. So threads do not share a file position, and a record can be
    sent to another process.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    # without this check, the image of a shard that has become shorter would count as damaged
    if len(data) < size:
        raise OSError(errno.EIO, "the shard became shorter while it was in use")
    return data


def _read_caption(path: Path, member: Member) -> str:
    return decode_caption(_read_at(path, member.start, member.size))


def _bad(key: str, error: BadImage, position: int, captioned: bool) -> ImageRecord:
    """Return a record without a label. Reading the record raises a copy of the error."""
    raise_error = partial(_raise_bad_image, error.stage, error.kind, str(error))
    caption = raise_error if captioned else None
    return ImageRecord(key, None, raise_error, caption, position)


def _raise_bad_image(stage: Stage, kind: Kind, message: str) -> NoReturn:
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
    """Return the shards of a folder, tar file or pattern, in order; None for any other source.

    The shards of a folder are in the byte order of their names. The shards of a pattern are in the
    order in which a shell expands braces: the last braces change fastest.

    Raises:
        UsageError: If the source is a URL, a pattern of files that do not exist, or a folder that
            holds tar files and also images or sub-folders.
        DataError: If the tar files are compressed.
    """
    text = os.fspath(source)
    path = Path(source)
    # not Path.exists, which raises an error if a pattern is too long for a file name
    exists = os.path.exists(path)  # noqa: PTH110
    if exists and path.is_dir():
        return _in_folder(path)
    _refuse_others(text, exists=exists)
    if exists:
        return [path] if path.suffix.lower() == SUFFIX else None
    if "{" not in text:
        return None
    paths = [Path(name) for name in expand_braces(text)]
    _require_shards(paths, text)
    return paths


def _require_shards(paths: Sequence[Path], pattern: str) -> None:
    """Raise UsageError where a path of a pattern does not exist, or does not end in ".tar"."""
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise UsageError(
            f"{pattern} names {len(paths)} shards; {len(missing)} are not there, "
            f"the first is {missing[0]}. Check the pattern or download them."
        )
    for path in paths:
        if path.suffix.lower() != SUFFIX:
            raise UsageError(f"a pattern names shards ending in {SUFFIX}. {pattern} names {path}.")


def expand_braces(pattern: str) -> list[str]:
    """Return all names that a pattern stands for.

    ``{a,b}`` is a list of alternatives. ``{08..10}`` is a range of numbers, which have as many
    digits as the numbers in the braces. Braces cannot be nested.

    Examples:
        >>> from vilu.datasets.tar import expand_braces
        >>> expand_braces("{08..10}.tar")
        ['08.tar', '09.tar', '10.tar']
        >>> expand_braces("{train,test}-{1,2}.tar")
        ['train-1.tar', 'train-2.tar', 'test-1.tar', 'test-2.tar']
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if re.search(r"[{}]", "".join(pieces)):
        raise UsageError(f"{pattern}: braces must match and cannot be nested.")
    choices = []
    for number, piece in enumerate(pieces):
        is_in_braces = number % 2 == 1  # ``re.split`` returns: outside, inside, outside, ...
        choices.append(_alternatives(piece, pattern) if is_in_braces else [piece])
    if prod(map(len, choices)) > MAX_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} names. Name fewer shards.")
    return ["".join(names) for names in product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    """Return the texts that the inside of one pair of braces stands for."""
    if "," in inside:
        return inside.split(",")
    match = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inside)
    if match is None:
        raise UsageError(
            f"{pattern}: braces hold a list {{a,b}} or two numbers {{00..10}}. Found {{{inside}}}."
        )
    first_text, last_text = match.groups()
    first = int(first_text)
    last = int(last_text)
    if abs(last - first) >= MAX_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} names. Name fewer shards.")
    n_digits = 0  # without leading zeros, zfill adds none
    if _has_leading_zero(first_text) or _has_leading_zero(last_text):
        n_digits = max(len(first_text), len(last_text))
    step = 1 if last >= first else -1
    return [str(number).zfill(n_digits) for number in range(first, last + step, step)]


def _has_leading_zero(digits: str) -> bool:
    return digits.startswith("0") and digits != "0"


def _in_folder(folder: Path) -> list[Path] | None:
    """Return the tar files of a folder; None where it has no uncompressed tar files.

    UsageError where the folder has tar files and also images or sub-folders. DataError where all
    tar files are compressed, and there are no images or sub-folders.
    """
    names = _visible_files(folder)
    shards = sorted(_ending_in(SUFFIX, names), key=os.fsencode)
    compressed = _ending_in(COMPRESSED_SUFFIXES, names)
    if not shards and not compressed:
        return None
    images_or_folders = _ending_in(SUFFIXES, names) or subfolders(folder)
    if shards and images_or_folders:
        raise UsageError(
            f"{folder} holds tar files and {images_or_folders[0]!r}, so what to read is unclear. "
            f"Move the tar files out, or name them: '{folder}/{{{shards[0]},...}}'."
        )
    if shards:
        return [folder / name for name in shards]
    if not images_or_folders:
        _refuse_compressed(str(folder / compressed[0]))
    return None


def _visible_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that are not hidden."""
    hint = "Check its permissions."
    with or_refuse(f"list the folder {folder}", hint), os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        return [entry.name for entry in visible if is_file(entry)]


def _ending_in(suffixes: str | tuple[str, ...], names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(suffixes)]


def _refuse_others(text: str, *, exists: bool) -> None:
    """Refuse URLs, commands and compressed tar files."""
    # A URL or command has at least two letters before its colon. One letter is a drive of Windows.
    if not exists and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
        raise UsageError(
            f"{text} is no file: nothing is downloaded and no command is run. Give files on a disk."
        )
    if text.lower().endswith(COMPRESSED_SUFFIXES):
        _refuse_compressed(text)


def _refuse_compressed(name: str) -> None:
    raise DataError(
        f"{name} is compressed, so it cannot be read in parts. "
        f"Uncompress it (gunzip, unxz, unzstd) to a {SUFFIX} file."
    )
