"""The model card for a saved predictor, made from the predictor's description and attributes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

from vilu.backbones.catalog import named_backbones
from vilu.embeddings.columns import AnswerKind, DataKind
from vilu.embeddings.space import REDUCED_JPEGS_SUFFIX
from vilu.text import escape_unprintable

TAGS = (
    "failure-prediction",
    "uncertainty-estimation",
    "selective-classification",
    "vision-language-model",
)
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
"""Repository name on the model hub: ORG/NAME."""
MADE_WITH = "Made with vilu "
"""Text before vilu's version in a card."""
MAX_VALUE_LENGTH = 500
"""Largest number of characters in a card's value."""

SPACE_FACTS = {
    "backbone": "backbone",
    "weights": "SHA-256 of its weights",
    "preprocess": "preprocessing",
    "tokenizer": "tokenizer",
    "precision": "arithmetic",
    "embed_dim": "width D",
    "logit_scale": "logit scale",
    "logit_bias": "logit bias",
}
"""Maps an embedding space key to the text before the value in the card."""
FIT_FACTS = {
    "n_train": "training rows",
    "n_failures": "failures among them",
    "start": "began from",
    "converted_from": "converted from",
    "pool_size": "pool size (captions that each image chose from)",
    "n_candidates": "classes",
    # the note ``classes`` has a hash of the names, and ``n_candidates`` has the number of classes
    "classes": "hash of the class names, in their order",
}
"""Maps a key in the fit's notes to the text before the value in the card."""
TABLE_FIT_FACTS = {
    "n_train": "training rows",
    "n_failures": "failures among them",
    "columns": "columns of numbers",  # the note has the column names
    "n_features": "features",
    "signs": "signs (1: a higher number means more likely right)",
    "shares": "share of each column in the score",
    "chosen": "chosen by cross-validation",
}
"""Maps a key in the notes on a table fit to the text before the value in the card."""
TABLE_USAGE_LINES = [
    "```bash",
    "pip install 'vilu[hub]'",
    "vilu pull ORG/NAME -o predictor  # where you found this card",
    "vilu score predictor answers.csv -o scores.csv",
    "```",
]
"""Lines with the commands to download a predictor for tables, and to score with the predictor."""
TABLE_LIMIT_LINES = [
    "- It says nothing about answers of another model, or scores that were made in another way.",
    "- `weights.safetensors` holds hashes of up to 16,384 identifiers of training rows, so "
    "that vilu can warn if these rows are scored.",
    "- You must state the licence.",
]
"""Lines on the limits of a predictor for tables."""
JUDGED_ANSWERS: dict[AnswerKind, str] = {
    "zero_shot": "the zero-shot answer",
    "adapted": "the adapted answer, which was learned from labels,",
    "given": "the answer given with the image",
}
"""Maps the kind of the judged answers to the noun in the card."""
GUARANTEE_FACTS = {
    "guarantee_text": "guarantee",
    "n": "calibration rows",
    "dataset": "from",
    "split": "split",
}
"""Maps a key of ``risk.json`` to the text before the value in the card."""


class DescribedPredictor(Protocol):
    """A fitted predictor with the attributes that a card describes (see ``FailurePredictor``)."""

    summary: ClassVar[str]
    reference: ClassVar[str]
    is_probability: ClassVar[bool]
    closed_set: ClassVar[bool]
    needs_fit: ClassVar[bool]
    takes: ClassVar[DataKind]
    answer: AnswerKind

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """Names of the columns used by the score, in addition to the embeddings."""


def model_card(
    description: Mapping[str, Any],
    predictor: DescribedPredictor,
    risk: Mapping[str, Any] | None = None,
) -> str:
    """Return a predictor's card as Markdown, with a header in YAML.

    ``description`` is the content of ``predictor.json``. ``risk`` is the content of ``risk.json``,
    or None without a calibration. The header is valid YAML for all names.
    """
    if predictor.takes == "answers":
        return _card_of_table_predictor(description, predictor, risk)
    return _card_of_image_predictor(description, predictor, risk)


