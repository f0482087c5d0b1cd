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
from vilu.store.arrays import MAX_TEXT, Arrays, StoredArray, texts_of
from vilu.store.embed import Budget, begin, describe_run, require_room, seal
from vilu.store.manifest import IMAGE, ClassColumn, ImageColumn, Imported, Receipt, Run
from vilu.store.parts import (
    ErrorRow,
    LabelledRow,
    Part,
    PartRows,
    RowWithAnswer,
    StoreLedger,
    has_shape,
)
from vilu.store.reader import EmbeddingStore
from vilu.validation import checked

PART_ROWS = 16_384  # default number of rows per part

NAMES = (
    *("image", "text", "logits", "target", "answer", "class_names", "ids"),
    *("logit_scale", "logit_bias", *COLUMNS),
)
"""Names of the arrays that are read."""

OF_SPACE = frozenset({"logit_scale", "logit_bias"})
"""Arrays that belong to the embedding space."""
BY_ROW = ("image", "logits", "target", "answer", "ids", *IMAGE_COLUMNS)
"""Arrays with one entry per image row."""
# Sets of kinds of NumPy's types (``dtype.kind``), one letter per kind.
NUMBERS = "fiu"  # floats and whole numbers
WHOLE = "iu"  # whole numbers
TEXTS = "US"  # texts and bytes
MIB = 2**20

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
    StoreLedger.check_place(root, overwrite=overwrite)
    with Arrays(source, files) as arrays:
        content = _read(
            arrays,
            keys=dict(keys or {}),
            class_names=class_names,
            outside=tuple(dict.fromkeys(outside)),  # each name once, in their order
        )
        run = _describe(
            content,
            content.space(logit_scale, logit_bias, model),
            Imported(columns=content.row_shapes(), ids="ids" in content.arrays, source=origin),
            split=split,
            dtype=content.number_format(dtype),
            part_size=part_size,
        )
        _require_shapes(content, run)
        budget = Budget(max_error_rate, bad_shards=False)
        _write_store(root, run, content, budget, overwrite=overwrite)
    return EmbeddingStore(root)


def _require_shapes(content: SourceArrays, run: Run) -> None:
    """Raise DataError if a column of the classes or of the model has a wrong shape."""
    for name, values in content.class_columns.items():
        shape = tuple(values.shape)
        if not has_shape(run, name, shape):
            raise DataError(
                f"column {name!r} must be {COLUMNS[name][1]}, with K = {len(content.names)} and "
                f"D = {content.width}. Got shape {shape} instead."
            )


