"""The artefacts of the flow: pictures, stores, calibrated predictors, scores, monitors, a study; see ``write.py``."""

from __future__ import annotations

import csv
import io
import shutil
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import vilu
from tests.compat.bed import Arrays, evaluated, of_folder, of_outcomes, of_source, run, tree, unpack, watch
from tests.compat.tiny import NAMES, Tiny, picture
from tests.compat.write import HEAD, pack, save_arrays, save_document

LABELLED = {"templates": ["a {}.", "the {}."], "features": True, "views": 2, "prompts": ["a {}.", "the {}."], "seed": 3}
SHARED = {"batch_size": 8, "workers": 1}


def write_pictures(root: Path) -> None:
    """A folder of classes in three parts, a flat one, a table with captions, and two tars with captions."""
    for part, n, first in (("train", 48, 0), ("val", 48, 100), ("test", 32, 200)):
        for number in range(n):
            name = NAMES[number % len(NAMES)]
            save_picture(root / "classes" / part / name / f"{first + number}.png", f"a {name}", first + number)
    (root / "classes/test/cup/broken.png").write_bytes(b"no picture")
    (root / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    lines = [(f"captioned/{n}.png", f"{NAMES[n % 4]} number {n}") for n in range(44)]
    for path, caption in lines:
        save_picture(root / path, caption, int(Path(path).stem) + 300)
    with (root / "captions.csv").open("w", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows([("path", "caption"), *lines])
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in range(12 * shard, 12 * shard + 12):
                caption = f"{NAMES[number % 4]} in tar {number}"
                content = io.BytesIO()
                picture(caption, number + 500, 60).save(content, "PNG")
                for suffix, blob in (("png", content.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    info.size = len(blob)
                    tar.addfile(info, io.BytesIO(blob))


def save_picture(path: Path, text: str, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(text, number, 90 if number % 2 else 25).save(path)


def write_stores() -> None:
    """A store of each kind, one that was interrupted, shards in LAION's form, and everything that each holds."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root / "pictures")
        pack("pictures", root / "pictures")
        stores, of = root / "stores", root / "pictures"
        for part in ("train", "val", "test"):
            images = vilu.open_dataset(of / "classes", split=part)
            more = {"max_error_rate": 0.1, "part_size": 16, "split": part, **LABELLED, **SHARED}
            vilu.embed(images, Tiny(), stores / part, names=NAMES, **more)
            if part == "train":
                with suppress(KeyboardInterrupt):  # the model gives up in the second of three parts
                    vilu.embed(images, Tiny(fails_after=70), stores / "interrupted", names=NAMES, **more)
        flat = vilu.open_dataset(of / "captioned", classes=of / "names.txt", limit=10)
        vilu.embed(flat, Tiny(), stores / "unlabelled", names=NAMES, dtype="float32", **SHARED)
        captions = vilu.open_dataset(of / "captions.csv")
        vilu.embed(captions, Tiny(), stores / "captions", features=True, part_size=16, **SHARED)
        tars = vilu.open_dataset(f"{of}/{{0..1}}.tar")
        vilu.embed(tars, Tiny(), stores / "tars", part_size=1, **SHARED)
        write_laion(stores / "laion", vilu.open_source(stores / "captions", pools=vilu.Pools(8)))
        assert sum("receipts" in path for path in tree(stores / "interrupted")) == 1
        pack("stores", stores)
        save_arrays("stores", expected_of_stores(stores))


def write_laion(root: Path, source: vilu.EmbeddingSource) -> None:
    """The same captions as another tool publishes them, in two shards."""
    found = of_source(source)
    texts = [f"{NAMES[n % 4]} number {n}" for n in range(len(source))]
    for number, rows in enumerate((slice(0, 20), slice(20, 44))):
        for name, array in (("images/img_emb", found["image"]), ("texts/text_emb", found["text"])):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(root / f"{name}_{number}.npy", array[rows].astype("<f2"))
        (root / "metadata").mkdir(exist_ok=True)
        pq.write_table(pa.table({"caption": texts[rows]}), root / f"metadata/metadata_{number}.parquet")


OPENED: dict[str, dict[str, object]] = {
    "train": {},
    "val": {},
    "test": {},
    "unlabelled": {},
    "captions": {"pools": vilu.Pools(8)},
    "tars": {"pools": vilu.Pools(4, seed=None)},
    "laion": {"pools": vilu.Pools(8, seed=1), "logit_scale": 12.0},
}


def expected_of_stores(stores: Path) -> Arrays:
    made = {name: of_source(vilu.open_source(stores / name, **how)) for name, how in OPENED.items()}
    fold = vilu.open_source(stores / "captions", pools=vilu.Pools(4, seed=2), fold="train")
    made["captions of a fold"] = of_source(fold)
    turned = vilu.open_source(stores / "laion", pools=vilu.Pools(8, direction="text_to_image"), logit_scale=12.0)
    made["laion turned"] = of_source(turned)
    found = {f"{name}/{key}": value for name, of in made.items() for key, value in of.items()}
    for name in OPENED:
        if name != "laion":
            found[f"{name}/inspect"] = np.array(run("inspect", stores / name, "--json").replace(str(stores), "STORES"))
    return found


RULES: dict[str, tuple[str, list[str]]] = {
    "ltt": ("mcm", ["--max-risk", "0.22", "--confidence", "0.7"]),
    "sgr": ("entropy", ["--max-risk", "0.32", "--confidence", "0.6", "--method", "sgr"]),
    "crc": ("mcm", ["--max-risk", "0.2", "--method", "crc"]),
    "selection": ("mcm", ["--max-risk", "0.25", "--method", "selection"]),
    "coverage": ("vilu", ["--min-coverage", "0.7"]),
    "per_class": ("mcm", ["--max-risk", "0.6", "--confidence", "0.5", "--per-class"]),
    "lac": ("vilu_plus", ["--max-risk", "0.28", "--confidence", "0.5", "--label-sets", "lac", "--max-miss", "0.2"]),
    "aps": ("mcm", ["--label-sets", "aps", "--max-miss", "0.2"]),
    "probabilities": ("doctor", []),
}
"""Method, and what ``vilu calibrate`` is asked for."""

PAIRS = ["--pool-size", "4"]


def write_scores() -> None:
    """Calibrated predictors, their scores as file and as folder, and everything that these hold."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores, rules, scores = unpack("stores", root), root / "rules", root / "scores"
        scores.mkdir()
        expected: Arrays = {}
        quick = {"vilu": HEAD, "vilu_plus": {"width": 8, "epochs": 3}}
        for label, (name, options) in RULES.items():
            vilu.PREDICTORS[name](**quick.get(name, {})).fit(vilu.EmbeddingStore(stores / "train")).save(rules / label)
            run("calibrate", rules / label, stores / "val", *options)
            suffix = "csv" if label in {"crc", "lac"} else "parquet"
            run("score", rules / label, stores / "test", "-o", scores / f"{label}.{suffix}")
        vilu.MCM().fit(vilu.open_source(stores / "captions", pools=vilu.Pools(4))).save(rules / "pairs")
        run("calibrate", rules / "pairs", stores / "captions", *PAIRS, "--max-risk", "0.16", "--confidence", "0.5")
        run("score", rules / "pairs", stores / "tars", "-o", scores / "pairs.parquet", *PAIRS)
        run("score", rules / "lac", stores / "test", "-o", scores / "folder")
        many = vilu.open_source(stores / "captions", pools=vilu.Pools(5))
        vilu.score_parts(vilu.load(rules / "pairs"), many, scores / "parts", rows_per_part=10, dataset="captions")
        interrupt(scores / "parts", scores / "interrupted")
        for path in sorted(scores.glob("*.*")):
            expected |= {f"{path.name}/{key}": value for key, value in of_outcomes(vilu.Outcomes.load(path)).items()}
        for name in ("folder", "parts"):
            expected |= {f"{name}/{key}": value for key, value in of_folder(vilu.ScoreFolder(scores / name)).items()}
        pack("rules", rules)
        pack("scores", scores)
        save_arrays("scores", expected)
        save_document("evaluated", evaluated(scores))


def interrupt(whole: Path, left: Path) -> None:
    """What a kill after two parts leaves of a folder of scores: the files of the third, and no receipt for them."""
    shutil.copytree(whole, left)
    for name in ("manifest.json", *(f"receipts/0000{part}.json" for part in (2, 3, 4))):
        (left / name).unlink()
    for path in (*left.glob("*/*_00003.parquet"), *left.glob("*/*_00004.parquet")):
        path.unlink()


def write_monitors() -> None:
    """States of monitors that have seen a few rows like the calibration rows, and many that are not."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rules, scores, states = unpack("rules", root), unpack("scores", root), root / "states"
        states.mkdir()
        rng = np.random.default_rng(3)
        found = vilu.Outcomes.load(scores / "ltt.parquet")
        for name, n, shift in (("calm", 40, 0.0), ("shifted", 400, 1.0), ("next", 60, 0.0)):
            rows = rng.choice(np.flatnonzero(np.isfinite(found.uncertainty)), n)
            more = {"method": found.method, "class_names": found.class_names, "provenance": found.provenance}
            more |= {"failure": np.full(n, -1), "prediction": found.prediction[rows]}
            vilu.Outcomes(found.uncertainty[rows] + shift * rng.random(n), **more).save(states / f"{name}.parquet")
        expected = {}
        for name in ("calm", "shifted"):
            expected[name] = watch(rules / "ltt", states / f"{name}-state.parquet", states / f"{name}.parquet")
        with tempfile.TemporaryDirectory() as other:
            for name in ("calm", "shifted"):
                state = Path(other) / "state.parquet"
                shutil.copy(states / f"{name}-state.parquet", state)
                expected[f"{name}, then next"] = watch(rules / "ltt", state, states / "next.parquet")
        assert [expected[name]["code"] for name in ("calm", "shifted")] == [0, 8]
        pack("monitors", states)
        save_document("monitors", expected)


STUDY = """
seeds = 2
resamples = 40
[data.one]
stores = { train = "train", test = "val" }
title = "Pictures"
[data.two]
stores = { train = "val", test = "test" }
[settings.all]
kind = "labels"
x = 12
[settings.few]
kind = "labels"
budget = 6
x = 6
[methods.mcm]
[methods.knn_distance]
deterministic = true
[methods.lvu.params]
epochs = 2
hidden = [8]
[methods.linear_probe]
data = ["one"]
[study]
title = "A miniature"
reproduces = "nothing"
protocol = "Small, and kept."
[[views]]
kind = "table"
name = "main"
title = "Everything"
rows = ["data", "setting"]
columns = ["method", "metric"]
metrics = ["auroc", "fpr95"]
mean = ["one", "two"]
[[views]]
kind = "curve"
x_label = "labels a class"
name = "budget"
title = "Against labels"
settings = ["few", "all"]
methods = ["mcm", "lvu"]
data = ["one"]
[[views]]
kind = "ranking"
name = "ranking"
title = "Best first"
[[claims]]
kind = "better"
says = "The probe is better than MCM"
source = "nobody"
better = { method = "linear_probe", setting = "all" }
than = { method = "mcm", setting = "all" }
data = ["one"]
"""


def write_study() -> None:
    """The cells of a miniature study and everything that was rendered from them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores = unpack("stores", root)
        (root / "small.toml").write_text(STUDY)
        run("benchmark", root / "small.toml", "--data", stores, "-o", root / "run")
        intro = ["--title", "Kept", "--intro", "Rendered from kept cells."]
        shown = run("render", root / "run", "--document", root / "run" / "docs" / "kept.md", *intro)
        (root / "run" / "shown.txt").write_text(shown)
        shutil.rmtree(root / "run" / "stores", ignore_errors=True)
        pack("study", root / "run")


KINDS = {"stores": write_stores, "scores": write_scores, "monitors": write_monitors, "study": write_study}

if __name__ == "__main__":
    for kind in sys.argv[1:]:
        KINDS[kind]()
