"""Damaged bytes from outside: a reader may only fail with a ``ViLUError``, and must respect its
limits.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.guard import guarded
from tests.fuzz.mutate import damages
from tests.fuzz.targets import TARGETS, Fuzzed, kept

CORPUS = Path(__file__).with_name("corpus")
CASES = settings().max_examples
QUICK = CASES <= 100  # as in `make test`, where `make test-fuzz` draws more


def once(target: Fuzzed, data: bytes) -> bool:
    """Return whether the reader accepted the bytes."""
    given = kept()  # made before the watch begins
    with TemporaryDirectory(prefix="vilu-fuzz-") as made, guarded(Path(made), given):
        return target.case(Path(made), data) is None


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_taken(name: str) -> None:
    """Each reader must accept a valid file.

    If a reader refused valid files, it would refuse every change, too, and the tests below would
    show nothing.
    """
    target = TARGETS[name]
    assert True in {once(target, data) for data in target.seeds()}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_in_words(name: str) -> None:
    target = TARGETS[name]
    n = 8 if QUICK else max(round(CASES * target.share), 1)

    @settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damages(target.seeds()))
    def check(data: bytes) -> None:
        once(target, data)

    check()


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_what_was_found_once_stays_mended(path: Path) -> None:
    once(TARGETS[path.parent.name], path.read_bytes())
