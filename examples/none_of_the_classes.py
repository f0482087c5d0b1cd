"""Some of my pictures show none of my classes: how do I keep their answers out?

The model names a class all the same, and a softmax over the classes cannot say "none". Shows what
can: everyday words as further candidates (`neglabel`, no label needed), or a few
out-of-distribution examples among labelled photos (`vilu_plus`). Real photos of clothes: hats and
shoes are none of eight other classes. Named by the small model that comes with vilu.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import vilu
from example_data import SMALL_MODEL, photos_on_disk

WORDS = """
sofa table chair lamp bed curtain carpet cup plate bottle spoon bread apple cheese soup cake dog cat
horse bird fish cow sheep car bus bicycle train ship airplane road bridge house tower church window
door tree flower grass mountain river beach sky book newspaper phone computer television camera
guitar piano ball toy doll pencil clock mirror bag umbrella glasses watch ring belt glove scarf tie
sock towel pillow blanket bucket
""".split()
"""`vilu embed --negatives` has about 2,200, which take longer to embed than these photos."""

OOD_CLASSES = ("hat", "shoe")


def main() -> None:
    """Two halves: labelled photos to fit on, and others to look at."""
    with tempfile.TemporaryDirectory() as place:
        home, backbone = Path(place), vilu.load_backbone(SMALL_MODEL)
        stores = {}
        for split, skip, n in (("labelled", 0, 88), ("new", 88, 260)):
            photos_on_disk(home / split, n, skip=skip, in_class_folders=True)
            # the label of these is vilu.OUTSIDE
            photos = vilu.open_dataset(home / split, outside=OOD_CLASSES)
            names = photos.class_names or ()
            words = vilu.ExtraColumns(negatives=WORDS)
            vilu.embed(photos, backbone, home / f"{split}.store", names=names, columns=words)
            stores[split] = vilu.EmbeddingStore(home / f"{split}.store")
        assert not set(OOD_CLASSES) & set(stores["new"].class_names or ())

        plus = vilu.ViLUPlus(seed=0).fit(stores["labelled"])
        methods = (vilu.MCM(), vilu.PREDICTORS["neglabel"](), plus)
        scores = {method.name: vilu.score(method, stores["new"]) for method in methods}

    # "outside": are out-of-distribution photos told from the rest?
    # AUROC: are wrong answers told from right ones, those about such photos among them?
    print(vilu.evaluate(scores.values(), metrics=["auroc_outside", "auroc"], n_resamples=200))
    is_ood = scores["mcm"].outside
    auroc = {}
    wrong = {}
    for name, outcomes in scores.items():
        auroc[name] = vilu.metrics.auroc(outcomes.uncertainty, is_ood.astype(int))
        wrong[name] = vilu.metrics.risk_at_coverage(outcomes.uncertainty, outcomes.failure, 0.3)
    print(
        f"{is_ood.mean():.0%} of the photos are out-of-distribution; "
        "of the 30 % that are trusted most are wrong:",
        end=" ",
    )
    print(", ".join(f"{share:.0%} by {name}" for name, share in wrong.items()))

    assert auroc["neglabel"] > auroc["mcm"] + 0.04
    assert auroc["vilu_plus"] > auroc["mcm"] + 0.05
    assert wrong["vilu_plus"] < wrong["mcm"] - 0.05


if __name__ == "__main__":
    main()
