"""Limits for clients: host names, keys, sizes of requests, and time."""

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
from contextlib import contextmanager, suppress
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
"""Host names of this machine for itself."""

OPEN: Final = frozenset({"/", "/healthz", "/readyz"})
"""Paths that need no key; "/" is the page, which asks the user for the key."""

PROBLEM: Final = "application/problem+json"
"""Content type of a refusal (RFC 9457)."""

REQUEST_ID: Final = re.compile(r"[!-~]{1,128}")
"""Form of an id that a client may give its request."""

DRAINED: Final = 2**20
"""At most this many bytes of a refused body are read before the connection is closed."""

POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
"""Content security policy of all answers except pages."""

WORK: Final = frozenset({"/v1/answers", "/v1/scores"})
"""Paths of requests with images or rows, which count towards the queue (``ImageSlots``)."""

access = logging.getLogger("vilu.access")


@dataclass(frozen=True)
class ClientLimits:
    """Limits for clients.

    Attributes:
        hosts: Allowed names in the Host header, without a port.
        keys: SHA-256 hashes of the keys; a client must send one of the keys. Empty: no key needed.
        queue: Maximum number of images in progress; further requests get 429.
        body: Maximum length of the body of a request, in bytes.
        images: Maximum number of images, rows or labels of a request.
        upload: Seconds in which the body of a request must arrive.
        answer: Seconds after which a request without an answer is given up.
    """

    hosts: frozenset[str] = frozenset(LOOPBACK)
    keys: frozenset[bytes] = frozenset()
    queue: int = 64
    body: int = 32 * 2**20
    images: int = 256
    upload: float = 30.0
    answer: float = 60.0


def log_access() -> None:
    """Log every request as a JSON line to stderr; JSON escapes terminal control characters."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers[:] = [handler]
    access.propagate = False


def read_keys(path: Path) -> frozenset[bytes]:
    """Hashes of the keys in a file, which has one key on every line.

    Raises:
        UsageError: If there is no key, or if a key is too short.
    """
    keys = read_bounded(path, "Give a file of keys", UsageError, 2**20).split()
    if not keys or min(map(len, keys)) < 16:
        raise UsageError(
            f"{path} must hold one key on every line, each of at least 16 characters. Found "
            f"{len(keys)} keys."
        )
    return frozenset(hashlib.sha256(key).digest() for key in keys)


class Refused(Exception):  # noqa: N818 - an answer to the client, not an error of the service
    """A request is refused: the client gets a problem document (RFC 9457) as the answer."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def problem(status: HTTPStatus, detail: str) -> bytes:
    """The body of a refusal: a problem document (RFC 9457)."""
    return json.dumps(
        {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail}
    ).encode()


