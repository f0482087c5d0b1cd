"""A scikit-learn classifier that accepts answers or leaves answers for review."""

from __future__ import annotations

from typing import Any, Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils import Tags, _safe_indexing, check_random_state, get_tags, indexable
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_is_fitted, column_or_1d

from vilu.calibration.rules import Rule, certify
from vilu.callers import warn_caller
from vilu.errors import UsageError
from vilu.metrics.counts import Floats
from vilu.outcomes.outcomes import Outcomes
from vilu.validation import require_between

REVIEW: Final = None
"""Value of ``predict_or_review`` for an answer left for review."""


# scikit-learn has no type hints. So mypy sees scikit-learn's classes as Any, but allows no base
# class Any.
class SelectiveClassifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifier that accepts a wrapped classifier's answers, with a guaranteed error rate.

    The uncertainty of an answer is 1 - max_c p_c, where p_c is the estimator's probability for
    class c. An answer is accepted if its uncertainty is at most a threshold.

    ``fit`` sets a part of the rows aside for calibration, and fits the estimator on the remaining
    rows. On the calibration part, ``fit`` certifies a threshold by "ltt" (``vilu.certify``). With
    probability ``confidence`` over how this part is drawn, at most the share ``max_risk`` of the
    accepted answers is wrong. If no threshold can be certified, nothing is accepted, and a warning
    gives the reason.

    Args:
        estimator: A classifier with ``predict_proba``. A clone is fitted.
        max_risk: Largest share of wrong answers among the accepted answers, in (0, 1).
        confidence: The guarantee's confidence, in (0, 1).
        calibration_size: Share of each class's rows to set aside, in (0, 1).
        prefit: Whether the estimator is fitted already. Then all rows given to ``fit`` are for
            calibration, and the estimator must not have been fitted on these rows.
        random_state: Seed or generator for choosing the calibration rows. None: every fit draws
            different rows. NumPy's global generator is not used.

    Attributes:
        estimator_: The fitted estimator.
        classes_: The classes.
        rule_: The ``vilu.Rule`` for accepting answers. None if there was no row to calibrate on.
        n_features_in_: Number of features, if the estimator has this attribute.
        feature_names_in_: The feature names, if the estimator has this attribute.

    Raises:
        UsageError: If the estimator has no ``predict_proba``, or a parameter is out of range.

    Examples:
        >>> import numpy as np
        >>> from sklearn.linear_model import LogisticRegression
        >>> from vilu.sklearn import SelectiveClassifier
        >>> X = np.random.default_rng(0).normal(size=(1000, 2))
        >>> y = X[:, 0] > 0
        >>> X_fit, X_new = np.split(X, [800])
        >>> y_fit, y_new = np.split(y, [800])
        >>> model = SelectiveClassifier(LogisticRegression(), max_risk=0.05, random_state=0)
        >>> accepted = model.fit(X_fit, y_fit).accept(X_new)
        >>> wrong = model.predict(X_new) != y_new
        >>> bool(accepted.mean() > 0.9)
        True
        >>> bool(wrong[accepted].mean() <= 0.05)
        True
    """

    def __init__(
        self,
        estimator: Any,  # noqa: ANN401 - any classifier
        *,
        max_risk: float = 0.05,
        confidence: float = 0.95,
        calibration_size: float = 0.3,
        prefit: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.max_risk = max_risk
        self.confidence = confidence
        self.calibration_size = calibration_size
        self.prefit = prefit
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        """Return scikit-learn's tags. The allowed inputs and classes are those of the estimator."""
        tags = super().__sklearn_tags__()
        estimator_tags = get_tags(self.estimator)
        tags.input_tags = estimator_tags.input_tags
        tags.classifier_tags = estimator_tags.classifier_tags
        return tags

    def fit(self, X: Any, y: ArrayLike) -> Self:  # noqa: ANN401 - whatever the estimator takes
        """Fit the estimator on a part of the rows, and certify a threshold on the remaining rows.

        Warns:
            UserWarning: If no threshold can be certified. The warning says what is missing.
        """
        self._check_parameters()
        X, labels = _checked_rows(X, y)
        if self.prefit:
            check_is_fitted(self.estimator)
            self.estimator_ = self.estimator
            calibration_rows = np.arange(len(labels))
        else:
            is_calibration = _calibration_mask(labels, self.calibration_size, self.random_state)
            fit_rows = np.flatnonzero(~is_calibration)
            calibration_rows = np.flatnonzero(is_calibration)
            self.estimator_ = clone(self.estimator)
            self.estimator_.fit(_safe_indexing(X, fit_rows), labels[fit_rows])
        self.classes_ = self.estimator_.classes_
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        X_calibration = _safe_indexing(X, calibration_rows)
        self.rule_ = self._certified_rule(X_calibration, labels[calibration_rows])
        return self

    def _check_parameters(self) -> None:
        for name in ("max_risk", "confidence", "calibration_size"):
            require_between(name, getattr(self, name))
        if not hasattr(self.estimator, "predict_proba"):
            raise UsageError(
                f"{type(self.estimator).__name__} has no predict_proba. Wrap it in "
                "sklearn.calibration.CalibratedClassifierCV."
            )

    def _certified_rule(self, X: Any, labels: NDArray[Any]) -> Rule | None:  # noqa: ANN401
        """Make the rule from the calibration rows. Return None if there are no calibration rows."""
        if not len(labels):
            warn_caller(
                "nothing is accepted: no row is left for calibration. Give more rows of each class."
            )
            return None
        is_wrong = self.predict(X) != labels
        uncertainty = self.predict_uncertainty(X)
        outcomes = Outcomes(uncertainty, failure=is_wrong.astype(np.int64))
        rule = certify(outcomes, max_risk=self.max_risk, confidence=self.confidence)
        if not rule.feasible:
            (threshold,) = rule.thresholds.values()  # without groups there is a single threshold
            warn_caller(f"nothing is accepted: {threshold.why}.")
        return rule

    def predict_proba(self, X: Any) -> Floats:  # noqa: ANN401
        """Return the estimator's class probabilities (N, C)."""
        check_is_fitted(self)
        probabilities: Floats = self.estimator_.predict_proba(X)
        return probabilities

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: ANN401
        """Return every row's likeliest class (N,), whether this answer is accepted or not."""
        class_index = self.predict_proba(X).argmax(axis=1)
        likeliest: NDArray[Any] = self.classes_[class_index]
        return likeliest

    def predict_uncertainty(self, X: Any) -> Floats:  # noqa: ANN401
        """Return every row's uncertainty (N,): 1 - max_c p_c, with the class probabilities p_c."""
        largest_probability = self.predict_proba(X).max(axis=1)
        uncertainty: Floats = 1 - largest_probability.astype(np.float64)
        return uncertainty

    def accept(self, X: Any) -> NDArray[np.bool_]:  # noqa: ANN401
        """Return a mask (N,), True for the rows with accepted answers."""
        uncertainty = self.predict_uncertainty(X)
        if self.rule_ is None:
            return np.zeros(len(uncertainty), np.bool_)
        return self.rule_.accept(uncertainty)

    def predict_or_review(self, X: Any) -> NDArray[np.object_]:  # noqa: ANN401
        """Return (N,) answers: the class if the row is accepted, ``REVIEW`` (None) if rejected."""
        answers = self.predict(X).astype(object)
        answers[~self.accept(X)] = REVIEW
        return answers

    def score(
        self,
        X: Any,  # noqa: ANN401
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
    ) -> float:
        """Compute the accuracy over all rows, accepted or not.

        ``max_risk`` does not bound this number. ``max_risk`` bounds the accepted answers' error
        rate: ``(model.predict(X) != y)[model.accept(X)].mean()``.
        """
        return float(super().score(X, y, sample_weight))


