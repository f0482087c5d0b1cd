"""I have photos and not a single label: can I do better than the model's own confidence?

Shows `vilu_zero`, which learns from photos without labels which of the classes occur, and where
they lie. Real photos of clothes; the list of classes is the one that such a project begins with,
fifty things of which ten occur. Named by the small model that comes with vilu.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import vilu
from example_data import SMALL_MODEL, photos_on_disk

ABSENT = """
sofa table chair lamp bed curtain carpet cup plate bottle spoon bread apple cheese soup cake dog cat
horse bird fish cow sheep car bus bicycle train ship airplane road bridge house tower church window
door tree flower grass mountain
""".split()
"""Names on the list of which there is no photo."""


def main() -> None:
    """Fit without labels; labels are used to check alone."""
    with tempfile.TemporaryDirectory() as place:
        home, backbone = Path(place), vilu.load_backbone(SMALL_MODEL)
        stores = {}
        for split, skip in (("seen", 0), ("later", 200)):
            photos_on_disk(home / split, 200, skip=skip, in_class_folders=True)
            for name in ABSENT:
                (home / split / name).mkdir()  # a class without a photo
            photos = vilu.open_dataset(home / split)
            vilu.embed(photos, backbone, home / f"{split}.store", names=photos.class_names or ())
            stores[split] = vilu.EmbeddingStore(home / f"{split}.store")
        print(f"{len(stores['later'].class_names or ())} classes, {len(stores['later'])} photos")

        zero = vilu.PREDICTORS["vilu_zero"]().fit(stores["seen"])
        learned, mcm = vilu.score(zero, stores["later"]), vilu.score(vilu.MCM(), stores["later"])

    wrong = float(mcm.failure.mean())
    comparison = vilu.compare(learned, mcm)
    print(comparison)
    trusted = {
        name: vilu.metrics.risk_at_coverage(one.uncertainty, one.failure, 0.3)
        for name, one in (("mcm", mcm), ("vilu_zero", learned))
    }
    print(f"wrong are {wrong:.0%} of all answers; of the 30 % that are trusted most", end=" ")
    print(", ".join(f"{share:.0%} by {name}" for name, share in trusted.items()))

    assert comparison.difference > 0.01
    assert comparison.ci_high > 0.03
    assert trusted["vilu_zero"] <= trusted["mcm"] + 0.05 < wrong


if __name__ == "__main__":
    main()
