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

from vilu.artifacts.disk import convert_os_errors
from vilu.datasets.base import POSITIONS_PER_SHARD, ImageRecord
from vilu.datasets.classes import class_table
from vilu.datasets.files import (
    IMAGE_SUFFIXES,
    MAX_FILE_BYTES,
    NO_VALUE,
    ListingHash,
    is_file,
    is_relative_without_dotdot,
    portable_name,
    subfolders,
)
from vilu.datasets.images import (
    MAX_CAPTION_BYTES,
    BadImage,
    ErrorKind,
    ReadingStage,
    decode_caption,
)
from vilu.datasets.tar_members import Member, read_members
from vilu.errors import OUTSIDE, DataError, UsageError

IMAGE_EXTENSIONS: Final = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
CAPTION_EXTENSION: Final = "txt"
MAX_LISTED: Final = 5  # maximum number of extensions in a message
# maps an error in the member order to a message
ORDER_ERRORS: Final = {
    "interleaved": "members of other samples are between those of this one. Sort the shard by name",
    "duplicate": "two members have the same name and extension. Write the shard again",
}


@dataclass(slots=True)
class Sample:
    """A shard's members with the same key: an image with a caption or label."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)  # extension -> member
    # error in the member order, if any
    order_error: Literal["interleaved", "duplicate"] | None = None

    def image_member(self) -> Member:
        """Return the member with the image. Raise BadImage if the sample has no usable image."""
        for member in self.members.values():
            if not is_relative_without_dotdot(member.name):
                raise BadImage(
                    f"{member.name!r}: a name must be relative and without '..'",
                    stage="open",
                    kind="bad_path",
                )
        if self.order_error is not None:
            raise BadImage(ORDER_ERRORS[self.order_error], stage="open", kind=self.order_error)
        image: Member | None = None
        for extension in self.members:
            if extension in IMAGE_EXTENSIONS:
                image = self.plain_member(extension)
                break
        if image is None:
            raise BadImage(
                f"the sample has no image; it has {self.list_extensions()} "
                "(an extension begins at the name's first dot)",
                stage="open",
                kind="missing_image",
            )
        if image.size > MAX_FILE_BYTES:
            raise BadImage(
                f"{image.size} bytes; at most {MAX_FILE_BYTES} are read",
                stage="open",
                kind="too_large",
            )
        return image

    def caption_member(self) -> Member:
        """Return the member with the caption. Raise BadImage if there is no usable caption."""
        member = self.plain_member(CAPTION_EXTENSION)
        if member is None:
            extensions = self.list_extensions()
            raise BadImage(
                f"the sample has no .{CAPTION_EXTENSION}; it has {extensions}",
                stage="text",
                kind="missing_caption",
            )
        if member.size > MAX_CAPTION_BYTES:
            raise BadImage(
                f"a caption of {member.size} bytes; at most {MAX_CAPTION_BYTES} are read",
                stage="text",
                kind="too_large",
            )
        return member

    def plain_member(self, extension: str) -> Member | None:
        """Return the member with an extension, or None if there is no such member.

        If the member is not a plain file, raise BadImage.
        """
        member = self.members.get(extension)
        if member is not None and not member.is_file:
            raise BadImage(
                f"{member.name!r} is a link, a device or sparse, not a plain file",
                stage="open",
                kind="not_a_file",
            )
        return member

    def is_complete(self, required_extension: str) -> bool:
        """Return whether the sample has an image and a member with the required extension."""
        has_image = not IMAGE_EXTENSIONS.isdisjoint(self.members)
        return has_image and required_extension in self.members

    def list_extensions(self) -> str:
        """Return the members' first extensions, for messages."""
        first_extensions = list(self.members)[:MAX_LISTED]
        listed = [f".{extension[:20]}" for extension in first_extensions]
        if len(self.members) > MAX_LISTED:
            listed.append("...")
        return ", ".join(listed)


