"""Faults that a machine and its users cause to a service and to commands, with the expected
outcomes.
"""

from __future__ import annotations

import os
import platform
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders.photo_folders import KINDS, photo
from tests.builders.store_fakes import NAMES, FakeBackbone, picture
from tests.command import PYTHONPATH, command, command_line
from tests.conftest import few
from tests.faults.bed import FRAME, plugged
from tests.service.conftest import Running, hosted, served
from tests.service.test_bad_company import MB, connected, monitored
from vilu.datasets.catalog import open_dataset
from vilu.store.embed import embed
from vilu.store.reader import EmbeddingStore


@pytest.fixture(autouse=True)
def _plugged() -> Iterator[None]:
    """Remove the fake model after each test, so that other tests find no such model."""
    with plugged():
        yield


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_reads_nothing_of_a_service(predictors: tuple[Path, Path]) -> None:
    before = os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory() as home:
            Path(home).chmod(0o755)
            with served(predictors[0], "--state", f"{home}/s") as running:
                running.post("/v1/answers", files={"a": photo(0, 0)})
            paths = [Path(home, "s"), *Path(home, "s").rglob("*")]
            assert "rows.sqlite" in {path.name for path in paths}
            for path in paths:
                words = ["ls" if path.is_dir() else "cat", path]
                done = subprocess.run(words, user=65534, capture_output=True, check=False)
                assert b"Permission denied" in done.stderr
    finally:
        os.umask(before)