def _card_of_image_predictor(
    description: Mapping[str, Any], predictor: DescribedPredictor, risk: Mapping[str, Any] | None
) -> str:
    """Return the card for an image predictor."""
    space = description["space"] or {}  # None if the method was not fitted
    notes = description["notes"]
    name = description["method"]
    space_facts = fact_lines(space, SPACE_FACTS) or ["- unknown: it was made from bare arrays"]
    seed_lines = fact_lines(description["parameters"], {"seed": "seed"})
    sections = [
        yaml_header(space.get("backbone"), name),
        f"# {name}, a failure predictor",
        f"For every image it says how likely {JUDGED_ANSWERS[predictor.answer]} is wrong (higher = "
        "more likely wrong), from the embeddings of the frozen model below alone. "
        f"{MADE_WITH}{code_span(description['vilu'])}.",
        method_paragraph(name, predictor),
        section("Embedding space", space_facts),
        section("Fit", [*fit_lines(notes, predictor), *seed_lines]),
        section("Hyper-parameters", parameter_lines(description["parameters"])),
        section("Guarantee", guarantee_lines(risk)),
        section("Use", usage_lines(space, notes, predictor)),
        section("Limits", limit_lines(notes, predictor, risk)),
        f"Fingerprint {code_span(description.get('fingerprint', 'none'))}.",
    ]
    return "\n\n".join(sections) + "\n"


def _card_of_table_predictor(
    description: Mapping[str, Any], predictor: DescribedPredictor, risk: Mapping[str, Any] | None
) -> str:
    """Return the card for a predictor that scores tables of answers."""
    notes = description["notes"]
    name = description["method"]
    fit_facts = fact_lines(notes, TABLE_FIT_FACTS) or ["- nothing is learned"]
    seed_lines = fact_lines(description["parameters"], {"seed": "seed"})
    sections = [
        yaml_header(None, name),
        f"# {name}, a failure predictor",
        "For every answer in a table it says how likely the answer is wrong (higher = more likely "
        f"wrong), from the columns of numbers. {MADE_WITH}{code_span(description['vilu'])}.",
        method_paragraph(name, predictor),
        section("Fit", [*fit_facts, *seed_lines]),
        section("Hyper-parameters", parameter_lines(description["parameters"])),
        section("Guarantee", guarantee_lines(risk)),
        section("Use", TABLE_USAGE_LINES),
        section("Limits", TABLE_LIMIT_LINES),
        f"Fingerprint {code_span(description.get('fingerprint', 'none'))}.",
    ]
    return "\n\n".join(sections) + "\n"


def method_paragraph(name: str, predictor: DescribedPredictor) -> str:
    """Return the method's name, summary and reference."""
    summary = escaped_text(predictor.summary)
    reference = escaped_text(predictor.reference)
    return f"**Method.** {code_span(name)}: {summary}. Reference: {reference}."


def parameter_lines(parameters: Mapping[str, Any]) -> list[str]:
    """Return a line for every parameter except the seed, which is in the section on the fit."""
    lines = []
    for name, value in parameters.items():
        if name != "seed":
            line = f"- {code_span(name)}: {code_span(value)}"
            lines.append(line)
    return lines or ["- none"]


