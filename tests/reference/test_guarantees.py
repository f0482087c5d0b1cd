"""Test each guarantee over many simulated calibrations, and compare the coverage with MAPIE."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import special, stats

import vilu
from vilu.calibration.thresholds import PROCEDURES, conformal_risk_control, coverage_first
from vilu.metrics.counts import tie_counts
from vilu.outcomes.outcomes import Outcomes

N_DRAWS = 2000
DELTA = 0.1


class Smooth:
    """Simulate scores u ~ Beta(1/2, 3/2), where an answer is wrong with probability u."""

    exact = True

    def draw(self, rng: np.random.Generator, n: int):
        u = rng.beta(0.5, 1.5, n)
        return u, (rng.random(n) < u).astype(int)

    def coverage(self, t):
        return stats.beta.cdf(t, 0.5, 1.5)

    def risk(self, t):
        return (
            0.25 * stats.beta.cdf(t, 1.5, 1.5) / stats.beta.cdf(t, 0.5, 1.5)
        )  # E[u; u <= t] = E[u] P(Beta(3/2, 3/2) <= t)


class Steep:
    """Simulate a strong predictor with uniform scores u.

    The error rate is 1.5 % up to a cliff at u = 0.6.
    """

    def draw(self, rng: np.random.Generator, n: int):
        u = rng.random(n)
        return u, (rng.random(n) < self.rate(u)).astype(int)

    def rate(self, u):
        return 0.015 + 0.98 * special.expit(12 * (u - 0.6))

    def coverage(self, t):
        return np.asarray(t, dtype=float)

    def risk(self, t):
        integral = 0.015 * t + 0.98 / 12 * (np.logaddexp(0, 12 * (t - 0.6)) - np.logaddexp(0, -7.2))
        return integral / t


class Tied:
    """Simulate eleven scores whose error rates rise, fall and rise.

    There are ties and atoms, and the risk is not monotone.
    """

    value = np.arange(11) / 10
    mass = np.array([0.2, 0.15, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05])
    wrong = np.array([0.01, 0.06, 0.02, 0.08, 0.03, 0.15, 0.2, 0.4, 0.1, 0.7, 0.9])

    def draw(self, rng: np.random.Generator, n: int):
        score = rng.choice(11, size=n, p=self.mass)
        return self.value[score], (rng.random(n) < self.wrong[score]).astype(int)

    def coverage(self, t):
        return np.cumsum(self.mass)[np.rint(np.asarray(t) * 10).astype(int)]

    def risk(self, t):
        place = np.rint(np.asarray(t) * 10).astype(int)
        return (np.cumsum(self.mass * self.wrong) / np.cumsum(self.mass))[place]


class Flat:
    """Simulate an error rate just above the target everywhere, so every certificate is wrong."""

    def draw(self, rng: np.random.Generator, n: int):
        return rng.random(n), (rng.random(n) < 0.1001).astype(int)

    def coverage(self, t):
        return np.asarray(t, dtype=float)

    def risk(self, t):
        return np.full(np.shape(t), 0.1001)


class Mistakes:
    """Simulate confident mistakes.

    Half the 4 % most trusted answers are wrong, one in a hundred in the next 60 %, and half the
    rest.
    """

    edge = np.array([0.0, 0.04, 0.64, 1.0])
    rate = np.array([0.5, 0.01, 0.5])

    def draw(self, rng: np.random.Generator, n: int):
        u = rng.random(n)
        return u, (
            rng.random(n) < self.rate[np.searchsorted(self.edge[1:-1], u, side="right")]
        ).astype(int)

    def coverage(self, t):
        return np.asarray(t, dtype=float)

    def risk(self, t):
        wrong = np.concatenate([[0.0], np.cumsum(self.rate * np.diff(self.edge))])
        return np.interp(t, self.edge, wrong) / t


WORLDS = {"smooth": Smooth(), "steep": Steep(), "tied": Tied()}


def interval(world, point) -> tuple[float, float]:
    """Return coverage and risk for the scores between both ends of a certified interval."""
    t = point.threshold
    coverage, risk = float(world.coverage(t)), float(world.risk(t))
    if point.floor is None:
        return coverage, risk
    below = float(world.coverage(point.floor))
    wrong = coverage * risk - below * float(world.risk(point.floor))
    return coverage - below, wrong / (coverage - below)


def thresholds(world, method, n: int, target: float, seed: int, n_draws: int = N_DRAWS):
    """Return coverage, risk and guaranteed bound, shape (3, M).

    There is one column for each draw in which something is accepted.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_draws):
        counts = tie_counts(*world.draw(rng, n))
        point = method(counts, target, DELTA)
        if point is not None:
            found.append((*interval(world, point), point.risk_bound))
    return np.array(found).reshape(-1, 3).T


@pytest.mark.slow
@pytest.mark.parametrize("n", [24, 45, 150, 1000])
@pytest.mark.parametrize("name", list(WORLDS))
def test_the_guaranteed_risk_holds(name: str, n: int) -> None:
    world = WORLDS[name]
    found, risk, bound = thresholds(world, PROCEDURES["ltt"], n, 0.1, seed=n)
    violated = np.count_nonzero(risk > bound + 1e-12)
    assert violated / N_DRAWS <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / N_DRAWS)
    if n == 1000:
        assert len(found) > 0.9 * N_DRAWS  # so the rule does not hold by accepting nothing


@pytest.mark.parametrize("n", [24, 45, 150, 600])
def test_what_cannot_be_guaranteed_is_rarely_guaranteed(n: int) -> None:
    """At the edge of the target every certificate is wrong.

    Certificates must be as rare as allowed.
    """
    found, *_ = thresholds(Flat(), PROCEDURES["ltt"], n, 0.1, seed=n)
    assert len(found) / N_DRAWS <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / N_DRAWS)
    assert len(found) > 0.02 * N_DRAWS  # so the bound above tests something