def split_name(name: str) -> tuple[str, str] | None:
    """Return a member's key and lower-case extension, split at the base name's first dot.

    If the member has no extension, or no name before the extension (hidden files), return None.

    Examples:
        >>> from vilu.datasets.tar import split_name
        >>> split_name("images/001.JPG")
        ('images/001', 'jpg')
        >>> # the dot in the folder is not the first dot of the base name
        >>> split_name("v1.0/001.left.jpg")
        ('v1.0/001', 'left.jpg')
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if stem == "" or dot == "":
        return None
    return folder + slash + stem, extension.lower()


def list_samples(path: Path, required_extension: str) -> tuple[list[Sample], BadImage | None]:
    """Return a shard's samples, and the error that ended the reading early (or None).

    ``required_extension`` is the extension for captions or labels. A sample without such a member
    is incomplete.
    """
    sample_of_key: dict[str, Sample] = {}
    shard_error = None
    try:
        n_bytes = _file_size(path)
        with path.open("rb") as file:
            members = read_members(file, n_bytes)
            _group_by_key(members, sample_of_key)
    except BadImage as error:
        shard_error = error
    except OSError as error:
        shard_error = BadImage(
            f"cannot read the shard: {error.strerror}", stage="open", kind="bad_shard"
        )
    samples = list(sample_of_key.values())
    if shard_error is None or not samples:
        return samples, shard_error
    # The last sample may lack members behind the damage. Then the sample gets no separate record,
    # because the shard's error already reports all lost samples.
    last_sample = samples[-1]
    is_cut_off = last_sample.order_error is None and not last_sample.is_complete(required_extension)
    if is_cut_off:
        samples.pop()
    return samples, shard_error


def _file_size(path: Path) -> int:
    """Return a regular file's size in bytes. Raise OSError if the file is not regular."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait without end
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_size


def _group_by_key(members: Iterable[Member], sample_of_key: dict[str, Sample]) -> None:
    """Add each member in a shard to the sample with the member's key, and mark order errors."""
    previous_sample = None  # the previous member's sample
    for member in members:
        key_and_extension = split_name(member.name)
        if key_and_extension is None:
            if is_relative_without_dotdot(member.name):
                continue  # the member belongs to no sample
            # A name leading out of the folder must be reported. So the member becomes a sample
            # without a usable image.
            key_and_extension = (member.name, "")
        key, extension = key_and_extension
        sample = sample_of_key.setdefault(key, Sample(key))  # the first member makes a new sample
        is_new = not sample.members
        if not is_new and sample is not previous_sample:
            sample.order_error = "interleaved"
        elif extension in sample.members and sample.order_error is None:
            sample.order_error = "duplicate"
        sample.members.setdefault(extension, member)  # if two names are equal, the first is used
        previous_sample = sample


LABEL_EXTENSION: Final = "cls"
MAX_LABEL_BYTES: Final = 32


