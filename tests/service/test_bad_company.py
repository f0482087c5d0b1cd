"""Hostile clients and pages from other sites must not take the room, the time or the guarantee."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.builders.photo_folders import KINDS, photo
from tests.conftest import few
from tests.service.conftest import Running, hosted, served
from vilu.calibration.calibration import Calibration
from vilu.errors import DataError, StorageError, UsageError
from vilu.service.bodies import ImagesIn
from vilu.service.journal import Journal
from vilu.service.journals import ContradictionError
from vilu.service.limits import ClientLimits, read_keys
from vilu.service.local_journals import LocalJournals

Photos = Callable[[int], list[bytes]]
MB = 2**20


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def received(connection: socket.socket) -> bytes:
    """Return all bytes that arrive until the service closes the connection."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


# Rows S2: the head of a request takes the room.


def begun(url: str, path: str, length: int) -> socket.socket:
    """Open a connection, send the head of a request and no byte from its body."""
    connection = connected(url)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    )
    connection.sendall(head.encode())
    return connection


@pytest.mark.parametrize(
    ("path", "length", "most"),
    [
        ("/v1/answers", 4 * MB, 4),  # the room is four times the largest body
        ("/v1/answers", 10, 8),  # the room is one body per queued image
        ("/v1/labels", 10, 16),
        ("/v1/scores", MB, 8),
    ],
)
def test_room_is_taken_at_the_head(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos, path: str, length: int, most: int
) -> None:
    """A body that has not come yet must take room. If its client leaves, the room must be free
    again.
    """
    with hosted(
        predictors[0], tmp_path / "s", max_queued_images=8, max_image_body_bytes=4 * MB
    ) as running:
        held = [begun(running.url, path, length) for _ in range(most)]
        refused = begun(running.url, path, length)
        assert refused.recv(100).startswith(b"HTTP/1.1 429")
        assert running.get("/healthz").status_code == 200
        for connection in [*held, refused]:
            connection.close()
        while running.post("/v1/answers", files={"a": photos(1)[0]}).status_code == 429:
            pass
        assert "vilu_bytes_under_way 0.0" in running.get("/metrics").text


