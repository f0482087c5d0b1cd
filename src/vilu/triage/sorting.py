"""Lists the photos of a folder, moved ones included, and sorts them by their decisions."""

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
from vilu.triage.sidecars import SUFFIX, sidecar_of
from vilu.triage.state import MOVED, SORTED, TriageSettings

NOT_IN_A_NAME: Final = re.compile(r"[^\w .()+-]")
"""Characters that are replaced by "_" in the name of a folder."""

LONGEST_NAME: Final = 255 - len(SUFFIX)
"""Maximum length of a file name in bytes, on common file systems, with room for a sidecar's."""

HASH_DIGITS: Final = 16
"""Number of hexadecimal digits of the hash in front of a name (``hashed_name``)."""


def list_folder(photos: Path, root: Path, *, follow_links: bool = False) -> PhotoFolder:
    """List the photos in ``photos``, and the photos that earlier runs moved into ``root``.

    With ``follow_links``, links may lead anywhere, also to folders.

    Files of the triage folder ``root`` are left out if it is inside ``photos``.

    Raises:
        DataError: If there is no photo, or if a new photo has the name of a photo that was moved.
    """
    moved = moved_photos(root)
    n_required = 0 if moved else 1  # if all photos were moved, the folder may have none
    listing = list_photos(photos, min_photos=n_required, follow_links=follow_links)
    listed_names = {portable_name(path) for path, _ in listing}
    moved_and_new = sorted(listed_names & moved.keys())
    if moved_and_new:
        name = moved_and_new[0]
        raise DataError(
            f"{name!r} was moved to {moved[name]} and is in {photos} again. Rename the new photo. "
            "If both files are the same photo, remove the moved file instead."
        )
    for name, target in moved.items():
        listing.append((original_path(name), target.stat()))
    listing = _without_output(listing, photos.resolve(), root.resolve())
    return PhotoFolder(photos, listing, moved, follow_links)


def _without_output(listing: list[ListedPhoto], photos: Path, root: Path) -> list[ListedPhoto]:
    """The listing without the files in the triage folder ``root``."""
    if not root.is_relative_to(photos):
        return listing
    start = f"{root.relative_to(photos).as_posix()}/"
    return [(path, status) for path, status in listing if not path.startswith(start)]


def moved_photos(root: Path) -> dict[str, Path]:
    """Present location of every moved photo, by its path in the folder of photos.

    Moved photos that were since deleted or replaced by a link are left out.
    """
    if not (root / MOVED).exists():
        return {}
    table, _ = read_table(root / MOVED, ())
    moved = {}
    for name, place in zip(table["path"].to_pylist(), table["place"].to_pylist(), strict=True):
        target = root / place
        if target.is_file() and not target.is_symlink():
            moved[portable_name(original_path(name))] = target
    return moved


def sort_photos(
    root: Path,
    listing: PhotoFolder,
    answers: Sequence[Answer],
    settings: TriageSettings,
    how: str,
) -> None:
    """Sort photos into ``sorted/accepted/CLASS``, ``sorted/outside`` and ``sorted/review``.

    - The new path of a photo is noted before the photo is moved. So later runs find the photo, even
      if this run is killed in between.
    - No file is overwritten. If the new path of a photo is taken, the photo stays where it is.
    - Links in ``sorted`` are removed first; no other file is removed.
    - A photo that is itself a link, or is reached by a link to a folder, is not moved.
    - The XMP sidecar of a photo is moved with it, unless it is a link.

    Args:
        root: The folder of the triage.
        listing: The photos.
        answers: The answers for the photos.
        settings: The settings of the triage.
        how: "link" or "move".
    """
    sorted_folder = root / SORTED
    sources = _sources(listing)
    targets = _targets(sorted_folder, answers, settings)
    with convert_os_errors(f"cannot sort photos into {sorted_folder}"):
        _remove_links(sorted_folder)
        targets = {path: target for path, target in targets.items() if not target.exists()}
        if how == "link":
            for path, target in targets.items():
                _link(sources[path], target)
            return
        linked = {path for path in targets if _is_behind_link(sources[path], listing.root, root)}
        targets = {path: target for path, target in targets.items() if path not in linked}
        _note_moves(root, [*listing.moved.items(), *targets.items()])
        for path, target in targets.items():
            sidecar = sidecar_of(sources[path])
            # The sidecar is moved before the photo. If the process is killed in between, the next
            # run moves the photo.
            if sidecar.is_file() and not sidecar.is_symlink():
                _move(sidecar, sidecar_of(target))
            _move(sources[path], target)


