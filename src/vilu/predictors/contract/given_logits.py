"""Checks whether a method or a fitted predictor works on given logits, or on a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vilu.embeddings.columns import DataKind
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors.contract.seen import candidates_agree, describe_candidates
from vilu.registry import METHODS, METHODS_OF_TABLES


def require_inputs(method_class: type[Any], data: EmbeddingSource) -> None:
    """Refuse rows with given logits that lack an input of the method.

    Args:
        method_class: A subclass of ``FailurePredictor``.
        data: Rows with given logits.

    Raises:
        DataError: If the method needs candidate embeddings, or row vectors that ``data`` lacks.
    """
    looks_at = inputs_of(method_class)
    if not looks_at:
        methods_on_logits = _methods_on_logits()
        methods_on_vectors = _methods_on_vectors()
        raise DataError(
            f"{method_class.name} needs embeddings of the candidates (texts), and these rows have "
            f"given logits without texts. These methods need logits alone: {methods_on_logits}. "
            f"These need features of the rows, too: {methods_on_vectors}. Take one of them, or "
            "give vilu.Embeddings(image, text)."
        )
    if "image" in looks_at and not data.has_vectors:
        methods_on_logits = _methods_on_logits()
        raise DataError(
            f"{method_class.name} needs a vector of every row, and these rows have logits alone. "
            "Give vilu.Embeddings.from_logits(logits, features), or `vilu import --features FILE`. "
            f"These methods need logits alone: {methods_on_logits}."
        )


def refuse_unlabelled(method_name: str, train: EmbeddingSource) -> None:
    """Refuse rows without labels if the logits of the training rows were given.

    Methods learn from unlabelled rows through class texts, and given logits have no texts.
    """
    if train.has_texts:
        return
    raise UsageError(
        f"{method_name} learns from rows without labels by the embeddings of the candidates "
        "(texts), and these rows have given logits without texts. Leave the unlabelled rows out."
    )


def inputs_of(method_class: type[Any]) -> frozenset[str]:
    """Return the inputs ``looks_at`` if the class itself defines them, or else an empty set.

    Inherited inputs do not count, since they may be wrong for the subclass.
    """
    inputs: frozenset[str] = vars(method_class).get("looks_at", frozenset())
    return inputs


def _methods_on_logits() -> str:
    """List the methods that need only logits, for a message."""
    names = []
    for name in METHODS.names():
        if inputs_of(METHODS[name]) == {"logits"}:
            names.append(name)
    return ", ".join(names)


def _methods_on_vectors() -> str:
    """List the methods that need vectors of the rows but no texts, for a message."""
    names = []
    for name in METHODS.names():
        if "image" in inputs_of(METHODS[name]):
            names.append(name)
    return ", ".join(names)


def require_same_logits(
    method_name: str, fit_notes: Mapping[str, Any], data: EmbeddingSource
) -> None:
    """Refuse data with given logits after a fit to embeddings, and the reverse.

    Data are also refused if both have given logits, but for different classes. A candidate without
    an embedding is identified only by position, so the classes must be in the order of the fit.

    Args:
        method_name: Name of the fitted method.
        fit_notes: The fit's notes, including the description by ``describe_candidates``.
        data: The rows to score.

    Raises:
        ProvenanceError: If only the fit or only ``data`` has given logits, or if both have given
            logits for different classes.
    """
    fitted_on_logits = is_of_given_logits(fit_notes)
    has_logits = not data.has_texts
    if not fitted_on_logits and not has_logits:
        return
    candidates = describe_candidates(data)
    if fitted_on_logits and has_logits and candidates_agree(fit_notes, candidates):
        return
    raise ProvenanceError(
        f"this {method_name} was fitted on {_candidates_in_words(fit_notes)}, and these rows have "
        f"{_candidates_in_words(candidates)}. Without embeddings of the candidates a class is "
        "identified by its position alone: give the same classes in the same order, or fit on rows "
        "like these."
    )


def is_of_given_logits(candidates: Mapping[str, Any]) -> bool:
    """Return whether a description by ``describe_candidates`` is about given logits.

    The sketch of the texts is then empty.
    """
    return bool(candidates.get("texts") == [])


def _candidates_in_words(candidates: Mapping[str, Any]) -> str:
    """Return a phrase for a message, such as "given logits of 10 candidates (no names)"."""
    kind = "embeddings of texts"
    if is_of_given_logits(candidates):
        kind = "given logits"
    names = "no names"
    if "classes" in candidates:
        names_hash = candidates["classes"]
        names = f"names {names_hash[:12]}"
    return f"{kind} of {candidates.get('n_candidates', '?')} candidates ({names})"


KIND_IN_WORDS: dict[DataKind, str] = {
    "embeddings": "embeddings of images",
    "answers": "a table of answers",
}
"""Maps a source's data kind to words for a message."""


def require_kind(method_class: type[Any], data: EmbeddingSource) -> None:
    """Refuse a table if the method takes embeddings, and embeddings if the method takes tables."""
    if method_class.takes == data.data_kind:
        return
    suitable_methods = list(METHODS_OF_TABLES)
    if data.data_kind == "embeddings":
        suitable_methods = METHODS.names()
    raise UsageError(
        f"{method_class.name} takes {KIND_IN_WORDS[method_class.takes]}. "
        f"Got {KIND_IN_WORDS[data.data_kind]} instead, for which there are "
        f"{', '.join(suitable_methods)}."
    )
