"""From a path to a data set: which reader fits, and what readers there are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from vilu.artifacts.disk import or_refuse
from vilu.datasets.base import (
    CAPTIONS_OR_CLASSES,
    Chosen,
    ImageDataset,
    Selection,
    ShardedDataset,
    WithOutside,
)
from vilu.datasets.folder import FolderDataset
from vilu.datasets.known import open_known
from vilu.datasets.layouts import find_opener
from vilu.datasets.table import open_table
from vilu.datasets.tar import SUFFIX, TarShards, find_shards
from vilu.errors import DataError, StorageError, UsageError
from vilu.validation import checked, require_at_least

DATASETS: Final[dict[str, str]] = {
    "folder": (
        "DIR/CLASS/**/IMAGE, or DIR/SPLIT/CLASS/**/IMAGE with --split; a flat folder is unlabelled"
    ),
    "csv": (
        "FILE.csv or .tsv: path (or file, filename, image_path, filepath), "
        "optionally label or caption, split, key"
    ),
    "parquet": (
        "FILE.parquet: image (encoded bytes, or struct of bytes and path) or path, "
        "and the rest as for csv"
    ),
    "tar": (
        "DIR/*.tar, FILE.tar, or 'DIR/{000..099}.tar' (webdataset): "
        "image and .txt; with --classes image and .cls"
    ),
}
"""Sources that ``open_dataset`` accepts without a name, beside the layouts of ``LAYOUTS``.

