"""Outcomes (answers and failures), their evaluation, and result tables."""