def _checked_rows(X: Any, y: ArrayLike | None) -> tuple[Any, NDArray[Any]]:  # noqa: ANN401
    """Return the checked rows, ready for indexing, and the checked classes (N,)."""
    if y is None:
        raise UsageError(
            "SelectiveClassifier requires y to be passed, but the target y is None. Give the "
            "classes of the rows."
        )
    labels = column_or_1d(y, warn=True)
    if labels.dtype.kind == "f":
        assert_all_finite(labels, input_name="y")
    check_classification_targets(labels)
    X, labels = indexable(X, labels)
    return X, np.asarray(labels)


def _calibration_mask(
    labels: NDArray[Any], share: float, random_state: int | np.random.RandomState | None
) -> NDArray[np.bool_]:
    """Draw the rows for calibration at random from each class, and return their mask (N,).

    ``share`` is the share of each class's rows. The number of rows is rounded down.
    """
    if random_state is None:
        # With None, check_random_state would give the process's global generator.
        random_state = np.random.RandomState()
    generator = check_random_state(random_state)
    is_calibration = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        rows_of_label = np.flatnonzero(labels == label)
        rows = generator.permutation(rows_of_label)
        n_calibration = int(share * len(rows))
        is_calibration[rows[:n_calibration]] = True
    return is_calibration
