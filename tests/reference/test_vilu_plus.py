"""Test ViLU+ against independent solvers.

SciPy solves the convex expert and the pool, and scikit-learn the memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.kernel_ridge import KernelRidge

import vilu
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.rows import Rows
from vilu.errors import DataError
from vilu.predictors.nn.attention import (
    BIAS_SHARE,
    MIN_LOSS_CHANGE,
    SHRINKAGE_ROWS,
    SHRINKAGE_SD,
    ImageInputs,
    Problem,
    SupervisedAttention,
    class_log_prior,
    fit_attention,
    fit_temperature,
    held_out_shrinkage,
    orthonormal_basis,
)
from vilu.predictors.nn.experts import Memory
from vilu.predictors.plus.vilu_plus import POOL_SD, ViLUPlus, fit_pool_weights
from vilu_bench.studies.data import without_labels

CPU = torch.device("cpu")
VARIANCE, SHARING = 10.0, 0.5
QUICK = {"epochs": 10, "width": 16}


def rows_of(data: Embeddings) -> Rows:
    return Rows(data, torch.arange(len(data)))


def standardised(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=0)
    return centred / np.sqrt((centred**2).sum(axis=1).mean())


@pytest.fixture(scope="module")
def data() -> Embeddings:
    return toy_embeddings(n=200, k=4, d=8)


@pytest.fixture(scope="module")
def attention(data: Embeddings):
    inputs = ImageInputs(8, 0)
    inputs.fit(rows_of(data))
    return fit_attention(inputs, rows_of(data), 4, VARIANCE, SHARING, CPU)


def zero_shot(data: Embeddings) -> np.ndarray:
    return data.space.logit_scale * data.image.double().numpy() @ data.text.double().numpy().T


def test_temperature_is_the_most_probable_one(data: Embeddings) -> None:
    logits, target = zero_shot(data), data.target.numpy()
    grid = np.exp(np.linspace(-3, 3, 6001))
    loss = [
        -log_softmax(a * logits, axis=1)[range(200), target].sum() + np.log(a) ** 2 / 0.5
        for a in grid
    ]
    # The grid steps are one part in a thousand.
    assert fit_temperature(attention_of(data), rows_of(data), CPU) == pytest.approx(
        grid[np.argmin(loss)], rel=2e-3
    )


@pytest.mark.parametrize("n", [200, 12, 3])
def test_attention_is_the_most_probable_one(data: Embeddings, n: int) -> None:
    """The attention must solve its dual problem.

    There each class has one weight vector. The prior covariance across classes is C (rho T T^T + (1
    - rho) D). D is one for classes with labels, and zero for the others.
    """
    few = data.take(torch.arange(n))
    inputs = ImageInputs(8, 0)
    inputs.fit(rows_of(few))
    attention = fit_attention(inputs, rows_of(few), 4, VARIANCE, SHARING, CPU)
    x = np.column_stack(
        [standardised(few.image_rows(torch.arange(n)).double().numpy()), np.ones(n)]
    )
    t = standardised(data.text.double().numpy())
    seen = np.isin(np.arange(4), few.target.numpy())
    precision = np.linalg.inv(SHARING * t @ t.T + (1 - SHARING) * np.diag(seen))
    offset = float(attention.temperature) * zero_shot(data)[:n]
    variance = VARIANCE * offset.var(axis=1).mean()
    each = np.append(np.full(8, 1 / variance), 1 / (BIAS_SHARE * variance))
    target = np.eye(4)[few.target.numpy()]
    start = class_log_prior(few.target, 4).double().numpy()

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(4, 9)
        logits = offset + start + x @ weights.T
        loss = (logsumexp(logits, axis=1) - (logits * target).sum(axis=1)).sum()
        loss += 0.5 * np.einsum("kd,kl,ld,d->", weights, precision, weights, each)
        slope = (softmax(logits, axis=1) - target).T @ x + precision @ weights * each
        return loss, slope.ravel()

    found = minimize(
        objective, np.zeros(36), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-8}
    )
    expected = offset + start + n / (n + SHRINKAGE_ROWS) * (x @ found.x.reshape(4, 9).T)
    batch = next(few.batches(200))
    # Both sides stop when float32 sums over 200 losses no longer change. That determines logits
    # near 10 to about 1e-3 of their size.
    assert np.allclose(attention(batch).numpy(), expected, atol=0.02)


@pytest.mark.parametrize(
    ("target", "n_classes", "share", "seen"),
    [
        ([0, 0, 1, 1, 1, 2], 6, 1 / 6, 3),  # one of six labels is single
        ([0, 0, 1, 1], 4, 1 / 4, 2),  # no label is single, so the share is one label's
        ([0, 1, 2], 9, 0.1, 3),  # every class has one label, so the labels say nothing
        # Two of four labels are single. The two classes without labels are as frequent as the three
        # with labels.
        (
            [0, 1, 2, 2],
            5,
            2 / 4,
            3,
        ),
    ],
)
def test_classes_without_labels_are_rarer(
    target: list[int], n_classes: int, share: float, seen: int
) -> None:
    prior = class_log_prior(torch.tensor(target), n_classes).exp()
    # Classes without labels divide ``share`` among them. Classes with labels divide the rest.
    each = min(share / (n_classes - seen) / ((1 - share) / seen), 1)
    assert prior.tolist() == pytest.approx([1.0 if c in target else each for c in range(n_classes)])


def test_no_class_is_rarer_where_all_have_labels() -> None:
    assert class_log_prior(torch.tensor([1, 0, 2, 2]), 3).tolist() == [0, 0, 0]
    assert class_log_prior(torch.tensor([], dtype=torch.long), 3).tolist() == [0, 0, 0]


def attention_of(data: Embeddings) -> SupervisedAttention:
    """Return an attention at temperature one, with the texts as they are."""
    inputs = ImageInputs(data.space.embed_dim, 0)
    inputs.fit(rows_of(data))
    attention = SupervisedAttention(inputs, data.space.embed_dim, len(data.text), SHARING)
    attention.classes.copy_(data.text)
    return attention


def problem_of(data: Embeddings, variance: float) -> Problem:
    return Problem(attention_of(data), rows_of(data), variance)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_rows_that_are_held_say_what_streamed_ones_say(
    data: Embeddings, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilu.predictors.nn.attention.MIN_STREAMED_LOSS_CHANGE", MIN_LOSS_CHANGE)
    held, streamed = (problem_of(data.take(torch.arange(n)), 3.0) for _ in range(2))
    streamed.whole_block = None
    held_solution = held.in_attention_coordinates(held.solve())
    streamed_solution = streamed.in_attention_coordinates(streamed.solve())
    for mine, other in zip(held_solution, streamed_solution, strict=True):
        # Both sides stop when the loss per row changes by 1e-9. The penalty's curvature is 1 / (3
        # n), so the weights differ by up to sqrt(2e-9 * 120).
        assert torch.allclose(mine, other, atol=2e-3)


def test_a_basis_holds_its_rows() -> None:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, rows[:1] + rows[1:2]])  # the rank is three
    found = orthonormal_basis(rows)
    assert found.shape == (8, 4)
    assert torch.allclose(found.T @ found, torch.eye(4), atol=1e-6)
    assert torch.allclose(rows @ found @ found.T, rows, atol=1e-5)
    assert torch.equal(orthonormal_basis(rows.T), torch.eye(4))


@pytest.mark.parametrize("n", [12, 30])
def test_the_share_that_is_kept_is_the_most_probable_one(data: Embeddings, n: int) -> None:
    few = data.take(torch.arange(n))
    problem = problem_of(few, 30.0)
    x = np.column_stack(
        [standardised(few.image_rows(torch.arange(n)).double().numpy()), np.ones(n)]
    )
    text, target = data.text.double().numpy(), few.target.numpy()
    kernel = x @ np.diag(np.append(np.full(8, 30.0), 30 * BIAS_SHARE)) @ x.T
    across = SHARING * text @ text.T + (1 - SHARING) * np.diag(np.isin(np.arange(4), target))
    logits = zero_shot(data)[:n]
    order = np.argsort(target, kind="stable")
    learned = np.zeros((n, 4))
    for k in range(5):
        out = np.isin(np.arange(n), order[k::5])
        size = (~out).sum()
        root = np.linalg.cholesky(kernel[np.ix_(~out, ~out)] + 1e-9 * np.eye(size))
        half = np.linalg.cholesky(across)

        def objective(
            flat: np.ndarray, root=root, half=half, out=out, size=size
        ) -> tuple[float, np.ndarray]:
            found = logits[~out] + root @ flat.reshape(size, 4) @ half.T
            loss = -log_softmax(found, axis=1)[range(size), target[~out]].sum() + flat @ flat / 2
            slope = root.T @ (softmax(found, axis=1) - np.eye(4)[target[~out]]) @ half
            return loss, slope.ravel() + flat

        best = minimize(
            objective, np.zeros(size * 4), jac=True, method="L-BFGS-B", options={"ftol": 1e-15}
        ).x
        residual = np.eye(4)[target[~out]] - softmax(
            logits[~out] + root @ best.reshape(size, 4) @ half.T, axis=1
        )
        learned[out] = kernel[np.ix_(out, ~out)] @ residual @ across  # at a zero slope
    grid = np.linspace(0, 1, 201)
    value = [
        -log_softmax(logits + w * learned, axis=1)[range(n), target].sum()
        + (w - 1) ** 2 / (2 * SHRINKAGE_SD**2)
        for w in grid
    ]
    # The tolerance is two grid steps.
    assert held_out_shrinkage(problem) == pytest.approx(grid[np.argmin(value)], abs=0.01)


def simulated(seed: int, n: int, n_classes: int, n_occurring: int, spread: float) -> Embeddings:
    """Return images around their class's text.

    All images in a class are off by a common shift (times 0.6), and each by larger noise.
    """
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(n_classes, 64)) / 8
    common = rng.normal(size=(n_classes, 64)) / 8
    target = np.arange(n) % n_occurring
    image = text[target] + 0.6 * common[target] + spread * rng.normal(size=(n, 64)) / 8
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    return Embeddings(image, text, target=target, logit_scale=20.0)


def auroc_of(predictor, data: Embeddings) -> float:
    failure = torch.cat([batch.failure for batch in data.batches(5_000)]).numpy()
    return float(vilu.metrics.auroc(predictor.predict_uncertainty(data), failure))


@pytest.mark.filterwarnings("ignore:vilu_plus is fitted on")
@pytest.mark.parametrize(("n_classes", "spread"), [(4, 3.0), (40, 1.5), (40, 6.0)])
def test_more_labels_never_cost_much(n_classes: int, spread: float) -> None:
    """More labels must not cost much, even with four labels in all.

    At spread 6 an image says next to nothing about its class.
    """
    gains = []
    for seed in range(5):
        whole = simulated(seed, 3_000, n_classes, n_classes, spread)
        test = whole.take(torch.arange(1_000, 3_000))
        mcm = auroc_of(vilu.MCM().fit(test), test)
        fits = [
            ViLUPlus(variance=10.0).fit(whole.take(torch.arange(k * n_classes))) for k in (1, 2, 5)
        ]
        gains.append([auroc_of(fit, test) - mcm for fit in fits])
    mean, error = np.mean(gains, axis=0), np.std(gains, axis=0) / 2
    assert (mean > -0.003 - 2 * error).all(), mean
    assert mean[2] > mean[0] - 2 * error[0]


@pytest.mark.filterwarnings("ignore:vilu_plus is fitted on")
def test_one_label_a_class_tells_which_classes_occur() -> None:
    whole = simulated(0, 2_000, 40, 8, 2.0)
    test = whole.take(torch.arange(1_000, 2_000))
    fit = ViLUPlus().fit(whole.take(torch.arange(8)))
    assert auroc_of(fit, test) > auroc_of(vilu.MCM().fit(test), test) + 0.05


@pytest.mark.filterwarnings("ignore:vilu_plus is fitted on")
@pytest.mark.parametrize("features", [False, True])
def test_images_without_labels_are_where_labels_begin(*, features: bool) -> None:
    """If labels give nothing but the temperature, q must be ``ViLUZero``'s posterior, tempered."""
    whole = simulated(3, 1_200, 8, 8, 2.0)
    if features:
        whole = variant(
            whole,
            columns={"features": torch.randn(1_200, 5, generator=torch.Generator().manual_seed(0))},
        )
    few, images, test = (
        whole.take(torch.arange(*ends)) for ends in ((0, 24), (24, 800), (800, 1_200))
    )
    zero = vilu.PREDICTORS["vilu_zero"]().fit(without_labels(images))
    assert (zero.notes_["absent"], zero.notes_["share"] > 0.1) == (0.0, True)
    plus = ViLUPlus(variance=1e-9).fit(few, unlabelled=without_labels(images))
    assert plus.notes_["unlabelled"].items() <= zero.notes_.items()
    logits, target = zero.pooled_parts(next(few.batches(24))).logits, few.target[:, None]
    grid = torch.exp(torch.linspace(-3, 3, 6_001, dtype=torch.float64))
    loss = [a.log() ** 2 / 0.5 - (a * logits).log_softmax(1).gather(1, target).sum() for a in grid]
    temperature = grid[torch.stack(loss).argmin()]
    batch = next(test.batches(400, columns=test.columns))
    expected = (temperature * zero.pooled_parts(batch).logits).log_softmax(1)
    # The grid steps are one part in a thousand, and logits differ by up to 40. Float32 rounding
    # adds little.
    assert torch.allclose(plus.log_posterior(batch), expected, atol=0.05)
    other = dataclasses.replace(
        batch, text=torch.nn.functional.normalize(torch.randn_like(batch.text), dim=1)
    )
    foreign = plus.experts.attention(other, plus.experts.attention.match_classes(other.text))
    assert torch.allclose(
        foreign,
        temperature
        ** float(plus.experts.attention.match_classes(other.text).class_similarity.mean())
        * other.logits,
        atol=0.05,
    )


