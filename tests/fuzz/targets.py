"""The readers that take bytes from outside, each with valid files.

A case passes if the reader returns or raises a ``ViLUError``. Any other error is a bug. Readers are
called as the commands call them. If a hash protects a reader, the hash is corrected first, so that
the case reaches the parser.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import vilu
from tests.builders import array_files, image_files, page_data, tar_files
from tests.builders.bench_fakes import make_store, tables
from tests.command import run
from tests.conftest import toy_embeddings
from vilu.artifacts.hashing import digest
from vilu.calibration.calibration import Calibration
from vilu.calibration.monitor.monitor import Monitor
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.datasets.catalog import open_dataset
from vilu.datasets.classes import read_classes
from vilu.datasets.images import BadImage, ImageLimits, decode_caption, decode_image, read_image
from vilu.embeddings.pairs import Pools
from vilu.errors import ViLUError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.convert import convert_official
from vilu.predictors.persistence.storage import load_predictor
from vilu.report.page.build import report_page
from vilu.store.importing import import_arrays
from vilu.store.reader import open_source
from vilu_bench.known_datasets.cifar import read_pickle
from vilu_bench.studies.load import load_config

LIMITS = ImageLimits(max_pixels=1_000_000)


@dataclass(frozen=True)
class Fuzzed:
    """A reader, valid files for it, and its share of the cases in a full run.

    A slow reader gets fewer cases.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path, bytes], object]
    share: float = 1.0

    def case(self, folder: Path, data: bytes) -> ViLUError | None:
        """Run one case and return the reader's error, if any."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.read(folder, data)
            except ViLUError as error:
                if not str(error):
                    raise RuntimeError("an error without words") from error
                return error
        return None


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@cache
def kept() -> Path:
    """Make valid artefacts once, and return their folder.

    The artefacts are a store, predictors, scores, a monitor's state and checkpoints.
    """
    root = Path(mkdtemp(prefix="vilu-fuzz-"))
    store = make_store(root / "store", 60, 0)
    data = open_source(store)
    vilu.LVU(epochs=1, hidden=(4,)).fit(toy_embeddings(400)).save(root / "head")
    vilu.MCM().fit(data).save(root / "predictor")
    calibrate_predictor(root / "predictor", data, Target(max_risk=0.9, confidence=0.5))
    scores = vilu.score(load_predictor(root / "predictor"), data)
    scores.save(root / "scores.parquet")
    scores.save(root / "scores.csv")
    monitor = Monitor.of_folder(root / "predictor")
    monitor.update(page_data.outcomes_of(20, method=scores.method, class_names=scores.class_names))
    monitor.save(root / "state.parquet")
    return root


def content(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [(kept() / name).read_bytes() for name in names]


def unsealed(*names: str) -> Callable[[], list[bytes]]:
    """Return documents without digests, because a digest would stop every change before the
    parser.
    """

    def plain() -> list[bytes]:
        found = [json.loads((kept() / name).read_bytes()) for name in names]
        return [
            json.dumps({key: value for key, value in one.items() if key != "digest"}).encode()
            for one in found
        ]

    return plain


def sealed(data: bytes, seal: str = "digest") -> bytes:
    """Return the document with a matching digest, or unchanged if it is no object."""
    try:
        content = json.loads(data)
        content = {key: value for key, value in content.items() if key not in {"digest", seal}}
        return json.dumps({**content, seal: digest(content)}, allow_nan=True).encode()
    except (ValueError, AttributeError, RecursionError):
        return data


def in_copy(part: str, name: str, use: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """Return a reader for a copied artefact in which one file is replaced."""

    def read(folder: Path, data: bytes) -> object:
        shutil.copytree(kept() / part, folder / part)
        put(folder / part / name, sealed(data))
        return use(folder / part)

    return read


def read_store(path: Path) -> object:
    data = open_source(path)
    return [data.ids[0], vilu.score(vilu.MCM().fit(data), data)]


def image(_folder: Path, data: bytes) -> object:
    try:
        return decode_image(data, LIMITS)
    except BadImage as error:
        return error.kind


def caption(_folder: Path, data: bytes) -> object:
    return decode_caption(data)


def npy_seeds() -> list[bytes]:
    rows = np.random.default_rng(0).normal(size=(8, 4))
    made = [rows.astype(kind) for kind in ("<f2", "<f4", "<f8", ">f4")] + [
        np.asfortranarray(rows),
        rows[:0],
        rows[0],
    ]
    return [_npy(array) for array in (*made, np.arange(6))]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy(folder: Path, data: bytes) -> object:
    put(folder / "img_emb" / "img_emb_0000.npy", data)
    put(
        folder / "text_emb" / "text_emb_0000.npy",
        _npy(np.random.default_rng(1).normal(size=(8, 4)).astype("<f4")),
    )
    pairs = open_source(folder, pools=Pools(2), logit_scale=100.0)
    return list(pairs.batches(8))


def npz_seeds() -> list[bytes]:
    """Return archives that are packed or not, with several types and with names as labels."""
    made = []
    for packed, changes in (
        (False, {}),
        (True, {"image": np.eye(6, dtype=">f8")[[0, 1, 2] * 2], "ids": None}),
        (
            True,
            {
                "target": np.array(["cat", "", "dog"] * 2),
                "negatives": np.eye(6),
                "views": np.ones((6, 2, 6)),
            },
        ),
    ):
        buffer = io.BytesIO()
        (np.savez_compressed if packed else np.savez)(buffer, **array_files.arrays(6, **changes))
        made.append(buffer.getvalue())
    return made


def npz(folder: Path, data: bytes) -> object:
    """Import the archive as a command does, and read the store."""
    return read_store(
        import_arrays(put(folder / "a.npz", data), folder / "store", max_error_rate=1.0).path
    )


def arrays_folder(name: str) -> Fuzzed:
    """Return a target for a folder with arrays in which one array is replaced."""

    def seeds() -> list[bytes]:
        return [_npy(array_files.arrays(6, seed=seed)[name]) for seed in range(2)]

    def read(folder: Path, data: bytes) -> object:
        source = array_files.save(folder / "arrays", array_files.arrays(6))
        put(source / f"{name}.npy", data)
        return read_store(
            import_arrays(source, folder / "store", part_size=4, max_error_rate=1.0).path
        )

    return Fuzzed(seeds, read, 0.5)


def stored_npy(folder: Path, data: bytes) -> object:
    """Replace an array in a store, correct its hashes in receipt and manifest, and read the
    store.
    """
    store = folder / "store"
    shutil.copytree(kept() / "store", store)
    put(store / "img_emb" / "img_emb_00000.npy", data)
    reseal(store)
    return read_store(store)


def reseal(store: Path) -> None:
    """Make receipts and manifest agree with the files."""
    hashes = []
    for path in sorted((store / "receipts").iterdir()):
        receipt = json.loads(path.read_bytes())
        for name, info in receipt["files"].items():
            raw = (store / name).read_bytes()
            info |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            hashes.append(info["sha256"])
        put(path, sealed(json.dumps(receipt).encode()))
    manifest = json.loads((store / "manifest.json").read_bytes()) | {"content": digest(hashes)}
    put(store / "manifest.json", sealed(json.dumps(manifest).encode()))


def safetensors(folder: Path, data: bytes) -> object:
    shutil.copytree(kept() / "head", folder / "head")
    put(folder / "head" / "weights.safetensors", data)
    path = folder / "head" / "predictor.json"
    said = json.loads(path.read_bytes()) | {"weights_sha256": hashlib.sha256(data).hexdigest()}
    said = {key: value for key, value in said.items() if key not in {"digest", "fingerprint"}}
    put(path, json.dumps({**said, "fingerprint": digest(said)}).encode())
    return load_predictor(folder / "head").predict_uncertainty(toy_embeddings(4))


def predictor(folder: Path, data: bytes) -> object:
    """Read ``predictor.json`` with a matching fingerprint, if the content is an object."""
    shutil.copytree(kept() / "head", folder / "head")
    put(folder / "head" / "predictor.json", sealed(data, "fingerprint"))
    return load_predictor(folder / "head").predict_uncertainty(toy_embeddings(4))


def parquet_seeds() -> list[bytes]:
    pictures = [image_files.encode(image_files.picture(), "PNG")] * 3
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pictures, "label": ["a", "b", "a"]}), buffer)
    return [buffer.getvalue(), (kept() / "scores.parquet").read_bytes()]


def listed(name: str) -> Callable[[Path, bytes], object]:
    """Return a reader that opens the file as an image data set and reads every image."""

    def read(folder: Path, data: bytes) -> object:
        put(folder / "a.png", image_files.encode(image_files.picture(), "PNG"))
        dataset = open_dataset(put(folder / name, data))
        found: list[object] = []
        for one in dataset.records(0, len(dataset)):
            try:
                found.append(read_image(one, LIMITS))
            except BadImage as error:
                found.append(error.kind)
        return found

    return read


def scores(name: str) -> Callable[[Path, bytes], object]:
    return lambda folder, data: vilu.evaluate(
        Outcomes.load(put(folder / name, data)), n_resamples=0
    )


def tar_seeds() -> list[bytes]:
    pictures = {
        f"{key}.png": image_files.encode(image_files.picture(seed=seed), "PNG")
        for seed, key in enumerate("ab")
    }
    made = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, raw in {
                **pictures,
                "b" * 120 * (form != tarfile.USTAR_FORMAT) + "c.txt": b"a cup",
            }.items():
                header = tarfile.TarInfo(name)
                header.size = len(raw)
                tar.addfile(header, io.BytesIO(raw))
        made.append(buffer.getvalue())
    return [*made, tar_files.tar_bytes(*tar_files.pair("x"), *tar_files.pair("y"))]


def tar(folder: Path, data: bytes) -> object:
    return tar_files.outcomes(open_dataset(put(folder / "0.tar", data)))


def checkpoint_seeds() -> list[bytes]:
    made = []
    for old in (False, True):
        buffer = io.BytesIO()
        shapes = {
            "mlp.0.weight": (4, 8),
            "mlp.0.bias": (4,),
            "mlp.2.weight": (1, 4),
            "mlp.2.bias": (1,),
        }
        state = {name: torch.zeros(shape) for name, shape in shapes.items()}
        torch.save(
            {"state_dict": state, "epoch": np.float64(3)},
            buffer,
            _use_new_zipfile_serialization=not old,
        )
        made.append(buffer.getvalue())
    return [*made, b"cos\nsystem\n(S'touch executed'\ntR.", pickle.dumps({"state_dict": {}})]


def page(_folder: Path, data: bytes) -> object:
    """Write a page with texts from outside, and check that the page is harmless.

    No text may become a tag, an attribute or a script, and the page must request nothing.
    """
    text = data.decode("utf-8", "replace")
    names = [f"{i}{text[i * 7 : i * 7 + 60]}" for i in range(4)]
    outcomes = page_data.outcomes_of(
        40,
        class_names=names,
        ids=[f"{i} {text}" for i in range(40)],
        dataset=text,
        split=text,
        provenance={"x" + text: text},
    )
    written = report_page([outcomes], title=text or None)
    return require_harmless(written)


@cache
def page_tags() -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tags(report_page([page_data.outcomes_of(40)]))


def tags(written: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the element kinds with their attribute names, each once."""
    found: set[tuple[str, tuple[str, ...]]] = set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.add((tag, tuple(name for name, _ in attrs)))

    Parser().feed(written)
    return tuple(sorted(found))


