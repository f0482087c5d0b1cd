"""Test push and pull, through a hub on this machine with the hub's own client, and
through folders.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vilu
from tests.builders.fake_hub import TOKEN, Hub, serve
from tests.conftest import toy_embeddings
from vilu.artifacts.disk import host_hash
from vilu.artifacts.documents import write_json
from vilu.artifacts.hashing import digest
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.cli.app import app
from vilu.errors import DataError, MissingModelError, UsageError
from vilu.predictors.persistence import hub as folders
from vilu.predictors.persistence.hub import pull, push
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.predictors.zero_shot import MCM
from vilu_bench.methods.neighbours import KNNVote

OURS = {"README.md", "predictor.json", "weights.safetensors"}
WAITING = 120


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vilu.cli", *map(str, args)]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=WAITING, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def predictor(tmp_path: Path) -> Path:
    """Return a folder with a saved predictor, and with private files that must not travel."""
    folder = tmp_path / "predictor"
    KNNVote(k=3).fit(toy_embeddings(40)).save(folder)
    (folder / "secrets.txt").write_text("mine")
    (folder / "model.pkl").write_bytes(b"\x80\x04.")
    (folder / "sub").mkdir()
    (folder / "sub" / "README.md").write_text("no")
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as found:
        yield found


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Point the hub's client to this hub and to its own cache, here and in subprocesses.

    Return the environment variables for subprocesses.
    """
    from huggingface_hub import constants

    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", settings["HF_HUB_CACHE"])
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    for name in {name for name in os.environ if re.search("^HF_|proxy", name, re.IGNORECASE)}:
        monkeypatch.delenv(name)
    return settings


