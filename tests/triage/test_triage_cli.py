"""Test ``vilu triage`` and the related commands through the real command line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from tests.builders.photo_folders import write_photos
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.command import command_line, run
from tests.conftest import toy_embeddings
from tests.triage.conftest import Folder, fill_in, give_labels, rows
from vilu.calibration.calibration import Calibration
from vilu.calibration.rules import Rule
from vilu.datasets.folder import PhotoFiles, list_photos
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import OUTSIDE_NAME, DataError, UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors import PREDICTORS
from vilu.predictors.persistence.storage import load_predictor
from vilu.selective import Selective, load
from vilu.store.embed import embed
from vilu.store.reader import EmbeddingStore, SealedStore
from vilu.triage import label_errors
from vilu.triage.ask import calibrate_by_labels
from vilu.triage.guarantee import PhotoSplit
from vilu.triage.label_errors import LabelErrors
from vilu.triage.labels import SKIPPED, LabelBook
from vilu.triage.store_labels import label_store


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", 60)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    return tmp_path


def test_the_loop_by_hand(work: Path) -> None:
    arguments = ("triage", "photos", "--classes", "names.txt", "-o", "out", "-n", 12)
    done = run(*arguments, cwd=work)
    assert done.stdout == "out\n"
    assert "60 photos (60 of them new): accepted 0 of 60 without a label" in done.stderr
    assert "next: fill in the column label of out/next_labels.csv (12 photos;" in done.stderr
    for name, words in (
        ("decisions.csv", "decisions.parquet of the triage has the same decisions"),
        ("next_labels.csv", "Fill in the column label, and give the file to the next command"),
    ):
        refused = run("inspect", work / "out" / name, code=3).stderr
        assert f"{name} is a list for people" in refused
        assert words in refused
    truth = write_photos(work / "again", 60)
    fill_in(work / "out", truth, work / "filled.csv")
    done = run(*arguments, "--labels", "filled.csv", "--link", cwd=work)
    assert "of 48 without a label, 48 to review; 12 have a label" in done.stderr
    assert len(list((work / "out" / "sorted").rglob("*.png"))) == 60
    run("review", "out", "-o", "tasks.json", "--to", "label-studio", cwd=work)
    refused = run("inspect", "tasks.json", cwd=work, code=3).stderr
    assert "tasks.json begins like a JSON list, such as the tasks for Label Studio" in refused
    tasks = json.loads((work / "tasks.json").read_text())
    for task in tasks:
        choice = {"type": "choices", "value": {"choices": [truth[task["data"]["path"]]]}}
        task["annotations"] = [{"result": [choice]}]
    (work / "done.json").write_text(json.dumps(tasks))
    run("labels", "done.json", "-o", "more.csv", cwd=work)
    assert "have a label" in run(*arguments, "--labels", "more.csv", cwd=work).stderr
    assert sum(
        row["decision"] == "labelled" for row in rows(work / "out" / "decisions.csv")
    ) == 12 + len(tasks)


@pytest.mark.slow
def test_all_labels_of_a_folder_in_one_file_that_every_command_reads(
    work: Path, fake_model: FakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A triage, a fit, a calibration and an audit read the CSV as they read the book itself."""
    arguments = ("triage", "photos", "--classes", "names.txt", "-n", 40)
    run(*arguments, "-o", "out", cwd=work)
    truth = write_photos(work / "again", 60)
    fill_in(work / "out", truth, work / "filled.csv")
    some = "".join(f"{path},{label}\n" for path, label in truth.items() if path[-5] in "2357")
    (work / "random.csv").write_text(f"path,label\n{some}")
    run(*arguments, "-o", "out", "--labels", "random.csv", "--labels", "filled.csv", cwd=work)
    done = run("labels", "out", "-o", "all.csv", cwd=work)
    book = LabelBook.load(work / "out" / "labels.parquet")
    assert f"{len(book.labels)} labels" in done.stderr
    all_rows = rows(work / "all.csv")
    assert {row["path"]: row["label"] for row in all_rows} == book.labels
    assert {row["path"]: row["stream"] for row in all_rows} == {
        entry.path: entry.stream for entry in book if entry.label is not None
    }
    photos = PhotoFiles(work / "photos", list_photos(work / "photos"), NAMES)
    embed(photos, fake_model, work / "store", names=NAMES)
    audited: list[list[str]] = []

    def note(source: EmbeddingSource, *_: object, **__: object) -> LabelErrors:
        audited.append(sorted(source.ids))
        return LabelErrors([], [], [], np.zeros(0), np.zeros(0, np.bool_))

    monkeypatch.setattr(label_errors, "find_label_errors", note)
    for number, labels in enumerate(("all.csv", "out/labels.parquet")):
        new = f"new {number}"
        run(*arguments, "-o", new, "--labels", labels, cwd=work)
        assert LabelBook.load(work / new / "labels.parquet").labels == book.labels
        done = run("fit", "store", "--labels", labels, "-o", f"p{number}", cwd=work)
        assert f"fitted on {len(book.labels)} rows" in done.stderr
        run("fit", "store", "--method", "mcm", "-o", f"mcm{number}", cwd=work)
        done = run("calibrate", f"mcm{number}", "store", "--labels", labels, cwd=work)
        n_given = sum(row["stream"] == "given" for row in all_rows)
        assert f"calibrated on {n_given} rows" in done.stderr
        run("audit-labels", "store", "-o", "e.csv", "--labels", labels, cwd=work)
    assert audited == [sorted(book.labels)] * 2