def require_harmless(written: str) -> str:
    strange = {tag for tag in tags(written) if tag not in page_tags() and tag[0] not in HARMLESS}
    assert not strange, f"the page has elements that ours has not: {sorted(strange)}"
    assert not re.search(
        r"""(src|href|action|data)\s*=\s*["']?\s*(https?:|//|javascript:|file:)""",
        _outside(written),
    )
    return written


HARMLESS = {"bdi", "p", "td", "th", "tr", "li", "span", "small", "b"}
"""Elements that a page may or may not have, as the numbers decide.

They have no attribute that requests or runs anything.
"""


def _outside(written: str) -> str:
    """Return only the markup in a page, because text may only look like markup.

    Texts are escaped, so every ``<`` begins an element.
    """
    return " ".join(re.findall(r"<[^>]*>", written))


COMMANDS = (
    *(
        "embed",
        "import",
        "fit",
        "score",
        "evaluate",
        "calibrate",
        "monitor",
        "explain",
        "report",
        "inspect",
        "list",
        "datasets",
    ),
    *(
        "convert",
        "export",
        "push",
        "pull",
        "pools",
        "benchmark",
        "render",
        "--help",
        "--version",
        "--plugin",
        "-q",
    ),
)
ARGUMENTS = (
    *(
        "-o",
        "--output",
        "--method",
        "--seed",
        "--max-risk",
        "--confidence",
        "--split",
        "--limit",
        "--json",
        "--fold",
        "--state",
    ),
    *(
        "store",
        "predictor",
        "scores.parquet",
        "scores.csv",
        "state.parquet",
        "nothing",
        ".",
        "",
        "-",
        "--",
        "out",
        "out.html",
    ),
    *(
        "0",
        "-1",
        "1e999",
        "nan",
        "99999999999999999999",
        "mcm",
        "vilu_plus",
        "mcm:",
        "=",
        "\udcff",
        "a\nb",
        "é",
        "../x",
        "{}",
    ),
)


