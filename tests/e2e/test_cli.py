"""The real command line on the photos that ship with the package, from images to metrics."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import vilu
from tests.command import command, run, run_process
from vilu.artifacts.hashing import digest
from vilu.registry import METHODS_OF_TABLES

PHOTOS = Path(str(resources.files("vilu").joinpath("assets", "clothing.parquet")))
NAMES = """dress\tdress
hat\that
longsleeve\tsweater
outwear\tcoat
pants\tjeans
shirt\tshirt
shoes\tshoe
shorts\tshorts
skirt\tskirt
t-shirt\tt-shirt
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write stores with 240 training and 160 test photos, and fit a ViLU in a few epochs."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "names.txt").write_text(NAMES)
    for split, limit in (("train", 240), ("test", 160)):
        done = run(
            "embed",
            PHOTOS,
            "-o",
            folder / split,
            "--backbone",
            "compact:64",
            "--classes",
            folder / "names.txt",
            "--split",
            split,
            "--limit",
            limit,
        )
        assert done.stdout.strip() == str(folder / split)
    settings = ("--method", "vilu", "--set", "epochs=10", "--set", "hidden=32,16")
    done = run("fit", folder / "train", "-o", folder / "vilu", *settings)
    assert done.stdout.strip() == str(folder / "vilu")
    return folder


def test_help_names_every_command() -> None:
    text = run_process("--help").stdout
    for name in (
        "demo",
        "embed",
        "inspect",
        "fit",
        "calibrate",
        "score",
        "evaluate",
        "monitor",
        "explain",
        "report",
        "export",
        "push",
        "pull",
        "pools",
        "benchmark",
        "list",
        "convert",
    ):
        assert name in text
        assert "Usage" in run(name, "--help").stdout
    assert "datasets" in text
    assert "check" in run("datasets", "--help").stdout
    assert run_process("--version").stdout.strip() == vilu.__version__


def test_score_and_evaluate_agree_with_scikit_learn(work: Path) -> None:
    for name in ("scores.parquet", "scores.csv"):
        assert run("score", work / "vilu", work / "test", "-o", work / name).stdout.strip() == str(
            work / name
        )
        rows = json.loads(run("evaluate", work / name, "--json", "--resamples", 50).stdout)
        found = {row["metric"]: row for row in rows}
        table = pq.read_table(work / "scores.parquet")
        expected = roc_auc_score(table["failure"].to_numpy(), table["uncertainty"].to_numpy())
        assert found["auroc"]["value"] == pytest.approx(expected, abs=1e-12)
        assert found["auroc"]["n"] == 160
        assert found["auroc"]["n_failures"] == int(np.sum(table["failure"].to_numpy()))
        assert found["auroc"]["ci_low"] < expected < found["auroc"]["ci_high"]
    assert set(table.column_names) >= {
        "row_id",
        "key",
        "pred",
        "pred_name",
        "label_name",
        "uncertainty",
        "failure",
    }
    assert "vilu" in run("evaluate", work / "scores.parquet", "--resamples", 50).stdout


def test_the_command_line_does_what_the_library_does(work: Path) -> None:
    train, test = vilu.EmbeddingStore(work / "train"), vilu.EmbeddingStore(work / "test")
    predictor = vilu.ViLU(epochs=10, hidden=(32, 16)).fit(train)
    run_process("score", work / "vilu", work / "test", "-o", work / "again.parquet")
    scored = vilu.Outcomes.load(work / "again.parquet").uncertainty
    assert np.array_equal(scored, predictor.predict_uncertainty(test))


@pytest.mark.slow
def test_the_card_and_the_onnx_file_of_a_fit(work: Path) -> None:
    import onnxruntime

    card = (work / "vilu" / "README.md").read_text()
    names = [line.split("\t")[1] for line in NAMES.splitlines()]
    for fact in (
        "training rows: `240`",
        "classes: `10`",
        f"in their order: `{digest(names)}`",
        "--backbone compact:64",
    ):
        assert fact in card
    done = run("export", work / "vilu", "-o", work / "head.onnx", "--onnx")
    assert done.stdout.strip() == str(work / "head.onnx")
    run("score", work / "vilu", work / "test", "-o", work / "torch.parquet")
    expected, test = vilu.Outcomes.load(work / "torch.parquet"), vilu.EmbeddingStore(work / "test")
    rows = torch.arange(len(test))
    feed = {"image": test.image_rows(rows).numpy(), "text": test.candidates(rows[:1]).text.numpy()}
    uncertainty, prediction = onnxruntime.InferenceSession((work / "head.onnx").read_bytes()).run(
        None, feed
    )
    assert np.abs(uncertainty - expected.uncertainty).max() <= 1e-5
    assert np.array_equal(prediction, expected.prediction)


