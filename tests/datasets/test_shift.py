"""A damage must keep the picture's content, be the same every time, and grow with its severity."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.builders.store_fakes import FakeDataset
from vilu.datasets.images import decode_image
from vilu.errors import UsageError
from vilu_bench.known_datasets.shift import DAMAGE_KINDS, ShiftedImages


def smooth(seed: int, side: int = 32) -> Image.Image:
    """Return a smooth picture without black or white."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 150, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def detailed(seed: int) -> Image.Image:
    """Return the same picture with details the size of a pixel."""
    grain = np.random.default_rng(seed).integers(-20, 21, (32, 32, 3))
    return Image.fromarray(
        (np.asarray(smooth(seed), dtype=int) + grain).clip(0, 255).astype(np.uint8)
    )


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def images(n: int = 6, side: int = 32) -> FakeDataset:
    return FakeDataset([encoded(smooth(i, side)) for i in range(n)], [i % 3 for i in range(n)])


def pixels(data) -> np.ndarray:
    return np.stack(
        [
            np.asarray(decode_image(r.read()).image, dtype=np.float64)
            for r in data.records(0, len(data))
        ]
    )


def distance(kind: str, severity: int) -> float:
    whole = FakeDataset([encoded(detailed(i)) for i in range(6)], [0] * 6)
    return float(np.abs(pixels(ShiftedImages(whole, [kind], severity)) - pixels(whole)).mean())


@pytest.mark.parametrize("kind", DAMAGE_KINDS)
def test_damage_grows_with_severity(kind: str) -> None:
    found = [distance(kind, severity) for severity in (1, 2, 3, 4, 5)]
    assert found == sorted(found)
    assert found[0] > 0.05


def test_labels_keys_and_bytes_stay() -> None:
    whole = images()
    shifted = ShiftedImages(whole, list(DAMAGE_KINDS), 3)
    again = ShiftedImages(whole, list(DAMAGE_KINDS), 3)
    for mine, same, theirs in zip(
        *(data.records(0, 6) for data in (shifted, again, whole)), strict=True
    ):
        assert (mine.key, mine.label) == (theirs.key, theirs.label)
        assert mine.read() == same.read() != theirs.read()
    assert (len(shifted), shifted.class_names, shifted.captioned) == (6, whole.class_names, False)
    assert [r.read() for r in shifted.records(2, 4)] == [r.read() for r in shifted.records(0, 6)][
        2:4
    ]


def test_every_recipe_has_its_fingerprint() -> None:
    whole = images()
    recipes = [(["blur"], 1), (["blur"], 2), (["jpeg"], 1), (["blur", "jpeg"], 1)]
    found = {ShiftedImages(whole, *recipe).fingerprint for recipe in recipes}
    assert len({*found, whole.fingerprint}) == 5


def test_low_resolution_is_32_to_16_to_32() -> None:
    whole = images(1)
    expected = (
        smooth(0)
        .resize((16, 16), Image.Resampling.BICUBIC)
        .resize((32, 32), Image.Resampling.BICUBIC)
    )
    assert np.array_equal(
        pixels(ShiftedImages(whole, ["low_resolution"], 3))[0], np.asarray(expected)
    )


def test_noise_has_its_strength() -> None:
    """The noise must have its stated strength.

    Over 40 pictures with 3,072 values each, the deviation must be within five standard errors of
    0.07 (severity 3).
    """
    whole = images(40)
    noise = (pixels(ShiftedImages(whole, ["gaussian_noise"], 3)) - pixels(whole)) / 255
    n = noise.size
    rounding = 1 / 255 / np.sqrt(12)
    assert noise.std() == pytest.approx(np.hypot(0.07, rounding), rel=5 / np.sqrt(2 * n))


def test_blur_goes_with_the_size() -> None:
    """A picture with twice the side must be blurred twice as far.

    If the large picture is halved after the blur, it must equal the small picture after its blur.
    """
    small, large = images(1), images(1, side=64)
    halved = Image.fromarray(pixels(ShiftedImages(large, ["blur"], 5))[0].astype(np.uint8)).reduce(
        2
    )
    assert (
        np.abs(
            np.asarray(halved, dtype=float) - pixels(ShiftedImages(small, ["blur"], 5))[0]
        ).mean()
        < 2
    )


def test_all_kinds_are_used() -> None:
    """Every kind must be drawn from 200 pictures and eight kinds.

    Each kind is drawn 25 times on average. Fewer than 5 draws have p < 1e-5.
    """
    whole = FakeDataset([encoded(smooth(0))] * 200, [0] * 200)
    alone = {
        kind: {r.read() for r in ShiftedImages(whole, [kind], 5).records(0, 200)}
        for kind in DAMAGE_KINDS
    }
    mixed = [r.read() for r in ShiftedImages(whole, list(DAMAGE_KINDS), 5).records(0, 200)]
    for kind in (
        "blur",
        "low_contrast",
        "brightness",
        "jpeg",
        "pixelate",
        "low_resolution",
    ):  # the same for all keys
        (only,) = alone[kind]
        assert mixed.count(only) >= 5, kind


@pytest.mark.parametrize(
    ("kinds", "severity"), [(["smoke"], 1), ([], 1), (["blur"], 0), (["blur"], 6)]
)
def test_what_cannot_be(kinds: list[str], severity: int) -> None:
    with pytest.raises(UsageError, match="instead"):
        ShiftedImages(images(1), kinds, severity)
