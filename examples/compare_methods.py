"""Two methods, one data set: is one of them better, or was it luck?

Shows `vilu.evaluate`, numbers with intervals, and `vilu.compare`, the difference of two methods on
the same answers with its interval, which is narrower than the two intervals let one think. Real
photos of clothes, named by the small model that comes with vilu.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from matplotlib.figure import Figure

import vilu
from example_data import SMALL_MODEL, photos_on_disk


def main() -> Figure:
    """Embed photos once, then score them by several methods."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        stores, backbone = {}, vilu.load_backbone(SMALL_MODEL)
        for split, skip, n in (("train", 0, 90), ("test", 90, 200)):
            photos_on_disk(home / split, n, skip=skip, in_class_folders=True)
            photos = vilu.open_dataset(home / split)
            vilu.embed(photos, backbone, home / f"{split}.store", names=photos.class_names or ())
            stores[split] = vilu.EmbeddingStore(home / f"{split}.store")

        plus = vilu.ViLUPlus(seed=0).fit(stores["train"])
        methods = (plus, vilu.MCM(), vilu.Margin())
        learned, mcm, margin = (vilu.score(method, stores["test"]) for method in methods)

    table = vilu.evaluate([learned, mcm, margin], metrics=["auroc", "fpr95"])
    print(table)
    print()
    clear, close = vilu.compare(learned, mcm), vilu.compare(mcm, margin)
    eighth = range(0, len(mcm), 8)  # rows lie sorted by class, so the first ones would be no sample
    few = vilu.compare(mcm.take(eighth), margin.take(eighth))
    for found in (clear, close, few):
        print(found)
    print(f"90 labels are worth {100 * clear.difference:.0f} points of AUROC, and that is no luck;")
    print("whether mcm is better than margin every eighth answer alone does not say.")

    assert clear.ci_low > 0.05  # from 5 points up to more
    assert few.ci_low < 0 < few.ci_high
    (row,) = (row for row in table.rows if (row.method, row.metric) == ("mcm", "auroc"))
    assert row.ci_low is not None
    assert row.ci_high is not None
    assert (
        close.ci_high - close.ci_low < row.ci_high - row.ci_low
    )  # the same answers are hard for both

    figure = Figure(figsize=(5, 1.8), layout="constrained")
    axes = figure.add_subplot()
    for name, found in (("mcm - margin", close), ("vilu_plus - mcm", clear)):
        ends = 100 * found.ci_low, 100 * found.ci_high
        axes.plot(ends, [name, name], "-", color="tab:blue")
        axes.plot(100 * found.difference, name, "o", color="tab:blue")
    axes.axvline(0, color="black", linestyle="--")
    axes.set(xlabel="difference of AUROC (points), with its interval", ylim=(-0.5, 1.5))
    return figure


if __name__ == "__main__":
    main()
