"""Other programs ask for decisions: how do I run a service, and is its guarantee in the answers?

Shows `vilu serve`: it gets photos over HTTP, answers with decisions and the state of the guarantee,
and takes labels for its audit later. The client needs the standard library alone. Real photos of
clothes, named by vilu's small model.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib import error, request

import vilu
from example_data import SMALL_MODEL, photos_on_disk

VILU = [sys.executable, "-m", "vilu.cli"]


def command(home: Path) -> list[str]:
    """What serves a predictor with a guarantee, which is made here."""
    backbone = vilu.load_backbone(SMALL_MODEL)
    for split, skip in (("train", 0), ("calibration", 120)):
        photos_on_disk(home / split, 120, skip=skip, in_class_folders=True)
        photos = vilu.open_dataset(home / split)
        vilu.embed(photos, backbone, home / f"{split}.store", names=photos.class_names or ())
    vilu.PREDICTORS["class_gaussians"]().fit(vilu.EmbeddingStore(home / "train.store")).save(
        home / "predictor"
    )
    guarantee = ["calibrate", "predictor", "calibration.store", "--max-risk", "0.4"]
    subprocess.run([*VILU, *guarantee], cwd=home, check=True, capture_output=True)
    return [*VILU, "serve", str(home / "predictor"), "--port", "0"]


def ask(address: str, question: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST with a question; the answer.

    503 means: the model is being loaded, come again.
    """
    body = None if question is None else json.dumps(question).encode()
    asked = request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310 - our own
    while True:
        try:
            with request.urlopen(asked, timeout=60) as response:  # noqa: S310
                return dict(json.load(response))
        except error.HTTPError as said:
            if said.code != 503:
                raise
            time.sleep(0.1)


def main() -> None:
    """Start, ask, tell what the photos show, stop."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        with subprocess.Popen(
            command(home), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as service:
            address = next(iter(service.stdout or ())).strip()
            try:
                truth = photos_on_disk(home / "new", 24, skip=240)
                images = [
                    base64.b64encode((home / "new" / path).read_bytes()).decode() for path in truth
                ]
                said = ask(
                    f"{address}/v1/answers",
                    {"images": [*images, base64.b64encode(b"no photo").decode()]},
                )
                *answers, bad = said["answers"]
                labels = {
                    answer["row"]: name
                    for answer, name in zip(answers, truth.values(), strict=True)
                }
                (audited,) = ask(f"{address}/v1/labels", {"labels": labels})["audited"]
                (monitor,) = ask(f"{address}/v1/monitor")["monitors"]
            finally:
                service.terminate()  # what is under way is answered first
            assert service.wait(60) == 143
    for answer in [*answers[:2], bad]:
        print(
            f"{answer['label']}: {answer['decision']}, {answer['reason'] or 'within the guarantee'}"
        )
    accepted = sum(answer["decision"] == "accept" for answer in answers)
    print(f"guarantee {said['guarantee']}: {accepted} of {len(answers)} answers are accepted")
    print(
        f"{audited['new']} labels were taken in; the monitor says: {monitor['status']['verdict']}"
    )
    assert said["guarantee"] == monitor["status"]["verdict"] == "holds"
    assert 0 < accepted < len(answers) == audited["new"]
    assert (bad["label"], bad["decision"]) == (None, "review")


if __name__ == "__main__":
    main()
