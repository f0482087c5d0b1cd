"""Stores for images with captions: rows, errors, flags and refusals."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.builders.store_fakes import DIM, MAX_WORDS, NAMES, FakeBackbone, dataset, picture, tree
from vilu.datasets.images import BadImage, ImageFlag, decode_image
from vilu.errors import DataError, UsageError
from vilu.store.embed import ExtraColumns, embed
from vilu.store.inspect import inspect
from vilu.store.pipeline import TEXT_TRUNCATED
from vilu.store.reader import CaptionStore, EmbeddingStore

SETTINGS = {"batch_size": 4, "part_size": 10}
N = 23


def captioned(n=N, **changes):
    data = dataset(n, unlabelled=range(n))
    data.class_names = None
    data.captions = [f"picture number {i}" for i in range(n)]
    for i, caption in changes.get("captions", {}).items():
        data.captions[i] = caption
    for i, blob in changes.get("bad", {}).items():
        data.blobs[i] = blob
    return data


def run(data, output, backbone=None, **settings):
    return embed(data, backbone or FakeBackbone(), output, **SETTINGS | settings)


def by_hand(data, part, dtype):
    """Return the embeddings for a part's images and captions, encoded in the same batches as in
    ``embed``.
    """
    backbone, images, texts = FakeBackbone(), [], []
    stop = min(len(data), 10 * part + 10)
    for start in range(10 * part, stop, 4):
        batch = range(start, min(start + 4, stop))
        images.append(
            backbone.encode_images(
                torch.stack([backbone.preprocess(decode_image(data.blobs[i]).image) for i in batch])
            )
        )
        texts.append(backbone.encode_texts([data.captions[i] for i in batch]))
    return torch.cat(images).numpy().astype(dtype), torch.cat(texts).numpy().astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_a_store_holds(tmp_path, dtype):
    data = captioned()
    store = run(data, tmp_path, dtype=dtype)
    for part in range(3):
        images, texts = by_hand(data, part, dtype)
        np.testing.assert_array_equal(np.load(tmp_path / f"img_emb/img_emb_{part:05d}.npy"), images)
        np.testing.assert_array_equal(
            np.load(tmp_path / f"text_emb/text_emb_{part:05d}.npy"), texts
        )
        metadata = pq.read_table(tmp_path / f"metadata/metadata_{part:05d}.parquet").to_pydict()
        assert metadata["caption"] == data.captions[10 * part : 10 * part + 10]
        assert set(metadata["label"]) == {None}
    assert isinstance(store, CaptionStore)
    assert list(store.ids) == data.keys


def test_there_are_no_classes(tmp_path):
    tmp_path = tmp_path / "s"
    run(captioned(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["names"], manifest["templates"], manifest["classes"]) == ([], [], "")
    assert manifest["captions"] is True
    assert not (tmp_path / "classes.json").exists()
    with pytest.raises(DataError, match="captions"):
        EmbeddingStore(tmp_path)
    for deep in (False, True):
        report = inspect(tmp_path, deep=deep)
        assert (report.sealed, report.problems, report.n_ok) == (True, [], N)
        assert "captions     one per image" in str(report)
        assert "classes" not in str(report)


BROKEN = {
    "missing_caption": None,
    "empty_text": BadImage("the caption is blank", stage="text", kind="empty_text"),
    "bad_text": BadImage("the caption must be UTF-8", stage="text", kind="bad_text"),
    "read_error": PermissionError(13, "Permission denied"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_caption_is_an_error_of_its_image(tmp_path, kind):
    data, backbone = captioned(captions={5: BROKEN[kind]}), FakeBackbone()
    store = run(data, tmp_path, backbone, max_error_rate=0.1)
    assert (store.manifest.n_ok, store.manifest.errors) == (N - 1, {kind: 1})
    (error,) = pq.read_table(tmp_path / "errors/errors_00000.parquet").to_pylist()
    assert (error["position"], error["stage"], error["kind"]) == (5, "text", kind)
    assert error["bytes"] == len(data.blobs[5])  # the image's size, since the image was read
    assert backbone.batches[:3] == [4, 3, 2]  # a position with an error stays empty
    assert inspect(tmp_path, deep=True).problems == []


def test_a_bad_image_is_an_error_of_its_caption(tmp_path):
    data, backbone = (
        captioned(bad={5: b"", 6: picture(6)[:200]}, captions={6: None}),
        FakeBackbone(),
    )
    store = run(data, tmp_path, backbone, max_error_rate=0.1)
    assert store.manifest.errors == {"empty": 1, "truncated": 1}  # the image's error comes first
    assert backbone.n_texts == N - 2
    texts = np.load(tmp_path / "text_emb/text_emb_00000.npy")
    good = FakeBackbone().encode_texts([data.captions[i] for i in range(10) if i not in {5, 6}])
    np.testing.assert_array_equal(texts, good.numpy().astype(np.float16))


def test_strict_stops_at_a_bad_caption(tmp_path):
    with pytest.raises(DataError, match=r"img/0005.png: bad_text in stage text"):
        run(captioned(captions={5: BROKEN["bad_text"]}), tmp_path, on_error="raise")


class Mute(FakeBackbone):
    def encode_texts(self, texts):
        rows = super().encode_texts(texts)
        for i, text in enumerate(texts):
            if text.endswith(" 3"):
                rows[i] = 0
            elif text.endswith(" 4"):
                rows[i] = float("nan")
        return rows


def test_captions_without_direction_become_errors(tmp_path):
    store = run(captioned(), tmp_path, Mute(), max_error_rate=0.1)
    assert store.manifest.errors == {"nonfinite": 1, "zero_norm": 1}
    errors = pq.read_table(tmp_path / "errors/errors_00000.parquet").to_pydict()
    assert (errors["position"], errors["kind"]) == ([3, 4], ["zero_norm", "nonfinite"])
    assert inspect(tmp_path, deep=True).problems == []


def test_captions_that_are_cut_off_are_flagged(tmp_path):
    """The flag must be set also if the row before has no embedding, and beside the image's own
    flags.
    """
    just, long = " ".join(["word"] * MAX_WORDS), " ".join(["word"] * (MAX_WORDS + 1))
    data = captioned(10, captions={0: just, 1: long, 4: "cut short 3", 5: long})
    data.blobs[5] = rgba = picture_with_alpha()
    run(data, tmp_path, Mute(), max_error_rate=0.5)
    metadata = pq.read_table(tmp_path / "metadata/metadata_00000.parquet").to_pydict()
    flags = dict(zip(metadata["position"], metadata["flags"], strict=True))
    assert int(decode_image(rgba).flags) == ImageFlag.ALPHA
    assert {i for i, flag in flags.items() if flag} == {1, 5}
    assert (flags[1], flags[5]) == (TEXT_TRUNCATED, TEXT_TRUNCATED | ImageFlag.ALPHA)
    assert max(ImageFlag) < TEXT_TRUNCATED < 2**31  # its own bit, within the column's type


def picture_with_alpha():
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def test_features_and_views_are_of_the_images(tmp_path):
    data = captioned()
    store = run(data, tmp_path, columns=ExtraColumns(features=True, views=2))
    assert store.columns == {"features", "views"}
    assert np.load(tmp_path / "features/features_00001.npy").shape == (10, 192)
    assert np.load(tmp_path / "views/views_00001.npy").shape == (10, 2, DIM)
    assert not (tmp_path / "columns").exists()
    assert inspect(tmp_path, deep=True).problems == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"names": NAMES}, "names"),
        ({"templates": ("a {}.",)}, "templates"),
        ({"columns": ExtraColumns(prompts=("a {}.",)), "names": NAMES}, "names, prompts"),
        ({"columns": ExtraColumns(negatives=("sea",))}, "negatives"),
    ],
)
def test_classes_are_refused(tmp_path, settings, named):
    with pytest.raises(
        UsageError, match=rf"captions, which are the candidates.*Leave out {named},"
    ):
        run(captioned(), tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


def test_a_lost_text_file_costs_its_part(tmp_path):
    data, backbone = captioned(), FakeBackbone()
    run(data, tmp_path)
    before = tree(tmp_path)
    (tmp_path / "text_emb/text_emb_00001.npy").unlink()
    run(data, tmp_path, backbone)
    assert (backbone.n_images, backbone.n_texts) == (10, 10)
    assert tree(tmp_path) == before


def test_every_row_of_the_text_file_is_looked_at(tmp_path):
    run(captioned(), tmp_path)
    content = bytearray((tmp_path / "text_emb/text_emb_00001.npy").read_bytes())
    content[-1] ^= 0x7C
    (tmp_path / "text_emb/text_emb_00001.npy").write_bytes(content)
    problems = inspect(tmp_path, deep=True).problems
    assert len(problems) == 2
    assert all("text_emb_00001.npy" in problem for problem in problems)
