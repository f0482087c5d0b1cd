"""Test which scikit-learn habits hold: parameters, clone and repr.

If a habit does not hold, an error says so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score

import vilu
from tests.conftest import toy_embeddings
from tests.contract.test_predictors import everything_set
from vilu.errors import NotFittedError, UsageError
from vilu.predictors.contract.parameters import parameters


def test_parameters_and_clones_of_every_method() -> None:
    for cls in vilu.PREDICTORS.values():
        predictor = cls()
        values = predictor.get_params()
        assert (
            values
            == predictor.get_params(deep=False)
            == {name: f.default for name, f in parameters(cls).items()}
        )
        if "seed" in values:
            assert predictor.set_params(seed=7) is predictor
        twin = clone(predictor)
        assert (type(twin), twin.get_params()) == (cls, predictor.get_params())
        assert repr(predictor) == (
            f"{cls.__name__}(seed=7)" if "seed" in values else f"{cls.__name__}()"
        )


def test_a_clone_is_not_fitted_and_learns_the_same() -> None:
    train = toy_embeddings(n=100)
    predictor = vilu.PREDICTORS["linear_probe"]().fit(train)
    twin = clone(predictor)
    with pytest.raises(NotFittedError):
        twin.predict_uncertainty(train)
    twin.fit(train)
    assert np.array_equal(twin.predict_uncertainty(train), predictor.predict_uncertainty(train))


def test_what_sklearn_cannot_do_it_is_told_in_a_sentence() -> None:
    train = toy_embeddings(n=20)
    for use in (
        lambda: cross_val_score(vilu.MCM(), train, scoring=lambda *_: 0.0),
        lambda: GridSearchCV(vilu.ViLU(), {"seed": [0, 1]}, scoring=lambda *_: 0.0).fit(train),
    ):
        with pytest.raises(UsageError, match=r"array.* data\.take\(rows\)"):
            use()
    with pytest.raises(UsageError, match="mcm has no parameter 'sed'"):
        vilu.MCM().set_params(sed=1)


def test_a_fit_that_its_parameters_no_longer_fit_is_not_saved(tmp_path: Path) -> None:
    """Otherwise the predictor would be written, and called damaged when it is loaded."""
    predictor = (
        vilu.PREDICTORS["sirc"]().fit(toy_embeddings(n=120, k=3)).set_params(typicality="residual")
    )
    with pytest.raises(UsageError, match="parameters were changed after the fit"):
        predictor.save(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    predictor.set_params(typicality="norm1").save(tmp_path / "p")


def test_a_fit_is_saved_whatever_is_set_in_torch(tmp_path: Path) -> None:
    """The caller's default type must not matter.

    A network that was made anew in float64 was taken for one that the parameters do not fit.
    """
    predictor = vilu.PREDICTORS["pvu"](hidden=(4,), epochs=1).fit(toy_embeddings(n=120, k=3))
    expected = predictor.save(tmp_path / "plain")
    with everything_set():
        assert predictor.save(tmp_path / "set") == expected
        predictor.restore(predictor.state())
    assert {weight.dtype for weight in predictor.state().values()} == {torch.float32}
