"""What is in a store, and whether it is sound."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from vilu.artifacts.disk import MANIFEST, RUN
from vilu.artifacts.documents import read_document
from vilu.embeddings.checks import NORM_TOLERANCE
from vilu.embeddings.columns import ANY_NORM
from vilu.errors import OUTSIDE, UNKNOWN, ViLUError
from vilu.store.documents import CAPTION, IMAGE, Receipt, Run
from vilu.store.ledger import require_hash
from vilu.store.parts import (
    ERRORS,
    Part,
    StoreLedger,
    holds_all,
    map_rows,
    metadata_schema,
    read_classes,
    read_columns,
)
from vilu.store.reader import CaptionStore, EmbeddingStore

CHUNK = 8192  # rows looked at together


@dataclass
class StoreReport:
    """Findings of ``inspect``."""

    store: str  # name of the folder
    sealed: bool  # whether it is complete and within its error budget, so that it can be read
    run: Run  # what it was made from
    parts: int  # parts in all
    deep: bool  # whether every byte was looked at
    parts_done: int = 0  # parts that are there
    n_in: int = 0  # images in the parts that are there
    n_ok: int = 0  # rows
    n_error: int = 0  # images that failed
    errors: Counter[str] = field(default_factory=Counter)  # the same by kind
    # rows of one of the classes ("inside"), of none ("outside"), and of unknown label
    labels: Counter[str] = field(default_factory=Counter)
    # what is kept beside the embeddings, with its shape: of one image, of all classes, or of the
    # model
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bytes: int = 0  # size of the parts on disk
    problems: list[str] = field(
        default_factory=list
    )  # what is wrong, one sentence each; empty if nothing is

    def add(self, receipt: Receipt) -> None:
        """Count a part."""
        self.parts_done += 1
        self.n_in += receipt.n_in
        self.n_ok += receipt.n_ok
        self.n_error += receipt.n_error
        self.errors.update(receipt.errors)
        self.bytes += sum(info.bytes for info in receipt.files.values())

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A block in which what is wrong is a finding."""
        try:
            yield
        except ViLUError as error:
            self.problems.append(str(error))

    def __str__(self) -> str:
        run, space = self.run, self.run.space
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.errors.most_common())
        unfound = "none" if self.deep else "none; --deep reads every byte"
        columns = ", ".join(
            f"{name} {' x '.join(map(str, shape))}" for name, shape in self.columns.items()
        )
        n_in = f" of {run.n_in}" if not run.shards else f" from {run.shards} shards"
        templates = ", ".join(map(repr, run.templates)) or "not known"
        classes = {"classes": f"{len(run.names)}, templates {templates}", "labels": self._labels()}
        model = f"{space.backbone or 'not known'}, {space.precision or 'precision not known'}"
        origin = (
            {}
            if run.imported is None
            else {"imported": run.imported.source or "from where is not known"}
        )
        made = "`vilu embed`" if run.imported is None else "`vilu import`"
        facts = {
            "store": f"{self.store}, {'complete' if self.sealed else f'not complete: run {made} again'}",
            "images": f"{self.n_in}{n_in} in {self.parts_done} of {self.parts} parts",
            "rows": f"{self.n_ok} x {space.embed_dim} {run.dtype}, {self.bytes / 2**20:.1f} MiB",
            "errors": f"{self.n_error}" + (f" ({kinds})" if kinds else ""),
            "data": f"{run.dataset}, split {run.split or 'not named'}",
            **origin,
            "model": f"{model}, logit scale {space.logit_scale:g}, bias {space.logit_bias:g}",
            **({"captions": "one per image"} if run.captions else classes),
            **({"columns": columns} if columns else {}),
            "fingerprint": run.fingerprint,
            "problems": "".join(f"\n  - {problem}" for problem in self.problems) or unfound,
        }
        return "\n".join(f"{name:<12} {fact}" for name, fact in facts.items())

    def _labels(self) -> str:
        counts = [
            f"{n} {kind} ({n / self.labels.total():.1%})" for kind, n in self.labels.items() if n
        ]
        named = (
            f"; outside are {', '.join(map(repr, self.run.outside))}" if self.run.outside else ""
        )
        return (", ".join(counts) or "none") + named

    def to_dict(self) -> dict[str, object]:
        """Plain JSON."""
        counts = {"errors": dict(self.errors), "labels": dict(self.labels)}
        return {**asdict(self), "run": self.run.model_dump(mode="json"), **counts}


