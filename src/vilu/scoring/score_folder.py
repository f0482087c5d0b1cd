"""Score folders for data of any size, as parts with receipts and a manifest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vilu.artifacts.disk import MANIFEST_FILE, RUN_FILE
from vilu.artifacts.documents import Document, FrozenModel, read_document, read_json
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import parquet_bytes, read_column, read_table
from vilu.errors import UNKNOWN, DataError, ProvenanceError, StorageError
from vilu.metrics.counts import Floats, Ints, has_repeated_picture
from vilu.metrics.histogram import MAX_BINS, Histogram, codes_of_scores
from vilu.outcomes.outcomes import MISSING_VALUE, OPTIONAL_COLUMNS, Outcomes, Tally, identity_fields
from vilu.store.ledger import (
    AnyReceipt,
    Count,
    FileInfo,
    FileVerifier,
    Ledger,
    PickledByPath,
    content_hash,
)
from vilu.validation import checked

RERUN_ADVICE = "Run the same `vilu score` again"


class ScoreDocument(Document):
    """Content of a JSON file in a score folder."""

    remedy = RERUN_ADVICE  # advice in messages about a damaged file


class ScoreRun(ScoreDocument):
    """Description of a run: all inputs and settings that determine the folder's content."""

    kind: Literal["scores"] = "scores"  # folder kind
    predictor: str  # fingerprint of the predictor and the weights
    source: str  # fingerprint of the embeddings
    n_in: Count  # number of embedding rows
    # number of rows to score: the usable rows, or, for image-caption pairs, the usable rows in
    # whole pools
    n_candidate: Count
    # number of rows in a part: whole pools, or whole scoring batches
    rows_per_part: int = Field(ge=1)
    method: str | None  # predictor name
    dataset: str | None  # data set name
    split: str | None  # split name
    seed: int | None  # predictor seed
    answer: str  # kind of the judged answer, as in ``Outcomes``
    is_probability: bool  # whether the uncertainty is a failure probability
    provenance: dict[str, Any]  # as in ``Outcomes``

    @property
    def fingerprint(self) -> str:
        """Hash of all fields."""
        content = self.model_dump(mode="json")
        return digest(content)

    @property
    def parts(self) -> list[ScorePart]:
        """All parts: first the rows to score, in scoring order, then the unscored rows."""
        rows_per_part = self.rows_per_part
        starts_of_scored_parts = range(0, self.n_candidate, rows_per_part)
        starts_of_unscored_parts = range(self.n_candidate, self.n_in, rows_per_part)
        # a part ends where the next part starts, and the last part ends at the last row
        boundaries = [*starts_of_scored_parts, *starts_of_unscored_parts, self.n_in]
        parts = []
        for number, (start, stop) in enumerate(pairwise(boundaries)):
            part = ScorePart(number=number, start=start, stop=stop)
            parts.append(part)
        return parts

    def require_same(self, run: ScoreRun, path: Path) -> None:
        """Raise ProvenanceError if ``run`` differs from this run, which is saved in ``path``.

        The message names the fields that differ.
        """
        saved_fields = self.model_dump(mode="json")
        new_fields = run.model_dump(mode="json")
        differences = []
        for name, value in saved_fields.items():
            if value != new_fields[name]:
                differences.append(f"{name}: {value!r} ({path}) against {new_fields[name]!r} (now)")
        if differences:
            listed_differences = "; ".join(differences)
            raise ProvenanceError(
                f"{path} holds the scores of another run: {listed_differences}. "
                "Give another folder, or --overwrite to replace it."
            )


