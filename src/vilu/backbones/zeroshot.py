"""Class names to candidate embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import torch
from torch import Tensor
from torch.nn import functional

from vilu.backbones.base import Backbone, DualEncoder
from vilu.callers import warn_caller
from vilu.embeddings.checks import check_class_names
from vilu.errors import DataError, UsageError

DEFAULT_TEMPLATE = "a photo of a {}."

TEMPLATES: dict[str, tuple[str, ...]] = {
    "default": (DEFAULT_TEMPLATE,),
    "ensemble": (
        DEFAULT_TEMPLATE,
        "a picture showing a {}.",
        "there is a {} in this image.",
        "somebody took a snapshot of this {}.",
        "this is what a {} looks like.",
        "a {}, seen in everyday life.",
        "an image whose subject is a {}.",
    ),
}
"""Named sets of prompt templates."""

NEAR_DUPLICATE = 0.999  # cosine of two candidates above which the image hardly decides between them
BLOCK = 1024


@cache
def everyday_words() -> tuple[str, ...]:
    """About 2,200 everyday words of what photos show, to tell images of none of the classes by.

    They are ours, under MIT.
    """
    text = (
        resources.files("vilu").joinpath("assets", "everyday_words.txt").read_text(encoding="utf-8")
    )
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


def class_texts(
    backbone: Backbone, names: Sequence[str], templates: Sequence[str] = TEMPLATES["default"]
) -> Tensor:
    """(K, D) float32 unit-norm embeddings of K classes: each the mean over templates, normalised.

    Prompt ensembling in embedding space (Radford et al., ICML 2021). Warns of pairs of classes
    whose embeddings nearly coincide.

    Args:
        backbone: Encodes the prompts.
        names: K class names; equal ones have the same embedding, to the last bit.
        templates: Each with one ``{}`` for the name.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    text = mean_texts(backbone, names, templates)
    _warn_of_near_duplicates(text, names)
    return text


def mean_texts(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """As ``class_texts``, of words among which no image chooses, so that two may be near."""
    return functional.normalize(prompt_texts(backbone, names, templates).mean(dim=1), dim=-1)


def prompt_texts(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(K, P, D) float32 unit-norm embeddings of K classes in P prompts, as ``class_texts``."""
    if not names:
        raise DataError("at least one class name is needed. Got none.")
    check_class_names(names, len(names))
    _check_templates(templates)
    # each name once: a batch may round equal ones otherwise
    unique = tuple(dict.fromkeys(names))
    encode = backbone.encode_prompts if isinstance(backbone, DualEncoder) else backbone.encode_texts
    prompts = fill_templates(unique, templates)
    rows = encode(prompts).view(len(unique), len(templates), -1)
    if len(unique) == len(names):
        return rows
    place = {name: i for i, name in enumerate(unique)}
    return rows[[place[name] for name in names]]


def _check_templates(templates: Sequence[str]) -> None:
    if isinstance(templates, str):
        raise UsageError(
            f"templates must be a list of templates. Got the text {templates!r} instead."
        )
    if not templates:
        raise UsageError("at least one template is needed, such as 'a photo of a {}.'. Got none.")
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(
                "a template must have exactly one {} for the class name. "
                f"Got {template!r} instead."
            )


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every name in every template, name by name."""
    prompts: list[str] = []
    for name in names:
        prompts += [template.replace("{}", name) for template in templates]
    return prompts


def named_templates(names: Sequence[str]) -> tuple[str, ...]:
    """Templates, where the names of sets stand for the templates in them."""
    templates: list[str] = []
    for name in names:
        templates += TEMPLATES.get(name, (name,))
    return tuple(templates)


def _warn_of_near_duplicates(text: Tensor, names: Sequence[str]) -> None:
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(text), BLOCK):
        rows = text[start : start + BLOCK]
        # above the diagonal each pair stands once
        near = (rows @ text[start:].T).triu(diagonal=1) > NEAR_DUPLICATE
        for i, j in torch.nonzero(near).tolist():
            first = names[start + i]
            second = names[start + j]
            if first != second:  # equal ones are one answer
                pairs.append((first, second))
    if pairs:
        first, second = pairs[0]
        warn_caller(
            f"{len(pairs)} pairs of classes have nearly the same text embedding (cosine above "
            f"{NEAR_DUPLICATE}), the first is {first!r} and {second!r}: the model can hardly tell "
            "them apart. Reword or merge them."
        )
