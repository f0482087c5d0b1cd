"""Test how pictures that are nearly the same are found."""

from __future__ import annotations

import numpy as np

import vilu
from vilu.embeddings.copies import near_copy_groups


def rows_with_copies(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return 600 rows and each row's scene.

    Each of 200 scenes has one row and two copies with a little noise.
    """
    rng = np.random.default_rng(seed)
    scene = rng.normal(size=(200, 32))
    scene /= np.linalg.norm(scene, axis=1, keepdims=True)
    rows = np.tile(scene, (3, 1))
    rows[200:] += 0.01 * rng.normal(size=(400, 32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = rng.permutation(600)
    return rows[order], np.tile(np.arange(200), 3)[order]


def test_copies_are_groups_whatever_the_block() -> None:
    image, scene = rows_with_copies()
    data = vilu.Embeddings(image, np.eye(32))
    _, first, place = np.unique(scene, return_index=True, return_inverse=True)
    for size in (1024, 7):
        copies = near_copy_groups(data, np.arange(600), block_rows=size)
        assert np.array_equal(copies, first[place])


def test_copies_are_told_by_the_place_among_the_rows() -> None:
    image, scene = rows_with_copies()
    data = vilu.Embeddings(image, np.eye(32))
    rows = np.arange(600)[::-1]
    found = near_copy_groups(data, rows)
    assert np.array_equal(scene[rows][found], scene[rows])
    assert len(np.unique(found)) == 200


def test_a_pair_is_a_copy_of_another_by_its_image() -> None:
    image, caption = np.eye(8)[[0, 0, 1, 1]], np.eye(8)[:4]
    for direction in ("image_to_text", "text_to_image"):
        pools = vilu.Pools(2, direction=direction)
        data = vilu.Embeddings.pairs(image, caption, pools)
        assert near_copy_groups(data, np.arange(4)).tolist() == [0, 0, 2, 2]
