"""How the artefacts in ``data`` were written:
once, by vilu 0.1.0 at commit cfccb89, before the code was moved.

They stay for ever, so this is kept to be read and not to be run: it refuses to write over what is
there, and some names that it takes from inside vilu may not be there any more. New kinds of
artefacts get new files.

    OMP_NUM_THREADS=1 python -m tests.compat.write OMP_NUM_THREADS=1 python -m
    tests.compat.write_flow stores scores monitors study views explanations
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vilu
from tests.compat import bed
from tests.compat.bed import DATA, Arrays, answers, classes, pairs, rounding

K, D = 4, 12
HEAD = {"hidden": (8, 4), "epochs": 3, "batch_size": 16}

FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "vilu-paper": (
        "vilu",
        {**HEAD, "attention": "paper", "mcm_input": True, "weighting": "static"},
    ),
    "vilu-plain": ("vilu", {**HEAD, "attention": None, "predicted_caption": False, "loss": "mse"}),
    "vilu-image_caption": ("vilu", {**HEAD, "attention": None}),
    "lvu-bce": ("lvu", {**HEAD, "loss": "bce"}),
    "pvu-mse": ("pvu", {**HEAD, "loss": "mse"}),
    "mcm_ts-ece": ("mcm_ts", {"objective": "ece"}),
    "sirc-residual": ("sirc", {"typicality": "residual", "confidence": "entropy", "components": 3}),
    "probvlm-epistemic": (
        "probvlm",
        {"uncertainty": "epistemic", "width": 8, "epochs": 3, "samples": 3},
    ),
    "probvlm-cross_modal": ("probvlm", {"uncertainty": "cross_modal", "width": 8, "epochs": 3}),
    "bayesvlm-embeddings": ("bayesvlm", {"mode": "embeddings", "loss": "siglip"}),
    "icpe-log_odds": ("icpe", {"score": "log_odds", "components": 4}),
    "knn_vote-similarity": ("knn_vote", {"weighting": "similarity", "k": 5}),
    "trust_score-alpha": ("trust_score", {"alpha": 0.2, "k": 3}),
    "gen-few": ("gen", {"gamma": 0.3, "largest": 3}),
    "energy-cold": ("energy", {"temperature": 0.5}),
    "tta-vote": ("tta", {"statistic": "vote"}),
    "vilu_plus-embedding": ("vilu_plus", {"features": False, "width": 8, "epochs": 3}),
    "stacking-all": (
        "stacking",
        {
            "members": (
                "mcm",
                "gen",
                "mcm_ts",
                "rel_u",
                "sirc",
                "knn_vote",
                "mahalanobis",
                "linear_probe",
                "lmn",
                "icpe",
            )
        },
    ),
}
"""Second fits, where what is saved or computed differs: label, method and parameters."""

QUICK: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("vilu", "lvu", "pvu", "mc_dropout"), HEAD),
    "mc_dropout": {**HEAD, "passes": 3},
    "deep_ensemble": {**HEAD, "members": 2},
    "lmn": {"hidden": (4,), "n_logits": 3, "epochs": 3, "batch_size": 16},
    "probvlm": {"width": 8, "epochs": 3},
    "vilu_plus": {"width": 8, "epochs": 3},
    "stacking": {"members": ("mcm", "entropy", "margin")},
}
"""Parameters that keep what is saved small."""


def rows(n: int, seed: int, prefix: str, *, captions: bool = False) -> Arrays:
    """Inputs (float32):
    images of K classes or of a caption each, half of them blurred, with every column.
    """
    rng = np.random.default_rng(seed)
    text = (rng if captions else np.random.default_rng(99)).normal(size=(n if captions else K, D))
    text[:, -1] = 0
    target = np.arange(n) if captions else rng.integers(K, size=n)
    blurred = rng.random(n) < 0.5
    noise = rng.normal(size=(n, D)) * np.where(blurred, 0.7, 0.05)[:, None]
    noise[:, -1] = np.where(blurred, 1.0, -1.0)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    image = text[target] + noise
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    projection = np.random.default_rng(98).normal(size=(D, D)) / np.sqrt(D) + np.eye(D)
    views = image[:, None] + rng.normal(size=(n, 4, D)) * 0.1
    prompts = text[:, None] + np.random.default_rng(97).normal(size=(len(text), 3, D)) * 0.05
    columns = {
        "features": np.linalg.solve(projection, image.T).T,
        "text_features": np.linalg.solve(projection, text.T).T,
        "image_projection": projection,
        "text_projection": projection,
        "views": views / np.linalg.norm(views, axis=2, keepdims=True),
        "prompts": prompts / np.linalg.norm(prompts, axis=2, keepdims=True),
    }
    found = {
        "image": image,
        "text": text,
        **{f"columns/{name}": value for name, value in columns.items()},
    }
    return {
        **{f"{prefix}/{name}": value.astype(np.float32) for name, value in found.items()},
        **({} if captions else {f"{prefix}/target": target}),
    }


def write_inputs() -> Arrays:
    """Rows to fit, select, calibrate and score on, of classes and of captions."""
    made = {
        **rows(60, 0, "train"),
        **rows(24, 1, "test"),
        **rows(20, 2, "validation"),
        **rows(40, 3, "calibration"),
        **rows(32, 4, "train pairs", captions=True),
        **rows(16, 5, "test pairs", captions=True),
    }
    made["test/image"][5] = 0  # a row without an uncertainty
    save_arrays("inputs", made)
    return made


def write_predictors() -> None:
    """Every method, saved; the numbers that each gives, and how far rounding can move them."""
    inputs = write_inputs()
    train, validation = classes(inputs, "train"), classes(inputs, "validation")
    made = {name: fit(name, QUICK.get(name, {}), train) for name in vilu.PREDICTORS}
    made |= {label: fit(name, parameters, train) for label, (name, parameters) in FITS.items()}
    made["vilu-validation"] = vilu.ViLU(**HEAD).fit(train, validation)
    few = vilu.Embeddings.from_rows(train, torch.arange(20))
    made["vilu_plus-few"] = vilu.ViLUPlus(width=8, epochs=3).fit(few)
    right = torch.cat([batch.index[batch.failure == 0] for batch in train.batches(64)])
    for name in ("vilu", "stacking"):
        constant = vilu.PREDICTORS[name](**QUICK.get(name, {}), allow_degenerate=True)
        made[f"{name}-constant"] = constant.fit(vilu.Embeddings.from_rows(train, right))
    calibration = classes(inputs, "calibration")
    for name in ("mcm", "margin", "vilu"):
        made[f"{name}-calibrated"] = fit(name, QUICK.get(name, {}), train).calibrate(calibration)
    captions = pairs(inputs, "train pairs")
    for name, cls in vilu.PREDICTORS.items():
        if cls.no_captions is None:
            made[f"pairs-{name}"] = fit(name, QUICK.get(name, {}), captions)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expected: Arrays = {}
        for label, predictor in made.items():
            archive = root / ("pairs" if label.startswith("pairs-") else "predictors")
            predictor.save(archive / label)
            expected |= expect(label, vilu.load(archive / label), inputs)
        expected |= write_checkpoint(root / "predictors")
        for name in ("predictors", "pairs"):
            pack(name, root / name)
    save_arrays("predictors", expected)


def fit(
    name: str, parameters: dict[str, Any], train: vilu.EmbeddingSource
) -> vilu.FailurePredictor:
    return vilu.PREDICTORS[name](**parameters).fit(train)


def expect(label: str, predictor: vilu.FailurePredictor, inputs: Arrays) -> Arrays:
    """What a saved predictor says of the test rows, and the tolerance of each number."""

    def ask(change: Callable[[Any], Any]) -> Arrays:
        of_pairs = label.startswith("pairs-")
        return answers(
            predictor,
            pairs(inputs, "test pairs", change) if of_pairs else classes(inputs, "test", change),
        )

    numbers, tolerances = ask(np.asarray), rounding(ask, D)
    if isinstance(predictor, vilu.ViLU):
        assert len(np.unique(numbers["uncertainty"])) > 5 or predictor.constant_ is not None, label
    return {
        **{f"{label}/{name}": value for name, value in numbers.items()},
        **{
            f"{label}/{name}/tolerance": value.astype(np.float32)
            for name, value in tolerances.items()
        },
    }


def write_checkpoint(root: Path) -> Arrays:
    """A checkpoint as the reference implementation wrote them,
    and the predictor that it was converted to.
    """
    with np.load(DATA.parents[1] / "data" / "vilu_head_d24.npz") as z:
        prefix = "attention1_caption1/param/"
        state = {
            key.removeprefix(prefix): torch.tensor(z[key]) for key in z if key.startswith(prefix)
        }
        data = {
            "image": z["image"][:24],
            "text": z["text"][: len(z["text"])],
            "scale": z["logit_scale"],
        }
    state["iteration_count"] = torch.tensor(1000)
    content = {"epoch": 3, "train_meter": {"auc": np.float64(0.9)}, "state_dict": state}
    (root / "converted").mkdir()
    torch.save(content, root / "converted" / "head.ckpt")
    scale = float(data["scale"])
    predictor = vilu.convert_official(root / "converted" / "head.ckpt", scale)
    predictor.save(root / "converted")

    def ask(change: Callable[[Any], Any]) -> Arrays:
        return answers(
            predictor, vilu.Embeddings(change(data["image"]), change(data["text"]), None, scale)
        )

    found = {
        **ask(np.asarray),
        **{f"{name}/tolerance": value for name, value in rounding(ask, 24).items()},
    }
    return {f"converted/{name}": value for name, value in {**data, **found}.items()}


def save_arrays(name: str, values: Arrays) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **values)
    save(f"{name}.npz", content.getvalue())


def save_document(name: str, value: Any) -> None:
    save(f"{name}.json", json.dumps(value, indent=1).encode())


def pack(name: str, folder: Path) -> None:
    """All files of a folder as one archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path, found in bed.tree(folder).items():
            archive.writestr(zipfile.ZipInfo(path), found, zipfile.ZIP_DEFLATED)
    save(f"{name}.zip", content.getvalue())


def save(name: str, content: bytes) -> None:
    path = DATA / name
    DATA.mkdir(exist_ok=True)
    if path.exists():
        raise SystemExit(
            f"{path} is there already: what earlier code wrote is never written again. "
            "Add a new file."
        )
    path.write_bytes(content)
    print(f"{len(content):8,} {name}")  # noqa: T201


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write_predictors()
