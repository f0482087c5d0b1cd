"""Import optional libraries, silence their messages, start Ray, and check connections."""

from __future__ import annotations

import importlib
import logging
import socket
import sys
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, cast
from urllib.parse import urlsplit

from vilu.errors import MissingModelError, UsageError
from vilu.process import ray_cluster

# Seconds for a connection test. Without the test, the hub client would try to connect for 23 s per
# file, and Ray for three minutes.
CONNECT_SECONDS = 3.0


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional library's module. MissingModelError says how to install the library."""
    try:
        with suppress_messages():
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingModelError(f"this needs: pip install 'vilu[{extra}]' ({error}).") from error


@contextmanager
def suppress_messages() -> Iterator[None]:
    """Suppress this thread's warnings, log lines below ERROR and progress bars within the block.

    Threads outside such a block are not affected, because every hook asks whether the thread is in
    such a block. The hooks are removed when no thread is in such a block any more.

    Model loaders warn if weights are missing or wrong. vilu does not need these warnings, because
    vilu checks the weights and raises an error.
    """
    token = _is_quiet.set(True)
    try:
        with ExitStack() as stack:
            for module, hook in SILENCING_HOOKS.items():
                if module in sys.modules:  # no module is imported only to be silenced
                    stack.enter_context(hook)
            yield
    finally:
        _is_quiet.reset(token)


_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)
"""Whether the current thread is quiet, that is, in a ``suppress_messages`` block."""


class _QuietCategory(type):
    """Metaclass for a warning category.

    In a quiet thread, every warning belongs to this category. In other threads, no warning does.
    """

    def __subclasscheck__(cls, category: type) -> bool:
        return _is_quiet.get()


class _QuietThreadWarning(Warning, metaclass=_QuietCategory):
    """The category in the warning filter, to find warnings from quiet threads."""


@contextmanager
def _hook_warnings() -> Iterator[None]:
    """Ignore warnings from quiet threads within the block."""
    filters = cast("list[object]", warnings.filters)
    # action, message, category, module and line, where None and 0 match everything
    ignore_filter = ("ignore", None, _QuietThreadWarning, None, 0)
    filters.insert(0, ignore_filter)
    try:
        yield
    finally:
        if ignore_filter in filters:  # warnings.resetwarnings() removes all filters
            filters.remove(ignore_filter)


BELOW_ALL_HANDLERS = -1
"""Log level below all handlers' levels, so no handler shows a record with this level."""


@contextmanager
def _hook_logging() -> Iterator[None]:
    """Drop log records below ERROR from quiet threads within the block."""
    previous_factory = logging.getLogRecordFactory()  # the factory to replace
    basic_config = logging.basicConfig

    def make_silent_record(*args: object, **fields: object) -> logging.LogRecord:
        record = previous_factory(*args, **fields)
        if _is_quiet.get() and record.levelno < logging.ERROR:
            record.levelno = BELOW_ALL_HANDLERS
        return record

    def configure_unless_quiet(**options: Any) -> None:  # noqa: ANN401 - as logging declares them
        if not _is_quiet.get():
            basic_config(**options)

    logging.setLogRecordFactory(make_silent_record)
    try:
        # open_clip calls ``logging.info``, and so adds a handler to a root logger without handlers
        with temporarily_set(logging, basicConfig=configure_unless_quiet):
            yield
    finally:
        # keep a factory set by another thread meanwhile
        if logging.getLogRecordFactory() is make_silent_record:
            logging.setLogRecordFactory(previous_factory)


TRANSFORMERS_BARS = "transformers.utils.logging"
"""The transformers module with progress bars."""
HUB_BARS = "huggingface_hub.utils.tqdm"
"""The hub client's module with progress bars."""


