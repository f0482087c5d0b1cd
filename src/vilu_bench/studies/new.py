"""Writes a new study: a benchmark file for a user's stores, to be changed by hand."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Final, NamedTuple

from vilu.errors import UNKNOWN, UsageError
from vilu.store.reader import EmbeddingStore
from vilu_bench.studies.load import parse_config

FIT_SHARE: Final = 0.5
"""Share of rows to fit on, if train and test are the same store."""

FEW_LABELS: Final = 5
"""Number of labels per class in a new study's setting ``few``."""

TEMPLATE: Final = """\
# A study that `vilu benchmark` runs. Keys and tables: docs/benchmark.md.
#
#     vilu benchmark {file} --data {folder} -o RUN              # resumes where it stopped
#     vilu benchmark {file} --data {folder} -o RUN --smoke      # everything in small, first
seeds = 3           # fits and draws of every method
resamples = 1000    # bootstrap resamples of every interval
metrics = ["auroc", "fpr95", "aurc"]

[data.{name}]
stores = {{ train = {train}, test = {test} }}    # relative to --data
{share_line}
# Which labels the methods are fitted on.
[settings.all]
kind = "labels"
title = "all labels"
{few_labels}
# Names of `vilu list predictors`. Parameters of a method: params = {{ key = value }}.
[methods.mcm]
[methods.margin]
[methods.linear_probe]
[methods.vilu_zero]
[methods.vilu_plus]

[[views]]
kind = "table"
name = "main"
title = "Failure prediction"
columns = ["setting", "metric"]
"""


class NewStudy(NamedTuple):
    """A benchmark file's text, and the folder that the paths in the text are relative to."""

    text: str
    folder: Path


def new_study(train: Path, test: Path | None, file: Path) -> NewStudy:
    """Write a study's text. The study compares the main methods on one store or on two stores.

    Without ``test``, the seed draws half of the rows in ``train`` to fit on, and the remaining half
    is tested on. The text is checked in the same way as by `vilu benchmark`.

    Args:
        train: Store with labels to fit on.
        test: Store with labels to test on. None: the other half of the rows in ``train``.
        file: Path of the file that will have this text. Comments in the text name the path.

    Raises:
        UsageError: If a store has no labels or a single class, or if the two have different
            classes.
    """
    train_store = _labelled_store(train)
    name = _toml_key(train)
    share_line = ""
    if test is None:
        test = train
        # a separate name, to keep the results apart from results on a test store
        name += "-halves"
        share_line = f"fit_share = {FIT_SHARE}    # of the rows; the others are tested on\n"
    elif _labelled_store(test).class_names != train_store.class_names:
        raise UsageError(
            f"{train} and {test} have different classes. Give two stores that were embedded with "
            "the same --classes."
        )
    folder = Path(os.path.commonpath([train.resolve().parent, test.resolve().parent]))
    text = TEMPLATE.format(
        file=file,
        folder=folder,
        name=name,
        train=_toml_path(train, folder),
        test=_toml_path(test, folder),
        share_line=share_line,
        few_labels=_few_labels_setting(train_store, is_divided=bool(share_line)),
    )
    parse_config({"name": file.stem, **tomllib.loads(text)}, str(file))
    return NewStudy(text, folder)


def _labelled_store(path: Path) -> EmbeddingStore:
    """Open a store. Raise a UsageError if the store has no labels, or only a single class."""
    store = EmbeddingStore(path)
    n_labelled = int((store.target != UNKNOWN).sum())
    if n_labelled == 0:
        raise UsageError(f"{path} has no labels. A study needs labelled images to test on.")
    if store.n_candidates < 2:
        raise UsageError(f"{path} has one class, so no answer is wrong. A study needs two or more.")
    return store


def _few_labels_setting(store: EmbeddingStore, *, is_divided: bool) -> str:
    """Write a setting with ``FEW_LABELS`` labels per class, or "" if no class has more labels."""
    labels_per_class = store.target[store.target != UNKNOWN].bincount()
    most_labels = int(labels_per_class.max())
    if is_divided:
        most_labels = int(most_labels * FIT_SHARE)
    if most_labels <= FEW_LABELS:
        return ""
    return (
        '\n[settings.few]\nkind = "labels"\n'
        f"budget = {FEW_LABELS}    # labels a class, drawn by the seed\n"
        f'title = "{FEW_LABELS} labels a class"\n'
    )


def _toml_key(path: Path) -> str:
    """Turn a folder's name into a TOML key. The key is also a part of paths."""
    folder_name = path.resolve().name
    # "my photos (2)" becomes "my_photos_2"
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", folder_name)
    return key.strip("_") or "data"


def _toml_path(path: Path, folder: Path) -> str:
    """Write a store's path below the folder as a TOML string."""
    relative_path = path.resolve().relative_to(folder)
    # JSON and TOML quote strings in the same way
    return json.dumps(relative_path.as_posix(), ensure_ascii=False)