@pytest.mark.slow
def test_labels_of_a_class_that_is_gone_are_named_and_written_all_the_same(work: Path) -> None:
    arguments = ("triage", "photos", "-o", "out", "--labels", "known.csv")
    truth = write_photos(work / "again", 60)
    (work / "known.csv").write_text(
        "path,label\n" + "".join(f"{path},{label}\n" for path, label in truth.items())
    )
    run(*arguments, "--classes", "names.txt", cwd=work)
    (work / "fewer.txt").write_text("cat\ndog")
    done = run(*arguments, "--classes", "fewer.txt", cwd=work)
    n_cars = sum(label == "car" for label in truth.values())
    named = f"{n_cars} labels left out, because the class no longer exists: 'car' ({n_cars})"
    assert f"known.csv: {named}" in done.stderr
    run("labels", "out", "-o", "all.csv", cwd=work)
    assert {row["path"]: row["label"] for row in rows(work / "all.csv")} == truth


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "vilu_zero"), "vilu_zero is fitted on rows without labels"),
        (("--pseudo",), "Give only one of --labels and --pseudo"),
    ],
)
def test_a_fit_that_uses_no_labels_takes_none(
    tmp_path: Path, fake_model: FakeBackbone, more: tuple[str, ...], message: str
) -> None:
    embed(dataset(30), fake_model, tmp_path / "store", names=NAMES)
    (tmp_path / "l.csv").write_text("path,label\na.jpg,cat\n")
    arguments = ("fit", "store", "--labels", "l.csv", "-o", "p")
    assert message in run(*arguments, *more, code=2, cwd=tmp_path).stderr


def test_a_run_says_what_its_prompts_and_its_model_are(work: Path) -> None:
    (work / "articles.txt").write_text("a cat\nthe dog\ncar")
    arguments = ("triage", "photos", "--classes", "articles.txt", "-o", "out")
    for _ in range(2):  # on every run, not only on the first
        done = run(*arguments, cwd=work)
        assert "Prompts: 'a photo of a {}.'. Warning: 'a photo of a a cat.' has two" in done.stderr
        assert "compact is a small stand-in for CLIP" in done.stderr
        assert "--backbone clip-vit-b32" in done.stderr
    page = (work / "out" / "report.html").read_text()
    assert "a photo of a {}." in page
    done = run(*arguments, "--backbone", "fake", "--template", "{}", cwd=work)
    assert "Prompts: '{}'." in done.stderr
    assert "Warning" not in done.stderr
    assert "stand-in" not in done.stderr


