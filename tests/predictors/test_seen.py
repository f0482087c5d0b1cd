"""Test how a row that was used to fit is recognised by its picture, from arrays and stores."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.builders.pair_files import write_shards
from tests.builders.store_fakes import NAMES, FakeBackbone, FakeDataset, picture
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu.embeddings.memory import Embeddings, PairEmbeddings
from vilu.embeddings.pairs import Pools, PseudoCaptions
from vilu.errors import DataError
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.seen import MAX_HASHES, RowSketch, make_sketches
from vilu.store import embed as embedding
from vilu.store.reader import CaptionStore

pytestmark = pytest.mark.filterwarnings("ignore:.*expect an unreliable fit")

Store = Callable[..., vilu.EmbeddingSource]


class Marked(Embeddings):
    """Hold rows that are recognised by given numbers."""

    def __init__(self, numbers: np.ndarray) -> None:
        n = len(numbers)
        super().__init__(
            np.ones((n, 1)), np.ones((1, 1)), ids=[f"key {number}" for number in numbers]
        )
        self.numbers = numbers.astype(np.uint64)

    def identities(self, by, rows=None):
        return self.numbers if rows is None else self.numbers[rows]


def quick(**settings: object) -> FailurePredictor:
    return vilu.LVU(epochs=1, hidden=(4,), **settings)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a function that embeds the pictures for some seeds, under some names."""

    def make(folder: str, seeds: range, names: str = "{}.png", **settings: object):
        blobs = [picture(seed) for seed in seeds]
        keys = [names.format(i) for i in range(len(blobs))]
        captions = (
            [f"caption {seed}" for seed in seeds] if settings.pop("captions", False) else None
        )
        data = FakeDataset(blobs, [i % 3 for i in range(len(blobs))], keys, captions=captions)
        if captions is not None:
            data.class_names = None
        names = {} if captions else {"names": NAMES}
        return embedding.embed(data, FakeBackbone(), tmp_path / folder, **names, **settings)

    return make


# The sketch.


def test_the_sketch_is_a_bounded_sample_that_never_invents_a_row() -> None:
    rng = np.random.default_rng(0)
    mine, others = rng.integers(2**62, size=4 * MAX_HASHES), rng.integers(2**62, size=1000)
    whole, small = RowSketch.of(Marked(mine), "names"), RowSketch.of(Marked(mine[:20]), "names")
    assert np.array_equal(whole.hashes.numpy(), np.sort(mine)[:MAX_HASHES])
    assert (whole.n_rows, whole.is_complete, small.n_rows, small.is_complete) == (
        4 * MAX_HASHES,
        False,
        20,
        True,
    )
    rows = np.arange(1000)
    assert len(whole.overlap(Marked(others), "names", rows)) == 0
    found = whole.overlap(Marked(mine[:1000]), "names", rows)
    # The sketch can tell rows below its largest hash, and all these rows are in the set.
    assert (
        found.n_comparable
        == len(found)
        == np.count_nonzero(mine[:1000] <= np.sort(mine)[MAX_HASHES - 1])
    )
    assert (
        found.in_words()
        == f"at least {len(found)} of 1000 rows (a sample of {MAX_HASHES} rows of the fit is known)"
    )
    assert small.overlap(Marked(mine[:30]), "names", rows[:30]).in_words("rows") == "20 of 30 rows"
    union = whole | RowSketch.of(Marked(others), "names")
    assert torch.equal(
        union.hashes, RowSketch.of(Marked(np.concatenate([mine, others])), "names").hashes
    )


