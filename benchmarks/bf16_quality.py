"""AUROC of ViLU trained in bfloat16 and in float32, on the demo photos.

Each precision has three seeds and batches with 1,024 rows. ``vilu demo`` has made the embeddings.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import vilu

SEEDS = 3


def main() -> dict[str, float]:
    """Print both means and return the difference in percentage points."""
    cache = Path("demo-output/cache")
    folders = sorted(cache.glob("*/embeddings/test/manifest.json"))
    if not folders:
        print("bf16 quality: skipped, run `make demo` first")
        return {}
    folder = folders[-1].parents[1]
    train, validation, test = (
        vilu.EmbeddingStore(folder / split) for split in ("train", "validation", "test")
    )
    means = {}
    for precision in ("fp32", "bf16"):
        values = []
        for seed in range(SEEDS):
            predictor = vilu.ViLU(batch_size=1024, precision=precision, seed=seed)
            predictor.fit(train, validation)
            outcomes = vilu.score(predictor, test)
            table = vilu.evaluate(outcomes, metrics=["auroc"], n_resamples=0)
            area = table.value("auroc")
            values.append(area)
        means[precision] = 100 * float(np.mean([value for value in values if value is not None]))
    print(
        f"ViLU, batch 1,024, {SEEDS} seeds: AUROC {means['fp32']:.2f} in float32, "
        f"{means['bf16']:.2f} in bfloat16"
    )
    return {"bf16_auroc_difference": means["bf16"] - means["fp32"]}


if __name__ == "__main__":
    main()