class TarShards:
    """Images in tar files in webdataset's layout, with labels or with captions.

    If there is a classes file, the images have labels. Otherwise the images have captions.

    A sample consists of all members with equal names up to the base name's first dot. A sample's
    image is the first member with an image extension. The caption is in the member ``.txt``. The
    label is a whole number in the member ``.cls``. Without this member, the label is unknown. All
    other members are ignored. A record's key is ``shard#key``. If an error concerns a whole shard,
    the key is ``shard``. No tar file is opened before ``records`` is called, and no tar file is
    unpacked. Memory holds a single shard's member list at a time.

    Every sample is a record. Reading an unusable sample's record raises ``BadImage``. The error's
    kind is in this list, or is a kind raised by ``decode_caption`` or ``decode_image``:

    - "bad_path": a name is absolute or contains "..".
    - "interleaved": members from other samples are between this sample's members. The whole sample
      is a single record.
    - "duplicate": two members have the same extension.
    - "not_a_file": a member is a link, a device or a sparse file.
    - "missing_image", "missing_caption", "too_large", "bad_label".

    If a shard ends early or cannot be read to the end, there is one more record, of kind
    "truncated_shard" or "bad_shard". If the last sample before the damage is incomplete, this
    record reports the sample, and the sample has no separate record.

    A classes file's lines are in label order, or begin with the labels. ``outside`` has class
    names, or labels without a class. Images with these labels, and images with label -2, are
    outside all classes. ``labels_without_class`` are the labels in ``outside`` without a class.
    Such a label need not occur in the data. To check this, all tar files would have to be read.

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
        # The folder with the shards, which may have no sub-folder. Empty if the shards are named.
        is_folder = os.path.isdir(source)  # noqa: PTH112  Path raises an error for a long pattern
        self.listed_folders: tuple[Path, ...] = (Path(source),) if is_folder else ()
        self.classes = class_table(data_names=None, file=classes, numeric_labels=True)
        self.class_names: tuple[str, ...] | None = None
        context = ["tar"]
        if self.classes is not None:
            self.class_names = self.classes.names
            context += [*self.classes.data_names, *self.classes.names]
        self.captioned = self.classes is None
        self.labels_without_class = self._numbers_without_class(outside)
        self._shard_paths = [path.absolute() for path in paths]
        self._shard_names = _shard_names(self._shard_paths)
        listing_hash = ListingHash(*context)
        for name in self._shard_names:
            listing_hash.add(name, label=NO_VALUE, status=None)
        self.fingerprint = listing_hash.hexdigest()

    @property
    def _n_classes(self) -> int:
        return len(self.class_names or ())

    def _numbers_without_class(self, outside: Sequence[str]) -> frozenset[str]:
        """Return the numbers in ``outside`` that are not class labels, as texts."""
        numbers = [name for name in outside if name.isdecimal()]
        return frozenset(name for name in numbers if int(name) >= self._n_classes)

    def __len__(self) -> int:
        return len(self._shard_paths)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the samples in shards start ... stop - 1, and the error after a damaged shard."""
        required_extension = CAPTION_EXTENSION if self.captioned else LABEL_EXTENSION
        for shard in range(len(self))[start:stop]:  # ``stop`` may lie behind the last shard
            samples, shard_error = list_samples(self._shard_paths[shard], required_extension)
            # Every shard has a fixed position range. So if a damaged shard loses samples, positions
            # in later shards do not change.
            first_position = shard * POSITIONS_PER_SHARD
            for position, sample in enumerate(samples, first_position):
                yield self._record(shard, sample, position)
            if shard_error is not None:
                next_position = first_position + len(samples)
                yield self._unusable_record(self._shard_names[shard], shard_error, next_position)

    def shard_fingerprint(self, start: int, stop: int) -> str:
        """Return a hash of names, sizes and modification times for shards start ... stop - 1."""
        listing_hash = ListingHash()
        names = self._shard_names[start:stop]
        paths = self._shard_paths[start:stop]
        for name, path in zip(names, paths, strict=True):
            try:
                status = path.stat()
                listing_hash.add(name, label=NO_VALUE, status=status)
            except OSError:  # the shard is hashed as missing, and reading it reports the error
                listing_hash.add(name, label=NO_VALUE, status=None)
        return listing_hash.hexdigest()

    def _record(self, shard: int, sample: Sample, position: int) -> ImageRecord:
        """Return a sample's record in the shard with the number ``shard``.

        If the sample is unusable, reading the record raises BadImage.
        """
        path = self._shard_paths[shard]
        key = f"{self._shard_names[shard]}#{sample.key}"
        label = None
        caption = None
        try:
            image_member = sample.image_member()
            if self.captioned:
                caption_member = sample.caption_member()
                caption = partial(_read_caption, path, caption_member)
            else:
                label_member = sample.plain_member(LABEL_EXTENSION)
                label = self._read_label(path, label_member)
        except BadImage as error:
            return self._unusable_record(key, error, position)
        read = partial(_read_bytes_at, path, image_member.start, image_member.size)
        return ImageRecord(key, label, read, caption, position)

    def _unusable_record(self, key: str, error: BadImage, position: int) -> ImageRecord:
        """Return a record without a label. Reading the record raises a copy of the error."""
        raise_error = partial(_raise_bad_image, str(error), stage=error.stage, kind=error.kind)
        caption = raise_error if self.captioned else None
        return ImageRecord(key, label=None, read=raise_error, caption=caption, position=position)

    def _read_label(self, path: Path, member: Member | None) -> int | None:
        """Return the label in a member: None without a member, -2 outside all classes."""
        if member is None:
            return None
        # a byte more than the maximum, to recognise a label that is too long
        n_bytes = min(member.size, MAX_LABEL_BYTES + 1)
        try:
            content = _read_bytes_at(path, member.start, n_bytes)
            text = content.strip()
        except OSError as error:
            raise BadImage(
                f"cannot read the label: {error.strerror}", stage="text", kind="read_error"
            ) from error
        outside_labels = {str(OUTSIDE), *self.labels_without_class}
        if text.decode("latin-1") in outside_labels:  # Latin-1 decodes any bytes without an error
            return OUTSIDE
        is_number = text.isdigit() and len(text) <= MAX_LABEL_BYTES
        if not is_number or int(text) >= self._n_classes:
            raise BadImage(
                f"the label must be 0 to {self._n_classes - 1}, or -2. Found {text!r}",
                stage="text",
                kind="bad_label",
            )
        return int(text)


