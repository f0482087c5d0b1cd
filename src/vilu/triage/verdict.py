"""The labels' verdict on the answers. The summary of a run begins with this verdict.

Each answer is judged by labels that the predictor was not fitted on. So adapted answers about
labelled photos come from two sources:

- Photos on the calibration side: the present predictor's answers.
- Photos on the fit side: the cross-fitted answers. Only the number of wrong answers is known. This
  number is saved with the predictor (``LikelyRight``).
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

MIN_SHARE_FOR_WARNING: Final = 0.9
"""There is a warning if at least this share of the answers is the same class."""

MIN_ANSWERS_FOR_WARNING: Final = 20
"""Smallest answer count for this warning."""

ANSWER_KIND_NAMES: Final[dict[AnswerKind, str]] = {"zero_shot": "zero-shot", "adapted": "adapted"}
"""Maps answer kinds to names in texts."""

MAX_CONFUSIONS_SHOWN: Final = 3
"""Maximum number of confusions in a verdict."""


@dataclass(frozen=True)
class LabelledAnswers:
    """Labels for M photos, and answers by predictors that were not fitted on these labels.

    All answer kinds are judged by the same labels: the labels of photos with an answer of every
    kind, and the labels that judge cross-fitted answers.

    Attributes:
        label: (M,) class indices. ``OUTSIDE`` means none of the classes.
        answers: Maps answer kinds to (M,) class indices. -1 without an answer. Adapted answers
            exist only about photos on the calibration side.
        n_cross_fitted: How many labels judge cross-fitted answers.
        cross_fitted_wrong: Maps answer kinds to the number of wrong cross-fitted answers.
    """

    label: Ints
    answers: dict[AnswerKind, Ints]
    n_cross_fitted: int = 0
    cross_fitted_wrong: Mapping[AnswerKind, int] = field(default_factory=dict)

    @property
    def has_every_answer(self) -> NDArray[np.bool_]:
        """(M,) bool, True for photos with an answer of every kind."""
        has_answer = np.ones(len(self.label), np.bool_)
        for answers in self.answers.values():
            has_answer &= answers != UNKNOWN
        return has_answer

    @property
    def n_labels_for_verdict(self) -> int:
        """Number of labels that judge answers."""
        return int(self.has_every_answer.sum()) + self.n_cross_fitted

    def n_with_answer(self, kind: AnswerKind) -> int:
        """Count the photos with an answer of this kind."""
        return int((self.answers[kind] != UNKNOWN).sum())

    def share_right(self, kind: AnswerKind) -> float:
        """Compute the share of right answers among the judged answers of this kind."""
        is_right = (self.answers[kind] == self.label) & self.has_every_answer
        n_right_cross_fitted = self.n_cross_fitted - self.cross_fitted_wrong.get(kind, 0)
        return (int(is_right.sum()) + n_right_cross_fitted) / self.n_labels_for_verdict

    def most_frequent_label(self) -> tuple[int, float]:
        """Return the most frequent label and its share in all labels. Return -1, 0 if none."""
        counts = Counter(self.label.tolist())
        if not counts:
            return UNKNOWN, 0.0
        ((index, n),) = counts.most_common(1)
        return index, n / len(self.label)

    def confusions(self, kind: AnswerKind) -> list[tuple[int, int, int]]:
        """Return the most frequent confusions, each as (label, wrong answer, how often)."""
        is_wrong = (self.answers[kind] != self.label) & (self.answers[kind] != UNKNOWN)
        labels = self.label[is_wrong].tolist()
        wrong_answers = self.answers[kind][is_wrong].tolist()
        counts = Counter(zip(labels, wrong_answers, strict=True)).most_common(MAX_CONFUSIONS_SHOWN)
        return [(label, answer, n) for (label, answer), n in counts]


def collect_labelled_answers(
    photos: Photos,
    outcomes: Outcomes,
    predictor: FailurePredictor,
    is_calibration: NDArray[np.bool_],
    likely_right: LikelyRight | None,
) -> LabelledAnswers:
    """Collect the labels of all labelled photos, and the answers about these photos.

    If zero-shot answers are judged, the result has only zero-shot answers. If no label can judge
    adapted answers, the result has only zero-shot answers, too.

    Args:
        photos: The photos, with labels.
        outcomes: The present predictor's outcomes for all photos.
        predictor: The present predictor.
        is_calibration: (N,) bool, True for photos on the calibration side.
        likely_right: The estimate saved with the predictor: the number of all cross-fitted
            answers, and the number of wrong cross-fitted answers.
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
    if likely_right is not None and likely_right.n_wrong_zero_shot is not None:
        n_cross_fitted = likely_right.n
        cross_fitted_wrong = {
            "zero_shot": likely_right.n_wrong_zero_shot,
            "adapted": likely_right.n_wrong,
        }
    is_calibration_row = is_calibration[rows]
    can_judge_adapted = n_cross_fitted > 0 or is_calibration_row.any()
    if outcomes.answer != "adapted" or not can_judge_adapted:
        return LabelledAnswers(label[rows], answers)
    answers["adapted"] = _adapted_answers(photos, predictor, rows, is_calibration_row)
    return LabelledAnswers(label[rows], answers, n_cross_fitted, cross_fitted_wrong)


