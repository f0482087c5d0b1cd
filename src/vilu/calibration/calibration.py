"""``risk.json``: a predictor's rule, probabilities and label sets, with the calibration data."""

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
from vilu.artifacts.documents import Document, content_digest, read_document, write_document
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import parquet_bytes
from vilu.calibration.closed_set import AnySavedTests, AnyThresholdTests, ClosedPhotos
from vilu.calibration.label_sets import LabelSets, sets_as_json
from vilu.calibration.rules import (
    ALL_ROWS_GROUP,
    OTHER_GROUP,
    Rule,
    group_names,
    make_anytime_rule,
    make_rule,
)
from vilu.calibration.target import Target
from vilu.calibration.thresholds import Threshold
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError, ProvenanceError, ViLUError
from vilu.metrics.counts import Floats
from vilu.outcomes.decisions import ABOVE, ACCEPT, NOT_COVERED, OUTSIDE_REASON, REVIEW
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.probability import Calibrator
from vilu.predictors.contract.seen import candidates_agree, describe_candidates
from vilu.predictors.persistence.description import RECALIBRATE_ADVICE, fit_fingerprint
from vilu.predictors.persistence.files import RISK, ROWS

ROUNDING_TOLERANCE = 1e-9
"""Tolerance for comparing bounds and levels: versions of SciPy may round differently."""

SCORE_TOLERANCE = 1e-6
"""Relative tolerance for a score that is computed again in a different batch."""

ADVICE_FOR_NEW_PHOTOS = (
    "For a guarantee about new photos run `vilu triage PHOTOS --about new -o FOLDER` into a new "
    "folder, with --labels and the labels.parquet of the old one."
)
"""Advice in messages, for data outside a guarantee about a folder's photos."""


