"""Calibration of a saved predictor on labelled rows that were not used in the fit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vilu.artifacts.disk import locked
from vilu.artifacts.hashing import digest
from vilu.calibration.calibration import Calibration, is_above_limit, save_calibration
from vilu.calibration.closed_set import AnySavedTests
from vilu.calibration.copies import check_copies
from vilu.calibration.given_answers import warn_of_in_sample_answers
from vilu.calibration.label_sets import LabelSets, check_label_sets, fit_label_sets
from vilu.calibration.looks import looks_in_words, record_target
from vilu.calibration.rules import (
    Rule,
    cluster_warning,
    group_names,
    make_rule,
    require_usable_rows,
)
from vilu.calibration.target import Target
from vilu.calibration.thresholds import exact_percent, percent
from vilu.calibration.units import (
    MAX_COMPARED_PICTURES,
    NOISE_COPY_COSINE,
    RowCounts,
    choose_picture_rows,
    first_copy_mask,
)
from vilu.embeddings.copies import NEAR_COPY_COSINE
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError, InfeasibleError, UsageError, ViLUError
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.probability import identity_calibrator
from vilu.predictors.persistence.description import refuse_foreign_files
from vilu.predictors.persistence.files import RISK
from vilu.predictors.persistence.storage import load_predictor, load_uncalibrated, write_card
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.scoring.score import predictor_fingerprint, score_unseen, source_fingerprint
from vilu.store.reader import EmbeddingStore
from vilu.validation import checked

MAX_GROUPS_SHOWN = 3  # largest number of groups with a reason in a message

logger = logging.getLogger(__name__)


@checked
def calibrate_predictor(
    folder: str | Path,
    data: EmbeddingSource,
    target: Target,
    *,
    dataset: str | None = None,
    split: str | None = None,
    overwrite: bool = True,
    drawn_below: float | None = None,
) -> Calibration:
    """Calibrate a saved predictor on labelled rows, as ``vilu calibrate`` does.

    The result is written into the predictor's folder:

    1. ``predictor.json``: the probability calibrator.
    2. ``calibration.parquet``: the calibration rows.
    3. ``risk.json``: the rule, and where the rule comes from. This file is written last. After a
       crash the folder therefore has no rule, or the old rule. Loading the old rule is refused.

    If the target cannot be reached, no calibration is written. Without ``overwrite``, an existing
    calibration with the same rows and target is kept. Otherwise there is a UsageError.

    With ``drawn_below``, the rows are a random sample of the rows with an uncertainty up to this
    limit, such as a draw by ``vilu next --for-guarantee``. The limit must not depend on the rows
    that could be drawn. Only thresholds up to the limit are tested. The predictor's scores stay the
    failure probabilities, because rows up to the limit show nothing about rows beyond it.

    Warns:
        UserWarning: If some rows were used in the fit. These rows are left out.

    Raises:
        DataError: If more than 1 % of the rows were used in the fit, or are near copies of fitted
            rows. Also if a row has an uncertainty above ``drawn_below``.
        InfeasibleError: If the target cannot be reached. The message says what is missing.
        UsageError: If the target is not possible, or if another calibration exists and
            ``overwrite`` is False.

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
        >>> calibration.rule.n_wrong, calibration.rule.n_accepted, calibration.probability.form
        (0, 200, 'temperature')
    """
    # The target is checked before the lock is taken. After a later refusal, the lock file would
    # stay in the folder.
    predictor = load_predictor(folder)
    check_target(target, predictor, data)
    if drawn_below is not None:
        _require_testable_below_limit(target, predictor)
    refuse_foreign_files(folder, is_same_fit=True)
    with locked(Path(folder), activity="calibrating", holder_kind="calibration"):
        return _calibrate(
            Path(folder),
            data,
            target,
            dataset_and_split=(dataset, split),
            overwrite=overwrite,
            drawn_below=drawn_below,
        )


def check_target(target: Target, predictor: FailurePredictor, data: EmbeddingSource) -> None:
    """Refuse an impossible target for a predictor and rows."""
    if target.has_rule:
        target.check_rule(grouped=target.per_class)
    elif target.per_class or target.method != "ltt":
        raise UsageError(
            "without max_risk or min_coverage there is no decision: leave method and per_class out."
        )
    elif target.states_shares:
        target.check_shares(grouped=False)
    if target.per_class and data.pool_size is not None:
        raise UsageError(
            "captions have no classes, so there are no thresholds per class. Leave per_class out."
        )
    if target.per_class and data.data_kind == "answers":
        # In another table the same answer may have another number, and so another threshold.
        raise UsageError(
            "a table of answers has no classes, so there are no thresholds per class. Leave "
            "per_class out."
        )
    if target.label_sets is not None:
        check_label_sets(predictor, data, target.max_miss)
    elif target.max_miss != Target.max_miss:  # the given value is not the default
        raise UsageError(
            f"max_miss ({target.max_miss}) is for label sets. Ask for label_sets too, or leave "
            "max_miss out."
        )


def _require_testable_below_limit(target: Target, predictor: FailurePredictor) -> None:
    """Refuse a predictor without probabilities, and targets with tests above the draw's limit.

    Such targets are coverages, label sets, stated shares, and means over all answers.
    """
    allowed_target = Target(
        max_risk=target.max_risk, confidence=target.confidence, per_class=target.per_class
    )
    if target.max_risk is None or target != allowed_target:
        raise UsageError(
            "rows that were drawn below a limit need a max_risk, and allow confidence and "
            "per_class beside it. Leave the rest of the target out."
        )
    require_probability(predictor)


def require_probability(predictor: FailurePredictor) -> None:
    """Refuse a predictor without probabilities, because probabilities choose a draw's limit."""
    if not predictor.is_probability:
        raise UsageError(
            "labels for a guarantee are chosen by a probability of failure; "
            f"{predictor.name} has none."
        )


