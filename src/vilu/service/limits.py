"""Limits for clients: host names, keys with scopes, request sizes and counts, and time."""

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
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Literal, get_args

from vilu.artifacts.documents import read_bounded
from vilu.errors import UsageError

# The types of ASGI, the interface between server and application. A Scope describes a connection
# or request. It has nothing to do with a key's scopes.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "[::1]")
"""Names by which this machine calls itself."""

OPEN_PATHS: Final = frozenset({"/", "/healthz", "/readyz"})
"""Paths that need no key. "/" is the page, and the page itself asks the user for the key."""

PROBLEM_TYPE: Final = "application/problem+json"
"""Content type of a refusal (RFC 9457)."""

REQUEST_ID_PATTERN: Final = re.compile(r"[!-~]{1,128}")
"""Pattern for request ids from clients: 1 to 128 visible ASCII characters."""

MAX_DRAINED_BYTES: Final = 2**20
"""Maximum number of bytes to read from a refused body before the connection is closed."""

SECURITY_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
"""Content security policy for all answers except pages."""

IMAGES_PATH: Final = "/v1/answers"
"""Path for requests with encoded images. Only requests to this path may have long bodies."""

QUEUED_PATHS: Final = frozenset({IMAGES_PATH, "/v1/scores"})
"""Paths for requests with images or rows. Such requests count in the queue (``InProgress``)."""

MAX_OTHER_REQUESTS: Final = 16
"""Maximum number of requests in progress that have a body without images or rows."""

TOTAL_BODY_FACTOR: Final = 4
"""Maximum total length of the bodies in progress, in multiples of the longest allowed body."""

MAX_CONNECTIONS: Final = 512
"""Maximum number of open connections."""

SENDING_SECONDS: Final = 10.0
"""Seconds for writing a request's rows and sending the answer, after all rows are judged."""

RETRY_HEADER: Final = {"Retry-After": "1"}
"""Header in a refusal: the same request may be sent again after a second."""

KeyScope = Literal["ask", "label", "admin"]
"""A key's rights. "ask": ask about images and rows. "label": send labels. "admin": correct
labels, and choose the answering predictor."""

KEY_SCOPES: Final = frozenset[KeyScope](get_args(KeyScope))
"""All scopes. A key has every scope, unless the key's line lists only some."""

SCOPE_OF_PATH: Final[dict[str, KeyScope]] = {
    IMAGES_PATH: "ask",
    "/v1/scores": "ask",
    "/v1/labels": "label",
    "/v1/corrections": "admin",
    "/v1/predictors": "admin",
}
"""The scope needed for a POST to a path. A GET needs any key."""

access_logger = logging.getLogger("vilu.access")


@dataclass(frozen=True)
class ClientKey:
    """A client's key.

    Attributes:
        digest: SHA-256 of the key.
        scopes: The key's rights.
    """

    digest: bytes
    scopes: frozenset[KeyScope] = KEY_SCOPES


@dataclass(frozen=True)
class ClientLimits:
    """Limits for clients.

    Attributes:
        hosts: Allowed names in the Host header, without a port.
        tls_hosts: The names in ``hosts`` for which a proxy serves https.
        keys: Allowed keys. A client must send one of them. If empty, no key is needed.
        max_queued_images: Maximum number of images in progress. Further requests get 429.
        max_image_body_bytes: Maximum length in bytes for a body with images.
        max_other_body_bytes: Maximum length in bytes for a body without images.
        max_images: Maximum number of images, rows or labels in a request.
        max_pixels: Maximum number of pixels in an image. Larger images are not decoded.
        max_request_pixels: Maximum number of pixels in a request's images together.
        upload_seconds: Seconds for receiving a request's body.
        answer_seconds: Seconds until an unanswered request is given up.
    """

    hosts: frozenset[str] = frozenset(LOOPBACK_HOSTS)
    tls_hosts: frozenset[str] = frozenset()
    keys: frozenset[ClientKey] = frozenset()
    max_queued_images: int = 64
    max_image_body_bytes: int = 32 * 2**20
    max_other_body_bytes: int = 2**20
    max_images: int = 256
    max_pixels: int = 25_000_000
    max_request_pixels: int = 250_000_000
    upload_seconds: float = 30.0
    answer_seconds: float = 60.0

    @property
    def max_request_seconds(self) -> float:
        """Maximum seconds for a request with images or rows.

        A service that stops waits at most this long for the requests in progress.
        """
        return self.upload_seconds + self.answer_seconds + SENDING_SECONDS

    def max_body_bytes(self, path: str) -> int:
        """Return the maximum body length in bytes for a request to this path."""
        if path == IMAGES_PATH:
            return self.max_image_body_bytes
        return min(self.max_other_body_bytes, self.max_image_body_bytes)


