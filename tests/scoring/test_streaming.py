"""Test scores of any size: parts, receipts, resuming, and evaluation from counts."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

import vilu
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.command import run
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu.artifacts.disk import host_hash
from vilu.artifacts.documents import read_document, write_json
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.embeddings.memory import Embeddings, PairEmbeddings
from vilu.embeddings.pairs import Pools
from vilu.embeddings.rows import SCORING_BATCH
from vilu.errors import (
    BusyError,
    DataError,
    NotFittedError,
    ProvenanceError,
    StorageError,
    UsageError,
)
from vilu.metrics import METRICS
from vilu.metrics.histogram import Histogram
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors import PREDICTORS
from vilu.predictors.persistence.storage import load_predictor
from vilu.progress import SilentProgress, reporting
from vilu.scoring import score_folder
from vilu.scoring.score import predictor_fingerprint, score_parts, source_fingerprint
from vilu.scoring.score_folder import Counts, ScoreFolder, ScorePart, ScoreReceipt, ScoreRun
from vilu.store.embed import embed

N = 2 * SCORING_BATCH + 900
"""Rows for two full scoring batches and a smaller third one."""

ROUNDING = 2e-6
"""A float32 logit of 20 is rounded by 1e-6, which changes a probability by as large a share."""


@pytest.fixture(scope="module")
def data() -> Embeddings:
    found = toy_embeddings(n=N, seed=3, ids_from=50_000)
    image, target = found.image.clone(), found.target.clone()
    image[5], image[700], image[N - 1] = 0, float("nan"), float("inf")
    target[10:20] = -1
    return variant(found, image=image, target=target, columns={}, class_names=found.class_names)


@pytest.fixture(scope="module")
def head(train: Embeddings) -> vilu.FailurePredictor:
    return vilu.LVU(epochs=1, hidden=(4,)).fit(train)


@pytest.fixture(scope="module")
def done(data: Embeddings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "mcm"
    score_parts(vilu.MCM(), data, folder, rows_per_part=1, dataset="toy", split="test")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def assert_same_outcomes(found: Outcomes, expected: Outcomes) -> None:
    """Require the same outcomes, and uncertainties up to the rounding of float32 logits.

    With another number of rows, some processors round a product differently.
    """
    np.testing.assert_allclose(found.uncertainty, expected.uncertainty, rtol=ROUNDING)
    for name in ("failure", "prediction", "target"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in (
        "ids",
        "reason",
        "class_names",
        "method",
        "dataset",
        "split",
        "seed",
        "provenance",
        "is_probability",
    ):
        assert getattr(found, name) == getattr(expected, name), name


def short_pairs(n: int = 200, pool: int = 32) -> PairEmbeddings:
    """Return pairs as a caption store may hold them.

    Some pairs are unusable, and some are left over because they do not fill a last pool.
    """
    found = toy_pairs(n=256, pool=pool)
    found.status[[3, 40]] = 1, 2
    found.usable_rows = torch.from_numpy(np.flatnonzero(found.status == 0)[:n])
    return found


def test_parts_hold_what_scoring_in_memory_gives(data: Embeddings, done: Path) -> None:
    folder = ScoreFolder(done)
    assert_same_outcomes(
        folder.outcomes(), vilu.score(vilu.MCM(), data, dataset="toy", split="test")
    )
    counts = folder.counts
    assert (counts.n_in, counts.n_scored, counts.n_unlabelled) == (N, N - 3, 10)
    assert counts.unscored == {"nonfinite": 2, "zero_norm": 1}
    assert [len(part) for part in folder.run.parts] == [SCORING_BATCH, SCORING_BATCH, 897, 3]
    assert len(folder) == N
    folder.verify()


def test_a_part_is_a_file_of_outcomes(data: Embeddings, done: Path, tmp_path: Path) -> None:
    table = pq.read_table(done / "scores" / "scores_00001.parquet")
    vilu.score(vilu.MCM(), data).save(tmp_path / "all.parquet")
    assert table.schema.equals(pq.read_table(tmp_path / "all.parquet").schema)
    whole = pq.read_table(tmp_path / "all.parquet").take(table["row_id"])
    for name in set(table.column_names) - {"score_name", "uncertainty"}:
        assert table[name].equals(whole[name]), name
    np.testing.assert_allclose(table["uncertainty"], whole["uncertainty"], rtol=ROUNDING)
    assert len(Outcomes.load(done / "scores" / "scores_00003.parquet")) == 3


@pytest.mark.parametrize("source", [toy_pairs(), short_pairs()], ids=["whole", "short"])
def test_pairs_are_scored_in_whole_pools(
    source: PairEmbeddings, head: vilu.FailurePredictor, tmp_path: Path
) -> None:
    folder = score_parts(head, source, tmp_path / "s", rows_per_part=70)
    whole = len(source.usable_rows) // 32 * 32
    assert folder.run.rows_per_part == 64
    assert (folder.counts.n_in, folder.counts.n_scored) == (256, whole)
    found = folder.outcomes()
    np.testing.assert_array_equal(found.uncertainty, head.predict_uncertainty(source))
    for batch in source.batches(SCORING_BATCH):
        for name in ("failure", "prediction", "target"):
            np.testing.assert_array_equal(
                getattr(found, name)[batch.index], getattr(batch, name), err_msg=name
            )
    left = {"nonfinite": 1, "zero_norm": 1, "short_pool": 254 - whole} if whole < 256 else {}
    assert folder.counts.unscored == left


def test_pools_in_a_random_order(tmp_path: Path) -> None:
    plain = toy_pairs()
    mixed = PairEmbeddings(
        plain.image, plain.text, Pools(32, seed=1), 20.0, ids=[f"k{i}" for i in range(256)]
    )
    folder = score_parts(vilu.MCM(), mixed, tmp_path / "s", rows_per_part=32)
    assert_same_outcomes(folder.outcomes(), vilu.score(vilu.MCM(), mixed))
    first = pq.read_table(tmp_path / "s" / "scores" / "scores_00000.parquet")
    assert first["row_id"].to_pylist() == mixed.usable_rows[:32].tolist()
    assert first["key"].to_pylist() == [f"k{i}" for i in mixed.usable_rows[:32].tolist()]


def test_one_candidate_is_no_question(test: Embeddings, tmp_path: Path) -> None:
    folder = score_parts(
        vilu.MCM(),
        Embeddings(test.image, test.text[:1], target=None, logit_scale=20.0),
        tmp_path / "s",
    )
    assert folder.counts.unscored == {"k<2": len(test)}
    with pytest.raises(DataError, match="600 no uncertainty"):
        vilu.evaluate(folder)


def test_values_do_not_depend_on_the_size_of_a_part(
    data: Embeddings, done: Path, tmp_path: Path
) -> None:
    one = score_parts(vilu.MCM(), data, tmp_path / "s", dataset="toy", split="test")
    assert len(one.run.parts) == 2
    assert_same_outcomes(one.outcomes(), ScoreFolder(done).outcomes())
    tables = [vilu.evaluate(folder, n_resamples=0) for folder in (one, ScoreFolder(done))]
    values = [[row.value for row in table.rows] for table in tables]
    np.testing.assert_allclose(*values, rtol=ROUNDING)


def test_evaluation_of_a_folder_is_that_of_the_rows(done: Path) -> None:
    metrics = list(METRICS)
    folder = ScoreFolder(done)
    exact = vilu.evaluate(folder.outcomes(), metrics=metrics, n_resamples=0).to_dicts()
    assert vilu.evaluate(folder, metrics=metrics, n_resamples=0).to_dicts() == exact
    row = vilu.evaluate([ScoreFolder(done)], metrics=["auroc"], n_resamples=50).rows[0]
    assert row.ci_low < row.value < row.ci_high
    assert row.interval == "95 % stratified bootstrap, 50 resamples"
    assert (row.n, row.n_unlabelled, row.n_unusable) == (N - 13, 10, 3)


@pytest.mark.parametrize("method", ["mcm", "max_logit"])
def test_a_folder_is_evaluated_by_its_calibrated_probability(
    data: Embeddings, tmp_path: Path, method: str
) -> None:
    """MCM's uncertainty is a probability, and that of max_logit is none."""
    predictor = tmp_path / "predictor"
    PREDICTORS[method]().save(predictor)
    calibrate_predictor(predictor, data, Target())
    calibrated = load_predictor(predictor)
    folder = score_parts(calibrated, data, tmp_path / "scores", rows_per_part=1)
    assert len(folder.run.parts) == 4
    table = vilu.evaluate(folder, n_resamples=50)
    assert table.to_dicts() == vilu.evaluate(folder.outcomes(), n_resamples=50).to_dicts()
    error = table.filter(metric="ece").rows[0]
    assert error.convention.endswith("equal width; of the calibrated failure_probability")


