"""Two methods, one data set: is one of them better, or was it luck?

`vilu.evaluate` gives the metrics of every method with intervals. `vilu.compare` gives the
difference of two methods on the same answers, with an interval. This interval is often narrower
than one expects from the intervals of the two methods, because the same answers are hard for both.
The photos are real photos of clothes. The small model that comes with vilu names them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from matplotlib.figure import Figure

import vilu
from example_data import SMALL_MODEL, photos_on_disk
from vilu.outcomes.evaluate import Comparison


def embed_photos(folder: Path, *, skip: int, n: int) -> vilu.EmbeddingStore:
    """Write photos into a folder with one folder per class, and embed them."""
    photos_on_disk(folder, n, skip=skip, in_class_folders=True)
    photos = vilu.open_dataset(folder)
    backbone = vilu.load_backbone(SMALL_MODEL)
    store_path = folder.with_suffix(".store")
    vilu.embed(photos, backbone, output=store_path, names=photos.class_names or ())
    return vilu.EmbeddingStore(store_path)


def main() -> Figure:
    """Embed photos once, score them by three methods, and compare the methods."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        train = embed_photos(home / "train", skip=0, n=90)
        test = embed_photos(home / "test", skip=90, n=200)

        vilu_plus = vilu.score(vilu.ViLUPlus(seed=0).fit(train), test)
        mcm = vilu.score(vilu.MCM(), test)
        margin = vilu.score(vilu.Margin(), test)

    table = vilu.evaluate([vilu_plus, mcm, margin], metrics=["auroc", "fpr95"])
    print(table)
    print()

    learned_gain = vilu.compare(vilu_plus, mcm)
    small_gain = vilu.compare(mcm, margin)
    # The rows are sorted by class. Every eighth row is a sample of all classes.
    every_eighth = range(0, len(mcm), 8)
    few_rows = vilu.compare(mcm.take(every_eighth), margin.take(every_eighth))
    print(learned_gain)
    print(small_gain)
    print(few_rows)
    points = 100 * learned_gain.difference
    print(
        f"with 90 labels, the AUROC of vilu_plus is {points:.0f} points above that of mcm: "
        "this is not luck"
    )
    print("with every eighth answer only, the difference of mcm and margin may be luck")
    assert learned_gain.ci_low > 0.05
    assert few_rows.ci_low < 0 < few_rows.ci_high
    # The same answers are hard for both methods, so the interval of the difference is narrower.
    assert small_gain.ci_high - small_gain.ci_low < auroc_interval_width(table, method="mcm")
    return difference_figure({"mcm - margin": small_gain, "vilu_plus - mcm": learned_gain})


def auroc_interval_width(table: vilu.ResultTable, *, method: str) -> float:
    """Return the width of the interval of a method's AUROC."""
    for row in table.rows:
        if row.method == method and row.metric == "auroc":
            assert row.ci_low is not None
            assert row.ci_high is not None
            return row.ci_high - row.ci_low
    raise KeyError(method)


def difference_figure(comparisons: dict[str, Comparison]) -> Figure:
    """Draw the differences of AUROC with their intervals."""
    figure = Figure(figsize=(5, 1.8), layout="constrained")
    axes = figure.add_subplot()
    for name, comparison in comparisons.items():
        interval = [100 * comparison.ci_low, 100 * comparison.ci_high]
        axes.plot(interval, [name, name], "-", color="tab:blue")
        axes.plot(100 * comparison.difference, name, "o", color="tab:blue")
    axes.axvline(0, color="black", linestyle="--")
    axes.set(xlabel="difference of AUROC with its interval (points)", ylim=(-0.5, 1.5))
    return figure


if __name__ == "__main__":
    main()