def log_access() -> None:
    """Log every request as a JSON line to stderr. JSON escapes terminal control characters."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_logger.handlers[:] = [handler]  # a second call must not log every request twice
    access_logger.propagate = False
    # This library logs characters of a form that cannot be read, and nothing that a client sends
    # may be logged.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def read_keys(path: Path) -> frozenset[ClientKey]:
    """Read a file with a key on every line. Scopes may follow the key after a space.

    Raises:
        UsageError: If there is no key, if a key is too short, or if a scope is unknown.
    """
    max_bytes = 2**20
    min_key_length = 16
    content = read_bounded(path, "Give a file of keys", UsageError, max_bytes)
    words_of_lines = [line.split() for line in content.splitlines() if line.strip()]
    key_lengths = [len(key) for key, *_ in words_of_lines]
    if not key_lengths or min(key_lengths) < min_key_length:
        raise UsageError(
            f"{path} must hold one key on every line, each of at least {min_key_length} "
            f"characters. Found {len(key_lengths)} keys."
        )
    return frozenset(_client_key(path, key, *scopes) for key, *scopes in words_of_lines)


def _client_key(path: Path, key: bytes, *scopes: bytes) -> ClientKey:
    """Make a key with the given scopes. If none is given, the key has all scopes."""
    digest = hashlib.sha256(key).digest()
    if not scopes:
        return ClientKey(digest)
    scope_names = {scope.decode(errors="replace") for scope in scopes}
    if scope_names <= KEY_SCOPES:
        # the same names, but from KEY_SCOPES, because a type checker knows those as KeyScope
        scopes_of_key = frozenset(scope for scope in KEY_SCOPES if scope in scope_names)
        return ClientKey(digest, scopes_of_key)
    unknown_names = ", ".join(sorted(scope_names - KEY_SCOPES))
    known_names = ", ".join(get_args(KeyScope))
    raise UsageError(
        f"{path} has a key with unknown scopes: {unknown_names!r:.60}. The scopes are "
        f"{known_names}. Write every key on its own line."
    )


class Refused(Exception):  # noqa: N818 - an answer to the client, not an error of the service
    """A request is refused: the client gets a problem document (RFC 9457) as the answer."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def problem_document(status: HTTPStatus, detail: str) -> bytes:
    """Return the body of a refusal: a problem document (RFC 9457)."""
    document = json.dumps(
        {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail}
    )
    return document.encode()


