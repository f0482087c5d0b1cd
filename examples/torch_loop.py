"""My images are embedded in a loop of torch: how do I score them where they lie?

A fitted predictor takes tensors and gives tensors, on the device of the tensors. Here a loop
collects the images that are most worth a label.
"""

from __future__ import annotations

import torch

import vilu
from example_data import simulated


def main() -> None:
    """Score batch by batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image, text, label = simulated(4200, seed=1)
    candidates = torch.from_numpy(text).float().to(device)

    fitted_on = vilu.Embeddings(
        image=image[:1200], text=text, target=label[:1200], logit_scale=20.0
    )
    predictor = vilu.ViLUPlus(seed=0).fit(fitted_on)

    # in place of your encoder: batches of embeddings, on the device
    batches = torch.from_numpy(image[1200:]).float().to(device).split(500)
    scores = [predictor.predict_uncertainty(batch, candidates) for batch in batches]
    uncertainty = torch.cat(scores)
    assert uncertainty.device.type == device.type

    answer = (torch.cat(batches) @ candidates.T).argmax(dim=1)
    wrong = answer != torch.from_numpy(label[1200:]).to(device)
    doubtful = uncertainty.topk(300).indices
    print(f"{len(uncertainty)} images, of which {wrong.double().mean():.0%} are answered wrongly")
    print(f"of the 300 most doubtful ones {wrong[doubtful].double().mean():.0%} are")

    assert wrong[doubtful].double().mean() > 1.5 * wrong.double().mean()


if __name__ == "__main__":
    main()
