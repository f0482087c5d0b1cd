"""What labels say of a predictor that something is to be promised of: which ones count, and where it may accept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.anytime import Draw, Looks, grid_of, level_of
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import keep_calibration
from vilu.calibration.rules import ALL, Rule, rule_at_any_time
from vilu.calibration.target import Target
from vilu.embeddings.copies import near_copies
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.probability import Logistic
from vilu.predictors.persistence.storage import write_card
from vilu.triage.choose import choose_limit
from vilu.triage.labels import SKIPPED, LabelBook, side_of
from vilu.triage.photos import Photos

PLANNED: Final = 200
"""Labels that vouch, for which the limit is chosen: with so many a risk of 1 % shows that it is below 5 %."""

ORDER: Final = 2**63
"""Places in the random order."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Sides:
    """Of every photo: whether it can be used, vouches (else teaches), and its place in the random order.

    And what is known of it: whether its label was given or skipped, or is there at all.
    """

    usable: Mask
    vouches: Mask
    place: Ints
    labelled: Mask  # a class, or one that is outside
    answered: Mask  # that, or skipped
    skipped: Mask
    given: Mask  # unasked

    @classmethod
    def of(cls, photos: Photos, book: LabelBook, seed: int) -> Sides:
        """Of photos whose labels were set; of equal pictures the first one counts.

        One that has changed since its label was given, and may have changed sides with that,
        vouches for nothing.
        """
        pictures = photos.pictures
        vouches, order = side_of(pictures, seed)
        usable, first = np.zeros((2, len(photos)), np.bool_)
        usable[photos.usable_rows.numpy()] = True
        first[np.unique(order, return_index=True)[1]] = True
        entries = [book.entries.get(path) for path in photos.ids]
        other = [
            one is not None and one.is_of_another(now)
            for one, now in zip(entries, pictures, strict=True)
        ]
        answered = np.array(
            [one is not None and one.label is not None for one in entries], np.bool_
        )
        skipped = np.array([one is not None and one.label == SKIPPED for one in entries], np.bool_)
        given = np.array([one is not None and one.stream == "given" for one in entries], np.bool_)
        place = (order >> np.uint64(1)).astype(np.int64)
        usable &= first & ~(vouches & np.array(other, np.bool_))
        return cls(usable, vouches, place, answered & ~skipped, answered, skipped, given & answered)

    @property
    def voucher(self) -> Mask:
        """(N,) photos whose labels may vouch."""
        return self.usable & self.vouches

    @property
    def teacher(self) -> Mask:
        """(N,) photos whose labels may teach."""
        return self.usable & ~self.vouches


def first_of_scene(photos: EmbeddingSource, known: Ints, rows: Ints) -> Mask:
    """(M,) which of the rows are nearly like no known one, and like none of the rows before them."""
    every = np.concatenate([known, rows])
    first: Mask = near_copies(photos, every) == np.arange(len(every))
    return first[len(known) :]


class Trial(Model):
    """A predictor that is tried: the thresholds that it may get, and how far labels may speak for it."""

    n_fit: int = Field(ge=0)  # labels that it was fitted on
    grid: tuple[float, ...]  # thresholds, ascending
    limit: float  # only photos up to this uncertainty have labels that speak for it
    likely: bool  # whether its own probabilities let one hope for a promise there
    attempt: int = Field(
        default=0, ge=0
    )  # its number among those of which labels could certify something; 0: not yet

    @classmethod
    def plan(
        cls, n_fit: int, scores: Floats, n: int, risk: tuple[float, float], least: float = 0.0
    ) -> Trial:
        """A new one: from the scores (M,) of photos that vouch, and how many of their labels there may be.

        ``risk`` is the error rate and its level; at least a share ``least`` of the photos lies
        below the limit.
        """
        limit, likely = choose_limit(scores, min(n, len(scores)), *risk)
        lowest = float(np.quantile(scores, least, method="higher"))
        limit, likely = max(limit, lowest), likely and limit >= lowest
        grid = tuple(grid_of(scores, limit).tolist())
        return cls(n_fit=n_fit, grid=grid, limit=limit, likely=likely)


@dataclass(frozen=True)
class PromiseProgress:
    """How far a promise is.

    Attributes:
        looks: Thresholds, risk and level.
        rows: Photos whose labels count.
        outcomes: What is said of them; a photo that nobody could name counts as answered wrong.
        missing: Photos whose labels are lacking before anything more can be said, in their order.
        certified: Place of the threshold that is certified; None where none is.
        more: About how many more labels would certify something; None where none would.
    """

    looks: Looks
    rows: Ints
    outcomes: Outcomes
    missing: Ints
    certified: int | None
    more: int | None

    @property
    def threshold(self) -> float:
        """What is certified; -inf where nothing is."""
        return -math.inf if self.certified is None else float(self.looks.grid[self.certified])


def stand(
    trial: Trial,
    outcomes: Outcomes,
    sides: Sides,
    risk: tuple[float, float],
    up_to: int,
    tried: int,
) -> PromiseProgress:
    """What the labels of photos up to a place in the order say of a predictor, as soon as all of them are there.

    ``outcomes`` are of all photos by that predictor, ``risk`` the error rate and the level,
    ``tried`` the number of predictors that were tried before it.
    """
    u = outcomes.uncertainty
    region = sides.voucher & (u <= trial.limit)
    drawn = region & (sides.place < up_to)
    missing = np.flatnonzero(drawn & ~sides.answered)
    rows = np.flatnonzero((drawn | (region & sides.given)) & (len(missing) == 0))
    max_risk, delta = risk
    looks = Looks(
        np.array(trial.grid), max_risk, level_of(trial.attempt or tried + 1, delta), trial.limit
    )
    taken = outcomes.take(rows)
    taken = dataclasses.replace(taken, failure=np.where(sides.skipped[rows], 1, taken.failure))
    certified = looks.certified(taken.uncertainty, taken.failure)
    more = looks.more_needed(taken.uncertainty, taken.failure)
    return PromiseProgress(
        looks, rows, taken, missing[np.argsort(sides.place[missing])], certified, more
    )


def rule_of_draws(draws: Mapping[str, PromiseProgress], max_risk: float, confidence: float) -> Rule:
    """The promise of all draws, by group, or what it lacks."""
    groups = {group: (one.looks, one.outcomes) for group, one in draws.items()}
    return rule_at_any_time(groups, max_risk, confidence)


def keep_promise(
    folder: Path,
    predictor: FailurePredictor,
    photos: Photos,
    draws: Mapping[str, PromiseProgress],
    rows: Outcomes,
    rule: Rule,
    dataset: str,
) -> Calibration:
    """Leave a rule, and the labelled ``rows`` of the ``draws`` that it rests on, beside the predictor.

    As ``vilu calibrate`` does.
    """
    wrong = int((rows.failure == 1).sum())
    # it is a probability as it is; labels below the limit alone would bend it
    predictor.calibrator_ = Logistic(
        form="temperature", weights=(1.0,), intercept=0.0, n=len(rows), n_failures=wrong
    )
    target = Target(
        max_risk=rule.max_risk,
        confidence=rule.confidence,
        method="anytime",
        per_class=ALL not in draws,
    )
    calibration = keep_calibration(
        folder,
        predictor,
        rows,
        photos,
        target,
        rule,
        (dataset, None),
        dtype=photos.first.manifest.dtype,
        draws={group: Draw.of(one.looks) for group, one in draws.items()},
    )
    write_card(folder)
    return calibration
