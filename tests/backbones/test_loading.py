from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import huggingface_hub.constants as hub
import pytest
import torch
from safetensors import SafetensorError

from vilu.artifacts.hashing import tensors_hash
from vilu.backbones import loading
from vilu.backbones.base import TEXT_BATCH_SIZE
from vilu.backbones.catalog import load_backbone
from vilu.backbones.loading import load_cached_first, load_local, tokenizer_identity
from vilu.errors import MissingModelError, ProvenanceError, StorageError, UsageError
from vilu.extras import CONNECT_SECONDS, import_extra, is_hub_reachable, suppress_messages
from vilu.progress import reporting

transformers_bars = import_module("transformers.utils.logging")
hub_bars = import_module("huggingface_hub.utils.tqdm")


def test_missing_extra_says_what_to_install() -> None:
    with pytest.raises(MissingModelError, match=r"pip install 'vilu\[clip\]'") as caught:
        import_extra("no_such_module_here", "clip")
    assert caught.value.exit_code == 5


def test_loading_and_encoding_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Work that takes more than two seconds must be reported.

    The log says what is loaded and how long that took. A progress task counts the encoded texts.
    """
    monkeypatch.setattr("vilu.backbones.catalog.SLOW_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "vilu")
    backbone = load_backbone("compact:64")
    assert caplog.messages[0] == "loading compact:64 ..."
    assert re.fullmatch(r"compact:64 loaded in \d+\.\d s", caplog.messages[-1])
    backbone.encode_texts(["the first one takes more"])
    seen: list[float] = []
    task = types.SimpleNamespace(advance=lambda steps, note="": seen.append(steps))
    reporter = types.SimpleNamespace(
        start=lambda *about: seen.append(about) or task, finish=lambda _: None
    )
    with reporting(reporter):
        backbone.encode_texts(["a"])
        assert seen == []
        backbone.encode_texts([f"a photo of {i}" for i in range(TEXT_BATCH_SIZE + 1)])
    assert seen == [("encode texts", TEXT_BATCH_SIZE + 1, "texts"), TEXT_BATCH_SIZE, 1]


def test_hash_of_tensors() -> None:
    tensors = {"b": torch.tensor(2.5), "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)}
    by_hand = hashlib.sha256()
    by_hand.update(b"a torch.bfloat16 (2, 3)\n")
    by_hand.update(bytes.fromhex("0000 803f 0040 4040 8040 a040"))  # 0 1 2 3 4 5 in bfloat16
    by_hand.update(b"b torch.float32 ()\n")
    by_hand.update(bytes.fromhex("00002040"))  # 2.5 in float32, little endian
    assert tensors_hash(tensors) == by_hand.hexdigest()
    transposed = {**tensors, "a": tensors["a"].T.contiguous().T}
    assert tensors_hash(transposed) == by_hand.hexdigest()
    assert tensors_hash({**tensors, "a": tensors["a"].T}) != by_hand.hexdigest()


def test_tokenizers_are_told_apart() -> None:
    def identity(shift: int) -> str:
        return tokenizer_identity(
            object(), lambda texts: torch.tensor([[ord(t) + shift for t in x[:9]] for x in texts])
        )

    assert identity(0) == identity(0)
    assert identity(0) != identity(1)
    assert identity(0).startswith("object ")


def test_tokenizer_without_vocabulary() -> None:
    start, end, padding, unknown = 0, 1, 2, 3
    ids = torch.tensor([[start, *[unknown] * 6, end, *[padding] * 9]] * 2)
    with pytest.raises(ProvenanceError, match="vocabulary is missing"):
        tokenizer_identity(object(), lambda texts: ids)


def settings_of_output() -> list[object]:
    """Return the process settings that decide which output is shown."""
    return [
        list(logging.getLogger().handlers),
        logging.root.manager.disable,
        logging.getLogRecordFactory(),
        logging.basicConfig,
        list(warnings.filters),
        transformers_bars.is_progress_bar_enabled(),
        transformers_bars._tqdm_hook,
        hub_bars.are_progress_bars_disabled,
        hub_bars.are_progress_bars_disabled(),
    ]


def shown_output(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Return which output this thread sees: a warning, two log lines, and each library's bar."""
    shown = set()
    name = f"thread {threading.get_ident()}"
    try:
        warnings.warn("heard", stacklevel=1)
    except UserWarning:  # the tests' filters turn warnings into errors
        shown.add("warning")
    logging.getLogger(name).warning("heard")
    logging.getLogger(name).error("heard")
    shown |= {record.levelname for record in caplog.records if record.name == name}
    if not transformers_bars.tqdm(total=1).disable:
        shown.add("bar of transformers")
    if not hub_bars.tqdm(total=1).disable:
        shown.add("bar of the hub")
    return shown


EVERYTHING = {"warning", "WARNING", "ERROR", "bar of transformers", "bar of the hub"}


def test_quiet_restores_everything() -> None:
    before = settings_of_output()

    def interrupted() -> None:
        with suppress_messages():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert settings_of_output() == before


