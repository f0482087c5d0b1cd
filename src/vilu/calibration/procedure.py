"""From a fitted predictor and labelled rows that it has not seen to probabilities and a rule with a stated risk."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from vilu.artifacts.disk import locked
from vilu.artifacts.documents import digest
from vilu.calibration import record
from vilu.calibration.copies import check_copies
from vilu.calibration.label_sets import Kind, LabelSets, check_label_sets, fit_label_sets
from vilu.calibration.looks import in_words, note_look
from vilu.calibration.record import Record, Rule
from vilu.calibration.rules import (
    Selector,
    calibrate,
    check_stated,
    check_target,
    evaluable,
    group_names,
)
from vilu.calibration.selection import select
from vilu.calibration.thresholds import exactly, percent
from vilu.calibration.units import MOST_COMPARED, CountedRows, count_once, first_of_scenes
from vilu.embeddings.copies import NEAR_COPY
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import InfeasibleError, UsageError, ViLUError
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.seen import candidates_of
from vilu.predictors.persistence.record import RISK, VOCABULARY, claim, fit_fingerprint
from vilu.predictors.persistence.storage import load, write_card
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.scoring.score import predictor_fingerprint, score_fresh, source_fingerprint
from vilu.store.reader import EmbeddingStore

SAID = 3  # groups of which a message says why nothing is accepted

logger = logging.getLogger(__name__)

Method = Literal["ltt", "sgr", "crc", "selection"]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is to be promised."""

    # largest error rate among accepted answers; None for probabilities alone, or for a coverage
    max_risk: float | None = None
    min_coverage: float | None = None  # least share to accept; None for any
    confidence: float = 0.95  # 1 - delta
    # "ltt", "sgr", "crc" (``vilu.calibrate``) or "selection" (``vilu.calibration.selection``)
    method: Method = "ltt"
    per_class: bool = False  # a threshold for every predicted class with enough rows
    label_sets: Kind | None = None  # "lac" or "aps"; None for none
    max_miss: float = 0.1  # largest share of label sets without the right label
    # share of pictures of none of the classes to be expected; None: as among the calibration rows
    outside_share: float | None = None
    # shares of the classes among the others to be expected, by name; None: as there
    class_shares: Mapping[str, float] | None = None

    def facts(self) -> dict[str, object]:
        """All that was asked for; shares only where they are stated."""
        stated = {"outside_share", "class_shares"}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value is not None or name not in stated
        }

    def check(self, predictor: FailurePredictor, data: EmbeddingSource) -> None:
        """Refuse what cannot be promised, before anything is computed."""
        if not self.has_rule:
            if self.per_class or self.method != "ltt":
                raise UsageError(
                    "without max_risk or min_coverage there is no decision: leave method and per_class out."
                )
        elif self.method != "selection":
            check_target(self.max_risk, self.min_coverage, self.confidence, self.method)
        elif self.max_risk is None or self.min_coverage is not None or self.per_class:
            raise UsageError(
                "selection takes a max_risk, and neither a min_coverage nor a threshold per class."
            )
        check_stated(
            self.outside_share,
            self.class_shares,
            self.max_risk,
            self.method,
            grouped=self.per_class,
        )
        if self.per_class and data.pool_size is not None:
            raise UsageError(
                "captions have no classes, so there are no thresholds per class. Leave per_class out."
            )
        if self.label_sets is not None:
            check_label_sets(predictor, data, self.max_miss)
        elif self.max_miss != Target.max_miss:
            raise UsageError(
                f"max_miss ({self.max_miss}) is for label sets. Ask for label_sets too, or leave it out."
            )

    @property
    def has_rule(self) -> bool:
        """Whether more is asked for than probabilities and label sets."""
        return self.max_risk is not None or self.min_coverage is not None

    def rule(self, rows: Outcomes) -> Rule | None:
        """The rule that calibration rows support."""
        if not self.has_rule:
            return None
        if self.method == "selection":
            return select(rows, max_risk=self.max_risk or 0.0)
        selector = calibrate(
            rows,
            max_risk=self.max_risk,
            min_coverage=self.min_coverage,
            confidence=self.confidence,
            method=self.method,
            groups="prediction" if self.per_class else None,
            outside_share=self.outside_share,
            class_shares=self.class_shares,
        )
        if not selector.feasible:
            raise InfeasibleError(_infeasible(selector))
        return selector


