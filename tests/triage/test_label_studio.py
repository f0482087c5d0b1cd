"""Check the files that vilu writes for Label Studio with Label Studio's own SDK."""

from __future__ import annotations

import json
from dataclasses import replace
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

    every = open_review(begun[0] / "half", "all")
    shown = [task for task in every.tasks if not task.is_blind][:15]
    blind = [task for task in every.tasks if task.is_blind][:15]
    review = replace(every, tasks=[*shown, *blind])
    tasks_file, config_file = write_review(review, "label-studio", tmp_path / "tasks.json")
    interface = LabelInterface(config_file.read_text())
    interface.validate()
    tasks = json.loads(tasks_file.read_text())
    predictions = [task["predictions"][0] for task in tasks if "predictions" in task]
    # photos that may count for the guarantee have hidden answers
    assert (len(predictions), len(tasks)) == (15, 30)
    for task in tasks:  # with predictions, validate_task calls itself without them
        assert interface.validate_task({"data": task["data"]})
    answers = {task.path: task.answer or "cat" for task in review.tasks}
    for prediction in predictions:
        assert interface.validate_prediction(prediction)
    result = predictions[0]["result"][0]
    for task in tasks:  # a person agrees with the model, or says "cat"
        choice = {**result, "value": {"choices": [answers[task["data"]["path"]]]}}
        task["annotations"] = [{"result": [choice], "was_cancelled": False}]
        assert interface.validate_annotation(task["annotations"][0])
    assert not interface.validate_prediction({"result": [{**result, "from_name": "x"}]})
    (tmp_path / "done.json").write_text(json.dumps(tasks))
    assert read_finished_tasks(tmp_path / "done.json")[0] == answers
