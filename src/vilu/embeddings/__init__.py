"""Input of predictors: rows in memory, pairs in pools, rows of a source, and the space."""
