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
    from vilu.service.journals import Journals


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
        folders = {"first": self.predictor}
        if self.second is not None:
            folders["second"] = self.second
        return folders


def load_engine(setup: Setup, journals: Journals | None = None) -> Engine:
    """The engine of a service, which has answered about a picture of ours.

    Args:
        setup: What is served.
        journals: Those that replicas share; None: the engine has its own.

    Raises:
        ViLUError: If a rule does not verify, or the model is another than the predictor's.
    """
    # late: these imports take seconds, in which the service answers already that it is alive
    from vilu.guard.guard import Guard
    from vilu.service.engine import Engine
    from vilu.service.local_journals import LocalJournals

    if journals is None:  # before the model, so that a rule that does not verify is known at once
        journals = LocalJournals(setup.state, setup.predictors)
    guard = Guard(
        setup.predictor,
        models=setup.models,
        device=setup.device,
        batch_size=setup.batch_size,
        workers=setup.workers,
    )
    (answer,) = guard([_grey_picture()])
    if answer.label is None:
        raise StorageError(
            f"the model gives no answer about a grey picture ({answer.reason}). Its weights are "
            "damaged."
        )
    return Engine(guard, journals, setup.second)


def _grey_picture() -> bytes:
    content = BytesIO()
    Image.fromarray(np.full((64, 64, 3), 127, np.uint8)).save(content, "PNG")
    return content.getvalue()
