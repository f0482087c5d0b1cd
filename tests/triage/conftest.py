"""Provide a model without weights and a folder with photos and their right names."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.builders.photo_folders import write_photos
from tests.builders.store_fakes import NAMES, FakeBackbone
from vilu.predictors.plus import vilu_plus
from vilu.store.job import BackboneSpec
from vilu.triage.outputs import triage_photos
from vilu.triage.photos import EmbeddingSettings
from vilu.triage.state import TriageSettings

Folder = tuple[Path, dict[str, str]]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def give_labels(file: Path, truth: dict[str, str], to: Path) -> Path:
    """Write the table again with the right label in every row, and return the new path."""
    asked = rows(file)
    with to.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(asked[0]))
        writer.writeheader()
        writer.writerows({**row, "label": truth[row["path"]]} for row in asked)
    return to


def fill_in(output: Path, truth: dict[str, str], to: Path) -> Path:
    """Write `next_labels.csv` again with the right label in every row, and return the new path."""
    return give_labels(output / "next_labels.csv", truth, to)


def label_file(file: Path, labels: dict[str, str]) -> None:
    """Write a file of labels."""
    lines = ["path,label", *(f"{path},{label}" for path, label in labels.items())]
    file.write_text("\n".join(lines) + "\n")


def job_on(photos: Path) -> TriageSettings:
    return TriageSettings(
        photos, EmbeddingSettings(BackboneSpec("fake"), NAMES, None, ()), max_risk=0.1, n_next=60
    )


@contextmanager
def quick_triages() -> Iterator[FakeBackbone]:
    """Load this fake model, whichever model a triage asks for, and train in few steps.

    By default the network of a fit makes at least 300 steps, which took most of the tests' time.
    """
    model = FakeBackbone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackboneSpec, "load", lambda self: model)
        patch.setattr(vilu_plus, "small_network_epochs", lambda steps: max(60 // steps, 1))
        yield model


@pytest.fixture(autouse=True, scope="package")
def fake_model() -> Iterator[FakeBackbone]:
    with quick_triages() as model:
        yield model


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return a folder with 400 photos and a triage with a guarantee, and the right names.

    The scope is the session. If it were the package, pytest would make the fixture again after
    each file from another package.
    """
    home = tmp_path_factory.mktemp("begun")
    with quick_triages():
        return home, until_guaranteed(home, job_on(home / "photos"))


def until_guaranteed(home: Path, job: TriageSettings) -> dict[str, str]:
    """Answer a triage with 400 new photos until it has a guarantee, and return the right names."""
    truth, labels = write_photos(job.photos, 400), list[Path]()
    for _ in range(8):
        triage_photos(job, home / "out", labels)
        if any(row["decision"] == "accept" for row in rows(home / "out" / "decisions.csv")):
            return truth
        if (home / "half").exists():
            shutil.rmtree(home / "half")
        shutil.copytree(home / "out", home / "half")  # keep the run before the guarantee
        labels = [fill_in(home / "out", truth, home / "filled.csv")]
    pytest.fail("nothing was guaranteed")


@pytest.fixture
def guaranteed(begun: tuple[Path, dict[str, str]], tmp_path: Path) -> Folder:
    """Return a copy with the photos and the triage from `begun`, and the right names."""
    shutil.copytree(begun[0] / "photos", tmp_path / "photos", copy_function=shutil.copy2)
    shutil.copytree(begun[0] / "out", tmp_path / "out")
    return tmp_path, begun[1]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Write 200 photos, and return their folder and their right names."""
    return tmp_path / "photos", write_photos(tmp_path / "photos", 200)


@pytest.fixture
def job(folder: Folder) -> TriageSettings:
    return job_on(folder[0])


@pytest.fixture
def changed(job: TriageSettings) -> Callable[..., TriageSettings]:
    """Return a function that changes settings of `job`."""
    return lambda **settings: replace(job, **settings)