@contextmanager
def _hook_transformers_bars() -> Iterator[None]:
    """Hide the progress bars of transformers in quiet threads within the block."""
    bars = importlib.import_module(TRANSFORMERS_BARS)

    def make_bar(
        bar_class: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> object:
        if _is_quiet.get():
            options = options | {"disable": True}
        if previous_hook is not None:
            return previous_hook(bar_class, args, options)
        return bar_class(*args, **options)

    previous_hook = bars.set_tqdm_hook(make_bar)  # ``make_bar`` calls the replaced hook
    try:
        yield
    finally:
        bars.set_tqdm_hook(previous_hook)


@contextmanager
def _hook_hub_bars() -> Iterator[None]:
    """Hide the hub client's progress bars in quiet threads within the block."""
    bars = importlib.import_module(HUB_BARS)
    are_bars_disabled = bars.are_progress_bars_disabled

    def are_disabled_or_quiet(name: str | None = None) -> bool:
        return _is_quiet.get() or are_bars_disabled(name)

    with temporarily_set(bars, are_progress_bars_disabled=are_disabled_or_quiet):
        yield


HUB_CONSTANTS = "huggingface_hub.constants"
"""The hub client's module with the constant for offline use."""

_is_offline: ContextVar[bool] = ContextVar("is_offline", default=False)
"""Whether the current thread is offline, that is, in an ``offline_hub`` block."""


class _OfflineSwitch:
    """A truth value: true in offline threads, and that of ``usual_value`` in other threads."""

    def __init__(self, usual_value: object) -> None:
        self.usual_value = usual_value

    def __bool__(self) -> bool:
        return _is_offline.get() or bool(self.usual_value)


@contextmanager
def _hook_hub_offline() -> Iterator[None]:
    """Within the block, let the hub client ask whether the current thread is offline."""
    # At import, the client sets the constant HF_HUB_OFFLINE from the environment variable of the
    # same name. The client reads the constant at every request.
    hub_constants: Any = importlib.import_module(HUB_CONSTANTS)
    offline_switch = _OfflineSwitch(hub_constants.HF_HUB_OFFLINE)
    hub_constants.HF_HUB_OFFLINE = offline_switch
    try:
        yield
    finally:
        # keep a value set by another thread meanwhile
        if hub_constants.HF_HUB_OFFLINE is offline_switch:
            hub_constants.HF_HUB_OFFLINE = offline_switch.usual_value


class _SharedContext:
    """A context shared by several threads: entered by the first thread, left by the last thread."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._n_threads_inside = 0
        self._exit_stack = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._n_threads_inside == 0:
                self._exit_stack.enter_context(self._context())
            self._n_threads_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_threads_inside -= 1
            if self._n_threads_inside == 0:
                self._exit_stack.close()


SILENCING_HOOKS = {
    "warnings": _SharedContext(_hook_warnings),
    "logging": _SharedContext(_hook_logging),
    TRANSFORMERS_BARS: _SharedContext(_hook_transformers_bars),
    HUB_BARS: _SharedContext(_hook_hub_bars),
}
"""Maps a module name to the context that silences the module in quiet threads."""


_OFFLINE_HOOK = _SharedContext(_hook_hub_offline)


@contextmanager
def offline_hub() -> Iterator[None]:
    """Keep the hub client from the network in this thread within the block.

    Threads outside such a block are not affected. Libraries have an argument ``local_files_only``
    for this purpose, but open_clip lacks the argument.
    """
    token = _is_offline.set(True)
    try:
        with _OFFLINE_HOOK:
            yield
    finally:
        _is_offline.reset(token)


@contextmanager
def temporarily_set(target: object, **values: object) -> Iterator[None]:
    """Set attributes of ``target`` within the block, and restore the old values afterwards."""
    previous_values = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in previous_values.items():
            setattr(target, name, value)


def is_hub_reachable() -> bool:
    """Return whether the hub may be used (no HF_HUB_OFFLINE) and accepts a connection in time."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    schemes_with_proxy = urllib.request.getproxies().keys()
    has_proxy = not schemes_with_proxy.isdisjoint({endpoint.scheme, "all"})
    if has_proxy:
        return True  # the connection behind a proxy cannot be tested
    usual_port = 443 if endpoint.scheme == "https" else 80
    return _accepts_connection(endpoint.hostname, endpoint.port or usual_port)


def _accepts_connection(host: str | None, port: int) -> bool:
    """Return whether a server accepts a connection in time."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
            return True
    except (OSError, UnicodeError):  # UnicodeError: the host is no valid name
        return False


def start_ray(**local_options: object) -> bool:
    """Join the Ray cluster at ``RAY_ADDRESS``. Without a cluster, start Ray on this machine.

    Args:
        local_options: Options for ``ray.init``, if Ray starts on this machine.

    Returns:
        Whether a cluster was joined.

    Raises:
        MissingModelError: If Ray is not installed.
        UsageError: If the cluster does not answer, or if Ray cannot start.
    """
    ray = import_extra("ray", "ray")
    address = ray_cluster()
    options: dict[str, object] = {"address": "local", **local_options}
    failure = "Ray does not start on this machine"
    if address is not None:
        _require_ray_cluster(address)
        options = {"address": address}
        failure = f"Ray cannot join the cluster at RAY_ADDRESS={address}"
    try:
        with suppress_messages():
            ray.init(
                **options,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(
            f"{failure}: {error}. Set RAY_ADDRESS to a running cluster, or give another executor."
        ) from error
    return address is not None


def _require_ray_cluster(address: str) -> None:
    """Raise UsageError if ``address`` is a host and a port, and no server is there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        return  # no host and port, but a form that only Ray knows, such as "auto"
    hostname = host.strip("[]")  # an IPv6 address is in brackets
    if not _accepts_connection(hostname, int(port)):
        raise UsageError(
            f"no Ray cluster answers at RAY_ADDRESS={address}. Start one there (ray start --head), "
            "or unset RAY_ADDRESS: then Ray is started on this machine."
        )
