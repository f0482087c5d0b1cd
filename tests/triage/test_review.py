"""Test review tasks in every format, their round trips, and the page of ``vilu review --serve``."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from tests.command import command, command_line, run
from tests.conftest import few
from tests.triage.conftest import Folder, job_on, rows
from vilu.artifacts.tables import write_table
from vilu.datasets.files import ForbiddenPathError
from vilu.errors import DataError, UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.store.reader import EmbeddingStore
from vilu.triage.label_files import write_labels
from vilu.triage.labels import SKIPPED, LabelBook, read_labels, sides_and_positions
from vilu.triage.outputs import triage_photos
from vilu.triage.photos import Photos, PhotoStores
from vilu.triage.review import Review, open_review
from vilu.triage.review_files import Tool, read_finished_tasks, write_review
from vilu.triage.serve import ReviewSession, serve_page
from vilu.triage.state import moved_photos

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture
def half(begun: Folder) -> Path:
    """Return a triage that asks for labels and has no guarantee yet."""
    return begun[0] / "half"


def test_moved_photos_are_shown_and_found(guaranteed: Folder) -> None:
    home, _ = guaranteed
    triage_photos(job_on(home / "photos"), home / "out", sort="move")
    review = open_review(home / "out", "all", 3)
    session = ReviewSession(review, home / "labels.csv")
    assert session.webp_photo(0)[8:12] == b"WEBP"
    _, samples_file = write_review(review, "fiftyone", home / "tasks")
    for sample in json.loads(samples_file.read_text())["samples"]:
        assert (home / "photos" / sample["filepath"]).is_file()
        assert sample["path"] in {task.path for task in review.tasks}


def test_label_studio_gets_the_present_address_of_a_moved_photo(guaranteed: Folder) -> None:
    home, _ = guaranteed
    triage_photos(job_on(home / "photos"), home / "out", sort="move")
    review = open_review(home / "out", "all", 3)
    file, _ = write_review(
        review, "label-studio", home / "tasks.json", prefix="http://here/photos/"
    )
    for task in json.loads(file.read_text()):
        address = urljoin("http://here/photos/", task["data"]["image"])
        assert (home / unquote(address.removeprefix("http://here/"))).is_file()


def test_a_moved_photo_behind_a_link_to_elsewhere_is_not_shown(guaranteed: Folder) -> None:
    home, _ = guaranteed
    triage_photos(job_on(home / "photos"), home / "out", sort="move")
    (home / "out" / "sorted").rename(home / "elsewhere")
    (home / "out" / "sorted").mkdir()
    for group in (home / "elsewhere").iterdir():
        (home / "out" / "sorted" / group.name).symlink_to(group)
    session = ReviewSession(open_review(home / "out", "all", 1), home / "labels.csv")
    with pytest.raises(ForbiddenPathError, match="links included"):
        session.webp_photo(0)
    review = replace(session.review, follow_links=True)
    session = ReviewSession(review, home / "more.csv")
    assert session.webp_photo(0)


@pytest.mark.parametrize("place", ["/etc/hosts", "sorted/../../photos/a.png", "b.png"])
def test_a_place_outside_the_sorted_photos_is_refused(tmp_path: Path, place: str) -> None:
    columns = {"path": pa.array(["a.png"]), "place": pa.array([place])}
    write_table(tmp_path / "moved.parquet", columns, {"kind": "moved"})
    with pytest.raises(DataError, match="not below sorted"):
        moved_photos(tmp_path)


def test_a_triage_says_what_it_asks_for_and_what_is_to_be_reviewed(
    half: Path, begun: Folder
) -> None:
    asked = open_review(half)
    assert [one.path for one in asked.tasks] == [
        row["path"] for row in rows(half / "next_labels.csv")
    ]
    assert asked.names == ("cat", "dog", "car", "(outside)")
    assert asked.photos == begun[0] / "photos"
    review = open_review(half, "review", 5)
    assert len(review.tasks) == 5
    assert len(open_review(half, "all").tasks) == 400
    of_scores = open_review(half / "decisions.parquet", n=3)
    doubts = [one.failure_probability or 0 for one in of_scores.tasks]
    assert doubts == sorted(doubts, reverse=True)


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("next_labels.csv", "stream", "strexm", "no column 'stream'"),
        ("decisions.csv", "path,", "qath,", "no column 'path'"),
        (
            "decisions.csv",
            ",0.",
            ",0.x",
            " has no number from 0 to 1 in the column failure_probability, but '0.x",
        ),
        ("decisions.csv", "\n", "\nonly-a-path.png\n", "row 2 is not complete"),
    ],
)
def test_a_damaged_table_of_a_triage_is_named(
    half: Path, tmp_path: Path, name: str, before: str, after: str, message: str
) -> None:
    shutil.copytree(half, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_text(path.read_text().replace(before, after, 1))
    done = run("review", tmp_path / "out", "-o", tmp_path / "tasks.csv", code=3)
    assert name in done.stderr
    assert message in done.stderr
    assert "Run `vilu triage` again" in done.stderr
    assert not (tmp_path / "tasks.csv").exists()


def with_answers(folder: Path, n: int) -> Review:
    """Return a review with up to `n` photos from the fit side, whose answers are shown."""
    review = open_review(folder, "review")
    return replace(review, tasks=[task for task in review.tasks if not task.is_blind][:n])


def test_photos_that_a_guarantee_may_rest_on_are_blind_for_every_tool(
    half: Path, tmp_path: Path
) -> None:
    """All photos on the calibration side are blind, because a later draw may meet any of them."""
    review = open_review(half, "all")
    stores = PhotoStores(half / "embeddings")
    store = EmbeddingStore(stores.store_folder(1))
    photos = Photos([(store, np.arange(len(store)))], fault_of_path={})
    is_calibration, _ = sides_and_positions(photos.pictures, 0)
    of_calibration = {path for path, is_it in zip(photos.ids, is_calibration, strict=True) if is_it}
    assert {task.path for task in review.tasks if task.is_blind} == of_calibration
    for task in review.tasks:
        assert (task.answer is None) == task.is_blind
        assert task.failure_probability is None or not task.is_blind
    (file,) = write_review(review, "csv", tmp_path / "tasks.csv")
    assert {row["path"] for row in rows(file) if not row["answer"]} == of_calibration


def test_label_studio_there_and_back(half: Path, tmp_path: Path) -> None:
    review = with_answers(half, 4)
    files = write_review(
        review, "label-studio", tmp_path / "tasks.json", prefix="/data/local-files/?d="
    )
    assert [file.name for file in files] == ["tasks.json", "tasks.xml"]
    tasks = json.loads(files[0].read_text())
    first = review.tasks[0]
    assert tasks[0]["data"]["path"] == first.path
    assert tasks[0]["data"]["image"] == f"/data/local-files/?d={first.path.replace(' ', '%20')}"
    (prediction,) = tasks[0]["predictions"]
    assert prediction["score"] == pytest.approx(1 - (first.failure_probability or 0))
    choice = {
        "from_name": "label",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": [first.answer]},
    }
    assert prediction["result"] == [choice]
    config = ElementTree.parse(files[1]).getroot()  # noqa: S314 - our own file
    assert [one.get("value") for one in config.iter("Choice")] == [
        "cat",
        "dog",
        "car",
        "(outside)",
        SKIPPED,
    ]
    answer = [{**choice, "value": {"choices": ["dog"]}}]
    tasks[0]["annotations"] = [
        {"result": [], "was_cancelled": False},
        {"result": answer, "was_cancelled": False},
    ]
    tasks[1]["annotations"] = [{"result": [], "was_cancelled": True}]
    tasks[2]["annotations"] = []
    del tasks[3]["data"]["path"]  # then the image address names the photo
    tasks[3]["annotations"] = [{"result": answer}]
    (tmp_path / "done.json").write_text(json.dumps(tasks))
    paths = [one.path for one in review.tasks]
    assert read_finished_tasks(tmp_path / "done.json")[0] == {
        paths[0]: "dog",
        paths[1]: SKIPPED,
        paths[3]: "dog",
    }
    small = [
        {"id": 1, "path": paths[0], "image": "x", "label": "cat"},
        {"id": 2, "path": paths[1], "image": "y"},
    ]
    (tmp_path / "min.json").write_text(json.dumps(small))
    assert read_finished_tasks(tmp_path / "min.json")[0] == {paths[0]: "cat"}


@pytest.mark.parametrize("tool", ["label-studio", "fiftyone", "csv"])
def test_photos_that_were_chosen_for_review_come_back_as_chosen(
    half: Path, tmp_path: Path, tool: Tool
) -> None:
    """Photos that were chosen for review keep the stream "fit".

    These photos are the most doubtful ones. If their labels counted as a random pick, a guarantee
    would be false without any message.
    """
    review = open_review(half, "review")
    asked = {row["path"] for row in rows(half / "next_labels.csv")}
    assert {one.stream for one in review.tasks if one.path not in asked} == {"fit"}
    assert {one.stream for one in open_review(half / "decisions.parquet").tasks} == {"fit"}
    name = {"label-studio": "t.json", "fiftyone": "t", "csv": "t.csv"}[tool]
    (file, *_), chosen = (
        write_review(review, tool, tmp_path / name),
        next(t for t in review.tasks if t.path not in asked),
    )
    if tool == "csv":
        lines = [{**row, "label": "cat"} for row in rows(file)]
        file.write_text(
            "path,label,stream\n" + "".join(f"{r['path']},cat,{r['stream']}\n" for r in lines)
        )
    else:
        file = tmp_path / "t" / "samples.json" if tool == "fiftyone" else file
        content = json.loads(file.read_text())
        for one in content["samples"] if tool == "fiftyone" else content:
            one["ground_truth"] = {"label": "cat"}
            one["annotations"] = [{"result": [{"type": "choices", "value": {"choices": ["cat"]}}]}]
        file.write_text(json.dumps(content))
    labels, streams = read_finished_tasks(file)
    write_labels(labels, tmp_path / "labels.csv", streams=streams)
    found, kept = read_labels(tmp_path / "labels.csv")
    book = LabelBook()
    book.note_labels(found, kept)
    assert book.entries[chosen.path].stream == "fit"
    assert all(one.stream == "fit" for one in book if one.path not in asked)


def test_fiftyone_is_told_what_was_decided(half: Path, tmp_path: Path) -> None:
    scores = Outcomes.load(half / "decisions.parquet")
    decisions = ["accept", "review"] * (len(scores) // 2)
    decided = replace(scores, decision=decisions, decision_reason=[None] * len(scores))
    decided.save(tmp_path / "scores.parquet")
    samples_of = {}
    for name in ("half", "scores"):
        source = half if name == "half" else tmp_path / "scores.parquet"
        write_review(open_review(source, "all"), "fiftyone", tmp_path / name)
        content = json.loads((tmp_path / name / "samples.json").read_text())
        samples_of[name] = {one["path"]: one["decision"] for one in content["samples"]}
    assert samples_of["scores"] == dict(zip(scores.ids, decisions, strict=True))
    written = rows(half / "decisions.csv")
    assert samples_of["half"] == {row["path"]: row["decision"] for row in written}


def test_fiftyone_there_and_back(half: Path, tmp_path: Path) -> None:
    review = with_answers(half, 2)
    files = write_review(review, "fiftyone", tmp_path / "set")
    assert write_review(review, "fiftyone", tmp_path / "set") == files  # the same bytes
    samples, metadata = (
        json.loads((tmp_path / "set" / f"{name}.json").read_text())
        for name in ("samples", "metadata")
    )
    fields = {one["name"]: one["ftype"] for one in metadata["sample_fields"]}
    assert samples["samples"][0].keys() - {"_id", "_media_type", "_rand"} <= fields.keys()
    assert metadata["version"]
    assert samples["samples"][0]["vilu"]["label"] == review.tasks[0].answer
    assert len(samples["samples"][0]["_id"]["$oid"]) == 24
    samples["samples"][1]["ground_truth"] = {"_cls": "Classification", "label": "car"}
    (tmp_path / "set" / "samples.json").write_text(json.dumps(samples))
    assert read_finished_tasks(tmp_path / "set") == (
        {review.tasks[1].path: "car"},
        {review.tasks[1].path: "fit"},
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "is no list of tasks"),
        ("[3]", "is no list of tasks"),
        ('[{"data": {"text": 1}}]', "does not say which photo"),
        ('[{"path": "a", "label": ["x", "y"]}]', "where one name is expected"),
        (
            '[{"path": "a", "label": "x"}, {"path": "a", "label": "y"}]',
            "has the labels 'x' and 'y'",
        ),
        ('{"samples": 3}', "is no FiftyOne data set"),
    ],
)
def test_finished_tasks_that_cannot_be(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_finished_tasks(tmp_path / "done.json")


def test_labels_become_failures_of_scores(half: Path, begun: Folder, tmp_path: Path) -> None:
    scores = Outcomes.load(half / "decisions.parquet")
    assert scores.ids is not None
    truth = {path: begun[1][path] for path in scores.ids[:30]} | {
        scores.ids[30]: "(outside)",
        scores.ids[31]: SKIPPED,
    }
    assert write_labels(truth, tmp_path / "late.parquet", half / "decisions.parquet") == 31
    late = Outcomes.load(tmp_path / "late.parquet")
    assert late.ids is not None
    assert late.outside.tolist() == [False] * 30 + [True]
    assert late.failure[30] == 1
    names, said = late.class_names or (), late.prediction
    assert said is not None
    wrong = [names[said[row]] != begun[1][late.ids[row]] for row in range(30)]
    assert late.failure[:30].tolist() == [int(one) for one in wrong]
    with pytest.raises(DataError, match="'bird' is no class"):
        write_labels({scores.ids[0]: "bird"}, tmp_path / "x.parquet", half / "decisions.parquet")
    with pytest.raises(DataError, match="not one of 1 label belongs to a row"):
        write_labels({"nobody": "cat"}, tmp_path / "x.parquet", half / "decisions.parquet")


def test_failures_of_scores_never_replace_scores(half: Path, begun: Folder, tmp_path: Path) -> None:
    shutil.copy(half / "decisions.parquet", tmp_path / "scores.parquet")
    path, name = next(iter(begun[1].items()))
    (tmp_path / "done.csv").write_text(f"path,label\n{path},{name}\n")
    words = ("labels", "done.csv", "--scores", "scores.parquet", "-o", "scores.parquet")
    assert "is there, so it is left alone" in run(*words, code=2, cwd=tmp_path).stderr
    assert (tmp_path / "scores.parquet").read_bytes() == (half / "decisions.parquet").read_bytes()


def test_somebodys_work_is_never_replaced(half: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\na.jpg,cat\n")
    with pytest.raises(UsageError, match="holds something else, so it is left alone"):
        write_labels({"b.jpg": "dog"}, tmp_path / "labels.csv")
    with pytest.raises(UsageError, match=r"ends in \.json"):
        write_review(open_review(half), "label-studio", tmp_path / "tasks.csv")


class Client:
    """A client that sends requests to the page as a browser does."""

    def __init__(self, url: str) -> None:
        self.url = urlsplit(url)
        self.key = self.url.query

    def ask(
        self, path: str, body: object = None, *, key: str | None = None, host: str | None = None
    ) -> tuple[int, bytes]:
        with closing(
            http.client.HTTPConnection(self.url.hostname or "", self.url.port or 0, timeout=10)
        ) as connection:
            return self._ask(connection, path, body, key, host)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        path: str,
        body: object,
        key: str | None,
        host: str | None,
    ) -> tuple[int, bytes]:
        content = (
            None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        address = f"{path}?{self.key if key is None else key}"
        connection.request(
            "POST" if content else "GET", address, content, {"Host": host or self.url.netloc}
        )
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def page(half: Path, tmp_path: Path) -> tuple[Client, ReviewSession, Path]:
    session = ReviewSession(open_review(half), tmp_path / "labels.csv")
    addresses: list[str] = []
    ready = threading.Event()

    def tell(url: str) -> None:
        addresses.append(url)
        ready.set()

    threading.Thread(target=serve_page, args=(session, 0, tell), daemon=True).start()
    assert ready.wait(10)
    return Client(addresses[0]), session, tmp_path / "labels.csv"


def test_every_answer_is_on_the_disk_at_once_and_can_be_taken_back(
    page: tuple[Client, ReviewSession, Path], half: Path
) -> None:
    client, session, kept = page
    status, content = client.ask("/tasks")
    tasks = json.loads(content)["tasks"]
    assert (status, len(tasks)) == (200, len(session.review.tasks))
    assert client.ask("/answer", {"index": 1, "label": "dog"}) == (200, b"{}")
    assert rows(kept) == [{"path": tasks[1]["path"], "label": "dog", "stream": "calibration"}]
    assert client.ask("/answer", {"index": 0, "label": SKIPPED})[0] == 200
    assert client.ask("/answer", {"index": 1, "label": None})[0] == 200
    assert [row["label"] for row in rows(kept)] == [SKIPPED]
    # the new session continues where the first one stopped
    again = ReviewSession(open_review(half), kept)
    assert again.labels == {tasks[0]["path"]: SKIPPED}
    kept.write_text("path,label\nelsewhere.jpg,cat\n")
    with pytest.raises(DataError, match="labels of other photos"):
        ReviewSession(open_review(half), kept)


def test_answers_that_are_not_shown_again_keep_their_stream(half: Path, tmp_path: Path) -> None:
    """A shorter review must not drop the streams of earlier answers.

    Otherwise photos that were chosen for doubt would count as drawn at random.
    """
    kept = tmp_path / "labels.csv"
    first = ReviewSession(open_review(half, "review"), kept)
    for place in range(6):
        first.set_label(place, "dog")
    before = {row["path"]: row["stream"] for row in rows(kept)}
    again = ReviewSession(open_review(half, "review", 2), kept)
    again.set_label(0, "cat")
    assert {row["path"]: row["stream"] for row in rows(kept)} == before
    assert len(before) == 6
    assert set(before.values()) <= {"fit", "calibration"}


def test_the_page_is_for_this_machine_and_its_key(page: tuple[Client, ReviewSession, Path]) -> None:
    client, _, kept = page
    assert client.ask("/")[0] == 200
    assert client.ask("/photo/0")[1][8:12] == b"WEBP"
    for path, body, more, expected in (
        ("/", None, {"key": "key=wrong"}, 403),
        ("/answer", {"index": 0, "label": "cat"}, {"key": ""}, 403),
        ("/tasks", None, {"host": "evil.example"}, 421),
        ("/photo/99999", None, {}, 404),
        ("/photo/..%2f..%2fetc", None, {}, 404),
        ("/secret", None, {}, 404),
        ("/answer", {"index": 0, "label": "bird"}, {}, 400),
        ("/answer", {"index": -1, "label": "cat"}, {}, 400),
        ("/answer", {"index": True, "label": "cat"}, {}, 400),
        ("/answer", {"label": "cat"}, {}, 400),
        ("/answer", b"[" * 9000, {}, 400),
        ("/answer", b"x" * 20_000, {}, 413),
    ):
        status, content = client.ask(path, body, **more)
        assert status == expected, path
        assert json.loads(content)["status"] == expected
    assert not kept.exists()


def test_labels_that_were_there_before_keep_their_stream(half: Path, tmp_path: Path) -> None:
    """A plain table of a random pick has no stream, and a correction on the page adds none."""
    review = with_answers(half, 3)
    first, second, third = (task.path for task in review.tasks)
    kept = tmp_path / "labels.csv"
    kept.write_text(f"path,label\n{first},cat\n{second},dog\n")
    session = ReviewSession(review, kept)
    session.set_label(0, "car")
    session.set_label(2, "car")
    streams = {row["path"]: row["stream"] for row in rows(kept)}
    assert streams == {first: "", second: "", third: "fit"}


@contextmanager
def tab_of(browser: Browser, session: ReviewSession) -> Iterator[Page]:
    """Open the page of a session in a browser, and require that the page reports no error."""
    addresses: list[str] = []
    ready = threading.Event()

    def tell(url: str) -> None:
        addresses.append(url)
        ready.set()

    threading.Thread(target=serve_page, args=(session, 0, tell), daemon=True).start()
    assert ready.wait(10)
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    trouble: list[str] = []
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
    tab.goto(addresses[0])
    yield tab
    tab.close()
    assert trouble == []


def wait_for(tab: Page, k: int, n: int) -> None:
    """Wait until k of n photos have an answer."""
    tab.locator("#progress", has_text=f"{k} of {n} answered").wait_for(timeout=10_000)


@pytest.mark.parametrize("n", few([30, 100], 1))
def test_photos_by_keyboard(half: Path, browser: Browser, tmp_path: Path, n: int) -> None:
    """Test the keys for accept, another class, none of the classes, skip and undo.

    The page must fit both widths.
    """
    review = with_answers(half, n)
    with tab_of(browser, ReviewSession(review, tmp_path / "labels.csv")) as tab:
        press = tab.keyboard.press
        wait_for(tab, 0, n)
        for key, answered in (("o", 1), ("s", 2), ("2", 3), ("u", 2)):
            press(key)
            wait_for(tab, answered, n)
        press("/")
        tab.keyboard.type("ca")
        press("Enter")  # the first class that begins with these letters
        wait_for(tab, 3, n)
        tab.set_viewport_size({"width": 390, "height": 844})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        unlabelled = tab.evaluate(
            "[...document.querySelectorAll('button, input')].filter(x => !x.textContent && "
            "!x.labels.length).length"
        )
        assert unlabelled == 0
        for k in range(4, n + 1):
            press("Enter")
            wait_for(tab, k, n)
        done = tab.locator("#done")
        done.wait_for()
        assert "vilu triage` command with --labels" in done.inner_text()
        box = done.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 844, "the end is on the first screen"
    kept = rows(tmp_path / "labels.csv")
    assert len(kept) == n
    label = {row["path"]: row["label"] for row in kept}
    assert [label[one.path] for one in review.tasks[:3]] == ["(outside)", SKIPPED, "cat"]
    assert all(label[one.path] == one.answer for one in review.tasks[3:])


def test_a_blind_photo_shows_classes_and_no_answer(
    half: Path, browser: Browser, tmp_path: Path
) -> None:
    """Digits name the classes. Enter does nothing."""
    review = open_review(half)
    review = replace(review, tasks=[task for task in review.tasks if task.is_blind][:3])
    with tab_of(browser, ReviewSession(review, tmp_path / "labels.csv")) as tab:
        wait_for(tab, 0, 3)
        assert not tab.locator("#accept").is_visible()
        assert not tab.locator("#second").is_visible()
        assert "the model's answer is not shown" in tab.locator("#said").inner_text()
        shown = tab.locator("#classes li").all_inner_texts()
        assert [text.split() for text in shown[:3]] == [["1", "cat"], ["2", "dog"], ["3", "car"]]
        tab.keyboard.press("Enter")
        tab.keyboard.press("2")
        wait_for(tab, 1, 3)
        tab.keyboard.press("3")
        wait_for(tab, 2, 3)
        tab.keyboard.press("1")
        tab.locator("#done").wait_for()
    label = {row["path"]: row["label"] for row in rows(tmp_path / "labels.csv")}
    assert [label[task.path] for task in review.tasks] == ["dog", "car", "cat"]
    assert {row["stream"] for row in rows(tmp_path / "labels.csv")} == {"calibration"}


def test_a_label_in_the_triage_and_in_the_file_counts_once(half: Path, tmp_path: Path) -> None:
    review = with_answers(half, 2)
    first, second = [task.path for task in review.tasks]
    of_file = {first: "cat", second: "cat"}
    review = replace(review, labels={**of_file, "a.png": "dog", "b.png": "dog", "c.png": "dog"})
    session = ReviewSession(review, tmp_path / "labels.csv")
    for index in range(2):
        session.set_label(index, "cat")
    assert session.page_data()["used"] == ["dog", "cat"]


def test_of_many_classes_the_most_used_ones_have_digits(
    half: Path, browser: Browser, tmp_path: Path
) -> None:
    classes = [f"class {number:02}" for number in range(12)]
    used = ["class 07"] * 2 + ["class 11"] * 5 + ["gone"] * 9
    review = open_review(half)
    review = replace(
        review,
        tasks=[task for task in review.tasks if task.is_blind][:3],
        names=(*classes, "(outside)"),
        labels={f"{number}.png": name for number, name in enumerate(used)},
    )
    with tab_of(browser, ReviewSession(review, tmp_path / "labels.csv")) as tab:
        wait_for(tab, 0, 3)
        tab.keyboard.press("9")  # this digit has no class yet
        tab.keyboard.press("1")
        wait_for(tab, 1, 3)
        tab.keyboard.press("/")
        tab.keyboard.type("05")
        tab.keyboard.press("Enter")
        wait_for(tab, 2, 3)
        tab.keyboard.press("3")  # a class that was used gets the next digit
        wait_for(tab, 3, 3)
        tab.locator("#done").wait_for()
    label = {row["path"]: row["label"] for row in rows(tmp_path / "labels.csv")}
    assert [label[task.path] for task in review.tasks] == ["class 11", "class 05", "class 05"]


def test_keys_that_are_pressed_while_an_answer_is_saved_are_kept(
    half: Path, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    review = with_answers(half, 4)
    session = ReviewSession(review, tmp_path / "labels.csv")
    may_save = threading.Event()
    save = session._save

    def save_late(answers: dict[str, str]) -> None:
        may_save.wait(10)
        save(answers)

    monkeypatch.setattr(session, "_save", save_late)
    with tab_of(browser, session) as tab:
        wait_for(tab, 0, 4)
        for key in ("o", "Enter", "s", "u", "Enter", "o"):
            tab.keyboard.press(key)
        assert not tab.locator("#done").is_visible()
        assert not (tmp_path / "labels.csv").exists()
        may_save.set()
        tab.locator("#done").wait_for()
    label = {row["path"]: row["label"] for row in rows(tmp_path / "labels.csv")}
    answers = [task.answer for task in review.tasks]
    assert [label[task.path] for task in review.tasks] == [
        "(outside)",
        answers[1],
        answers[2],
        "(outside)",
    ]


@contextmanager
def reviewing(folder: Path, output: Path) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    """Run ``vilu review --serve`` in its own process until the block ends."""
    words = command("review", folder, "--serve", "-o", output)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield Client(process.stdout.readline().strip()), process
        finally:
            process.kill()


def test_a_second_reviewer_of_a_file_is_refused(half: Path, tmp_path: Path) -> None:
    """Each session writes all its answers, so two sessions would overwrite each other's answers."""
    output = tmp_path / "labels.csv"
    with reviewing(half, output) as (client, process):
        words = command("review", half, "--serve", "-o", output)
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 75
        assert f"another review (process {process.pid} of" in done.stderr
        assert "labelling into labels.csv" in done.stderr
        assert client.ask("/answer", {"index": 0, "label": "dog"})[0] == 200
    assert [row["label"] for row in rows(output)] == ["dog"]


