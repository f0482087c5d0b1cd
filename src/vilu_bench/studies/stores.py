"""Makes and finds a study's embedding stores. All cells use the same stores."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import resources
from pathlib import Path

import numpy as np

from vilu.artifacts.disk import MANIFEST_FILE
from vilu.artifacts.documents import read_document
from vilu.artifacts.hashing import digest
from vilu.backbones.base import Backbone
from vilu.backbones.catalog import load_backbone
from vilu.backbones.zeroshot import everyday_words, expand_template_names
from vilu.datasets.base import ChosenImages, ImageDataset, ShardedDataset
from vilu.datasets.catalog import open_dataset
from vilu.errors import UsageError
from vilu.store.embed import ExtraColumns, embed
from vilu.store.manifest import Manifest
from vilu_bench.known_datasets.shift import ShiftedImages
from vilu_bench.studies.config import Config
from vilu_bench.studies.parts import Data, Role, StorePaths


def cut_images(images: ImageDataset, limit: int | None, shards: int | None) -> ImageDataset:
    """Cut a data set to ``limit`` evenly spaced images, or to the first ``shards`` tar files."""
    if isinstance(images, ShardedDataset):
        if shards is None and limit is not None:
            raise UsageError(
                f"{images.source} is in tar files, whose images are not counted in advance: "
                "limit cannot be used. Give shards = N to read the first N files."
            )
        if shards is None or shards >= len(images):
            return images
        return ChosenImages(images, range(shards), {"first_shards": shards})
    if limit is None or limit >= len(images):
        return images
    # Images are often sorted by class, so the first images have few classes. Evenly spaced images
    # have many.
    indices = evenly_spaced(len(images), limit)
    return ChosenImages(images, indices.tolist(), {"evenly_spaced": limit})


def evenly_spaced(n_rows: int, n_chosen: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Choose ``n_chosen`` evenly spaced indices from 0 to n_rows - 1, in ascending order.

    For example, 4 of 10 rows have the indices 0, 2, 5 and 7.
    """
    return np.arange(n_chosen, dtype=np.int64) * n_rows // n_chosen


PACKAGE_PREFIX = "package:"  # prefix on sources that ship with vilu
Part = tuple[str, Role]  # a data set's name, and a role


def find_stores(
    config: Config, parts: Iterable[Part], data_folder: Path, output: Path
) -> dict[Part, Path]:
    """Return each part's store folder. The store may not exist yet, and nothing is embedded."""
    folders = {}
    for part in parts:
        name, _role = part
        folders[part] = store_of(part, config.data[name], data_folder, output)
    return folders


def make_stores(
    config: Config,
    parts: Iterable[Part],
    data_folder: Path,
    output: Path,
    *,
    models: Path | None = None,
) -> dict[Part, Path]:
    """Embed missing stores, and return each part's store folder.

    An interrupted embedding is continued. If ``models`` is given, a present store must have been
    made by the model in this folder.
    """
    folders = find_stores(config, parts, data_folder, output)

    @functools.cache
    def load_model(name: str) -> Backbone:
        return load_backbone(name, models=models)

    for (name, role), folder in folders.items():
        entry = config.data[name]
        if entry.stores is not None:
            continue  # the study uses stores that the user made
        if not is_complete(folder):
            backbone = load_model(entry.backbone)
            _embed(entry, role, data_folder, folder, backbone)
        elif models is not None:
            stored_space = read_document(folder / MANIFEST_FILE, Manifest).space
            backbone = load_model(entry.backbone)
            backbone.space.require_match(
                stored_space, name=f"the model in {models}", other_name=f"{folder}"
            )
    return folders


def is_complete(folder: Path) -> bool:
    """Return whether a store exists and is finished."""
    return (folder / MANIFEST_FILE).is_file()


def require_stores(
    config: Config, parts: Iterable[Part], data_folder: Path, output: Path
) -> dict[Part, Path]:
    """Return each part's store folder.

    Raises:
        UsageError: If a store is missing.
    """
    folders = find_stores(config, parts, data_folder, output)
    missing = [part for part, folder in folders.items() if not is_complete(folder)]
    if missing:
        name, role = missing[0]
        raise UsageError(
            f"a share of the cells needs finished embeddings; {len(missing)} sets are missing, "
            f"the first is {name} ({role}). Make them all once, with --embed-only."
        )
    return folders


def store_of(part: Part, entry: Data, data_folder: Path, output: Path) -> Path:
    """Return a part's store folder.

    A ready-made store is in the folder that the data set names. Any other folder is named by a hash
    of the store's recipe, so data sets with the same recipe share a store.
    """
    name, role = part
    if entry.stores is not None:
        return _ready_made_folder(
            name, "stores", paths=entry.stores, role=role, data_folder=data_folder
        )
    columns = _columns(entry, role)
    with open_images(entry, role, data_folder) as images:
        recipe = [
            images.fingerprint,
            entry.backbone,
            _class_names(entry, images),
            (columns.features, columns.views, columns.prompts),
            *_word_lists(entry),
        ]
    source = str(entry.source).removeprefix(PACKAGE_PREFIX)
    stem = entry.dataset or Path(source).stem
    rows_in_name = "pairs" if entry.captions else role
    return output / "stores" / f"{stem}-{rows_in_name}-{digest(recipe)[:8]}"


