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
from vilu.artifacts.documents import Document, identity, read_document
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import parquet_bytes
from vilu.calibration.anytime import Draw, Looks
from vilu.calibration.label_sets import LabelSets, named_sets
from vilu.calibration.rules import ALL, OTHER, Rule, group_names, rule_at_any_time, rule_of
from vilu.calibration.target import Target
from vilu.calibration.thresholds import Threshold
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError, ProvenanceError, ViLUError
from vilu.metrics.counts import Floats
from vilu.outcomes.decisions import ABOVE, ACCEPT, OUTSIDE_REASON, REVIEW
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.probability import Calibrator
from vilu.predictors.contract.seen import candidates_of, same_candidates
from vilu.predictors.persistence.description import RECALIBRATE, fit_fingerprint
from vilu.predictors.persistence.files import RISK, ROWS

ROUNDING = 1e-9
"""Bounds are compared up to this: another SciPy may round them otherwise."""


class Calibration(Document):
    """What labelled rows showed of a predictor: rule, probabilities, label sets, and their origin.

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
        guarantee_text: What the rule guarantees, in words.
        target: What was asked for.
        rule: Accepts, or leaves for review; None where only probabilities were calibrated.
        probability: From scores to probabilities of failure.
        label_sets: Sets of labels; None without.
        draws: Per group what was fixed before labels that came one after another were looked at.
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

    kind: Literal["risk"] = "risk"
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
    # the key of every risk.json since 0.2.0, which are read for ever
    guarantee_text: str | None
    target: Target
    rule: Rule | None
    probability: Annotated[Calibrator, Field(discriminator="form")]
    label_sets: LabelSets | None = None
    draws: dict[str, Draw] | None = None
    inputs: str | None = None
    texts: tuple[float, ...] | None = None
    near_copies: tuple[Annotated[int, Field(ge=0)], ...] = ()
    looks: int | None = Field(default=None, ge=2)

    _rows: Outcomes = PrivateAttr()

    def __eq__(self, other: object) -> bool:
        """Whether two say the same; of the rows they have the hash."""
        if not isinstance(other, Calibration):
            return False
        return vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The calibration in a predictor's folder, if it is of it and its rows lead to it.

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
                f"{fingerprint}: its thresholds say nothing here. {RECALIBRATE}, or remove the "
                "file."
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
        """Hash of the guarantee, its predictor and its data; scores and monitors carry it.

        Not of the version of vilu, nor of the bytes of the rows' file, in which pyarrow's stands.
        """
        return identity(self.model_dump(mode="json"), "rows_sha256")

    @property
    def guarantee(self) -> Rule | LabelSets | None:
        """What is guaranteed of accepted answers, else of label sets; None where nothing is."""
        rule = self.label_sets if self.rule is None else self.rule
        return rule if has_guarantee(rule) else None

    @property
    def has_rule(self) -> bool:
        """Whether it decides what is accepted."""
        return self.rule is not None

    @property
    def needs_batch(self) -> bool:
        """Whether its rule judges all rows of a batch together."""
        return self.rule is not None and self.rule.needs_batch

    def require_match(self, predictor: FailurePredictor, data: EmbeddingSource) -> None:
        """Refuse another predictor, and rows with other candidates: for them nothing is guaranteed.

        Raises:
            ProvenanceError: If either is another one.
        """
        if predictor.calibrator_ != self.probability:
            raise ProvenanceError(
                f"the calibration is of another predictor than this {predictor.name}, or this one "
                "was loaded before it was calibrated. Load both from one folder."
            )
        if predictor.answer != self.rows.answer:
            raise ProvenanceError(
                f"the calibration rows judge {self.rows.answer} answers, and this "
                f"{predictor.name} judges {predictor.answer} ones: nothing is guaranteed of them. "
                f"{RECALIBRATE}."
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
        """The label sets of a batch; None without sets, or without uncertainty (one candidate)."""
        if self.label_sets is None or len(batch.text) < 2:
            return None
        return named_sets(self.label_sets.of(predictor, batch, uncertainty), class_names)

    def decide(self, outcomes: Outcomes, ood: NDArray[np.bool_] | None = None) -> Outcomes:
        """The outcomes with a decision of every row, and why it is not accepted.

        Without a rule they stay as they are.

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
            ('accept', 'review')
        """
        if self.rule is None:
            return outcomes
        groups = group_names(outcomes) if self.rule.grouped_by == "prediction" else None
        reasons = self.rule.reasons(outcomes.uncertainty, groups)
        if ood is not None:
            for row in np.flatnonzero(ood).tolist():
                if reasons[row] == ABOVE:
                    reasons[row] = OUTSIDE_REASON
        decisions = [ACCEPT if reason is None else REVIEW for reason in reasons]
        # a row without an uncertainty was not judged: its reason is why it has none
        for row in np.flatnonzero(np.isnan(outcomes.uncertainty)).tolist():
            decisions[row] = REVIEW
            reasons[row] = None if outcomes.reason is None else outcomes.reason[row]
        return dataclasses.replace(outcomes, decision=decisions, decision_reason=reasons)

    def _contradiction(self) -> str | None:
        """What it says that its rows and its target do not lead to; None where they do."""
        n = int(self.rows.evaluable.sum())
        if self.n != n:
            return f"it counts {self.n} calibration rows"
        if max(self.near_copies, default=-1) >= len(self.rows):
            return "it leaves out rows that are not there"
        has_rule = self.rule is not None
        if self.target.has_rule != has_rule:
            return "its rule is not what was asked for"
        if self.rule is None:
            return None
        try:
            rule = self._recomputed()
        except ViLUError as error:
            return f"it has a rule ({error})"
        return _difference(self.rule, rule)

    def _recomputed(self) -> Rule:
        """The rule that the rows which it is made from and the target lead to."""
        counts = np.ones(len(self.rows), np.bool_)
        counts[list(self.near_copies)] = False
        rows = self.rows.take(counts)
        if self.target.method == "anytime":
            return self._recomputed_from_draws(rows)
        return rule_of(rows, self.target, "prediction" if self.target.per_class else None)

    def _recomputed_from_draws(self, rows: Outcomes) -> Rule:
        """That of labels which came one after another."""
        draws = self.draws or {}
        max_risk = self.target.max_risk or 0.0
        if sum(draw.delta for draw in draws.values()) > 1 - self.target.confidence + ROUNDING:
            raise DataError("its levels are more than the confidence leaves")
        groups: dict[str, tuple[Looks, Outcomes]] = {}
        names = group_names(rows) if self.target.per_class else [ALL] * len(rows)
        group_of = np.array([name if name in draws else OTHER for name in names], dtype=object)
        for name, draw in draws.items():
            groups[name] = draw.looks(max_risk), rows.take(group_of == name)
        return rule_at_any_time(groups, max_risk, self.target.confidence)


def _difference(rule: Rule, recomputed: Rule) -> str | None:
    """What a rule says otherwise than the one that was computed again.

    None where they are the same.
    """
    if rule.thresholds.keys() != recomputed.thresholds.keys():
        return f"it has thresholds for {', '.join(rule.thresholds) or 'no group'}"
    for name, threshold in rule.thresholds.items():
        if not _same(threshold, recomputed.thresholds[name]):
            of = f" for {name!r}" if name else ""
            return f"{threshold}{of}"
    apart = {"thresholds", "counted"}
    facts = rule.model_dump(exclude=apart)
    for name, value in recomputed.model_dump(exclude=apart).items():
        if facts.get(name) != value:
            return f"its rule has another {name} than its rows and its target lead to"
    return None


def _same(threshold: Threshold, recomputed: Threshold) -> bool:
    """Whether both accept the same, with the same bound; in whatever words."""
    words = {"why", "risk_bound"}
    if threshold.model_dump(exclude=words) != recomputed.model_dump(exclude=words):
        return False
    if threshold.risk_bound is None or recomputed.risk_bound is None:
        return threshold.risk_bound is recomputed.risk_bound
    return math.isclose(threshold.risk_bound, recomputed.risk_bound, rel_tol=ROUNDING)


def _problem(data: EmbeddingSource) -> dict[str, Any]:
    """What a guarantee depends on beside the rows: how many candidates there are, and which."""
    classes = None
    if data.class_names is not None:
        classes = digest(list(data.class_names))
    n_candidates = data.n_candidates if data.pool_size is None else None
    return {"n_candidates": n_candidates, "classes": classes, "pool_size": data.pool_size}


def _in_words(problem: dict[str, Any]) -> str:
    if problem["pool_size"] is not None:
        return f"pools of {problem['pool_size']}"
    return f"{problem['n_candidates']} candidates (names {problem['classes'] or 'unknown'})"


def save_calibration(
    folder: Path, rows: Outcomes, data: EmbeddingSource, **fields: object
) -> Calibration:
    """Write the calibration rows of ``data``, and last the calibration with their hash."""
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
    return Outcomes.load(path)


def has_guarantee(rule: Rule | LabelSets | None) -> bool:
    """Whether a rule guarantees anything: one that accepts nothing does not."""
    if rule is None:
        return False
    if isinstance(rule, LabelSets):
        return True
    return rule.feasible