def test_sidecars_without_a_label_are_explained(work: Path) -> None:
    arguments = ("triage", "photos", "--classes", "names.txt", "-o", "out", "--xmp")
    assert "--xmp has written no label" in run(*arguments, cwd=work).stderr


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--with-backbone",)], ids=["head", "from pixels"])
def test_the_predictor_of_a_triage_is_exported(
    work: Path, more: tuple[str, ...], fake_model: FakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = write_photos(work / "again", 60)
    last_kind = set(list(truth)[8::9])
    lines = [
        f"{path},{OUTSIDE_NAME if path in last_kind else label}" for path, label in truth.items()
    ]
    (work / "known.csv").write_text("\n".join(["path,label", *lines]))
    arguments = ("triage", "photos", "--classes", "names.txt", "-o", "out")
    run(*arguments, "--labels", "known.csv", cwd=work)
    predictor = load_predictor(work / "out" / "predictor")
    assert (predictor.name, predictor.outcome.columns) == ("vilu_plus", ("negatives",))
    # the fake tower checks the number of images, which no graph can do
    monkeypatch.setattr(fake_model, "encode_images", partial(encode, fake_model))
    done = run("export", "out/predictor", "--onnx", "-o", "head.onnx", *more, cwd=work)
    assert done.stdout == "head.onnx\n"
    assert "onnxruntime gives the predictor's uncertainties" in done.stderr


def encode(model: FakeBackbone, pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(pixels.flatten(1) @ model.projection, dim=1)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--outside", "cat"), 2, "'cat' is the name of a class, and also the label"),
        (("--max-risk", 0), 2, "max_risk must be in (0, 1)"),
        (("--link", "--move"), 2, "--link and --move exclude each other"),
        (("--labels", "names.txt"), 3, "must have the columns path"),
        (("--classes", "gone.txt"), 2, "gone.txt does not exist"),
    ],
)
def test_slips_are_told_before_the_slow_part(
    work: Path, more: tuple[object, ...], code: int, message: str
) -> None:
    done = run(
        "triage", "photos", "--classes", "names.txt", "-o", "out", *more, code=code, cwd=work
    )
    assert message in done.stderr
    assert not (work / "out" / "embeddings").exists()


def test_next_for_a_store_and_a_predictor(
    begun: Folder, tmp_path: Path, fake_model: FakeBackbone
) -> None:
    photos = begun[0] / "photos"
    embed(
        PhotoFiles(photos, list_photos(photos), NAMES), fake_model, tmp_path / "store", names=NAMES
    )
    arguments = (
        "next",
        tmp_path / "store",
        "--predictor",
        begun[0] / "out" / "predictor",
        "-n",
        20,
    )
    run(*arguments, "-o", tmp_path / "one.csv")
    first = rows(tmp_path / "one.csv")
    assert sorted(row["stream"] for row in first) == ["calibration"] * 10 + ["fit"] * 10
    run(*arguments, "-o", tmp_path / "two.csv", "--labels", tmp_path / "one.csv")
    assert not {row["path"] for row in first} & {row["path"] for row in rows(tmp_path / "two.csv")}
    run(*arguments, "-o", tmp_path / "one.csv", code=2)
    same = ("--labels", tmp_path / "two.csv", "--labels", tmp_path / "store" / ".." / "one.csv")
    lost = run(*arguments, "-o", tmp_path / "one.csv", "--overwrite", *same, code=2)
    assert "is one of --labels, so its labels would be lost" in lost.stderr
    assert rows(tmp_path / "one.csv") == first
    run(*arguments, "-o", tmp_path / "one.csv", "--overwrite")
    again = rows(tmp_path / "one.csv")
    assert [row["path"] for row in again] == [row["path"] for row in first]
    known = "".join(f"{path},{NAMES[0]}\n" for path in EmbeddingStore(tmp_path / "store").ids)
    (tmp_path / "known.csv").write_text(f"path,label\n{known}")
    done = run(*arguments, "-o", tmp_path / "none.csv", "--labels", tmp_path / "known.csv")
    assert (
        "0 images asked for; every image that could help has a label, or was asked for before"
        in done.stderr
    )


@pytest.fixture
def uncalibrated(begun: Folder, tmp_path: Path, fake_model: FakeBackbone) -> Path:
    """Return a triage's predictor without its guarantee, with the store of the photos beside it."""
    home, predictor = begun[0], tmp_path / "predictor"
    shutil.copytree(home / "out" / "predictor", predictor)
    for name in ("risk.json", "calibration.parquet"):
        (predictor / name).unlink()
    photos = PhotoFiles(home / "photos", list_photos(home / "photos"), NAMES)
    embed(photos, fake_model, tmp_path / "store", names=NAMES)
    return predictor


@pytest.fixture
def of_zero_shot(begun: Folder, uncalibrated: Path, tmp_path: Path) -> Path:
    """Return a predictor for the zero-shot answers that was fitted on the same labels."""
    book = LabelBook.load(begun[0] / "out" / "labels.parquet")
    photos, _ = label_store(EmbeddingStore(tmp_path / "store"), [])
    photos.set_labels(book.labels, ())
    fit_rows = PhotoSplit.of(photos, book, seed=0).fit_rows
    folder = tmp_path / "of zero-shot"
    PREDICTORS["vilu_plus"]().fit(photos.take(fit_rows)).save(folder)
    shutil.copy(uncalibrated / "vocabulary.safetensors", folder)
    return folder


