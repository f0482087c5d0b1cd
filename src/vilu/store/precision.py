"""Compare embeddings in a low precision with those in float32, on the user's own photos."""

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
from vilu.backbones.zeroshot import mean_texts
from vilu.errors import ProvenanceError
from vilu.store.manifest import Run

N_CHECKED_PHOTOS: Final = 64
"""Number of photos that are embedded in both precisions."""

MIN_COSINE: Final = 0.995
"""Least cosine of the two embeddings of a photo."""

MIN_EQUAL_ANSWERS: Final = 0.98
"""Least share of photos with equal answers."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrecisionCheck:
    """How far embeddings in a low precision are from those in float32.

    Attributes:
        precision: The low precision.
        n: Number of photos.
        least_cosine: Least cosine of the two embeddings of a photo.
        equal_answers: Share of photos with equal answers; None if captions take the place of
            classes. The answers are those of the predictor. Without a predictor, they are zero-shot
            answers.
        equal_decisions: Share of photos with equal decisions; None without a predictor.
        speedup: Processor time of the image tower in float32, divided by that in this precision;
            None if it was not measured.
    """

    precision: str
    n: int
    least_cosine: float
    equal_answers: float | None
    equal_decisions: float | None = None
    speedup: float | None = None

    @property
    def is_passed(self) -> bool:
        """Whether the embeddings are near enough to those in float32."""
        are_answers_equal = self.equal_answers is None or self.equal_answers >= MIN_EQUAL_ANSWERS
        return self.least_cosine >= MIN_COSINE and are_answers_equal

    @property
    def failure(self) -> str:
        """What a message says if the check is not passed."""
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
    """Embed the first photos in the precision of the model and in float32, and compare.

    ``pixels`` (3, H, W) are those of the photos. The result is None if the model is in float32 or
    states no precision. It is also None if the model is no ``DualEncoder``: other models cannot be
    run in float32 as well.

    Raises:
        ProvenanceError: If the two differ too much.
    """
    is_low = model.space.precision not in {None, "fp32"}
    if not is_low or not isinstance(model, DualEncoder):
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
    """Embeddings (N, D) of photos, and the seconds of processor time that they took."""
    model.encode_images(pixels[0][None])  # some models are assembled at their first use
    batches = torch.stack(pixels).split(batch_size)
    begun = time.process_time()
    rows = torch.cat([model.encode_images(batch) for batch in batches])
    seconds = max(time.process_time() - begun, 1e-9)  # a clock may stand still for a small model
    return rows, seconds


def _compare_precisions(
    model: DualEncoder, run: Run, low_rows: Tensor, float32_rows: Tensor, *, speedup: float
) -> PrecisionCheck:
    """Compare unit-norm embeddings (N, D) in both precisions."""
    equal_answers = None
    if run.names:
        text = mean_texts(model, run.names, run.templates).cpu()
        low_answers = (low_rows @ text.T).argmax(dim=1)
        float32_answers = (float32_rows @ text.T).argmax(dim=1)
        equal_answers = float((low_answers == float32_answers).float().mean())
    return PrecisionCheck(
        precision=str(model.space.precision),
        n=len(low_rows),
        least_cosine=float((low_rows * float32_rows).sum(dim=1).min()),
        equal_answers=equal_answers,
        speedup=round(speedup, 2),
    )
