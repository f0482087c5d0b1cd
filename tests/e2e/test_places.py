"""Every command that writes, on a path that is new, empty, its own or foreign."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.builders.bench_fakes import make_store
from tests.builders.store_fakes import NAMES, FakeBackbone, FakeDataset, dataset, picture
from tests.command import run
from tests.predictors.test_convert import checkpoint
from vilu.artifacts.paths import KIND_OF_CSV_HEADER
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.cli.demo import claim_output as claim_demo
from vilu.errors import UsageError
from vilu.outcomes.results import ResultTable
from vilu.store.embed import embed
from vilu.store.job import BackboneSpec

NOBODY = 65534
MINE = b"# mine, and nobody else's\n"

STUDY = """
seeds = 1
resamples = 20
[data.one]
stores = {train = "one-train", test = "one-test"}
[settings.all]
kind = "labels"
[methods.mcm]
"""


@dataclass(frozen=True)
class Command:
    """A command that writes: its words, the words for other inputs, and its output path
    (``{}``).
    """

    words: str
    other: str
    place: str  # with a suffix if it is a file
    keeps_inputs: bool = True  # CSV does not name its inputs
    slow: bool = False  # its output is written once

    def __call__(self, place: Path, *more: str, other: bool = False, code: int = 0) -> str:
        """Run the command and return its messages."""
        words = shlex.split(self.other if other else self.words)
        return run(*(word.format(place) for word in words), *more, code=code).stderr


COMMANDS = {
    "embed": Command("embed photos -o {}", "embed photos -o {} --dtype float32", "store"),
    "fit": Command("fit train -o {} --method mcm", "fit train -o {} --method entropy", "predictor"),
    "convert": Command(
        "convert head.ckpt -o {}", "convert head.ckpt -o {} --logit-scale 50", "head"
    ),
    "pull": Command("pull ./fitted -o {}", "pull ./calibrated -o {}", "pulled"),
    "push": Command("push fitted {}", "push calibrated {}", "pushed"),
    "score-folder": Command("score fitted new -o {}", "score fitted train -o {}", "scores"),
    "score-parquet": Command("score fitted new -o {}", "score fitted train -o {}", "s.parquet"),
    "score-csv": Command(
        "score fitted new -o {}", "score fitted train -o {}", "s.csv", keeps_inputs=False
    ),
    "evaluate-json": Command(
        "evaluate s.parquet -o {} --resamples 20", "evaluate s.parquet -o {} --seed 1", "r.json"
    ),
    "evaluate-parquet": Command(
        "evaluate s.parquet -o {} --resamples 20",
        "evaluate s.parquet -o {} --resamples 21",
        "r.parquet",
    ),
    "evaluate-csv": Command(
        "evaluate s.parquet -o {} --resamples 20",
        "evaluate s.parquet -o {} --resamples 21",
        "r.csv",
        keeps_inputs=False,
    ),
    "pools": Command(
        "pools pairs mcm -o {} --sizes 4 --resamples 20",
        "pools pairs mcm -o {} --sizes 8 --resamples 20",
        "pools.json",
    ),
    "explain": Command("explain fitted new -o {}", "explain fitted new -o {} -n 3", "why.json"),
    "explain-summary": Command(
        "explain fitted new -o {} --summary",
        "explain fitted new -o {} --summary --coverage 0.5",
        "where.json",
    ),
    "monitor": Command(
        "monitor calibrated c.parquet -o {}",
        "monitor calibrated c.parquet -o {} --seed 1",
        "status.json",
    ),
    "report": Command(
        "report s.parquet -o {}", "report s.parquet -o {} --max-risk 0.2", "page.html"
    ),
    "render": Command(
        "render ran --document {}", "render ran --document {} --title Other", "found.md"
    ),
    "export": Command("export head -o {}", "export other-head -o {}", "head.onnx", slow=True),
}


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """Write one example for everything that a command reads, also readable for another user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for number, label in enumerate(NAMES * 2):
            (folder / "photos" / label).mkdir(parents=True, exist_ok=True)
            (folder / "photos" / label / f"{number}.png").write_bytes(picture(number))
        for part, first, n in (("train", 0, 60), ("calibration", 60, 80), ("new", 140, 30)):
            data = dataset(n)
            data.blobs, data.keys = (
                dataset(first + n).blobs[first:],
                [f"{part}/{i}.png" for i in range(n)],
            )
            embed(data, FakeBackbone(), folder / part, names=NAMES)
        pairs = FakeDataset([picture(i) for i in range(20)], [None] * 20, class_names=None)
        pairs.captions = [f"picture {i}" for i in range(20)]
        embed(pairs, FakeBackbone(), folder / "pairs")
        for target in ("fitted", "calibrated"):
            vilu.MCM().fit(vilu.open_source(folder / "train")).save(folder / target)
        calibrate_predictor(
            folder / "calibrated", vilu.open_source(folder / "calibration"), Target(max_risk=0.9)
        )
        for head, epochs in (("head", 1), ("other-head", 2)):
            vilu.LVU(hidden=(4,), epochs=epochs).fit(vilu.open_source(folder / "train")).save(
                folder / head
            )
        checkpoint(folder / "head.ckpt", "d24", "attention0_caption0")
        for part, first, n in (("one-train", 0, 30), ("one-test", 1_000, 20)):
            make_store(folder / part, n, first)
        (folder / "study.toml").write_text(STUDY)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            run("score", "fitted", "new", "-o", "s.parquet")
            run("score", "calibrated", "new", "-o", "c.parquet")
            run("benchmark", "study.toml", "--data", ".", "-o", "ran")
        yield folder


