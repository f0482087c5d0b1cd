"""Finds labels that are probably wrong, by cleanlab's Datalab on held-out posteriors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from vilu.artifacts.paths import claim_file
from vilu.artifacts.tables import write_table
from vilu.datasets.base import ImageDataset
from vilu.datasets.images import BadImage, read_image
from vilu.device import torch_defaults
from vilu.embeddings.source import EmbeddingSource, SubsetIds
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.extras import import_extra
from vilu.metrics.counts import Floats
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.report import figures, style
from vilu.report.figures import Photo
from vilu.report.page.gallery import find_pictures
from vilu.triage.posteriors import cross_fitted_posterior, posterior_of
from vilu.validation import checked

PICTURES_SHOWN: Final = 8
"""Maximum number of pictures in a row on the contact sheet."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelErrors:
    """Labelled rows with a score for every label. The most doubtful label comes first.

    Attributes:
        keys: N row names.
        label: N labels.
        suggested: N names: every row's most likely class by the posterior.
        quality: (N,) cleanlab's label score in [0, 1]. A label with a low score is likely wrong.
        is_error: (N,) bool, True for wrong labels according to cleanlab.
    """

    keys: list[str]
    label: list[str]
    suggested: list[str]
    quality: Floats
    is_error: NDArray[np.bool_]

    def save(self, path: Path) -> None:
        """Write a CSV or Parquet table. Only an earlier table of label errors may be replaced."""
        claim_file(path, "label errors", overwrite=True)
        texts = {"path": self.keys, "label": self.label, "suggested": self.suggested}
        columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
        columns |= {"quality": pa.array(self.quality), "is_error": pa.array(self.is_error)}
        write_table(path, columns, {"kind": "label errors"})


@checked
@torch_defaults()
def find_label_errors(
    source: EmbeddingSource, predictor: FailurePredictor | None = None, *, seed: int = 0
) -> LabelErrors:
    """Order a source's labels by cleanlab's confident learning, the least likely label first.

    A row's posterior is held-out: the predictor was not fitted on the row's label. The
    predictor is ``predictor``, or by default ``vilu_plus``, cross-fitted in five folds. Near copies
    of a picture (``near_copy_groups``) are in the same fold. Classes without a labelled row are
    left out of the posterior, because the error rates of these classes cannot be estimated.

    Args:
        source: Rows with labels. Rows with the label "none of the classes" are left out.
        predictor: Gives the posterior. None to cross-fit ``vilu_plus``. Rows that the predictor was
            fitted on are left out with a warning.
        seed: Seed for the folds and the fits.

    Raises:
        DataError: If fewer than two classes have labels, or if ``predictor`` was fitted on more
            than 1 % of the rows.
        UsageError: If the source has captions.
        MissingModelError: If cleanlab is not installed.

    Source: Northcutt et al., Confident Learning, JAIR 2021.
    """
    if source.pool_size is not None:
        raise UsageError("captions have no labels that could be wrong. Give a store of classes.")
    datalab_class = import_extra("cleanlab", "labels").Datalab
    logging.getLogger("cleanlab").setLevel(logging.ERROR)
    rows = source.usable_rows.numpy()
    rows = rows[source.target.numpy()[rows] != UNKNOWN]
    if predictor is not None:
        # Rows that the predictor was fitted on are left out. Many such rows are a DataError.
        rows = rows[predictor.unseen(source.take(rows), "audited")]
    target = source.target.numpy()[rows]
    classes = np.unique(target)  # indices of the classes with labels
    if len(classes) < 2:
        raise DataError(
            "finding wrong labels needs labels of at least two classes. These rows have labels of "
            f"{len(classes)}."
        )
    if predictor is None:
        posterior = cross_fitted_posterior(source, rows, seed)
    else:
        posterior = posterior_of(predictor, source, rows)
    probability = posterior[:, classes]
    probability /= probability.sum(axis=1, keepdims=True)
    label = np.searchsorted(classes, target)  # position in ``classes``
    datalab = datalab_class(data={"label": label.tolist()}, label_name="label", verbosity=0)
    # With one job cleanlab does not fork. If a process with threads forks, the fork may hang.
    with_one_job = {"clean_learning_kwargs": {"find_label_issues_kwargs": {"n_jobs": 1}}}
    datalab.find_issues(pred_probs=probability, issue_types={"label": with_one_job})
    issues = datalab.get_issues("label")
    quality = issues["label_score"].to_numpy(dtype=np.float64)
    order = np.argsort(quality, kind="stable")
    # Classes without names are called "class 0", "class 1", and so on.
    names = source.class_names or tuple(f"class {i}" for i in range(source.n_candidates))
    suggested = classes[probability.argmax(axis=1)]
    keys = SubsetIds(source.ids, torch.from_numpy(rows[order]))  # read from a store block by block
    return LabelErrors(
        keys=list(keys),
        label=[names[i] for i in target[order].tolist()],
        suggested=[names[i] for i in suggested[order].tolist()],
        quality=quality[order],
        is_error=issues["is_label_issue"].to_numpy(dtype=np.bool_)[order],
    )


def contact_sheet(errors: LabelErrors, images: ImageDataset, path: Path) -> None:
    """Draw the pictures with the best and the worst labels, with each label and suggested class.

    Raises:
        DataError: If ``images`` has no pictures with the labels' keys.
    """
    n_rows = len(errors.keys)
    n = min(PICTURES_SHOWN, n_rows // 2)  # so no picture is among both the best and the worst
    worst_rows = range(n)
    best_rows = range(n_rows - n, n_rows)
    photos = _photos(errors, [*worst_rows, *best_rows], images)
    # ``photos`` does not contain unreadable photos.
    worst_photos = [photos[row] for row in photos if row in worst_rows]
    best_photos = [photos[row] for row in photos if row in best_rows]
    sheet = figures.contact_sheet(best_photos, worst_photos)
    style.save_figure(sheet, path)


def _photos(errors: LabelErrors, rows: Sequence[int], images: ImageDataset) -> dict[int, Photo]:
    """Map the rows, in ascending order, to pictures. Unreadable pictures are left out."""
    row_of = {errors.keys[row]: row for row in rows}
    photos = {}
    for record in find_pictures(images, row_of):
        row = row_of[record.key]
        with suppress(BadImage):
            image = read_image(record).image
            photos[row] = Photo(
                image=image,
                prediction=errors.suggested[row],
                truth=errors.label[row],
                uncertainty=1 - float(errors.quality[row]),
            )
    return {row: photos[row] for row in sorted(photos)}
