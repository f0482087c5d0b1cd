"""A store's documents: the fields under the fingerprint, and how documents are read as untrusted
input.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilu.artifacts.documents import MAX_DOCUMENT_BYTES, read_document, write_document, write_json
from vilu.artifacts.hashing import digest
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import ProvenanceError, StorageError, ViLUError
from vilu.store.ledger import FileInfo
from vilu.store.manifest import MAX_PARTS, Manifest, Receipt, Run, StoredClasses, StoreInputs
from vilu.store.parts import plan_parts, possible_positions

SPACE = EmbeddingSpace(
    8, 100, backbone="b", weights="w", preprocess="p", tokenizer="t", precision="fp32"
)
FIELDS = {
    "dataset_fingerprint": "d",
    "n_in": 25,
    "split": None,
    "space": SPACE,
    "names": ("a", "b"),
    "folders": None,
    "templates": ("{}",),
    "limits": {"min_side": 8, "max_aspect": 20.0},
    "part_size": 10,
    "dtype": "float16",
}


def make_run(**changes):
    inputs = StoreInputs(**FIELDS | changes)
    return Run(
        **dict(inputs), fingerprint=digest(inputs.fingerprint_fields()), dataset="pets", vilu="1"
    )


CHANGES = [
    {"dataset_fingerprint": "e"},
    {"n_in": 26},
    {"split": "test"},
    {"names": ("b", "a")},
    {"folders": ("x", "y")},
    {"templates": ("{}.",)},
    {"limits": {"min_side": 9, "max_aspect": 20.0}},
    {"part_size": 11},
    {"dtype": "float32"},
    *(
        {"space": replace(SPACE, **{name: value})}
        for name, value in [
            ("embed_dim", 9),
            ("logit_scale", 99.0),
            ("logit_bias", 1.0),
            ("backbone", "x"),
            ("weights", "x"),
            ("preprocess", "x"),
            ("tokenizer", "x"),
            ("precision", "bf16"),
        ]
    ),
    {"features": 12},
    {"features": 13},
    {"views": {"n": 2}},
    {"views": {"n": 3}},
    {"views": {"n": 2, "seed": 1}},
    {"prompts": ("a {}.",)},
    {"prompts": ("a {}.", "the {}.")},
    {"negatives": ("cloud",)},
    {"negatives": ("cloud", "sea")},
    {"captions": True, "names": (), "templates": ()},
    {"names": (), "templates": ()},
    {"shards": 3},
    {"shards": 4},
    {"outside": ("moth",)},
    {"outside": ("fly", "moth")},
    *(
        {"imported": {"ids": False, **change}}
        for change in [
            {},
            {"ids": True},
            {"source": "a page"},
            {"columns": {"features": (3,)}},
            {"columns": {"views": (2, 8)}},
        ]
    ),
]


def test_every_input_changes_the_fingerprint_and_nothing_else_does():
    fingerprints = {make_run(**change).fingerprint for change in [{}, *CHANGES]}
    assert len(fingerprints) == 1 + len(CHANGES)
    changed = {name for change in CHANGES for name in change}
    assert changed == set(StoreInputs.model_fields) - {"schema_version"}
    run = make_run()
    assert (
        run.model_copy(update={"vilu": "2", "dataset": "moved"}).fingerprint_fields()
        == run.fingerprint_fields()
    )


def test_how_many_images_shards_hold_is_no_input():
    """The number of images in shards must not change the fingerprint.

    Only reading shows this number, so the run says 0 and the manifest says the counted number.
    """
    run, counted = make_run(shards=7, n_in=0), make_run(shards=7, n_in=1234)
    assert run.fingerprint == counted.fingerprint
    assert [(part.start, part.stop) for part in plan_parts(make_run(shards=23))] == [
        (0, 10),
        (10, 20),
        (20, 23),
    ]
    assert possible_positions(run, plan_parts(run)[0]) == range(7 * 2**32)
    assert possible_positions(make_run(), plan_parts(make_run())[2]) == range(20, 25)


def test_documents_survive_json(tmp_path):
    run = make_run()
    write_document(tmp_path / "run.json", run)
    assert read_document(tmp_path / "run.json", Run) == run
    info = FileInfo(bytes=1, sha256="0" * 64)
    table = StoredClasses.from_files(run, info)
    write_document(tmp_path / "classes.json", table)
    assert read_document(tmp_path / "classes.json", StoredClasses) == table
    assert StoredClasses.from_files(make_run(names=("a", "c")), info).hash != table.hash


def test_whole_numbers_and_floats_are_one():
    ten, ten_float = replace(SPACE, logit_scale=10), replace(SPACE, logit_scale=10.0)
    runs = [json.loads(make_run(space=space).model_dump_json()) for space in (ten, ten_float)]
    assert Run(**runs[0]).fingerprint == Run(**runs[1]).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"schema_version": 2}', "it has no digest"),
        (b'{"schema_version": "one"}', "schema_version"),
    ],
)
def test_damaged_documents(tmp_path, content, message):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(
        StorageError, match=rf"run.json is damaged: .*{message}|run.json is {message}"
    ):
        read_document(tmp_path / "run.json", Run)


def write_altered(path, **changes):
    write_json(path, make_run().model_dump(mode="json") | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_in": 24}, "fingerprint does not match the inputs"),
        ({"n_in": -1}, "n_in"),
        ({"n_in": 10 * MAX_PARTS + 1}, "more than 1000000 parts of 10000001 images"),
        ({"shards": 10 * MAX_PARTS + 1}, "more than 1000000 parts of 10000001 shards"),
        ({"captions": True}, "with captions there are no classes"),
        ({"space": {"embed_dim": -1, "logit_scale": 1}}, "embed_dim must be at least 0"),
        ({"extra": 1}, "extra"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_documents_with_impossible_values(tmp_path, changes, message):
    write_altered(tmp_path / "run.json", **changes)
    with pytest.raises(StorageError, match=rf"run.json is damaged: .*{message}"):
        read_document(tmp_path / "run.json", Run)


def test_nan_in_a_document(tmp_path):
    write_altered(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text.replace("100.0", "NaN"))
    with pytest.raises(StorageError, match="damaged"):
        read_document(tmp_path / "run.json", Run)


def test_another_schema_is_named(tmp_path):
    write_altered(tmp_path / "run.json", schema_version=3, something_new=1)
    with pytest.raises(ProvenanceError, match="schema version 3, this vilu reads 2"):
        read_document(tmp_path / "run.json", Run)


def test_a_huge_document_is_not_read(tmp_path):
    write_altered(tmp_path / "run.json")
    os.truncate(tmp_path / "run.json", MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(StorageError, match=f"larger than {MAX_DOCUMENT_BYTES} bytes"):
        read_document(tmp_path / "run.json", Run)


def test_a_folder_or_nothing_in_place_of_a_document(tmp_path):
    (tmp_path / "run.json").mkdir()
    for name in ("run.json", "nothing.json"):
        with pytest.raises(StorageError, match=f"{name} is missing"):
            read_document(tmp_path / name, Run)


@pytest.mark.parametrize("kind", [Receipt, Manifest])
def test_counts_must_add_up(tmp_path, kind):
    counts = {"n_in": 25, "n_ok": 20, "n_error": 5, "errors": {"truncated": 4}}
    own = {"part": 0, "start": 0, "stop": 25, "files": {}, "batch_size": 1}
    own |= {"fingerprint": "f"}
    if kind is Manifest:
        own = json.loads(make_run().model_dump_json()) | {
            "parts": 3,
            "classes": "c",
            "content": "c",
        }
    path = tmp_path / "document.json"
    write_json(path, own | counts)
    with pytest.raises(StorageError, match="n_in=25 is not n_ok=20 plus n_error=5"):
        read_document(path, kind)
    write_json(path, own | counts | {"errors": {"truncated": 4, "empty": 1}})
    assert read_document(path, kind).n_ok == 20


def test_differences_name_both_sides(tmp_path):
    other = make_run(templates=("x" * 500,), space=replace(SPACE, weights="v"))
    with pytest.raises(
        ProvenanceError, match=r"space.weights was 'w' and is now 'v'; templates was \['{}'\]"
    ) as caught:
        make_run().require_match(other, tmp_path)
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))


def test_other_image_files_are_explained(tmp_path):
    other = make_run(dataset_fingerprint="e")
    with pytest.raises(ProvenanceError, match=r"other names.*sizes or modification times.*`cp -p`"):
        make_run().require_match(other, tmp_path)
    with pytest.raises(ProvenanceError) as caught:
        make_run().require_match(make_run(part_size=7), tmp_path)
    assert "cp -p" not in str(caught.value)


@given(n=st.integers(0, 300), size=st.integers(1, 50))
def test_parts_cover_every_image_once(n, size):
    parts = plan_parts(make_run(n_in=n, part_size=size))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    assert all(len(part) == size for part in parts[:-1])
    assert [part.number for part in parts] == list(range(len(parts)))


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_content_ends_in_anything_but_an_error_of_ours(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(content)
    with pytest.raises(ViLUError, match=r"fuzz\.json"):
        read_document(path, Run)
