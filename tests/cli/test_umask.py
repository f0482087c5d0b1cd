"""Test that only the owner can read files with paths and labels, unless a user says otherwise."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.bench_fakes import make_store
from tests.command import command_line, run
from vilu.calibration.calibration import Calibration
from vilu.errors import StorageError


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    assert os.umask(before) == 0o022  # a command must not change it


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*")}


@pytest.fixture
def predictor(tmp_path: Path) -> Path:
    make_store(tmp_path / "train", 120, 0)
    make_store(tmp_path / "cal", 60, 1_000)
    run("fit", tmp_path / "train", "-o", tmp_path / "predictor", "--method", "mcm")
    return tmp_path / "predictor"


@pytest.mark.parametrize(("umask", "mode"), [((), 0o600), (("--umask", "027"), 0o640)])
def test_calibration_rows_are_for_their_owner(
    predictor: Path, umask: tuple[str, ...], mode: int
) -> None:
    assert modes(predictor)["predictor.json"] == 0o644
    run(*umask, "calibrate", predictor, predictor.parent / "cal")
    assert modes(predictor)["calibration.parquet"] == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_told_why_a_calibration_cannot_be_read(predictor: Path) -> None:
    run("calibrate", predictor, predictor.parent / "cal")
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        copy = Path(shutil.copytree(predictor, Path(home, "predictor")))
        os.seteuid(65534)
        try:
            with pytest.raises(StorageError, match=r"for their owner alone\..*vilu --umask 022"):
                Calibration.find(copy)
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("umask", ["9", "rwx", "-1", ""])
def test_a_umask_that_is_none_is_refused(umask: str) -> None:
    done = command_line("--umask", umask, "list", "methods")
    assert done.returncode == 2
    assert "--umask is an octal number such as 022" in done.stderr
