from __future__ import annotations

import errno
import io
import pickle
import random
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from tests.builders.image_files import (
    SIZE,
    chunk,
    encode,
    outcome,
    picture,
    pixels,
    png,
    seeds,
    with_png_size,
)
from vilu.datasets.base import ImageRecord
from vilu.datasets.images import (
    OPENERS,
    BadImage,
    ImageLimits,
    decode_image,
    detect_format,
    n_pixels_in_header,
    read_image,
)
from vilu.errors import DataError, UsageError, ViLUError

SEEDS = seeds()


# Images that cannot be used


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"\0" * 100, "unidentified"),
        (b"<!DOCTYPE html><html><body><svg></svg> not found</body></html>", "unidentified"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "unidentified"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "truncated"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "unsupported"),
        (b"8BPS\0\1", "unsupported"),
        (b"\0\0\1\0\1\0", "unsupported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported"),
        (b"%PDF-1.7", "unsupported"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><!-- x --><svg/>", "unsupported"),
    ],
)
def test_bytes_that_are_no_accepted_image(data, kind):
    assert outcome(data) == ("open", kind)


def test_formats_of_pillow_that_are_not_listed_are_unsupported():
    for name in ("ICO", "JPEG2000", "EPS"):
        assert outcome(encode(picture(), name)) == ("open", "unsupported")


