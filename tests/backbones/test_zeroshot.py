from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from vilu.backbones import zeroshot
from vilu.backbones.zeroshot import TEMPLATES, embed_class_names, everyday_words
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, UsageError

WIDTH = 6


class Hashing:
    """Embed each text as a random vector that depends on the text only."""

    space = EmbeddingSpace(WIDTH, 1.0)

    def __init__(self) -> None:
        self.seen: list[str] = []

    def preprocess(self, image: Image.Image) -> Tensor:
        raise NotImplementedError

    def encode_images(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.seen += texts
        return torch.stack([vector(text) for text in texts])


def vector(text: str) -> Tensor:
    seed = int.from_bytes(text.encode()[-7:], "big")
    row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return row / row.norm()


def test_default_template() -> None:
    backbone = Hashing()
    text = embed_class_names(backbone, ["dog", "cat"])
    assert backbone.seen == ["a photo of a dog.", "a photo of a cat."]
    torch.testing.assert_close(
        text, torch.stack([vector("a photo of a dog."), vector("a photo of a cat.")])
    )


def test_ensemble_is_the_normalised_mean_of_each_class() -> None:
    templates = ["one {}", "{} two", "a {} b"]
    text = embed_class_names(Hashing(), ["x", "y"], templates)
    for row, name in zip(text, ["x", "y"], strict=True):
        mean = sum(vector(t.replace("{}", name)).double() for t in templates) / 3
        # Three roundings (6e-8) per entry are magnified by the mean's norm, which is above 0.2
        # here.
        torch.testing.assert_close(row.double(), mean / mean.norm(), atol=1e-6, rtol=0)


def test_names_may_hold_braces() -> None:
    backbone = Hashing()
    embed_class_names(backbone, ["{x}", "a {} b"])
    assert backbone.seen == ["a photo of a {x}.", "a photo of a a {} b."]


@pytest.mark.parametrize(
    "templates", [[], ["a photo"], [""], ["{} and {}"], ["a {name}"], "a photo of a {}."]
)
def test_bad_templates(templates: list[str] | str) -> None:
    with pytest.raises(UsageError, match="template"):
        embed_class_names(Hashing(), ["dog"], templates)


def test_bad_names() -> None:
    with pytest.raises(DataError, match="at least one"):
        embed_class_names(Hashing(), [])
    with pytest.raises(DataError, match="blank"):
        embed_class_names(Hashing(), ["dog", " "])


def test_a_name_that_repeats_is_encoded_once() -> None:
    found = embed_class_names(Hashing(), ["cat", "dog", "dog", "cat", "cow"])
    assert torch.equal(found, embed_class_names(Hashing(), ["cat", "dog", "cow"])[[0, 1, 1, 0, 2]])


def test_one_name_is_not_a_list_of_letters() -> None:
    assert len(embed_class_names(Hashing(), "dog")) == 1


class Sticky(Hashing):
    """Return orthogonal classes, except the last. Its cosine with the first is 0.9995."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        rows = torch.eye(len(texts), WIDTH + len(texts))
        cosine = 0.9995
        rows[-1] = cosine * rows[0] + (1 - cosine**2) ** 0.5 * rows[-1]
        return rows


@pytest.mark.parametrize(
    "n_between", [1, zeroshot.COSINE_BLOCK_ROWS - 1, zeroshot.COSINE_BLOCK_ROWS]
)
def test_near_duplicates_are_named(n_between: int) -> None:
    """The pair must be found within one block of the comparison, and across two."""
    between = [f"table {number}" for number in range(n_between)]
    with pytest.warns(UserWarning, match=r": 1 pair, .* 'couch' and 'sofa'") as caught:
        embed_class_names(Sticky(), ["couch", *between, "sofa"])
    assert caught[0].filename == __file__


def test_classes_apart_are_not_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_class_names(Hashing(), ["couch", "table", "lamp"])


def test_named_templates_are_valid() -> None:
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates)
        embed_class_names(Hashing(), ["dog"], templates)
    assert len(TEMPLATES["ensemble"]) == 7


def test_everyday_words_are_distinct_plain_words():
    words = everyday_words()
    assert len(words) > 2000
    assert list(words) == sorted(set(words))
    assert all(re.fullmatch(r"[a-z]+([ -][a-z]+)*", word) for word in words)
    assert {"teapot", "waterfall", "wedding", "velvet", "hot air balloon"} <= set(words)