def _require_below_limit(rows: Outcomes, limit: float) -> None:
    """Refuse rows with an uncertainty above ``limit``: no such row can be in the draw."""
    is_above = is_above_limit(rows, limit)
    n_above = int(is_above.sum())
    if n_above:
        raise DataError(
            f"{n_above:,} of {len(rows):,} rows have an uncertainty above {limit:.6g}, so they "
            "were not drawn below it. Give the rows of the draw, and no other."
        )


def _calibrate(
    folder: Path,
    data: EmbeddingSource,
    target: Target,
    *,
    dataset_and_split: tuple[str | None, str | None],
    overwrite: bool,
    drawn_below: float | None,
) -> Calibration:
    """Calibrate in a locked folder, with the arguments of ``calibrate_predictor``."""
    predictor = load_uncalibrated(folder)
    inputs_digest = _digest_of_inputs(predictor, data, target, dataset_and_split, drawn_below)
    if not overwrite:
        calibration = _existing_calibration(folder, inputs_digest)
        if calibration is not None:
            write_card(folder)  # a crash may have kept the earlier call from writing the card
            return calibration
    is_unseen = predictor.unseen(data, "calibration")
    index_in_data = np.flatnonzero(is_unseen)  # row index in ``data`` for each outcome below
    check_copies(predictor, data, index_in_data)
    dataset, split = dataset_and_split
    outcomes = score_unseen(predictor, data, is_unseen, dataset=dataset, split=split)
    if drawn_below is not None:
        _require_below_limit(outcomes, drawn_below)
    n_looks = 1
    if outcomes.picture is not None and target.has_rule:
        pictures = outcomes.picture[outcomes.evaluable]
        target_facts = target.facts()
        n_looks = record_target(folder, pictures, target_facts)
    rows_and_rule = _choose_rows_and_rule(target, outcomes, data, index_in_data)
    rule = rows_and_rule.rule
    if rule is not None:
        rule = rule.model_copy(update={"drawn_below": drawn_below})
    calibration_rows = outcomes.take(rows_and_rule.saved_rows)
    warn_of_in_sample_answers(predictor.notes_.get("given_answers"), calibration_rows)
    if drawn_below is None:
        predictor.calibrate_scores(calibration_rows.uncertainty, calibration_rows.failure)
    else:
        # A calibrator from these rows would be biased, because no score is above the limit.
        predictor.calibrator_ = identity_calibrator(calibration_rows.failure)
    label_sets = _fit_label_sets_on_rows(
        predictor, data, index_in_data[rows_and_rule.saved_rows], target
    )
    calibration = save_calibrated_predictor(
        folder,
        predictor,
        calibration_rows,
        data,
        target,
        rule,
        dataset_and_split,
        label_sets=label_sets,
        inputs=inputs_digest,
        near_copies=tuple(rows_and_rule.near_copies.tolist()),
        n_looks=n_looks,
    )
    write_card(folder)  # the last file of a calibration
    return calibration