def find_second_stores(
    config: Config, parts: Iterable[Part], data_folder: Path
) -> dict[Part, Path]:
    """Find the second models' store folders. Parts without a second model are left out."""
    folders = {}
    for name, role in parts:
        second_paths = config.data[name].second
        if second_paths is not None:
            folders[name, role] = _ready_made_folder(
                name, "second", paths=second_paths, role=role, data_folder=data_folder
            )
    return folders


def _ready_made_folder(
    name: str, key: str, paths: StorePaths, role: Role, data_folder: Path
) -> Path:
    """Return the folder where a data set has a ready-made store for a role.

    Args:
        name: Name of the data set.
        key: Key for ``paths`` in the data set's table: "stores" or "second".
        paths: The store paths by role.
        role: The role.
        data_folder: Base folder for relative paths.

    Raises:
        UsageError: If the data set names no store for the role, or if there is no folder at a
            relative path.
    """
    named_folder = getattr(paths, role)
    if named_folder is None:
        raise UsageError(
            f"data.{name} has no store of its {role} rows. Name it, as {key}.{role} = ...."
        )
    path = data_folder / str(named_folder)
    is_relative = not Path(named_folder).is_absolute()
    if is_relative and not path.is_dir():
        raise UsageError(
            f"{path} is no folder, so no store is in it. Give the folder that the paths of the "
            "study are relative to: --data FOLDER."
        )
    return path


def _embed(entry: Data, role: Role, data_folder: Path, folder: Path, backbone: Backbone) -> None:
    """Embed a role's images into a store."""
    with open_images(entry, role, data_folder) as images:
        names = _class_names(entry, images)
        columns = _columns(entry, role)
        split = _split(entry, role)
        embed(images, backbone, folder, names=names, columns=columns, split=split)


def _columns(entry: Data, role: Role) -> ExtraColumns:
    """Choose the columns to store beside the embeddings."""
    words = list(itertools.chain.from_iterable(_word_lists(entry)))
    if entry.captions:
        return ExtraColumns(features=entry.features, negatives=words)
    views = 0
    if role == "test":
        # Only test images get views. To embed views for the training images would take long.
        views = entry.views
    prompts = expand_template_names(entry.prompts)
    return ExtraColumns(features=entry.features, views=views, prompts=prompts, negatives=words)


def _word_lists(entry: Data) -> list[tuple[str, ...]]:
    """Return the word lists to store: one list if the data set sets ``negatives``, else none."""
    if not entry.negatives:
        return []
    return [everyday_words()]


def _split(entry: Data, role: Role) -> str | None:
    """Return a role's split, or None for captions, because all roles are in the same store."""
    if entry.captions:
        return None
    split: str | None = getattr(entry, role)
    return split


def _class_names(entry: Data, images: ImageDataset) -> tuple[str, ...]:
    """Return the class names for prompts. Captions have none."""
    if entry.captions:
        return ()
    names = entry.classes or images.class_names
    if names is None:
        raise UsageError(
            f"{images.source} names no classes. "
            "List them in the benchmark file, as classes = [...]."
        )
    return names


@contextmanager
def open_images(entry: Data, role: Role, data_folder: Path) -> Iterator[ImageDataset]:
    """Open a role's pictures, within the data set's limits.

    If the data set has a ``shift``, the pictures are damaged. If the data set has captions, the
    pictures for all roles are opened.
    """
    with _source_path(entry, data_folder) as path:
        split = _split(entry, role)
        images = open_dataset(
            path,
            split=split,
            # a known data set tells the reader whether the data set has captions
            captions=entry.captions and entry.dataset is None,
            where=entry.where,
            dataset=entry.dataset,
            raw_names=entry.raw_names,
        )
        limit = entry.limit_of(role)
        images = cut_images(images, limit, entry.shards)
        if entry.shift is not None:
            if isinstance(images, ShardedDataset):
                raise UsageError(
                    f"{images.source} is in tar files, whose images cannot be shifted. "
                    "Leave out shift."
                )
            images = ShiftedImages(images, entry.shift.kinds, entry.shift.severity)
        yield images


def _source_path(entry: Data, data_folder: Path) -> AbstractContextManager[Path]:
    """Return the path to a data set's images: below the data folder, or in vilu's own files."""
    source = entry.source or "."
    if not source.startswith(PACKAGE_PREFIX):
        return nullcontext(data_folder / source)
    asset = resources.files("vilu").joinpath("assets", source.removeprefix(PACKAGE_PREFIX))
    return resources.as_file(asset)
