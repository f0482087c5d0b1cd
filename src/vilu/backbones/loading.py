"""Getting weights from disk or hub: silently, quickly when there is no network, and never half."""

from __future__ import annotations

import logging
import re
import struct
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pickle import UnpicklingError
from typing import TypeVar

from safetensors import SafetensorError
from torch import Tensor

from vilu.artifacts.hashing import digest
from vilu.errors import MissingModelError, ProvenanceError, StorageError, UsageError, ViLUError
from vilu.extras import hub_reachable, quiet, setting

UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    struct.error,
)
"""What foreign code raises on foreign files that are damaged, or made to harm."""

PROBES = ["a photo of a dog.", "MiXed Case, ümläuts & 2,048 signs?!"]
DISTINCT = 5
"""Different words and signs in the first probe.

Special tokens alone (start, unknown, end, padding) make four.
"""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


def tokenizer_identity(tokenizer: object, encode: Callable[[list[str]], Tensor]) -> str:
    """Its class and a hash of the tokens of two sentences, which tells vocabularies apart."""
    tokens = encode(PROBES)
    # transformers makes up a vocabulary where the tokenizer's files are missing
    if len(tokens[0].unique()) < DISTINCT:
        raise ProvenanceError(
            f"the tokenizer ({type(tokenizer).__name__}) knows none of the words in {PROBES[0]!r}: "
            "its vocabulary is missing. Put the tokenizer files (tokenizer.json and its kin) "
            "beside the weights."
        )
    return f"{type(tokenizer).__name__} {digest(tokens.tolist())}"


def require_hub_id(text: str) -> str:
    """``text``, if it names a repository of the model hub.

    If not, it is most often a folder that is not there.
    """
    if not HUB_ID.fullmatch(text):
        raise UsageError(
            f"expected a folder that exists, or ORG/NAME on the model hub. Got {text!r} instead."
        )
    return text


class _AbsentError(Exception):
    """Something that a load needs is not there; the message says what."""


def load_local(load: Callable[[], Loaded], name: str) -> Loaded:
    """What ``load`` makes of a local folder, without any network."""
    try:
        return _run(load, name, offline=True)
    except _AbsentError as error:
        raise MissingModelError(f"{name} cannot be loaded from this folder: {error}.") from error


def load_cached_first(load: Callable[[], Loaded], name: str, repository: str) -> Loaded:
    """What ``load`` makes of the hub's local cache; where that lacks something, it may download.

    So a cached model never waits for a network, and does not change under the user. ``load`` raises
    OSError for what is not there, as the hub, transformers and Python do.
    """
    try:
        return _run(load, name, offline=True)
    # files that do not go together: perhaps one is not cached yet
    except (_AbsentError, ProvenanceError) as error:
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
        f"{name} is not in the local cache of the model hub, and {reason}. Run `hf download "
        f"{repository}` where there is a network, bring its cache here (HF_HOME) and set "
        "HF_HUB_OFFLINE=1, or name a local folder; the backbone 'compact' needs no hub."
    ) from first


def _run(load: Callable[[], Loaded], name: str, *, offline: bool) -> Loaded:
    """Load quietly, and turn what can go wrong into our errors."""
    try:
        network = _offline_hub() if offline else nullcontext()
        with quiet(), network:
            return load()
    except ViLUError:
        raise
    except ImportError as error:
        raise MissingModelError(
            f"{name} needs a package that is not installed: {_brief(error)}."
        ) from error
    except OSError as error:
        raise _AbsentError(_brief(error)) from error
    except (SafetensorError, UnpicklingError) as error:
        why = why_refused(error) if isinstance(error, UnpicklingError) else _brief(error)
        raise StorageError(
            f"the weights of {name} are damaged or more than plain tensors: {why}. Download them "
            "again."
        ) from error
    except UNREADABLE as error:
        raise ProvenanceError(
            f"the files of {name} do not make a model together: {_brief(error)}."
        ) from error


def _offline_hub() -> AbstractContextManager[None]:
    """A block in which the hub's client asks no network; it reads HF_HUB_OFFLINE only once."""
    client = import_module("huggingface_hub.constants")
    return setting(client, HF_HUB_OFFLINE=True)


def why_refused(error: Exception) -> str:
    """Why torch's restricted unpickler would not read a file.

    Its own words tell how to have everything executed, so they are not shown.
    """
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = "it is cut short, damaged or something else"
    if asked:
        reason = f"it asks for {asked[1]}"
    return f"{reason}, and tensors alone are read"


def _brief(error: BaseException) -> str:
    """The message on one line, without its end where it is long."""
    message = str(error) or type(error).__name__
    return textwrap.shorten(message, 300, placeholder=" ...").rstrip(".")
