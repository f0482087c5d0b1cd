"""Lists a folder's photos, also moved photos, and sorts photos by decision."""

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
from vilu.artifacts.tables import read_table, write_table
from vilu.datasets.files import original_path, portable_name
from vilu.datasets.folder import ListedPhoto, list_photos
from vilu.errors import DataError
from vilu.guard.guard import Answer
from vilu.outcomes.decisions import ACCEPT, OUTSIDE_REASON
from vilu.triage.answers import LABELLED
from vilu.triage.photos import PhotoFolder
from vilu.triage.sidecars import SIDECAR_SUFFIX, sidecar_of
from vilu.triage.state import MOVED_TABLE, SORTED_FOLDER, TriageSettings

REPLACED_CHARACTERS: Final = re.compile(r"[^\w .()+-]")
"""Characters to replace by "_" in a folder name."""

MAX_NAME_BYTES: Final = 255 - len(SIDECAR_SUFFIX)
"""Maximum length of a photo's file name in bytes, with room for the suffix of a sidecar."""

HASH_DIGITS: Final = 16
"""How many hexadecimal digits the hash in front of a name has (``hashed_name``)."""


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


def moved_photos(root: Path) -> dict[str, Path]:
    """Map every moved photo's path, in the photo folder, to the present location.

    Moved photos are left out if they were deleted since or replaced by a link.
    """
    if not (root / MOVED_TABLE).exists():
        return {}
    table, _ = read_table(root / MOVED_TABLE, ())
    moved = {}
    for name, place in zip(table["path"].to_pylist(), table["place"].to_pylist(), strict=True):
        target = root / place
        if target.is_file() and not target.is_symlink():
            path = original_path(name)
            moved[portable_name(path)] = target
    return moved


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
    - A photo is not moved if the photo is a link, or is reached by a link to a folder.
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

    Photos are left out if they are reached only by links to folders, because such photos lie
    elsewhere.
    """
    sources = _present_locations(photo_folder)
    labels: dict[Path, str | None] = {}
    for answer in answers:
        photo = sources[answer.key]
        if not lies_inside(photo, photo_folder.root, root):
            continue
        folder = folder_of(answer, settings.outside_labels)
        is_accepted = folder.startswith("accepted/")
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
    targets = {}
    for answer in answers:
        name = flat_name(answer.key)
        if n_photos_with_name[name] > 1:
            name = hashed_name(answer.key)
        targets[answer.key] = sorted_folder / folder_of(answer, settings.outside_labels) / name
    return targets


def folder_of(answer: Answer, outside_labels: Collection[str]) -> str:
    """Return the folder below ``sorted`` for an answer's photo."""
    if answer.reason == OUTSIDE_REASON or answer.label in outside_labels:
        return "outside"
    if answer.decision in {ACCEPT, LABELLED} and answer.label is not None:
        name = REPLACED_CHARACTERS.sub("_", answer.label).strip(". ")
        return f"accepted/{name or '_'}"  # "_" if the name is empty now
    return "review"


def flat_name(path: str) -> str:
    """Return a photo's file name in a flat folder: the path with "__" in place of "/"."""
    name = path.replace("/", "__")
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    return hashed_name(path)


def hashed_name(path: str) -> str:
    """Return a hash of a photo's path, then the flat name. A long flat name loses its start.

    Without the hash, ``a/b.jpg`` and ``a__b.jpg`` would have the same name. Two long paths with the
    same end would also have the same name.
    """
    prefix = f"{bytes_hash(path.encode())[:HASH_DIGITS]}__"
    encoded_name = path.replace("/", "__").encode()
    n_bytes_left = MAX_NAME_BYTES - len(prefix)
    return prefix + encoded_name[-n_bytes_left:].decode(errors="ignore")


def _is_behind_link(photo: Path, *folders: Path) -> bool:
    """Return whether a photo is a link, or is reached by a link out of the ``folders``."""
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
    """Write the table of moved photos. ``moves`` are pairs: a path, and a new location."""
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
