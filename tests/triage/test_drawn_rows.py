"""Test that labels count for a guarantee up to the first photo in the order that has no label."""

from __future__ import annotations

import numpy as np

from vilu.triage.guarantee import N_POSITIONS, PhotoSplit

UNCERTAINTY = np.array([0.1, 0.2, 0.3, 0.4, 0.1, 0.2])
ORDER = [3, 0, 4, 1, 5, 2]
"""The rows in the random order."""


def split(
    answered: list[int], *, unasked: tuple[int, ...] = (), fit: tuple[int, ...] = ()
) -> PhotoSplit:
    """Return six photos where the named rows have a label."""
    position = np.empty(6, np.int64)
    position[ORDER] = np.arange(6) * (N_POSITIONS // 6)
    mask = {}
    for name, rows in {"answered": answered, "unasked": unasked, "fit": fit}.items():
        mask[name] = np.isin(np.arange(6), rows)
    none = np.zeros(6, np.bool_)
    return PhotoSplit(
        is_usable=~none,
        is_calibration=~mask["fit"],
        random_position=position,
        is_labelled=mask["answered"],
        is_answered=mask["answered"],
        is_skipped=none,
        has_given_label=mask["unasked"],
        has_open_request=none,
    )


def test_all_labels_count_up_to_the_first_photo_without_one() -> None:
    # In the order 3, 0, 4, 1, 5, 2, row 1 has no label, so rows 5 and 2 do not count.
    drawn = split([3, 0, 4, 5, 2])
    assert drawn.counted_rows(UNCERTAINTY, limit=1.0).tolist() == [0, 3, 4]
    assert drawn.unanswered_rows(UNCERTAINTY, limit=1.0).tolist() == [1]


def test_photos_beyond_the_limit_need_no_label() -> None:
    drawn = split([0, 4])
    assert drawn.counted_rows(UNCERTAINTY, limit=0.1).tolist() == [0, 4]
    assert drawn.unanswered_rows(UNCERTAINTY, limit=0.3).tolist() == [1, 5, 2]


def test_a_laxer_limit_asks_for_what_lies_in_between() -> None:
    drawn = split([0, 4, 1, 5])  # all up to 0.2
    assert drawn.counted_rows(UNCERTAINTY, limit=0.2).tolist() == [0, 1, 4, 5]
    assert drawn.unanswered_rows(UNCERTAINTY, limit=0.4).tolist() == [3, 2]
    assert drawn.counted_rows(UNCERTAINTY, limit=0.4).tolist() == []


def test_random_labels_without_a_request_count_wherever_they_are() -> None:
    assert split([2], unasked=(2,)).counted_rows(UNCERTAINTY, limit=1.0).tolist() == [2]


def test_photos_of_the_fit_side_never_count() -> None:
    drawn = split([3, 0, 4, 1, 5, 2], fit=(0, 5))
    assert drawn.counted_rows(UNCERTAINTY, limit=1.0).tolist() == [1, 2, 3, 4]
