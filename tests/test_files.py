from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from vilu.artifacts.disk import (
    MAX_TEMPORARY_AGE,
    TEMPORARY_NAME,
    atomic_write,
    convert_os_errors,
    host_hash,
    is_leftover,
    write_bytes,
)
from vilu.artifacts.documents import (
    MAX_DOCUMENT_BYTES,
    SCHEMA_VERSION,
    append_to_log,
    read_json,
    read_log,
    write_json,
)
from vilu.artifacts.hashing import digest
from vilu.artifacts.paths import content_identity, list_files
from vilu.artifacts.tables import read_table, table_digest, write_table
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError, ViLUError


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "scores.bin"
    with atomic_write(target) as handle:
        handle.write(b"half")
        assert not target.exists()
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.startswith(f".scores.bin.{host_hash()}.{os.getpid()}.")
        assert temporary.name.endswith(".tmp")
        handle.write(b" and half")
    assert target.read_bytes() == b"half and half"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(target) as handle:
        handle.writelines([b"new", "not bytes"])
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target):
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with atomic_write(target) as first, atomic_write(target) as second:
        first.write(b"first")
        second.write(b"second")
    assert target.read_bytes() == b"first"  # closed last
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "a"
    refused = pytest.raises(
        StorageError, match=r"cannot write .*nowhere.*No such file or directory"
    )
    with refused as caught, atomic_write(target):
        pass
    assert caught.value.exit_code == 7


def test_a_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.mkdir()
    refused = pytest.raises(StorageError, match=r"cannot write .*a: a folder is there\. Move it")
    with refused, atomic_write(target) as handle:
        handle.write(b"x")
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)), atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_storage_error_inside_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^inner$"), atomic_write(tmp_path / "a"):
        raise StorageError("inner")


