"""Test BayesVLM against autograd, dense Kronecker products, Monte Carlo, grids and a plain NumPy
version.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian, jacobian

import vilu
from tests.conftest import in_memory, toy_embeddings, toy_pairs, variant
from vilu.embeddings.memory import Embeddings, PairEmbeddings
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu_bench.methods import bayesvlm
from vilu_bench.methods.bayesvlm import (
    BayesVLM,
    CurvatureFactors,
    Layer,
    LayerPosterior,
    best_prior_precision,
    cosine_moments,
    curvature_factors,
    log_evidence,
)

FEATURES = ("features", "text_features", "image_projection", "text_projection")


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def semidefinite(n: int, rank: int, seed: int) -> torch.Tensor:
    root = draw(n, rank, seed=seed)
    return root @ root.T


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def only(data: Embeddings, names: tuple[str, ...]) -> Embeddings:
    return variant(
        data, columns={name: data.column(name, torch.arange(len(data))) for name in names}
    )


# --- moments of the cosine
# ---------------------------------------------------------------------------------------


def sampled(spread: float) -> tuple[torch.Tensor, ...]:
    g, h = draw(1, 6, seed=1), draw(1, 6, seed=2)
    g_variance, h_variance = (
        spread * draw(1, 6, seed=3).square(),
        spread * draw(1, 6, seed=4).square(),
    )
    n = 100_000
    g_draws, h_draws = (
        g + g_variance.sqrt() * draw(n, 6, seed=5),
        h + h_variance.sqrt() * draw(n, 6, seed=6),
    )
    return g, g_variance, h, h_variance, g_draws, h_draws


def test_cosine_moments_against_monte_carlo() -> None:
    g, g_variance, h, h_variance, g_draws, h_draws = sampled(0.3)
    mean, variance = cosine_moments(g, g_variance, h, h_variance)
    expected_norms = ((g**2 + g_variance).sum() * (h**2 + h_variance).sum()).sqrt()
    cosine = (g_draws * h_draws).sum(1) / expected_norms
    centred = cosine - cosine.mean()
    mean_error = cosine.std() / math.sqrt(len(cosine))
    variance_error = ((centred**4).mean() - centred.var() ** 2).sqrt() / math.sqrt(len(cosine))
    assert abs(float(mean) - float(cosine.mean())) < 4 * float(mean_error)
    assert abs(float(variance) - float(centred.var())) < 4 * float(variance_error)


def test_the_expected_norm_stands_in_for_the_norm() -> None:
    """The mean's bias must stay within a bound.

    The second derivatives of a cosine in g are at most 3 / ‖g‖², and give this bound.
    """
    g, g_variance, h, h_variance, g_draws, h_draws = sampled(0.01)
    cosine = torch.nn.functional.cosine_similarity(g_draws, h_draws)
    bound = 2 * float(g_variance.sum() / g.square().sum() + h_variance.sum() / h.square().sum())
    mean, _ = cosine_moments(g, g_variance, h, h_variance)
    assert abs(float(mean) - float(cosine.mean())) < bound + 4 * float(cosine.std()) / math.sqrt(
        len(cosine)
    )
    assert float(cosine_moments(g, 0 * g, h, 0 * h)[0]) == pytest.approx(
        float(torch.nn.functional.cosine_similarity(g, h)), abs=1e-12
    )


# --- curvature
# -------------------------------------------------------------------------------------------------

SCALE, BIAS = 7.0, -2.0
CANDIDATES = torch.nn.functional.normalize(draw(7, 5, seed=9), dim=1)


def logits_of(g: torch.Tensor) -> torch.Tensor:
    return SCALE * CANDIDATES @ (g / g.norm()) + BIAS


def infonce(logits: torch.Tensor) -> torch.Tensor:
    return logits.logsumexp(0) - logits[2]


def siglip(logits: torch.Tensor) -> torch.Tensor:
    sign = torch.tensor([1.0 if j == 2 else -1.0 for j in range(len(logits))], dtype=logits.dtype)
    return torch.nn.functional.softplus(-sign * logits).sum()


@pytest.mark.parametrize(("name", "loss"), [("infonce", infonce), ("siglip", siglip)])
def test_output_factor_against_autograd(name: str, loss) -> None:
    """The factor must equal the Gauss-Newton matrix.

    Autograd computes the logits' Jacobian in g and the loss's Hessian in the logits.
    """
    g, phi, count = (
        draw(4, 5, seed=10) * 3,
        draw(4, 3, seed=11),
        torch.tensor([1.0, 2.0, 0.0, 1.0]).double(),
    )
    found = curvature_factors(Layer(phi, g, count), CANDIDATES, SCALE, BIAS, name, block_rows=2)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for row, times in zip(g, count, strict=True):
        slope = jacobian(logits_of, row)
        expected += times * slope.T @ hessian(loss, logits_of(row)) @ slope
    assert torch.allclose(found.outputs, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.inputs, torch.einsum("n,nf,ng->fg", count, phi, phi))
    assert found.n == 4


def test_output_factor_is_the_fisher_information() -> None:
    """The factor must equal the gradient's expected outer product under the model's own answers.

    The answers come from a softmax, or from K independent coins.
    """
    g = draw(5, seed=12)
    layer = Layer(g[None], g[None], torch.ones(1).double())
    slope = jacobian(logits_of, g)
    p = logits_of(g).softmax(0)
    gradients = jacobian(lambda x: logits_of(x).log_softmax(0), g)
    fisher = torch.einsum("k,kd,ke->de", p, gradients, gradients)
    assert torch.allclose(
        curvature_factors(layer, CANDIDATES, SCALE, BIAS, "infonce").outputs, fisher, rtol=1e-9
    )
    sigma = logits_of(g).sigmoid()
    coins = sigma * (1 - sigma) ** 2 + (1 - sigma) * sigma**2
    fisher = torch.einsum("k,kd,ke->de", coins, slope, slope)
    assert torch.allclose(
        curvature_factors(layer, CANDIDATES, SCALE, BIAS, "siglip").outputs, fisher, rtol=1e-9
    )


# --- evidence
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_prior", [-3.0, 0.5, 4.0])
def test_evidence_against_a_dense_kronecker_product(log_prior: float) -> None:
    a, b, squared_norm = semidefinite(4, 2, 1), semidefinite(3, 3, 2), 5.0
    root = math.exp(log_prior / 2)
    dense = torch.kron(a + root * eye(4), b + root * eye(3))
    expected = (
        6 * log_prior - math.exp(log_prior) * squared_norm / 2 - float(torch.logdet(dense)) / 2
    )
    spectra = torch.linalg.eigvalsh(a).clamp_min(0), torch.linalg.eigvalsh(b)
    assert log_evidence(log_prior, *spectra, squared_norm) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(4, 6), (2, 1), (1, 0)])
def test_prior_precision_against_a_grid(rank_a: int, rank_b: int) -> None:
    a = torch.linalg.eigvalsh(semidefinite(4, rank_a, 1)).clamp_min(0) * 30
    b = torch.linalg.eigvalsh(semidefinite(6, rank_b, 2)).clamp_min(0)
    grid = np.linspace(-30, 10, 40_001)
    values = np.array([log_evidence(x, a, b, 5.0) for x in grid[::40]])
    assert (np.diff(values, 2) < 1e-9).all()  # concave, so there is one maximum
    near = grid[max(np.argmax(values) - 1, 0) * 40 : (np.argmax(values) + 1) * 40 + 1]
    best = near[np.argmax([log_evidence(x, a, b, 5.0) for x in near])]
    # The tolerance is two grid steps.
    assert math.log(best_prior_precision(a, b, 5.0)) == pytest.approx(best, abs=2e-3)


def test_posterior_variance_against_the_dense_covariance() -> None:
    found = CurvatureFactors(semidefinite(4, 4, 3), semidefinite(3, 2, 4), 50)
    learned, prior = bayesvlm.layer_posterior(found, squared_norm=6.0, pseudo_count=10.0)
    a, b = (math.sqrt(10 / 50) * factor for factor in (found.inputs, found.outputs))
    precision = torch.kron(a + math.sqrt(prior) * eye(4), b + math.sqrt(prior) * eye(3))
    covariance = torch.linalg.inv(precision).reshape(4, 3, 4, 3)
    phi = draw(5, 4, seed=7)
    expected = torch.einsum("nf,fdgd,ng->nd", phi, covariance, phi)
    assert torch.allclose(learned.variance(phi), expected, rtol=1e-9)


def test_variance_shrinks_with_more_data() -> None:
    sums = semidefinite(4, 4, 3), semidefinite(3, 3, 4)
    variances = []
    for times in (1, 4, 16):
        learned, _ = bayesvlm.layer_posterior(
            CurvatureFactors(times * sums[0], times * sums[1], 20 * times), 6.0, 10.0
        )
        variances.append(float(learned.variance(draw(5, 4, seed=7)).mean()))
    assert variances[0] > variances[1] > variances[2]
    rows = torch.arange(60)
    few, many = (
        BayesVLM().fit(data) for data in (in_memory(toy_embeddings(), rows), toy_embeddings())
    )
    z = toy_embeddings(seed=1).column("features", rows).double()
    few_variance, many_variance = (
        float(
            LayerPosterior(p.learned_["image_inputs"], p.learned_["image_outputs"])
            .variance(z)
            .mean()
        )
        for p in (few, many)
    )
    assert many_variance < few_variance


# --- the whole
# -------------------------------------------------------------------------------------------------


def plain(phi, g, candidates, scale, bias, siglip):
    """Return the sums for the input and output factors, row by row as in the formulas."""
    f, d = phi.shape[1], g.shape[1]
    inputs, outputs = np.zeros((f, f)), np.zeros((d, d))
    for x, y in zip(phi, g, strict=True):
        norm = np.linalg.norm(y)
        jacobian = np.eye(d) / norm - np.outer(y, y) / norm**3
        logits = scale * candidates @ y / norm + bias
        if siglip:
            p = 1 / (1 + np.exp(-logits))
            middle = candidates.T @ np.diag(p * (1 - p)) @ candidates
        else:
            p = np.exp(logits - logits.max())
            p /= p.sum()
            middle = candidates.T @ (np.diag(p) - np.outer(p, p)) @ candidates
        inputs += np.outer(x, x)
        outputs += scale**2 * jacobian @ middle @ jacobian
    return inputs, outputs


def plain_uncertainty(train, test, *, siglip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays over the test rows, computed in NumPy.

    The first is the uncertainty of the VLM's own answer, the second the posterior's answer.
    """
    sums = {"image": [], "text": []}
    n = 0
    for batch in train.batches(10_000, columns=FEATURES):
        c = {name: value.double().numpy() for name, value in batch.columns.items()}
        g, h = c["features"] @ c["image_projection"].T, c["text_features"] @ c["text_projection"].T
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (g, h)]
        own = batch.target.numpy()
        logit = (batch.logit_scale, batch.logit_bias, siglip)
        sums["image"].append(plain(c["features"], g, unit[1], *logit))
        sums["text"].append(plain(c["text_features"][own], h[own], unit[0], *logit))
        n += len(own)
    precision, projections = {}, {"image": c["image_projection"], "text": c["text_projection"]}
    for side, parts in sums.items():
        a, b = (math.sqrt(10 / n) * np.sum(factor, axis=0) for factor in zip(*parts, strict=True))
        spectra = (torch.from_numpy(np.linalg.eigvalsh(factor)).clamp_min(0) for factor in (a, b))
        root = math.sqrt(best_prior_precision(*spectra, float((projections[side] ** 2).sum())))
        precision[side] = (a + root * np.eye(len(a)), b + root * np.eye(len(b)))
    scores, answers = [], []
    for batch in test.batches(10_000, columns=FEATURES):
        c = {name: value.double().numpy() for name, value in batch.columns.items()}
        for row, answer in enumerate(batch.prediction.tolist()):
            logits = []
            for text in range(len(batch.text)):
                moments = []
                for side, phi in (
                    ("image", c["features"][row]),
                    ("text", c["text_features"][text]),
                ):
                    a, b = precision[side]
                    mean = projections[side] @ phi
                    moments += [mean, phi @ np.linalg.solve(a, phi) * np.diag(np.linalg.inv(b))]
                g, s, h, t = moments
                norms = ((g**2 + s).sum()) * ((h**2 + t).sum())
                mean = batch.logit_scale * g @ h / math.sqrt(norms) + batch.logit_bias
                variance = batch.logit_scale**2 * ((g**2 + s) * t + s * h**2).sum() / norms
                logits.append(mean / math.sqrt(1 + math.pi * variance / 8))
            p = np.exp(np.array(logits) - max(logits))
            scores.append(1 - p[answer] / p.sum())
            answers.append(int(np.argmax(p)))
    return np.array(scores), np.array(answers)


