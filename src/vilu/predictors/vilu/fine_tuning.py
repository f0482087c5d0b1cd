"""Fine-tuning: training that begins with the weights of an earlier fit.

Fine-tuning is useful if a head was fitted on one data set, and a second data set has only a few
labels.
"""

from __future__ import annotations

from collections.abc import Mapping

from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors import PREDICTORS
from vilu.predictors.contract.parameters import build_predictor, parameters
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.vilu.head import HeadPredictor

FINE_TUNING = {"epochs": None, "learning_rate": 1e-3, "freeze_epochs": 0}
"""Default parameters in fine-tuning. All parameters not named here are taken from the first fit.

- The learning rate is 1/30 of the rate for a new head, because the weights need only a correction.
  On synthetic data with five labels per class, 0.001 was the best among 0.03, 0.01, 0.003 and
  0.001.
- The attention is trained from the first step, because the first fit has already trained the
  attention.
- The epoch count is the default for the row count, not the epoch count of the first fit. With a few
  labels the epoch count is 300.
"""


def start_from_fitted(
    cls: type[FailurePredictor],
    fitted_predictor: FailurePredictor,
    values: Mapping[str, object] | None = None,
) -> HeadPredictor:
    """Create a predictor of class ``cls``, whose ``fit`` begins with the fitted weights.

    Args:
        cls: Class of a method with a failure head.
        fitted_predictor: A fitted predictor of this class.
        values: Parameters by name, also as strings (``--set key=value``). Parameters not in
            ``values`` are taken from ``FINE_TUNING``, or else from ``fitted_predictor``.

    Raises:
        UsageError: If the method ``cls`` has no failure head.
        ProvenanceError: If ``fitted_predictor`` has a different class, or weights that do not fit
            ``values``.
        DataError: If ``fitted_predictor`` is a constant.
    """
    if not issubclass(cls, HeadPredictor):
        methods_with_head = []
        for name, method in PREDICTORS.items():
            if issubclass(method, HeadPredictor):
                methods_with_head.append(name)
        raise UsageError(
            f"{cls.name} does not begin from another fit; methods with a failure head do: "
            f"{', '.join(methods_with_head)}. (vilu_plus needs no other fit: with few labels it "
            "stays near the zero-shot logits.)"
        )
    if not isinstance(fitted_predictor, HeadPredictor) or type(fitted_predictor) is not cls:
        raise ProvenanceError(
            f"a {cls.name} begins from a fitted {cls.name}. Got a {fitted_predictor.name} instead."
        )
    fitted_predictor.require_fitted()
    if fitted_predictor.constant_ is not None:
        raise DataError(
            f"the {fitted_predictor.name} to begin from is a constant: "
            "its training rows were all failures, or all successes."
        )
    settings: dict[str, object] = {
        name: getattr(fitted_predictor, name) for name in parameters(fitted_predictor)
    }
    settings |= FINE_TUNING
    if values is not None:
        settings |= values
    predictor = build_predictor(cls, settings)
    # a second predictor, only to check that the fitted weights can be loaded
    trial_predictor = build_predictor(cls, settings)
    trial_predictor.space_ = fitted_predictor.space_
    try:
        trial_predictor.restore(fitted_predictor.state())
    except DataError as error:
        raise ProvenanceError(
            f"the {fitted_predictor.name} to begin from has another architecture: {error}"
        ) from error
    predictor.start_ = fitted_predictor
    return predictor