@pytest.mark.parametrize(("n_shared", "refused"), [(0, False), (1, False), (2, True)])
def test_of_a_sample_the_share_is_that_of_the_rows_that_can_be_told(
    n_shared: int, refused: bool
) -> None:
    """The share must count only rows that the sketch can tell.

    The fit has 4 x 16,384 rows. Among 400 rows 100 have hashes within reach. One shared row is 1 %
    of these 100, and two are more.
    """
    fitted = np.arange(4 * MAX_HASHES) * 10  # so the sketch reaches to 10 * (MAX_HASHES - 1)
    told = np.concatenate([np.arange(n_shared) * 10, np.arange(100 - n_shared) * 10 + 5])
    data = Marked(np.concatenate([told, np.arange(300) + 10 * MAX_HASHES]))
    found = RowSketch.of(Marked(fitted), "names").overlap(data, "names", np.arange(400))
    assert (len(found), found.n_comparable) == (n_shared, 100)
    if refused:
        with pytest.raises(
            DataError,
            match=r"^at least 2 of 400 rows .* \('key 0', 'key 10'\), more than 1% of the 100",
        ):
            found.unshared_mask(data, "rows", "are known", "Remedy.")
    elif n_shared:
        with pytest.warns(
            UserWarning, match=r"at least 1 of 400 rows .*'key 0'.*; they are left out"
        ):
            assert np.flatnonzero(
                ~found.unshared_mask(data, "rows", "are known", "Remedy.")
            ).tolist() == [0]
    else:
        assert found.unshared_mask(data, "rows", "are known", "Remedy.").all()


# Arrays.


def test_an_array_is_recognised_by_its_rows_in_any_float_type(train: Embeddings) -> None:
    rows = train.image.half()  # as a store keeps them
    same = [
        variant(train, image=rows.to(kind), ids=None)
        for kind in (torch.float16, torch.float32, torch.float64)
    ]
    hashes = [data.identities("embeddings") for data in same]
    assert all(np.array_equal(hashes[0], of) for of in hashes)
    # Float16 from float32 and from float64 differ where the second rounding goes the other way,
    # about once in 2^13 numbers.
    wide = Embeddings(
        np.asarray(train.image, dtype=np.float64), train.text, target=None, logit_scale=20.0
    ).identities("embeddings")
    assert np.array_equal(wide, train.identities("embeddings"))
    expected = [blake2b(row.numpy().tobytes(), digest_size=8).digest() for row in rows[:3] + 0]
    assert hashes[0][:3].tolist() == [int.from_bytes(one, "little") for one in expected]
    minus = torch.tensor([[1.0, -0.0]])
    assert Embeddings(minus, minus).identities("embeddings") == Embeddings(
        abs(minus), minus
    ).identities("embeddings")


def test_what_has_no_direction_is_no_row_twice(train: Embeddings) -> None:
    spoiled = [
        variant(data, image=data.image.index_fill(0, torch.arange(3), np.nan))
        for data in (train, toy_embeddings(seed=1, ids_from=None))
    ]
    with pytest.warns(UserWarning, match="3 of 600 training rows are left out"):
        predictor = quick().fit(spoiled[0])
    assert len(predictor.seen(spoiled[1])) == 0
    assert np.flatnonzero(~predictor.seen(spoiled[0]).shared).tolist() == [0, 1, 2]


def test_names_say_nothing_where_the_rows_are_known(train: Embeddings) -> None:
    predictor = quick().fit(train)
    assert set(predictor.seen_) == {"embeddings", "names"}
    other = toy_embeddings(seed=1)  # other images with the same names
    assert len(predictor.seen(other)) == 0
    assert len(predictor.seen(variant(train, ids=None))) == 600
    assert len(predictor.seen(train.take(np.array([5, 2, 2])))) == 3
    assert predictor.calibrate_probability(other).calibrator_ is not None


