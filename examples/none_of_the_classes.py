"""Some of my pictures show none of my classes: how do I keep their answers out?

The model names a class all the same, because a softmax over the classes cannot say "none". Shows
two ways out. `neglabel` needs no labels: everyday words are further candidates. `vilu_plus` learns
from labelled photos, some of which are out of distribution. The photos are real photos of clothes.
There are eight classes, and hats and shoes are none of them. The small model that comes with vilu
names the photos.
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
"""Everyday words. `vilu embed --negatives` has about 2,200, which would take longer to embed."""

OOD_CLASSES = ("hat", "shoe")


def embedded_photos(folder: Path, n: int, *, skip: int) -> vilu.EmbeddingStore:
    """Write photos into a folder, and embed them with the class names and everyday words."""
    photos_on_disk(folder, n, skip=skip, in_class_folders=True)
    # Photos of hats and shoes get the label vilu.OUTSIDE.
    photos = vilu.open_dataset(folder, outside=OOD_CLASSES)
    class_names = photos.class_names or ()
    words = vilu.ExtraColumns(negatives=WORDS)
    backbone = vilu.load_backbone(SMALL_MODEL)
    store_path = folder.with_suffix(".store")
    vilu.embed(photos, backbone, output=store_path, names=class_names, columns=words)
    return vilu.EmbeddingStore(store_path)


def scores_of_new_photos() -> dict[str, vilu.Outcomes]:
    """Fit ViLU+ on labelled photos, and score new photos with three methods."""
    with tempfile.TemporaryDirectory() as temporary_folder:
        labelled = embedded_photos(Path(temporary_folder) / "labelled", 88, skip=0)
        new = embedded_photos(Path(temporary_folder) / "new", 260, skip=88)
        assert not set(OOD_CLASSES) & set(new.class_names or ())

        plus = vilu.ViLUPlus(seed=0)
        plus.fit(labelled)
        neglabel = vilu.PREDICTORS["neglabel"]()
        return {
            "mcm": vilu.score(vilu.MCM(), new),
            "neglabel": vilu.score(neglabel, new),
            "vilu_plus": vilu.score(plus, new),
        }


def main() -> None:
    """Compare how well three methods find photos of none of the classes, and wrong answers."""
    scores = scores_of_new_photos()
    # auroc_outside asks how well a method separates out-of-distribution photos from the others.
    # auroc asks how well it separates all wrong answers from right answers.
    print(vilu.evaluate(scores.values(), metrics=["auroc_outside", "auroc"], n_resamples=200))

    is_ood = scores["mcm"].outside
    auroc = {}
    wrong = {}
    for name, outcomes in scores.items():
        uncertainty = outcomes.uncertainty
        auroc[name] = vilu.metrics.auroc(uncertainty, is_ood.astype(int))
        wrong[name] = vilu.metrics.risk_at_coverage(uncertainty, outcomes.failure, coverage=0.3)
    print(f"{is_ood.mean():.0%} of the photos are out of distribution")
    print(
        f"among the 30% most trusted answers, {wrong['mcm']:.0%} are wrong with mcm, "
        f"{wrong['neglabel']:.0%} with neglabel, and {wrong['vilu_plus']:.0%} with vilu_plus"
    )

    assert auroc["neglabel"] > auroc["mcm"] + 0.04
    assert auroc["vilu_plus"] > auroc["mcm"] + 0.05
    assert wrong["vilu_plus"] < wrong["mcm"] - 0.05


if __name__ == "__main__":
    main()
