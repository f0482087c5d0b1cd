"""The artefacts of the flow: pictures, stores, calibrated predictors, scores, monitors, a study;
see ``write.py``.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
import tarfile
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import vilu
from tests.compat.bed import Arrays, tree, unpack
from tests.compat.flow import (
    EXPORTED,
    PAIRS,
    RULES,
    STORES,
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
from tests.compat.tiny import NAMES, Tiny, embed_captions, embed_classes, embed_tars, picture
from tests.compat.write import HEAD, pack, save, save_arrays, save_document


def write_pictures(root: Path) -> None:
    """A folder of classes in three parts, a flat one, a table with captions,
    and two tars with captions.
    """
    for part, n, first in (("train", 48, 0), ("val", 48, 100), ("test", 32, 200)):
        for number in range(n):
            name = NAMES[number % len(NAMES)]
            save_picture(
                root / "classes" / part / name / f"{first + number}.png",
                f"a {name}",
                first + number,
            )
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
    """A store of each kind, one that was interrupted, shards in LAION's form,
    and everything that each holds.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root / "drawn")
        pack("pictures", root / "drawn")
        stores, of = root / "stores", unpack("pictures", root)
        for part in ("train", "val", "test"):
            embed_classes(of, part, stores / part, Tiny())
            if part == "train":
                with suppress(KeyboardInterrupt):  # the model gives up in the second of three parts
                    embed_classes(of, part, stores / "interrupted", Tiny(fails_after=70))
        flat = vilu.open_dataset(of / "captioned", classes=of / "names.txt", limit=10)
        vilu.embed(
            flat,
            Tiny(),
            stores / "unlabelled",
            names=NAMES,
            dtype="float32",
            batch_size=8,
            workers=1,
        )
        embed_captions(of, stores / "captions", Tiny())
        embed_tars(of, stores / "tars", Tiny())
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
        pq.write_table(
            pa.table({"caption": texts[rows]}), root / f"metadata/metadata_{number}.parquet"
        )


def expected_of_stores(stores: Path) -> Arrays:
    made = {name: of_source(source) for name, source in sources(stores).items()}
    found = {f"{name}/{key}": value for name, of in made.items() for key, value in of.items()}
    return found | {f"{name}/inspect": np.array(inspected(stores, name)) for name in STORES}


def write_scores() -> None:
    """Calibrated predictors, their scores as file and as folder, and everything that these hold."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores, rules, scores = unpack("stores", root), root / "rules", root / "scores"
        scores.mkdir()
        expected: Arrays = {}
        quick = {"vilu": HEAD, "vilu_plus": {"width": 8, "epochs": 3}}
        for label, (name, options) in RULES.items():
            vilu.PREDICTORS[name](**quick.get(name, {})).fit(
                vilu.EmbeddingStore(stores / "train")
            ).save(rules / label)
            run("calibrate", rules / label, stores / "val", *options)
            suffix = "csv" if label in {"crc", "lac"} else "parquet"
            run("score", rules / label, stores / "test", "-o", scores / f"{label}.{suffix}")
        vilu.MCM().fit(vilu.open_source(stores / "captions", pools=vilu.Pools(4))).save(
            rules / "pairs"
        )
        run(
            "calibrate",
            rules / "pairs",
            stores / "captions",
            *PAIRS,
            "--max-risk",
            "0.16",
            "--confidence",
            "0.5",
        )
        run("score", rules / "pairs", stores / "tars", "-o", scores / "pairs.parquet", *PAIRS)
        run("score", rules / "lac", stores / "test", "-o", scores / "folder")
        score_in_parts(rules, stores, scores / "parts")
        interrupt(scores / "parts", scores / "interrupted")
        for path in sorted(scores.glob("*.*")):
            expected |= {
                f"{path.name}/{key}": value
                for key, value in of_outcomes(vilu.Outcomes.load(path)).items()
            }
        for name in ("folder", "parts"):
            expected |= {
                f"{name}/{key}": value
                for key, value in of_folder(vilu.ScoreFolder(scores / name)).items()
            }
        pack("rules", rules)
        pack("scores", scores)
        save_arrays("scores", expected)
        save_document("evaluated", evaluated(scores))


def interrupt(whole: Path, left: Path) -> None:
    """What a kill after two parts leaves of a folder of scores:
    the files of the third, and no receipt for them.
    """
    shutil.copytree(whole, left)
    for name in ("manifest.json", *(f"receipts/0000{part}.json" for part in (2, 3, 4))):
        (left / name).unlink()
    for path in (*left.glob("*/*_00003.parquet"), *left.glob("*/*_00004.parquet")):
        path.unlink()


def write_monitors() -> None:
    """States of monitors that have seen a few rows like the calibration rows,
    and many that are not.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rules, scores, states = unpack("rules", root), unpack("scores", root), root / "states"
        states.mkdir()
        rng = np.random.default_rng(3)
        found = vilu.Outcomes.load(scores / "ltt.parquet")
        for name, n, shift in (("calm", 40, 0.0), ("shifted", 400, 1.0), ("next", 60, 0.0)):
            rows = rng.choice(np.flatnonzero(np.isfinite(found.uncertainty)), n)
            more = {
                "method": found.method,
                "class_names": found.class_names,
                "provenance": found.provenance,
            }
            more |= {"failure": np.full(n, -1), "prediction": found.prediction[rows]}
            vilu.Outcomes(found.uncertainty[rows] + shift * rng.random(n), **more).save(
                states / f"{name}.parquet"
            )
        expected = {}
        for name in ("calm", "shifted"):
            expected[name] = watch(
                rules / "ltt", states / f"{name}-state.parquet", states / f"{name}.parquet"
            )
        with tempfile.TemporaryDirectory() as other:
            for name in ("calm", "shifted"):
                state = Path(other) / "state.parquet"
                shutil.copy(states / f"{name}-state.parquet", state)
                expected[f"{name}, then next"] = watch(
                    rules / "ltt", state, states / "next.parquet"
                )
        assert [expected[name]["code"] for name in ("calm", "shifted")] == [0, 8]
        pack("monitors", states)
        save_document("monitors", expected)


def write_study(name: str) -> None:
    """The cells of a miniature study and everything that was rendered from them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores = unpack("stores", root)
        shutil.copy(Path(__file__).parent / f"{name}.toml", root / "small.toml")
        run("benchmark", root / "small.toml", "--data", stores, "-o", root / "run")
        (root / "run" / "shown.txt").write_text(rendered(root / "run"))
        shutil.rmtree(root / "run" / "stores", ignore_errors=True)
        for drawn in (root / "run").rglob("*.png"):
            drawn.unlink()  # the SVG beside it says the same
        pack(name, root / "run")


def write_explanations() -> None:
    """Explanations, and a predictor for another runtime."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores, rules, predictors = (
            unpack(name, root) for name in ("stores", "rules", "predictors")
        )
        save_document("explained", explained(rules, stores))
        run("export", predictors / EXPORTED, "-o", root / "exported.onnx")
        save("exported.onnx", (root / "exported.onnx").read_bytes())


KINDS = {
    "explanations": write_explanations,
    "stores": write_stores,
    "scores": write_scores,
    "monitors": write_monitors,
    "study": partial(write_study, "study"),
    "views": partial(write_study, "views"),
}

if __name__ == "__main__":
    for kind in sys.argv[1:]:
        KINDS[kind]()
