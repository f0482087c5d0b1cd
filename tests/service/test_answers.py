"""The service over HTTP: it answers as ``Guard`` does, counts each row once and reports
mistakes.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.builders.photo_folders import KINDS, photo, truth_of
from tests.builders.store_fakes import FakeBackbone
from tests.command import command_line, run
from tests.service.conftest import Running, hosted
from vilu.artifacts.documents import write_document
from vilu.calibration.calibration import Calibration
from vilu.calibration.monitor.monitor import Monitor
from vilu.calibration.rules import certify
from vilu.calibration.target import Target
from vilu.errors import DataError, StorageError, UsageError
from vilu.guard.guard import Guard, ImageModel
from vilu.service.journal import Journal
from vilu.service.limits import read_keys
from vilu.service.local_journals import LocalJournals
from vilu.store.pipeline import Decoder

Photos = Callable[[int], list[bytes]]


def as_files(images: list[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"../../{number}.png", image)) for number, image in enumerate(images)]


@pytest.fixture
def guard(predictors: tuple[Path, Path]) -> Guard:
    return Guard(predictors[0], backbone=FakeBackbone())


def test_answers_are_those_of_guard(service: Running, guard: Guard, photos: Photos) -> None:
    images = [*photos(40), b"no picture"]
    reply = service.post("/v1/answers", files=as_files(images), headers={"X-Request-Id": "mine"})
    assert reply.status_code == 200
    told = reply.json()
    assert (told["guarantee"], reply.headers["guarantee"], reply.headers["x-request-id"]) == (
        "holds",
        "holds",
        "mine",
    )
    expected = guard(images)
    for mine, his in zip(told["answers"], expected, strict=True):
        assert (mine["label"], mine["decision"], mine["reason"]) == (
            his.label,
            his.decision,
            his.reason,
        )
        assert mine["failure_probability"] == pytest.approx(his.failure_probability, abs=1e-5)
        assert [one["label"] for one in mine["runners_up"]] == [name for name, _ in his.runners_up]
    assert {"accept", "review"} <= {one["decision"] for one in told["answers"]}
    as_text = [base64.b64encode(image).decode() for image in images]
    again = service.post("/v1/answers", json={"images": as_text}).json()["answers"]
    assert [one["label"] for one in again] == [one["label"] for one in told["answers"]]


def test_an_answer_does_not_wait_for_acknowledgements(service: Running) -> None:
    """If a client keeps its connection open, the client must get the whole answer at once.

    After the first answers on a connection, Linux acknowledges a head 40 ms later if the client has
    nothing to send. A body that waits for that acknowledgement comes 40 ms late. The test looks at
    the quickest answer, because other answers may be slow on a busy machine.
    """
    seconds = []
    with service.client() as client:
        for _ in range(60):
            began = time.perf_counter()
            client.get("/healthz")
            seconds.append(time.perf_counter() - began)
    assert min(seconds[30:]) < 0.035


def test_embeddings_are_scored_as_their_images(
    service: Running, guard: Guard, photos: Photos
) -> None:
    model = FakeBackbone()
    pixels = [model.preprocess(Image.open(BytesIO(image))) for image in photos(9)]
    rows = [3 * model.encode_images(one[None])[0] for one in pixels]  # not at unit norm
    told = service.post("/v1/scores", json={"embeddings": [row.tolist() for row in rows]}).json()[
        "answers"
    ]
    expected = guard(photos(9))
    assert [one["label"] for one in told] == [one.label for one in expected]
    u = np.array([one["uncertainty"] for one in told])
    assert u == pytest.approx(
        np.array([one.uncertainty for one in expected]), abs=2e-3
    )  # one step in float16


def test_what_was_never_guaranteed_is_not_said_to_hold(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    """If a predictor has only probabilities, no output may say that a guarantee holds.

    The outputs are the answer, the monitor and the metrics for Prometheus.
    """
    folder = tmp_path / "predictor"
    shutil.copytree(predictors[0], folder)
    run("calibrate", folder, predictors[0].parent / "cal", "--overwrite")
    with hosted(folder, tmp_path / "s") as running:
        told = running.post("/v1/answers", files=as_files(photos(9))).json()
        assert told["guarantee"] == "none"
        assert told["answers"][0]["failure_probability"] is not None
        (said,) = running.get("/v1/monitor").json()["monitors"]
        assert "status" not in said
        measured = running.get("/metrics").text
    for state in ("holds", "void"):
        assert re.search(rf"^vilu_guarantee_{state}\{{.*\}} 0.0$", measured, re.MULTILINE)
    assert "holds" not in json.dumps([told, said])
    assert "vilu_monitor_rows{" not in measured


def test_every_row_is_counted_once(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    """Each journal must count every image once, and every label once.

    The same request is sent twice, and a second predictor keeps a journal beside the first.
    """
    with hosted(predictors[0], tmp_path / "s", second=predictors[1]) as running:
        for _ in range(2):
            reply = running.post(
                "/v1/answers", files=as_files(photos(30)), headers={"X-Request-Id": "a"}
            )
        rows = [one["row"] for one in reply.json()["answers"]]
        right = {row: truth_of(number % KINDS) for number, row in enumerate(rows)}
        for expected in (30, 0):
            found = running.post(
                "/v1/labels", json={"labels": {**right, "unknown": "(outside)"}}
            ).json()["audited"]
            assert [(one["new"], one["unknown"]) for one in found] == [(expected, ["unknown"])] * 2
        before = running.get("/v1/monitor").json()["monitors"]
        assert [one["status"]["rows"] for one in before] == [30, 30]
        accepted = [one for one in reply.json()["answers"] if one["decision"] == "accept"]
        wrong = sum(right[one["row"]] != one["label"] for one in accepted)
        audit = before[0]["status"]["audit"]
        assert (audit["n"], audit["wrong"]) == (len(accepted), wrong)
        assert accepted
        assert (
            running.post("/v1/predictors", json={"answers": "second"}).json()["now"]["name"]
            == "second"
        )
        told = running.post("/v1/answers", files=as_files(photos(1))).json()
        assert told["answers"][0]["predictor"] == before[1]["predictor"]
        other = running.post("/v1/predictors", json={"answers": "third"})
        assert (other.status_code, "first and second" in other.json()["detail"]) == (422, True)
    assert len(list((tmp_path / "s").glob("*/rows.sqlite"))) == 2
    with hosted(predictors[0], tmp_path / "s", second=predictors[1]) as running:
        after = running.get("/v1/monitor").json()["monitors"]
        assert [one["status"]["rows"] for one in after] == [30, 30]  # the last one was known
        assert after[0]["status"]["audit"] == before[0]["status"]["audit"]
        assert [one["answers"] for one in after] == [False, True]  # as before the restart


@pytest.mark.usefixtures("left_open")
def test_a_void_guarantee_stays_void_after_a_kill_in_any_order_of_labels(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """The evidence is the largest value along the way, so later labels must not lower it.

    The last 30 rows are all wrong, and they get their labels before the other rows.
    """
    journal = Journal(tmp_path / "j", predictors[0])
    kept = journal.monitor.calibration
    names, said = kept.class_names or (), np.asarray(kept.prediction)
    rows = np.random.default_rng(0).choice(len(kept), 400)
    journal.record(
        [f"r{i}" for i in range(400)], said[rows].tolist(), kept.uncertainty[rows].tolist()
    )
    assert journal.guarantee == "holds"
    for number in range(399, 369, -1):
        journal.label({f"r{number}": names[(said[rows[number]] + 1) % len(names)]})
    journal.label({f"r{number}": names[said[rows[number]]] for number in range(370)})
    assert journal.guarantee == "void"
    journal.record(
        [f"s{i}" for i in range(400)], said[rows].tolist(), kept.uncertainty[rows].tolist()
    )
    # The save that the alarm started. The labels raised the alarm at row 399, which is not the last
    # row.
    journal._latest_save.result()
    assert journal.status.raised_at == 399
    again = Journal(tmp_path / "j", predictors[0])  # the first journal was never closed
    assert (again.guarantee, again.status) == ("void", journal.status)


@pytest.mark.usefixtures("left_open")
def test_labels_of_a_request_are_taken_in_together(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels in one request must be audited together, with the same evidence as one by one.

    Rows wait while labels are audited. When labels were audited one by one, 256 labels held the
    lock for seconds.
    """
    together, alone = Journal(tmp_path / "a", predictors[0]), Journal(tmp_path / "b", predictors[0])
    kept, audits = together.monitor.calibration, list[int]()
    names, said = kept.class_names or (), np.asarray(kept.prediction)
    labels = {f"r{i}": names[(said[i] + (i % 5 == 0)) % len(names)] for i in range(100)}
    for journal in (together, alone):
        journal.record(
            [f"r{i}" for i in range(100)], said[:100].tolist(), kept.uncertainty[:100].tolist()
        )
        journal.label({"r99": labels["r99"]})
    for key, label in labels.items():
        alone.label({key: label})
    audit = together.monitor.audit
    monkeypatch.setattr(
        together.monitor,
        "audit",
        lambda rows, **how: (audits.append(len(rows)), audit(rows, **how)),
    )
    assert together.label(labels) == (99, [])
    assert audits == [99]
    assert together.status == alone.status


