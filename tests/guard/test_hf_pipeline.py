"""Test ``transformers.pipeline`` against the guard on the same images."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.builders.photo_folders import photo
from tests.triage.conftest import Folder
from vilu.errors import UsageError
from vilu.guard.guard import Guard
from vilu.guard.hf_pipeline import TASK, SelectivePipeline, register

transformers = pytest.importorskip("transformers")
KEYS = {
    "label",
    "score",
    "failure_probability",
    "decision",
    "reason",
    "runners_up",
    "zero_shot",
    "likely",
    "quantile",
}


@pytest.fixture(scope="module")
def guard(begun: Folder) -> Guard:
    return Guard(begun[0] / "out" / "predictor", batch_size=4)


@pytest.fixture(scope="module")
def pipe(guard: Guard) -> SelectivePipeline:
    register()
    register()
    return transformers.pipeline(TASK, model=guard)


def test_an_image_in_any_form_is_a_list_with_the_answer(
    pipe: SelectivePipeline, guard: Guard, tmp_path: Path
) -> None:
    content = photo(3, 12345)
    (tmp_path / "a.png").write_bytes(content)
    answer = guard([content])[0]
    for image in (
        content,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.open(io.BytesIO(content)),
    ):
        (entry,) = pipe(image)
        assert entry.keys() == KEYS
        assert (entry["label"], entry["decision"], entry["reason"]) == (
            answer.label,
            answer.decision,
            answer.reason,
        )
        assert entry["failure_probability"] == answer.failure_probability
        assert entry["score"] + entry["failure_probability"] == pytest.approx(1)
        assert [(one["label"], one["score"]) for one in entry["runners_up"]] == list(
            answer.runners_up
        )


def test_many_images_are_a_list_and_a_stream_is_a_stream(
    pipe: SelectivePipeline, guard: Guard
) -> None:
    images = [photo(kind, 7) for kind in range(5)]
    found = pipe(images)
    assert [entry["label"] for (entry,) in found] == [answer.label for answer in guard(images)]
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield images[(taken - 1) % 5]

    stream = pipe(endless())
    assert [next(stream) for _ in range(4)] == found[:4]
    assert taken <= 4 + 4 + guard.workers + 1
    del stream
    assert pipe([]) == []


def test_a_bad_image_has_a_reason_and_spoils_no_other(
    pipe: SelectivePipeline, tmp_path: Path
) -> None:
    (gone,), (good,), (cut,) = pipe([tmp_path / "gone.png", photo(1, 1), photo(1, 1)[:60]])
    assert (gone["reason"], cut["reason"]) == ("read_error", "truncated")
    assert gone["label"] is gone["score"] is gone["failure_probability"] is None
    assert gone["decision"] == "review"
    assert gone["runners_up"] == []
    assert good["label"] is not None


def test_what_the_guard_decides_is_not_asked_again(pipe: SelectivePipeline, guard: Guard) -> None:
    with pytest.raises(
        UsageError,
        match=r"takes no candidate_labels: classes and prompts are those of the predictor",
    ):
        pipe(photo(1, 1), candidate_labels=["a", "b"])
    with pytest.raises(UsageError, match=r"takes no device: .* are arguments of the guard"):
        transformers.pipeline(TASK, model=guard, device="cpu")
    with pytest.raises(UsageError, match=r"model=vilu\.Guard\(folder\)\. Got 'out/predictor'"):
        SelectivePipeline("out/predictor")  # type: ignore[arg-type]


@pytest.mark.slow  # a process that imports transformers
def test_the_task_is_known_only_after_register() -> None:
    code = (
        "import vilu, sys, vilu.guard.hf_pipeline as ours; "
        "assert 'transformers' not in sys.modules; "
        "from transformers.pipelines import PIPELINE_REGISTRY as known; "
        "assert ours.TASK not in known.supported_tasks; ours.register(); "
        "assert known.supported_tasks[ours.TASK]['impl'] is ours.SelectivePipeline"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