@dataclass
class SourceArrays:
    """The arrays of a source, all checked except for the numbers in the rows of the images.

    ``arrays`` are open. ``rows`` reads and checks the rows of one part.
    """

    arrays: dict[str, StoredArray]  # all arrays that are used, by the names in ``NAMES``
    target: NDArray[np.int64]  # (N,) label of each row; -1 if unknown, -2 if of none of the classes
    names: tuple[str, ...]  # names of the K classes
    text: Tensor  # (K, D) float32 unit-norm text embeddings
    class_columns: dict[ClassColumn, Tensor]  # columns of the classes and of the model
    outside: tuple[str, ...]  # names of classes that were left out, and targets that are no class
    norms: Norms = field(default_factory=Norms)  # norms of the rows read so far
    answer: NDArray[np.int64] | None = None  # (N,) classes that another model answered, if any

    @property
    def array_of_rows(self) -> StoredArray:
        """The array that decides the number of rows: image embeddings, or logits."""
        return _array_of_rows(self.arrays)

    @property
    def width(self) -> int:
        """Width D of the embeddings; 0 if the rows have only logits."""
        return _width(self.arrays)

    def row_shapes(self) -> dict[ImageColumn, tuple[int, ...]]:
        """Return the shape of one row of each column of the images, by name."""
        shapes: dict[ImageColumn, tuple[int, ...]] = {}
        for name in get_args(ImageColumn):
            if name in self.arrays:
                shapes[name] = self.arrays[name].shape[1:]
        return shapes

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
        self, asked: Literal["float16", "float32"] | None
    ) -> Literal["float16", "float32"]:
        """Number format of the stored rows: ``asked``, or if it is None that of the images.

        Logits are always stored as float32.
        """
        if LOGITS in self.arrays:
            if asked == "float16":
                raise UsageError(
                    "logits are stored as float32, since float16 would change answers. Leave "
                    "--dtype out."
                )
            return "float32"
        if asked is not None:
            return asked
        dtype = self.array_of_rows.dtype
        has_float16 = dtype.kind == "f" and dtype.itemsize == 2  # in any byte order
        return "float16" if has_float16 else "float32"

    def number(self, name: str, flag: float | None) -> float:
        """Return ``flag``, or the number in the array ``name`` if ``flag`` is None.

        ``name`` is "logit_scale" or "logit_bias".
        """
        stored = self.arrays.get(name)
        if stored is None:
            if flag is None:
                raise UsageError(
                    f"the arrays have no {name}, which makes a cosine a logit and cannot be "
                    f"guessed. Give --{name.replace('_', '-')}: OpenAI's CLIP has --logit-scale "
                    "100 --logit-bias 0; of other models the scale is the exponential of the "
                    "learned parameter, and only those of SigLIP's kind have a bias. Or save both "
                    "as arrays of these names."
                )
            return float(flag)
        if stored.dtype.kind not in NUMBERS or np.prod(stored.shape) != 1:
            raise DataError(
                f"{stored.where} must be one number. Got {stored.dtype} of shape {stored.shape} "
                "instead."
            )
        (number,) = stored.whole().reshape(-1).tolist()
        if flag is None:
            return float(number)
        if float(number) != flag:
            logger.warning("%s is %g as given; the %g in the arrays is ignored", name, flag, number)
        return float(flag)

    def fingerprint(self) -> str:
        """Return a hash of all arrays except scale and bias, which the space contains."""
        hashed_arrays = {name: array for name, array in self.arrays.items() if name not in OF_SPACE}
        n_bytes = sum(array.n_bytes for array in hashed_arrays.values())
        with track("Reading arrays", n_bytes / MIB, "MiB") as task:

            def advance(n_read: int) -> None:
                task.advance(n_read / MIB)

            return digest({name: array.hash(advance) for name, array in hashed_arrays.items()})

    def rows(self, part: Part) -> PartRows:
        """Read the rows of a part, and return the usable rows and the errors."""
        content = PartRows()
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
                content.rows.append(self._row(position, key, known_label))
            else:
                content.errors.append(_error_row(position, key, STATUS[status_of_row]))
        is_usable = torch.from_numpy(status == VALID)
        for name, embeddings in blocks.items():
            content.arrays[name] = [embeddings[is_usable]]
        return content

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
        return texts_of(ids.read(part.start, part.stop), ids.where)


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
    """Return the rows to be stored, the status code of each image, and the norms before.

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


def _read(
    arrays: Arrays,
    keys: dict[str, str],
    class_names: Sequence[str] | None,
    outside: tuple[str, ...],
) -> SourceArrays:
    """Open the arrays of a source, and check everything except the numbers in the image rows.

    ``names`` are the classes in the source. ``classes`` are the classes in the store, which lack
    the classes ``outside``.
    """
    opened = _open(arrays, keys)
    for name in ("image", LOGITS):
        if name in opened:
            _require_matrix(opened[name])
    n_rows = len(_array_of_rows(opened))
    for name in BY_ROW:
        if name in opened and len(opened[name]) != n_rows:
            raise DataError(
                f"{opened[name].where} must have one entry per image row ({n_rows}). Got shape "
                f"{opened[name].shape} instead."
            )
    _check_columns(opened, _width(opened))
    names = _class_names(opened.get("class_names"), class_names)
    targets = _read_targets(opened.get("target"), n_rows)
    if LOGITS in opened:
        target, text_rows, classes = _classes_of_logits(targets, names, outside, opened[LOGITS])
        text = zero_texts(len(classes), logit_space(_width(opened)))
    else:
        target, text_rows, classes = _leave_out(outside, names, targets, opened["text"])
        text = _texts(opened, text_rows, classes)
    _check_ids(opened.get("ids"), n_rows)
    columns = _class_columns(opened, text_rows)
    answer = _answers(opened.get(ANSWER), n_rows, names, classes)
    return SourceArrays(
        arrays=opened,
        target=target,
        names=classes,
        text=text,
        class_columns=columns,
        outside=outside,
        answer=answer,
    )


def _array_of_rows(opened: Mapping[str, StoredArray]) -> StoredArray:
    """The array that decides the number of rows: image embeddings if there are any, else logits."""
    if "image" in opened:
        return opened["image"]
    return opened[LOGITS]


def _width(opened: Mapping[str, StoredArray]) -> int:
    """Width of the embeddings; 0 if the rows have only logits."""
    if "image" not in opened:
        return 0
    return opened["image"].shape[1]


def _texts(opened: Mapping[str, StoredArray], text_rows: Tensor, classes: Sequence[str]) -> Tensor:
    """Check the texts of the classes, and return them (K, D) with unit norm."""
    text = require_usable(opened["text"].whole(), "text")[text_rows]
    if text.shape[1] != _width(opened):
        raise DataError(
            f"image and text must share one width. Got {_width(opened)} ({opened['image'].where}) "
            f"and {text.shape[1]} ({opened['text'].where})."
        )
    first_same_answer(text, classes)  # raises DataError if classes of one name have different texts
    return text


def _answers(
    stored: StoredArray | None, n: int, names: Sequence[str], classes: Sequence[str]
) -> NDArray[np.int64] | None:
    """Return the answers (N,) as numbers of classes of the store; None if there is no array.

    In the array, an answer is the number or the name of a class in the source. ``names`` are the
    classes in the source. ``classes`` are the classes in the store, where some may be left out.
    """
    if stored is None:
        return None
    in_source = _read_targets(stored, n)
    values = in_source.values
    if values.dtype.kind in WHOLE:
        numbers = check_answers(
            values, n_rows=len(values), class_names=None, n_candidates=len(names)
        )
        values = np.array([names[number] for number in numbers.tolist()], dtype=np.str_)
    class_of_value = check_answers(
        values, n_rows=len(values), class_names=classes, n_candidates=len(classes)
    ).numpy()
    answers: NDArray[np.int64] = class_of_value[in_source.value_of_row]
    return answers


def _classes_of_logits(
    targets: Targets, names: tuple[str, ...], outside: tuple[str, ...], logits: StoredArray
) -> tuple[NDArray[np.int64], Tensor, tuple[str, ...]]:
    """Return targets, text rows and class names as ``_leave_out``, for a source with logits.

    Each class must have a column of logits, and no class is left out. So ``outside`` may only have
    labels that are no class.
    """
    n_logits = logits.shape[1]
    if n_logits != len(names):
        raise DataError(
            f"there must be one class name per logit ({n_logits}, {logits.where}). Got "
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
    if image.dtype.kind not in NUMBERS or not is_matrix:
        raise DataError(
            f"{image.where} must be a matrix (rows, width) of numbers. Got {image.dtype} of shape "
            f"{image.shape}."
        )


def _open(arrays: Arrays, keys: dict[str, str]) -> dict[str, StoredArray]:
    """Open the arrays of a source, and return them by the names in ``NAMES``.

    ``keys`` has an entry for each array that has another name in the source: the name in the
    source, by the name in ``NAMES``.
    """
    unknown = sorted(keys.keys() - set(NAMES))
    if unknown:
        raise UsageError(
            f"{unknown[0]!r} is no array that is imported. Give one of {', '.join(NAMES)}."
        )
    # the key of every array in the source, by its name in ``NAMES``
    key_of = {name: keys.get(name, name) for name in NAMES}
    needed = ["image", "text"]
    if key_of[LOGITS] in arrays.names:
        needed = [LOGITS]
        if key_of["text"] in arrays.names:
            raise DataError(
                f"{arrays.path} has the arrays {key_of['text']!r} and {key_of[LOGITS]!r}. Logits "
                "take the place of texts: leave one of them out."
            )
        if key_of["image"] not in arrays.names:
            # With logits, the array ``features`` has the vectors of the rows. So it is read as
            # ``image``, and nothing is read as ``features``: no array has the name "".
            key_of["image"] = key_of["features"]
            key_of["features"] = ""
    needed_keys = [key_of[name] for name in needed]
    _require_present(arrays, key_of, [*needed_keys, *keys.values()])
    used = {name: key for name, key in key_of.items() if key in arrays.names}
    unused = sorted(set(arrays.names) - set(used.values()))
    if unused:
        logger.info(
            "not imported: %s (to import an array under another name: --key NAME=KEY)",
            ", ".join(unused),
        )
    for name, key in used.items():
        # Embeddings never compress very well, so an array of embeddings that compressed very well
        # is refused. Arrays with one number or text per row may compress very well.
        if name not in {"target", "answer", "ids"}:
            arrays.require_small(key)
    opened = {name: arrays.open(key) for name, key in used.items()}
    for name in ("class_names", *BY_ROW):
        if name in opened:
            opened[name].require_rows()
    return opened


def _require_present(arrays: Arrays, key_of: Mapping[str, str], needed_keys: Sequence[str]) -> None:
    """Raise DataError if the source lacks an array.

    Args:
        arrays: The arrays of the source.
        key_of: The key of an array in the source, by the name of the array in ``NAMES``.
        needed_keys: Keys that the source must have.
    """
    missing_keys = [key for key in needed_keys if key not in arrays.names]
    if not missing_keys:
        return
    missing_key = missing_keys[0]
    name = next(name for name, key in key_of.items() if key == missing_key)
    present = ", ".join(map(repr, arrays.names[:20])) or "none"
    raise DataError(
        f"{arrays.path} has no array {missing_key!r}; it has {present}. If the array has another "
        f"name there, give --key {name}=NAME."
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
        is_sized = len(column.shape) == n_dims and all(sizes)
        if column.dtype.kind not in NUMBERS or not is_sized:
            raise DataError(
                f"{column.where} must be {meaning}. Got {column.dtype} of shape {column.shape} "
                "instead."
            )
        if name == "views" and column.shape[-1] != width:
            raise DataError(
                f"{column.where} must be of the width of the embeddings, {width}. Got "
                f"{column.shape[-1]}."
            )


def _class_names(stored: StoredArray | None, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names: the user's ``names`` if given, else the names in the source."""
    if names is not None:
        return tuple(names)
    if stored is None:
        raise UsageError(
            "the arrays have no class names. Save an array class_names, name the array that has "
            "them (--key class_names=NAME), or give --classes FILE with one name per line."
        )
    _require_names(stored)
    return tuple(texts_of(stored.whole(), stored.where))


