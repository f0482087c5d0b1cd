"""Test another author's data sets and backbones.

Each is a TOML table or an object, and every command must know it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vilu
from tests.builders.image_files import listed
from tests.builders.known_images import CLASSES, THREE, Row, rows, save, write_list
from tests.builders.store_fakes import FakeBackbone
from vilu.backbones.catalog import (
    BACKBONES,
    BackboneKind,
    add_backbone,
    add_backbones,
    find_named_backbone,
)
from vilu.cli.app import app
from vilu.datasets.known import KNOWN, Presence, check, open_known
from vilu.errors import DataError, UsageError, ViLUError
from vilu_bench.known_datasets import add_datasets
from vilu_bench.known_datasets.layouts import LAYOUTS

ENTRIES = """
[ponds]
title = "Ponds"
n_classes = 3
sizes = { train = 18, validation = 6, test = 12 }
url = "https://example.org/ponds"
how = "Ask the frog."
n_bytes = 250_400
folders = ["ponds/pictures"]
layout = { kind = "folders", splits = { train = "train", validation = "val", test = "test" } }

[meadows]
title = "Meadows"
n_classes = 12
sizes = { train = 28, validation = 12, test = 24 }
url = "https://example.org/meadows"
how = "Ask the hare."
folders = ["meadows"]
marks = ["images"]
coop_template = "a photo of {}, a meadow."
layout = { kind = "coop", file = "split_zhou_Meadows.json", images = "images" }
"""
PONDS = ("duck_pond", "Mill pond", "zoo")

BENCHMARK = """
name = "ponds"
seeds = 1
resamples = 20
[data.ponds]
dataset = "ponds"
source = "."
backbone = "stranger"
views = 0
prompts = []
[settings.labels]
kind = "labels"
[methods.mcm]
[methods.lvu]
params = { epochs = 2, hidden = [8] }
"""


def load_stranger(argument: str, device: torch.device, precision: str) -> FakeBackbone:
    return FakeBackbone()


@pytest.fixture(autouse=True)
def added() -> Iterator[None]:
    """Add the data sets and the backbone, and restore everything afterwards."""
    before = [(table, dict(table)) for table in (KNOWN, BACKBONES)]
    add_datasets(ENTRIES)
    add_backbone(
        BackboneKind(
            "stranger", f"{__name__}:load_stranger", "stranger, a random projection", "none"
        )
    )
    yield
    for table, content in before:
        table.clear()
        table.update(content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write tiny files for both data sets, 36 ponds and 64 meadows. Return their folder."""
    for row in rows(36, 3, ("train", "test", "train", "test", "train", "val")):
        save(tmp_path / f"data/ponds/pictures/{row.split}/{PONDS[row.label]}/{row.number}.jpg", row)
    meadows = [
        (row, f"meadow {row.label}/{row.number}.jpg", f"meadow {row.label}")
        for row in rows(64, CLASSES, THREE)
    ]
    write_list(tmp_path / "data/meadows", "Meadows", "images", meadows)
    return tmp_path / "data"


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(done.exception, ViLUError):
        assert done.exception.exit_code == code, done.exception
        return done.output + str(done.exception)
    assert done.exit_code == code, done.output
    return done.stdout


def checked(root: Path, name: str) -> Presence:
    (presence,) = check(root, [name])
    return presence


def test_they_are_listed_checked_and_opened(root: Path) -> None:
    assert "Meadows, by --dataset meadows" in run("list", "datasets")
    facts = {row["name"]: row for row in json.loads(run("datasets", "list", "--json"))}
    from_outside = [name for name in facts if name in {"ponds", "meadows"}]
    assert from_outside == ["ponds", "meadows"]
    assert " 250 kB " in run("datasets", "list")
    assert facts["ponds"]["sizes"] == {"train": 18, "validation": 6, "test": 12}
    assert (facts["meadows"]["coop_template"], facts["meadows"]["licence"]) == (
        "a photo of {}, a meadow.",
        "see the site",
    )
    found = {
        row["name"]: row["state"] for row in json.loads(run("datasets", "check", root, "--json"))
    }
    assert (found["ponds"], found["meadows"], found["dtd"]) == ("complete", "complete", "absent")
    assert "Ask the frog. (https://example.org/ponds)" in run(
        "datasets", "check", root / "meadows", "ponds", code=3
    )
    train, whole = (open_known("ponds", root, split=split) for split in ("train", None))
    # The classes are in the byte order of the folder names.
    assert train.class_names == whole.class_names == ("Mill pond", "duck pond", "zoo")
    assert listed(train)[0] == ("train/Mill pond/1.jpg", 0)
    assert (len(train), len(whole)) == (18, 36)
    meadows = open_known("meadows", root, split="validation+test")
    assert meadows.class_names == tuple(f"meadow {label}" for label in range(CLASSES))
    assert len(meadows) == 36


