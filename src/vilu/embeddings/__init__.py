"""What predictors see: rows in memory, pairs in pools, some rows of a source, the space they live in."""