def unlike_sides(data):
    """Return the ids and columns of ``data``.

    The text features have another width than the image features.
    """
    columns = {name: data.column(name, torch.arange(len(data))) for name in FEATURES}
    wide = draw(16, 20, seed=5).float()
    columns |= {"text_projection": wide, "text_features": 4 * data.text @ torch.linalg.pinv(wide).T}
    return {"ids": data.ids, "columns": columns}


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_scores_against_the_formulas_on_labelled_rows(loss: str) -> None:
    data = [toy_embeddings(n=150, seed=seed, ids_from=200 * seed) for seed in (0, 1)]
    # Class 4 has no images.
    data[0] = in_memory(data[0], (data[0].target != 4).nonzero().squeeze(1))
    train, test = (
        variant(d, space=EmbeddingSpace(16, 20.0, -3.0), **unlike_sides(d)) for d in data
    )
    predictor = BayesVLM(loss=loss).fit(train)
    expected, answers = plain_uncertainty(train, test, siglip=loss == "siglip")
    # Float32 logits near 20 are off by 1e-5.
    assert np.allclose(predictor.predict_uncertainty(test), expected, atol=1e-4)
    changed = answers != next(test.batches(1000)).prediction.numpy()
    # If the posterior answers otherwise, the VLM's answer is still scored.
    assert changed.any() == (loss == "infonce")
    assert (expected[changed] > 0.5).all()


