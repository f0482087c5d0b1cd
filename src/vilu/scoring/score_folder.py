"""Scores of data of any size, in a folder: parts, receipts, manifest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vilu.artifacts.disk import MANIFEST, RUN
from vilu.artifacts.documents import Document, Model, read_document, read_json
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import parquet_bytes, read_column, read_table
from vilu.errors import UNKNOWN, DataError, ProvenanceError, StorageError
from vilu.metrics.counts import Floats, Ints, repeated_pictures
from vilu.metrics.histogram import MAX_BINS, Histogram, codes
from vilu.outcomes.outcomes import MISSING, OPTIONAL, Outcomes, Tally, facts_of
from vilu.store.ledger import AnyReceipt, Count, FileInfo, Ledger, Reopened, Vouched, content_hash
from vilu.validation import checked

AGAIN = "Run the same `vilu score` again"


class ScoreDocument(Document):
    """A file of the folder."""

    again = AGAIN


class ScoreRun(ScoreDocument):
    """Everything that decides what the folder holds; its hash is the fingerprint."""

    kind: Literal["scores"] = "scores"  # what this folder is
    predictor: str  # fingerprint of the predictor and its weights
    source: str  # fingerprint of the embeddings
    n_in: Count  # rows of the embeddings
    # how many of them are usable (and fill pools); the others come after them, without a score
    n_candidate: Count
    rows_per_part: int = Field(ge=1)  # rows of a part: whole pools, or whole batches of scoring
    method: str | None  # name of the predictor
    dataset: str | None  # name of the data set
    split: str | None  # name of its part
    seed: int | None  # seed of the predictor
    is_probability: bool  # whether the uncertainty is a probability of failure
    provenance: dict[str, Any]  # as in ``Outcomes``

    @property
    def fingerprint(self) -> str:
        """Hash over every field."""
        return digest(self.model_dump(mode="json"))

    @property
    def parts(self) -> list[ScorePart]:
        """All parts: of the rows to score in their order, then of the rows without a score."""
        size = self.rows_per_part
        ends = (self.n_candidate, self.n_in)
        cuts = [*range(0, ends[0], size), *range(*ends, size), self.n_in]
        return [ScorePart(number=i, start=a, stop=b) for i, (a, b) in enumerate(pairwise(cuts))]

    def require_same(self, other: ScoreRun, path: Path) -> None:
        """Refuse to mix two runs, naming both sides of what differs."""
        before = self.model_dump(mode="json")
        now = other.model_dump(mode="json")
        differences = [
            f"{k}: {before[k]!r} ({path}) against {now[k]!r} (now)"
            for k in before
            if before[k] != now[k]
        ]
        if differences:
            raise ProvenanceError(
                f"{path} holds the scores of another run: {'; '.join(differences)}. "
                "Give another folder, or --overwrite to replace it."
            )


class ScorePart(Model):
    """Rows ``start`` ... ``stop - 1`` in the order of scoring."""

    number: Count
    start: Count
    stop: Count

    @property
    def scores(self) -> str:
        """One row per row, as ``Outcomes.save`` writes it."""
        return f"scores/scores_{self.number:05d}.parquet"

    @property
    def histogram(self) -> str:
        """Correct and wrong answers per bin of the score."""
        return f"histograms/histogram_{self.number:05d}.parquet"

    @property
    def receipt(self) -> str:
        """Written last."""
        return f"receipts/{self.number:05d}.json"

    @property
    def files(self) -> tuple[str, ...]:
        """What the receipt vouches for."""
        return self.scores, self.histogram

    def __len__(self) -> int:
        return self.stop - self.start


class Counts(Model):
    """What became of some rows."""

    n_in: Count  # rows
    n_scored: Count  # how many of them have an uncertainty
    n_failures: Count  # how many of those are wrong
    n_unlabelled: Count  # for how many of those that is unknown
    unscored: dict[str, Count]  # the other rows, by reason
    n_seen: Count  # how many of the rows were used to fit the predictor

    @property
    def n_unscored(self) -> int:
        """Rows without an uncertainty."""
        return sum(self.unscored.values())

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        if self.n_in != self.n_scored + self.n_unscored:
            raise ValueError(
                f"n_in={self.n_in} is not n_scored + n_unscored={self.n_scored + self.n_unscored}"
            )
        if self.n_scored < self.n_failures + self.n_unlabelled:
            raise ValueError(f"n_scored={self.n_scored} is less than n_failures + n_unlabelled")
        return self

    @classmethod
    def of(cls, outcomes: Outcomes, n_seen: int) -> Self:
        """Those of some rows."""
        scored = np.isfinite(outcomes.uncertainty)
        known = outcomes.evaluable
        return cls(
            n_in=len(outcomes),
            n_scored=int(scored.sum()),
            n_failures=int(outcomes.failure[known].sum()),
            n_unlabelled=int((scored & ~known).sum()),
            unscored=dict(sorted(Counter(text for text in outcomes.reason or () if text).items())),
            n_seen=n_seen,
        )

    @classmethod
    def total(cls, several: Iterable[Counts]) -> Counts:
        """The sum."""
        names = ("n_in", "n_scored", "n_failures", "n_unlabelled", "n_seen")
        sums = dict.fromkeys(names, 0)
        unscored = Counter[str]()
        for counts in several:
            unscored.update(counts.unscored)
            for name in names:
                sums[name] += getattr(counts, name)
        return cls(unscored=dict(sorted(unscored.items())), **sums)


class ScoreReceipt(AnyReceipt, ScoreDocument):
    """Vouches for the files of a part; a part exists if and only if its receipt does."""

    fingerprint: str  # of the run
    part: ScorePart  # which rows
    counts: Counts  # what became of them
    files: dict[str, FileInfo]  # size and hash of each file


class ScoreManifest(ScoreDocument):
    """The seal of a complete folder."""

    fingerprint: str  # of the run
    n_parts: Count  # number of parts
    counts: Counts  # of all rows
    content: str  # hash over the hashes of all files

    @classmethod
    def of(cls, run: ScoreRun, receipts: list[ScoreReceipt]) -> Self:
        """The seal of these parts."""
        counts = Counts.total(receipt.counts for receipt in receipts)
        return cls(
            fingerprint=run.fingerprint,
            n_parts=len(receipts),
            counts=counts,
            content=content_hash(receipts),
        )


class ScoreLedger(Ledger[ScorePart, ScoreReceipt]):
    """What is to be done and done in a folder of scores."""

    what = "folder of scores"
    command = "vilu score"
    doing = "scoring into"
    kind = "scores"
    folders = ("receipts", "histograms", "scores")

    def __init__(self, root: Path, run: ScoreRun) -> None:
        super().__init__(root, run.fingerprint, run.parts, ScoreReceipt)
        self.run = run

    def stated_and_planned(
        self, part: ScorePart, receipt: ScoreReceipt
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """Its rows."""
        return (receipt.part, receipt.counts.n_in), (part, len(part))

    def resume(self, *, overwrite: bool) -> None:
        """See that the folder, whose lock we hold, is of this run, and remove what a killed one left half-written."""
        if (self.root / RUN).is_file():
            found = read_run(self.root)
            if overwrite and found != self.run:
                self.clear()
            else:
                found.require_same(self.run, self.root)
        self.begin(self.run, self.folders)

    def write_rows(self, part: ScorePart, rows: Ints, outcomes: Outcomes, n_seen: int) -> None:
        """Write what is said of some rows of the source, of which so many were used to fit."""
        known = outcomes.evaluable
        u = outcomes.uncertainty
        failure = outcomes.failure
        histogram = histogram_bytes(
            *(Histogram.of(u[of], failure[of]) for of in (known, known & outcomes.outside))
        )
        payloads = {part.scores: parquet_bytes(*outcomes.table(rows)), part.histogram: histogram}
        counts = Counts.of(outcomes, n_seen)
        run = self.fingerprint
        self.write(
            part,
            payloads,
            lambda files: ScoreReceipt(fingerprint=run, part=part, counts=counts, files=files),
        )


def read_run(root: Path) -> ScoreRun:
    """``run.json``, a name that other folders have, too."""
    found = read_json(root / RUN, AGAIN, StorageError)
    if found.get("kind") != "scores":
        raise DataError(f"{root / RUN} is not of a folder of scores. Make one with `vilu score`.")
    return read_document(root / RUN, ScoreRun)


COLUMNS = ("bin", "correct", "wrong")


def histogram_bytes(histogram: Histogram, outside: Histogram) -> bytes:
    """A histogram as the content of a Parquet file: one row per occupied bin, ascending.

    Where some rows are of none of the classes, a column ``outside`` says how many of the wrong
    ones.
    """
    columns = dict(
        zip(
            COLUMNS,
            map(pa.array, (histogram.bins, histogram.correct, histogram.wrong)),
            strict=True,
        )
    )
    if outside.n:
        columns["outside"] = pa.array(histogram.rows_of_part(outside))
    ends = [histogram.low, histogram.high] if histogram.n else None
    return parquet_bytes(columns, {"kind": "histogram", "level": histogram.level, "ends": ends})


def read_histogram(root: Path, receipt: ScoreReceipt) -> tuple[Histogram, Histogram]:
    """The counts of a part, checked against its receipt: of all its rows, and of those of none of the classes."""
    path = Vouched(root, [receipt])(receipt.part.histogram)
    counts = receipt.counts
    table, metadata = read_table(path, ())
    level = metadata.get("level")
    ends = metadata.get("ends")
    names = [name for name in table.column_names if name != "outside"]
    if names != list(COLUMNS) or any(c.type != pa.int64() or c.null_count for c in table.columns):
        raise _damaged(path, f"its columns are {table.schema.names}")
    if not isinstance(level, int) or not 0 <= level < 64 or not _are_ends(ends):
        raise _damaged(path, f"its level is {level!r} and its ends are {ends!r}")
    low, high = ends if isinstance(ends, list) else (math.inf, -math.inf)
    bins, correct, wrong = (table[name].to_numpy() for name in COLUMNS)
    histogram = Histogram(bins, correct, wrong, level, low, high)
    outside = (
        table["outside"].to_numpy() if "outside" in table.column_names else np.zeros_like(wrong)
    )
    if not bool(((outside >= 0) & (outside <= wrong)).all()):
        raise _damaged(path, "more rows of none of the classes than wrong ones are in a bin")
    counted = (histogram.n, histogram.n_failures)
    expected = (counts.n_scored - counts.n_unlabelled, counts.n_failures)
    if counted != expected or not _in_order(histogram) or (ends is None) != (len(bins) == 0):
        raise _damaged(path, f"it counts {counted} rows and failures, its receipt {expected}")
    return histogram, histogram.counted(np.zeros_like(correct), outside)


def _are_ends(ends: object) -> bool:
    numbers = ends if isinstance(ends, list) and len(ends) == 2 else [None]
    return ends is None or all(isinstance(x, float) and math.isfinite(x) for x in numbers)


def _in_order(histogram: Histogram) -> bool:
    """Whether the bins are such as a histogram has: ascending, none empty, the outer ones with the ends in them."""
    bins = histogram.bins
    correct = histogram.correct
    wrong = histogram.wrong
    if not len(bins):
        return True
    first, last = codes(np.array([histogram.low, histogram.high])) >> histogram.level
    occupied = min(int(count.min()) for count in (correct, wrong, correct + wrong - 1)) >= 0
    ascending = len(bins) <= MAX_BINS and bool((np.diff(bins) > 0).all())
    return ascending and occupied and bool(first == bins[0]) and bool(last == bins[-1])


def _damaged(path: Path, what: str) -> StorageError:
    return StorageError(f"{path} is no histogram: {what}. {AGAIN} into a new folder.")


EvaluableRows = tuple[Floats, Ints, NDArray[np.bool_], Ints | None]
"""Uncertainty, failure, whether it is of none of the classes, and picture, where that is known."""

COMPARED = 2**24
"""Identities of pictures that are compared at a time, 128 MB."""


def _or_unknown(picture: Ints | None, n: int) -> Ints:
    return np.full(n, UNKNOWN) if picture is None else picture


class ScoreFolder(Reopened):
    """What ``score_parts`` wrote; ``vilu.evaluate`` takes it like ``Outcomes``, whatever its size.

    Opening reads the documents and checks that every file is there with its size. The bytes of a
    file are compared with its receipt when it is first read; ``verify`` reads all. Pickled, it is
    its path, as a store is.

    Raises:
        DataError: If the folder holds no scores, or is not complete.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together, or another schema wrote them.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> data = vilu.Embeddings(np.eye(4), np.eye(4)[:2], [0, 1, 0, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = vilu.score_parts(vilu.MCM(), data, folder)
        ...     scores = vilu.ScoreFolder(folder)  # in any other process
        ...     scores.verify()
        ...     print(
        ...         len(scores),
        ...         scores.outcomes().failure.tolist(),
        ...         scores.tally().scores.n_failures,
        ...     )
        4 [0, 0, 0, 1] 1
    """

    @checked
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        ScoreLedger.require_begun(self.path)
        self.run = read_run(self.path)
        ScoreLedger.require_sealed(self.path)
        manifest = read_document(self.path / MANIFEST, ScoreManifest)
        self._ledger = ScoreLedger(self.path, self.run)
        self._receipts = self._ledger.receipts()
        if manifest != ScoreManifest.of(self.run, self._receipts):
            raise ProvenanceError(
                f"{self.path / MANIFEST} seals other parts than the folder holds. {AGAIN}."
            )
        self.counts: Counts = manifest.counts  # what became of the rows
        self.seal = digest(manifest.model_dump(mode="json"))

    def __len__(self) -> int:
        return self.run.n_in

    def __repr__(self) -> str:
        return f"ScoreFolder({str(self.path)!r}, n_in={self.counts.n_in}, n_scored={self.counts.n_scored})"

    @property
    def histogram(self) -> Histogram:
        """Correct and wrong answers per bin of the score, of all rows that have a score and a known failure."""
        return self._histograms[0]

    @cached_property
    def _histograms(self) -> tuple[Histogram, Histogram]:
        """That, and the one of the rows of none of the classes alone."""
        outside = [
            Histogram.empty()
        ]  # what all of them are so far: no more is in memory than two of each

        def parts() -> Iterator[Histogram]:
            for receipt in self._receipts:
                every, strangers = read_histogram(self.path, receipt)
                outside.append(outside.pop() + strangers)
                yield every

        return Histogram.total(parts()), outside[0]

    def tally(self) -> Tally:
        """What ``vilu.evaluate`` needs: histograms, or the rows in memory where some show one picture.

        To know that, the identities of the pictures are read, at most ``COMPARED`` of them at a
        time. Rows take about 33 bytes each.
        """
        if self._has_repeats():
            return self._tally_of_rows()
        scores, outside = self._histograms
        return Tally(
            scores=scores,
            within=scores.without(outside) if outside.n else scores,
            outside=scores.against(outside),
            probability=self.histogram if self.run.is_probability else None,
            n_unlabelled=self.counts.n_unlabelled,
            n_unusable=self.counts.n_unscored,
            **facts_of(self.run),
        )

    def _has_repeats(self) -> bool:
        """Whether some rows with a score and a known failure show one picture."""
        n_passes = -(-self.counts.n_scored // COMPARED)
        for number in range(n_passes):
            pictures = [
                picture[picture % n_passes == number]
                for *_, picture in self._evaluable_parts()
                if picture is not None
            ]
            compared = np.concatenate([np.empty(0, np.int64), *pictures])
            if repeated_pictures(compared) is not None:
                return True
        return False

    def _tally_of_rows(self) -> Tally:
        """The counts of rows (N,), which know their pictures."""
        columns = [
            (u, failure, outside, _or_unknown(picture, len(u)))
            for u, failure, outside, picture in self._evaluable_parts()
        ]
        uncertainty, failure, outside, picture = map(np.concatenate, zip(*columns, strict=True))
        rows = Outcomes(
            uncertainty,
            failure,
            outside=outside,
            picture=picture,
            is_probability=self.run.is_probability,
            **facts_of(self.run),
        )
        return replace(
            rows.tally(),
            n_unlabelled=self.counts.n_unlabelled,
            n_unusable=self.counts.n_unscored,
        )

    def _evaluable_parts(self) -> Iterator[EvaluableRows]:
        """The rows of every part that have a score and a known failure."""
        files = Vouched(self.path, self._receipts)
        for receipt in self._receipts:
            path = files(receipt.part.scores)
            part = Outcomes.load(path)
            known = part.evaluable
            picture = None if part.picture is None else part.picture[known]
            yield part.uncertainty[known], part.failure[known], part.outside[known], picture

    def outcomes(self) -> Outcomes:
        """Every row in memory, in the order of the data: for data that fit, what ``vilu.score`` gives.

        Raises:
            StorageError: If a file is damaged.
            DataError: If a file is not such a table, or its rows are not those of the data.
        """
        files = Vouched(self.path, self._receipts)
        paths = [files(receipt.part.scores) for receipt in self._receipts]
        parts = [Outcomes.load(path) for path in paths]
        ids = [
            read_column(path, read_table(path, ())[0], "row_id", "int64").to_numpy()
            for path in paths
        ]
        row_id = np.concatenate(ids)
        order = np.argsort(row_id, kind="stable")
        if not np.array_equal(row_id[order], np.arange(len(self))):
            raise DataError(
                f"the parts of {self.path} do not hold the rows 0 to {len(self) - 1} once each. "
                f"{AGAIN}."
            )
        optional = {name: _joined(parts, name, kind, order) for name, kind in OPTIONAL.items()}
        optional["reason"] = optional["reason"] or [None] * len(order)
        return Outcomes(
            uncertainty=np.concatenate([part.uncertainty for part in parts])[order],
            failure=np.concatenate([part.failure for part in parts])[order],
            outside=np.concatenate([part.outside for part in parts])[order],
            **{name: values for name, values in optional.items() if values is not None},
            class_names=parts[0].class_names,
            **facts_of(self.run),
            is_probability=self.run.is_probability,
            provenance={**self.run.provenance, "n_seen_in_fit": self.counts.n_seen},
        )

    def verify(self) -> None:
        """Read every byte, and compare it with what was written.

        StorageError names the file that is damaged.
        """
        self._ledger.verify()


def _joined(parts: list[Outcomes], name: str, kind: str, order: NDArray[np.int64]) -> Any:  # noqa: ANN401 - by its kind
    """What the parts say of every row, in the order of the data.

    A part without it says nothing of its rows.
    """
    columns = [getattr(part, name) for part in parts]
    if all(values is None for values in columns):
        return None
    if kind == "string":
        texts = [
            text
            for part, values in zip(parts, columns, strict=True)
            for text in values or [None] * len(part)
        ]
        return [texts[place] for place in order]
    numbers = [
        np.full(len(p), MISSING[kind]) if v is None else v
        for p, v in zip(parts, columns, strict=True)
    ]
    return np.concatenate(numbers)[order]