def inspect(path: str | os.PathLike[str], *, deep: bool = False) -> StoreReport:
    """Describe a store, complete or not; what is wrong with it is reported, not raised.

    ``deep`` also reads every byte: hashes, norms, labels, keys, and that every image is a row or an
    error.
    """
    root = Path(path)
    StoreLedger.require_begun(root)
    run = read_document(root / RUN, Run)
    ledger = StoreLedger(root, run)
    report = StoreReport(
        root.resolve().name, (root / MANIFEST).exists(), run, len(ledger.parts), deep
    )
    report.columns = {
        name: shape for name, shape in run.arrays.items() if name not in {IMAGE, CAPTION}
    }
    for part in ledger.parts:
        if not report.sealed and not (root / part.receipt).exists():
            continue
        with report.noting():
            receipt = ledger.receipt(part)
            report.add(receipt)
            if deep:
                for name, info in receipt.files.items():
                    with report.noting():
                        require_hash(root / name, info.sha256, receipt.again)
                report.problems += [*_part_problems(ledger, part, receipt)]
            if not run.captions:
                report.labels.update(_label_counts(ledger, part, receipt))
    with report.noting():
        if not run.captions:
            table, _ = read_classes(root, run)
            report.columns |= {name: info.shape for name, info in table.columns.items()}
        if report.sealed and not report.problems:  # as those do who use it
            (CaptionStore if run.captions else EmbeddingStore)(root)
    return report


def _label_counts(ledger: StoreLedger, part: Part, receipt: Receipt) -> dict[str, int]:
    schema = metadata_schema(ledger.run)
    labels = read_columns(ledger.root / part.metadata, schema, ["label"], receipt.n_ok)["label"]
    known = labels.drop_null().to_numpy()
    n_outside = int(np.count_nonzero(known == OUTSIDE))
    return {"inside": len(known) - n_outside, "outside": n_outside, "unknown": labels.null_count}


def _part_problems(ledger: StoreLedger, part: Part, receipt: Receipt) -> Iterator[str]:
    root, run = ledger.root, ledger.run
    for name, shape in run.arrays.items():
        yield from _array_problems(root / part.array(name), name, (receipt.n_ok, *shape), run.dtype)
    names = ["position", "key", "label", *(["caption"] if run.captions else [])]
    good = read_columns(root / part.metadata, metadata_schema(run), names, receipt.n_ok)
    bad = read_columns(root / part.errors, ERRORS, ["position", "kind"], receipt.n_error)
    where = f"part {part.number} ({root / part.metadata}, {root / part.errors})"
    of_rows, of_errors = good["position"].to_numpy(), bad["position"].to_numpy()
    if not holds_all(run, part, np.union1d(of_rows, of_errors), receipt.n_in):
        what = "of its shards" if run.shards else f"from {part.start} to {part.stop - 1}"
        yield f"{where} does not hold every image {what} once."
    elif np.any(np.diff(of_rows) <= 0):
        yield f"{where} is not in the order of the images."
    if Counter(bad["kind"].to_pylist()) != Counter(receipt.errors):
        yield f"{where} has other kinds of errors than its receipt."
    labels = good["label"].drop_null().to_numpy()
    known = (labels != UNKNOWN) & (labels >= OUTSIDE) & (labels < len(run.names))
    if not (run.captions or known.all()):
        yield f"{where} has labels from {labels.min()} to {labels.max()} for {len(run.names)} classes."
    if len(good["key"].unique()) != len(good):
        yield f"{where} has keys more than once."


def _array_problems(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> Iterator[str]:
    rows = map_rows(path, shape, dtype)
    for start in range(0, len(rows), CHUNK):
        block = torch.from_numpy(rows[start : start + CHUNK].astype(np.float32))
        if name in ANY_NORM:
            good, virtue = torch.isfinite(block), "finite"
        else:
            good, virtue = (
                (torch.linalg.vector_norm(block, dim=-1) - 1).abs() <= NORM_TOLERANCE,
                "of unit norm",
            )
        if bad := int((~good.reshape(len(block), -1).all(dim=1)).sum()):
            yield f"{path} has {bad} rows from {start} to {start + len(block) - 1} that are not {virtue}."
