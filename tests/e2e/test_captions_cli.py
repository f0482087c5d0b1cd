"""Image-caption pairs through the real command line, from tars with photos and captions to
metrics.
"""

from __future__ import annotations

import io
import json
import tarfile
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import vilu
from tests.command import run

PHOTOS = Path(str(resources.files("vilu").joinpath("assets", "clothing.parquet")))
N = 96


def write_tar(path: Path, samples: list[tuple[str, bytes, bytes | None]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, image, caption in samples:
            for suffix, content in (("jpg", image), ("txt", caption)):
                if content is not None:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embed three tars, each with 32 photos and captions.

    One photo lacks its caption, and one caption is no UTF-8.
    """
    folder = tmp_path_factory.mktemp("captions")
    table = pq.read_table(PHOTOS, columns=["image"]).slice(0, N)
    samples = [
        (f"{i:05d}", image.as_py(), f"a photo of garment {i}".encode())
        for i, image in enumerate(table["image"])
    ]
    samples[3] = (*samples[3][:2], None)
    samples[40] = (*samples[40][:2], b"caf\xe9")
    for shard in range(3):
        write_tar(folder / f"{shard:03d}.tar", samples[32 * shard : 32 * (shard + 1)])
    done = run(
        "embed",
        folder / "{000..002}.tar",
        "-o",
        folder / "emb",
        "--backbone",
        "compact:64",
        "--part-size",
        1,
        "--max-error-rate",
        0.05,
    )
    assert done.stdout.strip() == str(folder / "emb")
    return folder


def test_what_is_wrong_with_a_sample_is_counted_and_nothing_else_is_lost(work: Path) -> None:
    report = json.loads(run("inspect", work / "emb", "--deep", "--json").stdout)
    assert (report["n_in"], report["n_ok"], report["problems"]) == (N, N - 2, [])
    assert report["errors"] == {"missing_caption": 1, "bad_text": 1}
    text = np.concatenate([np.load(path) for path in sorted((work / "emb/text_emb").glob("*.npy"))])
    captions = [
        c
        for path in sorted((work / "emb/metadata").glob("*"))
        for c in pq.read_table(path)["caption"].to_pylist()
    ]
    backbone = vilu.load_backbone("compact:64", device="cpu")
    # The store holds float16, whose spacing below 1 is at most 2^-11.
    assert np.abs(backbone.encode_texts(captions).numpy() - text).max() < 2**-11


def test_fit_score_evaluate_and_pools(work: Path) -> None:
    options = ("--pool-size", 16)
    run("fit", work / "emb", "-o", work / "plus", *options)
    run(
        "fit",
        work / "emb",
        "-o",
        work / "head",
        *options,
        "--method",
        "vilu",
        "--set",
        "epochs=2",
        "--set",
        "hidden=8",
    )
    assert not (work / "head.checkpoints").exists()
    run("score", work / "plus", work / "emb", "-o", work / "scores.parquet", *options)
    done = run("score", work / "plus", work / "emb", "-o", work / "scores", *options)
    assert "rows were used to fit" in done.stderr
    file, folder = (
        {
            row["metric"]: row
            for row in json.loads(run("evaluate", work / name, "--json", "--resamples", 20).stdout)
        }
        for name in ("scores.parquet", "scores")
    )
    assert file["auroc"]["n"] == 80  # five full pools from the 94 pairs
    assert file["auroc"]["n_unusable"] == 14
    assert {name: row["value"] for name, row in file.items()} == {
        name: row["value"] for name, row in folder.items()
    }
    explained = run("explain", work / "plus", work / "emb", "-n", 1, *options)
    assert "1 row explained\n" in explained.stderr  # the message does not name --summary
    rows = json.loads(
        run(
            "pools",
            work / "emb",
            "mcm",
            work / "head",
            "--sizes",
            "8,32,128",
            "--resamples",
            0,
            "--json",
        ).stdout
    )
    assert {(row["method"], row["dataset"]) for row in rows} == {
        (method, f"emb, pool {size}") for method in ("mcm", "head") for size in (8, 32)
    }
    assert (
        "VLM accuracy"
        in run("pools", work / "emb", "mcm", "--sizes", "8", "--direction", "text_to_image").stdout
    )


def test_a_second_run_of_everything_changes_nothing(work: Path) -> None:
    before = {path: path.read_bytes() for path in (work / "emb").rglob("*") if path.is_file()}
    run(
        "embed",
        work / "{000..002}.tar",
        "-o",
        work / "emb",
        "--backbone",
        "compact:64",
        "--part-size",
        1,
        "--max-error-rate",
        0.05,
    )
    assert {
        path: path.read_bytes() for path in (work / "emb").rglob("*") if path.is_file()
    } == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pools", "emb", "linear_probe"), 2, "linear_probe must be fitted first"),
        (
            ("pools", "emb", "a/head", "b/head"),
            2,
            "folders must differ in their last names. Got a/head, b/head",
        ),
        (("pools", "emb", "mcm", "--sizes", "0,x"), 2, "must be whole numbers from 2"),
        (("pools", "emb", "mcm", "--sizes", "512"), 3, "no pool can be filled: emb has 94 pairs"),
        (
            ("fit", "emb", "-o", "p", "--method", "knn_vote", "--pool-size", "8"),
            2,
            "does not work on image-caption pairs",
        ),
        (("fit", "emb", "-o", "p", "--pool-size", "4096"), 3, "94"),
        (("fit", "emb", "emb", "-o", "p"), 2, "as captions with --pseudo"),
        (("fit", "emb", "-o", "p", "--pool-size", "8", "--shots", "2"), 2, "have no classes"),
        (("fit", "emb", "-o", "p", "--logit-scale", "100"), 2, "has the logit scale of its model"),
        (
            ("fit", "emb", "-o", "p", "--pool-size", "8", "--init", "emb"),
            2,
            "where a predictor should be",
        ),
        (("embed", "{000..005}.tar", "-o", "other", "--backbone", "compact:64"), 2, "003.tar"),
        (
            (
                "embed",
                "{000..002}.tar",
                "-o",
                "other",
                "--backbone",
                "compact:64",
                "--template",
                "a {}",
            ),
            2,
            "caption",
        ),
        (("embed", "pipe:cat x.tar", "-o", "other", "--backbone", "compact:64"), 2, "pipe"),
    ],
)
def test_errors_say_what_and_how(
    work: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = run(*arguments, code=code, cwd=work)
    assert message in done.stderr
    assert not (work / "p").exists()
    assert not (work / "other").exists()
