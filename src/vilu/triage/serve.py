"""A web page for one person to label photos with the keyboard.

While an answer is saved, the page already shows the next photo. The answers' order is kept.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from shlex import join, quote
from socket import socket
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from vilu.artifacts.disk import convert_os_errors, write_bytes
from vilu.artifacts.tables import csv_bytes
from vilu.datasets.files import AllowedFolders, original_path
from vilu.datasets.images import BadImage, decode_image
from vilu.errors import BusyError, DataError, StorageError, UsageError
from vilu.text import render_page
from vilu.triage.label_files import label_columns
from vilu.triage.labels import SKIPPED, read_labels
from vilu.triage.review import Review

LOOPBACK: Final = "127.0.0.1"
"""Address for access from this machine only."""

LONGEST_SIDE: Final = 1600
"""Length of a photo's longest side on the page, in pixels, if the photo is not smaller."""

MAX_BODY_BYTES: Final = 10_000
"""Maximum body length of an answer, in bytes."""


@dataclass
class ReviewSession:
    """The photos to label, the answers so far, and the answer file.

    Args:
        review: Photos to look at. The photo folder must be known.
        output: CSV of labels. If the file exists, the labels in it are read first.

    Attributes:
        labels: Maps photo paths to labels.
        streams: Maps photo paths to streams, as in the file at the start.
        labelled_before: Paths with a label in the file at the start. The streams of these labels
            are kept.
        last_content: The file's content when this session last read or wrote the file, or None if
            there was no file.
        lock: Held while an answer is saved.
        allowed_folders: Reads files in the photo folder only.
        sorted_files: Reads moved photos, in the folder of sorted photos only.

    Raises:
        UsageError: If there is no photo to look at, or the photo folder is not known.
        DataError: If the label file is damaged, or if none of its labels is about these photos.
    """

    review: Review
    output: Path
    labels: dict[str, str] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)
    labelled_before: frozenset[str] = frozenset()
    last_content: bytes | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.review.photos is None:
            raise UsageError(
                "the folder of the photos is not known, so they cannot be shown. Give --photos "
                "DIR: the folder that their paths are relative to."
            )
        if not self.review.tasks:
            raise UsageError("there is no photo to look at.")
        self.allowed_folders = AllowedFolders(
            self.review.photos, follow_links=self.review.follow_links
        )
        self.sorted_files = AllowedFolders(
            self.review.sorted_folder, follow_links=self.review.follow_links
        )
        self.last_content = self._content_on_disk()
        if self.last_content is not None:
            self.labels, self.streams = read_labels(self.output)
            self.labelled_before = frozenset(self.labels)
            paths = {task.path for task in self.review.tasks}
            are_labels_of_others = paths.isdisjoint(self.labels)
            if self.labels and are_labels_of_others:
                raise DataError(f"{self.output} holds labels of other photos. Give another file.")

    def set_label(self, index: object, label: object) -> None:
        """Set the label of a photo, and save all labels.

        Args:
            index: The photo's number.
            label: The label. None removes the photo's label.

        Raises:
            DataError: If there is no photo with this number, or if the label is no known name.
            BusyError: If another program has changed the file. Then nothing is written.
            StorageError: If the file cannot be written.
        """
        # The type is compared because True and False would pass as numbers.
        if type(index) is not int or not 0 <= index < len(self.review.tasks):
            raise DataError(f"there is no photo number {index!r}.")
        if label is not None and label not in {*self.review.names, SKIPPED}:
            raise DataError(f"{label!r} is none of the names to choose from.")
        path = self.review.tasks[index].path
        with self.lock:
            labels = dict(self.labels)
            if label is None:
                labels.pop(path, None)
            else:
                labels[path] = str(label)
            self._save(labels)
            self.labels = labels

    def _save(self, labels: dict[str, str]) -> None:
        """Write the labels. Raises BusyError if another program has changed the file."""
        # If the file was removed meanwhile (None), the file is written again.
        if self._content_on_disk() not in {None, self.last_content}:
            raise BusyError(
                f"{self.output} was changed by another program, and stays as it is. Stop this "
                "command and start it again: it goes on with what the file holds now."
            )
        # A label without a stream in the file belongs to a photo that was picked at random. So this
        # label gets no stream here.
        streams = dict(self.streams)
        for task in self.review.tasks:
            if task.path not in self.labelled_before:
                streams[task.path] = task.stream
        columns = label_columns(labels, streams)
        content = csv_bytes(columns)
        write_bytes(self.output, content)
        self.last_content = content

    def _content_on_disk(self) -> bytes | None:
        """Return the file's present content, or None if there is no file."""
        with convert_os_errors(f"cannot read {self.output}"):
            return self.output.read_bytes() if self.output.exists() else None

    def webp_photo(self, index: int) -> bytes:
        """Encode a photo as WebP. The photo is decoded with the protection against hostile files.

        Raises:
            BadImage: If the file cannot be decoded as a picture.
            OSError: If the file cannot be read.
        """
        content_of_file = self._read_photo(self.review.tasks[index].path)
        image = decode_image(content_of_file).image
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        content = BytesIO()
        image.save(content, "WEBP", quality=85, method=2)
        return content.getvalue()

    def _read_photo(self, path: str) -> bytes:
        """Return the bytes in a photo's file, wherever ``vilu triage --move`` has moved the file.

        Raises:
            OSError: If the file cannot be read.
        """
        present_location = self.review.moved_photos.get(path)
        if present_location is None:
            return self.allowed_folders.read(original_path(path))
        path_in_folder = present_location.relative_to(self.review.sorted_folder)
        return self.sorted_files.read(str(path_in_folder))

    def page_data(self) -> dict[str, Any]:
        """Return the page's data for JSON: the names to choose from, and the photos."""
        tasks = []
        for task in self.review.tasks:
            facts = {
                "path": task.path,
                "answer": task.answer,
                "p": task.failure_probability,
                "quantile": task.quantile,
                "second": task.runner_up,
                "zero_shot": task.zero_shot,
                "label": self.labels.get(task.path),
                "blind": task.is_blind,
            }
            tasks.append(facts)
        return {
            "names": list(self.review.names),
            "skip": SKIPPED,
            "kind": self.review.answer,
            "used": self._names_by_use(),
            "next": self.next_command(),
            "tasks": tasks,
        }

    def _names_by_use(self) -> list[str]:
        """Return the label names so far, the most frequent name first."""
        # The triage may have read the answer file already, but each photo counts once.
        labels = {**self.review.labels, **self.labels}
        counts = Counter(labels.values())
        return [name for name, _ in counts.most_common() if name in self.review.names]

    def next_command(self) -> str:
        """Return a phrase that names the next command for the label file."""
        if self.review.scores is None:
            return f"the same `vilu triage` command with --labels {quote(str(self.output))}"
        scores = str(self.review.scores)
        words = ["vilu", "labels", str(self.output), "--scores", scores, "-o", "late.parquet"]
        return f"`{join(words)}`"


