"""Outcomes (answers and whether they are wrong), their evaluation, and tables of results."""
