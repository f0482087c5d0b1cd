from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders.bench_fakes import config, tables
from vilu.embeddings.memory import Embeddings
from vilu.errors import UsageError
from vilu.predictors import PREDICTORS
from vilu.predictors.contract.parameters import parameters
from vilu_bench.studies.config import Config, LabelsSetting, TransferSetting, UnseenSetting
from vilu_bench.studies.load import CONFIGS, load_config, parse_config, shrink_config

ROOT = Path(__file__).resolve().parents[2]


def test_settings_become_what_their_kind_says() -> None:
    settings = config().settings
    assert {name: type(setting) for name, setting in settings.items()} == {
        "all": LabelsSetting,
        "few": LabelsSetting,
        "unseen": UnseenSetting,
        "moved": TransferSetting,
    }
    assert settings["few"].budget == 8
    assert str(settings["moved"]) == "fitted on one with all labels"
    assert str(settings["few"]) == "8 labels per class"


def changed(path: str, value: object) -> dict[str, Any]:
    """Return the tables with the entry at a dotted path set."""
    content = tables()
    *steps, last = path.split(".")
    place = content
    for step in steps:
        place = place.setdefault(step, {})
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", 3, r"^the benchmark: there is no key 'seed'\. Did you mean 'seeds'\?$"),
        (
            "data.one.backbon",
            "compact",
            r"data\.one: there is no key 'backbon'\. Did you mean 'backbone'\?",
        ),
        (
            "settings.few.budgte",
            3,
            r"settings\.few: there is no key 'budgte'\. Did you mean 'budget'\?",
        ),
        ("settings.few.source", "one", r"settings\.few: there is no key 'source'"),
        (
            "methods.mcm.param",
            {},
            r"methods\.mcm: there is no key 'param'\. Did you mean 'params'\?",
        ),
        ("methods.mmc", {}, r"no method \(methods\.mmc\) 'mmc'\. Did you mean 'mcm'\?"),
        (
            "methods.mcm.settings",
            ["fwe"],
            r"no setting \(methods\.mcm\) 'fwe'\. Did you mean 'few'\?",
        ),
        (
            "settings.few.data",
            ["tow"],
            r"no data set \(settings\.few\) 'tow'\. Did you mean 'two'\?",
        ),
        ("settings.moved.source", "On", r"no data set \(settings\.moved\) 'On'"),
        ("settings.few.kind", "label", r"settings\.few: .*'labels', 'transfer', 'unseen'"),
        (
            "settings.few.budget",
            0,
            r"settings\.few\.budget: must be \"all\", \"none\", a number of labels per class",
        ),
        ("settings.few.budget", True, r"must be \"all\", \"none\", a number"),
        ("metrics", ["auroc", "fpr95", "augcr"], r"no metric 'augcr'\. Did you mean 'augrc'\?"),
        ("trained", {"settings": ["fwe"]}, r"no setting \(trained\) 'fwe'\. Did you mean 'few'\?"),
        ("metrics", ["auroc"], r"metrics must name auroc and fpr95"),
        ("deterministic", ["mcn"], r"no method \(deterministic\) 'mcn'"),
        ("seeds", 0, r"seeds: Input should be greater than or equal to 1"),
        ("data.one.source", "x.parquet", r"data\.one: a data set has either a source or stores"),
        ("data.three/3", {"source": "x"}, r"data\.three/3: String should match pattern"),
        (
            "methods.lvu.params",
            {"epohcs": 3},
            r"methods\.lvu: lvu has no parameter 'epohcs'\. Did you mean 'epochs'\?",
        ),
        ("methods.mcm.steps", 10, r"methods\.mcm: steps replace epochs"),
        (
            "methods.lvu.steps",
            10,
            r"methods\.lvu: steps replace epochs, so the method must have the parameter epochs",
        ),
        (
            "methods.mcm.params",
            {"answer": "given"},
            r"judges given answers, .*`vilu fit TRAIN --method mcm --answer given .* `vilu eval",
        ),
        (
            "methods.lvu.params",
            {"epochs": 0},
            r"methods\.lvu: the 'epochs' parameter of lvu must be greater",
        ),
    ],
)
def test_what_cannot_be_is_named_with_the_nearest(path: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config(changed(path, value))


@pytest.mark.parametrize("empty", ["data", "settings"])
def test_there_must_be_something_to_run(empty: str) -> None:
    with pytest.raises(UsageError, match=f"{empty}: .*at least 1 item"):
        parse_config(tables(**{empty: {}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"none": {"kind": "labels", "budget": "none"}}, "methods": {"lvu": {}}},
        {"settings": {"moved": {"kind": "transfer", "source": "one", "data": ["one"]}}},
        {"methods": {"mcm": {"data": []}}},
        {"methods": {"lvu": {}}, "trained": {"settings": []}},
    ],
)
def test_a_study_in_which_no_method_runs_is_refused(changes: dict) -> None:
    with pytest.raises(UsageError, match="no method runs on any data set"):
        parse_config(tables(**changes))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("seeds = = 1")
    with pytest.raises(UsageError, match=r"bad\.toml is not TOML: .*line 1"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not TOML"):
        load_config(tmp_path / "bad.toml")


def test_without_methods_every_method_runs() -> None:
    assert list(config(methods={}).method_entries) == list(PREDICTORS)
    named = {
        "lvu": {"params": {"epochs": 3}},
        "lvu-bce": {"method": "lvu", "params": {"loss": "bce"}},
    }
    entries = config(methods=named, all_methods=True).method_entries
    assert list(entries) == [*PREDICTORS, "lvu-bce"]
    assert entries["lvu"].params == {"epochs": 3}
    assert entries["lvu-bce"].method == "lvu"
    assert list(config(methods=named).method_entries) == ["lvu", "lvu-bce"]


def test_predictors_get_seed_device_and_parameters() -> None:
    chosen = config(device="cpu")
    predictor = chosen.predictor("lvu", seed=7)
    assert (predictor.seed, predictor.device, predictor.epochs, predictor.hidden) == (
        7,
        "cpu",
        2,
        (8,),
    )
    assert chosen.predictor("mcm", seed=7) == PREDICTORS["mcm"]()


def test_steps_become_epochs() -> None:
    chosen = config(methods={"lvu": {"steps": 100}, "mcm": {}})
    epochs = {n: chosen.epochs_for("lvu", 50, n) for n in (40, 501, 5000, 100_000)}
    assert epochs == {40: 100, 501: 9, 5000: 1, 100_000: 1}  # 1, 11, 100 and 2,000 batches an epoch
    assert config(methods={"lvu": {"steps": 10_000}}).epochs_for("lvu", 128, 40) == 300
    assert chosen.epochs_for("mcm", 50, 40) is None


def test_what_holds_for_trained_methods() -> None:
    methods = {"mcm": {}, "vilu": {}, "lvu": {"seeds": 3}, "pvu": {"params": {"epochs": 4}}}
    entries = config(methods=methods, trained={"seeds": 2}).method_entries
    assert {label: entry.seeds for label, entry in entries.items()} == {
        "mcm": None,
        "vilu": 2,
        "lvu": 3,
        "pvu": 2,
    }


def test_what_depends_on_the_seed() -> None:
    chosen = config(deterministic=["lvu"])
    assert not chosen.depends_on_seed("lvu")
    assert not chosen.depends_on_seed("mcm")
    assert not chosen.depends_on_seed("knn_distance")
    assert config().depends_on_seed("lvu")
    assert not config(methods={"lvu": {"params": {"seed": 3}}}).depends_on_seed("lvu")


def test_shrinking_keeps_everything_but_its_size() -> None:
    whole = config(methods={}, seeds=5, resamples=1000)
    small = shrink_config(whole)
    assert list(small.method_entries) == list(whole.method_entries)
    assert (small.settings, list(small.data)) == (whole.settings, list(whole.data))
    assert (small.seeds, small.resamples) == (1, 50)
    for label in small.method_entries:
        if "epochs" in parameters(small.class_of(label)):
            assert small.predictor(label).epochs == 2
    assert shrink_config(config(seeds=1)).seeds == 1


def test_the_shipped_benchmark_is_sound() -> None:
    shipped = load_config(CONFIGS / "methods.toml")
    assert isinstance(shipped, Config)
    assert set(shipped.method_entries) >= set(PREDICTORS)
    text = (CONFIGS / "methods.toml").read_text()
    assert str(ROOT) not in text
    assert not any(entry.source and entry.source.startswith("/") for entry in shipped.data.values())


@pytest.mark.parametrize("name", load_config(CONFIGS / "methods.toml").deterministic)
def test_what_is_said_to_be_deterministic_is(
    name: str, train: Embeddings, test: Embeddings
) -> None:
    shipped = load_config(CONFIGS / "methods.toml")
    scores = [shipped.predictor(name, seed).fit(train).predict_uncertainty(test) for seed in (0, 1)]
    assert np.array_equal(*scores)
