"""``vilu monitor`` through the real command line: a calibrated predictor, scores, a state and
exit codes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vilu
from tests.builders.store_fakes import NAMES, FakeBackbone, FakeDataset, picture
from tests.command import command as command_of
from tests.command import run
from tests.conftest import toy_embeddings
from vilu.backbones.zeroshot import embed_class_names
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.cli.app import app
from vilu.errors import (
    DataError,
    InfeasibleError,
    ProvenanceError,
    UsageError,
)
from vilu.store.embed import embed


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a calibrated predictor and scores.

    The calm rows have no labels, and a separate file holds their later labels. The hard rows are
    those with an uncertainty above the median.
    """
    folder = tmp_path_factory.mktemp("monitor")
    vilu.MCM().fit(toy_embeddings()).save(folder / "mcm")
    data = toy_embeddings(3000, seed=1, ids_from=10_000)
    calibrate_predictor(folder / "mcm", data, Target(max_risk=0.2), dataset="toy", split=None)
    model = vilu.load(folder / "mcm")

    def scored(seed: int) -> vilu.Outcomes:
        return vilu.score(model, toy_embeddings(800, seed=seed, ids_from=20_000))

    calm, rows = scored(2), scored(3)
    unlabelled = np.full(800, -1)
    dataclasses.replace(calm, failure=unlabelled).save(folder / "calm.parquet")
    calm.save(folder / "labels.parquet")
    hard = np.flatnonzero(rows.uncertainty > np.median(rows.uncertainty))
    vilu.Outcomes(
        rows.uncertainty[hard],
        unlabelled[hard],
        prediction=rows.prediction[hard],
        class_names=rows.class_names,
        method=rows.method,
        provenance=rows.provenance,
    ).save(folder / "hard.parquet")
    return folder


@pytest.mark.parametrize("calibrated", [False, True], ids=["not calibrated", "probabilities"])
def test_without_a_guarantee_there_is_nothing_to_watch(tmp_path: Path, calibrated: bool) -> None:
    """Without a guarantee, the command must refuse before it reads a row.

    The scores file is unreadable, so a read would fail with another message.
    """
    predictor, scores = tmp_path / "mcm", tmp_path / "scores.parquet"
    vilu.MCM().fit(toy_embeddings()).save(predictor)
    if calibrated:
        calibrate_predictor(predictor, toy_embeddings(300, seed=1, ids_from=10_000), Target())
    scores.write_bytes(b"nothing that can be read")
    overwrite = " --overwrite" if calibrated else ""
    advice = f"run `vilu calibrate {predictor} STORE --max-risk 0.05{overwrite}`"
    output, state = tmp_path / "report.json", tmp_path / "state.parquet"
    for option in (("-o", output), ("--state", state), ("--late-labels", scores)):
        done = run("monitor", predictor, scores, *option, code=4)
        assert "there is no guarantee to watch" in done.stderr
        assert advice in done.stderr
        assert done.stdout == ""
    assert not output.exists()
    assert not state.exists()
    with pytest.raises(InfeasibleError, match="no guarantee to watch"):
        vilu.Monitor.of_folder(predictor)


def test_label_sets_alone_are_a_guarantee(tmp_path: Path) -> None:
    predictor = tmp_path / "mcm"
    vilu.MCM().fit(toy_embeddings()).save(predictor)
    rows = toy_embeddings(300, seed=1, ids_from=10_000)
    calibrate_predictor(predictor, rows, Target(label_sets="aps", max_miss=0.2))
    assert vilu.Monitor.of_folder(predictor).status.verdict == "holds"