def test_an_empty_cell_takes_no_label_back(tmp_path: Path, fake_model: FakeBackbone) -> None:
    """Labels may come in a separate file, before or after the table that asked for them."""
    embed(dataset(30), fake_model, tmp_path / "store", names=NAMES)
    store = EmbeddingStore(tmp_path / "store")
    (tmp_path / "asked.csv").write_text(
        f"path,label,stream,predictor\n{store.ids[3]},,calibration,f00\n"
    )
    (tmp_path / "plain.csv").write_text(f"path,label\n{store.ids[3]},{SKIPPED}\n")
    for files in (("asked.csv", "plain.csv"), ("plain.csv", "asked.csv")):
        entry = label_store(store, [tmp_path / name for name in files])[1].entries[store.ids[3]]
        assert (entry.label, entry.stream, entry.predictor) == (SKIPPED, "calibration", "f00")


def test_labels_that_next_asks_for_make_a_guarantee_of_a_store(
    begun: Folder, tmp_path: Path, uncalibrated: Path
) -> None:
    """Labels are requested, filled in and tested again and again until the guarantee is shown.

    Labels that were chosen for the fit never count.
    """
    truth, predictor = begun[1], uncalibrated
    calibrate = (
        "calibrate",
        predictor,
        tmp_path / "store",
        "--method",
        "anytime",
        "--max-risk",
        0.1,
    )
    given, asked = list[object](), list[dict[str, str]]()
    for number in range(4):
        file = tmp_path / f"{number}.csv"
        run(
            "next",
            tmp_path / "store",
            "--predictor",
            predictor,
            "-n",
            80,
            "--max-risk",
            0.1,
            "-o",
            file,
            *given,
        )
        asked += (found := rows(file))
        empty = run(*calibrate, *given, "--labels", file, code=3)
        n_missing = sum(row["stream"] == "calibration" for row in found)
        assert f"{n_missing} of the labels that were asked for are missing" in empty.stderr
        give_labels(file, truth, file)
        given += ["--labels", file]
        done = command_line(*calibrate, *given)
        if done.returncode == 0:
            break
        assert "is not shown: about" in done.stderr
        assert Calibration.find(predictor) is None
    found = Calibration.load(predictor)
    assert found.rule is not None
    assert found.rule.method == "anytime"
    assert found.n == sum(row["stream"] == "calibration" for row in asked)
    model = load(predictor)
    assert isinstance(model, Selective)
    assert model.calibration == found
    run(*calibrate, *given)  # once more: nothing changes
    assert Calibration.load(predictor) == found
    assert "is calibrated already" in run(*calibrate[:-1], 0.2, *given, code=2).stderr
    assert "allows no other target" in run(*calibrate, "--max-miss", 0.2, *given, code=2).stderr
    run("score", predictor, tmp_path / "store", "-o", tmp_path / "scores.parquet")
    scores = Outcomes.load(tmp_path / "scores.parquet")
    wrong = [
        scores.class_names[said] != truth[path]
        for path, said, decided in zip(
            scores.ids, scores.prediction.tolist(), scores.decision, strict=True
        )
        if decided == "accept"
    ]
    assert len(wrong) > 100
    assert np.mean(wrong) <= 0.1
    assert (
        "drew some of these labels from the rows that could be accepted"
        in run(*calibrate[:3], *given, "--max-risk", 0.1, code=2).stderr
    )
    assert "anytime needs --labels" in run(*calibrate, code=2).stderr
    other = {path: next(name for name in NAMES if name != truth[path]) for path in truth}
    for file in given[1::2]:
        give_labels(cast("Path", file), other, cast("Path", file))
    kept = shutil.copytree(predictor, tmp_path / "kept")
    for more in ((), ("--overwrite",)):
        shutil.copytree(kept, predictor, dirs_exist_ok=True)
        done = run(*calibrate, *given, *more, code=4)
        assert "labels behind the guarantee have changed" in done.stderr
        assert Calibration.find(predictor) is None, (
            "a guarantee outlives the labels that it rests on"
        )


