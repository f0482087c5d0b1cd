"""Which candidates of a pool are right for which rows, where images or captions repeat."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matches:
    """Which candidates of a pool are right for its rows.

    A pool consists of M pairs of a query and a candidate. Several pairs may have the same query,
    and several may have the same candidate. A candidate is right for a query if one of the pairs
    has both. So if image A has the captions 1 and 2, and image B has the captions 2 and 3, caption
    2 is right for both images, and caption 3 is wrong for image A.

    Attributes:
        query: (M,) int64: for every pair, the first pair with the same query.
        candidate: (M,) int64: for every pair, the first pair with the same candidate.
        members: (K,) int64: for every candidate of the batch, its pair.
        own: (B,) int64: for every row of the batch, the first pair with its query.
    """

    query: Tensor
    candidate: Tensor
    members: Tensor
    own: Tensor

    def rows(self, part: slice | Tensor) -> Matches:
        """The matches of some rows of the batch."""
        return replace(self, own=self.own[part])

    def to(self, device: torch.device | str) -> Matches:
        """The same matches on another device."""
        return Matches(
            query=self.query.to(device),
            candidate=self.candidate.to(device),
            members=self.members.to(device),
            own=self.own.to(device),
        )

    def are_right(self, answer: Tensor) -> Tensor:
        """Mask (B,): whether the answer (B,) of every row is right. Nothing holds B x K numbers."""
        # the query and the candidate of a pair as one number
        n_pairs = len(self.query)
        pairs = self.query * n_pairs + self.candidate
        answered = self.own * n_pairs + self.candidate[self.members[answer]]
        return torch.isin(answered, pairs)

    def right(self) -> Tensor:
        """Mask (B, K) of the right candidates of every row."""
        has_query = self.query == self.own[:, None]
        is_right = _in_same_group(has_query, self.candidate)
        return is_right[:, self.members]

    def alike(self, answer: Tensor) -> Tensor:
        """Mask (B, K): whether any query has both the candidate and the answer (B,) of the row."""
        answered = self.candidate[self.members[answer]]
        has_answer = self.candidate == answered[:, None]
        shares_query = _in_same_group(has_answer, self.query)
        is_alike = _in_same_group(shares_query, self.candidate)
        return is_alike[:, self.members]


def _in_same_group(is_chosen: Tensor, group: Tensor) -> Tensor:
    """Mask (B, M) of the pairs that are in one group with a chosen pair.

    ``is_chosen`` (B, M) is the mask of the chosen pairs, and ``group`` (M,) the group of each pair:
    the index of the first pair of the group.
    """
    row, pair = is_chosen.nonzero(as_tuple=True)
    is_group_chosen = torch.zeros_like(is_chosen)
    is_group_chosen[row, group[pair]] = True
    return is_group_chosen[:, group]