def _fit_label_sets_on_rows(
    predictor: FailurePredictor, data: EmbeddingSource, rows: Ints, target: Target
) -> LabelSets | None:
    """Fit label sets on some rows of ``data``, or return None if the target asks for none.

    ``rows`` (M,) are the row indices.
    """
    if target.label_sets is None:
        return None
    is_left_out = np.ones(len(data), np.bool_)
    is_left_out[rows] = False
    data_to_fit = data.without(is_left_out)
    return fit_label_sets(
        predictor, data_to_fit, max_miss=target.max_miss, method=target.label_sets
    )


def _digest_of_inputs(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    target: Target,
    dataset_and_split: tuple[str | None, str | None],
    drawn_below: float | None,
) -> str:
    """Return a digest of all calibration inputs.

    The inputs are the predictor, the data, the names of data set and split, the target, and the
    limit.
    """
    source = source_fingerprint(data)
    target_facts = target.facts()
    # Without a limit nothing is added. So the digests of older calibrations stay the same.
    if drawn_below is not None:
        target_facts["drawn_below"] = drawn_below
    predictor_hash = predictor_fingerprint(predictor)
    origin: list[object] = [predictor_hash, source, *dataset_and_split, target_facts]
    # A store's fingerprint covers all rows. The fingerprint of a source that is no store covers
    # only a row sample, so all rows' identities are added. Rows may have several kinds of identity,
    # the best kind first.
    if not isinstance(data, EmbeddingStore):
        best_kind = data.identified_by[:1]  # empty if the rows have no identity
        identities = [data.identities(by).tolist() for by in best_kind]
        origin.append(identities)
    return digest(origin)


class _RowsAndRule(NamedTuple):
    """A rule, and the calibration rows to save."""

    rule: Rule | None  # None if the target asks for no rule
    saved_rows: Ints  # (M,) indices of the rows to save, among the N calibration rows
    near_copies: Ints  # indices, among the M saved rows, of the copies left out by the rule


def _choose_rows_and_rule(
    target: Target, rows: Outcomes, data: EmbeddingSource, index_in_data: Ints
) -> _RowsAndRule:
    """Return the rule for N calibration rows, and the rows to save. Every picture counts once.

    A single row per picture is saved, and all rows without a label. Near copies are counted and
    reported with a warning. If some pictures differ by noise only (``NOISE_COPY_COSINE``), a second
    rule is made from a single picture in each group of copies. The rule that accepts less is
    returned.

    Args:
        target: The target.
        rows: N calibration rows.
        data: The source with the rows.
        index_in_data: Row indices (N,) in the source.
    """
    if target.cluster_risk is not None:
        # Each cluster counts as a single draw, so copies within a cluster do no harm. All rows are
        # saved.
        return _RowsAndRule(
            rule=_make_feasible_rule(rows, target),
            saved_rows=np.arange(len(rows)),
            near_copies=np.arange(0),
        )
    is_labelled = require_usable_rows(rows)
    picture_rows, row_counts = choose_picture_rows(rows, is_labelled)
    rule = _make_feasible_rule(rows, target)
    left_out_rows = picture_rows[:0]  # no row is left out so far
    is_first_of_scene = _is_first_of_near_copies(data, index_in_data[picture_rows])
    if not is_first_of_scene.all():
        row_counts = _add_scene_count(row_counts, is_first_of_scene)
        is_first_of_noise_copies = first_copy_mask(
            data, index_in_data[picture_rows], NOISE_COPY_COSINE
        )
        # Pictures that differ by noise only are a single draw. If all copies count, the bound is
        # too small. If a single copy counts, the answer about this copy may be right by chance. So
        # both rules are made, and the rule that accepts less is used.
        first_copies = rows.take(picture_rows[is_first_of_noise_copies])
        rule_without_copies = _make_feasible_rule(first_copies, target)
        picture_outcomes = rows.take(picture_rows)
        if _accepts_less(rule_without_copies, rule, picture_outcomes):
            rule = rule_without_copies
            left_out_rows = picture_rows[~is_first_of_noise_copies]
    if rule is not None:
        rule = rule.model_copy(update={"counted": row_counts})
        warning = cluster_warning(rule, rows)
        if warning is not None:
            logger.warning("%s", warning)
    is_saved = ~is_labelled
    is_saved[picture_rows] = True
    saved_rows = np.flatnonzero(is_saved)
    is_left_out = np.isin(saved_rows, left_out_rows)
    return _RowsAndRule(rule, saved_rows, near_copies=np.flatnonzero(is_left_out))


