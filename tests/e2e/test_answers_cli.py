"""``--answer`` through the command line, and a triage on real photos that is compared with a
separate computation.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.command import run
from tests.triage.conftest import fill_in, rows
from vilu.calibration.calibration import Calibration
from vilu.cli.demo import PROMPT_NAMES
from vilu.datasets.catalog import open_dataset
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.storage import load_predictor
from vilu.store.embed import embed
from vilu.triage.labels import LabelBook, sides_and_positions

PHOTOS = Path(str(resources.files("vilu").joinpath("assets", "clothing.parquet")))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    for name, first, n in (("train", 0, 90), ("calibration", 90, 120), ("new", 210, 40)):
        data = dataset(n)
        data.blobs = dataset(first + n).blobs[first:]
        data.keys = [f"{name}/{i}.png" for i in range(n)]
        embed(data, FakeBackbone(), folder / name, names=NAMES)
    fit = ("fit", folder / "train", "--method", "linear_probe")
    run(*fit, "-o", folder / "zero_shot")
    run(*fit, "--answer", "adapted", "-o", folder / "adapted")
    return folder


def test_the_answer_is_a_setting_of_the_fit(stores: Path, tmp_path: Path) -> None:
    assert vilu.load(stores / "adapted").answer == "adapted"
    fit = ("fit", stores / "train", "-o", tmp_path / "p")
    done = run(*fit, "--answer", "adapted", "--set", "answer=adapted", code=2)
    assert "--answer and --set answer=... are one setting" in done.stderr
    done = run(*fit, "--method", "mcm", "--answer", "adapted", code=2)
    assert "mcm has no posterior of its own" in done.stderr
    run(*fit, "--method", "linear_probe", "--set", "answer=adapted")
    assert vilu.load(tmp_path / "p").state().keys() == vilu.load(stores / "adapted").state().keys()


def test_another_answer_than_that_of_the_predictor_is_refused(stores: Path, tmp_path: Path) -> None:
    scores = ("score", stores / "adapted", stores / "new", "-o", tmp_path / "scores.parquet")
    for command in (
        scores,
        ("calibrate", stores / "adapted", stores / "calibration", "--max-risk", 0.8),
    ):
        done = run(*command, "--answer", "zero_shot", code=2)
        assert "judges adapted answers, and --answer asks for zero_shot" in done.stderr
    run(*scores, "--answer", "adapted")
    assert Outcomes.load(tmp_path / "scores.parquet").answer == "adapted"


def test_tables_and_pages_say_which_answers_they_are_of(stores: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.parquet"
    run("score", stores / "adapted", stores / "new", "-o", scores)
    assert "linear_probe (adapted)" in run("evaluate", scores, "--resamples", 10).stdout
    page = tmp_path / "page.html"
    run("report", scores, "-o", page, "--store", stores / "new")
    text = page.read_text()
    assert "Of adapted answers." in text
    assert "adapted answers</p>" in text
    outcomes = Outcomes.load(scores)
    n_other = sum(outcomes.zero_shot_beside(row) is not None for row in range(len(outcomes)))
    assert n_other > 0
    assert "zero-shot: " in text
    explain = ("explain", stores / "adapted", stores / "new")
    explained = json.loads(run(*explain, "-n", 40, "--json").stdout)
    assert explained["answer"] == "adapted"
    by_row = {row["row"]: row for row in explained["rows"]}
    for row, found in by_row.items():
        assert found["answer"] == outcomes.class_names[outcomes.prediction[row]]
        assert found["zero_shot"] == outcomes.zero_shot_beside(row)
    text = run(*explain, "-n", 40).stdout
    assert "answers       adapted" in text
    assert "; zero-shot: " in text
    assert "adapted answers" in run(*explain, "--summary").stdout


@pytest.mark.slow
def test_a_loop_on_real_photos_is_what_one_counts_by_hand(tmp_path: Path) -> None:
    """A triage on 1,000 clothes photos must agree with a count by hand and end with a guarantee.

    The first run has no labels. Each later run gets the labels that the run before asked for.
    """
    photos = open_dataset(PHOTOS, split="test")
    truth = {}
    (tmp_path / "photos").mkdir()
    for record in photos.records(0, 1000):
        name = f"{Path(record.key).stem}.jpg"
        (tmp_path / "photos" / name).write_bytes(record.read())
        truth[name] = PROMPT_NAMES[record.label or 0]
    (tmp_path / "names.txt").write_text("\n".join(PROMPT_NAMES))
    command = ("triage", "photos", "--classes", "names.txt", "-o", "out", "-n", 200)
    command = (*command, "--max-risk", 0.15)
    done = run(*command, cwd=tmp_path)
    assert "The zero-shot answers of the model are judged" in done.stderr
    n_guaranteed = 0
    for _ in range(4):
        filled = fill_in(tmp_path / "out", truth, tmp_path / "filled.csv")
        done = run(*command, "--labels", filled, cwd=tmp_path)
        assert "Adapted answers are judged" in done.stderr
        n_guaranteed += _as_counted_by_hand(tmp_path / "out", truth)
    assert n_guaranteed > 0


def _as_counted_by_hand(output: Path, truth: dict[str, str]) -> bool:
    """Compare a round with a computation from the saved predictor, and return whether it has a
    guarantee.
    """
    scores = Outcomes.load(output / "decisions.parquet")
    parts = [
        vilu.open_source(folder.parent) for folder in output.glob("embeddings/*/manifest.json")
    ]
    predictor = load_predictor(output / "predictor")
    answer_of = {}
    for part in parts:
        for batch in part.batches(4096, columns=predictor.columns_to_score):
            likeliest = predictor.log_posterior(batch).argmax(dim=1).tolist()
            for row, code in zip(batch.index.tolist(), likeliest, strict=True):
                answer_of[part.ids[row]] = PROMPT_NAMES[code]
    said = [PROMPT_NAMES[code] for code in scores.prediction]
    assert said == [answer_of[path] for path in scores.ids]
    decided = {row["path"]: row for row in rows(output / "decisions.csv")}
    for path, row in decided.items():
        expected = truth[path] if row["decision"] == "labelled" else answer_of[path]
        assert row["answer"] == expected
    calibration = Calibration.find(output / "predictor")
    if calibration is None or calibration.rule.threshold is None:
        return False
    counted = calibration.rows
    book = {entry.path: entry for entry in LabelBook.load(output / "labels.parquet")}
    pictures = [bytes.fromhex(book[path].picture) for path in counted.ids]
    assert sides_and_positions(pictures, 0)[0].all()
    wrong = np.array([answer_of[path] != truth[path] for path in counted.ids])
    below = counted.uncertainty <= calibration.rule.threshold
    assert counted.failure.tolist() == wrong.astype(int).tolist()
    assert calibration.rule.n_wrong == wrong[below].sum()
    assert calibration.rule.n_accepted == below.sum()
    return True