def test_a_predictor_goes_up_and_comes_down(
    hub: Hub,
    client: dict[str, str],
    predictor: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    calibrate_predictor(
        predictor, toy_embeddings(200, seed=2, ids_from=10_000), Target(max_risk=0.9)
    )
    hub.create("lab/knn")
    hub.commit(
        "lab/knn",
        "main",
        {"notes.txt": b"kept", "calibration.parquet": b"of an earlier one", "evil.pkl": b"."},
    )
    done = run("push", predictor, "lab/knn", "--private", HF_TOKEN=TOKEN, **client)
    sha, files = hub.find("lab/knn", "main")
    assert done.stdout.strip() == f"{hub.url}/lab/knn/commit/{sha}"
    made = hub.created[-1]
    # Newer and older clients use different fields.
    assert made["visibility"] == "private" if "visibility" in made else made["private"]
    of_calibration = {"risk.json", "calibration.parquet", "looks.json", "vocabulary.safetensors"}
    calibrated = OURS | of_calibration
    assert set(files) == calibrated | {"notes.txt", "evil.pkl"}
    assert all(files[name] == (predictor / name).read_bytes() for name in OURS)

    assert run("pull", "lab/knn", "-o", tmp_path / "here", **client).stdout.strip() == str(
        tmp_path / "here"
    )
    assert names(tmp_path / "here") == calibrated
    assert not [path for path in hub.requests if path.endswith(("evil.pkl", "notes.txt"))]
    data = toy_embeddings(30, seed=1)
    both = [
        vilu.load(folder).predict_uncertainty(data).tolist()
        for folder in (predictor, tmp_path / "here")
    ]
    assert both[0] == both[1]

    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pull("lab/knn", tmp_path / "cached")
    assert names(tmp_path / "cached") == calibrated
    with pytest.raises(MissingModelError, match="not complete in the cache"):
        pull("lab/none", tmp_path / "none")
    with pytest.raises(MissingModelError, match="HF_HUB_OFFLINE is set"):
        push(predictor, "lab/knn")
    assert not hub.requests
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("client")
def test_what_the_hub_refuses_or_should_not_have(
    hub: Hub, predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with pytest.raises(UsageError, match="set HF_TOKEN"):
        push(predictor, "lab/knn")
    monkeypatch.setenv("HF_TOKEN", TOKEN[::-1])
    with pytest.raises(UsageError, match="HTTP 401"):
        push(predictor, "lab/knn")
    with pytest.raises(MissingModelError, match="no such name"):
        pull("lab/knn", tmp_path / "p")
    hub.create("lab/empty")
    with pytest.raises(MissingModelError, match="revision v9: it has no such revision"):
        pull("lab/empty", tmp_path / "p", revision="v9")
    with pytest.raises(DataError, match=r"no predictor: it has no predictor\.json and no weights"):
        pull("lab/empty", tmp_path / "p")
    (predictor / "README.md").write_bytes(b" " * 2**21)
    hub.commit("lab/empty", "main", {name: (predictor / name).read_bytes() for name in OURS})
    with pytest.raises(DataError, match="2,097,152 bytes"):
        pull("lab/empty", tmp_path / "p")
    assert not [path for path in hub.requests if "/resolve/" in path]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingModelError, match="cannot be reached"):
        pull("lab/empty", tmp_path / "p")
    assert names(tmp_path) <= {"predictor", "cache"}


def test_a_folder_as_the_hub(
    predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert push(predictor, "./hub/knn") == "hub/knn"
    assert names(tmp_path / "hub") == {"knn"}
    assert names(tmp_path / "hub" / "knn") == OURS
    assert pull((tmp_path / "hub" / "knn").as_uri(), "here") == Path("here")
    assert vilu.load("here").k == 3
    pull("./hub/knn", "here")  # a second pull works, too

    MCM().fit(toy_embeddings(20)).save("other")
    for copy in (lambda: pull("./hub/knn", "other"), lambda: push("other", "./hub/knn")):
        with pytest.raises(UsageError, match="another predictor"):
            copy()
    assert vilu.load("other").name == "mcm"
    push("other", "./hub/knn", overwrite=True)
    assert vilu.load("hub/knn").name == "mcm"
    with pytest.raises(UsageError, match=r"'model\.pkl', which is no part of"):
        pull("./hub/knn", predictor, overwrite=True)
    assert "secrets.txt" in names(predictor)
    assert names(tmp_path) == {"hub", "here", "other", "predictor"}


def sealed(content: bytes, old: bytes, new: bytes) -> bytes:
    """Return a changed record whose fingerprint agrees."""
    record = json.loads(content.replace(old, new))
    del record["fingerprint"]
    return json.dumps({**record, "fingerprint": digest(record)}).encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "weights.safetensors",
            lambda content: content[:-1] + b"!",
            "is not the file that predictor.json names",
        ),
        ("predictor.json", lambda _: b"[]", "holds no object"),
        (
            "predictor.json",
            lambda content: content.replace(b'"notes": {', b'"no": {'),
            "not what its fingerprint says",
        ),
        (
            "predictor.json",
            lambda content: sealed(content, b'"embed_dim"', b'"width"'),
            "is damaged.*'embed_dim'",
        ),
        (
            "predictor.json",
            lambda content: sealed(content, b'"notes": {', b'"no": {'),
            "notes: Field required",
        ),
        ("README.md", lambda _: b" " * 2**21, "2,097,152 bytes"),
    ],
)
def test_a_damaged_predictor_is_not_placed(
    name: str, change, message: str, predictor: Path, tmp_path: Path
) -> None:
    (predictor / name).write_bytes(change((predictor / name).read_bytes()))
    MCM().fit(toy_embeddings(20)).save(tmp_path / "here")
    with pytest.raises(DataError, match=f"{predictor / name}.*{message}"):
        pull(str(predictor), tmp_path / "here", overwrite=True)
    assert vilu.load(tmp_path / "here").name == "mcm"
    with pytest.raises(DataError, match=message):
        push(predictor, str(tmp_path / "hub"))
    assert names(tmp_path) == {"predictor", "here"}


def test_damaged_candidates_are_not_placed(predictor: Path, tmp_path: Path) -> None:
    space = vilu.EmbeddingSpace(2, logit_scale=10.0)
    Vocabulary(("cat", "dog"), torch.eye(2), space, "float32", {}).save(predictor)
    path = predictor / "vocabulary.safetensors"
    path.write_bytes(path.read_bytes().replace(b"cat", b"cot"))
    with pytest.raises(DataError, match=f"{path} is damaged"):
        pull(str(predictor), tmp_path / "here")
    with pytest.raises(DataError, match=r"vocabulary\.safetensors is damaged"):
        push(predictor, str(tmp_path / "hub"))
    assert names(tmp_path) == {"predictor"}


