"""Scores of data of any size: written part by part, evaluated from counts."""

from vilu.scores.folder import ScoreFolder
from vilu.scores.write import score_parts

__all__ = ["ScoreFolder", "score_parts"]