def serve_page(
    session: ReviewSession, port: int = 0, on_ready: Callable[[str], None] = print
) -> None:
    """Serve the page on this machine only, until an interrupt.

    Args:
        session: The photos and the answers.
        port: The port, or 0 for a free port.
        on_ready: Called with the page's address. The address includes a secret key.

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
            "leave --port out to use a free port."
        ) from error
    with server:
        on_ready(f"http://{LOOPBACK}:{server.server_port}/?key={key}")
        with suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.2)


class PageServer(ThreadingHTTPServer):
    """A server with a thread for each connection. The threads end with the command."""

    daemon_threads = True

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: object) -> None:
        """Report an error, except when the browser has closed the connection."""
        _, error, _ = sys.exc_info()
        if not isinstance(error, ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class PageHandler(BaseHTTPRequestHandler):
    """Handles the page's requests.

    A request is refused if it has no secret key, if it names this machine by another host name, or
    if it comes from another site's page.

    Attributes:
        page_session: The photos and the answers.
        token: The secret key.
    """

    page_session: ReviewSession
    token: str
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Send the page, the task data, or a photo."""
        if not self._is_allowed():
            return
        # The paths are /, /tasks and /photo/NUMBER.
        address = urlsplit(self.path)
        path = address.path.strip("/")
        resource, _, number = path.partition("/")
        n_photos = len(self.page_session.review.tasks)
        if not resource:
            self._send_page()
        elif resource == "tasks":
            page_data = self.page_session.page_data()
            content = json.dumps(page_data).encode()
            self._send(HTTPStatus.OK, content, "application/json")
        elif resource == "photo" and number.isdigit() and int(number) < n_photos:
            self._send_photo(int(number))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        """Take an answer such as {"index": 3, "label": "cat"}. The label null removes the label."""
        if not self._is_allowed():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an answer has at most {MAX_BODY_BYTES} bytes"
            )
            return
        try:
            content = self.rfile.read(int(length))
            body = json.loads(content)
            self.page_session.set_label(body["index"], body["label"])
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

    def _is_allowed(self) -> bool:
        """Return whether a request is allowed. A refused request gets an error as response."""
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        key, *_ = query.get("key", [""])  # the first key if there are several
        _, port = self.connection.getsockname()
        host = self.headers.get("Host", "")
        # The host name is checked because a hostile site may let its own host name lead to this
        # machine (DNS rebinding).
        if host not in {f"{LOOPBACK}:{port}", f"localhost:{port}"}:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this page is for this machine alone")
            return False
        # A page on another port of this machine counts as another site, too. Requests by this page
        # may come without the header.
        own_origin = f"http://{host}"
        if self.headers.get("Origin", own_origin) != own_origin:
            self._refuse(HTTPStatus.FORBIDDEN, "a page of another site may not use this page")
            return False
        if not hmac.compare_digest(key.encode(), self.token.encode()):
            self._refuse(
                HTTPStatus.FORBIDDEN, "the address must hold the key that the command printed"
            )
            return False
        return True

    def _send_page(self) -> None:
        content, policy = render_page("vilu.triage", name="review", images="'self'")
        self._send(HTTPStatus.OK, content.encode(), "text/html; charset=utf-8", policy)

    def _send_photo(self, index: int) -> None:
        try:
            content = self.page_session.webp_photo(index)
        except (BadImage, OSError) as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            return
        self._send(HTTPStatus.OK, content, "image/webp")

    def _send(
        self,
        status: HTTPStatus,
        content: bytes,
        content_type: str,
        policy: str = "default-src 'none'",
    ) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", content_type),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        # The body of the request may be unread, so the connection takes no further one.
        self.close_connection = True
        content = json.dumps({"status": int(status), "detail": detail}).encode()
        self._send(status, content, "application/problem+json")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Log nothing, because the terminal shows only the command's messages."""
