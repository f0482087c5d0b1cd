"""Import embeddings in ``.npz`` or ``.npy`` files, made by other programs, into a store."""

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
    STATUS,
    VALID,
    Norms,
    as_matrix,
    check_answers,
    check_class_names,
    check_targets,
    hash_names,
    normalise_rows,
    require_usable,
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
from vilu.embeddings.source import first_same_answer
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import OUTSIDE, UNKNOWN, DataError, UsageError
from vilu.progress import track
from vilu.store.arrays import MAX_NAME_CHARACTERS, Arrays, StoredArray, array_to_texts
from vilu.store.embed import Budget, begin, describe_run, require_disk_space, seal
from vilu.store.manifest import IMAGE, ClassColumn, ImageColumn, Imported, Receipt, Run
from vilu.store.parts import (
    ErrorRow,
    LabelledRow,
    Part,
    PartRows,
    RowWithAnswer,
    StoreLedger,
    is_possible_shape,
)
from vilu.store.reader import EmbeddingStore
from vilu.validation import checked

PART_ROWS = 16_384  # default number of rows per part

ARRAY_NAMES = (
    *("image", "text", "logits", "target", "answer", "class_names", "ids"),
    *("logit_scale", "logit_bias", *COLUMNS),
)
"""Names of the arrays that are read. An array may have another name in the source."""