def test_scores_against_the_formulas_on_captions() -> None:
    def pairs(seed: int) -> PairEmbeddings:
        data = toy_pairs(n=64, pool=16, seed=seed)
        text = data.text.clone()
        text[3], text[20] = text[1], text[19]  # two captions in a pool are equal
        features = {name: data.column(name, torch.arange(64)) for name in FEATURES}
        features["text_features"] = torch.linalg.solve(features["text_projection"], text.T).T
        return PairEmbeddings(data.image, text, 16, 20.0, columns=features)

    predictor = BayesVLM().fit(pairs(0))
    expected, _ = plain_uncertainty(pairs(0), pairs(1), siglip=False)
    assert np.allclose(predictor.predict_uncertainty(pairs(1)), expected, atol=1e-4)


def test_identity_as_last_layer_is_the_fit_from_embeddings_alone(
    train: Embeddings, test: Embeddings
) -> None:
    def identity(data: Embeddings) -> Embeddings:
        columns = {"features": data.image, "text_features": data.text}
        return variant(
            data,
            columns=columns | dict.fromkeys(("image_projection", "text_projection"), torch.eye(16)),
        )

    model, embeddings = BayesVLM().fit(identity(train)), BayesVLM(mode="embeddings").fit(train)
    assert (model.label, embeddings.label) == ("bayesvlm (model)", "bayesvlm (embeddings-only)")
    assert np.allclose(
        model.predict_uncertainty(identity(test)),
        embeddings.predict_uncertainty(test),
        rtol=1e-6,
        atol=1e-9,
    )


