"""Test that a guard in a low precision compares the first photos that it sees with float32."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

import vilu
from tests.store.test_precision import model
from vilu.errors import ProvenanceError
from vilu.predictors.persistence.vocabulary import Vocabulary

NAMES = ("red", "green", "blue")


def photos(n: int, colour: tuple[int, int, int] = (200, 40, 20)) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), colour)] * n


@pytest.fixture
def predictor(tmp_path: Path) -> Path:
    """Return a predictor for photos that were embedded in float32."""
    space = model(0.0, "fp32").space
    folder = tmp_path / "predictor"
    vilu.MCM().save(folder)
    Vocabulary(NAMES, torch.eye(3), space, "float32", {}).save(folder)
    return folder


def test_photos_that_agree_are_said_once(predictor: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vilu")
    guard = vilu.Guard(predictor, backbone=model(0.0), workers=1)
    guard(photos(40))
    assert "bf16 against fp32" not in caplog.text
    guard(photos(40))
    guard(photos(40))
    lines = [line for line in caplog.messages if "bf16 against fp32" in line]
    (line,) = lines
    assert "100.0% equal answers, 100.0% equal decisions" in line


def test_photos_that_differ_stop_the_guard_again_and_again(predictor: Path) -> None:
    guard = vilu.Guard(predictor, backbone=model(1.0), workers=1)
    for _ in range(2):
        with pytest.raises(ProvenanceError, match=r"bf16 against fp32, .*precision='fp32'"):
            guard(photos(64))


def test_clients_cannot_stop_a_service(predictor: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = vilu.Guard(predictor, backbone=model(1.0), workers=1)
    assert guard.model.first_photos is not None
    guard.model.first_photos.must_pass = False  # as the service sets it
    assert len(guard(photos(70))) == 70
    assert "Needed are a cosine of 0.995" in caplog.text


def test_without_another_precision_nothing_is_compared(predictor: Path) -> None:
    assert vilu.Guard(predictor, backbone=model(0.0, "fp32")).model.first_photos is None


def test_a_bad_photo_is_no_photo_of_the_comparison(predictor: Path) -> None:
    guard = vilu.Guard(predictor, backbone=model(0.0), workers=1)
    guard([b"no picture", *photos(63)])
    assert guard.model.first_photos is not None
    assert guard.model.first_photos.check is None
    guard(photos(1))
    assert guard.model.first_photos.check is not None
    assert guard.model.first_photos.check.n == 64
