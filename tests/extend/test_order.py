"""Test a catalogue's order, because study tables take their row order from it."""

from __future__ import annotations

import pytest

import vilu
from vilu.registry import METHODS, entry_points

FROM_ENTRY_POINTS = sorted(entry.name for entry in entry_points(METHODS.group))


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the methods' catalogue to its state before the first look-up."""
    monkeypatch.setattr(METHODS, "registered", {})
    monkeypatch.setattr(METHODS, "_has_imported_all", False)
    monkeypatch.setattr(METHODS, "_entry_names", [])


@pytest.mark.usefixtures("unused")
@pytest.mark.parametrize("looked_up", [(), ("trine", "bayesvlm", "mcm"), ("vilu", "mcm", "trine")])
def test_lookups_do_not_change_the_order(looked_up: tuple[str, ...]) -> None:
    assert {"trine", "bayesvlm"} <= set(FROM_ENTRY_POINTS)
    for name in looked_up:
        assert vilu.PREDICTORS[name].name == name
    expected = [*METHODS.addresses, *FROM_ENTRY_POINTS]
    assert METHODS.names() == expected
    assert list(METHODS) == expected


@pytest.mark.usefixtures("unused")
@pytest.mark.parametrize("is_listed_before", [False, True])
def test_a_registered_method_stands_before_those_of_entry_points(is_listed_before: bool) -> None:
    if is_listed_before:
        assert "narrow" not in list(METHODS)
    METHODS["narrow"] = object()
    expected = [*METHODS.addresses, "narrow", *FROM_ENTRY_POINTS]
    assert METHODS.names() == expected
    assert list(METHODS) == expected