@dataclass
class Gate:
    """Admits or refuses a request before the body is read. Counts and logs every answer.

    Attributes:
        app: The application for the admitted requests.
        limits: Limits for clients.
        in_progress: The requests with a body now in progress.
        on_answered: Called with path, status and seconds for every answered request.
        known_paths: The application's paths. All further paths are counted together as "other".
        is_closing: Returns whether connections are to be closed after the present request.
    """

    app: App
    limits: ClientLimits
    in_progress: InProgress
    on_answered: Callable[[str, int, float], None]
    known_paths: frozenset[str]
    is_closing: Callable[[], bool] = lambda: False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers)
        scope["state"]["request_id"] = request_id
        scope["state"]["images"] = 0  # the application sets the number of answered images
        start_time = time.perf_counter()
        answer_sender = _AnswerSender(send, request_id, self.is_closing)
        try:
            self._check_head(scope, headers)
            with self._count_while_in_progress(scope, headers):
                deadline = asyncio.get_running_loop().time() + self.limits.upload_seconds
                max_bytes = self.limits.max_body_bytes(scope["path"])
                body_receiver = _BodyReceiver(
                    receive, max_bytes, self.limits.upload_seconds, deadline
                )
                await self.app(scope, body_receiver, answer_sender)
        except Refused as refusal:
            if not answer_sender.has_begun:  # a sent status cannot be taken back
                await self._refuse(refusal, receive, answer_sender)
        finally:
            seconds = time.perf_counter() - start_time
            self._log_request(scope, answer_sender.status, seconds)

    def _check_head(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise Refused if a request's head already breaks a limit."""
        _require_one_length(headers)
        self._require_host(headers)
        if self.limits.keys and scope["path"] not in OPEN_PATHS:
            self._require_key(scope, headers)

    @contextmanager
    def _count_while_in_progress(self, scope: Scope, headers: dict[bytes, bytes]) -> Iterator[None]:
        """Count a request as in progress during the block, if the request has a body."""
        has_body = scope["method"] == "POST"
        if not has_body:
            yield
            return
        n_bytes = self._body_length(scope["path"], headers)
        with self.in_progress.admit(scope["path"], n_bytes) as admission:
            scope["state"]["admission"] = admission
            yield

    def _require_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse requests to host names that are not allowed, and requests from foreign pages.

        A foreign site can let its host name lead to this address (DNS rebinding). But a page of
        that site cannot change the Host and Origin headers, because the browser sets these headers.
        A page from another port of this host is foreign, too.
        """
        host_text = headers.get(b"host", b"").decode("latin-1")
        host_and_port = host_text.strip().lower()
        host = _without_port(host_and_port)
        if host not in self.limits.hosts:
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                "the name in the Host header is not allowed. Allow the name with --allow-host.",
            )
        scheme = "https" if host in self.limits.tls_hosts else "http"
        origin = headers.get(b"origin")
        own_origin = f"{scheme}://{host_and_port}".encode("latin-1")
        if origin is not None and origin.strip().lower() != own_origin:
            raise Refused(
                HTTPStatus.FORBIDDEN,
                "a page of another site may not use this service. If a proxy serves this page with "
                "TLS, allow the name of the proxy with --allow-host https://NAME.",
            )

    def _require_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Refuse a request without a key (401), or with a key without the needed scope (403)."""
        authorization = headers.get(b"authorization", b"")
        auth_scheme, _, padded_key = authorization.partition(b" ")
        key = padded_key.strip()
        digest = hashlib.sha256(key).digest()
        # All keys are compared, even after a match, and each comparison takes the same time. So the
        # duration reveals no key.
        matching_keys = [
            client_key for client_key in self.limits.keys if _are_equal(digest, client_key.digest)
        ]
        if auth_scheme.lower() != b"bearer" or not matching_keys:
            raise Refused(
                HTTPStatus.UNAUTHORIZED,
                "give a key: Authorization: Bearer KEY.",
                **{"WWW-Authenticate": "Bearer"},
            )
        needed_scope = None
        if scope["method"] == "POST":
            needed_scope = SCOPE_OF_PATH.get(scope["path"])
        if needed_scope is None:
            return
        has_needed_scope = any(needed_scope in client_key.scopes for client_key in matching_keys)
        if has_needed_scope:
            return
        raise Refused(HTTPStatus.FORBIDDEN, f"this key does not have the scope {needed_scope!r}.")

    def _body_length(self, path: str, headers: dict[bytes, bytes]) -> int:
        """Return a body's length in bytes. Raise Refused (413) if the body is too long."""
        max_bytes = self.limits.max_body_bytes(path)
        if b"transfer-encoding" in headers:  # the length is unknown until the end
            return max_bytes
        content_length = headers.get(b"content-length", b"0")
        if content_length.isdigit() and int(content_length) <= max_bytes:
            return int(content_length)
        raise Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body must be at most {max_bytes:,} bytes. Send fewer or smaller images, rows or "
            "labels.",
        )

    async def _refuse(self, refusal: Refused, receive: Receive, send: Send) -> None:
        """Send a refusal, then read a part of the body before the connection is closed.

        If the connection were closed while the client still sends, the client would not get the
        refusal.
        """
        body = problem_document(refusal.status, refusal.detail)
        headers = {
            "content-type": PROBLEM_TYPE,
            "content-length": str(len(body)),
            **refusal.headers,
        }
        header_pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send(
            {"type": "http.response.start", "status": int(refusal.status), "headers": header_pairs}
        )
        # more_body keeps the connection open while the client still sends
        await send({"type": "http.response.body", "body": body, "more_body": True})
        with suppress(TimeoutError):  # the refusal is sent already
            async with asyncio.timeout(self.limits.upload_seconds):
                await _drain_body(receive)
        await send({"type": "http.response.body", "body": b""})

    def _log_request(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log a request.

        Path and method are logged only for known paths. So no text from the client is logged.
        """
        path = "other"
        method = ""
        if scope["path"] in self.known_paths:
            path = scope["path"]
            method = scope["method"]
        self.on_answered(path, status, seconds)
        log_entry = {
            "time": round(time.time(), 3),
            "method": method,
            "path": path,
            "status": status,
            "images": scope["state"]["images"],
            "seconds": round(seconds, 4),
        }
        log_line = json.dumps(log_entry)
        access_logger.info(log_line)


@dataclass
class _AnswerSender:
    """Sends the answer to a request with the service's headers, and notes the status."""

    send: Send
    request_id: str
    is_closing: Callable[[], bool]
    status: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether the status has been sent."""
        return self.status > 0

    async def __call__(self, message: Message) -> None:
        """Send a message of the answer. Headers already in the answer are not changed."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present_names = {name.lower() for name, _ in message["headers"]}
            headers = list(message["headers"])
            service_headers = self._headers()
            for name, value in service_headers.items():
                if name not in present_names:
                    headers.append((name, value))
            message["headers"] = headers
        await self.send(message)

    def _headers(self) -> dict[bytes, bytes]:
        """Return the headers added to every answer from the service."""
        headers = {
            b"x-request-id": self.request_id.encode(),
            b"x-content-type-options": b"nosniff",
            b"referrer-policy": b"no-referrer",
            b"cache-control": b"no-store",
            b"content-security-policy": SECURITY_POLICY.encode(),
        }
        if self.is_closing():
            headers[b"connection"] = b"close"
        return headers


@dataclass
class _BodyReceiver:
    """Receives a request's body. Raises Refused for a long or slow body."""

    receive: Receive
    max_bytes: int  # maximum length in bytes
    seconds: float  # time for receiving the body
    deadline: float  # time on the event loop's clock when the body must be complete
    n_bytes_read: int = 0  # number of bytes received so far
    is_complete: bool = False  # whether the body is complete

    async def __call__(self) -> Message:
        """Receive the client's next message."""
        if self.is_complete:  # the next message, the disconnect, has no deadline
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError:
            raise Refused(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body was not complete after {self.seconds:g} seconds.",
            ) from None
        self.n_bytes_read += len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        if self.n_bytes_read > self.max_bytes:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body must be at most {self.max_bytes:,} bytes.",
            )
        return message