@pytest.mark.parametrize(
    "kind", ["another order", "two swapped", "one missing", "one other", "captions"]
)
def test_images_without_labels_of_other_candidates_are_refused(kind: str, data: Embeddings) -> None:
    """A wrong order would fit silently, so it must be refused.

    The mean text is blind to the candidates' order. With many candidates it is also blind to one
    exchanged candidate.
    """
    orders = {"another order": [3, 0, 1, 2], "two swapped": [0, 2, 1, 3], "one missing": [0, 1, 2]}
    text = data.text[orders.get(kind, [0, 1, 2, 3])]
    if kind == "one other":
        text[3] = torch.nn.functional.normalize(text[3] + 0.05 * torch.eye(8)[0], dim=0)
    images = (
        toy_pairs(d=8)
        if kind == "captions"
        else Embeddings(data.image, text, target=None, logit_scale=20.0)
    )
    with pytest.raises(
        DataError, match=r"in their order\. Of its 4 shared texts, [0-3] are at the same place here"
    ):
        ViLUPlus(**QUICK).fit(variant(data, columns=None), unlabelled=images)


@pytest.mark.filterwarnings("ignore:vilu_plus is fitted on")
@pytest.mark.parametrize("labels", [8, 40])
def test_images_without_labels_help_a_few_labels(labels: int) -> None:
    gains = []
    for seed in range(3):
        whole = simulated(seed, 2_000, 40, 8, 2.0)
        few, rest, test = (
            whole.take(torch.arange(*ends)) for ends in ((0, labels), (0, 1_000), (1_000, 2_000))
        )
        images = without_labels(rest)
        best = max(
            auroc_of(fit, test)
            for fit in (ViLUPlus().fit(few), vilu.PREDICTORS["vilu_zero"]().fit(images))
        )
        gains.append(auroc_of(ViLUPlus().fit(few, unlabelled=images), test) - best)
    assert np.mean(gains) > 0, gains