def test_a_guarantee_of_every_class_asks_first_where_labels_lack(
    begun: Folder, tmp_path: Path, of_zero_shot: Path
) -> None:
    """The classes take turns. "cat" gets no more labels, because half of its answers are wrong."""
    truth, predictor, given = begun[1], of_zero_shot, list[object]()
    calibrate = (
        "calibrate",
        predictor,
        tmp_path / "store",
        "--method",
        "anytime",
        "--max-risk",
        0.4,
    )
    drawn = Counter[str]()
    for number in range(6):
        file = tmp_path / f"{number}.csv"
        run(
            "next",
            tmp_path / "store",
            "--predictor",
            predictor,
            "--per-class",
            "--max-risk",
            0.4,
            "-o",
            file,
            *given,
        )
        found = rows(file)
        drawn.update(row["answer"] for row in found if row["stream"] == "calibration")
        if number == 0:
            assert drawn["cat"] <= min(drawn["car"], drawn["dog"])
            assert abs(drawn["car"] - drawn["dog"]) <= 1
        give_labels(file, truth, file)
        given += ["--labels", file]
        done = command_line(*calibrate, "--per-class", *given)
        assert done.returncode in {0, 4}
        if done.returncode == 4:
            assert all(f"{name}: about" in done.stderr for name in ("car", "dog"))
    rule = Calibration.load(predictor).rule
    assert isinstance(rule, Rule)
    assert rule.grouped_by == "prediction"
    assert rule.thresholds.keys() == set(NAMES)
    assert all(one.n <= drawn[name] for name, one in rule.thresholds.items())
    assert sum(one.threshold is not None for one in rule.thresholds.values()) >= 2
    assert "is calibrated already" in run(*calibrate, *given, code=2).stderr
    run("score", predictor, tmp_path / "store", "-o", tmp_path / "scores.parquet")
    scores = Outcomes.load(tmp_path / "scores.parquet")
    limits = [rule.thresholds[NAMES[said]].threshold or -1 for said in scores.prediction.tolist()]
    assert [one == "accept" for one in scores.decision] == (scores.uncertainty <= limits).tolist()


def test_labels_of_a_random_pick_calibrate_a_store_without_any(
    begun: Folder, tmp_path: Path, fake_model: FakeBackbone
) -> None:
    """If more than a few labelled rows were used in the fit, the labels are refused.

    A message tells how many rows were skipped.
    """
    home, truth = begun
    shutil.copytree(home / "out" / "predictor", tmp_path / "predictor")
    labels = {path: name for path, name in truth.items() if int(path[-8:-4]) % 3 == 0}
    (tmp_path / "some.csv").write_text(
        "path,label\n" + "".join(f"{path},{name}\n" for path, name in labels.items())
    )
    photos = PhotoFiles(home / "photos", list_photos(home / "photos"), NAMES)
    embed(photos, fake_model, tmp_path / "bare", names=NAMES)
    calibrate = (
        "calibrate",
        tmp_path / "predictor",
        tmp_path / "bare",
        "--labels",
        tmp_path / "some.csv",
    )
    seen = run(*calibrate, "--max-risk", 0.2, "--overwrite", code=3)
    assert "were used to fit this vilu_plus" in seen.stderr
    book = LabelBook.load(home / "out" / "labels.parquet").labels
    fresh = [
        line
        for line in (tmp_path / "some.csv").read_text().splitlines(True)
        if line.split(",")[0] not in book
    ]
    skipped = next(path for path in truth if path not in book and path not in labels)
    (tmp_path / "some.csv").write_text("".join([*fresh, f"{skipped},{SKIPPED}\n"]))
    # three colours are three scenes: too few for a guarantee
    done = run(*calibrate, "--overwrite")
    assert f"1 of {len(fresh)} picked rows have the label {SKIPPED} and are left out" in done.stderr
    found = Calibration.load(tmp_path / "predictor")
    assert found.n == len(fresh) - 1