async def _drain_body(receive: Receive) -> None:
    """Read and discard a body, up to ``MAX_DRAINED_BYTES`` bytes."""
    n_bytes_read = 0
    while n_bytes_read < MAX_DRAINED_BYTES:
        message = await receive()
        n_bytes_read += len(message.get("body", b""))
        is_last = message["type"] != "http.request" or not message.get("more_body", False)
        if is_last:
            return


def too_many_in_progress(noun: str) -> Refused:
    """Return the refusal (429) because too many ``noun`` (such as "images") are in progress."""
    return Refused(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"the service has too many {noun} in progress. Repeat the request after a second.",
        **RETRY_HEADER,
    )


def require_at_most(n_items: int, limit: int, noun: str) -> None:
    """Raise Refused (413) if a request has more than ``limit`` ``noun`` (such as "images")."""
    if n_items > limit:
        raise Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"a request may have at most {limit:,} {noun}. Found {n_items:,}; send several "
            "requests.",
        )


class InProgress:
    """The requests in progress, the bytes of their bodies, and their images.

    A request is in progress from just before the body is read until the answer is sent.

    Attributes:
        n_queued_requests: Number of requests with images or rows (``QUEUED_PATHS``).
        n_other_requests: Number of requests with a body but without images or rows.
        n_bytes: Number of bytes in all bodies. Bytes that have not arrived yet are counted, too.
        n_images: Number of images and rows in all requests whose body has arrived.
    """

    def __init__(self, limits: ClientLimits) -> None:
        self.limits = limits
        self.n_queued_requests = 0
        self.n_other_requests = 0
        self.n_bytes = 0
        self.n_images = 0

    @property
    def max_total_bytes(self) -> int:
        """Maximum number of bytes in all bodies in progress."""
        return TOTAL_BODY_FACTOR * self.limits.max_image_body_bytes

    @contextmanager
    def admit(self, path: str, n_bytes: int) -> Iterator[Admission]:
        """Count a request as in progress during the block. Raise Refused (429) for too many."""
        is_queued = path in QUEUED_PATHS
        if self.n_bytes + n_bytes > self.max_total_bytes:
            raise too_many_in_progress("bytes")
        # The number of images is known only after a body has arrived. But every queued request has
        # at least one image or row. So neither of the two numbers exceeds the images in progress.
        min_images = max(self.n_queued_requests, self.n_images)
        if is_queued and min_images >= self.limits.max_queued_images:
            raise too_many_in_progress("images")
        if not is_queued and self.n_other_requests >= MAX_OTHER_REQUESTS:
            raise too_many_in_progress("requests")
        admission = Admission(self)
        n_queued = 1 if is_queued else 0
        n_other = 0 if is_queued else 1
        self.n_bytes += n_bytes
        self.n_queued_requests += n_queued
        self.n_other_requests += n_other
        try:
            yield admission
        finally:
            self.n_bytes -= n_bytes
            self.n_queued_requests -= n_queued
            self.n_other_requests -= n_other
            self.n_images -= admission.n_images


