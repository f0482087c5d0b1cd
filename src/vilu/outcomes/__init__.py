"""Outcomes (answers and failures), the evaluation of outcomes, and tables of results."""
