"""Loading of model weights from a folder or from the model hub.

While a model is loaded, libraries print nothing, and a missing network causes no waiting. An
incomplete or damaged model raises an error.
"""

from __future__ import annotations

import logging
import re
import struct
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pickle import UnpicklingError
from typing import TypeVar

from safetensors import SafetensorError
from torch import Tensor

from vilu.artifacts.hashing import digest
from vilu.errors import MissingModelError, ProvenanceError, StorageError, UsageError, ViLUError
from vilu.extras import is_hub_reachable, offline_hub, suppress_messages

READING_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    struct.error,
)
"""Exceptions that libraries raise for damaged or malicious files."""

PROBE_TEXTS = ["a photo of a dog.", "MiXed Case, ümläuts & 2,048 signs?!"]
"""Sentences whose tokens identify a tokenizer."""
MIN_DISTINCT_TOKENS = 5
"""Number of different words and signs in the first probe text.

A tokenizer that knows no word makes at most four different tokens from this text: start, unknown,
end and padding.
"""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # a repository's NAME or ORG/NAME

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


def tokenizer_identity(tokenizer: object, encode: Callable[[list[str]], Tensor]) -> str:
    """Return the tokenizer's class, and a hash of the tokens for two sentences.

    Tokenizers with different vocabularies have different hashes.

    Raises:
        ProvenanceError: If the vocabulary is missing.
    """
    tokens = encode(PROBE_TEXTS)
    n_distinct = len(tokens[0].unique())
    # transformers creates an empty vocabulary if the tokenizer's files are missing
    if n_distinct < MIN_DISTINCT_TOKENS:
        raise ProvenanceError(
            f"the tokenizer ({type(tokenizer).__name__}) knows none of the words in "
            f"{PROBE_TEXTS[0]!r}: its vocabulary is missing. Put the tokenizer files (such as "
            "tokenizer.json) beside the weights."
        )
    return f"{type(tokenizer).__name__} {digest(tokens.tolist())}"


def require_hub_id(text: str) -> str:
    """Return ``text`` if ``text`` can be the name of a repository on the model hub.

    Raises:
        UsageError: If ``text`` cannot be such a name. Usually, ``text`` is then a missing folder's
            path.
    """
    if not HUB_ID.fullmatch(text):
        raise UsageError(
            f"expected a folder that exists, or ORG/NAME on the model hub. Got {text!r} instead."
        )
    return text


class _MissingFileError(Exception):
    """A model file is missing. The message names the file."""


def load_local(load: Callable[[], Loaded], name: str) -> Loaded:
    """Run ``load`` without network access, to load the model ``name`` from a local folder."""
    try:
        return _load_quietly(load, name, offline=True)
    except _MissingFileError as error:
        raise MissingModelError(f"{name} cannot be loaded from this folder: {error}.") from error


def load_cached_first(load: Callable[[], Loaded], name: str, repository: str) -> Loaded:
    """Run ``load`` on the hub's local cache. If files are missing, repeat with downloads.

    So a cached model loads without network access, and does not change when the model on the hub
    changes. If a file is missing, ``load`` must raise OSError, as the hub, transformers and Python
    do.
    """
    try:
        return _load_quietly(load, name, offline=True)
    # A ProvenanceError means that files do not match. Perhaps a file is not cached yet.
    except (_MissingFileError, ProvenanceError) as error:
        cache_error = error
    is_reachable = is_hub_reachable()
    # no download can replace the files that do not match
    if not is_reachable and isinstance(cache_error, ProvenanceError):
        raise cache_error
    reason = "the hub cannot be reached"
    if is_reachable:
        logger.info(
            "%s is not in the local cache of the model hub; downloading %s", name, repository
        )
        try:
            return _load_quietly(load, name, offline=False)
        except _MissingFileError as error:
            reason = f"the download failed: {error}"
    raise MissingModelError(
        f"{name} is not in the local cache of the model hub, and {reason}. Run `hf download "
        f"{repository}` where there is a network, bring its cache here (HF_HOME) and set "
        "HF_HUB_OFFLINE=1, or name a local folder; the backbone 'compact' needs no hub."
    ) from cache_error


def _load_quietly(load: Callable[[], Loaded], name: str, *, offline: bool) -> Loaded:
    """Run ``load`` without output from libraries, and convert exceptions to vilu errors.

    If ``offline``, the libraries do not use the network.
    """
    try:
        network_access = offline_hub() if offline else nullcontext()
        with suppress_messages(), network_access:
            return load()
    except ViLUError:
        raise
    except ImportError as error:
        raise MissingModelError(
            f"{name} needs a package that is not installed: {_short_message(error)}."
        ) from error
    except OSError as error:
        raise _MissingFileError(_short_message(error)) from error
    except (SafetensorError, UnpicklingError) as error:
        reason = _short_message(error)
        if isinstance(error, UnpicklingError):
            reason = unpickling_problem(error)
        raise StorageError(
            f"the weights of {name} are damaged or more than plain tensors: {reason}. Download "
            "them again."
        ) from error
    except READING_ERRORS as error:
        raise ProvenanceError(
            f"the files of {name} do not make a model together: {_short_message(error)}."
        ) from error


def unpickling_problem(error: Exception) -> str:
    """Return torch's reason for refusing to unpickle a file, as a clause for messages.

    torch's message is not shown, because the message explains how to execute arbitrary code.
    """
    refused_global = re.search(r"GLOBAL ([\w.]+)", str(error))  # such as "os.system"
    if refused_global:
        return f"it asks for {refused_global[1]}, but only tensors are read"
    return "it is cut short, damaged or something else, but only tensors are read"


def _short_message(error: BaseException) -> str:
    """Return an exception's message on a single line, shortened to 300 characters."""
    message = str(error) or type(error).__name__
    shortened = textwrap.shorten(message, 300, placeholder=" ...")
    return shortened.rstrip(".")