def test_rows_of_a_fit_that_knows_a_sample_of_them_are_refused(
    tmp_path: Path, fake_model: FakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(dataset(60), fake_model, tmp_path / "store", names=NAMES)
    store = EmbeddingStore(tmp_path / "store")
    PREDICTORS["mcm_ts"]().fit(store).save(tmp_path / "whole")
    with pytest.raises(DataError, match="has seen all rows of"):
        calibrate_by_labels(tmp_path / "whole", store, [], max_risk=0.9)
    monkeypatch.setattr("vilu.predictors.contract.seen.MAX_HASHES", 10)
    PREDICTORS["mcm_ts"]().fit(store).save(tmp_path / "sample")
    with pytest.raises(
        DataError, match=r"calibration rows .* were used to fit this mcm_ts .*, more than 1%"
    ):
        calibrate_by_labels(tmp_path / "sample", store, [], max_risk=0.9)


@pytest.mark.parametrize("name", ["errors.csv", "errors.parquet"])
def test_an_audit_of_labels_replaces_such_a_table_and_no_other_file(
    tmp_path: Path, name: str
) -> None:
    found = LabelErrors(["a.jpg"], ["cat"], ["dog"], np.array([0.1]), np.array([True]))
    found.save(tmp_path / name)
    found.save(tmp_path / name)
    Outcomes([0.5], [0]).save(tmp_path / f"scores.{name}")
    with pytest.raises(UsageError, match="holds no label errors of vilu"):
        found.save(tmp_path / f"scores.{name}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("-o", "labels.csv"),
            "labels.csv is there and holds no label errors of vilu, so it is left alone",
        ),
        (("-o", "errors.txt"), "in a .parquet or .csv file. Got 'errors.txt'"),
        (
            ("-o", "x.csv", "--images", ".", "--sheet", "cat.png"),
            "must be a new .png, .svg or .webp",
        ),
        (
            ("-o", "x.csv", "--images", ".", "--sheet", "sheet.txt"),
            "must be a new .png, .svg or .webp",
        ),
        (
            ("-o", "x.csv", "--images", ".", "--sheet", "gone/sheet.png"),
            "in an existing folder",
        ),
        (("-o", "x.csv", "--images", ".", "--sheet", "sheet.png", "--split", "dawn"), "dawn"),
    ],
)
def test_an_audit_of_labels_is_refused_a_wrong_place_before_the_fits(
    tmp_path: Path, fake_model: FakeBackbone, more: tuple[str, ...], message: str
) -> None:
    embed(dataset(30), fake_model, tmp_path / "store", names=NAMES)
    for name in ("labels.csv", "cat.png"):
        (tmp_path / name).write_bytes(b"path,label\na.jpg,cat\n")
    done = run("audit-labels", "store", *more, code=2, cwd=tmp_path)
    assert message in done.stderr
    assert "fit" not in done.stderr
    assert (
        (tmp_path / "labels.csv").read_bytes()
        == (tmp_path / "cat.png").read_bytes()
        == b"path,label\na.jpg,cat\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"store", "labels.csv", "cat.png"}


def test_a_label_that_a_predictor_was_fitted_on_is_not_judged_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = toy_embeddings(n=300)
    predictor, judged = PREDICTORS["knn_distance"]().fit(data.take(range(52))), list[int]()

    class Datalab:
        def __init__(self, data: dict[str, list[int]], **_: object) -> None:
            judged.extend(data["label"])
            raise InterruptedError

    monkeypatch.setattr(label_errors, "import_extra", lambda *_: SimpleNamespace(Datalab=Datalab))
    with (
        pytest.warns(UserWarning, match="2 of 250 audited rows .* they are left out"),
        pytest.raises(InterruptedError),
    ):
        label_errors.find_label_errors(data.take(range(50, 300)), predictor)
    assert judged == data.target[52:].tolist()


@pytest.mark.slow
def test_labels_that_are_wrong_are_found(
    tmp_path: Path, fake_model: FakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 labels that were changed on purpose, at least 8 are among the 15 worst rows.

    The audit must not read a whole part for each row in it.
    """
    reads: Counter[str] = Counter()
    read = SealedStore.metadata_column
    monkeypatch.setattr(
        SealedStore,
        "metadata_column",
        lambda at, name, part: reads.update([name]) or read(at, name, part),
    )
    truth = write_photos(tmp_path / "photos", 117)
    flipped = np.random.default_rng(0).choice(sorted(truth), 10, replace=False).tolist()
    given = {
        path: NAMES[(NAMES.index(name) + 1) % 3] if path in flipped else name
        for path, name in truth.items()
    }
    (tmp_path / "l.csv").write_text(
        "path,label\n" + "".join(f"{path},{name}\n" for path, name in given.items())
    )
    to_store = ("-o", tmp_path / "store", "--backbone", "fake", "--part-size", 3)
    run("embed", tmp_path / "l.csv", "--root", tmp_path / "photos", *to_store)
    done = run(
        *("audit-labels", tmp_path / "store", "-o", tmp_path / "errors.csv"),
        *(
            "--images",
            tmp_path / "l.csv",
            "--sheet",
            tmp_path / "sheet.png",
            "--root",
            tmp_path / "photos",
        ),
    )
    found = rows(tmp_path / "errors.csv")
    assert [row["path"] for row in found[:1]]
    worst = {row["path"] for row in found[:15]}
    assert len(worst & set(flipped)) >= 8
    assert "probably wrong" in done.stderr
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert {row["suggested"] for row in found} <= set(NAMES)
    assert reads["key"] <= 6 * 39