@pytest.mark.slow
def test_from_pixels_to_decisions_in_one_onnx_file(work: Path) -> None:
    import onnxruntime

    run("fit", work / "train", "-o", work / "decider", "--method", "vilu_plus", "--set", "epochs=2")
    run("calibrate", work / "decider", work / "test", "--min-coverage", "0.5")
    path = work / "decider.onnx"
    done = run("export", work / "decider", "-o", path, "--with-backbone")
    assert done.stdout.strip() == str(path)
    assert (
        "there is nothing to do"
        in run("export", work / "decider", "-o", path, "--with-backbone").stderr
    )
    other = run("export", work / "decider", "-o", path, code=2)
    assert "of other inputs" in other.stderr
    assert (
        "--with-backbone"
        in run("export", work / "decider", "-o", path, "--models", work, code=2).stderr
    )

    table = pq.read_table(PHOTOS)
    images = [
        image["bytes"] if isinstance(image, dict) else image
        for image in table["image"].to_pylist()[-40:]
    ]
    pixels = [
        (np.array(square(Image.open(io.BytesIO(image)), 64), np.float32) - 127) / 128
        for image in images
    ]
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    asked = ["accept", "prediction", "uncertainty"]
    accept, answer, u = session.run(asked, {"pixels": np.stack(pixels).transpose(0, 3, 1, 2)})
    names = json.loads(session.get_modelmeta().custom_metadata_map["vilu.classes"])
    expected = vilu.Guard(work / "decider")(images)
    assert [names[place] for place in answer] == [one.label for one in expected]
    assert np.abs(u - [one.uncertainty for one in expected]).max() <= 1e-4
    assert accept.tolist() == [one.decision == "accept" for one in expected]
    assert 5 < accept.sum() < 35


