"""What the kept artefacts are asked, by their test and by the script that wrote them;
public names alone.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import vilu

DATA = Path(__file__).parent / "data"
EXACT = os.environ.get("VILU_COMPAT_EXACT") == "1"
"""Ask for the same bits of what is computed, too:
true on the machine, and with the number of threads, that wrote.
"""

WRITTEN = 1_764_000_000
"""When the files of the archives were written, since the fingerprint of a data set is over that,
too.
"""

EPSILON = float(np.finfo(np.float32).eps)

Arrays = dict[str, NDArray[Any]]


def unpack(name: str, folder: Path) -> Path:
    """The files of an archive in a new folder."""
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(folder / name)
    for path in (folder / name).rglob("*"):
        os.utime(path, (WRITTEN, WRITTEN))
    return folder / name


def arrays(name: str) -> Arrays:
    """The arrays of a kept file."""
    with np.load(DATA / f"{name}.npz") as found:
        return dict(found)


def document(name: str) -> Any:
    """A kept JSON file."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def classes(
    of: Arrays, name: str, change: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray
) -> vilu.Embeddings:
    """The rows ``name`` of the kept inputs as embeddings with shared candidates and every
    column.
    """
    columns = {
        key.split("/")[2]: change(value)
        for key, value in of.items()
        if key.startswith(f"{name}/columns/")
    }
    image, text = change(of[f"{name}/image"]), change(of[f"{name}/text"])
    names = [f"class {number}" for number in range(len(text))]
    ids = [f"{name} {number}" for number in range(len(image))]
    return vilu.Embeddings(
        image, text, of[f"{name}/target"], 20.0, class_names=names, ids=ids, columns=columns
    )


def pairs(
    of: Arrays, name: str, change: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray
) -> vilu.PairEmbeddings:
    """The rows ``name`` of the kept inputs as image-caption pairs in pools of eight."""
    columns = {
        key.split("/")[2]: change(value)
        for key, value in of.items()
        if key.startswith(f"{name}/columns/")
    }
    image, text = change(of[f"{name}/image"]), change(of[f"{name}/text"])
    ids = [f"{name} {number}" for number in range(len(image))]
    return vilu.PairEmbeddings(image, text, 8, 20.0, ids=ids, columns=columns)


def answers(predictor: vilu.FailurePredictor, data: vilu.EmbeddingSource) -> Arrays:
    """Everything that a predictor says of rows:
    uncertainty, log-posterior, and where it has one, the probability.
    """
    found: Arrays = {"uncertainty": predictor.predict_uncertainty(data)}
    posterior = np.full((len(data), data.pool_size or data.n_candidates), np.nan)
    for batch, _ in predictor.scored(data):
        posterior[batch.index.numpy()] = predictor.log_posterior(batch).numpy()
    found["posterior"] = posterior
    if predictor.is_probability or predictor.calibrator_ is not None:
        found["probability"] = predictor.predict_failure_probability(data)
    return found


def require_same(found: Arrays, expected: Arrays, tolerance: Arrays, what: str) -> None:
    """The same numbers:
    to the bit where asked for, else to the tolerance that the arithmetic leaves to each.
    """
    assert found.keys() == expected.keys(), what
    for name, values in expected.items():
        mine = found[name]
        assert (mine.shape, mine.dtype) == (values.shape, values.dtype), f"{what}: {name}"
        if EXACT:
            assert np.array_equal(mine, values, equal_nan=True), f"{what}: {name}"
            continue
        assert np.array_equal(np.isnan(mine), np.isnan(values)), f"{what}: {name}"
        excess = np.nan_to_num(np.abs(mine - values) - tolerance[name]).max()
        assert excess <= 0, f"{what}: {name} is {excess:.3g} farther away than rounding explains"


def rounding(ask: Callable[[Callable[[NDArray[Any]], NDArray[Any]]], Arrays], width: int) -> Arrays:
    """How far rounding can move each number of ``ask``, found by moving what goes in.

    A float32 product of width D has a relative error of up to D eps in any order of its sum, as if
    its inputs were so much others. So every input is moved by up to D eps of itself, eight times,
    and what an answer moves by is multiplied by four; and by 16 eps of the largest number, for what
    is rounded after the products.
    """
    plain = ask(np.asarray)
    moved = {name: np.zeros_like(values) for name, values in plain.items()}
    rng = np.random.default_rng(0)

    def change(values: NDArray[Any]) -> NDArray[Any]:
        noise = rng.uniform(-1, 1, values.shape) * width * EPSILON
        return np.asarray(values * (1 + noise), dtype=values.dtype)

    for _ in range(8):
        again = ask(change)
        for name, values in plain.items():
            moved[name] = np.fmax(moved[name], np.abs(again[name] - values))
    return {
        name: 4 * np.nan_to_num(moved[name]) + 16 * EPSILON * max(1.0, np.nanmax(np.abs(values)))
        for name, values in plain.items()
    }


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


LATER = re.compile(
    r"(/coverage, all|/lac, all|/ltt, all|/status)/kind|/(columns|labels)|/config/trained/settings"
    r"|/config/(methods/[^/]+/unlabelled|data/[^/]+/(fit_share|second|negatives)|views/\d+/(mean|means_only|ticks))"
)
"""Where documents have keys that those of then did not have, or had at another place."""


def require_near(
    found: Any, expected: Any, relative: float, where: str = "", *, exact: bool = EXACT
) -> None:
    """The same JSON; numbers with a fraction up to rounding, unless the same bits are asked for."""
    assert type(found) is type(expected), f"{where}: {found!r} against {expected!r}"
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), f"{where}: {list(found)}"
        here, then = (
            [key for key in keys if not LATER.fullmatch(f"{where}/{key}")]
            for keys in (found, expected)
        )
        assert here == then, where
        for key, value in expected.items():
            require_near(found[key], value, relative, f"{where}/{key}", exact=exact)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            require_near(found[number], value, relative, f"{where}/{number}", exact=exact)
    elif isinstance(expected, float) and not exact:
        assert found == pytest.approx(expected, rel=relative, abs=relative), where
    else:
        assert found == expected, where