@pytest.mark.parametrize(("code", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_is_no_failure_but_an_io_error_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raised: bool
) -> None:
    sync = os.fsync
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:  # the folder, after the file
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if raised:
        with pytest.raises(StorageError, match=os.strerror(code)):
            write_json(tmp_path / "a.json", {"a": 1})
    else:
        write_json(tmp_path / "a.json", {"a": 1})
    assert len(synced) == 2


@pytest.mark.parametrize("name", ["a" * 250, "猫" * 85], ids=["bytes", "characters"])
def test_the_longest_names_are_written(tmp_path: Path, name: str, dead_pid: int) -> None:
    """A name may have 255 bytes. The extra part in a temporary name once made it too long."""
    short = os.fsencode(name)[:220].decode("utf-8", "ignore")
    leftover = make(tmp_path / f".{short}.{host_hash()}.{dead_pid}.0123abcd.tmp")
    write_bytes(tmp_path / name, b"1")
    assert (tmp_path / name).read_bytes() == b"1"
    assert not leftover.exists()


def test_json_round_trip_is_readable(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "naïve 猫"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    content = {"schema_version": SCHEMA_VERSION, **value}
    assert json.loads(text) == {**content, "digest": digest(content)}
    assert read_json(tmp_path / "a.json", "Make it again") == content
    assert "猫" in text
    assert text.endswith("}\n")
    assert text.index('"b"') < text.index('"a"')


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], object(), "\udcff", {(1, 2): 3}])
def test_what_is_not_json_is_refused_before_anything_is_written(
    tmp_path: Path, value: object
) -> None:
    with pytest.raises(DataError, match=r"a\.json: its content must be plain JSON"):
        write_json(tmp_path / "a.json", {"a": value})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def dead_pid() -> int:
    """Return the id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def make(path: Path, age: float = 0.0) -> Path:
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_leftovers_are_of_the_dead_of_this_machine_or_old(tmp_path: Path, dead_pid: int) -> None:
    here, elsewhere = host_hash(), f"{int(host_hash(), 16) ^ 1:08x}"
    leftovers = [
        make(tmp_path / f".a.npy.{here}.{dead_pid}.0123abcd.tmp"),
        make(tmp_path / f".a.npy.{here}.{10**30}.0123abcd.tmp"),  # no process can have this number
        make(tmp_path / f".a.npy.{elsewhere}.{dead_pid}.0123abcd.tmp", MAX_TEMPORARY_AGE + 60),
        make(
            tmp_path / f".a.npy.{here}.{os.getpid()}.0123abcd.tmp", MAX_TEMPORARY_AGE + 60
        ),  # another process got this number later
        make(
            tmp_path / f".a.npy.{dead_pid}.0123abcd.tmp", MAX_TEMPORARY_AGE + 60
        ),  # without a host, as older code named them
    ]
    others = [
        make(tmp_path / f".a.npy.{here}.{os.getpid()}.0123abcd.tmp1", MAX_TEMPORARY_AGE + 60),
        make(tmp_path / f".b.npy.{here}.{os.getpid()}.0123abcd.tmp"),
        make(tmp_path / f".b.npy.{here}.{os.getppid()}.0123abcd.tmp", MAX_TEMPORARY_AGE - 60),
        make(tmp_path / f".b.npy.{elsewhere}.{dead_pid}.0123abcd.tmp", MAX_TEMPORARY_AGE - 60),
        make(tmp_path / f".b.npy.{dead_pid}.0123abcd.tmp", MAX_TEMPORARY_AGE - 60),
        make(tmp_path / "b.npy", MAX_TEMPORARY_AGE + 60),
        make(tmp_path / ".mine.tmp", MAX_TEMPORARY_AGE + 60),
        tmp_path / f".gone.{here}.{dead_pid}.0123abcd.tmp",
    ]
    assert [path for path in [*leftovers, *others] if is_leftover(path)] == leftovers


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="zombies are told by Linux's /proc"
)
def test_a_write_removes_what_crashes_left_of_it_and_nothing_else(
    tmp_path: Path, dead_pid: int
) -> None:
    left = make(tmp_path / f".a.json.{host_hash()}.{dead_pid}.0123abcd.tmp")
    others = [
        make(tmp_path / f".a.json.{host_hash()}.{os.getpid()}.0123abcd.tmp"),
        make(tmp_path / f".a.json.89abcdef.{dead_pid}.0123abcd.tmp"),
        make(tmp_path / f".b.json.{host_hash()}.{dead_pid}.0123abcd.tmp"),
        make(tmp_path / "a.json.tmp"),
    ]
    write_json(tmp_path / "a.json", {"a": 1})
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_a_log_is_read_but_for_lines_that_were_cut(tmp_path: Path) -> None:
    assert list(read_log(tmp_path)) == []
    append_to_log(tmp_path, part=0, seconds=1.5)
    with (tmp_path / "log.jsonl").open("a") as handle:
        handle.write('{"part": 1, "sec\n[1]\n')
    append_to_log(tmp_path, part=2, seconds=0.25)
    assert list(read_log(tmp_path)) == [{"part": 0, "seconds": 1.5}, {"part": 2, "seconds": 0.25}]


def test_a_process_that_has_ended_unasked_is_dead(tmp_path: Path) -> None:
    """A container's first process may never reap workers whose driver was killed."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        leftover = make(tmp_path / f".a.{host_hash()}.{child.pid}.0123abcd.tmp")
        end = time.monotonic() + 10
        while not is_leftover(leftover):
            assert time.monotonic() < end
            time.sleep(0.01)
        # os.kill raises if the process were gone. Nobody has reaped it yet, so it is a zombie.
        os.kill(child.pid, 0)


@pytest.mark.skipif(os.name == "nt", reason="no process of another user to ask for")
def test_a_process_of_another_user_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_leftover(make(tmp_path / f".a.{host_hash()}.1.0123abcd.tmp"))


