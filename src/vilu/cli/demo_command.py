"""The command demo: all steps on photos of clothes, and a triage of a folder of photos."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

from typer import Option

from vilu.artifacts.disk import write_text
from vilu.cli import console
from vilu.cli.console import log_next_step
from vilu.cli.options import Overwrite, Seed

MAX_RISK: Final = 0.1
"""Largest error rate among the accepted photos in the folder."""

N_LABELS_TO_FIT: Final = 60
"""Number of labels that the triage requests first, to fit on."""

N_LABELS_TO_TEST: Final = 140
"""Number of labels that the triage requests next, for photos drawn at random for a guarantee."""


@console.resumable
def demo(
    output: Annotated[
        Path, Option("--output", "-o", help="Folder for the table, the figures and the cache.")
    ] = Path("demo-output"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Run all steps on real photos of 10 kinds of clothes: see which answers to distrust.

    A small model embeds the photos. On two cores, the first run takes minutes, and a second run
    takes seconds. The command prints a table, and saves figures. Then a triage sorts a folder of
    400 photos with 200 labels.
    """
    from vilu.cli.demo import run_demo

    demo_result = run_demo(output, seed=seed, overwrite=overwrite)
    sorting_text = sort_folder(output, seed)
    table_rows = demo_result.table.to_dicts()
    console.print_result(table_rows, f"{demo_result.text}\n\n{sorting_text}")
    log_next_step(f"figures and tables are in {output}; your own images: vilu embed FOLDER -o emb")


def sort_folder(output: Path, seed: int) -> str:
    """Sort the demo folder, and describe the plan and the result in sentences.

    The labels come from the data set. The triage reads only the requested labels. It runs three
    times:

    1. Without labels, the triage says what labels could show, and requests labels to fit on.
    2. With these labels, it fits a predictor, and requests labels for photos drawn at random.
    3. With the drawn photos' labels, it accepts the answers up to a guaranteed threshold.
    """
    from vilu.backbones.zeroshot import everyday_words
    from vilu.cli.demo import BACKBONE, SORTED_CLASSES
    from vilu.store.job import BackboneSpec
    from vilu.triage.outputs import triage_photos
    from vilu.triage.photos import EmbeddingSettings
    from vilu.triage.state import TriageSettings

    backbone_spec = BackboneSpec(BACKBONE)
    settings = TriageSettings(
        photos=output / "photos",
        embedding=EmbeddingSettings(
            backbone_spec, SORTED_CLASSES, templates=None, negatives=everyday_words()
        ),
        max_risk=MAX_RISK,
        n_next=N_LABELS_TO_FIT,
        seed=seed,
    )
    triage_folder = output / "triage"
    first_summary = triage_photos(settings, triage_folder, overwrite=True)
    fit_labels = write_asked_labels(output, "labels_to_fit.csv")
    triage_photos(replace(settings, n_next=N_LABELS_TO_TEST), triage_folder, [fit_labels])
    drawn_labels = write_asked_labels(output, "labels_drawn.csv")
    last_summary = triage_photos(settings, triage_folder, [fit_labels, drawn_labels])
    lines = (
        f"A triage of photos of {', '.join(SORTED_CLASSES)} (triage/report.html). Before the first "
        f"label it says: {first_summary.forecast or first_summary.counts}",
        f"Then it gets the labels that it asks for. {last_summary.guarantee}",
        f"{last_summary.counts}.",
        accepted_in_words(output),
    )
    return "\n".join(lines)


def write_asked_labels(output: Path, name: str) -> Path:
    """Write the labels that the triage asks for, in place of a person. Return the file's path.

    If somebody has added a photo to the folder, its label is not known, and the photo is skipped.
    """
    from vilu.triage.labels import SKIPPED

    label_of_path = {row["path"]: row["label"] for row in read_rows(output / "labels.csv")}
    lines = ["path,label"]
    for row in read_rows(output / "triage" / "next_labels.csv"):
        path = row["path"]
        label = label_of_path.get(path, SKIPPED)
        lines.append(f"{path},{label}")
    write_text(output / name, "\n".join(lines) + "\n")
    return output / name


def accepted_in_words(output: Path) -> str:
    """Say in a sentence how many accepted answers are wrong, by labels unknown to the triage."""
    label_of_path = {row["path"]: row["label"] for row in read_rows(output / "labels.csv")}
    n_accepted = 0
    n_wrong = 0
    for row in read_rows(output / "triage" / "decisions.csv"):
        has_label = row["path"] in label_of_path
        if row["decision"] == "accept" and has_label:
            n_accepted += 1
            if row["answer"] != label_of_path[row["path"]]:
                n_wrong += 1
    return (
        f"Of the {n_accepted} accepted answers {n_wrong} are wrong, by labels that the triage was "
        "not given."
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
