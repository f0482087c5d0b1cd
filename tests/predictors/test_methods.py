"""Test ``vilu.methods``: every method by its class name, from the catalogue."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import Tensor

import vilu
from vilu import PREDICTORS
from vilu.predictors.contract.catalogue import find_method, method_names


def test_every_method_is_there_by_its_class() -> None:
    classes = [find_method(name) for name in method_names()]
    assert dir(vilu.methods) == sorted(cls.__name__ for cls in classes)
    for cls in PREDICTORS.values():
        assert getattr(vilu.methods, cls.__name__) is cls


def test_a_registered_method_is_there() -> None:
    @vilu.register
    @dataclass
    class Flat(vilu.FailurePredictor):
        name: ClassVar[str] = "flat"
        summary: ClassVar[str] = "no score"
        reference: ClassVar[str] = "nobody"

        def _score(self, batch: vilu.Batch) -> Tensor:
            return batch.logits[:, 0]

    try:
        assert "Flat" in dir(vilu.methods)
        from vilu.methods import Flat as found

        assert found is Flat
    finally:
        del PREDICTORS["flat"]


def test_a_class_that_is_no_method() -> None:
    with pytest.raises(AttributeError, match=r"no method with the class 'ViLUPuls'.*'ViLUPlus'\?"):
        _ = vilu.methods.ViLUPuls
    with pytest.raises(ImportError, match="NoMethod"):
        from vilu.methods import NoMethod  # noqa: F401


def test_methods_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, vilu.methods; assert 'torch' not in sys.modules;"
        "names = dir(vilu.methods); from vilu.methods import MCM, RelU;"
        "assert {'MCM', 'RelU', 'ViLUPlus'} <= set(names);"
        "print([name for name in sys.modules if name in"
        " {'vilu.predictors.plus.vilu_plus', 'vilu_bench.methods.sirc'}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