def test_a_hundredth_of_the_rows_may_be_shared(train: Embeddings) -> None:
    """1 of 100 rows is 1 %, and is left out. 2 of 100 rows are more, and are refused."""
    predictor = quick().fit(train)
    new = toy_embeddings(seed=1, n=100, ids_from=1000)
    one, two = (variant(new, image=torch.cat([train.image[:n], new.image[n:]])) for n in (1, 2))
    with pytest.warns(
        UserWarning,
        match=r"^1 of 100 calibration rows were used to fit this lvu \('row-1000'\); they are",
    ):
        made = predictor.calibrate_probability(one).calibrator_
    assert made == predictor.calibrate_probability(new.take(np.arange(1, 100))).calibrator_
    with pytest.raises(
        DataError, match=r"2 of 100 calibration rows .* \('row-1000', 'row-1001'\), more than 1%"
    ):
        predictor.calibrate_probability(two)
    with pytest.warns(UserWarning, match="1 of 100 validation rows are in the training set"):
        found = quick().fit(train, one)
    assert all(
        torch.equal(of, quick().fit(train, new.take(np.arange(1, 100))).state()[name])
        for name, of in found.state().items()
    )
    with pytest.raises(
        DataError,
        match=r"2 of 100 validation rows are in the training set.*Training rows cannot select",
    ):
        quick().fit(train, two)
    # One set may hold a row twice.
    twice = train.take(np.r_[np.arange(600), 0, 0])
    assert quick().fit(twice, new).notes_["n_train"] == 602


def test_a_pair_is_its_picture_and_its_caption() -> None:
    data = toy_pairs()
    predictor = vilu.ViLU(epochs=1, hidden=(4,)).fit(data)
    other = toy_pairs(seed=1)
    assert len(predictor.seen(data)) == 256
    assert len(predictor.seen(PairEmbeddings(data.image, other.text, 32, 20.0))) == 0
    mixed = [
        torch.cat([x[:2], y[2:]]) for x, y in ((data.image, other.image), (data.text, other.text))
    ]
    with pytest.warns(UserWarning, match="2 of 256 validation rows"):
        found = vilu.ViLU(epochs=1, hidden=(4,)).fit(data, PairEmbeddings(*mixed, Pools(32), 20.0))
    assert {one.n_rows for one in found.seen_.values()} == {512}
    kept = PairEmbeddings(*mixed, Pools(32), 20.0).without(np.arange(256) < 2)
    assert len(kept.usable_rows) == 224  # 254 rows fill seven pools
    assert not np.isin([0, 1], kept.usable_rows).any()
    assert np.bincount(kept.status, minlength=4).tolist() == [224, 0, 0, 32]
    with pytest.warns(UserWarning, match="2 of 256 calibration rows"):
        predictor.calibrate_probability(PairEmbeddings(*mixed, Pools(32), 20.0))


def test_shards_of_laion_are_recognised_by_their_embeddings(tmp_path: Path) -> None:
    data, other = toy_pairs(), toy_pairs(seed=1)
    for name, source in (("a", data), ("b", other)):
        write_shards(
            tmp_path / name,
            source.image.half().numpy(),
            source.text.half().numpy(),
            sizes=[100, 156],
        )
    found = [vilu.open_source(tmp_path / name, pools=Pools(32), logit_scale=20.0) for name in "ab"]
    assert found[0].identified_by == ("embeddings",)
    predictor = vilu.ViLU(epochs=1, hidden=(4,)).fit(found[0])
    assert [len(predictor.seen(one)) for one in (*found, data)] == [256, 0, 256]


# Stores.


def test_other_pictures_of_the_same_name_are_other_rows(store: Store) -> None:
    train, other, renamed = (
        store("a", range(60)),
        store("b", range(60, 120)),
        store("c", range(60), "z{}.png"),
    )
    predictor = quick(allow_degenerate=True).fit(train)
    assert set(predictor.seen_) == {"pictures", "names"}
    assert [len(predictor.seen(data)) for data in (train, other, renamed)] == [60, 0, 60]
    assert len(predictor.seen(renamed, np.array([7, 3]))) == 2
    expected = [sha256(picture(i)).digest()[:8] for i in (59, 0)]
    assert train.identities("pictures", np.array([59, 0])).tolist() == [
        int.from_bytes(b, "little") for b in expected
    ]
    union = PseudoCaptions([other, train], 16)
    assert union.identified_by == ("pictures", "names")
    assert predictor.seen(union).shared.tolist() == [False] * 60 + [True] * 60