def read_in_bins(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read folders from now on as if at most `most` bins were allowed."""
    read = score_folder.read_histogram

    def read_coarsely(root: Path, receipt: ScoreReceipt) -> tuple[Histogram, ...]:
        return tuple(replace(part, max_bins=most) for part in read(root, receipt))

    monkeypatch.setattr(score_folder, "read_histogram", read_coarsely)


def test_evaluation_says_when_it_is_of_bins(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = vilu.evaluate(ScoreFolder(done), n_resamples=0)
    read_in_bins(4096, monkeypatch)
    folder = ScoreFolder(done)
    coarse = vilu.evaluate(folder, n_resamples=0)
    assert (
        "ties count half; histogram of at most 4,096 bins"
        in coarse.filter(metric="auroc").rows[0].convention
    )
    bound = folder.histogram.tied_pairs / 2
    assert 0 < abs(coarse.value("auroc") - exact.value("auroc")) <= bound < 1e-3
    # The threshold moves inside one bin.
    one_bin = folder.histogram.wrong.max() / folder.histogram.n_failures
    assert coarse.value("fpr95") == pytest.approx(exact.value("fpr95"), abs=one_bin)


@pytest.mark.parametrize(
    "lost",
    [
        ["receipts/00001.json"],
        ["receipts/00000.json", "scores/scores_00000.parquet"],
        ["histograms/histogram_00002.parquet"],
        ["manifest.json"],
        [
            "manifest.json",
            "receipts/00002.json",
            "receipts/00003.json",
            "scores/scores_00003.parquet",
        ],
    ],
    ids=" ".join,
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    lost: list[str], data: Embeddings, done: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(done, folder)
    before = files_of(folder)
    kept = {
        name: (folder / name).stat().st_mtime_ns for name in before if name.startswith("receipts")
    }
    for name in lost:
        (folder / name).unlink()
    (folder / "scores" / f".scores_00001.parquet.{host_hash()}.{10**30}.0a1b2c3d.tmp").write_bytes(
        b"half"
    )
    with pytest.raises((DataError, StorageError)):
        ScoreFolder(folder)
    steps: list[float] = []

    class Watch(SilentProgress):
        def start(self, description: str, total: float | None, unit: str) -> SilentProgress:
            return self if description == "score" else SilentProgress()

        def advance(self, n: float, note: str = "") -> None:
            steps.append(n)

    with reporting(Watch()):
        score_parts(vilu.MCM(), data, folder, rows_per_part=1, dataset="toy", split="test")
    assert files_of(folder) == before
    redone = [n for n, time in kept.items() if (folder / n).stat().st_mtime_ns != time]
    numbers = {
        int("".join(filter(str.isdigit, Path(name).stem)))
        for name in lost
        if name != "manifest.json"
    }
    assert redone == [f"receipts/{number:05d}.json" for number in sorted(numbers)]
    assert sum(steps) == sum(len(ScoreFolder(done).run.parts[number]) for number in numbers)


def test_what_another_process_writes_is_left_alone(
    data: Embeddings, done: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(done, folder)
    names = [
        f"scores/.scores_00001.parquet.{host_hash()}.{os.getpid()}.0a1b2c3d.tmp",
        f".notes.txt.{10**30}.0a1b2c3d.tmp",
    ]
    for name in names:
        (folder / name).write_bytes(b"half")
    score_parts(vilu.MCM(), data, folder, rows_per_part=1, dataset="toy", split="test")
    assert [(folder / name).read_bytes() for name in names] == [b"half"] * 2


def test_a_run_that_dies_in_the_middle_leaves_whole_parts(
    data: Embeddings, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vilu.store import ledger

    real, calls = ledger.write_hashed, []

    def dying(path: Path, content: memoryview) -> object:
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(path, content)

    monkeypatch.setattr(ledger, "write_hashed", dying)
    with pytest.raises(KeyboardInterrupt):
        score_parts(vilu.MCM(), data, tmp_path / "s", rows_per_part=1, dataset="toy", split="test")
    assert [p.name for p in (tmp_path / "s" / "receipts").iterdir()] == ["00000.json"]
    monkeypatch.undo()
    score_parts(vilu.MCM(), data, tmp_path / "s", rows_per_part=1, dataset="toy", split="test")
    assert files_of(tmp_path / "s") == files_of(done)


def test_another_run_is_refused_and_named(
    data: Embeddings, done: Path, head: vilu.FailurePredictor, tmp_path: Path
):
    folder = tmp_path / "s"
    shutil.copytree(done, folder)
    before = files_of(folder)
    same = {"rows_per_part": 1, "dataset": "toy", "split": "test"}
    for predictor, source, changes, said in (
        (head, data, {}, "method: 'mcm' .* against 'lvu'"),
        (vilu.MCM(), toy_embeddings(n=N), {}, "source: "),
        (vilu.MCM(), data, {"rows_per_part": 5000}, "rows_per_part: 4096 .* against 8192"),
        (vilu.MCM(), data, {"split": "train"}, "split: 'test' .* against 'train'"),
    ):
        with pytest.raises(ProvenanceError, match=said):
            score_parts(predictor, source, folder, **{**same, **changes})
    assert files_of(folder) == before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        score_parts(head, data, folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert files_of(folder) == before
    replaced = score_parts(head, data, folder, overwrite=True)
    assert replaced.run.method == "lvu"
    assert_same_outcomes(replaced.outcomes(), vilu.score(head, data))


def test_folders_that_are_something_else(data: Embeddings, done: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").touch()
    with pytest.raises(UsageError, match=r"holiday\.jpg"):
        score_parts(vilu.MCM(), data, tmp_path / "full")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "run.json").write_text(
        '{"schema_version": 1, "dataset_fingerprint": "x"}'
    )
    with pytest.raises(UsageError, match=r"run\.json is of no folder of scores"):
        score_parts(vilu.MCM(), data, tmp_path / "store", overwrite=True)
    with pytest.raises(DataError, match="no folder of scores"):
        ScoreFolder(tmp_path / "full")
    shutil.copytree(done, tmp_path / "s")
    with FileLock(tmp_path / "s" / ".lock"), pytest.raises(BusyError, match="another process"):
        score_parts(vilu.MCM(), data, tmp_path / "s", rows_per_part=1, dataset="toy", split="test")


def edited(change: object, name: str):
    def do(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        write_json(folder / name, content)

    return do


def flipped(name: str):
    def do(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return do


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (edited(lambda c: c.update(n_in=N + 1), "run.json"), ProvenanceError, "belongs to run"),
        (
            edited(lambda c: c.update(schema_version=3), "run.json"),
            ProvenanceError,
            "schema version 3",
        ),
        (edited(lambda c: c.pop("source"), "run.json"), StorageError, "source"),
        (
            edited(lambda c: c["counts"].update(n_scored=1), "receipts/00000.json"),
            StorageError,
            "n_in=4096 is not",
        ),
        (
            edited(lambda c: c["counts"].update(n_failures=9000), "receipts/00000.json"),
            StorageError,
            "is less than",
        ),
        (
            edited(lambda c: c["counts"].update(n_failures=1), "receipts/00000.json"),
            ProvenanceError,
            "seals other",
        ),
        (
            edited(lambda c: c["part"].update(stop=5), "receipts/00000.json"),
            StorageError,
            "it describes",
        ),
        (
            lambda f: (f / "receipts" / "00001.json").write_text("{"),
            StorageError,
            "00001.json is damaged",
        ),
        (
            lambda f: (f / "scores" / "scores_00000.parquet").write_bytes(b"x"),
            StorageError,
            "has 1 bytes",
        ),
        (lambda f: (f / "scores" / "scores_00000.parquet").unlink(), StorageError, "is missing"),
        (
            flipped("histograms/histogram_00001.parquet"),
            StorageError,
            "is damaged: its SHA-256 is not",
        ),
    ],
)
def test_damage_is_found_and_named(
    damage, error: type[Exception], said: str, done: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(done, folder)
    damage(folder)
    with pytest.raises(error, match=said):
        ScoreFolder(folder).tally()


PART_FILES = [
    "scores/scores_00001.parquet",
    "histograms/histogram_00002.parquet",
    "scores/scores_00003.parquet",
]


@pytest.mark.parametrize("name", PART_FILES)
def test_scoring_again_mends_a_damaged_part_and_says_so(
    name: str, data: Embeddings, done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(done, folder)
    flipped(name)(folder)
    with caplog.at_level("WARNING", "vilu"):
        score_parts(vilu.MCM(), data, folder, rows_per_part=1, dataset="toy", split="test")
    (said,) = caplog.messages
    assert said.startswith(f"part {int(name[-9:-8])} is done again: {folder / name} is damaged")
    assert files_of(folder) == files_of(done)


def test_no_command_believes_a_damaged_part(data: Embeddings, tmp_path: Path) -> None:
    folder, predictor, page = tmp_path / "scores", tmp_path / "predictor", tmp_path / "page.html"
    vilu.MCM().save(predictor)
    calibrate_predictor(predictor, data, Target(max_risk=0.9))
    calibration = vilu.Calibration.load(predictor)
    score_parts(load_predictor(predictor), data, folder, rows_per_part=1, calibration=calibration)
    calls = {
        "histograms/histogram_00001.parquet": [("evaluate", folder)],
        "scores/scores_00001.parquet": [
            ("monitor", predictor, folder),
            ("report", folder, "-o", page),
        ],
    }
    for name, commands in calls.items():
        flipped(name)(folder)
        for command in commands:
            assert f"{folder / name} is damaged" in run(*command, code=7).stderr
        flipped(name)(folder)


def test_verify_reads_every_byte(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(done, folder)
    flipped("scores/scores_00002.parquet")(folder)
    with pytest.raises(StorageError, match="scores_00002"):
        ScoreFolder(folder).verify()


def test_forged_histograms_are_refused(done: Path, tmp_path: Path) -> None:
    from vilu.scoring.score_folder import histogram_bytes, read_histogram
    from vilu.store.ledger import write_hashed

    receipt = read_document(done / "receipts" / "00000.json", ScoreReceipt)
    good, nothing = read_histogram(done, receipt)
    bins = good.bins.copy()
    bins[1] = bins[0]
    negative = good.correct.copy()
    negative[:2] += [-5, 5]
    for changes in (
        {"bins": bins},
        {"correct": negative},
        {"low": 0.9},
        {"level": 70},
        {"wrong": good.wrong * 2},
    ):
        made = {
            name: getattr(good, name)
            for name in ("bins", "correct", "wrong", "level", "low", "high")
        }
        forged = type(good)(**{**made, **changes})
        (tmp_path / "histograms").mkdir(exist_ok=True)
        info = write_hashed(
            tmp_path / receipt.part.histogram_file, histogram_bytes(forged, nothing)
        )
        files = {**receipt.files, receipt.part.histogram_file: info}
        with pytest.raises(StorageError, match="no histogram"):
            read_histogram(tmp_path, receipt.model_copy(update={"files": files}))
    info = write_hashed(
        tmp_path / receipt.part.histogram_file,
        histogram_bytes(good, replace(good, wrong=good.wrong + 1)),
    )
    files = {**receipt.files, receipt.part.histogram_file: info}
    with pytest.raises(StorageError, match="more rows of none of the classes than wrong answers"):
        read_histogram(tmp_path, receipt.model_copy(update={"files": files}))


def test_a_folder_counts_what_is_of_none_of_the_classes(
    data: Embeddings, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder has the same values as memory. With few bins, the values differ by what ties allow.

    If no row is outside the classes, the histograms have no columns for such rows.
    """
    target = data.target.clone()
    target[::7] = vilu.OUTSIDE
    strange = variant(data, target=target, class_names=data.class_names)
    folder = score_parts(vilu.MCM(), strange, tmp_path / "s", rows_per_part=1)
    assert len(folder.run.parts) == 4
    outcomes = folder.outcomes()
    metrics = list(METRICS)
    exact = vilu.evaluate(outcomes, metrics=metrics, n_resamples=0).to_dicts()
    assert vilu.evaluate(folder, metrics=metrics, n_resamples=0).to_dicts() == exact
    assert exact[0]["n_outside"] == np.count_nonzero(outcomes.outside & outcomes.evaluable)
    assert pq.read_table(done / "histograms" / "histogram_00000.parquet").column_names == [
        "bin",
        "correct",
        "wrong",
    ]
    read_in_bins(512, monkeypatch)
    coarse = vilu.evaluate(ScoreFolder(folder.path), n_resamples=0)
    for name in ("auroc_within", "auroc_outside"):
        found = next(row["value"] for row in exact if row["metric"] == name)
        assert coarse.value(name) == pytest.approx(found, abs=1e-2)
        assert coarse.value(name) != found


def test_rows_that_were_fitted_on_are_noticed(head: vilu.FailurePredictor, tmp_path: Path) -> None:
    mixed = toy_embeddings(n=50, seed=5)
    mixed.image[:20] = toy_embeddings().image[580:]  # 20 training rows, under other names
    with pytest.warns(UserWarning, match="20 of 50 rows were used to fit this lvu"):
        folder = score_parts(head, mixed, tmp_path / "s")
    assert folder.outcomes().provenance["n_seen_in_fit"] == 20


def test_what_cannot_be_scored_is_refused(test: Embeddings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to score"):
        score_parts(
            vilu.MCM(),
            Embeddings(np.empty((0, 16)), test.text, target=None, logit_scale=20.0),
            tmp_path / "s",
        )
    with pytest.raises(NotFittedError):
        score_parts(vilu.LVU(), test, tmp_path / "s")
    with pytest.raises(UsageError, match="rows_per_part"):
        score_parts(vilu.MCM(), test, tmp_path / "s", rows_per_part=0)
    assert not (tmp_path / "s").exists()


def test_scores_that_are_not_finite_are_refused(
    test: Embeddings, train: Embeddings, tmp_path: Path
) -> None:
    broken = vilu.LVU(epochs=1, hidden=(4,)).fit(train)
    broken.restore({name: torch.full_like(t, torch.nan) for name, t in broken.state().items()})
    with pytest.raises(DataError, match="600 scores that are not finite"):
        score_parts(broken, test, tmp_path / "s")


def test_answers_are_computed_once(
    test: Embeddings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A score that computes the logits passes them on to the answer.

    A second product or a second pass would waste time.
    """
    from vilu.embeddings import source

    def never(*_: object) -> None:
        raise AssertionError("the answers were computed again")

    monkeypatch.setattr(source, "zero_shot", never)
    assert score_parts(vilu.MCM(), test, tmp_path / "s").counts.n_scored == len(test)


def test_fingerprints_tell_what_matters(
    test: Embeddings, train: Embeddings, head: vilu.FailurePredictor
) -> None:
    again = vilu.LVU(epochs=1, hidden=(4,)).fit(train)
    assert predictor_fingerprint(again) == predictor_fingerprint(head)
    seeds = {
        predictor_fingerprint(p)
        for p in (head, vilu.LVU(epochs=1, hidden=(4,), seed=1).fit(train), vilu.MCM())
    }
    assert len(seeds) == 3
    image = test.image.clone()
    image[0] = test.image[1]
    target = test.target.clone()
    target[4] = -1
    changes = [{"image": image}, {"target": target}, {"ids": None}, {"class_names": None}, {}]
    found = [
        source_fingerprint(variant(test, **{"class_names": test.class_names, **one}))
        for one in changes
    ]
    assert [one == source_fingerprint(test) for one in found] == [False, False, False, False, True]
    pairs = {
        source_fingerprint(source)
        for source in (toy_pairs(), toy_pairs(seed=1), short_pairs(), toy_pairs(pool=64))
    }
    assert len(pairs) == 4


def test_every_method_streams_what_it_scores(train: Embeddings, tmp_path: Path) -> None:
    """Columns, closed sets and devices take the same path in both ways of scoring."""
    part = toy_embeddings(n=50, seed=1, ids_from=10_000)
    for name in ("rel_u", "knn_distance", "tta", "prompt_disagreement", "linear_probe"):
        predictor = PREDICTORS[name]().fit(train)
        folder = score_parts(predictor, part, tmp_path / name)
        np.testing.assert_array_equal(
            folder.outcomes().uncertainty, vilu.score(predictor, part).uncertainty
        )


def test_counts_and_parts_add_up() -> None:
    a = Counts(
        n_in=5, n_scored=3, n_failures=1, n_unlabelled=1, unscored={"nonfinite": 2}, n_seen=1
    )
    b = Counts(n_in=1, n_scored=0, n_failures=0, n_unlabelled=0, unscored={"k<2": 1}, n_seen=0)
    total = Counts.total([a, b])
    assert (total.n_in, total.n_scored, total.unscored) == (6, 3, {"k<2": 1, "nonfinite": 2})
    same = {
        "predictor": "p",
        "source": "s",
        "method": None,
        "dataset": None,
        "split": None,
        "seed": None,
        "answer": "zero_shot",
    }
    run = ScoreRun(
        n_in=12, n_candidate=7, rows_per_part=3, is_probability=True, provenance={}, **same
    )
    assert [(p.start, p.stop) for p in run.parts] == [(0, 3), (3, 6), (6, 7), (7, 10), (10, 12)]
    assert run.parts[3] == ScorePart(number=3, start=7, stop=10)


def test_a_renamed_store_is_the_same_rows_under_another_label(tmp_path: Path) -> None:
    """The dataset label is the folder's name, and nothing else depends on it."""
    embed(dataset(30), FakeBackbone(), tmp_path / "first", names=NAMES)
    vilu.MCM().save(tmp_path / "p")
    run("score", tmp_path / "p", tmp_path / "first", "-o", tmp_path / "a")
    (tmp_path / "first").rename(tmp_path / "second")
    said = run("score", tmp_path / "p", tmp_path / "second", "-o", tmp_path / "a", code=6).stderr
    assert (
        f"another run: dataset: 'first' ({tmp_path / 'a'}) against 'second' (now). "
        "Give another folder" in said
    )
    run("score", tmp_path / "p", tmp_path / "second", "-o", tmp_path / "b")
    a, b = (ScoreFolder(tmp_path / name) for name in "ab")
    assert (a.run.dataset, b.run.dataset) == ("first", "second")
    assert a.run.model_copy(update={"dataset": "second"}) == b.run
    np.testing.assert_array_equal(a.outcomes().uncertainty, b.outcomes().uncertainty)
