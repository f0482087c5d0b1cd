"""Methods that score rows by the zero-shot logits alone, without labels and without a fit.

In the docstrings:

- u is the uncertainty of a row.
- l_j is the zero-shot logit of candidate j.
- p is the softmax of the logits.
- a is the judged answer.
- K is the candidate count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.similarity import RivalWeights, float64
from vilu.embeddings.source import Batch, log_posterior
from vilu.predictors.contract.predictor import FailurePredictor, own_graph

LOGITS_ONLY = frozenset({"logits"})


@dataclass
class MCM(FailurePredictor):
    """Maximum concept matching: u = 1 - p_a, with the zero-shot probability p_a of the answer a.

    If the zero-shot answer is judged, p_a = max_j p_j.

    Source: Ming et al., NeurIPS 2022. In that paper p is the softmax of the cosines. Here and in
    ViLU p is the softmax of the logits, at the VLM's logit scale.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(4)[:3]
        >>> image = np.eye(4)[[0, 3]]  # image 0 is text 0, image 1 is orthogonal to all texts
        >>> data = vilu.Embeddings(image, text, logit_scale=np.log(2))
        >>> # p is 1/2, 1/4, 1/4 for the first image, and 1/3, 1/3, 1/3 for the second
        >>> vilu.MCM().predict_uncertainty(data).round(2)  # 1 - 1/2 and 1 - 1/3
        array([0.5 , 0.67])
    """

    name: ClassVar[str] = "mcm"
    summary: ClassVar[str] = "one minus the largest zero-shot probability (Ming et al. 2022)"
    reference: ClassVar[str] = "Ming et al., NeurIPS 2022"
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY
    is_probability: ClassVar[bool] = True

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        return batch.judged_rivals.total_probability


@dataclass
class Entropy(FailurePredictor):
    """Normalised Shannon entropy: u = -sum_j p_j log p_j / log K, in [0, 1].

    p log p is computed exactly. ViLU's released code computes p log(p + 1e-6), and so has a bias
    that depends on K.

    Source: ViLU, supplement A.3.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(4)[:3]
        >>> image = np.eye(4)[[0, 3]]  # image 0 is text 0, image 1 is orthogonal to all texts
        >>> data = vilu.Embeddings(image, text, logit_scale=np.log(2))
        >>> # p is 1/2, 1/4, 1/4 for the first image, and 1/3, 1/3, 1/3 for the second
        >>> vilu.Entropy().predict_uncertainty(data).round(2)  # 1.5 bits / log2(3), and 1
        array([0.95, 1.  ])
    """

    name: ClassVar[str] = "entropy"
    summary: ClassVar[str] = "Shannon entropy of the zero-shot posterior over log K"
    reference: ClassVar[str] = "Shannon, 1948"
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY
    depends_on_answer: ClassVar[bool] = False

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        return entropy(batch) / log_n_candidates(batch)


@dataclass
class Doctor(FailurePredictor):
    """DOCTOR, alpha form: u = (1 - g) / g with g = sum_j p_j^2.

    Let e_j = p_j / max_i p_i, s = sum e_j and q = sum e_j^2. Both sums are over all candidates
    except the likeliest candidate. Then

        u = (s * (2 + s) - q) / (1 + q)

    The difference s * (2 + s) - q loses no digits, because q <= s. The paper also perturbs the
    input. This step is left out, because the embeddings are fixed.

    Source: Granese et al., NeurIPS 2021, D_alpha.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(4)[:3]
        >>> image = np.eye(4)[[0, 3]]  # image 0 is text 0, image 1 is orthogonal to all texts
        >>> data = vilu.Embeddings(image, text, logit_scale=np.log(2))
        >>> # p is 1/2, 1/4, 1/4 for the first image, and 1/3, 1/3, 1/3 for the second
        >>> vilu.Doctor().predict_uncertainty(data).round(2)  # g is 3/8 and 1/3
        array([1.67, 2.  ])
    """

    name: ClassVar[str] = "doctor"
    summary: ClassVar[str] = "DOCTOR alpha: odds of the Gini impurity (Granese et al. 2021)"
    reference: ClassVar[str] = "Granese et al., NeurIPS 2021"
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY
    depends_on_answer: ClassVar[bool] = False

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        rivals = batch.rivals
        odds = rivals.odds  # s
        # With the two largest logits l and l', logit_gap is l' - l, and weight_j is exp(l_j - l').
        # So largest_ratio is the largest e_j, and e_j = largest_ratio * weight_j.
        largest_ratio = rivals.logit_gap.exp()
        squared_ratio = largest_ratio.square()
        squared_weights = rivals.weight.square().sum(dim=1)
        sum_of_squares = squared_ratio * float64(squared_weights)  # q
        return (odds * (2 + odds) - sum_of_squares) / (1 + sum_of_squares)


@dataclass
class MaxLogit(FailurePredictor):
    """Negative logit of the answer a: u = -l_a. For the zero-shot answer u = -max_j l_j.

    Source: Hendrycks et al., ICML 2022 (MaxLogit).

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.6, 0.8]]
        >>> text = np.eye(2)
        >>> data = vilu.Embeddings(image, text, logit_scale=10.0)
        >>> # the logits of the two rows are (10, 0) and (6, 8)
        >>> vilu.MaxLogit().predict_uncertainty(data).round(2)
        array([-10.,  -8.])
    """

    name: ClassVar[str] = "max_logit"
    summary: ClassVar[str] = "negative largest zero-shot logit (Hendrycks et al. 2022)"
    reference: ClassVar[str] = "Hendrycks et al., ICML 2022"
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        return -batch.judged_rivals.answer_logit


@dataclass
class Margin(FailurePredictor):
    """Negative gap between the answer's logit and the largest logit of a different candidate.

    u = max_(j != a) l_j - l_a

    For the zero-shot answer u is the negative gap between the two largest logits. The logit bias
    cancels. The logit scale multiplies all u, and so does not change the row order.

    Source: the score called RLog in "Know When to Abstain" (ICLR 2026).

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.6, 0.8]]
        >>> text = np.eye(2)
        >>> data = vilu.Embeddings(image, text, logit_scale=10.0)
        >>> # the logits of the two rows are (10, 0) and (6, 8)
        >>> vilu.Margin().predict_uncertainty(data).round(2)
        array([-10.,  -2.])
    """

    name: ClassVar[str] = "margin"
    summary: ClassVar[str] = "negative gap between the two largest zero-shot logits"
    reference: ClassVar[str] = '"Know When to Abstain", ICLR 2026'
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        return batch.judged_rivals.logit_gap


@dataclass
class ProbMargin(FailurePredictor):
    """One minus the gap between the two largest probabilities: u = 1 - (p_(1) - p_(2)).

    p_(1) is the answer's probability, and p_(2) is the largest probability among the remaining
    candidates. For the zero-shot answer, u is in [0, 1]. For a given answer, p_(2) may exceed
    p_(1), and u is in [0, 2].

    For confident rows, the gap p_(1) - p_(2) rounds to one. The values of u still differ, because u
    is computed as (1 - p_(1)) + p_(2).

    Source: best-versus-second-best, Joshi et al., CVPR 2009.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(4)[:3]
        >>> image = np.eye(4)[[0, 3]]  # image 0 is text 0, image 1 is orthogonal to all texts
        >>> data = vilu.Embeddings(image, text, logit_scale=np.log(2))
        >>> # p is 1/2, 1/4, 1/4 for the first image, and 1/3, 1/3, 1/3 for the second
        >>> method = vilu.PREDICTORS["prob_margin"]()
        >>> method.predict_uncertainty(data).round(2)  # 1 - (1/2 - 1/4), and 1 - 0
        array([0.75, 1.  ])
    """

    name: ClassVar[str] = "prob_margin"
    summary: ClassVar[str] = "one minus the gap between the two largest zero-shot probabilities"
    reference: ClassVar[str] = "Joshi et al., CVPR 2009"
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        rivals = batch.judged_rivals
        # ratio = p_(2) / p_(1) and odds = (1 - p_(1)) / p_(1). Therefore p_(1) = 1 / (1 + odds),
        # 1 - p_(1) = odds / (1 + odds) and p_(2) = ratio / (1 + odds).
        return (rivals.ratio + rivals.odds) / (1 + rivals.odds)


@dataclass
class Energy(FailurePredictor):
    """Free energy of the logits: u = -T log sum_j exp(l_j / T).

    u is between -max_j l_j - T log K and -max_j l_j.

    Args:
        temperature: T, the divisor of the logits. The logits already have the VLM's logit scale. As
            T goes to zero, the score becomes the score of ``max_logit``.

    Source: Liu et al., NeurIPS 2020.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.6, 0.8]]
        >>> text = np.eye(2)
        >>> data = vilu.Embeddings(image, text, logit_scale=10.0)
        >>> # the logits of the two rows are (10, 0) and (6, 8)
        >>> vilu.PREDICTORS["energy"]().predict_uncertainty(data).round(2)
        array([-10.  ,  -8.13])
    """

    name: ClassVar[str] = "energy"
    summary: ClassVar[str] = "negative log-sum-exp of the zero-shot logits (Liu et al. 2020)"
    reference: ClassVar[str] = "Liu et al., NeurIPS 2020"
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY
    depends_on_answer: ClassVar[bool] = False

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        rivals = RivalWeights.from_logits(batch.logits, temperature=self.temperature)
        # sum_j exp(l_j / T) = exp(answer_logit / T) * (1 + odds)
        return -(float64(rivals.answer_logit) + self.temperature * torch.log1p(rivals.odds))


@dataclass
class GEN(FailurePredictor):
    """Generalised entropy: u = sum_j p_j^gamma (1 - p_j)^gamma over the M largest p_j.

    With a small gamma, small probabilities count as well: 1e-20 to the power 0.1 is 0.01. Powers
    are computed from logarithms, so small probabilities do not underflow. If there are fewer than M
    candidates, the sum is over all candidates.

    Args:
        gamma: Exponent.
        largest: M, how many of the largest probabilities are in the sum.

    Source: Liu et al., CVPR 2023.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(4)[:3]
        >>> image = np.eye(4)[[0, 3]]  # image 0 is text 0, image 1 is orthogonal to all texts
        >>> data = vilu.Embeddings(image, text, logit_scale=np.log(2))
        >>> # p is 1/2, 1/4, 1/4 for the first image, and 1/3, 1/3, 1/3 for the second
        >>> method = vilu.PREDICTORS["gen"](gamma=0.5)
        >>> method.predict_uncertainty(data).round(2)  # sums of sqrt(p (1 - p))
        array([1.37, 1.41])
    """

    name: ClassVar[str] = "gen"
    summary: ClassVar[str] = (
        "generalised entropy of the largest zero-shot probabilities (Liu et al. 2023)"
    )
    reference: ClassVar[str] = "Liu et al., CVPR 2023"
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY
    depends_on_answer: ClassVar[bool] = False

    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    largest: Annotated[int, Field(ge=1)] = 100

    def _score(self, batch: Batch) -> Tensor:
        all_log_p = log_posterior(batch)
        n_largest = min(self.largest, all_log_p.shape[-1])
        log_p = all_log_p.topk(n_largest, dim=-1).values
        log_rest = torch.log(-torch.expm1(log_p))  # log(1 - p)
        terms = (self.gamma * (log_p + log_rest)).exp()
        return terms.sum(dim=-1)


@dataclass
class KLUniform(FailurePredictor):
    """Negative divergence of the uniform distribution from p: u = -KL(uniform || p), at most 0.

    u = log K + mean_j log p_j. All candidates have equal weights in the mean, and most candidates
    are unlikely. So u depends mostly on how far the unlikely candidates' logits are below the
    answer's logit. The score -KL(p || uniform) = H(p) - log K would order rows exactly as
    ``entropy`` does.

    Source: the confidence loss by Lee et al., ICLR 2018, as a score.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(3)
        >>> image = text[:1]  # p is 1/2, 1/4, 1/4
        >>> data = vilu.Embeddings(image, text, logit_scale=np.log(2))
        >>> method = vilu.PREDICTORS["kl_uniform"]()
        >>> method.predict_uncertainty(data).round(3)  # log 3 + (log 1/2 + 2 log 1/4) / 3
        array([-0.057])
    """

    name: ClassVar[str] = "kl_uniform"
    summary: ClassVar[str] = (
        "negative KL divergence of the uniform distribution from the zero-shot posterior"
    )
    reference: ClassVar[str] = "Lee et al., ICLR 2018"
    looks_at: ClassVar[frozenset[str]] = LOGITS_ONLY
    depends_on_answer: ClassVar[bool] = False

    graph = own_graph

    def _score(self, batch: Batch) -> Tensor:
        return log_posterior(batch).mean(dim=-1) + log_n_candidates(batch)


def entropy(batch: Batch) -> Tensor:
    """Compute the zero-shot posterior's entropy (B,) float64 in nats, without cancellation.

    Let l be the largest logit, e_j = exp(l_j - l) and Z = 1 + sum_j e_j. The entropy is
    log Z + sum_j e_j * (l - l_j) / Z. The sums are over all candidates except the likeliest
    candidate. No term is negative, so there is no cancellation.
    """
    rivals = batch.rivals
    odds = rivals.odds  # sum_j e_j
    # Let l' be the second-largest logit. Then logit_gap is l' - l, and weight_j is exp(l_j - l').
    # Therefore e_j = exp(logit_gap) * weight_j, and l_j - l = (l_j - l') + logit_gap. below_second
    # sums weight_j * (l_j - l').
    below_second = (rivals.logits - rivals.max_rival_logit).mul_(rivals.weight).sum(dim=1)
    logit_gap = rivals.logit_gap
    total = logit_gap.exp() * float64(below_second) + logit_gap * odds  # sum_j e_j * (l_j - l)
    return torch.log1p(odds) - total / (1 + odds)


def log_n_candidates(batch: Batch) -> Tensor:
    """Return log K as a float64 tensor of shape ().

    Tensor operations count the candidates, so that an exported graph works for any K.
    """
    one_per_candidate = batch.text.new_ones(batch.text.shape[-2])
    n_candidates = float64(one_per_candidate).sum()
    return n_candidates.log()