def test_a_service_that_is_stopped_for_a_while_goes_on(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """After SIGSTOP and SIGCONT, the service must answer all requests and count each row once."""
    statuses: list[int] = []

    def ask(running: Running, number: int) -> None:
        image = photo(number % KINDS, number)
        statuses.append(running.post("/v1/answers", files={"a": image}).status_code)

    with served(predictors[0], "--state", tmp_path / "s") as running:
        assert running.process is not None
        running.process.send_signal(signal.SIGSTOP)
        threads = [threading.Thread(target=ask, args=(running, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        assert statuses == []
        running.process.send_signal(signal.SIGCONT)
        for thread in threads:
            thread.join(30)
        assert statuses == [200] * 8
        assert monitored(running)["rows"] == 8


PEAK_AT_THE_START = """
from vilu.service import server

server.MEMORY_RETURN_SECONDS = {seconds}
blocks = [b"x" * 100_000 for _ in range(3_000)]
last = b"x" * 100_000  # the heap ends here, so it cannot become shorter
del blocks
"""


def memory(process: int, name: str) -> int:
    """Return a number of bytes from /proc: VmRSS is resident now, VmHWM is the peak."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    pytest.fail(f"no {name}")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns what is freed")
@pytest.mark.parametrize(("seconds", "returned"), few([(0.5, True), (600, False)], 1))
def test_a_service_returns_the_memory_of_its_largest_moment(
    predictors: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    returned: bool,
) -> None:
    (tmp_path / "peak_of_a_test.py").write_text(PEAK_AT_THE_START.format(seconds=seconds))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), PYTHONPATH]))
    with served(predictors[0], "--state", tmp_path / "s", plugin="peak_of_a_test") as running:
        assert running.process is not None
        time.sleep(3)
        peak, now = (memory(running.process.pid, name) for name in ("VmHWM", "VmRSS"))
        assert (peak - now > 150 * MB) == returned
        assert running.post("/v1/answers", files={"a": photo(0, 0)}).status_code == 200


def test_two_services_on_one_state(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    """While the first service lives, the second must be refused.

    After the first is killed, the second must go on with its rows.
    """
    state = ("--state", tmp_path / "s")
    with served(predictors[0], *state) as first:
        assert first.post("/v1/answers", files={"a": photo(0, 0)}).status_code == 200
        words = command(*FRAME, "serve", predictors[0], *state, "--port", 0)
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, "serving with the state in" in done.stderr) == (75, True)
        assert first.post("/v1/answers", files={"a": photo(1, 1)}).status_code == 200
        first.stop(signal.SIGKILL)
    with served(predictors[0], *state) as second:
        assert monitored(second)["rows"] == 2
        assert second.post("/v1/answers", files={"a": photo(2, 2)}).status_code == 200
        assert monitored(second)["rows"] == 3
    assert not list((tmp_path / "s").rglob("*.aside-*"))


def test_a_clock_that_is_set_back_under_a_service(
    predictors: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the clock is set back, the journal must still count every row.

    A row is identified by its number. Its time is the clock's time.
    """
    clock = iter(range(2_000_000_000, 0, -86_400))
    with hosted(predictors[0], tmp_path / "s") as running:
        with monkeypatch.context() as patch:
            patch.setattr("vilu.service.rows.time.time", lambda: float(next(clock)))
            for number in range(5):
                image = photo(number, number)
                assert running.post("/v1/answers", files={"a": image}).status_code == 200
        before = monitored(running)
    assert before["rows"] == 5
    with hosted(predictors[0], tmp_path / "s") as running:
        assert monitored(running) == before
    assert not list((tmp_path / "s").rglob("*.aside-*"))
    (file,) = (tmp_path / "s").glob("*/rows.sqlite")
    with closing(sqlite3.connect(file)) as table:
        times = [when for (when,) in table.execute("SELECT time FROM rows ORDER BY n")]
    assert times == sorted(times, reverse=True)


@contextmanager
def few_descriptors(n: int) -> Iterator[None]:
    """Let processes that start in this block open at most n files each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_do_not_take_the_last_descriptor(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        with few_descriptors(128):
            state = ("--state", tmp_path / "s")
            running = stack.enter_context(served(predictors[0], *state, ready=False))
        running.wait_ready()
        idle = [connected(running.url) for _ in range(200)]
        time.sleep(1)
        for connection in idle:
            connection.close()
        running.wait_ready()
        assert running.post("/v1/answers", files={"a": photo(0, 0)}).status_code == 200


def test_a_plugin_that_raises_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_of_nobody.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = command_line("--plugin", "plugin_of_nobody", "list", "method")
    assert done.returncode == 2
    words = "the plugin 'plugin_of_nobody' failed at its import: ZeroDivisionError"
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_huge_toml_file_is_not_parsed(tmp_path: Path) -> None:
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as file:
        file.truncate(100_000_000)
    began = time.monotonic()
    done = command_line("benchmark", huge, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "is larger than 4,194,304 bytes" in done.stderr
    assert time.monotonic() - began < 10
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["../../etc", "org/../../../etc", "org/..", "..", "a/b/c/../../.."]
)
def test_a_name_of_a_hub_leads_to_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A hub name must lead neither to a folder beside the work folder nor out of the hub's
    cache.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    work = tmp_path / "a" / "b" / "work"
    work.mkdir(parents=True)
    done = command_line("pull", name, "-o", "pulled", cwd=work)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the address space")
def test_too_little_memory_is_named(predictors: tuple[Path, Path], tmp_path: Path) -> None:
    """If the memory is too small, the message must say so.

    200 MiB are too small for every version of numpy and torch.
    """
    train = predictors[0].parent / "train"
    for words in (
        ("fit", train, "-o", tmp_path / "p", "--method", "mcm"),
        ("serve", predictors[0], "--state", tmp_path / "s", "--port", 0),
    ):
        preexec = partial(resource.setrlimit, resource.RLIMIT_AS, (200 * MB, 200 * MB))
        done = subprocess.run(
            command(*words),
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=preexec,
        )
        assert done.returncode == 7, done.stderr
        assert "there is not enough memory" in done.stderr
        assert "`ulimit -v` allows this process 200 MiB" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "p").exists()


def test_memory_that_ends_during_the_work_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the memory ends during the work, finished parts must stay, and the same command must
    complete.
    """
    photos, store = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    for number in range(24):
        (photos / f"{number:02}.png").write_bytes(photo(number % KINDS, number))
    classes = write_classes(tmp_path)
    words = (*FRAME, "embed", photos, "-o", store, *classes, "--part-size", 6)
    encode = FakeBackbone.encode_images
    encoded: list[int] = []  # counts here, since models are reused

    def encode_three_parts(model: FakeBackbone, pixels: torch.Tensor) -> torch.Tensor:
        if sum(encoded) >= 18:
            raise MemoryError
        encoded.append(len(pixels))
        return encode(model, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(FakeBackbone, "encode_images", encode_three_parts)
        done = command_line(*words)
    assert (done.returncode, "there is not enough memory" in done.stderr) == (7, True)
    parts = sorted((store / "img_emb").iterdir())
    assert [np.load(path).shape[0] for path in parts] == [6, 6, 6]
    assert command_line(*words).returncode == 0
    assert len(EmbeddingStore(store)) == 24


def write_classes(folder: Path) -> tuple[object, ...]:
    """Write a file with class names, and return arguments that name this file and the fake
    model.
    """
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return ("--classes", folder / "classes.txt", "--backbone", "fake")


def test_photos_that_change_during_a_run_with_the_same_size_and_time(tmp_path: Path) -> None:
    """If photos change during a run, the vector and the digest in a row must belong to one content.

    The content may be the first or the second version. Both have the same size and time.
    """
    n = 30
    folders = [tmp_path / "first", tmp_path / "second", tmp_path / "live"]
    for version, folder in enumerate(folders):
        folder.mkdir()
        for number in range(n):
            path = folder / f"{number:02}.bmp"
            path.write_bytes(picture(100 * (version % 2) + number, image_format="BMP"))
            os.utime(path, (1, 1))
    ended = threading.Event()

    def change() -> None:
        version = 1
        while not ended.is_set():
            for source in folders[version].iterdir():
                copy = tmp_path / "copy"
                copy.write_bytes(source.read_bytes())
                os.utime(copy, (1, 1))
                copy.replace(folders[2] / source.name)
            version = 1 - version

    changing = threading.Thread(target=change)
    changing.start()
    try:
        live = rows_of(folders[2], tmp_path / "stores" / "live")
    finally:
        ended.set()
        changing.join()
    first = rows_of(folders[0], tmp_path / "stores" / "first")
    second = rows_of(folders[1], tmp_path / "stores" / "second")
    assert len(live) == n
    for row, whole in enumerate(live):
        assert whole in {first[row], second[row]}


def rows_of(photos: Path, store: Path) -> list[tuple[int, bytes]]:
    """Embed these photos, and return the picture's digest and the vector for every row."""
    found = embed(open_dataset(photos), FakeBackbone(), store, names=NAMES, part_size=7)
    pictures = found.identities("picture").tolist()
    vectors = found.image_rows(torch.arange(len(found))).numpy()
    return [(key, row.tobytes()) for key, row in zip(pictures, vectors, strict=True)]


def test_data_of_an_onnx_file_outside_of_its_folder_are_not_read(tmp_path: Path) -> None:
    """No command may read an ONNX file, so no command may follow the path inside it."""
    onnx = pytest.importorskip("onnx")
    secret = np.arange(1000, dtype=np.float32)
    (tmp_path / "secret").write_bytes(secret.tobytes())
    tensor = onnx.TensorProto(
        name="w", data_type=1, dims=[1000], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="../secret")
    value = onnx.helper.make_tensor_value_info("y", 1, [1000])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "graph", [], [value], [tensor])
    folder = tmp_path / "folder"
    folder.mkdir()
    model = folder / "model.onnx"
    model.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    opened: list[str] = []
    out = tmp_path / "out"
    with watched_files(opened):
        for words in (
            ("inspect", model),
            ("inspect", folder),
            ("convert", model, "-o", out),
            ("evaluate", model),
            ("report", model, "-o", out),
            ("pull", folder, "-o", out),
            ("push", folder, tmp_path / "hub"),
            ("export", folder, "-o", out),
        ):
            done = command_line(*words)
            assert done.returncode in {2, 3, 5, 6}, (words, done.stderr)
            assert "Traceback" not in done.stderr
    assert str(model) in opened
    assert not [path for path in opened if path.endswith("secret")]
    assert not out.exists()


WATCHED: list[list[str]] = []
"""Lists that get the name of every file that this process opens."""


@contextmanager
def watched_files(opened: list[str]) -> Iterator[None]:
    """Add the name of every file that is opened in this block to ``opened``."""
    WATCHED.append(opened)
    try:
        yield
    finally:
        WATCHED.remove(opened)


def note_file(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        for names in WATCHED:
            names.append(str(arguments[0]))


sys.addaudithook(note_file)


@pytest.mark.hostile
def test_a_folder_of_a_hundred_thousand_files(
    predictors: tuple[Path, Path], tmp_path: Path
) -> None:
    """A folder with 100,000 files must be usable by ``vilu embed`` and by a service.

    The command lists the folder once. A service that keeps images in the folder does not list it.
    """
    many = tmp_path / "many"
    many.mkdir()
    for number in range(100_000):
        (many / f"{number:06}.png").touch()
    for number in range(8):
        (many / f"{number:06}.png").write_bytes(photo(number % KINDS, number))
    words = ("embed", many, "-o", tmp_path / "store", *write_classes(tmp_path), "--limit", 8)
    done = command_line(*FRAME, *words)
    assert done.returncode == 0, done.stderr
    assert len(EmbeddingStore(tmp_path / "store")) == 8
    with hosted(predictors[0], tmp_path / "s", keep=many) as running:
        assert running.post("/v1/answers", files={"a": photo(0, 99)}).status_code == 200
    assert len(list(many.iterdir())) == 100_001
