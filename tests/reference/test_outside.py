"""Test everyday words and the outcome "outside".

The references are plain NumPy, cases worked by hand, and simulated data with known answers.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression, Ridge

import vilu
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu import OUTSIDE, PREDICTORS, Embeddings, ViLUPlus
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch
from vilu.errors import DataError, UsageError
from vilu.metrics import auroc
from vilu.predictors.contract.labelled import log_odds_with_outside
from vilu.predictors.plus.ood import (
    Margins,
    Outside,
    far_word_indices,
    fit_mixture,
    learn_from_examples,
    learn_from_words,
    word_margins,
)


def rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    found = rng.normal(size=(n, d))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def world(
    seed: int = 0, n: int = 40, k: int = 7, m: int = 30, d: int = 12, scale: float = 15.0
) -> Embeddings:
    rng = np.random.default_rng(seed)
    return Embeddings(
        rows(rng, n, d), rows(rng, k, d), logit_scale=scale, columns={"negatives": rows(rng, m, d)}
    )


def arrays(data: Embeddings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    words = data.column("negatives", torch.arange(1))
    return tuple(tensor.double().numpy() for tensor in (data.image, data.text, words))


def test_far_words_do_not_keep_their_tensors() -> None:
    words, text = torch.eye(4), torch.eye(4)[:2]
    first = far_word_indices(words, text, 0.5)
    assert far_word_indices(words, text, 0.5) is first  # the result is cached
    assert far_word_indices(words, text, 0.25).tolist() == [2]
    references = [weakref.ref(words), weakref.ref(text)]
    del words, text
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("nearest", [0.0, 0.2, 0.43, 1.0])
def test_far_words_by_brute_force(share: float, nearest: float) -> None:
    _, text, words = arrays(world())
    place = max(int(np.ceil(nearest * len(text))), 1)
    nearness = [sorted(float(word @ name) for name in text)[-place] for word in words]
    kept = sorted(np.argsort(nearness)[: max(round(share * len(words)), 1)].tolist())
    assert (
        far_word_indices(torch.from_numpy(words), torch.from_numpy(text), share, nearest).tolist()
        == kept
    )


def test_a_word_that_is_a_class_goes_first() -> None:
    text = torch.eye(4)[:2]
    assert far_word_indices(torch.eye(4), text, 0.5).tolist() == [2, 3]
    assert far_word_indices(torch.eye(4)[[3, 0, 2, 1]], text, 0.5).tolist() == [0, 2]
    # Among equally near words the first stays.
    assert far_word_indices(torch.eye(4), text, 0.75).tolist() == [
        0,
        2,
        3,
    ]


@pytest.mark.parametrize("of", ["classes", "answer"])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_neglabel_is_its_formula(of: str, share: float) -> None:
    data = world()
    image, text, words = arrays(data)
    far = far_word_indices(torch.from_numpy(words), torch.from_numpy(text), share, 0.05).numpy()
    posterior = softmax(15.0 * image @ np.concatenate([text, words[far]]).T, axis=1)
    classes = posterior[:, : len(text)]
    expected = 1 - (classes.sum(axis=1) if of == "classes" else classes.max(axis=1))
    found = PREDICTORS["neglabel"](of=of, share=share).predict_uncertainty(data)
    # Logits are float32, and off by a few times 15 * 2^-23.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_confident_images_do_not_tie() -> None:
    """If 1 - u rounds to one in float64, u itself must still rank images."""
    data = world(scale=300.0)
    for of in ("classes", "answer"):
        found = PREDICTORS["neglabel"](of=of, share=1.0).predict_uncertainty(data)
        assert (found < 1e-17).any()
        small = found[found < 0.5]
        assert len(np.unique(small)) == len(small)


def test_logit_bias_and_equal_answers_count() -> None:
    data = world()
    image, text, words = arrays(data)
    shifted = Embeddings(
        image, text, logit_scale=15.0, logit_bias=-9.0, columns={"negatives": words}
    )
    method = PREDICTORS["neglabel"](of="answer")
    expected = method.predict_uncertainty(data)
    np.testing.assert_allclose(method.predict_uncertainty(shifted), expected, rtol=1e-5)
    names = [*"abcdefg", "a"]
    doubled = Embeddings(
        image,
        np.concatenate([text, text[:1]]),
        logit_scale=15.0,
        class_names=names,
        columns={"negatives": words},
    )
    np.testing.assert_array_equal(method.predict_uncertainty(doubled), expected)


def test_what_neglabel_cannot_do() -> None:
    bare = variant(toy_embeddings(n=20), columns=None)
    with pytest.raises(
        DataError,
        match=r"neglabel needs .*'negatives'.*`vilu embed --negatives`, "
        r"or give it to `vilu import`",
    ):
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


# The outcome "outside".


def ood_rows(
    seed: int, n_inside: int, n_outside: int, k: int = 6, m: int = 80, d: int = 48
) -> Embeddings:
    """Return images near class texts, then images near far words, in one space.

    The first images have class targets, the rest have OUTSIDE.
    """
    fixed, rng = np.random.default_rng(5), np.random.default_rng(seed)
    text, words = rows(fixed, k, d), rows(fixed, m, d)
    far = far_word_indices(torch.from_numpy(words), torch.from_numpy(text), 0.25).numpy()
    target = rng.integers(k, size=n_inside)
    image = np.concatenate([text[target], words[rng.choice(far, size=n_outside)]])
    image += rng.normal(size=image.shape) * 0.11
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    labels = np.concatenate([target, np.full(n_outside, OUTSIDE)])
    return Embeddings(image, text, target=labels, logit_scale=20.0, columns={"negatives": words})


def all_rows(data: Embeddings, columns: tuple[str, ...] = ("negatives",), **more: object) -> Rows:
    return Rows(data, torch.arange(len(data)), columns, **more)


def whole(data: Embeddings) -> Batch:
    (batch,) = data.batches(len(data), columns=["negatives"])
    return batch


def test_margin_by_brute_force() -> None:
    data = world()
    image, text, words = arrays(data)
    far = torch.tensor([3, 4, 19])
    expected = logsumexp(15 * image @ words[far.numpy()].T, axis=1) - logsumexp(
        15 * image @ text.T, axis=1
    )
    np.testing.assert_allclose(word_margins(whole(data), far).numpy(), expected, atol=1e-5)


def test_the_direction_is_ridge_regression() -> None:
    data = ood_rows(0, 150, 50)
    seen = Margins.of(all_rows(data))
    weight, bias = seen.regress_on_image()
    image = data.image.double().numpy()
    centred = image - image.mean(axis=0)
    size = np.sqrt((centred**2).sum(axis=1).mean())
    expected = (
        Ridge(alpha=1 / 0.1, fit_intercept=False)
        .fit(centred / size, seen.margin - seen.margin.mean())
        .coef_
    )
    np.testing.assert_allclose(weight, expected / size, rtol=1e-8)
    assert float(image.mean(axis=0) @ weight.numpy() + bias) == pytest.approx(
        float(seen.margin.mean())
    )


def test_the_mixture_finds_what_was_drawn() -> None:
    """The fit must find the drawn parameters within four standard errors.

    There are 2,000 values around class means, and a fifth lies around 6.
    """
    rng = np.random.default_rng(0)
    answer = rng.integers(4, size=2_000)
    outside = rng.random(2_000) < 0.2
    means = np.array([-1.0, 0.0, 0.5, 1.5])
    value = np.where(outside, 6.0, means[answer]) + rng.normal(size=2_000) * 1.2
    balance = 6.5 + np.sort(value)[int(0.25 * 1_999)]
    found = fit_mixture(
        torch.from_numpy(value), torch.from_numpy(answer), 4, balance, all_known_inside=False
    )
    assert found.outside_share == pytest.approx(outside.mean(), abs=4 * np.sqrt(0.2 * 0.8 / 2_000))
    # The prior counts as 100 of 500 rows and says 6.5.
    assert found.outside_mean == pytest.approx(6 + 0.1, abs=0.1 + 4 * 1.2 / 20)
    assert found.variance**0.5 == pytest.approx(1.2, abs=4 * 1.2 / np.sqrt(4_000))
    np.testing.assert_allclose(found.inside_means[:4], means, atol=4 * 1.2 / 20 + 0.05)
    slope, offset = found.log_odds()
    sd = found.variance**0.5
    inside, beyond = (
        norm.logpdf(2.0, found.inside_means, sd),
        norm.logpdf(2.0, found.outside_mean, sd),
    )
    expected = beyond - inside + np.log(found.outside_share / (1 - found.outside_share))
    np.testing.assert_allclose(slope * 2.0 + offset, expected, rtol=1e-9)


def test_rows_that_are_all_inside_have_hardly_any_outside() -> None:
    rng = np.random.default_rng(1)
    answer = torch.from_numpy(rng.integers(4, size=1_000))
    value = torch.from_numpy(rng.standard_t(5, size=1_000))
    balance = 7.0 + float(value.sort().values[int(0.25 * 999)])
    found = fit_mixture(value, answer, 4, balance, all_known_inside=False)
    assert found.outside_share < 0.01
    assert found.outside_mean > 5
    known = fit_mixture(value, answer, 4, balance, all_known_inside=True)
    assert (known.outside_share, known.outside_mean) == (0.1, pytest.approx(7.0))
    assert float(known.inside_means[-1]) == pytest.approx(float(value.mean()))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5])
def test_words_tell_ood_apart_however_many_there_are(share: float) -> None:
    n = 600
    train, test = ood_rows(1, round(n * (1 - share)), round(n * share)), ood_rows(2, 300, 300)
    found = learn_from_words(all_rows(train), all_known_inside=False)
    odds = found.log_odds(whole(test), torch.arange(6)).numpy()
    assert auroc(odds, np.arange(600) >= 300) > 0.97
    # Hardly any inside row is called an out-of-distribution row.
    assert (odds[:300] > 0).mean() < 0.05
    assert found.notes["outside_share"] == pytest.approx(share, abs=0.05)


def test_words_that_do_not_tell_are_left_alone() -> None:
    """Words lie around the class texts and near every image. The fit must then claim nothing."""
    rng = np.random.default_rng(2)
    text, image = rows(rng, 20, 24), rows(rng, 400, 24)
    words = text[rng.integers(20, size=200)] + rng.normal(size=(200, 24)) * 0.1
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    data = Embeddings(image, text, logit_scale=20.0, columns={"negatives": words})
    found = learn_from_words(all_rows(data), all_known_inside=False)
    assert not found
    assert found.columns == ()
    assert (found.log_odds(whole(data)) == -np.inf).all()
    log_odds = torch.linspace(-40, 40, 400).double()
    assert torch.equal(log_odds_with_outside(log_odds, found.log_odds(whole(data))), log_odds)


@pytest.mark.parametrize("columns", [(), ("negatives",)])
def test_examples_are_a_ridge_logistic_regression(columns: tuple[str, ...]) -> None:
    data = ood_rows(3, 120, 30)
    train = Rows(data, torch.arange(120), columns)
    assert train.outside.tolist() == list(range(120, 150))
    found = learn_from_examples(train, train.outside)
    image = data.image.double().numpy()
    centred = image - image.mean(axis=0)
    inputs = centred / np.sqrt((centred**2).sum(axis=1).mean()) * np.sqrt(100)
    if columns:
        far = far_word_indices(data.column("negatives", torch.arange(1)), data.text, 0.25)
        m = word_margins(whole(data), far).numpy()
        inputs = np.column_stack([inputs, (m - m.mean()) / m.std() * np.sqrt(10)])
    other = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(inputs, np.arange(150) >= 120)
    np.testing.assert_allclose(
        found.log_odds(whole(data)), other.decision_function(inputs), atol=2e-3
    )
    assert found.columns == columns


def test_failure_is_one_less_the_probability_of_both() -> None:
    data = ood_rows(4, 200, 50)
    found = learn_from_words(all_rows(data), all_known_inside=False)
    batch, log_odds = whole(data), torch.linspace(-30, 30, 250).double()
    inside = torch.sigmoid(-found.log_odds(batch, torch.arange(6)))
    expected = 1 - inside * torch.sigmoid(-log_odds)
    both = log_odds_with_outside(log_odds, found.log_odds(batch, torch.arange(6)))
    torch.testing.assert_close(torch.sigmoid(both), expected, rtol=0, atol=1e-12)


def test_other_candidates_have_the_means_of_all() -> None:
    data = ood_rows(5, 200, 50)
    found = learn_from_words(all_rows(data), all_known_inside=False)
    batch = whole(data)
    mine, others = (
        found.log_odds(batch, torch.arange(6)),
        found.log_odds(batch, torch.full((6,), -1)),
    )
    assert torch.equal(others, found.log_odds(batch))
    assert not torch.allclose(mine, others)
    assert auroc(others.numpy(), np.arange(250) >= 200) > 0.95


def test_what_is_saved_is_what_is_known() -> None:
    data = ood_rows(6, 200, 50)
    found = learn_from_words(all_rows(data), all_known_inside=False)
    again = Outside.from_tensors(found.tensors())
    assert torch.equal(again.log_odds(whole(data)), found.log_odds(whole(data)))
    assert not Outside.from_tensors({})
    assert not Outside.from_tensors(Outside.not_learned().tensors())


def test_vilu_zero_looks_at_words_where_they_are() -> None:
    train, test = ood_rows(7, 400, 100), ood_rows(8, 300, 100)
    unlabelled = variant(train, target=None)
    bare = PREDICTORS["vilu_zero"]().fit(variant(unlabelled, columns=None))
    words = PREDICTORS["vilu_zero"]().fit(unlabelled)
    assert (bare.columns_to_score, words.columns_to_score) == ((), ("negatives",))
    assert (bare.label, words.label) == ("vilu_zero", "vilu_zero (outside)")
    told, untold = words.predict_uncertainty(test), bare.predict_uncertainty(test)
    assert told[300:].min() > 0.5 > untold[300:].min()
    assert told[300:].mean() > 0.98 > 0.8 > untold[300:].mean()
    np.testing.assert_allclose(told[:300], untold[:300], atol=1e-3)
    with pytest.raises(DataError, match="vilu_zero needs the column 'negatives'"):
        words.predict_uncertainty(variant(test, columns=None))


def failures(data: Embeddings) -> np.ndarray:
    return np.concatenate([batch.failure.numpy() for batch in data.batches(1_000)])


def plus(train: Embeddings, unlabelled: Embeddings | None = None) -> ViLUPlus:
    return ViLUPlus(width=8, epochs=1).fit(train, unlabelled=unlabelled)


@pytest.mark.filterwarnings("ignore:.*rows are left out", "ignore:only .* failures")
@pytest.mark.parametrize("columns", [None, "all"])
def test_vilu_plus_learns_outside_from_examples(columns: str | None) -> None:
    """A few out-of-distribution examples must tell similar rows apart, with and without words."""
    train, test = ood_rows(9, 90, 30), ood_rows(10, 300, 100)
    if columns is None:
        train, test = variant(train, columns=None), variant(test, columns=None)
    fitted, bare = plus(train), plus(variant(train, target=train.target, columns=None))
    assert fitted.label == "vilu_plus (outside)"
    assert bare.label == "vilu_plus"
    assert fitted.notes_["n_outside"] == 30
    told, untold = (
        fitted.predict_uncertainty(test),
        bare.predict_uncertainty(variant(test, columns=None)),
    )
    assert auroc(told, failures(test)) > 0.97
    assert told[300:].mean() > 0.75 > 0.5 > untold[300:].mean()
    assert np.abs(told - untold)[:300].mean() < 0.05


@pytest.mark.filterwarnings("ignore:.*rows are left out", "ignore:only .* failures")
def test_vilu_plus_without_outside_is_as_it_was() -> None:
    """Without words and examples no tensor may be added, even if there are rows without labels."""
    train = variant(ood_rows(11, 90, 0), columns=None)
    for fitted in (plus(train), plus(train, variant(ood_rows(12, 90, 30), columns=None))):
        assert not set(Outside.names) & fitted.state().keys()


@pytest.mark.filterwarnings("ignore:only .* failures")
def test_vilu_plus_learns_outside_from_words_and_rows_without_labels() -> None:
    train, unlabelled, test = ood_rows(13, 90, 0), ood_rows(14, 240, 60), ood_rows(15, 300, 100)
    for fitted in (plus(train), plus(train, variant(unlabelled, target=None))):
        assert fitted.columns_to_score == ("negatives",)
        u = fitted.predict_uncertainty(test)
        assert u[300:].mean() > 0.9
        assert u[:300].mean() < 0.1
    assert fitted.notes_["outside_share"] == pytest.approx(0.2, abs=0.02)


@pytest.mark.filterwarnings("ignore:.*rows are left out", "ignore:only .* failures")
@pytest.mark.parametrize("examples", [0, 30])
def test_rows_without_labels_count_as_seen(examples: int) -> None:
    unlabelled = variant(ood_rows(17, 60, 20), target=None)
    assert len(plus(ood_rows(18, 90, examples), unlabelled).seen(unlabelled)) == 80


@pytest.mark.filterwarnings(
    "ignore:.*rows are left out", "ignore:only .* failures", "ignore:.*were used to fit"
)
def test_the_outcome_is_explained() -> None:
    data = ood_rows(16, 90, 30)
    fitted = plus(data)
    u = fitted.predict_uncertainty(data)
    explained = vilu.explain(fitted, data, rows=[0, 5, 100, 110])
    for row in explained:
        parts, odds = row.attribution.parts, np.log(u[row.row]) - np.log1p(-u[row.row])
        assert row.attribution.score == pytest.approx(odds, abs=1e-4)
        assert sum(parts.values()) == pytest.approx(odds - row.attribution.baseline, abs=1e-6)
        assert (parts["none of the classes"] > 0) == (row.row >= 90)


def test_words_refuse_nothing_that_few_rows_hold() -> None:
    """Two equal rows, or rows from one class, must give numbers and no errors."""
    for n in (2, 3, 30):
        data = ood_rows(17, n, 0)
        data = data.take(torch.zeros(n, dtype=torch.long)) if n < 30 else data
        for known in (True, False):
            found = learn_from_words(all_rows(data), all_known_inside=known)
            assert torch.isfinite(
                torch.cat([tensor.flatten() for tensor in found.tensors().values()])
            ).all()
