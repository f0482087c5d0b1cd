"""Optional libraries: imported late and silently, and whether the model hub can be asked."""

from __future__ import annotations

import importlib
import logging
import socket
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from urllib.parse import urlsplit

from vilu.errors import MissingModelError

# seconds the hub has to accept a connection; its own client would retry for 23 seconds per file
REACH_TIMEOUT = 3.0


def import_extra(module: str, extra: str) -> ModuleType:
    """A module of an optional dependency; MissingModelError says how to install it."""
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingModelError(f"this needs: pip install 'vilu[{extra}]' ({error}).") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines below ERROR or progress bars while a model loads; all is restored afterwards.

    What loaders only warn of (weights that are missing or do not fit) vilu checks itself and
    raises.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    bars = sys.modules.get("transformers.utils.logging")
    shown = bars is not None and bars.is_progress_bar_enabled()
    handler = (
        logging.NullHandler()
    )  # on a root without any, open_clip's logging.info() would leave one behind
    root.addHandler(handler)
    logging.disable(max(disabled, logging.WARNING))
    try:
        if bars is not None and shown:
            bars.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars is not None and shown:
            bars.enable_progress_bar()
        logging.disable(disabled)
        root.removeHandler(handler)


@contextmanager
def setting(target: object, **values: object) -> Iterator[None]:
    """A block in which attributes have other values."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


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
