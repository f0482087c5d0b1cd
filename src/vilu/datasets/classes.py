"""A data set's class table: names in folders or labels, and names for prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from vilu.datasets.files import portable_name, read_file
from vilu.errors import DataError, StorageError, UsageError, did_you_mean

MAX_LISTED = 5  # maximum number of names in a message


@dataclass(frozen=True)
class ClassTable:
    """K classes in label order."""

    # names in the data: class folders, label texts, or names in a table's metadata
    data_names: tuple[str, ...]
    # names for prompts. Predictors merge classes with equal names, and therefore equal texts.
    names: tuple[str, ...]
    # whether ``names`` are ``data_names`` with spaces in place of underscores
    has_cleaned_names: bool = False

    def __post_init__(self) -> None:
        if not self.data_names or len(self.data_names) != len(self.names):
            raise DataError(
                "a class table needs one prompt name per class. "
                f"Got {len(self.data_names)} classes, {len(self.names)} names."
            )
        _require_texts("class", self.data_names)
        _require_texts("prompt", self.names)
        if self.data_names == self.names:
            # Repeated names are accepted here. Repeated names occur only with numbers as labels,
            # and these numbers distinguish classes with equal names.
            return
        counts = Counter(self.data_names)
        repeated_names = _repeated_names(counts)
        if repeated_names:
            listed_names = _list_names(repeated_names)
            raise DataError(
                f"class names must be distinct. Repeated: {listed_names}. Merge or rename them."
            )


def _require_texts(kind: str, names: Sequence[str]) -> None:
    """Raise DataError if a name is blank, or cannot be encoded in UTF-8.

    ``kind`` is "class" or "prompt", for the message.
    """
    for number, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{kind} names must not be blank. Class {number} (counting from 0) is.")
    invalid_names = [portable_name(name) for name in names if not _is_utf8(name)]
    if invalid_names:
        listed_names = _list_names(invalid_names)
        raise DataError(f"{kind} names must be UTF-8 text. Rename: {listed_names}.")


def _repeated_names(counts: Counter[str]) -> list[str]:
    """Return the repeated names."""
    return [name for name, count in counts.items() if count > 1]


@overload
def class_table(
    data_names: Sequence[str],
    file: Path | None,
    *,
    numeric_labels: bool = False,
    names: Sequence[str] | None = None,
    outside: Collection[str] = (),
) -> ClassTable: ...
@overload
def class_table(
    data_names: Sequence[str] | None,
    file: Path | None,
    *,
    numeric_labels: bool = False,
    outside: Collection[str] = (),
) -> ClassTable | None: ...
def class_table(
    data_names: Sequence[str] | None,
    file: Path | None,
    *,
    numeric_labels: bool = False,
    names: Sequence[str] | None = None,
    outside: Collection[str] = (),
) -> ClassTable | None:
    """Return a data set's class table. Without names in the data or in a file, return None.

    All lines of a classes file are ``name``, or all are ``folder<TAB>name``. The lines get labels
    as follows:

    1. ``folder<TAB>name``: The folders are matched with ``data_names``. Without ``data_names``, the
       lines are in label order. There is an exception: if ``numeric_labels`` is True and all
       folders are numbers, these numbers are the labels.
    2. ``name``: With ``numeric_labels`` or without ``data_names``, the lines are in label order.
       Otherwise the names are matched with ``data_names``.

    Args:
        data_names: Names in the data, in label order. None if the data have no names.
        file: A classes file, or None.
        numeric_labels: Whether labels are whole numbers. Label i is then line i in the file.
        names: Names for prompts if there is no file. By default, ``data_names`` with spaces in
            place of underscores.
        outside: Classes to be left out later (``ImagesWithOutside``). If the file is matched with
            ``data_names``, these classes need no line.
    """
    if file is None and names is not None:
        # without ``data_names``, the empty tuple makes ClassTable raise an error
        return ClassTable(tuple(data_names or ()), tuple(names))
    if file is None:
        if data_names is None:
            return None
        return _cleaned_table(data_names)
    file_folders, file_names = read_classes(file)
    if data_names is None and file_folders is not None and numeric_labels:
        data_names = _parse_labels(file_folders, file)
    if data_names is None:
        # in a file without folders, both table columns are the names
        return ClassTable(file_folders or file_names, file_names)
    if file_folders is not None:
        return _match_folders(data_names, file_folders, file_names, file, outside)
    if numeric_labels:
        _require_same_order(data_names, file_names, file)
        return ClassTable(tuple(data_names), file_names)
    # an unchanged name has precedence over a cleaned name, so unchanged names are entered last
    class_of_line = {clean_name(name): name for name in data_names}
    class_of_line |= {name: name for name in data_names}
    _require_each_class_once(data_names, class_of_line, file_names, file, outside)
    # all names in the file are also in the data, so the file changes nothing
    return _cleaned_table(data_names)


def _parse_labels(file_folders: Sequence[str], file: Path) -> tuple[str, ...] | None:
    """Return the labels 0, 1, ... as texts if all folders are numbers, otherwise None.

    If the folders are numbers, but not every label occurs once, raise DataError.
    """
    if not all(folder.isdecimal() for folder in file_folders):
        return None
    n_classes = len(file_folders)
    labels = tuple(str(label) for label in range(n_classes))
    if sorted(labels) != sorted(file_folders):
        raise DataError(
            f"{file}: numbers before names must be the labels 0 to {n_classes - 1}, each once."
        )
    return labels


def _match_folders(
    data_names: Sequence[str],
    file_folders: Sequence[str],
    file_names: Sequence[str],
    file: Path,
    outside: Collection[str],
) -> ClassTable:
    """Return the table for the classes ``data_names``, with prompt names from the file.

    ``file_folders`` and ``file_names`` are the file's two columns. A class in ``outside`` may be
    missing in the file.
    """
    class_of_line = {name: name for name in data_names}
    _require_each_class_once(data_names, class_of_line, file_folders, file, outside)
    name_of_folder = dict(zip(file_folders, file_names, strict=True))
    names = [name_of_folder.get(folder, clean_name(folder)) for folder in data_names]
    return ClassTable(tuple(data_names), tuple(names))


def read_classes(file: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return the folders and the names in a classes file.

    If the file's lines are names without folders, the folders are None.

    A byte order mark, line ends from any system (CRLF, CR) and blank lines at the end are accepted.
    """
    text = _read_text(file)
    stripped_text = text.rstrip()
    lines = re.split(r"\r\n?|\n", stripped_text)
    rows = [line.split("\t") for line in lines]
    n_columns = len(rows[0])
    for line_number, row in enumerate(rows, start=1):
        if not all(cell.strip() for cell in row):
            raise DataError(
                f"{file} line {line_number}: blank name. Every line is a name, or folder<TAB>name."
            )
        if len(row) > 2 or len(row) != n_columns:
            cells = " and ".join(map(repr, row))
            raise DataError(
                f"{file} line {line_number}: {len(row)} columns, {cells}. All lines are a name, or "
                "all folder<TAB>name."
            )
    if n_columns == 1:
        return None, tuple(name.strip() for (name,) in rows)
    folders = tuple(folder.strip() for folder, _ in rows)
    names = tuple(name.strip() for _, name in rows)
    return folders, names


