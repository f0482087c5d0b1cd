"""One small artefact for every kind, and every command that uses it."""

from __future__ import annotations

import hashlib
import logging.handlers
import queue
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import vilu
from tests.builders.array_files import arrays, save
from tests.builders.bench_fakes import config, make_store
from tests.builders.photo_folders import KINDS, photo, write_photos
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.command import command_line
from tests.conftest import toy_embeddings
from tests.e2e.ddp_worker import Brake, Stop, stop
from vilu.calibration.calibration import Calibration
from vilu.calibration.monitor.monitor import Monitor
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.cli.inspecting import check_artefacts
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.pairs import Pools
from vilu.guard.guard import Guard
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable
from vilu.predictors.nn.checkpoint import checkpointing
from vilu.predictors.persistence.storage import load_predictor, write_card
from vilu.predictors.vilu.vilu import ViLU
from vilu.progress import reporting
from vilu.scoring.score_folder import ScoreFolder
from vilu.service.local_journals import LocalJournals
from vilu.store.embed import ExtraColumns, embed
from vilu.store.importing import import_arrays
from vilu.store.inspect import inspect
from vilu.store.job import BackboneSpec
from vilu_bench.studies.study import render_studies, run_studies

FINE = {0, 8}
"""Exit codes for commands that did their work.

8 is the answer "the guarantee is void".
"""
UNSAID = {".lock", "log.jsonl", "README.md", "times.txt"}
"""Files without numbers that are read again: locks, clocks, and cards, which a user may edit."""
LIMIT = 60
"""The seconds that a use may take on a busy machine."""

Use = Callable[[], object]


class Refused(Exception):
    """The error for a command that failed, with its message."""


@dataclass
class Artefact:
    """A folder or a file in the bed, with the commands that use it and a fast reader.

    Some commands repair the artefact.
    """

    path: Path
    uses: dict[str, Use]
    read: Use
    suffixes: frozenset[str] = frozenset()
    """Suffixes for the files to damage. If empty, all files are damaged."""
    pristine: dict[Path, bytes] = field(default_factory=dict)
    """The files to damage, with their original content."""
    whole: dict[Path, bytes] = field(default_factory=dict)
    """All files with their original content, because a use may change any file."""

    def files(self) -> list[Path]:
        found = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        return [path for path in found if path.is_file() and path.name not in UNSAID]

    def keep(self) -> None:
        self.whole = {path: path.read_bytes() for path in self.files()}
        self.pristine = {}
        for path, content in self.whole.items():
            if not self.suffixes or path.suffix in self.suffixes:
                self.pristine[path] = content

    def restore(self) -> None:
        for path in self.files():
            if path not in self.whole:
                path.unlink()
        for path, content in self.whole.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


