"""Test classes as captions, and held-out rows that share no caption with the other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu import PREDICTORS
from vilu.embeddings.memory import Embeddings, PairEmbeddings
from vilu.embeddings.pairs import Pools, PseudoCaptions
from vilu.embeddings.rows import Rows
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.metrics import auroc
from vilu.predictors.contract.labelled import (
    caption_groups,
    fit_and_selection,
    held_out_positions,
    rows_and_failures,
    rows_of_whole_groups,
)


def animals(
    n: int = 90,
    *,
    seed: int = 0,
    names: tuple[str, ...] = ("cat", "dog", "cow"),
    text_seed: int = 1,
):
    """Return images from classes with these names. Half are blurred, so they are often missed."""
    rng, k, d = np.random.default_rng(seed), len(names), 16
    text = np.random.default_rng(text_seed).normal(size=(k, d))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    target = rng.integers(k, size=n)
    image = (
        text[target] + rng.normal(size=(n, d)) * np.where(rng.random(n) < 0.5, 0.5, 0.05)[:, None]
    )
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    return Embeddings(
        image,
        text,
        target=target,
        logit_scale=20.0,
        class_names=names,
        ids=[f"{names[0]}-{i}" for i in range(n)],
    )


def test_a_row_is_an_image_with_the_text_of_its_class() -> None:
    one, two = animals(), animals(50, seed=1, names=("car", "bus"), text_seed=2)
    both = PseudoCaptions([one, two], 35)
    assert len(both) == 140
    assert len(both.usable_rows) == 140
    rows = torch.tensor([139, 0, 90, 89])
    expected = torch.stack([two.image[49], one.image[0], two.image[0], one.image[89]])
    assert torch.equal(both.picture_rows(rows), expected)
    captions = [
        two.text[two.target[49]],
        one.text[one.target[0]],
        two.text[two.target[0]],
        one.text[one.target[89]],
    ]
    assert torch.equal(both.caption_rows(rows), torch.stack(captions))
    assert [both.ids[i] for i in rows.tolist()] == ["1/car-49", "0/cat-0", "1/car-0", "0/cat-89"]
    assert both.ids[88:91] == ["0/cat-88", "0/cat-89", "1/car-0"]
    assert both.ids[-1] == "1/car-49"
    assert len(set(both.ids)) == 140
    assert PseudoCaptions([one, two], 35, ["a", "b"]).ids[90] == "b/car-0"


def test_failures_of_a_pool_by_brute_force() -> None:
    """The answer is the class with the largest logit in the pool, from any source."""
    one, two = animals(), animals(70, seed=1, names=("car", "bus"), text_seed=2)
    both = PseudoCaptions([one, two], 32)
    text = torch.cat([one.text, two.text])
    label = torch.cat([one.target, two.target + 3])
    image = torch.cat([one.image, two.image])
    n_mixed = 0
    for batch in both.steps(32):
        here = label[batch.index].unique()
        n_mixed += bool((here < 3).any() and (here >= 3).any())
        assert len(batch.text) == len(here)
        answer = here[(image[batch.index] @ text[here].T).argmax(dim=1)]
        assert torch.equal(batch.failure, (answer != label[batch.index]).long())
    assert n_mixed == 5  # each pool has classes from both sources


def test_a_name_that_two_sets_have_is_one_caption() -> None:
    one = animals()
    two = animals(90, seed=1, names=("dog", "bus", "fox"), text_seed=2)  # another text for the dog
    both = PseudoCaptions([one, two], 30)
    dogs = torch.cat([one.target == 1, two.target == 0]).nonzero().squeeze(1)
    assert len(dogs) > 30
    assert torch.equal(both.caption_rows(dogs), one.text[1].expand(len(dogs), -1))
    found = both.candidates(dogs[[0, -1]])
    assert len(found.text) == 1
    assert found.target.tolist() == [0, 0]
    turned = PseudoCaptions([one, two], Pools(30, "text_to_image"))
    assert next(turned.steps(30, rows=dogs[-30:])).failure.sum() == 0  # any dog is right


def test_one_text_under_two_names_is_one_answer() -> None:
    one = animals()
    two = animals(90, seed=1, names=("feline", "canine", "bovine"))
    both = PseudoCaptions([one, two], 30)
    assert max(len(batch.text) for batch in both.steps(30)) == 3


def test_rows_without_label_or_embedding_are_left_out() -> None:
    one = animals()
    one.target[:10] = -1
    one.status[10:20] = 1
    both = PseudoCaptions([one, animals(30, seed=3)], 20)
    assert len(both) == 100
    assert [both.origin(i) for i in (0, 69, 70)] == [(0, 20), (0, 89), (1, 0)]


def test_a_source_with_captions_brings_its_own() -> None:
    pairs, one = toy_pairs(n=64, pool=64), animals(50)
    both = PseudoCaptions([pairs, one], 38)
    rows = torch.tensor([63, 64, 0, 113])
    assert torch.equal(both.picture_rows(rows)[[0, 2]], pairs.image[[63, 0]])
    assert torch.equal(both.caption_rows(rows)[[0, 2]], pairs.text[[63, 0]])
    assert torch.equal(both.caption_rows(rows)[[1, 3]], one.text[one.target[[0, 49]]])


def test_rows_that_are_only_numbered_identify_nothing() -> None:
    anonymous = variant(toy_embeddings(n=60), ids=None, columns=None)
    assert (
        type(PseudoCaptions([anonymous, toy_embeddings(n=60, seed=1)], 30).ids).__name__
        == "RowNumbers"
    )


def test_what_cannot_be_one_source_is_refused() -> None:
    one = animals()
    with pytest.raises(UsageError, match="at least one data set"):
        PseudoCaptions([])
    with pytest.raises(UsageError, match="2 data sets need as many different names"):
        PseudoCaptions([one, one], 16, ["a", "a"])
    with pytest.raises(ProvenanceError, match="logit_scale"):
        PseudoCaptions([one, toy_embeddings(scale=30.0)], 16)
    with pytest.raises(
        DataError, match="the union of the labelled rows has 90 usable pairs, and a pool has 91"
    ):
        PseudoCaptions([one], 91)
    one.target[:] = -1
    with pytest.raises(DataError, match="'x' has no labels"):
        PseudoCaptions([one], 16, ["x"])


def test_a_head_learned_on_several_sets_scores_another() -> None:
    """Blur is the same everywhere.

    So a head that learned it on two sets must score a third set above chance.
    """
    learned = [toy_embeddings(n=400, k=5, seed=0), animals_like_toy(seed=1)]
    third = toy_embeddings(n=400, seed=7, ids_from=9000)
    head = PREDICTORS["vilu"](hidden=(16, 8), epochs=15, device="cpu").fit(
        PseudoCaptions(learned, 50)
    )
    failure = torch.cat([batch.failure for batch in third.batches(1024)]).numpy()
    # about 100 failures in 400 rows: chance has a standard error near 0.033
    assert auroc(head.predict_uncertainty(third), failure) > 0.5 + 4 * 0.033


def animals_like_toy(seed: int) -> Embeddings:
    data = toy_embeddings(n=400, seed=seed)
    turned = torch.linalg.qr(torch.randn(15, 15, generator=torch.Generator().manual_seed(5))).Q
    turn = torch.block_diag(turned, torch.ones(1, 1))  # other classes, the same sign of blur
    names = [f"other {i}" for i in range(5)]
    return Embeddings(
        data.image @ turn,
        data.text @ turn,
        target=data.target,
        logit_scale=20.0,
        class_names=names,
        ids=list(data.ids),
    )


def test_groups_are_equal_captions() -> None:
    pairs = toy_pairs(n=256, pool=32)
    text = pairs.text.clone()
    text[200:] = text[:56]
    text[100] = -text[7]
    repeated = PairEmbeddings(pairs.image, text, 32, 20.0)
    groups = caption_groups(repeated, torch.arange(256))
    for i, j in ((0, 200), (55, 255)):
        assert groups[i] == groups[j]
    assert len(groups.unique()) == 200
    order = torch.randperm(256)
    assert torch.equal(caption_groups(repeated, order), groups[order])


def test_a_zero_has_no_sign_and_blocks_do_not_matter() -> None:
    text = torch.eye(4).repeat(3, 1)
    text[4:8][text[4:8] == 0] = -0.0
    pairs = PairEmbeddings(torch.eye(4).repeat(3, 1), text, 4)
    groups = caption_groups(pairs, torch.arange(12), block_rows=5)
    assert groups.tolist() == groups[:4].tolist() * 3
    assert len(groups.unique()) == 4


def test_held_out_rows_share_no_caption_with_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(1000) // 3
    part = held_out_positions(torch.zeros(1000).long(), 0.2, 50, generator, groups)
    rest = torch.ones(1000, dtype=torch.bool)
    rest[part] = False
    assert 198 <= len(part) <= 200  # whole groups of three
    assert torch.equal(part, part.unique())
    assert not set(groups[part].tolist()) & set(groups[rest].tolist())


def test_distinct_captions_are_held_out_as_rows_are() -> None:
    failure = torch.zeros(320).long()
    groups = torch.randperm(320)
    with_groups = held_out_positions(failure, 0.1, 32, torch.Generator().manual_seed(5), groups)
    without = held_out_positions(failure, 0.1, 32, torch.Generator().manual_seed(5))
    assert torch.equal(with_groups, without)
    assert len(without) == 32


def test_captions_that_recur_in_every_pool_are_classes() -> None:
    """There are fewer captions than rows in a pool, so single images are held out."""
    groups = torch.arange(90) % 29
    part = held_out_positions(torch.zeros(90).long(), 0.1, 30, torch.Generator(), groups)
    assert torch.equal(part, held_out_positions(torch.zeros(90).long(), 0.1, 30, torch.Generator()))
    assert len(part) == 30


def test_classes_are_never_held_out_whole() -> None:
    """With any number of classes, each image is its own group.

    So every class can have images in both parts.
    """
    text = np.random.default_rng(3).normal(size=(60, 16))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    source = PseudoCaptions(
        [Embeddings(text[np.arange(480) % 60], text, target=np.arange(480) % 60, logit_scale=20.0)],
        16,
    )
    groups = caption_groups(source, torch.arange(480))
    assert len(groups.unique()) == 480
    pairs = PairEmbeddings(text[:32], text[:32], 16, 20.0)
    mixed = caption_groups(PseudoCaptions([source.sources[0], pairs], 16), torch.arange(512))
    assert torch.equal(mixed[:480], torch.arange(480))
    assert torch.equal(mixed[480:], caption_groups(pairs, torch.arange(32)))


def test_a_caption_too_frequent_to_be_held_out() -> None:
    groups = torch.cat([torch.zeros(60), torch.arange(1, 31)]).long()
    part = held_out_positions(torch.zeros(90).long(), 0.1, 30, torch.Generator(), groups)
    assert part.tolist() == list(range(60, 90))
    fewer = torch.cat([torch.zeros(61), torch.arange(1, 30)]).long()  # 29 others fill no pool
    assert len(held_out_positions(torch.zeros(90).long(), 0.1, 30, torch.Generator(), fewer)) == 0


def test_selection_that_would_be_blind_is_none() -> None:
    """The rows that fail differ between the training pools and the selection pools.

    A selection without failures or without successes could choose nothing.
    """
    pairs = PairEmbeddings(torch.eye(16), torch.eye(16), 4)
    rows = Rows(pairs, torch.arange(16))
    assert rows_and_failures(rows.batches(4))[1].tolist() == [0] * 16
    assert [len(part) for part in rows_and_failures([])] == [0, 0]
    fit_rows, held_out = fit_and_selection(rows, torch.arange(16) % 2, None, 0.5, seed=0)
    assert torch.equal(fit_rows.index, rows.index)  # rows that cannot select are used in the fit
    assert held_out is None


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 45))
def test_whole_groups_against_a_loop(groups: list[int], room: int) -> None:
    """Groups are taken in order, and a group that does not fit is left out."""
    chosen: set[int] = set()
    left = room
    for group in dict.fromkeys(groups):
        if groups.count(group) <= left:
            chosen.add(group)
            left -= groups.count(group)
    expected = [i for i, group in enumerate(groups) if group in chosen]
    assert rows_of_whole_groups(torch.tensor(groups), room).tolist() == expected


def test_selection_rows_of_pairs_have_captions_of_their_own() -> None:
    """The split is the one that ``fit`` uses."""
    pairs = toy_pairs(n=256, pool=32)
    text = pairs.text.clone()
    text[128:] = text[:128]
    source = PairEmbeddings(pairs.image, text, Pools(32, seed=0), 20.0)
    failure = torch.arange(256) % 2
    fit_rows, held_out = fit_and_selection(
        Rows(source, source.usable_rows), failure, None, 0.25, seed=0
    )
    assert held_out is not None
    assert len(held_out.index) == 64
    assert not set((fit_rows.index % 128).tolist()) & set((held_out.index % 128).tolist())
