"""The states that ``check`` reports, and its counts."""

from __future__ import annotations

import errno
import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.builders.known_images import Row, save
from tests.builders.known_trees import CIFAR10, TREES, make_tree, make_trees
from tests.builders.tar_files import pair, tar_bytes, write_shard
from vilu.datasets.known import KNOWN, check, check_entry
from vilu.errors import StorageError, UsageError
from vilu_bench.known_datasets.layouts import missing_numbers

COOP = {"eurosat", "stanford_cars", "oxford_pets", "flowers102", "caltech101", "dtd", "ucf101"}
CAPTIONED = {"cc3m", "cc12m", "laion400m"}


def one(root: Path, name: str, *, deep: bool = False):
    (presence,) = check(root, [name], deep=deep)
    assert presence.name == name
    return presence


def counts(presence) -> dict[str, tuple[int | None, int | None, int | None]]:
    return {
        name: (split.found, split.listed, split.expected) for name, split in presence.splits.items()
    }


def test_nothing_is_there(tmp_path: Path) -> None:
    found = check(tmp_path)
    assert [presence.name for presence in found] == list(KNOWN)
    for presence in found:
        entry = KNOWN[presence.name]
        assert (presence.state, presence.folder, dict(presence.splits)) == ("absent", None, {})
        assert presence.advice == f"{entry.how} ({entry.url})"
    with pytest.raises(UsageError, match="is no folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="Did you mean 'dtd'"):
        check(tmp_path, ["dtdd"])


@pytest.mark.parametrize("layout", ["torchvision", "coop"])
def test_everything_is_there(tmp_path: Path, layout: str) -> None:
    make_trees(tmp_path, layout=layout)
    states = {presence.name: presence.state for presence in check(tmp_path)}
    for name in KNOWN:
        there = "complete" if name in COOP else "present" if name in CAPTIONED else "incomplete"
        assert states.pop(name) == (there if name in TREES else "absent"), name
    assert states == {}  # the others have fewer images than were published
    assert [presence.to_dict() for presence in check(tmp_path, list(KNOWN))] == [
        presence.to_dict() for presence in check(tmp_path)
    ]
    json.dumps([presence.to_dict() for presence in check(tmp_path)])


def test_a_list_of_the_user_says_what_is_whole(tmp_path: Path) -> None:
    home = make_tree("dtd", tmp_path)
    presence = one(tmp_path, "dtd")
    assert counts(presence) == {
        "train": (28, 28, 2820),
        "validation": (12, 12, 1128),
        "test": (24, 24, 1692),
    }
    assert (presence.folder, presence.origin) == (
        home,
        "split_zhou_DescribableTextures.json of the user",
    )
    assert presence.advice == f"vilu embed {tmp_path} --dataset dtd -o STORE"
    gone = sorted((home / "images").glob("*/*_0002.jpg"))
    for file in gone:
        file.unlink()
    presence = one(tmp_path, "dtd")
    assert counts(presence)["test"] == (12, 24, 1692)
    assert presence.splits["test"].missing == tuple(
        str(file.relative_to(home)) for file in gone[:5]
    )
    assert (presence.state, presence.splits["train"].missing) == ("incomplete", ())


def test_a_shipped_list_says_what_is_missing(tmp_path: Path) -> None:
    home = make_tree("dtd", tmp_path)
    (home / "split_zhou_DescribableTextures.json").unlink()
    presence = one(tmp_path, "dtd")
    assert presence.origin == "CoOp list shipped with vilu"
    assert {split.listed for split in presence.splits.values()} == {2820, 1128, 1692}
    assert (presence.state, len(presence.splits["train"].missing)) == ("incomplete", 5)


def test_published_sizes_are_those_of_the_list_in_use(tmp_path: Path) -> None:
    home = make_tree("food101", tmp_path)
    assert counts(one(tmp_path, "food101")) == {"train": (36, 36, 75_750), "test": (28, 28, 25_250)}
    (home / "split_zhou_Food101.json").write_text(
        json.dumps({"train": [["apple_pie/1001.jpg", 0, "pie"]]})
    )
    presence = one(tmp_path, "food101")
    assert counts(presence) == {
        "train": (1, 1, 50_500),
        "validation": (0, 0, 20_200),
        "test": (0, 0, 30_300),
    }
    assert presence.state == "complete"
    make_tree("imagenet_sketch", tmp_path)
    assert counts(one(tmp_path, "imagenet_sketch")) == {"shots+test": (64, 64, 50_889)}


def test_with_the_published_number_of_images_it_is_whole(tmp_path: Path) -> None:
    make_tree("food101", tmp_path)
    tiny = replace(KNOWN["food101"], official_sizes={"train": 36, "test": 28})
    assert check_entry(tiny, tmp_path, named=True, deep=False).state == "complete"
    short = replace(KNOWN["food101"], official_sizes={"train": 36, "test": 29})
    assert check_entry(short, tmp_path, named=True, deep=False).state == "incomplete"


def test_a_split_that_cannot_be_listed_hides_no_other(tmp_path: Path) -> None:
    home = make_tree("imagenet", tmp_path)
    save(home / "val/n99999999/1.JPEG", Row(0, 1, 1, "test"))
    presence = one(tmp_path, "imagenet")
    assert counts(presence)["train"] == (36, 36, 1_281_167)
    assert "n99999999 is no class" in presence.splits["test"].problem
    assert presence.state == "incomplete"
    home = make_tree("dtd", tmp_path)
    (home / "split_zhou_DescribableTextures.json").write_text("{")
    presence = one(tmp_path, "dtd")
    assert (presence.state, presence.folder) == ("incomplete", home)
    assert "cannot be read as JSON" in presence.problem


def test_a_folder_is_taken_for_a_data_set_by_its_name_or_when_asked(tmp_path: Path) -> None:
    make_tree("dtd", tmp_path)  # images/ alone could be dtd's, food101's or oxford_pets'
    (tmp_path / "dtd/dtd").rename(tmp_path / "somewhere")
    assert {presence.state for presence in check(tmp_path / "somewhere")} == {"absent"}
    assert one(tmp_path / "somewhere", "dtd").state == "complete"
    (tmp_path / "somewhere").rename(tmp_path / "dtd/dtd")
    for folder in (tmp_path / "dtd", tmp_path / "dtd/dtd"):
        states = {presence.name: presence.state for presence in check(folder)}
        assert states == {name: "complete" if name == "dtd" else "absent" for name in KNOWN}


def test_a_folder_that_cannot_be_looked_into_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree("dtd", tmp_path)

    def refuse(self: Path, pattern: str) -> None:
        raise PermissionError(errno.EACCES, "no", str(self))

    monkeypatch.setattr(Path, "glob", refuse)
    with pytest.raises(StorageError, match="cannot look into"):
        check(tmp_path)


# Checksums


def test_archives_are_seen_and_with_deep_compared(tmp_path: Path) -> None:
    entry = KNOWN["eurosat"]
    (tmp_path / "eurosat").mkdir()
    (tmp_path / "eurosat/EuroSAT.zip").write_bytes(b"zip")
    presence = one(tmp_path, "eurosat")
    assert presence.archives == {"EuroSAT.zip": "present"}
    assert presence.advice.startswith("EuroSAT.zip is here: unpack. Download")
    presence = one(tmp_path, "eurosat", deep=True)
    assert (presence.state, presence.archives) == ("absent", {"EuroSAT.zip": "wrong"})
    assert presence.advice.startswith("EuroSAT.zip is damaged: download again. Download")
    right = replace(
        entry, archives={"EuroSAT.zip": hashlib.md5(b"zip", usedforsecurity=False).hexdigest()}
    )
    assert check_entry(right, tmp_path, named=True, deep=True).archives == {"EuroSAT.zip": "right"}


def test_a_damaged_archive_beside_whole_images_is_told_but_does_no_harm(tmp_path: Path) -> None:
    make_tree("dtd", tmp_path)
    (tmp_path / "dtd/dtd-r1.0.1.tar.gz").write_bytes(b"")
    presence = one(tmp_path, "dtd", deep=True)
    assert (presence.state, presence.archives) == ("complete", {"dtd-r1.0.1.tar.gz": "wrong"})


def test_cifar_files_are_data_and_must_be_right(tmp_path: Path) -> None:
    home = make_tree("cifar10", tmp_path)
    files = [*CIFAR10["train"], *CIFAR10["test"], "batches.meta"]
    md5 = {
        name: hashlib.md5((home / name).read_bytes(), usedforsecurity=False).hexdigest()
        for name in files
    }
    tiny = replace(KNOWN["cifar10"], archives=md5, sizes={"train": 34, "test": 30})
    presence = check_entry(tiny, tmp_path, named=True, deep=True)
    assert (presence.state, set(presence.archives.values())) == ("complete", {"right"})
    wrong = replace(tiny, archives={**md5, "test_batch": "0" * 32})
    presence = check_entry(wrong, tmp_path, named=True, deep=True)
    assert (presence.state, presence.problem) == ("incomplete", "wrong checksum: test_batch")
    assert check_entry(wrong, tmp_path, named=True, deep=False).state == "complete"
    (home / "data_batch_3").unlink()
    presence = check_entry(tiny, tmp_path, named=True, deep=False)
    assert counts(presence) == {"train": (0, 34, 34), "test": (30, 30, 30)}
    assert presence.splits["train"].missing == ("data_batch_3",)
    (home / "test_batch").write_bytes(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    presence = check_entry(tiny, tmp_path, named=True, deep=False)
    assert "asks for os.system" in presence.splits["test"].problem


# Tars


def test_pairs_are_counted_when_asked(tmp_path: Path) -> None:
    make_tree("cc3m", tmp_path)
    assert counts(one(tmp_path, "cc3m")) == {"all": (None, None, 3_334_173)}
    presence = one(tmp_path, "cc3m", deep=True)
    assert (presence.state, counts(presence)) == ("present", {"all": (64, None, 3_334_173)})
    assert presence.origin == "3 tar files"
    shard = tmp_path / "cc3m/train/00001.tar"
    shard.write_bytes(shard.read_bytes()[:-20_000])
    presence = one(tmp_path, "cc3m", deep=True)
    assert presence.state == "incomplete"
    assert presence.splits["all"].found < 64
    assert presence.splits["all"].problem.startswith("train/00001.tar: ")
    assert presence.splits["all"].problem.endswith("Download this shard again.")


def test_gaps_in_the_numbers_of_shards(tmp_path: Path) -> None:
    for number in (0, 1, 4, 5):
        write_shard(tmp_path / "cc12m", tar_bytes(*pair("a")), f"{number:05d}.tar")
    presence = one(tmp_path, "cc12m")
    assert (presence.state, presence.splits["all"].missing) == (
        "incomplete",
        ("00002.tar", "00003.tar"),
    )
    names = [tmp_path / name for name in ("a-1.tar", "a-3.tar", "b.tar", "99999999999999.tar")]
    assert missing_numbers(tmp_path, names)[:2] == ("a-0.tar", "a-2.tar")
    assert len(missing_numbers(tmp_path, names)) == 5


def test_tars_and_something_else(tmp_path: Path) -> None:
    make_tree("cc12m", tmp_path)
    (tmp_path / "cc12m/extra").mkdir()
    presence = one(tmp_path, "cc12m")
    assert presence.state == "incomplete"
    assert "what to read is unclear" in presence.problem
    with tarfile.open(tmp_path / "cc12m/00000.tar") as tar:
        assert len(tar.getnames()) == 96  # three members a pair
