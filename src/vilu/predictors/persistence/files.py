"""Names of the files of a saved predictor, and models that have such files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Final

# Files of every saved predictor.
PREDICTOR: Final = "predictor.json"
WEIGHTS: Final = "weights.safetensors"
CARD: Final = "README.md"

# Optional files, each with the key of its metadata if it has one.

SAMPLE: Final = "sample.safetensors"
SAMPLE_KEY: Final = "vilu.sample"
"""The file of a sample of the images of the fit (``FitSample``), and the key of its metadata."""

RISK: Final = "risk.json"
ROWS: Final = "calibration.parquet"
LOOKS: Final = "looks.json"
"""The guarantee of a calibration, the rows of the calibration, and the count of looks at them."""

LIKELY: Final = "likely.json"
"""The estimate of which answers are likely right (``vilu.calibration.likely``)."""

VOCABULARY: Final = "vocabulary.safetensors"
VOCABULARY_KEY: Final = "vilu.vocabulary"
"""The file of the candidate classes (``Vocabulary``), and the key of its metadata."""


class SavedModel(ABC):
    """A model that can be given in place of the folder in which it would be saved.

    It is the base of ``vilu.Selective``, for modules that ``vilu.Selective`` imports, and which
    therefore cannot import ``vilu.Selective``.
    """

    how: ClassVar[str] = "a vilu.Selective"

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Folder with the files of the model, which is removed together with the object."""


def folder_of(model: str | os.PathLike[str] | SavedModel) -> Path:
    """The folder of a model, which is given by its path or as an object."""
    if isinstance(model, SavedModel):
        return model.folder
    return Path(model)
