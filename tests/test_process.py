"""Test that vilu leaves the caller's process alone, and tunes it only on request."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sklearn  # noqa: F401 - sets variables of its own when it is imported
import torch
import torch._dynamo  # torch's compiler also sets variables, and torch's optimisers import it
from PIL import Image
from sklearn.linear_model import LogisticRegression

import vilu
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.conftest import few, toy_embeddings
from tests.tables.answers import table
from vilu import registry
from vilu.predictors.persistence.onnx import export_onnx
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.process import KEPT_MEMORY_VARIABLES
from vilu.sklearn import SelectiveClassifier
from vilu.tables.methods import AnswerProbe

PAUSE = 0.0002
"""Seconds between two looks by the second thread, which is less than any fit takes."""


def state() -> dict[str, object]:
    """Return the process settings that a caller may rely on."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - the global generator is meant
    return {
        "default type": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "generator of torch": torch.get_rng_state().numpy().tobytes(),
        "generator of numpy": numpy_state["state"]["key"].tobytes(),
        "generator of Python": random.getstate(),
    }


@contextmanager
def watched() -> Iterator[set[str]]:
    """Yield the names of settings that change.

    A second thread looks again and again, and this thread looks at the end.
    """
    before = state()
    changed: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        now = state()
        changed.update(name for name in before if now[name] != before[name])

    def look_again_and_again() -> None:
        while not ended.wait(PAUSE):
            look()

    watcher = threading.Thread(target=look_again_and_again)
    watcher.start()
    try:
        yield changed
    finally:
        ended.set()
        watcher.join()
        look()


