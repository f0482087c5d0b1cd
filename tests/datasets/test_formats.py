"""Every format that Pillow opens must be decoded, or be refused with a reason, as the
documentation says.
"""

from __future__ import annotations

import re
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders.image_files import encode, picture
from vilu.datasets.base import ImageRecord
from vilu.datasets.folder import list_photos
from vilu.datasets.images import OPENERS, BadImage, ImageFlag, decode_image, read_image

DOCUMENT = Path(__file__).parents[2] / "docs" / "datasets.md"
SAVED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that vilu decodes and Pillow can write."""


def rows() -> dict[str, str]:
    """Return the documentation's text for each format."""
    _, table = DOCUMENT.read_text(encoding="utf-8").split("## Formats\n")
    found = re.findall(r"^\| ([\w ,]+) \| [^|]*\| (.*) \|$", table.split("\n## ")[0], re.MULTILINE)
    return {name: text for names, text in found for name in names.split(", ")}


def refusal(data: bytes, key: str = "photo") -> BadImage:
    with pytest.raises(BadImage) as caught:
        read_image(ImageRecord(key, None, lambda: data))
    return caught.value


def heic(image: Image.Image, **options: object) -> bytes:
    plugin = pytest.importorskip("pillow_heif")
    buffer = BytesIO()
    plugin.from_pillow(image).save(buffer, quality=-1, chroma=444, **options)
    return buffer.getvalue()


def test_the_table_has_every_format_of_pillow() -> None:
    Image.init()
    assert not set(Image.OPEN) - rows().keys()
    decoded = {name.upper() for name in OPENERS}
    assert decoded == {name for name, text in rows().items() if text.startswith("decoded")} - {
        "DIB"
    }


@pytest.mark.parametrize("name", SAVED)
def test_decoded_formats(name: str) -> None:
    assert decode_image(encode(picture(), name)).image.size == picture().size


@pytest.mark.parametrize("name", ["JPEG2000", "ICO", "QOI", "DDS", "EPS", "TGA", "SGI", "PCX"])
def test_refused_formats(name: str) -> None:
    kind = "unsupported" if "`unsupported`" in rows()[name] else "unidentified"
    assert refusal(encode(picture(), name)).kind == kind


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(name: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    decoded = decode_image(encode(frames[0], name, save_all=True, append_images=frames[1:]))
    assert (decoded.n_frames, decoded.flags) == (2, ImageFlag.ANIMATED)
    red = np.asarray(decoded.image).mean(axis=(0, 1))
    np.testing.assert_allclose(red, (255, 0, 0), atol=4)  # the codecs are lossy


def test_heic_photos_are_upright() -> None:
    """A HEIC photo must be upright.

    Its decoder applies the file's rotation, so the tag must not rotate the photo again.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 32), "red")
    decoded = decode_image(heic(image, exif=exif.tobytes()))
    assert (decoded.image.size, decoded.exif_orientation) == ((32, 64), 1)


def test_a_damaged_heic_photo_is_a_bad_image() -> None:
    data = heic(picture())
    for length in range(8, len(data), 97):
        assert refusal(data[:length]).kind in {"decode_error", "truncated", "unidentified"}


def test_without_its_extra_the_reason_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(picture())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    error = refusal(data)
    assert error.kind == "needs_pillow_heif"
    assert "pip install 'vilu[heic]'" in str(error)


@pytest.mark.parametrize(
    ("key", "start"),
    [
        ("a.NEF", b"MM\0*\0\0\0\x08"),  # a TIFF, as most raw files are
        ("a.dng", b"II*\0\x08\0\0\0"),
        ("a", b"II*\0\x10\0\0\0CR\x02\0"),
        ("a", b"\0\0\0\x18ftypcrx "),
        ("a", b"FUJIFILMCCD-RAW "),
    ],
)
def test_raw_photos_are_refused_with_what_to_do(key: str, start: bytes) -> None:
    error = refusal(start + bytes(64), key)
    assert error.kind == "raw_photo"
    assert "export it as JPEG" in str(error)


def test_raw_photos_of_a_folder_are_listed(tmp_path: Path) -> None:
    for name in ("a.nef", "b.CR3", "c.txt"):
        (tmp_path / name).write_bytes(b"II*\0")
    assert [path for path, _ in list_photos(tmp_path)] == ["a.nef", "b.CR3"]
