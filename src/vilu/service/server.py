"""The server process: listens, loads the model meanwhile, and drains requests at a stop."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Final, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vilu.artifacts.disk import locked, make_folder
from vilu.errors import UsageError
from vilu.process import return_freed_memory
from vilu.service.app import Service
from vilu.service.limits import MAX_CONNECTIONS, PROBLEM_TYPE, in_brackets, problem_document
from vilu.service.setup import Setup, load_engine

MAX_HEAD_BYTES: Final = 16 * 2**10
"""Maximum length of a request head, in bytes."""

IDLE_SECONDS: Final = 10
"""Seconds until a connection without a complete request head is closed."""

MEMORY_RETURN_SECONDS: Final = 60
"""Seconds between two returns of freed memory to the operating system."""


class TimedProtocol(H11Protocol):
    """HTTP/1.1 with a time limit on request heads, and with problem documents as errors.

    A request head (first line and headers) must be complete within ``IDLE_SECONDS``.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request head. If there are too many connections, close this one."""
        # A socket's transport is always an asyncio.Transport.
        socket_transport = cast("asyncio.Transport", transport)
        super().connection_made(socket_transport)
        max_connections = connection_limit()
        if len(self.connections) > max_connections:
            self._close_with(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the service has at most {max_connections} connections. Connect again later.",
            )
            return
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        """Process data. Keep the deadline until the head is complete.

        The request body has its own limit (``ClientLimits.upload_seconds``).
        """
        super().data_received(data)
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _update_deadline(self) -> None:
        """Set the deadline if a head is awaited. Cancel it if a request is being answered."""
        is_answering = bool(self.cycle) and not self.cycle.response_complete
        if is_answering:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
            return
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(IDLE_SECONDS, self.transport.close)

    def on_response_complete(self) -> None:
        """Wait for the next request head."""
        super().on_response_complete()
        self._update_deadline()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with a problem document. The invalid content is not logged."""
        self._close_with(HTTPStatus.BAD_REQUEST, msg)

    def _close_with(self, status: HTTPStatus, detail: str) -> None:
        """Send a refusal outside a request, and close the connection."""
        body = problem_document(status, detail)
        head = (
            f"HTTP/1.1 {int(status)} {status.phrase}\r\n"
            f"content-type: {PROBLEM_TYPE}\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n"
            "\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def connection_limit() -> int:
    """Return the maximum number of open connections: at most half the open-file limit.

    Every connection is an open file for the operating system. The second half is left for the
    service's files. Without these files the service could not answer.
    """
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource

    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max_files // 2)


class Server(uvicorn.Server):
    """A uvicorn server that calls a function as soon as it listens, and lets requests finish."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop at the first signal. Ignore further signals.

        At a second Ctrl-C, uvicorn would drop the requests in progress.
        """
        if not self.should_exit:
            super().handle_exit(sig, frame)


class HostedService:
    """A service at an address of this machine.

    Args:
        setup: Settings of the service.
        host: The address.
        port: The port, or 0 for a free port.
        announce: Called with the URL as soon as the service listens, and with "ready" as soon as
            the model is loaded.

    Raises:
        UsageError: If the address or the port cannot be used.
    """

    def __init__(self, setup: Setup, host: str, port: int, announce: Callable[[str], None]) -> None:
        self.setup = setup
        self.announce = announce
        self.service = Service(setup.limits, setup.keep)
        self.load_error: BaseException | None = None  # raised while the engine was loaded
        self.bound_socket = _bind_socket(host, port)
        config = uvicorn.Config(
            self.service.gate,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(setup.limits.max_request_seconds),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        self.server = Server(config, lambda: announce(_url(self.bound_socket)))
        self.service.gate.is_closing = lambda: self.server.should_exit

    def run(self) -> None:
        """Serve until a signal or ``stop``. Then finish the admitted requests, and save.

        Raises:
            BusyError: If another process serves with the same state folder.
            ViLUError: If a predictor's rule cannot be verified, or if the model differs from the
                predictor's model.
        """
        with ExitStack() as stack:
            stack.enter_context(self.bound_socket)
            make_folder(self.setup.state)
            stack.enter_context(locked(self.setup.state, activity="serving with the state in"))
            stack.enter_context(_return_memory_regularly())
            loader = threading.Thread(target=self._load_engine, name="vilu-load")
            loader.start()
            try:
                self.server.run([self.bound_socket])
            finally:
                loader.join()
                engine = self.service.engine
                if engine is not None:
                    engine.close()
                    engine.journals.close()
        if self.load_error is not None:
            raise self.load_error

    def stop(self) -> None:
        """Stop serving. Any thread may call this method."""
        self.server.should_exit = True

    def _load_engine(self) -> None:
        """Load the engine. An exception stops the service, and is raised again by ``run``."""
        try:
            engine = load_engine(self.setup)
        except BaseException as error:  # noqa: BLE001 - ``run`` raises the exception
            self.load_error = error
            self.stop()
            return
        self.service.start(engine)
        self.announce("ready")


@contextmanager
def _return_memory_regularly() -> Iterator[None]:
    """Return freed memory every ``MEMORY_RETURN_SECONDS`` seconds during the block.

    The process keeps a batch's memory for the next batch (``vilu.process.keep_freed_memory``). But
    batches differ in size, and waiting images lie between the memory of two batches. So from time
    to time a large batch fits into no gap, and the heap grows. Without this thread, the heap would
    never shrink again.
    """
    end_event = threading.Event()

    def return_again_and_again() -> None:
        while not end_event.wait(MEMORY_RETURN_SECONDS):
            return_freed_memory()

    thread = threading.Thread(target=return_again_and_again, name="vilu-memory")
    thread.start()
    try:
        yield
    finally:
        end_event.set()
        thread.join()


def _bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address and a port. Raise UsageError if this is impossible."""
    family = socket.AF_INET
    if ":" in host:
        family = socket.AF_INET6
    # asyncio turns off Nagle's algorithm only if the socket states TCP. With Nagle's algorithm, the
    # end of an answer would wait 40 ms until the client has acknowledged the head.
    bound_socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound_socket.bind((host, port))
    except OSError as error:
        bound_socket.close()
        raise UsageError(
            f"cannot listen at {host}, port {port}: {error.strerror}. Give another --host or "
            "--port."
        ) from error
    bound_socket.set_inheritable(True)
    return bound_socket


def _url(bound_socket: socket.socket) -> str:
    host, port, *_ = bound_socket.getsockname()  # an IPv6 address has two more values
    return f"http://{in_brackets(host)}:{port}"