class ScorePart(FrozenModel):
    """Part of a folder: the rows ``start`` to ``stop - 1``, in the order of ``ScoreRun.parts``."""

    number: Count
    start: Count
    stop: Count

    @property
    def scores_file(self) -> str:
        """File with the row outcomes, in the format that ``Outcomes.save`` writes."""
        return f"scores/scores_{self.number:05d}.parquet"

    @property
    def histogram_file(self) -> str:
        """File that counts correct and wrong answers in every score bin."""
        return f"histograms/histogram_{self.number:05d}.parquet"

    @property
    def receipt_file(self) -> str:
        """Receipt file. The receipt is the last written file in the part."""
        return f"receipts/{self.number:05d}.json"

    @property
    def files(self) -> tuple[str, ...]:
        """The files whose hashes are in the receipt."""
        return self.scores_file, self.histogram_file

    def __len__(self) -> int:
        return self.stop - self.start


class Counts(FrozenModel):
    """Counts of scored, wrong, unlabelled and unscored rows."""

    n_in: Count  # number of rows
    n_scored: Count  # number of rows with an uncertainty
    n_failures: Count  # number of scored rows with a wrong answer
    n_unlabelled: Count  # number of scored rows with an unknown failure
    unscored: dict[str, Count]  # reason -> number of rows without an uncertainty for this reason
    n_seen: Count  # number of rows used to fit the predictor

    @property
    def n_unscored(self) -> int:
        """Number of rows without an uncertainty."""
        return sum(self.unscored.values())

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        """Raise ValueError if the counts do not add up."""
        if self.n_in != self.n_scored + self.n_unscored:
            raise ValueError(
                f"n_in={self.n_in} is not n_scored + n_unscored={self.n_scored + self.n_unscored}"
            )
        if self.n_scored < self.n_failures + self.n_unlabelled:
            raise ValueError(f"n_scored={self.n_scored} is less than n_failures + n_unlabelled")
        return self

    @classmethod
    def of(cls, outcomes: Outcomes, n_seen: int) -> Self:
        """Make the counts for some rows. ``n_seen`` of the rows were used to fit the predictor."""
        is_scored = np.isfinite(outcomes.uncertainty)
        is_evaluable = outcomes.evaluable  # scored rows with a known failure
        reasons = outcomes.reason or ()
        n_of_reason = Counter(reason for reason in reasons if reason is not None)
        return cls(
            n_in=len(outcomes),
            n_scored=int(is_scored.sum()),
            n_failures=int(outcomes.failure[is_evaluable].sum()),
            n_unlabelled=int((is_scored & ~is_evaluable).sum()),
            unscored=dict(sorted(n_of_reason.items())),
            n_seen=n_seen,
        )

    @classmethod
    def total(cls, counts_of_parts: Iterable[Counts]) -> Counts:
        """Add up the counts for several parts."""
        names = ("n_in", "n_scored", "n_failures", "n_unlabelled", "n_seen")
        sums = dict.fromkeys(names, 0)
        unscored = Counter[str]()
        for counts in counts_of_parts:
            unscored.update(counts.unscored)
            for name in names:
                sums[name] += getattr(counts, name)
        sorted_counts = dict(sorted(unscored.items()))
        return cls(unscored=sorted_counts, **sums)


class ScoreReceipt(AnyReceipt, ScoreDocument):
    """Receipt for a part, with the file hashes. A part with a receipt is complete."""

    fingerprint: str  # the run's fingerprint
    part: ScorePart  # row range
    counts: Counts  # counts for these rows
    files: dict[str, FileInfo]  # size and hash of every file


class ScoreManifest(ScoreDocument):
    """Seal for a complete folder."""

    fingerprint: str  # the run's fingerprint
    n_parts: Count  # number of parts
    counts: Counts  # counts for all rows
    content: str  # hash over all file hashes

    @classmethod
    def of(cls, run: ScoreRun, receipts: list[ScoreReceipt]) -> Self:
        """Return the seal for the parts with these receipts."""
        counts = Counts.total(receipt.counts for receipt in receipts)
        content = content_hash(receipts)
        return cls(
            fingerprint=run.fingerprint,
            n_parts=len(receipts),
            counts=counts,
            content=content,
        )