SPACE_ARRAYS = frozenset({"logit_scale", "logit_bias"})
"""Arrays that belong to the embedding space."""
ROW_ARRAYS = ("image", "logits", "target", "answer", "ids", *IMAGE_COLUMNS)
"""Arrays with one entry per image row."""
# Sets of kinds of NumPy's types (``dtype.kind``), one letter per kind.
NUMBER_KINDS = "fiu"  # floats and whole numbers
WHOLE_KINDS = "iu"  # whole numbers
TEXT_KINDS = "US"  # texts and bytes
MIB = 2**20
MAX_LISTED = 10  # maximum number of names that a message lists

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
    part_size: int = PART_ROWS,
    max_error_rate: float = 0.01,
    overwrite: bool = False,
) -> EmbeddingStore:
    """Write arrays into a store, or resume an earlier run with the same inputs.

    Required arrays are ``image`` (N, D), ``text`` (K, D) and ``class_names`` (K,). Optional arrays
    are ``target`` (N,), ``ids`` (N,), ``logit_scale``, ``logit_bias`` and the columns of
    ``vilu.embeddings.columns``. A target is either the row number of a text, or the name of a
    class. An unknown target is -1 or "". The target -2 (``vilu.OUTSIDE``) means that the image
    belongs to none of the classes.

    In place of ``image`` and ``text`` there may be ``logits`` (N, K) and ``features`` (N, D), as
    for ``vilu.Embeddings.from_logits``. The array ``answer`` (N,) holds answers of another model:
    row numbers of ``text``, or names of classes. Methods with ``answer="given"`` judge them.

    Rows are normalised to unit norm, with one warning if they did not have unit norm. Image rows
    that are not finite, or have norm zero, become errors. Only the rows of one part are in memory.
    Nothing is unpickled. The process can be killed at any moment. Finished parts stay, and the next
    run writes the same bytes as a run without interruption.

    Args:
        source: An ``.npz`` file, or a folder of ``.npy`` files. None: all arrays are in ``files``.
        output: Folder of the store.
        files: Files of arrays, by the names above. A file is ``.npy``, or text (``.txt``, ``.csv``)
            with one entry per line and no header.
        logit_scale: Multiplier of the cosine (100 for OpenAI's CLIP). None: the array is used.
        logit_bias: Added to every logit (0 except for SigLIP). None: the array is used.
        keys: Names of arrays in the source that differ from the names above. For example,
            {"image": "embeddings"} reads ``image`` from the array "embeddings".
        class_names: K names, instead of the array ``class_names``.
        outside: Names of classes to leave out, or values of ``target`` that are no class. Rows with
            these targets get the target ``vilu.OUTSIDE``.
        model: Name of the model that made the embeddings, if it is known. Stores of different
            models cannot be combined.
        origin: Where the arrays come from, for people; recorded in the store.
        split: Name of the split; recorded in the store.
        dtype: Number format of the stored rows; by default that of ``image``, but not float64.
        part_size: Rows per part. One part is in memory, and a kill loses at most one part.
        max_error_rate: Largest share of unusable rows with which the store is sealed.
        overwrite: Whether to replace a store in ``output``.

    Raises:
        UsageError: If an argument is invalid, if the scale or the bias is neither an argument nor
            in the source, or if ``output`` holds something else than a store.
        ProvenanceError: If ``output`` holds a store of other inputs; the message names them.
        DataError: If an array is missing, damaged, of Python objects, or does not fit the rest.
        StorageError: If reading or writing a file fails; finished parts are intact.
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
    with Arrays(source, files) as arrays:
        source_arrays = _read_source(
            arrays,
            keys=dict(keys or {}),
            class_names=class_names,
            outside=tuple(dict.fromkeys(outside)),  # each name once, in their order
        )
        run = _describe_run(
            source_arrays,
            source_arrays.space(logit_scale, logit_bias, model),
            source_arrays.describe_import(origin),
            split=split,
            dtype=source_arrays.number_format(dtype),
            part_size=part_size,
        )
        _require_shapes(source_arrays, run)
        budget = Budget(max_error_rate, accepts_bad_shards=False)
        _write_store(root, run, source_arrays, budget, overwrite=overwrite)
    return EmbeddingStore(root)


def _require_shapes(source_arrays: SourceArrays, run: Run) -> None:
    """Raise DataError if a column of the classes or of the model has a wrong shape."""
    for name, values in source_arrays.class_columns.items():
        shape = tuple(values.shape)
        if not is_possible_shape(run, name, shape):
            raise DataError(
                f"column {name!r} must be {COLUMNS[name][1]}, with K = {len(source_arrays.names)} "
                f"and D = {source_arrays.width}. Got shape {shape} instead."
            )


@dataclass
class SourceArrays:
    """The arrays of a source, all checked except for the numbers in the rows of the images.

    ``arrays`` are open. ``rows`` reads and checks the rows of one part.
    """

    arrays: dict[str, StoredArray]  # all arrays that are used, by the names in ``ARRAY_NAMES``
    target: NDArray[np.int64]  # (N,) label of each row; -1 if unknown, -2 if of none of the classes
    names: tuple[str, ...]  # names of the K classes
    text: Tensor  # (K, D) float32 unit-norm text embeddings
    class_columns: dict[ClassColumn, Tensor]  # columns of the classes and of the model
    outside: tuple[str, ...]  # names of classes that were left out, and targets that are no class
    norms: Norms = field(default_factory=Norms)  # norms of the rows read so far
    # (N,) answers of another model, as numbers of classes; None if there are no answers
    answer: NDArray[np.int64] | None = None

    @property
    def row_array(self) -> StoredArray:
        """The array that decides the number of rows: image embeddings, or logits."""
        return _row_array(self.arrays)

    @property
    def width(self) -> int:
        """Width D of the embeddings; 0 if the rows have only logits."""
        return _embedding_width(self.arrays)

    def row_shapes(self) -> dict[ImageColumn, tuple[int, ...]]:
        """Return the shape of one row of each column of the images, by name."""
        shapes: dict[ImageColumn, tuple[int, ...]] = {}
        for name in get_args(ImageColumn):
            if name in self.arrays:
                shapes[name] = self.arrays[name].shape[1:]
        return shapes

    def describe_import(self, origin: str | None) -> Imported:
        """Return what the store records about these arrays, with their ``origin`` for people."""
        return Imported(columns=self.row_shapes(), ids="ids" in self.arrays, source=origin)

    def space(
        self, logit_scale: float | None, logit_bias: float | None, model: str | None
    ) -> EmbeddingSpace:
        """The embedding space. Flags of the user replace the numbers in the source."""
        if LOGITS not in self.arrays:
            scale = self.number("logit_scale", logit_scale)
            bias = self.number("logit_bias", logit_bias)
            return EmbeddingSpace(self.width, scale, bias, backbone=model)
        if logit_scale is not None or logit_bias is not None:
            raise UsageError(
                "logits have their scale and bias already. Leave --logit-scale and --logit-bias "
                "out."
            )
        return replace(logit_space(self.width), backbone=model)

    def number_format(
        self, user_format: Literal["float16", "float32"] | None
    ) -> Literal["float16", "float32"]:
        """Number format of the stored rows; ``user_format`` is the choice of the user, if any.

        By default, the rows have the number format of the images. Logits are always float32.
        """
        if LOGITS in self.arrays:
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

    def number(self, name: str, user_value: float | None) -> float:
        """Return ``user_value``, or if it is None the number in the array ``name``.

        ``name`` is "logit_scale" or "logit_bias".
        """
        stored = self.arrays.get(name)
        if stored is None:
            if user_value is None:
                raise UsageError(
                    f"the arrays have no {name}, which makes a cosine a logit and cannot be "
                    f"guessed. Give --{name.replace('_', '-')}: OpenAI's CLIP has --logit-scale "
                    "100 --logit-bias 0; of other models the scale is the exponential of the "
                    "learned parameter, and only those of SigLIP's kind have a bias. Or save both "
                    "as arrays of these names."
                )
            return float(user_value)
        if stored.dtype.kind not in NUMBER_KINDS or np.prod(stored.shape) != 1:
            raise DataError(
                f"{stored.location} must be one number. Got {stored.dtype} of shape {stored.shape} "
                "instead."
            )
        (number,) = stored.read_whole().reshape(-1).tolist()
        if user_value is None:
            return float(number)
        if float(number) != user_value:
            logger.warning(
                "%s is %g as given; the %g in the arrays is ignored", name, user_value, number
            )
        return float(user_value)

    def fingerprint(self) -> str:
        """Return a hash of all arrays except scale and bias, which the space contains."""
        hashed_arrays = {
            name: array for name, array in self.arrays.items() if name not in SPACE_ARRAYS
        }
        n_bytes = sum(array.n_bytes for array in hashed_arrays.values())
        with track("Reading arrays", n_bytes / MIB, "MiB") as task:

            def advance(n_read: int) -> None:
                task.advance(n_read / MIB)

            return digest({name: array.hash(advance) for name, array in hashed_arrays.items()})

    def rows(self, part: Part) -> PartRows:
        """Read the rows of a part, and return the usable rows and the errors."""
        part_rows = PartRows()
        status = np.full(len(part), VALID, np.uint8)
        blocks: dict[str, Tensor] = {}
        for name in part.arrays:
            # the store names the array of image embeddings ``IMAGE``, and the source "image"
            stored = self.arrays["image" if name == IMAGE else name]
            block = stored.read(part.start, part.stop)
            blocks[name], status_in_array, norms = _normalise(name, block)
            # of the status codes that a row has in several arrays, the highest is kept
            status = np.maximum(status, status_in_array)
            # Norms are collected for a warning. With logits, "image" holds features, which may have
            # any norm, so there is no warning about them.
            if LOGITS not in self.arrays:
                self.norms += norms
        keys = self._keys(part)
        labels = self.target[part.start : part.stop].tolist()
        positions = range(part.start, part.stop)
        rows = zip(positions, keys, labels, status, strict=True)
        for position, key, label, status_of_row in rows:
            if status_of_row == VALID:
                known_label = None if label == UNKNOWN else label
                part_rows.rows.append(self._row(position, key, known_label))
            else:
                part_rows.errors.append(_error_row(position, key, STATUS[status_of_row]))
        is_usable = torch.from_numpy(status == VALID)
        for name, embeddings in blocks.items():
            part_rows.arrays[name] = [embeddings[is_usable]]
        return part_rows

    def _row(self, position: int, key: str, label: int | None) -> LabelledRow:
        """The metadata of a row, including another model's answer if answers were imported."""
        if self.answer is None:
            return LabelledRow(position, key, label)
        return RowWithAnswer(position, key, label, int(self.answer[position]))

    def _keys(self, part: Part) -> list[str]:
        """Return the identifiers of the rows of a part, or their numbers if there are none."""
        ids = self.arrays.get("ids")
        if ids is None:
            return [str(row) for row in range(part.start, part.stop)]
        return array_to_texts(ids.read(part.start, part.stop), ids.location)


