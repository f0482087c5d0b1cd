"""I have photos and not a single label: can I do better than the model's own confidence?

Shows `vilu_zero`. From photos without labels, this method learns which classes occur, and where
their embeddings lie. The photos are real photos of clothes. The list of classes has fifty names,
but photos show only ten of them, as it may be at the start of a project. The small model that
comes with vilu names the photos.
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
"""Names of classes without a photo."""


def embedded_photos(folder: Path, *, skip: int) -> vilu.EmbeddingStore:
    """Write 200 photos into a folder, and embed them with fifty class names."""
    photos_on_disk(folder, 200, skip=skip, in_class_folders=True)
    for name in ABSENT:
        (folder / name).mkdir()  # The folder of a class without a photo is empty.
    photos = vilu.open_dataset(folder)
    class_names = photos.class_names or ()
    backbone = vilu.load_backbone(SMALL_MODEL)
    store_path = folder.with_suffix(".store")
    vilu.embed(photos, backbone, output=store_path, names=class_names)
    return vilu.EmbeddingStore(store_path)


def main() -> None:
    """Fit without labels. The labels only serve to check the result."""
    with tempfile.TemporaryDirectory() as temporary_folder:
        fit_photos = embedded_photos(Path(temporary_folder) / "fit", skip=0)
        new_photos = embedded_photos(Path(temporary_folder) / "new", skip=200)
        n_classes = len(new_photos.class_names or ())
        print(f"the list has {n_classes} classes, and {len(new_photos)} new photos are scored")

        predictor = vilu.PREDICTORS["vilu_zero"]()
        predictor.fit(fit_photos)
        zero = vilu.score(predictor, new_photos)
        mcm = vilu.score(vilu.MCM(), new_photos)

    comparison = vilu.compare(zero, mcm, metric="auroc")
    print(comparison)
    wrong = float(mcm.failure.mean())
    print(f"{wrong:.0%} of all answers are wrong")
    wrong_mcm = vilu.metrics.risk_at_coverage(mcm.uncertainty, mcm.failure, coverage=0.3)
    wrong_zero = vilu.metrics.risk_at_coverage(zero.uncertainty, zero.failure, coverage=0.3)
    print(
        f"among the 30% most trusted answers, {wrong_mcm:.0%} are wrong with mcm, "
        f"and {wrong_zero:.0%} with vilu_zero"
    )

    assert comparison.difference > 0.01
    assert comparison.ci_high > 0.03
    assert wrong_zero <= wrong_mcm + 0.05 < wrong


if __name__ == "__main__":
    main()
