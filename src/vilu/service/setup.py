"""What is served, and the engine that is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vilu.errors import StorageError
from vilu.service.limits import ClientLimits

if TYPE_CHECKING:
    from vilu.service.engine import Engine
    from vilu.service.kept import Keeps


@dataclass(frozen=True)
class Setup:
    """What is served, and how.

    Attributes:
        predictor: Folder of the predictor that answers at first.
        second: Folder of one that judges beside it.
        state: Folder that is kept through restarts.
        limits: What clients may do.
        keep: Folder for the images that were answered.
        models, device, batch_size, workers: As of ``Guard``.
    """

    predictor: Path
    second: Path | None
    state: Path
    limits: ClientLimits
    keep: Path | None
    models: Path | None = None
    device: str = "auto"
    batch_size: int = 32
    workers: int | None = None

    @property
    def predictors(self) -> dict[str, Path]:
        """The folders by name."""
        both = {"first": self.predictor, "second": self.second}
        return {name: folder for name, folder in both.items() if folder is not None}


def load_engine(setup: Setup, keeper: Keeps | None = None) -> Engine:
    """The engine of a service, which has answered about a picture of ours; with a keeper of its own, or a shared one.

    The keeper comes first: what does not verify is known before the model is loaded.
    """
    from vilu.guard.guard import Guard
    from vilu.service.engine import (
        Engine,
    )  # what they import takes seconds, in which the service is alive
    from vilu.service.keeper import Bookkeeper

    keeper = keeper or Bookkeeper(setup.state, setup.predictors)
    guard = Guard(
        setup.predictor,
        models=setup.models,
        device=setup.device,
        batch_size=setup.batch_size,
        workers=setup.workers,
    )
    content = BytesIO()
    Image.fromarray(np.full((64, 64, 3), 127, np.uint8)).save(content, "PNG")
    (said,) = guard([content.getvalue()])
    if said.label is None:
        raise StorageError(
            f"the model gives no answer about a grey picture ({said.reason}). Its weights are damaged."
        )
    return Engine(guard, keeper, setup.second)
