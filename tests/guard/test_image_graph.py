"""Test that onnxruntime decides from pixels as the guard does on the same images."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import vilu
from tests.builders.photo_folders import photo, truth_of
from tests.builders.store_fakes import NAMES, FakeBackbone, FakeDataset
from tests.triage.conftest import Folder, job_on, until_guaranteed
from vilu.artifacts.paths import claim_file
from vilu.backbones.base import Backbone
from vilu.backbones.catalog import load_backbone
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.errors import OUTSIDE, DataError, UsageError
from vilu.guard import image_graph
from vilu.guard.guard import Answer, Guard
from vilu.guard.image_graph import ImageGraph, export_fingerprint, export_image_graph
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.predictors.persistence.files import VOCABULARY
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.store.embed import ExtraColumns, embed

IMAGES = [photo(kind, 1000 + kind) for kind in range(9)] * 3


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, fake_model: FakeBackbone) -> Folder:
    """Return the triage from the other tests with zero-shot answers and some photos in review."""
    home = tmp_path_factory.mktemp("zero-shot")
    return home, until_guaranteed(home, replace(job_on(home / "photos"), answer="zero_shot"))


class Traceable(FakeBackbone):
    """A backbone that does not look at the number of images."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels.flatten(1) @ self.projection, dim=1)


class Untraceable(FakeBackbone):
    """A backbone that computes outside torch."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        rows = np.array(pixels.flatten(1).tolist(), np.float32) @ self.projection.numpy()
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def answers(
    path: Path, guard: Guard, images: list[bytes]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return onnxruntime's outputs by name for some images, and the file's metadata."""
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    pixels = torch.stack(
        [guard.backbone.preprocess(Image.open(io.BytesIO(image))) for image in images]
    ).numpy()
    found = session.run(None, {"pixels": pixels})
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, found, strict=True)), session.get_modelmeta().custom_metadata_map


def require_same(
    path: Path, guard: Guard, images: list[bytes] = IMAGES, *, within: float = 1e-5
) -> set[str]:
    """Require that the file and the guard agree on one image and on many. Return the decisions."""
    expected: list[Answer] = guard(images)
    for n in (1, len(images)):
        found, said = answers(path, guard, images[:n])
        names = json.loads(said["vilu.classes"])
        assert [names[place] for place in found["prediction"]] == [
            one.label for one in expected[:n]
        ]
        gap = found["uncertainty"] - np.array([one.uncertainty for one in expected[:n]])
        assert np.abs(gap).max() <= within
        if "accept" in found:
            decided = ["accept" if yes else "review" for yes in found["accept"]]
            assert decided == [one.decision for one in expected[:n]]
    return {str(one.decision) for one in expected}


def made(
    folder: Path,
    model: Backbone,
    predictor: vilu.FailurePredictor,
    target: Target | None,
    words: tuple[str, ...] = (),
) -> Path:
    """Fit a predictor on embedded photos, and return its folder.

    If `target` is given, the predictor is calibrated. If there are everyday words, photos of the
    last kind belong to no class.
    """
    truths = [NAMES.index(truth_of(kind)) for kind in range(9)]
    if words:
        truths[-1] = OUTSIDE
    columns = ExtraColumns(features=True, negatives=words)
    for part, first in (("train", 0), ("calibration", 90)):
        blobs = [photo(number % 9, number) for number in range(first, first + 90)]
        labels = [truths[number % 9] for number in range(90)]
        embed(FakeDataset(blobs, labels), model, folder / part, names=NAMES, columns=columns)
    predictor.fit(vilu.open_source(folder / "train")).save(folder / "predictor")
    if target is None:
        Vocabulary.of(vilu.open_source(folder / "train"), "float16").save(folder / "predictor")
    else:
        calibrate_predictor(folder / "predictor", vilu.open_source(folder / "calibration"), target)
    return folder / "predictor"


@pytest.mark.slow
def test_adapted_answers_are_those_of_the_guard(tmp_path: Path) -> None:
    predictor = vilu.ViLUPlus(answer="adapted", width=8, epochs=2)
    folder = made(tmp_path, Traceable(), predictor, Target(max_risk=0.2))
    path = tmp_path / "guard.onnx"
    export_image_graph(folder, path, backbone=Traceable())
    guard = Guard(folder, backbone=Traceable())
    # the two kinds of answers differ
    assert any(answer.zero_shot is not None for answer in guard(IMAGES))
    require_same(path, guard)


@pytest.mark.slow
def test_onnxruntime_decides_as_the_guard(begun: Folder, tmp_path: Path) -> None:
    folder, path = begun[0] / "out" / "predictor", tmp_path / "guard.onnx"
    assert export_image_graph(folder, path, backbone=Traceable()) <= 1e-5
    guard = Guard(folder)
    assert require_same(path, guard) == {"accept", "review"}
    found, said = answers(path, guard, IMAGES)
    assert {name: (rows.dtype, rows.shape) for name, rows in found.items()} == {
        "uncertainty": (np.float64, (27,)),
        "prediction": (np.int64, (27,)),
        "accept": (np.bool_, (27,)),
        "image": (np.float32, (27, 16)),
    }
    assert np.array_equal(found["image"], found["image"].astype(np.float16))
    assert (said["vilu.preprocess"], json.loads(said["vilu.classes"])) == ("8x8", list(NAMES))
    assert said["vilu.predictor"] == fit_fingerprint(folder)
    assert said["vilu.decision"].startswith("accepts ")
    assert claim_file(path, "ONNX export", export_fingerprint(folder))
    with pytest.raises(UsageError, match="of other inputs"):
        claim_file(path, "ONNX export", said["vilu.predictor"])