def test_quiet_silences_its_thread_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A second thread must see everything. It may be in its own block, which ends earlier."""

    def in_own_block() -> set[str]:
        with suppress_messages():
            return shown_output(caplog)

    before = settings_of_output()
    with ThreadPoolExecutor(1) as second_thread:
        with suppress_messages():
            assert second_thread.submit(shown_output, caplog).result() == EVERYTHING
            caplog.clear()
            assert second_thread.submit(in_own_block).result() == {"ERROR"}
            assert shown_output(caplog) == {"ERROR"}
            with suppress_messages():
                pass
            caplog.clear()
            assert shown_output(caplog) == {"ERROR"}
        caplog.clear()
        assert second_thread.submit(shown_output, caplog).result() == EVERYTHING
    assert shown_output(caplog) == EVERYTHING
    assert settings_of_output() == before


def test_quiet_leaves_no_handler_on_a_bare_root() -> None:
    # logging.info() calls basicConfig() on a root without handlers. pytest's own handlers would
    # hide that, so the test needs another process.
    code = """if True:
        import logging, sys
        from concurrent.futures import ThreadPoolExecutor
        from vilu.extras import suppress_messages
        with suppress_messages():
            logging.info("x"); logging.warning("y")
        left = len(logging.getLogger().handlers)
        with suppress_messages(), ThreadPoolExecutor(1) as second_thread:
            second_thread.submit(logging.basicConfig, stream=sys.stdout).result()
            second_thread.submit(logging.warning, "of the second thread").result()
        raise SystemExit(left)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "WARNING:root:of the second thread\n"


def failing(error: Exception) -> Callable[[], None]:
    def load() -> None:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (FileNotFoundError("no config.json"), MissingModelError),
        (ImportError("needs sentencepiece"), MissingModelError),
        (SafetensorError("header too large"), StorageError),
        (pickle.UnpicklingError("weights only"), StorageError),
        (RuntimeError("size mismatch for head.weight"), ProvenanceError),
        (KeyError("vision_cfg"), ProvenanceError),
        (UsageError("ours"), UsageError),
    ],
)
def test_failures_are_named(error: Exception, becomes: type[Exception]) -> None:
    told = (
        "only tensors are read" if isinstance(error, pickle.UnpicklingError) else str(error.args[0])
    )
    with pytest.raises(becomes, match=told) as caught:
        load_local(failing(error), "hf:tiny")
    assert type(caught.value) is becomes


def test_bugs_are_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError):
        load_local(failing(ZeroDivisionError()), "hf:tiny")


def test_cached_model_never_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "is_hub_reachable", failing(AssertionError("asked")))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    seen: list[bool] = []

    def load() -> str:
        seen.append(bool(hub.HF_HUB_OFFLINE))
        return "model"

    assert load_cached_first(load, "hf:a/b", "a/b") == "model"
    assert seen == [True]
    assert hub.HF_HUB_OFFLINE is False


def test_a_second_thread_stays_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread loads from the cache, another thread may use the network."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)

    def is_offline() -> bool:
        return bool(hub.HF_HUB_OFFLINE)

    def load(second_thread: ThreadPoolExecutor) -> list[bool]:
        seen = [is_offline(), second_thread.submit(is_offline).result()]
        # This second load ends while the first goes on.
        second_thread.submit(load_local, is_offline, "hf:tiny").result()
        return [*seen, is_offline(), second_thread.submit(is_offline).result()]

    with ThreadPoolExecutor(1) as second_thread:
        seen = load_cached_first(lambda: load(second_thread), "hf:a/b", "a/b")
        assert seen == [True, False, True, False]
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # a caller who is offline stays offline
        seen = load_cached_first(lambda: load(second_thread), "hf:a/b", "a/b")
        assert seen == [True, True, True, True]
    assert hub.HF_HUB_OFFLINE is True


@pytest.mark.parametrize(
    "error", [FileNotFoundError("not cached"), ValueError("tokenizer and weights differ")]
)
def test_uncached_model_is_downloaded(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: True)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)

    def load() -> str:
        if hub.HF_HUB_OFFLINE:
            raise error
        return "model"

    with caplog.at_level(logging.INFO):
        assert load_cached_first(load, "hf:a/b", "a/b") == "model"
    assert "downloading a/b" in caplog.text


def test_files_that_do_not_go_together_stay_so_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: False)
    with pytest.raises(ProvenanceError, match="size mismatch"):
        load_cached_first(failing(RuntimeError("size mismatch")), "hf:a/b", "a/b")


@pytest.mark.parametrize(
    ("reachable", "reason"), [(False, "cannot be reached"), (True, "download failed: no such")]
)
def test_absent_model_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, reachable: bool, reason: str
) -> None:
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: reachable)
    with pytest.raises(MissingModelError, match=f"{reason}.*hf download a/b.*HF_HUB_OFFLINE=1"):
        load_cached_first(failing(FileNotFoundError("no such repository")), "hf:a/b", "a/b")


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove proxies and HF_HUB_OFFLINE, whatever the environment says."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("direct")
def test_reachability(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert is_hub_reachable()
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
        assert not is_hub_reachable()
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    assert not is_hub_reachable()
    assert time.monotonic() - start < CONNECT_SECONDS + 1
    for proxies, reachable in [({"no": "localhost"}, False), ({"http": "http://proxy:3128"}, True)]:
        monkeypatch.setattr(urllib.request, "getproxies", lambda proxies=proxies: proxies)
        assert is_hub_reachable() is reachable