@pytest.fixture
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    monkeypatch.setattr(BackboneSpec, "load", lambda _: FakeBackbone())
    monkeypatch.setattr("vilu.predictors.persistence.onnx.largest_difference", lambda *_: 0.0)
    return work


def tree(place: Path) -> dict[str, str]:
    """Return hashes for all files at a path, without locks and the log, which depends on the
    clock.
    """
    files = (
        [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    )
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in {".lock", "log.jsonl"}
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_is_new_or_the_same_again_or_refused(name: str, here: Path, tmp_path: Path) -> None:
    command = COMMANDS[name]
    place, is_file = tmp_path / command.place, "." in command.place
    mine = place if is_file else place / "README.md"

    def refused(*more: str, other: bool = False, code: int = 2) -> str:
        before = tree(tmp_path)
        said = command(place, *more, other=other, code=code)
        assert tree(tmp_path) == before
        assert str(place) in said
        return said

    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(MINE)
    for more in ((), ("--overwrite",)):
        assert ("holds no" if is_file else "'README.md', which is no part") in refused(*more)
    mine.unlink()  # an empty folder is left

    command(place)
    first = tree(tmp_path)
    if command.keeps_inputs:
        assert "nothing to do" in command(place)
        assert tree(tmp_path) == first
    else:
        assert "inputs that it does not name" in refused()
    # For a store, the message names each input that differs: these artefacts do not fit together.
    assert "--overwrite" in refused(other=True, code=6 if name in {"embed", "score-folder"} else 2)

    if not is_file:
        notes = place / "notes.txt"
        notes.write_bytes(MINE)
        assert "notes.txt" in refused("--overwrite", other=True)
        notes.unlink()

    if command.slow:
        return
    command(place, "--overwrite", other=True)
    second = tree(tmp_path)
    assert second != first
    if command.keeps_inputs:
        assert "nothing to do" in command(place, other=True)
    assert tree(tmp_path) == second
    command(place, "--overwrite")
    assert tree(tmp_path) == first  # the same inputs, the same bytes


@pytest.mark.parametrize(
    "words",
    [
        "evaluate s.parquet -o {}/e.txt",
        "monitor calibrated c.parquet -o {}/told.json --state {}/state.txt",
        "next train --predictor fitted -o {}/next.parquet",
    ],
)
def test_a_file_of_another_kind_is_refused_before_the_work(
    words: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilu.outcomes.evaluate.evaluate", None)
    said = run(*words.format(tmp_path, tmp_path).split(), code=2).stderr
    assert re.search(r"vilu keeps .* in a \..* file\. Got '", said)
    assert not tree(tmp_path)


@pytest.mark.parametrize("name", [*COMMANDS, "benchmark"])
def test_a_folder_that_cannot_be_written_to_is_said_at_once(name: str, here: Path) -> None:
    command = COMMANDS.get(name) or Command("benchmark study.toml --data . -o {}", "", "out")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        as_root = os.geteuid() == 0
        if as_root:  # folder modes do not stop root
            os.seteuid(NOBODY)
        try:
            said = command(Path(folder) / command.place, code=7)
        finally:
            if as_root:
                os.seteuid(0)
            Path(folder).chmod(0o755)
        assert "is not writable" in said
        assert not list(Path(folder).iterdir())


MISSING = """
fit nowhere -o x
score fitted nowhere -o x
score nowhere new -o x
evaluate nowhere.parquet
inspect nowhere
explain nowhere new
report nowhere -o x.html
convert n.ckpt -o x
monitor calibrated nowhere.parquet
calibrate fitted nowhere
export nowhere -o x.onnx
render nowhere
push nowhere ./x
pull ./nowhere -o x
embed nowhere -o x
pools pairs ./nowhere
benchmark nowhere.toml
datasets check nowhere
embed photos -o x --classes nowhere.txt
fit train -o x --init nowhere
"""


@pytest.mark.parametrize("words", MISSING.split("\n")[1:-1])
def test_a_missing_path_is_one_error_everywhere(words: str, here: Path) -> None:
    said = run(*words.split(), code=2).stderr
    missing = next(
        word for word in words.split() if word.startswith(("nowhere", "./nowhere", "n.ckpt"))
    )
    assert f"{missing.removeprefix('./')} does not exist" in said
    assert not (here / "x").exists()


@pytest.mark.parametrize("more", [("--split", "train"), ("--root", ".")])
def test_what_is_of_the_images_of_a_page_goes_with_them(more: tuple[str, str], here: Path) -> None:
    done = run("report", "s.parquet", "-o", "lone.html", *more, code=2)
    assert "--split and --root need --images. Give --images, too, or leave them out" in done.stderr
    assert not (here / "lone.html").exists()


@pytest.mark.parametrize("place", ["store", "photos"])
def test_a_fit_into_a_folder_of_other_things_is_refused_before_it_begins(
    place: str, here: Path, tmp_path: Path
) -> None:
    run("embed", "photos", "-o", tmp_path / "store")
    for target in (tmp_path / "store", here / "photos"):
        before = tree(target)
        for more in ((), ("--overwrite",)):
            assert (
                "no part of vilu's predictor"
                in run("fit", "train", "-o", target, *more, code=2).stderr
            )
        assert tree(target) == before


def test_a_new_fit_takes_the_old_calibration_with_it(here: Path, tmp_path: Path) -> None:
    place = tmp_path / "p"
    run("fit", "train", "-o", place, "--method", "mcm")
    target = ("calibrate", place, "calibration", "--max-risk", 0.9)
    run(*target)
    calibrated = tree(place)
    assert "nothing to do" in run(*target).stderr
    assert "nothing to do" in run("fit", "train", "-o", place, "--method", "mcm").stderr
    assert tree(place) == calibrated
    assert "--overwrite" in run("calibrate", place, "calibration", "--max-risk", 0.8, code=2).stderr
    assert tree(place) == calibrated
    done = run("fit", "train", "-o", place, "--method", "entropy", "--overwrite")
    assert "the predictor here was replaced, and its calibration was removed" in done.stderr
    assert {path.name for path in place.iterdir()} - {".lock"} == {
        "README.md",
        "predictor.json",
        "weights.safetensors",
    }


def test_what_the_same_inputs_gave_and_time_has_damaged_is_made_again(
    here: Path, tmp_path: Path
) -> None:
    for words, name in (
        ("fit train --method mcm", "weights.safetensors"),
        ("score fitted new", "s.parquet"),
    ):
        place = tmp_path / (name if name.endswith("parquet") else "p")
        run(*words.split(), "-o", place)
        file = place if place.is_file() else place / name
        whole = file.read_bytes()
        for at in range(4, len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
            try:
                vilu.load(place) if place.is_dir() else vilu.Outcomes.load(place)
            except vilu.errors.DataError:
                break
        done = run(*words.split(), "-o", place)
        assert "made again" in done.stderr
        assert file.read_bytes() == whole


def test_a_state_is_gone_on_from_and_nothing_else_is_taken_for_one(
    here: Path, tmp_path: Path
) -> None:
    state, scores = tmp_path / "state.parquet", tmp_path / "s.parquet"
    scores.write_bytes((here / "s.parquet").read_bytes())
    before = tree(tmp_path)
    assert (
        "no monitor state"
        in run("monitor", "calibrated", "c.parquet", "--state", scores, code=2).stderr
    )
    assert tree(tmp_path) == before
    run("monitor", "calibrated", "c.parquet", "--state", state)
    assert vilu.Monitor.of_folder("calibrated").resume(state).rows == 30


def test_a_benchmark_goes_on_in_its_own_folder_and_in_no_other(here: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(MINE)
    command = ("benchmark", "study.toml", "--data", ".", "-o")
    assert "'notes.txt', which is no part" in run(*command, tmp_path, code=2).stderr
    assert tree(tmp_path).keys() == {"notes.txt"}
    before = tree(here / "ran")
    assert "nothing to do" in run(*command, "ran").stderr
    assert tree(here / "ran") == before


def test_the_demo_goes_on_in_its_own_folder_and_in_no_other(tmp_path: Path) -> None:
    key, other = "0" * 32, "1" * 32
    claim_demo(tmp_path, key, overwrite=False)
    (tmp_path / "results.md").write_bytes(MINE)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"results\.md"):
            claim_demo(tmp_path, key, overwrite=overwrite)
    (tmp_path / "cache" / key).mkdir(parents=True)
    claim_demo(tmp_path, key, overwrite=False)  # a demo that has begun
    ResultTable().save(tmp_path / "results.json", inputs=key)
    claim_demo(tmp_path, key, overwrite=False)  # a demo that has finished
    with pytest.raises(UsageError, match="--overwrite"):
        claim_demo(tmp_path, other, overwrite=False)
    claim_demo(tmp_path, other, overwrite=True)


def test_the_library_replaces_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    outcomes, results = vilu.Outcomes([0.5], [0]), ResultTable()
    for name in ("a.parquet", "a.csv"):
        outcomes.save(tmp_path / name)
        outcomes.save(tmp_path / name)
        with pytest.raises(UsageError, match="holds no results"):
            results.save(tmp_path / name)
    link = tmp_path / "null.json"
    link.symlink_to("/dev/null")
    with pytest.raises(UsageError, match="holds no results"):
        results.save(link)
    for save in (outcomes.save, results.save):
        save(tmp_path / "csv.csv")
        assert any(
            (tmp_path / "csv.csv").read_bytes().startswith(header) for header in KIND_OF_CSV_HEADER
        )
        (tmp_path / "csv.csv").unlink()
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=r"'a\.csv', which is no part"):
        vilu.MCM().save(tmp_path)


@pytest.mark.parametrize(
    ("output", "split", "said"),
    [
        ("it's here", None, "vilu fit 'it'\"'\"'s here' -o predictor"),
        ("emb test", None, "vilu fit 'emb test' -o predictor"),
        ("test", None, "vilu score PREDICTOR test -o scores.parquet"),
        ("one", "test", "vilu score PREDICTOR one -o scores.parquet"),
        ("validation", None, "vilu calibrate PREDICTOR validation --max-risk 0.05"),
    ],
)
def test_hints_can_be_pasted_and_fit_the_split(output: str, split: str | None, said: str) -> None:
    from vilu.cli.images import next_command

    assert next_command(Path(output), split, "photos") == said
    assert np.isclose(len(shlex.split(said)), len(said.split()), atol=4)
