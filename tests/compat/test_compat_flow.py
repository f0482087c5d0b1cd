"""Stores, scores, rules, monitors and a study that vilu 0.1.0 wrote:
read, gone on with and made again.

As in ``test_compat.py``: what is stored is the same to the bit, what is computed up to rounding.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.compat.bed import (
    DATA,
    EPSILON,
    EXACT,
    Arrays,
    arrays,
    classes,
    document,
    require_near,
    require_same,
    tree,
)
from tests.compat.flow import (
    EXPORTED,
    PAIRS,
    RULES,
    STORES,
    command,
    evaluated,
    explained,
    inspected,
    of_folder,
    of_outcomes,
    of_source,
    rendered,
    run,
    score_in_parts,
    sources,
    watch,
)
from tests.compat.tiny import D, Tiny, embed_captions, embed_classes, embed_tars
from vilu.artifacts.paths import MARK
from vilu.artifacts.tables import read_table
from vilu.calibration.calibration import Calibration
from vilu.embeddings.source import say_once
from vilu.errors import ProvenanceError

pytestmark = pytest.mark.skip(reason="risk.json is schema 2: what was kept before is refused")

Open = Callable[[str], Path]

ROUNDING = 4 * 12.0 * D * EPSILON
"""Of a probability or an entropy:
four times what float32 products of width D leave of a logit (scale 12) at most.
"""


def part_of(whole: Arrays, name: str) -> Arrays:
    return {
        key.removeprefix(f"{name}/"): value
        for key, value in whole.items()
        if key.startswith(f"{name}/")
    }


def require_equal(found: Arrays, expected: Arrays, what: str) -> None:
    assert found.keys() == expected.keys(), what
    for name, values in expected.items():
        same = np.array_equal(found[name], values, equal_nan=values.dtype.kind == "f")
        assert same, f"{what}: {name}"
        assert found[name].dtype.kind == values.dtype.kind, f"{what}: {name}"


def require_about(found: Arrays, expected: Arrays, what: str) -> None:
    """Scores that were computed again: every text and whole number, and the others up to rounding.

    The bins of a histogram are the bits of scores, so only how many are right and wrong says
    something of others.
    """
    if not EXACT:
        counts = [
            [of.get(f"histogram/{kind}", np.zeros(1)).sum() for kind in ("correct", "wrong")]
            for of in (found, expected)
        ]
        assert counts[0] == counts[1], what
        found, expected = (
            {k: v for k, v in of.items() if "histogram" not in k} for of in (found, expected)
        )
    floats = {name for name, values in expected.items() if values.dtype.kind == "f"}
    texts = [
        without_identities({key: of[key] for key in of.keys() - floats}) for of in (found, expected)
    ]
    require_equal(*texts, what)
    tolerance = {name: np.full(expected[name].shape, ROUNDING) for name in floats}
    require_same(
        *({key: of[key] for key in floats & of.keys()} for of in (found, expected)), tolerance, what
    )


def without_identities(found: Arrays) -> Arrays:
    """Without what names a predictor and its calibration, of which the version was a part then."""
    about = json.loads(str(found["about"]))
    for name in ("predictor", "risk"):
        about["provenance"].pop(name, None)
    return {**found, "about": np.array(json.dumps(about, sort_keys=True))}


def said(path: str, content: bytes) -> object:
    """What a file says:
    of a document its content without its digest, which old ones do not have, and wall times.
    """
    if not path.endswith(".json"):
        unmarked, marks = MARK.subn(
            b"", content
        )  # by which a text is known as ours, after an empty line
        return unmarked[:-1] if marks else content
    return {
        key: value for key, value in json.loads(content).items() if key not in {"digest", "seconds"}
    }


def all_said(files: dict[str, bytes]) -> dict[str, object]:
    return {path: said(path, content) for path, content in files.items()}


def test_stores_hold_what_they_held(kept: Open) -> None:
    expected = arrays("stores")
    for name, source in sources(kept("stores")).items():
        then = part_of(expected, name)
        then.pop("inspect", None)
        require_equal(of_source(source), then, name)
    assert {"columns/features", "columns/views", "columns/prompts"} <= part_of(
        expected, "train"
    ).keys()


@pytest.mark.parametrize("name", STORES)
def test_stores_are_sound(kept: Open, name: str) -> None:
    found, expected = (
        json.loads(inspected(kept("stores"), name)),
        json.loads(str(arrays("stores")[f"{name}/inspect"])),
    )
    require_near(found, expected, 0.0, exact=True)


def test_an_interrupted_store_goes_on(kept: Open, tmp_path: Path) -> None:
    """The part that is there stays; the whole is the store that was not interrupted."""
    store, whole = tmp_path / "store", kept("stores") / "train"
    shutil.copytree(kept("stores") / "interrupted", store)
    there = {path: (store / path).stat().st_mtime_ns for path in tree(store) if "00000" in path}
    assert there
    embed_classes(kept("pictures"), "train", store, Tiny())
    assert {path: (store / path).stat().st_mtime_ns for path in there} == there
    require_equal(
        of_source(vilu.EmbeddingStore(store)), of_source(vilu.EmbeddingStore(whole)), "resumed"
    )
    if EXACT:
        assert all_said(tree(store)) == all_said(tree(whole))


def test_nothing_is_embedded_twice(kept: Open, tmp_path: Path) -> None:
    """Data sets and settings have the fingerprints that they had:
    the model, which gives up at once, is not asked.
    """
    for name, again in (("captions", embed_captions), ("tars", embed_tars)):
        shutil.copytree(kept("stores") / name, tmp_path / name)
        again(kept("pictures"), tmp_path / name, Tiny(fails_after=0))
        assert all_said(tree(tmp_path / name)) == all_said(tree(kept("stores") / name))
    for part in ("train", "val", "test"):
        shutil.copytree(kept("stores") / part, tmp_path / part)
        embed_classes(kept("pictures"), part, tmp_path / part, Tiny(fails_after=0))
        assert all_said(tree(tmp_path / part)) == all_said(tree(kept("stores") / part))


def test_scores_hold_what_they_held(kept: Open) -> None:
    expected, scores = arrays("scores"), kept("scores")
    files = sorted(scores.glob("*.*"))
    assert {path.stem for path in files} == {*RULES, "pairs"}
    for path in files:
        require_equal(
            of_outcomes(vilu.Outcomes.load(path)), part_of(expected, path.name), path.name
        )
    for name in ("folder", "parts"):
        require_equal(of_folder(vilu.ScoreFolder(scores / name)), part_of(expected, name), name)


def test_scores_are_evaluated_as_they_were(kept: Open) -> None:
    """All but the intervals of the ECE: those of then did not allow for its bias."""
    found, expected = evaluated(kept("scores")), document("evaluated")
    for told in (found, expected):
        told["table"] = re.sub(
            r" +\[[^]]*\]$|ECE +$|; in brackets: 95 %, corrected.*$", "", told["table"], flags=re.M
        )
        for row in told["rows"]:
            if row["metric"] in {"ece", "ece_mass"} and row["value"] is not None:
                assert row.pop("ci_low") <= row["value"] <= row.pop("ci_high") or told is expected
                row.pop("interval")
    assert found["table"] == expected["table"]
    require_near(
        found, expected, 1e-12
    )  # means and quantiles of the stored float64 numbers, in any order of their sums


def test_scores_are_computed_as_they_were(kept: Open, tmp_path: Path) -> None:
    """Decisions, reasons and label sets of every rule."""
    expected, rules, stores = arrays("scores"), kept("rules"), kept("stores")
    for path in sorted(kept("scores").glob("*.*")):
        data = [stores / "tars", *PAIRS] if path.stem == "pairs" else [stores / "test"]
        run("score", rules / path.stem, *data, "-o", tmp_path / path.name)
        require_about(
            of_outcomes(vilu.Outcomes.load(tmp_path / path.name)),
            part_of(expected, path.name),
            path.name,
        )
    run("score", rules / "lac", stores / "test", "-o", tmp_path / "folder")
    require_about(
        of_folder(vilu.ScoreFolder(tmp_path / "folder")), part_of(expected, "folder"), "folder"
    )


def test_an_interrupted_folder_of_scores_is_refused(kept: Open, tmp_path: Path) -> None:
    """It names its predictor by a fingerprint with the version of then in it."""
    folder = tmp_path / "parts"
    shutil.copytree(kept("scores") / "interrupted", folder)
    before = tree(folder)
    with pytest.raises(ProvenanceError, match="the scores of another run: predictor"):
        score_in_parts(kept("rules"), kept("stores"), folder)
    assert tree(folder) == before
    score_in_parts(kept("rules"), kept("stores"), tmp_path / "new")
    found = of_folder(vilu.ScoreFolder(tmp_path / "new"))
    require_about(found, part_of(arrays("scores"), "parts"), "parts")


def test_rows_of_then_are_recognised_by_their_names(
    kept: Open, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = (vilu.EmbeddingStore(kept("stores") / part) for part in ("train", "val"))
    predictor = vilu.load(kept("rules") / "coverage")
    assert (tuple(predictor.seen_), train.identified_by) == (("names",), ("names",))
    say_once.cache_clear()
    assert [len(predictor.seen(data)) for data in (train, val)] == [len(train), 0]
    told = [
        line.partition(", as they")[0]
        for line in caplog.messages
        if "carries no digest" not in line
    ]
    assert told == [
        "rows of the fit and of these are compared by their names, not by their pictures"
    ]


@pytest.mark.parametrize("label", RULES)
def test_rules_are_calibrated_as_they_were(kept: Open, tmp_path: Path, label: str) -> None:
    """``risk.json``, the calibration rows, the calibrator and the card,
    from the predictor that is in the folder.

    But where a sequence begins the row at the threshold is no trial any more. Three cats and three
    dogs below a fourth are right, and at a risk of 60 % and a confidence of 50 % / 4 that is enough
    for them: 0.4^3 = 0.064. The fourth is wrong, and there the sequences end, before it, since
    P[Bin(4, 0.6) <= 1] = 0.18; then more dogs were accepted.
    """
    shutil.copytree(kept("rules") / label, tmp_path / label)
    made = json.loads(
        run(
            "calibrate",
            tmp_path / label,
            kept("stores") / "val",
            *RULES[label][1],
            "--overwrite",
            "--json",
        )
    )
    now, then = tree(tmp_path / label), tree(kept("rules") / label)
    expected = json.loads(then["risk.json"])
    assert ("texts" in made) == (made["pool_size"] is None)
    made.pop("texts", None)  # which those of then do not know
    assert made.pop("inputs")
    assert list(made) == list(expected)
    if label == "per_class":
        few = [
            [rule["thresholds"].pop(name) for name in ("cat", "dog")]
            for rule in (made["rule"], expected["rule"])
        ]
        accepted = [[(one["n_accepted"], one["n_wrong"]) for one in pair] for pair in few]
        assert accepted == [[(3, 0), (3, 0)], [(0, 0), (7, 2)]]
    for rule in (made["rule"], expected["rule"]):
        for group in (rule or {}).get("thresholds", {}).values():
            assert (group.pop("why") is None) == (
                group["threshold"] is not None
            )  # in words of today
            group.pop("n_needed")
    for name in ("rule", "label_sets"):
        require_near(made[name], expected[name], ROUNDING)
    hashes = {
        "vilu",
        "predictor",
        "rows_sha256",
        "promise",
        "rule",
        "label_sets",
    }  # of numbers that are rounded
    assert {k: v for k, v in made.items() if k not in hashes} == {
        k: v for k, v in expected.items() if k not in hashes
    }
    rows = [
        of_outcomes(vilu.Outcomes.load(root / label / "calibration.parquet"))
        for root in (tmp_path, kept("rules"))
    ]
    require_about(*rows, label)
    if EXACT and label != "per_class":
        version = {"predictor.json", "risk.json", "README.md", "calibration.parquet"}
        assert {k: v for k, v in now.items() if k not in version} == {
            k: v for k, v in then.items() if k not in version
        }
        assert {**made, "vilu": ""} == {**expected, "vilu": ""}


def test_answers_are_explained_as_they_were(kept: Open) -> None:
    # the code of then computed them in blocks of other sizes than the scores, which rounds in other
    # places
    require_near(
        explained(kept("rules"), kept("stores")), document("explained"), ROUNDING, exact=False
    )


def test_an_exported_predictor_runs() -> None:
    """The file of then in another runtime,
    against the numbers of the predictor that it was made from.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    expected = part_of(arrays("predictors"), EXPORTED)
    session = onnxruntime.InferenceSession(
        DATA / "exported.onnx", providers=["CPUExecutionProvider"]
    )
    rows = classes(arrays("inputs"), "test")
    usable = np.flatnonzero(np.isfinite(expected["uncertainty"]))
    image, text = rows.image[usable].numpy(), rows.text.numpy()
    found, answer = session.run(["uncertainty", "prediction"], {"image": image, "text": text})
    # two runtimes, each within its rounding of the truth
    assert (
        np.abs(found - expected["uncertainty"][usable]).max()
        <= 2 * expected["uncertainty/tolerance"].max()
    )
    assert np.array_equal(answer, expected["posterior"][usable].argmax(axis=1))


