"""Getting weights from disk or hub: silently, quickly when there is no network, and never half."""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
import socket
import sys
import textwrap
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pickle import UnpicklingError
from types import ModuleType
from typing import TypeVar
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from torch import Tensor

from vilu.embeddings.space import digest
from vilu.errors import MissingModelError, ProvenanceError, StorageError, UsageError, ViLUError

REACH_TIMEOUT = 3.0
"""Seconds the hub has to accept a connection; its own client would retry for 23 seconds per file."""

PROBES = ["a photo of a dog.", "MiXed Case, ümläuts & 2,048 signs?!"]
DISTINCT = 5
"""Different words and signs in the first probe; special tokens alone (start, unknown, end, padding) make four."""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


def import_extra(module: str, extra: str) -> ModuleType:
    """A module of an optional dependency.

    Raises:
        MissingModelError: If it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingModelError(f"this needs: pip install 'vilu[{extra}]' ({error}).") from error


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def tokenizer_identity(tokenizer: object, encode: Callable[[list[str]], Tensor]) -> str:
    """Its class and a hash of the token numbers of two sentences, which tells vocabularies and lengths apart.

    Raises:
        ProvenanceError: If different words get the same number: transformers makes up a vocabulary of special tokens
            where the tokenizer's files are missing.
    """
    tokens = encode(PROBES)
    if len(tokens[0].unique()) < DISTINCT:
        raise ProvenanceError(
            f"the tokenizer ({type(tokenizer).__name__}) knows none of the words in {PROBES[0]!r}: its vocabulary is "
            "missing. Put the tokenizer files (tokenizer.json and its kin) beside the weights."
        )
    return f"{type(tokenizer).__name__} {digest(tokens.tolist())}"


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines below ERROR or progress bars while a model loads; all is restored afterwards.

    What loaders only warn of (weights that are missing or do not fit) vilu checks itself and raises.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handler = logging.NullHandler()  # on a root without any, open_clip's logging.info() would leave one behind
    root.addHandler(handler)
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings(), _no_progress_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off the bars of transformers, if it is imported."""
    bars = sys.modules.get("transformers.utils.logging")
    shown = bars is not None and bars.is_progress_bar_enabled()
    if bars is not None and shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if bars is not None and shown:
            bars.enable_progress_bar()


def require_hub_id(text: str) -> str:
    """``text``, if it names a repository of the model hub.

    Raises:
        UsageError: If it does not: most often a folder that is not there.
    """
    if not HUB_ID.fullmatch(text):
        raise UsageError(f"expected a folder that exists, or ORG/NAME on the model hub. Got {text!r} instead.")
    return text


class _AbsentError(Exception):
    """Something that a load needs is not there; the message says what."""


def load_local(load: Callable[[], Loaded], name: str) -> Loaded:
    """What ``load`` makes of a local folder, without any network; raises as ``load_cached_first``."""
    try:
        return _run(load, name, offline=True)
    except _AbsentError as error:
        raise MissingModelError(f"{name} cannot be loaded from this folder: {error}.") from error


def load_cached_first(load: Callable[[], Loaded], name: str, repository: str) -> Loaded:
    """What ``load`` makes of the hub's local cache; if something is not in it, ``load`` may download.

    So a cached model never waits for a network, and does not change under the user.

    Args:
        load: Raises OSError for what is not there (as the hub, transformers and Python do).
        name: Of the backbone, for messages.
        repository: Its hub repository, for messages.

    Raises:
        MissingModelError: If it is neither in the cache nor can be downloaded, or a package is not installed.
        ProvenanceError: If the weights do not fit the model.
        StorageError: If a file is damaged.
    """
    try:
        return _run(load, name, offline=True)
    except (_AbsentError, ProvenanceError) as error:  # files that do not go together: perhaps one is not cached yet
        first = error
    if hub_reachable():
        log.info("%s is not in the local cache of the model hub; downloading %s", name, repository)
        try:
            return _run(load, name, offline=False)
        except _AbsentError as error:
            reason = f"the download failed: {error}"
    elif isinstance(first, ProvenanceError):
        raise first
    else:
        reason = "the hub cannot be reached"
    raise MissingModelError(
        f"{name} is not in the local cache of the model hub, and {reason}. Run `hf download {repository}` where there "
        "is a network, bring its cache here (HF_HOME) and set HF_HUB_OFFLINE=1, or name a local folder; the backbone "
        "'compact' needs no hub."
    ) from first


def _run(load: Callable[[], Loaded], name: str, *, offline: bool) -> Loaded:
    """Load quietly, and turn what can go wrong into our errors."""
    try:
        with quiet(), _hub_offline() if offline else nullcontext():
            return load()
    except ViLUError:
        raise
    except ImportError as error:
        raise MissingModelError(f"{name} needs a package that is not installed: {_brief(error)}.") from error
    except OSError as error:
        raise _AbsentError(_brief(error)) from error
    except (SafetensorError, UnpicklingError) as error:
        raise StorageError(
            f"the weights of {name} are damaged or more than plain tensors: {_brief(error)}. Download them again."
        ) from error
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:  # foreign code, foreign files
        raise ProvenanceError(f"the files of {name} do not make a model together: {_brief(error)}.") from error


def hub_reachable() -> bool:
    """Whether the hub may be asked (HF_HUB_OFFLINE is not set) and accepts a connection within ``REACH_TIMEOUT``."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if {endpoint.scheme, "all"} & urllib.request.getproxies().keys():  # only the proxy knows
        return True
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        with socket.create_connection((endpoint.hostname, port), timeout=REACH_TIMEOUT):
            return True
    except OSError:
        return False


@contextmanager
def _hub_offline() -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1, which the hub's client reads only once, when it is imported."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _brief(error: BaseException) -> str:
    """The message on one line, without its end where it is long."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...").rstrip(".")
