"""Several processes at once: what they leave is whole and right, and who has to wait is told so (exit 75)."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import vilu
from tests.conftest import few
from tests.faults.bed import COMMANDS, Bed, Command, contents
from tests.faults.test_faults import TRIALS, bed  # noqa: F401 - the fixture
from vilu.decision.monitor import _read_state
from vilu.decision.score import Decider
from vilu.errors import BusyError, ProvenanceError, UsageError, ViLUError
from vilu.store.reader import EmbeddingStore

BUSY = BusyError.exit_code
WRITERS = ("embed", "import", "fit vilu", "fit mcm", "score folder", "score file", "calibrate", "monitor", "benchmark")
SHORT = ("calibrate", "score folder", "fit vilu", "embed")
"""Those of ``make test-slow``, each with 8 writers; ``make test-faults`` has all."""


def together(bed: Bed, commands: list[Command]) -> tuple[Path, list[int]]:  # noqa: F811
    """Run commands at once in one folder; the folder and the exit codes."""
    work = bed.prepare(commands[0])
    bed.fill(work, commands[0])
    told = bed.server.ask_all([bed.request(work, command, number) for number, command in enumerate(commands)])
    for number in range(len(commands)):
        assert "Traceback" not in bed.said(work, number)
    return work, [one["code"] for one in told]


@pytest.mark.parametrize("name", WRITERS if TRIALS else few(SHORT, 0))
def test_eight_writers_on_one_folder(bed: Bed, name: str) -> None:  # noqa: F811
    alone = bed.undisturbed(name)
    work, codes = together(bed, [COMMANDS[name]] * 8)
    said = "\n".join(bed.said(work, number) for number in range(8))
    assert set(codes) <= {alone.code, BUSY}, (Counter(codes), said)
    assert alone.code in codes, said
    assert (BUSY in codes) == ("another" in said)
    assert contents(work) == alone.files
    assert bed.ask(work, COMMANDS[name])["code"] == alone.code
    assert contents(work) == alone.files
    shutil.rmtree(work)


def test_two_calibrations_of_one_predictor(bed: Bed) -> None:  # noqa: F811
    """One of them lies there whole; the other was told that it has to wait, or that a calibration is there."""
    first = COMMANDS["calibrate"]
    second = replace(first, argv=(*first.argv[:-1], "0.95"))
    work, codes = together(bed, [first, second])
    assert 0 in codes
    assert set(codes) <= {0, BUSY, UsageError.exit_code, ProvenanceError.exit_code}
    found = Decider.of_folder(vilu.load(work / "predictor"), work / "predictor")
    assert found.record.rule.max_risk in {0.9, 0.95}
    assert found.record.rule.max_risk == (0.9, 0.95)[codes.index(0)] or codes == [0, 0]
    shutil.rmtree(work)


def test_two_monitors_on_one_state(bed: Bed) -> None:  # noqa: F811
    """Every row is counted that a monitor said it had taken in, and no other."""
    watch = replace(
        COMMANDS["monitor"], argv=tuple(w for w in COMMANDS["monitor"].argv if w not in {"-o", "told.json"})
    )
    other = replace(watch, argv=tuple(word.replace("b.parquet", "c.parquet") for word in watch.argv))
    before = _read_state(bed.inputs / "state.parquet")[1].rows
    work, codes = together(bed, [watch, other])
    assert set(codes) <= {0, 8, BUSY}
    taken = sum(code != BUSY for code in codes)
    assert taken
    assert _read_state(work / "state.parquet")[1].rows == before + 120 * taken
    shutil.rmtree(work)


def _files(path: Path) -> bytes:
    return path.read_bytes()


def _predictor(folder: Path) -> str:
    loaded = vilu.load(folder)
    return repr(None if loaded.calibrator_ is None else loaded.calibrator_.model_dump())


def _decider(folder: Path) -> str:
    found = Decider.of_folder(vilu.load(folder), folder)
    return repr((_predictor(folder), found.record and found.record.rule))


def _store(folder: Path) -> str:
    store = EmbeddingStore(folder)
    return hashlib.sha256(store.image_rows(store.usable_rows).numpy().tobytes()).hexdigest()


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "calibrate": ("predictor", _decider),
    "embed": ("store", _store),
    "import": ("store", _store),
    "monitor": ("state.parquet", lambda path: _read_state(path)[1].rows),
    "score file": ("scores.parquet", lambda path: vilu.Outcomes.load(path).uncertainty.tolist()),
    "score folder": ("scores", lambda path: vilu.ScoreFolder(path).outcomes().uncertainty.tolist()),
}


@pytest.fixture
def looking() -> Iterator[Callable[[Callable[[], object]], list[object]]]:
    """Looks over and over in a thread, until the test ends."""
    done = threading.Event()
    threads: list[threading.Thread] = []

    def start(look: Callable[[], object]) -> list[object]:
        seen: list[object] = []

        def run() -> None:
            while not done.is_set():
                try:
                    seen.append(look())
                except ViLUError:
                    seen.append(ViLUError)
                except Exception as error:  # noqa: BLE001 - the test shows it
                    seen.append(error)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return seen

    yield start
    done.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("name", READERS)
def test_a_reader_sees_the_old_or_the_new_or_is_told(bed: Bed, looking, name: str) -> None:  # noqa: F811
    place, look = READERS[name]
    command = COMMANDS[name]
    work = bed.prepare(command)
    bed.fill(work, command)

    def now() -> object:
        try:
            return look(work / place)
        except ViLUError:
            return ViLUError

    before = now()
    seen = looking(lambda: look(work / place))
    told = bed.ask(work, command)
    assert told["code"] == bed.undisturbed(name).code
    after = now()
    assert after is not ViLUError
    assert after != before
    allowed = [before, after, ViLUError]
    if name == "calibrate":  # as after `vilu calibrate` without a target: probabilities, and nothing decided yet
        allowed.append(repr((_predictor(work / place), None)))
    others = [one for one in seen if one not in allowed]
    assert not others, others[:3]
    assert seen
