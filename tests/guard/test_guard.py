"""Test that a guard decides about images as embedding and scoring do, in every image form."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.builders.photo_folders import photo
from tests.builders.store_fakes import NAMES, FakeBackbone
from tests.triage.conftest import Folder, rows
from vilu.datasets.folder import PhotoFiles, list_photos
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.guard.guard import Guard
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.files import VOCABULARY
from vilu.predictors.persistence.storage import load_predictor
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.predictors.zero_shot import MCM
from vilu.scoring.score import score, score_rows
from vilu.store.embed import embed

HALF = 2.0**-10
"""One float16 step below 2."""


@pytest.fixture
def predictor(begun: Folder) -> Path:
    return begun[0] / "out" / "predictor"


def test_decisions_are_those_of_the_triage(begun: Folder, predictor: Path) -> None:
    """Batches of another size may sum in another order.

    So probabilities are equal up to rounding, and so are decisions.
    """
    photos, decided = begun[0] / "photos", rows(begun[0] / "out" / "decisions.csv")
    free = [row for row in decided if row["decision"] != "labelled"]
    guard = Guard(predictor, batch_size=17)
    answers = guard([photos / row["path"] for row in free])
    assert [answer.label for answer in answers] == [row["answer"] for row in free]
    p = np.array([answer.failure_probability for answer in answers])
    expected = np.array([float(row["failure_probability"]) for row in free])
    assert p == pytest.approx(expected, abs=1e-5)
    rule = guard.calibration and guard.calibration.rule
    assert rule is not None
    near = np.abs(expected - (rule.threshold or 0.0)) < 1e-5
    said = np.array([answer.decision == "accept" for answer in answers])
    assert (said == np.array([row["decision"] == "accept" for row in free]))[~near].all()
    assert near.sum() <= 1
    assert [answer.runners_up[0][0] for answer in answers] == [row["runner_up"] for row in free]
    assert all(p >= 0 for answer in answers for _, p in answer.runners_up)


def test_in_batches_of_one_size_the_bits_are_those_of_embed_and_score(
    begun: Folder, predictor: Path, tmp_path: Path, fake_model: FakeBackbone
) -> None:
    photos = begun[0] / "photos"
    free = {
        row["path"]
        for row in rows(begun[0] / "out" / "decisions.csv")
        if row["decision"] != "labelled"
    }
    listing = [one for one in list_photos(photos) if one[0] in free][:64]
    embed(
        PhotoFiles(photos, listing, NAMES),
        fake_model,
        tmp_path / "store",
        names=NAMES,
        batch_size=32,
    )
    import vilu

    fitted, store = load_predictor(predictor), vilu.open_source(tmp_path / "store")
    guard = Guard(predictor, batch_size=32)
    answers = guard([photos / path for path, _ in listing])
    for start in (0, 32):
        part = score(
            fitted,
            store.take(np.arange(start, start + 32)),
            calibration=vilu.Calibration.find(predictor),
        )
        mine = answers[start : start + 32]
        assert [answer.uncertainty for answer in mine] == part.uncertainty.tolist()
        assert tuple(answer.decision for answer in mine) == part.decision


def test_a_path_bytes_and_a_picture_are_one_image(predictor: Path, tmp_path: Path) -> None:
    content = photo(3, 12345)
    (tmp_path / "a.png").write_bytes(content)
    image = Image.open(io.BytesIO(content))
    first, *others = Guard(predictor)([tmp_path / "a.png", str(tmp_path / "a.png"), content, image])
    for one in others:  # a row further down may be summed in another order
        assert (one.label, one.decision) == (first.label, first.decision)
        assert one.uncertainty == pytest.approx(first.uncertainty, rel=1e-5)
    assert [one.key for one in others[1:]] == ["2", "3"]


def test_a_bad_image_is_an_answer_with_a_reason(predictor: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(photo(1, 1)[:60])
    images = [b"no picture", tmp_path / "gone.png", photo(1, 1), tmp_path / "cut.png", b""]
    images += ["a\0b.png", "\ud800.png"]  # no file can have these names
    answers = Guard(predictor)(images)
    assert [answer.reason for answer in answers if answer.label is None] == [
        *("unidentified", "read_error"),
        *("truncated", "empty"),
        *("read_error", "read_error"),
    ]
    assert answers[2].label is not None
    assert {answer.decision for answer in answers if answer.label is None} == {"review"}


def test_who_asks_in_the_midst_of_another_changes_no_answer(predictor: Path, monkeypatch) -> None:
    """A call during another call stands for a second thread between two lines of the first."""
    guard, photos = Guard(predictor, workers=1), [photo(n, n) for n in range(5)]
    expected, others = guard(photos[:3]), iter([photos[3:]])

    def interrupted(*args, **kwargs) -> Outcomes:
        for images in others:
            guard(images)
        return score_rows(*args, **kwargs)

    monkeypatch.setattr("vilu.guard.guard.score_rows", interrupted)
    assert guard(photos[:3]) == expected
    assert next(others, None) is None


def test_a_stream_is_answered_as_it_comes(predictor: Path) -> None:
    """Memory is bounded: the stream is read ahead by at most the batches that are being decoded."""
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield photo(taken % 5, taken)

    guard = Guard(predictor, batch_size=8, workers=2)
    stream = guard.stream(endless())
    keys = [next(stream).key for _ in range(20)]
    assert keys == [str(place) for place in range(20)]
    assert taken <= 24 + 8 + 2 + 1
    stream.close()  # type: ignore[attr-defined]


def test_what_does_not_belong_together_is_refused(
    predictor: Path, tmp_path: Path, test: Embeddings
) -> None:
    with pytest.raises(ProvenanceError, match=r"weights: 'w0' .* against 'w1'"):
        Guard(predictor, backbone=FakeBackbone(weights="w1"))
    bare = Path(shutil.copytree(predictor, tmp_path / "bare"))
    (bare / VOCABULARY).unlink()
    with pytest.raises(DataError, match="does not say what its answers are chosen from"):
        Guard(bare)
    content = bytearray((predictor / VOCABULARY).read_bytes())
    content[-3] ^= 1
    (bare / VOCABULARY).write_bytes(bytes(content))
    with pytest.raises(DataError, match="is damaged"):
        Guard(bare)
    Vocabulary.of(test, "float16").save(bare)
    with pytest.raises(ProvenanceError):
        Guard(bare)
    with pytest.raises(UsageError, match="give a list of images"):
        Guard(predictor)(b"one image")
    with pytest.raises(UsageError, match=r"a picture of Pillow\. Got int at index 0"):
        Guard(predictor)([7])  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["<f4", "<i4", ">u2", "<u2"])
def test_a_deep_picture_of_pillow_is_answered_as_its_file(predictor: Path, kind: str) -> None:
    """Pillow would clip these numbers: nearly all of the picture would be white or black."""
    ramp = np.linspace(0, 1, 40)[:, None] * np.linspace(0.2, 1, 50)
    most = 1 if kind == "<f4" else 65_535
    picture = Image.fromarray((ramp * most).astype(kind))
    file = io.BytesIO()
    picture.save(file, "TIFF")
    guard = Guard(predictor)
    # one picture a call, because two rows of one product may be rounded differently
    (in_memory,) = guard([picture])
    (on_disk,) = guard([file.getvalue()])
    assert in_memory.uncertainty == on_disk.uncertainty


def test_a_bad_picture_of_pillow_is_an_answer_with_a_reason(predictor: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    content = file.getvalue()
    place = content.rindex(b"IDAT")  # the second block of pixels, so the header can be read
    damaged = Image.open(io.BytesIO(content[:place] + b"\0\0\0\0" + content[place + 4 :]))
    first, last = (Image.open(io.BytesIO(photo(0, 1))) for _ in range(2))
    answers = Guard(predictor)([first, Image.new("RGB", (0, 5)), damaged, last])
    assert [answer.reason for answer in answers[1:3]] == ["bad_geometry", "decode_error"]
    assert answers[0].label == answers[3].label is not None


def test_without_a_rule_there_is_a_probability_and_no_decision(
    tmp_path: Path, fake_model: FakeBackbone, begun: Folder
) -> None:
    listing = list_photos(begun[0] / "photos")[:9]
    embed(
        PhotoFiles(begun[0] / "photos", listing, NAMES), fake_model, tmp_path / "store", names=NAMES
    )
    import vilu

    store = vilu.open_source(tmp_path / "store")
    MCM().fit(store).save(tmp_path / "mcm")
    Vocabulary.of(store, "float16").save(tmp_path / "mcm")
    answers = Guard(tmp_path / "mcm")([photo(0, 1)])
    assert answers[0].decision is None
    assert answers[0].failure_probability is not None
    assert isinstance(Outcomes.load(begun[0] / "out" / "decisions.parquet"), Outcomes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_data_set_of_the_hub_is_mapped(predictor: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.open(io.BytesIO(photo(kind, 1))) for kind in range(5)]
    guard = Guard(predictor)
    mapped = datasets.Dataset.from_dict({"image": pictures}).map(
        lambda rows: guard.columns(rows["image"]), batched=True, batch_size=2
    )
    assert mapped["label"] == [answer.label for answer in guard(pictures)]
    assert mapped.column_names == [
        *("image", "label", "failure_probability", "uncertainty", "decision", "reason"),
        *("runners_up", "zero_shot", "likely", "quantile"),
    ]


def test_a_guard_for_vectors_alone_needs_no_model(predictor: Path) -> None:
    whole, vectors = Guard(predictor), Guard(predictor, vectors_only=True, device="cuda:99")
    widths = whole.model.widths
    rows = {name: torch.eye(3, width) for name, width in widths.items()}
    keys = ["a.jpg", "b.jpg", "c.jpg"]
    expected, _ = whole.answer(rows, keys)
    answers, outcomes = vectors.answer(rows, keys)
    assert answers == expected
    assert [answer.key for answer in answers] == list(outcomes.ids or ()) == keys
    with pytest.raises(UsageError, match="opened with vectors_only"):
        vectors([photo(1, 1)])


def test_a_row_without_a_direction_changes_no_other_answer(predictor: Path) -> None:
    guard = Guard(predictor, vectors_only=True)
    widths = Guard(predictor).model.widths
    rows = {name: torch.eye(2, width) for name, width in widths.items()}
    expected, _ = guard.answer(rows, ["a", "b"])
    more_rows = {}
    for name, width in widths.items():
        more_rows[name] = torch.cat([torch.full((1, width), torch.nan), torch.zeros(1, width)])
        more_rows[name] = torch.cat([more_rows[name], rows[name]])
    answers, _ = guard.answer(more_rows, ["nan", "zero", "a", "b"])
    first, second, *others = answers
    assert (first.label, first.reason, first.runners_up) == (None, "nonfinite", ())
    assert (second.label, second.reason, second.runners_up) == (None, "zero_norm", ())
    assert [answer.runners_up for answer in others] == [answer.runners_up for answer in expected]
