"""I have a folder of photos and a model that names them: which of its answers can I trust?

Shows `vilu triage`, which learns from a folder and its labels whom to trust and guarantees how
often it errs, and `vilu.Guard`, which decides about photos that come later. Real photos of four
kinds of clothes, named by the small model that comes with vilu and adapted to the labels. One in
ten of its answers is then wrong. A risk of 10 % is asked for, since 5 % takes more labels.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import vilu
from example_data import photos_on_disk

KINDS = ("t-shirt", "jeans", "shoe", "dress")


def triage(home: Path, labels: dict[str, str]) -> str:
    """The command, as one types it; what it tells."""
    (home / "names.txt").write_text("\n".join(KINDS) + "\n", encoding="utf-8")
    with (home / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *labels.items()])
    given = (
        "triage photos --classes names.txt --labels labels.csv --backbone compact:128 "
        "--max-risk 0.1 -o out"
    )
    command = [sys.executable, "-m", "vilu.cli", *given.split()]
    return subprocess.run(command, cwd=home, check=True, capture_output=True, text=True).stderr


def main() -> Figure:
    """Learn from a folder, then ask about new photos."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        told = triage(home, photos_on_disk(home / "photos", 400, kinds=KINDS))
        print(next(line for line in told.splitlines() if "guaranteed" in line.lower()))

        truth = photos_on_disk(home / "later", 100, skip=400, kinds=KINDS)
        guard = vilu.Guard(home / "out" / "predictor")
        answers = guard(home / "later" / path for path in truth)
        figure = drawn([home / "later" / path for path in truth], answers)

    for one in answers[:3]:
        reason = one.reason or "within the guarantee"
        print(f"{one.label}, wrong with {one.failure_probability:.0%}: {one.decision}, {reason}")
    right = [answer.label == name for answer, name in zip(answers, truth.values(), strict=True)]
    accepted = [
        said for answer, said in zip(answers, right, strict=True) if answer.decision == "accept"
    ]
    wrong, still_wrong = 1 - sum(right) / len(right), 1 - sum(accepted) / len(accepted)
    print(
        f"{wrong:.0%} of {len(right)} answers are wrong; of the {len(accepted)} that are accepted "
        f"{still_wrong:.0%} are"
    )

    assert "Guaranteed: at most 10.0% wrong" in told
    assert Counter(answer.decision for answer in answers).keys() == {"accept", "review"}
    assert 15 < len(accepted) < 95
    assert still_wrong < wrong  # 100 photos are few
    return figure


def drawn(photos: list[Path], answers: list[vilu.Answer]) -> Figure:
    """Above some that are accepted, below some that are not."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    for row, decision in zip(figure.subplots(2, 5), ("accept", "review"), strict=True):
        chosen = [
            pair for pair in zip(photos, answers, strict=True) if pair[1].decision == decision
        ]
        for axes, (path, answer) in zip(row, chosen, strict=False):
            with Image.open(path) as photo:
                axes.imshow(photo)
            axes.set(xticks=[], yticks=[], title=f"{decision}:\n{answer.label}")
    return figure


if __name__ == "__main__":
    main()
