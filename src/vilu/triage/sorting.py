"""Lists the photos in a folder, also photos moved by earlier runs, and sorts them by decision."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa

from vilu.artifacts.disk import atomic_write, convert_os_errors, make_folder
from vilu.artifacts.hashing import bytes_hash
from vilu.artifacts.tables import write_table
from vilu.datasets.files import original_path, portable_name
from vilu.datasets.folder import ListedPhoto, list_photos
from vilu.errors import DataError
from vilu.guard.guard import Answer
from vilu.outcomes.decisions import ACCEPT, OUTSIDE_REASON
from vilu.triage.answers import LABELLED
from vilu.triage.photos import PhotoFolder
from vilu.triage.sidecars import SIDECAR_SUFFIX, sidecar_of
from vilu.triage.state import MOVED_TABLE, SORTED_FOLDER, TriageSettings, moved_photos

REPLACED_CHARACTERS: Final = re.compile(r"[^\w .()+-]")
"""Matches a character to replace by "_" in a folder name."""

MAX_NAME_BYTES: Final = 255 - len(SIDECAR_SUFFIX)
"""Maximum length of a photo's file name in bytes, with room for the suffix of a sidecar."""

ACCEPTED_GROUP: Final = "accepted"
"""Folder below ``sorted`` for accepted and labelled photos. It contains a folder for each class."""

HASH_DIGITS: Final = 16
"""Number of hexadecimal digits in the hash at the start of a name (``hashed_name``)."""


def list_folder(photos: Path, root: Path, *, follow_links: bool = False) -> PhotoFolder:
    """List the photos in ``photos``, and the photos moved into ``root`` by earlier runs.

    Args:
        photos: The photo folder.
        root: The triage folder. If this folder is inside ``photos``, its files are left out.
        follow_links: Whether links may lead anywhere, also to folders.

    Raises:
        DataError: If there is no photo, or if a new photo has a moved photo's name.
    """
    moved = moved_photos(root)
    n_required = 0 if moved else 1  # the folder may be empty if all photos were moved
    listed_photos = list_photos(photos, min_photos=n_required, follow_links=follow_links)
    listed_names = {portable_name(path) for path, _ in listed_photos}
    moved_and_new = sorted(listed_names & moved.keys())
    if moved_and_new:
        name = moved_and_new[0]
        raise DataError(
            f"{name!r} was moved to {moved[name]} and is in {photos} again. Rename the new photo. "
            "If both files are the same photo, remove the moved file instead."
        )
    for name, target in moved.items():
        listed_photos.append((original_path(name), target.stat()))
    listed_photos = _without_output(listed_photos, photos.resolve(), root.resolve())
    return PhotoFolder(photos, listed_photos, moved, follow_links)


def _without_output(
    listed_photos: list[ListedPhoto], photos: Path, root: Path
) -> list[ListedPhoto]:
    """Return the listed photos outside the triage folder ``root``."""
    if not root.is_relative_to(photos):
        return listed_photos
    start = f"{root.relative_to(photos).as_posix()}/"
    return [(path, status) for path, status in listed_photos if not path.startswith(start)]


def sort_photos(
    root: Path,
    photo_folder: PhotoFolder,
    answers: Sequence[Answer],
    settings: TriageSettings,
    action: str,
) -> None:
    """Sort photos into ``sorted/accepted/CLASS``, ``sorted/outside`` and ``sorted/review``.

    - A photo's new path is saved before the photo is moved. So if this run is killed in
      between, later runs still find the photo.
    - No file is overwritten. If the new path is taken, the photo is not moved.
    - All links in ``sorted`` are removed at the beginning. No other file is removed.
    - A photo is not moved if it is a link, or if a link to a folder elsewhere leads to it.
    - A photo's XMP sidecar is moved with the photo, unless the sidecar is a link.

    Args:
        root: The triage folder.
        photo_folder: The photos.
        answers: The answers about the photos.
        settings: The triage settings.
        action: "link": make links to the photos. "move": move the photos.
    """
    sorted_folder = root / SORTED_FOLDER
    sources = _present_locations(photo_folder)
    targets = _new_locations(sorted_folder, answers, settings)
    with convert_os_errors(f"cannot sort photos into {sorted_folder}"):
        _remove_links(sorted_folder)
        targets = {path: target for path, target in targets.items() if not target.exists()}
        if action == "link":
            for path, target in targets.items():
                _link(sources[path], target)
            return
        for path in list(targets):
            if _is_behind_link(sources[path], photo_folder.root, root):
                del targets[path]  # a photo behind a link is not moved
        _write_moves(root, [*photo_folder.moved_photos.items(), *targets.items()])
        for path, target in targets.items():
            sidecar = sidecar_of(sources[path])
            # The sidecar is moved before the photo. So if the process is killed in between, the
            # photo is not moved yet, and the next run moves the photo.
            if sidecar.is_file() and not sidecar.is_symlink():
                _move(sidecar, sidecar_of(target))
            _move(sources[path], target)


def accepted_labels(
    root: Path, photo_folder: PhotoFolder, answers: Sequence[Answer], settings: TriageSettings
) -> dict[Path, str | None]:
    """Map the present path of every photo to the label if the label is accepted, else to None.

    Photos are left out if only a link to a folder elsewhere leads to them.
    """
    sources = _present_locations(photo_folder)
    labels: dict[Path, str | None] = {}
    for answer in answers:
        photo = sources[answer.key]
        if not lies_inside(photo, photo_folder.root, root):
            continue
        is_accepted = group_of(answer, settings.outside_labels) == ACCEPTED_GROUP
        labels[photo] = answer.label if is_accepted else None
    return labels


