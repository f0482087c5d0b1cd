"""The process: it listens at once, loads the model beside, and stops without losing what it took on."""

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
"""Seconds for what is under way when the service is told to stop."""


class Patient(H11Protocol):
    """HTTP/1.1 with an end to patience: a head must come whole within ``IDLE`` seconds, and mistakes are problems."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(cast("asyncio.Transport", transport))  # of a socket it is one
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait on if the head is not there yet; a request that is complete has its own limits."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _watch(self) -> None:
        listens = bool(self.cycle) and not self.cycle.response_complete
        if listens and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif not listens and self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(IDLE, self.transport.close)

    def on_response_complete(self) -> None:
        """What comes next is a head again."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """No HTTP: said as every other problem, and nothing of what came is logged."""
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
    """uvicorn, which says where it listens."""

    def __init__(self, config: uvicorn.Config, listens: Callable[[], None]) -> None:
        super().__init__(config)
        self._listens = listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self._listens()


class Hosted:
    """A service on an address of this machine. ``told`` gets the address as soon as it listens, and then "ready".

    Raises:
        UsageError: If the address cannot be had.
    """

    def __init__(self, setup: Setup, host: str, port: int, told: Callable[[str], None]) -> None:
        self.setup = setup
        self.told = told
        self.service = Service(setup.limits, setup.keep)
        self.faults: list[BaseException] = []
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
        self.server = Server(config, lambda: told(_address(self.socket)))
        self.service.gate.closing = lambda: self.server.should_exit

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
                if self.service.engine is not None:
                    self.service.engine.close()
                    self.service.engine.keeper.close()
        if self.faults:
            raise self.faults[0]

    def stop(self) -> None:
        """End, from another thread."""
        self.server.should_exit = True

    def _load(self) -> None:
        """Make the engine, and have it answer once; what speaks against it ends the service."""
        try:
            self.service.start(load_engine(self.setup))
        except BaseException as error:  # noqa: BLE001 - raised where the server ends
            self.faults.append(error)
            self.stop()
            return
        self.told("ready")


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens; UsageError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise UsageError(
            f"cannot listen at {host}, port {port}: {error.strerror}. Give another --host or --port."
        ) from error
    taken.set_inheritable(True)
    return taken


def _address(taken: socket.socket) -> str:
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
