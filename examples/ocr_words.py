"""Tesseract reads my pages: which of its words are right, and which does a person read again?

Renders pages whose words are known, makes half of them hard to read, and lets Tesseract read them.
A probe learns from a third of the pages which words are doubtful, another third vouches for a
guarantee, and the last third is decided. The guarantee speaks of words that were read: those that
Tesseract never saw are counted beside it. It counts words as independent; benchmarks/ocr.py counts
pages, too. Needs Tesseract (apt-get install tesseract-ocr).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import vilu
from vilu.tables.methods import AnswerProbe
from vilu.tables.sources import Word, word_answers

TEXT = (
    "invoice account balance payment of the to 2026 total amount due delivery for your order "
    "number 4711 please transfer within thirty days reference customer address tax rate 19.5 net "
    "gross quantity price article item discount shipping date signed by manager office street"
).split()


def scanned(file: Path, random: np.random.Generator) -> list[Word]:
    """Write a page of 14 random words as a picture, and return the words with their boxes."""
    font = ImageFont.load_default(20)
    image = Image.new("L", (900, 120), 235)
    words = []
    for line in range(2):
        left = 30.0
        for text in random.choice(TEXT, 7):
            words.append(Word(str(text), (left, 25 + 40 * line, font.getlength(text), 24)))
            ImageDraw.Draw(image).text((left, 25 + 40 * line), str(text), fill=70, font=font)
            left += font.getlength(text) + 9
    hardness = max(0.0, random.uniform(-1, 1))  # half of the pages are as they were printed
    blurred = image.filter(ImageFilter.GaussianBlur(2.0 * hardness))
    noisy = np.asarray(blurred) + 30 * hardness * random.normal(size=(120, 900))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file)
    return words


def main() -> None:
    """Read, make a table, fit, calibrate, decide."""
    random = np.random.default_rng(0)
    truth = {}
    with tempfile.TemporaryDirectory() as place:
        for number in range(90):
            page = Path(place) / f"page{number:03}"
            truth[page.name] = scanned(page.with_suffix(".png"), random)
            command = ["tesseract", f"{page}.png", str(page), "--psm", "6", "tsv"]
            environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
        words = word_answers(sorted(Path(place).glob("*.tsv")), truth=truth)

    table = vilu.open_table(words.columns)  # words.write("words.csv") keeps it
    of_page = np.array([int(name.removeprefix("page")) for name in table.cluster or ()])
    fit, calibration, new = (table[of_page % 3 == part] for part in range(3))
    model = vilu.Selective(AnswerProbe()).fit(fit).calibrate(calibration, max_risk=0.05)
    decided = model.predict(new)
    accepted = np.array(decided.decision) == "accept"
    wrong = new.failure == 1
    print(f"{len(table)} words were read; {words.missed_share:.0%} of all were never read")
    print(f"of all that were read {wrong.mean():.0%} are wrong")
    print(f"accepted are {accepted.mean():.0%}, of which {wrong[accepted].mean():.1%} are wrong")
    doubtful = int(np.argmax(decided.uncertainty))
    print(f"most doubtful: {(new.answer or ())[doubtful]!r} on {(new.cluster or ())[doubtful]}")

    assert wrong[accepted].mean() < wrong.mean() / 2
    assert accepted.mean() > 0.6


if __name__ == "__main__":
    main()
