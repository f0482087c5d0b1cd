"""A page on which one person labels photos with the keyboard.

An answer is on the disk before the next photo is shown.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from socket import socket
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from vilu.artifacts.disk import or_refuse, write_bytes
from vilu.artifacts.tables import csv_bytes
from vilu.datasets.files import Bounds, path_of
from vilu.datasets.images import BadImage, decode_image
from vilu.errors import BusyError, DataError, StorageError, UsageError
from vilu.text import page_of
from vilu.triage.label_files import label_columns
from vilu.triage.labels import SKIPPED, read_labels
from vilu.triage.review import Review

LOOPBACK: Final = "127.0.0.1"
SIDE: Final = 1600
"""Longest side of a photo as it is shown, in pixels."""

MAX_BODY: Final = 10_000
"""Bytes of an answer at most."""


@dataclass
class ReviewSession:
    """Photos, the answers so far, and where they are kept.

    Args:
        review: What to look at; its folder of photos must be known.
        output: CSV of labels; a file that is there is continued.

    Attributes:
        written: What the file held when it was read or written last; None where there was none.

    Raises:
        UsageError: If there is nothing to look at, or the folder of photos is not known.
        DataError: If the file of labels cannot be read, or is of other photos.
    """

    review: Review
    output: Path
    answers: dict[str, str] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)
    written: bytes | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.review.photos is None:
            raise UsageError(
                "to show photos the folder is needed that their paths are relative to. Give "
                "--photos DIR."
            )
        if not self.review.tasks:
            raise UsageError("there is no photo to look at.")
        self.bounds = Bounds(self.review.photos)
        self.written = self._on_disk()
        if self.written is not None:
            self.answers, self.streams = read_labels(self.output)
            known = {task.path for task in self.review.tasks}
            if self.answers and not known & self.answers.keys():
                raise DataError(f"{self.output} holds labels of other photos. Give another file.")

    def answer(self, index: object, label: object) -> None:
        """Set the label of a photo, or take it back (None), and keep all of them.

        Raises:
            DataError: If there is no such photo or label.
            BusyError: If another program has changed the file meanwhile; it stays as it is.
            StorageError: If the file cannot be written.
        """
        if type(index) is not int or not 0 <= index < len(self.review.tasks):
            raise DataError(f"there is no photo number {index!r}.")
        if label is not None and label not in {*self.review.names, SKIPPED}:
            raise DataError(f"{label!r} is none of the names to choose from.")
        path = self.review.tasks[index].path
        with self.lock:
            answers = dict(self.answers)
            if label is None:
                answers.pop(path, None)
            else:
                answers[path] = str(label)
            self._save(answers)
            self.answers = answers

    def _save(self, answers: dict[str, str]) -> None:
        """Write answers, unless the file holds what was not written here."""
        if self._on_disk() not in {None, self.written}:
            raise BusyError(
                f"{self.output} was changed by another program, and stays as it is. Stop this "
                "command and start it again: it goes on with what the file holds now."
            )
        streams = dict(self.streams)  # also of photos that are not shown now
        for task in self.review.tasks:
            streams[task.path] = task.stream
        content = csv_bytes(label_columns(answers, streams))
        write_bytes(self.output, content)
        self.written = content

    def _on_disk(self) -> bytes | None:
        """What the file holds; None where there is none."""
        with or_refuse(f"read {self.output}"):
            return self.output.read_bytes() if self.output.exists() else None

    def picture(self, index: int) -> bytes:
        """A photo as WebP, decoded with all that is done against hostile files.

        Raises:
            BadImage: If it is no picture that can be decoded.
            OSError: If it cannot be read.
        """
        path = path_of(self.review.tasks[index].path)
        image = decode_image(self.bounds.read(path)).image
        image.thumbnail((SIDE, SIDE))
        content = BytesIO()
        image.save(content, "WEBP", quality=85, method=2)
        return content.getvalue()

    def tasks(self) -> dict[str, Any]:
        """What the page shows."""
        tasks = []
        for task in self.review.tasks:
            facts = {
                "path": task.path,
                "answer": task.answer,
                "p": task.failure_probability,
                "second": task.runner_up,
                "label": self.answers.get(task.path),
            }
            tasks.append(facts)
        return {"names": list(self.review.names), "skip": SKIPPED, "tasks": tasks}


def serve_page(session: ReviewSession, port: int = 0, ready: Callable[[str], None] = print) -> None:
    """Serve the page on this machine alone until interrupted.

    ``ready`` gets its address, which holds a key.

    Raises:
        UsageError: If the port is taken.
    """
    key = secrets.token_urlsafe(16)

    class Handler(PageHandler):
        page_session = session
        token = key

    try:
        server = PageServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {LOOPBACK}, port {port}: {error.strerror}. Give another --port, or "
            "none: then a free one is taken."
        ) from error
    with server:
        ready(f"http://{LOOPBACK}:{server.server_port}/?key={key}")
        with suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.2)


class PageServer(ThreadingHTTPServer):
    """One thread per connection, none of which keeps the command from ending."""

    daemon_threads = True

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: object) -> None:
        """A browser that goes away in the middle is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class PageHandler(BaseHTTPRequestHandler):
    """Answers to the page; to nobody without the key, and to no other name of this machine."""

    page_session: ReviewSession
    token: str
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """The page, its tasks, a photo."""
        if not self._allowed():
            return
        kind, _, number = urlsplit(self.path).path.strip("/").partition("/")
        if not kind:
            self._page()
        elif kind == "tasks":
            self._send(
                HTTPStatus.OK, json.dumps(self.page_session.tasks()).encode(), "application/json"
            )
        elif (
            kind == "photo"
            and number.isdigit()
            and int(number) < len(self.page_session.review.tasks)
        ):
            self._photo(int(number))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        """An answer: {"index": 3, "label": "cat"}; null takes it back."""
        if not self._allowed():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an answer has at most {MAX_BODY} bytes"
            )
            return
        try:
            answer = json.loads(self.rfile.read(int(length)))
            self.page_session.answer(answer["index"], answer["label"])
        except (DataError, KeyError, RecursionError, TypeError, ValueError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        except BusyError as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
            return
        except StorageError as error:
            self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, str(error))
            return
        self._send(HTTPStatus.OK, b"{}", "application/json")

    def _allowed(self) -> bool:
        key = parse_qs(urlsplit(self.path).query).get("key", [""])[0]
        port = self.connection.getsockname()[1]
        host = self.headers.get("Host", "")
        # a page of elsewhere may point its own name at this machine
        if host not in {f"{LOOPBACK}:{port}", f"localhost:{port}"}:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this page is for this machine alone")
            return False
        if not hmac.compare_digest(key.encode(), self.token.encode()):
            self._refuse(
                HTTPStatus.FORBIDDEN, "the address must hold the key that the command printed"
            )
            return False
        return True

    def _page(self) -> None:
        content, policy = page_of("vilu.triage", "review", "'self'")
        self._send(HTTPStatus.OK, content.encode(), "text/html; charset=utf-8", policy)

    def _photo(self, index: int) -> None:
        try:
            content = self.page_session.picture(index)
        except (BadImage, OSError) as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            return
        self._send(HTTPStatus.OK, content, "image/webp")

    def _send(
        self, status: HTTPStatus, content: bytes, kind: str, policy: str = "default-src 'none'"
    ) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True
        self._send(
            status,
            json.dumps({"status": int(status), "detail": why}).encode(),
            "application/problem+json",
        )

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Nothing: the terminal is for what the command says."""
