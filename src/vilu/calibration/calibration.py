"""``risk.json``: what labelled rows showed of a predictor, and what that was made from."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from vilu.artifacts.disk import file_hash, write_bytes
from vilu.artifacts.documents import Document, digest, identity, read_document, vouched
from vilu.artifacts.tables import parquet_bytes
from vilu.calibration.anytime import log_evidence
from vilu.calibration.label_sets import LabelSets, named_sets
from vilu.calibration.rules import (
    ALL,
    OTHER,
    Certificate,
    Selector,
    describe,
    group_names,
    interval,
)
from vilu.calibration.selection import MAX_ROWS, BatchSelector, drawn
from vilu.calibration.shares import Strata, bears_out
from vilu.calibration.thresholds import tail
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError, ProvenanceError
from vilu.metrics.counts import Floats
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.probability import Calibrator
from vilu.predictors.contract.seen import candidates_of, same_candidates
from vilu.predictors.persistence.record import RECALIBRATE, RISK, ROWS, fit_fingerprint
from vilu.scoring.score import ABOVE, ABSTAIN, ACCEPT, OUTSIDE_REASON

Rule = Selector | BatchSelector


class Calibration(Document):
    """What labelled rows showed of a predictor: a rule, probabilities, label sets, and what they were made from.

    ``vilu calibrate``, ``vilu.calibrate_predictor`` and ``vilu triage`` leave one in the folder of
    the predictor, as ``risk.json``, beside the calibration rows. It decides about scores.

    Attributes:
        vilu: Version that made it.
        predictor: Hash of the predictor, its weights and its probabilities; not of the vilu that
            loads it.
        n_candidates: Number of candidates that the rows had; None for pools.
        classes: Hash of their names; None where they have none.
        texts: Sketch of the candidates' texts; None for pools.
        pool_size: Pairs of a pool; None for classes.
        source: Fingerprint of the calibration data.
        dataset: Their name.
        split: Name of their part.
        n: Calibration rows with an uncertainty and a known failure.
        rows_sha256: Hash of ``calibration.parquet``, the calibration rows as ``vilu.Outcomes``.
        promise: What the rule promises, in words.
        rule: Accepts or abstains; None where only probabilities were calibrated.
        probability: From scores to probabilities of failure.
        label_sets: Sets of labels; None without.
        inputs: Digest of everything that it was made from; None where labels were asked for one
            after another.
        near_copies: Places of calibration rows that the rule leaves out, as they are near copies of
            others.
        looks: For so many targets these rows were looked at; None: for this one alone.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> rows = np.random.default_rng(0).normal(size=(200, 8))
        >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        >>> data = vilu.Embeddings(rows, np.eye(8), rows.argmax(axis=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = vilu.MCM().save(folder)
        ...     _ = vilu.calibrate_predictor(folder, data, vilu.Target(max_risk=0.05))
        ...     predictor, calibration = vilu.load(folder), vilu.Calibration.load(folder)
        >>> outcomes = vilu.score(predictor, data, calibration=calibration)
        >>> outcomes.decision[:2], calibration.rule.max_risk
        (('accept', 'accept'), 0.05)
    """

    again = RECALIBRATE
    fault = DataError
    later = frozenset({"inputs", "texts", "near_copies", "looks"})

    kind: Literal["risk"] = "risk"
    schema_version: Literal[2] = 2
    vilu: str = Field(default_factory=partial(version, "vilu"))
    predictor: str
    n_candidates: int | None
    classes: str | None
    pool_size: int | None
    source: str
    dataset: str | None
    split: str | None
    n: int = Field(ge=0)
    rows_sha256: str
    promise: str | None
    rule: Annotated[Rule, Field(discriminator="kind")] | None
    probability: Annotated[Calibrator, Field(discriminator="form")]
    label_sets: LabelSets | None = None
    inputs: str | None = None
    texts: tuple[float, ...] | None = None
    near_copies: tuple[Annotated[int, Field(ge=0)], ...] = ()
    looks: int | None = Field(default=None, ge=2)

    _rows: Outcomes = PrivateAttr()

    def __eq__(self, other: object) -> bool:
        """Whether two say the same; of the rows they have the hash."""
        return isinstance(other, Calibration) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The calibration in a predictor's folder, if it is of this predictor, and its rows lead to it.

        Raises:
            DataError: If there is none, or it is damaged, or its rows do not lead to it.
            ProvenanceError: If it was made for another predictor, or by another schema.

        Examples:
            >>> import tempfile, vilu
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     try:
            ...         vilu.Calibration.load(folder)
            ...     except vilu.errors.DataError as error:
            ...         print(str(error).endswith("is not calibrated. Run `vilu calibrate` first."))
            True
        """
        path = Path(folder) / RISK
        if not path.is_file():
            raise DataError(f"{folder} is not calibrated. Run `vilu calibrate` first.")
        calibration = read_document(path, cls)
        fingerprint = fit_fingerprint(folder)
        if calibration.predictor != fingerprint:
            raise ProvenanceError(
                f"{path} was made for the predictor {calibration.predictor}, and {folder} holds "
                f"{fingerprint}: its thresholds say nothing here. {RECALIBRATE}, or remove the file."
            )
        calibration._rows = _read_rows(Path(folder), calibration.rows_sha256)
        wrong = calibration._contradiction()
        if wrong is not None:
            raise DataError(
                f"{path} is damaged: {wrong}, which {ROWS} does not bear out. {RECALIBRATE}."
            )
        return calibration

    @classmethod
    def find(cls, folder: str | Path) -> Self | None:
        """As ``load``; None where the predictor in the folder is not calibrated.

        Examples:
            >>> import tempfile, vilu
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = vilu.MCM().save(folder)
            ...     print(vilu.Calibration.find(folder))
            None
        """
        if not (Path(folder) / RISK).is_file():
            return None
        return cls.load(folder)

    @property
    def rows(self) -> Outcomes:
        """The calibration rows."""
        return self._rows

    @property
    def fingerprint(self) -> str:
        """Hash of what was promised of which predictor on which data; scores and monitors carry it.

        Not of the version of vilu, nor of the bytes of the rows' file, in which pyarrow's stands.
        """
        return identity(self.model_dump(mode="json"), "rows_sha256")

    @property
    def guarantee(self) -> Rule | LabelSets | None:
        """What is promised of accepted answers, else of label sets; None where nothing is."""
        promise = self.label_sets if self.rule is None else self.rule
        return promise if promises(promise) else None

    @property
    def has_rule(self) -> bool:
        """Whether it accepts or abstains."""
        return self.rule is not None

    @property
    def needs_batch(self) -> bool:
        """Whether its rule judges all rows of a batch together."""
        return self.rule is not None and self.rule.needs_batch

    def require_match(self, predictor: FailurePredictor, data: EmbeddingSource) -> None:
        """Refuse another predictor, and rows with other candidates, of which nothing was promised.

        Raises:
            ProvenanceError: If either is another one.
        """
        if predictor.calibrator_ != self.probability:
            raise ProvenanceError(
                f"the calibration is of another predictor than this {predictor.name}, or this one "
                "was loaded before it was calibrated. Load both from one folder."
            )
        expected = {name: getattr(self, name) for name in ("n_candidates", "classes", "pool_size")}
        present = _problem(data)
        difference = None
        if expected != present:
            difference = _in_words(present)
        elif not same_candidates(vars(self), candidates_of(data)):
            difference = "the same names in other prompts"
        if difference is not None:
            raise ProvenanceError(
                f"the predictor was calibrated on rows with {_in_words(expected)}, and these have "
                f"{difference}: its thresholds say nothing of them. {RECALIBRATE} on rows like "
                f"these, or remove {RISK}."
            )

    def sets_of(
        self,
        predictor: FailurePredictor,
        batch: Batch,
        uncertainty: Floats,
        class_names: tuple[str, ...] | None,
    ) -> list[str] | None:
        """The label sets of a batch; None where there are none, or no uncertainty (one candidate)."""
        if self.label_sets is None or len(batch.text) < 2:
            return None
        return named_sets(self.label_sets.of(predictor, batch, uncertainty), class_names)

    def decide(self, outcomes: Outcomes, ood: NDArray[np.bool_] | None = None) -> Outcomes:
        """The outcomes with a decision of every row, and why it is not accepted; as they are without a rule.

        Args:
            outcomes: Scores (N,) of the predictor.
            ood: (N,) rows that are rather of none of the classes than answered wrongly: what is not
                accepted of them for its uncertainty has the reason "outside".

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> rows = np.random.default_rng(0).normal(size=(200, 8))
            >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            >>> data = vilu.Embeddings(rows, np.eye(8), rows.argmax(axis=1))
            >>> target = vilu.Target(max_risk=0.05)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = vilu.MCM().save(folder)
            ...     calibration = vilu.calibrate_predictor(folder, data, target)
            >>> calibration.decide(vilu.Outcomes([0.1, 0.9], [-1, -1])).decision
            ('accept', 'abstain')
        """
        if self.rule is None:
            return outcomes
        groups = group_names(outcomes) if self.rule.grouped_by == "prediction" else None
        reasons = self.rule.reasons(outcomes.uncertainty, groups)
        if ood is not None:
            for row in np.flatnonzero(ood).tolist():
                if reasons[row] == ABOVE:
                    reasons[row] = OUTSIDE_REASON
        is_missing = np.isnan(outcomes.uncertainty)
        for row in np.flatnonzero(is_missing).tolist():
            reasons[row] = None if outcomes.reason is None else outcomes.reason[row]
        decisions = []
        for reason, missing in zip(reasons, is_missing.tolist(), strict=True):
            is_accepted = reason is None and not missing
            decisions.append(ACCEPT if is_accepted else ABSTAIN)
        return dataclasses.replace(outcomes, decision=decisions, decision_reason=reasons)

    def _contradiction(self) -> str | None:
        """What it says that its rows do not; None where they agree."""
        n = int(self.rows.evaluable.sum())
        if self.n != n:
            return f"it counts {self.n} calibration rows"
        if self.rule is None:
            return None
        if any(row >= len(self.rows) for row in self.near_copies):
            return "it leaves out rows that are not there"
        standing = np.ones(len(self.rows), np.bool_)
        standing[list(self.near_copies)] = False
        return contradiction(self.rule, self.rows.take(standing))


def _problem(data: EmbeddingSource) -> dict[str, Any]:
    """What a promise depends on beside the rows: how many candidates there are, and which."""
    names = data.class_names
    pools = data.pool_size
    return {
        "n_candidates": data.n_candidates if pools is None else None,
        "classes": None if names is None else digest(list(names)),
        "pool_size": pools,
    }


def _in_words(problem: dict[str, Any]) -> str:
    if problem["pool_size"] is not None:
        return f"pools of {problem['pool_size']}"
    return f"{problem['n_candidates']} candidates (names {problem['classes'] or 'unknown'})"


def save_calibration(
    folder: Path, rows: Outcomes, data: EmbeddingSource, **fields: object
) -> Calibration:
    """Write the calibration rows of ``data``, and the calibration that vouches for them last."""
    content = parquet_bytes(*rows.table())
    write_bytes(folder / ROWS, content)
    facts = {
        **_problem(data),
        "predictor": fit_fingerprint(folder),
        "texts": candidates_of(data).get("texts"),
        "n": int(rows.evaluable.sum()),
        "rows_sha256": hashlib.sha256(content).hexdigest(),
    }
    calibration = Calibration.model_validate({**facts, **fields})
    calibration._rows = rows
    calibration.write(folder / RISK)
    return calibration


def _read_rows(folder: Path, sha256: str) -> Outcomes:
    """The calibration rows in a folder; DataError if they are missing, or others than these."""
    path = folder / ROWS
    if not path.is_file():
        raise DataError(f"{path} is missing. {RECALIBRATE}.")
    if file_hash(path) != sha256:
        raise DataError(f"{path} does not hold the rows that {RISK} names. {RECALIBRATE}.")
    with vouched():
        return Outcomes.load(path)


def promises(rule: Rule | LabelSets | None) -> bool:
    """Whether a rule promises anything: one that accepts nothing does not."""
    return rule is not None and (not isinstance(rule, Selector) or rule.feasible)


def contradiction(rule: Rule, rows: Outcomes) -> str | None:
    """What a rule says that the rows which it was made from do not; None where they agree."""
    keep = rows.evaluable
    uncertainty, wrong = rows.uncertainty[keep], rows.failure[keep] == 1
    if isinstance(rule, BatchSelector):
        agree = (  # earlier code took the first ones
            rule.n == len(wrong[rows])
            and list(rule.wrong) == np.sort(uncertainty[rows][wrong[rows]]).tolist()
            for rows in (drawn(len(wrong)), slice(MAX_ROWS))
        )
        return (
            None
            if any(agree)
            else f"it has {rule.n} scores, {len(rule.wrong)} of them of wrong answers"
        )
    certificates = list(rule.certificates.items())
    place = {name: index for index, (name, _) in enumerate(certificates)}
    groups = group_names(rows) if rule.grouped_by else [ALL] * len(rows)
    group = np.array(
        [place.get(name, place.get(OTHER, len(place))) for name in groups], dtype=np.int64
    )[keep]
    floor, limit = np.array([*(interval(one) for _, one in certificates), (-np.inf, -np.inf)]).T
    accepted = (uncertainty > floor[group]) & (uncertainty <= limit[group])
    last, below = np.full((2, len(limit)), -np.inf)
    np.maximum.at(last, group[accepted], uncertainty[accepted])
    too_trusted = uncertainty <= floor[group]
    np.maximum.at(below, group[too_trusted], uncertainty[too_trusted])
    counted = [
        np.bincount(group[chosen], minlength=len(limit))
        for chosen in (group >= 0, accepted, accepted & wrong)
    ]
    for index, (name, one) in enumerate(certificates):
        found, said = (
            tuple(int(count[index]) for count in counted),
            (one.n, one.n_accepted, one.n_wrong),
        )
        # thresholds of a grid were fixed before the labels, so they need not be the score of one
        reached = (
            last[index] <= limit[index] if rule.method == "anytime" else last[index] == limit[index]
        )
        ends = reached and below[index] == floor[index]
        if found != said or not ends or not _is_borne_out(rule, one):
            of = f" for {name!r}" if name else ""
            return f"{describe(one)}{of}"
    if rule.reweighted and not _shares_bear_out(rule, rows.take(keep)):
        return "the risk at the stated shares"
    return f"it leaves out {counted[0][-1]} rows" if counted[0][-1] else None


def _is_borne_out(rule: Selector, one: Certificate) -> bool:
    """Whether so few wrong answers can show the bound: necessary for every method, with all of delta."""
    if one.threshold is None or one.risk_bound is None:
        return one.threshold is None and one.risk_bound is None
    if rule.method == "crc" and rule.max_risk is not None:
        return (one.n_wrong + 1) / (one.n + 1) <= rule.max_risk == one.risk_bound
    if rule.method == "anytime":
        enough = -math.log(1 - rule.confidence) - 1e-9
        shown_by_labels = bool(log_evidence(one.n_wrong, one.n_accepted, one.risk_bound) >= enough)
        return one.risk_bound == rule.max_risk and shown_by_labels
    if rule.reweighted:
        return one.risk_bound == rule.max_risk  # and ``_shares_bear_out``
    aside = min(
        one.n_wrong, 1
    )  # the row at the threshold may be no trial, as in ``coverage_first`` and older code
    shown = float(
        tail(np.array(one.n_wrong - aside), np.array(one.n_accepted - aside), one.risk_bound)
    )
    delta = (1 - rule.confidence) / len(rule.certificates) * (1 + 1e-6)
    return one.risk_bound >= 1 or (shown <= delta and one.risk_bound <= (rule.max_risk or 1))


def _shares_bear_out(rule: Selector, rows: Outcomes) -> bool:
    """Whether a rule for stated shares accepts nothing, or what the rows show of them."""
    one = rule.certificates.get(ALL)
    if one is None or rule.max_risk is None:
        return False
    strata = Strata(rows, rule.outside_share, rule.class_shares)
    return one.threshold is None or bears_out(
        rows, strata, interval(one), rule.max_risk, 1 - rule.confidence
    )
