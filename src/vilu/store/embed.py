"""Embed the images in a data set into a store."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from vilu.artifacts.disk import RUN_FILE
from vilu.artifacts.documents import first_error, read_document
from vilu.artifacts.hashing import digest
from vilu.backbones.base import Backbone
from vilu.backbones.zeroshot import TEMPLATES, embed_class_names
from vilu.callers import warn_caller
from vilu.datasets.base import (
    ImageDataset,
    ShardedDataset,
    require_files,
    require_outside_listing,
)
from vilu.datasets.images import DEFAULT_LIMITS, ImageLimits, ShardErrorKind
from vilu.device import torch_defaults
from vilu.embeddings.checks import check_class_names, require_usable_rows
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, StorageError, UsageError, ViLUError
from vilu.progress import track
from vilu.store.job import BackboneSpec, EmbedJob, Executor, remove_attempt_marks
from vilu.store.ledger import FileVerifier, content_hash
from vilu.store.manifest import (
    CLASSES_FILE,
    ClassColumn,
    Manifest,
    Receipt,
    Run,
    StoreInputs,
    class_columns,
)
from vilu.store.parts import (
    ERROR_SCHEMA,
    Part,
    StoreLedger,
    read_classes,
    read_columns,
    write_classes,
)
from vilu.store.reader import CaptionStore, EmbeddingStore
from vilu.validation import checked, checked_fields, require_at_least

IMAGES_PER_PART = 4096  # default number of images per part
SHARDS_PER_PART = 10  # default number of shards per part
MIB = 2**20  # number of bytes in a MiB
STORE_SIZE_RATIO = 1.05  # the store's size, at most, as a multiple of the vectors' size

LOCK_WAIT_SECONDS = 600.0
"""Seconds for which a process waits for a shared store's lock.

