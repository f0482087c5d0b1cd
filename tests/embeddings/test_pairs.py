"""Test pools of captions: which captions are one answer, which rows form a pool, and blocks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import vilu
from tests.conftest import toy_columns
from tests.contract.test_predictors import everything_set, make
from tests.embeddings.test_similarity import noisy, unit
from vilu import PREDICTORS
from vilu.embeddings import pairs
from vilu.embeddings.memory import PairEmbeddings
from vilu.embeddings.pairs import Pools, group_leaders, hard_pool_order, require_full_pools
from vilu.errors import DataError, UsageError

SCORING = [name for name, cls in PREDICTORS.items() if cls.no_captions is None]
BOTH = pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])


def pool_of(
    pools: Pools, n: int = 96, distinct: int = 60, d: int = 16, seed: int = 0
) -> PairEmbeddings:
    """Return pairs where some captions occur more than once, each time with another picture."""
    rng = np.random.default_rng(seed)
    text = unit(distinct, d, seed)[torch.from_numpy(rng.integers(distinct, size=n))]
    image = noisy(text, n, seed + 1)
    roles = (image, text) if pools.direction == "image_to_text" else (text, image)
    return PairEmbeddings(
        image, text, pools, 20.0, columns=toy_columns(*(rows.numpy() for rows in roles), rng)
    )


def greedy(rows: Tensor, cosine: float) -> list[int]:
    """Return the first similar row for every row, one row after the other, in float64."""
    similar = (rows.double() @ rows.double().T).tolist()
    kept: list[int] = []
    first = []
    for i in range(len(rows)):
        near = [k for k in kept if similar[i][k] >= cosine or torch.equal(rows[i], rows[k])]
        first.append(near[0] if near else i)
        kept += [] if near else [i]
    return first


def test_equal_captions_are_one_candidate_of_an_image() -> None:
    text = torch.eye(5)[[2, 0, 2, 1, 0, 4]]
    (batch,) = PairEmbeddings(text, text, Pools(6, seed=None)).batches(10)
    assert torch.equal(batch.text, torch.eye(5)[[2, 0, 1, 4]])
    assert batch.target.tolist() == [0, 1, 0, 2, 1, 3]
    assert batch.matches is None
    assert batch.failure.tolist() == [0] * 6


def test_any_image_of_an_equal_caption_is_right() -> None:
    text = torch.eye(4)[[0, 1, 0, 2]]
    image = torch.eye(4)[
        [1, 1, 0, 2]
    ]  # the first picture shows the second caption, and the third picture the first caption
    (batch,) = PairEmbeddings(image, text, Pools(4, "text_to_image", seed=None)).batches(10)
    assert torch.equal(batch.image, text)
    assert torch.equal(batch.text, image)
    assert batch.target.tolist() == [0, 1, 2, 3]
    # rows 0 and 2 have one caption, rows 0 and 1 one picture
    assert batch.right.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert batch.prediction.tolist() == [2, 0, 2, 3]
    assert batch.failure.tolist() == [0, 0, 0, 0]


@BOTH
@pytest.mark.parametrize("near", [None, 0.8])
def test_failures_by_brute_force(direction: str, near: float | None) -> None:
    data = pool_of(Pools(32, direction, near_duplicates=near))
    n_wrong = 0
    for batch in data.batches(1000):
        image, text = data.image[batch.index], data.text[batch.index]
        answer = greedy(text, 2.0 if near is None else near)
        for row in range(len(batch.index)):
            if direction == "image_to_text":
                best = max(
                    range(32), key=lambda j: float(image[row].double() @ text[answer[j]].double())
                )
            else:
                best = max(range(32), key=lambda j: float(text[row].double() @ image[j].double()))
            wrong = int(answer[best] != answer[row])
            assert int(batch.failure[row]) == wrong
            n_wrong += wrong
        if direction == "image_to_text":
            assert len(batch.text) == len(set(answer)) < 32
    assert 0 < n_wrong < 96


@BOTH
@pytest.mark.parametrize("n", [96, 109])
def test_images_with_several_captions_by_brute_force(direction: str, n: int) -> None:
    """An answer is right if a row in the pool has the picture with the caption."""
    rng = np.random.default_rng(3)
    shown, written = rng.integers(40, size=n), rng.integers(70, size=n)
    world = unit(70, 16, 0)
    image, text = noisy(world, 70, 1)[shown], world[written]
    image = torch.nn.functional.normalize(image + 2 * world[shown], dim=1)
    data = PairEmbeddings(image, text, Pools(32, direction), 20.0)  # type: ignore[arg-type]
    assert np.bincount(data.status, minlength=4).tolist() == [96, 0, 0, n - 96]
    failures = 0
    for batches in (data.batches(1000), data.many(1000)):
        for batch in batches:
            rows = batch.index.numpy()
            one_picture = shown[rows, None] == shown[rows]
            one_caption = written[rows, None] == written[rows]
            if direction == "image_to_text":
                query, candidate = image, text
                is_right = one_picture @ one_caption
            else:
                query, candidate = text, image
                is_right = one_caption @ one_picture
            similar = query[rows].double() @ candidate[rows].double().T
            best = similar.argmax(dim=1).numpy()
            right = is_right[np.arange(len(rows)), best]
            assert batch.failure.tolist() == (~right).astype(int).tolist()
            failures += int((~right).sum())
    assert 0 < failures < 192


@BOTH
def test_a_shared_caption_does_not_join_two_images(direction: str) -> None:
    """Image 0 has captions 0 and 1, and image 1 has captions 1 and 2.

    So caption 2 is wrong for image 0.
    """
    image, text = torch.eye(4)[[0, 0, 1, 1]], torch.eye(4)[[0, 1, 1, 2]]
    data = PairEmbeddings(image, text, Pools(4, direction, seed=None), 2.0)  # type: ignore[arg-type]
    (batch,) = data.batches(4)
    if direction == "image_to_text":  # rows are images, and the three captions are candidates
        right = [[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 1]]
        last_answer, failure = [2, 2, 2, 2], [1, 1, 0, 0]
    else:  # rows are captions, and all four images are candidates
        right = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
        last_answer, failure = [3, 3, 3, 3], [1, 0, 0, 0]
    assert batch.right.int().tolist() == right
    judged = batch.judging(torch.tensor(last_answer))
    assert judged.failure.tolist() == failure
    for row in range(4):
        assert judged.rows(slice(row, row + 1)).failure.tolist() == failure[row : row + 1]
    posterior = (2 * batch.image @ batch.text.T).softmax(dim=1)
    expected = (posterior * batch.right).sum(dim=1).log()
    assert torch.allclose(batch.target_log_probability, expected, atol=1e-6)
    assert torch.allclose(batch.log_likelihood(batch.logits), expected, atol=1e-6)


def test_alike_answers_have_an_image_in_common() -> None:
    """Captions 0 and 1 belong to one image, 1 and 2 to another, and 3 to a third."""
    image, text = torch.eye(4)[[0, 0, 1, 1, 2]], torch.eye(4)[[0, 1, 1, 2, 3]]
    (batch,) = PairEmbeddings(image, text, Pools(5, seed=None)).batches(5)
    alike = batch.rows(slice(4)).alike(torch.arange(4))
    assert alike.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_log_probability_of_an_image_with_several_captions() -> None:
    """The probabilities of all its captions are added."""
    image, text = torch.eye(4)[[0, 0, 2, 3]], torch.eye(4)
    (batch,) = PairEmbeddings(image, text, Pools(4, seed=None), 2.0).batches(4)
    assert batch.failure.tolist() == [0, 0, 0, 0]
    probability = batch.log_likelihood(batch.logits).exp()
    e = np.e**2
    assert np.allclose(probability[:2], (e + 1) / (e + 3))
    assert np.allclose(probability[2:], e / (e + 3))


@BOTH
def test_log_probability_of_the_answer_by_brute_force(direction: str) -> None:
    for batch in pool_of(Pools(32, direction)).batches(1000):
        posterior = (20 * batch.image.double() @ batch.text.double().T).softmax(dim=1)
        for row in range(len(batch.target)):
            mass = posterior[row, batch.right[row]].sum().log()
            assert float(batch.target_log_probability[row]) == pytest.approx(float(mass), abs=1e-4)


@pytest.mark.parametrize("cosine", [0.8, 0.9, 0.97])
@pytest.mark.parametrize("block", [1, 7, 64, 1024])
def test_near_duplicates_are_greedy_leaders(cosine: float, block: int) -> None:
    rows = torch.nn.functional.normalize(
        unit(25, 8, 0)[torch.arange(200) % 25] + 0.35 * unit(200, 8, 1), dim=1
    )
    rows[[50, 170]] = rows[[3, 20]]
    expected = greedy(rows, cosine)
    assert group_leaders(rows, cosine, block).tolist() == expected
    assert 10 < len(set(expected)) < 198


def test_likeness_does_not_chain() -> None:
    angles = torch.tensor([0.0, 0.3, 0.6, 0.9, 0.3])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert group_leaders(rows, 0.9).tolist() == [0, 0, 2, 2, 0]  # cos 0.3 = 0.955, cos 0.6 = 0.825


def test_a_cosine_of_one_is_equality() -> None:
    rows = unit(300, 16, 0)
    rows[[5, 250]] = rows[[1, 2]]
    assert torch.equal(group_leaders(rows, 1.0), group_leaders(rows))
    assert group_leaders(rows)[[5, 250]].tolist() == [1, 2]
    assert group_leaders(rows, 1e-9)[0] == 0
    assert group_leaders(rows[:0]).tolist() == group_leaders(rows[:0], 0.9).tolist() == []


@pytest.mark.parametrize(("n", "size"), [(256, 16), (250, 16), (10, 16), (48, 16), (7, 1)])
def test_hard_pools_are_a_permutation_and_alike(n: int, size: int) -> None:
    rows = torch.nn.functional.normalize(
        unit(8, 16, 0)[torch.arange(n) % 8] + 0.7 * unit(n, 16, 1), dim=1
    )
    order = hard_pool_order(rows, size, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, hard_pool_order(rows, size, torch.Generator().manual_seed(0)))
    if n // size > 2 and size > 1:
        chance = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        assert within(rows, order, size) > within(rows, chance, size) + 0.1


def within(rows: Tensor, order: Tensor, size: int) -> float:
    """Return the mean cosine between two rows in one pool."""
    pools = rows[order[: len(order) // size * size]].view(-1, size, rows.shape[1])
    return float(((pools @ pools.mT).sum() / len(pools) - size) / (size * (size - 1)))


def test_hard_pools_fail_more_often() -> None:
    """The captions have 30 subjects.

    A pool with few subjects has more captions that are nearly right.
    """
    text = torch.nn.functional.normalize(
        unit(30, 16, 0)[torch.arange(480) % 30] + 0.3 * unit(480, 16, 1), dim=1
    )
    image = torch.nn.functional.normalize(text + 0.8 * unit(480, 16, 2), dim=1)
    easy, hard = (
        torch.cat(
            [
                batch.failure
                for batch in PairEmbeddings(image, text, Pools(16, hard=hard)).batches(100)
            ]
        )
        for hard in (False, True)
    )
    # 480 rows: the standard error of a difference between rates is below 0.033
    assert hard.double().mean() > easy.double().mean() + 0.1


def test_hard_pools_are_sought_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_HARD_ROWS", 40)  # two pools of 16
    data = pool_of(Pools(16, hard=True, seed=None))
    blocks = data.usable_rows.split(32)
    assert [sorted(block.tolist()) for block in blocks] == [
        list(range(i, i + 32)) for i in (0, 32, 64)
    ]


@pytest.mark.parametrize("hard", [False, True])
def test_seeds_choose_the_pools(hard: bool) -> None:
    def rows(seed: int | None) -> list[int]:
        return pool_of(Pools(16, hard=hard, seed=seed)).usable_rows.tolist()

    assert rows(0) == rows(0) != rows(1)
    assert sorted(rows(0)) == list(range(96))
    if not hard:
        assert rows(None) == list(range(96))
    data = pool_of(Pools(16, hard=hard))
    passes = [
        data.shuffled(torch.arange(96), torch.Generator().manual_seed(seed)).tolist()
        for seed in (0, 0, 1)
    ]
    assert passes[0] == passes[1] != passes[2]
    assert sorted(passes[0]) == list(range(96))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "pool_size must be at least 1. Got 0"),
        (
            {"direction": "sideways"},
            "direction must be 'image_to_text' or 'text_to_image'. Got 'sideways'",
        ),
        ({"near_duplicates": 0.0}, r"near_duplicates must be a cosine in \(0, 1\]. Got 0.0"),
        ({"near_duplicates": 1.01}, "Got 1.01"),
        ({"near_duplicates": float("nan")}, "Got nan"),
    ],
)
def test_pools_that_cannot_be(wrong: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pools(**wrong)


def test_a_pool_must_be_full() -> None:
    require_full_pools(8, 8, subject="it")
    with pytest.raises(DataError, match="it has 7 usable pairs, and a pool has 8"):
        require_full_pools(7, 8, subject="it")


@BOTH
@pytest.mark.parametrize("size", [1, 5, 32, 1000])
def test_blocks_of_a_pool_are_its_rows(direction: str, size: int) -> None:
    data = pool_of(Pools(32, direction))
    columns = ("features", "text_features", "image_projection")
    steps, blocks = list(data.steps(7, columns=columns)), list(data.batches(size, columns=columns))
    assert [len(step.index) for step in steps] == [32] * 3  # whole pools, whatever the size
    assert max(len(block.index) for block in blocks) <= size
    for name in ("image", "index", "failure", "prediction", "target_log_probability"):
        whole, parts = (
            torch.cat([getattr(batch, name) for batch in batches]) for batches in (steps, blocks)
        )
        assert (
            torch.equal(whole, parts)
            if whole.dtype == torch.int64
            else torch.allclose(whole, parts, atol=1e-4)
        )
    assert torch.equal(torch.cat([step.index for step in steps]), data.usable_rows)
    for batches in (steps, blocks):
        for batch in batches:
            members = next(
                step for step in steps if set(batch.index.tolist()) <= set(step.index.tolist())
            ).index
            pool = data.candidates(members)
            assert torch.equal(batch.text, pool.text)
            assert torch.equal(
                batch.columns["text_features"], data.column("text_features", pool.row_of_candidate)
            )
            assert torch.equal(batch.columns["features"], data.column("features", batch.index))
            assert torch.equal(
                batch.columns["image_projection"], data.column("image_projection", batch.index)
            )
            assert len(batch.columns["text_features"]) == len(batch.text)


def test_columns_of_the_candidates_belong_to_their_texts() -> None:
    """Equal captions have equal features here, and a projection maps the features to the text."""
    for batch in pool_of(Pools(32)).batches(9, columns=("text_features",)):
        back = batch.columns["text_features"].double()
        projection = torch.linalg.lstsq(back, batch.text.double()).solution
        assert torch.allclose(back @ projection, batch.text.double(), atol=1e-4)


def test_rows_of_a_batch() -> None:
    (step,) = pool_of(Pools(96)).steps(96, columns=("features", "text_features"))
    part = step.rows(slice(10, 25))
    assert torch.equal(part.image, step.image[10:25])
    assert torch.equal(part.index, step.index[10:25])
    assert part.text is step.text
    assert torch.equal(part.columns["features"], step.columns["features"][10:25])
    assert part.columns["text_features"] is step.columns["text_features"]
    assert torch.equal(part.failure, step.failure[10:25])
    assert torch.allclose(part.logits, step.logits[10:25], atol=1e-5)


@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("near", [None, 0.9])
def test_every_method_that_takes_captions_scores_pictures_of_equal_ones(
    name: str, near: float | None
) -> None:
    """Both sets hold duplicates. The scores are finite and do not depend on the blocks."""
    made = make(name)
    pools = Pools(32, "text_to_image", near_duplicates=near)
    train, test = pool_of(pools, n=256, distinct=150), pool_of(pools, n=64, distinct=40, seed=5)
    assert any(batch.matches is not None for batch in test.batches(64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"only \d+ (failures|successes)")
        uncertainty = made.fit(train).predict_uncertainty(test)
    assert np.isfinite(uncertainty).all()
    assert len(np.unique(uncertainty)) > 10
    for block in test.batches(5, columns=made.columns_to_score):
        scores = made.score_batch(block.to(made.device_)).detach().cpu()
        assert np.allclose(scores, uncertainty[block.index], rtol=1e-4, atol=1e-5)
    assert isinstance(made, vilu.FailurePredictor)


LOGITS = [
    name
    for name in SCORING
    if PREDICTORS[name].looks_at == {"logits"} and not PREDICTORS[name].needs_fit
]


@BOTH
@pytest.mark.parametrize("equal", [0, 1, 20])
def test_pools_together_are_the_pools_one_at_a_time(direction: str, equal: int) -> None:
    """The results are equal bit by bit and in the same order.

    A pool with equal captions or pictures comes alone.
    """
    text, n = unit(12 * 16, 16, 0), 12 * 16
    image = noisy(text, n, 1)
    text[20 : 20 + equal], image[100 : 100 + equal] = text[19].clone(), image[99].clone()
    source = PairEmbeddings(image, text, Pools(16, direction, seed=None), 20.0)
    alone, together = list(source.batches(64)), list(source.many(64))
    assert len(alone) == 12
    assert len(together) < 12
    parts = [pool for batch in together for _, pool in batch.by_pool()]
    for name in ("image", "text", "target", "index", "logits", "prediction", "failure"):
        for one, other in zip(alone, parts, strict=True):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("index", "prediction", "failure"):
        assert torch.equal(
            *(
                torch.cat([getattr(batch, name) for batch in batches])
                for batches in (alone, together)
            )
        )
    known = [
        torch.cat([batch.target_log_probability for batch in batches])
        for batches in (alone, together)
    ]
    # a logit is off by 20 * 2^-24, and its norm by as much
    assert torch.allclose(*known, atol=1e-5)
    for method in LOGITS:
        predictor = PREDICTORS[method]()
        scores = torch.cat([predictor.score_batch(batch) for batch in alone]).double().numpy()
        np.testing.assert_array_equal(predictor.predict_uncertainty(source), scores)


def test_pools_come_alone_where_more_than_logits_is_looked_at() -> None:
    source = PairEmbeddings(unit(96, 16, 0), unit(96, 16, 1), Pools(16, near_duplicates=0.9), 20.0)
    assert [len(batch.index) for batch in source.many(64)] == [16] * 6
    assert [len(batch.index) for batch in source.many(31, rows=torch.arange(40))] == [16] * 2


@pytest.mark.parametrize("method", ["mcm", "entropy", "vilu"])
def test_a_pool_of_one_caption_has_no_score(method: str) -> None:
    """Its rows have the reason `k<2`, and the other rows have scores."""
    text, image = unit(96, 16, 0), noisy(unit(96, 16, 0), 96, 1)
    fitted = make(method)
    if method == "vilu":
        fitted.fit(PairEmbeddings(image.clone(), text.clone(), Pools(16, seed=None), 2.0))
    text[32:48] = text[32].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # most rows were in the fit
        outcomes = vilu.score(fitted, PairEmbeddings(image, text, Pools(16, seed=None), 2.0))
    assert np.flatnonzero(np.isnan(outcomes.uncertainty)).tolist() == list(range(32, 48))
    assert [reason for reason in outcomes.reason or () if reason] == ["k<2"] * 16


@BOTH
@pytest.mark.parametrize("hard", [False, True])
def test_batches_do_not_depend_on_what_is_set_in_torch(direction: str, hard: bool) -> None:
    text = unit(64, 8, 0)
    image, ids = noisy(text, 64), [f"picture {i}" for i in range(40)]
    classes = vilu.Embeddings(noisy(text, 40), text[:5], target=np.arange(40) % 5, ids=ids)

    def made() -> list[object]:
        chosen = Pools(8, direction, hard=hard, near_duplicates=0.4)  # type: ignore[arg-type]
        near, plain = (
            vilu.Embeddings.pairs(image, text, chosen),
            vilu.Embeddings.pairs(image, text, 8),
        )
        found = [*near.batches(8), *near.without(np.arange(64) == 5).steps(8), *plain.many(32)]
        both, part = (
            vilu.PseudoCaptions([near, classes], 8, ["a", "b"]),
            classes.take([3, 1, 2], [4, 1]),
        )
        found += [*both.many(32), *part.batches(2), *vilu.TwoModels(classes, classes).batches(32)]
        numbers = [
            (one.index, one.target, one.image, one.text, one.prediction, one.failure)
            for one in found
        ]
        return [tensor.tolist() for batch in numbers for tensor in batch]

    expected = made()
    with everything_set():
        assert made() == expected