def command_seeds() -> list[bytes]:
    return [bytes(range(start, start + 6)) for start in range(0, 240, 6)]


def command(folder: Path, data: bytes) -> object:
    """Run a command line in which each byte selects a word.

    The command must not show a traceback.
    """
    for name in ("store", "predictor", "scores.parquet", "scores.csv", "state.parquet"):
        place = kept() / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, folder / name)
    words = [COMMANDS[data[0] % len(COMMANDS)]] if data else []
    words += [ARGUMENTS[byte % len(ARGUMENTS)] for byte in data[1:9]]
    with pytest.raises(
        AssertionError
    ) as ended:  # no command ends with -1, so ``run`` raises with the command's output
        run(*words, code=-1, cwd=folder)
    return ended.match(r"(?s)^(?!.*Traceback)")


def monitor_state(folder: Path, data: bytes) -> object:
    return (
        Monitor.of_folder(kept() / "predictor").resume(put(folder / "state.parquet", data)).status
    )


def risk(path: Path) -> object:
    return [
        Calibration.load(path).rows,
        vilu.score(load_predictor(path), open_source(kept() / "store")),
    ]


def toml_seeds() -> list[bytes]:
    lines = ["seeds = 2", "resamples = 40"]
    for section, entries in tables().items():
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            lines.append(f"[{section}.{name}]")
            lines += [f"{key} = {_toml(value)}" for key, value in entry.items()]
    return ["\n".join(lines).encode()]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


