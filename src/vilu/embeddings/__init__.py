"""What predictors see: rows in memory, pairs in pools, rows of a source, and their space."""