def yaml_header(backbone: str | None, method: str) -> str:
    """Return a card's YAML header. The values are JSON in ASCII, and therefore valid YAML."""
    fields = {
        "library_name": "vilu",
        "license": "unknown",
        "tags": [*TAGS, method],
        "base_model": hub_id(backbone),
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def hub_id(backbone: str | None) -> str | None:
    """Return a backbone's ORG/NAME on the model hub, or None if the name is not known."""
    spec = backbone or ""
    # a named backbone has a repository for OpenCLIP, and another one for transformers (@hf)
    models = named_backbones()
    for name, model in models.items():
        if spec in {name, f"open_clip:{model.open_clip}"}:
            return model.open_clip_hub
        if spec == f"{name}@hf":
            return model.hf
    for prefix in ("hf:", "open_clip:hf-hub:"):
        without_prefix = spec.removeprefix(prefix)
        has_prefix = without_prefix != spec
        if has_prefix and HUB_ID.fullmatch(without_prefix):
            return without_prefix
    return None


def fit_lines(notes: Mapping[str, Any], predictor: DescribedPredictor) -> list[str]:
    """Return lines on the rows, the failures and the candidates that the fit used."""
    if not predictor.needs_fit:
        return ["- nothing is learned from labels", *fact_lines(notes, FIT_FACTS)]
    lines = fact_lines(notes, FIT_FACTS)
    n_rows = notes.get("n_train")
    n_failures = notes.get("n_failures")
    are_known = isinstance(n_rows, int) and isinstance(n_failures, int)
    if are_known and n_rows:
        lines.append(f"- error rate of the frozen model on these rows: {n_failures / n_rows:.2%}")
    return lines or ["- training rows: unknown"]


def guarantee_lines(risk: Mapping[str, Any] | None) -> list[str]:
    """Return lines on a calibration's guarantee. Without a calibration, ``risk`` is None."""
    if risk is None:
        return [
            "- none: `vilu calibrate` was not run on this predictor, so no threshold comes with it"
        ]
    if risk.get("guarantee_text") is None:
        return ["- none: only the probabilities are calibrated", *fact_lines(risk, GUARANTEE_FACTS)]
    return [
        *fact_lines(risk, GUARANTEE_FACTS),
        "- it holds for rows that are drawn as the calibration rows were, and for no others",
    ]


def usage_lines(
    space: Mapping[str, Any], notes: Mapping[str, Any], predictor: DescribedPredictor
) -> list[str]:
    """Return lines with the commands to download the predictor, and to score images."""
    backbone = space.get("backbone") or "BACKBONE"
    printable_backbone = escape_unprintable(backbone)
    options = ["--backbone", shlex.quote(printable_backbone)]
    if space.get("precision") == "bf16":
        options += ["--precision", "bf16"]
    preprocess = space.get("preprocess")
    if preprocess and not str(preprocess).endswith(REDUCED_JPEGS_SUFFIX):
        options.append("--full-decode")  # the fit's JPEGs were decoded in full
    if "features" in predictor.columns_to_score:
        options.append("--features")
    pool_option = ""
    if isinstance(notes.get("pool_size"), int):
        pool_option = f" --pool-size {notes['pool_size']}"
    return [
        "```bash",
        "pip install 'vilu[hub]'",
        "vilu pull ORG/NAME -o predictor  # where you found this card",
        f"vilu embed IMAGES -o store {' '.join(options)}",
        f"vilu score predictor store -o scores.parquet{pool_option}",
        "```",
        "",
        'In Python: `vilu.load("predictor").predict_uncertainty(vilu.open_source("store"))`.',
    ]


def limit_lines(
    notes: Mapping[str, Any], predictor: DescribedPredictor, risk: Mapping[str, Any] | None
) -> list[str]:
    """Return sentences on the predictor's limits."""
    sentences = [
        "It says nothing about other backbones, weights, preprocessing or logit scales; "
        "vilu refuses them."
    ]
    if not predictor.is_probability:
        sentences.append("Its score orders answers; it is no probability.")
    else:
        calibration_sentence = "It was not calibrated on rows of its own (`vilu calibrate`)."
        if risk:
            calibration_sentence = "It was calibrated, see above."
        sentences.append(
            "Its score estimates P(failure) for images like those of the fit. "
            f"{calibration_sentence}"
        )
    if predictor.closed_set:
        sentences.append("It scores the classes that it was fitted on and no others.")
    columns = ", ".join(code_span(name) for name in predictor.columns_to_score)
    if columns:
        sentences.append(f"It looks at {columns} beside the embeddings.")
    if isinstance(notes.get("pool_size"), int):
        sentences.append(
            "Failures depend on the pool size: numbers at different pool sizes are not comparable."
        )
    if predictor.needs_fit:
        sentences.append(
            "`weights.safetensors` holds hashes of up to 16,384 identifiers of training rows, "
            "so that vilu can warn if these rows are scored."
        )
    sentences.append(
        "You must state the licence; those of the backbone and of the images may restrict it."
    )
    return [f"- {sentence}" for sentence in sentences]


def section(title: str, lines: Iterable[str]) -> str:
    """Return a heading, with the section's ``lines``."""
    return f"## {title}\n\n" + "\n".join(lines)


def fact_lines(values: Mapping[str, Any], texts: Mapping[str, str]) -> list[str]:
    """Return a line "- TEXT: VALUE" for every key in ``texts`` with a value in ``values``."""
    lines = []
    for key, text in texts.items():
        value = values.get(key)
        if value is not None:
            line = f"- {text}: {code_span(value)}"
            lines.append(line)
    return lines


def without_version_of_vilu(card: bytes) -> bytes:
    """Remove vilu's version from a card, to compare two cards for the same predictor."""
    version_pattern = MADE_WITH.encode() + rb"`[^`\n]*`"
    return re.sub(version_pattern, b"", card, count=1)


def code_span(value: object) -> str:
    """Return a text as a Markdown code span on a single line. Other values become JSON first."""
    if not isinstance(value, str):
        value = json.dumps(value)
    text = escape_unprintable(value)
    if len(text) > MAX_VALUE_LENGTH:
        text = f"{text[:MAX_VALUE_LENGTH]} ..."
    # the fence must be longer than any run of backticks in the text
    longest_run = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest_run + 1)
    is_blank = not text.strip()
    needs_spaces = is_blank or text[0] in "` " or text[-1] in "` "
    if needs_spaces:
        # the two spaces separate the text from the fence, and Markdown does not show the spaces
        return f"{fence} {text} {fence}"
    return f"{fence}{text}{fence}"


def escaped_text(text: str) -> str:
    """Escape all characters in ``text`` that have a meaning in Markdown."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)
