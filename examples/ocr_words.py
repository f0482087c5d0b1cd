"""Tesseract reads my pages: which of its words are right, and which does a person read again?

The pages are rendered, so their words are known. Half of the pages are hard to read. One third of
the pages is for the fit, one third for the guarantee, one third is new. The guarantee covers words
that Tesseract read. Missed words are counted separately. Words count as independent.
benchmarks/ocr.py also counts pages. This script needs Tesseract (apt-get install tesseract-ocr).
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

N_PAGES = 90
VOCABULARY = (
    "invoice account balance payment of the to 2026 total amount due delivery for your order "
    "number 4711 please transfer within thirty days reference customer address tax rate 19.5 net "
    "gross quantity price article item discount shipping date signed by manager office street"
).split()


def write_page(file: Path, random: np.random.Generator) -> list[Word]:
    """Write a picture of a page with 14 random words, and return the words with their boxes."""
    font = ImageFont.load_default(20)
    image = Image.new("L", (900, 120), 235)
    draw = ImageDraw.Draw(image)
    words = []
    for line in range(2):
        left = 30.0
        top = 25 + 40 * line
        for choice in random.choice(VOCABULARY, 7):
            text = str(choice)
            width = font.getlength(text)
            draw.text((left, top), text, fill=70, font=font)
            words.append(Word(text=text, box=(left, top, width, 24)))
            left += width + 9
    hardness = max(0.0, random.uniform(-1, 1))  # Half of the pages stay as they are.
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(2.0 * hardness)))
    noise = 30 * hardness * random.normal(size=(120, 900))
    pixels = (blurred + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file)
    return words


def run_tesseract(page: Path) -> None:
    """Read the picture page.png, and write the words with their confidence to page.tsv."""
    command = ["tesseract", f"{page}.png", str(page), "--psm", "6", "tsv"]
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def main() -> None:
    """Read pages, make a table of the words, and accept words with a guarantee."""
    random = np.random.default_rng(0)
    truth = {}
    with tempfile.TemporaryDirectory() as temporary:
        for index in range(N_PAGES):
            page = Path(temporary) / f"page{index:03}"
            truth[page.name] = write_page(page.with_suffix(".png"), random)
            run_tesseract(page)
        tsv_files = sorted(Path(temporary).glob("*.tsv"))
        words = word_answers(tsv_files, truth=truth)  # words.write("words.csv") would keep them.
    table = vilu.open_table(words.columns)
    print(f"{len(table)} words were read, and {words.missed_share:.0%} of all words were missed")

    page_index = np.array([int(name.removeprefix("page")) for name in table.cluster or ()])
    third = page_index % 3
    fit, calibration, new = table[third == 0], table[third == 1], table[third == 2]
    model = vilu.Selective(AnswerProbe())
    model.fit(fit)
    model.calibrate(calibration, max_risk=0.05)
    outcomes = model.predict(new)
    accepted = np.array(outcomes.decision) == "accept"
    wrong = new.failure == 1
    print(f"{wrong.mean():.0%} of the words on the new pages are wrong")
    risk = wrong[accepted].mean()
    print(
        f"{accepted.mean():.0%} of the words are accepted, "
        f"and {risk:.1%} of the accepted words are wrong"
    )
    most_doubtful = int(np.argmax(outcomes.uncertainty))
    assert new.answer is not None
    assert new.cluster is not None
    print(f"most doubtful word: {new.answer[most_doubtful]!r} on {new.cluster[most_doubtful]}")

    assert risk < wrong.mean() / 2
    assert accepted.mean() > 0.6


if __name__ == "__main__":
    main()
