"""The entry points lead to the right things, and these to the right numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

import vilu
from vilu.datasets.known import check, find_known
from vilu.metrics import METRICS, auroc
from vilu_example.metric import YOUDEN

CLASSES = ("angular_leaf_spot", "bean_rust", "healthy")


def some_embeddings(n: int = 60, k: int = 5, d: int = 8) -> vilu.Embeddings:
    """Images near the text of their class."""
    generator = torch.Generator().manual_seed(0)
    text, noise = torch.randn(k, d, generator=generator), torch.randn(n, d, generator=generator)
    label = torch.arange(n) % k
    return vilu.Embeddings(
        normalize(text[label] + 1.5 * noise), normalize(text), target=label, logit_scale=5.0
    )


def test_the_method_is_its_formula(tmp_path: Path) -> None:
    data, method = some_embeddings(), vilu.PREDICTORS["quadratic_entropy"]()
    p, t = (5.0 * data.image.double() @ data.text.double().T).softmax(dim=1), data.text.double()
    expected = torch.einsum("ni,nj,ij->n", p, p, 1 - t @ t.T)
    found = method.predict_uncertainty(data)
    assert np.allclose(found, expected, atol=1e-6)
    method.save(tmp_path / "saved")
    assert np.array_equal(vilu.load(tmp_path / "saved").predict_uncertainty(data), found)


def test_it_tells_wrong_answers_from_right_ones() -> None:
    scored = vilu.score(vilu.PREDICTORS["quadratic_entropy"](), some_embeddings(n=600))
    assert auroc(scored.uncertainty, scored.failure) > 0.6


def test_the_metric_is_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    failure = (rng.random(80) < 0.4).astype(int)
    score = rng.integers(0, 12, 80) + 2 * failure  # with ties
    gaps = [
        (score[failure == 0] <= u).mean() - (score[failure == 1] <= u).mean()
        for u in np.unique(score)
    ]
    table = vilu.evaluate(vilu.Outcomes(score, failure), metrics=["youden"], n_resamples=0)
    assert METRICS["youden"] is YOUDEN
    assert table.rows[0].value == max(gaps)


def test_the_data_set_is_known(tmp_path: Path) -> None:
    assert sum(find_known("beans").sizes.values()) == 1295
    for split in find_known("beans").sizes:
        for name in CLASSES:
            (tmp_path / "beans" / split / name).mkdir(parents=True)
            (tmp_path / "beans" / split / name / "1.jpg").touch()
    (found,) = check(tmp_path, ["beans"])
    assert {split: count.found for split, count in found.splits.items()} == dict.fromkeys(
        find_known("beans").sizes, 3
    )


def test_the_backbone_sees_colours() -> None:
    model = vilu.load_backbone("colours", device="cpu")
    names = ["red", "green", "blue"]
    pixels = torch.stack([model.preprocess(Image.new("RGB", (50, 40), name)) for name in names])
    text = model.encode_texts([f"a photo of a {name} thing" for name in names])
    cosine = model.encode_images(pixels) @ text.T
    assert cosine.argmax(dim=1).tolist() == [0, 1, 2]
