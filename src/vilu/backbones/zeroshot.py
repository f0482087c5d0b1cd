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
"""Words that may not follow each other, as in "a the"."""

MAX_SHOWN_TEMPLATES = 3
"""Maximum number of templates in the text that ``describe_prompts`` returns."""

NEAR_DUPLICATE_COSINE = 0.999
"""Above this cosine, the model can hardly tell two candidates apart."""
COSINE_BLOCK_ROWS = 1024
"""Number of candidates per block. The cosines between a block and all candidates are in memory."""


@cache
def everyday_words() -> tuple[str, ...]:
    """Return about 2,200 everyday words for objects in photos.

    The words help to detect images outside all classes. The list was written for vilu and has the
    MIT licence.
    """
    package = resources.files("vilu")
    file = package.joinpath("assets", "everyday_words.txt")
    text = file.read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


def embed_class_names(
    backbone: Backbone, names: Sequence[str], templates: Sequence[str] = TEMPLATES["default"]
) -> Tensor:
    """Return unit-norm embeddings (K, D) float32 for K classes.

    A class embedding is the normalised mean over all templates: prompt ensembling in embedding
    space (Radford et al., ICML 2021). A warning reports class pairs with nearly equal embeddings.

    Args:
        backbone: Encoder for the prompts.
        names: K class names. Equal names have exactly the same embedding.
        templates: Prompt templates, each with a single ``{}`` for the name.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    text = embed_names(backbone, names, templates)
    _warn_of_near_duplicates(text, names)
    return text


def embed_names(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return embeddings (K, D) like ``embed_class_names``, without warning about similar rows.

    This function is for words that are not candidates. Among such words, similar ones do no harm.
    """
    mean_over_templates = embed_prompts(backbone, names, templates).mean(dim=1)
    return functional.normalize(mean_over_templates, dim=-1)


def embed_prompts(backbone: Backbone, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return unit-norm embeddings (K, P, D) float32 for K classes in P prompt templates."""
    if not names:
        raise DataError("at least one class name is needed. Got none.")
    check_class_names(names, n_candidates=len(names))
    _check_templates(templates)
    # Each name is encoded once. Otherwise equal names in different batches could get differently
    # rounded embeddings.
    distinct_names = tuple(dict.fromkeys(names))
    # ``encode_prompts`` also looks into the user's cache
    encode = backbone.encode_prompts if isinstance(backbone, DualEncoder) else backbone.encode_texts
    prompts = fill_templates(distinct_names, templates)
    prompt_rows = encode(prompts)
    rows = prompt_rows.view(len(distinct_names), len(templates), -1)
    if len(distinct_names) == len(names):
        return rows
    row_of_name = {name: row for row, name in enumerate(distinct_names)}
    row_indices = [row_of_name[name] for name in names]
    return rows[row_indices]


def _check_templates(templates: Sequence[str]) -> None:
    """Raise UsageError if a template does not have exactly one ``{}`` for a name."""
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
    """Return prompts for every name in every template. A name's prompts are consecutive."""
    prompts: list[str] = []
    for name in names:
        prompts += [template.replace("{}", name) for template in templates]
    return prompts


def prompts_with_two_articles(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the prompts with two articles: in the template and at the name's beginning.

    A model has seen few texts such as "a photo of a a textile with a hole.", so answers suffer.

    Examples:
        >>> from vilu.backbones.zeroshot import prompts_with_two_articles
        >>> prompts_with_two_articles(["a shoe", "coat"], ["a photo of a {}."])
        ['a photo of a a shoe.']
        >>> prompts_with_two_articles(["a shoe", "coat"], ["a photo of {}."])
        []
    """
    names_with_article: list[str] = []
    for name in names:
        first_words = name.split()[:1]
        if _is_determiner(first_words):
            names_with_article.append(name)
    prompts: list[str] = []
    for template in templates:
        text_before_name, _, _ = template.partition("{}")
        last_words = text_before_name.split()[-1:]  # one word, or none before the name
        if _is_determiner(last_words):
            prompts += fill_templates(names_with_article, [template])
    return prompts


def _is_determiner(words: Sequence[str]) -> bool:
    """Return whether ``words`` is a single word, and this word is a determiner such as "a"."""
    return len(words) == 1 and words[0].lower() in DETERMINERS


def describe_prompts(names: Sequence[str], templates: Sequence[str]) -> str:
    """Describe the templates for people, with a warning about prompts with two articles."""
    first_templates = ", ".join(repr(template) for template in templates[:MAX_SHOWN_TEMPLATES])
    n_more_templates = len(templates) - MAX_SHOWN_TEMPLATES
    and_more = f" and {n_more_templates} more" if n_more_templates > 0 else ""
    sentences = [f"Prompts: {first_templates}{and_more}."]
    clumsy_prompts = prompts_with_two_articles(names, templates)
    if clumsy_prompts:
        n_more_clumsy = len(clumsy_prompts) - 1
        and_so_do = f", and so do {n_more_clumsy} more" if n_more_clumsy > 0 else ""
        sentences.append(
            f"Warning: {clumsy_prompts[0]!r} has two articles{and_so_do}. Leave them out of the "
            "class names, or give another --template, such as 'a photo of {}.'"
        )
    return " ".join(sentences)


def expand_template_names(names_or_templates: Sequence[str]) -> tuple[str, ...]:
    """Replace each set name in ``TEMPLATES`` by the set's templates.

    Every other text is a template, and stays.
    """
    templates: list[str] = []
    for text in names_or_templates:
        templates += TEMPLATES.get(text, (text,))
    return tuple(templates)


def _warn_of_near_duplicates(text: Tensor, names: Sequence[str]) -> None:
    """Warn about class pairs with nearly equal embeddings."""
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(text), COSINE_BLOCK_ROWS):
        block = text[start : start + COSINE_BLOCK_ROWS]
        cosines = block @ text[start:].T  # rows and columns both count from ``start``
        # only cosines above the diagonal, so that each pair is reported once
        is_near = cosines.triu(diagonal=1) > NEAR_DUPLICATE_COSINE
        near_pairs = torch.nonzero(is_near)
        for i, j in near_pairs.tolist():
            first = names[start + i]
            second = names[start + j]
            if first != second:  # classes with equal names are one answer
                pairs.append((first, second))
    if pairs:
        first, second = pairs[0]
        warn_caller(
            "the model can hardly tell some classes apart, since their text embeddings have a "
            f"cosine above {NEAR_DUPLICATE_COSINE}: {plural(len(pairs), 'pair')}, the first is "
            f"{first!r} and {second!r}. Reword or merge them."
        )
