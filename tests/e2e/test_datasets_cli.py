"""``vilu datasets`` and ``vilu embed --dataset`` on small trees with the real layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.builders.image_files import listed
from tests.builders.known_trees import make_tree
from tests.command import run
from vilu.datasets.known import KNOWN, open_known


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("dtd", "ucf101", "food101", "cc12m"):
        make_tree(name, folder)
    return folder


def test_the_catalogue_on_screen_and_in_json() -> None:
    done = run("datasets", "list")
    rows = done.stdout.splitlines()
    assert [line.split()[0] for line in rows[1:] if not line.startswith(" ")] == list(KNOWN)
    assert "train 2,820 validation 1,128 test 1,692" in done.stdout
    assert "vilu datasets check FOLDER" in done.stderr
    facts = {row["name"]: row for row in json.loads(run("datasets", "list", "--json").stdout)}
    assert list(facts) == list(KNOWN)
    assert facts["oxford_pets"]["coop_template"] == "a photo of a {}, a type of pet."
    assert facts["cifar10"]["archives"]["test_batch"] == "40351d587109b95175f43aff81a1287e"
    assert (facts["laion400m"]["captioned"], facts["laion400m"]["n_classes"]) == (True, None)


def test_check_says_what_is_there_and_what_to_do(root: Path) -> None:
    done = run("datasets", "check", root)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert lines["dtd"].split()[1:3] == ["complete", "train"]
    assert "test 24/24 (published 1,692)" in lines["dtd"]
    assert lines["cc12m"].split()[1:] == ["present", "all", "?/12,423,374"]
    assert lines["food101"].split()[1] == "incomplete"
    assert lines["sun397"].split()[1:] == ["absent", "-"]
    assert "split_zhou_DescribableTextures.json of the user" in done.stdout
    assert f"vilu embed {root} --dataset dtd -o STORE" in done.stdout
    assert f"3 of {len(KNOWN)} data sets are here and whole" in done.stderr
    found = {
        row["name"]: row
        for row in json.loads(run("datasets", "check", root, "--json", "--deep").stdout)
    }
    assert found["cc12m"]["splits"]["all"]["found"] == 64
    assert found["dtd"]["folder"] == str(root / "dtd/dtd")
    assert found["sun397"]["folder"] is None


def test_a_named_data_set_that_is_not_whole_is_an_error(root: Path, tmp_path: Path) -> None:
    assert run("datasets", "check", root, "dtd", "ucf101", "cc12m").stdout.count("complete") == 2
    done = run("datasets", "check", root, "dtd", "food101", "sun397", code=3)
    assert "not whole: food101, sun397 (2 of 3 data sets)" in done.stderr
    assert "Download SUN397.tar.gz" in done.stdout
    home = make_tree("dtd", tmp_path)
    (home / "images/banded/banded_0002.jpg").unlink()
    done = run("datasets", "check", tmp_path, "dtd", code=3)
    assert "missing: images/banded/banded_0002.jpg" in done.stdout
    assert "Did you mean 'dtd'" in run("datasets", "check", root, "dtb", code=2).stderr
    assert "does not exist" in run("datasets", "check", root / "nowhere", code=2).stderr


@pytest.mark.slow
def test_embedding_a_data_set_by_name(root: Path, tmp_path: Path) -> None:
    embed = ["embed", root, "--backbone", "compact:64", "--dataset"]
    run(*embed, "dtd", "--split", "test", "-o", tmp_path / "dtd")
    store, images = vilu.EmbeddingStore(tmp_path / "dtd"), open_known("dtd", root, split="test")
    assert (len(store), store.class_names) == (24, images.class_names)
    assert list(store.ids) == [key for key, _ in listed(images)]
    assert np.array_equal(np.asarray(store.target), [label for _, label in listed(images)])
    assert store.manifest.split == "test"
    assert store.manifest.dataset == "dtd (split_zhou_DescribableTextures.json of the user)"
    run(*embed, "ucf101", "--limit", 3, "-o", tmp_path / "ucf101")
    assert vilu.EmbeddingStore(tmp_path / "ucf101").class_names[0] == "Apply Eye Makeup"
    for options, message in (
        (["dtdd", "-o", tmp_path / "x"], "Did you mean 'dtd'"),
        (["dtd", "--split", "tset", "-o", tmp_path / "x"], "Did you mean 'test'"),
        (["dtd", "--where", "a=b", "-o", tmp_path / "x"], "are for tables"),
    ):
        assert message in run(*embed, *options, code=2).stderr
    assert "Download SUN397.tar.gz" in run(*embed, "sun397", "-o", tmp_path / "x", code=3).stderr
