"""I have a folder of photos and a model that names them: which of its answers can I trust?

Shows `vilu triage` and `vilu.Guard`. `vilu triage` learns from a folder and its labels which
answers to trust. It guarantees that at most 10 % of the accepted answers are wrong. A smaller risk
would take more labels. `vilu.Guard` decides about photos that come later. The photos are real
photos of four kinds of clothes. The small model that comes with vilu names them, after it was
adapted to the labels. Even then one in ten answers is wrong.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import vilu
from example_data import photos_on_disk

KINDS = ("t-shirt", "jeans", "shoe", "dress")
ARGUMENTS = (
    "triage photos --classes names.txt --labels labels.csv --backbone compact:128 "
    "--max-risk 0.1 -o out"
)
"""The arguments of the command `vilu`."""


def run_triage(home: Path) -> str:
    """Write photos and their labels, run `vilu triage`, and return its messages."""
    labels = photos_on_disk(home / "photos", 400, kinds=KINDS)
    class_names = "\n".join(KINDS) + "\n"
    (home / "names.txt").write_text(class_names, encoding="utf-8")
    with (home / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows(labels.items())
    command = [sys.executable, "-m", "vilu.cli", *ARGUMENTS.split()]
    process = subprocess.run(command, cwd=home, check=True, capture_output=True, text=True)
    return process.stderr


def main() -> Figure:
    """Learn from a folder, then decide about new photos."""
    with tempfile.TemporaryDirectory() as temporary_folder:
        home = Path(temporary_folder)
        messages = run_triage(home)
        label_by_path = photos_on_disk(home / "later", 100, skip=400, kinds=KINDS)
        photos = [home / "later" / path for path in label_by_path]
        guard = vilu.Guard(home / "out" / "predictor")
        answers = guard(photos)
        figure = draw(photos, answers)

    for message in messages.splitlines():
        if "guaranteed" in message.lower():
            print(message)
            break
    for answer in answers[:3]:
        probability = f"probability of failure {answer.failure_probability:.0%}"
        reason = answer.reason or "within the guarantee"
        print(f"{answer.label}, {probability}: {answer.decision} ({reason})")

    label = np.array(list(label_by_path.values()))
    wrong = np.array([answer.label for answer in answers]) != label
    accepted = np.array([answer.decision for answer in answers]) == "accept"
    print(f"{wrong.mean():.0%} of {len(wrong)} answers are wrong")
    print(f"of {accepted.sum()} accepted answers, {wrong[accepted].mean():.0%} are wrong")

    assert "Guaranteed: at most 10.0% wrong" in messages
    assert {answer.decision for answer in answers} == {"accept", "review"}
    assert 15 < accepted.sum() < 95
    assert wrong[accepted].mean() < wrong.mean()  # 100 photos are too few to check the 10 %.
    return figure


def draw(photos: list[Path], answers: list[vilu.Answer]) -> Figure:
    """Draw accepted photos above, and photos for review below."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    rows_of_axes = figure.subplots(2, 5)
    for row, decision in zip(rows_of_axes, ("accept", "review"), strict=True):
        indices = [i for i, answer in enumerate(answers) if answer.decision == decision]
        for axes, index in zip(row, indices, strict=False):
            with Image.open(photos[index]) as photo:
                axes.imshow(photo)
            axes.set(xticks=[], yticks=[], title=f"{decision}:\n{answers[index].label}")
    return figure


if __name__ == "__main__":
    main()
