"""The head that a release offers: it is fitted on the demo's photos, pushed to a folder, pulled
and used.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import vilu
from tests.builders.clothes import write_few_photos
from tests.command import ROOT, run
from vilu.cli.demo import PROMPT_NAMES
from vilu.predictors.persistence.hub import push

TOOL = runpy.run_path(str(ROOT / "tools" / "clothes_head.py"))


@pytest.mark.slow
def test_a_pulled_head_answers(tmp_path: Path) -> None:
    photos = tmp_path / "few.parquet"
    write_few_photos(photos, {"train": 400, "validation": 300, "test": 60})
    head = TOOL["make_head"](photos, tmp_path / "work")
    push(head, str(tmp_path / "shelf" / "clothes"))
    run("pull", tmp_path / "shelf" / "clothes", "-o", "pulled", cwd=tmp_path)
    card = (tmp_path / "pulled" / "README.md").read_text(encoding="utf-8")
    assert 'license: "cc0-1.0"' in card
    assert "400 photos were fitted on and 300 calibrated on. Of 60" in card
    images = pq.read_table(photos)["image"][:3].to_pylist()
    for number, image in enumerate(images):
        (tmp_path / f"{number}.jpg").write_bytes(image)
    guard = vilu.Guard(tmp_path / "pulled")
    answers = guard([tmp_path / f"{number}.jpg" for number in range(3)])
    assert {answer.label for answer in answers} <= set(PROMPT_NAMES)
    assert {answer.decision for answer in answers} <= {"accept", "review"}