def test_other_candidates_get_only_what_is_shared(data: Embeddings, attention) -> None:
    other = torch.nn.functional.normalize(
        torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=1
    )
    mixed = Embeddings(
        data.image, torch.cat([other[:1], data.text[[2]], other[1:]]), target=None, logit_scale=20.0
    )
    batch = next(mixed.batches(200))
    match = attention.match_classes(batch.text)
    assert match.is_class.tolist() == [False, True, False, False]
    assert int(match.nearest_class[1]) == 2
    texts, classes = (
        rows - data.text.numpy().mean(axis=0) for rows in (batch.text.numpy(), data.text.numpy())
    )
    cosine = (
        texts @ classes.T / np.linalg.norm(texts, axis=1)[:, None] / np.linalg.norm(classes, axis=1)
    )
    reach = np.where(match.is_class.numpy(), 1, np.maximum(cosine.max(axis=1), 0) ** 2)
    assert np.allclose(match.class_similarity.numpy(), reach, atol=1e-5)
    logits = attention(batch, match)
    temperature = attention.temperature ** reach.mean()
    learned = attention(next(data.batches(200))) - attention.tempered_logits(
        next(data.batches(200))
    )
    assert torch.allclose(logits[:, 1], temperature * batch.logits[:, 1] + learned[:, 2], atol=1e-4)
    keys = SHARING**0.5 * attention.text(batch.text[[0]]) @ attention.shared.T
    x = torch.nn.functional.pad(attention.inputs(batch), (0, 1), value=1.0)
    expected = temperature * batch.logits[:, 0] + float(reach[0]) * (x @ keys.T).squeeze(1)
    assert torch.allclose(logits[:, 0], expected, atol=1e-4)