@pytest.mark.slow  # every export takes torch seconds
@pytest.mark.parametrize(
    ("predictor", "target"),
    [
        (vilu.ViLUPlus(width=8, epochs=2), Target(min_coverage=0.5, per_class=True)),
        (vilu.MaxLogit(), Target(min_coverage=0.5)),
        (vilu.MCM(), None),
    ],
    ids=["features, a limit per class", "score", "no rule"],
)
@pytest.mark.filterwarnings("ignore")
def test_of_every_kind_of_predictor_and_rule(
    predictor: vilu.FailurePredictor, target: Target | None, tmp_path: Path
) -> None:
    folder, path = made(tmp_path, Traceable(), predictor, target), tmp_path / "guard.onnx"
    export_image_graph(folder, path, backbone=Traceable())
    guard = Guard(folder)
    assert require_same(path, guard) == ({"accept", "review"} if target else {"None"})
    found, said = answers(path, guard, IMAGES)
    assert ("accept" in found) == bool(said["vilu.decision"]) == (target is not None)
    assert (
        ("features" in found)
        == ("features" in guard.predictor.columns_to_score)
        == (predictor.name == "vilu_plus")
    )
    calibration = guard.calibration
    if predictor.name == "vilu_plus":
        assert calibration is not None
        assert calibration.rule.grouped_by == "prediction"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_outcome_outside_is_part_of_the_file(tmp_path: Path) -> None:
    words = tuple(f"word {number}" for number in range(50))
    target, predictor = Target(min_coverage=0.5), vilu.ViLUPlus(width=8, epochs=2)
    folder, path = made(tmp_path, Traceable(), predictor, target, words), tmp_path / "guard.onnx"
    export_image_graph(folder, path, backbone=Traceable())
    guard = Guard(folder)
    assert guard.predictor.outcome.columns == ("negatives",)
    assert require_same(path, guard) == {"accept", "review"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["open_clip clip", "open_clip siglip", "hf clip", "hf siglip"])
def test_with_the_image_towers_of_real_architectures(model: str, tmp_path: Path) -> None:
    from tests.builders.tiny_models import write_tiny

    library, kind = model.split()
    write_tiny(tmp_path / "tiny", kind, library)
    backbone = load_backbone(f"{library}:{tmp_path / 'tiny'}", device="cpu")
    folder = made(tmp_path, backbone, vilu.MCM(), Target(min_coverage=0.5))
    export_image_graph(folder, tmp_path / "guard.onnx", backbone=backbone)
    # a float16 step in some of the coordinates, at the model's logit scale
    require_same(tmp_path / "guard.onnx", Guard(folder, backbone=backbone), within=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "why"), [(FakeBackbone, "one number of rows of pixels"), (Untraceable, "")]
)
def test_a_tower_that_cannot_be_written_is_told(
    model: type[FakeBackbone], why: str, begun: Folder, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match=rf"fake cannot be written as ONNX: .*{why}.* Without --with-backbone"
    ):
        export_image_graph(
            begun[0] / "out" / "predictor", tmp_path / "guard.onnx", backbone=model()
        )
    assert not list(tmp_path.iterdir())


def test_what_no_file_can_say_is_told(begun: Folder, tmp_path: Path) -> None:
    half = Traceable()
    half.space = replace(half.space, precision="bf16")
    folder = made(tmp_path, half, vilu.MCM(), None)
    with pytest.raises(UsageError, match=r"runs in bfloat16.* Without --with-backbone"):
        export_image_graph(folder, tmp_path / "guard.onnx", backbone=half)
    shutil.copytree(begun[0] / "out" / "predictor", tmp_path / "bare")
    (tmp_path / "bare" / VOCABULARY).unlink()
    with pytest.raises(DataError, match="does not say what its answers are chosen from"):
        export_image_graph(tmp_path / "bare", tmp_path / "guard.onnx", backbone=Traceable())
    assert not (tmp_path / "guard.onnx").exists()


@pytest.mark.parametrize(
    ("output", "change", "message"),
    [
        (0, lambda uncertainty: uncertainty + 1e-3, "differs by 0.001 from the predictor"),
        (1, lambda answer: (answer + 1) % 3, "gives other answers"),
        (2, lambda accept: ~accept, "does not decide as the rule does"),
        (3, lambda image: -image, "the image rows of the exported tower differ"),
    ],
)
def test_a_graph_that_says_something_else_is_not_written(
    output: int,
    change: Callable[[np.ndarray], np.ndarray],
    message: str,
    begun: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch replaces onnxruntime, and one output is changed."""
    graphs: list[ImageGraph] = []

    def answer(trial: dict[str, torch.Tensor]) -> list[np.ndarray]:
        with torch.no_grad():
            outputs = [rows.numpy() for rows in graphs[0](trial["pixels"])]
        return [change(rows) if place == output else rows for place, rows in enumerate(outputs)]

    monkeypatch.setattr(image_graph, "write_graph", lambda graph, *_: graphs.append(graph) or b"")
    monkeypatch.setattr(image_graph, "onnx_function", lambda _: answer)
    with pytest.raises(DataError, match=message):
        export_image_graph(
            begun[0] / "out" / "predictor", tmp_path / "guard.onnx", backbone=Traceable()
        )
    assert not list(tmp_path.iterdir())
