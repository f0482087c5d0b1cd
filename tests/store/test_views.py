"""Augmented views: their content, and that only the key, the number and the seed decide it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from scipy import stats

from vilu.store.manifest import Views, _uniform_numbers, make_view

UNIT = st.floats(0, 1, exclude_max=True)
SIDE = st.integers(1, 60)


def coordinates(width: int, height: int) -> Image.Image:
    """Return a picture whose colours are coordinates: red is x, green is y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8))


@given(SIDE, SIDE, UNIT, UNIT, UNIT, UNIT)
def test_a_view_is_a_crop_of_the_pictures_shape(width, height, area, left, top, mirror) -> None:
    shown = np.asarray(make_view(coordinates(width, height), area, left, top, mirror)).astype(int)
    x, y = shown[0, :, 0], shown[:, 0, 1]
    assert (shown[:, :, 0] == x).all()
    assert (shown[:, :, 1] == y[:, None]).all()
    assert (np.diff(x) == (-1 if mirror < 0.5 else 1)).all()
    assert (np.diff(y) == 1).all()
    side = np.sqrt(0.5 + 0.5 * area)
    assert len(x) == max(round(side * width), 1)  # only rounding to whole pixels changes the shape
    assert len(y) == max(round(side * height), 1)
    assert (len(x) + 0.5) * (len(y) + 0.5) >= 0.5 * width * height


def test_every_place_and_every_size_is_drawn() -> None:
    draws = np.array([_uniform_numbers(0, 1, f"img/{i:05d}.png") for i in range(4000)])
    for column in draws.T:
        # One test in a thousand fails by chance. The draws are fixed, so this test does not.
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    off = np.corrcoef(draws.T) - np.eye(4)
    assert np.abs(off).max() < 4 / np.sqrt(
        len(draws)
    )  # four standard errors for a correlation that is zero
    corners = {
        make_view(coordinates(10, 10), 0, left, top, 0.9).getpixel((0, 0))[:2]
        for _, left, top, _ in draws
    }
    assert corners == {(x, y) for x in range(4) for y in range(4)}  # crops with 7 x 7 pixels


def test_views_depend_on_key_number_and_seed_alone() -> None:
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    )
    views = Views(n=3, seed=5)
    first = [view.tobytes() for view in views.make_views(picture, "a.png")]
    views.make_views(picture, "b.png")
    assert [view.tobytes() for view in views.make_views(picture, "a.png")] == first
    assert [view.tobytes() for view in Views(n=2, seed=5).make_views(picture, "a.png")] == first[:2]
    others = [*views.make_views(picture, "b.png"), *Views(n=3, seed=6).make_views(picture, "a.png")]
    assert len({*first, *(view.tobytes() for view in others)}) == 9
    assert views.make_views(picture, "caf\udce9.png")  # a file name that is no text


def test_numbers_do_not_change_from_version_to_version() -> None:
    """The random numbers must stay the same from version to version.

    The expected value is SHA-256 for "0 0 a", read by hand: a number is eight little-endian bytes,
    and 53 bits are used.
    """
    digest = bytes.fromhex("8679922b67376e1d")
    assert _uniform_numbers(0, 0, "a")[0] == int.from_bytes(digest, "little") // 2**11 / 2**53


@pytest.mark.parametrize("n", [0, -1])
def test_there_is_at_least_one(n: int) -> None:
    with pytest.raises(ValidationError):
        Views(n=n)