The wait is long, because the process with the lock may be embedding the class texts.
"""

# error message if both ``overwrite`` and ``shared`` are True
SHARED_OVERWRITE_MESSAGE = (
    "processes that share a store cannot replace it: each would undo the others' work. Remove the "
    "old store first."
)

logger = logging.getLogger(__name__)


@checked_fields
@dataclass(frozen=True)
class ExtraColumns:
    """A store's content in addition to the image and class embeddings.

    Attributes:
        features: Whether to store the input to the image tower's last map, as the column
            ``features``. If both towers' last maps are linear, both maps are also stored, as the
            columns ``image_projection`` and ``text_projection``. If there is also only one
            template, the input to the text tower's last map is stored as ``text_features``.
        views: Number of augmented views to embed for each image, as the column ``views``.
        seed: Seed for the views.
        prompts: Templates for embedding every class, as the column ``prompts``.
        negatives: Words for things in images outside all classes, such as ``everyday_words``. The
            words are filled into the class templates and embedded, as the column ``negatives``.

    Examples:
        >>> import vilu
        >>> columns = vilu.ExtraColumns(views=4)  # four random crops of every image
        >>> columns.views, columns.features
        (4, False)
    """

    features: bool = False
    views: int = 0
    seed: int = 0
    prompts: Sequence[str] = ()
    negatives: Sequence[str] = ()


NO_EXTRA_COLUMNS = ExtraColumns()


@checked
@torch_defaults()
def embed(  # noqa: PLR0913 - one keyword per flag of the command
    dataset: ImageDataset,
    backbone: Backbone | BackboneSpec,
    output: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    columns: ExtraColumns = NO_EXTRA_COLUMNS,
    batch_size: int = 32,
    workers: int | None = None,
    part_size: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    limits: ImageLimits = DEFAULT_LIMITS,
    max_error_rate: float = 0.01,
    allow_bad_shards: bool = False,
    on_error: Literal["skip", "raise"] = "skip",
    split: str | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    shared: bool = False,
) -> EmbeddingStore | CaptionStore | None:
    """Embed all images in a data set. After an earlier run, embed only the remaining images.

    If the images have captions, the captions are the candidates, and are stored, too. The images
    are embedded in parts. Then the store is sealed: the manifest is written. After a kill, the next
    run embeds the missing parts, and the store gets the same bytes. With V views, memory holds
    about 2 (V + 1) ``batch_size`` images, and V + 1 embeddings per image in a part.

    Args:
        dataset: The images.
        backbone: The model, or a ``BackboneSpec`` if other processes must load the model.
        output: Folder for the store.
        names: K class names for the prompts, in label order. Empty if images have captions.
        templates: Prompts, with ``{}`` for the class name. By default "a photo of a {}.".
        columns: Further columns to store, by default none.
        batch_size: Images per forward pass.
        workers: Decoding threads, by default one per core.
        part_size: Images per part (by default 4096), or shards per part (by default 10).
        dtype: Number format of the image embeddings. The texts are always float32.
        limits: Size and shape limits. An image beyond these limits is an error.
        max_error_rate: Largest share of failed images for which the store is sealed.
        allow_bad_shards: Whether to seal the store, with a warning, although a shard cannot be read
            to the end. If False, a bad shard is a DataError at the end. Finished parts stay.
        on_error: "skip" counts bad images and goes on. "raise" stops at the first bad image.
        split: Name of the split, recorded in the store.
        overwrite: Whether to replace a store in ``output``.
        executor: Does the parts in other processes. By default, this process does all parts.
        shared: Whether other processes, on any machine, call this function with the same arguments
            at the same time. The last process seals the store. If False, this process locks the
            store, and forgets which parts killed earlier processes.

    Returns:
        The store, or None if the store is shared and other processes have not finished their parts.

    Raises:
        UsageError: If an argument is invalid, or ``output`` is no place for a store.
        ProvenanceError: If ``output`` holds a store with other inputs, named in the message. Also
            if the model's low precision changes embeddings or answers too much.
        DataError: If the data do not fit the names, too many images failed, or a shard is bad.
        StorageError: If reading or writing a file fails. Finished parts are intact.
        BusyError: If another process embeds into ``output``.

    Examples:
        >>> import numpy as np, pathlib, tempfile, torch, vilu
        >>> from PIL import Image
        >>> from vilu.backbones.base import DualEncoder
        >>> def encode_texts(texts):  # "a photo of a red." becomes (1, 0, 0)
        ...     colours = ("red", "green", "blue")
        ...     return torch.tensor([[float(word in text) for word in colours] for text in texts])
        >>> model = DualEncoder(  # compares the mean colour of an image with the words of a text
        ...     vilu.EmbeddingSpace(3, logit_scale=10.0, backbone="colours"),
        ...     torch.device("cpu"),
        ...     transform=lambda image: (
        ...         torch.tensor(np.array(image) / 255).permute(2, 0, 1).float()
        ...     ),
        ...     image_tower=lambda pixels: pixels.mean(dim=(2, 3)),
        ...     text_tower=encode_texts,
        ...     truncates=lambda texts: [False] * len(texts),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("blue", "red"):  # one image per class
        ...         pathlib.Path(folder, "images", name).mkdir(parents=True)
        ...         Image.new("RGB", (8, 8), name).save(f"{folder}/images/{name}/1.png")
        ...     images = vilu.open_dataset(f"{folder}/images")
        ...     store = vilu.embed(images, model, f"{folder}/store", names=["blue", "red"])
        ...     print(store.image_rows(torch.tensor([0, 1])).tolist())
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    _check_settings(batch_size, workers, max_error_rate)
    if overwrite and shared:
        raise UsageError(SHARED_OVERWRITE_MESSAGE)
    root = Path(output)
    strict = on_error == "raise"
    loss_budget = LossBudget(0.0 if strict else max_error_rate, accepts_bad_shards=allow_bad_shards)
    _check_folder(dataset, root, overwrite=overwrite)
    require_files(dataset, loss_budget.max_error_rate)
    model = backbone.load() if isinstance(backbone, BackboneSpec) else backbone
    settings: dict[str, Any] = {"limits": asdict(limits), "dtype": dtype, "split": split}
    settings |= _candidate_settings(dataset, names, templates, columns)
    settings |= _image_column_settings(model, columns)
    run = plan_run(dataset, model.space, part_size=part_size, **settings)
    job = EmbedJob(
        root,
        run,
        dataset,
        backbone,
        batch_size=batch_size,
        workers=workers,
        strict=strict,
        limits=limits,
    )
    if not shared:
        _embed_alone(job, model, executor, loss_budget, overwrite=overwrite)
    elif not _embed_shared(job, model, executor, loss_budget):
        return None  # other processes are still at work
    return CaptionStore(root) if run.captions else EmbeddingStore(root)


def _check_folder(dataset: ImageDataset, root: Path, *, overwrite: bool) -> None:
    """Raise UsageError if a folder has files but no store, or lies among the images."""
    StoreLedger.check_folder(root, overwrite=overwrite)
    require_outside_listing(dataset, root)


def _image_column_settings(model: Backbone, columns: ExtraColumns) -> dict[str, object]:
    """Return the run's settings "features" and "views".

    "features" is the column's width, and "views" has the views' number and seed. For a missing
    column, the setting is None.
    """
    settings: dict[str, object] = {"features": None, "views": None}
    if columns.features:
        settings["features"] = model.feature_dim
    if columns.views:
        settings["views"] = {"n": columns.views, "seed": columns.seed}
    return settings


def _check_settings(batch_size: int, workers: int | None, max_error_rate: float) -> None:
    """Raise UsageError if a setting is outside its range."""
    require_at_least("batch_size", batch_size, 1)
    if workers is not None:
        require_at_least("workers", workers, 1)
    if not 0 <= max_error_rate <= 1:
        raise UsageError(
            f"max_error_rate must be a share from 0 to 1. Got {max_error_rate} instead."
        )


@dataclass(frozen=True)
class LossBudget:
    """The largest losses with which a store may still be sealed."""

    max_error_rate: float  # largest share of images that may fail
    accepts_bad_shards: bool  # whether shards are accepted that cannot be read to the end


def _embed_alone(
    job: EmbedJob,
    model: Backbone,
    executor: Executor | None,
    loss_budget: LossBudget,
    *,
    overwrite: bool,
) -> None:
    """Embed the missing parts and seal the store, under the store's lock."""
    with StoreLedger.lock_folder(job.root):
        job = _begin_job(job, model, overwrite=overwrite)
        remove_attempt_marks(job.root)
        missing_parts, receipts = job.ledger.check_parts()
        _prepare_store(job, missing_parts, model)
        _embed_parts(job, executor, missing_parts, receipts)
        job.ledger.remove_temporary_files()
        seal(job.ledger, loss_budget)


def _embed_shared(
    job: EmbedJob, model: Backbone, executor: Executor | None, loss_budget: LossBudget
) -> bool:
    """Embed this process's parts into a store that several processes share.

    Returns True if all parts are done. Then this process has sealed the store.

    The store's lock is held at the beginning and at the end, but not while parts are embedded. So
    all processes embed parts at the same time. But they begin and seal the store one at a time.
    """
    with StoreLedger.lock_folder(job.root, wait_seconds=LOCK_WAIT_SECONDS):
        job = _begin_job(job, model, overwrite=False)
        # check only the sizes, because for the hashes every process would have to read all parts
        missing_parts, receipts = job.ledger.check_parts(check_hashes=False)
        _prepare_store(job, missing_parts, model)
    _embed_parts(job, executor, missing_parts, receipts)
    with StoreLedger.lock_folder(job.root, wait_seconds=LOCK_WAIT_SECONDS):
        missing_parts, _ = job.ledger.check_parts(check_hashes=False)
        if missing_parts:
            logger.info(
                "%d parts are still missing; the process that ends last seals %s",
                len(missing_parts),
                job.root,
            )
            return False
        job.ledger.remove_temporary_files()
        seal(job.ledger, loss_budget)
    return True


def _begin_job(job: EmbedJob, model: Backbone, *, overwrite: bool) -> EmbedJob:
    """Begin or resume the store, and return the job with the run in ``run.json``."""

    def make_classes() -> TextAndColumns:
        return encode_classes(model, job.run)

    run = begin_run(job.root, job.run, make_classes, overwrite=overwrite)
    return replace(job, run=run)


def _prepare_store(job: EmbedJob, missing_parts: Sequence[Part], model: Backbone) -> None:
    """Prepare a store for writing the missing parts, if any part is missing."""
    if not missing_parts:
        logger.info("%s is complete: there is nothing to do", job.root)
        return
    # a manifest states that all parts are done, so remove the manifest before writing a part
    job.ledger.unseal()
    require_disk_space(job.root, job.run, missing_parts)
    job.check_precision(model)


def _embed_parts(
    job: EmbedJob,
    executor: Executor | None,
    missing_parts: Sequence[Part],
    receipts: Sequence[Receipt],
) -> None:
    """Embed the missing parts, in this process or by an executor, and show the progress.

    ``receipts`` are the receipts for the parts that are already done.
    """
    if receipts and missing_parts:
        n_done = len(receipts)
        logger.info("%d of %d parts are there already", n_done, n_done + len(missing_parts))
    part_numbers = [part.number for part in missing_parts]
    # the number of images in shards is unknown before the shards are read
    n_images = None if job.run.shards else job.run.n_in
    with track("embed", n_images, "images") as progress:
        progress.advance(sum(receipt.n_in for receipt in receipts))
        if executor is None:
            # The job shows the progress itself, after each batch. The loop only drives the job: the
            # receipts are not needed here.
            for _ in job.process_all(part_numbers, progress):
                pass
            return
        n_errors = 0
        for receipt in executor.run(job, part_numbers):
            n_errors += receipt.n_error
            progress.advance(receipt.n_in, f"{n_errors} errors")


def _candidate_settings(
    dataset: ImageDataset,
    names: Sequence[str],
    templates: Sequence[str] | None,
    columns: ExtraColumns,
) -> dict[str, object]:
    """Check and return names, templates, prompts and negative words as run settings.

    For a data set with captions, all these settings are empty.
    """
    settings = {
        "names": names,
        "templates": templates,
        "prompts": columns.prompts,
        "negatives": columns.negatives,
    }
    if dataset.captioned:
        _require_no_classes(dataset, settings)
        return dict.fromkeys(settings, ())
    dataset_classes = dataset.class_names
    if dataset_classes is not None and len(dataset_classes) != len(names):
        raise DataError(
            f"there must be one name per class of {dataset.source}. Got {len(names)} names for "
            f"{len(dataset_classes)} classes."
        )
    if not names:
        raise DataError("names must have at least one class name. Got none.")
    # each word once, in the user's order
    negative_words = tuple(dict.fromkeys(columns.negatives))
    # For the type checker: ``check_class_names`` returns None only if the names are None, so
    # ``or ()`` is never needed.
    return {
        "names": check_class_names(names, n_candidates=len(names)) or (),
        "templates": TEMPLATES["default"] if templates is None else templates,
        "prompts": columns.prompts,
        "negatives": check_class_names(negative_words, n_candidates=len(negative_words)) or (),
    }


def _require_no_classes(dataset: ImageDataset, settings: Mapping[str, object]) -> None:
    """Raise UsageError if settings for classes were given for a data set with captions."""
    names_of_settings = [name for name, value in settings.items() if value]
    if names_of_settings:
        raise UsageError(
            f"{dataset.source} has captions, which are the candidates, so it has no classes. Leave "
            f"out {', '.join(names_of_settings)}, or open it without captions."
        )


def plan_run(
    dataset: ImageDataset,
    space: EmbeddingSpace,
    *,
    part_size: int | None = None,
    **settings: object,
) -> Run:
    """Return the run for a data set and a model's embedding space."""
    if isinstance(dataset, ShardedDataset):
        # the number of images is unknown before the shards are read
        unit_counts = {"n_in": 0, "shards": len(dataset)}
        default_part_size = SHARDS_PER_PART
    else:
        unit_counts = {"n_in": len(dataset), "shards": 0}
        default_part_size = IMAGES_PER_PART
    inputs = {
        "dataset_fingerprint": dataset.fingerprint,
        **unit_counts,
        "captions": dataset.captioned,
        "folders": dataset.class_names,
        "outside": getattr(dataset, "outside", ()),  # not every data set has this attribute
        "space": asdict(space),
        "part_size": default_part_size if part_size is None else part_size,
        **settings,
    }
    base_name = Path(dataset.source).name  # empty for a source such as "/" or "."
    return make_run(inputs, base_name or dataset.source)


def make_run(settings: Mapping[str, object], dataset_name: str) -> Run:
    """Return the run for ``settings``, the values of the fields in ``StoreInputs``.

    ``dataset_name`` becomes ``Run.dataset``.
    """
    try:
        inputs = StoreInputs.model_validate(settings)
    except ValidationError as error:
        raise UsageError(
            f"cannot make a store with these settings: {first_error(error)}."
        ) from error
    input_fields = inputs.fingerprint_fields()
    further_fields = {
        "fingerprint": digest(input_fields),
        "dataset": dataset_name,
        "vilu": version("vilu"),
    }
    return Run.model_validate({**dict(inputs), **further_fields})


TextAndColumns = tuple[Tensor, Mapping[ClassColumn, Tensor]]
"""Text embeddings (K, D) for the classes, and the class and model columns by name."""


def encode_classes(backbone: Backbone, run: Run) -> TextAndColumns:
    """Compute the text embeddings for a run's classes, and the class and model columns."""
    class_texts = embed_class_names(backbone, run.names, run.templates)
    text = require_usable_rows(class_texts, "class text")
    return text, class_columns(backbone, run)


def begin_run(
    root: Path, run: Run, make_classes: Callable[[], TextAndColumns], *, overwrite: bool = False
) -> Run:
    """Resume the run in a folder, or begin a new run. Write missing class files.

    Returns the run in the folder. Nothing is written or removed before ``make_classes`` has
    returned. So if the model refuses the settings, no new store is left behind, and an old store is
    unchanged.

    Args:
        root: The folder.
        run: The run with the user's inputs. A resumed run must have the same inputs.
        make_classes: Function that computes the classes' texts and columns.
        overwrite: Whether to replace the run in the folder.
    """
    if (root / RUN_FILE).is_file() and not overwrite:
        earlier_run = read_document(root / RUN_FILE, Run)
        earlier_run.require_match(run, root)
        run = earlier_run
    classes = None
    if not run.captions:
        must_make_classes = overwrite or not _has_class_files(root, run)
        if must_make_classes:
            classes = make_classes()
    if overwrite:
        StoreLedger(root, run).remove_run()
    StoreLedger(root, run).begin(run, folders={*StoreLedger.required_folders, *run.row_shapes})
    if classes is not None:
        write_classes(root, run, *classes)
    return run


def require_disk_space(root: Path, run: Run, missing_parts: Sequence[Part]) -> None:
    """Raise StorageError unless the disk has space for vectors, and 5 % more for other files."""
    if run.shards:  # the number of images is unknown before the shards are read
        return
    n_rows = sum(len(part) for part in missing_parts)
    numbers_per_row = sum(math.prod(shape) for shape in run.row_shapes.values())
    row_bytes = numbers_per_row * np.dtype(run.dtype).itemsize
    needed_bytes = int(n_rows * row_bytes * STORE_SIZE_RATIO)
    free_bytes = shutil.disk_usage(root).free
    if needed_bytes > free_bytes:
        # in tenths of a MiB, rounded apart, so that a small need is not "0.0 where 0.0 are free"
        needed_mib = math.ceil(10 * needed_bytes / MIB) / 10
        free_mib = math.floor(10 * free_bytes / MIB) / 10
        advice = "Make room, or store float16." if run.dtype == "float32" else "Make room."
        raise StorageError(
            f"{n_rows} embeddings need {needed_mib} MiB in {root}, where {free_mib} MiB are free. "
            f"{advice}"
        )


SHARD_ERROR_KINDS = frozenset(get_args(ShardErrorKind))  # error kinds for whole shards
MAX_LISTED_SHARDS = 5  # maximum number of bad shards in a message


def seal(ledger: StoreLedger, loss_budget: LossBudget) -> None:
    """Write the manifest for a store with all parts done.

    Raises:
        DataError: If the losses exceed the budget. All parts stay, and the message says how to seal
            the store.
    """
    run = ledger.run
    receipts = ledger.receipts()
    n_in = sum(receipt.n_in for receipt in receipts)
    n_errors_of_kind: Counter[str] = Counter()
    for receipt in receipts:
        n_errors_of_kind += Counter(receipt.errors)
    n_ok = n_in - n_errors_of_kind.total()
    _check_losses(ledger, receipts, n_errors_of_kind, n_ok, loss_budget)
    classes_hash = ""
    if not run.captions:
        class_table, _ = read_classes(ledger.root, run)
        classes_hash = class_table.hash
    run_fields = {**dict(run), "n_in": n_in}  # with shards, the run does not know ``n_in``
    manifest = Manifest(
        **run_fields,
        n_ok=n_ok,
        n_error=n_errors_of_kind.total(),
        errors=dict(sorted(n_errors_of_kind.items())),
        parts=len(receipts),
        classes=classes_hash,
        content=content_hash(receipts),
    )
    ledger.seal(manifest)


def _check_losses(
    ledger: StoreLedger,
    receipts: Sequence[Receipt],
    n_errors_of_kind: Counter[str],
    n_ok: int,
    loss_budget: LossBudget,
) -> None:
    """Raise DataError if the losses exceed the budget. Warn of bad shards, or if there is no image.

    A bad shard has a single error row for an unknown number of images. Therefore this row does not
    count in the share of failed images.

    Args:
        ledger: The store's folder.
        receipts: Receipts for all parts.
        n_errors_of_kind: Maps each error kind to the number of error rows.
        n_ok: Number of embedded images.
        loss_budget: The largest accepted losses.
    """
    n_image_errors_of_kind = Counter(n_errors_of_kind)
    for kind in SHARD_ERROR_KINDS:
        del n_image_errors_of_kind[kind]  # a Counter accepts a missing key
    n_image_errors = n_image_errors_of_kind.total()
    n_images = n_ok + n_image_errors
    bad_shards_sentence = _bad_shards_sentence(ledger, receipts)
    if bad_shards_sentence and not loss_budget.accepts_bad_shards:
        raise DataError(
            f"{bad_shards_sentence} The other {n_ok} images are kept. Write or download these "
            "shards again and repeat the command, which does only their parts again. Or accept the "
            "loss with --allow-bad-shards."
        )
    if n_images and n_image_errors / n_images > loss_budget.max_error_rate:
        message = _too_many_errors_message(
            ledger.root, n_images, n_image_errors_of_kind, loss_budget.max_error_rate
        )
        raise DataError(message)
    if bad_shards_sentence:
        warn_caller(f"{bad_shards_sentence} This is accepted (--allow-bad-shards).")
    if not n_images:
        warn_caller(f"{ledger.run.dataset} has no images: {ledger.root} is a store without rows.")


def _bad_shards_sentence(ledger: StoreLedger, receipts: Sequence[Receipt]) -> str:
    """Return a sentence that names the bad shards, or "" if there are none."""
    shard_texts: list[str] = []
    for part, receipt in zip(ledger.parts, receipts, strict=True):
        if SHARD_ERROR_KINDS.isdisjoint(receipt.errors):
            continue
        verify_file = FileVerifier(ledger.root, [receipt])
        path = verify_file(part.errors_file)
        table = read_columns(path, ERROR_SCHEMA, ["key", "kind", "message"], receipt.n_error)
        for row in table.to_pylist():
            if row["kind"] in SHARD_ERROR_KINDS:
                shard_texts.append(f"{row['key']} ({row['message']})")
    if not shard_texts:
        return ""
    first_shards = "; ".join(shard_texts[:MAX_LISTED_SHARDS])
    n_more = len(shard_texts) - MAX_LISTED_SHARDS
    and_more = f" and {n_more} more" if n_more > 0 else ""
    return (
        f"{len(shard_texts)} of {ledger.run.shards} shards cannot be read to the end, so an "
        f"unknown number of images is lost: {first_shards}{and_more}."
    )


def _has_class_files(root: Path, run: Run) -> bool:
    """Return whether the class files exist, are intact, and belong to this run."""
    if not (root / CLASSES_FILE).exists():
        return False
    try:
        read_classes(root, run)
    except ViLUError as error:
        logger.warning("the class texts are made again: %s", error)
        return False
    return True


def _too_many_errors_message(
    root: Path, n_images: int, n_errors_of_kind: Counter[str], max_error_rate: float
) -> str:
    """Return the message about too many failed images, and the rate that would accept them."""
    n_error = n_errors_of_kind.total()
    error_rate = n_error / n_images
    kinds = ", ".join(f"{kind} {count}" for kind, count in n_errors_of_kind.most_common())
    # rounded up to 3 decimals, because a lower rate would refuse the store again
    sufficient_rate = math.ceil(error_rate * 1000) / 1000
    return (
        f"{n_error} of {n_images} images ({error_rate:.2%}) could not be embedded ({kinds}). At "
        f"most {max_error_rate:.2%} of the images may fail. The failed images are listed in "
        f"{root / 'errors'}, and the other {n_images - n_error} images are kept. To accept the "
        f"failures, repeat with --max-error-rate {sufficient_rate:g}; nothing is computed again."
    )
