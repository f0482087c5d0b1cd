"""The class table of a data set: names in its folders or labels, and names for prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from vilu.datasets.files import portable_name, read_file
from vilu.errors import DataError, StorageError, UsageError, nearest


@dataclass(frozen=True)
class ClassTable:
    """K classes in label order."""

    # names in the data: class folders, texts of labels, or names in the metadata of a table
    folders: tuple[str, ...]
    # names for prompts; predictors merge classes that have the same name, and so the same texts
    names: tuple[str, ...]
    # whether ``names`` are ``folders`` with spaces in place of underscores
    cleaned: bool = False

    def __post_init__(self) -> None:
        if not self.folders or len(self.folders) != len(self.names):
            raise DataError(
                f"a class table needs one prompt name per class. Got {len(self.folders)} classes, "
                f"{len(self.names)} names."
            )
        _require_texts("class", self.folders)
        _require_texts("prompt", self.names)
        if self.folders == self.names:
            # Equal names are accepted here. They only occur if labels are numbers, which tell
            # classes of the same name apart.
            return
        repeated = _repeated(Counter(self.folders))
        if repeated:
            raise DataError(
                f"class names must be distinct. Repeated: {_listed(repeated)}. "
                "Merge or rename them."
            )


def _require_texts(kind: str, names: Sequence[str]) -> None:
    """Raise DataError where a name is blank, or cannot be encoded in UTF-8.

    ``kind`` is "class" or "prompt", for the message.
    """
    for number, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{kind} names must not be blank. Class {number} (counting from 0) is.")
    not_text = [portable_name(name) for name in names if not _is_text(name)]
    if not_text:
        raise DataError(f"{kind} names must be UTF-8 text. Rename: {_listed(not_text)}.")


def _repeated(counts: Counter[str]) -> list[str]:
    """Return the names that occur more than once."""
    return [name for name, count in counts.items() if count > 1]


@overload
def class_table(
    raw: Sequence[str],
    file: Path | None,
    *,
    by_position: bool = False,
    names: Sequence[str] | None = None,
    outside: Collection[str] = (),
) -> ClassTable: ...
@overload
def class_table(
    raw: Sequence[str] | None,
    file: Path | None,
    *,
    by_position: bool = False,
    outside: Collection[str] = (),
) -> ClassTable | None: ...
def class_table(
    raw: Sequence[str] | None,
    file: Path | None,
    *,
    by_position: bool = False,
    names: Sequence[str] | None = None,
    outside: Collection[str] = (),
) -> ClassTable | None:
    """Return the class table of a data set; None if neither the data nor a file name the classes.

    All lines of a classes file are ``name``, or all are ``folder<TAB>name``. They are assigned to
    labels as follows:

    1. ``folder<TAB>name``: The folders are matched with ``raw``. Without ``raw``, the lines are in
       label order. There is one exception: if ``by_position`` is True and all folders are numbers,
       these numbers are the labels.
    2. ``name``: With ``by_position`` or without ``raw``, the lines are in label order. Otherwise
       the names are matched with ``raw``.

    Args:
        raw: Names in the data, in label order; None if the data have none.
        file: A classes file; None if there is none.
        by_position: Whether labels are whole numbers. Label i is then line i of the file.
        names: Names for prompts if there is no file; by default ``raw`` with spaces in place of
            underscores.
        outside: Classes that will be left out (``WithOutside``). They need no line in a file that
            is matched with ``raw``.
    """
    if file is None and names is not None:
        # without ``raw``, the empty tuple of folders makes ClassTable raise an error
        return ClassTable(tuple(raw or ()), tuple(names))
    if file is None:
        if raw is None:
            return None
        return _default(raw)
    keys, prompts = read_classes(file)
    if raw is None and keys is not None and by_position:
        raw = _labels_of(keys, file)
    if raw is None:
        return ClassTable(keys or prompts, prompts)
    if keys is not None:
        return _named_by_keys(raw, keys, prompts, file, outside)
    if by_position:
        _require_same_order(raw, prompts, file)
        return ClassTable(tuple(raw), prompts)
    name_of = {clean_name(name): name for name in raw}
    name_of |= {name: name for name in raw}  # an unchanged name has precedence over a cleaned name
    _require_all_named(raw, name_of, prompts, file, outside)
    return _default(raw)  # all names in the file are also in the data, so it changes nothing


def _labels_of(keys: Sequence[str], file: Path) -> tuple[str, ...] | None:
    """Return the labels 0, 1, ... as texts if all keys are numbers; None otherwise.

    DataError if the keys are numbers, but not every label occurs once.
    """
    if not all(key.isdecimal() for key in keys):
        return None
    labels = tuple(str(label) for label in range(len(keys)))
    if sorted(labels) != sorted(keys):
        raise DataError(
            f"{file}: numbers before names must be the labels 0 to {len(keys) - 1}, each once."
        )
    return labels


def _named_by_keys(
    raw: Sequence[str],
    keys: Sequence[str],
    prompts: Sequence[str],
    file: Path,
    outside: Collection[str],
) -> ClassTable:
    """Return the table of the classes ``raw`` with the prompts in their lines of the file.

    ``keys`` and ``prompts`` are the two columns of the file. A class in ``outside`` may be missing.
    """
    _require_all_named(raw, {name: name for name in raw}, keys, file, outside)
    prompt_of = dict(zip(keys, prompts, strict=True))
    names = [prompt_of.get(name, clean_name(name)) for name in raw]
    return ClassTable(tuple(raw), tuple(names))


def read_classes(file: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return the folders and the names in a classes file.

    The folders are None if the lines of the file are names without folders.

    A byte order mark, line ends of any system (CRLF, CR) and blank lines at the end are accepted.
    """
    text = _read_text(file)
    rows = [line.split("\t") for line in re.split(r"\r\n?|\n", text.rstrip())]
    width = len(rows[0])
    for number, row in enumerate(rows, start=1):
        if not all(cell.strip() for cell in row):
            raise DataError(
                f"{file} line {number}: blank name. Every line is a name, or folder<TAB>name."
            )
        if len(row) > 2 or len(row) != width:
            cells = " and ".join(map(repr, row))
            raise DataError(
                f"{file} line {number}: {len(row)} columns, {cells}. All lines are a name, or all "
                "folder<TAB>name."
            )
    if width == 1:
        return None, tuple(name.strip() for (name,) in rows)
    folders = tuple(folder.strip() for folder, _ in rows)
    names = tuple(name.strip() for _, name in rows)
    return folders, names


