"""Training that begins from fitted weights.

A head knows one data set, and there are a few labels of another.
"""

from __future__ import annotations

from collections.abc import Mapping

from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors import PREDICTORS
from vilu.predictors.contract.parameters import build, parameters
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.vilu.head import HeadPredictor

FINE_TUNING = {"epochs": None, "learning_rate": 1e-3, "freeze_epochs": 0}
"""What a fine-tuning has unless it is said otherwise.

A thirtieth of a new head's learning rate, since the weights are to be corrected and not to be found
(on synthetic data with five labels a class the best of 0.03, 0.01, 0.003 and 0.001). The attention
learns from the first step, since it is no longer at its start. Epochs follow from the number of
rows, whatever the first fit had: 300 for a few labels.
"""


def initialise(
    cls: type[FailurePredictor],
    fitted: FailurePredictor,
    values: Mapping[str, object] | None = None,
) -> HeadPredictor:
    """A predictor whose ``fit`` begins with the weights of another fit.

    Its parameters are those of the other fit, of the same method, but for ``FINE_TUNING`` and
    ``values``, which may be strings (``--set key=value``).
    """
    if not issubclass(cls, HeadPredictor):
        with_a_head = [name for name, kind in PREDICTORS.items() if issubclass(kind, HeadPredictor)]
        raise UsageError(
            f"{cls.name} does not begin from another fit; methods with a failure head do: "
            f"{', '.join(with_a_head)}. (vilu_plus needs no start: it is solved from the labels, "
            "and where they are few it stays near zero-shot.)"
        )
    if not isinstance(fitted, HeadPredictor) or type(fitted) is not cls:
        raise ProvenanceError(
            f"a {cls.name} begins from a fitted {cls.name}. Got a {fitted.name} instead."
        )
    fitted.require_fitted()
    if fitted.constant_ is not None:
        raise DataError(
            f"the {fitted.name} to begin from is a constant: "
            "its training rows were all of one kind."
        )
    settings: dict[str, object] = {name: getattr(fitted, name) for name in parameters(fitted)}
    settings |= FINE_TUNING
    if values is not None:
        settings |= values
    predictor = build(cls, settings)
    trial = build(cls, settings)
    trial.space_ = fitted.space_
    try:
        trial.restore(fitted.state())
    except DataError as error:
        raise ProvenanceError(
            f"the {fitted.name} to begin from has another architecture: {error}"
        ) from error
    predictor.start_ = fitted
    return predictor