def test_what_another_program_wrote_is_not_overwritten(
    page: tuple[Client, ReviewSession, Path],
) -> None:
    client, session, output = page
    assert client.ask("/answer", {"index": 0, "label": "dog"})[0] == 200
    edited = output.read_bytes().replace(b"dog", b"cat")
    output.write_bytes(edited)
    status, content = client.ask("/answer", {"index": 1, "label": "car"})
    assert status == 409
    assert "was changed by another program, and stays as it is" in json.loads(content)["detail"]
    assert output.read_bytes() == edited
    assert set(session.labels.values()) == {
        "dog"
    }  # the page shows no answer that is not on the disk
    again = ReviewSession(session.review, output)
    again.set_label(1, "car")
    assert sorted(row["label"] for row in rows(output)) == ["car", "cat"]


def test_an_answer_that_cannot_be_written_is_refused(
    page: tuple[Client, ReviewSession, Path],
) -> None:
    client, session, output = page
    output.mkdir()
    status, content = client.ask("/answer", {"index": 0, "label": "dog"})
    assert status == 507
    assert "labels.csv" in json.loads(content)["detail"]
    assert session.labels == {}


def test_a_port_that_is_taken_is_one_sentence(half: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command_line(
            "review", half, "--serve", "-o", tmp_path / "labels.csv", "--port", port
        )
    assert done.returncode == 2
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in done.stderr
    assert "Give another --port, or leave --port out" in done.stderr
    assert "open this address" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, 143, "stopped: every answer is in"),
        pytest.param(signal.SIGINT, 0, "1 answer in", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_review_goes_on_and_says_so(
    half: Path, tmp_path: Path, number: signal.Signals, code: int, words: str
) -> None:
    output = tmp_path / "labels.csv"
    with reviewing(half, output) as (client, process):
        assert client.ask("/answer", {"index": 2, "label": "dog"})[0] == 200
        process.send_signal(number)
        assert process.stderr is not None
        message = process.stderr.read()
        assert process.wait(30) == code
    assert words in message
    assert "the same command goes on with the rest" in message
    with reviewing(half, output) as (client, _):
        tasks = json.loads(client.ask("/tasks")[1])["tasks"]
    assert [task["label"] for task in tasks[:4]] == [None, None, "dog", None]