def accepted_labels(
    root: Path, listing: PhotoFolder, answers: Sequence[Answer], settings: TriageSettings
) -> dict[Path, str | None]:
    """The label of every photo if it is accepted, else None, by the present path of the photo.

    Photos that links to folders lead to are left out, because they lie outside of the folder.
    """
    sources = _sources(listing)
    labels: dict[Path, str | None] = {}
    for answer in answers:
        photo = sources[answer.key]
        if not lies_inside(photo, listing.root, root):
            continue
        is_accepted = folder_of(answer, settings.of_no_class).startswith("accepted/")
        labels[photo] = answer.label if is_accepted else None
    return labels


def _sources(listing: PhotoFolder) -> dict[str, Path]:
    """Present location of every photo, by its path as tables write it."""
    sources = {}
    for path, _ in listing.listing:
        name = portable_name(path)
        sources[name] = listing.moved.get(name, listing.root / path)
    return sources


def _targets(
    sorted_folder: Path, answers: Sequence[Answer], settings: TriageSettings
) -> dict[str, Path]:
    """New path of every photo below ``sorted_folder``."""
    n_photos_of = Counter(flat_name(answer.key) for answer in answers)
    targets = {}
    for answer in answers:
        name = flat_name(answer.key)
        if n_photos_of[name] > 1:
            name = hashed_name(answer.key)
        targets[answer.key] = sorted_folder / folder_of(answer, settings.of_no_class) / name
    return targets


def folder_of(answer: Answer, of_no_class: Collection[str]) -> str:
    """The folder below ``sorted`` for the photo of an answer."""
    if answer.reason == OUTSIDE_REASON or answer.label in of_no_class:
        return "outside"
    if answer.decision in {ACCEPT, LABELLED} and answer.label is not None:
        name = NOT_IN_A_NAME.sub("_", answer.label).strip(". ")
        return f"accepted/{name or '_'}"  # "_" if nothing is left of the name
    return "review"


def flat_name(path: str) -> str:
    """File name of a photo in a folder without sub-folders; "/" becomes "__"."""
    name = path.replace("/", "__")
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return hashed_name(path)


def hashed_name(path: str) -> str:
    """A hash of the path of a photo, and then its flat name; a long name loses its start.

    Without the hash, ``a/b.jpg`` and ``a__b.jpg`` would have the same name, and so would two long
    paths with the same end.
    """
    start = f"{bytes_hash(path.encode())[:HASH_DIGITS]}__"
    content = path.replace("/", "__").encode()
    n_kept = LONGEST_NAME - len(start)
    return start + content[-n_kept:].decode(errors="ignore")


def _is_behind_link(photo: Path, *folders: Path) -> bool:
    """Whether a photo is a link, or its real folder lies in none of the ``folders``."""
    return photo.is_symlink() or not lies_inside(photo, *folders)


def lies_inside(photo: Path, *folders: Path) -> bool:
    """Whether the real folder of a photo is one of the folders or below one."""
    real_folder = Path(os.path.realpath(photo.parent))
    return any(real_folder.is_relative_to(folder.resolve()) for folder in folders)


def _remove_links(sorted_folder: Path) -> None:
    """Remove all links below a folder."""
    for path in sorted_folder.rglob("*"):
        if path.is_symlink():
            path.unlink()


def _link(source: Path, target: Path) -> None:
    """Make a relative link at ``target`` that leads to the real file of ``source``."""
    make_folder(target.parent)
    # Path.resolve raises an error for a link to itself; os.path.realpath does not.
    real_file = os.path.realpath(source)
    target.symlink_to(os.path.relpath(real_file, target.parent.resolve()))


def _move(source: Path, target: Path) -> None:
    """Move a file if it exists and no file is at the target."""
    make_folder(target.parent)
    if source.exists() and not target.exists():
        shutil.move(source, target, _copy)


def _copy(source: str | Path, target: str | Path) -> None:
    """Copy a photo to another disk with its times; a killed process leaves no partial file."""
    with atomic_write(target) as copy:
        copy.write(Path(source).read_bytes())
        copy.flush()
        shutil.copystat(source, copy.name)


def _note_moves(root: Path, moves: Sequence[tuple[str, Path]]) -> None:
    """Write the table of moved photos: path and new location of each."""
    paths = []
    targets = []
    for path, target in moves:
        paths.append(path)
        targets.append(target.relative_to(root).as_posix())
    columns: Mapping[str, pa.Array] = {
        "path": pa.array(paths, pa.string()),
        "place": pa.array(targets, pa.string()),
    }
    write_table(root / MOVED, columns, {"kind": "moved"})