def test_damaged_looks_are_not_placed(predictor: Path, tmp_path: Path) -> None:
    write_json(predictor / "looks.json", {"kind": "looks", "rows": []})
    path = predictor / "looks.json"
    path.write_bytes(path.read_bytes().replace(b"[]", b"[1]"))
    with pytest.raises(DataError, match=r"looks\.json is damaged"):
        push(predictor, str(tmp_path / "hub"))
    with pytest.raises(DataError, match=r"looks\.json is damaged"):
        pull(str(predictor), tmp_path / "here")
    assert names(tmp_path) == {"predictor"}


@pytest.mark.parametrize("interrupted", [None, 1, 2])
def test_a_failed_move_brings_the_old_one_back(
    interrupted: int | None, predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old predictor must be there again if its replacement fails.

    The disk refuses the second move, or a Ctrl-C comes after the first or second move. After the
    second move the new predictor is there.
    """
    MCM().fit(toy_embeddings(20)).save(tmp_path / "here")
    rename, places = Path.rename, []

    def move(path: Path, target: Path) -> Path:
        if tmp_path / "here" not in {path, target} or path.name == "old":
            return rename(path, target)
        places.append(target)
        if len(places) == 2 and interrupted is None:
            raise OSError(28, "No space left on device")
        found = rename(path, target)
        if len(places) == interrupted:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", move)
    error, what = (
        (KeyboardInterrupt, None) if interrupted else (vilu.errors.StorageError, "No space left")
    )
    with pytest.raises(error, match=what):
        pull(str(predictor), tmp_path / "here", overwrite=True)
    assert vilu.load(tmp_path / "here").name == ("knn_vote" if interrupted == 2 else "mcm")
    assert names(tmp_path) == {"predictor", "here"}


def test_what_kills_left_of_a_copy_goes_with_the_next_one_that_ends_well(
    predictor: Path, tmp_path: Path
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours, others = (
        tmp_path / "there" / f".{name}.{host_hash()}.{pid}.0123abcd.tmp"
        for name, pid in (("mine", ended.pid), ("mine", os.getpid()))
    )
    for folder in (ours, others):
        (folder / "old").mkdir(parents=True)
    with pytest.raises(UsageError):
        pull(str(tmp_path / "nowhere"), tmp_path / "there" / "mine")
    assert ours.is_dir()  # the folder may hold the predictor that was to be replaced
    pull(str(predictor), tmp_path / "there" / "mine")
    assert names(tmp_path / "there") == {"mine", others.name}


@pytest.mark.parametrize("name", ["README.md", "predictor.json", "calibration.parquet"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_are_refused_both_ways(
    predictor: Path, tmp_path: Path, name: str, relative: bool
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("sesame")
    (predictor / name).unlink(missing_ok=True)
    (predictor / name).symlink_to(f"../{secret.name}" if relative else secret)
    pulled = tmp_path / "pulled"
    pushed = tmp_path / "hub"
    for command in (["push", predictor, pushed], ["pull", predictor, "-o", pulled]):
        done = CliRunner().invoke(app, [*map(str, command)])
        assert isinstance(done.exception, UsageError)
        assert f"{predictor / name} is a symbolic link" in str(done.exception)
    assert names(tmp_path) == {"predictor", "secret"}


def test_a_folder_that_is_a_link_is_refused_both_ways(predictor: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "knn").symlink_to(predictor)
    for repository in (str(shelf / "knn"), f"{shelf / 'knn'}/", (shelf / "knn").as_uri()):
        with pytest.raises(UsageError, match=r"knn is a symbolic link.* Give the folder"):
            pull(repository, tmp_path / "here")
    with pytest.raises(UsageError, match=r"knn is a symbolic link.* Give the folder"):
        push(shelf / "knn", str(tmp_path / "hub"))
    assert names(tmp_path) == {"predictor", "shelf"}
    (tmp_path / "mine").symlink_to(shelf)  # a link higher in the path is the user's own
    (shelf / "knn").unlink()
    predictor.rename(shelf / "knn")
    assert pull(str(tmp_path / "mine" / "knn"), tmp_path / "here").is_dir()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_is_put_there_during_the_copy_is_not_followed(
    what: str, predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the card is checked, it is a file. When it is opened, a link has replaced it."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("sesame")
    card = (predictor / "README.md").read_bytes()
    opened = os.open

    def open_late(path: str | Path, *more: int, **where: int | None) -> int:
        if Path(path).name == "README.md" and not (tmp_path / "before").exists():
            place = predictor / "README.md" if what == "file" else predictor
            place.rename(tmp_path / "before")
            place.symlink_to(other / "README.md" if what == "file" else other)
        return opened(path, *more, **where)

    monkeypatch.setattr(os, "open", open_late)
    if what == "file":
        with pytest.raises(vilu.errors.StorageError, match="symbolic links"):
            pull(str(predictor), tmp_path / "here")
        assert not (tmp_path / "here").exists()
    else:
        pull(str(predictor), tmp_path / "here")
        assert (tmp_path / "here" / "README.md").read_bytes() == card


def test_a_pipe_is_no_file_of_a_predictor(predictor: Path, tmp_path: Path) -> None:
    (predictor / "README.md").unlink()
    os.mkfifo(predictor / "README.md")
    with pytest.raises(DataError, match=r"README\.md is no regular file"):
        pull(str(predictor), tmp_path / "here")


def test_links_of_the_cache_are_followed_within_it_alone(
    hub: Hub,
    client: dict[str, str],
    predictor: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    hub.create("lab/knn")
    hub.commit("lab/knn", "main", {name: (predictor / name).read_bytes() for name in OURS})
    run("pull", "lab/knn", "-o", tmp_path / "here", **client)
    (snapshot,) = (tmp_path / "cache" / "models--lab--knn" / "snapshots").iterdir()
    card = snapshot / "README.md"
    assert card.is_symlink()
    assert (tmp_path / "here" / "README.md").read_bytes() == card.read_bytes()

    (tmp_path / "secret").write_text("sesame")
    (tmp_path / "cache" / "models--lab--other").mkdir()
    (tmp_path / "cache" / "models--lab--other" / "README.md").write_text("sesame")
    (snapshot.parents[1] / "blobs" / "out").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for target in (
        tmp_path / "secret",
        "../../../../secret",
        "../../../models--lab--other/README.md",
        "../../blobs/out",
    ):
        card.unlink()
        card.symlink_to(target)
        with pytest.raises(UsageError, match="leads out of the cache of the hub"):
            pull("lab/knn", tmp_path / "again")
    with pytest.raises(AssertionError, match="leads out of the cache of the hub"):
        run("pull", "lab/knn", "-o", tmp_path / "again", **client)  # online as well
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "repository", ["knn", "", "a/b/c", "lab/", "-lab/knn", "lab/k n", "file://other/dir"]
)
def test_what_is_no_repository(repository: str, predictor: Path, tmp_path: Path) -> None:
    for copy in (lambda: push(predictor, repository), lambda: pull(repository, tmp_path / "here")):
        with pytest.raises(UsageError, match=r"ORG/NAME|file:///"):
            copy()


def test_folders_have_no_revisions(predictor: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no revisions"):
        push(predictor, str(tmp_path / "hub"), revision="v1")
    with pytest.raises(UsageError, match="nothing does not exist"):
        pull(str(tmp_path / "nothing"), tmp_path / "here")
    assert folders.MAX_FILE_SIZES.keys() >= OURS


def test_a_predictor_is_not_pushed_onto_itself(predictor: Path) -> None:
    files = sorted(path.name for path in predictor.iterdir())
    with pytest.raises(UsageError, match="is the predictor itself"):
        push(predictor, f"{predictor}/", overwrite=True)
    assert sorted(path.name for path in predictor.iterdir()) == files


def test_the_commands(predictor: Path, tmp_path: Path) -> None:
    MCM().fit(toy_embeddings(20)).save(tmp_path / "mcm")
    file = tmp_path / "head.onnx"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "mcm"), "-o", str(file), "--onnx"])
    assert (done.exit_code, done.stdout) == (0, f"{file}\n")
    assert file.stat().st_size > 1_000
    refused = CliRunner().invoke(
        app, ["export", str(tmp_path / "mcm"), "-o", str(tmp_path / "head")]
    )
    assert "ends in .onnx, or --onnx" in str(refused.exception)
    copied = CliRunner().invoke(app, ["push", str(predictor), str(tmp_path / "hub")])
    assert copied.stdout == f"{tmp_path / 'hub'}\n"
    pulled = CliRunner().invoke(app, ["pull", str(tmp_path / "hub"), "-o", str(tmp_path / "here")])
    assert pulled.stdout == f"{tmp_path / 'here'}\n"
