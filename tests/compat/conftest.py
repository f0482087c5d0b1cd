"""The kept archives, each unpacked once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compat.bed import unpack


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an archive, to be read and not to be written into."""
    root = tmp_path_factory.mktemp("compat")
    return lambda name: root / name if (root / name).exists() else unpack(name, root)
