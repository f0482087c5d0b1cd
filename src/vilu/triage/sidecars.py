"""XMP sidecars: accepted labels beside the photos, where photo libraries read them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from vilu.artifacts.disk import or_refuse, write_text
from vilu.text import plural

TOOLKIT: Final = 'x:xmptk="vilu"'
"""Attribute by which a sidecar of vilu is recognised."""

SIDECAR: Final = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" {toolkit}>
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
   <dc:subject><rdf:Bag><rdf:li>{label}</rdf:li></rdf:Bag></dc:subject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""
"""A sidecar with one subject (XMP specification, part 1)."""

logger = logging.getLogger(__name__)


def write_sidecars(labels: Mapping[Path, str | None]) -> int:
    """Write labels as ``dc:subject`` to PHOTO.xmp beside each photo; return how many were written.

    - Photos are never changed.
    - A sidecar that vilu did not write is never changed; a warning counts these photos.
    - Where the label is None, the sidecar is removed if vilu wrote it.
    """
    refused: list[Path] = []
    n_written = 0
    for photo, label in labels.items():
        sidecar = photo.with_name(f"{photo.name}.xmp")
        with or_refuse(f"write {sidecar}"):
            is_ours = sidecar.is_file() and TOOLKIT in sidecar.read_text("utf-8", "replace")
            if label is None:
                if is_ours:
                    sidecar.unlink()
            elif sidecar.exists() and not is_ours:
                refused.append(sidecar)
            else:
                write_text(sidecar, SIDECAR.format(toolkit=TOOLKIT, label=escape(label)))
                n_written += 1
    _warn_of(refused)
    return n_written


def _warn_of(refused: Sequence[Path]) -> None:
    """Warn of sidecars that were not written."""
    if refused:
        logger.warning(
            "%s not written, because another program wrote such a file, the first %s. Move it "
            "away to get the label of vilu.",
            plural(len(refused), "sidecar"),
            refused[0],
        )
