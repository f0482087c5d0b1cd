"""What a client may do before anybody listens to it: which host it asks, with what key, how much, and how slowly."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from vilu.artifacts.documents import read_bounded
from vilu.errors import UsageError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
OPEN: Final = frozenset({"/", "/healthz", "/readyz"})
"""What needs no key; "/" is the page, which asks for one."""

PROBLEM: Final = "application/problem+json"
REQUEST_ID: Final = re.compile(r"[!-~]{1,128}")
DRAINED: Final = 2**20
"""Bytes of a refused body that are read and thrown away, so that the answer arrives; then the connection is closed."""

POLICY: Final = "default-src 'none'; frame-ancestors 'none'"

access = logging.getLogger("vilu.access")


@dataclass(frozen=True)
class ClientLimits:
    """What a client may do.

    Attributes:
        hosts: Names that may stand in the Host header, without a port.
        keys: SHA-256 of the keys of which a client must have one; empty: none is needed.
        queue: Images that are under way at a time; beyond, 429.
        body: Bytes of a request.
        images: Images, rows or labels of a request.
        upload: Seconds in which a request must be there.
        answer: Seconds after which it is given up.
    """

    hosts: frozenset[str] = frozenset(LOOPBACK)
    keys: frozenset[bytes] = frozenset()
    queue: int = 64
    body: int = 32 * 2**20
    images: int = 256
    upload: float = 30.0
    answer: float = 60.0


def log_access() -> None:
    """Have a JSON line a request on stderr, in which nothing can steer a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers[:] = [handler]
    access.propagate = False


def read_keys(path: Path) -> frozenset[bytes]:
    """The hashes of the keys in a file, one a line; UsageError if there is none, or one is short."""
    keys = read_bounded(path, "Give a file of keys", UsageError, 2**20).split()
    if not keys or min(map(len, keys)) < 16:
        raise UsageError(
            f"{path} must hold one key a line, of at least 16 characters. Found {len(keys)} keys."
        )
    return frozenset(hashlib.sha256(key).digest() for key in keys)


class Refused(Exception):  # noqa: N818 - an answer, not a mistake of ours
    """A request that gets a problem for an answer."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def problem(status: HTTPStatus, detail: str) -> bytes:
    """The body that says so (RFC 9457)."""
    return json.dumps(
        {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail}
    ).encode()


@dataclass
class Gate:
    """Lets a request in, or refuses it before its body is read; tells what became of it.

    ``room`` says how many more images fit in, ``told`` gets the path, the status and the seconds of
    a request, ``closing`` says whether this is to be the last request of its connection.
    """

    app: App
    limits: ClientLimits
    room: Callable[[], int]
    told: Callable[[str, int, float], None]
    paths: frozenset[str]
    closing: Callable[[], bool] = lambda: False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request = headers.get(b"x-request-id", b"").decode("latin-1")
        if not REQUEST_ID.fullmatch(request):
            request = uuid.uuid4().hex
        scope["state"]["request_id"] = request
        scope["state"]["images"] = 0
        began = time.perf_counter()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name.lower() for name, _ in message["headers"]}
                extra = {
                    b"x-request-id": request.encode(),
                    b"x-content-type-options": b"nosniff",
                    b"referrer-policy": b"no-referrer",
                    b"cache-control": b"no-store",
                    b"content-security-policy": POLICY.encode(),
                }
                if self.closing():
                    extra[b"connection"] = b"close"
                message["headers"] = [
                    *message["headers"],
                    *((k, v) for k, v in extra.items() if k not in names),
                ]
            await send(message)

        try:
            self._admit(scope, headers)
            await self.app(scope, _within(receive, self.limits), answer)
        except Refused as refused:
            await self._refuse(refused, receive, answer, started=bool(status))
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            seconds = time.perf_counter() - began
            self.told(path, status, seconds)
            facts = {
                "time": round(time.time(), 3),
                "method": scope["method"] if path != "other" else "",
                "path": path,
            }
            facts |= {
                "status": status,
                "images": scope["state"]["images"],
                "seconds": round(seconds, 4),
            }
            access.info(json.dumps(facts))

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise what speaks against the request, from its head alone."""
        host = _host(headers.get(b"host", b"").decode("latin-1"))
        limits = self.limits
        if host not in limits.hosts:
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this service does not go by the name in the Host header. Allow the name with --allow-host.",
            )
        origin = headers.get(b"origin")
        if origin is not None and _host(origin.decode("latin-1").partition("://")[2]) != host:
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site may not use this service.")
        if (
            limits.keys
            and scope["path"] not in OPEN
            and not self._has_key(headers.get(b"authorization", b""))
        ):
            raise Refused(
                HTTPStatus.UNAUTHORIZED,
                "give a key: Authorization: Bearer KEY.",
                **{"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] != "POST":
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limits.body:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body must be at most {limits.body:,} bytes. Send fewer or smaller images.",
            )
        if scope["path"] in WORK and self.room() < 1:
            raise full()

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        same = [hmac.compare_digest(digest, known) for known in self.limits.keys]
        return scheme.lower() == b"bearer" and any(same)

    async def _refuse(
        self, refused: Refused, receive: Receive, send: Send, *, started: bool
    ) -> None:
        """Say no at once; then throw some of the body away, since a connection closed on it would eat the answer."""
        if started:
            return
        body = problem(refused.status, refused.detail)
        headers = {"content-type": PROBLEM, "content-length": str(len(body)), **refused.headers}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": int(refused.status), "headers": pairs})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        drained = 0
        more = True
        try:
            async with asyncio.timeout(self.limits.upload):
                while more and drained < DRAINED:
                    message = await receive()
                    drained += len(message.get("body", b""))
                    more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            pass  # it has its answer
        await send({"type": "http.response.body", "body": b""})


WORK: Final = frozenset({"/v1/answers", "/v1/scores"})
"""What takes a place in the queue."""


def full() -> Refused:
    """The queue has no room."""
    return Refused(
        HTTPStatus.TOO_MANY_REQUESTS,
        "more images are under way than the service takes at a time. Repeat the request after a second.",
        **{"Retry-After": "1"},
    )


@dataclass
class Room:
    """Images under way, of so many that may be at a time."""

    most: int
    taken: int = field(default=0, init=False)

    @property
    def left(self) -> int:
        """How many more may come in."""
        return self.most - self.taken

    @contextmanager
    def of(self, n: int) -> Iterator[None]:
        """Places for n images; without room 429, but a request that is larger than all room may come alone."""
        if self.taken and n > self.left:
            raise full()
        self.taken += n
        try:
            yield
        finally:
            self.taken -= n


def _host(value: str) -> str:
    """A name without its port, in lower case."""
    return re.sub(r":\d{1,5}$", "", value.strip().lower())


def _within(receive: Receive, limits: ClientLimits) -> Receive:
    """The same body, refused where it is too long or too slow."""
    read = 0
    deadline = asyncio.get_running_loop().time() + limits.upload
    whole = False

    async def bounded() -> Message:
        nonlocal read, whole
        if whole:  # what is waited for now is the end of the connection
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise Refused(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body was not there after {limits.upload:g} seconds.",
            ) from None
        read += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if read > limits.body:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body must be at most {limits.body:,} bytes.",
            )
        return message

    return bounded