def _error_row(position: int, key: str, kind: str) -> ErrorRow:
    """Return the error of a row that cannot be used."""
    return ErrorRow(
        key=key,
        position=position,
        stage="import",
        kind=kind,
        exception=None,
        message="the row has no direction, or numbers that are not finite",
        bytes=None,
    )


def _normalise(name: str, block: NDArray[Any]) -> tuple[Tensor, NDArray[np.uint8], Norms]:
    """Return the rows to be stored, the status code of each image, and the original norms.

    Columns that may have any norm are not normalised, and their norms are not returned. The status
    code of an image with several views is the highest status code of its views.
    """
    may_have_any_norm = name in UNNORMALISED_COLUMNS
    if name == LOGITS:
        rows = logits_to_float32(block)
    else:
        rows = as_matrix(
            block.reshape(-1, block.shape[-1]), name, keep_direction=not may_have_any_norm
        )
    if may_have_any_norm:
        is_finite = torch.isfinite(rows).all(dim=1).numpy()
        status = np.where(is_finite, VALID, NONFINITE).astype(np.uint8)
        return rows, status, Norms()
    # in ``rows``, every view of an image is a row
    rows, status, norms = normalise_rows(rows)
    status_of_views = status.reshape(len(block), -1)
    # VALID is the smallest code, so an image is valid only if all its views are.
    status_of_images = status_of_views.max(axis=1, initial=VALID)
    return rows.view(block.shape), status_of_images, norms


