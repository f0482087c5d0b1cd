"""The embedding space. Embeddings can be compared only if their spaces match."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Final

from vilu.artifacts.hashing import digest
from vilu.errors import ProvenanceError, UsageError
from vilu.validation import checked_fields, require_at_least

LOGARITHM_RANGE = (4.0, 5.0)
"""A logit scale between these numbers is an error: probably it is the logarithm of a scale.

A model's learned parameter is the logarithm. Released models have scales from 50 to 150: CLIP
100 (logarithm 4.605), SigLIP 112 to 118 (logarithms 4.72 to 4.77). No model has a scale from 4
to 5, because such a scale would make the probabilities of 1,000 classes nearly equal.
"""

REDUCED_JPEGS_SUFFIX: Final = (
    "; JPEGs decoded at 1/2, 1/4 or 1/8, but no smaller than twice this size"
)
"""Last words in the description of a preprocessing that decodes JPEGs at a reduced size."""

FULL_DECODE_ADVICE: Final = (
    "Only one of them decodes JPEGs at a reduced size, which is the default now. Give "
    "--full-decode (in Python full_decode=True) to decode in full as before, or embed the other "
    "one again."
)
"""Advice for two spaces that differ only by the size of decoded JPEGs."""

PROVENANCE_FIELDS = ("backbone", "weights", "preprocess", "tokenizer")
"""Attributes to compare only if something is known about the models of both spaces.

The precision is not compared. If the precision is not float32, `vilu embed` has compared the
embeddings with float32 embeddings (``vilu.store.precision``).
"""


@checked_fields
@dataclass(frozen=True)
class EmbeddingSpace:
    """Identity of a dual encoder's joint space, and the affine map from cosine to logit.

    The zero-shot logit of image v and text t is ``logit_scale * cos(v, t) + logit_bias``.

    Attributes:
        embed_dim: Width D of the joint space. 0 for rows with logits and without vectors
            (``vilu.Embeddings.from_logits``).
        logit_scale: Multiplier of the cosine: the exponential of the learned parameter, 100 for
            OpenAI's CLIP. A number between 4 and 5 is an error, because it is probably the
            parameter itself.
        logit_bias: Added to every logit (SigLIP). The bias cancels in a softmax, but is part of the
            model.
        backbone: Name of the backbone, as given to ``--backbone``. None for bare arrays.
        weights: SHA-256 of the weights.
        preprocess: A description of the image preprocessing.
        tokenizer: A description of the tokenizer.
        precision: The encoders' arithmetic ("fp32", "bf16", ...).

    Examples:
        >>> import vilu
        >>> clip = vilu.EmbeddingSpace(embed_dim=512, logit_scale=100.0, backbone="clip-vit-b32")
        >>> # the model of bare arrays is not known
        >>> bare = vilu.EmbeddingSpace(embed_dim=512, logit_scale=100.0)
        >>> clip.anonymous, bare.anonymous
        (False, True)
        >>> # no error: width and logit scale match, and nothing else is known of the arrays
        >>> clip.require_match(bare, name="the predictor", other_name="the arrays")
    """

    embed_dim: int
    logit_scale: float
    logit_bias: float = 0.0
    backbone: str | None = None
    weights: str | None = None
    preprocess: str | None = None
    tokenizer: str | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        require_at_least("embed_dim", self.embed_dim, 0)
        is_valid_scale = math.isfinite(self.logit_scale) and self.logit_scale > 0
        if not is_valid_scale:
            raise UsageError(
                f"logit_scale must be a positive finite number. Got {self.logit_scale} instead."
            )
        smallest, largest = LOGARITHM_RANGE
        if smallest < self.logit_scale < largest:
            multiplier = math.exp(self.logit_scale)
            raise UsageError(
                f"logit_scale must be the multiplier of the cosine. Got {self.logit_scale:g}, "
                "which is probably its logarithm, the parameter of the model. Give its "
                f"exponential: logit_scale={multiplier:.6g}."
            )
        if not math.isfinite(self.logit_bias):
            raise UsageError(f"logit_bias must be finite. Got {self.logit_bias} instead.")

    @property
    def anonymous(self) -> bool:
        """Whether nothing is known about the embedding model."""
        return self.backbone is None and self.weights is None

    @property
    def fingerprint(self) -> str:
        """Hash over all attributes."""
        return digest(asdict(self))

    @property
    def reduces_jpegs(self) -> bool:
        """Whether the preprocessing decodes JPEGs at a reduced size."""
        return self.preprocess is not None and self.preprocess.endswith(REDUCED_JPEGS_SUFFIX)

    @property
    def with_full_jpegs(self) -> EmbeddingSpace:
        """The same model's space with JPEGs decoded in full."""
        if self.preprocess is None:
            return self
        full_preprocess = self.preprocess.removesuffix(REDUCED_JPEGS_SUFFIX)
        return replace(self, preprocess=full_preprocess)

    @property
    def with_reduced_jpegs(self) -> EmbeddingSpace:
        """The same model's space with JPEGs decoded at a reduced size."""
        full_space = self.with_full_jpegs
        full_preprocess = full_space.preprocess or ""
        return replace(full_space, preprocess=full_preprocess + REDUCED_JPEGS_SUFFIX)

    def differs_by_decoding(self, other: EmbeddingSpace) -> bool:
        """Return whether two spaces differ only by the size of decoded JPEGs."""
        own_model = replace(self.with_full_jpegs, precision=None)
        other_model = replace(other.with_full_jpegs, precision=None)
        is_same_model = own_model == other_model
        return is_same_model and self.reduces_jpegs != other.reduces_jpegs

    def require_match(self, other: EmbeddingSpace, *, name: str, other_name: str) -> None:
        """Raise ProvenanceError if the spaces differ. The message names every difference.

        For bare arrays only width, logit scale and logit bias are compared, because nothing is
        known about the model. An attribute is not compared if it is None in one of the spaces.

        Examples:
            >>> import vilu
            >>> from vilu.errors import ProvenanceError
            >>> clip = vilu.EmbeddingSpace(embed_dim=512, logit_scale=100.0)
            >>> siglip = vilu.EmbeddingSpace(embed_dim=512, logit_scale=112.0, logit_bias=-16.5)
            >>> try:
            ...     clip.require_match(siglip, name="store", other_name="query")
            ... except ProvenanceError as error:
            ...     print("logit_scale: 100.0 (store) against 112.0 (query)" in str(error))
            True
        """
        fields = ["embed_dim", "logit_scale", "logit_bias"]
        if not (self.anonymous or other.anonymous):
            fields += PROVENANCE_FIELDS
        differences = []
        for field in fields:
            own_value = getattr(self, field)
            other_value = getattr(other, field)
            if own_value is None or other_value is None:
                continue  # at least one space does not know the attribute
            if own_value != other_value:
                differences.append(
                    f"{field}: {own_value!r} ({name}) against {other_value!r} ({other_name})"
                )
        if differences:
            advice = "Embed both with the same backbone, weights and preprocessing."
            if self.differs_by_decoding(other):
                advice = FULL_DECODE_ADVICE
            listing = "; ".join(differences)
            raise ProvenanceError(
                f"{name} and {other_name} come from different embedding spaces: {listing}. {advice}"
            )