@pytest.fixture
def callers_own_settings() -> Iterator[None]:
    """Use settings that differ from torch's defaults, as a caller may."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


@pytest.fixture
def data() -> vilu.Embeddings:
    return toy_embeddings(n=400, k=3)


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.usefixtures("callers_own_settings")
@pytest.mark.parametrize("method", few(["lvu", "pvu", "lmn", "mc_dropout", "vilu_plus"], 4))
def test_a_fit_and_its_scores_leave_the_process_alone(method: str, data: vilu.Embeddings) -> None:
    parameters = {} if method == "vilu_plus" else {"epochs": 3}
    with watched() as changed:
        predictor = vilu.PREDICTORS[method](**parameters).fit(data)
        outcomes = vilu.score(predictor, toy_embeddings(n=400, k=3, seed=1, ids_from=1000))
        vilu.evaluate(outcomes)
    assert changed == set()


@pytest.mark.usefixtures("callers_own_settings")
def test_saving_calibrating_and_guarding_leave_the_process_alone(
    tmp_path: Path, data: vilu.Embeddings
) -> None:
    photos = [Image.effect_noise((20, 24), 50).convert("RGB") for _ in range(4)]
    with watched() as changed:
        vilu.MCM().save(tmp_path / "predictor")
        target = vilu.Target(max_risk=0.5)
        vilu.calibrate_predictor(tmp_path / "predictor", data, target)
        model = FakeBackbone()
        names = ("cat", "dog", "bird")
        vilu.MCM().save(tmp_path / "guarded")
        text = model.encode_texts(names)
        Vocabulary(names, text, model.space, "float32", {}).save(tmp_path / "guarded")
        answers = vilu.Guard(tmp_path / "guarded", backbone=model, workers=1)(photos)
    assert len(answers) == len(photos)
    assert changed == set()


@pytest.mark.usefixtures("callers_own_settings")
def test_embedding_leaves_the_process_alone(tmp_path: Path) -> None:
    with watched() as changed:
        store = vilu.embed(dataset(12), FakeBackbone(), tmp_path / "store", names=NAMES, workers=2)
    assert len(store) > 0
    assert changed == set()


@pytest.mark.usefixtures("callers_own_settings")
def test_tables_of_answers_leave_the_process_alone(tmp_path: Path) -> None:
    with watched() as changed:
        rows = table(1200, features=4)
        model = vilu.Selective(AnswerProbe()).fit(rows[:500])
        model.calibrate(rows[500:1000], max_risk=0.3)
        vilu.Monitor.of_folder(model).update(model.predict(rows[1000:]))
        vilu.estimate(vilu.score(model, rows[1000:]))
        model.save(tmp_path / "model")
        vilu.load(tmp_path / "model")
    assert changed == set()


@pytest.mark.usefixtures("callers_own_settings")
def test_a_selective_model_and_its_page_leave_the_process_alone(
    tmp_path: Path, data: vilu.Embeddings
) -> None:
    with watched() as changed:
        model = vilu.Selective(vilu.PREDICTORS["linear_probe"]()).fit(data)
        model.calibrate(toy_embeddings(n=400, k=3, seed=1, ids_from=1000), max_risk=0.4)
        new = toy_embeddings(n=100, k=3, seed=2, ids_from=2000)
        outcomes = model.predict(new)
        outcomes.to_arrow()
        vilu.report_page([outcomes])
        vilu.explain(model.predictor, new)
        model.save(tmp_path / "model")
        vilu.MCM().fit(data).save(tmp_path / "mcm")
        export_onnx(tmp_path / "mcm", tmp_path / "mcm.onnx")
    assert changed == set()


def test_a_classifier_of_scikit_learn_leaves_the_process_alone() -> None:
    random_rows = np.random.default_rng(0).normal(size=(600, 2))
    label = random_rows[:, 0] > 0
    with watched() as changed:
        model = SelectiveClassifier(LogisticRegression()).fit(random_rows, label)
        model.predict_or_review(random_rows)
    assert changed == set()


def test_loading_a_plugin_leaves_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_of_a_test.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "IMPORTED_PLUGINS", [])
    before = dict(os.environ)
    registry.load_plugin("plugin_of_a_test")
    assert dict(os.environ) == before
    assert registry.plugins() == ["plugin_of_a_test"]


def answer_of(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process whose environment sets no such variable."""
    set_by_user = ("OMP_", "GOMP_", "RAY_", *KEPT_MEMORY_VARIABLES)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(set_by_user)
    }
    return subprocess.run(
        [sys.executable, "-c", program],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_an_import_leaves_the_environment_alone() -> None:
    program = """
import os
before = dict(os.environ)
import vilu
for name in vilu.__all__:
    getattr(vilu, name)
import json
print(json.dumps(sorted(set(os.environ.items()) ^ set(before.items()))))
"""
    assert json.loads(answer_of(program).stdout) == []


@pytest.mark.skipif(sys.platform != "linux", reason="torch computes with libgomp on Linux alone")
@pytest.mark.parametrize(
    ("environment", "spins"), [({}, "3000"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_in_a_tuned_process_threads_do_not_spin_for_long(
    environment: dict[str, str], spins: str
) -> None:
    """libgomp prints what it has read. If the user sets how threads wait, that setting stays."""
    program = "import vilu; vilu.tune_process(); import torch"
    done = answer_of(program, OMP_DISPLAY_ENV="VERBOSE", **environment)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_tuning_after_torch_warns_of_what_comes_too_late() -> None:
    program = "import torch, vilu; vilu.tune_process()"
    warning = answer_of(program).stderr
    assert "<string>:1: UserWarning: torch was imported before vilu.tune_process()" in warning
    assert "GOMP_SPINCOUNT has no effect in this process any more" in warning
    assert answer_of(program, GOMP_SPINCOUNT="100").stderr == ""


def test_a_ray_of_a_tuned_process_reports_to_nobody() -> None:
    program = (
        "import vilu; vilu.tune_process(); import os; print(os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    assert answer_of(program).stdout == "0\n"
    assert answer_of(program, RAY_USAGE_STATS_ENABLED="1").stdout == "1\n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "0"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "None"),
        ({"RAY_ADDRESS": ""}, "0"),
        ({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}, "1"),
    ],
)
def test_a_ray_of_the_command_line_listens_to_this_machine(
    environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    """If the user names a cluster or sets the variable, vilu leaves it alone."""
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    (tmp_path / "says.py").write_text(f"import os; print(os.environ.get('{name}'))")
    program = (
        "import sys; sys.argv = ['vilu', '--plugin', 'says', 'list', 'metrics']\n"
        "from vilu.cli import entry; entry()"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = answer_of(program, PYTHONPATH=path, **environment)
    assert done.stdout.startswith(f"{expected}\n")


PAGES_OF_BLOCKS = """
import resource, vilu
{first}
import torch

def pages() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(10 * 2**20).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

vilu.Embeddings(torch.eye(3), torch.eye(3))
pages()  # the heap grows until a block fits
print(pages() / (40 * 2**20 // resource.getpagesize()))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_in_a_tuned_process_pages_of_a_large_block_are_made_once() -> None:
    """The test makes three blocks with 40 MiB, one after the other.

    By itself, glibc never keeps a freed block over 32 MiB. If the user sets a variable, it stays.
    """
    tuned = PAGES_OF_BLOCKS.format(first="vilu.tune_process()")
    assert float(answer_of(tuned).stdout) < 1
    assert float(answer_of(tuned, MALLOC_TRIM_THRESHOLD_="131072").stdout) > 2
    assert float(answer_of(PAGES_OF_BLOCKS.format(first="")).stdout) > 2


HEAPS = """
import ctypes, threading, vilu
from vilu.process import use_one_heap
use_one_heap()
import numpy, pyarrow
thread = threading.Thread(target=lambda: numpy.ones(2**17))
thread.start()
thread.join()
print(pyarrow.default_memory_pool().backend_name)
ctypes.CDLL(None).malloc_stats()  # tells of every heap on stderr
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these heaps")
def test_with_one_heap_a_thread_has_none_of_its_own() -> None:
    """If the user sets the number of heaps or Arrow's memory pool, that setting stays."""
    done = answer_of(HEAPS)
    assert (done.stdout, done.stderr.count("Arena ")) == ("system\n", 1)
    done = answer_of(HEAPS, MALLOC_ARENA_MAX="8", ARROW_DEFAULT_MEMORY_POOL="mimalloc")
    assert done.stdout == "mimalloc\n"
    assert done.stderr.count("Arena ") > 1


def test_a_plugin_does_not_choose_the_heap_of_arrow_in_a_service(tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text(
        "import pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    )
    program = (
        "import sys; sys.argv = ['vilu', '--plugin', 'says', 'serve', '--help']\n"
        "from vilu.cli import entry; entry()"
    )
    done = answer_of(program, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.stdout.startswith("system\n")


def test_the_command_line_tunes_its_process(tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text("import os; print(os.environ['GOMP_SPINCOUNT'])")
    program = (
        "import sys; sys.argv = ['vilu', '--plugin', 'says', 'list', 'metrics']\n"
        "from vilu.cli import entry; entry()"
    )
    done = answer_of(program, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.stdout.startswith("3000\n")
