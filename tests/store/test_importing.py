"""Arrays from other programs, imported as a store: the numbers must stay the same for every file
format, and nothing is used unchecked.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import clip_cache

import vilu
from tests.builders.array_files import NAMES, arrays, save
from vilu.embeddings.columns import IMAGE_COLUMNS
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.store import importing
from vilu.store.arrays import ArrayFiles
from vilu.store.importing import _read_targets, import_arrays
from vilu.store.inspect import inspect

LOOSE = pytest.mark.filterwarnings("ignore:.*not of unit norm")


NO_TEXT = np.arange(0x110000, 0x110000 + 30, dtype=np.uint32).view("U1")


def files(store: Path) -> dict[str, bytes]:
    """Return every file in a store except its lock, as bytes by path."""
    paths = (path for path in store.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


def imported(
    folder: Path, values: dict, name: str = "a.npz", **settings: object
) -> vilu.EmbeddingStore:
    return import_arrays(save(folder / name, values), folder / "store", **settings)


def test_names_of_one_hash_are_compared_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If names share a hash, all must be compared.

    Another name with the same hash may stand between two equal names.
    """
    monkeypatch.setattr(importing, "hash_names", lambda names: np.zeros(len([*names]), np.uint64))
    names = [f"name {row}" for row in range(30)]
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
    assert list(imported(tmp_path / "good", arrays(ids=np.array(names))).ids) == names
    names[28] = names[3]
    with pytest.raises(DataError, match="Rows 3 and 28 are both 'name 3'"):
        imported(tmp_path / "bad", arrays(ids=np.array(names)))


@pytest.mark.parametrize("name", ["a.npz", "folder"])
@pytest.mark.parametrize("part_size", [1, 7, 30, 1000])
def test_a_store_is_the_arrays(tmp_path: Path, name: str, part_size: int) -> None:
    values = arrays()
    store = imported(
        tmp_path, values, name, part_size=part_size, model="ViT-B/32", origin="a paper's code"
    )
    rows = torch.arange(30)
    assert torch.equal(store.image_rows(rows), torch.from_numpy(values["image"]))
    assert torch.equal(store.text, torch.from_numpy(values["text"]))
    assert store.target.tolist() == [max(label, -1) for label in values["target"]]
    assert store.outside.tolist() == [label == -2 for label in values["target"]]
    assert list(store.ids) == values["ids"].tolist()
    assert store.class_names == NAMES
    space = store.space
    assert (space.logit_scale, space.logit_bias, space.backbone, space.weights) == (
        50,
        -1,
        "ViT-B/32",
        None,
    )
    assert store.manifest.imported.source == "a paper's code"
    assert not inspect(tmp_path / "store", deep=True).problems
    memory = vilu.Embeddings(
        values["image"], values["text"], target=values["target"], logit_scale=50, logit_bias=-1
    )
    failures = [
        torch.cat([batch.failure for batch in data.batches(8)]).tolist() for data in (store, memory)
    ]
    assert failures[0] == failures[1]
    assert {1} == {
        failure for failure, label in zip(failures[0], values["target"], strict=True) if label == -2
    }


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    """Equal arrays must give equal bytes, from a file (packed or not) and from a folder.

    Only the source's name may differ.
    """
    made = []
    for place in ("one/a.npz", "two/a.npz", "three/a.npz"):
        (tmp_path / place).parent.mkdir()
        path = save(tmp_path / place, arrays(), packed=place.startswith("two"))
        made.append(import_arrays(path, path.parent / "store", part_size=7))
    assert files(made[0].path) == files(made[1].path) == files(made[2].path)
    folder = import_arrays(save(tmp_path / "folder", arrays()), tmp_path / "store", part_size=7)
    assert folder.manifest.fingerprint == made[0].manifest.fingerprint
    assert folder.manifest.content == made[0].manifest.content
    assert folder.folder_hash == made[0].folder_hash or folder.manifest.dataset == "folder"