def test_the_name_of_a_file_in_the_making_says_what_and_whose_it_is(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "run.1.json"):
        (temporary,) = tmp_path.iterdir()
    match = TEMPORARY_NAME.fullmatch(temporary.name)
    assert match is not None
    assert match.groupdict() == {"name": "run.1.json", "host": host_hash(), "pid": str(os.getpid())}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (bytes(MAX_DOCUMENT_BYTES + 1), f"larger than {MAX_DOCUMENT_BYTES} bytes"),
    ],
    ids=["nothing", "half", "deep", "large"],
)
@pytest.mark.parametrize("fault", [DataError, StorageError])
def test_json_that_cannot_be_read(content, message, fault, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(fault, match=rf"a\.json .*{message}"):
        read_json(tmp_path / "a.json", "Make it again", fault)


def test_a_refusal_of_the_file_system_is_an_error_of_ours(tmp_path: Path) -> None:
    said = r"^cannot look: No such file or directory \(.*nothing\)\. Look elsewhere\.$"
    with (
        pytest.raises(StorageError, match=said) as caught,
        convert_os_errors("cannot look", "Look elsewhere."),
    ):
        (tmp_path / "nothing").stat()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(StorageError, match=r"^said already$"), convert_os_errors("cannot look"):
        raise StorageError("said already")
    with pytest.raises(ValueError, match="no matter of files"), convert_os_errors("cannot look"):
        raise ValueError("no matter of files")


def columns() -> dict[str, pa.Array]:
    return {
        "number": pa.array([0.5, None, -0.0, 1e300]),
        "text": pa.array(["a", None, "", "naïve 猫"]),
        "flag": pa.array([True, False, None, True]),
        "count": pa.array([1, 2, None, 4], pa.int8()),
    }


def test_the_digest_of_a_table_is_of_what_it_says() -> None:
    """The digest depends on every value, null, name and type.

    It does not depend on chunks or slices, or on the bytes under nulls.
    """
    whole = pa.table(columns())
    right = table_digest(whole, {"a": 1})
    for size in (1, 2, 3):
        assert (
            table_digest(
                pa.concat_tables(whole.slice(at, size) for at in range(0, 4, size)), {"a": 1}
            )
            == right
        )
    assert table_digest(pa.concat_tables([whole, whole]).slice(4), {"a": 1}) == right
    under = pa.Array.from_buffers(
        pa.float64(), 4, [whole["number"].chunk(0).buffers()[0], pa.py_buffer(b"\1" * 32)]
    )
    empty = pa.Array.from_buffers(pa.float64(), 4, [under.buffers()[0], pa.py_buffer(b"\2" * 32)])
    assert table_digest(pa.table({"a": pc.fill_null(under, 0.0)}), {}) != table_digest(
        pa.table({"a": under}), {}
    )
    assert table_digest(pa.table({"a": under}), {}) != table_digest(pa.table({"a": empty}), {})
    others = [
        (whole.set_column(0, "number", pa.array([0.5, 0.0, -0.0, 1e300])), {"a": 1}),
        (whole.set_column(0, "number", pa.array([0.5, None, 0.0, 1e300])), {"a": 1}),
        (whole.set_column(1, "text", pa.array(["a", "", None, "naïve 猫"])), {"a": 1}),
        (whole.set_column(1, "text", pa.array(["", None, "a", "naïve 猫"])), {"a": 1}),
        (whole.set_column(2, "flag", pa.array([True, None, False, True])), {"a": 1}),
        (whole.set_column(3, "count", pa.array([1, 2, None, 4], pa.int16())), {"a": 1}),
        (whole.rename_columns(["number", "text", "flag", "counts"]), {"a": 1}),
        (whole.select(["text", "number", "flag", "count"]), {"a": 1}),
        (whole.slice(0, 3), {"a": 1}),
        (whole, {"a": 1.0}),
    ]
    assert len({right, *(table_digest(*other) for other in others)}) == 1 + len(others)


def test_a_table_is_damaged_or_what_it_was(tmp_path: Path) -> None:
    """If a bit in the file is flipped, the table is refused or reads the same.

    Page checksums alone let damaged footers pass.
    """
    path = tmp_path / "a.parquet"
    write_table(path, columns(), {"kind": "test", "note": "x" * 20})
    right, whole = read_table(path, ()), path.read_bytes()
    refused = 0
    for place in range(0, 8 * len(whole), 37):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            table, metadata = read_table(path, ())
        except DataError as error:
            refused += str(path) in str(error)
            continue
        assert table.equals(right[0])
        assert metadata == right[1]
    assert refused > len(whole) / 10


@pytest.mark.parametrize("metadata", [{"kind": "test"}, {"kind": "test", "digest": ""}])
def test_a_table_of_ours_has_a_digest(tmp_path: Path, metadata: dict[str, object]) -> None:
    text = json.dumps({"schema_version": SCHEMA_VERSION, **metadata}).encode()
    table = pa.table(columns()).replace_schema_metadata({b"vilu": text})
    pq.write_table(table, tmp_path / "ours.parquet")
    with pytest.raises(DataError, match=r"ours\.parquet is damaged"):
        read_table(tmp_path / "ours.parquet", ())
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "other.parquet")
    assert read_table(tmp_path / "other.parquet", ())[1] == {}


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, r"a\.json was made before vilu 0\.2\.0 \(schema 1\)\. Run it again\.$"),
        (3, "schema version 3, this vilu reads 2. Update vilu"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_another_schema_is_refused(
    tmp_path: Path, version: int, message: str, sealed: bool
) -> None:
    write_json(tmp_path / "a.json", {"schema_version": version, "a": 1})
    if not sealed:
        (tmp_path / "a.json").write_text(json.dumps({"schema_version": version, "b": 1}))
    with pytest.raises(ProvenanceError, match=message):
        read_json(tmp_path / "a.json", "Run it again")


def test_a_document_without_a_schema_or_a_digest_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(ProvenanceError, match="has no schema_version: it was made before"):
        read_json(tmp_path / "a.json", "Run it again")
    (tmp_path / "a.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
    with pytest.raises(DataError, match="is damaged: it has no digest"):
        read_json(tmp_path / "a.json", "Run it again")
    write_json(tmp_path / "a.json", {"schema_version": "two"})
    with pytest.raises(DataError, match="its schema_version is 'two', no whole number"):
        read_json(tmp_path / "a.json", "Run it again")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 1}}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        "[1]",
        "1",
        "",
        "{",
        "\ufeff{}",
        '{"a": ' + "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_what_no_document_of_ours_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(
        DataError,
        match=r"a\.json is damaged: it is not JSON of ours \(.*\). Make it again to repair it",
    ):
        read_json(tmp_path / "a.json", "Make it again")


