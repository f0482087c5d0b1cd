"""Images to an embedding store."""

from __future__ import annotations

import logging
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from vilu.artifacts.disk import RUN
from vilu.artifacts.documents import digest, explain, read_document
from vilu.backbones.base import Backbone
from vilu.backbones.zeroshot import TEMPLATES, class_texts
from vilu.datasets.base import ImageDataset, ShardedDataset, require_files
from vilu.datasets.images import DEFAULT_LIMITS, ImageLimits, OfShard
from vilu.device import as_usual
from vilu.embeddings.checks import check_class_names, require_usable
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, StorageError, UsageError, ViLUError
from vilu.progress import track
from vilu.store.documents import CLASSES, ClassColumn, Inputs, Manifest, Receipt, Run, class_columns
from vilu.store.job import BackboneSpec, EmbedJob, Executor, forget_attempts
from vilu.store.ledger import Vouched, content_hash
from vilu.store.parts import ERRORS, Part, StoreLedger, read_classes, read_columns, write_classes
from vilu.store.reader import CaptionStore, EmbeddingStore
from vilu.validation import checked, require_at_least

PART_IMAGES, PART_SHARDS = 4096, 10  # images or shards per part, unless somebody says otherwise
OVERHEAD = 1.05  # of metadata and receipts over the vectors

PATIENCE = 600.0
"""Seconds that one of several drivers waits for another one, which may be embedding the texts of many classes."""

logger = logging.getLogger(__name__)