def _present_locations(photo_folder: PhotoFolder) -> dict[str, Path]:
    """Map the path of every photo, as tables write it, to the present location."""
    sources = {}
    for path, _ in photo_folder.listed_photos:
        name = portable_name(path)
        sources[name] = photo_folder.moved_photos.get(name, photo_folder.root / path)
    return sources


def _new_locations(
    sorted_folder: Path, answers: Sequence[Answer], settings: TriageSettings
) -> dict[str, Path]:
    """Map every photo's path to its new path below ``sorted_folder``."""
    n_photos_with_name = Counter(flat_name(answer.key) for answer in answers)
    folder_of_class = class_folders(settings.embedding.names)
    targets = {}
    for answer in answers:
        name = flat_name(answer.key)
        if n_photos_with_name[name] > 1:
            name = hashed_name(answer.key)
        group = group_of(answer, settings.outside_labels)
        folder = sorted_folder / group
        if group == ACCEPTED_GROUP and answer.label is not None:
            folder /= folder_of_class[answer.label]
        targets[answer.key] = folder / name
    return targets


def group_of(answer: Answer, outside_labels: Collection[str]) -> str:
    """Return a photo's folder below ``sorted``: "accepted", "outside" or "review"."""
    if answer.reason == OUTSIDE_REASON or answer.label in outside_labels:
        return "outside"
    if answer.decision in {ACCEPT, LABELLED} and answer.label is not None:
        return ACCEPTED_GROUP
    return "review"


def class_folders(class_names: Collection[str]) -> dict[str, str]:
    """Map every class name to a folder name. No two classes have the same folder.

    A folder name begins with a hash if several classes would have the same folder, or if the name
    would be too long. A name that is too long loses its start.
    """
    n_classes_with_folder = Counter(_readable_folder(name) for name in set(class_names))
    folder_of_class = {}
    for class_name in class_names:
        folder = _readable_folder(class_name)
        is_too_long = len(folder.encode()) > MAX_NAME_BYTES
        if is_too_long or n_classes_with_folder[folder] > 1:
            folder = _hash_and_end(class_name, folder)
        folder_of_class[class_name] = folder
    return folder_of_class


def _readable_folder(class_name: str) -> str:
    """Return a class name with "_" in place of characters that are unusual in folder names."""
    name = REPLACED_CHARACTERS.sub("_", class_name).strip(". ")
    return name or "_"


def flat_name(path: str) -> str:
    """Return a photo's file name in a flat folder: the path with "__" in place of "/"."""
    name = path.replace("/", "__")
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    return hashed_name(path)


def hashed_name(path: str) -> str:
    """Return a photo's flat name with a hash of the path at the start.

    A long flat name is shortened, and only its end is left. Without the hash, ``a/b.jpg`` and
    ``a__b.jpg`` would have the same name. Two long paths with the same end would also have the same
    name.
    """
    return _hash_and_end(path, path.replace("/", "__"))


def _hash_and_end(hashed_text: str, name: str) -> str:
    """Return ``name`` with a hash of ``hashed_text`` before it. A long name loses its start."""
    hash_digits = bytes_hash(hashed_text.encode())[:HASH_DIGITS]
    prefix = f"{hash_digits}__"
    n_bytes_left = MAX_NAME_BYTES - len(prefix)
    end_of_name = name.encode()[-n_bytes_left:]
    # The cut may split a character. errors="ignore" leaves out the rest of this character.
    return prefix + end_of_name.decode(errors="ignore")


def _is_behind_link(photo: Path, *folders: Path) -> bool:
    """Return whether a photo is a link, or its real folder is outside the ``folders``."""
    return photo.is_symlink() or not lies_inside(photo, *folders)


def lies_inside(photo: Path, *folders: Path) -> bool:
    """Return whether a photo's real folder is in ``folders``, or below a folder in ``folders``."""
    real_folder = Path(os.path.realpath(photo.parent))
    return any(real_folder.is_relative_to(folder.resolve()) for folder in folders)


def _remove_links(sorted_folder: Path) -> None:
    """Remove all links below a folder."""
    for path in sorted_folder.rglob("*"):
        if path.is_symlink():
            path.unlink()


def _link(source: Path, target: Path) -> None:
    """Make a relative link at ``target`` to the real file behind ``source``."""
    make_folder(target.parent)
    # Path.resolve raises an error for a link to itself. os.path.realpath does not.
    real_file = os.path.realpath(source)
    real_folder = target.parent.resolve()
    relative_path = os.path.relpath(real_file, real_folder)
    target.symlink_to(relative_path)


def _move(source: Path, target: Path) -> None:
    """Move a file if it exists and no file is at the target."""
    make_folder(target.parent)
    if source.exists() and not target.exists():
        shutil.move(source, target, _copy)


def _copy(source: str | Path, target: str | Path) -> None:
    """Copy a photo with its file times to another disk. A killed process leaves no partial file."""
    with atomic_write(target) as copy:
        content = Path(source).read_bytes()
        copy.write(content)
        copy.flush()
        shutil.copystat(source, copy.name)


def _write_moves(root: Path, moves: Sequence[tuple[str, Path]]) -> None:
    """Write the table of moved photos. ``moves`` has pairs: a photo's path and its new location."""
    paths = []
    targets = []
    for path, target in moves:
        paths.append(path)
        relative_target = target.relative_to(root)
        targets.append(relative_target.as_posix())
    columns: Mapping[str, pa.Array] = {
        "path": pa.array(paths, pa.string()),
        "place": pa.array(targets, pa.string()),
    }
    write_table(root / MOVED_TABLE, columns, {"kind": "moved"})
