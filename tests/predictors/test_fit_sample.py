"""Test the image sample that a fit keeps: its content, its files, and damage to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vilu
from tests.builders.bench_fakes import make_store
from tests.conftest import toy_embeddings
from vilu.cli.app import app
from vilu.errors import DataError
from vilu.predictors.persistence.files import SAMPLE
from vilu.predictors.persistence.fit_sample import MAX_SAMPLE_BYTES
from vilu.predictors.persistence.hub import pull, push
from vilu_bench.methods.neighbours import KNNVote


def test_a_sample_is_at_most_two_megabytes_and_drawn_with_the_seed() -> None:
    n, d = 3000, 512
    rng = np.random.default_rng(0)
    text = rng.normal(size=(5, d))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    image = text[rng.integers(5, size=n)] + rng.normal(size=(n, d))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    data = vilu.Embeddings(image, text, target=rng.integers(5, size=n), logit_scale=20.0)
    fits = [vilu.PREDICTORS["vilu_zero"](seed=seed).fit(data) for seed in (0, 0, 1)]
    samples = [predictor.sample_.image for predictor in fits]
    assert samples[0].numpy().nbytes <= MAX_SAMPLE_BYTES == 2_000_000
    assert samples[0].shape == (1953, d)
    assert samples[0].dtype == torch.float16
    assert samples[0].equal(samples[1])
    assert not samples[0].equal(samples[2])
    assert fits[0].sample_.share == 1953 / n


def test_a_sample_comes_back_and_goes_with_its_fit(tmp_path: Path) -> None:
    first = KNNVote(k=3).fit(toy_embeddings(40))
    first.save(tmp_path / "p")
    loaded = vilu.load(tmp_path / "p")
    assert loaded.sample_.image.equal(first.sample_.image)
    loaded.save(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / SAMPLE).read_bytes() == (tmp_path / "p" / SAMPLE).read_bytes()
    (tmp_path / "elsewhere" / SAMPLE).unlink()  # a sample may be missing
    assert vilu.load(tmp_path / "elsewhere").sample_ is None
    vilu.MCM().save(tmp_path / "p")
    assert not (tmp_path / "p" / SAMPLE).exists()


def test_a_damaged_sample_and_that_of_another_fit_are_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        KNNVote(k=3).fit(toy_embeddings(40, seed=seed)).save(tmp_path / str(seed))
    path = tmp_path / "0" / SAMPLE
    whole = path.read_bytes()
    for place in (4, 60, len(whole) // 2, len(whole) - 1):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(bytes(content))
        with pytest.raises(DataError, match="is damaged"):
            vilu.load(tmp_path / "0")
    shutil.copy(tmp_path / "1" / SAMPLE, path)
    with pytest.raises(DataError, match="is of another fit than the weights beside it"):
        vilu.load(tmp_path / "0")
    path.write_bytes(bytes(3_000_000))
    with pytest.raises(DataError, match="has 3,000,000 bytes"):
        vilu.load(tmp_path / "0")


def test_a_sample_is_pushed_only_where_it_is_asked_for(tmp_path: Path) -> None:
    KNNVote(k=3).fit(toy_embeddings(40)).save(tmp_path / "predictor")
    push(tmp_path / "predictor", str(tmp_path / "shelf"))
    assert not (tmp_path / "shelf" / SAMPLE).exists()
    assert vilu.load(tmp_path / "shelf").sample_ is None
    with_it = tmp_path / "with-it"
    done = CliRunner().invoke(
        app, ["push", str(tmp_path / "predictor"), str(with_it), "--with-sample"]
    )
    assert done.exit_code == 0, done.output
    pull(str(with_it), tmp_path / "pulled")
    assert vilu.load(tmp_path / "pulled").sample_ is not None


def test_fit_without_a_sample(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 120, 0)
    fit = ["fit", str(store), "-o", str(tmp_path / "p"), "--method", "knn_vote"]
    for options, is_there in (([], True), (["--no-sample", "--overwrite"], False)):
        done = CliRunner().invoke(app, [*fit, *options])
        assert done.exit_code == 0, done.output
        assert (tmp_path / "p" / SAMPLE).exists() is is_there