def _is_first_of_near_copies(data: EmbeddingSource, rows: Ints) -> NDArray[np.bool_]:
    """Return the mask (M,), True for the first picture in each group of near copies.

    ``rows`` (M,) holds for each picture a row index in ``data``. If there are too many pictures to
    compare, a warning is logged and the mask is True everywhere. Without vectors nothing can be
    compared, so the mask is True everywhere, too.
    """
    n_pictures = len(rows)
    if not data.has_vectors:
        return np.ones(n_pictures, np.bool_)
    if n_pictures <= MAX_COMPARED_PICTURES:
        return first_copy_mask(data, rows, NEAR_COPY_COSINE)
    logger.warning(
        "near copies are searched among at most %s pictures, and there are %s. If some of them are "
        "near copies of others, the guarantee is too optimistic",
        f"{MAX_COMPARED_PICTURES:,}",
        f"{n_pictures:,}",
    )
    return np.ones(n_pictures, np.bool_)


def _add_scene_count(
    row_counts: RowCounts | None, is_first_of_scene: NDArray[np.bool_]
) -> RowCounts:
    """Add the scene count to the counts of files and pictures, and log a warning.

    ``row_counts`` is None if there are as many files as pictures. ``is_first_of_scene`` marks the
    first picture in each scene.
    """
    n_pictures = len(is_first_of_scene)
    n_files = n_pictures if row_counts is None else row_counts.files
    n_scenes = int(is_first_of_scene.sum())
    row_counts = RowCounts(files=n_files, pictures=n_pictures, scenes=n_scenes)
    logger.warning(
        "near copies among the calibration rows (cosine at least %s): %s. Answers about them are "
        "not independent: the guarantee is more optimistic than the rows allow",
        NEAR_COPY_COSINE,
        row_counts,
    )
    return row_counts


def _make_feasible_rule(rows: Outcomes, target: Target) -> Rule | None:
    """Make the rule from calibration rows, or return None if the target asks for no rule.

    If the rule accepts nothing, an InfeasibleError is raised.
    """
    if not target.has_rule:
        return None
    groups: Literal["prediction"] | None = "prediction" if target.per_class else None
    rule = make_rule(rows, target, groups)
    if not rule.feasible:
        raise InfeasibleError(_infeasible_message(rule))
    return rule


def _accepts_less(rule: Rule | None, compared_rule: Rule | None, pictures: Outcomes) -> bool:
    """Return whether ``rule`` accepts less than ``compared_rule``. False if either is None."""
    if rule is None or compared_rule is None:
        return False
    groups = group_names(pictures) if rule.grouped_by == "prediction" else None
    n_accepted = int(rule.accept(pictures.uncertainty, groups).sum())
    n_accepted_by_compared = int(compared_rule.accept(pictures.uncertainty, groups).sum())
    return n_accepted < n_accepted_by_compared


