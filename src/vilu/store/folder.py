"""The folder of a store, and one run that writes into it."""

from __future__ import annotations

import logging
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

from pydantic import ValidationError

import vilu
from vilu.backbones.base import Backbone
from vilu.backbones.zeroshot import class_texts
from vilu.datasets.base import ImageDataset, ShardedDataset
from vilu.embeddings.checks import require_usable
from vilu.embeddings.space import EmbeddingSpace, digest
from vilu.errors import DataError, StorageError, UsageError, ViLUError
from vilu.files import LOCK, TEMPORARY, explain, is_leftover, locked, write_json
from vilu.store.documents import CLASSES, MANIFEST, RUN, Inputs, Manifest, Receipt, Run, class_columns, read_document
from vilu.store.parts import Part, content_hash, plan, read_classes, read_receipt, write_classes

FOLDERS = ("img_emb", "text_emb", "metadata", "errors", "receipts", "attempts")
COLUMNS = ("features", "views", "columns")
"""Folders that a store has if it holds more than embeddings."""

OURS = re.compile(r"run\.json|classes\.json|manifest\.json|\w+\.npy|\w+\.parquet|\d+\.json")
"""Names of the files of a store."""

OVERHEAD = 1.05
"""Of metadata and receipts over the vectors."""


@contextmanager
def claim(root: Path, patience: float = 0.0) -> Iterator[None]:
    """Make the folder and hold its lock; the system lets go of it when the process dies.

    Args:
        root: The store.
        patience: Seconds to wait for another process.

    Raises:
        UsageError: If the folder holds something else than a store.
        BusyError: If another process embeds into it, and still does after the wait.
        StorageError: If it cannot be made or written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in root.iterdir() if path.name != LOCK and not _in_the_making(path.name)]
        if foreign and not (root / RUN).is_file():
            raise UsageError(
                f"{root} is not empty ({min(foreign)!r}, ...) and holds no {RUN}, so it is no embedding store. "
                "Give a new or an empty folder."
            )
    except OSError as error:
        raise StorageError(f"cannot write to {root}: {error.strerror or error}.") from error
    with locked(root, "embedding into", patience):
        yield


def prepare(root: Path, arrays: Iterable[str]) -> None:
    """Make the sub-folders, and clean them.

    Args:
        root: The store.
        arrays: What is kept of each image, each in a folder of its name.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        for name in {*FOLDERS, *arrays}:
            (root / name).mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot prepare {root}: {error.strerror or error}.") from error
    clean(root)


def clean(root: Path) -> None:
    """Remove what killed processes left half-written, and nothing that another process, here or elsewhere, is writing.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        for folder in (root, *(root / name for name in (*FOLDERS, *COLUMNS))):
            for path in folder.iterdir() if folder.is_dir() else ():
                if _in_the_making(path.name) and is_leftover(path):
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot clean {root}: {error.strerror or error}.") from error


def _in_the_making(name: str) -> bool:
    match = TEMPORARY.fullmatch(name)
    return match is not None and OURS.fullmatch(match["name"]) is not None


def unseal(root: Path) -> None:
    """Mark a store as not complete.

    Raises:
        StorageError: If the file system refuses.
    """
    try:
        (root / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot change {root}: {error.strerror or error}.") from error


def clear(root: Path) -> None:
    """Remove a store, and nothing else that may lie in its folder; ``run.json`` last, so that a kill leaves a store.

    Raises:
        StorageError: If the file system refuses.
    """
    unseal(root)
    try:
        for name in ("receipts", *FOLDERS, *COLUMNS):
            if (root / name).is_dir():
                shutil.rmtree(root / name)
        for name in (CLASSES, RUN):
            (root / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove the old store in {root}: {error.strerror or error}.") from error


def require_room(root: Path, n_rows: int, row_bytes: int) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        StorageError: If the disk has less free space than the vectors need, with 5 % for the rest.
    """
    needed = int(n_rows * row_bytes * OVERHEAD)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise StorageError(
            f"{n_rows} embeddings need {needed / 2**20:.1f} MiB in {root}, where {free / 2**20:.1f} MiB are free. "
            "Make room, or store float16."
        )


logger = logging.getLogger(__name__)

PART_IMAGES, PART_SHARDS = 4096, 10
"""Images or shards per part, unless somebody says otherwise."""

ABSENT = "it is not there"


