from __future__ import annotations

import io
import struct
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.builders.image_files import (
    LOSSLESS,
    SIZE,
    chunk,
    deep_png,
    encode,
    gif_frames,
    orientation_block,
    outcome,
    picture,
    pixels,
    png,
)
from vilu.datasets.images import (
    MAX_FRAMES,
    ImageFlag,
    count_directories,
    decode_image,
    read_orientation,
)


@pytest.mark.parametrize("name", sorted(LOSSLESS))
def test_lossless_formats_give_the_pixels_back(name):
    original = picture()
    decoded = decode_image(encode(original, name, **LOSSLESS[name]))
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(original))
    assert (decoded.image.mode, decoded.width, decoded.height, decoded.n_frames) == (
        "RGB",
        *SIZE,
        1,
    )
    assert (decoded.exif_orientation, decoded.flags) == (None, 0)


def test_jpeg_is_pillows_own_decoding():
    data = encode(picture(), "JPEG")
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def test_grey_one_bit_palette_and_cmyk_become_rgb():
    grey = picture("L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels(encode(grey, "PNG")), expected)
    bits = picture("1")
    np.testing.assert_array_equal(pixels(encode(bits, "PNG"))[..., 0], np.asarray(bits) * 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert (pixels(encode(palette, "PNG")) == [40, 50, 60]).all()
    ink = Image.new("CMYK", (8, 8), (0, 255, 0, 0))  # magenta on white paper
    assert (pixels(encode(ink, "TIFF")) == [255, 0, 255]).all()
    assert np.abs(pixels(encode(ink, "JPEG")).astype(int) - [255, 0, 255]).max() <= 2  # JPEG rounds


def over_white(value: int, alpha: int) -> float:
    return value * alpha / 255 + 255 * (1 - alpha / 255)


@pytest.mark.parametrize(("value", "alpha"), [(0, 0), (200, 0), (200, 128), (17, 254), (0, 255)])
def test_alpha_is_composited_on_white(value, alpha):
    for image in (
        Image.new("RGBA", (8, 8), (value,) * 3 + (alpha,)),
        Image.new("LA", (8, 8), (value, alpha)),
    ):
        decoded = decode_image(encode(image, "PNG"))
        assert decoded.flags == ImageFlag.ALPHA
        found = np.asarray(decoded.image).astype(float)
        assert np.abs(found - over_white(value, alpha)).max() <= 1  # one rounding to a byte


def test_transparency_without_an_alpha_channel():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert (pixels(encode(palette, "PNG", transparency=1)) == 255).all()
    assert (pixels(encode(palette, "GIF", transparency=1)) == 255).all()
    half = pixels(encode(palette, "PNG", transparency=bytes([255, 51])))
    assert np.abs(half - [over_white(c, 51) for c in (40, 50, 60)]).max() <= 1
    key = Image.new("RGB", (8, 8), (1, 2, 3))
    assert (pixels(encode(key, "PNG", transparency=(1, 2, 3))) == 255).all()
    assert (pixels(encode(key, "PNG", transparency=(9, 2, 3))) == [1, 2, 3]).all()


@given(st.lists(st.integers(0, 65535), min_size=64, max_size=64))
@settings(max_examples=30, deadline=None)
def test_16_bit_grey_is_divided_by_257(values):
    grid = np.array(values).reshape(8, 8)
    expected = (grid + 128) // 257  # nearest: 257 is odd, so there are no ties
    for data in (deep_png(grid), encode(Image.fromarray(grid.astype(np.uint16)), "TIFF")):
        decoded = decode_image(data)
        np.testing.assert_array_equal(np.asarray(decoded.image)[..., 2], expected)
        assert decoded.flags == ImageFlag.DEEP


def test_16_bit_photo_is_not_saturated():
    grid = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = decode_image(deep_png(grid)).image
    assert np.asarray(image).mean() == pytest.approx(127.5, abs=0.5)
    assert (
        np.asarray(Image.open(io.BytesIO(deep_png(grid))).convert("RGB")).mean() > 250
    )  # Pillow alone gets this wrong


def test_16_bit_colour_keeps_its_high_bytes():
    row = b"\0" + struct.pack(">3H", 0x1234, 0xABCD, 0xFFFF) * 8
    assert (pixels(png(8, 8, 16, 2, row * 8)) == [0x12, 0xAB, 0xFF]).all()


@pytest.mark.parametrize(
    ("values", "expected", "flags"),
    [
        (np.array([0, 257, 65535], np.int32), [0, 1, 255], ImageFlag.DEEP),
        (np.array([-100, 20, 100], np.int32), [0, 153, 255], ImageFlag.DEEP | ImageFlag.STRETCHED),
        (
            np.array([2**31 - 256, 2**31 - 129, 2**31 - 1], np.int32),
            [0, 127, 255],
            ImageFlag.DEEP | ImageFlag.STRETCHED,
        ),
        (np.array([0.0, 0.2, 1.0], np.float32), [0, 51, 255], ImageFlag.DEEP),
        (np.array([0.25, 0.25, 0.25], np.float32), [64, 64, 64], ImageFlag.DEEP),
        (
            np.array([-1.0, 1.0, 1.55], np.float32),
            [0, 200, 255],
            ImageFlag.DEEP | ImageFlag.STRETCHED,
        ),
        (np.array([3.0, 3.0, 3.0], np.float32), [0, 0, 0], ImageFlag.DEEP | ImageFlag.STRETCHED),
    ],
)
def test_32_bit_values_are_scaled_or_stretched(values, expected, flags):
    grid = np.tile(np.repeat(values, 4), (12, 1))
    decoded = decode_image(encode(Image.fromarray(grid), "TIFF"))
    np.testing.assert_array_equal(np.asarray(decoded.image)[0, ::4, 0], expected)
    assert decoded.flags == flags


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_refused(value):
    grid = np.zeros((8, 8), np.float32)
    grid[3, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in use, numpy's warning stops nothing
        assert outcome(encode(Image.fromarray(grid), "TIFF")) == ("decode", "decode_error")


def test_modes_without_a_conversion_are_unsupported():
    assert outcome(encode(Image.new("LAB", (8, 8)), "TIFF")) == ("decode", "unsupported")


# Animations


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_is_taken_and_frames_are_counted(name):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if name == "WEBP" else {}
    decoded = decode_image(
        encode(frames[0], name, save_all=True, append_images=frames[1:], **options)
    )
    assert (np.asarray(decoded.image) == [255, 0, 0]).all()
    assert (decoded.n_frames, decoded.flags) == (3, ImageFlag.ANIMATED)


def test_counting_frames_has_an_end():
    start = time.perf_counter()
    assert decode_image(gif_frames(1_000_000)).n_frames == MAX_FRAMES
    directories = b"".join(struct.pack("<HI", 0, 8 + 6 * (i + 1)) for i in range(200_000))
    assert (
        count_directories(b"II*\0" + struct.pack("<I", 8) + directories, MAX_FRAMES) == MAX_FRAMES
    )
    assert time.perf_counter() - start < 2  # Pillow's own count would take minutes


def test_directories_that_loop_or_leave_the_file_are_counted_once():
    loop = b"II*\0" + struct.pack("<I", 8) + struct.pack("<HI", 0, 14) + struct.pack("<HI", 0, 8)
    assert count_directories(loop, 100) == 2
    assert (
        count_directories(b"II*\0" + struct.pack("<I", 8) + struct.pack("<HI", 0, 10**9), 100) == 1
    )
    assert count_directories(b"MM\0*" + struct.pack(">I", 10**9), 100) == 0


# EXIF


def with_exif(name: str, block: bytes) -> bytes:
    return encode(picture(), name, **LOSSLESS.get(name, {}), exif=b"Exif\0\0" + block)


def with_orientation(name: str, value: int) -> bytes:
    if name == "TIFF":
        return encode(picture(), name, **LOSSLESS[name], tiffinfo={0x0112: value})
    return with_exif(name, orientation_block(value))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_recorded_and_not_applied(name, value):
    decoded = decode_image(with_orientation(name, value))
    assert (decoded.exif_orientation, decoded.flags) == (value, 0)
    plain = decode_image(encode(picture(), name, **LOSSLESS.get(name, {})))
    assert decoded.image.size == (decoded.width, decoded.height) == SIZE
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(plain.image))


@pytest.mark.parametrize("value", [3, 6])
def test_deep_tiff_is_not_turned_either(value):
    grid = np.arange(8 * 12, dtype=np.uint16).reshape(8, 12) * 257
    decoded = decode_image(encode(Image.fromarray(grid), "TIFF", tiffinfo={0x0112: value}))
    assert (decoded.width, decoded.height, decoded.exif_orientation) == (12, 8, value)
    np.testing.assert_array_equal(np.asarray(decoded.image)[..., 0], grid // 257)


def test_orientation_in_the_xmp_of_a_tiff_is_not_applied():
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    decoded = decode_image(encode(picture(), "TIFF", tiffinfo={700: xmp}))
    assert decoded.image.size == SIZE
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(picture()))


def test_orientation_in_a_png_behind_its_pixels():
    data = encode(picture(), "PNG")
    assert (
        decode_image(
            data[:-12] + chunk(b"eXIf", orientation_block(6)) + data[-12:]
        ).exif_orientation
        == 6
    )


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"nonsense",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3",
        orientation_block(9),
        orientation_block(6)[:19],
        orientation_block(6).replace(b"\x12\1\3\0", b"\x12\1\2\0"),
    ],
)
def test_bad_exif_never_fails_a_picture(name, exif):
    decoded = decode_image(with_exif(name, exif))
    assert (decoded.exif_orientation, decoded.flags) == (None, ImageFlag.BAD_EXIF)
    assert decoded.image.size == SIZE


@given(
    value=st.integers(0, 8),
    order=st.sampled_from("<>"),
    kind=st.sampled_from([1, 3, 4]),
    big=st.booleans(),
    prefix=st.sampled_from([b"", b"Exif\0\0"]),
)
def test_orientation_in_every_byte_order_and_type(value, order, kind, big, prefix):
    assert read_orientation(prefix + orientation_block(value, order=order, kind=kind, big=big)) == (
        value or None
    )


@given(st.binary(max_size=60).map(lambda tail: b"II*\0" + tail) | st.binary(max_size=60))
def test_orientation_of_any_bytes_is_a_value_or_a_value_error(block):
    try:
        assert read_orientation(block) in {None, *range(1, 9)}
    except ValueError:
        return
