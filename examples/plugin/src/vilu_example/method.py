"""A failure predictor: how far apart are the answers between which the model hesitates?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import vilu
from vilu.predictors.contract.predictor import own_graph


@dataclass
class QuadraticEntropy(vilu.FailurePredictor):
    """Rao's quadratic entropy of the zero-shot posterior.

    u = sum_ij p_i p_j (1 - t_i · t_j), in [0, 1]. It is the mean distance of two answers drawn from
    the posterior. To hesitate between two names of one thing is no doubt, and between two things
    is; Shannon's entropy does not tell them apart. Texts have unit norm, so that it is 1 - |sum_j
    p_j t_j|², which takes K D steps and not K² D.

    Source: Rao, "Diversity and dissimilarity coefficients", Theoretical Population Biology, 1982.

    Examples:
        The first image lies between two texts at right angles, the second between two that are
        almost one.

        >>> import torch, vilu
        >>> text = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.96, 0.28]])
        >>> image = torch.nn.functional.normalize(torch.tensor([[2.0, 2.0, -1.0], [0.0, 7.0, 1.0]]))
        >>> data = vilu.Embeddings(image, text, logit_scale=50.0)
        >>> QuadraticEntropy().predict_uncertainty(data).round(2)
        array([0.5 , 0.02])
    """

    name: ClassVar[str] = "quadratic_entropy"
    summary: ClassVar[str] = "mean distance of two answers drawn from the zero-shot posterior"
    reference: ClassVar[str] = "Rao, 1982"
    graph = own_graph  # for `vilu export`: `_score` branches on no values and no sizes

    def _score(self, batch: vilu.Batch) -> Tensor:
        """(N,) from logits (N, K) and texts (K, D)."""
        mean = batch.logits.double().softmax(dim=-1) @ batch.text.double()
        return 1 - mean.square().sum(dim=-1)