def _require_names(stored: StoredArray) -> None:
    """Raise DataError if an array is not a vector of short texts."""
    max_bytes = 4 * MAX_TEXT  # NumPy stores a character in 4 bytes
    if len(stored.shape) != 1 or stored.dtype.itemsize > max_bytes:
        raise DataError(
            f"{stored.where} must be a vector of texts of at most {MAX_TEXT:,} characters. Got "
            f"{stored.dtype} of shape {stored.shape} instead."
        )


def _check_ids(stored: StoredArray | None, n_rows: int) -> None:
    """Raise DataError if an identifier occurs twice."""
    if stored is None:
        return
    _require_names(stored)
    hashes_of_blocks = [np.empty(0, np.uint64)]  # not an empty list, which concatenate refuses
    for block in stored.blocks():
        hashes_of_blocks.append(hash_names(texts_of(block, stored.where)))
    hashes = np.concatenate(hashes_of_blocks)
    # After sorting, equal hashes are neighbours. Their identifiers are compared, too, because
    # different identifiers can have the same hash. Between two equal identifiers there may be
    # a third one of this hash, so every one is compared with all before it.
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    equals_next = np.flatnonzero(ordered[:-1] == ordered[1:])
    row_of: dict[str, int] = {}  # by identifier, of the identifiers that share their hash
    for row in order[np.union1d(equals_next, equals_next + 1)].tolist():
        name = _name_of_row(stored, row)
        if name in row_of:
            raise DataError(
                f"{stored.where} must name each of the {n_rows} rows once. Rows {row_of[name]} and "
                f"{row} are both {name!r:.80}. Rename them, or leave the identifiers out."
            )
        row_of[name] = row