def calibrate_predictor(
    folder: str | Path,
    data: EmbeddingSource,
    target: Target,
    *,
    dataset: str | None = None,
    split: str | None = None,
    overwrite: bool = True,
) -> Record:
    """Calibrate a saved predictor on labelled rows and leave the result in its folder.

    ``predictor.json`` gets the calibrator of probabilities, ``calibration.parquet`` the rows,
    ``risk.json`` the rule and what it was made from; that comes last, so that a crash leaves a
    folder with the old rule, which is then refused, or without a rule. Where the target is out of
    reach nothing is written. Without ``overwrite`` a calibration of the same rows and target that
    is there stays as it is, and one of others is refused.

    Warns:
        UserWarning: If some rows were used to fit; they are left out.

    Raises:
        DataError: If more than 1 % of the rows were used to fit, or are near copies of such rows.
    """
    target.check(load(folder), data)  # what is refused leaves no lock behind
    claim(folder, same=True)
    with locked(Path(folder), "calibrating", who="calibration"):
        return _calibrate(Path(folder), data, target, (dataset, split), overwrite=overwrite)


def _calibrate(
    folder: Path,
    data: EmbeddingSource,
    target: Target,
    names: tuple[str | None, str | None],
    *,
    overwrite: bool,
) -> Record:
    predictor = load(folder)
    predictor.calibrator_ = None
    made_from = predictor_fingerprint(predictor), source_fingerprint(data), *names, target.facts()
    inputs = digest(made_from)
    dtype = data.manifest.dtype if isinstance(data, EmbeddingStore) else None
    if dtype is None:  # only a store has a hash of all its rows
        inputs = digest(
            [made_from, [data.identities(by).tolist() for by in data.identified_by[:1]]]
        )
    found = None if overwrite else _calibrated(folder, inputs)
    if found is None:
        fresh = predictor.unseen(data, "calibration")
        check_copies(predictor, data, np.flatnonzero(fresh))
        rows = score_fresh(predictor, data, fresh, dataset=names[0], split=names[1])
        n_looks = 1
        if rows.picture is not None and target.has_rule:
            n_looks = note_look(folder, rows.picture[rows.evaluable], target.facts())
        rule, counts, near = _rule_of_units(target, rows, data, np.flatnonzero(fresh))
        rows = rows.take(counts)
        predictor.calibrate_scores(rows.uncertainty, rows.failure)
        sets: LabelSets | None = None
        if target.label_sets is not None:
            left_out = np.ones(len(data), np.bool_)
            left_out[np.flatnonzero(fresh)[counts]] = False
            sets = fit_label_sets(
                predictor,
                data.without(left_out),
                max_miss=target.max_miss,
                method=target.label_sets,
            )
        found = keep_record(
            folder,
            predictor,
            rows,
            data,
            rule,
            names,
            dtype=dtype,
            label_sets=sets,
            inputs=inputs,
            near_copies=tuple(near.tolist()),
            n_looks=n_looks,
        )
    elif dtype is not None and not (folder / VOCABULARY).exists():  # somebody removed it
        Vocabulary.of(data, dtype).save(folder)
    write_card(folder)  # the last file of a calibration
    return found


def _rule_of_units(
    target: Target, rows: Outcomes, data: EmbeddingSource, places: Ints
) -> tuple[Rule | None, Ints, Ints]:
    """The rule of calibration rows (N,) at ``places`` (N,) of a source; which of them (M,) count.

    And the places among these M of near copies of others, which the rule leaves out.

    Those of one picture count once. Where some pictures are near copies of others there is a second
    rule, of one of them each, and the rule that accepts less is taken. Rows that nobody has
    labelled stay.
    """
    labelled = evaluable(rows)
    chosen, counted = count_once(rows, labelled)
    rule = target.rule(rows)
    first = first_of_scenes(data, places[chosen])
    if first is None:
        logger.warning(
            "near copies are looked for among at most %s pictures, and these are %s: where some "
            "are near copies of others, the promise is too sharp",
            f"{MOST_COMPARED:,}",
            f"{len(chosen):,}",
        )
        first = np.ones(len(chosen), np.bool_)
    left_out = chosen[:0]
    if not first.all():
        scenes = chosen[first]
        n_files = len(chosen) if counted is None else counted.files
        counted = CountedRows(files=n_files, pictures=len(chosen), scenes=len(scenes))
        logger.warning(
            "near copies among the calibration rows (cosine at least %s): %s. They are no "
            "independent answers, so they do not count as such",
            NEAR_COPY,
            counted,
        )
        of_scenes = target.rule(rows.take(scenes))
        if _accepts_less(of_scenes, rule, rows.take(chosen)):
            rule = of_scenes
            left_out = chosen[~first]
    if rule is not None:
        rule = rule.model_copy(update={"counted": counted})
    counts = ~labelled
    counts[chosen] = True
    counting = np.flatnonzero(counts)
    return rule, counting, np.flatnonzero(np.isin(counting, left_out))


