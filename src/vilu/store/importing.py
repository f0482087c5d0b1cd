"""Import embeddings from other programs, in ``.npz`` or ``.npy`` files, into a store."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.hashing import digest
from vilu.device import torch_defaults
from vilu.embeddings.checks import (
    NONFINITE,
    STATUS_NAMES,
    VALID,
    NormSummary,
    as_matrix,
    check_answers,
    check_class_names,
    check_targets,
    hash_names,
    normalise_rows,
    require_usable_rows,
)
from vilu.embeddings.column_checks import check_columns
from vilu.embeddings.columns import (
    ANSWER,
    COLUMNS,
    IMAGE_COLUMNS,
    LOGITS,
    TEXT_COLUMNS,
    UNNORMALISED_COLUMNS,
)
from vilu.embeddings.logits import (
    logit_space,
    logits_to_float32,
    require_distinct_names,
    zero_texts,
)
from vilu.embeddings.source import index_of_first_same_answer
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import OUTSIDE, UNKNOWN, DataError, UsageError
from vilu.progress import track
from vilu.store.arrays import MAX_NAME_CHARACTERS, ArrayFiles, StoredArray, array_to_texts
from vilu.store.embed import MIB, LossBudget, begin_run, make_run, require_disk_space, seal
from vilu.store.manifest import IMAGE, ClassColumn, ImageColumn, ImportFacts, Receipt, Run
from vilu.store.parts import (
    ErrorRow,
    MetadataWithAnswer,
    Part,
    PartContent,
    RowMetadata,
    StoreLedger,
    is_possible_shape,
)
from vilu.store.reader import EmbeddingStore
from vilu.validation import checked

ROWS_PER_PART = 16_384  # default number of rows per part

ARRAY_NAMES = (
    "image",
    "text",
    "logits",
    "target",
    "answer",
    "class_names",
    "ids",
    "logit_scale",
    "logit_bias",
    *COLUMNS,
)
"""Names of the arrays to read. In the source, an array may have a different name."""

SPACE_ARRAYS = frozenset({"logit_scale", "logit_bias"})
"""Arrays with numbers that belong to the embedding space."""
ROW_ARRAYS = ("image", "logits", "target", "answer", "ids", *IMAGE_COLUMNS)
"""Arrays with an entry for every image row."""
# NumPy's type kinds, as letters (``dtype.kind``)
NUMBER_KINDS = "fiu"  # floats and whole numbers
WHOLE_KINDS = "iu"  # whole numbers
TEXT_KINDS = "US"  # texts and bytes
MAX_LISTED_NAMES = 10  # maximum number of class names or labels in a message
MAX_LISTED_KEYS = 20  # maximum number of array names in a message

logger = logging.getLogger(__name__)


@checked
@torch_defaults()
def import_arrays(  # noqa: PLR0913 - one keyword per flag of the command
    source: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
    keys: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
    outside: Sequence[str] = (),
    model: str | None = None,
    origin: str | None = None,
    split: str | None = None,
    dtype: Literal["float16", "float32"] | None = None,
    part_size: int = ROWS_PER_PART,
    max_error_rate: float = 0.01,
    overwrite: bool = False,
) -> EmbeddingStore:
    """Write arrays into a store, or resume an earlier run with the same inputs.

    Required arrays are ``image`` (N, D), ``text`` (K, D) and ``class_names`` (K,). Optional arrays
    are ``target`` (N,), ``ids`` (N,), ``logit_scale``, ``logit_bias`` and the columns in
    ``vilu.embeddings.columns``. A target is a text's row number, or a class name. An unknown target
    is -1 or "". For an image outside all classes, the target is -2 (``vilu.OUTSIDE``).

    A source may have ``logits`` (N, K) and ``features`` (N, D) instead of ``image`` and ``text``,
    as for ``vilu.Embeddings.from_logits``. The array ``answer`` (N,) has another model's answers:
    row numbers in ``text``, or class names. Methods with ``answer="given"`` judge these answers.

    Rows are normalised to unit norm. There is one warning if rows in the source had another norm.
    Image rows with non-finite numbers or with norm zero become errors. Nothing is unpickled. The
    process can be killed at any moment. Finished parts stay, and the next run does the rest.

    Args:
        source: An ``.npz`` file, or a folder of ``.npy`` files. None: all arrays are in ``files``.
        output: Folder for the store.
        files: Maps the names above to files. A file is ``.npy``, or text (``.txt``, ``.csv``) with
            an entry per line and no header.
        logit_scale: Multiplier of the cosine (100 for OpenAI's CLIP). None: the array is used.
        logit_bias: Added to every logit (0 except for SigLIP). None: the array is used.
        keys: Array names in the source, if different from the names above. For example,
            {"image": "embeddings"} reads ``image`` from the array "embeddings".
        class_names: K names, instead of the array ``class_names``.
        outside: Names of classes to leave out, or values in ``target`` that are no class. Rows with
            these targets get the target ``vilu.OUTSIDE``.
        model: Name of the model that made the embeddings, if known. Stores from different models
            cannot be combined.
        origin: Where the arrays come from, for people. Recorded in the store.
        split: Name of the split, recorded in the store.
        dtype: Number format of the stored rows. By default float16 for an ``image`` in float16,
            otherwise float32.
        part_size: Rows per part. One part is in memory, and a kill loses at most one part.
        max_error_rate: Largest share of unusable rows for which the store is sealed.
        overwrite: Whether to replace a store in ``output``.

    Raises:
        UsageError: If an argument is invalid, if the scale or the bias is neither an argument nor
            in the source, or if ``output`` holds something else than a store.
        ProvenanceError: If ``output`` holds a store with other inputs, named in the message.
        DataError: If an array is missing, damaged or of Python objects, or does not fit the other
            arrays. Also if too many rows are unusable.
        StorageError: If reading or writing a file fails. Finished parts are intact.
        BusyError: If another process writes to ``output``.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> arrays = {"image": np.eye(3), "text": np.eye(3), "class_names": ["cat", "dog", "cup"]}
        >>> scale = {"logit_scale": 100, "logit_bias": 0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/arrays.npz", **arrays, **scale)
        ...     store = vilu.import_arrays(f"{folder}/arrays.npz", f"{folder}/store")
        ...     print(len(store), store.class_names)
        3 ('cat', 'dog', 'cup')
    """
    if part_size < 1 or not 0 <= max_error_rate <= 1:
        raise UsageError(
            f"part_size must be at least 1 and max_error_rate from 0 to 1. Got {part_size} and "
            f"{max_error_rate}."
        )
    root = Path(output)
    StoreLedger.check_folder(root, overwrite=overwrite)
    with ArrayFiles(source, files) as array_files:
        source_arrays = _read_source(
            array_files,
            keys=dict(keys or {}),
            class_names=class_names,
            outside=tuple(dict.fromkeys(outside)),  # each name once, in the given order
        )
        run = _plan_run(
            source_arrays,
            source_arrays.make_space(logit_scale, logit_bias, model),
            source_arrays.describe_import(origin),
            split=split,
            dtype=source_arrays.choose_number_format(dtype),
            part_size=part_size,
        )
        _require_shapes(source_arrays, run)
        loss_budget = LossBudget(max_error_rate, accepts_bad_shards=False)
        _write_store(root, run, source_arrays, loss_budget, overwrite=overwrite)
    return EmbeddingStore(root)


def _require_shapes(source_arrays: SourceArrays, run: Run) -> None:
    """Raise DataError if a class or model column has a wrong shape."""
    for name, values in source_arrays.class_columns.items():
        shape = tuple(values.shape)
        if not is_possible_shape(run, name, shape):
            raise DataError(
                f"column {name!r} must be {COLUMNS[name][1]}, with "
                f"K = {len(source_arrays.class_names)} and D = {source_arrays.width}. Got shape "
                f"{shape} instead."
            )


@dataclass
class SourceArrays:
    """A source's open arrays. All arrays are checked, except the numbers in the image rows.

    ``read_part`` reads and checks a part's image rows.
    """

    array_files: ArrayFiles  # the files with the arrays
    # All used arrays. The keys are names in ``ARRAY_NAMES``.
    opened_arrays: dict[str, StoredArray]
    target: NDArray[np.int64]  # (N,) label for each row: -1 is unknown, -2 is outside all classes
    class_names: tuple[str, ...]  # names of the K classes
    text: Tensor  # (K, D) float32 unit-norm text embeddings
    class_columns: dict[ClassColumn, Tensor]  # class and model columns
    outside: tuple[str, ...]  # names of left-out classes, and targets that are no class
    norm_summary: NormSummary = field(default_factory=NormSummary)  # norms of the rows read so far
    # (N,) answers by another model, as class numbers. None: there are no answers.
    answer: NDArray[np.int64] | None = None

    @property
    def row_array(self) -> StoredArray:
        """The array that decides the row count: image embeddings, or else logits."""
        return _row_array(self.opened_arrays)

    @property
    def width(self) -> int:
        """Width D of the embeddings, or 0 if the rows have only logits."""
        return _embedding_width(self.opened_arrays)

    def row_shapes(self) -> dict[ImageColumn, tuple[int, ...]]:
        """Map each image column's name to the row shape."""
        shapes: dict[ImageColumn, tuple[int, ...]] = {}
        for name in get_args(ImageColumn):
            if name in self.opened_arrays:
                shapes[name] = self.opened_arrays[name].shape[1:]
        return shapes

    def describe_import(self, origin: str | None) -> ImportFacts:
        """Return the store's record of these arrays. ``origin`` is a text for people."""
        columns = self.row_shapes()
        return ImportFacts(columns=columns, ids="ids" in self.opened_arrays, source=origin)

    def make_space(
        self, logit_scale: float | None, logit_bias: float | None, model: str | None
    ) -> EmbeddingSpace:
        """Return the embedding space.

        ``logit_scale`` and ``logit_bias`` are the user's choices. None means that the number in the
        source is used.
        """
        if LOGITS not in self.opened_arrays:
            scale = self._scale_or_bias("logit_scale", logit_scale)
            bias = self._scale_or_bias("logit_bias", logit_bias)
            return EmbeddingSpace(self.width, scale, bias, backbone=model)
        if logit_scale is not None or logit_bias is not None:
            raise UsageError(
                "logits have their scale and bias already. Leave --logit-scale and --logit-bias "
                "out."
            )
        unnamed_space = logit_space(self.width)
        return replace(unnamed_space, backbone=model)

    def choose_number_format(
        self, user_format: Literal["float16", "float32"] | None
    ) -> Literal["float16", "float32"]:
        """Return the number format of the stored rows: ``user_format`` if given.

        By default, float16 images are stored as float16, all other images as float32. With logits,
        all rows are stored as float32.
        """
        if LOGITS in self.opened_arrays:
            if user_format == "float16":
                raise UsageError(
                    "logits are stored as float32, since float16 would change answers. Leave "
                    "--dtype out."
                )
            return "float32"
        if user_format is not None:
            return user_format
        dtype = self.row_array.dtype
        has_float16 = dtype.kind == "f" and dtype.itemsize == 2  # in any byte order
        return "float16" if has_float16 else "float32"

    def _scale_or_bias(self, name: str, user_value: float | None) -> float:
        """Return ``user_value`` if given, otherwise the number in the array ``name``.

        ``name`` is "logit_scale" or "logit_bias".
        """
        array = self.opened_arrays.get(name)
        if array is None:
            if user_value is None:
                option = name.replace("_", "-")
                raise UsageError(
                    f"the arrays have no {name}, which makes a cosine a logit and cannot be "
                    f"guessed. Give --{option}: OpenAI's CLIP has --logit-scale "
                    "100 --logit-bias 0; for other models the scale is the exponential of the "
                    "learned parameter, and only models like SigLIP have a bias. Or save both as "
                    "arrays with these names."
                )
            return float(user_value)
        if array.dtype.kind not in NUMBER_KINDS or np.prod(array.shape) != 1:
            raise DataError(
                f"{array.location} must be one number. Got {array.dtype} of shape {array.shape} "
                "instead."
            )
        number = array.read_whole().item()
        if user_value is None:
            return float(number)
        if float(number) != user_value:
            logger.warning(
                "%s is %g as given; the %g in the arrays is ignored", name, user_value, number
            )
        return float(user_value)

    def fingerprint(self) -> str:
        """Return a hash of all arrays except scale and bias.

        Scale and bias are in the embedding space, which is another input of the run.
        """
        hashed_arrays = {
            name: array for name, array in self.opened_arrays.items() if name not in SPACE_ARRAYS
        }
        n_bytes = sum(array.n_bytes for array in hashed_arrays.values())
        with track("Reading arrays", n_bytes / MIB, "MiB") as task:

            def advance(n_bytes_read: int) -> None:
                task.advance(n_bytes_read / MIB)

            hash_of_array = {name: array.hash(advance) for name, array in hashed_arrays.items()}
            return digest(hash_of_array)

    def read_part(self, part: Part) -> PartContent:
        """Read a part's rows, and return the usable rows and the errors.

        If a file with arrays has changed since it was opened, raise DataError.
        """
        status = np.full(len(part), VALID, np.uint8)
        rows_of_array: dict[str, Tensor] = {}
        for name in part.array_names:
            # the array with image embeddings is named ``IMAGE`` in the store, "image" in the source
            name_in_source = "image" if name == IMAGE else name
            block = self.opened_arrays[name_in_source].read(part.start, part.stop)
            rows_of_array[name], status_in_array, norm_summary = _normalise(name, block)
            # a row with several status codes gets the highest of these codes
            status = np.maximum(status, status_in_array)
            # Norms are collected for a warning. With logits, "image" holds features. Features may
            # have any norm, so there is no warning about features.
            if LOGITS not in self.opened_arrays:
                self.norm_summary += norm_summary
        # the run's fingerprint describes the arrays as they were before the first part
        self.array_files.require_unchanged()
        content = self._metadata_and_errors(part, status)
        is_usable = torch.from_numpy(status == VALID)
        for name, rows in rows_of_array.items():
            # ``PartContent`` has a list of blocks for each array. Here, one block has all rows.
            content.array_blocks[name] = [rows[is_usable]]
        return content

    def _metadata_and_errors(self, part: Part, status: NDArray[np.uint8]) -> PartContent:
        """Return metadata for a part's usable rows, and errors for the remaining rows.

        The result has no arrays yet.

        ``status`` (n,) has the status code for each row in the part.
        """
        content = PartContent()
        row_keys = self._row_keys(part)
        labels = self.target[part.start : part.stop].tolist()
        positions = range(part.start, part.stop)
        facts_of_rows = zip(positions, row_keys, labels, status, strict=True)
        for position, key, label, status_of_row in facts_of_rows:
            if status_of_row == VALID:
                known_label = None if label == UNKNOWN else label
                metadata = self._metadata_of_row(position, key, known_label)
                content.metadata.append(metadata)
            else:
                error = _error_row(position, key, STATUS_NAMES[status_of_row])
                content.errors.append(error)
        return content

    def _metadata_of_row(self, position: int, key: str, label: int | None) -> RowMetadata:
        """Return a row's metadata, with another model's answer if there are such answers."""
        if self.answer is None:
            return RowMetadata(position, key, label)
        return MetadataWithAnswer(position, key, label, answer=int(self.answer[position]))

    def _row_keys(self, part: Part) -> list[str]:
        """Return the identifiers of a part's rows, or else the row numbers."""
        ids = self.opened_arrays.get("ids")
        if ids is None:
            return [str(row) for row in range(part.start, part.stop)]
        ids_of_part = ids.read(part.start, part.stop)
        return array_to_texts(ids_of_part, ids.location)


def _error_row(position: int, key: str, kind: str) -> ErrorRow:
    """Return the error for an unusable row. ``kind`` names the row's status code."""
    return ErrorRow(
        key=key,
        position=position,
        stage="import",
        kind=kind,
        exception=None,
        message="the row has no direction, or numbers that are not finite",
        bytes=None,
    )


def _normalise(name: str, block: NDArray[Any]) -> tuple[Tensor, NDArray[np.uint8], NormSummary]:
    """Normalise a block of rows from the array ``name``, unless the array may have any norm.

    Returns the rows to be stored, each image's status code, and a summary of the original norms.
    The summary is empty if the array may have any norm. An image with several views gets the
    highest status code of its views.
    """
    may_have_any_norm = name in UNNORMALISED_COLUMNS
    if name == LOGITS:
        rows = logits_to_float32(block)
    else:
        flat_rows = block.reshape(-1, block.shape[-1])
        rows = as_matrix(flat_rows, name, keep_direction=not may_have_any_norm)
    if may_have_any_norm:
        is_finite = torch.isfinite(rows).all(dim=1)
        status_of_rows = np.where(is_finite.numpy(), VALID, NONFINITE)
        return rows, status_of_rows.astype(np.uint8), NormSummary()
    # in ``rows``, every view of an image is a row
    unit_rows, status, norm_summary = normalise_rows(rows)
    status_of_views = status.reshape(len(block), -1)
    # VALID is the smallest code, so an image is valid only if all its views are valid
    status_of_images = status_of_views.max(axis=1, initial=VALID)
    return unit_rows.view(block.shape), status_of_images, norm_summary


def _read_source(
    array_files: ArrayFiles,
    keys: dict[str, str],
    class_names: Sequence[str] | None,
    outside: tuple[str, ...],
) -> SourceArrays:
    """Open a source's arrays, and check everything except the numbers in the image rows.

    ``keys``, ``class_names`` and ``outside`` are arguments of ``import_arrays``.
    """
    opened_arrays = _open_arrays(array_files, keys)
    for name in ("image", LOGITS):
        if name in opened_arrays:
            _require_matrix(opened_arrays[name])
    n_rows = len(_row_array(opened_arrays))
    _require_entry_per_row(opened_arrays, n_rows)
    width = _embedding_width(opened_arrays)
    _check_columns(opened_arrays, width)
    source_names = _read_class_names(opened_arrays.get("class_names"), class_names)
    targets = _read_targets(opened_arrays.get("target"), n_rows)
    if LOGITS in opened_arrays:
        store_classes = _classes_with_logits(targets, source_names, outside, opened_arrays[LOGITS])
        text = zero_texts(len(store_classes.names), logit_space(width))
    else:
        store_classes = _classes_with_texts(targets, source_names, outside, opened_arrays["text"])
        text = _read_texts(opened_arrays, store_classes.text_rows, store_classes.names)
    _check_ids(opened_arrays.get("ids"), n_rows)
    class_columns = _read_class_columns(opened_arrays, store_classes.text_rows)
    answer_array = opened_arrays.get(ANSWER)
    answer = _read_answers(answer_array, n_rows, source_names, store_classes.names)
    return SourceArrays(
        array_files=array_files,
        opened_arrays=opened_arrays,
        target=store_classes.target,
        class_names=store_classes.names,
        text=text,
        class_columns=class_columns,
        outside=outside,
        answer=answer,
    )


def _require_entry_per_row(opened_arrays: Mapping[str, StoredArray], n_rows: int) -> None:
    """Raise DataError if an array for the image rows does not have ``n_rows`` entries."""
    for name in ROW_ARRAYS:
        if name not in opened_arrays:
            continue
        array = opened_arrays[name]
        if len(array) != n_rows:
            raise DataError(
                f"{array.location} must have one entry per image row ({n_rows}). Got shape "
                f"{array.shape} instead."
            )


def _row_array(opened_arrays: Mapping[str, StoredArray]) -> StoredArray:
    """Return the array that decides the row count: image embeddings, or else logits."""
    if "image" in opened_arrays:
        return opened_arrays["image"]
    return opened_arrays[LOGITS]


def _embedding_width(opened_arrays: Mapping[str, StoredArray]) -> int:
    """Return the embedding width, or 0 if the rows have only logits."""
    if "image" not in opened_arrays:
        return 0
    return opened_arrays["image"].shape[1]


def _read_texts(
    opened_arrays: Mapping[str, StoredArray], text_rows: Tensor, store_names: Sequence[str]
) -> Tensor:
    """Check the store's class texts. Return the texts (K, D) with unit norm.

    Args:
        opened_arrays: The open arrays.
        text_rows: (K,) for each class in the store, the row number in the array ``text``.
        store_names: The K class names in the store.
    """
    image_array = opened_arrays["image"]
    text_array = opened_arrays["text"]
    all_texts = require_usable_rows(text_array.read_whole(), "text")
    text = all_texts[text_rows]
    image_width = _embedding_width(opened_arrays)
    if text.shape[1] != image_width:
        raise DataError(
            f"image and text must share one width. Got {image_width} ({image_array.location}) and "
            f"{text.shape[1]} ({text_array.location})."
        )
    # raises DataError if two classes with the same name have different texts
    index_of_first_same_answer(text, store_names)
    return text


def _read_answers(
    array: StoredArray | None, n_rows: int, source_names: Sequence[str], store_names: Sequence[str]
) -> NDArray[np.int64] | None:
    """Return the answers (N,) as class numbers in the store, or None if there is no array.

    In the array, an answer is a class number or a class name in the source.

    Args:
        array: The array ``answer``, or None if the source has no answers.
        n_rows: Number of rows.
        source_names: Class names in the source.
        store_names: Class names in the store. Some of the source's classes may be missing.
    """
    if array is None:
        return None
    answers = _read_targets(array, n_rows)  # answers have the same form as targets
    values = answers.values
    if values.dtype.kind in WHOLE_KINDS:
        # numbers in the source become names, because the store may number the classes anew
        class_numbers = check_answers(
            values, n_rows=len(values), class_names=None, n_candidates=len(source_names)
        )
        names_of_values = [source_names[number] for number in class_numbers.tolist()]
        values = np.array(names_of_values, dtype=np.str_)
    class_of_value = check_answers(
        values, n_rows=len(values), class_names=store_names, n_candidates=len(store_names)
    ).numpy()
    class_of_row: NDArray[np.int64] = class_of_value[answers.index_of_row]
    return class_of_row


class StoreClasses(NamedTuple):
    """The store's K classes, and each row's target as a class number in the store."""

    names: tuple[str, ...]  # class names
    text_rows: Tensor  # (K,) for each class, the row number in the array ``text``
    target: NDArray[np.int64]  # (N,) label for each row: -1 is unknown, -2 is outside all classes


def _classes_with_logits(
    targets: Targets, source_names: tuple[str, ...], outside: tuple[str, ...], logits: StoredArray
) -> StoreClasses:
    """Return the classes for a source with logits: all classes in ``source_names``.

    Each class must have a column of logits. No class can be left out, so the labels in ``outside``
    must not be classes.
    """
    n_logits = logits.shape[1]
    if n_logits != len(source_names):
        raise DataError(
            f"there must be one class name per logit ({n_logits}, {logits.location}). Got "
            f"{len(source_names)} names instead."
        )
    classes_outside = set(outside) & set(source_names)
    if classes_outside:
        raise UsageError(
            "classes with logits can be answers, so they cannot be outside. Leave their logits "
            "out, or use --outside for labels beyond the classes only."
        )
    require_distinct_names(source_names)
    target = _index_targets(targets, source_names, outside)
    # For the type checker: ``check_class_names`` returns None only if the names are None, so
    # ``or ()`` is never needed.
    checked_names = check_class_names(source_names, n_candidates=len(source_names)) or ()
    text_rows = torch.arange(len(source_names))
    return StoreClasses(checked_names, text_rows=text_rows, target=target)


def _require_matrix(array: StoredArray) -> None:
    """Raise DataError if an array is not a matrix with numbers."""
    is_matrix = len(array.shape) == 2 and array.shape[1] >= 1
    if array.dtype.kind not in NUMBER_KINDS or not is_matrix:
        raise DataError(
            f"{array.location} must be a matrix (rows, width) of numbers. Got {array.dtype} of "
            f"shape {array.shape}."
        )


def _open_arrays(array_files: ArrayFiles, keys: dict[str, str]) -> dict[str, StoredArray]:
    """Open a source's arrays, and return each open array by its name in ``ARRAY_NAMES``.

    An array's key is the array's name in the source. ``keys`` maps names to keys. For an array
    without an entry in ``keys``, name and key are equal.
    """
    unknown_names = sorted(keys.keys() - set(ARRAY_NAMES))
    if unknown_names:
        raise UsageError(
            f"{unknown_names[0]!r} is no array that is imported. Give one of "
            f"{', '.join(ARRAY_NAMES)}."
        )
    key_of_name = {name: keys.get(name, name) for name in ARRAY_NAMES}
    required_names = ["image", "text"]
    if key_of_name[LOGITS] in array_files.names:
        required_names = [LOGITS]
        _adapt_keys_to_logits(array_files, key_of_name)
    required_keys = [key_of_name[name] for name in required_names]
    _require_keys(array_files, key_of_name, [*required_keys, *keys.values()])
    used_keys = {name: key for name, key in key_of_name.items() if key in array_files.names}
    unused_keys = sorted(set(array_files.names) - set(used_keys.values()))
    if unused_keys:
        logger.info(
            "not imported: %s (to import an array under another name: --key NAME=KEY)",
            ", ".join(unused_keys),
        )
    for name, key in used_keys.items():
        # Embeddings never compress very well. So an array of embeddings is refused if the
        # compressed array is very small. An array with one number or text per row may be small.
        if name not in {"target", "answer", "ids"}:
            array_files.refuse_zip_bomb(key)
    opened_arrays = {name: array_files.open(key) for name, key in used_keys.items()}
    for name in ("class_names", *ROW_ARRAYS):
        if name in opened_arrays:
            opened_arrays[name].require_c_order()
    return opened_arrays


def _adapt_keys_to_logits(array_files: ArrayFiles, key_of_name: dict[str, str]) -> None:
    """Change ``key_of_name`` for a source with logits. Such a source must have no texts.

    Unless there is an array ``image``, the array ``features`` is read as ``image``.
    """
    if key_of_name["text"] in array_files.names:
        raise DataError(
            f"{array_files.path} has the arrays {key_of_name['text']!r} and "
            f"{key_of_name[LOGITS]!r}. Logits replace texts: leave one of them out."
        )
    if key_of_name["image"] not in array_files.names:
        key_of_name["image"] = key_of_name["features"]
        key_of_name["features"] = ""  # no array has this key, so ``features`` is not read twice


def _require_keys(
    array_files: ArrayFiles, key_of_name: Mapping[str, str], required_keys: Sequence[str]
) -> None:
    """Raise DataError if the source lacks an array.

    Args:
        array_files: The source's arrays.
        key_of_name: Maps names in ``ARRAY_NAMES`` to array keys in the source.
        required_keys: Keys that the source must have.
    """
    missing_keys = [key for key in required_keys if key not in array_files.names]
    if not missing_keys:
        return
    missing_key = missing_keys[0]
    name = next(name for name, key in key_of_name.items() if key == missing_key)
    shown_keys = [repr(key) for key in array_files.names[:MAX_LISTED_KEYS]]
    existing_keys = ", ".join(shown_keys) or "none"
    raise DataError(
        f"{array_files.path} has no array {missing_key!r}; it has {existing_keys}. If the array "
        f"has another name there, give --key {name}=NAME."
    )


def _check_columns(opened_arrays: Mapping[str, StoredArray], width: int) -> None:
    """Raise DataError if texts or columns have a wrong type or shape, or no entries.

    ``width`` is the embedding width.
    """
    # array name -> number of dimensions, and what the array must be
    expected_arrays = {"text": (2, "(K, D) embeddings of the candidates"), **COLUMNS}
    for name, (n_dims, meaning) in expected_arrays.items():
        if name not in opened_arrays:
            continue
        column = opened_arrays[name]
        sizes = column.shape
        if name in IMAGE_COLUMNS:  # the row count may be 0
            sizes = column.shape[1:]
        has_valid_shape = len(column.shape) == n_dims and 0 not in sizes
        if column.dtype.kind not in NUMBER_KINDS or not has_valid_shape:
            raise DataError(
                f"{column.location} must be {meaning}. Got {column.dtype} of shape {column.shape} "
                "instead."
            )
        if name == "views" and column.shape[-1] != width:
            raise DataError(
                f"{column.location} must be of the width of the embeddings, {width}. Got "
                f"{column.shape[-1]}."
            )


def _read_class_names(
    array: StoredArray | None, user_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Return ``user_names`` if given, otherwise the names in the array ``class_names``."""
    if user_names is not None:
        return tuple(user_names)
    if array is None:
        raise UsageError(
            "the arrays have no class names. Save an array class_names, name the array that has "
            "them (--key class_names=NAME), or give --classes FILE with one name per line."
        )
    _require_short_texts(array)
    stored_names = array.read_whole()
    return tuple(array_to_texts(stored_names, array.location))


def _require_short_texts(array: StoredArray) -> None:
    """Raise DataError if an array is not a vector with short texts."""
    max_bytes = 4 * MAX_NAME_CHARACTERS  # NumPy stores a character in 4 bytes
    if len(array.shape) != 1 or array.dtype.itemsize > max_bytes:
        raise DataError(
            f"{array.location} must be a vector of texts of at most {MAX_NAME_CHARACTERS:,} "
            f"characters. Got {array.dtype} of shape {array.shape} instead."
        )


def _check_ids(array: StoredArray | None, n_rows: int) -> None:
    """Raise DataError if an identifier occurs twice."""
    if array is None:
        return
    _require_short_texts(array)
    hashes_of_blocks = [np.empty(0, np.uint64)]  # np.concatenate refuses an empty list
    for block in array.blocks():
        hashes_of_block = hash_names(array_to_texts(block, array.location))
        hashes_of_blocks.append(hashes_of_block)
    hashes = np.concatenate(hashes_of_blocks)
    # after sorting, equal hashes are neighbours
    order = np.argsort(hashes, kind="stable")
    sorted_hashes = hashes[order]
    equals_next = sorted_hashes[:-1] == sorted_hashes[1:]
    positions = np.flatnonzero(equals_next)
    repeated_positions = np.union1d(positions, positions + 1)  # both neighbours of each pair
    # Different identifiers can have the same hash. So the identifiers of these rows are read, and
    # each identifier is compared with all identifiers read before.
    row_of_identifier: dict[str, int] = {}
    for row in order[repeated_positions].tolist():
        identifier = _read_identifier(array, row)
        if identifier in row_of_identifier:
            raise DataError(
                f"{array.location} must name each of the {n_rows} rows once. Rows "
                f"{row_of_identifier[identifier]} and {row} are both {identifier!r:.80}. Rename "
                "them, or leave the identifiers out."
            )
        row_of_identifier[identifier] = row


def _read_identifier(array: StoredArray, row: int) -> str:
    """Read a row's identifier."""
    entries = array.read(row, row + 1)
    (identifier,) = array_to_texts(entries, array.location)
    return identifier


class Targets(NamedTuple):
    """The rows' targets, as in the source. Every distinct target is in memory only once."""

    values: NDArray[Any]  # distinct targets, sorted: whole numbers or names
    index_of_row: NDArray[np.int64]  # (N,) for each row, the target's index in ``values``


def _read_targets(array: StoredArray | None, n_rows: int) -> Targets:
    """Read the targets of ``n_rows`` rows in blocks. Without an array, all are unknown."""
    if array is None:
        n_values = min(n_rows, 1)  # one value for all rows, or no value if there are no rows
        unknown_target = np.full(n_values, UNKNOWN, np.int64)
        index_of_row = np.zeros(n_rows, np.int64)
        return Targets(unknown_target, index_of_row)
    is_vector = len(array.shape) == 1
    holds_names = is_vector and array.dtype.kind in TEXT_KINDS
    if holds_names:
        _require_short_texts(array)
    elif not is_vector or array.dtype.kind not in WHOLE_KINDS:
        raise DataError(
            f"{array.location} must hold one whole number per row (the number of a row of text), "
            f"or one class name per row. Got {array.dtype} of shape {array.shape} instead."
        )
    targets_of_blocks: list[Targets] = []
    for block in array.blocks():
        block_targets = block
        if holds_names:
            block_targets = np.array(array_to_texts(block, array.location), np.str_)
        values, index_of_row = np.unique(block_targets, return_inverse=True)
        targets_of_blocks.append(Targets(values, index_of_row))
    return _join_targets(targets_of_blocks)


def _join_targets(targets_of_blocks: Sequence[Targets]) -> Targets:
    """Join the targets from consecutive blocks of rows."""
    if not targets_of_blocks:
        empty = np.empty(0, np.int64)
        return Targets(values=empty, index_of_row=empty)
    all_values = np.unique(np.concatenate([targets.values for targets in targets_of_blocks]))
    index_of_row: list[NDArray[np.int64]] = []
    for targets in targets_of_blocks:
        # for each value in the block, the index in ``all_values``
        new_index_of_value = np.searchsorted(all_values, targets.values)
        index_of_row.append(new_index_of_value[targets.index_of_row])
    joined_index = np.concatenate(index_of_row)
    return Targets(all_values, joined_index)


def _classes_with_texts(
    targets: Targets, source_names: tuple[str, ...], outside: tuple[str, ...], text: StoredArray
) -> StoreClasses:
    """Return the classes for a source with texts: ``source_names`` without ``outside``."""
    kept_classes = [number for number, name in enumerate(source_names) if name not in outside]
    n_texts = len(text)
    if n_texts not in {len(source_names), len(kept_classes)}:
        raise DataError(
            f"there must be one class name per row of text ({n_texts}, {text.location}). Got "
            f"{len(source_names)} names instead."
        )
    if not kept_classes:
        raise UsageError(
            f"all of the {len(source_names)} classes would be outside. At least one must be left."
        )
    # the store's label for each class in the source, OUTSIDE if the class is left out
    label_of_class = np.full(len(source_names), OUTSIDE, np.int64)
    label_of_class[kept_classes] = np.arange(len(kept_classes))
    target = _index_targets(targets, source_names, outside)
    is_class = target >= 0
    source_classes = target[is_class]
    target[is_class] = label_of_class[source_classes]
    # ``text`` has a row for every name, or only for every remaining class
    has_text_per_name = n_texts == len(source_names)
    text_rows = torch.tensor(kept_classes if has_text_per_name else range(n_texts))
    remaining_names = [source_names[number] for number in kept_classes]
    # for the type checker: the names are not None, so ``or ()`` is never needed
    checked_names = check_class_names(remaining_names, n_candidates=len(kept_classes)) or ()
    return StoreClasses(checked_names, text_rows=text_rows, target=target)


def _index_targets(
    targets: Targets, source_names: tuple[str, ...], outside: tuple[str, ...]
) -> NDArray[np.int64]:
    """Return targets (N,) int64: index in ``source_names``, -1 (unknown) or -2 (no class)."""
    index_of_name: dict[str, int] = {}
    for i, name in enumerate(source_names):
        index_of_name.setdefault(name, i)  # a repeated name keeps the first index
    labels_outside = [name for name in outside if name not in index_of_name]
    _require_used_labels(labels_outside, targets, source_names)
    if targets.values.dtype.kind == "U":
        indices = _indices_of_names(targets.values.tolist(), index_of_name, labels_outside)
    else:
        indices = _indices_of_numbers(targets.values, len(source_names), labels_outside)
    return indices[targets.index_of_row]


def _require_used_labels(
    labels_outside: Sequence[str], targets: Targets, source_names: tuple[str, ...]
) -> None:
    """Raise UsageError if a label in ``labels_outside`` is the target of no row."""
    known_labels = {"", *source_names}
    known_numbers = range(len(source_names))
    labels_beyond_classes: list[str] = []  # targets that are no class
    for value in targets.values.tolist():  # all values are names, or all are numbers
        if value not in known_labels and value not in known_numbers:
            labels_beyond_classes.append(str(value))
    unused_labels = [label for label in labels_outside if label not in labels_beyond_classes]
    if not unused_labels:
        return
    shown_names = [repr(name) for name in source_names[:MAX_LISTED_NAMES]]
    if len(source_names) > MAX_LISTED_NAMES:
        shown_names.append("...")
    choices_text = f"Classes are {', '.join(shown_names)}"
    if labels_beyond_classes:
        shown_labels = ", ".join(labels_beyond_classes[:MAX_LISTED_NAMES])
        choices_text = f"{choices_text}; labels beyond the classes are {shown_labels}"
    raise UsageError(
        f"there is no class or label {unused_labels[0]!r} for --outside. {choices_text}."
    )


def _indices_of_names(
    values: Sequence[str], index_of_name: Mapping[str, int], labels_outside: Sequence[str]
) -> NDArray[np.int64]:
    """Return each value's index (n,): -1 for "" (unknown), -2 for a label in ``labels_outside``.

    Args:
        values: Names from the source.
        index_of_name: Maps class names to indices.
        labels_outside: Labels that are no class and that the user has named.
    """
    index_of_value = {"": UNKNOWN, **index_of_name, **dict.fromkeys(labels_outside, OUTSIDE)}
    for value in values:
        if value in index_of_value:
            continue
        advice = (
            "Add it to class_names and text, or say with --outside that it is none of the classes."
        )
        if value.removeprefix("-").isdecimal():
            advice += " A text is a name. Save numbers of classes as whole numbers in an .npy file."
        raise DataError(f"target has the label {value!r:.80}, which is no class. {advice}")
    return np.array([index_of_value[value] for value in values], dtype=np.int64)


def _indices_of_numbers(
    values: NDArray[Any], n_classes: int, labels_outside: Sequence[str]
) -> NDArray[np.int64]:
    """Check and return whole-number targets (n,), with -2 for the labels in ``labels_outside``."""
    is_label_outside = np.array([str(value) in labels_outside for value in values.tolist()], bool)
    is_checked = ~is_label_outside
    n_checked = int(is_checked.sum())
    # ``is_outside`` marks the targets that are -2 in the source
    target, is_outside = check_targets(values[is_checked], n_rows=n_checked, n_candidates=n_classes)
    indices = np.full(len(values), OUTSIDE, np.int64)
    checked_indices = torch.where(is_outside, OUTSIDE, target)
    indices[is_checked] = checked_indices.numpy()
    return indices


def _read_class_columns(
    opened_arrays: Mapping[str, StoredArray], text_rows: Tensor
) -> dict[ClassColumn, Tensor]:
    """Check and return the class and model columns.

    Columns that must have unit norm are normalised. A class column keeps only the rows
    ``text_rows`` (K,), so left-out classes have no row.
    """
    columns: dict[ClassColumn, Tensor] = {}
    for name in get_args(ClassColumn):
        if name not in opened_arrays:
            continue
        array = opened_arrays[name]
        if LOGITS in opened_arrays:
            raise DataError(
                f"{array.location} is compared with texts, and with logits there are no texts. "
                "Leave it out."
            )
        # n_rows has no effect, because only image columns depend on n_rows
        checked_columns = check_columns(
            {name: array.read_whole()}, n_rows=0, n_texts=len(opened_arrays["text"])
        )
        columns[name] = checked_columns[name]
        has_row_per_class = name in TEXT_COLUMNS
        if has_row_per_class:
            columns[name] = columns[name][text_rows]
    return columns


def _plan_run(
    source_arrays: SourceArrays, space: EmbeddingSpace, imported: ImportFacts, **settings: object
) -> Run:
    """Return the run for importing these arrays.

    All arrays are read once, because the run's fingerprint contains a hash of the arrays.
    """
    inputs: dict[str, object] = {
        "dataset_fingerprint": source_arrays.fingerprint(),
        "n_in": len(source_arrays.row_array),
        "space": asdict(space),
        "names": source_arrays.class_names,
        "folders": source_arrays.class_names if "target" in source_arrays.opened_arrays else None,
        "templates": (),
        "limits": {},
        "outside": tuple(sorted(source_arrays.outside)),
        "imported": imported.model_dump(),
        **settings,
    }
    # the location is a text such as "FILE.npz, array 'image'", or "FOLDER/image.npy"
    source_path, _, _ = source_arrays.row_array.location.partition(", array ")
    path = Path(source_path)
    source = path.parent if path.suffix == ".npy" else path
    # the folder "." has no name, so then the data set is named after the file
    return make_run(inputs, source.name or path.stem)


def _write_store(
    root: Path, run: Run, source_arrays: SourceArrays, loss_budget: LossBudget, *, overwrite: bool
) -> None:
    """Write the missing parts and seal the store."""
    with StoreLedger.lock_folder(root):
        classes = (source_arrays.text, source_arrays.class_columns)
        run = begin_run(root, run, make_classes=lambda: classes, overwrite=overwrite)
        ledger = StoreLedger(root, run)
        missing_parts, receipts = ledger.check_parts()
        if missing_parts:
            # a manifest states that all parts are done, so remove it before writing a part
            ledger.unseal()
            require_disk_space(root, run, missing_parts)
        else:
            logger.info("%s is complete: there is nothing to do", root)
        with track("import", run.n_in, "rows") as task:
            task.advance(sum(receipt.n_in for receipt in receipts))
            n_errors = 0
            for part in missing_parts:
                receipt = _write_part(ledger, part, source_arrays)
                n_errors += receipt.n_error
                task.advance(len(part), f"{n_errors} errors")
            source_arrays.norm_summary.warn("image")
        ledger.remove_temporary_files()
        seal(ledger, loss_budget)


def _write_part(ledger: StoreLedger, part: Part, source_arrays: SourceArrays) -> Receipt:
    """Write a part in the store's number format, and return the receipt."""
    content = source_arrays.read_part(part)
    number_format = getattr(torch, ledger.run.dtype)
    for name, blocks in content.array_blocks.items():
        content.array_blocks[name] = [block.to(number_format) for block in blocks]
    return ledger.write_part(part, content, batch_size=len(part), shard_fingerprint="")