@pytest.mark.parametrize("name", ["jpeg", "progressive", "cmyk", "png", "palette", "deep"])
def test_jpeg_or_png_cut_in_half_is_truncated(name):
    data = encode(picture(size=(200, 200)), "PNG") if name == "png" else SEEDS[name]
    assert outcome(data[: len(data) * 3 // 4]) == ("decode", "truncated")


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_every_prefix_is_refused_or_has_the_whole_picture(name):
    data = SEEDS[name]
    whole = pixels(data)
    refused = 0
    for length in range(len(data)):
        try:
            image = decode_image(data[:length]).image
        except BadImage:
            refused += 1
        else:
            np.testing.assert_array_equal(np.asarray(image), whole)
    assert refused >= len(data) // 3  # the second half in an animation is its second frame


def test_truncated_files_never_pass_when_another_library_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match="LOAD_TRUNCATED_IMAGES"):
        decode_image(SEEDS["jpeg"])


@pytest.mark.parametrize(
    "size", [(60_000, 60_000), (10_000, 10_000), (7_072, 7_072)]
)  # an error, a warning, no message
def test_bomb_is_told_by_its_header(size, monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert outcome(with_png_size(SEEDS["png"], *size)) == ("geometry", "bomb")
    bmp = bytearray(SEEDS["bmp"])
    bmp[18:26] = struct.pack("<ii", *size)
    assert outcome(bytes(bmp)) == ("geometry", "bomb")
    assert outcome(b"P6 %d %d 255\n" % size) == ("geometry", "bomb")


@pytest.mark.parametrize("size", [(65_535, 65_535), (10_000, 10_000), (7_072, 7_072)])
def test_bomb_by_the_size_of_a_gif_frame(size):
    data = bytearray(SEEDS["gif"])
    frame = data.index(b"\x2c", 13 + 768)
    data[frame + 5 : frame + 9] = struct.pack("<HH", *size)
    assert outcome(bytes(data))[1] == "bomb"


def test_bomb_by_the_canvas_of_a_webp():
    data = bytearray(SEEDS["webp"])
    assert data[12:16] == b"VP8X"
    data[24:30] = (16_382).to_bytes(3, "little") * 2
    # Before Pillow 13, the decoder compares the canvas with the frame when it opens a file.
    assert outcome(bytes(data))[1] == (
        "bomb" if int(PIL.__version__.split(".")[0]) >= 13 else "decode_error"
    )


def test_limits_count_pixels_and_bytes_exactly():
    data = SEEDS["png"]
    n_pixels = SIZE[0] * SIZE[1]
    assert (
        decode_image(data, ImageLimits(max_pixels=n_pixels, max_bytes=len(data))).width == SIZE[0]
    )
    assert outcome(data, ImageLimits(max_pixels=n_pixels - 1)) == ("geometry", "bomb")
    assert outcome(data, ImageLimits(max_bytes=len(data) - 1)) == ("open", "too_large")


@pytest.mark.parametrize(
    "limits",
    [
        {"max_pixels": 0},
        {"max_pixels": 100_000_000},
        {"max_bytes": 2**40},
        {"min_side": 0},
        {"max_aspect": 0.5},
    ],
)
def test_limits_that_protect_from_nothing_are_refused(limits):
    with pytest.raises(UsageError):
        ImageLimits(**limits)


def test_thin_pictures_are_bad_geometry():
    thin = png(1, 5000, 8, 0, b"\0\x80" * 5000)
    assert len(thin) < 120
    assert outcome(thin) == ("geometry", "bad_geometry")
    for size, good in [
        ((8, 8), True),
        ((32, 32), True),
        ((7, 8), False),
        ((8, 160), True),
        ((161, 8), False),
    ]:
        data = encode(picture(size=size), "PNG")
        if good:
            assert decode_image(data).image.size == size
        else:
            assert outcome(data) == ("geometry", "bad_geometry")


# Reading, threads, errors


def test_read_image_tells_unreadable_from_too_large():
    def read_error(code: int) -> bytes:
        raise OSError(code, "no")

    for code, kind in (
        (errno.ENOENT, "read_error"),
        (errno.EACCES, "read_error"),
        (errno.EFBIG, "too_large"),
    ):
        with pytest.raises(BadImage) as caught:
            read_image(ImageRecord("a", None, lambda code=code: read_error(code)))
        assert (caught.value.stage, caught.value.kind) == ("open", kind)
    assert read_image(ImageRecord("a", None, lambda: SEEDS["png"])).width == SIZE[0]


def test_bad_image_is_a_data_error_and_crosses_processes():
    error = pickle.loads(pickle.dumps(BadImage("half of it", stage="decode", kind="truncated")))
    assert isinstance(error, DataError)
    assert isinstance(error, ViLUError)
    assert (error.stage, error.kind, str(error)) == ("decode", "truncated", "half of it")


def test_threads_share_nothing():
    bomb = with_png_size(SEEDS["png"], 10_000, 10_000)
    jobs = [*SEEDS.values(), bomb, SEEDS["jpeg"][:300]] * 20

    def job(data: bytes) -> object:
        try:
            return decode_image(data).image.tobytes()
        except BadImage as error:
            return error.stage, error.kind

    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(job, jobs)) == [job(data) for data in jobs]
    assert (
        list(warnings.filters),
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
    ) == before


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return the data with a few bytes changed, cut or inserted, most often in the header."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        position = draw.randrange(min(len(out), 200) if draw.random() < 0.7 else len(out))
        match draw.choice("bbbbbbcdi"):
            case "b":
                out[position] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
            case "c":
                del out[position + 1 :]
            case "d":
                del out[position : position + draw.randint(1, 8) : 1]
            case "i":
                out[position:position] = draw.randbytes(draw.randint(1, 8))
        out = out or bytearray(1)
    return bytes(out)


def mended(data: bytes) -> bytes:
    position, out = 8, data[:8]
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        out += chunk(data[position + 4 : position + 8], data[position + 8 : end - 4])
        position = end
    return out + data[position:]


@pytest.mark.parametrize("filters", ["error", "ignore"])
@pytest.mark.parametrize("name", sorted(SEEDS))
def test_only_bad_image_comes_out_of_damaged_files(name, filters):
    draw = random.Random(name)
    outcomes = {"good": 0, "bad": 0}
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        for _ in range(400):
            data = damaged(SEEDS[name], draw)
            try:
                decoded = decode_image(
                    mended(data) if name in {"png", "apng", "palette", "deep"} else data
                )
            except BadImage:
                outcomes["bad"] += 1
            else:
                outcomes["good"] += 1
                assert decoded.image.mode == "RGB"
                assert decoded.image.size == (decoded.width, decoded.height)
    assert min(outcomes.values()) > 0, outcomes


@given(st.sampled_from(sorted(OPENERS.keys() - {"HEIC"})), st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_signature_followed_by_noise_is_never_an_image(name, noise):
    data = SEEDS[name.lower()][:16] + noise
    assert detect_format(data) == name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert outcome(data)[1] in {"decode_error", "truncated", "bomb", "bad_geometry"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_stated_pixels_are_read_from_the_header_alone(kind):
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, kind)
    assert n_pixels_in_header(file.getvalue()) == 2_400


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"II*\0\xff\xff\xff\xff"])
def test_damaged_headers_and_other_data_state_no_pixels(data):
    assert n_pixels_in_header(data) == 0
