"""Describe a store, and check it for damage."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vilu.artifacts.disk import MANIFEST_FILE, RUN_FILE
from vilu.artifacts.documents import read_document
from vilu.embeddings.checks import NORM_TOLERANCE
from vilu.embeddings.columns import UNNORMALISED_COLUMNS
from vilu.errors import OUTSIDE, UNKNOWN, ViLUError
from vilu.store.ledger import require_hash
from vilu.store.manifest import CAPTION, IMAGE, Receipt, Run
from vilu.store.parts import (
    ERROR_SCHEMA,
    Part,
    StoreLedger,
    has_all_positions,
    map_rows,
    metadata_schema,
    read_classes,
    read_columns,
)
from vilu.store.reader import CaptionStore, EmbeddingStore

BLOCK_ROWS = 8192  # number of rows checked at a time


@dataclass
class StoreReport:
    """Facts about a store, with all damage found. ``inspect`` returns such a report."""

    store: str  # folder name
    # whether the store has a manifest, and so is complete and within the error budget
    sealed: bool
    run: Run  # the run with its inputs
    parts: int  # number of parts, done or not
    deep: bool  # whether all files' contents were checked
    parts_done: int = 0  # number of finished parts
    n_in: int = 0  # number of images in the finished parts
    n_ok: int = 0  # number of rows in the finished parts
    n_error: int = 0  # number of failed images in the finished parts
    errors: Counter[str] = field(default_factory=Counter)  # error kind -> number of failed images
    # label kind -> number of rows. The kinds are "inside" (a class), "outside" (outside all
    # classes) and "unknown".
    labels: Counter[str] = field(default_factory=Counter)
    # column name -> shape of the column, or for an image column the row shape
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bytes: int = 0  # size on disk of the finished parts
    # a sentence for each problem found, empty if nothing is damaged
    problems: list[str] = field(default_factory=list)

    def add(self, receipt: Receipt) -> None:
        """Add the counts in a part's receipt."""
        self.parts_done += 1
        self.n_in += receipt.n_in
        self.n_ok += receipt.n_ok
        self.n_error += receipt.n_error
        self.errors.update(receipt.errors)
        self.bytes += sum(info.bytes for info in receipt.files.values())

    @contextmanager
    def catch_problem(self) -> Iterator[None]:
        """Return a context manager: an error in the block is added to ``problems``, not raised."""
        try:
            yield
        except ViLUError as error:
            self.problems.append(str(error))

    def __str__(self) -> str:
        run = self.run
        space = run.space
        model = f"{space.backbone or 'not known'}, {space.precision or 'precision not known'}"
        facts = {
            "store": f"{self.store}, {self._state_text()}",
            "images": self._images_text(),
            "rows": f"{self.n_ok} x {space.embed_dim} {run.dtype}, {self.bytes / 2**20:.1f} MiB",
            "errors": self._errors_text(),
            "data": f"{run.dataset}, split {run.split or 'not named'}",
        }
        if run.imported is not None:
            facts["imported"] = run.imported.source or "source not known"
        facts["model"] = f"{model}, logit scale {space.logit_scale:g}, bias {space.logit_bias:g}"
        if run.captions:
            facts["captions"] = "one per image"
        else:
            templates = ", ".join(map(repr, run.templates)) or "not known"
            facts["classes"] = f"{len(run.names)}, templates {templates}"
            facts["labels"] = self._labels_text()
        if self.columns:
            facts["columns"] = self._columns_text()
        facts["fingerprint"] = run.fingerprint
        facts["problems"] = self._problems_text()
        return "\n".join(f"{name:<12} {fact}" for name, fact in facts.items())

    def _state_text(self) -> str:
        if self.sealed:
            return "complete"
        command = "`vilu embed`" if self.run.imported is None else "`vilu import`"
        return f"not complete: run {command} again"

    def _images_text(self) -> str:
        run = self.run
        if run.shards:
            images = f"{self.n_in} from {run.shards} shards"
        else:
            images = f"{self.n_in} of {run.n_in}"
        return f"{images} in {self.parts_done} of {self.parts} parts"

    def _errors_text(self) -> str:
        if not self.errors:
            return f"{self.n_error}"
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.errors.most_common())
        return f"{self.n_error} ({kinds})"

    def _columns_text(self) -> str:
        columns: list[str] = []
        for name, shape in self.columns.items():
            sizes = " x ".join(map(str, shape))
            columns.append(f"{name} {sizes}")
        return ", ".join(columns)

    def _problems_text(self) -> str:
        if self.problems:
            return "".join(f"\n  - {problem}" for problem in self.problems)
        return "none" if self.deep else "none; --deep reads every byte"

    def _labels_text(self) -> str:
        n_rows = self.labels.total()
        counts = [f"{n} {kind} ({n / n_rows:.1%})" for kind, n in self.labels.items() if n]
        labels = ", ".join(counts) or "none"
        if not self.run.outside:
            return labels
        names_outside = ", ".join(map(repr, self.run.outside))
        return f"{labels}; outside are {names_outside}"

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain JSON values."""
        # ``asdict`` makes no plain JSON values from counters and from the run
        counts = {"errors": dict(self.errors), "labels": dict(self.labels)}
        return {**asdict(self), "run": self.run.model_dump(mode="json"), **counts}


def inspect(path: str | os.PathLike[str], *, deep: bool = False) -> StoreReport:
    """Describe a store, complete or not. Damage is listed in the report.

    If ``deep`` is True, all files are read, to check their hashes, the norms, labels and keys, and
    that every image is either a row or an error.
    """
    root = Path(path)
    StoreLedger.require_begun(root)
    run = read_document(root / RUN_FILE, Run)
    ledger = StoreLedger(root, run)
    is_sealed = (root / MANIFEST_FILE).exists()
    report = StoreReport(
        store=root.resolve().name, sealed=is_sealed, run=run, parts=len(ledger.parts), deep=deep
    )
    for name, shape in run.row_shapes.items():
        if name not in {IMAGE, CAPTION}:
            report.columns[name] = shape
    for part in ledger.parts:
        # in an incomplete store, a part without a receipt is not done yet
        if is_sealed or (root / part.receipt_file).exists():
            with report.catch_problem():
                _inspect_part(ledger, part, report)
    with report.catch_problem():
        if not run.captions:
            class_table, _ = read_classes(root, run)
            for name, info in class_table.columns.items():
                report.columns[name] = info.shape
        if is_sealed and not report.problems:
            _try_to_open(root, run)
    return report


def _try_to_open(root: Path, run: Run) -> None:
    """Open a store as a user does. If the store is damaged, this raises an error."""
    if run.captions:
        CaptionStore(root)
    else:
        EmbeddingStore(root)


def _inspect_part(ledger: StoreLedger, part: Part, report: StoreReport) -> None:
    """Add a part and its damage to the report. Raise an error if the part cannot be read."""
    receipt = ledger.receipt(part)
    report.add(receipt)
    if report.deep:
        for name, info in receipt.files.items():
            # every file is checked, even if another file is damaged
            with report.catch_problem():
                require_hash(ledger.root / name, info.sha256, receipt.remedy)
        report.problems += list(_part_problems(ledger, part, receipt))
    if not ledger.run.captions:
        label_counts = _label_counts(ledger, part, receipt)
        report.labels.update(label_counts)


def _label_counts(ledger: StoreLedger, part: Part, receipt: Receipt) -> dict[str, int]:
    """Count a part's rows by label kind: "inside", "outside" or "unknown"."""
    schema = metadata_schema(ledger.run)
    table = read_columns(ledger.root / part.metadata_file, schema, ["label"], receipt.n_ok)
    labels = table["label"]
    known_labels = labels.drop_null().to_numpy()
    n_outside = int(np.count_nonzero(known_labels == OUTSIDE))
    return {
        "inside": len(known_labels) - n_outside,
        "outside": n_outside,
        "unknown": labels.null_count,
    }


