"""Renders pages with known words, as hard to read as scans and photos.

The text is English prose shipped with Python (``pydoc_data``). A page has 10 to 30 consecutive
words from the text, and no part of the text is used twice. Font, size, contrast, blur, noise,
rotation and JPEG quality are drawn at random for each page, so the words on a page are wrong
together.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vilu.tables.sources import Word

PLAIN_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*[.,;:]?")
"""Matches words with letters and digits. No quotes, because OCR confuses the forms of quotes."""

FEWEST_WORDS, MOST_WORDS = 10, 30
MARGIN = 40
LINE_WIDTH = 620

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono"),
    *("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol"),
)
"""Fonts shipped with matplotlib, so every machine has the same fonts."""


@dataclass(frozen=True)
class PageStyle:
    """A page's look, drawn at random."""

    font: str
    size: int  # font size, in pixels
    ink: int  # grey level of the ink (0 is black)
    paper: int  # grey level of the paper (255 is white)
    blur: float  # radius in pixels
    noise: float  # standard deviation in grey levels
    angle: float  # rotation in degrees
    quality: int  # JPEG quality

    @classmethod
    def draw(cls, random: np.random.Generator) -> PageStyle:
        """Draw a look at random: most pages are easy to read, some are hard."""
        paper = int(random.integers(190, 256))
        contrast = int(random.integers(40, 190))
        hardness = random.beta(1.0, 1.4)
        return cls(
            font=str(random.choice(FONTS)),
            size=int(random.integers(14, 29)),
            ink=paper - contrast,
            paper=paper,
            blur=float(2.5 * hardness * random.random()),
            noise=float(55 * hardness * random.random()),
            angle=float(random.normal(0, 1.2)),
            quality=int(random.integers(10, 90)),
        )


def words_of_pages(n_pages: int, seed: int) -> list[list[str]]:
    """Return the words on ``n_pages`` pages. No part of the text is on two pages."""
    text = " ".join(topics.values())
    words = [word for word in text.split() if PLAIN_WORD.fullmatch(word)]
    random = np.random.default_rng(seed)
    pages = []
    first = 0
    while first + MOST_WORDS < len(words):
        length = int(random.integers(FEWEST_WORDS, MOST_WORDS + 1))
        pages.append(words[first : first + length])
        first += length
    if len(pages) < n_pages:
        raise ValueError(f"the text is enough for {len(pages)} pages. Got {n_pages} instead.")
    return [pages[index] for index in random.permutation(len(pages))[:n_pages]]


class Page:
    """Words in lines on a page, as in a picture from a camera or a scanner.

    Args:
        words: The words in order.
        seed: Seed of the page's look and noise.
    """

    def __init__(self, words: list[str], seed: tuple[int, int]) -> None:
        self.random = np.random.default_rng(seed)
        self.style = PageStyle.draw(self.random)
        font_file = _font_file(self.style.font)
        self.font = ImageFont.truetype(font_file, self.style.size)
        self.upright = _lines(words, self.font)
        _, last_top, _, last_height = self.upright[-1].box
        self.size = (LINE_WIDTH + 2 * MARGIN, round(last_top + last_height) + MARGIN)

    @property
    def words(self) -> tuple[Word, ...]:
        """The words on the page, with upright boxes around the rotated words."""
        return tuple(_rotated(word, self.size, self.style.angle) for word in self.upright)

    def picture(self) -> Image.Image:
        """Draw the page as a grey picture."""
        image = Image.new("L", self.size, self.style.paper)
        canvas = ImageDraw.Draw(image)
        for word in self.upright:
            canvas.text(word.box[:2], word.text, fill=self.style.ink, font=self.font, anchor="la")
        turned = image.rotate(
            self.style.angle, Image.Resampling.BICUBIC, fillcolor=self.style.paper
        )
        return _degrade(turned, self.style, self.random)


def _font_file(name: str) -> str:
    data_folder = mpl.get_data_path()
    return str(Path(data_folder) / "fonts" / "ttf" / f"{name}.ttf")


def _lines(words: list[str], font: ImageFont.FreeTypeFont) -> list[Word]:
    """Arrange words in lines of at most ``LINE_WIDTH`` pixels."""
    ascent, descent = font.getmetrics()
    space = font.getlength(" ")
    left, top = float(MARGIN), float(MARGIN)
    placed = []
    for text in words:
        width = font.getlength(text)
        if left + width > MARGIN + LINE_WIDTH:
            left = float(MARGIN)
            top += 1.35 * (ascent + descent)
        word = Word(text, (left, top, width, ascent + descent))
        placed.append(word)
        left += width + space
    return placed


def _rotated(word: Word, size: tuple[int, int], angle: float) -> Word:
    """Return the upright box around a word after a rotation of the page around the middle."""
    left, top, width, height = word.box
    right = left + width
    bottom = top + height
    middle = np.array(size) / 2
    corners = np.array([(left, top), (right, top), (left, bottom), (right, bottom)]) - middle
    radians = np.deg2rad(angle)
    # y grows downwards, so for Pillow's counterclockwise angle the sine has this sign
    x = corners[:, 0] * np.cos(radians) + corners[:, 1] * np.sin(radians) + middle[0]
    y = corners[:, 1] * np.cos(radians) - corners[:, 0] * np.sin(radians) + middle[1]
    box = (float(x.min()), float(y.min()), float(np.ptp(x)), float(np.ptp(y)))
    return Word(word.text, box)


def _degrade(image: Image.Image, style: PageStyle, random: np.random.Generator) -> Image.Image:
    """Add blur, then sensor noise, then JPEG to the image."""
    gaussian = ImageFilter.GaussianBlur(style.blur)
    blurred = image.filter(gaussian)
    grey = np.asarray(blurred, dtype=np.float64)
    noisy = grey + style.noise * random.normal(size=grey.shape)
    rounded = np.rint(noisy)
    levels = np.clip(rounded, 0, 255)
    clipped = Image.fromarray(levels.astype(np.uint8))
    file = io.BytesIO()
    clipped.save(file, "JPEG", quality=style.quality)
    return Image.open(file)