@contextmanager
def in_time() -> Iterator[None]:
    """Raise a TimeoutError if the block hangs."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(path: Path) -> dict[str, str]:
    """Return a hash for every file that holds numbers."""
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in paths
        if file.is_file() and file.name not in UNSAID
    }


def clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def command(*args: object, out: Path | None = None, cwd: Path) -> object:
    """Run a command, and return its exit code, its output and its files at ``out``.

    If the command fails, raise Refused.
    """
    if out is not None:
        clear(out.parent if out.suffix == ".safetensors" else out)
    done = command_line(*args, cwd=cwd)
    if done.returncode not in FINE:
        raise Refused(done.stderr)
    printed, _, _ = done.stdout.partition("\n\nwall time")  # times differ in every run
    return done.returncode, printed, None if out is None else tree(out)


def build(root: Path) -> list[Artefact]:
    """Build the artefacts, which keep their original content."""
    rows = dataset(220)
    for name, first, n in (("train", 0, 80), ("calibration", 80, 90), ("new", 170, 50)):
        part = dataset(n)
        part.blobs, part.keys = rows.blobs[first : first + n], [f"{name}/{i}.png" for i in range(n)]
        columns = ExtraColumns()
        if name == "new":
            columns = ExtraColumns(features=True, views=2, prompts=["a {}", "the {}"])
        embed(part, FakeBackbone(), root / name, names=NAMES, part_size=30, columns=columns)
    pairs = dataset(40, unlabelled=range(40))
    pairs.class_names, pairs.captions = None, [f"picture number {i}" for i in range(40)]
    embed(pairs, FakeBackbone(), root / "pairs", part_size=20)
    import_arrays(
        save(root / "arrays.npz", arrays(60, negatives=np.eye(6))), root / "imported", part_size=20
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vilu.ViLU(hidden=(8,), epochs=2).fit(vilu.open_source(root / "train")).save(root / "head")
    vilu.MCM().save(root / "mcm")
    target = Target(max_risk=0.8, confidence=0.9, label_sets="aps", max_miss=0.5)
    calibrate_predictor(root / "head", vilu.open_source(root / "calibration"), target)
    do = partial(command, cwd=root)
    do("score", "head", "new", "-o", "scores.parquet")
    do("score", "head", "new", "-o", "scores")
    do("monitor", "head", "scores.parquet", "--state", "state.parquet")
    for suffix in ("json", "parquet"):
        do("evaluate", "scores.parquet", "-o", f"results.{suffix}", "--resamples", 10)
    do("explain", "head", "new", "-n", 3, "-o", "why.json")
    do("monitor", "head", "scores.parquet", "-o", "monitored.json")
    do("pools", "pairs", "mcm", "--sizes", "4,8", "-o", "sizes.json", "--resamples", 10)
    do("audit-labels", "new", "--predictor", "mcm", "-o", "wrong.parquet")
    begin_triage(root, do)
    benchmark(root)
    resume(root / "checkpoints", stop_after=5)
    found = [
        *(_store(root, name, do) for name in ("new", "pairs", "imported")),
        _predictor(root, do),
        _scores(root, do),
        _score_folder(root, do),
        _state(root, do),
        *(_results(root / name, do) for name in ("results.json", "results.parquet", "sizes.json")),
        _monitor_report(root, do),
        _label_errors(root, do),
        *_triage(root, do),
        *_journals(root),
        Artefact(
            root / "why.json",
            {"inspect": lambda: do("inspect", "why.json")},
            lambda: do("inspect", "why.json"),
        ),
        _benchmark(root, do),
        Artefact(
            root / "checkpoints",
            {"resume": lambda: resume(root / "checkpoints")},
            lambda: resume(root / "checkpoints"),
        ),
    ]
    for artefact in found:
        artefact.keep()
    return found


Do = Callable[..., object]


def _store(root: Path, name: str, do: Do) -> Artefact:
    out = root / "out.parquet"
    path = root / name
    more, method = (("--pool-size", 4), "mcm") if name == "pairs" else ((), "knn_distance")

    def read() -> object:
        inspect(path)
        store = (
            vilu.open_source(path, pools=Pools(4)) if name == "pairs" else vilu.open_source(path)
        )
        labels = [store.target.tolist(), store.outside.tolist()]
        return [vilu.MCM().predict_uncertainty(store).tolist(), list(store.ids), labels]

    uses: dict[str, Use] = {
        "columns": lambda: columns(path),
        "inspect": lambda: do("inspect", path, "--deep"),
        "score": lambda: do("score", "mcm", path, "-o", out, *more, out=out),
        "explain": lambda: do("explain", "mcm", path, "-n", 2, "--json", *more),
        "fit": lambda: do(
            "fit", path, "-o", "fitted", "--method", method, *more, out=root / "fitted"
        ),
    }
    return Artefact(path, uses, read)


def columns(path: Path) -> object:
    """Return every array in a store."""
    store = vilu.open_source(path)
    index = torch.arange(len(store))
    return {name: store.column(name, index).tolist() for name in store.columns}


def _predictor(root: Path, do: Do) -> Artefact:
    path, out = root / "head", root / "out.parquet"
    rows = vilu.open_source(root / "new")

    def read() -> object:
        predictor = load_predictor(path)
        write_card(path)
        calibration = Calibration.find(path)
        monitor = None if calibration is None else Monitor.of_folder(path)
        outcomes = vilu.score(predictor, rows, calibration=calibration)
        return [
            outcomes.table()[0]["uncertainty"].to_pylist(),
            outcomes.decision,
            monitor and monitor.fingerprint,
        ]

    uses: dict[str, Use] = {
        "score": lambda: do("score", path, "new", "-o", out, out=out),
        "explain": lambda: do("explain", path, "new", "-n", 2, "--json"),
        "monitor": lambda: do("monitor", path, "scores.parquet", "--json"),
        "report": lambda: do(
            "report",
            "scores.parquet",
            "--predictor",
            path,
            "-o",
            "page.html",
            out=root / "page.html",
        ),
        "push": lambda: do("push", path, root / "pushed", out=root / "pushed"),
        "pull": lambda: do("pull", path, "-o", "pulled", out=root / "pulled"),
        "inspect": lambda: do("inspect", path),
        "init": lambda: do(
            "fit",
            "train",
            "-o",
            "fitted",
            "--method",
            "vilu",
            "--init",
            path,
            "--set",
            "epochs=1",
            "--set",
            "hidden=8",
            out=root / "fitted" / "weights.safetensors",
        ),
    }
    return Artefact(path, uses, read)


def _scores(root: Path, do: Do) -> Artefact:
    path = root / "scores.parquet"
    uses: dict[str, Use] = {
        "evaluate": lambda: do("evaluate", path, "--json", "--resamples", 10),
        "monitor": lambda: do("monitor", "head", path, "--json"),
        "labels": lambda: do("monitor", "head", "--late-labels", path, "--json"),
        "report": lambda: do("report", path, "-o", "page.html", out=root / "page.html"),
        "inspect": lambda: do("inspect", path),
    }
    return Artefact(
        path, uses, lambda: vilu.evaluate(Outcomes.load(path), n_resamples=0).to_dicts()
    )


def _score_folder(root: Path, do: Do) -> Artefact:
    path = root / "scores"
    uses: dict[str, Use] = {
        "evaluate": lambda: do("evaluate", path, "--json", "--resamples", 10),
        "monitor": lambda: do("monitor", "head", path, "--json"),
        "inspect": lambda: do("inspect", path),
        "again": lambda: [do("score", "head", "new", "-o", path), tree(path)],
    }

    def read() -> object:
        folder = ScoreFolder(path)
        return [
            vilu.evaluate(folder, n_resamples=0).to_dicts(),
            folder.outcomes().uncertainty.tolist(),
        ]

    return Artefact(path, uses, read)


def _state(root: Path, do: Do) -> Artefact:
    path = root / "state.parquet"
    uses: dict[str, Use] = {
        "monitor": lambda: [
            do("monitor", "head", "--late-labels", "scores.parquet", "--state", path, "--json"),
            tree(path),
        ],
        "inspect": lambda: do("inspect", path),
    }
    return Artefact(
        path,
        uses,
        lambda: Monitor.of_folder(root / "head").resume(path).status.model_dump(mode="json"),
    )


def _journals(root: Path) -> list[Artefact]:
    """Return the state folders from `vilu serve`, one stopped and one as a kill leaves it."""
    stopped = root / "serving"
    killed = root / "serving-killed"
    scores = Outcomes.load(root / "scores.parquet")
    ids = list(scores.ids or ())
    answers = np.asarray(scores.prediction).tolist()
    journals = LocalJournals(stopped, {"first": root / "head"})
    journals.switch("first")
    for first in range(0, len(ids), 10):
        rows = slice(first, first + 10)
        journals.record(ids[rows], {"first": (answers[rows], scores.uncertainty.tolist()[rows])})
    labels = {key: NAMES[answers[place]] for place, key in enumerate(ids[:20])}
    journals.label(labels)
    shutil.copytree(stopped, killed, ignore=shutil.ignore_patterns("*-shm"))
    journals.close()
    artefacts: list[Artefact] = []
    for path in (stopped, killed):
        use = partial(_start_journals, path, root / "head", labels)
        artefacts.append(Artefact(path, {"start": use}, use))
    return artefacts


def _start_journals(state: Path, predictor: Path, labels: dict[str, str]) -> object:
    """Return the monitor's status at the start.

    If the log reports anything, for example files that were set aside, raise Refused.
    """
    messages = queue.SimpleQueue[logging.LogRecord]()
    handler = logging.handlers.QueueHandler(messages)
    logger = logging.getLogger("vilu.service")
    logger.addHandler(handler)
    try:
        with closing(LocalJournals(state, {"first": predictor})) as journals:
            statuses = journals.statuses()["first"].model_dump(mode="json")
            known = journals.label(labels)  # each row has its label already
    finally:
        logger.removeHandler(handler)
    if not messages.empty():
        raise Refused(messages.get().getMessage())
    return statuses, known


def _results(path: Path, do: Do) -> Artefact:
    uses: dict[str, Use] = {
        "load": lambda: str(ResultTable.load(path)),
        "inspect": lambda: do("inspect", path),
    }
    return Artefact(path, uses, lambda: str(ResultTable.load(path)))


def _monitor_report(root: Path, do: Do) -> Artefact:
    path = root / "monitored.json"
    uses: dict[str, Use] = {
        "again": lambda: [do("monitor", "head", "scores.parquet", "-o", path), tree(path)],
        "inspect": lambda: do("inspect", path),
    }
    return Artefact(path, uses, lambda: do("inspect", path))


def _label_errors(root: Path, do: Do) -> Artefact:
    path = root / "wrong.parquet"
    uses: dict[str, Use] = {
        "again": lambda: [
            do("audit-labels", "new", "--predictor", "mcm", "-o", path),
            tree(path),
        ],
        "inspect": lambda: do("inspect", path),
    }
    return Artefact(path, uses, lambda: do("inspect", path))


def begin_triage(root: Path, do: Do) -> None:
    """Run a triage on 45 photos, where 36 have a label, so that its predictor learns from them."""
    truth = write_photos(root / "photos", 45)
    (root / "names.txt").write_text("\n".join(NAMES))
    lines = [f"{path},{label}" for path, label in list(truth.items())[:36]]
    (root / "known.csv").write_text("\n".join(["path,label", *lines]))
    triage(root, do, "--labels", "known.csv")
    triage(root, do)


def triage(root: Path, do: Do, *more: object) -> object:
    """Return the command's output and written files, without the embeddings, which are only
    read.
    """
    arguments = ("photos", "--classes", "names.txt", "-o", "triage", "-n", 6)
    with patch.object(BackboneSpec, "load", lambda _: FakeBackbone()):
        said = do("triage", *arguments, *more)
    written = tree(root / "triage")
    return said, {name: of for name, of in written.items() if not name.startswith("embeddings/")}


def _triage(root: Path, do: Do) -> list[Artefact]:
    path, tasks = root / "triage", root / "tasks.json"
    images = [photo(kind, 1_000 + kind) for kind in range(KINDS)]

    def read() -> object:
        return list(map(str, Guard(path / "predictor", backbone=FakeBackbone())(images)))

    again: Use = partial(triage, root, do)
    uses: dict[str, Use] = {
        "again": again,
        "review": lambda: do("review", path, "-o", tasks, "--to", "label-studio", out=tasks),
        "guard": read,
        "inspect": lambda: do("inspect", path / "predictor"),
    }
    sealed = frozenset({".json", ".parquet", ".safetensors", ".npy"})
    for_people = frozenset({".csv", ".html"})  # without a digest, since each run writes them anew
    return [
        Artefact(path, uses, read, suffixes=sealed),
        Artefact(path, {"again": again}, again, suffixes=for_people),
    ]


def benchmark(root: Path) -> object:
    if not (root / "data").is_dir():
        make_store(root / "data/one-train", 60, 0)
        make_store(root / "data/one-test", 30, 1_000)
    stores = {"one": {"stores": {"train": "one-train", "test": "one-test"}}}
    methods = {"mcm": {}, "lvu": {"params": {"epochs": 1, "hidden": [4]}}}
    changes = {
        "data": stores,
        "methods": methods,
        "seeds": 1,
        "settings": {"all": {"kind": "labels"}},
    }
    (study,) = run_studies([config(**changes)], root / "data", root / "bench")
    return study.text, tree(root / "bench")


def _benchmark(root: Path, do: Do) -> Artefact:
    path = root / "bench"

    def read() -> object:
        return [list(check_artefacts(path)), [done.text for done in render_studies(path)]]

    uses: dict[str, Use] = {
        "render": lambda: [do("render", path), tree(path / "studies/benchmark/tables")],
        "inspect": lambda: do("inspect", path),
        "again": lambda: benchmark(root),
    }
    return Artefact(path, uses, read)


def resume(folder: Path, stop_after: int | None = None) -> object:
    """Train with checkpoints, and stop after some steps or at the end."""
    data: Embeddings = toy_embeddings(n=100)
    predictor = ViLU(hidden=(4,), epochs=2, batch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if stop_after is not None:
            with suppress(Stop), reporting(Brake(stop_after, stop)), checkpointing(folder):
                predictor.fit(data)
            return None
        with checkpointing(folder, resume=True):
            predictor.fit(data)
    return {name: tensor.tolist() for name, tensor in predictor.state().items()}