TARGETS: dict[str, Fuzzed] = {
    "image": Fuzzed(lambda: list(image_files.seeds().values()), image),
    "caption": Fuzzed(lambda: [b"a cup", "é \u202e".encode(), b"\xff"], caption),
    "npy": Fuzzed(npy_seeds, npy),
    "npz": Fuzzed(npz_seeds, npz),
    **{
        f"array_{name}": arrays_folder(name)
        for name in ("image", "text", "target", "class_names", "ids")
    },
    "stored_npy": Fuzzed(content("store/img_emb/img_emb_00000.npy"), stored_npy, 0.3),
    "safetensors": Fuzzed(content("head/weights.safetensors"), safetensors),
    "predictor": Fuzzed(unsealed("head/predictor.json"), predictor),
    "risk": Fuzzed(unsealed("predictor/risk.json"), in_copy("predictor", "risk.json", risk), 0.5),
    **{
        name: Fuzzed(unsealed(f"store/{file}"), in_copy("store", file, read_store), 0.3)
        for name, file in {
            "run": "run.json",
            "manifest": "manifest.json",
            "receipt": "receipts/00000.json",
            "classes": "classes.json",
        }.items()
    },
    "toml": Fuzzed(toml_seeds, lambda folder, data: load_config(put(folder / "study.toml", data))),
    "class_list": Fuzzed(
        lambda: [b"cat\ndog\n", b"n01\tcat\nn02\tdog\n"],
        lambda folder, data: read_classes(put(folder / "names.txt", data)),
    ),
    "image_csv": Fuzzed(
        lambda: [b"path,label\na.png,cat\n", b'path,caption\n"a.png","a, cup"\n'],
        listed("list.csv"),
    ),
    "image_parquet": Fuzzed(parquet_seeds, listed("list.parquet")),
    "scores_csv": Fuzzed(content("scores.csv"), scores("scores.csv")),
    "scores_parquet": Fuzzed(content("scores.parquet"), scores("scores.parquet")),
    "tar": Fuzzed(tar_seeds, tar),
    "checkpoint": Fuzzed(
        checkpoint_seeds,
        lambda folder, data: convert_official(put(folder / "head.ckpt", data), 100.0),
    ),
    "cifar": Fuzzed(
        lambda: [
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, protocol=2)
        ],
        lambda folder, data: read_pickle(put(folder / "data_batch_1", data)),
    ),
    "monitor_state": Fuzzed(content("state.parquet"), monitor_state, 0.5),
    "page": Fuzzed(lambda: [b"a cup", b"<b>bold</b>", "\u202eevil".encode()], page, 0.1),
    "command": Fuzzed(command_seeds, command, 0.1),
}
