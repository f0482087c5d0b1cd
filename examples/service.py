"""Other programs should ask for decisions: how do I run this as a service, and is its promise in the answers?

Shows `vilu serve`: it is started as a command, gets photos over HTTP, answers with decisions and the state of the
promise, and takes labels for its audit later. The client needs nothing but the standard library. Real photos of
clothes, named by the small model that comes with vilu. Takes 30 seconds.
"""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import vilu
from example_data import SMALL_MODEL, photos_on_disk

VILU = [sys.executable, "-m", "vilu.cli"]


def calibrated(home: Path) -> Path:
    """A predictor with a promise, as a service takes it."""
    stores, backbone = {}, vilu.load_backbone(SMALL_MODEL)
    for split, skip in (("train", 0), ("calibration", 200)):
        photos_on_disk(home / split, 200, skip=skip, in_class_folders=True)
        photos = vilu.open_dataset(home / split)
        vilu.embed(photos, backbone, home / f"{split}.store", names=photos.class_names or ())
        stores[split] = home / f"{split}.store"
    vilu.PREDICTORS["class_gaussians"]().fit(vilu.EmbeddingStore(stores["train"])).save(home / "predictor")
    promise = ["calibrate", home / "predictor", stores["calibration"], "--max-risk", "0.4"]
    subprocess.run([*VILU, *map(str, promise)], check=True, capture_output=True)
    return home / "predictor"


def ask(address: str, question: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST with a question; the answer."""
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        answer: dict[str, Any] = json.load(response)
    return answer


def wait_ready(address: str) -> None:
    """It listens at once, and answers when the model is loaded."""
    for _ in range(600):
        try:
            ask(f"{address}/readyz")
        except urllib.error.HTTPError:  # 503 until then
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the service is not ready")


def main() -> None:
    """Start, ask, tell what the photos show, stop."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        command = [*VILU, "serve", str(calibrated(home)), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as service:
            assert service.stdout is not None
            address = service.stdout.readline().strip()
            try:
                wait_ready(address)
                truth = photos_on_disk(home / "new", 24, skip=400)
                images = [base64.b64encode((home / "new" / path).read_bytes()).decode() for path in truth]
                said = ask(f"{address}/v1/answers", {"images": [*images, base64.b64encode(b"no photo").decode()]})
                *answers, bad = said["answers"]
                labels = {answer["row"]: name for answer, name in zip(answers, truth.values(), strict=True)}
                (audited,) = ask(f"{address}/v1/labels", {"labels": labels})["audited"]
                (monitor,) = ask(f"{address}/v1/monitor")["monitors"]
            finally:
                service.send_signal(signal.SIGTERM)  # what is under way is answered first
            ended = service.wait(60)

    for answer in [*answers[:2], bad]:
        print({name: answer[name] for name in ("label", "failure_probability", "decision", "reason")})
    accepted = sum(answer["decision"] == "accept" for answer in answers)
    print(f"promise {said['promise']}: {accepted} of {len(answers)} answers are accepted")
    print(f"{audited['new']} labels were taken in; the monitor says: {monitor['status']['verdict']}")
    assert said["promise"] == "holds"
    assert 0 < accepted < len(answers)
    assert (bad["label"], bad["decision"]) == (None, "abstain")
    assert audited["new"] == len(answers)
    assert monitor["status"]["verdict"] == "holds"
    assert ended == 143


if __name__ == "__main__":
    main()
