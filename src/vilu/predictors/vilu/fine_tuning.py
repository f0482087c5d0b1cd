"""Fine-tuning: training that begins with the weights of another fit.

It is used if a head was fitted on one data set, and there are a few labels of another data set.
"""

from __future__ import annotations

from collections.abc import Mapping

from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors import PREDICTORS
from vilu.predictors.contract.parameters import build, parameters
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.vilu.head import HeadPredictor

FINE_TUNING = {"epochs": None, "learning_rate": 1e-3, "freeze_epochs": 0}
"""Default parameters of a fine-tuning, where they differ from those of the first fit.

- The learning rate is a thirtieth of that of a new head, because the weights need only a
  correction. On synthetic data with five labels per class it was the best of 0.03, 0.01, 0.003 and
  0.001.
- The attention is trained from the first step, because it was trained before.
- The number of epochs follows from the number of rows, not from the first fit. With a few labels it
  is 300.
"""


def initialise(
    cls: type[FailurePredictor],
    fitted: FailurePredictor,
    values: Mapping[str, object] | None = None,
) -> HeadPredictor:
    """Create a predictor of class ``cls`` whose ``fit`` begins with the weights of ``fitted``.

    ``fitted`` must be of the same method. The parameters are those of ``fitted``, replaced by those
    of ``FINE_TUNING`` and then by ``values``. Values may be strings (``--set key=value``).

    Raises:
        UsageError: If methods of class ``cls`` have no failure head.
        ProvenanceError: If ``fitted`` is another method or has another architecture.
        DataError: If ``fitted`` is a constant.
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