def square(image: Image.Image, size: int) -> Image.Image:
    """Return the central square, which is the part that the compact model sees."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)


def test_validation_store_and_zero_shot_methods(work: Path) -> None:
    run(
        "fit",
        work / "train",
        "-o",
        work / "lvu",
        "--method",
        "lvu",
        "--validation",
        work / "test",
        "--set",
        "epochs=2",
    )
    run("fit", work / "train", "-o", work / "plus", "--set", "epochs=2", "--set", "width=16")
    assert vilu.load(work / "plus").name == "vilu_plus"
    run("fit", work / "train", "-o", work / "mcm", "--method", "mcm")
    run("score", work / "mcm", work / "test", "-o", work / "mcm.csv")
    assert "mcm" in run("evaluate", work / "mcm.csv", "--resamples", 20).stdout


def test_a_fit_on_images_without_labels(work: Path) -> None:
    """A folder with unlabelled photos must be enough to fit ``vilu_zero``.

    The fitted predictor must give probabilities, a guarantee and reasons.
    """
    photos = work / "unsorted"
    photos.mkdir()
    table = pq.read_table(PHOTOS)
    for i, image in enumerate(
        table.filter(table["split"].to_numpy() == "train")["image"].to_pylist()[:240]
    ):
        (photos / f"{i}.jpg").write_bytes(image["bytes"] if isinstance(image, dict) else image)
    run(
        "embed",
        photos,
        "-o",
        work / "unsorted-store",
        "--backbone",
        "compact:64",
        "--classes",
        work / "names.txt",
    )
    assert (vilu.EmbeddingStore(work / "unsorted-store").target == -1).all()
    run("fit", work / "unsorted-store", "-o", work / "zero", "--method", "vilu_zero")
    labelled = run("fit", work / "train", "-o", work / "zero-labelled", "--method", "vilu_zero")
    assert "vilu_zero fitted on 240 rows" in labelled.stderr
    run("score", work / "zero", work / "test", "-o", work / "zero.parquet")
    assert "vilu_zero" in run("evaluate", work / "zero.parquet", "--resamples", 20).stdout
    run("calibrate", work / "zero", work / "test", "--max-risk", "0.9")
    assert "log-odds of failure" in run("explain", work / "zero", work / "test").stdout
    done = run("score", work / "zero", work / "unsorted-store", "-o", work / "zero-seen.csv")
    assert "240 of 240 rows were used to fit" in done.stderr
    other = run("export", work / "zero", "-o", work / "zero.onnx", code=2)
    assert "vilu_zero cannot be exported" in other.stderr


def test_scoring_training_rows_warns(work: Path) -> None:
    done = run("score", work / "vilu", work / "train", "-o", work / "seen.csv")
    assert "240 of 240 rows were used to fit" in done.stderr


def test_inspect_shows_and_verifies(work: Path) -> None:
    assert "160" in run("inspect", work / "test", "--deep").stdout
    report = json.loads(run("inspect", work / "test", "--deep", "--json").stdout)
    assert (report["n_in"], report["n_ok"], report["n_error"]) == (160, 160, 0)
    assert report["problems"] == []


def test_columns_for_the_methods_that_need_them(work: Path) -> None:
    """A store must keep every column that the compact model can compute.

    The methods that read several views or prompts must work on this store.
    """
    embed = [
        "embed",
        PHOTOS,
        "--backbone",
        "compact:64",
        "--classes",
        work / "names.txt",
        "--limit",
        24,
    ]
    extra = ["--features", "--views", 2, "--prompts", "ensemble", "--prompts", "{}"]
    more = {"train": ["--negatives"], "test": []}
    for split in ("train", "test"):
        run(*embed, "--split", split, "-o", work / f"{split}-columns", *extra, *more[split])
    store, plain = vilu.EmbeddingStore(work / "test-columns"), vilu.EmbeddingStore(work / "test")
    assert store.columns == {"features", "views", "prompts"}
    rows = torch.arange(24)
    assert torch.equal(store.image_rows(rows), plain.image_rows(rows))
    shapes = {name: tuple(store.column(name, rows).shape) for name in store.columns}
    assert shapes == {
        "features": (24, 1280),
        "views": (24, 2, 768),
        "prompts": (10, 8, 768),
    }
    fitted_on = vilu.EmbeddingStore(work / "train-columns")
    n_words = len(fitted_on.manifest.negatives)
    assert n_words > 2000
    assert fitted_on.column("negatives", rows).shape == (n_words, 768)
    assert torch.allclose(
        store.column("prompts", rows)[:, 0], store.text, atol=1e-6
    )  # the default template is first
    views, images = store.column("views", rows), store.image_rows(rows)
    own, other = ((views * photo[:, None]).sum(dim=2) for photo in (images, images.roll(1, dims=0)))
    assert own.mean() > other.mean() + 0.2  # a view is closer to its own photo than to the next ...
    assert own.max() < 1 - 1e-4  # ... and no view is the photo itself
    for method in ("tta", "prompt_disagreement"):
        run(
            "fit",
            work / "train-columns",
            "-o",
            work / method,
            "--method",
            method,
            "--set",
            "statistic=vote",
        )
        run("score", work / method, work / "test-columns", "-o", work / f"{method}.csv")
        votes = vilu.Outcomes.load(work / f"{method}.csv").uncertainty
        looks = 3 if method == "tta" else 9
        assert set(np.round(votes * looks, 9)) <= set(range(looks))
    assert "2 x 768, prompts 10 x 8 x 768" in run("inspect", work / "test-columns", "--deep").stdout
    done = run("fit", work / "train", "-o", work / "x", "--method", "tta", code=3)
    assert "tta needs the column 'views'. Make it with `vilu embed --views 8`" in done.stderr
    done = run(*embed, "--split", "test", "-o", work / "test-columns", code=6)
    assert "views.n was 2 and is now None" in done.stderr


def test_predictors_fit_on_a_screen_and_in_json() -> None:
    table = run("list", "predictors").stdout
    assert max(map(len, table.splitlines())) <= 120
    rows = {row["name"]: row for row in json.loads(run("list", "predictors", "--json").stdout)}
    assert list(rows) == [*vilu.PREDICTORS, *METHODS_OF_TABLES]
    for name, row in rows.items():
        assert f"\n{name} " in table
        assert row["what it is"] in table
        assert (row["captions"] == "no") == bool(row["why no captions"])
    assert rows["tta"]["needs columns"] == ["views"]
    assert rows["vilu"]["classes"] == "any"
    assert [rows[name]["needs labels"] for name in ("mcm", "vilu", "vilu_zero")] == [
        "no",
        "yes",
        "images",
    ]
    line = next(line for line in table.splitlines() if line.startswith("tta "))
    assert line.split()[:6] == ["tta", "no", "yes", "any", "--views", "8"]


def test_lists() -> None:
    for what, name in (("predictors", "vilu"), ("backbones", "open_clip"), ("datasets", "cifar10")):
        assert name in run("list", what).stdout
        assert any(row["name"] == name for row in json.loads(run("list", what, "--json").stdout))
    assert "vilu datasets list" in run("list", "datasets").stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["fti"], 2, "no such command"),
        (["fit", "{work}/train"], 2, "missing option"),
        (["fit", "{work}/train", "-o", "{work}/x", "--method", "vilo"], 2, "Did you mean 'vilu'"),
        (["fit", "{work}/train", "-o", "{work}/x", "--set", "epoch=3"], 2, "Did you mean 'epochs'"),
        (["fit", "{work}/train", "-o", "{work}/x", "--set", "epochs"], 2, "KEY=VALUE"),
        (
            ["fit", "{work}/train", "-o", "{work}/x", "--validation", "{work}/train"],
            3,
            "240 of 240 validation rows",
        ),
        (
            [
                "fit",
                "{work}/train",
                "-o",
                "{work}/x",
                "--method",
                "mcm",
                "--unlabelled",
                "{work}/test",
            ],
            2,
            "or fit vilu_zero",
        ),
        (["fit", "{work}/nowhere", "-o", "{work}/x"], 2, "nowhere does not exist"),
        (
            ["score", "{work}/nowhere", "{work}/test", "-o", "{work}/x.csv"],
            2,
            "nowhere does not exist",
        ),
        (["score", "{work}/vilu", "{work}/test", "-o", "{work}/x.txt"], 2, "parquet"),
        (["score", "{work}/vilu", "{work}/test", "-o", "{work}/no/where.csv"], 2, "cannot write"),
        (["evaluate", "{work}/nowhere.csv"], 2, "nowhere.csv does not exist"),
        (["embed", "{work}/nowhere", "-o", "{work}/x"], 2, "does not exist"),
        (
            ["embed", "{photos}", "-o", "{work}/x", "--backbone", "compakt"],
            2,
            "Did you mean 'compact'",
        ),
        (["embed", "{photos}", "-o", "{work}/x", "--split", "dev"], 2, "dev"),
        (
            [
                "embed",
                "{photos}",
                "-o",
                "{work}/x",
                "--backbone",
                "open_clip:ViT-B-32/laion2b_s34b_b79k",
            ],
            5,
            "ViT-B-32",
        ),
        (["embed", "{photos}", "-o", "{work}/test", "--backbone", "compact:96"], 6, "compact:64"),
        (["convert", "{work}/nowhere.ckpt", "-o", "{work}/x"], 2, "does not exist"),
    ],
)
def test_errors_say_what_and_how(work: Path, args: list[str], code: int, message: str) -> None:
    done = run(*(arg.format(work=work, photos=PHOTOS) for arg in args), code=code)
    assert message in done.stderr
    assert done.stdout == ""
    assert not (work / "x").exists() or not any((work / "x").glob("manifest.json"))


def test_embeddings_of_another_backbone_are_refused(work: Path) -> None:
    run(
        "embed",
        PHOTOS,
        "-o",
        work / "other",
        "--backbone",
        "compact:96",
        "--split",
        "test",
        "--limit",
        8,
    )
    done = run("score", work / "vilu", work / "other", "-o", work / "x.csv", code=6)
    assert "compact:64" in done.stderr
    assert "compact:96" in done.stderr


def test_bad_images_are_set_aside_and_counted(work: Path) -> None:
    """Bad images must be set aside and counted.

    The folder holds good photos, a truncated photo, a web page and an empty file.
    """
    photos = pq.read_table(PHOTOS, columns=["image"])["image"]
    folder = work / "folder"
    for name in ("dress", "hat"):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        (folder / ("dress", "hat")[i % 2] / f"{i}.webp").write_bytes(photos[i].as_py())
    (folder / "hat" / "cut.webp").write_bytes(photos[7].as_py()[:900])
    (folder / "hat" / "page.jpg").write_text("<html>not found</html>")
    (folder / "dress" / "empty.png").touch()
    done = run("embed", folder, "-o", work / "bad", "--backbone", "compact:64", code=3)
    assert "--max-error-rate" in done.stderr
    done = run(
        "embed", folder, "-o", work / "bad", "--backbone", "compact:64", "--max-error-rate", 0.5
    )
    report = json.loads(run("inspect", work / "bad", "--json").stdout)
    assert (report["n_in"], report["n_ok"], report["n_error"]) == (9, 6, 3)
    errors = pq.read_table(work / "bad" / "errors" / "errors_00000.parquet").to_pylist()
    assert {Path(row["key"]).name for row in errors} == {"cut.webp", "page.jpg", "empty.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_interrupted_and_resumed(
    work: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """After Ctrl-C or SIGTERM, the exit code must be clean, and a second run must complete the
    store.

    The completed store must have the same bytes as a store from one run.
    """
    args = [
        "embed",
        PHOTOS,
        "-o",
        tmp_path / "s",
        "--backbone",
        "compact:64",
        "--classes",
        work / "names.txt",
    ]
    args += ["--split", "test", "--limit", 160, "--part-size", 32]
    started = subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "s").glob("receipts/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(started.pid, number)
    _, stderr = started.communicate(timeout=60)
    if started.returncode != 0:  # otherwise the command was done before the signal came
        assert started.returncode == code, stderr
        assert "Traceback" not in stderr
        assert "vilu: stopped: finished parts are in" in stderr
        assert "the same command goes on with the rest" in stderr
    run(*args)
    undisturbed, resumed = vilu.EmbeddingStore(work / "test"), vilu.EmbeddingStore(tmp_path / "s")
    assert list(resumed.ids) == list(undisturbed.ids)
    assert json.loads(run("inspect", tmp_path / "s", "--deep", "--json").stdout)["problems"] == []