@pytest.mark.parametrize(("name", "n"), [("ponds", 12), ("meadows", 24)])
def test_they_are_embedded_by_name(root: Path, tmp_path: Path, name: str, n: int) -> None:
    run(
        "embed",
        root,
        "--dataset",
        name,
        "--split",
        "test",
        "--backbone",
        "stranger",
        "-o",
        tmp_path / "store",
    )
    store, images = vilu.EmbeddingStore(tmp_path / "store"), open_known(name, root, split="test")
    assert (len(store), store.class_names) == (n, images.class_names)
    assert list(store.ids) == [key for key, _ in listed(images)]
    assert np.array_equal(np.asarray(store.target), [label for _, label in listed(images)])


def test_they_are_data_of_a_benchmark(root: Path, tmp_path: Path) -> None:
    (tmp_path / "ponds.toml").write_text(BENCHMARK)
    text = run("benchmark", tmp_path / "ponds.toml", "--data", root, "-o", tmp_path / "out")
    assert {"mcm", "lvu"} <= set(text.split())
    assert {
        path.parent.name.partition("-")[0]
        for path in (tmp_path / "out/stores").glob("*/manifest.json")
    } == {"ponds"}


def test_what_is_wrong_with_the_files_is_said(root: Path) -> None:
    (root / "meadows/split_zhou_Meadows.json").unlink()
    with pytest.raises(
        DataError, match=r"Meadows in .* has no split_zhou_Meadows\.json, .* Ask the hare"
    ):
        open_known("meadows", root)
    presence = checked(root, "meadows")
    assert presence.state == "incomplete"
    assert "has no split_zhou_Meadows.json" in str(presence.problem)
    home = root / "ponds/pictures"
    save(home / "val/new/1.jpg", Row(0, 1, 1, "val"))
    assert open_known("ponds", root).class_names == ("Mill pond", "duck pond", "new", "zoo")
    (home / "val").rename(home / "away")
    assert checked(root, "ponds").splits["validation"].problem == (
        f"{home / 'val'} is missing. Unpack it there, or choose another split."
    )
    save(home / "val/1.jpg", Row(0, 1, 1, "val"))
    with pytest.raises(
        DataError, match=r"images without class folders \(1.jpg, ...\); .* of its name."
    ):
        open_known("ponds", root, split="validation")
    for split in ("train", "test"):
        (home / split).rename(home / f"{split} away")
    with pytest.raises(DataError, match="has no folder of a class in"):
        open_known("ponds", root)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('title = "Ponds"\n', "", "data set 'ponds', title: Field required"),
        ("n_classes = 3", "n_clases = 3", "data set 'ponds' has no 'n_clases'; it has name, title"),
        ("n_classes = 3", "", "data set 'ponds' must have n_classes"),
        (
            "n_classes = 3",
            "n_classes = 0",
            "data set 'ponds', n_classes: Input should be greater than 0",
        ),
        (
            "train = 18",
            "train = 'many'",
            "data set 'ponds', sizes.train: Input should be a valid integer",
        ),
        ("[ponds]", '["a pond"]', "data set 'a pond', name: String should match"),
        (
            'kind = "folders"',
            'kind = "heap"',
            "kinds are folders, coop, tars, .* Got {'kind': 'heap'",
        ),
        (
            'kind = "folders", splits',
            'kind = "folders", parts',
            "layout folders has no 'parts'; it has splits",
        ),
        ('kind = "folders"', 'kind = "tars"', "layout tars has no options. Leave out splits."),
        (
            'file = "split_zhou_Meadows.json", ',
            "",
            "data set 'meadows', layout coop, file: Field required",
        ),
        ("[ponds]", "ponds", "the text is not TOML"),
        ("[ponds]", "x = 1\n[ponds]", "'x' is in no table"),
        ('title = "Ponds"', 'title = "Lakes"', "another data set 'ponds' already"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(before: str, after: str, message: str) -> None:
    assert before in ENTRIES
    with pytest.raises(UsageError, match=message):
        add_datasets(ENTRIES.replace(before, after, 1))


def test_an_entry_is_added_once_and_may_be_an_object_or_a_file(tmp_path: Path) -> None:
    assert add_datasets(ENTRIES) == [KNOWN["ponds"], KNOWN["meadows"]]
    lakes = replace(KNOWN["ponds"], name="lakes", reader=LAYOUTS["tars"], n_classes=None)
    assert vilu.register(lakes).captioned
    assert "lakes" in run("datasets", "list")
    (tmp_path / "more.toml").write_text(ENTRIES.replace("[ponds]", "[rivers]"))
    assert [entry.name for entry in add_datasets(tmp_path / "more.toml")] == ["rivers", "meadows"]
    with pytest.raises(UsageError, match="cannot read"):
        add_datasets(tmp_path / "none.toml")


def test_of_tables_with_one_taken_name_none_is_added() -> None:
    """If one name is taken, no table must be added, even if the taken name comes last."""
    add_datasets(ENTRIES)
    new, changed = ENTRIES.replace("[ponds]", "[brooks]"), 'title = "Meadows"'
    assert changed in new
    with pytest.raises(UsageError, match="another data set 'meadows' already"):
        add_datasets(new.replace(changed, 'title = "Hills"'))
    assert "brooks" not in KNOWN


# Backbones

NAMED_ENTRY = """
[clip-small]
title = "CLIP small"
open_clip = "ViT-S-32/someone"
open_clip_hub = "someone/vit_small"
hf = "someone/clip-small"
embed_dim = 384
feature_dim = 384
image_size = 224
context_length = 77
quick_gelu = false
tanh_gelu = false
"""


def test_a_named_backbone_is_a_table() -> None:
    assert add_backbones(NAMED_ENTRY) == ["clip-small"]
    assert find_named_backbone("clip-small@hf").spec == "hf:someone/clip-small"
    found = {row["name"]: row for row in json.loads(run("list", "backbones", "--json"))}
    assert found["clip-small"]["image_rate"] is None
    assert found["stranger"]["what it is"] == "stranger, a random projection"
    assert add_backbones('[other]\nloader = "x:load"\ndescription = "other"\nextra = "none"') == [
        "other"
    ]
    assert BACKBONES["other"] == BackboneKind("other", "x:load", "other", "none")
    for name, entry, message in (
        ("compact", BACKBONES["stranger"], "another backbone 'compact' already"),
        ("clip-vit-b32", BACKBONES["clip-small"], "another backbone 'clip-vit-b32' already"),
        ("a:b", BACKBONES["clip-small"], "letters, digits"),
    ):
        with pytest.raises(UsageError, match=message):
            vilu.register(replace(entry, name=name))
    with pytest.raises(UsageError, match="backbone 'x', open_clip: Field required"):
        add_backbones('[x]\ntitle = "X"')


def test_the_embedding_space_is_the_strangers() -> None:
    assert vilu.load_backbone("stranger").space.backbone == "fake"
    with pytest.raises(UsageError, match="Did you mean 'stranger'"):
        vilu.load_backbone("strangr")


def test_a_file_for_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    tables = {
        "datasets": ENTRIES.replace("[ponds]", "[tarns]").replace("[meadows]", "[lawns]"),
        "backbones": NAMED_ENTRY,
    }
    path.write_text(
        "".join(text.replace("\n[", f"\n[{section}.") for section, text in tables.items())
    )
    assert vilu.register(path) == path
    assert {"tarns", "lawns"} <= set(KNOWN)
    assert "clip-small" in BACKBONES
    path.write_text("[metrics.x]\n")
    with pytest.raises(
        UsageError, match=r"a section \[metrics\]; there are \[datasets.NAME\], \[backbones.NAME\]"
    ):
        vilu.register(path)
    with pytest.raises(
        UsageError, match=r"register takes the path of a TOML file, or .* Got 'mine.txt'"
    ):
        vilu.register("mine.txt")
