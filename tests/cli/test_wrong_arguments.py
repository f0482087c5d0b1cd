"""Test one wrong argument in every command: a sentence and vilu's exit code, never a traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from tests.builders.array_files import arrays, save
from tests.command import command_line, run
from tests.conftest import toy_embeddings
from vilu.cli.app import app, with_stop_message
from vilu.cli.console import INPUT_KINDS, STORE_KIND, input_kind
from vilu.predictors.zero_shot import MCM
from vilu.scoring.score import score

VALUES = ("", "\udcff\n\x1b[2J", "x" * 5000, "/", str(-(2**70)))
COMMANDS = typer.main.get_command(app).commands
CODES = set(range(2, 9)) | {0}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a predictor, its scores, and a file that is no real checkpoint."""
    folder = tmp_path_factory.mktemp("wrong")
    predictor, data = MCM().fit(toy_embeddings(40)), toy_embeddings(60, seed=1, ids_from=1000)
    predictor.save(folder / "pred")
    score(predictor, data).save(folder / "s.parquet")
    torch.save({"state_dict": {}}, folder / "x.ckpt")
    np.save(folder / "x.npy", np.zeros(3))
    save(folder / "a.npz", arrays())
    return folder


SOUND = {
    "import": ["a.npz", "-o", "i"],
    "inspect": ["x.npy"],
    "evaluate": ["s.parquet", "--resamples", "5"],
    "list": ["metrics"],
    "render": ["x.npy"],
    "convert": ["x.ckpt", "-o", "c"],
    "export": ["pred", "-o", "m.onnx"],
    "push": ["pred", "./pushed"],
    "pull": ["./pred", "-o", "pulled"],
    "score": ["pred", "x.npy", "-o", "y.parquet"],
    "fit": ["x.npy", "-o", "f", "--method", "mcm"],
    "calibrate": ["pred", "x.npy"],
    "explain": ["pred", "x.npy"],
    "monitor": ["pred", "s.parquet"],
    "pools": ["x.npy", "mcm"],
    "benchmark": ["x.npy", "-o", "b"],
}


def cases(name: str, line: list[str]) -> Iterator[list[str]]:
    """Yield the line with each argument replaced, and with each other option added once."""
    for i, word in enumerate(line):
        if not word.startswith("-"):
            yield from ([*line[:i], value, *line[i + 1 :]] for value in VALUES)
    for option in COMMANDS[name].params:
        if option.param_type_name == "option" and not option.is_flag:
            yield from ([*line, option.opts[0], value] for value in ("", "\udcff\n", str(2**70)))


@pytest.mark.parametrize("name", SOUND)
def test_one_wrong_argument(work: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(work)
    for line in cases(name, SOUND[name]):
        done = command_line(name, *line)  # an exception without a message would pass through
        assert done.returncode in CODES, (line, done.stderr)
        assert done.stderr.isascii() or "\x1b" not in done.stderr, line
        assert done.returncode or done.stdout or done.stderr, line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            ["score", "store", "pred", "-o", "y.parquet"],
            "store is a store of embeddings, where a predictor should be, "
            "and pred is a predictor, where a store of embeddings should be. "
            "They are in the wrong order",
        ),
        (["calibrate", "store", "pred"], "They are in the wrong order"),
        (["explain", "store", "pred"], "They are in the wrong order"),
        (["fit", "pred", "pred", "-o", "f"], "where a store of embeddings should be. See vilu fit"),
        (["evaluate", "store"], "store is a store of embeddings, where scores should be"),
        (["evaluate", "pred"], "pred is a predictor, where scores should be"),
        (["fit", "pred", "-o", "f"], "pred is a predictor, where a store of embeddings should be"),
        (["report", "store", "-o", "r.html"], "where scores should be"),
        (["monitor", "scores", "scores"], "scores is scores, where a predictor should be"),
        (["export", "store", "-o", "m.onnx"], "where a predictor should be"),
        (["push", "store", "./p"], "where a predictor should be"),
        (["embed", "store", "-o", "e"], "store is a store of embeddings, where images should be"),
        (["import", "pred", "-o", "e"], "pred is a predictor, where arrays should be"),
        (["render", "pred"], "where the output of a benchmark should be"),
        (["pools", "scores", "mcm"], "where a store of embeddings should be"),
        (["score", "", "store", "-o", "y.parquet"], "an argument is empty where a path should be"),
    ],
)
def test_another_kind_of_thing(tmp_path: Path, line: list[str], message: str) -> None:
    """Files must be recognised by their names alone, before a slow import."""
    for name in (
        "store/run.json",
        "pred/predictor.json",
        "scores/run.json",
        "scores/scores/x.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert input_kind(tmp_path / "store") == STORE_KIND
    assert message in run(*line, code=2, cwd=tmp_path).stderr


def test_kinds_are_asked_of_parameters_that_there_are() -> None:
    for name, wanted in INPUT_KINDS.items():
        assert wanted.keys() <= {parameter.name for parameter in COMMANDS[name].params}


def interrupted(
    name: str, stop: BaseException, capsys: pytest.CaptureFixture[str], **values: object
) -> str:
    def command(**_: object) -> None:
        raise stop

    command.__name__ = name
    real = COMMANDS[name.removesuffix("_")].callback
    command.goes_on = getattr(real, "goes_on", False)
    with pytest.raises(type(stop)):
        with_stop_message(command)(**values)
    return capsys.readouterr().err


def test_a_stopped_command_says_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on = (
        f"vilu: stopped: finished parts are in {tmp_path}; "
        "the same command goes on with the rest.\n"
    )
    anew = (
        "vilu: stopped: no incomplete file was left; "
        "the same command starts again from the beginning.\n"
    )
    for name in ("embed", "import_", "score", "benchmark", "demo"):
        assert interrupted(name, KeyboardInterrupt(), capsys, output=tmp_path) == goes_on
    assert (
        interrupted("embed", SystemExit(128 + signal.SIGTERM), capsys, output=tmp_path) == goes_on
    )
    for name, output in (
        ("score", tmp_path / "s.csv"),
        ("fit", tmp_path / "p"),
        ("calibrate", None),
    ):
        assert interrupted(name, KeyboardInterrupt(), capsys, output=output) == anew
    (tmp_path / "p.checkpoints").mkdir()
    said = interrupted("fit", KeyboardInterrupt(), capsys, output=tmp_path / "p")
    assert (
        said == "vilu: stopped: the same command goes on from the last checkpoint in "
        f"{tmp_path / 'p.checkpoints'}.\n"
    )
    assert interrupted("monitor", SystemExit(8), capsys) == ""  # its own exit code