@checked
@as_usual()
def embed(  # noqa: PLR0913 - one keyword per flag of the command
    dataset: ImageDataset,
    backbone: Backbone | BackboneSpec,
    output: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    part_size: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    limits: ImageLimits = DEFAULT_LIMITS,
    features: bool = False,
    views: int = 0,
    seed: int = 0,
    prompts: Sequence[str] = (),
    negatives: Sequence[str] = (),
    max_error_rate: float = 0.01,
    allow_bad_shards: bool = False,
    on_error: Literal["skip", "raise"] = "skip",
    split: str | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    shared: bool = False,
) -> EmbeddingStore | CaptionStore | None:
    """Embed all images of a data set, or what is still missing of an earlier run with the same inputs.

    Where the images have captions, these are the candidates: the embedding of each is stored beside
    its image's, and there are no classes.

    Kill it at any moment: finished parts stay, and the next run gives the bytes that an undisturbed
    one would have given. Memory is bounded by ``batch_size`` images and ``part_size`` embeddings,
    whatever the size of the data (each times one more than ``views``); of shards, by the embeddings
    of ``part_size`` shards. Progress is shown through ``vilu.progress``.

    Args:
        dataset: The images.
        backbone: The model; by name where other processes are to load it.
        output: Folder of the store.
        names: K names as they are to stand in the prompts, in the order of the labels; none for
            captions.
        templates: Prompts with ``{}`` for the name; a class text is the mean over them. By default
            "a photo of a {}."; none for captions.
        batch_size: Images per forward pass.
        workers: Decoding threads; by default one per core.
        part_size: What a kill can cost: images per part (by default 4096), or for shards, shards
            per part (10).
        dtype: Number format of what is stored of the images; what is stored of classes and model is
            float32.
        features: Also store the image tower's output before its last map, and where the last maps
            of both towers are linear, the maps and (with a single template) what the text's maps:
            the columns ``features``, ``image_projection``, ``text_projection`` and
            ``text_features``.
        views: Also store the embeddings of so many augmented views of each image, as the column
            ``views``.
        seed: Of the views.
        prompts: Also store the embeddings of every class in these templates, as the column
            ``prompts``.
        negatives: Also store the embeddings of these words in ``templates``, as the column
            ``negatives``: what images may show that are of none of the classes (``everyday_words``
            are such).
        limits: What an image may be.
        max_error_rate: Largest share of images that may fail; above it the store is not sealed, and
            nothing is lost.
        allow_bad_shards: Seal the store although a shard is cut short or cannot be read (on), so
            that nobody knows how many images are missing; a warning names it. Not allowed, that is
            an error at the end, and nothing is lost.
        on_error: "skip" sets bad images aside and counts them, "raise" stops at the first.
        split: Name of the split, recorded.
        overwrite: Replace the store that is there.
        executor: Who does the parts; by default this process.
        shared: Other processes, here or on other machines, call this with the same arguments at the
            same time, and ``executor`` does the parts that are its own. The last one to end seals
            the store. (Not shared, the store is locked from beginning to end, and parts that were
            given up half-way count as not tried.)

    Returns:
        The store; None if it is shared and parts of other processes are still missing.

    Raises:
        UsageError: If an argument cannot be, or ``output`` holds something else than a store.
        ProvenanceError: If ``output`` holds a store of other inputs, which the message names.
        DataError: If the data do not fit the names, or too many images failed, or a shard is bad.
        StorageError: If the file system refuses; finished parts are intact.
        BusyError: If another process embeds into ``output``.

    Examples:
        >>> import numpy as np, pathlib, tempfile, torch, vilu
        >>> from PIL import Image
        >>> from vilu.backbones.base import DualEncoder
        >>> model = DualEncoder(  # a model of your own: it compares the mean colour with the words for colours
        ...     vilu.EmbeddingSpace(3, logit_scale=10.0, backbone="colours"),
        ...     torch.device("cpu"),
        ...     transform=lambda image: (
        ...         torch.tensor(np.array(image.convert("RGB")) / 255).permute(2, 0, 1).float()
        ...     ),
        ...     image_tower=lambda pixels: pixels.mean(dim=(2, 3)),
        ...     text_tower=lambda texts: torch.tensor(
        ...         [[float(c in t) for c in ("red", "green", "blue")] for t in texts]
        ...     ),
        ...     truncates=lambda texts: [False] * len(texts),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("red", "green", "blue"):
        ...         pathlib.Path(folder, "images", name).mkdir(parents=True)
        ...         Image.new("RGB", (8, 8), name).save(f"{folder}/images/{name}/1.png")
        ...     images = vilu.open_dataset(f"{folder}/images")
        ...     store = vilu.embed(
        ...         images, model, f"{folder}/store", names=images.class_names, workers=1
        ...     )
        ...     print(store.class_names, store.image_rows(torch.arange(3)).tolist())
        ('blue', 'green', 'red') [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    require_at_least("batch_size", batch_size, 1)
    require_at_least("workers", 1 if workers is None else workers, 1)
    if not 0 <= max_error_rate <= 1:
        raise UsageError(
            f"max_error_rate must be a share from 0 to 1. Got {max_error_rate} instead."
        )
    if overwrite and shared:
        raise UsageError(
            "processes that share a store cannot replace it: each would undo the others' work. Remove it."
        )
    root, strict = Path(output), on_error == "raise"
    StoreLedger.check_place(root, overwrite=overwrite)
    require_files(dataset, 0.0 if strict else max_error_rate)
    model = backbone.load() if isinstance(backbone, BackboneSpec) else backbone
    run = describe(
        dataset,
        model.space,
        **_check_candidates(dataset, names, templates, prompts, negatives),
        limits=asdict(limits),
        part_size=part_size,
        dtype=dtype,
        split=split,
        features=model.feature_dim if features else None,
        views={"n": views, "seed": seed} if views else None,
    )
    job = EmbedJob(root, run, dataset, backbone, batch_size, workers, strict=strict, limits=limits)
    budget = Budget(0.0 if strict else max_error_rate, allow_bad_shards)
    if not _drive(job, model, executor, budget, overwrite=overwrite, shared=shared):
        return None
    return CaptionStore(root) if run.captions else EmbeddingStore(root)


@dataclass(frozen=True)
class Budget:
    """What a store may lack: a share of its images, and what bad shards have lost."""

    error_rate: float
    bad_shards: bool


def _drive(
    job: EmbedJob,
    model: Backbone,
    executor: Executor | None,
    budget: Budget,
    *,
    overwrite: bool,
    shared: bool,
) -> bool:
    """Do what is missing and seal the store; whether it was sealed: of several processes only the last one does it."""
    root, patience = job.root, PATIENCE if shared else 0.0
    with ExitStack() as lock:
        lock.enter_context(StoreLedger.claim(root, patience))
        job = replace(
            job,
            run=begin(root, job.run, lambda: encode_classes(model, job.run), overwrite=overwrite),
        )
        if not shared:
            forget_attempts(root)
        missing, receipts = job.ledger.survey(
            deep=not shared
        )  # many drivers would each read all of it
        if missing:
            job.ledger.unseal()
            require_room(root, job.run, missing)
        else:
            logger.info("%s is complete: there is nothing to do", root)
        if shared:
            lock.close()
        _work(job, executor, missing, receipts)
        if shared:
            lock.enter_context(StoreLedger.claim(root, patience))
            missing, _ = job.ledger.survey(deep=False)
            if missing:
                logger.info(
                    "%d parts are still missing; the process that ends last seals %s",
                    len(missing),
                    root,
                )
                return False
        job.ledger.clean()
        seal(job.ledger, budget)
    return True


def _work(
    job: EmbedJob, executor: Executor | None, missing: Sequence[Part], done: Sequence[Receipt]
) -> None:
    if done and missing:
        logger.info("%d of %d parts are there already", len(done), len(done) + len(missing))
    parts = [part.number for part in missing]
    with track("embed", None if job.run.shards else job.run.n_in, "images") as progress:
        progress.advance(sum(receipt.n_in for receipt in done))
        if executor is None:
            for _ in job.process_all(parts, progress):
                pass
            return
        n_errors = 0
        for receipt in executor.run(job, parts):
            n_errors += receipt.n_error
            progress.advance(receipt.n_in, f"{n_errors} errors")


def _check_candidates(
    dataset: ImageDataset,
    names: Sequence[str],
    templates: Sequence[str] | None,
    prompts: Sequence[str],
    negatives: Sequence[str],
) -> dict[str, object]:
    """Names, templates, prompts and negative words of the run."""
    given = {"names": names, "templates": templates, "prompts": prompts, "negatives": negatives}
    unfit = [name for name, value in given.items() if value]
    if dataset.captioned and unfit:
        raise UsageError(
            f"{dataset.source} has captions, which are the candidates, so it has no classes. Leave out "
            f"{', '.join(unfit)}, or open it without captions."
        )
    if dataset.captioned:
        return dict.fromkeys(given, ())
    folders = dataset.class_names
    if folders is not None and len(folders) != len(names):
        raise DataError(
            f"there must be one name per class of {dataset.source}. Got {len(names)} names for {len(folders)} classes."
        )
    if not names:
        raise DataError("names must have at least one class name. Got none.")
    given["names"] = check_class_names(names, len(names)) or ()
    words = check_class_names(tuple(dict.fromkeys(negatives)), len(set(negatives))) or ()
    return {
        **given,
        "negatives": words,
        "templates": TEMPLATES["default"] if templates is None else templates,
    }


def describe(
    dataset: ImageDataset,
    space: EmbeddingSpace,
    *,
    part_size: int | None = None,
    **settings: object,
) -> Run:
    """The run over a data set with a model."""
    sharded = isinstance(dataset, ShardedDataset)
    inputs = {
        "dataset_fingerprint": dataset.fingerprint,
        "n_in": 0 if sharded else len(dataset),
        "shards": len(dataset) if sharded else 0,
        "captions": dataset.captioned,
        "folders": dataset.class_names,
        "outside": getattr(dataset, "outside", ()),
        "space": asdict(space),
        "part_size": (PART_SHARDS if sharded else PART_IMAGES) if part_size is None else part_size,
        **settings,
    }
    return describe_run(inputs, Path(dataset.source).name or dataset.source)


def describe_run(described: Mapping[str, object], dataset: str) -> Run:
    """The run with these inputs, of data of this name."""
    try:
        inputs = Inputs.model_validate(described)
    except ValidationError as error:
        raise UsageError(f"cannot make a store with these settings: {explain(error)}.") from error
    made = {
        "fingerprint": digest(inputs.identity()),
        "dataset": dataset,
        "vilu": version("vilu"),
    }
    return Run.model_validate({**dict(inputs), **made})


Classes = tuple[Tensor, Mapping[ClassColumn, Tensor]]
"""(K, D) texts of the classes, and what else is kept of them and of the model."""


def encode_classes(backbone: Backbone, run: Run) -> Classes:
    """Those of a run, by the model."""
    text = require_usable(class_texts(backbone, run.names, run.templates), "class text")
    return text, class_columns(backbone, run)


def begin(
    root: Path, run: Run, make_classes: Callable[[], Classes], *, overwrite: bool = False
) -> Run:
    """Go on with the run that is in the folder, or begin this one; the class texts, if any, are there afterwards.

    Nothing is written or removed before the prompts have been encoded: settings that the model
    refuses leave no store behind, and the old one as it was.
    """
    if (root / RUN).is_file() and not overwrite:
        earlier = read_document(root / RUN, Run)
        earlier.require_match(run, root)
        run = earlier
    classes = None
    if not run.captions and (overwrite or not _has_classes(root, run)):
        classes = make_classes()
    if overwrite:
        StoreLedger(root, run).clear()
    StoreLedger(root, run).begin(run, {*StoreLedger.always, *run.arrays})
    if classes is not None:
        write_classes(root, run, *classes)
    return run


def require_room(root: Path, run: Run, missing: Sequence[Part]) -> None:
    """Refuse to begin where the disk has less free space than the vectors need, with 5 % for the rest."""
    if run.shards:  # how many images are in them, nobody knows
        return
    n_rows, free = sum(map(len, missing)), shutil.disk_usage(root).free
    row_bytes = sum(map(math.prod, run.arrays.values())) * np.dtype(run.dtype).itemsize
    needed = int(n_rows * row_bytes * OVERHEAD)
    if needed > free:
        raise StorageError(
            f"{n_rows} embeddings need {needed / 2**20:.1f} MiB in {root}, where {free / 2**20:.1f} MiB are free. "
            "Make room, or store float16."
        )


def seal(ledger: StoreLedger, budget: Budget) -> None:
    """Write the manifest, if every part is there and little enough is lacking; otherwise everything is kept."""
    root, run, receipts = ledger.root, ledger.run, ledger.receipts()
    n_in = sum(receipt.n_in for receipt in receipts)
    errors = sum((Counter(receipt.errors) for receipt in receipts), Counter[str]())
    images = Counter({kind: count for kind, count in errors.items() if kind not in BAD_SHARD})
    n_images = n_in - errors.total() + images.total()
    lost = _bad_shards(ledger, receipts)
    if lost and not budget.bad_shards:
        raise DataError(
            f"{lost} The other {n_in - errors.total()} images are kept. Write or download them again and repeat the "
            "command, which does only their parts again; or accept what is lost with --allow-bad-shards."
        )
    if n_images and images.total() / n_images > budget.error_rate:
        raise DataError(_over_budget(root, n_images, images, budget.error_rate))
    if lost:
        warnings.warn(f"{lost} That is accepted (--allow-bad-shards).", stacklevel=6)
    if not n_images:
        warnings.warn(f"{run.dataset} has no images: {root} is a store without rows.", stacklevel=6)
    ledger.seal(
        Manifest(
            **dict(run) | {"n_in": n_in},
            n_ok=n_in - errors.total(),
            n_error=errors.total(),
            errors=dict(sorted(errors.items())),
            parts=len(receipts),
            classes="" if run.captions else read_classes(root, run)[0].hash,
            content=content_hash(receipts),
        )
    )


BAD_SHARD = frozenset(get_args(OfShard))  # kinds of errors that are of a whole shard
NAMED = 5  # bad shards that a message names


def _bad_shards(ledger: StoreLedger, receipts: Sequence[Receipt]) -> str:
    """What is wrong with shards, in a sentence; empty where nothing is."""
    found: list[str] = []
    for part, receipt in zip(ledger.parts, receipts, strict=True):
        if BAD_SHARD.isdisjoint(receipt.errors):
            continue
        path = Vouched(ledger.root, [receipt])(part.errors)
        table = read_columns(path, ERRORS, ["key", "kind", "message"], receipt.n_error)
        found += [
            f"{row['key']} ({row['message']})"
            for row in table.to_pylist()
            if row["kind"] in BAD_SHARD
        ]
    if not found:
        return ""
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return (
        f"{len(found)} of {ledger.run.shards} shards cannot be read to the end, and how many images that costs is "
        f"unknown: {'; '.join(found[:NAMED])}{more}."
    )


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