def _read_source(
    arrays: Arrays,
    keys: dict[str, str],
    class_names: Sequence[str] | None,
    outside: tuple[str, ...],
) -> SourceArrays:
    """Open the arrays of a source, and check everything except the numbers in the image rows.

    The arguments are those of ``import_arrays``. In this function, ``names`` are the classes in the
    source. ``classes`` are the classes in the store, which lack the classes ``outside``.
    """
    opened = _open_arrays(arrays, keys)
    for name in ("image", LOGITS):
        if name in opened:
            _require_matrix(opened[name])
    n_rows = len(_row_array(opened))
    for name in ROW_ARRAYS:
        if name in opened and len(opened[name]) != n_rows:
            raise DataError(
                f"{opened[name].location} must have one entry per image row ({n_rows}). Got shape "
                f"{opened[name].shape} instead."
            )
    _check_columns(opened, _embedding_width(opened))
    names = _read_class_names(opened.get("class_names"), class_names)
    targets = _read_targets(opened.get("target"), n_rows)
    if LOGITS in opened:
        target, text_rows, classes = _classes_of_logits(targets, names, outside, opened[LOGITS])
        text = zero_texts(len(classes), logit_space(_embedding_width(opened)))
    else:
        target, text_rows, classes = _leave_out(outside, names, targets, opened["text"])
        text = _read_texts(opened, text_rows, classes)
    _check_ids(opened.get("ids"), n_rows)
    columns = _read_class_columns(opened, text_rows)
    answer = _read_answers(opened.get(ANSWER), n_rows, names, classes)
    return SourceArrays(
        arrays=opened,
        target=target,
        names=classes,
        text=text,
        class_columns=columns,
        outside=outside,
        answer=answer,
    )


def _row_array(opened: Mapping[str, StoredArray]) -> StoredArray:
    """The array that decides the number of rows: image embeddings, or logits if there are none."""
    if "image" in opened:
        return opened["image"]
    return opened[LOGITS]


def _embedding_width(opened: Mapping[str, StoredArray]) -> int:
    """Width of the embeddings; 0 if the rows have only logits."""
    if "image" not in opened:
        return 0
    return opened["image"].shape[1]


def _read_texts(
    opened: Mapping[str, StoredArray], text_rows: Tensor, classes: Sequence[str]
) -> Tensor:
    """Check the texts of the classes, and return them (K, D) with unit norm."""
    text = require_usable(opened["text"].read_whole(), "text")[text_rows]
    if text.shape[1] != _embedding_width(opened):
        raise DataError(
            f"image and text must share one width. Got {_embedding_width(opened)} "
            f"({opened['image'].location}) and {text.shape[1]} ({opened['text'].location})."
        )
    first_same_answer(text, classes)  # raises DataError if classes of one name have different texts
    return text


def _read_answers(
    stored: StoredArray | None, n_rows: int, names: Sequence[str], classes: Sequence[str]
) -> NDArray[np.int64] | None:
    """Return the answers (N,) as numbers of classes of the store; None if there is no array.

    In the array, an answer is the number or the name of a class in the source. ``names`` are the
    classes in the source. ``classes`` are the classes in the store, where some may be left out.
    """
    if stored is None:
        return None
    answers_in_source = _read_targets(stored, n_rows)
    values = answers_in_source.values
    if values.dtype.kind in WHOLE_KINDS:
        numbers = check_answers(
            values, n_rows=len(values), class_names=None, n_candidates=len(names)
        )
        values = np.array([names[number] for number in numbers.tolist()], dtype=np.str_)
    class_of_value = check_answers(
        values, n_rows=len(values), class_names=classes, n_candidates=len(classes)
    ).numpy()
    answers: NDArray[np.int64] = class_of_value[answers_in_source.value_of_row]
    return answers


