"""Test that a tower's last map is taken out only if it is linear and really the last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vilu.backbones.base import detach_projection

PROBE = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))


class Tower(nn.Module):
    """Apply tanh, then the map ``proj``, then perhaps one more function."""

    def __init__(self, proj: nn.Module | nn.Parameter, *, more: bool = False) -> None:
        super().__init__()
        self.proj, self.more = proj, more

    def forward(self, rows: Tensor) -> Tensor:
        rows = torch.tanh(rows)
        if isinstance(self.proj, nn.Module):
            rows = self.proj(rows)
        elif self.proj is not None:
            rows = rows @ self.proj
        return torch.sin(rows) if self.more else rows


class Model(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower


MAPS = {
    "matrix": lambda: nn.Parameter(torch.randn(6, 4)),
    "module": lambda: nn.Linear(6, 4, bias=False),
    "square": lambda: nn.Linear(6, 6, bias=False),
}


@pytest.mark.parametrize("kind", MAPS)
def test_the_tower_is_the_map_of_what_it_gives_afterwards(kind: str) -> None:
    torch.manual_seed(0)
    model = Model(Tower(MAPS[kind]())).requires_grad_(requires_grad=False)
    rows = torch.randn(5, 6)
    expected = model.tower(rows)
    weight = detach_projection(
        model, ["absent.proj", "tower.other", "tower.proj"], lambda: model.tower(PROBE)
    )
    assert weight is not None
    features = model.tower(rows)
    assert torch.equal(features, torch.tanh(rows))
    torch.testing.assert_close(features @ weight.T, expected)


@pytest.mark.parametrize(
    "tower",
    [
        Tower(nn.Linear(6, 4)),
        Tower(nn.Sequential(nn.Linear(6, 4, bias=False), nn.GELU())),
        Tower(nn.Linear(6, 4, bias=False), more=True),
        Tower(nn.Linear(6, 6, bias=False), more=True),
        Tower(nn.Parameter(torch.ones(6, 4)), more=True),
        Tower(nn.Parameter(torch.zeros(6, 4))),
        Tower(nn.Identity()),
    ],
    ids=[
        "bias",
        "sequence",
        "not last",
        "square, not last",
        "matrix, not last",
        "maps to nothing",
        "no map",
    ],
)
def test_what_is_no_linear_last_map_is_left_alone(tower: Tower) -> None:
    model = Model(tower).requires_grad_(requires_grad=False)
    expected, state = model.tower(PROBE), dict(model.state_dict())
    assert detach_projection(model, ["tower.proj"], lambda: model.tower(PROBE)) is None
    assert torch.equal(model.tower(PROBE), expected)
    assert model.state_dict().keys() == state.keys()