def test_any_change_of_what_a_document_says_is_seen(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2.5, None], "b": {"c": "x"}})
    whole = (tmp_path / "a.json").read_text()
    for old, new in (
        ("2.5", "2.50001"),
        ("1,", "1.0,"),
        ("null", "0"),
        ('"x"', '"X"'),
        ('"c"', '"d"'),
        ("1,", ""),
    ):
        (tmp_path / "a.json").write_text(whole.replace(old, new, 1))
        with pytest.raises(DataError, match="its content is not what its digest says"):
            read_json(tmp_path / "a.json", "Make it again")
    (tmp_path / "a.json").write_text(whole.replace("\n", "").replace("2.5", "2.50"))
    content = read_json(tmp_path / "a.json", "Make it again")
    assert content == {"schema_version": SCHEMA_VERSION, "a": [1, 2.5, None], "b": {"c": "x"}}


def test_a_table_is_one_input_while_it_says_the_same(tmp_path: Path) -> None:
    """A flip in Arrow's copy of the metadata changes no number, so the input stays the same.

    Otherwise an output would seem to come from other inputs.
    """
    path = tmp_path / "a.parquet"
    write_table(path, columns(), {"kind": "outcomes"})
    content, said = path.read_bytes(), content_identity(path)
    seen = {"same": 0, "damaged": 0}
    for place in range(len(content) - 1200, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            read_table(path, ())
        except ViLUError:
            seen["damaged"] += 1
        else:
            seen["same"] += 1
            assert content_identity(path) == said, place
    assert min(seen.values()) > 10


def test_a_folder_of_too_many_files_is_refused(tmp_path: Path) -> None:
    """A disk may be named by mistake. The walk ends early, and the message says what is wrong."""
    for name in ("a/b", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [entry[0] for entry in list_files(tmp_path, max_entries=3)] == ["a/b", "c"]
    with pytest.raises(UsageError, match=r"no document of vilu, and more than 2 files .* Check"):
        list_files(tmp_path, max_entries=2)