@pytest.mark.usefixtures("left_open")
def test_rows_do_not_wait_for_the_state_to_be_written_and_do_without(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Recording must neither wait for the state file nor fail if the disk has no room for the
    state.

    At 500,000 rows, writing the state took a second. If the disk was full, recorded rows were
    reported as a fault.
    """
    monkeypatch.setattr("vilu.service.journal.ROWS_BETWEEN_SAVES", 10)
    journal = Journal(tmp_path / "j", predictors[0])
    kept, save, may_write, written = (
        journal.monitor.calibration,
        Monitor.save,
        threading.Event(),
        list[int](),
    )
    said, state = np.asarray(kept.prediction), tmp_path / "j" / "monitor.parquet"

    def slow(monitor: Monitor, path: Path) -> None:
        assert may_write.wait(20)
        written.append(monitor.rows)
        if monitor.rows == 10:
            raise StorageError("no room.")
        save(monitor, path)

    def record(first: int, last: int) -> None:
        ids = [f"r{number}" for number in range(first, last)]
        journal.record(ids, said[first:last].tolist(), kept.uncertainty[first:last].tolist())

    monkeypatch.setattr(Monitor, "save", slow)
    record(0, 10)
    record(10, 30)  # while the state with 10 rows is being written
    may_write.set()
    journal._latest_save.result()
    assert "no room. Until the state of the monitor can be saved" in caplog.text
    assert not state.exists()
    record(30, 40)
    journal._latest_save.result()
    record(40, 45)  # the journal is not closed, as after a kill
    assert written == [10, 40]
    again = Monitor.of_folder(predictors[0]).resume(state)
    assert again.rows == 40
    assert Journal(tmp_path / "j", predictors[0]).status == journal.status


@pytest.mark.usefixtures("left_open")
def test_a_fault_while_saving_is_reported_once_and_saving_goes_on(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault during a save must be raised once, and the next save must run.

    After one moment without memory, every request failed until a restart, although its rows were
    recorded.
    """
    monkeypatch.setattr("vilu.service.journal.ROWS_BETWEEN_SAVES", 10)
    journal = Journal(tmp_path / "j", predictors[0])
    kept, save, faults = journal.monitor.calibration, Monitor.save, [MemoryError("one moment")]
    said = np.asarray(kept.prediction)

    def saved(monitor: Monitor, path: Path) -> None:
        if faults:
            raise faults.pop()
        save(monitor, path)

    def record(first: int) -> None:
        rows = slice(first, first + 10)
        wait([journal._latest_save], 20)
        journal.record(
            [f"r{n}" for n in range(100)[rows]],
            said[rows].tolist(),
            kept.uncertainty[rows].tolist(),
        )

    monkeypatch.setattr(Monitor, "save", saved)
    record(0)
    with pytest.raises(MemoryError, match="one moment"):
        record(10)
    record(20)
    wait([journal._latest_save], 20)
    assert Monitor.of_folder(predictors[0]).resume(tmp_path / "j" / "monitor.parquet").rows == 30
    journal.close()


def test_nothing_that_is_sent_is_kept(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    secret = "secret-name"  # noqa: S105 - no password
    with hosted(predictors[0], tmp_path / "s") as running:
        headers = {"X-Request-Id": secret, "User-Agent": secret}
        running.post(
            f"/v1/answers?{secret}", files={secret: (secret, photos(1)[0])}, headers=headers
        )
        running.get(f"/{secret}")
    logged = "\n".join(running.said)
    (rows,) = (tmp_path / "s").glob("*/rows.sqlite")
    assert secret not in logged
    assert all(
        secret.encode() not in path.read_bytes()
        for path in (tmp_path / "s").rglob("*")
        if path.is_file()
    )
    with closing(sqlite3.connect(rows)) as there:
        assert there.execute("SELECT count(*) FROM rows").fetchone() == (1,)
    lines = [json.loads(line) for line in running.said]
    assert [line["path"] for line in lines] == ["/v1/answers", "other"]
    assert next(line for line in lines if line["path"] == "/v1/answers")["images"] == 1


def test_what_is_to_be_kept_is(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    with hosted(predictors[0], tmp_path / "s", keep=tmp_path / "kept") as running:
        told = running.post("/v1/answers", files=as_files([*photos(2), b"none"])).json()["answers"]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert kept == {f"{one['row']}.png": image for one, image in zip(told, photos(2), strict=False)}


def test_embeddings_are_answered_where_images_are_kept(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    pixels = FakeBackbone().preprocess(Image.open(BytesIO(photos(1)[0])))
    row = FakeBackbone().encode_images(pixels[None])[0]
    with hosted(predictors[0], tmp_path / "s", keep=tmp_path / "kept") as running:
        reply = running.post("/v1/scores", json={"embeddings": [row.tolist()]})
    assert reply.status_code == 200
    assert list((tmp_path / "kept").iterdir()) == []


MISTAKES = {
    "no such path": (("GET", "/v2", {}), 404, "Not Found"),
    "no such method": (("DELETE", "/v1/answers", {}), 405, "Method Not Allowed"),
    "no body": (("POST", "/v1/answers", {}), 415, "Found ''"),
    "another kind": (
        ("POST", "/v1/answers", {"content": b"x", "headers": {"Content-Type": "text/plain"}}),
        415,
        "text",
    ),
    "no file": (
        ("POST", "/v1/answers", {"files": {}, "data": {"a": "b"}, "headers": {}}),
        415,
        "multipart",
    ),
    "an empty list": (
        ("POST", "/v1/answers", {"json": {"images": []}}),
        422,
        "images: List should have at least 1",
    ),
    "no base64": (
        ("POST", "/v1/answers", {"json": {"images": ["", "é"]}}),
        422,
        "images.1 is no base64",
    ),
    "a word too many": (
        ("POST", "/v1/answers", {"json": {"images": ["AA=="], "url": "http://x"}}),
        422,
        "url: Extra",
    ),
    "a broken form": (
        (
            "POST",
            "/v1/answers",
            {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}},
        ),
        400,
        "the form cannot be read",
    ),
    "a form that ends early": (
        (
            "POST",
            "/v1/answers",
            {
                "content": b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n'
                b"\r\nabc",
                "headers": {"Content-Type": "multipart/form-data; boundary=x"},
            },
        ),
        400,
        "ends within a file",
    ),
    "too many images": (
        ("POST", "/v1/answers", {"json": {"images": ["AA=="] * 257}}),
        413,
        "Found 257",
    ),
    "too few numbers": (
        ("POST", "/v1/scores", {"json": {"embeddings": [[1.0]]}}),
        422,
        "embeddings must be 1 row of 16 numbers. Found 1 row of 1 to 1",
    ),
    "not finite": (("POST", "/v1/scores", {"content": b'{"embeddings": [[NaN]]}'}), 422, "finite"),
    "no direction": (
        ("POST", "/v1/scores", {"json": {"embeddings": [[0.0] * 16]}}),
        422,
        "embeddings.0 has no",
    ),
    "deep": (
        ("POST", "/v1/scores", {"content": b'{"embeddings": ' + b"[" * 100_000}),
        422,
        "the body",
    ),
    "no class": (("POST", "/v1/labels", {"json": {"labels": {"a": "cow"}}}), 422, "cow"),
    "two labels for a row": (
        ("POST", "/v1/labels", {"content": b'{"labels": {"a": "(outside)", "a": "dress"}}'}),
        422,
        "'a' occurs 2 times",
    ),
    "another host": (
        ("GET", "/healthz", {"headers": {"Host": "evil.example"}}),
        421,
        "--allow-host",
    ),
    "another site": (
        ("POST", "/v1/answers", {"headers": {"Origin": "http://evil.example"}}),
        403,
        "another site",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told(service: Running, name: str) -> None:
    (method, path, settings), status, words = MISTAKES[name]
    if "content" in settings and "headers" not in settings:
        settings = {**settings, "headers": {"Content-Type": "application/json"}}
    with service.client() as client:
        reply = client.request(method, path, **settings)
    assert (reply.status_code, reply.headers["content-type"]) == (
        status,
        "application/problem+json",
    )
    told = reply.json()
    assert told["status"] == status
    assert words in told["detail"]


def test_a_body_that_is_too_long_is_refused_before_it_is_read(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    def chunks() -> Iterator[bytes]:
        yield from (b"x" * 2**16 for _ in range(64))

    with hosted(predictors[0], tmp_path / "s", max_image_body_bytes=2**20) as running:
        long = running.post(
            "/v1/answers", content=b"x" * 2**21, headers={"Content-Type": "application/json"}
        )
        assert (long.status_code, "1,048,576" in long.json()["detail"]) == (413, True)
        streamed = running.post(
            "/v1/answers", content=chunks(), headers={"Content-Type": "application/json"}
        )
        assert streamed.status_code == 413
        assert running.get("/readyz").status_code == 200


def test_a_key_is_asked_for(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("0123456789abcdef\nfedcba9876543210\n")
    with hosted(predictors[0], tmp_path / "s", keys=read_keys(tmp_path / "keys")) as running:
        assert running.get("/healthz").status_code == 200
        for given in (
            {},
            {"Authorization": "Bearer 0123456789abcdeF"},
            {"Authorization": "0123456789abcdef"},
        ):
            reply = running.get("/v1/monitor", headers=given)
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert (
            running.get(
                "/v1/monitor", headers={"Authorization": "Bearer fedcba9876543210"}
            ).status_code
            == 200
        )
    assert "fedcba" not in "\n".join(running.said)


def test_more_than_fits_in_is_sent_away(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    with hosted(predictors[0], tmp_path / "s", max_queued_images=4, batch_size=2) as running:
        with ThreadPoolExecutor(24) as pool:
            replies = list(
                pool.map(
                    lambda one: running.post("/v1/answers", files=as_files([one] * 4)), photos(24)
                )
            )
        told = {reply.status_code for reply in replies}
        assert told == {200, 429}
        assert (
            next(reply for reply in replies if reply.status_code == 429).headers["retry-after"]
            == "1"
        )
        measured = running.get("/metrics").text
    n = sum(reply.status_code == 200 for reply in replies)
    assert f'vilu_requests_total{{path="/v1/answers",status="200"}} {n:.1f}' in measured
    assert "vilu_images_under_way 0.0" in measured
    assert 'vilu_guarantee_holds{predictor="' in measured


def test_what_does_not_verify_is_not_served(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    edited = shutil.copytree(predictors[0], tmp_path / "edited")
    said = json.loads((edited / "risk.json").read_text())
    said["rule"]["thresholds"][""]["threshold"] += 0.1
    (edited / "risk.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match=r"risk\.json"), hosted(edited, tmp_path / "s"):
        pass
    with (
        pytest.raises(UsageError, match="are the same predictor"),
        hosted(predictors[0], tmp_path / "t", second=predictors[0]),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--host", "0.0.0.0"), "--key-file"), (("--key-file", "short"), "at least 16 characters")],  # noqa: S104 - refused
)
def test_a_wrong_start(
    predictors: tuple[Path, Path], tmp_path: Path, words: tuple[str, str], told: str
) -> None:
    (tmp_path / "short").write_text("abc")
    done = command_line("serve", predictors[0], "--state", tmp_path / "s", *words, cwd=tmp_path)
    assert (done.returncode, told in done.stderr) == (2, True)
    assert not (tmp_path / "s").exists()


def test_two_services_do_not_share_a_state(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    with hosted(predictors[0], tmp_path / "s") as running:
        done = command_line("serve", predictors[0], "--state", tmp_path / "s", "--port", 0)
        assert (done.returncode, "serving with the state in" in done.stderr) == (75, True)
        port = running.url.rpartition(":")[2]
        done = command_line("serve", predictors[0], "--state", tmp_path / "t", "--port", port)
        assert (done.returncode, f"port {port}" in done.stderr) == (2, True)


def test_openapi_and_its_page_are_from_here(service: Running) -> None:
    described = service.get("/openapi.json").json()
    assert set(described["paths"]) >= {
        "/v1/answers",
        "/v1/scores",
        "/v1/labels",
        "/v1/monitor",
        "/healthz",
        "/readyz",
    }
    assert set(described["paths"]["/v1/answers"]["post"]["requestBody"]["content"]) == {
        *("application/json", "multipart/form-data")
    }
    page = service.get("/docs")
    assert "http" not in page.text
    assert service.get("/docs/swagger-ui-bundle.js").status_code == 200
    assert service.get("/docs/favicon.png").status_code == 404
    assert "'self'" in page.headers["content-security-policy"]


def test_a_slow_client_waits_alone(service: Running) -> None:
    """Half a head, or a body that does not come, must not delay other clients."""
    host, port = service.url.removeprefix("http://").split(":")
    with (
        socket.create_connection((host, int(port))) as one,
        socket.create_connection((host, int(port))) as two,
    ):
        one.sendall(b"POST /v1/answers HTTP/1.1\r\nHost: localhost\r\n")
        two.sendall(b"POST /v1/answers HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert service.get("/readyz").status_code == 200
        two.sendall(b"GARBAGE" * 20)
    with socket.create_connection((host, int(port))) as three:
        three.sendall(b"\0\0\0 nothing like it\r\n\r\n")
        assert three.recv(200).startswith(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json"
        )
    assert service.get("/readyz").status_code == 200


def test_a_fault_of_ours_is_told_and_the_next_request_is_answered(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the journal fails, no answer may leave the service, and the cause must stay in the log."""

    def broken(*_: object) -> None:
        raise OSError("the disk is on fire")

    with hosted(predictors[0], tmp_path / "s") as running:
        with monkeypatch.context() as patch:
            patch.setattr(LocalJournals, "record", broken)
            reply = running.post("/v1/answers", files=as_files(photos(2)))
            assert (reply.status_code, reply.headers["content-type"]) == (
                500,
                "application/problem+json",
            )
            assert "fire" not in reply.text
        assert running.post("/v1/answers", files=as_files(photos(2))).status_code == 200
        assert running.get("/v1/monitor").json()["monitors"][0]["status"]["rows"] == 2


def test_images_that_nobody_waits_for_any_more_are_not_decoded(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    photos: Callable[[int], list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode, begun, gate = Decoder.__call__, list[int](), threading.Event()

    def slow(decoder: Decoder, image: Any) -> Any:
        begun.append(1)
        assert gate.wait(30)
        return decode(decoder, image)

    with hosted(predictors[0], tmp_path / "s", answer_seconds=1.0) as running:
        monkeypatch.setattr(Decoder, "__call__", slow)
        files = [("images", ("a", content)) for content in photos(8)]
        assert running.post("/v1/answers", files=files).status_code == 503
        gate.set()
        assert running.post("/v1/answers", files=files[:1]).status_code == 200
    assert len(begun) == 2 + 1  # one in each decoder (there are two), then the last request


def blocked(
    monkeypatch: pytest.MonkeyPatch, picture: bytes
) -> tuple[threading.Event, threading.Event]:
    """Make decoders wait at this picture.

    Return two events: the first is set when a decoder waits, and setting the second releases all
    decoders.
    """
    decode = Decoder.__call__
    waits = threading.Event()
    gate = threading.Event()

    def slow(decoder: Decoder, image: Any) -> Any:
        if image[1].read() == picture:
            waits.set()
            assert gate.wait(30)
        return decode(decoder, image)

    monkeypatch.setattr(Decoder, "__call__", slow)
    return waits, gate


def rows_counted(running: Running) -> int:
    (monitor,) = running.get("/v1/monitor").json()["monitors"]
    return int(monitor["status"]["rows"])


def rows_stored(state: Path) -> int:
    (file,) = state.glob("*/rows.sqlite")
    with closing(sqlite3.connect(file)) as table:
        (n,) = table.execute("SELECT count(*) FROM rows").fetchone()
    return int(n)


@pytest.mark.parametrize("headers", [{}, {"X-Request-Id": "again"}])
def test_rows_of_an_answer_that_was_given_up_do_not_count(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    photos: Photos,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
) -> None:
    """Seven pictures out of eight were judged when the time was up. The retry must count all
    eight once.
    """
    images = photos(8)
    with hosted(predictors[0], tmp_path / "s", answer_seconds=2.0, batch_size=2) as running:
        _, gate = blocked(monkeypatch, images[-1])
        late = running.post("/v1/answers", files=as_files(images), headers=headers)
        assert late.status_code == 503
        assert (rows_counted(running), rows_stored(tmp_path / "s")) == (0, 0)
        gate.set()
        again = running.post("/v1/answers", files=as_files(images), headers=headers)
        assert again.status_code == 200
        assert (rows_counted(running), rows_stored(tmp_path / "s")) == (8, 8)


def test_rows_of_an_answer_that_failed_do_not_count(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    photos: Photos,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the last batch fails, the rows from earlier batches must not count."""
    with hosted(predictors[0], tmp_path / "s", batch_size=2) as running:
        with monkeypatch.context() as patch:
            embed = ImageModel.embed
            batches: list[int] = []

            def fails(model: ImageModel, batch: Any) -> Any:
                batches.append(len(batch))
                if sum(batches) >= 8:
                    raise RuntimeError("no memory")
                return embed(model, batch)

            patch.setattr(ImageModel, "embed", fails)
            reply = running.post("/v1/answers", files=as_files(photos(8)))
            assert reply.status_code == 500
            assert len(batches) > 1
        assert (rows_counted(running), rows_stored(tmp_path / "s")) == (0, 0)


def test_rows_of_a_client_that_has_gone_do_not_count(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    photos: Photos,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = photos(2)
    with hosted(predictors[0], tmp_path / "s") as running:
        waits, gate = blocked(monkeypatch, images[-1])
        with (
            running.client() as client,
            pytest.raises(httpx.ReadTimeout),
        ):
            client.post("/v1/answers", files=as_files(images), timeout=1.0)
        assert waits.wait(10)
        gate.set()
        while "vilu_images_under_way 0.0" not in running.get("/metrics").text:
            time.sleep(0.05)
        assert (rows_counted(running), rows_stored(tmp_path / "s")) == (0, 0)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_answered_where_the_journal_is_gone(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos, *, is_replaced: bool
) -> None:
    """If the journal is removed or replaced by an older copy, the service must answer 503."""
    with hosted(predictors[0], tmp_path / "s") as running:
        first = running.post("/v1/answers", files=as_files(photos(3)))
        (file,) = (tmp_path / "s").glob("*/rows.sqlite")
        if is_replaced:
            copy = shutil.copy(file, tmp_path / "copy")
            Path(copy).replace(file)
        else:
            for path in file.parent.glob("rows.sqlite*"):
                path.unlink()
        row = first.json()["answers"][0]["row"]
        label = {"labels": {row: truth_of(0)}}
        for reply in (
            running.post("/v1/answers", files=as_files(photos(2))),
            running.post("/v1/labels", json=label),
            running.get("/readyz"),
        ):
            assert reply.status_code == 503
            assert "the journal was removed or replaced" in reply.json()["detail"]
        assert running.get("/healthz").status_code == 200
        assert "vilu_ready 0.0" in running.get("/metrics").text
        assert rows_counted(running) == 3


def accept_nothing(predictor: Path) -> None:
    """Give a calibrated predictor a rule that accepts nothing, as in a triage that has few
    labels.
    """
    before = Calibration.load(predictor)
    target = Target(max_risk=0.001)
    rule = certify(before.rows, max_risk=target.max_risk)
    assert not rule.feasible
    after = before.model_copy(update={"target": target, "rule": rule, "guarantee_text": str(rule)})
    write_document(predictor / "risk.json", after)


def test_the_page_says_what_is_guaranteed_in_every_state(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Photos
) -> None:
    """The page must name each state: no rule, a rule that accepts nothing, a valid and a void
    guarantee.
    """
    home = predictors[0].parent
    for name in ("no rule", "nothing"):
        shutil.copytree(predictors[0], tmp_path / name)
    run("calibrate", tmp_path / "no rule", home / "cal", "--overwrite")
    accept_nothing(tmp_path / "nothing")
    expected = {
        "no rule": ("none", "Nothing is guaranteed: this predictor has no rule"),
        "nothing": ("none", "Nothing is guaranteed: no threshold was certified"),
        "holds": (
            "holds",
            "The guarantee holds: the answers so far show nothing against it. Guaranteed: the",
        ),
        "void": ("void", "The guarantee is void: the images differ from the calibration data"),
    }
    for name, (state, words) in expected.items():
        folder = tmp_path / name if state == "none" else predictors[0]
        with hosted(folder, tmp_path / f"{name} state") as running:
            if name == "void":
                for first in range(0, 240, 30):
                    numbers = range(first, first + 30)
                    of_one_kind = [photo(0, number) for number in numbers]
                    running.post("/v1/answers", files=as_files(of_one_kind))
            (now,) = running.get("/v1/predictors").json()["predictors"]
            page = running.get("/").text
        assert now["guarantee"] == state
        assert now["in_words"].startswith(words)
        assert "it nothing" not in now["in_words"]
        assert 'byId("guarantee").textContent = answering.in_words' in page


def test_a_service_guards_adapted_answers_and_names_the_zero_shot_ones(
    predictors: tuple[Path, Path], tmp_path: Path, photos: Callable[[int], list[bytes]]
) -> None:
    home = predictors[0].parent
    adapted = tmp_path / "adapted"
    run("fit", home / "train", "-o", adapted, "--method", "linear_probe", "--answer", "adapted")
    run("calibrate", adapted, home / "cal", "--max-risk", "0.1", "--answer", "adapted")
    sent = photos(2 * KINDS)
    expected = Guard(adapted, backbone=FakeBackbone())(sent)
    with hosted(adapted, tmp_path / "state") as running:
        files = [("images", (f"{i}.png", content)) for i, content in enumerate(sent)]
        answers = running.post("/v1/answers", files=files).json()["answers"]
        kinds = [(answer["label"], answer["zero_shot"]) for answer in answers]
        assert kinds == [(answer.label, answer.zero_shot) for answer in expected]
        assert any(zero_shot not in {None, label} for label, zero_shot in kinds)
        rows = {answers[i]["row"]: truth_of(i % KINDS) for i in range(len(sent))}
        assert running.post("/v1/labels", json={"labels": rows}).status_code == 200
        monitor = running.get("/v1/monitor").json()
    # The journal judges the guarded answer, not the zero-shot answer.
    accepted = [i for i, answer in enumerate(answers) if answer["decision"] == "accept"]
    n_wrong = sum(answers[i]["label"] != truth_of(i % KINDS) for i in accepted)
    audited = json.dumps(monitor)
    assert f'"n": {len(accepted)}' in audited
    assert f'"wrong": {n_wrong}' in audited or n_wrong == 0
