"""A service's settings, and a function that loads the service's engine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from vilu.datasets.images import ImageLimits
from vilu.errors import StorageError, UsageError
from vilu.service.limits import ClientLimits

if TYPE_CHECKING:
    from vilu.service.engine import Engine
    from vilu.service.journals import Journals


@dataclass(frozen=True)
class Setup:
    """Settings of a service.

    Attributes:
        predictor: Folder of the predictor that answers at first.
        second: Folder of a second predictor for the same images. If None, only the first predictor
            is served.
        state: Folder for the journals, kept between restarts.
        limits: Limits for clients.
        keep: Folder for the answered images. If None, no image is kept.
        models, device, batch_size, workers, precision: As in ``Guard``.
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
    precision: Literal["fp32", "bf16"] | None = None

    @property
    def predictors(self) -> dict[str, Path]:
        """The predictors' folders, under the keys "first" and perhaps "second"."""
        folders = {"first": self.predictor}
        if self.second is not None:
            folders["second"] = self.second
        return folders


def load_engine(setup: Setup, journals: Journals | None = None) -> Engine:
    """Load a service's engine. A model for images is tested with a grey picture.

    Args:
        setup: The service's settings.
        journals: Journals shared by replicas. If None, the journals in ``setup.state`` are opened.

    Raises:
        ViLUError: If a rule cannot be verified, or if the predictor was fitted on another model.
    """
    from vilu.service.local_journals import LocalJournals

    if journals is not None:
        return _load_engine_with(journals, setup)
    # The journals are opened before the model is loaded. Opening them verifies the rules, so an
    # invalid rule is reported at once.
    local_journals = LocalJournals(setup.state, setup.predictors)
    with ExitStack() as on_failure:
        on_failure.callback(local_journals.close_without_saving)
        engine = _load_engine_with(local_journals, setup)
        on_failure.pop_all()  # success: keep the journals open
    return engine


def _load_engine_with(journals: Journals, setup: Setup) -> Engine:
    """Load the engine with these journals."""
    # These imports take seconds. Meanwhile the service already answers /healthz.
    from vilu.guard.guard import Guard
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.service.engine import Engine

    if load_predictor(setup.predictor).takes == "answers":
        return _table_engine(setup, journals)
    guard = Guard(
        setup.predictor,
        models=setup.models,
        device=setup.device,
        batch_size=setup.batch_size,
        workers=setup.workers,
        limits=ImageLimits(max_pixels=setup.limits.max_pixels),
        precision=setup.precision,
    )
    if guard.model.first_photos is not None:
        # The guard compares the first photos in low precision with float32. Too large differences
        # would raise an error. But clients choose the photos, and no client must be able to stop
        # the service. So this guard only logs a warning.
        guard.model.first_photos.must_pass = False
    (answer,) = guard([_grey_picture()])
    if answer.label is None:
        raise StorageError(
            f"the model gives no answer about a grey picture ({answer.reason}). Its weights are "
            "damaged."
        )
    return Engine(guard, journals, setup.second)


def _table_engine(setup: Setup, journals: Journals) -> Engine:
    """Return a table predictor's engine. Raise UsageError if a setting for images was given."""
    from vilu.service.tables import TableEngine, TableGuard

    for name in ("second", "keep", "models", "precision"):
        if getattr(setup, name) is not None:
            raise UsageError(
                f"{setup.predictor} judges tables of answers, and --{name} is for images. Leave it "
                "out."
            )
    guard = TableGuard(setup.predictor)
    return TableEngine(guard, journals)


def _grey_picture() -> bytes:
    """Return a grey picture as PNG, to test the model with."""
    content = BytesIO()
    pixels = np.full((64, 64, 3), 127, np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(content, "PNG")
    return content.getvalue()
