"""Predictors that vilu 0.1.0 saved, before its code was moved:
they load, and give the numbers that they gave then.

The artefacts in ``data`` (``write.py`` says how they were made) stay for ever and are never written
again. What is stored must be the same to the bit on every machine. What is computed must be the
same up to rounding, number by number (``bed.rounding``), and with VILU_COMPAT_EXACT=1 to the bit,
on the processor and with the threads that wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import torch as safetensors_torch

import vilu
from tests.compat.bed import answers, arrays, classes, pairs, require_same, tree
from vilu.predictors.contract.parameters import parameters

Open = Callable[[str], Path]

VERSION = ("vilu", "fingerprint")
"""What names the version of vilu in ``predictor.json``: the fingerprint is over it, too."""

RENAMED = {
    "icpe": "class_gaussians",
    "icpe-log_odds": "class_gaussians",
    "stacking-all": "stacking",
}
"""Artefacts of (or with) the method that was called "icpe" then, and what they are now;
their numbers stay.
"""


def test_predictors_give_their_numbers(kept: Open) -> None:
    inputs, expected = arrays("inputs"), arrays("predictors")
    rows, captions = classes(inputs, "test"), pairs(inputs, "test pairs")
    folders = {path.name: path for name in ("predictors", "pairs") for path in kept(name).iterdir()}
    assert folders.keys() == {key.partition("/")[0] for key in expected}
    assert folders.keys() >= {
        "vilu",
        "vilu_plus-few",
        "stacking-all",
        "mcm-calibrated",
        "vilu-constant",
        "pairs-vilu",
    }
    for label, folder in sorted(folders.items()):
        mine = {
            key.removeprefix(f"{label}/"): value
            for key, value in expected.items()
            if key.startswith(f"{label}/")
        }
        data = captions if label.startswith("pairs-") else rows
        if label == "converted":
            data = vilu.Embeddings(
                mine.pop("image"), mine.pop("text"), None, float(mine.pop("scale"))
            )
        tolerances = {
            key.removesuffix("/tolerance"): mine.pop(key)
            for key in list(mine)
            if key.endswith("/tolerance")
        }
        require_same(answers(vilu.load(folder), data), mine, tolerances, label)


FINGERPRINT = re.compile(rb"Fingerprint `[0-9a-f]{32}`")


def test_predictors_are_saved_as_they_were(kept: Open, tmp_path: Path) -> None:
    """The same bytes, but for the version, and the fingerprint, of which it is no part any more."""
    for name in ("predictors", "pairs"):
        for folder in sorted(kept(name).iterdir()):
            vilu.load(folder).save(tmp_path / name / folder.name)
            now, then = tree(tmp_path / name / folder.name), tree(folder)
            if folder.name in RENAMED:
                require_renamed(now, then, RENAMED[folder.name])
                continue
            assert now["weights.safetensors"] == then["weights.safetensors"], folder.name
            cards = [FINGERPRINT.sub(b"", found["README.md"]) for found in (now, then)]
            assert cards[0] == cards[1], folder.name
            records = [json.loads(found["predictor.json"]) for found in (now, then)]
            texts = [
                {key: value for key, value in record.items() if key not in VERSION}
                for record in records
            ]
            assert list(texts[0].items()) == list(texts[1].items()), folder.name


def renamed(parameters: dict[str, object]) -> object:
    """With the members of a stack by their names of now."""
    return json.loads(json.dumps(parameters).replace('"icpe"', '"class_gaussians"'))


def require_renamed(now: dict[str, bytes], then: dict[str, bytes], method: str) -> None:
    """The same tensors, and the same record but for names."""
    found, expected = (
        safetensors_torch.load(files["weights.safetensors"]) for files in (now, then)
    )
    assert found.keys() == {
        name.replace("members.icpe.", "members.class_gaussians.") for name in expected
    }
    for name, tensor in expected.items():
        assert found[name.replace("members.icpe.", "members.class_gaussians.")].equal(tensor)
    mine, theirs = (json.loads(files["predictor.json"]) for files in (now, then))
    assert mine["method"] == method
    theirs["parameters"] = renamed(theirs["parameters"])
    skipped = {*VERSION, "method", "weights_sha256"}
    assert {k: v for k, v in mine.items() if k not in skipped} == {
        k: v for k, v in theirs.items() if k not in skipped
    }


def test_every_method_of_then_is_kept(kept: Open) -> None:
    """No name has gone: neither of a method, nor of one of its parameters."""
    labels = {path.name for path in kept("predictors").iterdir()}
    assert len(labels & vilu.PREDICTORS.keys()) == 37
    for label in labels - {"converted"}:
        record = json.loads((kept("predictors") / label / "predictor.json").read_text())
        found = vilu.load(kept("predictors") / label)
        assert found.name == RENAMED.get(label, record["method"])
        values = {name: getattr(found, name) for name in record["parameters"]}
        assert json.loads(json.dumps(values)) == (renamed if label in RENAMED else dict)(
            record["parameters"]
        )


def test_a_checkpoint_is_converted_as_it_was(kept: Open) -> None:
    expected = {
        key.removeprefix("converted/"): value for key, value in arrays("predictors").items()
    }
    folder, data = kept("predictors") / "converted", (expected["image"], expected["text"], None)
    now = vilu.convert_official(folder / "head.ckpt", float(expected["scale"]))
    then = vilu.load(folder)
    rows = vilu.Embeddings(*data, float(expected["scale"]))
    values = [{name: getattr(each, name) for name in parameters(each)} for each in (now, then)]
    assert [found.pop("batch_size") for found in values] == [
        None,
        128,
    ]  # by default, which has changed since
    assert values[0] == values[1]
    assert np.array_equal(now.predict_uncertainty(rows), then.predict_uncertainty(rows))
    assert all(np.array_equal(now.state()[name], tensor) for name, tensor in then.state().items())