def _classes_of_logits(
    targets: Targets, names: tuple[str, ...], outside: tuple[str, ...], logits: StoredArray
) -> tuple[NDArray[np.int64], Tensor, tuple[str, ...]]:
    """Return the same as ``_leave_out``, for a source with logits.

    Each class must have a column of logits, and no class is left out. So ``outside`` may only have
    labels that are no class.
    """
    n_logits = logits.shape[1]
    if n_logits != len(names):
        raise DataError(
            f"there must be one class name per logit ({n_logits}, {logits.location}). Got "
            f"{len(names)} names instead."
        )
    if set(outside) & set(names):
        raise UsageError(
            "classes with logits can be answers, so they cannot be outside. Leave their logits "
            "out, or use --outside for labels beyond the classes only."
        )
    require_distinct_names(names)
    target = _index_targets(targets, names, outside)
    # ``check_class_names`` returns a tuple, and None only for None. ``or ()`` is for type checkers.
    classes = check_class_names(names, n_candidates=len(names)) or ()
    return target, torch.arange(len(names)), classes


def _require_matrix(image: StoredArray) -> None:
    """Raise DataError if the images are not a matrix of numbers."""
    is_matrix = len(image.shape) == 2 and image.shape[1] >= 1
    if image.dtype.kind not in NUMBER_KINDS or not is_matrix:
        raise DataError(
            f"{image.location} must be a matrix (rows, width) of numbers. Got {image.dtype} of "
            f"shape {image.shape}."
        )


def _open_arrays(arrays: Arrays, keys: dict[str, str]) -> dict[str, StoredArray]:
    """Open the arrays of a source, and return them by the names in ``ARRAY_NAMES``.

    ``keys`` has an entry for each array that has another name in the source: the name in the
    source, by the name in ``ARRAY_NAMES``.
    """
    unknown = sorted(keys.keys() - set(ARRAY_NAMES))
    if unknown:
        raise UsageError(
            f"{unknown[0]!r} is no array that is imported. Give one of {', '.join(ARRAY_NAMES)}."
        )
    # the name of every array in the source (its key), by its name in ``ARRAY_NAMES``
    key_of_name = {name: keys.get(name, name) for name in ARRAY_NAMES}
    required_names = ["image", "text"]
    if key_of_name[LOGITS] in arrays.names:
        required_names = [LOGITS]
        if key_of_name["text"] in arrays.names:
            raise DataError(
                f"{arrays.path} has the arrays {key_of_name['text']!r} and "
                f"{key_of_name[LOGITS]!r}. Logits take the place of texts: leave one of them out."
            )
        if key_of_name["image"] not in arrays.names:
            # With logits, the array ``features`` has the vectors of the rows. So it is read as
            # ``image``, and nothing is read as ``features``: no array has the name "".
            key_of_name["image"] = key_of_name["features"]
            key_of_name["features"] = ""
    required_keys = [key_of_name[name] for name in required_names]
    _require_present(arrays, key_of_name, [*required_keys, *keys.values()])
    used_keys = {name: key for name, key in key_of_name.items() if key in arrays.names}
    unused_keys = sorted(set(arrays.names) - set(used_keys.values()))
    if unused_keys:
        logger.info(
            "not imported: %s (to import an array under another name: --key NAME=KEY)",
            ", ".join(unused_keys),
        )
    for name, key in used_keys.items():
        # Embeddings never compress very well, so an array of embeddings that compressed very well
        # is refused. Arrays with one number or text per row may compress very well.
        if name not in {"target", "answer", "ids"}:
            arrays.require_small(key)
    opened = {name: arrays.open(key) for name, key in used_keys.items()}
    for name in ("class_names", *ROW_ARRAYS):
        if name in opened:
            opened[name].require_rows()
    return opened


