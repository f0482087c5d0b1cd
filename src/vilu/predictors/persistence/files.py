"""File names in a saved predictor's folder, and models with such files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Final

# Files that every saved predictor has.
PREDICTOR: Final = "predictor.json"
WEIGHTS: Final = "weights.safetensors"
CARD: Final = "README.md"

# Optional files. Some files have metadata. The metadata's key follows the file name.

SAMPLE: Final = "sample.safetensors"
SAMPLE_KEY: Final = "vilu.sample"
"""Metadata key in the file above, a sample of the fit's images (``FitSample``)."""

RISK: Final = "risk.json"
"""The file with a calibration's guarantee."""
ROWS: Final = "calibration.parquet"
"""The file with the calibration rows."""
LOOKS: Final = "looks.json"
"""The file with the targets of all calibrations on these rows (``vilu.calibration.looks``)."""

LIKELY: Final = "likely.json"
"""The file with the estimate for the likely right answers (``vilu.calibration.likely``)."""

VOCABULARY: Final = "vocabulary.safetensors"
VOCABULARY_KEY: Final = "vilu.vocabulary"
"""Metadata key in the file above, the candidate classes (``Vocabulary``)."""


class SavedModel(ABC):
    """A model accepted in place of a path to a saved folder.

    ``vilu.Selective`` is derived from this class. Modules imported by ``vilu.Selective`` use this
    class, because these modules cannot import ``vilu.Selective`` itself.
    """

    # phrase for messages about a wrong argument: how to get such a model
    how_to_make: ClassVar[str] = "a vilu.Selective"

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Folder with the model's files. The folder is removed together with the object."""


def folder_of(model: str | os.PathLike[str] | SavedModel) -> Path:
    """Return a model's folder. The model is given as a path or as an object."""
    if isinstance(model, SavedModel):
        return model.folder
    return Path(model)
