"""What else the model could have answered."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from vilu.errors import ProvenanceError, UsageError
from vilu.outcome_columns import UNKNOWN
from vilu.outcomes import Outcomes
from vilu.types import EmbeddingSource

SHOWN = 3
BATCH = 256


def competitors(outcomes: Outcomes, rows: Iterable[int], source: EmbeddingSource) -> dict[int, list[tuple[str, float]]]:
    """The likeliest classes of some rows, with softmax probabilities of the zero-shot logits.

    Rows that the source does not have are left out.

    Raises:
        UsageError: If the source has captions in place of classes.
        ProvenanceError: If it is not what the scores were made from: other classes or answers.
    """
    names, ids, said = outcomes.class_names, outcomes.ids, outcomes.prediction
    if source.class_names is None or names is None or ids is None or said is None:
        raise UsageError("competitors need classes with names, in the scores and in the embeddings. Leave --store out.")
    if tuple(source.class_names) != tuple(names):
        raise ProvenanceError("the store has other classes than the scores. Give the store that was scored.")
    place = {key: position for position, key in enumerate(source.ids)}
    wanted = {place[ids[row]]: row for row in map(int, rows) if ids[row] in place}
    found: dict[int, list[tuple[str, float]]] = {}
    for batch in source.batches(BATCH, rows=torch.tensor(sorted(wanted), dtype=torch.int64)):
        probability = batch.logits.double().softmax(dim=1).numpy()
        for position, answer, p in zip(batch.index.tolist(), batch.prediction.tolist(), probability, strict=True):
            row = wanted[position]
            if said[row] not in {UNKNOWN, answer}:
                raise ProvenanceError(
                    f"the store answers {names[answer]!r} where the scores say {names[said[row]]!r} ({ids[row]!r}). "
                    "Give the store that was scored."
                )
            best = np.argsort(-p, kind="stable")[:SHOWN]
            found[row] = [(names[k], float(p[k])) for k in best]
    return found