def test_memory_is_kernel_ridge_regression_of_the_residual(data: Embeddings, attention) -> None:
    memory = Memory.fit(attention, rows_of(data))
    x = standardised(data.image.double().numpy())
    residual = np.eye(4)[data.target.numpy()] - softmax(
        float(attention.temperature) * zero_shot(data), axis=1
    )
    ridge = KernelRidge(alpha=0.1, kernel="rbf", gamma=0.5).fit(x, residual)
    found = memory(next(data.batches(200))).numpy()
    # Kernels are float32 (1e-6), and the Gram matrix has a condition number up to 200 / 0.1.
    assert np.allclose(found, 8 * ridge.predict(x), atol=0.02)


def test_pool_is_the_most_probable_one() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(3, size=300)
    truth = 2.0 * np.eye(3)[target]
    log_p = np.stack(
        [log_softmax(truth + rng.normal(size=(300, 3)) * s, axis=1) for s in (1.5, 1.0)], axis=1
    )
    grid = np.linspace(0, 1.5, 151)
    loss = np.array(
        [
            [
                -log_softmax(a * log_p[:, 0] + b * log_p[:, 1], axis=1)[range(300), target].sum()
                + ((a - 1) ** 2 + b**2) / (2 * POOL_SD**2)
                for b in grid
            ]
            for a in grid
        ]
    )
    best = np.unravel_index(loss.argmin(), loss.shape)
    # The tolerance is half a grid step, rounded up.
    assert np.allclose(fit_pool_weights(log_p, target), [grid[i] for i in best], atol=0.006)
    # One row says next to nothing.
    assert np.allclose(fit_pool_weights(log_p[:1], target[:1]), [1, 0], atol=0.1)


