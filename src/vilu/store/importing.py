"""Arrays that somebody else made to an embedding store."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.documents import digest
from vilu.device import as_usual
from vilu.embeddings.checks import (
    NONFINITE,
    STATUS,
    VALID,
    Norms,
    as_matrix,
    check_class_names,
    check_targets,
    hash_names,
    normalised,
    require_usable,
)
from vilu.embeddings.columns import ANY_NORM, COLUMNS, IMAGE_COLUMNS, TEXT_COLUMNS, check_columns
from vilu.embeddings.source import first_same
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import OUTSIDE, UNKNOWN, DataError, UsageError
from vilu.progress import track
from vilu.store.arrays import MAX_TEXT, Arrays, StoredArray, texts_of
from vilu.store.documents import IMAGE, ClassColumn, ImageColumn, Imported, Run
from vilu.store.embed import Budget, begin, describe_run, require_room, seal
from vilu.store.parts import ErrorRow, LabelledRow, Part, PartRows, StoreLedger, has_shape
from vilu.store.reader import EmbeddingStore
from vilu.validation import checked

PART_ROWS = 16_384  # rows per part, unless somebody says otherwise

NAMES = ("image", "text", "target", "class_names", "ids", "logit_scale", "logit_bias", *COLUMNS)
"""Of the arrays that are read."""

logger = logging.getLogger(__name__)


@checked
@as_usual()
def import_arrays(  # noqa: PLR0913 - one keyword per flag of the command
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
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
    """Make a store of arrays, or what is still missing of an earlier run with the same inputs.

    They are ``image`` (N, D), ``text`` (K, D), ``class_names`` (K,) and, where there are such,
    ``target`` (N,), ``ids`` (N,), ``logit_scale``, ``logit_bias`` and columns
    (``vilu.embeddings.columns``) of these names. Targets are rows of ``text``, -1 where unknown and
    -2 (``vilu.OUTSIDE``) of none of the classes; or names of classes, "" where unknown.

    Rows are brought to unit norm, said once as a warning if they were not. Image rows that are not
    finite or of norm zero are set aside and counted as bad images are. Every array is read twice,
    once for the fingerprint of the store, and memory is bounded by one part of the rows, whatever
    N. Nothing is unpickled. Kill it at any moment: finished parts stay, and the next run gives the
    bytes that an undisturbed one would have given.

    Args:
        source: An ``.npz`` file, or a folder of ``.npy`` files.
        output: Folder of the store.
        logit_scale: Multiplier of the cosine (100 for OpenAI's CLIP); None to take it from the
            array of this name.
        logit_bias: Added to every logit (0 but for SigLIP); None to take it from the array of this
            name.
        keys: What arrays are called in the source, by the names above, where they are called
            otherwise.
        class_names: K names, in place of the array.
        outside: Names of classes, or values of ``target`` beyond them, that are none of the
            classes: such rows become ``vilu.OUTSIDE``, and classes of such names are left out.
        model: Name of the model that made the embeddings, where it is known; stores of other models
            are not mixed.
        origin: Where the arrays come from, recorded.
        split: Name of the split, recorded.
        dtype: Number format of what is stored of the rows; by default float16 where ``image`` is,
            else float32.
        part_size: Rows per part: what a kill can cost, and what is in memory.
        max_error_rate: Largest share of rows that may be unusable; above it the store is not
            sealed, and nothing lost.
        overwrite: Replace the store that is there.

    Raises:
        UsageError: If an argument cannot be, the scale or the bias is neither given nor in the
            source, or ``output`` holds something else than a store.
        ProvenanceError: If ``output`` holds a store of other inputs, which the message names.
        DataError: If an array is missing, damaged, of Python objects, or does not fit the others.
        StorageError: If the file system refuses; finished parts are intact.
        BusyError: If another process writes to ``output``.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(
        ...         f"{folder}/a.npz",
        ...         image=np.eye(3),
        ...         text=np.eye(3),
        ...         class_names=["cat", "dog", "cup"],
        ...     )
        ...     store = vilu.import_arrays(
        ...         f"{folder}/a.npz", f"{folder}/store", logit_scale=100, logit_bias=0
        ...     )
        ...     print(len(store), store.n_candidates, store.space.anonymous)
        3 3 True
    """
    if part_size < 1 or not 0 <= max_error_rate <= 1:
        raise UsageError(
            f"part_size must be at least 1 and max_error_rate from 0 to 1. Got {part_size} and {max_error_rate}."
        )
    root, path = Path(output), Path(source)
    StoreLedger.check_place(root, overwrite=overwrite)
    with Arrays(path) as arrays:
        given = _read(arrays, dict(keys or {}), class_names, tuple(dict.fromkeys(outside)))
        scale = given.number("logit_scale", logit_scale)
        bias = given.number("logit_bias", logit_bias)
        shapes = {
            name: one.shape[1:]
            for name in get_args(ImageColumn)
            if (one := given.arrays.get(name)) is not None
        }
        run = _describe(
            given,
            EmbeddingSpace(given.width, scale, bias, backbone=model),
            Imported(columns=shapes, ids="ids" in given.arrays, source=origin),
            split=split,
            dtype=dtype or ("float16" if given.image.dtype.str[1:] == "f2" else "float32"),
            part_size=part_size,
        )
        for name, values in given.class_columns.items():
            if not has_shape(run, name, tuple(values.shape)):
                raise DataError(
                    f"column {name!r} must be {COLUMNS[name][1]}, with K = {len(given.names)} and D = {given.width}. "
                    f"Got shape {tuple(values.shape)} instead."
                )
        _drive(root, run, given, Budget(max_error_rate, bad_shards=False), overwrite=overwrite)
    return EmbeddingStore(root)


@dataclass
class Given:
    """What a source holds, checked: what is of rows by its header, all else read."""

    arrays: dict[str, StoredArray]  # all that is used, by our names
    target: NDArray[np.int64]  # (N,) int64 classes of the store, -1 where unknown, -2 of none
    names: tuple[str, ...]  # of the K classes
    text: Tensor  # (K, D) float32 unit-norm texts
    class_columns: dict[ClassColumn, Tensor]  # what else there is of the classes and of the model
    outside: tuple[str, ...]  # names that are none of the classes
    norms: Norms = field(default_factory=Norms)  # of the rows that were read

    @property
    def image(self) -> StoredArray:
        """(N, D) embeddings."""
        return self.arrays["image"]

    @property
    def width(self) -> int:
        """D."""
        return self.image.shape[1]

    def number(self, name: str, given: float | None) -> float:
        """The logit scale or bias: what is given counts, then what the source says."""
        stored = self.arrays.get(name)
        if stored is None and given is None:
            raise UsageError(
                f"the arrays do not say {name}, which makes a cosine a logit and cannot be guessed. Give "
                f"--{name.replace('_', '-')}: OpenAI's CLIP has --logit-scale 100 --logit-bias 0; of other models the "
                "scale is the exponential of the learned parameter, and only those of SigLIP's kind have a bias. Or "
                "save both as arrays of these names."
            )
        if stored is None:
            return float(cast("float", given))
        if stored.dtype.kind not in "fiu" or np.prod(stored.shape) != 1:
            raise DataError(
                f"{stored.place} must be one number. Got {stored.dtype} of shape {stored.shape} instead."
            )
        value = float(stored.whole().reshape(-1)[0])
        if given is not None and value != given:
            logger.warning("%s is %g, as was said; the arrays say %g", name, given, value)
        return value if given is None else float(given)

    def fingerprint(self) -> str:
        """Hash of all arrays but the scale and the bias, which are in the space."""
        used = {
            name: one
            for name, one in self.arrays.items()
            if name not in {"logit_scale", "logit_bias"}
        }
        with track(
            "Reading arrays", sum(one.n_bytes for one in used.values()) / 2**20, "MiB"
        ) as task:
            return digest(
                {name: one.hash(lambda n: task.advance(n / 2**20)) for name, one in used.items()}
            )

    def rows(self, part: Part) -> PartRows:
        """What becomes of the rows of a part."""
        content, status = PartRows(), np.full(len(part), VALID, np.uint8)
        kept: dict[str, Tensor] = {}
        for name in part.arrays:
            block = (self.image if name == IMAGE else self.arrays[name]).read(part.start, part.stop)
            kept[name], found, norms = _usable(name, block)
            status = np.maximum(status, found)
            self.norms += norms
        ids, ends = self.arrays.get("ids"), (part.start, part.stop)
        keys = list(map(str, range(*ends))) if ids is None else texts_of(ids.read(*ends), ids.place)
        labels = self.target[part.start : part.stop].tolist()
        for position, key, label, code in zip(
            range(part.start, part.stop), keys, labels, status, strict=True
        ):
            if code == VALID:
                content.rows.append(LabelledRow(position, key, None if label == UNKNOWN else label))
            else:
                told = "the row has no direction, or numbers that are not finite"
                content.errors.append(
                    ErrorRow(key, position, "import", STATUS[code], None, told, None)
                )
        good = torch.from_numpy(status == VALID)
        content.arrays = {name: [rows[good]] for name, rows in kept.items()}
        return content


def _usable(name: str, block: NDArray[Any]) -> tuple[Tensor, NDArray[np.uint8], Norms]:
    """Rows as they are stored, the worst status of each, and what the norms were."""
    rows = as_matrix(block.reshape(-1, block.shape[-1]), name, scaled=name not in ANY_NORM)
    if name in ANY_NORM:
        finite = torch.isfinite(rows).all(dim=1).numpy()
        return rows, np.where(finite, VALID, NONFINITE).astype(np.uint8), Norms()
    rows, status, norms = normalised(rows)
    return rows.view(block.shape), status.reshape(len(block), -1).max(axis=1, initial=VALID), norms


def _read(
    arrays: Arrays,
    keys: dict[str, str],
    class_names: Sequence[str] | None,
    outside: tuple[str, ...],
) -> Given:
    """What the source holds; everything that can be wrong with it, but for the numbers of its rows, is told here."""
    found = _open(arrays, keys)
    image = found["image"]
    if image.dtype.kind not in "fiu" or len(image.shape) != 2 or image.shape[1] < 1:
        raise DataError(
            f"{image.place} must be a matrix (rows, width) of numbers. Got {image.dtype} of shape {image.shape}."
        )
    n = len(image)
    for name in ("target", "ids", *IMAGE_COLUMNS):
        if name in found and len(found[name]) != n:
            raise DataError(
                f"{found[name].place} must have one entry per image row ({n}). Got shape {found[name].shape} instead."
            )
    _check_columns(found, image.shape[1])
    names = _class_names(found.get("class_names"), class_names)
    labels = _labels(found.get("target"), n)
    target, kept, classes = _classes(labels, names, outside, found["text"])
    text = require_usable(found["text"].whole(), "text")[kept]
    if text.shape[1] != image.shape[1]:
        raise DataError(
            f"image and text must share one width. Got {image.shape[1]} ({image.place}) and {text.shape[1]} "
            f"({found['text'].place})."
        )
    first_same(text, classes)
    _check_ids(found.get("ids"), n)
    return Given(found, target, classes, text, _class_columns(found, kept), outside)


def _open(arrays: Arrays, keys: dict[str, str]) -> dict[str, StoredArray]:
    """The arrays that are there, by our names."""
    if unknown := sorted(keys.keys() - set(NAMES)):
        raise UsageError(
            f"there is no array {unknown[0]!r} to be called otherwise. Known: {', '.join(NAMES)}."
        )
    absent = next((name for name in keys.values() if name not in arrays.names), None)
    called = {name: keys.get(name, name) for name in NAMES}
    lacking = next(
        (called[name] for name in ("image", "text") if called[name] not in arrays.names), absent
    )
    if lacking is not None:
        ours = next(name for name, key in called.items() if key == lacking)
        raise DataError(
            f"{arrays.path} has no array {lacking!r}; it has {', '.join(map(repr, arrays.names[:20])) or 'none'}. If "
            f"it is there by another name, say so: --key {ours}=NAME."
        )
    used = {name: key for name, key in called.items() if key in arrays.names}
    if unused := sorted(set(arrays.names) - set(used.values())):
        logger.info(
            "not imported: %s (those that are, by other names too: --key NAME=KEY)",
            ", ".join(unused),
        )
    for name, key in used.items():
        if name not in {"target", "ids"}:  # which grow with the rows and nothing else
            arrays.require_small(key)
    found = {name: arrays.open(key) for name, key in used.items()}
    for name in ("image", "target", "ids", "class_names", *IMAGE_COLUMNS):
        if name in found:
            found[name].require_rows()
    return found


def _check_columns(found: Mapping[str, StoredArray], width: int) -> None:
    """Refuse what is of another type or number of dimensions, or has none of something."""
    for name, (n_dims, meaning) in {
        "text": (2, "(K, D) embeddings of the candidates"),
        **COLUMNS,
    }.items():
        if name not in found:
            continue
        one = found[name]
        sizes = one.shape[1:] if name in IMAGE_COLUMNS else one.shape  # there may be no rows
        if one.dtype.kind not in "fiu" or len(one.shape) != n_dims or not all(sizes):
            raise DataError(
                f"{one.place} must be {meaning}. Got {one.dtype} of shape {one.shape} instead."
            )
        if name == "views" and one.shape[-1] != width:
            raise DataError(
                f"{one.place} must be of the width of the embeddings, {width}. Got {one.shape[-1]}."
            )


def _class_names(stored: StoredArray | None, given: Sequence[str] | None) -> tuple[str, ...]:
    if given is not None:
        return tuple(given)
    if stored is None:
        raise UsageError(
            "the arrays do not say what the classes are called. Save class_names beside them, call another array so "
            "(--key class_names=NAME), or give --classes FILE, one name a line."
        )
    _require_names(stored)
    return tuple(texts_of(stored.whole(), stored.place))


def _require_names(stored: StoredArray) -> None:
    if len(stored.shape) != 1 or stored.dtype.itemsize > 4 * MAX_TEXT:
        raise DataError(
            f"{stored.place} must be a vector of texts of at most {MAX_TEXT:,} characters. Got {stored.dtype} of shape "
            f"{stored.shape} instead."
        )


def _check_ids(stored: StoredArray | None, n: int) -> None:
    """Refuse identifiers that occur twice."""
    if stored is None:
        return
    _require_names(stored)
    hashes = np.concatenate(
        [
            np.empty(0, np.uint64),
            *(hash_names(texts_of(block, stored.place)) for block in stored.blocks()),
        ]
    )
    order = np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(hashes[order][1:] == hashes[order][:-1]).tolist():
        first, second = order[place : place + 2].tolist()
        one, other = (
            texts_of(stored.read(row, row + 1), stored.place)[0] for row in (first, second)
        )
        if one == other:
            raise DataError(
                f"{stored.place} must name each of the {n} rows once. Rows {first} and {second} are both {one!r:.80}. "
                "Rename them, or leave the identifiers out."
            )


class Targets(NamedTuple):
    """Targets as they are in the source: which whole numbers or names occur, sorted, and (N,) places among them."""

    found: NDArray[Any]
    place: NDArray[np.int64]


def _labels(stored: StoredArray | None, n: int) -> Targets:
    """Read block by block."""
    if stored is None:
        return Targets(np.full(min(n, 1), UNKNOWN, np.int64), np.zeros(n, np.int64))
    named = len(stored.shape) == 1 and stored.dtype.kind in "US"
    if named:
        _require_names(stored)
    elif len(stored.shape) != 1 or stored.dtype.kind not in "iu":
        raise DataError(
            f"{stored.place} must hold one whole number per row (a row of text), or one name of a class. Got "
            f"{stored.dtype} of shape {stored.shape} instead."
        )
    parts = [
        np.unique(
            np.array(texts_of(block, stored.place), np.str_) if named else block,
            return_inverse=True,
        )
        for block in stored.blocks()
    ]
    found = (
        np.unique(np.concatenate([values for values, _ in parts]))
        if parts
        else np.empty(0, np.int64)
    )
    places = [np.searchsorted(found, values)[inverse] for values, inverse in parts]
    return Targets(found, np.concatenate([np.empty(0, np.int64), *places]))


def _classes(
    labels: Targets, names: tuple[str, ...], outside: tuple[str, ...], text: StoredArray
) -> tuple[NDArray[np.int64], Tensor, tuple[str, ...]]:
    """(N,) targets, (K,) rows of text that stay, and K names of classes."""
    stay = [place for place, name in enumerate(names) if name not in outside]
    n_texts = len(text)
    if n_texts not in {len(names), len(stay)}:
        raise DataError(
            f"there must be one class name per row of text ({n_texts}, {text.place}). Got {len(names)} names instead."
        )
    position = np.full(len(names), OUTSIDE, np.int64)
    position[stay] = np.arange(len(stay))
    if not stay:
        raise UsageError(
            f"all of the {len(names)} classes would be outside. At least one must be left."
        )
    target = _targets(labels, names, outside)
    inside = target >= 0
    target[inside] = position[target[inside]]
    kept = torch.tensor(stay if n_texts == len(names) else range(n_texts))
    classes = check_class_names([names[place] for place in stay], len(stay)) or ()
    return target, kept, classes


def _targets(
    labels: Targets, names: tuple[str, ...], outside: tuple[str, ...]
) -> NDArray[np.int64]:
    """(N,) int64 places among the names, -1 where unknown, -2 where a label that is no class is named as outside."""
    values: list[Any] = labels.found.tolist()
    place_of = {name: place for place, name in reversed(list(enumerate(names)))}
    extra = [name for name in outside if name not in place_of]
    beyond = [
        str(value)
        for value in values
        if value not in {"", *place_of} and value not in range(len(names))
    ]
    unknown = next((name for name in extra if name not in beyond), None)
    if unknown is not None:
        there = [*map(repr, names[:10]), *(["..."] if len(names) > 10 else [])]
        more = f"; labels beyond the classes are {', '.join(beyond[:10])}" if beyond else ""
        raise UsageError(
            f"there is no class or label {unknown!r} to be outside. Classes are {', '.join(there)}{more}."
        )
    if labels.found.dtype.kind == "U":
        known = {"": UNKNOWN, **place_of, **dict.fromkeys(extra, OUTSIDE)}
        stray = next((value for value in values if value not in known), None)
        if stray is not None:
            raise DataError(
                f"target has the label {stray!r:.80}, which is no class. Add it to class_names and text, or say with "
                "--outside that it is none of the classes."
            )
        codes = np.array([known[value] for value in values], dtype=np.int64)
    else:
        classes = np.array([str(value) not in extra for value in values], dtype=bool)
        target, strange = check_targets(labels.found[classes], int(classes.sum()), len(names))
        codes = np.full(len(values), OUTSIDE, np.int64)
        codes[classes] = torch.where(strange, OUTSIDE, target).numpy()
    return codes[labels.place]


def _class_columns(found: Mapping[str, StoredArray], kept: Tensor) -> dict[ClassColumn, Tensor]:
    """The columns of classes and model: all finite, and of unit norm where they are to be."""
    columns: dict[ClassColumn, Tensor] = {}
    for name in get_args(ClassColumn):
        if name not in found:
            continue
        columns[name] = check_columns({name: found[name].whole()}, 0, len(found["text"]))[name]
        if name in TEXT_COLUMNS:
            columns[name] = columns[name][kept]
    return columns


def _describe(given: Given, space: EmbeddingSpace, imported: Imported, **settings: object) -> Run:
    """The run over the arrays; they are read once for its fingerprint."""
    described: dict[str, object] = {
        "dataset_fingerprint": given.fingerprint(),
        "n_in": len(given.image),
        "space": asdict(space),
        "names": given.names,
        "folders": given.names if "target" in given.arrays else None,
        "templates": (),
        "limits": {},
        "outside": tuple(sorted(given.outside)),
        "imported": imported.model_dump(),
        **settings,
    }
    place = Path(given.image.place.partition(", array ")[0])
    return describe_run(described, place.name if place.suffix != ".npy" else place.parent.name)


def _drive(root: Path, run: Run, given: Given, budget: Budget, *, overwrite: bool) -> None:
    """Do what is missing and seal the store."""
    with StoreLedger.claim(root):
        run = begin(root, run, lambda: (given.text, given.class_columns), overwrite=overwrite)
        ledger = StoreLedger(root, run)
        missing, done = ledger.survey()
        if missing:
            ledger.unseal()
            require_room(root, run, missing)
        else:
            logger.info("%s is complete: there is nothing to do", root)
        with track("import", run.n_in, "rows") as task:
            task.advance(sum(receipt.n_in for receipt in done))
            n_errors = 0
            for part in missing:
                content = given.rows(part)
                content.arrays = {
                    name: [block.to(getattr(torch, run.dtype)) for block in blocks]
                    for name, blocks in content.arrays.items()
                }
                receipt = ledger.write_rows(part, content, len(part), "")
                n_errors += receipt.n_error
                task.advance(len(part), f"{n_errors} errors")
            given.norms.warn("image", stacklevel=7)
        ledger.clean()
        seal(ledger, budget)
