"""What a source of embeddings may carry beside its embeddings, for the methods that need more."""

from __future__ import annotations

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
"""One entry per image: number of dimensions and meaning."""

ANSWER = "answer"
"""(N,) int64 rows of ``text``: the answers of another model, which are judged in its place."""

OF_ROWS = frozenset({*IMAGE_COLUMNS, ANSWER})
"""Names of all columns with one entry per row."""

ANY_NORM = frozenset({"features", "second_image"})  # those of images that need not be of unit norm

TEXT_COLUMNS = {
    "text_features": (2, "(K, F) output of the VLM's text encoder before its projection"),
    "prompts": (3, "(K, P, D) unit-norm embeddings of each candidate in P prompts"),
    "second_text": (
        2,
        "(K, E) embeddings of the candidates by a second model, times its logit scale",
    ),
}
"""One entry per candidate."""

MODEL_COLUMNS = {
    "image_projection": (2, "(D, F) last linear map of the VLM's image encoder"),
    "text_projection": (2, "(D, F) last linear map of the VLM's text encoder"),
    "negatives": (
        2,
        "(M, D) unit-norm embeddings of everyday words, none of which need be a class",
    ),
}
"""Of the model as a whole."""

COLUMNS = IMAGE_COLUMNS | TEXT_COLUMNS | MODEL_COLUMNS

# those that are compared with the embeddings
UNIT_NORM = frozenset({"views", "prompts", "negatives"})

SECOND = frozenset({"second_image", "second_text"})
"""Those that a second source of the same rows brings (``vilu.embeddings.two_models``)."""

HOW = {
    "features": "vilu embed --features",
    "views": "vilu embed --views 8",
    "prompts": "vilu embed --prompts ensemble",
    "negatives": "vilu embed --negatives",
    ANSWER: 'vilu.Embeddings(..., columns={"answer": answers})',
    **dict.fromkeys(SECOND, "--second STORE"),
    **dict.fromkeys(
        ("text_features", "image_projection", "text_projection"), "vilu embed --features"
    ),
}
"""The command that makes a column."""
