"""A head for the compact model, fitted on the demo's photos (CC0) and pushed to a hub or a folder.

    python tools/clothes_head.py TARGET [--work FOLDER]

TARGET is ORG/NAME on a model hub, or a folder such as ./shelf/clothes. The head is fitted on the
train split, calibrated on the validation split, and measured on the test split. The head's card has
the measured numbers, the licence and a section on the photos. FOLDER keeps the embeddings.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np

import vilu
from vilu.cli.demo import embed_splits
from vilu.predictors.persistence.hub import push

LICENCE = "cc0-1.0"
MAX_RISK = 0.1
CONFIDENCE = 0.95

ABOUT = """## The photos

Clothes of ten kinds, from the [Clothing dataset](https://github.com/alexeygrigorev/clothing-dataset)
(CC0), made small. {n_train} photos were fitted on and {n_calibration} calibrated on. Of {n_test}
photos of the test split, {share:.0%} are accepted, and {wrong:.1%} of the accepted answers are
wrong (guaranteed: at most {max_risk:.0%} at {confidence:.0%} confidence). The answers are those
that the head has adapted to labels. The test split was looked at while vilu was developed.

"""


def make_head(photos: Path, work: Path) -> Path:
    """Fit, calibrate and measure the head, and return the head's folder."""
    stores = embed_splits(photos, work)
    head = work / "head"
    model = vilu.ViLUPlus(seed=0, answer="adapted")
    model.fit(stores["train"])
    model.save(head)
    target = vilu.Target(max_risk=MAX_RISK, confidence=CONFIDENCE)
    vilu.calibrate_predictor(head, stores["validation"], target)
    predictor = vilu.load(head)
    scores = vilu.score(predictor, stores["test"])
    is_accepted = np.array(scores.decision) == "accept"
    failure_of_accepted = scores.failure[is_accepted]
    about = ABOUT.format(
        n_train=len(stores["train"]),
        n_calibration=len(stores["validation"]),
        n_test=len(scores),
        share=is_accepted.mean(),
        wrong=failure_of_accepted.mean() if len(failure_of_accepted) else 0,
        max_risk=MAX_RISK,
        confidence=CONFIDENCE,
    )
    write_card(head / "README.md", about)
    return head


def write_card(card_path: Path, about: str) -> None:
    """Write the licence and a section on the photos into a predictor's card."""
    text = card_path.read_text(encoding="utf-8")
    for old, new in (
        ('license: "unknown"', f"license: {json.dumps(LICENCE)}"),
        ("## Use\n", about + "## Use\n"),
    ):
        if old not in text:
            sys.exit(f"{card_path} has no {old!r}, so it would lack its licence or its numbers.")
        text = text.replace(old, new)
    card_path.write_text(text, encoding="utf-8")


def main() -> None:
    """Make and push the head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--work", type=Path, default=Path("build/clothes-head"))
    options = parser.parse_args()
    package = resources.files("vilu")
    assets = package.joinpath("assets", "clothing.parquet")
    with resources.as_file(assets) as photos:
        head = make_head(photos, options.work)
    print(push(head, options.target, overwrite=True))


if __name__ == "__main__":
    main()