def test_a_monitor_goes_on_from_its_state(work: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.parquet"
    first = run(
        "monitor",
        work / "mcm",
        work / "calm.parquet",
        "--state",
        state,
        "-o",
        tmp_path / "first.json",
    )
    assert first.stdout.startswith("holds: no sign of a shift")
    assert "next rows: vilu monitor" in first.stderr
    told = json.loads((tmp_path / "first.json").read_text())
    assert (told["verdict"], told["rows"], told["raised_at"], told["audit"]["n"]) == (
        "holds",
        800,
        None,
        0,
    )
    labels = run(
        "monitor",
        work / "mcm",
        "--late-labels",
        work / "labels.parquet",
        "--state",
        state,
        "--json",
    )
    told = json.loads(labels.stdout)
    expected = vilu.Outcomes.load(work / "labels.parquet")
    accepted = np.array([decision == "accept" for decision in expected.decision or ()])
    assert (told["audit"]["n"], told["audit"]["wrong"]) == (
        accepted.sum(),
        expected.failure[accepted].sum(),
    )
    assert told["rows"] == 800
    alarm = run("monitor", work / "mcm", work / "hard.parquet", "--state", state, "--json", code=8)
    told = json.loads(alarm.stdout)
    assert told["verdict"] == "shifted: guarantee void"
    assert 800 <= told["raised_at"] < 1200
    assert told["batches"] == [
        {
            "scores": str(work / "hard.parquet"),
            "rows": 1200,
            "repeated": 0,
            "verdict": told["verdict"],
        }
    ]
    at_once = vilu.Monitor.of_folder(work / "mcm")
    at_once.update(vilu.Outcomes.load(work / "calm.parquet"))
    at_once.audit(expected)
    assert (
        at_once.update(vilu.Outcomes.load(work / "hard.parquet")).model_dump(mode="json").items()
        <= told.items()
    )
    with pytest.raises(ProvenanceError, match="belongs to the monitor"):
        command(
            "monitor", work / "mcm", work / "calm.parquet", "--state", state, "--false-alarm", 0.01
        )


def command(*args: object) -> None:
    """Run the same command in this process."""
    app([str(arg) for arg in args], standalone_mode=False)


def test_scores_of_another_calibration_are_refused(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "mcm", tmp_path / "mcm")
    data = toy_embeddings(3000, seed=9, ids_from=10_000)
    calibrate_predictor(tmp_path / "mcm", data, Target(max_risk=0.2), dataset="toy", split=None)
    with pytest.raises(ProvenanceError, match="decided on by the calibration"):
        command("monitor", tmp_path / "mcm", work / "calm.parquet")


def test_usage(work: Path) -> None:
    with pytest.raises(UsageError, match="nothing to monitor"):
        command("monitor", work / "mcm")


def test_rows_in_no_order_are_shuffled_on_request(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows sorted by uncertainty must be refused, because their order is not the arrival order.

    With ``--shuffle``, the monitor must accept them.
    """
    calm = vilu.Outcomes.load(work / "calm.parquet")
    order = np.argsort(calm.uncertainty)
    columns = {
        name: getattr(calm, name)[order] for name in ("uncertainty", "failure", "prediction")
    }
    vilu.Outcomes(**columns, class_names=calm.class_names, method=calm.method).save(
        tmp_path / "sorted.parquet"
    )
    arguments = [
        "monitor",
        str(work / "mcm"),
        str(tmp_path / "sorted.parquet"),
        "--state",
        str(tmp_path / "st.parquet"),
    ]
    with pytest.raises(
        DataError,
        match=r"sorted.parquet: these 800 rows lie sorted by their uncertainty.*--shuffle",
    ):
        app(arguments, standalone_mode=False)
    assert not (tmp_path / "st.parquet").exists()
    assert app([*arguments[:-2], "--in-order"], standalone_mode=False) == 8
    with pytest.raises(UsageError, match="--in-order is for rows that have one"):
        app([*arguments, "--in-order", "--shuffle"], standalone_mode=False)
    capsys.readouterr()
    command("monitor", work / "mcm", tmp_path / "sorted.parquet", "--shuffle", "--json")
    assert json.loads(capsys.readouterr().out)["verdict"] == "holds"
    with pytest.warns(UserWarning, match="3000 of 3000 rows are calibration rows"):
        command("monitor", work / "mcm", work / "mcm" / "calibration.parquet", "--shuffle")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a store for each folder with classes, as ``vilu embed`` does.

    The rows are sorted by class, and eight answers in ten are right.
    """
    root = tmp_path_factory.mktemp("folders")
    model = FakeBackbone()
    with torch.no_grad():
        text = embed_class_names(model, NAMES)
        seen: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
        for seed in range(1500):
            blob = picture(seed)
            pixels = model.preprocess(Image.open(io.BytesIO(blob)))[None]
            seen[int((model.encode_images(pixels) @ text.T).argmax())].append(blob)
    rng = np.random.default_rng(0)
    for name in ("train", "calibration", "new"):
        answer = np.repeat([0, 1, 2], 70)
        shown = np.where(rng.random(210) < 0.8, answer, (answer + 1) % 3)
        blobs = [seen[c].pop() for c in shown.tolist()]
        keys = [f"{NAMES[c]}/{name}{row:03d}.png" for row, c in enumerate(answer.tolist())]
        embed(FakeDataset(blobs, answer.tolist(), keys), FakeBackbone(), root / name, names=NAMES)
    return root


@pytest.mark.parametrize("labelled", [True, False])
def test_the_commands_of_the_readme_end_without_a_false_alarm(
    folders: Path, tmp_path: Path, labelled: bool
) -> None:
    """Fit, calibrate, score and monitor on three folders without a shift must report no shift."""
    predictor, scores, state = (
        tmp_path / "predictor",
        tmp_path / "scores.parquet",
        tmp_path / "state.parquet",
    )
    run("fit", folders / "train", "--method", "mcm", "-o", predictor)
    run("calibrate", predictor, folders / "calibration", "--max-risk", 0.5, "--confidence", 0.9)
    run("score", predictor, folders / "new", "-o", scores)
    if not labelled:
        found = vilu.Outcomes.load(scores)
        dataclasses.replace(found, failure=np.full(210, -1), target=None).save(scores)
    refused = run("monitor", predictor, scores, "--state", state, code=3)
    what = "right answer" if labelled else "answer"
    assert f"{scores}: these 210 rows lie sorted by their {what}" in refused.stderr
    assert "--shuffle" in refused.stderr
    assert not state.exists()
    assert run("monitor", predictor, scores, "--in-order", code=8).stdout.startswith(
        "shifted"
    )  # without the order check, this was a false alarm
    holds = run("monitor", predictor, scores, "--shuffle", "--state", state)
    assert holds.stdout.startswith("holds")
    again = run("monitor", predictor, scores, "--shuffle", "--state", state, "--json")
    assert "210 of 210 rows were monitored before and are not counted again" in again.stderr
    told = json.loads(again.stdout)
    assert (told["rows"], told["batches"][0]["repeated"], told["verdict"]) == (210, 210, "holds")


HOLD = """
import sys, time
from pathlib import Path
from vilu.artifacts.disk import locked
with locked(Path(sys.argv[1]), activity="at work in"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[None]:
    """Hold a folder's lock in another process until the block ends."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield
        other.communicate("")


def test_two_at_once_on_one_state_or_predictor(work: Path, folders: Path, tmp_path: Path) -> None:
    """While another process holds the lock, a second command must be told to wait.

    After the first process ends, the command must run, and no row may be lost or counted twice.
    """
    monitoring = (
        "monitor",
        work / "mcm",
        work / "calm.parquet",
        "--state",
        tmp_path / "state.parquet",
    )
    with held_by_another_process(tmp_path):
        assert ") is monitoring" in run(*monitoring, code=75).stderr
    assert not (tmp_path / "state.parquet").exists()
    run(*monitoring)
    vilu.MCM().fit(vilu.EmbeddingStore(folders / "train")).save(tmp_path / "predictor")
    calibrating = ("calibrate", tmp_path / "predictor", folders / "calibration", "--max-risk", 0.5)
    with held_by_another_process(tmp_path / "predictor"):
        assert ") is calibrating" in run(*calibrating, code=75).stderr
    assert not (tmp_path / "predictor" / "risk.json").exists()
    run(*calibrating)


@pytest.mark.slow
def test_two_processes_calibrate_and_monitor_at_once(
    folders: Path, work: Path, tmp_path: Path
) -> None:
    """If two processes start at once, the second must wait or be refused with exit code 75.

    The files must be those from one run.
    """
    vilu.MCM().fit(vilu.EmbeddingStore(folders / "train")).save(tmp_path / "predictor")
    state = tmp_path / "states" / "state.parquet"
    state.parent.mkdir()
    both = (
        (
            "calibrate",
            tmp_path / "predictor",
            folders / "calibration",
            "--max-risk",
            0.5,
            "--confidence",
            0.9,
        ),
        ("monitor", work / "mcm", work / "calm.parquet", "--state", state),
    )
    started = [
        subprocess.Popen(command_of(*words), stderr=subprocess.DEVNULL)
        for words in both
        for _ in range(2)
    ]
    codes = [process.wait() for process in started]
    assert set(codes[:2]) <= {0, 75}
    assert set(codes[2:]) <= {0, 75}
    assert 0 in codes[:2]
    assert 0 in codes[2:]
    vilu.Calibration.find(tmp_path / "predictor")
    assert vilu.Monitor.of_folder(work / "mcm").resume(state).rows == 800
    run("monitor", work / "mcm", work / "hard.parquet", "--state", state, code=8)


def test_a_state_in_no_folder_is_refused_first(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist\. Make it"):
        command(
            "monitor",
            work / "mcm",
            work / "calm.parquet",
            "--state",
            tmp_path / "none" / "state.parquet",
        )
