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

    u = sum_ij p_i p_j (1 - t_i · t_j), in [0, 1]

    Two answers drawn from the posterior p have this mean distance. A model that hesitates between
    two names of one thing gets a low uncertainty, and a model that hesitates between two things
    gets a high one. Shannon's entropy treats both cases alike. Texts t have unit norm, so
    u = 1 - |sum_j p_j t_j|². This form takes K D steps, while the double sum takes K² D.

    Source: Rao, "Diversity and dissimilarity coefficients", Theoretical Population Biology, 1982.

    Examples:
        The first image lies between two texts at right angles. The second image lies between two
        texts that are almost equal.

        >>> import torch, vilu
        >>> from torch.nn.functional import normalize
        >>> text = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.96, 0.28]])
        >>> image = normalize(torch.tensor([[2.0, 2.0, -1.0], [0.0, 7.0, 1.0]]))
        >>> data = vilu.Embeddings(image=image, text=text, logit_scale=50.0)
        >>> QuadraticEntropy().predict_uncertainty(data).round(2)
        array([0.5 , 0.02])
    """

    name: ClassVar[str] = "quadratic_entropy"
    summary: ClassVar[str] = "mean distance of two answers drawn from the zero-shot posterior"
    reference: ClassVar[str] = "Rao, 1982"
    # `vilu export` can write `_score` as a graph, because it branches on no values and no sizes.
    graph = own_graph

    def _score(self, batch: vilu.Batch) -> Tensor:
        """Compute the uncertainty (B,) from logits (B, K) and texts (K, D)."""
        probability = batch.logits.double().softmax(dim=-1)
        mean_text = probability @ batch.text.double()
        return 1 - mean_text.square().sum(dim=-1)
