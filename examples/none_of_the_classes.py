"""Some of my pictures show none of my classes: how do I keep their answers out?

The model names a class all the same, and a softmax over the classes cannot say "none". Shows what
can: everyday words as further candidates (`neglabel`, no label needed), or a few examples of
strangers among labelled photos (`vilu_plus`). Real photos of clothes: hats and shoes are strangers
to eight other classes. Named by the small model that comes with vilu.
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

STRANGERS = ("hat", "shoe")


def main() -> None:
    """Two halves: labelled photos to fit on, and others to look at."""
    with tempfile.TemporaryDirectory() as place:
        home, backbone = Path(place), vilu.load_backbone(SMALL_MODEL)
        stores = {}
        for split, skip, n in (("labelled", 0, 88), ("new", 88, 260)):
            photos_on_disk(home / split, n, skip=skip, in_class_folders=True)
            photos = vilu.open_dataset(
                home / split, outside=STRANGERS
            )  # their label is vilu.OUTSIDE
            names = photos.class_names or ()
            words = vilu.ExtraColumns(negatives=WORDS)
            vilu.embed(photos, backbone, home / f"{split}.store", names=names, columns=words)
            stores[split] = vilu.EmbeddingStore(home / f"{split}.store")
        assert not set(STRANGERS) & set(stores["new"].class_names or ())

        plus = vilu.ViLUPlus(seed=0).fit(stores["labelled"])
        methods = (vilu.MCM(), vilu.PREDICTORS["neglabel"](), plus)
        found = {method.name: vilu.score(method, stores["new"]) for method in methods}

    # "outside": are strangers told from others?
    # AUROC: are wrong answers told from right ones, strangers' among them?
    print(vilu.evaluate(found.values(), metrics=["auroc_outside", "auroc"], n_resamples=200))
    strangers = found["mcm"].outside
    asked = {
        name: vilu.metrics.auroc(one.uncertainty, strangers.astype(int))
        for name, one in found.items()
    }
    wrong = {
        name: vilu.metrics.risk_at_coverage(one.uncertainty, one.failure, 0.3)
        for name, one in found.items()
    }
    print(
        f"{strangers.mean():.0%} of the photos are strangers; "
        "of the 30 % that are trusted most are wrong:",
        end=" ",
    )
    print(", ".join(f"{share:.0%} by {name}" for name, share in wrong.items()))

    assert asked["neglabel"] > asked["mcm"] + 0.04
    assert asked["vilu_plus"] > asked["mcm"] + 0.05
    assert wrong["vilu_plus"] < wrong["mcm"] - 0.05


if __name__ == "__main__":
    main()