def _shard_names(paths: Sequence[Path]) -> list[str]:
    """Return the shards' names: the paths, relative to the shards' common folder.

    "#" is replaced by "%23", because in a key "#" separates the shard's name from the sample's key.
    """
    common_folder = os.path.commonpath({path.parent for path in paths})
    names = []
    for path in paths:
        relative_path = path.relative_to(common_folder)
        name = portable_name(relative_path.as_posix())
        names.append(name.replace("#", "%23"))
    counts = Counter(names)
    for name, count in counts.items():
        if count > 1:
            raise UsageError(f"the shard {name} is named more than once. Name each once.")
    return names


def _read_bytes_at(path: Path, start: int, size: int) -> bytes:
    """Return ``size`` bytes in a shard from the position ``start`` on.

    The file is opened in every call. So threads do not share a file position, and a record can be
    sent to another process.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    # without this check, an image would be called damaged if the shard has become shorter
    if len(data) < size:
        raise OSError(errno.EIO, "the shard became shorter while it was in use")
    return data


def _read_caption(path: Path, member: Member) -> str:
    """Return the caption in a member of the shard ``path``. Raise BadImage if not valid."""
    content = _read_bytes_at(path, member.start, member.size)
    return decode_caption(content)


def _raise_bad_image(message: str, *, stage: ReadingStage, kind: ErrorKind) -> NoReturn:
    """Raise BadImage. In an unusable sample's record, this function replaces the reader."""
    raise BadImage(message, stage=stage, kind=kind)


TAR_SUFFIX: Final = ".tar"
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
    """Return the shards in a folder, tar file or pattern, or None for a different source.

    A folder's shards are sorted by name bytes. A pattern's shards have the order of a shell's brace
    expansion: the last braces change fastest.

    Raises:
        UsageError: If the source is a URL, a pattern with missing files, or a folder with tar files
            and also images or sub-folders.
        DataError: If the tar files are compressed.
    """
    text = os.fspath(source)
    path = Path(source)
    # not Path.exists, which raises an error if a pattern is too long for a file name
    exists = os.path.exists(path)  # noqa: PTH110
    if exists and path.is_dir():
        return _shards_in_folder(path)
    if not exists:
        _refuse_url(text)
    if text.lower().endswith(COMPRESSED_SUFFIXES):
        _refuse_compressed(text)
    if exists:
        return [path] if path.suffix.lower() == TAR_SUFFIX else None
    if "{" not in text:
        return None
    paths = [Path(name) for name in expand_braces(text)]
    _require_shards(paths, text)
    return paths


def _require_shards(paths: Sequence[Path], pattern: str) -> None:
    """Raise UsageError if a path from a pattern does not exist, or does not end in ".tar"."""
    missing_paths = [path for path in paths if not path.exists()]
    if missing_paths:
        raise UsageError(
            f"{pattern} names {len(paths)} shards; {len(missing_paths)} are not there, "
            f"the first is {missing_paths[0]}. Check the pattern or download them."
        )
    for path in paths:
        if path.suffix.lower() != TAR_SUFFIX:
            raise UsageError(
                f"a pattern names shards ending in {TAR_SUFFIX}. {pattern} names {path}."
            )