@dataclass
class Admission:
    """A request in progress, with the number of images (0 until the body has arrived)."""

    in_progress: InProgress
    n_images: int = 0

    def admit_images(self, n: int) -> None:
        """Count this request's images as in progress. Raise Refused (429) for too many images.

        A request with more images than ``max_queued_images`` is admitted if no image from another
        request is in progress.
        """
        has_other_images = self.in_progress.n_images > 0
        if (
            has_other_images
            and self.in_progress.n_images + n > self.in_progress.limits.max_queued_images
        ):
            raise too_many_in_progress("images")
        self.n_images = n
        self.in_progress.n_images += n


def _request_id(headers: dict[bytes, bytes]) -> str:
    """Return the request id from the client, or a new id if the client sent no valid id."""
    request_id = headers.get(b"x-request-id", b"").decode("latin-1")
    if REQUEST_ID_PATTERN.fullmatch(request_id):
        return request_id
    return uuid.uuid4().hex


def _require_one_length(headers: dict[bytes, bytes]) -> None:
    """Refuse a request whose head states the body's end twice, and close the connection.

    A proxy may follow the second header and see the end somewhere else. Then the proxy and this
    service disagree about where the next request begins (request smuggling).
    """
    if b"content-length" in headers and b"transfer-encoding" in headers:
        raise Refused(
            HTTPStatus.BAD_REQUEST,
            "a request has either Content-Length or Transfer-Encoding. Found both.",
            Connection="close",
        )


def _are_equal(digest: bytes, other_digest: bytes) -> bool:
    """Return whether two digests are equal. The comparison always takes the same time."""
    return hmac.compare_digest(digest, other_digest)


def in_brackets(host: str) -> str:
    """Return a host as written in URLs: with brackets if it is an IPv6 address."""
    if ":" in host:
        return f"[{host}]"
    return host


def _without_port(host_and_port: str) -> str:
    """Return the host alone, such as "localhost" for "localhost:8000"."""
    return re.sub(r":\d{1,5}$", "", host_and_port)
