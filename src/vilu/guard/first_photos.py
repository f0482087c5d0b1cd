"""Compare the first photos of a guard in a low precision with float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vilu.errors import ProvenanceError
from vilu.store.manifest import IMAGE
from vilu.store.parts import PartContent
from vilu.store.pipeline import END_OF_PART, Encoder, ImageOrError
from vilu.store.precision import N_CHECKED_PHOTOS, PrecisionCheck

logger = logging.getLogger(__name__)


class AnswerWithDecision(Protocol):
    """An answer with a decision, like ``vilu.guard.guard.Answer``."""

    @property
    def label(self) -> str | None:
        """The answer. None if the photo has no answer."""

    @property
    def decision(self) -> str | None:
        """The decision. None without a rule."""


@dataclass(frozen=True)
class PhotoPair:
    """A photo in both precisions."""

    cosine: float  # cosine similarity of the two embeddings
    is_answer_equal: bool  # whether both precisions give the same answer
    is_decision_equal: bool  # whether both precisions give the same decision


@dataclass
class FirstPhotos:
    """Compares a guard's first photos in a low precision with the same photos in float32.

    Attributes:
        precision: The low precision.
        encoder: The same model's encoder in float32.
        answer_photos: Function that gives the answers about embedded photos.
        must_pass: Whether too large differences between the two precisions raise ProvenanceError.
            If False, a warning is logged. A service needs False, because a client's photos must not
            stop the service.
        check: The comparison's result. None until ``N_CHECKED_PHOTOS`` photos were seen.
    """

    precision: str
    encoder: Encoder
    answer_photos: Callable[[PartContent], Sequence[AnswerWithDecision]]
    must_pass: bool = True
    check: PrecisionCheck | None = None
    _pairs: list[PhotoPair] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)  # several threads may use a guard at once

    def compare(
        self, batch: Sequence[ImageOrError | None], low_precision_content: PartContent
    ) -> None:
        """Compare a batch's photos in both precisions, until enough photos were compared.

        Args:
            batch: The decoded photos.
            low_precision_content: The same photos, embedded in the low precision.

        Raises:
            ProvenanceError: If the precisions differ too much on the first photos, and
                ``must_pass`` is True.
        """
        with self._lock:
            if self.check is None:
                self._add_pairs(batch, low_precision_content)
            if self.check is None:
                return
            if self.must_pass and not self.check.is_passed:
                raise ProvenanceError(self.check.failure)

    def _add_pairs(
        self, batch: Sequence[ImageOrError | None], low_precision_content: PartContent
    ) -> None:
        """Compare a batch's photos. Set ``check`` once enough photos were compared."""
        float32_content = self.encoder.encode_part(iter([*batch, END_OF_PART]))
        float32_photos = self._photos_by_position(float32_content)
        low_precision_photos = self._photos_by_position(low_precision_content)
        for position, (embedding, answer) in low_precision_photos.items():
            if position not in float32_photos:  # no valid embedding in float32
                continue
            float32_embedding, float32_answer = float32_photos[position]
            cosine = cosine_similarity(embedding, float32_embedding, dim=0)
            pair = PhotoPair(
                cosine=float(cosine),
                is_answer_equal=answer.label == float32_answer.label,
                is_decision_equal=answer.decision == float32_answer.decision,
            )
            self._pairs.append(pair)
        if len(self._pairs) >= N_CHECKED_PHOTOS:
            self._set_check()

    def _photos_by_position(
        self, content: PartContent
    ) -> dict[int, tuple[Tensor, AnswerWithDecision]]:
        """Map every embedded photo's position to the embedding (D,) and the answer."""
        if not content.metadata:
            return {}
        embeddings = torch.cat(content.array_blocks[IMAGE]).float()
        answers = self.answer_photos(content)
        positions = [metadata.position for metadata in content.metadata]
        photos = zip(embeddings, answers, strict=True)
        return dict(zip(positions, photos, strict=True))

    def _set_check(self) -> None:
        """Compare the two precisions over all first photos, and log the result."""
        n = len(self._pairs)
        n_equal_answers = sum(pair.is_answer_equal for pair in self._pairs)
        n_equal_decisions = sum(pair.is_decision_equal for pair in self._pairs)
        self.check = PrecisionCheck(
            precision=self.precision,
            n=n,
            least_cosine=min(pair.cosine for pair in self._pairs),
            equal_answers=n_equal_answers / n,
            equal_decisions=n_equal_decisions / n,
        )
        if self.check.is_passed:
            logger.info("%s", self.check)
        else:
            logger.warning("%s", self.check.failure)
