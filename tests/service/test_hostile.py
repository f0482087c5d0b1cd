"""Requests that no honest client sends must cause no status 5xx, no traceback, no growth and no
file outside the state folder. The service must answer the next request.

The long form, ``make test-hostile``, draws ``REQUESTS`` requests (10,000) with schemathesis from
the service's OpenAPI description. The long form draws as many more requests that no description
allows.
"""

from __future__ import annotations

import base64
import json
import os
import random
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.builders.photo_folders import photo
from tests.service.conftest import Running, hosted, served

CLIENTS = 16
REQUESTS = int(os.environ.get("REQUESTS", "10000"))
GROWTH = 60 * 2**20
"""The number of bytes that the process may grow by during a test.

The allocator keeps its arenas and uses them again, so some growth is no leak.
"""


def png(width: int, height: int) -> bytes:
    """Return a small PNG with this size and only zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = zlib.compress(bytes(min((width + 1) * height, 2**22)), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMBS = [
    png(60_000, 60_000),
    png(1, 5_000),
    png(2**31 - 1, 1),
    b"GIF89a" + b"\xff" * 40,
    b"\xff\xd8" * 3_000,
    b"P6\n9 9\n255\n",
]


def raw_requests() -> Iterator[bytes]:
    """Yield malformed requests as bytes, some of them cut."""
    post = b"POST /v1/answers HTTP/1.1\r\nHost: localhost\r\n"
    form = b"Content-Type: multipart/form-data; boundary=x\r\n"
    for path in (
        b"/../../etc/passwd",
        b"/%2e%2e/%2e%2e",
        b"/docs/..%2f..%2fetc",
        b"//evil/x",
        b"/" + b"a" * 9_000,
        b"/\xff",
    ):
        yield b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for head in (
        b"Host: localhost\r\nHost: evil.example\r\n",
        b"Host: localhost:99999999\r\n",
        b"Host: \r\n",
        b"Host: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n",
        b"Host: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Host: localhost\r\nContent-Length: -1\r\n",
        b"Host: localhost\r\nX-Request-Id: " + b"i" * 10_000 + b"\r\n",
        b"Host: localhost\r\nX-Request-Id: a\tb\r\nAuthorization: Bearer \xff\r\n",
        b"Host: localhost\r\n" + b"A: b\r\n" * 4_000,
        b"Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
    ):
        yield b"POST /v1/scores HTTP/1.1\r\n" + head + b"\r\n"
    for body in (
        b"--x\r\n",
        b"--x\r\n\r\n\r\n--x--\r\n",
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"; filename="../../a"\r\n\r\n'
        + b"z" * 70_000,
        b"--x\r\n" + b"Header: " + b"v" * 70_000 + b"\r\n\r\n\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\na\r\n' * 300 + b"--x--\r\n",
    ):
        yield post + form + b"Content-Length: %d\r\n\r\n" % len(body) + body
        yield post + form + b"Content-Length: %d\r\n\r\n" % (len(body) + 50) + body  # too short
    yield post + b"Content-Type: multipart/form-data\r\nContent-Length: 3\r\n\r\nabc"
    yield post + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\nabc"
    yield post + b"Content-Type: application/json; charset=\xff\r\nContent-Length: 2\r\n\r\n{}"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)  # a TLS handshake
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def send(url: str, content: bytes, *, hang_up: bool = True) -> bytes:
    """Return the reply to these bytes, or b"" if no reply comes within a second.

    Some answers need a client that keeps its connection open (``hang_up=False``).
    """
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=1) as client:
        try:
            client.sendall(content)
            if hang_up:
                client.shutdown(socket.SHUT_WR)
            return client.recv(4096)
        except (TimeoutError, ConnectionError):
            return b""


@pytest.fixture(scope="module")
def target(
    predictors: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("target")
    with hosted(predictors[0], home / "s", max_image_body_bytes=4 * 2**20) as running:
        yield running
    assert not [line for line in running.said if '"status": 5' in line]
    assert [path.name for path in home.iterdir()] == ["s"]


def test_bytes_that_are_no_request(target: Running) -> None:
    for content in raw_requests():
        answer = send(target.url, content)
        assert not answer or answer.split(b" ", 2)[1][:1] == b"4", (content[:200], answer)
    assert target.get("/readyz").status_code == 200


def test_images_that_are_none(target: Running) -> None:
    order = random.Random(0)
    images = [
        *BOMBS,
        *(bytes(order.choices(photo(0, 0), k=order.randrange(1, 300))) for _ in range(60)),
    ]
    whole = bytearray(photo(1, 1))
    for _ in range(60):
        broken = whole.copy()
        for _ in range(order.randrange(1, 6)):
            broken[order.randrange(len(broken))] ^= 1 << order.randrange(8)
        images.append(bytes(broken))
    told = target.post(
        "/v1/answers", json={"images": [base64.b64encode(image).decode() for image in images]}
    )
    assert told.status_code == 200
    reasons = Counter(one["reason"] for one in told.json()["answers"] if one["label"] is None)
    assert {"bomb", "bad_geometry", "unidentified"} <= reasons.keys()


POSTED = ("/v1/answers", "/v1/scores", "/v1/labels", "/v1/corrections", "/v1/predictors")
PATHS = (
    *POSTED,
    "/v1/monitor",
    "/readyz",
    "/metrics",
    "/docs/../../etc/passwd",
    "/%00",
)
HEADERS = (
    "Origin: http://127.0.0.1:9",
    "Authorization: Bearer x",
    "Transfer-Encoding: chunked",
    "Content-Encoding: gzip",
    "Connection: close",
    "X-Request-Id: " + "i" * 129,
    "Content-Length: 7",
    "Host: evil.example",
    "Range: bytes=0-",
    "Cookie: " + "c" * 5_000,
)
VALUES = (
    None,
    -1,
    1e308,
    "",
    "(outside)",
    "\ud800",
    [],
    {},
    [[]],
    [0.5] * 16,
    [[0.5] * 16],
    [[0.0] * 16],
    {"a": "b"},
)
FIELDS = ("images", "embeddings", "features", "labels", "before", "after", "answers", "x")


def random_body(order: random.Random) -> tuple[str, bytes]:
    """Return a content type and a body that may be valid for it."""
    kind = "application/json"
    if order.random() < 0.5:
        fields = order.choices(FIELDS, k=order.randrange(1, 4))
        body = json.dumps({name: order.choice(VALUES) for name in fields}).encode()
    elif order.random() < 0.5:
        kind = "multipart/form-data; boundary=x"
        image = order.choice([photo(0, 0), *BOMBS, order.randbytes(order.randrange(300))])
        head = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
        body = head + image + b"\r\n--x--\r\n"
    else:
        body = order.randbytes(order.randrange(2_000))
    return kind, body


def random_request(order: random.Random) -> tuple[bytes, bool]:
    """Return a request with a random fault, and whether the request may also be cut or damaged."""
    kind, body = random_body(order)
    method = "POST"
    path = order.choice(POSTED)
    if order.random() < 0.3:
        method = order.choice(["GET", "PUT", "DELETE", "A" * 40])
        path = order.choice(PATHS)
    length = len(body)
    if order.random() < 0.2:
        length = order.choice([0, 1, length + 9, 2**31, 10**30])
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {kind}",
        f"Content-Length: {length}",
        *order.sample(HEADERS, k=order.choice([0, 0, 0, 1, 2])),
    ]
    content = bytearray("\r\n".join([*lines, "", ""]).encode() + body)
    is_damaged = order.random() < 0.2
    is_cut = order.random() < 0.1
    if is_damaged:
        for _ in range(order.randrange(1, 6)):
            content[order.randrange(len(content))] = order.randrange(256)
    if is_cut:
        content = content[: order.randrange(1, len(content))]
    return bytes(content), is_damaged or is_cut or length != len(body)


def ask_all(url: str, requests: list[tuple[bytes, bool]]) -> Counter[str]:
    """Send requests from ``CLIENTS`` clients at once, and count the statuses.

    A request without an answer counts as "none".
    """

    def ask(request: tuple[bytes, bool]) -> str:
        content, is_broken = request
        answer = send(url, content, hang_up=is_broken)
        status = answer.split(b" ", 2)[1].decode() if answer else "none"
        assert status[:1] in {"2", "4", "n"}, (content[:300], answer)
        return status

    with ThreadPoolExecutor(CLIENTS) as clients:
        return Counter(clients.map(ask, requests))


@pytest.mark.parametrize("n", [300, pytest.param(REQUESTS, marks=pytest.mark.hostile)])
def test_requests_at_random(predictors: tuple[Path, Path], tmp_path: Path, n: int) -> None:
    order = random.Random(0)
    statuses: Counter[str] = Counter()
    sizes = []
    with served(predictors[0], "--state", tmp_path / "s", "--max-body", 4) as running:
        assert running.process is not None
        process = psutil.Process(running.process.pid)
        before = running.post("/v1/answers", files={"a": photo(1, 1)}).json()["answers"]
        for _ in range(10):
            statuses += ask_all(running.url, [random_request(order) for _ in range(n // 10)])
            sizes.append(process.memory_info().rss)
            megabytes = [round(size / 2**20, 1) for size in sizes]
            print(f"{statuses.total()} requests, {dict(statuses)}; {megabytes} MiB")  # noqa: T201
        assert sizes[-1] - sizes[0] < GROWTH  # the first tenth is a warm-up
        assert running.get("/readyz").status_code == 200
        after = running.post("/v1/answers", files={"a": photo(1, 1)}).json()["answers"]
    for answer_before, answer_after in zip(before, after, strict=True):
        assert answer_after | {"row": ""} == answer_before | {"row": ""}
    assert not [line for line in running.said if "Traceback" in line]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.hostile
def test_requests_that_the_description_allows_and_forbids(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Callable[[int], list[bytes]]
) -> None:
    with served(predictors[0], "--state", tmp_path / "s", "--max-body", 4) as running:
        meet_all(running)
        assert running.post("/v1/answers", files={"a": photos(1)[0]}).status_code == 200
    assert not [line for line in running.said if "Traceback" in line]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def meet_all(target: Running) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_dict(target.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert target.process is not None
    process, seen, sizes = psutil.Process(target.process.pid), Counter[int](), list[int]()
    with_body = [operation for operation in operations if operation.body]
    share = REQUESTS // (2 * len(with_body))
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for operation in operations if mode is GenerationMode.POSITIVE else with_body:

            @settings(
                max_examples=share,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def meet(case: schemathesis.Case) -> None:
                answer = case.call(base_url=target.url, timeout=20)
                seen[answer.status_code] += 1
                assert answer.status_code < 500, answer.text[:300]
                assert "Traceback" not in answer.text

            meet()
            sizes.append(process.memory_info().rss)
    print(  # noqa: T201
        f"{sum(seen.values())} requests, {dict(seen)}; memory "
        f"{[size // 2**20 for size in sizes]} MiB"
    )
    assert sizes[-1] - sizes[0] < GROWTH