def _name_of_row(stored: StoredArray, row: int) -> str:
    """Read the identifier of a row."""
    (name,) = texts_of(stored.read(row, row + 1), stored.where)
    return name


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
    is_named = is_vector and stored.dtype.kind in TEXTS
    if is_named:
        _require_names(stored)
    elif not is_vector or stored.dtype.kind not in WHOLE:
        raise DataError(
            f"{stored.where} must hold one whole number per row (the number of a row of text), or "
            f"one class name per row. Got {stored.dtype} of shape {stored.shape} instead."
        )
    of_blocks: list[Targets] = []
    for block in stored.blocks():
        targets = np.array(texts_of(block, stored.where), np.str_) if is_named else block
        values, value_of_row = np.unique(targets, return_inverse=True)
        of_blocks.append(Targets(values, value_of_row))
    if not of_blocks:
        return Targets(values=np.empty(0, np.int64), value_of_row=np.empty(0, np.int64))
    all_values = np.unique(np.concatenate([of_block.values for of_block in of_blocks]))
    indices: list[NDArray[np.int64]] = []
    for of_block in of_blocks:
        # for each value of the block, its index among the values of all blocks
        new_index = np.searchsorted(all_values, of_block.values)
        indices.append(new_index[of_block.value_of_row])
    return Targets(all_values, np.concatenate(indices))


