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

# Optional files. Some have metadata, whose key follows the name of the file.

SAMPLE: Final = "sample.safetensors"
SAMPLE_KEY: Final = "vilu.sample"
"""The file of a sample of the images of the fit (``FitSample``), and the key of its metadata."""

RISK: Final = "risk.json"
"""The file with the guarantee of a calibration."""
ROWS: Final = "calibration.parquet"
"""The file with the rows of the calibration."""
LOOKS: Final = "looks.json"
"""The file with the targets of all calibrations on these rows (``vilu.calibration.looks``)."""

LIKELY: Final = "likely.json"
"""The file with the estimate of which answers are likely right (``vilu.calibration.likely``)."""

VOCABULARY: Final = "vocabulary.safetensors"
VOCABULARY_KEY: Final = "vilu.vocabulary"
"""The file of the candidate classes (``Vocabulary``), and the key of its metadata."""


class SavedModel(ABC):
    """A model that can be given in place of the folder in which it would be saved.

    ``vilu.Selective`` is derived from this class. Modules that ``vilu.Selective`` imports use this
    class, because they cannot import ``vilu.Selective`` itself.
    """

    # phrase for messages about a wrong argument: how to get such a model
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
