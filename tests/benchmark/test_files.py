"""Test benchmark files: entries from another file, names, shares, and the files that ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.known_trees import TREES
from vilu.backbones.catalog import named_backbones
from vilu.errors import UsageError
from vilu.metrics.catalog import METRICS
from vilu.predictors import PREDICTORS
from vilu_bench.studies.config import Config
from vilu_bench.studies.load import CONFIGS, find_studies, load_config, load_configs, study_names
from vilu_bench.studies.run import CellShare
from vilu_bench.studies.views import BetterClaim, find_published, published_tables

STUDIES = sorted(CONFIGS.glob("*/*.toml"))

COMMON = """
seeds = 4
metrics = ["auroc", "fpr95"]
[data.one]
source = "one.parquet"
[data.two]
source = "two.parquet"
[settings.all]
kind = "labels"
[methods.mcm]
[methods.lvu]
steps = 7
"""


def write(folder: Path, text: str, name: str = "study.toml") -> Path:
    (folder / "common.toml").write_text(COMMON)
    (folder / "listed.toml").write_text("data = [1]")
    (folder / name).write_text(text)
    return folder / name


def test_everything_is_taken_unless_something_is_chosen(tmp_path: Path) -> None:
    whole = load_config(write(tmp_path, 'include = "common.toml"'))
    assert (list(whole.data), list(whole.settings), list(whole.methods)) == (
        ["one", "two"],
        ["all"],
        ["mcm", "lvu"],
    )
    assert (whole.name, whole.seeds, whole.methods["lvu"].steps) == ("study", 4, 7)
    chosen = (
        'include = "common.toml"\nseeds = 2\n[use]\ndata = ["two"]\nmethods = []\n'
        "[methods.margin]\n"
    )
    some = load_config(write(tmp_path, chosen))
    assert (list(some.data), list(some.methods), some.seeds) == (["two"], ["margin"], 2)


def test_the_including_file_has_the_last_word(tmp_path: Path) -> None:
    text = 'include = "common.toml"\nname = "mine"\n[methods.lvu]\nsteps = 9\n'
    found = load_config(write(tmp_path, text))
    assert (found.name, found.methods["lvu"].steps) == ("mine", 9)
    assert list(found.methods) == ["mcm", "lvu"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('include = "none.toml"', "cannot read"),
        (
            'include = "common.toml"\n[use]\ndata = ["tow"]',
            "common.toml has no 'tow' in its data. Did you mean 'two'",
        ),
        (
            'include = "common.toml"\n[use]\nviews = []',
            r"\[use\] can choose data, settings, methods. Got 'views'",
        ),
        ("[use]\ndata = []", r"has \[use\], and no include"),
        ("include = 3", "include must be the name of a file"),
        ('include = "common.toml"\n[use]\ndata = 5', r"\[use\] must hold lists"),
        ('include = "common.toml"\n[use]\ndata = "two"', r"\[use\] must hold lists"),
        (
            'include = "common.toml"\n[use]\nmethods = [["mcm"]]',
            r"common\.toml has no \['mcm'\] in its methods",
        ),
        (
            'include = "common.toml"\n[[data]]\nsource = "x"',
            r"data must be a table, as \[data\.NAME\]\. Got \[\{",
        ),
        (
            'include = "common.toml"\nsettings = 3',
            r"settings must be a table, as \[settings\.NAME\]\. Got 3",
        ),
        (
            'include = "listed.toml"',
            r"listed\.toml: data must be a table, as \[data\.NAME\]\. Got \[1\]",
        ),
        (f"x = {'[' * 10_000}{']' * 10_000}", r"study\.toml is not TOML"),
        ('include = "common.toml"\nname = "a b"', "name: String should match pattern"),
    ],
)
def test_what_cannot_be_included(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path, text))


def test_two_studies_of_one_name(tmp_path: Path) -> None:
    paths = [write(tmp_path, 'include = "common.toml"', "a.toml")]
    paths.append(write(tmp_path, 'include = "common.toml"\nname = "a"', "b.toml"))
    with pytest.raises(UsageError, match="two benchmarks are called 'a'"):
        load_configs(paths)


def test_a_study_that_comes_along_has_a_name() -> None:
    names = study_names()
    assert {"methods", "clip_row", "here/main", "paper/main"} <= set(names)
    assert not {"here", "paper", "clip"} & set(names)  # groups are no studies
    assert len(names) == len(STUDIES) + 3  # three studies have no group
    for name in names:
        (config,) = load_configs([name])
        assert config.name == name.rpartition("/")[2]


def test_a_group_is_all_of_its_studies() -> None:
    by_group = [path for path in STUDIES if path.parent.name == "here"]
    assert find_studies("here") == by_group
    assert len(load_configs(["here", "methods"])) == len(by_group) + 1


def test_a_file_goes_before_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()  # a folder is no study
    assert len(find_studies("here")) > 1
    write(tmp_path, 'include = "common.toml"', "methods")
    (config,) = load_configs(["methods"])
    assert config.seeds == 4


@pytest.mark.parametrize("name", ["nothing", "here/nothing", "her", "here/", ".", ""])
def test_what_is_no_study_lists_them(name: str) -> None:
    with pytest.raises(UsageError, match=r"no file and no study .* clip/labels, .* methods"):
        load_configs([name])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_studies_are_sound(path: Path) -> None:
    config = load_config(path)
    assert config.study is not None
    assert config.views
    assert "/home" not in path.read_text()
    published = {key[:3] for name in config.study.published for key in published_tables()[name]}
    named = {entry.paper_name for entry in config.data.values()}
    assert not published or {data for data, _, _ in published} & named, (
        "no published number can stand beside ours"
    )


def test_both_beds_have_the_same_studies() -> None:
    names = {
        folder: {path.stem for path in STUDIES if path.parent.name == folder}
        for folder in ("here", "paper")
    }
    assert names["here"] == names["paper"]
    assert len(names["here"]) == 11


def test_the_study_of_clip_has_every_method_and_number_of_labels() -> None:
    clip = {path.stem: load_config(path) for path in STUDIES if path.parent.name == "clip"}
    assert len(clip["labels"].data) == 8
    assert all(entry.fit_share == 0.5 for entry in clip["labels"].data.values())
    budgets = {setting.budget for config in clip.values() for setting in config.settings.values()}
    assert budgets == {"none", 1, 5, 16, "all"}
    run = {
        label
        for config in clip.values()
        for label in config.method_entries
        if config.method_entries[label].settings != ()
    }
    assert run >= set(PREDICTORS.names())
    assert min(clip[name].seeds for name in ("labels", "none", "budgets")) >= 5


def paper(name: str) -> Config:
    return load_config(CONFIGS / "paper" / f"{name}.toml")


def test_the_main_table_has_every_set_and_every_method() -> None:
    main = paper("main")
    shown = {entry.dataset for entry in main.data.values()}
    assert shown == set(TREES) - {"imagenet_v2", "imagenet_sketch"}
    (classes,) = [view for view in main.views if view.name == "main"]
    assert len(classes.mean) == 13
    assert {main.data[name].captions for name in classes.mean} == {False}
    every = set(main.method_entries)
    assert set(classes.methods) == every


TABLE_7 = ("clip-vit-b32", "clip-vit-b16", "clip-vit-l14", "siglip-vit-b16", "siglip-vit-l16")


def test_every_backbone_of_table_7_is_tried() -> None:
    tried = {(entry.dataset, entry.backbone) for entry in paper("backbones").data.values()}
    assert tried == {
        (name, backbone) for name in ("cifar10", "imagenet") for backbone in TABLE_7
    } - {
        ("cifar10", "clip-vit-b32"),  # in the main table
        ("imagenet", "clip-vit-b32"),
    }


def test_the_grid_is_the_supplements() -> None:
    values = [entry.params for entry in paper("grid").method_entries.values()]
    assert {value["learning_rate"] for value in values} == {0.1, 0.01, 0.001}
    assert {value["batch_size"] for value in values} == {128, 256, 512, 1024}
    assert len(values) == 12


def test_the_pools_are_table_6s() -> None:
    sizes = [setting.pool_size for setting in paper("pool_size").settings.values()]
    assert sizes == [128, 512, 1024, 2048, 4096, 8192, 16384, 32768]


def test_published_numbers() -> None:
    tables = published_tables()
    assert set(tables) == {"main", "ablation", "depth", "table6", "table7", "table8", "table9"}
    numbers = [number for table in tables.values() for found in table.values() for number in found]
    assert all(0 < number.value < 1 and number.source for number in numbers)
    assert {number.backbone for number in numbers} <= set(named_backbones())
    assert {key[3] for table in tables.values() for key in table} <= set(METRICS)
    doubtful = find_published(["table6"], ("cc12m", "pool_128", "mcm", "fpr95"), "clip-vit-b32")
    assert doubtful.value == 0.156
    assert "equals ViLU's cell" in doubtful.doubt
    assert find_published(["table6"], ("cc12m", "pool_512", "mcm", "fpr95"), "compact").doubt == ""


@pytest.mark.parametrize(
    ("method", "setting", "mean"),
    [
        ("mcm", "zero_shot", 70.5),
        ("vilu_mcm", "from_captions", 68.6),
        ("vilu_mcm", "from_union", 63.1),
    ],
)
def test_the_means_of_table_9_are_those_of_its_rows(method: str, setting: str, mean: float) -> None:
    """The published mean must agree up to the table's rounding.

    The mean is rounded by half a tenth, and so is each row.
    """
    cells = published_tables()["table9"]
    rows = [
        found[0].value
        for key, found in cells.items()
        if key[1:3] == (setting, method) and "mean" not in key[0]
    ]
    assert len(rows) == 12
    assert 100 * sum(rows) / 12 == pytest.approx(mean, abs=0.1)
    assert 100 * cells["mean of 12", setting, method, "fpr95"][0].value == pytest.approx(mean)


def test_several_backbones_stand_beside_their_own_only() -> None:
    key = ("cifar10", "", "vilu", "auroc")
    assert find_published(["table7"], key, "clip-vit-l14").value == 0.99
    assert find_published(["table7"], key, "compact") is None
    assert find_published(["main"], key, "compact").backbone == "clip-vit-b32"


def test_claims_of_the_supplement_name_what_they_are_about() -> None:
    for path in STUDIES:
        for claim in load_config(path).claims:
            assert claim.source
            assert not isinstance(claim, BetterClaim) or claim.better != claim.than


def test_shares() -> None:
    assert CellShare.parse("2/8") == CellShare(index=1, n_shares=8)
    assert CellShare().lock != CellShare.parse("1/2").lock != CellShare.parse("2/2").lock