class ScoreLedger(Ledger[ScorePart, ScoreReceipt]):
    """Ledger for a score folder, with finished and missing parts."""

    # words for messages
    folder_kind = "folder of scores"
    command = "vilu score"
    activity = "scoring into"
    kind = "scores"  # ``kind`` in the folder's documents
    folders = ("receipts", "histograms", "scores")  # sub-folders

    def __init__(self, root: Path, run: ScoreRun) -> None:
        super().__init__(root, run.fingerprint, run.parts, ScoreReceipt)
        self.run = run

    def facts_of_receipt_and_plan(
        self, part: ScorePart, receipt: ScoreReceipt
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """Return (part, number of rows) from the receipt, and from the run's plan."""
        return (receipt.part, receipt.counts.n_in), (part, len(part))

    def resume(self, *, overwrite: bool) -> None:
        """Make sure that the folder belongs to this run, and remove unfinished files.

        The caller must hold the folder's lock. If the folder holds scores from another run,
        ``overwrite`` removes these scores. Without ``overwrite``, such a folder is an error.
        """
        if (self.root / RUN_FILE).is_file():
            earlier_run = read_run(self.root)
            if overwrite and earlier_run != self.run:
                self.remove_run()
            else:
                earlier_run.require_same(self.run, self.root)
        self.begin(self.run, self.folders)

    def write_part(self, part: ScorePart, rows: Ints, outcomes: Outcomes, n_seen: int) -> None:
        """Write the outcomes for a part's rows. ``n_seen`` of the rows were used in the fit."""
        is_evaluable = outcomes.evaluable
        is_evaluable_ood = is_evaluable & outcomes.outside
        histogram = Histogram.of(outcomes.uncertainty[is_evaluable], outcomes.failure[is_evaluable])
        histogram_ood = Histogram.of(
            outcomes.uncertainty[is_evaluable_ood], outcomes.failure[is_evaluable_ood]
        )
        payloads = {
            part.scores_file: parquet_bytes(*outcomes.table(rows)),
            part.histogram_file: histogram_bytes(histogram, histogram_ood),
        }
        counts = Counts.of(outcomes, n_seen)

        def make_receipt(files: dict[str, FileInfo]) -> ScoreReceipt:
            return ScoreReceipt(fingerprint=self.fingerprint, part=part, counts=counts, files=files)

        self.write_files(part, payloads, make_receipt)


def read_run(root: Path) -> ScoreRun:
    """Read the run description in a score folder."""
    # The kind is checked before the fields, because an embedding store also has a ``run.json``.
    content = read_json(root / RUN_FILE, RERUN_ADVICE, StorageError)
    if content.get("kind") != "scores":
        raise DataError(
            f"{root / RUN_FILE} belongs to no folder of scores. Make one with `vilu score`."
        )
    return read_document(root / RUN_FILE, ScoreRun)


HISTOGRAM_COLUMNS = ("bin", "correct", "wrong")  # columns in a histogram file, in order


def histogram_bytes(histogram: Histogram, histogram_ood: Histogram) -> bytes:
    """Return a histogram as Parquet content, with a row per occupied bin, ascending.

    ``histogram_ood`` is the histogram for the rows outside all classes. Every answer to such a row
    is wrong. If there are such rows, the column ``outside`` counts these rows in each bin.
    """
    columns = {
        "bin": pa.array(histogram.bins),
        "correct": pa.array(histogram.correct),
        "wrong": pa.array(histogram.wrong),
    }
    if histogram_ood.n:
        rows_outside = histogram.rows_of_part(histogram_ood)
        columns["outside"] = pa.array(rows_outside)
    ends = None  # the lowest and the highest score
    if histogram.n:
        ends = [histogram.low, histogram.high]
    return parquet_bytes(columns, {"kind": "histogram", "level": histogram.level, "ends": ends})


def read_histogram(root: Path, receipt: ScoreReceipt) -> tuple[Histogram, Histogram]:
    """Read a part's two histograms: for all rows, and for the rows outside all classes.

    The histograms are checked against the part's receipt.
    """
    verify_file = FileVerifier(root, [receipt])  # compares a file's bytes with the receipt
    path = verify_file(receipt.part.histogram_file)
    table, metadata = read_table(path, ())
    histogram = _parse_histogram(path, table, metadata)
    wrong_ood = np.zeros_like(histogram.wrong)
    if "outside" in table.column_names:
        wrong_ood = table["outside"].to_numpy()
    is_possible = (wrong_ood >= 0) & (wrong_ood <= histogram.wrong)
    if not is_possible.all():
        raise _damaged_error(path, "a bin has more rows of none of the classes than wrong answers")
    n_evaluable = receipt.counts.n_scored - receipt.counts.n_unlabelled
    # compared as texts, because the message shows these texts
    counts_in_file = f"{histogram.n} rows with {histogram.n_failures} failures"
    counts_in_receipt = f"{n_evaluable} rows with {receipt.counts.n_failures} failures"
    if counts_in_file != counts_in_receipt:
        raise _damaged_error(
            path, f"it has {counts_in_file}, but its receipt states {counts_in_receipt}"
        )
    if not _has_valid_bins(histogram):
        raise _damaged_error(path, "its bins are empty, not ascending, or do not match its ends")
    correct_ood = np.zeros_like(histogram.correct)  # every answer to such a row is wrong
    return histogram, histogram.with_counts(correct=correct_ood, wrong=wrong_ood)


def _parse_histogram(path: Path, table: pa.Table, metadata: Mapping[str, Any]) -> Histogram:
    """Return the histogram in a file's ``table``, or raise StorageError for invalid content."""
    names = [name for name in table.column_names if name != "outside"]
    has_right_names = names == list(HISTOGRAM_COLUMNS)
    has_counts = all(_is_count_column(column) for column in table.columns)
    if not (has_right_names and has_counts):
        raise _damaged_error(path, f"its columns are {table.schema.names}")
    level: Any = metadata.get("level")
    ends = metadata.get("ends")
    if table.num_rows == 0:  # an empty histogram has no ends
        has_right_ends = ends is None
    else:
        has_right_ends = _are_two_numbers(ends)
    n_bits_of_code = 64  # a level drops the lowest bits of a code
    has_right_level = isinstance(level, int) and 0 <= level < n_bits_of_code
    if not (has_right_level and has_right_ends):
        raise _damaged_error(path, f"its level is {level!r} and its ends are {ends!r}")
    low, high = ends or (math.inf, -math.inf)  # as in ``Histogram.empty``
    bins, correct, wrong = (table[name].to_numpy() for name in HISTOGRAM_COLUMNS)
    return Histogram(bins, correct, wrong, level, low, high)


def _is_count_column(column: pa.ChunkedArray) -> bool:
    """Return whether a column has a whole number in every row."""
    return bool(column.type == pa.int64() and column.null_count == 0)


def _are_two_numbers(ends: object) -> bool:
    """Return whether a value from a file is a list of two finite numbers."""
    if not isinstance(ends, list) or len(ends) != 2:
        return False
    return all(isinstance(end, float) and math.isfinite(end) for end in ends)


def _has_valid_bins(histogram: Histogram) -> bool:
    """Return whether a histogram's bins are valid.

    Valid bins are ascending and not empty. The lowest score must be in the first bin, and the
    highest score in the last bin.
    """
    bins = histogram.bins
    if not len(bins):
        return True
    steps = np.diff(bins)
    are_ascending = bool((steps > 0).all())
    if len(bins) > MAX_BINS or not are_ascending:
        return False
    is_negative = (histogram.correct < 0) | (histogram.wrong < 0)
    is_empty = histogram.correct + histogram.wrong == 0
    if is_negative.any() or is_empty.any():
        return False
    ends = np.array([histogram.low, histogram.high])
    # a bin is a score's code without the ``level`` lowest bits
    bins_of_ends = codes_of_scores(ends) >> histogram.level
    first_and_last_bin = bins[[0, -1]]
    return np.array_equal(bins_of_ends, first_and_last_bin)


def _damaged_error(path: Path, fault: str) -> StorageError:
    """Return the error for a file without a valid histogram. ``fault`` says what is wrong."""
    return StorageError(f"{path} is no histogram: {fault}. {RERUN_ADVICE} into a new folder.")


class EvaluableRows(NamedTuple):
    """Rows in a part that have a score and a known failure."""

    uncertainty: Floats
    failure: Ints
    is_ood: NDArray[np.bool_]  # whether the row is outside all classes
    # (N,) number of each row's cluster, or of its picture without clusters. None if not known
    identity: Ints | None
    has_clusters: bool  # whether the identities are of clusters
    failure_probability: Floats | None  # calibrated probability, None without a calibration

    @property
    def identity_or_unknown(self) -> Ints:
        """The identities (N,), or -1 in every row if the identities are not known."""
        if self.identity is None:
            return np.full(len(self.failure), UNKNOWN)
        return self.identity


IDENTITIES_PER_PASS = 2**23
"""Approximate number of identities compared at once. At 16 bytes each, these take 134 MB."""


class ScoreFolder(PickledByPath):
    """Score folder from ``score_parts``, accepted by ``vilu.evaluate`` like ``Outcomes``.

    Opening a folder reads the documents, and checks that every file exists and has the right size.
    When a file is first read, the file's bytes are compared with the receipt. ``verify`` compares
    all files. A pickled folder holds only the path.

    Raises:
        DataError: If the folder holds no scores, or is not complete.
        StorageError: If a file is missing or damaged. The message names the file.
        ProvenanceError: If files do not belong together, or were written with another schema.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> image = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
        >>> text = np.eye(2)
        >>> data = vilu.Embeddings(image, text, target=[0, 1, 1])  # the last answer is wrong
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = vilu.score_parts(vilu.MCM(), data, folder)
        ...     scores = vilu.ScoreFolder(folder)  # works in any other process, too
        ...     scores.outcomes().failure.tolist()
        [0, 0, 1]
    """

    @checked
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        ScoreLedger.require_begun(self.path)
        self.run = read_run(self.path)
        ScoreLedger.require_sealed(self.path)
        manifest = read_document(self.path / MANIFEST_FILE, ScoreManifest)
        self._ledger = ScoreLedger(self.path, self.run)
        self._receipts = self._ledger.receipts()
        if manifest != ScoreManifest.of(self.run, self._receipts):
            raise ProvenanceError(
                f"{self.path / MANIFEST_FILE} seals other parts than the folder holds. "
                f"{RERUN_ADVICE}."
            )
        self.counts: Counts = manifest.counts
        content = manifest.model_dump(mode="json")
        self.folder_hash = digest(content)

    def __len__(self) -> int:
        return self.run.n_in

    def __repr__(self) -> str:
        counts = f"n_in={self.counts.n_in}, n_scored={self.counts.n_scored}"
        return f"ScoreFolder({str(self.path)!r}, {counts})"

    @property
    def histogram(self) -> Histogram:
        """Histogram of correct and wrong answers over the score, for all evaluable rows.

        Evaluable rows have a score and a known failure.
        """
        histogram, _ = self._histograms
        return histogram

    @cached_property
    def _histograms(self) -> tuple[Histogram, Histogram]:
        """Two histograms: for all evaluable rows, and for the rows outside all classes."""
        total_ood = Histogram.empty()

        # A generator, so that memory never holds all histograms at once. Each part has two. The
        # generator yields the histogram for all rows, and adds the other histogram to
        # ``total_ood``.
        def histograms() -> Iterator[Histogram]:
            nonlocal total_ood
            for receipt in self._receipts:
                histogram, histogram_ood = read_histogram(self.path, receipt)
                total_ood = total_ood + histogram_ood
                yield histogram

        total = Histogram.total(histograms())
        return total, total_ood

    def tally(self) -> Tally:
        """Return the counts for ``vilu.evaluate``, from histograms or from rows.

        If two rows have the same cluster, or else the same picture, the counts come from all rows.
        Then all rows are read into memory, about 41 bytes per row. To find out, the identities are
        compared, about ``IDENTITIES_PER_PASS`` at a time.
        """
        if self._has_repeated_identities():
            return self._tally_of_rows()
        histogram, histogram_ood = self._histograms
        histogram_within = histogram
        if histogram_ood.n:
            histogram_within = histogram.without(histogram_ood)
        histogram_outside = histogram.with_part_as_wrong(histogram_ood)
        probability = self._histogram_of_calibrated_probability()
        is_calibrated = probability is not None
        if probability is None and self.run.is_probability:
            probability = histogram
        return Tally(
            scores=histogram,
            within=histogram_within,
            outside=histogram_outside,
            probability=probability,
            is_calibrated=is_calibrated,
            n_unlabelled=self.counts.n_unlabelled,
            n_unusable=self.counts.n_unscored,
            n_seen_in_fit=self.counts.n_seen,
            **identity_fields(self.run),
        )

    def _histogram_of_calibrated_probability(self) -> Histogram | None:
        """Return the histogram over the calibrated probability, or None without a calibration."""
        parts = self._evaluable_rows_of_parts()
        first_part = next(parts, None)
        if first_part is None or first_part.failure_probability is None:  # all parts are alike
            return None

        # A generator, so that memory never holds all histograms at once.
        def histograms() -> Iterator[Histogram]:
            for rows in chain([first_part], parts):
                if rows.failure_probability is not None:
                    yield Histogram.of(rows.failure_probability, rows.failure)

        return Histogram.total(histograms())

    def _has_repeated_identities(self) -> bool:
        """Return whether two evaluable rows are of the same cluster, or show the same picture."""
        n_passes = math.ceil(self.counts.n_scored / IDENTITIES_PER_PASS)
        for remainder in range(n_passes):
            # Each pass compares the identities with one remainder, after a division by the number
            # of passes. Equal identities have equal remainders, so they meet in the same pass.
            if has_repeated_picture(self._identities_with_remainder(remainder, n_passes)):
                return True
        return False

    def _identities_with_remainder(self, remainder: int, divisor: int) -> Ints:
        """Return the evaluable rows' identities with this remainder after division."""
        identities = [np.empty(0, np.int64)]  # so that there is an array if no part has identities
        for rows in self._evaluable_rows_of_parts():
            if rows.identity is not None:
                has_remainder = rows.identity % divisor == remainder
                identities.append(rows.identity[has_remainder])
        return np.concatenate(identities)

    def _tally_of_rows(self) -> Tally:
        """Return the counts for ``vilu.evaluate``, from all evaluable rows and their identities."""
        parts = list(self._evaluable_rows_of_parts())
        has_clusters = any(part.has_clusters for part in parts)
        probabilities = [
            part.failure_probability for part in parts if part.failure_probability is not None
        ]
        outcomes = Outcomes(
            np.concatenate([part.uncertainty for part in parts]),
            np.concatenate([part.failure for part in parts]),
            outside=np.concatenate([part.is_ood for part in parts]),
            picture=np.concatenate([part.identity_or_unknown for part in parts]),
            failure_probability=np.concatenate(probabilities) if probabilities else None,
            is_probability=self.run.is_probability,
            **identity_fields(self.run),
        )
        tally = outcomes.tally()
        return replace(
            tally,
            n_unlabelled=self.counts.n_unlabelled,
            n_unusable=self.counts.n_unscored,
            n_seen_in_fit=self.counts.n_seen,
            has_clusters=has_clusters,
            # With clusters, this sample consists of clusters and not of pictures. So it could not
            # be compared with the samples in other tallies.
            sample=None if has_clusters else tally.sample,
        )

    def _evaluable_rows_of_parts(self) -> Iterator[EvaluableRows]:
        """Yield each part's evaluable rows."""
        verify_file = FileVerifier(self.path, self._receipts)
        for receipt in self._receipts:
            path = verify_file(receipt.part.scores_file)
            outcomes = Outcomes.load(path)
            is_evaluable = outcomes.evaluable
            failure_probability = None
            if outcomes.failure_probability is not None:
                failure_probability = outcomes.failure_probability[is_evaluable]
            yield EvaluableRows(
                uncertainty=outcomes.uncertainty[is_evaluable],
                failure=outcomes.failure[is_evaluable],
                is_ood=outcomes.outside[is_evaluable],
                identity=outcomes.identities(is_evaluable),
                has_clusters=outcomes.cluster is not None,
                failure_probability=failure_probability,
            )

    def outcomes(self) -> Outcomes:
        """Return all rows in memory, in data order, like ``vilu.score``.

        Raises:
            StorageError: If a file is damaged.
            DataError: If a file is no outcome table, or if the parts do not hold every data row
                once.
        """
        verify_file = FileVerifier(self.path, self._receipts)
        paths = [verify_file(receipt.part.scores_file) for receipt in self._receipts]
        parts = [Outcomes.load(path) for path in paths]
        rows_of_parts = []
        for path in paths:
            table, _ = read_table(path, ())
            rows_of_parts.append(read_column(path, table, "row_id", "int64").to_numpy())
        row_id = np.concatenate(rows_of_parts)
        order = np.argsort(row_id, kind="stable")
        if not np.array_equal(row_id[order], np.arange(len(self))):
            raise DataError(
                f"the parts of {self.path} do not hold the rows 0 to {len(self) - 1} once each. "
                f"{RERUN_ADVICE}."
            )
        # ``vilu.score`` always returns a column of reasons, so this column is made even if no part
        # has it
        optional_columns: dict[str, Any] = {"reason": [None] * len(order)}
        for name, type_name in OPTIONAL_COLUMNS.items():
            column = _join_column(parts, name, type_name, order)
            if column is not None:
                optional_columns[name] = column
        return Outcomes(
            uncertainty=np.concatenate([part.uncertainty for part in parts])[order],
            failure=np.concatenate([part.failure for part in parts])[order],
            outside=np.concatenate([part.outside for part in parts])[order],
            **optional_columns,
            class_names=parts[0].class_names,
            **identity_fields(self.run),
            is_probability=self.run.is_probability,
            provenance={**self.run.provenance, "n_seen_in_fit": self.counts.n_seen},
        )

    def verify(self) -> None:
        """Read all files and compare their hashes with the receipts.

        Raises:
            StorageError: If a file is damaged. The message names the file.
        """
        self._ledger.verify()


def _join_column(
    parts: list[Outcomes],
    name: str,
    type_name: str,
    order: NDArray[np.int64],
) -> Any:  # noqa: ANN401 - the type depends on the column
    """Return the optional column ``name``, in data order, or None if no part has the column.

    ``order`` (N,) sorts the parts' joined rows into data order. If a part lacks the column, the
    part's rows get the value for "missing" in columns of this type.
    """
    columns = [getattr(part, name) for part in parts]
    if all(values is None for values in columns):
        return None
    is_text = type_name == "string"
    values_of_parts: list[Any] = []
    for part, values in zip(parts, columns, strict=True):
        if values is not None:
            values_of_parts.append(values)
        elif is_text:
            values_of_parts.append([None] * len(part))
        else:
            values_of_parts.append(np.full(len(part), MISSING_VALUE[type_name]))
    if is_text:
        texts = list(chain.from_iterable(values_of_parts))
        return [texts[row] for row in order]
    return np.concatenate(values_of_parts)[order]
