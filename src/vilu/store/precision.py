"""Compare embeddings in a low precision with embeddings in float32, on the user's own photos."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from vilu.backbones.base import Backbone, DualEncoder
from vilu.backbones.zeroshot import embed_names
from vilu.errors import ProvenanceError
from vilu.store.manifest import Run

N_CHECKED_PHOTOS: Final = 64
"""Number of photos embedded in both precisions."""

MIN_COSINE: Final = 0.995
"""A check is passed only if the two embeddings of every photo have at least this cosine."""

MIN_EQUAL_ANSWERS: Final = 0.98
"""A check is passed only if at least this share of photos has equal answers."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrecisionCheck:
    """Differences between embeddings in a low precision and embeddings in float32.

    Attributes:
        precision: The low precision.
        n: Number of photos.
        least_cosine: Cosine between a photo's two embeddings, for the photo where it is smallest.
        equal_answers: Share of photos with equal answers by the predictor. Without a predictor, the
            zero-shot answers are compared. None if there are captions and no classes.
        equal_decisions: Share of photos with equal decisions. None without a predictor.
        speedup: The image tower's processor time in float32, divided by the time in the low
            precision. None if the time was not measured.
    """

    precision: str
    n: int
    least_cosine: float
    equal_answers: float | None
    equal_decisions: float | None = None
    speedup: float | None = None

    @property
    def is_passed(self) -> bool:
        """Whether embeddings and answers are near enough to those in float32."""
        are_embeddings_near = self.least_cosine >= MIN_COSINE
        are_answers_equal = self.equal_answers is None or self.equal_answers >= MIN_EQUAL_ANSWERS
        return are_embeddings_near and are_answers_equal

    @property
    def failure(self) -> str:
        """The message if the check is not passed."""
        return (
            f"{self}. Needed are a cosine of {MIN_COSINE} and {MIN_EQUAL_ANSWERS:.0%} equal "
            "answers. Take --precision fp32 (in Python precision='fp32')."
        )

    def __str__(self) -> str:
        findings = [f"cosine at least {self.least_cosine:.5f}"]
        if self.equal_answers is not None:
            findings.append(f"{self.equal_answers:.1%} equal answers")
        if self.equal_decisions is not None:
            findings.append(f"{self.equal_decisions:.1%} equal decisions")
        if self.speedup is not None:
            findings.append(f"the image tower {self.speedup:.1f} times as fast")
        return f"{self.precision} against fp32, {self.n} photos: {', '.join(findings)}"


def check_precision(
    model: Backbone, run: Run, pixels: Iterator[Tensor], batch_size: int
) -> PrecisionCheck | None:
    """Embed the first photos (``N_CHECKED_PHOTOS``) in the model's precision and in float32.

    Returns how much the embeddings differ. ``pixels`` are the pixels (3, H, W) of each photo.

    Returns None if the model is in float32 or states no precision, if there are no photos, or if
    the model is no ``DualEncoder``. Only a ``DualEncoder`` can also run in float32.

    Raises:
        ProvenanceError: If the embeddings or the answers differ too much.
    """
    is_in_low_precision = model.space.precision not in {None, "fp32"}
    if not is_in_low_precision or not isinstance(model, DualEncoder):
        return None
    photos = list(islice(pixels, N_CHECKED_PHOTOS))
    if not photos:
        return None
    low_rows, low_seconds = _encode_and_time(model, photos, batch_size)
    float32_rows, float32_seconds = _encode_and_time(model.in_float32(), photos, batch_size)
    speedup = float32_seconds / low_seconds
    check = _compare_precisions(model, run, low_rows, float32_rows, speedup=speedup)
    logger.info("%s", check)
    if not check.is_passed:
        raise ProvenanceError(check.failure)
    return check


def _encode_and_time(
    model: DualEncoder, pixels: list[Tensor], batch_size: int
) -> tuple[Tensor, float]:
    """Return embeddings (N, D) of photos, and the model's processor time in seconds."""
    # a batch of one photo, not timed, because a model may be built at the first use
    model.encode_images(pixels[0][None])
    batches = torch.stack(pixels).split(batch_size)
    begun = time.process_time()
    rows = torch.cat([model.encode_images(batch) for batch in batches])
    # for a small model, the clock may show the same time before and after
    seconds = max(time.process_time() - begun, 1e-9)
    return rows, seconds


def _compare_precisions(
    model: DualEncoder, run: Run, low_rows: Tensor, float32_rows: Tensor, *, speedup: float
) -> PrecisionCheck:
    """Compare unit-norm embeddings (N, D) in the low precision with embeddings in float32.

    ``speedup`` becomes ``PrecisionCheck.speedup``.
    """
    equal_answers = None
    if run.names:
        text = embed_names(model, run.names, run.templates).cpu()
        low_answers = (low_rows @ text.T).argmax(dim=1)
        float32_answers = (float32_rows @ text.T).argmax(dim=1)
        equal_answers = float((low_answers == float32_answers).float().mean())
    cosines = (low_rows * float32_rows).sum(dim=1)  # the norms are 1
    least_cosine = float(cosines.min())
    return PrecisionCheck(
        precision=str(model.space.precision),
        n=len(low_rows),
        least_cosine=least_cosine,
        equal_answers=equal_answers,
        speedup=round(speedup, 2),
    )
