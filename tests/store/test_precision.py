"""A low precision is compared with float32 on the user's own photos."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

import vilu
from tests.builders.store_fakes import NAMES, FakeDataset, picture
from vilu.artifacts.documents import read_log
from vilu.backbones.base import DualEncoder
from vilu.device import multiplies_bf16
from vilu.errors import ProvenanceError
from vilu.store.job import BackboneSpec
from vilu.store.precision import MIN_COSINE, MIN_EQUAL_ANSWERS, PrecisionCheck
from vilu.store.reader import EmbeddingStore


def model(error: float, precision: str = "bf16") -> DualEncoder:
    """Return a model that embeds mean colours, where autocast adds ``error`` to blue."""

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        means = pixels.mean(dim=(2, 3))
        if torch.is_autocast_enabled("cpu"):
            means = means + error * torch.tensor([0.0, 0.0, 1.0])
        return means

    def transform(image: Image.Image) -> torch.Tensor:
        red, green, blue = image.resize((1, 1)).getpixel((0, 0))
        return torch.tensor([red, green, blue], dtype=torch.float32).view(3, 1, 1) / 255

    return DualEncoder(
        vilu.EmbeddingSpace(3, 10.0, backbone="colours", precision=precision),
        torch.device("cpu"),
        transform=transform,
        image_tower=tower,
        text_tower=lambda texts: torch.eye(3)[: len(texts)],
        truncates=lambda texts: [False] * len(texts),
    )


def solid(colour: tuple[int, int, int]) -> bytes:
    content = BytesIO()
    Image.new("RGB", (16, 16), colour).save(content, "PNG")
    return content.getvalue()


def embed(folder: Path, backbone: DualEncoder) -> EmbeddingStore:
    dataset = FakeDataset([picture(seed) for seed in range(70)], [0] * 70)
    store = vilu.embed(dataset, backbone, folder, names=NAMES)
    assert isinstance(store, EmbeddingStore)
    return store


def test_the_comparison_stands_in_the_log_of_the_store(tmp_path: Path) -> None:
    store = embed(tmp_path / "low", model(0.0))
    assert store.space.precision == "bf16"
    (check,) = [line["checked"] for line in read_log(tmp_path / "low") if "checked" in line]
    assert check.pop("speedup") > 0
    assert check == {
        "precision": "bf16",
        "n": 64,
        "least_cosine": pytest.approx(1, abs=1e-6),
        "equal_answers": 1.0,
        "equal_decisions": None,
    }
    exact = embed(tmp_path / "exact", model(0.0, "fp32"))
    assert not [line for line in read_log(tmp_path / "exact") if "checked" in line]
    store.space.require_match(exact.space, name="low", other_name="exact")  # raises nothing


def test_a_precision_that_changes_answers_stops_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(
        ProvenanceError, match=r"64 photos: cosine at least 0\.\d+, .*equal answers"
    ):
        embed(tmp_path / "low", model(1.0))


@pytest.mark.parametrize(
    ("least_cosine", "equal_answers", "is_passed"),
    [
        (MIN_COSINE, MIN_EQUAL_ANSWERS, True),
        (MIN_COSINE - 1e-4, 1.0, False),  # equal answers, different embeddings
        (1.0, MIN_EQUAL_ANSWERS - 1e-4, False),  # equal embeddings, different answers
        (MIN_COSINE - 1e-4, None, False),
        (MIN_COSINE, None, True),
    ],
)
def test_each_bar_alone_decides(
    least_cosine: float, equal_answers: float | None, is_passed: bool
) -> None:
    check = PrecisionCheck("bf16", 64, least_cosine, equal_answers)
    assert check.is_passed is is_passed


def test_equal_answers_do_not_excuse_embeddings_that_differ(tmp_path: Path) -> None:
    # Under autocast, blue is 0.3 too bright. The embeddings move, and red pictures are still
    # answered as red.
    dataset = FakeDataset([solid((255, 0, 0))] * 10, [0] * 10)
    with pytest.raises(ProvenanceError, match=r"cosine at least 0\.95.*100\.0% equal answers"):
        vilu.embed(dataset, model(0.3), tmp_path / "low", names=NAMES)


def test_near_embeddings_do_not_excuse_answers_that_differ(tmp_path: Path) -> None:
    # Red and blue tie, and the error adds a little blue.
    dataset = FakeDataset([solid((255, 0, 255))] * 10, [0] * 10)
    with pytest.raises(ProvenanceError, match=r"cosine at least 0\.99.*0\.0% equal answers"):
        vilu.embed(dataset, model(0.05), tmp_path / "low", names=NAMES)


def test_the_processor_is_asked_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, expected in (({"avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda names=names: names, raising=False)
        assert multiplies_bf16(torch.device("cpu")) is expected


def test_auto_takes_what_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from vilu.cli.images import backbone_spec

    for is_fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("vilu.device.multiplies_bf16", lambda device, is_fast=is_fast: is_fast)
        spec = backbone_spec("clip-vit-b32", "cpu", "auto", None, full_decode=False)
        assert isinstance(spec, BackboneSpec)
        assert spec.precision == expected