def _read_text(file: Path) -> str:
    """Return the text of a classes file, without its byte order mark."""
    try:
        return read_file(file).decode("utf-8-sig")
    except PermissionError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}.") from error
    except OSError as error:
        raise UsageError(f"cannot read the classes file: {error}. Check --classes.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} must be UTF-8 text: {error}. Save it as UTF-8.") from error


def _default(raw: Sequence[str]) -> ClassTable:
    """Return the class table of a data set without a classes file."""
    return ClassTable(tuple(raw), tuple(clean_name(name) for name in raw), cleaned=True)


def clean_name(name: str) -> str:
    """Return a name for prompts, with spaces in place of underscores."""
    return name.replace("_", " ")


def _require_all_named(
    raw: Sequence[str],
    name_of: dict[str, str],
    lines: Sequence[str],
    file: Path,
    outside: Collection[str],
) -> None:
    """Raise DataError unless the file names every class of the data (``raw``) once.

    Names in ``outside`` may be missing. ``lines`` are the names in the file, and ``name_of`` maps
    each line that is accepted to a name in the data.
    """
    unknown = [line for line in lines if line not in name_of]
    if unknown:
        first = unknown[0]
        hint = nearest(first, name_of)
        if hint:
            # " Did you mean 'cat'?" becomes " Did you mean 'cat' for 'cta'?"
            hint = f"{hint.removesuffix('?')} for {first!r}?"
        raise DataError(
            f"{file} names classes that the data does not have: {_listed(unknown)}.{hint} "
            "Leave them out. If they are classes without an image here, make an empty sub-folder "
            "for each, or in a table use numbers as labels (lines of this file, from 0)."
        )
    counts = Counter(name_of[line] for line in lines)
    repeated = _repeated(counts)
    if repeated:
        raise DataError(f"{file} names classes more than once: {_listed(repeated)}.")
    missing = []
    for name in raw:
        is_outside = name in outside or clean_name(name) in outside
        if name not in counts and not is_outside:
            missing.append(name)
    if missing:
        raise DataError(
            f"{file} leaves out classes of the data: {_listed(missing)}. Add a line for each, or "
            "name them with --outside to count their images as outside of the classes."
        )


def _require_same_order(raw: Sequence[str], names: Sequence[str], file: Path) -> None:
    """Raise DataError for a wrong number of names, or names of the data in another order."""
    if len(raw) != len(names):
        raise DataError(
            f"{file} must have one name per class of the data ({len(raw)}). "
            f"Got {len(names)} instead."
        )
    if sorted(raw) != sorted(names):
        return
    for label, name in enumerate(raw):
        if name != names[label]:
            raise DataError(
                f"{file} has the data's class names in another order (class {label} is {name!r} "
                "in the data). Names for whole-number labels go in label order."
            )


def refuse_numbers(classes: ClassTable, source: str) -> None:
    """Raise DataError if class names are numbers that differ from the labels of the classes.

    This function is called if labels in the data are numbers, too. Then it is not clear whether
    such a label is the name of a class or the number of a line in the classes file.
    """
    names = classes.names
    are_numbers = all(map(str.isdecimal, names))
    if classes.folders != names or not are_numbers:
        return
    are_labels = [int(name) for name in names] == list(range(len(names)))
    if are_labels:
        return
    raise DataError(
        f"{source}: labels are numbers, and so are the classes ({_listed(names)}). Is a label a "
        "name, or a line of the classes file, counted from 0? Make the labels such numbers, and "
        "write number<TAB>name in that file."
    )


def _is_text(name: str) -> bool:
    """Whether a name has no surrogates, which stand for bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _listed(names: Sequence[str]) -> str:
    """Return the first names for a message, and the number of the rest."""
    listed = ", ".join(map(repr, names[:5]))
    if len(names) > 5:
        return f"{listed} and {len(names) - 5} more"
    return listed