def _leave_out(
    outside: tuple[str, ...], names: tuple[str, ...], targets: Targets, text: StoredArray
) -> tuple[NDArray[np.int64], Tensor, tuple[str, ...]]:
    """Leave out the classes in ``outside``, so that K classes remain.

    Returns the targets (N,) among these classes, the row numbers (K,) of their texts in ``text``,
    and their K names.
    """
    inside = [i for i, name in enumerate(names) if name not in outside]
    n_texts = len(text)
    if n_texts not in {len(names), len(inside)}:
        raise DataError(
            f"there must be one class name per row of text ({n_texts}, {text.where}). Got "
            f"{len(names)} names instead."
        )
    if not inside:
        raise UsageError(
            f"all of the {len(names)} classes would be outside. At least one must be left."
        )
    # new_label[i] is the label of class i in the store: its index in ``inside``, or OUTSIDE
    new_label = np.full(len(names), OUTSIDE, np.int64)
    new_label[inside] = np.arange(len(inside))
    target = _index_targets(targets, names, outside)
    is_class = target >= 0
    target[is_class] = new_label[target[is_class]]
    # ``text`` has a row for every name, or only a row for every class inside
    has_text_per_name = n_texts == len(names)
    text_rows = torch.tensor(inside if has_text_per_name else range(n_texts))
    # ``check_class_names`` returns a tuple, and None only for None. ``or ()`` is for type checkers.
    classes = check_class_names([names[i] for i in inside], n_candidates=len(inside)) or ()
    return target, text_rows, classes


def _index_targets(
    targets: Targets, names: tuple[str, ...], outside: tuple[str, ...]
) -> NDArray[np.int64]:
    """Return (N,) int64 indices into ``names``, -1 if unknown, -2 if the target is no class."""
    index_of: dict[str, int] = {}
    for i, name in enumerate(names):
        index_of.setdefault(name, i)  # of classes with the same name, the first index
    labels_outside = [name for name in outside if name not in index_of]
    _require_used(labels_outside, targets, names)
    if targets.values.dtype.kind == "U":
        indices = _indices_of_names(targets.values.tolist(), index_of, labels_outside)
    else:
        indices = _indices_of_numbers(targets.values, len(names), labels_outside)
    return indices[targets.value_of_row]


def _require_used(labels_outside: Sequence[str], targets: Targets, names: tuple[str, ...]) -> None:
    """Raise UsageError if a label in ``labels_outside`` is the target of no row."""
    known_names = {"", *names}
    known_numbers = range(len(names))
    beyond: list[str] = []  # targets that are no class
    for value in targets.values.tolist():
        if value not in known_names and value not in known_numbers:
            beyond.append(str(value))
    unknown = [name for name in labels_outside if name not in beyond]
    if not unknown:
        return
    shown = [repr(name) for name in names[:10]]
    if len(names) > 10:
        shown.append("...")
    more = f"; labels beyond the classes are {', '.join(beyond[:10])}" if beyond else ""
    raise UsageError(
        f"there is no class or label {unknown[0]!r} for --outside. Classes are "
        f"{', '.join(shown)}{more}."
    )