def test_again_does_nothing_and_other_inputs_are_refused(tmp_path: Path) -> None:
    store = imported(tmp_path, arrays(), part_size=7)
    before = {path: path.stat().st_mtime_ns for path in sorted(store.path.rglob("*.npy"))}
    imported(tmp_path, arrays(), part_size=7)
    assert {path: path.stat().st_mtime_ns for path in sorted(store.path.rglob("*.npy"))} == before
    for changes, settings, told in (
        ({"seed": 1}, {}, "dataset_fingerprint"),
        ({}, {"outside": ["sea"]}, "outside"),
        ({}, {"model": "other"}, "space.backbone"),
        ({}, {"origin": "somebody"}, "imported.source"),
        ({}, {"logit_scale": 100.0}, "space.logit_scale"),
    ):
        with pytest.raises(ProvenanceError, match=told):
            imported(tmp_path, arrays(**changes), part_size=7, **settings)
    again = imported(tmp_path, arrays(seed=1), part_size=7, overwrite=True)
    assert again.ids[0] == "img/1-0.png"


def test_a_store_that_is_not_complete_names_what_began_it(tmp_path: Path) -> None:
    imported(tmp_path, arrays())
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"not complete\. Run the same `vilu import` again"):
        vilu.open_source(tmp_path / "store")


