"""Input for predictors: rows in memory, pairs in pools, selected rows, and embedding spaces."""