def test_more_connections_than_the_limit_are_closed(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilu.service.server.MAX_CONNECTIONS", 5)
    with hosted(predictors[0], tmp_path / "s") as running:
        idle = [connected(running.url) for _ in range(5)]
        with connected(running.url) as connection:
            refused = received(connection)
        for connection in idle:
            connection.close()
        assert refused.startswith(b"HTTP/1.1 503 Service Unavailable")
        assert b"at most 5 connections" in refused
        assert running.get("/readyz").status_code == 200


# Row S3: the values in a body are counted before anything is built.

LONG = 31 * MB
BODIES = {
    "lists": ("/v1/answers", b'{"images":[' + b"[]," * (LONG // 3) + b"[]]}"),
    "zeros": ("/v1/answers", b'{"images":[' + b"0," * (LONG // 2) + b"0]}"),
    "texts": ("/v1/answers", b'{"images":[' + b'"",' * (LONG // 3) + b'""]}'),
    "escapes": ("/v1/answers", b'{"images":["' + rb"\\" * (LONG // 2) + b'"]}'),
    "digits": ("/v1/answers", b'{"images":[' + b"1" * LONG + b"]}"),
    "vectors": ("/v1/scores", b'{"embeddings":[' + b"[]," * (LONG // 3) + b"[]]}"),
    "labels": (
        "/v1/labels",
        b'{"labels":{' + b",".join(b'"%d":"a"' % number for number in range(2_000_000)) + b"}}",
    ),
}

WATCH = """
import json, sys, time, http.client
client = http.client.HTTPConnection(sys.argv[1], timeout=60)
print("ready", flush=True)
sys.stdin.readline()
seconds = []
while len(seconds) < 4000:
    began = time.perf_counter()
    client.request("GET", "/healthz", headers={"Host": "localhost"})
    client.getresponse().read()
    seconds.append(time.perf_counter() - began)
    time.sleep(0.005)
    if __import__("select").select([sys.stdin], [], [], 0)[0]:
        break
print(json.dumps(sorted(seconds)))
"""


@contextmanager
def health_watched(url: str) -> Iterator[list[float]]:
    """Let another process ask for /healthz during the block, and yield a list.

    After the block, the list holds the seconds that each answer took.
    """
    words = [sys.executable, "-c", WATCH, url.removeprefix("http://")]
    seconds: list[float] = []
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.stdin.write("go\n")
        process.stdin.flush()
        yield seconds
        told, _ = process.communicate("stop\n", timeout=60)
        seconds += json.loads(told)


def seconds_to_parse_one_text() -> float:
    """Measure how long a body of one long text takes here. The service has to parse it, too."""
    _, body = BODIES["escapes"]
    began = time.perf_counter()
    ImagesIn.model_validate_json(body)
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def apart(
    predictors: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Return a service in its own process, which shares no interpreter lock with its clients."""
    with served(predictors[0], "--state", tmp_path_factory.mktemp("apart") / "s") as running:
        yield running


@pytest.mark.parametrize("name", few(BODIES, 3))
def test_long_bodies_hold_up_nobody_else(apart: Running, name: str) -> None:
    """While long bodies arrive, every question from a third process must be answered soon.

    The limit is eight times the time to parse one long text, measured before and after, because a
    busy machine is slower at both. The old fault built all values of a body. For the bodies "lists"
    and "zeros" this takes 100 times as long as one text.
    """
    path, body = BODIES[name]
    headers = {"Content-Type": "application/json"}
    before = seconds_to_parse_one_text()
    began = time.monotonic()
    with health_watched(apart.url) as seconds:
        while time.monotonic() - began < 1:
            reply = apart.post(path, content=body, headers=headers)
            assert reply.status_code in {413, 422}
    after = seconds_to_parse_one_text()
    print(f"{name}: {max(seconds):.3f} s at most, {before:.3f} and {after:.3f} for a text")  # noqa: T201
    assert max(seconds) <= 8 * max(before, after)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/answers", {"images": ["AA=="] * 9}, "8 images. Found 9"),
        ("/v1/answers", {"images": [""] * 9}, "8 images. Found 9"),
        ("/v1/scores", {"embeddings": [[0.5] * 16] * 9}, "128 numbers. Found 144"),
        ("/v1/labels", {"labels": {str(row): "dress" for row in range(9)}}, "8 labels. Found 9"),
    ],
)
def test_what_a_body_holds_is_counted(
    predictors: tuple[Path, Path], tmp_path: Path, path: str, body: object, words: str
) -> None:
    with hosted(predictors[0], tmp_path / "s", max_images=8) as running:
        reply = running.post(path, json=body)
        assert (reply.status_code, words in reply.json()["detail"]) == (413, True)


def test_commas_and_quotes_within_texts_are_not_counted(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    labels = {'a, "quoted" \\ one': "cat, dog", "b,,,,": '"', "c\\": "(outside)"}
    with hosted(predictors[0], tmp_path / "s", max_images=3) as running:
        reply = running.post("/v1/labels", json={"labels": labels})
        assert (reply.status_code, "neither a class" in reply.json()["detail"]) == (422, True)


def test_numbers_and_labels_have_a_smaller_limit_than_images(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    with hosted(predictors[0], tmp_path / "s") as running:
        for path in ("/v1/scores", "/v1/labels", "/v1/predictors"):
            reply = running.post(path, content=b" " * (MB + 1))
            assert (reply.status_code, "1,048,576 bytes" in reply.json()["detail"]) == (413, True)
        assert running.post("/v1/answers", content=b" " * (MB + 1)).status_code == 415


# Row S4: a request has a budget for pixels.


def png(side: int) -> bytes:
    """Return a small file: a black PNG with side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    packed = zlib.compressobj(9)
    rows = [packed.compress(bytes(side + 1)) for _ in range(side)]
    pixels = chunk(b"IDAT", b"".join(rows) + packed.flush())
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


def test_pixels_of_a_request_have_a_budget(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    """A picture above the budget must not be decoded.

    Pictures with 50 megapixels kept both decoders busy for a minute.
    """
    assert ClientLimits().max_pixels < 50_000_000
    files = [("images", ("a", png(200)))] * 9
    with hosted(predictors[0], tmp_path / "s", max_pixels=40_000) as running:
        reply = running.post("/v1/answers", files=files[:1])
        assert reply.json()["answers"][0]["decision"] is not None
        reply = running.post("/v1/answers", files=[("images", ("a", png(201)))])
        assert reply.json()["answers"][0]["reason"] == "bomb"
    with hosted(predictors[0], tmp_path / "s", max_request_pixels=8 * 40_000) as running:
        assert running.post("/v1/answers", files=files[:8]).status_code == 200
        reply = running.post("/v1/answers", files=files)
        assert reply.status_code == 413
        assert "320,000 pixels. Found 360,000" in reply.json()["detail"]


# Row S5: keys have scopes.


def test_a_key_does_what_its_scopes_allow(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    names = ("ask", "label", "admin")
    keys = {name: name.ljust(16, "0") for name in (*names, "all")}
    lines = [f"{keys[name]} {name}" for name in names]
    (tmp_path / "keys").write_text("\n".join([*lines, keys["all"], ""]))
    requests = {
        "ask": ("/v1/answers", {"images": ["AA=="]}),
        "label": ("/v1/labels", {"labels": {"a": "(outside)"}}),
        "admin": ("/v1/predictors", {"answers": "first"}),
    }
    with hosted(predictors[0], tmp_path / "s", keys=read_keys(tmp_path / "keys")) as running:
        for holder, key in keys.items():
            headers = {"Authorization": f"Bearer {key}"}
            assert running.get("/v1/monitor", headers=headers).status_code == 200
            for needed, (path, body) in requests.items():
                reply = running.post(path, json=body, headers=headers)
                expected = 200 if holder in {needed, "all"} else 403
                assert reply.status_code == expected
                assert expected == 200 or f"scope {needed!r}" in reply.json()["detail"]


def test_a_scope_that_there_is_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef ask write\n")
    with pytest.raises(UsageError, match=r"'write'\. The scopes are ask, label, admin"):
        read_keys(tmp_path / "keys")


# Row S5: equal pictures count once, and contradicting labels are reported.


def with_comment(picture: bytes, comment: str) -> bytes:
    """Return the same pixels in a file with other bytes."""
    content = BytesIO()
    facts = PngInfo()
    facts.add_text("comment", comment)
    Image.open(BytesIO(picture)).save(content, "PNG", pnginfo=facts)
    return content.getvalue()


def monitored(running: Running) -> dict[str, Any]:
    (monitor,) = running.get("/v1/monitor").json()["monitors"]
    status: dict[str, Any] = monitor["status"]
    return status


def test_equal_pictures_count_once(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    """If a client sends the same picture again, the picture must count once.

    A health check posted one picture, and after 14 posts the guarantee was void.
    """
    picture = photo(0, 0)
    with hosted(predictors[0], tmp_path / "s") as running:
        rows = []
        for number in range(20):
            images = [picture, with_comment(picture, str(number))]
            files = [("images", ("a", image)) for image in images]
            reply = running.post("/v1/answers", files=files).json()
            rows += [answer["row"] for answer in reply["answers"]]
        assert reply["guarantee"] == "holds"
        assert monitored(running)["rows"] == 1
        labels = dict.fromkeys(rows, "(outside)")
        (audited,) = running.post("/v1/labels", json={"labels": labels}).json()["audited"]
        assert (audited["new"], audited["guarantee"]) == (40, "holds")
        assert monitored(running)["audit"]["n"] <= 1
        other = running.post("/v1/answers", files={"a": photo(1, 1)})
        assert other.status_code == 200
        assert monitored(running)["rows"] == 2
        before = monitored(running)
    with hosted(predictors[0], tmp_path / "s") as running:
        assert monitored(running) == before


def test_a_picture_with_one_other_pixel_is_another_picture(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """The monitor must count near copies one by one.

    A camera that is stuck or covered sends near copies, and the monitor must notice them.
    """
    with hosted(predictors[0], tmp_path / "s") as running:
        for number in range(3):
            picture = Image.open(BytesIO(photo(0, 0)))
            picture.putpixel((0, 0), (85 * number, 0, 0))
            content = BytesIO()
            picture.save(content, "PNG")
            reply = running.post("/v1/answers", files={"a": content.getvalue()})
            assert reply.status_code == 200
        assert monitored(running)["rows"] == 3


def test_wrong_labels_are_told_and_can_be_corrected(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """Wrong labels make the guarantee void, and the right labels must restore it.

    Both labels stay in the journal.
    """
    images = [photo(number % KINDS, number) for number in range(60)]
    files = [("images", ("a", image)) for image in images]
    with hosted(predictors[0], tmp_path / "s") as running:
        answers = running.post("/v1/answers", files=files).json()["answers"]
        accepted = [answer for answer in answers if answer["decision"] == "accept"]
        wrong = {answer["row"]: "(outside)" for answer in accepted}
        right = {answer["row"]: answer["label"] for answer in accepted}
        (audited,) = running.post("/v1/labels", json={"labels": wrong}).json()["audited"]
        assert audited["guarantee"] == "void"

        fresh = next(answer["row"] for answer in answers if answer["decision"] != "accept")
        reply = running.post("/v1/labels", json={"labels": {**right, fresh: "(outside)"}})
        assert reply.status_code == 409
        for words in ("'(outside)'", repr(accepted[0]["label"]), "/v1/corrections"):
            assert words in reply.json()["detail"]
        reply = running.post("/v1/labels", json={"labels": {fresh: "(outside)"}})
        assert reply.json()["audited"][0]["new"] == 1  # the refused request wrote nothing

        stale = {"before": right, "after": wrong}
        assert running.post("/v1/corrections", json=stale).status_code == 409
        others = {"before": wrong, "after": {fresh: "(outside)"}}
        assert running.post("/v1/corrections", json=others).status_code == 422
        reply = running.post("/v1/corrections", json={"before": wrong, "after": right})
        assert reply.json()["corrected"] == len(accepted)
        assert reply.json()["guarantees"] == {"first": "holds"}
        before = monitored(running)
        assert (before["audit"]["n"], before["audit"]["wrong"]) == (len(accepted), 0)
    with hosted(predictors[0], tmp_path / "s") as running:
        assert monitored(running) == before
        again = running.post("/v1/labels", json={"labels": right}).json()["audited"]
        assert again[0]["new"] == 0
    (file,) = (tmp_path / "s").glob("*/rows.sqlite")
    with closing(sqlite3.connect(file)) as table:
        (n_labels,) = table.execute("SELECT count(*) FROM labels").fetchone()
        (n_corrections,) = table.execute("SELECT count(*) FROM corrections").fetchone()
    assert (n_labels, n_corrections) == (len(accepted) + 1, len(accepted))


@pytest.mark.usefixtures("left_open")
def test_a_crash_during_a_correction_counts_the_right_labels(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journals = LocalJournals(tmp_path / "s", {"first": predictors[0]})
    journals.record(["a-1", "b-2"], {"first": ([0, 1], [0.1, 0.2])})
    names = predictors_names(predictors[0])
    journals.label({"a-1": names[1]})
    journals.close()
    journals = LocalJournals(tmp_path / "s", {"first": predictors[0]})
    with monkeypatch.context() as crash:
        crash.setattr(Journal, "_take_in_all", lambda journal: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            journals.correct({"a-1": names[1]}, {"a-1": names[0]})
    audit = LocalJournals(tmp_path / "s", {"first": predictors[0]}).statuses()["first"].audit
    assert audit is not None
    assert audit.wrong == 0


def journals_of_two(folder: Path, predictors: tuple[Path, Path], label: str) -> LocalJournals:
    """Return the journals of two predictors, with two rows of this label.

    The row a-1 is older than the second predictor, so the first journal alone has it. Both journals
    have the row b-2.
    """
    first, second = predictors
    journals = LocalJournals(folder, {"first": first})
    journals.record(["a-1"], {"first": ([0], [0.1])})
    journals.label({"a-1": label})
    journals.close()
    journals = LocalJournals(folder, {"first": first, "second": second})
    journals.record(["b-2"], {name: ([0], [0.2]) for name in ("first", "second")})
    journals.label({"b-2": label})
    return journals


def test_a_row_that_is_older_than_the_second_predictor_can_be_corrected(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """The second journal has never seen the row, and must not stop the correction halfway."""
    dress, hat, *_ = predictors_names(predictors[0])
    journals = journals_of_two(tmp_path / "s", predictors, hat)
    journals.correct({"a-1": hat, "b-2": hat}, {"a-1": dress, "b-2": dress})
    audits = {name: status.audit for name, status in journals.statuses().items()}
    with pytest.raises(ContradictionError, match=f"has the label {dress!r}, and {hat!r} was sent"):
        journals.correct({"a-1": hat}, {"a-1": dress})
    with pytest.raises(DataError, match="no label that could be corrected"):
        journals.correct({"a-1": dress, "c-3": hat}, {"a-1": hat, "c-3": dress})
    assert {name: status.audit for name, status in journals.statuses().items()} == audits
    journals.close()
    assert {name: (audit.n, audit.wrong) for name, audit in audits.items() if audit} == {
        "first": (2, 0),
        "second": (1, 0),
    }


def test_a_correction_that_ended_between_two_journals_can_be_repeated(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dress, hat, *_ = predictors_names(predictors[0])
    journals = LocalJournals(
        tmp_path / "s", dict(zip(("first", "second"), predictors, strict=True))
    )
    journals.record(["a-1"], {name: ([0], [0.1]) for name in ("first", "second")})
    journals.label({"a-1": hat})
    correct = Journal.correct

    def correct_only_first(journal: Journal, labels: dict[str, str]) -> None:
        if journal is journals._journals["second"]:
            raise StorageError("the second journal is locked.")
        correct(journal, labels)

    with monkeypatch.context() as lock:
        lock.setattr(Journal, "correct", correct_only_first)
        with pytest.raises(StorageError):
            journals.correct({"a-1": hat}, {"a-1": dress})
    journals.correct({"a-1": hat}, {"a-1": dress})
    audits = [status.audit for status in journals.statuses().values()]
    journals.close()
    assert [audit.wrong for audit in audits if audit] == [0, 0]


def test_only_replaced_labels_are_counted_as_corrected(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """A row that keeps its label is no corrected row, and adds nothing to the journal."""
    dress, hat, *_ = predictors_names(predictors[0])
    files = [("images", ("a", photo(0, number))) for number in range(2)]
    with hosted(predictors[0], tmp_path / "s") as running:
        answers = running.post("/v1/answers", files=files).json()["answers"]
        wrong, right = (answer["row"] for answer in answers)
        labels = {wrong: hat, right: dress}
        assert running.post("/v1/labels", json={"labels": labels}).status_code == 200
        corrections = {"before": labels, "after": {wrong: dress, right: dress}}
        reply = running.post("/v1/corrections", json=corrections)
        assert reply.json()["corrected"] == 1
        unchanged = {"before": {right: dress}, "after": {right: dress}}
        reply = running.post("/v1/corrections", json=unchanged)
        assert (reply.status_code, reply.json()["corrected"]) == (200, 0)
    (file,) = (tmp_path / "s").glob("*/rows.sqlite")
    with closing(sqlite3.connect(file)) as table:
        (n_corrections,) = table.execute("SELECT count(*) FROM corrections").fetchone()
    assert n_corrections == 1


def correct_only_first(journals: LocalJournals, label_before: str, label_after: str) -> None:
    """Send a correction of all rows that ends after the first journal."""
    first = journals._journals["first"]
    row_ids = first.labels_of(["a-1", "b-2"])
    assert set(row_ids.values()) == {label_before}
    first.correct(dict.fromkeys(row_ids, label_after))


def test_an_interrupted_correction_of_rows_of_one_journal_is_repeated(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    dress, hat, *_ = predictors_names(predictors[0])
    journals = journals_of_two(tmp_path / "s", predictors, hat)
    correct_only_first(journals, hat, dress)
    before = {"a-1": hat, "b-2": hat}
    n_corrected = journals.correct(before, dict.fromkeys(before, dress))
    assert n_corrected == 1  # the second journal has b-2 alone
    with pytest.raises(ContradictionError, match=f"a-1 has the label {dress!r}, and {hat!r} was"):
        journals.correct(before, dict.fromkeys(before, dress))
    audits = [status.audit for status in journals.statuses().values()]
    journals.close()
    assert [(audit.n, audit.wrong) for audit in audits if audit] == [(2, 0), (1, 0)]


def test_the_refusal_after_an_interrupted_correction_says_what_to_send(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    dress, hat, skirt, *_ = predictors_names(predictors[0])
    journals = LocalJournals(
        tmp_path / "s", dict(zip(("first", "second"), predictors, strict=True))
    )
    journals.record(["a-1"], {name: ([0], [0.1]) for name in ("first", "second")})
    journals.label({"a-1": hat})
    correct_only_first(journals, hat, dress)
    for label_before in (dress, hat):
        with pytest.raises(ContradictionError, match="from one of these labels to the other"):
            journals.correct({"a-1": label_before}, {"a-1": skirt})
    journals.correct({"a-1": hat}, {"a-1": dress})
    journals.correct({"a-1": dress}, {"a-1": skirt})
    labels = [journal.labels_of(["a-1"]) for journal in journals._journals.values()]
    journals.close()
    assert labels == [{"a-1": skirt}] * 2


def test_a_correction_counts_under_the_calibration_of_the_start(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """The folder is removed under the service, as a new fit does. The decisions stay the old ones,
    and so does the monitor.
    """
    predictor = tmp_path / "predictor"
    shutil.copytree(predictors[0], predictor)
    dress, hat, *_ = predictors_names(predictor)
    journals = LocalJournals(tmp_path / "s", {"first": predictor})
    journals.record(["a-1"], {"first": ([0], [0.1])})
    journals.label({"a-1": hat})
    shutil.rmtree(predictor)
    journals.correct({"a-1": hat}, {"a-1": dress})
    audit = journals.statuses()["first"].audit
    journals.close()
    assert audit is not None
    assert (audit.n, audit.wrong) == (1, 0)


def predictors_names(predictor: Path) -> tuple[str, ...]:
    calibration = Calibration.load(predictor)
    return tuple(calibration.rows.class_names or ())


# Row S6: a page at another port is another site.


@pytest.mark.parametrize(
    "origin",
    ["http://127.0.0.1:9999", "http://127.0.0.1", "https://127.0.0.1:{port}", "null", "file://"],
)
def test_a_page_of_another_origin_is_refused(service: Running, photos: Photos, origin: str) -> None:
    port = service.url.rpartition(":")[2]
    headers = {"Origin": origin.format(port=port)}
    reply = service.post("/v1/answers", files={"a": photos(1)[0]}, headers=headers)
    assert (reply.status_code, "another site" in reply.json()["detail"]) == (403, True)


def test_the_own_page_is_admitted(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    """The service must admit its own page, also behind a proxy with TLS if ``tls_hosts`` names
    it.
    """
    names = {"hosts": frozenset({"127.0.0.1", "photos.example"})}
    tls = {"tls_hosts": frozenset({"photos.example"})}
    with hosted(predictors[0], tmp_path / "s", **names, **tls) as running:
        for host, origin in (
            (running.url.removeprefix("http://"), running.url),
            ("photos.example", "https://photos.example"),
            ("photos.example:8443", "https://PHOTOS.example:8443"),
        ):
            headers = {"Host": host, "Origin": origin}
            assert running.get("/readyz", headers=headers).status_code == 200
        headers = {"Host": "photos.example", "Origin": "http://photos.example"}
        assert running.get("/readyz", headers=headers).status_code == 403


# Row S7: two parsers may read one request in two ways.


def test_nothing_after_a_request_with_two_lengths_is_answered(service: Running) -> None:
    smuggled = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = (
        b"POST /v1/answers HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with connected(service.url) as connection:
        connection.sendall(head + b"0\r\n\r\n" + smuggled)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1") == 1
    assert b"vilu_" not in answer


# Row S8: the journal cannot be written.


def test_a_locked_journal_is_not_ready(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilu.service.rows.LOCK_WAIT_SECONDS", 0.2)
    with hosted(predictors[0], tmp_path / "s") as running:
        (file,) = (tmp_path / "s").glob("*/rows.sqlite")
        assert running.get("/readyz").status_code == 200
        with closing(sqlite3.connect(file, isolation_level=None)) as table:
            table.execute("BEGIN IMMEDIATE")
            reply = running.post("/v1/answers", files={"a": photo(0, 0)})
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            reply = running.get("/readyz")
            assert (reply.status_code, "cannot be written" in reply.json()["detail"]) == (503, True)
            assert "vilu_ready 0.0" in running.get("/metrics").text
            table.execute("ROLLBACK")
        assert running.get("/readyz").status_code == 200
        assert running.post("/v1/answers", files={"a": photo(0, 0)}).status_code == 200
        assert monitored(running)["rows"] == 1


def test_an_image_stays_only_if_its_row_is_written(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the journal is locked, the new image must not stay in the folder.

    The refused request repeats the id and the picture that were answered before, and adds a
    picture.
    """
    monkeypatch.setattr("vilu.service.rows.LOCK_WAIT_SECONDS", 0.2)
    keep = tmp_path / "kept"
    first, second = ("images", ("a", photo(0, 0))), ("images", ("a", photo(1, 1)))
    request = {"headers": {"X-Request-Id": "again"}}
    with hosted(predictors[0], tmp_path / "s", keep=keep) as running:
        assert running.post("/v1/answers", files=[first], **request).status_code == 200
        before = sorted(keep.iterdir())
        assert len(before) == 1
        (file,) = (tmp_path / "s").glob("*/rows.sqlite")
        with closing(sqlite3.connect(file, isolation_level=None)) as table:
            table.execute("BEGIN IMMEDIATE")
            reply = running.post("/v1/answers", files=[first, second], **request)
            table.execute("ROLLBACK")
        assert reply.status_code == 503
        assert sorted(keep.iterdir()) == before
        assert running.post("/v1/answers", files=[first, second], **request).status_code == 200
        assert len(list(keep.iterdir())) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_not_ready(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    """If the disk is full, answered rows must count and refused rows must not count."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with hosted(predictors[0], disk / "s") as running:
            assert running.post("/v1/answers", files={"a": photo(0, 0)}).status_code == 200
            filler = disk / "filler"
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1024)):
                    pass
            statuses = set()
            while 503 not in statuses:
                reply = running.post("/v1/answers", files={"a": photo(0, len(statuses))})
                statuses.add(reply.status_code)
            assert statuses <= {200, 503}
            assert running.get("/readyz").status_code == 503
            n_before = monitored(running)["rows"]
            filler.unlink()
            assert running.get("/readyz").status_code == 200
            assert running.post("/v1/answers", files={"a": photo(1, 1)}).status_code == 200
            assert monitored(running)["rows"] == n_before + 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_journal_is_for_its_owner_alone(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    before = os.umask(0o022)
    try:
        with served(predictors[0], "--state", tmp_path / "s", "--keep", keep) as running:
            running.post("/v1/answers", files={"a": photo(0, 0)})
            running.stop()
    finally:
        os.umask(before)
    paths = [tmp_path / "s", keep, *(tmp_path / "s").rglob("*"), *keep.rglob("*")]
    assert {"rows.sqlite", "rows.ends", "monitor.parquet"} <= {path.name for path in paths}
    for path in paths:
        expected = 0o700 if path.is_dir() else 0o600
        assert path.stat().st_mode & 0o777 == expected, path