def _accepts_less(rule: Rule | None, than: Rule | None, pictures: Outcomes) -> bool:
    """Whether a rule accepts fewer of some pictures than another one."""
    if rule is None or than is None:
        return False
    groups = group_names(pictures) if rule.grouped_by == "prediction" else None
    mine = int(rule.accept(pictures.uncertainty, groups).sum())
    return mine < int(than.accept(pictures.uncertainty, groups).sum())


def keep_record(  # noqa: PLR0913 - all that a record is made of
    folder: Path,
    predictor: FailurePredictor,
    rows: Outcomes,
    data: EmbeddingSource,
    rule: Rule | None,
    names: tuple[str | None, str | None],
    *,
    dtype: str | None,
    label_sets: LabelSets | None = None,
    inputs: str | None = None,
    near_copies: tuple[int, ...] = (),
    n_looks: int = 1,
) -> Record:
    """Write a calibrated predictor, the rows of ``data`` (a set and a split) it was calibrated on, last the result."""
    rows = dataclasses.replace(
        rows, failure_probability=predictor.failure_probability(rows.uncertainty)
    )
    predictor.save(folder)
    if (
        dtype is not None
    ):  # of a store, which keeps embeddings so: what a new image needs (``vilu.Guard``)
        Vocabulary.of(data, dtype).save(folder)
    return record.save(
        folder,
        rows,
        predictor=fit_fingerprint(folder),
        **record.problem(data),
        texts=candidates_of(data).get("texts"),
        source=source_fingerprint(data),
        dataset=names[0],
        split=names[1],
        n=int(rows.evaluable.sum()),
        promise=None if rule is None else f"{rule}{in_words(n_looks)}",
        rule=rule,
        label_sets=label_sets,
        inputs=inputs,
        near_copies=near_copies,
        looks=n_looks if n_looks > 1 else None,
    )


def take_back(folder: Path, changed: set[str]) -> bool:
    """Whether a promise rests on labels, by the keys of their rows, that are others now; it is gone then."""
    found = record.load(folder) if changed and record.has_record(folder) else None
    if wrong := changed & {*(() if found is None else record.load_rows(folder, found).ids or ())}:
        (folder / RISK).unlink()
        write_card(folder)
        logger.warning(
            "%d labels that the promise rests on have changed: it has to be shown again", len(wrong)
        )
    return bool(wrong)


def _calibrated(folder: Path, inputs: str) -> Record | None:
    """What the same inputs made of a predictor before; refuses what others made.

    What cannot be used is in no way.
    """
    if not record.has_record(folder):
        return None
    try:
        found = record.load(folder)
    except ViLUError as error:
        logger.warning("the calibration in %s is made again: %s", folder, error)
        return None
    if found.inputs == inputs:
        logger.info("%s is calibrated so already: there is nothing to do", folder)
        return found
    raise UsageError(
        f"{folder} is calibrated already, on {found.n:,} rows of {found.dataset} ({found.promise or 'no rule'}). "
        "--overwrite replaces that calibration; monitors of it then begin anew."
    )


def _infeasible(selector: Selector) -> str:
    """Why nothing can be accepted, and what it would take."""
    reasons, few = [], list(selector.certificates.items())[:SAID]
    for name, one in few:
        needed = (
            ""
            if one.n_needed is None
            else f" At least {one.n_needed:,} calibration rows are needed."
        )
        reasons.append(f"{name + ': ' if name else ''}{one.why}.{needed}")
    more = (
        f" And {len(selector.certificates) - SAID} more groups."
        if len(selector.certificates) > SAID
        else ""
    )
    counted = "" if selector.counted is None else f" The {selector.counted}."
    goal = "" if selector.max_risk is None else f"a risk of at most {percent(selector.max_risk)} "
    goal += (
        ""
        if selector.min_coverage is None
        else f"at a coverage of at least {selector.min_coverage:.1%} "
    )
    return (
        f"{goal}cannot be promised with confidence {exactly(selector.confidence)}: "
        f"{' '.join(reasons)}{more}{counted} Nothing "
        "was written but that these rows were looked at. Add calibration rows, ask for less (a "
        "larger --max-risk, a lower --confidence or --min-coverage), or take a predictor that "
        "ranks better."
    )
