"""The class table of a data set: the names that its files or labels use, and the names that prompts use."""

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

    folders: tuple[
        str, ...
    ]  # raw names: class folders, label strings, or names in the file's own table
    names: tuple[
        str, ...
    ]  # names for prompts. Classes of one name are one answer wherever their texts are compared
    cleaned: bool = (
        False  # whether ``names`` were derived from ``folders`` by turning underscores into spaces
    )

    def __post_init__(self) -> None:
        if not self.folders or len(self.folders) != len(self.names):
            raise DataError(
                f"a class table needs one prompt name per class. Got {len(self.folders)} classes, "
                f"{len(self.names)} names."
            )
        for what, names in (("class", self.folders), ("prompt", self.names)):
            if blank := [i for i, name in enumerate(names) if not name.strip()]:
                raise DataError(
                    f"{what} names must not be blank. Class {blank[0]} (counting from 0) is."
                )
            if not_text := [portable_name(name) for name in names if not _is_text(name)]:
                raise DataError(f"{what} names must be UTF-8 text. Rename: {_listed(not_text)}.")
        counts = Counter(
            self.folders if self.folders != self.names else ()
        )  # else they are of labels that count
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise DataError(
                f"class names must be distinct. Repeated: {_listed(repeated)}. Merge or rename them."
            )


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
    """The class table of a data set, from what the data says and what the user says.

    ``raw`` are the names in the data, in label order, ``names`` those of the prompts without a file
    (by default ``raw`` with underscores turned into spaces). A classes file has one name per line,
    or ``folder<TAB>name``. Its lines are in label order ``by_position`` (whole-number labels), else
    matched with ``raw``; tabbed lines always are, except where there is no ``raw``: numbers there
    are the labels ``by_position``, and of other names the lines are in label order. A file that is
    matched may leave out classes that will be taken out (``WithOutside``).
    """
    if file is None and names is not None:
        return ClassTable(tuple(raw or ()), tuple(names))
    if file is None:
        return None if raw is None else _default(raw)
    keys, prompts = read_classes(file)
    if raw is None and by_position and keys and all(map(str.isdecimal, keys)):
        raw = tuple(map(str, range(len(keys))))
        if sorted(raw) != sorted(keys):
            raise DataError(
                f"{file}: numbers before names must be the labels 0 to {len(keys) - 1}, each once."
            )
    if raw is None:
        return ClassTable(keys or prompts, prompts)
    if keys is None and by_position:
        _require_same_order(raw, prompts, file)
        return ClassTable(tuple(raw), prompts)
    if keys is None:
        known = {**{clean_name(name): name for name in raw}, **{name: name for name in raw}}
        _match(raw, known, prompts, file, outside)
        return _default(raw)
    given = dict(zip(keys, prompts, strict=True))
    _match(raw, {name: name for name in raw}, keys, file, outside)
    return ClassTable(tuple(raw), tuple(given.get(name, clean_name(name)) for name in raw))


def read_classes(file: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Left and right columns of a classes file; no left column (None) where it has one name per line.

    A byte order mark, line ends of any system (CRLF, CR) and blank lines at the end are tolerated.
    """
    try:
        text = read_file(file).decode("utf-8-sig")
    except PermissionError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}.") from error
    except OSError as error:
        raise UsageError(f"cannot read the classes file: {error}. Check --classes.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} must be UTF-8 text: {error}. Save it as UTF-8.") from error
    rows = [line.split("\t") for line in re.split(r"\r\n?|\n", text.rstrip())]
    for number, row in enumerate(rows, start=1):
        if not all(cell.strip() for cell in row):
            raise DataError(
                f"{file} line {number}: blank name. Every line is a name, or folder<TAB>name."
            )
        if len(row) > 2 or len(row) != len(rows[0]):
            cells = " and ".join(map(repr, row))
            raise DataError(
                f"{file} line {number}: {len(row)} columns, {cells}. All lines are a name, or all "
                "folder<TAB>name."
            )
    columns = [tuple(cell.strip() for cell in column) for column in zip(*rows, strict=True)]
    return (columns[0] if len(columns) == 2 else None), columns[-1]


def _default(raw: Sequence[str]) -> ClassTable:
    return ClassTable(tuple(raw), tuple(clean_name(name) for name in raw), cleaned=True)


def clean_name(name: str) -> str:
    """A name as prompts use it: spaces for underscores."""
    return name.replace("_", " ")


def _match(
    raw: Sequence[str],
    known: dict[str, str],
    given: Sequence[str],
    file: Path,
    outside: Collection[str],
) -> None:
    """Refuse a file whose names are not exactly those of the data, each written once; but for those outside."""
    if unknown := [name for name in given if name not in known]:
        question = nearest(unknown[0], known)
        hint = question and f"{question[:-1]} for {unknown[0]!r}?"
        raise DataError(
            f"{file} names classes that the data does not have: {_listed(unknown)}.{hint} Leave them "
            "out; or, if they are classes without an image here, make an empty sub-folder for each, or in a table make "
            "the labels numbers: places in this file, from 0."
        )
    counts = Counter(known[name] for name in given)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"{file} names classes more than once: {_listed(repeated)}.")
    missing = [
        name for name in raw if name not in counts and {name, clean_name(name)}.isdisjoint(outside)
    ]
    if missing:
        raise DataError(
            f"{file} leaves out classes of the data: {_listed(missing)}. Add a line for each, or say with --outside "
            "which are none of the classes."
        )


def _require_same_order(raw: Sequence[str], names: Sequence[str], file: Path) -> None:
    if len(raw) != len(names):
        raise DataError(
            f"{file} must have one name per class of the data ({len(raw)}). Got {len(names)} instead."
        )
    if list(raw) != list(names) and sorted(raw) == sorted(names):
        first = next(
            i for i, (mine, theirs) in enumerate(zip(raw, names, strict=True)) if mine != theirs
        )
        raise DataError(
            f"{file} has the data's class names in another order (class {first} is {raw[first]!r} in the data). "
            "Names for whole-number labels go in label order."
        )


def refuse_numbers(classes: ClassTable, source: str) -> None:
    """Refuse classes whose names are numbers, others than their places, where labels are: these could be either."""
    names = classes.names
    if (
        classes.folders == names
        and all(map(str.isdecimal, names))
        and [*map(int, names)] != [*range(len(names))]
    ):
        raise DataError(
            f"{source}: labels are numbers, and so are the classes ({_listed(names)}). Is a label a name, or a line of "
            "the classes file, counted from 0? Make the labels such places, and write number<TAB>name in that file."
        )


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
