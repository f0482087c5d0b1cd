"""I have calibrated a model: how do I save it, and decide with it in another program?

The folder is the one that the commands leave and read. The program that decides gets image
embeddings alone; the classes and the guarantee come with the model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import vilu
from example_data import simulated


def trained(folder: Path) -> None:
    """The first program: fit, calibrate, save."""
    image, text, label = simulated(2400, seed=1)
    names = [f"class {number}" for number in range(len(text))]
    data = vilu.Embeddings(
        image=image, text=text, target=label, logit_scale=20.0, class_names=names
    )
    parts = data.split(fit=0.4, calibration=0.6, seed=0)
    model = vilu.Selective(vilu.ViLUPlus(seed=0), answer="adapted").fit(parts.fit)
    model.calibrate(parts.calibration, max_risk=0.05).save(folder)


def main() -> None:
    """The second program: load, decide, watch."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        trained(folder)
        print("the folder:", ", ".join(sorted(path.name for path in folder.iterdir())))
        model = vilu.load(folder)
    assert isinstance(model, vilu.Selective)  # as the folder is calibrated
    assert model.calibration is not None
    print(model.calibration.guarantee_text)

    image, _, label = simulated(3000, seed=2)
    outcomes = model.predict(image)  # an array, or a tensor, which is scored on its device
    assert outcomes.prediction is not None
    assert outcomes.class_names is not None
    assert outcomes.decision is not None
    accepted = np.array([decision == "accept" for decision in outcomes.decision])
    wrong = np.not_equal(outcomes.prediction, label)
    print(f"accepted are {accepted.mean():.0%}, of which {wrong[accepted].mean():.1%} are wrong")
    first = outcomes.prediction[0]
    print(f"the first answer: {outcomes.class_names[first]}, {outcomes.decision[0]}")

    monitor = vilu.Monitor.of_folder(model)  # does the guarantee still hold?
    print("monitor:", monitor.update(outcomes).verdict)

    assert accepted.mean() > 0.4
    assert wrong[accepted].mean() < 0.06


if __name__ == "__main__":
    main()
