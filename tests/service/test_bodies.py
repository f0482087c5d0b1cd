"""The service counts the values in a body before it builds anything."""

from __future__ import annotations

import json

import pytest

from vilu.service.bodies import count_values, count_values_outside_texts


def corrections(n: int, label: str) -> bytes:
    """Return a body that corrects n labels."""
    rows = {f"{row:032x}": label for row in range(n)}
    return json.dumps({"before": rows, "after": rows}).encode()


@pytest.mark.parametrize("label", ["dog", "dog, small", 'a "dog", small', "dog\\"])
def test_commas_in_permitted_corrections_do_not_count(label: str) -> None:
    assert count_values_outside_texts(corrections(256, label), limit=512) == 512


def test_more_labels_than_the_limit_are_counted() -> None:
    assert count_values_outside_texts(corrections(257, "dog"), limit=512) > 512


def test_texts_without_commas_are_counted_where_there_are_too_many() -> None:
    body = b'{"labels":{' + b'"a":"b"' * 1_000 + b"}}"
    assert count_values(body) == 1
    assert count_values_outside_texts(body, limit=100) > 100