@pytest.mark.parametrize(("n", "draws", "least"), [(2000, 300, 0.35), (10_000, 60, 0.60)])
def test_confident_mistakes_do_not_destroy_a_guarantee(n: int, draws: int, least: float) -> None:
    """The best threshold accepts 65 %, and must be found.

    A sequence that begins among the mistakes would end there.
    """
    world = Mistakes()
    found, risk, bound = thresholds(world, PROCEDURES["ltt"], n, 0.05, seed=n, n_draws=draws)
    assert found.sum() / draws >= least
    assert np.mean(risk > bound) * len(found) / draws <= DELTA + 3 * np.sqrt(
        DELTA * (1 - DELTA) / draws
    )


def test_at_the_edge_above_a_floor_little_is_guaranteed() -> None:
    """Certificates must be rare if only floors could certify, and would be wrong.

    The first 4 % are all wrong, and then the error rate is just above the target.
    """

    class Behind(Flat):
        def draw(self, rng: np.random.Generator, n: int):
            u, f = super().draw(rng, n)
            return u, np.where(u < 0.04, 1, f)

    certified = sum(PROCEDURES["ltt"](tie_counts(*Behind().draw(rng, 600)), 0.1, DELTA) is not None
                    for rng in np.random.default_rng(1).spawn(N_DRAWS))  # fmt: skip
    level = 0.04 * DELTA
    assert certified / N_DRAWS <= level + 3 * np.sqrt(level * (1 - level) / N_DRAWS)


def test_the_guarantees_of_several_groups_hold_at_once() -> None:
    """Check two groups at the edge and a small rest.

    ``certify`` chooses the pooling from the group sizes.
    """
    rng, broken, given, draws = np.random.default_rng(3), 0, 0, 800
    sizes = {"a": 150, "b": 90, "c": 20, "d": 25}
    groups = np.repeat(list(sizes), list(sizes.values())).tolist()
    for _ in range(draws):
        u, f = Flat().draw(rng, len(groups))
        selector = vilu.certify(Outcomes(u, f), max_risk=0.1, confidence=1 - DELTA, groups=groups)
        given += len(selector.thresholds)
        broken += selector.feasible  # any certificate breaks its guarantee
    assert given == 3 * draws
    assert 0.03 < broken / draws <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / draws)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WORLDS))
def test_coverage_and_risk_hold_together(name: str) -> None:
    world = WORLDS[name]
    found, risk, bound = thresholds(world, coverage_first, 200, 0.4, seed=5)
    assert len(found) == N_DRAWS
    violated = np.mean((found < 0.4 - 1e-12) | (risk > bound + 1e-12))
    assert violated <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / N_DRAWS)


@pytest.mark.parametrize("name", list(WORLDS))
def test_the_mean_joint_risk_is_controlled_and_used_up(name: str) -> None:
    world, target, n = WORLDS[name], 0.05, 200
    found, risk, _ = thresholds(world, conformal_risk_control, n, target, seed=7, n_draws=800)
    joint = np.zeros(800)
    joint[: len(found)] = risk * found
    error = joint.std() / np.sqrt(len(joint))
    assert joint.mean() <= target + 3 * error
    if name != "tied":  # in "tied" one step in the loss is larger than the slack
        # A monotone loss with bound one has this known slack.
        assert joint.mean() >= target - 2 / (n + 1) - 3 * error


def certified_by_mapie(u, f, risk: float, delta: float, fwer: str):
    """Return MAPIE's threshold on the confidence 1 - u as a threshold on u.

    Return None if MAPIE certifies nothing.
    """
    from mapie.risk_control import BinaryClassificationController

    controller = BinaryClassificationController(
        predict_function=lambda confidence: np.stack([1 - confidence, confidence], axis=1),
        risk="precision",
        target_level=1 - risk,
        confidence_level=1 - delta,
        list_predict_params=np.linspace(0.95, 0, 96),
        fwer_method=fwer,
    )
    with warnings.catch_warnings():
        # MAPIE warns about fixed sequences, and if it finds nothing.
        warnings.simplefilter("ignore")
        controller.calibrate(1 - u, 1 - f)
    valid = np.asarray(controller.valid_predict_params)
    return None if not len(valid) else 1 - valid.min()


@pytest.mark.slow
@pytest.mark.parametrize("n", [150, 1000])
@pytest.mark.parametrize("name", list(WORLDS))
def test_as_much_is_accepted_as_by_mapie(name: str, n: int) -> None:
    """The mean coverage must reach MAPIE's best procedure, which is known only afterwards, per
    setting.
    """
    world, rng, risk, draws = WORLDS[name], np.random.default_rng(11), 0.1, 40
    ours, theirs = [], {fwer: [] for fwer in ("bonferroni", "bonferroni_holm", "fixed_sequence")}
    for _ in range(draws):
        u, f = world.draw(rng, n)
        counts = tie_counts(u, f)
        point = PROCEDURES["ltt"](counts, risk, DELTA)
        ours.append(0.0 if point is None else interval(world, point)[0])
        for fwer, coverages in theirs.items():
            limit = certified_by_mapie(u, f, risk, DELTA, fwer)
            inside = u[u <= limit + 1e-9] if limit is not None else u[:0]
            coverages.append(float(world.coverage(inside.max())) if len(inside) else 0.0)
    best = max(np.mean(coverages) for coverages in theirs.values())
    assert np.mean(ours) >= best - 0.03
