"""Columns: further data besides the embeddings, for methods that need such data."""

from __future__ import annotations

from typing import Literal

IMAGE_COLUMNS = {
    "features": (
        2,
        "(N, F) output of an image encoder: the VLM's own before its projection, or a second "
        "encoder's",
    ),
    "views": (3, "(N, V, D) unit-norm embeddings of V augmented views of each image"),
    "second_image": (
        2,
        "(N, E) embeddings by a second model, whose products with second_text are its logits",
    ),
}
"""Columns with one entry per image. Maps names to the number of dimensions and the meaning."""

ANSWER = "answer"
"""Name of the column (N,) int64 with another model's answers, as candidate indices.

If a source has this column, predictors judge these answers and not the zero-shot answers.
"""

DataKind = Literal["embeddings", "answers"]
"""Kind of rows in a source: image embeddings, or any model's answers with scores."""

AnswerKind = Literal["zero_shot", "adapted", "given"]
"""The answer to judge.

"zero_shot" is the zero-shot answer. "adapted" is the likeliest candidate under the method's
posterior. "given" is the answer in the data's column "answer".
"""

LOGITS = "logits"
"""Name of the column (N, K) float32 with logits computed by another classifier.

If a source has this column, the candidates have no embeddings, and the column has the rows'
logits.
"""

NUMBERS = "numbers"
"""Name of the column (N, C) float64 in an answer table: the C number columns."""

ROW_COLUMNS = frozenset({*IMAGE_COLUMNS, ANSWER, LOGITS, NUMBERS})
"""Names of all columns with one entry per row."""

UNNORMALISED_COLUMNS = frozenset({"features", "second_image", LOGITS})
"""Columns with one entry per image that are not normalised to unit norm."""

TEXT_COLUMNS = {
    "text_features": (2, "(K, F) output of the VLM's text encoder before its projection"),
    "prompts": (3, "(K, P, D) unit-norm embeddings of each candidate in P prompts"),
    "second_text": (
        2,
        "(K, E) embeddings of the candidates by a second model, times its logit scale",
    ),
}
"""Columns with one entry per candidate. Maps names to the number of dimensions and the meaning."""

MODEL_COLUMNS = {
    "image_projection": (2, "(D, F) last linear map of the VLM's image encoder"),
    "text_projection": (2, "(D, F) last linear map of the VLM's text encoder"),
    "negatives": (
        2,
        "(M, D) unit-norm embeddings of everyday words, which need not be classes",
    ),
}
"""Columns for the whole model. Maps names to the number of dimensions and the meaning."""

COLUMNS = IMAGE_COLUMNS | TEXT_COLUMNS | MODEL_COLUMNS
"""All columns but ``ANSWER``, ``LOGITS`` and ``NUMBERS``. Maps names as the three tables above."""

UNIT_NORM_COLUMNS = frozenset({"views", "prompts", "negatives"})
"""Columns to normalise to unit norm, because they are compared with the embeddings."""

SECOND_MODEL_COLUMNS = frozenset({"second_image", "second_text"})
"""Columns from a second source with the same rows (``vilu.embeddings.two_models``)."""

COLUMN_COMMANDS = {
    "features": "vilu embed --features",
    "views": "vilu embed --views 8",
    "prompts": "vilu embed --prompts ensemble",
    "negatives": "vilu embed --negatives",
    ANSWER: 'vilu import --answers FILE` or `vilu.Embeddings(..., columns={"answer": answers})',
    **dict.fromkeys(SECOND_MODEL_COLUMNS, "--second STORE"),
    **dict.fromkeys(
        ("text_features", "image_projection", "text_projection"), "vilu embed --features"
    ),
}
"""Maps a column name to the command that makes the column, or to a command and a call.

Messages put backticks around the text: "Make it with `vilu embed --features`." The text for the
answers names a command and a call. So a backtick closes the command, and another opens the call.
"""
