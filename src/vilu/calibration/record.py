"""``risk.json``: what was promised, on which rows, for which predictor; it lies beside ``predictor.json``."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from vilu.artifacts.disk import file_hash, write_bytes
from vilu.artifacts.documents import Document, digest, identity, read_document
from vilu.artifacts.tables import parquet_bytes
from vilu.calibration.anytime import log_evidence
from vilu.calibration.label_sets import LabelSets
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
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError, ProvenanceError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.seen import candidates_of, same_candidates
from vilu.predictors.persistence.record import RECALIBRATE, RISK, ROWS, fit_fingerprint

Rule = Selector | BatchSelector


class Record(Document):
    """The calibration of a predictor."""

    again = RECALIBRATE
    fault = DataError

    kind: Literal["risk"] = "risk"
    vilu: str = Field(default_factory=partial(version, "vilu"))  # version that made it
    predictor: (
        str  # hash of the predictor, its weights and its calibrator; not of the vilu that loads it
    )
    n_candidates: int | None  # number of candidates that the rows had; None for pools
    classes: str | None  # hash of their names; None where they have none
    pool_size: int | None  # pairs of a pool; None for classes
    source: str  # fingerprint of the calibration data
    dataset: str | None  # their name
    split: str | None  # name of their part
    n: int = Field(ge=0)  # calibration rows with an uncertainty and a known failure
    rows_sha256: str  # of ``calibration.parquet``, the calibration rows as ``vilu.Outcomes``
    promise: str | None  # what the rule promises, in words
    # accepts or abstains; None when only probabilities were calibrated
    rule: Annotated[Rule, Field(discriminator="kind")] | None
    label_sets: LabelSets | None = None  # sets of labels; None without
    inputs: str | None = None  # digest of everything that it was made from; None in a triage
    # sketch of the candidates' texts (``candidates_of``); None for pools
    texts: tuple[float, ...] | None = None
    # places of calibration rows that the rule leaves out, as they are near copies of others
    near_copies: tuple[Annotated[int, Field(ge=0)], ...] = ()
    # for so many targets these rows were looked at; None: for this one alone
    looks: int | None = Field(default=None, ge=2)

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

    def require_candidates(self, data: EmbeddingSource) -> None:
        """Refuse rows with other candidates: another problem, of which nothing was promised."""
        mine, theirs = (
            {name: getattr(self, name) for name in ("n_candidates", "classes", "pool_size")},
            problem(data),
        )
        apart = mine != theirs and _in_words(theirs)
        if not apart and not same_candidates(vars(self), candidates_of(data)):
            apart = "the same names in other prompts"
        if apart:
            raise ProvenanceError(
                f"the predictor was calibrated on rows with {_in_words(mine)}, and these have {apart}: its "
                f"thresholds say nothing of them. {RECALIBRATE} on rows like these, or remove {RISK}."
            )


def problem(data: EmbeddingSource) -> dict[str, Any]:
    """What a promise depends on beside the rows: how many candidates there are, and which."""
    names, pools = data.class_names, data.pool_size
    return {
        "n_candidates": data.n_candidates if pools is None else None,
        "classes": None if names is None else digest(list(names)),
        "pool_size": pools,
    }


def _in_words(found: dict[str, Any]) -> str:
    if found["pool_size"] is not None:
        return f"pools of {found['pool_size']}"
    return f"{found['n_candidates']} candidates (names {found['classes'] or 'unknown'})"


def save(folder: Path, rows: Outcomes, **fields: object) -> Record:
    """Write the calibration rows, and the record that vouches for them last."""
    content = parquet_bytes(*rows.table())
    write_bytes(folder / ROWS, content)
    record = Record.model_validate({**fields, "rows_sha256": hashlib.sha256(content).hexdigest()})
    record.write(folder / RISK)
    return record


def promises(rule: Rule | LabelSets | None) -> bool:
    """Whether a rule promises anything: one that accepts nothing does not."""
    return rule is not None and (not isinstance(rule, Selector) or rule.feasible)


def has_record(folder: Path) -> bool:
    """Whether a predictor's folder holds a calibration."""
    return (folder / RISK).is_file()


def has_guarantee(folder: Path) -> bool:
    """Whether anything is promised of the predictor in a folder; errors as ``load``."""
    return has_record(folder) and load(folder).guarantee is not None


def load(folder: str | Path) -> Record:
    """The record in a predictor's folder: of the predictor that lies there, and what its calibration rows lead to."""
    path = Path(folder) / RISK
    if not path.is_file():
        raise DataError(f"{folder} is not calibrated. Run `vilu calibrate` first.")
    found, fingerprint = read_document(path, Record), fit_fingerprint(folder)
    if found.predictor != fingerprint:
        raise ProvenanceError(
            f"{path} was made for the predictor {found.predictor}, and {folder} holds {fingerprint}: its thresholds "
            f"say nothing here. {RECALIBRATE}, or remove the file."
        )
    rows = load_rows(folder, found)
    wrong = (
        f"it counts {found.n} calibration rows" if found.n != int(rows.evaluable.sum()) else None
    )
    if wrong is None and found.rule is not None:
        standing = np.ones(len(rows), np.bool_)
        inside = [row for row in found.near_copies if row < len(rows)]
        standing[inside] = False
        wrong = contradiction(found.rule, rows.take(standing))
        if len(inside) < len(found.near_copies):
            wrong = "it leaves out rows that are not there"
    if wrong is not None:
        raise DataError(
            f"{path} is damaged: {wrong}, which {ROWS} does not bear out. {RECALIBRATE}."
        )
    return found


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


def load_rows(folder: str | Path, record: Record) -> Outcomes:
    """The calibration rows behind a record; DataError if they are missing, or others than it names."""
    path = Path(folder) / ROWS
    if not path.is_file():
        raise DataError(f"{path} is missing. {RECALIBRATE}.")
    if file_hash(path) != record.rows_sha256:
        raise DataError(f"{path} does not hold the rows that {RISK} names. {RECALIBRATE}.")
    return Outcomes.load(path)
