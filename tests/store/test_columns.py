"""Columns beside the embeddings: ``embed`` must keep them, and a store must serve and protect
them like the embeddings.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tests.builders.store_fakes import DIM, NAMES, FakeBackbone, dataset, tree
from tests.conftest import in_memory
from vilu.artifacts.disk import host_hash
from vilu.artifacts.documents import read_document, write_document, write_json
from vilu.datasets.images import decode_image
from vilu.embeddings.columns import COLUMNS, SECOND_MODEL_COLUMNS
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError, ViLUError
from vilu.store.embed import ExtraColumns, embed
from vilu.store.inspect import inspect
from vilu.store.manifest import StoredClasses, Views
from vilu.store.reader import EmbeddingStore

N, F, V = 23, 192, 3
BAD = {2: b"", 5: b"<html>", 14: b"x"}
PROMPTS = ("a {}.", "the {}!")
WORDS = ("teapot", "cloud", "cat")  # the last word is also a class
ALL = {"features": True, "views": V, "seed": 7, "prompts": PROMPTS, "negatives": WORDS}
HALF = 2**-11  # largest relative rounding error in float16


def run(output, backbone=None, data=None, extra=None, **settings):
    columns = ExtraColumns(**extra or {})
    data = dataset(N, bad=BAD) if data is None else data
    fixed = {"names": NAMES, "batch_size": 4, "part_size": 10, "max_error_rate": 0.5}
    return embed(data, backbone or FakeBackbone(), output, columns=columns, **fixed | settings)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "s"
    run(root, dtype="float32", extra=ALL)
    return root


@pytest.fixture
def root(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "s"))


def everything(store):
    rows = torch.arange(len(store))
    return {name: store.column(name, rows) for name in sorted(store.columns)}


def test_what_is_kept(original):
    store, backbone, data = EmbeddingStore(original), FakeBackbone(), dataset(N, bad=BAD)
    assert store.columns == set(COLUMNS) - SECOND_MODEL_COLUMNS
    kept = everything(store)
    assert all(values.dtype == torch.float32 for values in kept.values())
    good = [i for i in range(N) if i not in BAD]
    for row, i in enumerate(good):
        image = decode_image(data.blobs[i]).image
        assert torch.equal(kept["features"][row], backbone.preprocess(image).flatten())
        views = Views(n=V, seed=7).make_views(image, data.keys[i])
        expected = backbone.encode_images(
            torch.stack([backbone.preprocess(view) for view in views])
        )
        # One side uses batches with three views from one image, the other side uses four images
        # with a view each. The 192 products are summed in another order.
        torch.testing.assert_close(kept["views"][row], expected, rtol=1e-5, atol=1e-6)
    for k, name in enumerate(NAMES):
        assert torch.equal(
            kept["prompts"][k], backbone.encode_texts([p.replace("{}", name) for p in PROMPTS])
        )
    expected = backbone.encode_texts([f"a photo of a {word}." for word in WORDS])
    torch.testing.assert_close(
        kept["negatives"], expected, rtol=1e-6, atol=0
    )  # scaled to unit norm


def test_maps_lead_from_features_to_embeddings(original):
    store = EmbeddingStore(original)
    kept = everything(store)
    image = normalize(kept["features"] @ kept["image_projection"].T, dim=1)
    text = normalize(kept["text_features"] @ kept["text_projection"].T, dim=1)
    torch.testing.assert_close(
        image, store.image_rows(torch.arange(len(store))), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(text, store.text, rtol=1e-5, atol=1e-6)


def test_a_store_serves_columns_like_embeddings_in_memory(original):
    store = EmbeddingStore(original)
    memory = in_memory(store, torch.arange(len(store)))
    assert memory.columns == store.columns
    names = sorted(store.columns)
    for mine, theirs in zip(
        store.batches(8, columns=names), memory.batches(8, columns=names), strict=True
    ):
        for name in names:
            assert torch.equal(mine.columns[name], theirs.columns[name]), name
    index = torch.tensor([19, 0, 7, 7])  # from several parts, not in order
    assert torch.equal(store.column("views", index), everything(store)["views"][index])
    with pytest.raises(IndexError, match="0 to 19"):
        store.column("features", torch.tensor([20]))


def test_embeddings_are_those_of_a_store_without_columns(original, tmp_path):
    bare = run(tmp_path / "bare", dtype="float32")
    assert bare.columns == frozenset()
    with pytest.raises(DataError, match=r"no column 'views'.*vilu embed --views"):
        bare.column("views", torch.arange(2))
    mine, theirs = tree(original), tree(tmp_path / "bare")
    for name, content in theirs.items():
        assert mine[name] == content or name.endswith(".json"), name
    extra = {path.parent.name for path in map(Path, mine.keys() - theirs.keys())}
    assert extra == {"features", "views", "columns"}
    assert not [name for name in extra if (tmp_path / "bare" / name).exists()]


def test_half_precision_is_that_of_the_store(original, tmp_path):
    half, full = run(tmp_path / "h", extra=ALL), EmbeddingStore(original)
    for name in ("features", "views"):
        (part, *_) = sorted((tmp_path / "h" / name).iterdir())
        assert np.load(part).dtype == "<f2"
        torch.testing.assert_close(
            everything(half)[name], everything(full)[name], rtol=HALF, atol=1e-6
        )
    for name in ("prompts", "text_features", "image_projection", "text_projection", "negatives"):
        assert torch.equal(everything(half)[name], everything(full)[name])


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_views_do_not_depend_on_the_batches(original, tmp_path, batch_size):
    other = run(tmp_path / "s", dtype="float32", batch_size=batch_size, workers=1, extra=ALL)
    # The sum has 192 products below one, in another order.
    torch.testing.assert_close(
        everything(other)["views"], everything(EmbeddingStore(original))["views"], atol=1e-5, rtol=0
    )


def test_other_seeds_are_other_views(original, tmp_path):
    other = run(tmp_path / "s", dtype="float32", extra=ALL | {"seed": 8})
    same = torch.isclose(
        everything(other)["views"], everything(EmbeddingStore(original))["views"]
    ).all(dim=2)
    assert same.float().mean() < 0.2  # pictures with 20 x 18 pixels have few crops, so some repeat


def test_no_pass_is_larger_than_the_batch(tmp_path):
    backbone = FakeBackbone()
    run(tmp_path / "s", backbone, extra=ALL)
    once = [3, 3, 2, 4, 3, 2, 3]  # 4, 4, 2 | 4, 4, 2 | 3 positions less the bad ones
    assert backbone.batches == [size for size in once for _ in range(1 + V)]


def test_several_templates_have_no_text_features(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vilu")
    store = run(tmp_path / "s", extra={"features": True}, templates=("a {}.", "the {}."))
    assert store.columns == {"features", "image_projection", "text_projection"}
    assert "no text_features: a class text is a mean over 2 templates" in caplog.text


def test_maps_that_are_not_linear(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vilu")
    backbone = FakeBackbone()
    backbone.projections = None
    assert run(tmp_path / "s", backbone, extra={"features": True}).columns == {"features"}
    assert "the last maps of fake are not both linear" in caplog.text


@pytest.mark.parametrize(
    ("asked", "columns"),
    [
        ({"views": 1}, {"views"}),
        ({"prompts": ("{}",)}, {"prompts"}),
        ({"views": 2, "prompts": PROMPTS}, {"views", "prompts"}),
        ({"negatives": WORDS}, {"negatives"}),
    ],
)
def test_each_on_its_own(tmp_path, asked, columns):
    assert run(tmp_path / "s", extra=asked).columns == columns
    assert inspect(tmp_path / "s", deep=True).problems == []


def test_documents_name_them(original):
    run_document = json.loads((original / "run.json").read_text())
    assert run_document["features"] == F
    assert (run_document["views"]["n"], run_document["views"]["seed"]) == (V, 7)
    assert run_document["prompts"] == list(PROMPTS)
    assert run_document["negatives"] == list(WORDS)
    classes = json.loads((original / "classes.json").read_text())
    assert {name: info["shape"] for name, info in classes["columns"].items()} == {
        "prompts": [3, 2, DIM],
        "text_features": [3, DIM],
        "image_projection": [DIM, F],
        "text_projection": [DIM, DIM],
        "negatives": [3, DIM],
    }
    told = str(inspect(original))
    assert f"columns      features {F}, views {V} x {DIM}, " in told
    assert f"prompts 3 x 2 x {DIM}" in told
    assert f"negatives 3 x {DIM}" in told


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"features": False}, "features was 192 and is now None"),
        ({"views": 2}, "views.n was 3 and is now 2"),
        ({"seed": 8}, "views.seed was 7 and is now 8"),
        ({"views": 0}, "views.recipe was 'crop .*' and is now None"),
        ({"prompts": PROMPTS[:1]}, "prompts was .* and is now"),
        ({"negatives": WORDS[:2]}, "negatives was .* and is now"),
    ],
)
def test_they_are_part_of_what_a_store_is(root, change, field):
    before = tree(root)
    with pytest.raises(ProvenanceError, match=f"{field}.*--overwrite"):
        run(root, dtype="float32", extra=ALL | change)
    assert tree(root) == before


def test_a_store_without_them_is_not_resumed_with_them(tmp_path):
    run(tmp_path / "s")
    with pytest.raises(ProvenanceError, match=r"views\.n was None and is now 2"):
        run(tmp_path / "s", extra={"views": 2})


@pytest.mark.parametrize(
    "name",
    [
        "features/features_00001.npy",
        "views/views_00001.npy",
        "columns/prompts.npy",
        "columns/text_features.npy",
        "columns/negatives.npy",
    ],
)
@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_damage_is_found_and_mended(original, root, name, damage):
    content = (root / name).read_bytes()
    (root / name).unlink()
    if damage != "gone":
        (root / name).write_bytes(
            content[:-4] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1])
        )
    assert any(name in problem for problem in inspect(root, deep=True).problems)
    of_images = not name.startswith("columns")
    if of_images and damage == "changed":  # only --deep reads its bytes
        assert inspect(root).problems == []
        (root / "receipts/00001.json").unlink()
    else:
        with pytest.raises(StorageError, match=name):
            EmbeddingStore(root)
    backbone = FakeBackbone()
    run(root, backbone, dtype="float32", extra=ALL)
    assert (backbone.n_images, backbone.n_texts) == (
        (9 * (1 + V), 0) if of_images else (0, 3 + 3 * 2 + 3 + 3)
    )
    assert tree(root) == tree(original)


@pytest.mark.parametrize(
    ("name", "value", "fault"), [("features", np.nan, "finite"), ("views", 3.0, "of unit norm")]
)
def test_numbers_that_cannot_be(root, name, value, fault):
    path = root / f"{name}/{name}_00000.npy"
    rows = np.load(path)
    rows[4, -1] = value
    np.save(path, rows)
    problems = inspect(root, deep=True).problems
    assert any(f"1 rows from 0 to 7 that are not {fault}" in problem for problem in problems)


def change_classes(root, change):
    """Write another class table with a hash that agrees."""
    table = read_document(root / "classes.json", StoredClasses)
    forged = table.model_copy(update=change(table))
    write_document(root / "classes.json", forged.model_copy(update={"hash": forged.digest()}))


def test_documents_that_do_not_agree(root):
    change_classes(root, lambda table: {"prompts": ("another {}.", "the {}!")})
    with pytest.raises(ProvenanceError, match="holds other classes, templates or columns"):
        EmbeddingStore(root)


@pytest.mark.parametrize("shape", [(3, 2), (3, 3, DIM), (3, 1, 2 * DIM), (2, 2, DIM)])
def test_shapes_that_cannot_be(root, shape):
    change_classes(
        root,
        lambda table: {
            "columns": table.columns
            | {"prompts": table.columns["prompts"].model_copy(update={"shape": shape})}
        },
    )
    with pytest.raises(
        StorageError, match=r"classes\.json is damaged: it says that prompts is of shape"
    ):
        EmbeddingStore(root)


def test_no_column_leads_out_of_the_store(root):
    document = json.loads((root / "classes.json").read_text())
    document["columns"]["../../secret"] = document["columns"]["prompts"]
    write_json(root / "classes.json", document)
    with pytest.raises(StorageError, match=r"classes\.json is damaged: columns"):
        EmbeddingStore(root)


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_damage_ends_in_anything_but_an_error_of_ours(original, tmp_path, data):
    """If bytes in one file are replaced, the store must be refused with a ``ViLUError`` or be
    read in full.
    """
    root = tmp_path / "s"
    if not root.exists():
        shutil.copytree(original, root)
    name = data.draw(
        st.sampled_from(
            [n for n in tree(original) if not n.startswith(("img_emb", "metadata", "errors"))]
        )
    )
    content = bytearray((original / name).read_bytes())
    where = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(130, len(content)) - 1))
    junk = data.draw(
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([b"9", b"-1", b"99999999999", b"[", b'"'])
    )
    content[where : where + len(junk)] = junk
    (root / name).write_bytes(content)
    with suppress(ViLUError):
        assert everything(EmbeddingStore(root)).keys() == set(COLUMNS) - SECOND_MODEL_COLUMNS
    shutil.copy(original / name, root / name)


class Interrupted(FakeBackbone):
    def encode_images(self, pixels):
        if len(self.batches) == 5 * (1 + V) - 1:
            raise KeyboardInterrupt
        return super().encode_images(pixels)


def test_an_interrupt_keeps_the_parts(original, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", Interrupted(), dtype="float32", extra=ALL)
    assert [path.name for path in (tmp_path / "s/receipts").iterdir()] == ["00000.json"]
    backbone = FakeBackbone()
    run(tmp_path / "s", backbone, dtype="float32", extra=ALL)
    assert backbone.n_images == 12 * (1 + V)
    assert tree(tmp_path / "s") == tree(original)


@pytest.mark.parametrize("failing", range(0, 26, 3))
def test_a_full_disk_keeps_the_finished_parts(original, tmp_path, monkeypatch, failing):
    """If the disk is full, the finished parts must stay and the next run must do only the rest.

    The n-th file cannot be synced. The order is run.json, five class arrays, classes.json, then six
    files a part.
    """
    fsync, calls, root = os.fsync, iter(range(10**6)), tmp_path / "s"

    def full(descriptor):
        if next(calls) == 2 * failing:  # every other call is for the folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            run(root, dtype="float32", extra=ALL)
    assert not list(root.rglob("*.tmp"))
    backbone = FakeBackbone()
    run(root, backbone, dtype="float32", extra=ALL)
    assert backbone.n_images == [20, 12, 3, 0][max(0, failing - 7) // 6] * (1 + V)
    assert tree(root) == tree(original)


def test_leftovers_are_removed_and_overwriting_leaves_nothing(original, root):
    nobody = f"{host_hash()}.{10**30}.0123abcd"  # no process has this number
    leftovers = [root / f"{name}/.{name}_00000.npy.{nobody}.tmp" for name in ("features", "views")]
    leftovers.append(root / f"columns/.prompts.npy.{nobody}.tmp")
    for path in leftovers:
        path.write_bytes(b"half")
    run(root, dtype="float32", extra=ALL)
    assert tree(root) == tree(original)
    run(root, overwrite=True)
    assert not [name for name in ("features", "views", "columns") if (root / name).exists()]


def test_room_on_the_disk_is_for_all_of_it(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = int(N * 2 * (DIM + F + V * DIM) * 1.05)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, needed - 1))
    with pytest.raises(StorageError, match="23 embeddings need"):
        run(tmp_path / "s", extra=ALL)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, needed))
    run(tmp_path / "s", extra=ALL)


class Loud(FakeBackbone):
    def encode_images_and_features(self, pixels):
        rows, features = super().encode_images_and_features(pixels)
        return rows, 1e6 * features


def test_features_beyond_the_number_format(tmp_path):
    with pytest.raises(
        DataError, match=r"features has numbers beyond the range of float16.*--dtype float32"
    ):
        run(tmp_path / "h", Loud(), extra={"features": True})
    run(tmp_path / "f", Loud(), extra={"features": True}, dtype="float32")


class Dark(FakeBackbone):
    """A backbone whose outputs cannot be used.

    The second pass in every batch (the first views) starts with a zero embedding. Every feature 0
    is NaN.
    """

    def encode_images(self, pixels):
        rows = super().encode_images(pixels)
        if len(self.batches) % 3 == 2:
            rows[0] = 0
        return rows

    def encode_images_and_features(self, pixels):
        rows, features = super().encode_images_and_features(pixels)
        features = features.clone()
        features[1] = float("nan")
        return rows, features


def test_an_image_without_a_usable_view_or_feature_is_an_error(tmp_path):
    store = run(
        tmp_path / "s",
        Dark(),
        dataset(20),
        extra={"features": True, "views": 2},
        max_error_rate=0.6,
    )
    assert store.manifest.errors == {"nonfinite": 6, "zero_norm": 6}  # 4, 4, 2 | 4, 4, 2
    assert list(store.ids) == [f"img/{i:04d}.png" for i in (2, 3, 6, 7, 12, 13, 16, 17)]
    assert inspect(tmp_path / "s", deep=True).problems == []
    plain = run(tmp_path / "plain", data=dataset(20), extra={"features": True, "views": 2})
    rows = torch.tensor([2, 3, 6, 7, 12, 13, 16, 17])
    assert torch.equal(everything(store)["features"], plain.column("features", rows))


class Narrow(FakeBackbone):
    def encode_images_and_features(self, pixels):
        rows, features = super().encode_images_and_features(pixels)
        return rows, features[:, :100]


def test_a_model_that_is_not_what_it_says(tmp_path):
    with pytest.raises(ProvenanceError, match=r"features of shape \(2, 100\).*width 192"):
        run(tmp_path / "s", Narrow(), dataset(2), extra={"features": True})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"views": -1}, r"views\.n"),
        ({"prompts": "ensemble"}, "prompts"),
        ({"prompts": ("no place",)}, "exactly one {}"),
    ],
)
def test_settings_that_cannot_be(tmp_path, asked, message):
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "s", extra=asked)
    assert not (tmp_path / "s/run.json").exists()


def test_a_repeated_word_counts_once_and_none_is_blank(tmp_path):
    store = run(tmp_path / "s", extra={"negatives": ("cloud", "teapot", "cloud")})
    assert store.manifest.negatives == ("cloud", "teapot")
    assert store.column("negatives", torch.arange(1)).shape == (2, DIM)  # not by rows
    with pytest.raises(DataError, match="names must not be blank"):
        run(tmp_path / "t", extra={"negatives": ("cloud", " ")})


def test_an_empty_data_set(tmp_path):
    with pytest.warns(UserWarning, match="has no images"):
        store = run(tmp_path / "s", data=dataset(0), extra=ALL)
    nothing = torch.arange(0)
    assert store.column("features", nothing).shape == (0, F)
    assert store.column("views", nothing).shape == (0, V, DIM)
    assert store.column("prompts", nothing).shape == (3, 2, DIM)