def test_chunks_change_only_which_images_compete_for_a_text(train: Embeddings) -> None:
    whole, parts = BayesVLM().fit(train), BayesVLM(chunk=64).fit(train)
    for name in ("image_inputs", "image_outputs", "text_inputs"):
        assert torch.allclose(whole.learned_[name], parts.learned_[name], rtol=0.05, atol=1e-3), (
            name
        )
    # The images' factors are sums over rows. So these factors and their prior do not depend on the
    # chunks.
    assert float(whole.learned_["image_prior"]) == pytest.approx(
        float(parts.learned_["image_prior"]), rel=1e-6
    )
    assert not torch.equal(whole.learned_["text_outputs"], parts.learned_["text_outputs"])


# --- the two kinds of fit
# ----------------------------------------------------------------------------------------


def test_every_result_says_which_fit_it_is(train: Embeddings, test: Embeddings, tmp_path) -> None:
    assert BayesVLM().label == "bayesvlm"
    for mode, names, label in [
        ("auto", FEATURES, "bayesvlm (model)"),
        ("auto", FEATURES[:2], "bayesvlm (embeddings-only)"),
        ("embeddings", FEATURES, "bayesvlm (embeddings-only)"),
    ]:
        predictor = BayesVLM(mode=mode).fit(only(train, names))
        predictor.save(tmp_path)
        outcomes = vilu.score(vilu.load(tmp_path), test)
        assert outcomes.method == label
        assert {row.method for row in vilu.evaluate(outcomes, n_resamples=0)} == {label}
    assert vilu.score(vilu.MCM(), test).method == "mcm"


def test_the_kind_of_fit_is_chosen_anew_by_every_fit(train: Embeddings, test: Embeddings) -> None:
    predictor = BayesVLM().fit(train)
    with pytest.raises(
        DataError, match=r"needs the column 'features'. Make it with `vilu embed --features`"
    ):
        predictor.predict_uncertainty(only(test, FEATURES[1:]))
    assert predictor.fit(only(train, ())).label == "bayesvlm (embeddings-only)"
    assert np.isfinite(predictor.predict_uncertainty(only(test, ()))).all()


def test_a_model_is_refused_without_its_columns(train: Embeddings) -> None:
    for missing in FEATURES:
        there = tuple(name for name in FEATURES if name != missing)
        with pytest.raises(DataError, match=f"needs the column '{missing}'"):
            BayesVLM(mode="model").fit(only(train, there))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "features",
            draw(600, 16).float(),
            r"'features' times 'image_projection' must be the embeddings",
        ),
        (
            "features",
            draw(600, 9).float(),
            r"'image_projection' must map 'features' .* shape \(16, 9\)",
        ),
        (
            "text_features",
            torch.zeros(5, 16),
            r"'text_features' times 'text_projection' must be the embeddings",
        ),
    ],
)
def test_columns_of_another_model_are_refused(
    train: Embeddings, column: str, values, message: str
) -> None:
    columns = {name: train.column(name, torch.arange(600)) for name in FEATURES} | {column: values}
    with pytest.raises(DataError, match=message):
        BayesVLM().fit(variant(train, columns=columns))
