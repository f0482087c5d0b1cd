"""Open a data set by path or by name, with the reader for its format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from vilu.artifacts.disk import convert_os_errors
from vilu.datasets.base import (
    CAPTIONS_OR_CLASSES,
    ChosenImages,
    ImageDataset,
    ImagesWithOutside,
    Selection,
    ShardedDataset,
)
from vilu.datasets.folder import FolderDataset
from vilu.datasets.known import open_known
from vilu.datasets.layouts import find_opener
from vilu.datasets.table import open_table
from vilu.datasets.tar import TAR_SUFFIX, TarShards, find_shards
from vilu.errors import DataError, StorageError, UsageError
from vilu.validation import checked, require_at_least

SOURCE_KINDS: Final[dict[str, str]] = {
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
"""Maps a source kind for ``open_dataset`` to its description for users.

In addition, ``open_dataset`` accepts the folder layouts in ``LAYOUTS``, and opens the data sets in
``vilu.datasets.known`` by name.
"""

TABLE_SUFFIXES: Final = frozenset({".csv", ".tsv", ".parquet", ".pq"})


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
    follow_links: bool = False,
) -> ImageDataset:
    """Open images with the reader for their format, or a data set by name.

    Args:
        source: A folder, a file or a file pattern, of a kind in ``SOURCE_KINDS``. With ``dataset``,
            the folder of all data sets, or this data set's folder.
        split: Split names joined by ``+`` ("validation+test"). None for all images.
        limit: Use only the first ``limit`` images. These are not a random sample: images in folders
            are sorted by class, so the first images have few classes.
        classes: A classes file: one name per line, or ``folder<TAB>name``.
        captions: Use captions from a table that also has labels. A table with captions and without
            labels needs no option.
        where: Use only table rows with these values. For example, {"vendor": "google"} selects the
            rows with "google" in the column "vendor".
        dataset: A name in ``vilu.datasets.known.KNOWN``, such as "dtd".
        raw_names: Whether to use the data's class names unchanged. Only with ``dataset``.
        root: Folder where the paths in a table start, instead of the table's folder. Absolute paths
            and paths with ".." are then accepted if the file is below ``root``. For a folder of
            images, ``root`` is a second allowed folder for link targets.
        outside: Classes to leave out (by folder, label or name for prompts), or labels without a
            class. Images with these labels are outside all classes, and get the label -2
            (``vilu.OUTSIDE``).
        follow_links: Whether links in a folder of images may lead anywhere, also to folders. By
            default, links may lead to files below the folder or below ``root``.

    Raises:
        UsageError: If an argument does not fit the source. The message names the alternatives.
        DataError: If the source has no readable images, or is inconsistent.
        StorageError: If a folder cannot be listed.

    Examples:
        >>> import pathlib, tempfile, vilu
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for class_name in ("cat", "dog"):  # one image per class
        ...         pathlib.Path(folder, class_name).mkdir()
        ...         Image.new("RGB", (8, 8)).save(f"{folder}/{class_name}/1.png")
        ...     images = vilu.open_dataset(folder)
        >>> images.class_names
        ('cat', 'dog')
        >>> [(record.key, record.label) for record in images.records(0, 2)]
        [('cat/1.png', 0), ('dog/1.png', 1)]
    """
    if dataset is None:
        if raw_names:
            raise UsageError(
                "raw_names is for data sets of the catalogue. Name one with dataset, or leave "
                "raw_names out."
            )
        _require_root(root)
        selection = Selection(
            split=split,
            classes=classes,
            captions=captions,
            where=dict(where or {}),
            root=root,
            outside=tuple(outside),
            follow_links=follow_links,
        )
        images = _open_any_source(source, selection)
    else:
        has_table_options = captions or where or root
        if has_table_options:
            raise UsageError(
                f"--captions, --where and --root are for tables. {dataset} is no table: leave them "
                "out."
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
        images = ImagesWithOutside(images, outside)
    if limit is not None:
        images = _first_images(images, limit)
    return images


def _require_root(root: Path | None) -> None:
    """Raise UsageError if ``root`` is given, but is not a folder."""
    if root is None:
        return
    with convert_os_errors("cannot look at the folder of the images"):
        if not root.is_dir():
            raise UsageError(f"--root must be a folder that holds the images. Got {root} instead.")


def _first_images(images: ImageDataset, limit: int) -> ImageDataset:
    """Return a data set with the first ``limit`` images."""
    require_at_least("--limit", limit, 1)
    if isinstance(images, ShardedDataset):
        raise UsageError(
            "--limit does not work for tar files, since their images are not counted in advance. "
            "Give fewer shards."
        )
    if limit >= len(images):
        return images
    return ChosenImages(images, range(limit), {"limit": limit})


def _open_any_source(source: Path | str, selection: Selection) -> ImageDataset:
    """Open a table, tar files, a folder with a known layout, or a folder of images."""
    path = Path(source)
    # not Path.is_file, which raises an error if a pattern is too long for a file name
    if os.path.isfile(path) and path.suffix.lower() in TABLE_SUFFIXES:  # noqa: PTH113
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
        raise _source_error(path)
    _refuse_where(source, selection)
    _refuse_captions(source, selection)
    return FolderDataset(
        path,
        split=selection.split,
        classes=selection.classes,
        link_folder=selection.root,
        outside=selection.outside,
        follow_links=selection.follow_links,
    )


def _refuse_where(source: Path | str, selection: Selection) -> None:
    """Raise UsageError if the user chose rows with --where, but the source is not a table."""
    if selection.where:
        raise UsageError(
            f"--where chooses rows of a CSV or Parquet file. {source} is no such file."
        )


def _refuse_root(source: Path | str, selection: Selection) -> None:
    """Raise UsageError if the user gave --root, but the source does not use --root."""
    if selection.root is not None:
        raise UsageError(f"--root is for a table or a folder of images. {source} is neither.")


def _refuse_captions(source: Path | str, selection: Selection) -> None:
    """Raise UsageError if the user asked for captions, but the source cannot have captions."""
    if selection.captions:
        raise UsageError(
            f"{source} has no captions: only tables and tar files can have captions. "
            "Leave --captions out."
        )


def _source_error(path: Path) -> UsageError | DataError:
    """Return the error for a path that no reader can open."""
    expected = "a folder of images, a CSV or Parquet file, or tar files"
    if not path.exists():
        return UsageError(f"{path} does not exist. Expected {expected}.")
    if not path.is_file():
        return DataError(f"{path} is no regular file. Expected {expected}.")
    suffixes = sorted({*TABLE_SUFFIXES, TAR_SUFFIX})
    ending = f"ending in {path.suffix!r}" if path.suffix else "without an ending"
    listed_suffixes = ", ".join(suffixes)
    return DataError(
        f"{path} is a file {ending}. "
        f"Expected a folder of images, or a file ending in {listed_suffixes}."
    )


def _open_shards(source: str, shards: list[Path], selection: Selection) -> TarShards:
    """Open tar files. Raise an error for options that do not fit, and for unreadable files."""
    if selection.split is not None:
        raise UsageError(
            f"{source} has no splits. "
            f"Leave --split {selection.split} out, and give the shards of one split."
        )
    if selection.captions and selection.classes is not None:
        raise UsageError(CAPTIONS_OR_CLASSES)
    for shard in shards:
        if shard.exists() and not os.access(shard, os.R_OK):
            raise StorageError(f"cannot read {shard}: permission denied.")
    return TarShards(source, shards, classes=selection.classes, outside=selection.outside)
