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
    """No warnings, log lines below ERROR or progress bars while a model loads.

    All is restored afterwards. What loaders only warn of (weights that are missing or do not fit)
    vilu checks itself and raises.
    """
    root = logging.getLogger()
    disabled = logging.root.manager.disable
    # on a root without any handler, open_clip's logging.info() would leave one behind
    handler = logging.NullHandler()
    root.addHandler(handler)
    logging.disable(max(disabled, logging.WARNING))
    try:
        with _no_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)


@contextmanager
def _no_bars() -> Iterator[None]:
    """A block without progress bars of transformers, if it has been imported."""
    bars = sys.modules.get("transformers.utils.logging")
    if bars is None or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


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
    """Whether the hub may be asked (no HF_HUB_OFFLINE) and accepts a connection in time."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if {endpoint.scheme, "all"} & urllib.request.getproxies().keys():  # only the proxy knows
        return True
    usual_port = 443 if endpoint.scheme == "https" else 80
    address = (endpoint.hostname, endpoint.port or usual_port)
    try:
        with socket.create_connection(address, timeout=REACH_TIMEOUT):
            return True
    except OSError:
        return False
