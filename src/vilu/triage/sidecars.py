"""XMP sidecars: accepted labels beside the photos, where photo libraries read them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE
from typing import Final

from vilu.artifacts.disk import atomic_write, convert_os_errors, write_bytes
from vilu.errors import DataError
from vilu.text import plural
from vilu.triage.xmp import BEGIN, read_xmp, with_subject, without_added_subject, xmp_with

SUFFIX: Final = ".xmp"
"""End of the name of a sidecar, after the whole name of the photo."""

MAX_BYTES: Final = 2**24
"""Larger sidecars are not read."""

logger = logging.getLogger(__name__)


def sidecar_of(photo: Path) -> Path:
    """Path of the sidecar of a photo."""
    return photo.with_name(f"{photo.name}{SUFFIX}")


def write_sidecars(labels: Mapping[Path, str | None]) -> int:
    """Write labels as ``dc:subject`` to PHOTO.xmp beside each photo; return the number of labels.

    - Photos are never changed.
    - A sidecar of another program keeps all its bytes; the label is added to its subjects. If it is
      not clear where the label belongs, the sidecar is not changed, and a warning says why.
    - Where the label is None, a label of an earlier run is taken back.
    """
    refused: dict[Path, str] = {}
    n_written = 0
    for photo, label in labels.items():
        sidecar = sidecar_of(photo)
        try:
            with convert_os_errors(f"cannot write {sidecar}"):
                _update_sidecar(sidecar, label)
        except DataError as error:
            refused[sidecar] = str(error)
            continue
        if label is not None:
            n_written += 1
    _warn_of(refused)
    return n_written


def _update_sidecar(sidecar: Path, label: str | None) -> None:
    """Write a label into a sidecar, or remove it (None); DataError with the reason if unsafe."""
    if sidecar.is_symlink() or (sidecar.exists() and not sidecar.is_file()):
        if label is not None:
            raise DataError("it is a link or no file")
        return
    if not sidecar.exists():
        if label is not None:
            write_bytes(sidecar, xmp_with(label))
        return
    status = sidecar.stat()
    if status.st_size > MAX_BYTES:
        if label is not None:
            raise DataError(f"it has {status.st_size} bytes; at most {MAX_BYTES} are read")
        return
    old_content = sidecar.read_bytes()
    new_content = _new_content(old_content, label)
    if new_content is None:
        sidecar.unlink()
    elif new_content != old_content:
        with atomic_write(sidecar) as handle:
            handle.write(new_content)
            Path(handle.name).chmod(S_IMODE(status.st_mode))


def _new_content(data: bytes, label: str | None) -> bytes | None:
    """The content of a sidecar with another label; None if the sidecar is to be removed."""
    if _is_ours(data):
        return None if label is None else xmp_with(label)
    if label is None and BEGIN.encode() not in data:
        return data  # vilu has added nothing to it
    original = without_added_subject(data)
    return original if label is None else with_subject(original, label)


def _is_ours(data: bytes) -> bool:
    """Whether a sidecar is as ``xmp_with`` writes it, without anything of other programs."""
    try:
        subjects = read_xmp(data).subjects
        return len(subjects) == 1 and data == xmp_with(subjects[0])
    except DataError:
        return False


def _warn_of(refused: Mapping[Path, str]) -> None:
    """Warn of sidecars that could not get their label."""
    if refused:
        first, reason = next(iter(refused.items()))
        logger.warning(
            "%s of another program not changed, the first %s: %s. Mend it or move it away to get "
            "the label of vilu.",
            plural(len(refused), "sidecar"),
            first,
            reason,
        )
