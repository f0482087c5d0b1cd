"""Late and silent import of optional libraries, and the check that the model hub is reachable."""

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

# seconds to wait for a connection to the hub; the hub's client would retry for 23 s per file
REACH_TIMEOUT = 3.0


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency; MissingModelError states how to install it."""
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingModelError(f"this needs: pip install 'vilu[{extra}]' ({error}).") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, log lines below ERROR, and progress bars in the block.

    All settings are restored afterwards. Loaders of models only warn of missing or wrong weights.
    No such warning is lost, because vilu checks the weights itself and raises an error.
    """
    root = logging.getLogger()
    disabled = logging.root.manager.disable
    # if the root logger had no handler, logging.info() in open_clip would add one and leave it
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
    """Switch off the progress bars of transformers in the block, if transformers is imported."""
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
    """Set attributes of ``target`` to other values in the block, and restore them afterwards."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def hub_reachable() -> bool:
    """Whether the hub may be used (no HF_HUB_OFFLINE) and accepts a connection in time."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if {endpoint.scheme, "all"} & urllib.request.getproxies().keys():
        return True  # the connection behind a proxy cannot be tested
    usual_port = 443 if endpoint.scheme == "https" else 80
    address = (endpoint.hostname, endpoint.port or usual_port)
    try:
        with socket.create_connection(address, timeout=REACH_TIMEOUT):
            return True
    except OSError:
        return False