class Calibration(Document):
    """Result of calibrating a predictor on labelled rows: rule, probabilities and label sets.

    ``vilu calibrate``, ``vilu.calibrate_predictor`` and ``vilu triage`` write the calibration into
    the predictor's folder as ``risk.json``, beside the calibration rows. The rule of a calibration
    decides which answers are accepted.

    Attributes:
        vilu: vilu version that made the calibration.
        predictor: Hash of the predictor with weights and probabilities. The hash does not depend on
            the vilu version that loads the predictor.
        n_candidates: Number of candidates in the calibration rows. None for pools.
        classes: Hash of the class names. None without class names.
        texts: Sketch of the candidates' texts: eight rounded numbers, which differ for other texts.
            Empty without texts. None for pools.
        pool_size: Number of pairs in a pool. None for classes.
        source: Fingerprint of the calibration data.
        dataset: Name of the data set with the calibration rows.
        split: Name of the split with the calibration rows.
        n: Number of calibration rows with an uncertainty and a known failure.
        rows_sha256: Hash of ``calibration.parquet``, the calibration rows as ``vilu.Outcomes``.
        guarantee_text: The guarantee in words. None without a rule.
        target: Target of the calibration.
        rule: Rule for accepting answers or leaving answers for review. None if only probabilities
            were calibrated.
        probability: Calibrator that turns scores into failure probabilities.
        label_sets: Label sets. None without label sets.
        draws: Test settings for every group, fixed before the first label in the group was seen.
            None if the method is not "anytime".
        inputs: Digest of all calibration inputs. None for the method "anytime".
        near_copies: Indices of near copies among the calibration rows. The rule leaves out these
            rows.
        looks: Number of looks at these rows (``vilu.calibration.looks``). None means a single look.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> image = np.random.default_rng(0).normal(size=(200, 8))
        >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
        >>> text = np.eye(8)
        >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
        >>> data = vilu.Embeddings(image, text, target=target)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = vilu.MCM().save(folder)
        ...     _ = vilu.calibrate_predictor(folder, data, vilu.Target(max_risk=0.05))
        ...     model = vilu.load(folder)
        >>> model.predict(data).decision[:2], model.calibration.rule.max_risk
        (('accept', 'accept'), 0.05)
    """

    remedy = RECALIBRATE_ADVICE
    error_class = DataError

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
    # all later versions read this key, so the key must not be renamed
    guarantee_text: str | None
    target: Target
    rule: Rule | None
    probability: Annotated[Calibrator, Field(discriminator="form")]
    label_sets: LabelSets | None = None
    draws: dict[str, AnySavedTests] | None = None
    inputs: str | None = None
    texts: tuple[float, ...] | None = None
    near_copies: tuple[Annotated[int, Field(ge=0)], ...] = ()
    looks: int | None = Field(default=None, ge=2)

    _rows: Outcomes = PrivateAttr()

    def __eq__(self, other: object) -> bool:
        """Return whether two calibrations are equal. The calibration rows are compared by hash."""
        if not isinstance(other, Calibration):
            return False
        return vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load the calibration in a predictor's folder, and check predictor, rows and rule.

        Raises:
            DataError: If there is no calibration, if the file is damaged, or if the rule does not
                follow from the calibration rows.
            ProvenanceError: If the calibration was made for another predictor or with another
                schema. Also if the rule is by a cluster test of vilu 0.2.0 that was not valid.

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
                f"{fingerprint}: its thresholds are not valid here. {RECALIBRATE_ADVICE}, or "
                "remove the file."
            )
        calibration._rows = _read_rows(Path(folder), calibration.rows_sha256)
        calibration._require_right_statements(path)
        return calibration

    @classmethod
    def find(cls, folder: str | Path) -> Self | None:
        """Load the calibration like ``load``, or return None if the predictor is not calibrated.

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
        """Calibration rows."""
        return self._rows

    @property
    def fingerprint(self) -> str:
        """Hash of the guarantee, the predictor and the data. Scores and monitors save this hash.

        The hash depends neither on the vilu version nor on the bytes in ``calibration.parquet``.
        These bytes contain the pyarrow version.
        """
        document = self.model_dump(mode="json")
        excluded_key = "rows_sha256"
        return content_digest(document, excluded_key)

    @property
    def guarantee(self) -> Rule | LabelSets | None:
        """Rule, or else the label sets. None if nothing is guaranteed."""
        rule_or_sets = self.label_sets if self.rule is None else self.rule
        return rule_or_sets if has_guarantee(rule_or_sets) else None

    @property
    def has_rule(self) -> bool:
        """Whether the calibration decides which answers are accepted."""
        return self.rule is not None

    @property
    def needs_batch(self) -> bool:
        """Whether the rule judges all rows in a batch, or in a cluster, together."""
        if self.rule is None:
            return False
        return self.rule.needs_batch or self.rule.clusters is not None

    def require_match(self, predictor: FailurePredictor, data: EmbeddingSource) -> None:
        """Refuse a predictor, candidates or photos outside the guarantee.

        Raises:
            ProvenanceError: If the calibration was made with another predictor or different
                candidates, or if the guarantee is about a folder's photos and the data show
                different photos.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> data = vilu.Embeddings(image, np.eye(8), target=image.argmax(axis=1))
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, max_risk=0.05)
            >>> pair = data.take([0, 1], classes=[0, 1])  # two of the eight candidates
            >>> try:
            ...     model.calibration.require_match(model.predictor, pair)
            ... except vilu.errors.ProvenanceError as error:
            ...     print(str(error).partition(",")[0])
            the predictor was calibrated on rows with 8 candidates (names unknown)
        """
        self._require_photos_of_folder(data)
        if predictor.calibrator_ != self.probability:
            raise ProvenanceError(
                f"the calibration is of another predictor than this {predictor.name}, or this one "
                "was loaded before it was calibrated. Load both from one folder."
            )
        if predictor.answer != self.rows.answer:
            raise ProvenanceError(
                f"the calibration rows judge {self.rows.answer} answers, and this "
                f"{predictor.name} judges {predictor.answer} answers, of which nothing is "
                f"guaranteed. {RECALIBRATE_ADVICE}."
            )
        saved_facts = {
            "n_candidates": self.n_candidates,
            "classes": self.classes,
            "pool_size": self.pool_size,
        }
        facts_of_data = _candidate_facts(data)
        candidates_of_data = None  # in words, if different from the saved candidates
        if saved_facts != facts_of_data:
            candidates_of_data = _candidates_in_words(facts_of_data)
        elif not candidates_agree(vars(self), describe_candidates(data)):
            candidates_of_data = "the same names in other prompts"
        if candidates_of_data is not None:
            raise ProvenanceError(
                f"the predictor was calibrated on rows with {_candidates_in_words(saved_facts)}, "
                f"and these have {candidates_of_data}: its thresholds are not valid for them. "
                f"{RECALIBRATE_ADVICE} on rows like these, or remove {RISK}."
            )

    def _require_photos_of_folder(self, data: EmbeddingSource) -> None:
        """Refuse data with pictures outside a guarantee about a folder."""
        if self.rule is None or self.rule.closed is None:
            return
        pictures = data.picture_identities()
        is_covered = self.rule.closed.covers(pictures)
        n_not_covered = int((~is_covered).sum())
        if n_not_covered:
            raise ProvenanceError(
                f"{n_not_covered:,} of {len(data):,} rows show other pictures than the "
                f"{self.rule.closed} that this guarantee is about. {ADVICE_FOR_NEW_PHOTOS}"
            )

    def sets_of(
        self,
        predictor: FailurePredictor,
        batch: Batch,
        uncertainty: Floats,
        class_names: tuple[str, ...] | None,
    ) -> list[str] | None:
        """Return the label sets for a batch. None without label sets, or with a single candidate.

        ``vilu.score`` calls ``sets_of`` batch by batch, and ``Outcomes.label_set`` has the result.

        Args:
            predictor: The calibrated predictor.
            batch: B rows with K candidates.
            uncertainty: The predictor's scores (B,) for the rows.
            class_names: Candidate names. None means the candidate numbers.

        Returns:
            B texts, each a JSON list of names.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
            >>> data = vilu.Embeddings(image, np.eye(8), target=target)
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, label_sets="lac")
            >>> batch = next(data.batches(2))
            >>> uncertainty = model.predict_uncertainty(data)[:2]
            >>> target[:2].tolist()
            [6, 3]
            >>> model.calibration.sets_of(model.predictor, batch, uncertainty, None)
            ['["6"]', '["3"]']
        """
        if self.label_sets is None or len(batch.text) < 2:
            return None
        return sets_as_json(self.label_sets.members(predictor, batch, uncertainty), class_names)

    def decide(self, outcomes: Outcomes, ood: NDArray[np.bool_] | None = None) -> Outcomes:
        """Return the outcomes with a decision for every row, and reasons for rows left for review.

        Without a rule the outcomes are returned unchanged.

        Args:
            outcomes: The predictor's scores for N rows.
            ood: Mask (N,). In a row in the mask, a picture outside all classes is more probable
                than a wrong answer about a picture within the classes. If such a row has an
                uncertainty above the threshold, the reason is "outside".

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> text = np.eye(8)
            >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
            >>> data = vilu.Embeddings(image, text, target=target)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = vilu.MCM().save(folder)
            ...     calibration = vilu.calibrate_predictor(folder, data, vilu.Target(max_risk=0.05))
            >>> outcomes = vilu.Outcomes(uncertainty=[0.1, 0.9], failure=[-1, -1])
            >>> calibration.decide(outcomes).decision
            ('accept', 'review')
        """
        if self.rule is None:
            return outcomes
        groups = group_names(outcomes) if self.rule.grouped_by == "prediction" else None
        reasons = self.rule.reasons(outcomes.uncertainty, groups, outcomes.cluster)
        if ood is not None:
            for row in np.flatnonzero(ood).tolist():
                if reasons[row] == ABOVE:
                    reasons[row] = OUTSIDE_REASON
        if self.rule.closed is not None:
            reasons = _reasons_in_folder(reasons, outcomes, self.rule.closed)
        # A row without a reason for review is accepted.
        decisions = [ACCEPT if reason is None else REVIEW for reason in reasons]
        # A row without an uncertainty is not judged. The reason says why there is no uncertainty.
        for row in np.flatnonzero(np.isnan(outcomes.uncertainty)).tolist():
            decisions[row] = REVIEW
            reasons[row] = None if outcomes.reason is None else outcomes.reason[row]
        return dataclasses.replace(outcomes, decision=decisions, decision_reason=reasons)

    def _require_right_statements(self, path: Path) -> None:
        """Raise an error if the file at ``path`` states what does not follow from the rows.

        Raises:
            DataError: If the file is damaged.
            ProvenanceError: If the rule is by a test that was not valid.
        """
        wrong_statement = self._first_wrong_statement()
        if wrong_statement is None:
            return
        if self._is_by_former_cluster_test():
            raise ProvenanceError(
                f"{path} has a rule about clusters by vilu 0.2.0. Its test left the largest "
                "cluster out, so its guarantees can be broken more often than the confidence says. "
                f"{RECALIBRATE_ADVICE}."
            )
        raise DataError(
            f"{path} is damaged: {wrong_statement}, which does not follow from {ROWS}. "
            f"{RECALIBRATE_ADVICE}."
        )

    def _first_wrong_statement(self) -> str | None:
        """Return the first statement that does not follow from the calibration rows and the target.

        The statement is a clause such as "it counts 30 calibration rows". None if every statement
        follows.
        """
        n = int(self.rows.evaluable.sum())
        if self.n != n:
            return f"it counts {self.n} calibration rows"
        largest_index = max(self.near_copies, default=-1)
        if largest_index >= len(self.rows):
            return "it leaves out rows that do not exist"
        has_rule = self.rule is not None
        if self.target.has_rule != has_rule:
            return "its rule is not what was asked for"
        if self.rule is None:
            return None
        limit = self.rule.drawn_below
        if limit is not None and is_above_limit(self.rows, limit).any():
            return f"its rows were drawn up to the uncertainty {limit:.6g}"
        try:
            recomputed_rule = self._recompute_rule()
        except ViLUError as error:
            return f"it has a rule ({error})"
        return _first_difference(self.rule, recomputed_rule)

    def _is_by_former_cluster_test(self) -> bool:
        """Return whether the rule is by the test of vilu 0.2.0 that was not valid.

        This is the test for the cluster risk "ratio" without ``largest_cluster``.
        """
        is_ratio = self.target.cluster_risk == "ratio"
        return is_ratio and self.target.largest_cluster is None and self.vilu == "0.2.0"

    def _recompute_rule(self) -> Rule:
        """Compute the rule again from the calibration rows and the target."""
        is_counted = np.ones(len(self.rows), np.bool_)
        is_counted[list(self.near_copies)] = False
        rows = self.rows.take(is_counted)
        if self.target.method == "anytime":
            return self._recompute_from_draws(rows)
        self.target.check_rule(grouped=self.target.per_class)
        groups: Literal["prediction"] | None = "prediction" if self.target.per_class else None
        rule = make_rule(rows, self.target, groups)
        # The limit was fixed before the rows were drawn. So it does not follow from the rows, and
        # is copied.
        limit = None if self.rule is None else self.rule.drawn_below
        return rule.model_copy(update={"drawn_below": limit})

    def _recompute_from_draws(self, rows: Outcomes) -> Rule:
        """Compute the rule for the method "anytime" again."""
        draws = self.draws or {}
        max_risk = self.target.risk_of_anytime()
        total_level = sum(settings.delta for settings in draws.values())
        if total_level > 1 - self.target.confidence + ROUNDING_TOLERANCE:
            raise DataError("its levels add up to more than 1 - confidence")
        names = group_names(rows) if self.target.per_class else [ALL_ROWS_GROUP] * len(rows)
        # Rows in groups without separate settings are tested together as the group "(other)".
        group_of_row = np.array(
            [name if name in draws else OTHER_GROUP for name in names], dtype=object
        )
        tests_and_rows: dict[str, tuple[AnyThresholdTests, Outcomes]] = {}
        for name, settings in draws.items():
            rows_of_group = rows.take(group_of_row == name)
            tests_and_rows[name] = (settings.tests(max_risk), rows_of_group)
        # The photos in a closed set do not follow from the calibration rows, so they are copied.
        closed_photos = None if self.rule is None else self.rule.closed
        return make_anytime_rule(tests_and_rows, max_risk, self.target.confidence, closed_photos)


def _reasons_in_folder(
    reasons: list[str | None], outcomes: Outcomes, closed_photos: ClosedPhotos
) -> list[str | None]:
    """Return the reasons for N rows, with ``NOT_COVERED`` for accepted rows outside the folder.

    ``reasons`` come from ``Rule.reasons``, where None stands for an accepted row. ``closed_photos``
    are the photos under the guarantee.
    """
    if outcomes.picture is None:
        is_covered = np.zeros(len(reasons), np.bool_)
    else:
        is_covered = closed_photos.covers(outcomes.picture)
    reasons_in_folder: list[str | None] = []
    for reason, is_row_covered in zip(reasons, is_covered.tolist(), strict=True):
        is_accepted_by_rule = reason is None
        if is_accepted_by_rule and not is_row_covered:
            reasons_in_folder.append(NOT_COVERED)
        else:
            reasons_in_folder.append(reason)
    return reasons_in_folder


def is_above_limit(rows: Outcomes, limit: float) -> NDArray[np.bool_]:
    """Return the mask (N,) of the rows with an uncertainty above ``limit``.

    Only rows up to ``limit`` were drawn to be labelled.
    """
    # If a row is scored again in another batch, the last digits of the score may change.
    tolerance = SCORE_TOLERANCE * abs(limit)
    return rows.uncertainty > limit + tolerance


def require_new_row_guarantee(guarantee: Rule | LabelSets | None) -> None:
    """Refuse a rule about a folder or about clusters, because new rows come one by one."""
    if not isinstance(guarantee, Rule):
        return
    if guarantee.closed is not None:
        raise ProvenanceError(
            f"this guarantee is about {guarantee.closed} of one folder, and about no new image. "
            f"{ADVICE_FOR_NEW_PHOTOS}"
        )
    if guarantee.clusters is not None:
        raise ProvenanceError(
            "this guarantee is about clusters of rows, and not about rows that come one by one. "
            "Score a table with all rows of its clusters: vilu score PREDICTOR TABLE -o FILE."
        )


def _first_difference(rule: Rule, recomputed_rule: Rule) -> str | None:
    """Return the first difference between a saved rule and the recomputed rule, or None.

    The difference is a statement about the saved rule, as a clause.
    """
    if rule.thresholds.keys() != recomputed_rule.thresholds.keys():
        return f"it has thresholds for {', '.join(rule.thresholds) or 'no group'}"
    for group, threshold in rule.thresholds.items():
        if not _is_same_threshold(threshold, recomputed_rule.thresholds[group]):
            for_group = f" for {group!r}" if group else ""
            return f"{threshold}{for_group}"
    # The thresholds are compared above. The counts do not follow from the saved rows, because only
    # a single labelled row per picture is saved.
    fields_not_compared = {"thresholds", "counted"}
    saved_fields = rule.model_dump(exclude=fields_not_compared)
    recomputed_fields = recomputed_rule.model_dump(exclude=fields_not_compared)
    for field, value in recomputed_fields.items():
        if saved_fields.get(field) != value:
            return f"its rule has another {field} than its rows and its target lead to"
    return None


def _is_same_threshold(threshold: Threshold, recomputed_threshold: Threshold) -> bool:
    """Return whether both thresholds accept the same rows and have equal bounds.

    The texts ``why`` are not compared.
    """
    fields_compared_separately = {"why", "risk_bound"}
    saved_fields = threshold.model_dump(exclude=fields_compared_separately)
    if saved_fields != recomputed_threshold.model_dump(exclude=fields_compared_separately):
        return False
    if threshold.risk_bound is None or recomputed_threshold.risk_bound is None:
        return threshold.risk_bound is None and recomputed_threshold.risk_bound is None
    return math.isclose(
        threshold.risk_bound, recomputed_threshold.risk_bound, rel_tol=ROUNDING_TOLERANCE
    )


def _candidate_facts(data: EmbeddingSource) -> dict[str, Any]:
    """Return the candidate count, the hash of the class names, and the pool size, by field name.

    A guarantee holds only for data with the same values as the calibration rows.
    """
    hash_of_names = None
    if data.class_names is not None:
        hash_of_names = digest(list(data.class_names))
    n_candidates = data.n_candidates if data.pool_size is None else None
    return {"n_candidates": n_candidates, "classes": hash_of_names, "pool_size": data.pool_size}


def _candidates_in_words(facts: dict[str, Any]) -> str:
    """Describe the candidates for messages, from the result of ``_candidate_facts``."""
    if facts["pool_size"] is not None:
        return f"pools of {facts['pool_size']}"
    return f"{facts['n_candidates']} candidates (names {facts['classes'] or 'unknown'})"


def save_calibration(
    folder: Path, rows: Outcomes, data: EmbeddingSource, **fields: object
) -> Calibration:
    """Write the calibration rows, and then the calibration with the hash of these rows.

    ``data`` is the source of the rows. ``fields`` are the calibration fields that do not follow
    from ``rows`` and ``data``.
    """
    content = parquet_bytes(*rows.table())
    write_bytes(folder / ROWS, content)
    computed_fields = {
        **_candidate_facts(data),
        "predictor": fit_fingerprint(folder),
        "texts": describe_candidates(data).get("texts"),
        "n": int(rows.evaluable.sum()),
        "rows_sha256": hashlib.sha256(content).hexdigest(),
    }
    calibration = Calibration.model_validate({**computed_fields, **fields})
    calibration._rows = rows
    write_document(folder / RISK, calibration)
    return calibration


def _read_rows(folder: Path, sha256: str) -> Outcomes:
    """Read the calibration rows in a folder.

    A missing file, or a file with another hash than ``sha256``, is a DataError.
    """
    path = folder / ROWS
    if not path.is_file():
        raise DataError(f"{path} is missing. {RECALIBRATE_ADVICE}.")
    if file_hash(path) != sha256:
        raise DataError(f"{path} does not hold the rows that {RISK} names. {RECALIBRATE_ADVICE}.")
    return Outcomes.load(path)


def has_guarantee(rule_or_sets: Rule | LabelSets | None) -> bool:
    """Return whether a rule or label sets guarantee anything.

    A rule that accepts nothing guarantees nothing.
    """
    if rule_or_sets is None:
        return False
    if isinstance(rule_or_sets, LabelSets):
        return True
    return rule_or_sets.feasible