@pytest.mark.parametrize("name", ["calm", "shifted"])
def test_monitors_go_on(kept: Open, tmp_path: Path, name: str) -> None:
    """From the beginning to the kept state, and from there, once the scores are bound anew."""
    expected, states, rule = document("monitors"), kept("monitors"), kept("rules") / "ltt"
    assert command("monitor", rule, states / f"{name}.parquet")[0] == ProvenanceError.exit_code
    today = {"risk": Calibration.load(rule).fingerprint}
    for file in (f"{name}.parquet", "next.parquet"):
        replace(vilu.Outcomes.load(states / file), provenance=today).save(tmp_path / file)
    begun = watch(rule, tmp_path / "new.parquet", tmp_path / f"{name}.parquet")
    require_near(
        begun, expected[name], 1e-9
    )  # wealth is a product of as many factors as there are rows
    shutil.copy(states / f"{name}-state.parquet", tmp_path / "state.parquet")
    require_near(
        watch(rule, tmp_path / "state.parquet", tmp_path / "next.parquet"),
        expected[f"{name}, then next"],
        1e-9,
    )
    assert expected[name]["code"] == {"calm": 0, "shifted": 8}[name]
    if EXACT:  # and beside what was kept then, the rows that were taken in
        new, old = (
            read_table(path, ("test",))[0]
            for path in (tmp_path / "new.parquet", states / f"{name}-state.parquet")
        )
        assert (
            new.slice(0, len(old))
            .select(old.column_names)
            .equals(old.replace_schema_metadata(new.schema.metadata))
        )


