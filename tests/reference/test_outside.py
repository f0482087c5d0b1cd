"""Everyday words and the outcome "outside", against plain numpy, cases worked by hand, and worlds of known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu import PREDICTORS, Embeddings
from vilu.errors import DataError, UsageError
from vilu.predictors.outside import far_words


def rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    found = rng.normal(size=(n, d))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def world(seed: int = 0, n: int = 40, k: int = 7, m: int = 30, d: int = 12, scale: float = 15.0) -> Embeddings:
    rng = np.random.default_rng(seed)
    return Embeddings(rows(rng, n, d), rows(rng, k, d), logit_scale=scale, columns={"negatives": rows(rng, m, d)})


def arrays(data: Embeddings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    words = data.column("negatives", torch.arange(1))
    return tuple(tensor.double().numpy() for tensor in (data.image, data.text, words))


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("nearest", [0.0, 0.2, 0.43, 1.0])
def test_far_words_by_brute_force(share: float, nearest: float) -> None:
    _, text, words = arrays(world())
    place = max(int(np.ceil(nearest * len(text))), 1)
    nearness = [sorted(float(word @ name) for name in text)[-place] for word in words]
    kept = sorted(np.argsort(nearness)[: max(round(share * len(words)), 1)].tolist())
    assert far_words(torch.from_numpy(words), torch.from_numpy(text), share, nearest).tolist() == kept


def test_a_word_that_is_a_class_goes_first() -> None:
    text = torch.eye(4)[:2]
    assert far_words(torch.eye(4), text, 0.5).tolist() == [2, 3]
    assert far_words(torch.eye(4)[[3, 0, 2, 1]], text, 0.5).tolist() == [0, 2]
    assert far_words(torch.eye(4), text, 0.75).tolist() == [0, 2, 3]  # of equally near ones the first stays


@pytest.mark.parametrize("of", ["classes", "answer"])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_neglabel_is_its_formula(of: str, share: float) -> None:
    data = world()
    image, text, words = arrays(data)
    far = far_words(torch.from_numpy(words), torch.from_numpy(text), share, 0.05).numpy()
    posterior = softmax(15.0 * image @ np.concatenate([text, words[far]]).T, axis=1)
    classes = posterior[:, : len(text)]
    expected = 1 - (classes.sum(axis=1) if of == "classes" else classes.max(axis=1))
    found = PREDICTORS["neglabel"](of=of, share=share).predict_uncertainty(data)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # logits in float32: 15 * 2^-23 * a few


def test_confident_images_do_not_tie() -> None:
    """Where 1 - u rounds to one in float64, u itself still ranks."""
    data = world(scale=300.0)
    for of in ("classes", "answer"):
        found = PREDICTORS["neglabel"](of=of, share=1.0).predict_uncertainty(data)
        assert (found < 1e-17).any()
        small = found[found < 0.5]
        assert len(np.unique(small)) == len(small)


def test_logit_bias_and_equal_answers_count() -> None:
    data = world()
    image, text, words = arrays(data)
    shifted = Embeddings(image, text, logit_scale=15.0, logit_bias=-9.0, columns={"negatives": words})
    method = PREDICTORS["neglabel"](of="answer")
    expected = method.predict_uncertainty(data)
    np.testing.assert_allclose(method.predict_uncertainty(shifted), expected, rtol=1e-5)
    names = [*"abcdefg", "a"]
    doubled = Embeddings(
        image, np.concatenate([text, text[:1]]), logit_scale=15.0, class_names=names, columns={"negatives": words}
    )
    np.testing.assert_array_equal(method.predict_uncertainty(doubled), expected)


def test_what_neglabel_cannot_do() -> None:
    bare = variant(toy_embeddings(n=20), columns=None)
    with pytest.raises(DataError, match=r"neglabel needs the column 'negatives'.*`vilu embed --negatives`"):
        PREDICTORS["neglabel"]().predict_uncertainty(bare)
    with pytest.raises(UsageError, match="does not work on image-caption pairs: words are chosen"):
        PREDICTORS["neglabel"]().predict_uncertainty(toy_pairs())
    with pytest.raises(UsageError, match="share"):
        PREDICTORS["neglabel"](share=0.0).predict_uncertainty(world())


def test_neglabel_tells_images_of_words_from_images_of_classes() -> None:
    rng = np.random.default_rng(3)
    text, words = rows(rng, 6, 32), rows(rng, 60, 32)
    inside, outside = text[rng.integers(6, size=50)], words[rng.integers(60, size=50)]
    image = np.concatenate([inside, outside]) + rng.normal(size=(100, 32)) * 0.05
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    data = Embeddings(image, text, logit_scale=40.0, columns={"negatives": words})
    u = PREDICTORS["neglabel"](share=1.0).predict_uncertainty(data)
    assert u[:50].max() < u[50:].min()
    gap = logsumexp(40 * image @ words.T, axis=1) - logsumexp(40 * image @ text.T, axis=1)
    assert np.array_equal(np.argsort(gap[:50]), np.argsort(u[:50]))
