"""``--plugin tests.faults.plugin`` registers a model that loads at once, under the name
``fake``.
"""

from __future__ import annotations

import torch

from tests.builders.store_fakes import FakeBackbone
from vilu.backbones.catalog import BackboneKind, add_backbone


def load_fake(argument: str, device: torch.device, precision: str) -> FakeBackbone:
    return FakeBackbone()


add_backbone(BackboneKind("fake", f"{__name__}:load_fake", "fake, a random projection", "none"))