def expand_braces(pattern: str) -> list[str]:
    """Return all names that match a pattern with braces.

    ``{a,b}`` is a list of alternatives. ``{08..10}`` is a range of numbers with as many digits as
    in the braces. Braces cannot be nested.

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
    choices_of_pieces: list[list[str]] = []
    for number, piece in enumerate(pieces):
        is_in_braces = number % 2 == 1  # ``re.split`` alternates: text outside, text in braces
        choices = _brace_choices(piece, pattern) if is_in_braces else [piece]
        choices_of_pieces.append(choices)
    n_names = prod(len(choices) for choices in choices_of_pieces)
    if n_names > MAX_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} names. Name fewer shards.")
    return ["".join(combination) for combination in product(*choices_of_pieces)]


def _brace_choices(content: str, pattern: str) -> list[str]:
    """Return the possible replacements for a pair of braces.

    ``content`` is the text in the braces. ``pattern`` is the whole pattern, for messages.
    """
    if "," in content:
        return content.split(",")
    match = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", content)
    if match is None:
        raise UsageError(
            f"{pattern}: braces hold a list {{a,b}} or two numbers {{00..10}}. Found {{{content}}}."
        )
    first_text, last_text = match.groups()
    first = int(first_text)
    last = int(last_text)
    if abs(last - first) >= MAX_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} names. Name fewer shards.")
    min_digits = 0
    if _has_leading_zero(first_text) or _has_leading_zero(last_text):
        min_digits = max(len(first_text), len(last_text))
    step = 1 if last >= first else -1
    return [str(number).zfill(min_digits) for number in range(first, last + step, step)]


def _has_leading_zero(digits: str) -> bool:
    """Return whether a number has leading zeros, such as "007"."""
    return digits.startswith("0") and digits != "0"


def _shards_in_folder(folder: Path) -> list[Path] | None:
    """Return a folder's tar files. Return None if the folder has no uncompressed tar files.

    If the folder has tar files and also images or sub-folders, raise UsageError. If all tar files
    are compressed, and there are no images or sub-folders, raise DataError.
    """
    names = _visible_files(folder)
    shard_names = sorted(_names_with_suffix(TAR_SUFFIX, names), key=os.fsencode)
    compressed_names = _names_with_suffix(COMPRESSED_SUFFIXES, names)
    if not shard_names and not compressed_names:
        return None
    images_or_folders = _names_with_suffix(IMAGE_SUFFIXES, names) or subfolders(folder)
    if shard_names and images_or_folders:
        raise UsageError(
            f"{folder} holds tar files and {images_or_folders[0]!r}, so what to read is unclear. "
            f"Move the tar files out, or name them: '{folder}/{{{shard_names[0]},...}}'."
        )
    if shard_names:
        return [folder / name for name in shard_names]
    if not images_or_folders:
        _refuse_compressed(str(folder / compressed_names[0]))
    return None


def _visible_files(folder: Path) -> list[str]:
    """Return the file names in a folder, without hidden files."""
    hint = "Check its permissions."
    with convert_os_errors(f"cannot list the folder {folder}", hint), os.scandir(folder) as entries:
        visible_entries = [entry for entry in entries if not entry.name.startswith(".")]
        return [entry.name for entry in visible_entries if is_file(entry)]


def _names_with_suffix(suffixes: str | tuple[str, ...], names: Sequence[str]) -> list[str]:
    """Return the names with a suffix in ``suffixes``."""
    return [name for name in names if name.lower().endswith(suffixes)]


def _refuse_url(source: str) -> None:
    """Raise UsageError if a missing source is a URL, or a webdataset command."""
    # A URL or command has at least two letters before the colon. A single letter would be a Windows
    # drive.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source):
        raise UsageError(
            f"{source} is no file: nothing is downloaded and no command is run. Give files on a "
            "disk."
        )


def _refuse_compressed(name: str) -> None:
    """Raise DataError for a compressed tar file."""
    raise DataError(
        f"{name} is compressed, so it cannot be read in parts. "
        f"Uncompress it (gunzip, unxz, unzstd) to a {TAR_SUFFIX} file."
    )
