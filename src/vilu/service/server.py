"""The process: it listens at once, loads the model beside, and answers all before it stops."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from http import HTTPStatus
from typing import Final, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vilu.artifacts.disk import locked, make_folder
from vilu.errors import UsageError
from vilu.service.app import Service
from vilu.service.limits import PROBLEM, problem
from vilu.service.setup import Setup, load_engine

HEAD: Final = 16 * 2**10
"""Bytes of the head of a request."""

IDLE: Final = 10
"""Seconds that a connection may stay without a whole head of a request."""

STOP: Final = 60
"""Seconds for the requests that are under way when the service has to stop."""


class Patient(H11Protocol):
    """HTTP/1.1 whose heads must be whole within ``IDLE`` seconds; mistakes are problems."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(cast("asyncio.Transport", transport))  # of a socket it is one
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait on if the head is not there yet; a whole request has limits of its own."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _watch(self) -> None:
        """Set the deadline while a head is awaited; cancel it while a request is answered."""
        is_answering = bool(self.cycle) and not self.cycle.response_complete
        if is_answering:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
            return
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(IDLE, self.transport.close)

    def on_response_complete(self) -> None:
        """Wait for the next head."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with a problem, as all mistakes; nothing of it is logged."""
        body = problem(HTTPStatus.BAD_REQUEST, msg)
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            f"content-type: {PROBLEM}\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n"
            "\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn with a call as soon as it listens."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()


class Hosted:
    """A service on an address of this machine.

    Args:
        setup: What is served.
        host: The address.
        port: Its port; 0 for a free one.
        announce: Gets the URL as soon as the service listens, then "ready".

    Raises:
        UsageError: If the address cannot be had.
    """

    def __init__(self, setup: Setup, host: str, port: int, announce: Callable[[str], None]) -> None:
        self.setup = setup
        self.announce = announce
        self.service = Service(setup.limits, setup.keep)
        self.fault: BaseException | None = None  # why the engine could not be loaded
        self.socket = _bound(host, port)
        config = uvicorn.Config(
            self.service.gate,
            http=Patient,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=STOP,
            h11_max_incomplete_event_size=HEAD,
        )
        self.server = Server(config, lambda: announce(_url(self.socket)))
        self.service.gate.is_closing = lambda: self.server.should_exit

    def run(self) -> None:
        """Serve until a signal comes or ``stop``, then answer what was taken on, and save.

        Raises:
            BusyError: If another process serves with this state.
            ViLUError: What speaks against the predictor: its rule does not verify, its model is
                another.
        """
        with ExitStack() as stack:
            stack.enter_context(self.socket)
            make_folder(self.setup.state)
            stack.enter_context(locked(self.setup.state, "serving with the state in"))
            loader = threading.Thread(target=self._load, name="vilu-load")
            loader.start()
            try:
                self.server.run([self.socket])
            finally:
                loader.join()
                engine = self.service.engine
                if engine is not None:
                    engine.close()
                    engine.journals.close()
        if self.fault is not None:
            raise self.fault

    def stop(self) -> None:
        """End, from another thread."""
        self.server.should_exit = True

    def _load(self) -> None:
        """Load the engine; an error ends the service, and is raised there."""
        try:
            engine = load_engine(self.setup)
        except BaseException as error:  # noqa: BLE001 - ``run`` raises it
            self.fault = error
            self.stop()
            return
        self.service.start(engine)
        self.announce("ready")


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens; UsageError where it cannot."""
    family = socket.AF_INET
    if ":" in host:
        family = socket.AF_INET6
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UsageError(
            f"cannot listen at {host}, port {port}: {error.strerror}. Give another --host or "
            "--port."
        ) from error
    bound.set_inheritable(True)
    return bound


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}"
