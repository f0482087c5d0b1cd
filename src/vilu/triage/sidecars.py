"""XMP sidecars: accepted labels in files beside the photos, for photo libraries to read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE
from typing import Final

from vilu.artifacts.disk import atomic_write, convert_os_errors, write_bytes
from vilu.errors import DataError
from vilu.text import plural
from vilu.triage.xmp import ADDITION_BEGIN, add_subject, new_xmp, read_xmp, remove_added_subject

SIDECAR_SUFFIX: Final = ".xmp"
"""End of a sidecar's name, after the photo's whole name."""

MAX_SIDECAR_BYTES: Final = 2**24
"""Maximum sidecar size in bytes (16 MiB). Larger sidecars are not read."""

logger = logging.getLogger(__name__)


def sidecar_of(photo: Path) -> Path:
    """Return the sidecar path of a photo."""
    return photo.with_name(f"{photo.name}{SIDECAR_SUFFIX}")


def write_sidecars(labels: Mapping[Path, str | None]) -> int:
    """Write labels as ``dc:subject`` to PHOTO.xmp in the folder of each photo.

    - Photos are never changed.
    - A sidecar by another program keeps all its bytes. The label is added to the subjects in the
      sidecar. If the place for the label is not clear, the sidecar is not changed, and a warning
      gives the reason.
    - If a photo's label is None, a label from an earlier run is removed.

    Args:
        labels: Maps photos to labels.

    Returns:
        The number of written labels.
    """
    refusals: dict[Path, str] = {}  # maps an unchanged sidecar to the reason
    n_written = 0
    for photo, label in labels.items():
        sidecar = sidecar_of(photo)
        try:
            with convert_os_errors(f"cannot write {sidecar}"):
                _update_sidecar(sidecar, label)
        except DataError as error:
            refusals[sidecar] = str(error)
            continue
        if label is not None:
            n_written += 1
    _warn_of_refusals(refusals)
    return n_written


def _update_sidecar(sidecar: Path, label: str | None) -> None:
    """Write a label into a sidecar. If the label is None, remove an earlier run's label.

    Raises:
        DataError: If the label cannot be written safely. The message is the reason.
    """
    # A link is found first, because the file that it leads to may be unreadable.
    is_link_or_no_file = sidecar.is_symlink() or (sidecar.exists() and not sidecar.is_file())
    if is_link_or_no_file:
        if label is not None:
            raise DataError("it is a link or no file")
        return
    if not sidecar.exists():
        if label is not None:
            write_bytes(sidecar, new_xmp(label))
        return
    status = sidecar.stat()
    if status.st_size > MAX_SIDECAR_BYTES:
        if label is not None:
            raise DataError(f"it has {status.st_size} bytes; at most {MAX_SIDECAR_BYTES} are read")
        return
    old_content = sidecar.read_bytes()
    new_content = _new_content(old_content, label)
    if new_content is None:
        sidecar.unlink()
    elif new_content != old_content:
        with atomic_write(sidecar) as handle:
            handle.write(new_content)
            Path(handle.name).chmod(S_IMODE(status.st_mode))  # the permissions stay the same


def _new_content(old_content: bytes, label: str | None) -> bytes | None:
    """Return a sidecar's content with the new label, or None if the sidecar is to be removed."""
    if _is_written_by_vilu(old_content):
        return None if label is None else new_xmp(label)
    if label is None and ADDITION_BEGIN.encode() not in old_content:
        return old_content  # vilu has added nothing
    original = remove_added_subject(old_content)
    return original if label is None else add_subject(original, label)


def _is_written_by_vilu(content: bytes) -> bool:
    """Return whether ``new_xmp`` wrote a sidecar, and no other program has changed the sidecar."""
    try:
        subjects = read_xmp(content).subjects
        return len(subjects) == 1 and content == new_xmp(subjects[0])
    except DataError:
        return False


def _warn_of_refusals(refusals: Mapping[Path, str]) -> None:
    """Warn about unchanged sidecars: name the first unchanged sidecar, and the reason."""
    if refusals:
        first, reason = next(iter(refusals.items()))
        logger.warning(
            "%s of another program not changed, the first %s: %s. Mend it or move it away to get "
            "the label of vilu.",
            plural(len(refusals), "sidecar"),
            first,
            reason,
        )