@pytest.mark.parametrize("name", ["study", "views"])
def test_a_study_is_rendered_as_it_was(kept: Open, tmp_path: Path, name: str) -> None:
    """From cells that older code has made: the same tables, page and document;
    and the figures of one matplotlib.
    """
    study = tmp_path / "study"
    shutil.copytree(kept(name), study)
    then = tree(study)
    made = {
        path
        for path in then
        if path.startswith(("studies/", "docs/")) and not path.endswith("study.json")
    }
    for path in made:
        (study / path).unlink()
    assert rendered(study) == then.pop("shown.txt").decode()
    now = {path: content for path, content in tree(study).items() if not path.endswith(".png")}
    assert now.keys() - {"shown.txt"} == then.keys()
    loose = {path for path in made if path.endswith((".svg", ".parquet", "results.json"))}
    for path in sorted(then.keys() - (set() if EXACT else loose)):
        assert said(path, now[path]) == said(path, then[path]), path
    results = [said("results.json", found["studies/small/results.json"]) for found in (now, then)]
    require_near(*results, 1e-12)


@pytest.mark.parametrize(("name", "n"), [("study", 20), ("views", 36)])
def test_cells_hold_what_they_held(kept: Open, name: str, n: int) -> None:
    """The scores of a cell give the metrics that stand beside them, where these are defined."""
    cells = sorted((kept(name) / "cells").rglob("*.json"))
    assert len(cells) == n
    for path in cells:
        cell = json.loads(path.read_text())
        metrics = {row["metric"]: row for row in cell["results"]}
        undefined = cell["refused"] if not metrics else metrics["auroc"]["why"]
        if undefined:
            continue
        scores = vilu.Outcomes.load(path.with_suffix(".parquet"))
        known = scores.evaluable
        auroc = vilu.metrics.auroc(scores.uncertainty[known], scores.failure[known])
        assert auroc == pytest.approx(metrics["auroc"]["value"], rel=1e-12), path


def test_what_is_kept_stays_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DATA.iterdir()}
    assert max(sizes.values()) < 300_000, sizes
    assert sum(sizes.values()) < 2_000_000, sizes