def describe(dataset: ImageDataset, space: EmbeddingSpace, *, part_size: int | None = None, **settings: object) -> Run:
    """The run over a data set with a model.

    Args:
        dataset: The images.
        space: Of the model.
        part_size: Images or shards per part; None for ``PART_IMAGES`` or ``PART_SHARDS``.
        settings: The other fields of ``Inputs``.

    Raises:
        UsageError: If a setting cannot be.
    """
    sharded = isinstance(dataset, ShardedDataset)
    default = PART_SHARDS if sharded else PART_IMAGES
    try:
        inputs = Inputs.model_validate(
            {
                "dataset_fingerprint": dataset.fingerprint,
                "n_in": 0 if sharded else len(dataset),
                "shards": len(dataset) if sharded else 0,
                "captions": dataset.captioned,
                "folders": dataset.class_names,
                "space": asdict(space),
                "part_size": default if part_size is None else part_size,
                **settings,
            }
        )
    except ValidationError as error:
        raise UsageError(f"cannot embed with these settings: {explain(error)}.") from error
    source = Path(dataset.source).name or dataset.source
    return Run(**dict(inputs), fingerprint=digest(inputs.identity()), dataset=source, vilu=vilu.__version__)


def begin(root: Path, run: Run, backbone: Backbone) -> Run:
    """Go on with the run that is in the folder, or begin this one; the class texts, if any, are there afterwards.

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
    if not (run.captions or _has_classes(root, run)):
        text = require_usable(class_texts(backbone, run.names, run.templates), "class text")
        classes = text, class_columns(backbone, run)
    if not resumed:
        write_json(root / RUN, run.model_dump(mode="json"))
    prepare(root, run.arrays)
    if classes is not None:
        write_classes(root, run, *classes)
    return run


def survey(root: Path, run: Run, dataset: ImageDataset) -> tuple[list[Part], list[Receipt]]:
    """Parts to do, and the receipts of the others.

    Raises:
        StorageError: If the file system refuses.
    """
    missing, receipts = [], []
    for part in plan(run):
        found = look_up(root, run, part, dataset)
        if isinstance(found, Receipt):
            receipts.append(found)
            continue
        missing.append(part)
        if found != ABSENT:
            logger.warning("part %d is done again: %s", part.number, found)
    return missing, receipts


def look_up(root: Path, run: Run, part: Part, dataset: ImageDataset) -> Receipt | str:
    """The receipt of a part that is there in full, of this run and of shards as they are now; or else what it lacks."""
    if not (root / part.receipt).exists():
        return ABSENT
    try:
        receipt = read_receipt(root, run, part)
    except ViLUError as error:
        return str(error)
    return receipt if receipt.source == shard_fingerprint(run, part, dataset) else "its shards have changed"


def shard_fingerprint(run: Run, part: Part, dataset: ImageDataset) -> str:
    """Fingerprint of the shards of a part as they are now; empty where parts are made of images."""
    return cast("ShardedDataset", dataset).shard_fingerprint(part.start, part.stop) if run.shards else ""


def seal(root: Path, run: Run, max_error_rate: float) -> None:
    """Write the manifest, if every part is there and few enough images failed.

    Raises:
        DataError: If too many images failed; everything is kept.
        StorageError: If the file system refuses.
    """
    receipts = [read_receipt(root, run, part) for part in plan(run)]
    n_in = sum(receipt.n_in for receipt in receipts)
    errors: Counter[str] = Counter()
    for receipt in receipts:
        errors.update(receipt.errors)
    n_error = errors.total()
    if n_in and n_error / n_in > max_error_rate:
        raise DataError(_over_budget(root, n_in, errors, max_error_rate))
    if not n_in:
        warnings.warn(f"{run.dataset} has no images: {root} is a store without rows.", stacklevel=4)
    manifest = Manifest(
        **dict(run) | {"n_in": n_in},
        n_ok=n_in - n_error,
        n_error=n_error,
        errors=dict(sorted(errors.items())),
        parts=len(receipts),
        classes="" if run.captions else read_classes(root, run)[0].hash,
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


def _over_budget(root: Path, n_in: int, errors: Counter[str], max_error_rate: float) -> str:
    n_error = errors.total()
    share = n_error / n_in
    kinds = ", ".join(f"{kind} {count}" for kind, count in errors.most_common())
    return (
        f"{n_error} of {n_in} images ({share:.2%}) could not be embedded, at most {max_error_rate:.2%} may: "
        f"{kinds}. They are listed in {root / 'errors'}. The other {n_in - n_error} are kept; to accept that, "
        f"repeat with --max-error-rate {math.ceil(share * 1000) / 1000:g} (nothing is computed again)."
    )