def _read_text(file: Path) -> str:
    """Return a classes file's text, without the byte order mark."""
    try:
        content = read_file(file)
        return content.decode("utf-8-sig")
    except PermissionError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}.") from error
    except OSError as error:
        raise UsageError(f"cannot read the classes file: {error}. Check --classes.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} must be UTF-8 text: {error}. Save it as UTF-8.") from error


def _cleaned_table(data_names: Sequence[str]) -> ClassTable:
    """Return the class table for a data set without a classes file."""
    names = tuple(clean_name(name) for name in data_names)
    return ClassTable(tuple(data_names), names, has_cleaned_names=True)


def clean_name(name: str) -> str:
    """Return a name for prompts, with spaces in place of underscores."""
    return name.replace("_", " ")


def _require_each_class_once(
    data_names: Sequence[str],
    class_of_line: dict[str, str],
    lines: Sequence[str],
    file: Path,
    outside: Collection[str],
) -> None:
    """Raise DataError unless the file names every class in the data (``data_names``) once.

    Names in ``outside`` may be missing. ``lines`` are the names in the file, and ``class_of_line``
    maps each accepted line to a class in the data.
    """
    unknown_lines = [line for line in lines if line not in class_of_line]
    if unknown_lines:
        first_unknown = unknown_lines[0]
        hint = did_you_mean(first_unknown, class_of_line)
        if hint:
            # " Did you mean 'cat'?" becomes " Did you mean 'cat' for 'cta'?"
            hint = f"{hint.removesuffix('?')} for {first_unknown!r}?"
        raise DataError(
            f"{file} names classes that the data does not have: {_list_names(unknown_lines)}."
            f"{hint} Leave them out. If they are classes without an image here, make an empty "
            "sub-folder for each, or in a table use numbers as labels (lines of this file, from 0)."
        )
    counts = Counter(class_of_line[line] for line in lines)
    repeated_classes = _repeated_names(counts)
    if repeated_classes:
        raise DataError(f"{file} names classes more than once: {_list_names(repeated_classes)}.")
    missing_classes = []
    for name in data_names:
        is_outside = name in outside or clean_name(name) in outside
        if name not in counts and not is_outside:
            missing_classes.append(name)
    if missing_classes:
        raise DataError(
            f"{file} leaves out classes of the data: {_list_names(missing_classes)}. Add a line "
            "for each, or name them with --outside to count their images as outside of the classes."
        )


