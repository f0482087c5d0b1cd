"""What the labels say about the answers: the verdict with which a run begins.

No answer is judged by a label that its predictor was fitted on. So adapted answers are judged on
two kinds of photos. For labelled photos of the calibration side, they are the answers of the
present predictor. For those of the fit side, they are the cross-fitted answers, whose numbers are
saved with the predictor (``LikelyRight``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
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

    All kinds of answers are judged by the same labels: those of photos with an answer of every
    kind, and the cross-fitted ones.

    Attributes:
        label: (M,) indices of classes; ``OUTSIDE`` for none of the classes.
        answers: (M,) indices of classes by kind of answers; -1 without an answer. Adapted answers
            are those to photos of the calibration side.
        n_cross_fitted: Number of labels that cross-fitted answers are judged by.
        cross_fitted_wrong: Number of wrong answers to these labels, by kind of answers.
    """

    label: Ints
    answers: dict[AnswerKind, Ints]
    n_cross_fitted: int = 0
    cross_fitted_wrong: Mapping[AnswerKind, int] = field(default_factory=dict)

    @property
    def has_every_answer(self) -> NDArray[np.bool_]:
        """(M,) which photos have an answer of every kind."""
        has_answer = np.ones(len(self.label), np.bool_)
        for answers in self.answers.values():
            has_answer &= answers != UNKNOWN
        return has_answer

    @property
    def n_judging(self) -> int:
        """Number of labels that judge the answers."""
        return int(self.has_every_answer.sum()) + self.n_cross_fitted

    def share_right(self, kind: AnswerKind) -> float:
        """Share of right answers of this kind, by the labels that judge all kinds."""
        is_right = (self.answers[kind] == self.label) & self.has_every_answer
        n_right_cross_fitted = self.n_cross_fitted - self.cross_fitted_wrong.get(kind, 0)
        return (int(is_right.sum()) + n_right_cross_fitted) / self.n_judging

    def most_frequent_label(self) -> tuple[int, float]:
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
    """The labels of all labelled photos, and the answers that they judge.

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
    n_cross_fitted = 0
    cross_fitted_wrong: dict[AnswerKind, int] = {}
    if likely is not None and likely.n_wrong_zero_shot is not None:
        n_cross_fitted = likely.n
        cross_fitted_wrong = {"zero_shot": likely.n_wrong_zero_shot, "adapted": likely.n_wrong}
    in_calibration = is_calibration[rows]
    has_judging_label = n_cross_fitted > 0 or in_calibration.any()
    if outcomes.answer != "adapted" or not has_judging_label:
        return LabelledAnswers(label[rows], answers)
    answers["adapted"] = _adapted_answers(photos, predictor, rows, in_calibration)
    return LabelledAnswers(label[rows], answers, n_cross_fitted, cross_fitted_wrong)


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
    if labelled.answers and labelled.n_judging:
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
    warning = f"Warning: {n / len(answers):.0%} of the answers are {_class_name(outcomes, index)!r}"
    if len(labelled.label):
        share = float((labelled.label == index).mean())
        return f"{warning}, and {share:.0%} of the labels."
    return f"{warning}. Either nearly all photos are, or classes and prompts do not fit them."


def _judgement(labelled: LabelledAnswers, outcomes: Outcomes) -> list[str]:
    """What the labels show: shares of right answers, and confusions of the judged answers."""
    judged: AnswerKind = "zero_shot"
    if outcomes.answer == "adapted" and "adapted" in labelled.answers:
        judged = "adapted"
    most_frequent_label, share_of_most_frequent = labelled.most_frequent_label()
    parts = []
    for kind in labelled.answers:
        share = labelled.share_right(kind)
        parts.append(f"{share:.0%} of the {KINDS[kind]} answers")
    class_name = _class_name(outcomes, most_frequent_label)
    sentences = [
        f"{' and '.join(parts)} are right, by {plural(labelled.n_judging, 'label')}. "
        f"Always saying {class_name!r} is right in {share_of_most_frequent:.0%} of all "
        f"{plural(len(labelled.label), 'label')}."
    ]
    if labelled.share_right(judged) <= share_of_most_frequent:
        sentences.append("So the answers are worth no more than that one word.")
    confusion_texts = []
    for label, answer, n in labelled.confusions(judged):
        confusion_texts.append(
            f"{_class_name(outcomes, answer)!r} for {_class_name(outcomes, label)!r} ({n})"
        )
    if confusion_texts:
        sentences.append(f"The most frequent confusions: {', '.join(confusion_texts)}.")
    return sentences


def _class_name(outcomes: Outcomes, index: int) -> str:
    """The name of the class with this index; a negative index is none of the classes."""
    names = outcomes.class_names or ()
    return str(names[index]) if index >= 0 else OUTSIDE_NAME
