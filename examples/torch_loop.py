"""My images are embedded in a loop of torch: how do I score them where they lie?

A fitted predictor takes tensors and gives tensors on the same device. Here a loop scores batches.
Then the most uncertain answers are selected, because many of them are wrong.
"""

from __future__ import annotations

import torch

import vilu
from example_data import simulated


def main() -> None:
    """Score batch by batch."""
    image, text, label = simulated(4200, seed=1)
    fit_data = vilu.Embeddings(image=image[:1200], text=text, target=label[:1200], logit_scale=20.0)
    predictor = vilu.ViLUPlus(seed=0)
    predictor.fit(fit_data)

    # Put your encoder in place of these batches of embeddings.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    new_image = torch.from_numpy(image[1200:]).float().to(device)
    candidates = torch.from_numpy(text).float().to(device)
    scores = []
    for batch in new_image.split(500):
        score = predictor.predict_uncertainty(batch, candidates)
        scores.append(score)
    uncertainty = torch.cat(scores)
    assert uncertainty.device.type == device.type

    new_label = torch.from_numpy(label[1200:]).to(device)
    answer = (new_image @ candidates.T).argmax(dim=1)
    wrong = (answer != new_label).double()
    most_uncertain = uncertainty.topk(300).indices
    wrong_uncertain = wrong[most_uncertain].mean()
    print(f"of {len(uncertainty)} answers, {wrong.mean():.0%} are wrong")
    print(f"of the 300 most uncertain answers, {wrong_uncertain:.0%} are wrong")

    assert wrong_uncertain > 1.5 * wrong.mean()


if __name__ == "__main__":
    main()
