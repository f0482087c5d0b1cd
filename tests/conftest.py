"""Provide data for many tests: small, seeded, and with failures that can be predicted."""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import settings

from vilu.embeddings.checks import RowNumbers
from vilu.embeddings.memory import Embeddings, PairEmbeddings
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import OUTSIDE
from vilu.metrics.histogram import Histogram

# The examples are the same on every machine. There is no time limit, because it would depend on
# the machine. `make test-fuzz` draws other examples.
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, deadline=None)
settings.register_profile("fuzz", max_examples=1_000, database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

BROWSER = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHARED = Path(__file__).resolve().parents[2] / "shared"


def refuse_network() -> None:
    """Make every attempt to reach another machine an error in this process from here on."""
    own = {
        address.address.split("%")[0] for link in psutil.net_if_addrs().values() for address in link
    }
    own |= {"", "localhost", socket.gethostname()}

    def is_here(host: object) -> bool:
        if host is None or host in own:
            return True
        try:
            return (
                ipaddress.ip_address(str(host)).is_loopback
                or ipaddress.ip_address(str(host)).is_unspecified
            )
        except ValueError:
            return False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.connect":
            connection, address = arguments
            # A datagram connection sends nothing. Programs learn their own address from one.
            sends = isinstance(connection, socket.socket) and connection.type == socket.SOCK_STREAM
            host = address[0] if isinstance(address, tuple) and sends else None
        elif event == "socket.getaddrinfo":
            host = arguments[0]
        else:
            return
        if not is_here(host.decode() if isinstance(host, bytes) else host):
            raise ConnectionRefusedError(f"this asks the network: {event} {host!r}")

    sys.addaudithook(hook)


refuse_network()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return Chromium without a window, and with its own network features off."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, args=BROWSER)
        yield launched
        launched.close()


def few(values: Iterable[object], n: int) -> list[object]:
    """Return parameters whose first ``n`` are in every test run.

    The others run in `make test-slow`. A tuple has the values of several arguments.
    """
    parameters: list[object] = []
    for i, value in enumerate(values):
        if i < n:
            parameters.append(value)
            continue
        arguments = value if isinstance(value, tuple) else (value,)
        parameters.append(pytest.param(*arguments, marks=pytest.mark.slow))
    return parameters


def toy_embeddings(
    n: int = 600,
    k: int = 5,
    d: int = 16,
    *,
    seed: int = 0,
    ids_from: int | None = 0,
    scale: float = 20.0,
) -> Embeddings:
    """Return images from K classes, half of them blurred.

    A blurred image says so in its last coordinate and is often missed.
    """
    rng = np.random.default_rng(seed)
    text = np.random.default_rng(99).normal(size=(k, d))
    text[:, -1] = 0
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    target = rng.integers(k, size=n)
    blurred = rng.random(n) < 0.5
    noise = rng.normal(size=(n, d)) * np.where(blurred, 0.6, 0.05)[:, None]
    noise[:, -1] = np.where(blurred, 1.0, -1.0)
    ids = None if ids_from is None else [f"row-{i}" for i in range(ids_from, ids_from + n)]
    image = text[target] + noise
    norm = np.linalg.norm(image, axis=1, keepdims=True)
    columns = toy_columns(image, text, rng)
    names = [f"class {i}" for i in range(k)]
    return Embeddings(
        image / norm,
        text,
        target=target,
        logit_scale=scale,
        class_names=names,
        ids=ids,
        columns=columns,
    )


def toy_columns(
    image: np.ndarray, text: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return every column.

    The columns include features whose projection is the embedding, noisy views, prompts around the
    texts, and random words.
    """
    d = image.shape[1]
    projection = np.random.default_rng(98).normal(size=(d, d)) / np.sqrt(d) + np.eye(d)
    views = image[:, None] + rng.normal(size=(len(image), 4, d)) * 0.1
    negatives = np.random.default_rng(96).normal(size=(40, d))
    small = np.random.default_rng(95).normal(size=(d, d // 2)) / np.sqrt(
        d
    )  # the second model sees this part
    prompts = text[:, None] + np.random.default_rng(97).normal(size=(len(text), 3, d)) * 0.05
    return {
        "features": np.linalg.solve(projection, image.T).T,
        "text_features": np.linalg.solve(projection, text.T).T,
        "image_projection": projection,
        "text_projection": projection,
        "views": views / np.linalg.norm(views, axis=2, keepdims=True),
        "prompts": prompts / np.linalg.norm(prompts, axis=2, keepdims=True),
        "second_image": image @ small,
        "second_text": text @ small * 20.0,
        "negatives": negatives / np.linalg.norm(negatives, axis=1, keepdims=True),
    }


def without_words(data: EmbeddingSource) -> EmbeddingSource:
    """Return the same rows without everyday words, so that no method has the outcome "outside"."""
    return data.take(torch.arange(len(data)), columns=data.columns - {"negatives"})


def variant(source: Embeddings, **changes: object) -> Embeddings:
    """Return the same rows and columns with other arguments for ``Embeddings``."""
    columns = {name: source.column(name, torch.arange(len(source))) for name in source.columns}
    target = source.target.masked_fill(source.outside, OUTSIDE)
    same = {"image": source.image, "text": source.text, "target": target, "space": source.space}
    return Embeddings(**{**same, "ids": source.ids, "columns": columns, **changes})


def in_memory(source: EmbeddingSource, rows: torch.Tensor) -> Embeddings:
    """Return a copy of some rows from a source with shared candidates."""
    ids = None if isinstance(source.ids, RowNumbers) else [source.ids[row] for row in rows.tolist()]
    columns = {name: source.column(name, rows) for name in source.columns}
    same = {
        "class_names": source.class_names,
        "ids": ids,
        "space": source.space,
        "columns": columns,
    }
    found = source.candidates(rows)
    target = found.target.masked_fill(source.outside[rows], OUTSIDE)
    return Embeddings(source.image_rows(rows), found.text, target=target, **same)


def toy_pairs(n: int = 256, pool: int = 32, d: int = 16, *, seed: int = 0):
    """Return image-caption pairs, blurred as in `toy_embeddings`."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(n, d))
    text[:, -1] = 0
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    blurred = rng.random(n) < 0.5
    noise = rng.normal(size=(n, d)) * np.where(blurred, 0.6, 0.02)[:, None]
    noise[:, -1] = np.where(blurred, 1.0, -1.0)
    image = text + noise
    norm = np.linalg.norm(image, axis=1, keepdims=True)
    return PairEmbeddings(image / norm, text, pool, 20.0, columns=toy_columns(image, text, rng))


def same_histogram(one: Histogram, other: Histogram) -> bool:
    """Return whether two histograms hold the same, to the last bit."""
    mine, theirs = ((h.level, h.low, h.high) for h in (one, other))
    columns = ((one.bins, other.bins), (one.correct, other.correct), (one.wrong, other.wrong))
    return mine == theirs and all(np.array_equal(a, b) for a, b in columns)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first.

    If several processes share the files, no slow file is then left for the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.dtest is not None:
            item.dtest.globs = {
                "__name__": "__main__"
            }  # an example runs as a reader pastes it, without its module


@pytest.fixture(autouse=True)
def quiet_logger() -> Iterator[None]:
    """Restore the logger after a command that runs in this process."""
    logger = logging.getLogger("vilu")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="session")
def train() -> Embeddings:
    return toy_embeddings()


@pytest.fixture(scope="session")
def test() -> Embeddings:
    return toy_embeddings(seed=1, ids_from=10_000)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED
