"""Other programs ask for decisions: how do I run a service, and is its guarantee in the answers?

Shows `vilu serve`. The service gets photos over HTTP. It replies with decisions and with the state
of the guarantee. Later it gets labels for its audit. The client needs only the standard library.
The photos are real photos of clothes, and vilu's small model names them.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, run
from typing import Any
from urllib import error, request

import vilu
from example_data import SMALL_MODEL, photos_on_disk

VILU = [sys.executable, "-m", "vilu.cli"]


def make_predictor(home: Path) -> None:
    """Fit a predictor, and calibrate it with a guarantee."""
    backbone = vilu.load_backbone(SMALL_MODEL)
    for split, skip in (("fit", 0), ("calibration", 120)):
        photos_on_disk(home / split, 120, skip=skip, in_class_folders=True)
        photos = vilu.open_dataset(home / split)
        class_names = photos.class_names or ()
        vilu.embed(photos, backbone, output=home / f"{split}.store", names=class_names)
    predictor = vilu.PREDICTORS["class_gaussians"]()
    predictor.fit(vilu.EmbeddingStore(home / "fit.store"))
    predictor.save(home / "predictor")
    calibrate = "calibrate predictor calibration.store --max-risk 0.4"
    run([*VILU, *calibrate.split()], cwd=home, check=True, capture_output=True)


def send(address: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send GET, or POST if there is a body, and return the reply.

    While the service loads the model, its status is 503. The request is then sent again.
    """
    data = None if body is None else json.dumps(body).encode()
    message = request.Request(address, data, {"Content-Type": "application/json"})  # noqa: S310
    while True:
        try:
            with request.urlopen(message, timeout=60) as response:  # noqa: S310
                return dict(json.load(response))
        except error.HTTPError as problem:
            if problem.code != 503:
                raise
        time.sleep(0.1)


def use_service(address: str, photos: Path) -> None:
    """Send photos, send their labels, and print the replies."""
    label_by_path = photos_on_disk(photos, 24, skip=240)
    images = [(photos / path).read_bytes() for path in label_by_path] + [b"no photo"]
    encoded_images = [base64.b64encode(image).decode() for image in images]
    reply = send(f"{address}/v1/answers", {"images": encoded_images})
    guarantee = reply["guarantee"]
    *answers, bad_answer = reply["answers"]

    rows = [answer["row"] for answer in answers]
    labels = dict(zip(rows, label_by_path.values(), strict=True))
    audit = send(f"{address}/v1/labels", {"labels": labels})["audited"][0]
    verdict = send(f"{address}/v1/monitor")["monitors"][0]["status"]["verdict"]

    for answer in [*answers[:2], bad_answer]:
        reason = answer["reason"] or "within the guarantee"
        print(f"{answer['label']}: {answer['decision']} ({reason})")
    n_accepted = [answer["decision"] for answer in answers].count("accept")
    print(f"the guarantee {guarantee}, and {n_accepted} of {len(answers)} answers are accepted")
    print(f"after {audit['new']} labels, the monitor says that the guarantee {verdict}")
    assert guarantee == verdict == "holds"
    assert 0 < n_accepted < len(answers) == audit["new"]
    assert (bad_answer["label"], bad_answer["decision"]) == (None, "review")


def main() -> None:
    """Start the service, use it, and stop it."""
    with tempfile.TemporaryDirectory() as temporary_folder:
        home = Path(temporary_folder)
        make_predictor(home)
        command = [*VILU, "serve", str(home / "predictor"), "--port", "0"]  # 0 is any free port.
        with Popen(command, stdout=PIPE, stderr=DEVNULL, text=True) as service:
            try:
                assert service.stdout is not None
                address = service.stdout.readline().strip()  # The first line is the address.
                use_service(address, home / "new")
            finally:
                service.terminate()  # The service still replies to open requests.
            assert service.wait(60) == 143


if __name__ == "__main__":
    main()