def save_calibrated_predictor(  # noqa: PLR0913 - one argument per part of a calibration
    folder: Path,
    predictor: FailurePredictor,
    rows: Outcomes,
    data: EmbeddingSource,
    target: Target,
    rule: Rule | None,
    dataset_and_split: tuple[str | None, str | None],
    *,
    dtype: str | None = None,
    label_sets: LabelSets | None = None,
    draws: Mapping[str, AnySavedTests] | None = None,
    inputs: str | None = None,
    near_copies: tuple[int, ...] = (),
    n_looks: int = 1,
) -> Calibration:
    """Write a calibrated predictor, the calibration rows, and then the calibration.

    Args:
        folder: The predictor's folder.
        predictor: The predictor with a probability calibrator.
        rows: Calibration rows.
        data: Source with the rows.
        target: The target.
        rule: The rule. None if the target asks for no rule.
        dataset_and_split: Data set name, and split name.
        dtype: Number format for rounding new embeddings. None means the data's format.
        label_sets: As in ``Calibration``.
        draws: As in ``Calibration``.
        inputs: As in ``Calibration``.
        near_copies: As in ``Calibration``.
        n_looks: Number of looks at these rows (``vilu.calibration.looks``).
    """
    probability = predictor.failure_probability(rows.uncertainty)
    rows = dataclasses.replace(rows, failure_probability=probability)
    predictor.save(folder)
    # The vocabulary is needed to score bare embeddings and new images. Without texts there is no
    # vocabulary.
    if data.pool_size is None and data.has_texts:
        Vocabulary.of(data, dtype).save(folder)
    dataset, split = dataset_and_split
    guarantee_text = None
    if rule is not None:
        guarantee_text = f"{rule}{looks_in_words(n_looks)}"
    return save_calibration(
        folder,
        rows,
        data,
        source=source_fingerprint(data),
        dataset=dataset,
        split=split,
        guarantee_text=guarantee_text,
        target=target,
        rule=rule,
        probability=predictor.calibrator_,
        label_sets=label_sets,
        draws=draws,
        inputs=inputs,
        near_copies=near_copies,
        looks=n_looks if n_looks > 1 else None,
    )


def remove_outdated_calibration(folder: Path, changed_keys: set[str]) -> bool:
    """Remove a calibration if labels of calibration rows have changed, and return True if removed.

    ``changed_keys`` holds the keys of all rows with a changed label, calibration rows or not.
    """
    calibration = Calibration.find(folder) if changed_keys else None
    if calibration is None:
        return False
    changed_rows = changed_keys & set(calibration.rows.ids or ())
    if not changed_rows:
        return False
    (folder / RISK).unlink()
    write_card(folder)
    logger.warning(
        "%d labels behind the guarantee have changed, so the calibration was removed. Calibrate "
        "again",
        len(changed_rows),
    )
    return True


def _existing_calibration(folder: Path, inputs_digest: str) -> Calibration | None:
    """Load the calibration in the folder, or return None if there is no calibration.

    A calibration from different inputs is refused. If loading fails, a warning is logged and None
    is returned.
    """
    try:
        calibration = Calibration.find(folder)
    except ViLUError as error:
        logger.warning("the calibration in %s is made again: %s", folder, error)
        return None
    if calibration is None:
        return None
    if calibration.inputs == inputs_digest:
        logger.info("%s is calibrated so already: there is nothing to do", folder)
        return calibration
    raise UsageError(
        f"{folder} is calibrated already, on {calibration.n:,} rows of {calibration.dataset} "
        f"({calibration.guarantee_text or 'no rule'}). --overwrite replaces that calibration; "
        "its monitors must then begin anew."
    )


def _infeasible_message(rule: Rule) -> str:
    """Return the message for an infeasible target: the reasons, the missing rows, and advice."""
    reasons = []
    groups = list(rule.thresholds.items())
    for name, threshold in groups[:MAX_GROUPS_SHOWN]:
        group_in_words = f"{name}: " if name else ""
        need_in_words = ""
        if threshold.n_needed is not None:
            need_in_words = f" At least {threshold.n_needed:,} calibration rows are needed."
        reasons.append(f"{group_in_words}{threshold.why}.{need_in_words}")
    n_groups_not_shown = len(groups) - MAX_GROUPS_SHOWN
    if n_groups_not_shown > 0:
        reasons.append(f"And {n_groups_not_shown} more groups.")
    if rule.counted is not None:
        reasons.append(f"The {rule.counted}.")
    target_parts = []
    if rule.max_risk is not None:
        target_parts.append(f"a risk of at most {percent(rule.max_risk)}")
    if rule.min_coverage is not None:
        target_parts.append(f"at a coverage of at least {rule.min_coverage:.1%}")
    return (
        f"{' '.join(target_parts)} cannot be guaranteed with confidence "
        f"{exact_percent(rule.confidence)}: "
        f"{' '.join(reasons)} No rule was written, and looks.json counts the look at these rows. "
        "Add calibration rows, ask for less (a larger --max-risk, a lower --confidence or "
        "--min-coverage), or take a predictor that ranks better. If you test some of these rows "
        "again, that is another look."
    )