def test_companions_come_with_enough_labels(data: Embeddings) -> None:
    fewer = data.take(torch.arange(30))
    few, many = ViLUPlus(**QUICK).fit(fewer), ViLUPlus(**QUICK).fit(data)
    assert list(few.experts.companions) == []
    assert few.notes_["pool"] == [1.0]
    assert list(many.experts.companions) == ["adapter", "memory"]
    assert len(many.notes_["pool"]) == 3


@pytest.mark.parametrize("ruled_out", [-1e12, -3e38])
def test_a_candidate_ruled_out_by_a_large_logit_is_refused(
    data: Embeddings, ruled_out: float
) -> None:
    logits = np.column_stack([zero_shot(data), np.full(len(data), ruled_out)])
    target = data.target.numpy()
    rows = Embeddings.from_logits(logits, data.image, target)
    with pytest.raises(DataError, match="rules a candidate out"):
        ViLUPlus(**QUICK).fit(rows)
    logits[:, -1] = logits[:, :-1].min() - 50
    rows = Embeddings.from_logits(logits, data.image, target)
    assert np.isfinite(ViLUPlus(**QUICK).fit(rows).predict_uncertainty(rows)).all()


def test_rows_of_one_picture_have_the_attention_alone() -> None:
    """No row can be held out, because the rows of a picture are in the same fold."""
    image, text = np.tile([1.0, 0.0], (40, 1)), np.eye(2)
    data = Embeddings(image, text, target=[0, 0, 0, 1] * 10)
    predictor = ViLUPlus(**QUICK).fit(data)
    assert predictor.notes_["pool"] == [1.0]
    assert predictor.held_out_ is None
    assert len(set(predictor.predict_uncertainty(data).tolist())) == 1


@pytest.mark.parametrize(
    ("n", "fits"), [(200, [160] * 5 + [200]), (1_000, [800] * 2 + [1_000]), (1_400, [1_120, 1_400])]
)
def test_no_more_folds_are_fitted_than_the_pool_needs(
    monkeypatch: pytest.MonkeyPatch, n: int, fits: list[int]
) -> None:
    sizes = []
    fit_experts = ViLUPlus._fit_experts

    def count_rows(predictor, rows, *arguments, **settings):
        sizes.append(len(rows.index))
        return fit_experts(predictor, rows, *arguments, **settings)

    monkeypatch.setattr(ViLUPlus, "_fit_experts", count_rows)
    ViLUPlus(**QUICK).fit(toy_embeddings(n=n, k=4, d=8))
    assert sizes == fits


