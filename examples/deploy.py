"""I have calibrated a model: how do I save it, and decide with it in another program?

`model.save` writes the same folder that the commands write and read. The second program has image
embeddings only. The classes and the guarantee are in the folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import vilu
from example_data import simulated


def save_model(folder: Path) -> None:
    """Fit, calibrate and save a model, as the first program does."""
    image, text, label = simulated(2400, seed=1)
    class_names = [f"class {number}" for number in range(len(text))]
    data = vilu.Embeddings(
        image=image, text=text, target=label, logit_scale=20.0, class_names=class_names
    )
    parts = data.split(fit=0.4, calibration=0.6, seed=0)
    model = vilu.Selective(vilu.ViLUPlus(seed=0), answer="adapted")
    model.fit(parts.fit)
    model.calibrate(parts.calibration, max_risk=0.05)
    model.save(folder)


def main() -> None:
    """Load the model, decide and monitor, as the second program does."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder)
        file_names = sorted(path.name for path in folder.iterdir())
        print("files in the folder:", ", ".join(file_names))
        model = vilu.load(folder)
    assert isinstance(model, vilu.Selective)  # `load` returns a predictor if nothing is calibrated.
    assert model.calibration is not None
    print(model.calibration.guarantee_text)

    image, _, label = simulated(3000, seed=2)
    outcomes = model.predict(image)  # This may be an array, or a tensor on any device.
    assert outcomes.prediction is not None
    assert outcomes.class_names is not None
    assert outcomes.decision is not None
    accepted = np.array(outcomes.decision) == "accept"
    wrong = outcomes.prediction != label
    risk = wrong[accepted].mean()
    print(f"{accepted.mean():.0%} of the answers are accepted, and {risk:.1%} of these are wrong")
    first_answer = outcomes.class_names[outcomes.prediction[0]]
    print(f"the first answer is {first_answer}, and the decision is {outcomes.decision[0]}")

    # The monitor checks whether new images are still like those of the calibration.
    monitor = vilu.Monitor.of_folder(model)
    status = monitor.update(outcomes)
    print(f"the monitor says: {status.verdict}")

    assert accepted.mean() > 0.4
    assert risk < 0.06


if __name__ == "__main__":
    main()
