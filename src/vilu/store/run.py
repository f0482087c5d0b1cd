"""Beginning a run, finding out what is left of it to do, and ending it."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

import vilu
from vilu.backbones.base import Backbone
from vilu.backbones.zeroshot import class_texts
from vilu.datasets.base import ImageDataset
from vilu.errors import DataError, UsageError, ViLUError
from vilu.files import write_json
from vilu.space import EmbeddingSpace, digest
from vilu.store.classes import class_columns
from vilu.store.content import read_classes
from vilu.store.document import explain, read_document
from vilu.store.folder import prepare, unseal
from vilu.store.manifest import CLASSES, MANIFEST, RUN, Inputs, Manifest, Run
from vilu.store.parts import Part, content_hash, plan, read_receipt
from vilu.store.writer import write_classes
from vilu.validate import require_usable

logger = logging.getLogger(__name__)


def describe(dataset: ImageDataset, space: EmbeddingSpace, **settings: object) -> Run:
    """The run over a data set with a model; ``settings`` are the other fields of ``Inputs``.

    Raises:
        UsageError: If a setting cannot be.
    """
    try:
        inputs = Inputs.model_validate(
            {
                "dataset_fingerprint": dataset.fingerprint,
                "n_in": len(dataset),
                "folders": dataset.class_names,
                "space": asdict(space),
                **settings,
            }
        )
    except ValidationError as error:
        raise UsageError(f"cannot embed with these settings: {explain(error)}.") from error
    source = Path(dataset.source).name or dataset.source
    return Run(**dict(inputs), fingerprint=digest(inputs.identity()), dataset=source, vilu=vilu.__version__)


def begin(root: Path, run: Run, backbone: Backbone) -> Run:
    """Go on with the run that is in the folder, or begin this one; the class texts are there afterwards.

    Nothing is written before the prompts have been encoded: settings that the model refuses leave no store behind.

    Raises:
        ProvenanceError: If the run in the folder has other inputs.
        UsageError: If a template cannot be.
        DataError: If a class text has an unusable embedding.
        StorageError: If ``run.json`` is damaged, or the file system refuses.
    """
    resumed = (root / RUN).is_file()
    if resumed:
        earlier = read_document(root / RUN, Run)
        earlier.require_match(run, root)
        run = earlier
    classes = None
    if not _has_classes(root, run):
        text = require_usable(class_texts(backbone, run.names, run.templates), "class text")
        classes = text, class_columns(backbone, run)
    if not resumed:
        write_json(root / RUN, run.model_dump(mode="json"))
    prepare(root, run.arrays)
    if classes is not None:
        write_classes(root, run, *classes)
    return run


def missing_parts(root: Path, run: Run) -> list[Part]:
    """Parts to do; where there are any, the store is unsealed.

    Raises:
        StorageError: If the file system refuses.
    """
    parts = plan(run)
    missing = [part for part in parts if not _is_done(root, run, part)]
    if len(missing) < len(parts):
        logger.info("%d of %d parts are there already", len(parts) - len(missing), len(parts))
    if missing:
        unseal(root)
    return missing


def seal(root: Path, run: Run, max_error_rate: float) -> None:
    """Write the manifest, if every part is there and few enough images failed.

    Raises:
        DataError: If too many images failed; everything is kept.
        StorageError: If the file system refuses.
    """
    receipts = [read_receipt(root, run, part) for part in plan(run)]
    errors: Counter[str] = Counter()
    for receipt in receipts:
        errors.update(receipt.errors)
    n_error = errors.total()
    if run.n_in and n_error / run.n_in > max_error_rate:
        raise DataError(_over_budget(root, run, errors, max_error_rate))
    if not run.n_in:
        warnings.warn(f"{run.dataset} has no images: {root} is a store without rows.", stacklevel=3)
    manifest = Manifest(
        **dict(run),
        n_ok=run.n_in - n_error,
        n_error=n_error,
        errors=dict(sorted(errors.items())),
        parts=len(receipts),
        classes=read_classes(root, run)[0].hash,
        content=content_hash(receipts),
    )
    write_json(root / MANIFEST, manifest.model_dump(mode="json"))


def _has_classes(root: Path, run: Run) -> bool:
    if not (root / CLASSES).exists():
        return False
    try:
        read_classes(root, run)
    except ViLUError as error:
        logger.warning("the class texts are made again: %s", error)
        return False
    return True


def _is_done(root: Path, run: Run, part: Part) -> bool:
    if not (root / part.receipt).exists():
        return False
    try:
        read_receipt(root, run, part)
    except ViLUError as error:
        logger.warning("part %d is done again: %s", part.number, error)
        return False
    return True


def _over_budget(root: Path, run: Run, errors: Counter[str], max_error_rate: float) -> str:
    n_error = errors.total()
    share = n_error / run.n_in
    kinds = ", ".join(f"{kind} {count}" for kind, count in errors.most_common())
    return (
        f"{n_error} of {run.n_in} images ({share:.2%}) could not be embedded, at most {max_error_rate:.2%} may: "
        f"{kinds}. They are listed in {root / 'errors'}. The other {run.n_in - n_error} are kept; to accept that, "
        f"repeat with --max-error-rate {math.ceil(share * 1000) / 1000:g} (nothing is computed again)."
    )