def test_a_part_that_is_lost_is_done_again(tmp_path: Path) -> None:
    store = imported(tmp_path, arrays(), part_size=7)
    whole = files(store.path)
    (store.path / "receipts/00002.json").unlink()
    (store.path / "manifest.json").unlink()
    with (store.path / "img_emb/img_emb_00001.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    imported(tmp_path, arrays(), part_size=7)
    assert files(store.path) == whole


@pytest.mark.parametrize("name", ["a.npz", "folder"])
def test_arrays_that_change_while_they_are_read_give_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The fingerprint must not be of other numbers than the rows."""
    source = save(tmp_path / name, arrays())
    begin_run = importing.begin_run

    def begin_and_change(*args: object, **settings: object) -> object:
        run = begin_run(*args, **settings)
        changed = source if source.is_file() else source / "image.npy"
        os.utime(changed, ns=(0, 0))
        return run

    with monkeypatch.context() as patched:
        patched.setattr(importing, "begin_run", begin_and_change)
        with pytest.raises(DataError, match=r"changed while it was read.*--overwrite"):
            import_arrays(source, tmp_path / "store", part_size=7)
    assert not list((tmp_path / "store/receipts").iterdir())
    assert len(import_arrays(source, tmp_path / "store", part_size=7)) == 30


def test_a_store_may_lie_in_the_folder_of_its_arrays(tmp_path: Path) -> None:
    """Making the store's folder changes the time of the arrays' folder, but no array."""
    source = save(tmp_path / "folder", arrays())
    os.utime(source, ns=(0, 0))
    assert len(import_arrays(source, source / "store", part_size=7)) == 30


def test_a_file_whose_status_cannot_be_read_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.npz", arrays(target=None))
    too_long = tmp_path / f"{'x' * 300}.npy"
    with pytest.raises(StorageError, match=r"cannot read .*: File name too long"):
        import_arrays(source, tmp_path / "store", files={"target": too_long})
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path == source and list((tmp_path / "store/receipts").glob("*")):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*a\.npz: Stale file handle"):
        import_arrays(source, tmp_path / "store", part_size=7)


def test_text_files_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", arrays(target=None))

    def refused(content: bytes, error: type[Exception] = DataError) -> str:
        (tmp_path / "labels.txt").write_bytes(content)
        with pytest.raises(error) as caught:
            import_arrays(source, tmp_path / "store", files={"target": tmp_path / "labels.txt"})
        return str(caught.value)

    assert "Save it as UTF-8, with an entry per line" in refused(b"caf\xe9\n" * 30)
    assert "Save numbers of classes as whole numbers in an .npy file" in refused(b"0\n" * 30)
    assert "Save numbers" not in refused(b"chair\n" * 30)
    assert "Got shape (0,)" in refused(b"")
    for place in (tmp_path, tmp_path / "nowhere.txt", source / "below.npy", "nul\0.npy"):
        with pytest.raises(UsageError, match="is no file"):
            import_arrays(source, tmp_path / "store", files={"target": place})


def test_a_file_that_may_not_be_read_is_not_called_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.npz", arrays())

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*a\.npz: Permission denied"):
        import_arrays(source, tmp_path / "store")


def test_what_is_not_known_stays_unknown(tmp_path: Path) -> None:
    values = arrays(target=None, ids=None)
    store = imported(tmp_path, values)
    assert set(store.target.tolist()) == {-1}
    assert not store.outside.any()
    assert list(store.ids) == [str(row) for row in range(30)]
    assert store.identified_by == ("embeddings",)
    assert store.space.anonymous
    assert store.manifest.folders is None
    memory = vilu.Embeddings(values["image"], values["text"])
    assert np.array_equal(store.identities("embeddings"), memory.identities("embeddings"))


def test_rows_that_fit_somewhere_are_known_again_by_their_numbers(tmp_path: Path) -> None:
    """If a model is scored on its fit rows, the rows must be recognized although they have no
    names.

    Only the vectors can show that the rows are the same.
    """
    store = imported(tmp_path, arrays(ids=None))
    seen = vilu.MCM().fit(store).predict_uncertainty(store)
    assert len(seen) == 30


@pytest.mark.parametrize("kind", ["<f2", ">f4", "<f8", ">f8", "<i4", "<i2"])
def test_numbers_of_any_type(tmp_path: Path, kind: str) -> None:
    values = arrays(image=np.eye(6, dtype=kind)[[0, 1, 2, 3, 4, 5] * 5])
    store = imported(tmp_path, values)
    assert store.manifest.dtype == ("float16" if kind == "<f2" else "float32")
    assert torch.equal(store.image_rows(torch.arange(6)), torch.eye(6))


def test_rows_are_brought_to_unit_norm_and_unusable_ones_set_aside(tmp_path: Path) -> None:
    image = arrays(200)["image"] * np.linspace(0.1, 9, 200)[:, None]
    image[3], image[150] = np.nan, 0
    values = arrays(200, image=image)
    with pytest.warns(
        UserWarning, match=r"19\d of 200 image rows are not of unit norm \(norms 0\.1 to 9\)"
    ):
        store = imported(tmp_path, values, part_size=64)
    assert store.manifest.errors == {"nonfinite": 1, "zero_norm": 1}
    assert len(store) == 198
    assert torch.allclose(
        store.image_rows(torch.arange(198)).norm(dim=1), torch.ones(198), atol=1e-6
    )
    assert not inspect(store.path, deep=True).problems
    (tmp_path / "two").mkdir()
    with (
        pytest.raises(DataError, match="2 of 200 images"),
        pytest.warns(UserWarning, match="unit norm"),
    ):
        imported(tmp_path / "two", values, max_error_rate=0.0)


def test_numbers_of_rows_without_names_have_gaps(tmp_path: Path) -> None:
    image = arrays()["image"]
    image[4] = 0
    store = imported(tmp_path, arrays(image=image, ids=None), max_error_rate=0.5)
    assert list(store.ids)[3:6] == ["3", "5", "6"]


def test_columns_come_too(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    unit = lambda *shape: (  # noqa: E731
        (rows := generator.standard_normal(shape)) / np.linalg.norm(rows, axis=-1, keepdims=True)
    )
    columns = {
        "features": generator.standard_normal((30, 9)),
        "views": unit(30, 3, 6),
        "prompts": unit(4, 2, 6),
        "text_features": generator.standard_normal((4, 9)),
        "image_projection": generator.standard_normal((6, 9)),
        "text_projection": generator.standard_normal((6, 9)),
        "negatives": unit(11, 6),
        "second_image": generator.standard_normal((30, 4)),
        "second_text": generator.standard_normal((4, 4)),
    }
    store = imported(tmp_path, arrays(**columns), part_size=7)
    assert store.columns == columns.keys()
    for name, values in columns.items():
        found = store.column(name, torch.arange(30 if name in IMAGE_COLUMNS else 4))
        assert torch.allclose(found, torch.from_numpy(values).float(), atol=1e-6), name
    report = inspect(store.path, deep=True)
    assert not report.problems
    assert "columns      features 9, views 3 x 6, second_image 4, prompts 4 x 2 x 6, " in str(
        report
    )
    assert "negatives 11 x 6" in str(report)


def test_other_names(tmp_path: Path) -> None:
    values = arrays()
    values["text_single"], values["labels"] = values["text"][::-1].copy(), values.pop("target")
    store = imported(tmp_path, values, keys={"text": "text_single", "target": "labels"})
    assert torch.equal(store.text, torch.from_numpy(values["text_single"]))
    assert store.target.max() == 3


def test_labels_may_be_names(tmp_path: Path) -> None:
    labels = np.array(["dog", "", "chair", "cat", "table"] * 6)
    store = imported(tmp_path, arrays(target=labels), outside=["chair", "table"])
    assert store.target.tolist() == [1, -1, -1, 0, -1] * 6
    assert store.outside.tolist() == [False, False, True, False, True] * 6
    with pytest.raises(DataError, match="the label 'table', which is no class"):
        imported(tmp_path, arrays(target=labels), outside=["chair"], overwrite=True)


def test_a_class_is_outside(tmp_path: Path) -> None:
    """If a class is out of distribution, its text must go and its rows must have no class.

    The classes after it move up by one.
    """
    values = arrays(target=np.arange(30) % 4, prompts=np.tile(np.eye(6)[:2], (4, 1, 1)))
    store = imported(tmp_path, values, outside=["dog"])
    assert store.class_names == ("cat", "cup", "sea")
    assert torch.equal(store.text, torch.from_numpy(values["text"][[0, 2, 3]]))
    assert store.target.tolist() == ([0, -1, 1, 2] * 8)[:30]
    assert store.outside.tolist() == ([False, True, False, False] * 8)[:30]
    assert len(store.column("prompts", torch.arange(3))) == 3


def test_a_class_without_a_text_is_outside(tmp_path: Path) -> None:
    values = arrays(target=np.arange(30) % 5, class_names=np.array(["cat", "nothing", *NAMES[1:]]))
    store = imported(tmp_path, values, outside=["nothing"])
    assert store.class_names == NAMES
    assert store.target.tolist() == [0, -1, 1, 2, 3] * 6
    assert store.outside.tolist() == [False, True, False, False, False] * 6


def test_a_label_beyond_the_classes_is_outside(tmp_path: Path) -> None:
    store = imported(tmp_path, arrays(target=np.array([0, 9, -1, 3, -5] * 6)), outside=["9", "-5"])
    assert store.target.tolist() == [0, -1, -1, 3, -1] * 6
    assert store.outside.tolist() == [False, True, False, False, True] * 6


@pytest.mark.parametrize(
    ("changes", "settings", "kind", "told"),
    [
        (
            {"logit_scale": None},
            {},
            UsageError,
            "Give --logit-scale: OpenAI's CLIP has --logit-scale 100 --lo",
        ),
        ({"logit_bias": None}, {}, UsageError, "have no logit_bias"),
        ({"logit_scale": np.ones(2)}, {}, DataError, "must be one number"),
        ({"logit_scale": np.float32(-3)}, {}, UsageError, "positive"),
        ({"image": None}, {}, DataError, "no array 'image'; it has '"),
        ({"text": None}, {}, DataError, "no array 'text'"),
        ({}, {"keys": {"text": "nothing"}}, DataError, "no array 'nothing'"),
        (
            {},
            {"keys": {"nothing": "text"}},
            UsageError,
            "'nothing' is no array that is imported",
        ),
        ({"class_names": None}, {}, UsageError, "--classes FILE"),
        ({"class_names": np.array(NAMES[:3])}, {}, DataError, "one class name per row of text"),
        ({"class_names": np.array(["cat", "dog", " ", "sea"])}, {}, DataError, "blank"),
        (
            {"class_names": np.array(["cat", "dog", "cat", "sea"])},
            {},
            DataError,
            "one name must have one text",
        ),
        ({"class_names": np.array([*NAMES], dtype=object)}, {}, DataError, "Python objects"),
        ({"class_names": np.arange(4.0)}, {}, DataError, "must hold texts"),
        ({"class_names": np.array([b"\xff", b"a", b"b", b"c"])}, {}, DataError, "damaged"),
        ({"ids": np.array(["a\ud800"] * 30)}, {}, DataError, "0xd800 is no character"),
        ({"ids": NO_TEXT}, {}, DataError, "0x110000 is no char"),
        ({"ids": np.array(["a"] * 30)}, {}, DataError, "Rows 0 and 1 are both 'a'"),
        ({"ids": np.arange(29)}, {}, DataError, "one entry per image row"),
        ({"target": np.arange(30)}, {}, DataError, "must be a row of text, 0 to 3"),
        ({"target": np.full(30, 2**64 - 1, np.uint64)}, {}, DataError, "must be a row of text"),
        ({"target": np.full(30, -3)}, {}, DataError, "must be a row of text"),
        ({"target": np.zeros(30)}, {}, DataError, "one whole number per row"),
        ({"target": np.zeros(29, int)}, {}, DataError, "one entry per image row"),
        ({"target": np.zeros((30, 1), int)}, {}, DataError, "one whole number per row"),
        ({"image": np.zeros((30, 6), complex)}, {}, DataError, "matrix"),
        ({"image": np.zeros((30, 6, 1), "f4")}, {}, DataError, "matrix"),
        ({"image": np.zeros((30, 0), "f4")}, {}, DataError, "matrix"),
        ({"image": np.asfortranarray(np.eye(30, 6))}, {}, DataError, "Fortran"),
        ({"image": np.eye(30, 7)}, {}, DataError, "share one width"),
        ({"text": np.zeros((4, 6))}, {}, DataError, "non-zero norm"),
        ({"text": np.full((4, 6), np.inf)}, {}, DataError, "finite"),
        (
            {"text": np.zeros((0, 6)), "class_names": np.array([], "U1")},
            {},
            DataError,
            "candidates",
        ),
        ({"negatives": np.eye(3, 5)}, {}, DataError, "negatives"),
        ({"prompts": np.tile(np.eye(6)[:2], (3, 1, 1))}, {}, DataError, "prompts"),
        ({"views": np.tile(np.eye(5)[:2], (30, 1, 1))}, {}, DataError, "width"),
        ({"features": np.zeros((30, 0))}, {}, DataError, "features"),
        ({"text_features": np.full((4, 2), np.nan)}, {}, DataError, "finite"),
        (
            {},
            {"outside": ["cow"]},
            UsageError,
            "no class or label 'cow' for --outside. Classes are 'cat', 'dog'",
        ),
        ({}, {"outside": ["2"]}, UsageError, "no class or label '2'"),
        ({}, {"outside": list(NAMES)}, UsageError, "At least one must be left"),
        ({}, {"part_size": 0}, UsageError, "part_size"),
        ({}, {"class_names": ["a", "b"]}, DataError, "one class name per row"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    tmp_path: Path, changes: dict, settings: dict, kind: type[Exception], told: str
) -> None:
    for name in ("a.npz", "folder"):
        with pytest.raises(kind, match=told):
            imported(tmp_path, arrays(**changes), name, **settings)
    assert not (tmp_path / "store").exists()


def test_labels_as_arrays_name_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="labels beyond the classes are 9"):
        imported(tmp_path, arrays(target=np.array([0, 9, 1] * 10)), outside=["8"])


def raw(shape: str, kind: str = "<f4", content: bytes = b"") -> bytes:
    """Return a ``.npy`` file with this header."""
    header = (
        f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117)
        + b"\n"
    )
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (raw("(30, 6)", content=bytes(700)), "header says float32 of shape"),
        (raw("(30, 6)", content=bytes(721)), "header says float32 of shape"),
        (raw("(10**9, 6)"), "damaged"),
        (raw("(1000000000000000000, 512)"), "header says"),
        (raw("(-30, -6)", content=bytes(720)), "header says"),
        (raw("(1000000000000000000,)", "<U0"), "header says"),
        (raw("(30, 6)", "|O", pickle.dumps(1)), "pickle"),
        (raw("(30, 6)", "<f4")[:40], "damaged"),
        (b"\x93NUMPY\x09\x00" + bytes(99), "damaged|version"),
        (b"", "damaged"),
        (b"not an array", "damaged"),
    ],
)
def test_a_hostile_array(tmp_path: Path, content: bytes, told: str) -> None:
    folder = save(tmp_path / "folder", arrays())
    (folder / "image.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays(image=None).items():
            buffer = io.BytesIO()
            np.save(buffer, values)
            archive.writestr(f"{name}.npy", buffer.getvalue())
        archive.writestr("image.npy", content)
    for path in (folder, tmp_path / "a.npz"):
        with pytest.raises(DataError, match=told) as caught:
            import_arrays(path, tmp_path / "store")
        assert "image" in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_hostile_file(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.npz", arrays(), packed=True).read_bytes()
    place = whole.index(b"image.npy") + 200  # inside the packed rows
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for content, told in (
        (flipped, "damaged"),
        (whole[: len(whole) // 2], "no .npz"),
        (b"PK", "no .npz"),
        (b"", "no"),
    ):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DataError, match=told):
            import_arrays(tmp_path / "a.npz", tmp_path / "store")
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("image.npy", raw("(0, 6)"))
        archive.writestr("image", raw("(0, 6)"))
    with pytest.raises(DataError, match="'image' twice"):
        import_arrays(tmp_path / "twice.npz", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        import_arrays(tmp_path / "empty", tmp_path / "store")
    with pytest.raises(UsageError, match="no file and no folder"):
        import_arrays(tmp_path / "nowhere", tmp_path / "store")
    os.mkfifo(tmp_path / "empty" / "image.npy")
    with pytest.raises(DataError, match="is no file"):
        import_arrays(tmp_path / "empty", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A zip bomb must be refused from its sizes alone.

    The bomb is 300 MB zeros in 300 kB. Embeddings that size would be read.
    """
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays(image=None).items():
            buffer = io.BytesIO()
            np.save(buffer, values)
            archive.writestr(f"{name}.npy", buffer.getvalue())
        with archive.open("image.npy", "w") as member:
            member.write(raw("(12500000, 6)"))
            for _ in range(300):
                member.write(bytes(10**6))
    with pytest.raises(DataError, match="Embeddings never compress so well"):
        import_arrays(tmp_path / "a.npz", tmp_path / "store")


def test_a_link_or_a_name_does_not_lead_elsewhere(tmp_path: Path) -> None:
    """A key must be a name in the folder, not a path."""
    save(tmp_path / "other", arrays())
    with pytest.raises(DataError, match=r"no array '\.\./other/text'"):
        imported(tmp_path, arrays(), "folder", keys={"text": "../other/text"})
    with pytest.raises(DataError, match=r"no array 'lables'.* give --key target=NAME"):
        imported(tmp_path, arrays(), "folder", keys={"target": "lables"})


LARGE = """
import resource, sys
from pathlib import Path
from vilu.store.importing import import_arrays
folder = Path(sys.argv[1])
import_arrays(folder / "small", folder / "one", part_size=4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_arrays(folder / "large", folder / "two", part_size=4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_a_large_folder_is_never_in_memory(tmp_path: Path) -> None:
    """An import must not hold a large folder in memory.

    The folder has 200 MiB and parts with 4 MiB. The memory may hold the labels and a few parts.
    """
    for name, n in (("small", 10_000), ("large", 200_000)):
        values = arrays(10, text=np.eye(4, 256, dtype=np.float32), image=None)
        folder = save(
            tmp_path / name, {**values, "target": np.zeros(n, np.int64), "ids": np.arange(n)}
        )
        shape = (n, 256)
        image = np.lib.format.open_memmap(
            folder / "image.npy", mode="w+", dtype=np.float32, shape=shape
        )
        for start in range(0, n, 10_000):
            image[start : start + 10_000] = np.eye(256, dtype=np.float32)[np.arange(10_000) % 256]
        del image
    words = [sys.executable, "-c", LARGE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60, done.stdout


def test_names_of_classes_are_read_by_blocks(tmp_path: Path) -> None:
    """Class names must be read in blocks.

    A long name makes the target array 8 MB, and one block is 64 kB.
    """
    n, names = 20_000, np.array([*"abc", "z" * 100])
    target = names[np.arange(n) % 4]
    path = save(tmp_path / "a.npz", {"target": target})
    with ArrayFiles(path, block_bytes=2**16) as arrays_there:
        stored = arrays_there.open("target")
        tracemalloc.start()
        labels = _read_targets(stored, n)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert labels.values[labels.index_of_row].tolist() == target.tolist()
    assert target.nbytes == 8_000_000
    assert (
        peak < 2_000_000
    )  # 8 bytes a row (twice while the pieces are joined), the zip's buffers, and a block


def test_a_few_shot_cache_is_a_store_of_splits_and_class_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few-shot cache from methods like Tip-Adapter must be imported with its splits and class
    means.

    The files have half precision, keys as columns and one-hot values.
    """
    draw = np.random.default_rng(0)
    unit = lambda rows: torch.nn.functional.normalize(  # noqa: E731
        torch.from_numpy(draw.normal(size=(rows, 8))).half(), dim=1
    )
    cache, names = tmp_path / "caches" / "dtd", tmp_path / "names.txt"
    cache.mkdir(parents=True)
    names.write_text("banded\nblotchy\nbraided\n")
    images, labels = (
        {"test": unit(9), "val": unit(6)},
        {"test": torch.arange(9) // 3, "val": torch.arange(6) // 2},
    )
    for split, rows in images.items():
        torch.save(rows, cache / f"{split}_f.pt")
        torch.save(labels[split], cache / f"{split}_l.pt")
    keys, of = unit(12), torch.arange(12) % 3
    torch.save(keys.T, cache / "keys_4shots.pt")
    torch.save(torch.nn.functional.one_hot(of).half(), cache / "values_4shots.pt")
    torch.save(torch.nn.Parameter(keys), cache / "keys_16shots.pt")
    torch.save({"keys": keys}, cache / "values_16shots.pt")
    heads = unit(3)
    np.save(tmp_path / "head.npy", heads.T.numpy())

    def run(output: str, *more: str) -> vilu.EmbeddingStore:
        given = [str(cache), "--classes", str(names), "-o", str(tmp_path / output), *more]
        monkeypatch.setattr(sys, "argv", ["clip_cache", *given])
        clip_cache.main()
        return vilu.EmbeddingStore(tmp_path / output)

    store = run("few", "--splits", "test,val", "--shots", "4")
    assert store.target.tolist() == [*labels["test"].tolist(), *labels["val"].tolist()]
    both = torch.cat([images["test"], images["val"]]).float()
    assert torch.allclose(
        store.image_rows(torch.arange(15)), both, atol=1e-3
    )  # one step in float16 below 1 is 5e-4
    means = [keys[of == one].float().mean(dim=0) for one in range(3)]
    assert torch.allclose(
        store.text, torch.stack([mean / mean.norm() for mean in means]), atol=1e-6
    )
    assert torch.allclose(
        run("head", "--texts", str(tmp_path / "head.npy")).text, heads.float(), atol=1e-3
    )
    np.save(tmp_path / "square.npy", unit(8).numpy())
    with pytest.raises(DataError, match=r"K not 8. Got \(8, 8\)"):
        run("square", "--texts", str(tmp_path / "square.npy"))
    with pytest.raises(DataError, match=r"values_16shots.pt must hold one tensor. Got dict"):
        run("other")
    torch.save(subprocess.Popen, cache / "values_4shots.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run("hostile", "--shots", "4")
