"""Commands on a machine where only the data's location is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.bench_fakes import make_store
from tests.command import run_process


@pytest.mark.slow
def test_commands_need_no_home(tmp_path: Path) -> None:
    """No command may need the home folder, although libraries below vilu keep caches there."""
    store, nowhere = make_store(tmp_path / "store", 60, 0), "/nonexistent"
    env = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME"), nowhere)
    run_process("fit", store, "--method", "mcm", "-o", tmp_path / "predictor", **env)
    run_process("score", tmp_path / "predictor", store, "-o", tmp_path / "scores.parquet", **env)
    assert "AUROC" in run_process("evaluate", tmp_path / "scores.parquet", **env).stdout
    assert not Path(nowhere).exists()
