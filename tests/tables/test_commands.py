"""Test tables of answers through the command line, from the file to decisions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vilu
from tests.command import run
from tests.tables.answers import columns, table, written
from vilu.methods import AnswerProbe, AnswerScore, AnswerScores
from vilu.outcomes.outcomes import Outcomes
from vilu.tables.explain import explain_answers
from vilu.tables.onnx import batch_of, random_graph_inputs

ONE_SCORE = ("id", "score_a", "correct")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tables to fit, to calibrate and to test on, and two tables with one score column."""
    folder = tmp_path_factory.mktemp("tables")
    written(folder / "fit.csv", columns(500))
    written(folder / "calibration.csv", columns(800, 1000))
    written(folder / "test.csv", columns(1000, 2000))
    written(folder / "one.csv", columns(800, 1000), ONE_SCORE)
    written(folder / "new.csv", columns(1000, 2000), ONE_SCORE)
    return folder


def test_one_column_of_scores_needs_no_fit(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    command = ("calibrate", work / "one.csv", "--max-risk", 0.05, "-o", folder)
    done = run(*command)
    assert "with confidence 95% at most 5.00% of the accepted answers are wrong" in done.stdout
    data = vilu.open_table(work / "one.csv")
    by_hand = vilu.certify(Outcomes(-data.numbers["score_a"], data.failure), max_risk=0.05)
    assert vilu.Calibration.load(folder).rule.threshold == by_hand.threshold
    assert "there is nothing to do" in run(*command).stderr
    refused = run("calibrate", work / "one.csv", "--max-risk", 0.1, "-o", folder, code=2)
    assert "--overwrite" in refused.stderr

    scores = tmp_path / "scores.csv"
    run("score", folder, work / "new.csv", "-o", scores)
    outcomes = Outcomes.load(scores)
    uncertainty = -vilu.open_table(work / "new.csv").numbers["score_a"]
    assert outcomes.uncertainty.tolist() == uncertainty.tolist()
    accepted = [decision == "accept" for decision in outcomes.decision]
    assert accepted == by_hand.accept(uncertainty).tolist()
    assert outcomes.ids[0] == "row2000"

    evaluated = json.loads(run("evaluate", scores, "--json").stdout)
    auroc = next(row["value"] for row in evaluated if row["metric"] == "auroc")
    assert auroc == pytest.approx(vilu.metrics.auroc(uncertainty, table(1000, 2000).failure))
    assert "holds" in run("monitor", folder, scores).stdout


def test_several_columns_are_fitted_first(work: Path, tmp_path: Path) -> None:
    predictor = tmp_path / "predictor"
    fit = ("fit", work / "fit.csv", "-o", predictor)
    assert "answer_scores fitted on 500 rows" in run(*fit).stderr
    assert "there is nothing to do" in run(*fit).stderr
    run("calibrate", predictor, work / "calibration.csv", "--max-risk", 0.05)
    scores = tmp_path / "scores.parquet"
    run("score", predictor, work / "test.csv", "-o", scores)
    model = vilu.load(predictor)
    expected = model.predict(vilu.open_table(work / "test.csv"))
    assert Outcomes.load(scores).uncertainty.tolist() == expected.uncertainty.tolist()
    run("score", predictor, work / "test.csv", "-o", tmp_path / "parts")
    parts = vilu.ScoreFolder(tmp_path / "parts").outcomes()
    assert parts.uncertainty.tolist() == expected.uncertainty.tolist()
    assert parts.decision == expected.decision


def test_features_beside_the_table_are_read_and_watched(tmp_path: Path) -> None:
    """Changed features are a changed input, even if the table file is the same."""
    content = columns(500, features=40)
    path = written(tmp_path / "fit.csv", content)
    predictor = tmp_path / "predictor"
    fit = ("fit", path, "--method", "answer_probe", "-o", predictor)
    run(*fit)
    assert vilu.load(predictor).notes_["n_features"] == 40
    assert "there is nothing to do" in run(*fit).stderr
    np.save(tmp_path / "fit.features.npy", content["features"] + 1)
    assert "--overwrite" in run(*fit, code=2).stderr


def test_each_column_of_scores_is_evaluated(work: Path) -> None:
    rows = json.loads(run("evaluate", work / "test.csv", "--json").stdout)
    data = table(1000, 2000)
    for name, sign in (("score_a", -1), ("uncertainty_b", 1)):
        expected = vilu.metrics.auroc(sign * data.numbers[name], data.failure)
        (row,) = [row for row in rows if (row["method"], row["metric"]) == (name, "auroc")]
        assert row["value"] == pytest.approx(expected)
    assert {row["method"] for row in rows} == {"score_a", "uncertainty_b"}


@pytest.fixture(scope="module")
def calibrated(work: Path) -> Path:
    predictor = work / "predictor"
    run("fit", work / "fit.csv", "-o", predictor)
    run("calibrate", predictor, work / "calibration.csv", "--max-risk", 0.1)
    return predictor


def test_a_monitor_takes_tables_as_it_takes_scores(
    work: Path, calibrated: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.parquet"
    run("score", calibrated, work / "test.csv", "-o", scores)
    of_scores = json.loads(run("monitor", calibrated, scores, "--json").stdout)
    state = tmp_path / "state.parquet"
    command = ("monitor", calibrated, work / "test.csv", "--json", "--state", state)
    of_table = json.loads(run(*command).stdout)
    assert of_table["rows"] == 1000
    for fact in ("verdict", "rows", "acceptance", "audit", "tests"):
        assert of_table[fact] == of_scores[fact]
    again = json.loads(run(*command).stdout)
    assert again["rows"] == 1000
    assert again["batches"][0]["repeated"] >= 1000


def test_answers_that_became_worse_raise_an_alarm(
    work: Path, calibrated: Path, tmp_path: Path
) -> None:
    """All scores are as before, but a third of the answers are wrong."""
    content = columns(3000, 50_000)
    content["correct"] = (np.random.default_rng(0).random(3000) > 1 / 3).astype(int)
    worse = written(tmp_path / "worse.csv", content)
    assert "broken" in run("monitor", calibrated, worse, code=8).stdout


def test_a_page_is_made_of_a_table(work: Path, calibrated: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    run("report", work / "test.csv", "-o", page, "--predictor", calibrated)
    assert "at most 10.00% of the accepted answers are wrong" in page.read_text()
    run("report", work / "test.csv", "-o", tmp_path / "columns.html")
    assert "uncertainty_b" in (tmp_path / "columns.html").read_text()


def test_inspect_says_what_each_column_is(work: Path, calibrated: Path) -> None:
    shown = run("inspect", work / "test.csv").stdout
    assert "table of answers, 1,000 rows" in shown
    assert "uncertainty_b  uncertainty: a higher number means more likely wrong" in shown
    assert "width          number whose sign a fit learns" in shown
    facts = json.loads(run("inspect", work / "test.csv", "--json").stdout)
    assert facts["right"] + facts["wrong"] == facts["rows"] == 1000
    assert "predictor answer_scores, calibrated: accepts" in run("inspect", calibrated).stdout


def test_inspect_needs_no_word_for_what_it_shows(work: Path) -> None:
    refused = run("inspect", "table", work / "test.csv", code=2)
    assert "table does not exist. `vilu inspect PATH` takes one path" in refused.stderr


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id;score_a;correct\n1;0,5;ja\n", "correct must be 1 (right), 0 (wrong), or empty"),
        ("score_a,correct\n0.5,1\n", "must have a column id"),
    ],
)
def test_a_csv_without_scores_is_read_as_a_table(
    tmp_path: Path, command: str, text: str, words: str
) -> None:
    (tmp_path / "sheet.csv").write_text(text)
    assert words in run(command, tmp_path / "sheet.csv", code=3).stderr


def test_inspect_reads_scores_in_csv(work: Path, calibrated: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.csv"
    run("score", calibrated, work / "test.csv", "-o", scores)
    assert "outcomes, 1,000 rows" in run("inspect", scores).stdout
    scores.write_text("uncertainty\n0.5\n")
    assert "Missing: failure" in run("inspect", scores, code=3).stderr


def test_a_predictor_is_shared_with_its_guarantee(
    work: Path, calibrated: Path, tmp_path: Path
) -> None:
    run("push", calibrated, tmp_path / "hub")
    run("pull", tmp_path / "hub", "-o", tmp_path / "pulled")
    for predictor, name in ((calibrated, "first.csv"), (tmp_path / "pulled", "second.csv")):
        run("score", predictor, work / "test.csv", "-o", tmp_path / name)
    assert (tmp_path / "first.csv").read_bytes() == (tmp_path / "second.csv").read_bytes()
    card = (tmp_path / "pulled" / "README.md").read_text()
    assert "share of each column in the score" in card
    assert "vilu score predictor answers.csv" in card
    assert "backbone" not in card


@pytest.mark.parametrize("method", ["answer_scores", "answer_probe"])
def test_onnx_gives_the_same_scores(method: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    data = table(300, 500, features=40)
    path = written(tmp_path / "fit.csv", columns(500, features=40))
    run("fit", path, "--method", method, "-o", tmp_path / "p")
    run("export", tmp_path / "p", "-o", tmp_path / "p.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "p.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    inputs = {"numbers": data.matrix(json.loads(facts["vilu.columns"]))}
    if method == "answer_probe":
        inputs["features"] = data.features
    (uncertainty,) = session.run(None, inputs)
    expected = vilu.load(tmp_path / "p").predict_uncertainty(data)
    assert uncertainty == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", [AnswerScores, AnswerProbe])
def test_onnx_is_tried_on_rows_as_those_of_the_fit(method: type) -> None:
    content = columns(500, features=3)
    content["score_a"] = 5_000 + 10 * content["score_a"]  # far from 0
    predictor = method().fit(content)
    rows = random_graph_inputs(predictor)
    uncertainty = predictor.score_batch(batch_of(**rows)).numpy()
    assert len(np.unique(uncertainty)) > len(uncertainty) / 2
    of_score = rows["numbers"][:, predictor.used_columns.index("score_a")]
    assert np.median(of_score) == pytest.approx(np.median(content["score_a"]), abs=30)


def test_an_explanation_names_the_columns(work: Path, calibrated: Path) -> None:
    done = run("explain", calibrated, work / "test.csv", "-n", 1, "--json")
    (row,) = json.loads(done.stdout)["rows"]
    model = vilu.load(calibrated)
    data = vilu.open_table(work / "test.csv")
    uncertainty = model.predictor.predict_uncertainty(data)
    assert row["uncertainty"] == uncertainty.max()
    log_odds = np.log(uncertainty) - np.log1p(-uncertainty)
    assert sum(row["terms"].values()) == pytest.approx(log_odds.max() - log_odds.mean())
    shown = run("explain", calibrated, work / "test.csv", "--key", "row2003").stdout
    assert "row 3  row2003   answer 'cat'" in shown
    wrong = run("explain", calibrated, work / "test.csv", "--key", "none", code=3)
    assert "no row with the id 'none'" in wrong.stderr
    summary = run("explain", calibrated, work / "test.csv", "--summary", code=2)
    assert "Leave them out" in summary.stderr


def test_an_explanation_escapes_an_answer_once() -> None:
    answers = vilu.open_table({"id": ["a"], "answer": ["two\nlines"], "score": [0.5]})
    text = str(explain_answers(AnswerScore(), answers))
    assert r"answer 'two\nlines'" in text


def filled(path: Path, truth: dict[str, int]) -> Path:
    """Fill in every label in a table from ``vilu next``, and return its path."""
    heading, *lines = path.read_text().splitlines()
    column = heading.split(",").index("correct")
    written_lines = [heading]
    for line in lines:
        cells = [cell.strip('"') for cell in line.split(",")]
        cells[column] = str(truth[cells[0]])
        written_lines.append(",".join(cells))
    path.write_text("\n".join(written_lines) + "\n")
    return path


def test_answers_to_label_next_are_for_a_fit_and_for_a_guarantee(
    work: Path, calibrated: Path, tmp_path: Path
) -> None:
    content = columns(3000, 90_000)
    truth = dict(zip(content["id"], content.pop("correct").tolist(), strict=True))
    new = written(tmp_path / "new.csv", content)
    ask = ("next", new, "--predictor", calibrated, "--next", 400)
    first = tmp_path / "first.csv"
    hints = run(*ask, "-o", first).stderr
    assert f"`vilu fit {first} -o better`" in hints
    assert f"`vilu calibrate better {first} --max-risk 0.05`" in hints
    asked = vilu.open_table(first)
    assert asked.asked_for.count("calibration") == asked.asked_for.count("fit") == 200
    missing = run("calibrate", calibrated, first, "--max-risk", 0.2, code=3)
    assert "200 of the labels that were asked for are missing" in missing.stderr
    assert "go to a new .csv file" in run(*ask, "-o", first, code=2).stderr

    second = tmp_path / "second.csv"
    run(*ask, "--labels", first, "-o", second)
    later = vilu.open_table(second)
    assert not set(asked.ids) & set(later.ids)

    labelled = ("next", work / "test.csv", "--predictor", calibrated, "-o", tmp_path / "no.csv")
    assert "every answer" in run(*labelled, code=2).stderr

    predictor = tmp_path / "predictor"
    run("fit", filled(first, truth), "-o", predictor)
    assert vilu.load(predictor).notes_["n_train"] == 200
    run("calibrate", predictor, first, "--max-risk", 0.2)
    assert vilu.Calibration.load(predictor).n == 200
    # the calibration rows are a random sample: as many wrong as in all rows, within 4 standard
    # errors
    share = 1 - np.mean(list(truth.values()))
    rows = vilu.Calibration.load(predictor).rows
    assert rows.failure.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / 200) ** 0.5)


def test_near_copies_are_mentioned_only_where_vectors_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilu.calibration.procedure.MAX_COMPARED_PICTURES", 50)
    bare = written(tmp_path / "bare.csv", columns(500), only=("id", "score_a", "correct"))
    said = run("calibrate", bare, "--max-risk", 0.4, "-o", tmp_path / "bare").stderr
    assert "near copies" not in said

    path = written(tmp_path / "table.csv", columns(500, features=40))
    predictor = tmp_path / "predictor"
    run("fit", written(tmp_path / "fit.csv", columns(500, 500, features=40)), "-o", predictor)
    said = run("calibrate", predictor, path, "--max-risk", 0.4).stderr
    assert "near copies are searched among at most 50 pictures" in said


def test_a_pulled_predictor_of_tables_is_said_to_take_a_table(
    work: Path, calibrated: Path, tmp_path: Path
) -> None:
    run("push", calibrated, tmp_path / "shelf")
    hint = run("pull", tmp_path / "shelf", "-o", tmp_path / "rows").stderr
    assert f"next: vilu score {tmp_path / 'rows'} TABLE -o scores.parquet" in hint


def test_questions_of_a_table_take_no_risk_that_would_change_nothing(
    work: Path, calibrated: Path, tmp_path: Path
) -> None:
    ask = ("next", work / "new.csv", "--predictor", calibrated, "-o", tmp_path / "next.csv")
    assert "Leave --max-risk out" in run(*ask, "--max-risk", 0.1, code=2).stderr


def test_questions_keep_columns_with_commas_and_quotes(calibrated: Path, tmp_path: Path) -> None:
    content = columns(100, 40_000)
    del content["correct"]
    names = ["a,b", 'the "c"']
    content.update(dict.fromkeys(names, [1.5] * 100))
    path = tmp_path / "new.parquet"
    pq.write_table(pa.table(content), path)
    run("next", path, "--predictor", calibrated, "-o", tmp_path / "next.csv")
    asked = vilu.open_table(tmp_path / "next.csv")
    assert list(asked.numbers)[-2:] == names
    assert asked.numbers["a,b"].tolist() == [1.5] * len(asked)


def test_features_that_are_there_are_not_taken_for_those_of_new_questions(
    work: Path, calibrated: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "next.features.npy"
    np.save(beside, np.zeros((3, 2)))
    before = beside.read_bytes()
    ask = ("next", work / "new.csv", "--predictor", calibrated, "-o", tmp_path / "next.csv")
    assert "would be read as the features" in run(*ask, code=2).stderr
    assert beside.read_bytes() == before


def test_asked_for_is_checked(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", {"id": [1], "score": [0.5], "asked_for": ["test"]})
    wrong = run("inspect", path, code=3)
    assert "asked_for must be fit or calibration" in wrong.stderr


def test_what_cannot_be_done_says_what_can(work: Path, tmp_path: Path) -> None:
    several = run("calibrate", work / "fit.csv", "--max-risk", 0.1, "-o", tmp_path / "c", code=2)
    assert "the columns score_a, uncertainty_b" in several.stderr
    assert "vilu fit TABLE" in several.stderr
    assert "and then `vilu calibrate PREDICTOR ANOTHER_TABLE`." in several.stderr
    estimated = run("estimate", work / "fit.csv", code=2)
    assert f"and then `vilu estimate {work / 'fit.csv'} --predictor PREDICTOR`." in estimated.stderr
    assert "needs -o FOLDER" in run("calibrate", work / "one.csv", code=2).stderr
    flags = run("fit", work / "fit.csv", "--pool-size", 8, "-o", tmp_path / "p", code=2)
    assert "is a table of answers" in flags.stderr
    wrong = run("fit", work / "fit.csv", "--method", "mcm_ts", "-o", tmp_path / "p", code=2)
    assert "for which there are answer_scores, answer_probe, answer_score" in wrong.stderr
    shots = run("fit", work / "fit.csv", "--shots", 2, "-o", tmp_path / "p", code=2)
    assert "--shots and --pseudo are about classes" in shots.stderr
    assert not (tmp_path / "p").exists()
    run("fit", work / "fit.csv", "-o", tmp_path / "p")
    seen = run("calibrate", tmp_path / "p", work / "fit.csv", "--max-risk", 0.1, code=3)
    assert "500 of 500 calibration rows were used to fit" in seen.stderr
    alone = run("calibrate", tmp_path / "p", code=2)
    assert "STORE is missing" in alone.stderr
    both = run("calibrate", tmp_path / "p", work / "one.csv", "-o", tmp_path / "c", code=2)
    assert "Leave -o out" in both.stderr
    hopeless = run("calibrate", work / "one.csv", "--max-risk", 0.001, "-o", tmp_path / "c", code=4)
    assert "would be needed" in hopeless.stderr or "are needed" in hopeless.stderr
