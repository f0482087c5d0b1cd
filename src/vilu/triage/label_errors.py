"""Labels that are probably wrong: cleanlab's Datalab on a posterior that has not seen the labels that it judges."""

from __future__ import annotations

import logging
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
from vilu.device import as_usual
from vilu.embeddings.copies import NEAR_COPY, near_copies
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import EmbeddingSource, TakenIds
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.extras import import_extra
from vilu.metrics.counts import Floats
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.plus.vilu_plus import ViLUPlus
from vilu.progress import track
from vilu.report import figures, style
from vilu.report.figures import Photo
from vilu.report.page.gallery import find_pictures
from vilu.validation import checked

FOLDS: Final = 5
SHOWN: Final = 8
"""Pictures in a row of the contact sheet."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelErrors:
    """Labelled rows, the most suspicious first.

    Attributes:
        keys: Their names.
        label: What they are labelled.
        suggested: What the posterior makes most likely.
        quality: (N,) cleanlab's label score in [0, 1]: the lower, the more likely the label is
            wrong.
        is_error: (N,) which labels cleanlab takes for wrong.
    """

    keys: list[str]
    label: list[str]
    suggested: list[str]
    quality: Floats
    is_error: NDArray[np.bool_]

    def save(self, path: Path) -> None:
        """Write a CSV or Parquet table, in place of such a table and of no other file."""
        claim_file(path, "label errors", overwrite=True)
        text = {"path": self.keys, "label": self.label, "suggested": self.suggested}
        columns = {name: pa.array(values, pa.string()) for name, values in text.items()}
        columns |= {"quality": pa.array(self.quality), "is_error": pa.array(self.is_error)}
        write_table(path, columns, {"kind": "label errors"})


@checked
@as_usual()
def find_label_errors(
    source: EmbeddingSource, predictor: FailurePredictor | None = None, *, seed: int = 0
) -> LabelErrors:
    """The labels of a source in the order of how little they fit, by cleanlab's confident learning.

    The posterior of a row comes from a predictor that has not seen its label: the given one, which
    must not be fitted on these rows, or ``vilu_plus`` fitted on the other four fifths of them. The
    fifths are of pictures: near copies (``near_copies``) are in one of them.
    Classes of which no row has a label are left out of it: nobody can say how often they are taken
    for another.

    Args:
        source: Rows with labels; those of none of the classes are left out.
        predictor: Whose posterior is taken; by default cross-fitted. A few rows that it was fitted
            on are left out.
        seed: Of the folds and the fits.

    Raises:
        DataError: If fewer than two classes have labels, or ``predictor`` was fitted on these rows.
        UsageError: If the source has captions.
        MissingModelError: If cleanlab is not installed.

    Source: Northcutt et al., Confident Learning, JAIR 2021.
    """
    if source.pool_size is not None:
        raise UsageError("captions have no labels that could be wrong. Give a store of classes.")
    datalab = import_extra("cleanlab", "labels").Datalab
    logging.getLogger("cleanlab").setLevel(logging.ERROR)
    rows = source.usable_rows.numpy()
    rows = rows[source.target.numpy()[rows] != UNKNOWN]
    if (
        predictor is not None
    ):  # one that has learned these very labels is refused, a few of them are left out
        rows = rows[predictor.unseen(source.take(rows), "audited")]
    target = source.target.numpy()[rows]
    present = np.unique(target)
    if len(present) < 2:
        raise DataError(
            f"labels of two classes at least are needed to tell wrong ones. These have {len(present)}."
        )
    posterior = (
        _cross_fitted(source, rows, seed)
        if predictor is None
        else posterior_of(predictor, source, rows)
    )
    shown = posterior[:, present] / posterior[:, present].sum(axis=1, keepdims=True)
    lab = datalab(
        data={"label": np.searchsorted(present, target).tolist()}, label_name="label", verbosity=0
    )
    lab.find_issues(pred_probs=shown, issue_types={"label": {}})
    found = lab.get_issues("label")
    quality = found["label_score"].to_numpy(dtype=np.float64)
    order = np.argsort(quality, kind="stable")
    names = source.class_names or tuple(f"class {i}" for i in range(source.n_candidates))
    suggested = present[shown.argmax(axis=1)]
    return LabelErrors(
        keys=list(
            TakenIds(source.ids, torch.from_numpy(rows[order]))
        ),  # a store reads them part by part
        label=[names[i] for i in target[order].tolist()],
        suggested=[names[i] for i in suggested[order].tolist()],
        quality=quality[order],
        is_error=found["is_label_issue"].to_numpy(dtype=np.bool_)[order],
    )


def _cross_fitted(source: EmbeddingSource, rows: NDArray[np.int64], seed: int) -> Floats:
    """(N, K) posterior of rows by predictors that were fitted on the others, and on no near copy of them."""
    fold = _folds(source, rows, seed)
    found = np.empty((len(rows), source.n_candidates))
    with track("fit without a fifth of the labels", FOLDS, "fits") as task:
        for number in range(FOLDS):
            held_out = fold == number
            if not held_out.any():
                continue
            predictor = ViLUPlus(seed=seed).fit(source.take(rows[~held_out]))
            found[held_out] = posterior_of(predictor, source, rows[held_out])
            task.advance(1)
    return found


def _folds(source: EmbeddingSource, rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """(N,) fold of every row: near copies are in one, since a copy would tell the label that is judged."""
    first = near_copies(source, rows)
    _, picture = np.unique(first, return_inverse=True)
    n_pictures = int(picture.max()) + 1
    if n_pictures < 2:
        raise DataError(
            f"all {len(rows)} labelled rows are near copies of one picture (cosine of at least "
            f"{NEAR_COPY}), so no label can be judged by others. Give labels of other pictures."
        )
    if n_pictures < len(rows):
        logger.info(
            "%d labelled rows are %d pictures and their near copies, which are judged together",
            len(rows),
            n_pictures,
        )
    fold_of_picture = np.random.default_rng(seed).permutation(np.arange(n_pictures) % FOLDS)
    return fold_of_picture[picture]


def posterior_of(
    predictor: FailurePredictor, source: EmbeddingSource, rows: NDArray[np.int64]
) -> Floats:
    """(N, K) the predictor's posterior, or the zero-shot one where it has none."""
    batches = source.batches(
        SCORING_BATCH, rows=torch.from_numpy(rows), columns=predictor.columns_to_score
    )
    with torch.no_grad():
        found = [
            predictor.log_posterior(one.to(predictor.device_)).exp().numpy(force=True)
            for one in batches
        ]
    return np.concatenate([np.empty((0, source.n_candidates)), *found])


def contact_sheet(found: LabelErrors, images: ImageDataset, path: Path) -> None:
    """Pictures of the labels that fit best, and of those that fit least, each with what is suggested and its label.

    Raises:
        DataError: If the images are not those of the labels.
    """
    n = min(SHOWN, len(found.keys) // 2)
    places = {
        found.keys[at]: at for at in (*range(n), *range(len(found.keys) - n, len(found.keys)))
    }
    photos: dict[int, Photo] = {}
    for record in find_pictures(images, places):
        at = places[record.key]
        with suppress(BadImage):  # its place stays empty
            image = read_image(record).image
            photos[at] = Photo(
                image, found.suggested[at], found.label[at], 1 - float(found.quality[at])
            )
    best, worst = (
        [photos[at] for at in sorted(photos) if (at >= n) == fits] for fits in (True, False)
    )
    style.save(figures.contact_sheet(best, worst), path)