``vilu.datasets.known`` has the sets with a name.
"""

TABLES: Final = frozenset({".csv", ".tsv", ".parquet", ".pq"})


@checked
def open_dataset(  # noqa: PLR0913 - one keyword per flag of the command
    source: Path | str,
    *,
    split: str | None = None,
    limit: int | None = None,
    classes: Path | None = None,
    captions: bool = False,
    where: Mapping[str, str] | None = None,
    dataset: str | None = None,
    raw_names: bool = False,
    root: Path | None = None,
    outside: Sequence[str] = (),
) -> ImageDataset:
    """Open images with the reader that fits, or a data set by its name.

    Args:
        source: A folder, file or pattern of files laid out in one of the ways of ``DATASETS``; with
            ``dataset`` the folder that holds all data sets, or that one.
        split: Names of splits joined by ``+`` ("validation+test"); None for everything.
        limit: Keep the first ``limit`` images of the fixed order (folders are sorted by class, so
            this is no sample).
        classes: A classes file: one name per line, or ``folder<TAB>name``.
        captions: Take the captions of a table that has labels too; where there are only captions
            they are taken anyway.
        where: Keep the rows of a table that hold these values, by column ({"vendor": "google"}).
        dataset: A name in ``vilu.datasets.known.KNOWN``, such as "dtd".
        raw_names: With ``dataset``: leave class names as the data have them.
        root: Folder that the paths in a table are relative to, in place of the table's own; paths
            that are absolute or climb are fine where they end below it. Of a folder of images:
            where links may lead, too.
        outside: Names of classes (folders, labels, names for prompts), or numbers beyond the
            classes, that are none of them: they are left out of ``class_names``, and their images
            get the label -2 (``vilu.OUTSIDE``).

    Raises:
        UsageError: If an argument does not fit; the message names what there is.
        DataError: If nothing there can be read as images, or what there is contradicts itself.
        StorageError: If a folder cannot be listed.

    Examples:
        >>> import pathlib, tempfile, vilu
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
        ...         path = pathlib.Path(folder, name)
        ...         path.parent.mkdir(exist_ok=True)
        ...         Image.new("RGB", (8, 8)).save(path)
        ...     images = vilu.open_dataset(folder)
        ...     records = [(record.key, record.label) for record in images.records(0, len(images))]
        >>> images.class_names, records
        (('cat', 'dog'), [('cat/1.png', 0), ('cat/2.png', 0), ('dog/3.png', 1)])
    """
    if dataset is None:
        if raw_names:
            raise UsageError(
                "--raw-names is of a data set of the catalogue. "
                "Name one with --dataset, or leave it out."
            )
        _require_root(root)
        selection = Selection(split, classes, captions, dict(where or {}), root, tuple(outside))
        images = _open(source, selection)
    else:
        is_for_tables = captions or where or root
        if is_for_tables:
            raise UsageError(
                f"--captions, --where and --root are of tables. {dataset} is none: leave them out."
            )
        images = open_known(
            dataset,
            source,
            split=split,
            raw_names=raw_names,
            classes=classes,
            outside=tuple(outside),
        )
    if outside:
        images = WithOutside(images, outside)
    if limit is not None:
        images = _first(images, limit)
    return images


def _require_root(root: Path | None) -> None:
    """UsageError where --root is no folder."""
    if root is None:
        return
    with or_refuse("look at the folder of the images"):
        if not root.is_dir():
            raise UsageError(f"--root must be a folder that holds the images. Got {root} instead.")


def _first(images: ImageDataset, limit: int) -> ImageDataset:
    """The first images, at most ``limit``."""
    require_at_least("--limit", limit, 1)
    if isinstance(images, ShardedDataset):
        raise UsageError(
            "--limit cannot be had of tar files, whose images are not counted before. "
            "Give fewer shards."
        )
    if limit >= len(images):
        return images
    return Chosen(images, range(limit), {"limit": limit})


def _open(source: Path | str, selection: Selection) -> ImageDataset:
    """The images of a source: a table, tar files, or a folder of a layout or of images."""
    path = Path(source)
    # not by Path: a pattern can be longer than any name, which is an error to it
    if os.path.isfile(path) and path.suffix.lower() in TABLES:  # noqa: PTH113
        return open_table(path, selection)
    is_folder = os.path.isdir(path)  # noqa: PTH112
    opener = find_opener(path) if is_folder else None
    if opener is not None:
        _refuse_where(source, selection)
        _refuse_root(source, selection)
        _refuse_captions(source, selection)
        return opener(selection)
    shards = find_shards(source)
    if shards:
        _refuse_where(source, selection)
        _refuse_root(source, selection)
        return _open_shards(str(source), shards, selection)
    if not is_folder:
        raise _no_source(path)
    _refuse_where(source, selection)
    _refuse_captions(source, selection)
    return FolderDataset(
        path,
        split=selection.split,
        classes=selection.classes,
        beside=selection.root,
        outside=selection.outside,
    )


def _refuse_where(source: Path | str, selection: Selection) -> None:
    if selection.where:
        raise UsageError(f"--where chooses rows of a CSV or Parquet file. {source} is none.")


def _refuse_root(source: Path | str, selection: Selection) -> None:
    if selection.root is not None:
        raise UsageError(f"--root is of a table or a folder of images. {source} is none.")


def _refuse_captions(source: Path | str, selection: Selection) -> None:
    if selection.captions:
        raise UsageError(
            f"{source} has no captions: tables and tar files have. Leave --captions out."
        )


def _no_source(path: Path) -> UsageError | DataError:
    expected = "a folder of images, a CSV or Parquet file, or tar files"
    if not path.exists():
        return UsageError(f"{path} does not exist. Expected {expected}.")
    if not path.is_file():
        return DataError(f"{path} is no regular file. Expected {expected}.")
    return DataError(
        f"{path} is a file ending in {path.suffix or 'nothing'!r}. "
        f"Expected a folder of images, or a file ending in {', '.join(sorted({*TABLES, SUFFIX}))}."
    )


def _open_shards(source: str, shards: list[Path], selection: Selection) -> TarShards:
    if selection.split is not None:
        raise UsageError(
            f"{source} has no splits. "
            f"Leave --split {selection.split} out and name the shards of one."
        )
    if selection.captions and selection.classes is not None:
        raise UsageError(CAPTIONS_OR_CLASSES)
    for shard in shards:
        if shard.exists() and not os.access(shard, os.R_OK):
            raise StorageError(f"cannot read {shard}: permission denied.")
    return TarShards(source, shards, classes=selection.classes, outside=selection.outside)