def _require_present(
    arrays: Arrays, key_of_name: Mapping[str, str], required_keys: Sequence[str]
) -> None:
    """Raise DataError if the source lacks an array.

    Args:
        arrays: The arrays of the source.
        key_of_name: The key of an array in the source, by the name of the array in ``ARRAY_NAMES``.
        required_keys: Keys that the source must have.
    """
    missing_keys = [key for key in required_keys if key not in arrays.names]
    if not missing_keys:
        return
    missing_key = missing_keys[0]
    name = next(name for name, key in key_of_name.items() if key == missing_key)
    existing_keys = ", ".join(repr(key) for key in arrays.names[:20]) or "none"
    raise DataError(
        f"{arrays.path} has no array {missing_key!r}; it has {existing_keys}. If the array has "
        f"another name there, give --key {name}=NAME."
    )


def _check_columns(opened: Mapping[str, StoredArray], width: int) -> None:
    """Raise DataError if texts or columns have a wrong type or shape, or no entries.

    ``width`` is the width of the embeddings.
    """
    # number of dimensions and meaning of each array, by name
    expected = {"text": (2, "(K, D) embeddings of the candidates"), **COLUMNS}
    for name, (n_dims, meaning) in expected.items():
        if name not in opened:
            continue
        column = opened[name]
        sizes = column.shape
        if name in IMAGE_COLUMNS:  # the number of rows may be 0
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