def test_captions_and_folds(store: Store) -> None:
    data = store("a", range(64), captions=True, part_size=10)
    expected = [
        blake2b(sha256(picture(i)).digest()[:16] + f"caption {i}".encode(), digest_size=8).digest()
        for i in range(64)
    ]
    assert data.identities("pictures").tolist() == [
        int.from_bytes(one, "little") for one in expected
    ]
    parts = [CaptionStore(data.path, Pools(2), fold) for fold in ("train", "validation", "test")]
    hashes = [part.identities("pictures") for part in parts]
    assert sorted(np.concatenate(hashes)) == sorted(data.identities("pictures"))
    predictor = vilu.ViLU(epochs=1, hidden=(4,), allow_degenerate=True).fit(parts[0])
    assert [len(predictor.seen(part)) for part in parts] == [len(parts[0]), 0, 0]


def test_sketches_of_both_sets_have_what_both_are_recognised_by(
    store: Store, train: Embeddings
) -> None:
    assert set(make_sketches(store("new", range(9)))) == {"pictures", "names"}
    found = quick().fit(train, toy_embeddings(seed=1, ids_from=None))
    assert set(found.seen_) == {"embeddings"}


# Pictures of scored rows.


def test_rows_of_one_file_are_scored_as_one_picture(store: Store, tmp_path: Path) -> None:
    seeds = [0, 1, 0, 2, 1, 0]
    outcomes = vilu.score(vilu.MCM(), store("a", seeds))
    expected = [int.from_bytes(sha256(picture(seed)).digest()[:8], "little") for seed in seeds]
    assert outcomes.picture is not None
    assert outcomes.picture.tolist() == [number & (2**63 - 1) for number in expected]
    bare = vilu.score(vilu.MCM(), Embeddings(np.eye(3)[seeds], np.eye(3)[:2], target=[0] * 6))
    assert bare.picture is not None  # it comes from the embeddings, as there is nothing else
    first = [bare.picture.tolist().index(number) for number in bare.picture.tolist()]
    assert first == [0, 1, 0, 3, 1, 0]
    parts = vilu.score_parts(vilu.MCM(), vilu.EmbeddingStore(tmp_path / "a"), tmp_path / "scores")
    assert np.array_equal(parts.outcomes().picture, outcomes.picture)


def test_a_row_without_embedding_has_no_known_picture() -> None:
    image = np.array([[1.0, 0.0], [0.0, 0.0], [np.nan, 0.0], [0.0, 0.0]])
    outcomes = vilu.score(vilu.MCM(), Embeddings(image, np.eye(2), target=[0, 1, 0, 1]))
    assert outcomes.picture is not None
    assert (outcomes.picture == -1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_the_picture_of_a_pair_is_its_image(store: Store, direction: str) -> None:
    seeds = list(range(64)) * 2
    pools = Pools(16, direction=direction)
    stored = CaptionStore(store("a", seeds, captions=True, part_size=50).path, pools)
    image, caption = np.eye(8)[[0, 0, 1, 1]], np.eye(8)[:4]
    memory = PairEmbeddings(image, caption, Pools(2, direction=direction))
    union = PseudoCaptions([memory, Embeddings(np.eye(8)[:2], np.eye(8), target=[0, 1])], 2)
    for data, same in (
        (stored, [(row, row + 64) for row in range(64)]),
        (memory, [(0, 1), (2, 3)]),
        (union, [(0, 1), (1, 4), (2, 3), (3, 5)]),
    ):
        picture = vilu.score(vilu.MCM(), data).picture
        assert picture is not None
        assert all(picture[first] == picture[second] for first, second in same)
        assert len(np.unique(picture)) == len(data) - len(same)
