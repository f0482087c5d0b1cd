"""JPEGs that are decoded at a reduced size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.builders.image_files import encode, picture
from vilu.datasets.base import ImageRecord
from vilu.datasets.images import BadImage, decode_image, read_image


def smooth(width: int, height: int) -> Image.Image:
    """Return a picture whose details are larger than a few pixels, as in a photo."""
    return picture(size=(width, height)).filter(ImageFilter.GaussianBlur(8))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((527, 512), (66, 64)),  # 1/8, rounded up
        ((511, 600), (128, 150)),  # 1/4, since 1/8 is smaller than asked
        ((128, 999), (64, 500)),  # the shorter side decides
        ((127, 127), (127, 127)),  # less than twice as large
        ((40, 40), (40, 40)),
    ],
)
def test_the_shorter_side_is_never_smaller_than_asked(size, expected):
    decoded = decode_image(encode(picture(size=size), "JPEG"), jpeg_side=64)
    assert decoded.image.size == expected
    assert (decoded.width, decoded.height) == size  # the file's size


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_every_kind_of_jpeg_is_reduced(mode):
    decoded = decode_image(encode(picture(mode, (256, 256)), "JPEG"), jpeg_side=64)
    assert (decoded.image.mode, decoded.image.size) == ("RGB", (64, 64))


def test_other_formats_and_small_jpegs_are_decoded_in_full():
    for data in (encode(picture(size=(256, 256)), "PNG"), encode(picture(size=(99, 99)), "JPEG")):
        in_full = np.asarray(decode_image(data).image)
        np.testing.assert_array_equal(np.asarray(decode_image(data, jpeg_side=64).image), in_full)


def test_what_the_model_reads_hardly_changes():
    data = encode(smooth(1024, 768), "JPEG", quality=95)
    small = [
        np.asarray(decode_image(data, jpeg_side=side).image.resize((64, 48))).astype(float)
        for side in (None, 96)
    ]
    # Each side rounds to whole grey levels twice: after decoding and after resizing.
    assert np.abs(small[0] - small[1]).mean() <= 1


def test_a_truncated_jpeg_is_still_bad():
    data = encode(picture(size=(512, 512)), "JPEG")
    record = ImageRecord("half.jpg", None, lambda: data[: len(data) // 2])
    with pytest.raises(BadImage) as caught:
        read_image(record, jpeg_side=64)
    assert caught.value.kind == "truncated"


def test_orientation_is_still_recorded(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(size=(512, 256)), "JPEG", exif=exif.tobytes())
    decoded = decode_image(data, jpeg_side=64)
    assert (decoded.exif_orientation, decoded.image.size) == (6, (128, 64))
