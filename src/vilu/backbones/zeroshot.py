"""Candidate embeddings from class names and prompt templates."""

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
from vilu.text import plural

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

DETERMINERS = frozenset(
    {"a", "an", "the", "this", "that", "these", "those", "some", "any", "my", "our", "your"}
)
"""Words of which no two may stand side by side, as in "a the"."""

MAX_SHOWN = 3
"""Maximum number of templates that ``prompts_in_words`` shows."""

NEAR_DUPLICATE_COSINE = 0.999
"""If the cosine of two candidates is above this number, images can hardly decide between them."""
BLOCK_SIZE = 1024
"""Number of candidates whose cosines with all candidates are in memory at a time."""


@cache
def everyday_words() -> tuple[str, ...]:
    """About 2,200 everyday words for objects in photos.

    The words help to detect images of none of the classes. The list was written for vilu and has
    the MIT licence.
    """
    text = (
        resources.files("vilu").joinpath("assets", "everyday_words.txt").read_text(encoding="utf-8")
    )
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


def class_texts(
    backbone: Backbone, names: Sequence[str], templates: Sequence[str] = TEMPLATES["default"]
) -> Tensor:
    """Unit-norm embeddings (K, D) float32 of K classes.

    The embedding of a class is the normalised mean over all templates: prompt ensembling in
    embedding space (Radford et al., ICML 2021). A warning reports pairs of classes whose embeddings
    are nearly equal.

    Args:
        backbone: Encoder of the prompts.
        names: K class names. Equal names have exactly the same embedding.
        templates: Prompt templates, each with one ``{}`` for the name.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    text = mean_texts(backbone, names, templates)
    _warn_of_near_duplicates(text, names)
    return text


def mean_texts(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Embeddings (K, D) as those of ``class_texts``, without a warning of nearly equal rows.

    The function is for words that are no candidates. Among them, similar words do no harm.
    """
    mean_over_templates = prompt_texts(backbone, names, templates).mean(dim=1)
    return functional.normalize(mean_over_templates, dim=-1)


def prompt_texts(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit-norm embeddings (K, P, D) float32 of K classes in P prompt templates."""
    if not names:
        raise DataError("at least one class name is needed. Got none.")
    check_class_names(names, n_candidates=len(names))
    _check_templates(templates)
    # Each name is encoded once, because equal names may be rounded differently in another batch.
    distinct_names = tuple(dict.fromkeys(names))
    encode = backbone.encode_prompts if isinstance(backbone, DualEncoder) else backbone.encode_texts
    prompts = fill_templates(distinct_names, templates)
    rows = encode(prompts).view(len(distinct_names), len(templates), -1)
    if len(distinct_names) == len(names):
        return rows
    row_of_name = {name: row for row, name in enumerate(distinct_names)}
    return rows[[row_of_name[name] for name in names]]


def _check_templates(templates: Sequence[str]) -> None:
    """Refuse templates that do not have exactly one place for a name."""
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
    """Prompts of every name in every template; all prompts of a name are consecutive."""
    prompts: list[str] = []
    for name in names:
        prompts += [template.replace("{}", name) for template in templates]
    return prompts


def clumsy_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts in which a name with an article follows an article of the template.

    A model has seen few texts such as "a photo of a a textile with a hole.", so its answers suffer.

    Examples:
        >>> from vilu.backbones.zeroshot import clumsy_prompts
        >>> clumsy_prompts(["a shoe", "coat"], ["a photo of a {}."])
        ['a photo of a a shoe.']
        >>> clumsy_prompts(["a shoe", "coat"], ["a photo of {}."])
        []
    """
    names_with_article = [name for name in names if _is_determiner(name.split()[:1])]
    prompts: list[str] = []
    for template in templates:
        before, _, _ = template.partition("{}")
        if _is_determiner(before.split()[-1:]):
            prompts += fill_templates(names_with_article, [template])
    return prompts


def _is_determiner(words: Sequence[str]) -> bool:
    """Whether ``words`` is a single word, and this word is a determiner such as "a"."""
    return len(words) == 1 and words[0].lower() in DETERMINERS


def prompts_in_words(names: Sequence[str], templates: Sequence[str]) -> str:
    """The templates as a text for people, with a warning of ``clumsy_prompts``."""
    shown = ", ".join(repr(template) for template in templates[:MAX_SHOWN])
    n_more = len(templates) - MAX_SHOWN
    and_more = f" and {n_more} more" if n_more > 0 else ""
    sentences = [f"Prompts: {shown}{and_more}."]
    clumsy = clumsy_prompts(names, templates)
    if clumsy:
        and_more = f", and so do {len(clumsy) - 1} more" if len(clumsy) > 1 else ""
        sentences.append(
            f"Warning: {clumsy[0]!r} has two articles{and_more}. Leave them out of the class "
            "names, or give another --template, such as 'a photo of {}.'"
        )
    return " ".join(sentences)


def named_templates(names: Sequence[str]) -> tuple[str, ...]:
    """Replace each name of a set in ``TEMPLATES`` by the templates of the set.

    All other ``names`` are templates themselves.
    """
    templates: list[str] = []
    for name in names:
        templates += TEMPLATES.get(name, (name,))
    return tuple(templates)


def _warn_of_near_duplicates(text: Tensor, names: Sequence[str]) -> None:
    """Warn of pairs of classes whose embeddings are nearly equal."""
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(text), BLOCK_SIZE):
        rows = text[start : start + BLOCK_SIZE]
        cosines = rows @ text[start:].T
        # only cosines above the diagonal, so that each pair is reported once
        is_near = cosines.triu(diagonal=1) > NEAR_DUPLICATE_COSINE
        for i, j in torch.nonzero(is_near).tolist():
            first = names[start + i]
            second = names[start + j]
            if first != second:  # classes with equal names are the same answer
                pairs.append((first, second))
    if pairs:
        first, second = pairs[0]
        warn_caller(
            "the model can hardly tell some classes apart, since their text embeddings have a "
            f"cosine above {NEAR_DUPLICATE_COSINE}: {plural(len(pairs), 'pair')}, the first is "
            f"{first!r} and {second!r}. Reword or merge them."
        )