def _adapted_answers(
    photos: Photos, predictor: FailurePredictor, rows: Ints, is_calibration_row: NDArray[np.bool_]
) -> Ints:
    """Return adapted answers (M,) about calibration-side rows, and -1 for fit-side rows."""
    answers = np.full(len(rows), UNKNOWN)
    posterior = posterior_of(predictor, photos, rows[is_calibration_row])
    answers[is_calibration_row] = posterior.argmax(axis=1)
    return answers


def verdict_in_words(
    labelled_answers: LabelledAnswers, outcomes: Outcomes, *, has_doubtful: bool
) -> str:
    """Return the verdict as a text, or "" if there is no label and nothing to warn about.

    Args:
        labelled_answers: Labels and answers for the labelled photos.
        outcomes: The present predictor's outcomes for all photos.
        has_doubtful: Whether some labels were requested because the photos are doubtful.
    """
    sentences = [_warning_of_one_class(labelled_answers, outcomes)]
    if labelled_answers.answers and labelled_answers.n_labels_for_verdict:
        sentences += _judgement(labelled_answers, outcomes)
        if has_doubtful:
            sentences.append(
                "Labels of doubtful photos are among them, so all photos may do better."
            )
    return " ".join(sentence for sentence in sentences if sentence)


def _warning_of_one_class(labelled_answers: LabelledAnswers, outcomes: Outcomes) -> str:
    """Return a warning if nearly all answers are the same class, or else ""."""
    if outcomes.prediction is None:
        return ""
    answers = outcomes.prediction[outcomes.prediction != UNKNOWN].tolist()
    if len(answers) < MIN_ANSWERS_FOR_WARNING:
        return ""
    ((index, n),) = Counter(answers).most_common(1)
    if n < MIN_SHARE_FOR_WARNING * len(answers):
        return ""
    share_of_answers = n / len(answers)
    class_name = _class_name(outcomes, index)
    warning = f"Warning: {share_of_answers:.0%} of the answers are {class_name!r}"
    if len(labelled_answers.label):
        share_of_labels = float((labelled_answers.label == index).mean())
        return f"{warning}, and {share_of_labels:.0%} of the labels."
    return f"{warning}. Either nearly all photos are, or classes and prompts do not fit them."


def _judgement(labelled_answers: LabelledAnswers, outcomes: Outcomes) -> list[str]:
    """Write sentences on the shares of right answers, and on the judged answers' confusions."""
    judged_kind: AnswerKind = "zero_shot"
    if outcomes.answer == "adapted" and "adapted" in labelled_answers.answers:
        judged_kind = "adapted"
    most_frequent_label, share_of_most_frequent = labelled_answers.most_frequent_label()
    shares = []
    for kind in labelled_answers.answers:
        share = labelled_answers.share_right(kind)
        shares.append(f"{share:.0%} of the {ANSWER_KIND_NAMES[kind]} answers")
    class_name = _class_name(outcomes, most_frequent_label)
    judging_labels = plural(labelled_answers.n_labels_for_verdict, "label")
    all_labels = plural(len(labelled_answers.label), "label")
    sentences = [
        f"{' and '.join(shares)} are right, by {judging_labels}. Always saying {class_name!r} is "
        f"right in {share_of_most_frequent:.0%} of all {all_labels}."
    ]
    if labelled_answers.share_right(judged_kind) <= share_of_most_frequent:
        sentences.append("So the answers are worth no more than that one word.")
    confusions_text = _confusions_in_words(labelled_answers, outcomes, judged_kind)
    if confusions_text:
        sentences.append(confusions_text)
    return sentences


def _confusions_in_words(
    labelled_answers: LabelledAnswers, outcomes: Outcomes, kind: AnswerKind
) -> str:
    """Write a sentence on the most frequent confusions of an answer kind, or "" without one."""
    texts = []
    for label, answer, n in labelled_answers.confusions(kind):
        answer_name = _class_name(outcomes, answer)
        label_name = _class_name(outcomes, label)
        texts.append(f"{answer_name!r} for {label_name!r} ({n})")
    if not texts:
        return ""
    # Cross-fitted answers are counted, but not saved one by one.
    labels_behind = ""
    if labelled_answers.n_cross_fitted:
        n = labelled_answers.n_with_answer(kind)
        labels_behind = f" by the {plural(n, 'label')} of the calibration side"
    return f"The most frequent confusions{labels_behind}: {', '.join(texts)}."


def _class_name(outcomes: Outcomes, index: int) -> str:
    """Return the class name at this index, or "(outside)" for a negative index."""
    names = outcomes.class_names or ()
    return str(names[index]) if index >= 0 else OUTSIDE_NAME
