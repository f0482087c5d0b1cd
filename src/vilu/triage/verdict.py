"""What the labels say about the answers: the verdict with which a run begins.

No answer is judged by a label that its predictor was fitted on. Adapted answers are those of the
present predictor to labelled photos of the calibration side. Of the fit side the cross-fitted
answers are counted, which the fit has kept (``LikelyRight``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vilu.calibration.likely import LikelyRight
from vilu.embeddings.columns import AnswerKind
from vilu.errors import OUTSIDE, OUTSIDE_NAME, UNKNOWN
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.text import plural
from vilu.triage.photos import Photos
from vilu.triage.posteriors import posterior_of

NEARLY_ALL: Final = 0.9
"""There is a warning if at least this share of the answers is one class."""

LEAST_ANSWERS: Final = 20
"""Smallest number of answers for this warning."""

KINDS: Final[dict[AnswerKind, str]] = {"zero_shot": "zero-shot", "adapted": "adapted"}
"""Kinds of answers as texts call them."""

CONFUSIONS: Final = 3
"""Maximum number of confusions that a verdict names."""


@dataclass(frozen=True)
class LabelledAnswers:
    """Labels of M photos, and answers of predictors that were not fitted on these labels.

    Attributes:
        label: (M,) indices of classes; ``OUTSIDE`` for none of the classes.
        answers: (M,) indices of classes by kind of answers; -1 without an answer. Adapted answers
            are those to photos of the calibration side.
        n_cross_fitted: Number of labels with a cross-fitted adapted answer.
        n_cross_fitted_wrong: Number of wrong answers among these.
    """

    label: Ints
    answers: dict[AnswerKind, Ints]
    n_cross_fitted: int = 0
    n_cross_fitted_wrong: int = 0

    def share_right(self, kind: AnswerKind) -> float:
        """Share of right answers among the labels that have an answer of this kind."""
        has_answer = self.answers[kind] != UNKNOWN
        n = int(has_answer.sum())
        n_right = int((self.answers[kind] == self.label)[has_answer].sum())
        if kind == "adapted":
            n += self.n_cross_fitted
            n_right += self.n_cross_fitted - self.n_cross_fitted_wrong
        return n_right / n

    def commonest(self) -> tuple[int, float]:
        """The most frequent label, and its share of all labels; -1 without any."""
        counts = Counter(self.label.tolist())
        if not counts:
            return UNKNOWN, 0.0
        ((index, n),) = counts.most_common(1)
        return index, n / len(self.label)

    def confusions(self, kind: AnswerKind) -> list[tuple[int, int, int]]:
        """Label, wrong answer and number of the most frequent confusions."""
        is_wrong = (self.answers[kind] != self.label) & (self.answers[kind] != UNKNOWN)
        labels = self.label[is_wrong].tolist()
        wrong_answers = self.answers[kind][is_wrong].tolist()
        counts = Counter(zip(labels, wrong_answers, strict=True)).most_common(CONFUSIONS)
        return [(label, answer, n) for (label, answer), n in counts]


def labelled_answers(
    photos: Photos,
    outcomes: Outcomes,
    predictor: FailurePredictor,
    is_calibration: NDArray[np.bool_],
    likely: LikelyRight | None,
) -> LabelledAnswers:
    """Labels and answers of all labelled photos.

    Args:
        photos: The photos, with their labels.
        outcomes: Outcomes of all photos by the present predictor.
        predictor: The present predictor.
        is_calibration: (N,) which photos are of the calibration side.
        likely: The estimate that was kept with the predictor; it counts the cross-fitted answers.
    """
    label = np.where(photos.outside.numpy(), OUTSIDE, photos.target.numpy())
    usable = photos.usable_rows.numpy()
    rows = usable[label[usable] != UNKNOWN]
    zero_shot = outcomes.zero_shot
    if zero_shot is None:  # then the judged answers are the zero-shot answers
        zero_shot = outcomes.prediction
    answers: dict[AnswerKind, Ints] = {}
    if zero_shot is not None and (zero_shot[rows] != UNKNOWN).any():
        answers["zero_shot"] = zero_shot[rows]
    if outcomes.answer != "adapted" or likely is None:
        return LabelledAnswers(label[rows], answers)
    in_calibration = is_calibration[rows]
    if likely.n or in_calibration.any():
        answers["adapted"] = _adapted_answers(photos, predictor, rows, in_calibration)
    return LabelledAnswers(label[rows], answers, likely.n, likely.n_wrong)


def _adapted_answers(
    photos: Photos, predictor: FailurePredictor, rows: Ints, in_calibration: NDArray[np.bool_]
) -> Ints:
    """(M,) adapted answers to labelled rows of the calibration side; -1 to all others."""
    answers = np.full(len(rows), UNKNOWN)
    posterior = posterior_of(predictor, photos, rows[in_calibration])
    answers[in_calibration] = posterior.argmax(axis=1)
    return answers


def verdict_in_words(labelled: LabelledAnswers, outcomes: Outcomes, *, has_doubtful: bool) -> str:
    """The verdict as a text; empty if there is no label and nothing to warn of.

    Args:
        labelled: Labels and answers of the labelled photos.
        outcomes: Outcomes of all photos by the present predictor.
        has_doubtful: Whether some labels were asked for because their photos are doubtful.
    """
    sentences = [_warning_of_one_class(labelled, outcomes)]
    if labelled.answers:
        sentences += _judgement(labelled, outcomes)
        if has_doubtful:
            sentences.append(
                "Labels of doubtful photos are among them, so all photos may do better."
            )
    return " ".join(sentence for sentence in sentences if sentence)


def _warning_of_one_class(labelled: LabelledAnswers, outcomes: Outcomes) -> str:
    """A warning if nearly all answers are one class; empty otherwise."""
    if outcomes.prediction is None:
        return ""
    answers = outcomes.prediction[outcomes.prediction != UNKNOWN].tolist()
    if len(answers) < LEAST_ANSWERS:
        return ""
    ((index, n),) = Counter(answers).most_common(1)
    if n < NEARLY_ALL * len(answers):
        return ""
    warning = f"Warning: {n / len(answers):.0%} of the answers are {_name(outcomes, index)!r}"
    if len(labelled.label):
        share = float((labelled.label == index).mean())
        return f"{warning}, and {share:.0%} of the labels."
    return f"{warning}. Either nearly all photos are, or classes and prompts do not fit them."


def _judgement(labelled: LabelledAnswers, outcomes: Outcomes) -> list[str]:
    """What the labels show: shares of right answers, and confusions of the judged answers."""
    judged: AnswerKind = "zero_shot"
    if outcomes.answer == "adapted" and "adapted" in labelled.answers:
        judged = "adapted"
    commonest, share_commonest = labelled.commonest()
    parts = []
    for kind in labelled.answers:
        share = labelled.share_right(kind)
        parts.append(f"{share:.0%} of the {KINDS[kind]} answers")
    always = _name(outcomes, commonest)
    sentences = [
        f"By {plural(len(labelled.label), 'label')}, right are {' and '.join(parts)}. "
        f"Always saying {always!r} is right in {share_commonest:.0%}."
    ]
    if labelled.share_right(judged) <= share_commonest:
        sentences.append("So the answers are worth no more than that one word.")
    confused = []
    for label, answer, n in labelled.confusions(judged):
        confused.append(f"{_name(outcomes, answer)!r} for {_name(outcomes, label)!r} ({n})")
    if confused:
        sentences.append(f"The most frequent confusions: {', '.join(confused)}.")
    return sentences


def _name(outcomes: Outcomes, index: int) -> str:
    """The name of a class, or that of none of the classes."""
    names = outcomes.class_names or ()
    return str(names[index]) if index >= 0 else OUTSIDE_NAME