def _read_class_names(stored: StoredArray | None, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names: the user's ``names``, or if they are None those in the source."""
    if names is not None:
        return tuple(names)
    if stored is None:
        raise UsageError(
            "the arrays have no class names. Save an array class_names, name the array that has "
            "them (--key class_names=NAME), or give --classes FILE with one name per line."
        )
    _require_names(stored)
    return tuple(array_to_texts(stored.read_whole(), stored.location))


def _require_names(stored: StoredArray) -> None:
    """Raise DataError if an array is not a vector of short texts."""
    max_bytes = 4 * MAX_NAME_CHARACTERS  # NumPy stores a character in 4 bytes
    if len(stored.shape) != 1 or stored.dtype.itemsize > max_bytes:
        raise DataError(
            f"{stored.location} must be a vector of texts of at most {MAX_NAME_CHARACTERS:,} "
            f"characters. Got {stored.dtype} of shape {stored.shape} instead."
        )


def _check_ids(stored: StoredArray | None, n_rows: int) -> None:
    """Raise DataError if an identifier occurs twice."""
    if stored is None:
        return
    _require_names(stored)
    hashes_of_blocks = [np.empty(0, np.uint64)]  # not an empty list, which concatenate refuses
    for block in stored.blocks():
        hashes_of_blocks.append(hash_names(array_to_texts(block, stored.location)))
    hashes = np.concatenate(hashes_of_blocks)
    # After sorting, equal hashes are neighbours. Their identifiers are compared, too, because
    # different identifiers can have the same hash. Between two equal identifiers there may be
    # a third one of this hash, so every one is compared with all before it.
    order = np.argsort(hashes, kind="stable")
    sorted_hashes = hashes[order]
    equals_next = np.flatnonzero(sorted_hashes[:-1] == sorted_hashes[1:])
    shares_hash = np.union1d(equals_next, equals_next + 1)  # positions in ``order``
    row_of_identifier: dict[str, int] = {}
    for row in order[shares_hash].tolist():
        identifier = _read_identifier(stored, row)
        if identifier in row_of_identifier:
            raise DataError(
                f"{stored.location} must name each of the {n_rows} rows once. Rows "
                f"{row_of_identifier[identifier]} and {row} are both {identifier!r:.80}. Rename "
                "them, or leave the identifiers out."
            )
        row_of_identifier[identifier] = row


def _read_identifier(stored: StoredArray, row: int) -> str:
    """Read the identifier of a row."""
    (identifier,) = array_to_texts(stored.read(row, row + 1), stored.location)
    return identifier


class Targets(NamedTuple):
    """Targets as they are in the source, with every distinct value once in memory."""

    values: NDArray[Any]  # distinct targets, sorted: whole numbers or names
    value_of_row: NDArray[np.int64]  # (N,) for each row, the index of its target in ``values``


def _read_targets(stored: StoredArray | None, n_rows: int) -> Targets:
    """Read the targets of ``n_rows`` rows in blocks; all are unknown if there is no array."""
    if stored is None:
        unknown = np.full(min(n_rows, 1), UNKNOWN, np.int64)  # one value, or none without rows
        return Targets(values=unknown, value_of_row=np.zeros(n_rows, np.int64))
    is_vector = len(stored.shape) == 1
    is_named = is_vector and stored.dtype.kind in TEXT_KINDS
    if is_named:
        _require_names(stored)
    elif not is_vector or stored.dtype.kind not in WHOLE_KINDS:
        raise DataError(
            f"{stored.location} must hold one whole number per row (the number of a row of text), "
            f"or one class name per row. Got {stored.dtype} of shape {stored.shape} instead."
        )
    targets_of_blocks: list[Targets] = []
    for block in stored.blocks():
        targets = np.array(array_to_texts(block, stored.location), np.str_) if is_named else block
        values, value_of_row = np.unique(targets, return_inverse=True)
        targets_of_blocks.append(Targets(values, value_of_row))
    return _join_targets(targets_of_blocks)


def _join_targets(targets_of_blocks: Sequence[Targets]) -> Targets:
    """Join the targets of consecutive blocks of rows."""
    if not targets_of_blocks:
        return Targets(values=np.empty(0, np.int64), value_of_row=np.empty(0, np.int64))
    all_values = np.unique(np.concatenate([targets.values for targets in targets_of_blocks]))
    value_of_row: list[NDArray[np.int64]] = []
    for targets in targets_of_blocks:
        # for each value of the block, its index among the values of all blocks
        new_index = np.searchsorted(all_values, targets.values)
        value_of_row.append(new_index[targets.value_of_row])
    return Targets(all_values, np.concatenate(value_of_row))


def _leave_out(
    outside: tuple[str, ...], names: tuple[str, ...], targets: Targets, text: StoredArray
) -> tuple[NDArray[np.int64], Tensor, tuple[str, ...]]:
    """Leave out the classes in ``outside``, so that K classes remain.

    Returns the targets (N,) among these classes, the row numbers (K,) of their texts in ``text``,
    and their K names.
    """
    remaining = [number for number, name in enumerate(names) if name not in outside]
    n_texts = len(text)
    if n_texts not in {len(names), len(remaining)}:
        raise DataError(
            f"there must be one class name per row of text ({n_texts}, {text.location}). Got "
            f"{len(names)} names instead."
        )
    if not remaining:
        raise UsageError(
            f"all of the {len(names)} classes would be outside. At least one must be left."
        )
    # the label in the store of each class in the source; OUTSIDE if the class is left out
    new_label = np.full(len(names), OUTSIDE, np.int64)
    new_label[remaining] = np.arange(len(remaining))
    target = _index_targets(targets, names, outside)
    is_class = target >= 0
    target[is_class] = new_label[target[is_class]]
    # ``text`` has a row for every name, or only a row for every remaining class
    has_text_per_name = n_texts == len(names)
    text_rows = torch.tensor(remaining if has_text_per_name else range(n_texts))
    remaining_names = [names[number] for number in remaining]
    # ``check_class_names`` returns a tuple, and None only for None. ``or ()`` is for type checkers.
    classes = check_class_names(remaining_names, n_candidates=len(remaining)) or ()
    return target, text_rows, classes


def _index_targets(
    targets: Targets, names: tuple[str, ...], outside: tuple[str, ...]
) -> NDArray[np.int64]:
    """Return (N,) int64 indices into ``names``, -1 if unknown, -2 if the target is no class."""
    index_of_name: dict[str, int] = {}
    for i, name in enumerate(names):
        index_of_name.setdefault(name, i)  # of classes with the same name, the first index
    labels_outside = [name for name in outside if name not in index_of_name]
    _require_used(labels_outside, targets, names)
    if targets.values.dtype.kind == "U":
        indices = _indices_of_names(targets.values.tolist(), index_of_name, labels_outside)
    else:
        indices = _indices_of_numbers(targets.values, len(names), labels_outside)
    return indices[targets.value_of_row]


def _require_used(labels_outside: Sequence[str], targets: Targets, names: tuple[str, ...]) -> None:
    """Raise UsageError if a label in ``labels_outside`` is the target of no row."""
    known_names = {"", *names}
    known_numbers = range(len(names))
    further_labels: list[str] = []  # targets that are no class
    for value in targets.values.tolist():
        if value not in known_names and value not in known_numbers:
            further_labels.append(str(value))
    unused_labels = [label for label in labels_outside if label not in further_labels]
    if not unused_labels:
        return
    shown_names = [repr(name) for name in names[:MAX_LISTED]]
    if len(names) > MAX_LISTED:
        shown_names.append("...")
    further_text = ""
    if further_labels:
        further_text = f"; labels beyond the classes are {', '.join(further_labels[:MAX_LISTED])}"
    raise UsageError(
        f"there is no class or label {unused_labels[0]!r} for --outside. Classes are "
        f"{', '.join(shown_names)}{further_text}."
    )


def _indices_of_names(
    values: Sequence[str], index_of_name: Mapping[str, int], labels_outside: Sequence[str]
) -> NDArray[np.int64]:
    """Return the index of each name, -1 if unknown, -2 if outside."""
    index_of_value = {"": UNKNOWN, **index_of_name, **dict.fromkeys(labels_outside, OUTSIDE)}
    for value in values:
        if value not in index_of_value:
            raise DataError(
                f"target has the label {value!r:.80}, which is no class. Add it to class_names and "
                "text, or say with --outside that it is none of the classes."
            )
    return np.array([index_of_value[value] for value in values], dtype=np.int64)


def _indices_of_numbers(
    values: NDArray[Any], n_classes: int, labels_outside: Sequence[str]
) -> NDArray[np.int64]:
    """Check targets that are whole numbers, and return them with -2 in place of labels outside."""
    # ``--outside`` names values for which no class stands
    is_not_named = np.array(
        [str(value) not in labels_outside for value in values.tolist()], dtype=bool
    )
    # ``is_outside`` marks values that are -2 in the source
    target, is_outside = check_targets(
        values[is_not_named], n_rows=int(is_not_named.sum()), n_candidates=n_classes
    )
    indices = np.full(len(values), OUTSIDE, np.int64)
    indices[is_not_named] = torch.where(is_outside, OUTSIDE, target).numpy()
    return indices


def _read_class_columns(
    opened: Mapping[str, StoredArray], text_rows: Tensor
) -> dict[ClassColumn, Tensor]:
    """Check the columns of the classes and of the model, and return them.

    Of the columns of the classes, the rows ``text_rows`` are returned. Columns that must have unit
    norm are normalised.
    """
    columns: dict[ClassColumn, Tensor] = {}
    for name in get_args(ClassColumn):
        if name not in opened:
            continue
        if LOGITS in opened:
            raise DataError(
                f"{opened[name].location} is compared with texts, and with logits there are no "
                "texts. Leave it out."
            )
        n_texts = len(opened["text"])
        # the number of image rows, here 0, is not compared, because no column of images is checked
        values = check_columns({name: opened[name].read_whole()}, n_rows=0, n_texts=n_texts)[name]
        has_row_per_class = name in TEXT_COLUMNS
        columns[name] = values[text_rows] if has_row_per_class else values
    return columns


def _describe_run(
    source_arrays: SourceArrays, space: EmbeddingSpace, imported: Imported, **settings: object
) -> Run:
    """Return the description of a run. All arrays are read once, for the fingerprint of the run."""
    inputs: dict[str, object] = {
        "dataset_fingerprint": source_arrays.fingerprint(),
        "n_in": len(source_arrays.row_array),
        "space": asdict(space),
        "names": source_arrays.names,
        "folders": source_arrays.names if "target" in source_arrays.arrays else None,
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
    return describe_run(inputs, source.name or path.stem)


def _write_store(
    root: Path, run: Run, source_arrays: SourceArrays, budget: Budget, *, overwrite: bool
) -> None:
    """Write the missing parts and seal the store."""
    with StoreLedger.claim(root):
        texts_and_columns = (source_arrays.text, source_arrays.class_columns)
        run = begin(root, run, make_classes=lambda: texts_and_columns, overwrite=overwrite)
        ledger = StoreLedger(root, run)
        missing_parts, receipts = ledger.survey()
        if missing_parts:
            # The manifest is removed before the first part is written, because a manifest states
            # that all parts are done.
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
            source_arrays.norms.warn("image")
        ledger.clean()
        seal(ledger, budget)


def _write_part(ledger: StoreLedger, part: Part, source_arrays: SourceArrays) -> Receipt:
    """Write a part in the number format of the store, and return its receipt."""
    rows = source_arrays.rows(part)
    number_format = getattr(torch, ledger.run.dtype)
    for name, blocks in rows.arrays.items():
        rows.arrays[name] = [block.to(number_format) for block in blocks]
    return ledger.write_rows(part, rows, batch_size=len(part), source="")