@dataclass
class Gate:
    """Admits a request or refuses it before its body is read; counts and logs every answer.

    Attributes:
        app: The application that gets the admitted requests.
        limits: Limits for clients.
        slots_left: Returns the number of images that may still be taken in.
        on_answered: Called with the path, the status and the seconds of every answered request.
        paths: Paths of the application; all other paths are counted together as "other".
        is_closing: Returns whether connections are to be closed after the present request.
    """

    app: App
    limits: ClientLimits
    slots_left: Callable[[], int]
    on_answered: Callable[[str, int, float], None]
    paths: frozenset[str]
    is_closing: Callable[[], bool] = lambda: False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers)
        scope["state"]["request_id"] = request_id
        scope["state"]["images"] = 0
        began = time.perf_counter()
        answer = _Answer(send, request_id, self.is_closing)
        try:
            self._admit(scope, headers)
            deadline = asyncio.get_running_loop().time() + self.limits.upload
            await self.app(scope, _Body(receive, self.limits, deadline), answer)
        except Refused as refused:
            if not answer.has_begun:
                await self._refuse(refused, receive, answer)
        finally:
            self._log(scope, answer.status, time.perf_counter() - began)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise Refused if the head of a request already breaks a limit."""
        self._require_host(headers)
        if self.limits.keys and scope["path"] not in OPEN:
            self._require_key(headers)
        if scope["method"] == "POST":
            self._require_size(headers)
            if scope["path"] in WORK and self.slots_left() < 1:
                raise full()

    def _require_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse requests to host names that are not allowed, and requests of other sites' pages.

        Another site can let its host name lead to this address (DNS rebinding). But its page cannot
        change the Host and Origin headers, which the browser sets.
        """
        host = _host(headers.get(b"host", b"").decode("latin-1"))
        if host not in self.limits.hosts:
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                "the name in the Host header is not allowed. Allow the name with --allow-host.",
            )
        origin = headers.get(b"origin")
        if origin is None:
            return
        _, _, site = origin.decode("latin-1").partition("://")
        if _host(site) != host:
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site may not use this service.")

    def _require_key(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All keys are compared, even after a match, and each comparison takes the same time. So the
        # duration reveals no key.
        matches = [hmac.compare_digest(digest, known) for known in self.limits.keys]
        is_bearer = scheme.lower() == b"bearer"
        if is_bearer and any(matches):
            return
        raise Refused(
            HTTPStatus.UNAUTHORIZED,
            "give a key: Authorization: Bearer KEY.",
            **{"WWW-Authenticate": "Bearer"},
        )

    def _require_size(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.body:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body must be at most {self.limits.body:,} bytes. Send fewer or smaller "
                "images.",
            )

    async def _refuse(self, refused: Refused, receive: Receive, send: Send) -> None:
        """Send a refusal, then read some of the body before the connection is closed.

        If the connection were closed while the client still sends, the client would not get the
        refusal.
        """
        body = problem(refused.status, refused.detail)
        headers = {"content-type": PROBLEM, "content-length": str(len(body)), **refused.headers}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": int(refused.status), "headers": pairs})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        with suppress(TimeoutError):  # the refusal is sent already
            async with asyncio.timeout(self.limits.upload):
                await _drain(receive)
        await send({"type": "http.response.body", "body": b""})

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log a request.

        Path and method are logged only for known paths, so that no text of the client is logged.
        """
        path = "other"
        method = ""
        if scope["path"] in self.paths:
            path = scope["path"]
            method = scope["method"]
        self.on_answered(path, status, seconds)
        facts = {
            "time": round(time.time(), 3),
            "method": method,
            "path": path,
            "status": status,
            "images": scope["state"]["images"],
            "seconds": round(seconds, 4),
        }
        access.info(json.dumps(facts))


@dataclass
class _Answer:
    """Sends the answer to a request with the headers of the service, and notes its status."""

    send: Send
    request_id: str
    is_closing: Callable[[], bool]
    status: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether the status has been sent."""
        return self.status > 0

    async def __call__(self, message: Message) -> None:
        """Send a message of the answer; headers that the answer has already are not changed."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message["headers"]}
            headers = list(message["headers"])
            for name, value in self._headers().items():
                if name not in present:
                    headers.append((name, value))
            message["headers"] = headers
        await self.send(message)

    def _headers(self) -> dict[bytes, bytes]:
        headers = {
            b"x-request-id": self.request_id.encode(),
            b"x-content-type-options": b"nosniff",
            b"referrer-policy": b"no-referrer",
            b"cache-control": b"no-store",
            b"content-security-policy": POLICY.encode(),
        }
        if self.is_closing():
            headers[b"connection"] = b"close"
        return headers


@dataclass
class _Body:
    """Receives the body of a request; raises Refused if it is too long or comes too slowly."""

    receive: Receive
    limits: ClientLimits
    deadline: float  # time on the clock of the event loop at which the body must be complete
    n_read: int = 0  # number of bytes received so far
    is_whole: bool = False  # whether the body is complete

    async def __call__(self) -> Message:
        """Receive the next message of the client."""
        if self.is_whole:  # the next message is the disconnect, which has no deadline
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError:
            raise Refused(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body was not complete after {self.limits.upload:g} seconds.",
            ) from None
        self.n_read += len(message.get("body", b""))
        self.is_whole = not message.get("more_body", False)
        if self.n_read > self.limits.body:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body must be at most {self.limits.body:,} bytes.",
            )
        return message


async def _drain(receive: Receive) -> None:
    """Read a body and throw it away, up to ``DRAINED`` bytes."""
    n_drained = 0
    while n_drained < DRAINED:
        message = await receive()
        n_drained += len(message.get("body", b""))
        is_last = message["type"] != "http.request" or not message.get("more_body", False)
        if is_last:
            return


def full() -> Refused:
    """The refusal of a request while the queue is full."""
    return Refused(
        HTTPStatus.TOO_MANY_REQUESTS,
        "the service has too many images in progress. Repeat the request after a second.",
        **{"Retry-After": "1"},
    )


@dataclass
class ImageSlots:
    """Counts the images in progress.

    Attributes:
        limit: Maximum number of images in progress.
        taken: Number of images in progress.
    """

    limit: int
    taken: int = field(default=0, init=False)

    @property
    def left(self) -> int:
        """Number of images that may still be taken in."""
        return self.limit - self.taken

    @contextmanager
    def hold(self, n: int) -> Iterator[None]:
        """A block during which n more images are in progress; Refused (429) if they are too many.

        A request with more than ``limit`` images is admitted if no other image is in progress.
        """
        has_others = self.taken > 0
        if has_others and n > self.left:
            raise full()
        self.taken += n
        try:
            yield
        finally:
            self.taken -= n


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The id that the client gave the request; a new id if it gave none or an invalid one."""
    request_id = headers.get(b"x-request-id", b"").decode("latin-1")
    if REQUEST_ID.fullmatch(request_id):
        return request_id
    return uuid.uuid4().hex


def _host(value: str) -> str:
    """A host name without its port, in lower case."""
    return re.sub(r":\d{1,5}$", "", value.strip().lower())