def _require_same_order(data_names: Sequence[str], file_names: Sequence[str], file: Path) -> None:
    """Raise DataError if the file has too few or too many names, or names in another order.

    The order can only be checked if the file and the data have the same names.
    """
    if len(data_names) != len(file_names):
        raise DataError(
            f"{file} must have one name per class of the data ({len(data_names)}). "
            f"Got {len(file_names)} instead."
        )
    if sorted(data_names) != sorted(file_names):
        return
    for label, name in enumerate(data_names):
        if name != file_names[label]:
            raise DataError(
                f"{file} has the data's class names in another order (class {label} is {name!r} "
                "in the data). Names for whole-number labels go in label order."
            )


def refuse_numbers_as_names(classes: ClassTable, source: str) -> None:
    """Raise DataError if class names are numbers that differ from the class labels.

    This function is for data with numeric labels. With such class names, it is not clear what a
    label means: a class name, or a line number in the classes file.
    """
    names = classes.names
    has_other_labels = classes.data_names != names  # a file with lines number<TAB>name is clear
    are_numbers = all(map(str.isdecimal, names))
    if has_other_labels or not are_numbers:
        return
    labels = list(range(len(names)))
    are_labels = [int(name) for name in names] == labels
    if are_labels:
        return
    listed_names = _list_names(names)
    raise DataError(
        f"{source}: labels are numbers, and so are the classes ({listed_names}). Is a label "
        "a name, or a line of the classes file, counted from 0? Make the labels such numbers, and "
        "write number<TAB>name in that file."
    )


def _is_utf8(name: str) -> bool:
    """Return whether a name can be encoded in UTF-8.

    Surrogates cannot be encoded. Python puts surrogates in place of bytes that are not UTF-8.
    """
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _list_names(names: Sequence[str]) -> str:
    """Return a text for a message: the first names, and the number of further names."""
    first_names = ", ".join(repr(name) for name in names[:MAX_LISTED])
    n_more = len(names) - MAX_LISTED
    if n_more > 0:
        return f"{first_names} and {n_more} more"
    return first_names
