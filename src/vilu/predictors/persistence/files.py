"""The files of a saved predictor, by their names."""

from __future__ import annotations

from typing import Final

PREDICTOR: Final = "predictor.json"
WEIGHTS: Final = "weights.safetensors"
CARD: Final = "README.md"

SAMPLE: Final = "sample.safetensors"
SAMPLE_KEY: Final = "vilu.sample"
"""A sample of the images of the fit (``FitSample``), and the key of what it says of itself."""

RISK: Final = "risk.json"
ROWS: Final = "calibration.parquet"
LOOKS: Final = "looks.json"
"""The guarantee of a calibration, the rows that it was made from, and how often one looked."""

VOCABULARY: Final = "vocabulary.safetensors"
VOCABULARY_KEY: Final = "vilu.vocabulary"
"""What answers are chosen from (``Vocabulary``), and the key of what the file says of itself."""