def test_with_a_validation_set_experts_are_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    fit_experts = ViLUPlus._fit_experts

    def count_rows(predictor, rows, *arguments, **settings):
        sizes.append(len(rows.index))
        return fit_experts(predictor, rows, *arguments, **settings)

    monkeypatch.setattr(ViLUPlus, "_fit_experts", count_rows)
    ViLUPlus(**QUICK).fit(
        toy_embeddings(n=300, k=4, d=8), toy_embeddings(n=200, k=4, d=8, seed=3, ids_from=500)
    )
    assert sizes == [300]


def test_probabilities_are_calibrated(data: Embeddings) -> None:
    test = toy_embeddings(n=2000, k=4, d=8, seed=5)
    predictor = ViLUPlus(**QUICK).fit(data)
    failure = torch.cat([batch.failure for batch in test.batches(512)]).numpy()
    probability = predictor.predict_failure_probability(test)
    # The pool was fitted on 200 rows. A rate near 0.2 over 200 rows has a standard error of 0.028,
    # and three of these are 0.085.
    assert probability.mean() == pytest.approx(failure.mean(), abs=0.085)


def test_captions_have_the_attention_alone(tmp_path) -> None:
    predictor = ViLUPlus(**QUICK).fit(toy_pairs())
    assert list(predictor.experts.companions) == []
    test = toy_pairs(seed=1)
    predictor.save(tmp_path)
    assert np.array_equal(
        vilu.load(tmp_path).predict_uncertainty(test), predictor.predict_uncertainty(test)
    )


def test_features_are_named_and_needed_again(data: Embeddings, tmp_path) -> None:
    bare = variant(data, columns=None)
    with_features, without = (
        ViLUPlus(**QUICK).fit(data),
        ViLUPlus(features=False, **QUICK).fit(data),
    )
    assert (with_features.label, without.label) == ("vilu_plus (features)", "vilu_plus")
    assert np.array_equal(
        ViLUPlus(**QUICK).fit(bare).predict_uncertainty(data), without.predict_uncertainty(data)
    )
    with pytest.raises(DataError, match="needs the column 'features'"):
        with_features.predict_uncertainty(bare)
    with_features.save(tmp_path)
    loaded = vilu.load(tmp_path)
    assert loaded.label == "vilu_plus (features)"
    assert np.array_equal(loaded.predict_uncertainty(data), with_features.predict_uncertainty(data))


def test_validation_rows_weigh_the_pool(data: Embeddings) -> None:
    validation = toy_embeddings(n=150, k=4, d=8, seed=3, ids_from=5000)
    chosen = ViLUPlus(**QUICK).fit(data, validation)
    assert chosen.notes_["pool"] != ViLUPlus(**QUICK).fit(data).notes_["pool"]
    # The pool used these rows, although no weights were learned from them.
    assert len(chosen.seen(validation)) == len(validation)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("superset", "3 of the 7"), ("disjoint", "3 of the 3"), ("captions", "32 of the 32")],
)
def test_validation_rows_of_unknown_classes_are_refused_before_the_fit(
    kind: str, found: str, data: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ViLUPlus, "_fit_experts", lambda *_: pytest.fail("it was fitted"))
    bare, new = variant(data, columns=None), toy_embeddings(n=150, k=4, d=8, seed=3, ids_from=5000)
    # The first four texts are the training classes.
    text = toy_embeddings(n=1, k=7, d=8).text[4 if kind == "disjoint" else 0 :]
    validation = (
        toy_pairs(d=8)
        if kind == "captions"
        else Embeddings(new.image, text, target=new.target % 3, logit_scale=20.0)
    )
    with pytest.raises(
        DataError, match=f"the 4 training classes.* {found} candidates of the validation set"
    ):
        ViLUPlus(**QUICK).fit(bare, validation)


def test_validation_rows_may_have_fewer_classes_in_another_order(data: Embeddings) -> None:
    bare, new = variant(data, columns=None), toy_embeddings(n=150, k=4, d=8, seed=3, ids_from=5000)
    rows, order = new.target != 1, torch.tensor([3, 0, 2])
    target = (new.target[rows][:, None] == order).int().argmax(dim=1)
    fit = ViLUPlus(**QUICK).fit(
        bare, Embeddings(new.image[rows], new.text[order], target=target, logit_scale=20.0)
    )
    assert len(fit.notes_["pool"]) == 3
    assert np.isfinite(fit.predict_uncertainty(bare)).all()