def _indices_of_names(
    values: Sequence[str], index_of: Mapping[str, int], labels_outside: Sequence[str]
) -> NDArray[np.int64]:
    """Return the index of each name, -1 if unknown, -2 if outside."""
    known = {"": UNKNOWN, **index_of, **dict.fromkeys(labels_outside, OUTSIDE)}
    for value in values:
        if value not in known:
            raise DataError(
                f"target has the label {value!r:.80}, which is no class. Add it to class_names and "
                "text, or say with --outside that it is none of the classes."
            )
    return np.array([known[value] for value in values], dtype=np.int64)


def _indices_of_numbers(
    values: NDArray[Any], n_classes: int, labels_outside: Sequence[str]
) -> NDArray[np.int64]:
    """Check targets that are whole numbers, and return them with -2 in place of labels outside."""
    may_be_class = np.array(
        [str(value) not in labels_outside for value in values.tolist()], dtype=bool
    )
    # ``is_outside`` marks values that are -2 in the source
    target, is_outside = check_targets(
        values[may_be_class], n_rows=int(may_be_class.sum()), n_candidates=n_classes
    )
    indices = np.full(len(values), OUTSIDE, np.int64)
    indices[may_be_class] = torch.where(is_outside, OUTSIDE, target).numpy()
    return indices


def _class_columns(
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
                f"{opened[name].where} is compared with texts, and with logits there are no texts. "
                "Leave it out."
            )
        n_texts = len(opened["text"])
        # the number of image rows, here 0, is not compared, because no column of images is checked
        values = check_columns({name: opened[name].whole()}, n_rows=0, n_texts=n_texts)[name]
        has_row_per_class = name in TEXT_COLUMNS
        columns[name] = values[text_rows] if has_row_per_class else values
    return columns


def _describe(
    content: SourceArrays, space: EmbeddingSpace, imported: Imported, **settings: object
) -> Run:
    """Return the description of a run. All arrays are read once, for the fingerprint of the run."""
    described: dict[str, object] = {
        "dataset_fingerprint": content.fingerprint(),
        "n_in": len(content.array_of_rows),
        "space": asdict(space),
        "names": content.names,
        "folders": content.names if "target" in content.arrays else None,
        "templates": (),
        "limits": {},
        "outside": tuple(sorted(content.outside)),
        "imported": imported.model_dump(),
        **settings,
    }
    # ``where`` is a text such as "FILE.npz, array 'image'", or "FOLDER/image.npy"
    source_path, _, _ = content.array_of_rows.where.partition(", array ")
    path = Path(source_path)
    source = path.parent if path.suffix == ".npy" else path
    return describe_run(described, source.name or path.stem)


def _write_store(
    root: Path, run: Run, content: SourceArrays, budget: Budget, *, overwrite: bool
) -> None:
    """Write the missing parts and seal the store."""
    with StoreLedger.claim(root):
        texts_and_columns = (content.text, content.class_columns)
        run = begin(root, run, lambda: texts_and_columns, overwrite=overwrite)
        ledger = StoreLedger(root, run)
        missing, done = ledger.survey()
        if missing:
            # The manifest is removed before the first part is written, because a manifest states
            # that all parts are done.
            ledger.unseal()
            require_room(root, run, missing)
        else:
            logger.info("%s is complete: there is nothing to do", root)
        with track("import", run.n_in, "rows") as task:
            task.advance(sum(receipt.n_in for receipt in done))
            n_errors = 0
            for part in missing:
                receipt = _write_part(ledger, part, content)
                n_errors += receipt.n_error
                task.advance(len(part), f"{n_errors} errors")
            content.norms.warn("image")
        ledger.clean()
        seal(ledger, budget)


def _write_part(ledger: StoreLedger, part: Part, content: SourceArrays) -> Receipt:
    """Write a part in the number format of the store, and return its receipt."""
    rows = content.rows(part)
    number_format = getattr(torch, ledger.run.dtype)
    for name, blocks in rows.arrays.items():
        rows.arrays[name] = [block.to(number_format) for block in blocks]
    return ledger.write_rows(part, rows, batch_size=len(part), source="")