def _part_problems(ledger: StoreLedger, part: Part, receipt: Receipt) -> Iterator[str]:
    """Yield a sentence for each problem in a part's content."""
    run = ledger.run
    for name, row_shape in run.row_shapes.items():
        path = ledger.root / part.array_file(name)
        yield from _array_problems(path, name, (receipt.n_ok, *row_shape), run.dtype)
    column_names = ["position", "key", "label"]
    if run.captions:
        # not used below, but reading the column checks that it is text
        column_names.append("caption")
    metadata_path = ledger.root / part.metadata_file
    errors_path = ledger.root / part.errors_file
    row_table = read_columns(metadata_path, metadata_schema(run), column_names, receipt.n_ok)
    error_table = read_columns(errors_path, ERROR_SCHEMA, ["position", "kind"], receipt.n_error)
    part_text = f"part {part.number} ({metadata_path}, {errors_path})"  # begins each sentence
    row_positions = row_table["position"].to_numpy()
    error_positions = error_table["position"].to_numpy()
    all_positions = np.union1d(row_positions, error_positions)
    if not has_all_positions(run, part, all_positions, receipt.n_in):
        images = "of its shards" if run.shards else f"from {part.start} to {part.stop - 1}"
        yield f"{part_text} does not hold every image {images} once."
    elif np.any(np.diff(row_positions) <= 0):
        yield f"{part_text} is not in the order of the images."
    if Counter(error_table["kind"].to_pylist()) != Counter(receipt.errors):
        yield f"{part_text} has other kinds of errors than its receipt."
    if not run.captions:
        labels = row_table["label"].drop_null().to_numpy()
        yield from _label_problems(labels, len(run.names), part_text)
    if len(row_table["key"].unique()) != len(row_table):
        yield f"{part_text} has keys more than once."


def _label_problems(labels: NDArray[np.int64], n_classes: int, part_text: str) -> Iterator[str]:
    """Yield a sentence about a part if a label is invalid.

    Valid labels are 0 to ``n_classes`` - 1, and -2 (outside). An unknown label is stored as null
    and not as -1, so -1 is invalid here.
    """
    is_valid = (labels != UNKNOWN) & (labels >= OUTSIDE) & (labels < n_classes)
    if not is_valid.all():
        yield (
            f"{part_text} has labels from {labels.min()} to {labels.max()} for {n_classes} classes."
        )


def _array_problems(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> Iterator[str]:
    """Yield a sentence for each block with rows that are not finite or lack unit norm."""
    rows = map_rows(path, shape, dtype)
    requirement = "finite" if name in UNNORMALISED_COLUMNS else "of unit norm"
    for start in range(0, len(rows), BLOCK_ROWS):
        block = torch.from_numpy(rows[start : start + BLOCK_ROWS].astype(np.float32))
        if name in UNNORMALISED_COLUMNS:
            is_good = torch.isfinite(block)
        else:
            norms = torch.linalg.vector_norm(block, dim=-1)
            is_good = (norms - 1).abs() <= NORM_TOLERANCE
        # a row is good if all numbers, or all views, in the row are good
        is_good_row = is_good.reshape(len(block), -1).all(dim=1)
        n_bad = int((~is_good_row).sum())
        if n_bad:
            last_row = start + len(block) - 1
            yield f"{path} has {n_bad} rows from {start} to {last_row} that are not {requirement}."
