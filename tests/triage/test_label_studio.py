"""What we write for Label Studio, judged by its own kit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.triage.conftest import Folder
from vilu.triage.review import open_review
from vilu.triage.review_files import read_finished_tasks, write_review

pytestmark = [pytest.mark.label_studio, pytest.mark.filterwarnings("ignore")]


def test_tasks_predictions_and_answers_are_as_its_configuration_says(
    begun: Folder, tmp_path: Path
) -> None:
    from label_studio_sdk.label_interface import LabelInterface

    review = open_review(begun[0] / "half", n=30)
    tasks_file, config_file = write_review(review, "label-studio", tmp_path / "tasks.json")
    interface = LabelInterface(config_file.read_text())
    interface.validate()
    tasks = json.loads(tasks_file.read_text())
    assert len(tasks) == 30
    for task in tasks:
        assert interface.validate_task(
            {"data": task["data"]}
        )  # with predictions it calls itself without them
        assert interface.validate_prediction(task["predictions"][0])
    name = {one["data"]["path"]: one["predictions"][0]["result"] for one in tasks}
    for task in tasks:  # a person agrees with the model
        task["annotations"] = [{"result": name[task["data"]["path"]], "was_cancelled": False}]
        assert interface.validate_annotation(task["annotations"][0])
    assert not interface.validate_prediction(
        {"result": [{**tasks[0]["predictions"][0]["result"][0], "from_name": "x"}]}
    )
    (tmp_path / "done.json").write_text(json.dumps(tasks))
    assert read_finished_tasks(tmp_path / "done.json")[0] == {
        one.path: one.answer for one in review.tasks
    }
