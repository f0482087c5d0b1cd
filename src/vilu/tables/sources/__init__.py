"""Answer tables from other programs: language models, detectors, Tesseract, logits."""

from vilu.tables.sources.boxes import Box
from vilu.tables.sources.completions import completion_answers
from vilu.tables.sources.converted import Converted
from vilu.tables.sources.detections import detection_answers
from vilu.tables.sources.logits import logit_answers
from vilu.tables.sources.words import Word, word_answers

__all__ = [
    "Box",
    "Converted",
    "Word",
    "completion_answers",
    "detection_answers",
    "logit_answers",
    "word_answers",
]
