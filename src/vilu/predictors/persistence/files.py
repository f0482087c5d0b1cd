"""Names of the files of a saved predictor."""

from __future__ import annotations

from typing import Final

PREDICTOR: Final = "predictor.json"
WEIGHTS: Final = "weights.safetensors"
CARD: Final = "README.md"

SAMPLE: Final = "sample.safetensors"
SAMPLE_KEY: Final = "vilu.sample"
"""The file of a sample of the images of the fit (``FitSample``), and the key of its metadata."""

RISK: Final = "risk.json"
ROWS: Final = "calibration.parquet"
LOOKS: Final = "looks.json"
"""The guarantee of a calibration, the rows of the calibration, and the count of looks at them."""

VOCABULARY: Final = "vocabulary.safetensors"
VOCABULARY_KEY: Final = "vilu.vocabulary"
"""The file of the candidate classes (``Vocabulary``), and the key of its metadata."""
